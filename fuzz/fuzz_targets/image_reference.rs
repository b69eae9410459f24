//! A reference that is accepted has one full form, which means the same.
#![no_main]

use funtainer_model::ImageRef;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    if let Ok(image) = text.parse::<ImageRef>() {
        assert_eq!(image.to_string().parse::<ImageRef>().unwrap(), image);
        assert!(!image.repository().starts_with('/') && !image.repository().contains(".."));
        assert!(image.tag().is_some() || image.digest().is_some());
    }
});

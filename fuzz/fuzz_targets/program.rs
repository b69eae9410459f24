//! Whatever a program of an image begins with, its interpreter is a part of it, or there is none.
#![no_main]

use funtainer_contract::program::interpreter;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|head: &[u8]| {
    if let Some(path) = interpreter(head) {
        assert!(!path.is_empty() && !path.contains('\0'));
        assert!(head.windows(path.len()).any(|window| window == path.as_bytes()));
    }
});

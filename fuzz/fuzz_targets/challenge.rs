//! The `WWW-Authenticate` header of a registry.
#![no_main]

use funtainer_image::client::Challenge;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|text: &str| {
    let _ = Challenge::find_bearer(text.lines());
});

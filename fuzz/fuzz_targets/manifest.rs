//! What a registry sends for a manifest, an index or a configuration: what is accepted is within the limits.
#![no_main]

use funtainer_image::manifest::{
    CONFIG_BYTES_MAX, Document, INDEX_ENTRIES_MAX, LAYER_BYTES_MAX, LAYERS_MAX, MANIFEST_BYTES_MAX, Platform, parse_config,
};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|bytes: &[u8]| {
    let platform = Platform::native();
    match Document::parse(bytes, None) {
        Ok(Document::Manifest(manifest)) => {
            assert!((1..=LAYERS_MAX).contains(&manifest.layers.len()));
            assert!(manifest.config.size <= CONFIG_BYTES_MAX);
            assert!(manifest.layers.iter().all(|layer| layer.size <= LAYER_BYTES_MAX));
        }
        Ok(Document::Index(index)) => {
            assert!(index.entries.len() <= INDEX_ENTRIES_MAX);
            assert!(index.entries.iter().all(|entry| entry.descriptor.size <= MANIFEST_BYTES_MAX));
            let _ = index.choose(&platform);
        }
        Err(error) => assert!(!error.failure("image").detail.is_empty()),
    }
    if let Ok(parsed) = parse_config(bytes, &platform) {
        assert!(parsed.diff_ids.len() <= LAYERS_MAX);
        let words = parsed.config.entrypoint.iter().chain(&parsed.config.cmd);
        assert!(!words.chain([&parsed.config.user, &parsed.config.working_dir]).any(|word| word.contains('\0')));
    }
});

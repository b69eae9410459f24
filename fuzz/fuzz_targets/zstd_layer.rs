//! Any blob that calls itself a layer in zstd is refused or becomes a layer, in bounded memory.
#![no_main]

use funtainer_image::layer::{Compression, LayerBlob, write};
use funtainer_model::{Digest, LayerId};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    // No digest is right: what counts is the way to the end.
    let digest = Digest::from_sha256([0; 32]);
    let blob = LayerBlob { digest, size: data.len() as u64, compression: Compression::Zstd };
    let out = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap();
    write(data, &blob, LayerId { diff_id: digest, base: true }, &out).unwrap_err();
});

//! Writes a layer's blob as an erofs file, and says how long that took: `write_layer BLOB OUT [RUNS]`.

use std::fs::File;
use std::io::{BufRead, BufReader, Read};
use std::time::Instant;

use flate2::bufread::MultiGzDecoder;
use funtainer_image::layer::{self, Compression, LayerBlob};
use funtainer_model::{Digest, LayerId};
use sha2::{Digest as _, Sha256};

fn main() {
    let mut arguments = std::env::args().skip(1);
    let (Some(blob), Some(out)) = (arguments.next(), arguments.next()) else {
        eprintln!("usage: write_layer BLOB OUT [RUNS]");
        std::process::exit(2);
    };
    let runs = arguments.next().map_or(1, |runs| runs.parse().expect("RUNS is a number"));
    let open = || BufReader::new(File::open(&blob).expect("the blob can be opened"));
    let compression = match open().fill_buf().expect("the blob can be read") {
        [0x1f, 0x8b, ..] => Compression::Gzip,
        [0x28, 0xb5, 0x2f, 0xfd, ..] => Compression::Zstd,
        _ => Compression::None,
    };
    let (digest, size) = sha256(open());
    let (diff_id, _) = match compression {
        Compression::None => (digest, size),
        Compression::Gzip => sha256(MultiGzDecoder::new(open())),
        Compression::Zstd => sha256(ruzstd::decoding::StreamingDecoder::new(open()).expect("the blob is a zstd frame")),
    };
    let meta = LayerBlob { digest, size, compression };
    let layer = LayerId { diff_id, base: true };
    for _ in 0..runs {
        let file = File::create(&out).expect("the layer's file can be made");
        let start = Instant::now();
        let source = File::open(&blob).expect("the blob can be opened");
        let summary = layer::write(source, &meta, layer, &file).expect("the blob is a layer");
        let seconds = start.elapsed().as_secs_f64();
        let rate = summary.tar_bytes as f64 / 1e6 / seconds;
        println!("{seconds:.3} s, {rate:.0} MB/s of tar, {} entries, {} bytes", summary.entries, summary.image_bytes);
    }
}

/// Digest and length of a stream.
fn sha256(mut stream: impl Read) -> (Digest, u64) {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut length = 0;
    loop {
        let read = stream.read(&mut buffer).expect("the blob can be read");
        if read == 0 {
            return (Digest::from_sha256(hash.finalize().into()), length);
        }
        hash.update(&buffer[..read]);
        length += read as u64;
    }
}

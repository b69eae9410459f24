//! Writes a layer's blob as an erofs file, and says how long that took: `write_layer BLOB OUT [RUNS]`.

use std::fs::{self, File};
use std::io::{BufReader, Read};
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
    let bytes = fs::read(&blob).expect("the blob can be read");
    let compression = if bytes.starts_with(&[0x1f, 0x8b]) { Compression::Gzip } else { Compression::None };
    let mut tar = Vec::new();
    match compression {
        Compression::Gzip => MultiGzDecoder::new(bytes.as_slice()).read_to_end(&mut tar).expect("the blob is gzip"),
        Compression::None => BufReader::new(bytes.as_slice()).read_to_end(&mut tar).expect("memory can be read"),
    };
    let meta = LayerBlob { digest: sha256(&bytes), size: bytes.len() as u64, compression };
    let layer = LayerId { diff_id: sha256(&tar), base: true };
    drop(tar);
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

fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

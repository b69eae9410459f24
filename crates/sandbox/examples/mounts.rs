//! What the newest and the oldest ways to mount layers and stack them cost, in µs.
//!
//! `cargo run --release -p funtainer-sandbox --example mounts [DIRECTORY]`; needs root, erofs-utils, and a directory on a disk (default
//! /var/tmp). Rounds of both ways alternate. What a start pays is the last two rows: the writable part with the overlay, and their end.

use std::fs::{self, File};
use std::os::fd::{AsFd as _, BorrowedFd};
use std::path::PathBuf;
use std::process::{Command, Stdio};
use std::time::Instant;

use funtainer_sandbox::mount::{Features, Mounts};
use funtainer_sandbox::userns;

/// Rounds of each way.
const ROUNDS: usize = 300;
/// Host ids of the trial's namespace: apart from those of functions.
const BASE: u32 = 0x6FFB_0000;
/// Room of a writable part.
const WRITABLE_BYTES: u64 = 64 << 20;
/// Layers of an overlay.
const LAYERS: usize = 4;

/// Steps of a round, in order.
const STEPS: [&str; 4] = [
    "a layer mounted (once per layer)",
    "its ids mapped (once per function and layer)",
    "writable part and overlay of four layers",
    "these released (after the end)",
];

fn main() {
    let place = std::env::args_os().nth(1).map_or_else(|| PathBuf::from("/var/tmp"), PathBuf::from);
    let directory = place.join(format!("funtainer-mounts-{}", std::process::id()));
    fs::create_dir_all(directory.join("root/etc")).expect("make a directory");
    fs::write(directory.join("root/etc/motd"), "hello\n").expect("write a file");
    let image = directory.join("image");
    let made = Command::new("mkfs.erofs").arg(&image).arg(directory.join("root")).stdout(Stdio::null()).status();
    assert!(made.expect("erofs-utils is installed").success());
    // An overlay takes no layer twice.
    let files: Vec<File> = (0..LAYERS)
        .map(|number| {
            let copy = directory.join(number.to_string());
            fs::copy(&image, &copy).expect("copy the image");
            File::open(copy).expect("open the image")
        })
        .collect();
    let ids = userns::make(BASE).expect("a user namespace");
    let newest = Mounts::probe(File::open(&directory).expect("open the directory").as_fd(), Features::NEWEST);
    let newest = newest.unwrap_or_else(|missing| panic!("{}: {}", missing.feature, missing.reason));
    let oldest = Mounts::open(Features::OLDEST).expect("the oldest ways");

    let mut rows = [[const { Vec::new() }; STEPS.len()], [const { Vec::new() }; STEPS.len()]];
    for _ in 0..ROUNDS {
        for (rows, mounts) in rows.iter_mut().zip([&newest, &oldest]) {
            for (row, time) in rows.iter_mut().zip(round(mounts, &files, ids.as_fd())) {
                row.push(time);
            }
        }
    }
    println!("| step | {:?} p50, p95 | {:?} p50, p95 |\n|---|---|---|", newest.features(), oldest.features());
    let [newest, oldest] = &mut rows;
    for ((name, newest), oldest) in STEPS.iter().zip(newest).zip(oldest) {
        println!("| {name} | {} | {} |", figures(newest), figures(oldest));
    }
    fs::remove_dir_all(directory).expect("remove the directory");
}

fn figures(row: &mut [f64]) -> String {
    row.sort_by(f64::total_cmp);
    let at = |part: usize| row[(row.len() - 1) * part / 100];
    format!("{:.0}, {:.0}", at(50), at(95))
}

/// Microseconds that `step` takes.
fn timed<T>(step: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let value = step();
    (start.elapsed().as_secs_f64() * 1e6, value)
}

/// From the files of images to a root file system, and its end.
fn round(mounts: &Mounts, files: &[File], ids: BorrowedFd<'_>) -> [f64; STEPS.len()] {
    let (mut mounting, mut mapping) = (Vec::new(), Vec::new());
    let mut layers = Vec::new();
    for file in files {
        let (time, layer) = timed(|| mounts.layer(file.as_fd()).expect("mount the layer"));
        mounting.push(time);
        let (time, mapped) = timed(|| mounts.idmapped(&layer, ids).expect("map the ids"));
        mapping.push(time);
        layers.push((layer, mapped));
    }
    let (layers, mapped): (Vec<_>, Vec<_>) = layers.into_iter().unzip();
    let (stacking, root) = timed(|| {
        let writable = mounts.writable(WRITABLE_BYTES, BASE).expect("make the writable part");
        let root = mounts.overlay(&mapped, &writable).expect("make the overlay");
        (root, writable)
    });
    let (releasing, ()) = timed(|| drop(root));
    drop((mapped, layers));
    let mean = |times: Vec<f64>| times.iter().sum::<f64>() / times.len() as f64;
    [mean(mounting), mean(mapping), stacking, releasing]
}

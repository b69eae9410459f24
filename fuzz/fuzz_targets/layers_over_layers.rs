//! Any layer over any other is left as it is, refused, or gets another form that the reader can walk in full.
//!
//! The input is two archives of one length, the lower one first; checksums are made right, so that the fuzzer gets behind them.
#![no_main]

use funtainer_image::erofs::{InodeKind, Reader, WriteOptions, derive, write};
use funtainer_image::rootfs::Rootfs;
use funtainer_image::tar;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let (lower, upper) = data.split_at(data.len() / 1024 * 512);
    let (Some(lower), Some(upper)) = (layer(lower, true), layer(upper, false)) else { return };
    let upper = Reader::new(upper).unwrap();
    let below = Rootfs::new(vec![lower]).unwrap();
    let out = file();
    if !derive(&upper, &below, &out).unwrap_or(false) {
        return;
    }
    let reader = Reader::new(out).unwrap();
    assert!(!reader.superblock().implied);
    let mut inodes = std::collections::HashSet::new();
    let mut pending = vec![reader.root().unwrap()];
    while let Some(inode) = pending.pop() {
        if inodes.insert(inode.nid) && inode.kind == InodeKind::Directory {
            assert!(!reader.is_implied(&inode).unwrap());
            pending.extend(reader.entries(&inode).unwrap().iter().map(|entry| reader.inode(entry.nid).unwrap()));
        }
    }
});

fn layer(archive: &[u8], base: bool) -> Option<std::fs::File> {
    let mut archive = archive.to_vec();
    archive.chunks_exact_mut(512).for_each(seal);
    let out = file();
    write(&mut tar::Reader::new(archive.as_slice()), &out, WriteOptions { base }).ok()?;
    Some(out)
}

fn file() -> std::fs::File {
    tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap()
}

/// Makes the checksum of a block right, where it could be a header at all.
fn seal(block: &mut [u8]) {
    if block.iter().all(|byte| *byte == 0) {
        return;
    }
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

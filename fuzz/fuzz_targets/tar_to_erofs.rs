//! Any archive is refused or becomes a layer that the reader can walk in full.
//!
//! Checksums are made right first, so that the fuzzer gets behind them; a first byte of 1 turns that off.
#![no_main]

use funtainer_image::erofs::{InodeKind, Reader, WriteOptions, write};
use funtainer_image::tar;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|data: &[u8]| {
    let Some((first, archive)) = data.split_first() else { return };
    let mut archive = archive.to_vec();
    if first & 1 == 0 {
        archive.chunks_exact_mut(512).for_each(seal);
    }
    let file = tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap();
    let options = WriteOptions { base: first & 2 != 0 };
    // Small reads, so that every boundary is met.
    let input = std::io::BufReader::with_capacity(usize::from(first >> 2) + 1, archive.as_slice());
    let Ok(summary) = write(&mut tar::Reader::new(input), &file, options) else { return };
    let reader = Reader::new(file).unwrap();
    let mut inodes = std::collections::HashSet::new();
    let mut pending = vec![reader.root().unwrap()];
    while let Some(inode) = pending.pop() {
        if !inodes.insert(inode.nid) {
            continue;
        }
        for xattr in reader.xattrs(&inode).unwrap() {
            let name = String::from_utf8_lossy(&xattr.name).into_owned();
            let ours = ["opaque", "origin"].iter().any(|mark| name.ends_with(mark));
            assert!(!name.contains(".overlay.") || ours, "{name}");
        }
        match inode.kind {
            InodeKind::Directory => {
                for entry in reader.entries(&inode).unwrap() {
                    assert_eq!(reader.lookup(&inode, &entry.name).unwrap(), Some(entry.nid));
                    pending.push(reader.inode(entry.nid).unwrap());
                }
            }
            InodeKind::Symlink => drop(reader.read_link(&inode).unwrap()),
            InodeKind::File => {
                let mut buffer = [0; 8_192];
                reader.read_at(&inode, &mut buffer, 0).unwrap();
                reader.read_at(&inode, &mut buffer, inode.size.saturating_sub(5_000)).unwrap();
            }
            _ => {}
        }
    }
    assert_eq!(inodes.len() as u64, summary.inodes);
});

/// Makes the checksum of a block right, where it could be a header at all.
fn seal(block: &mut [u8]) {
    if block.iter().all(|byte| *byte == 0) {
        return;
    }
    block[148..156].fill(b' ');
    let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
    block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
}

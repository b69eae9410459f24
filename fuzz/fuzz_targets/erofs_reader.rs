//! Any bytes behind a good superblock are walked without a panic, an endless loop or a large allocation.
#![no_main]

use std::os::unix::fs::FileExt;

use funtainer_image::erofs::{InodeKind, Reader, WriteOptions, write};
use funtainer_image::rootfs::Rootfs;
use funtainer_image::tar;
use libfuzzer_sys::fuzz_target;

/// Inodes that one walk visits.
const VISITS_MAX: usize = 500;

fuzz_target!(|data: &[u8]| {
    // A layer of our own, whose metadata is overwritten from its start on. Its superblock holds for the same size.
    let new_file = || tempfile::tempfile_in("/dev/shm").or_else(|_| tempfile::tempfile()).unwrap();
    let file = new_file();
    let summary = write(&mut tar::Reader::new(&ARCHIVE[..]), &file, WriteOptions::default()).unwrap();
    let room = (summary.image_bytes - summary.metadata_offset) as usize;
    let data = &data[..data.len().min(room)];
    file.write_all_at(data, summary.metadata_offset).unwrap();
    walk(&Reader::new(file.try_clone().unwrap()).unwrap());
    let below = new_file();
    write(&mut tar::Reader::new(&ARCHIVE[..]), &below, WriteOptions { base: true }).unwrap();
    let rootfs = Rootfs::new(vec![below, file]).unwrap();
    for path in ["/", "a", "/a/b", "l/x", "../..//a/."] {
        let _ = rootfs.stat(path);
        let _ = rootfs.symlink_stat(path);
        let _ = rootfs.read_file(path, 10_000);
        let _ = rootfs.read_link(path);
        let _ = rootfs.list(path);
    }
});

fn walk(reader: &Reader) {
    let Ok(root) = reader.root() else { return };
    let mut pending = vec![root];
    for _ in 0..VISITS_MAX {
        let Some(inode) = pending.pop() else { return };
        let mut buffer = [0; 8_192];
        let _ = reader.xattrs(&inode);
        let _ = reader.read_at(&inode, &mut buffer, 0);
        let _ = reader.read_at(&inode, &mut buffer, inode.size / 2);
        let _ = reader.read_link(&inode);
        if inode.kind == InodeKind::Directory {
            let _ = reader.lookup(&inode, b"a");
            let entries = reader.entries(&inode).unwrap_or_default();
            pending.extend(entries.iter().take(VISITS_MAX).filter_map(|entry| reader.inode(entry.nid).ok()));
        }
    }
}

/// An archive of no entries is a layer of one inode, in one block of metadata.
static ARCHIVE: [u8; 1024] = [0; 1024];

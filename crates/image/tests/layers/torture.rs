//! A tree with all that file systems allow, through GNU tar in each of its formats: the layer must be what GNU tar
//! unpacks, and what the kernel mounts must be the layer.

use std::ffi::OsStr;
use std::fs::{self, File};
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, PermissionsExt, chown, lchown, symlink};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::fs::{AtFlags, CWD, FileType, Mode, Timespec, Timestamps, XattrFlags, lsetxattr, makedev, mknodat, utimensat};

use crate::make::{Layer, need_root, scratch};
use crate::mounted::Mount;
use crate::{snapshot, unpack};

/// Options with which GNU tar stores all that it can.
const XATTRS: &[&str] = &["--format=posix", "--sparse", "--xattrs", "--xattrs-include=*"];

#[test]
fn gnu_format() {
    need_root();
    // GNU tar stores extended attributes in PAX records only.
    Torture::new().check(&["--format=gnu", "--sparse"]);
}

#[test]
fn posix_format_with_sparse_1_0() {
    need_root();
    Torture::new().with_xattrs().check(&[&["--sparse-version=1.0"], XATTRS].concat());
}

#[test]
fn posix_format_with_sparse_0_1() {
    need_root();
    Torture::new().with_xattrs().check(&[&["--sparse-version=0.1"], XATTRS].concat());
}

#[test]
fn posix_format_with_sparse_0_0() {
    need_root();
    Torture::new().with_xattrs().check(&[&["--sparse-version=0.0"], XATTRS].concat());
}

#[test]
fn ustar_format() {
    need_root();
    Torture::small().check(&["--format=ustar"]);
}

#[test]
fn v7_format() {
    need_root();
    let tree = Torture::small();
    for node in ["fifo", "tty", "disk"] {
        fs::remove_file(tree.root.join(node)).unwrap();
    }
    fs::remove_file(tree.root.join("fifo-again")).unwrap();
    tree.check(&["--format=v7"]);
}

#[test]
fn a_sparse_file_of_5_gib_stays_sparse() {
    need_root();
    let scratch = scratch();
    let root = scratch.path().join("root");
    fs::create_dir(&root).unwrap();
    let file = File::create(root.join("large")).unwrap();
    let size = 5 << 30;
    file.set_len(size).unwrap();
    file.write_all_at(b"start of the middle", 3 << 30).unwrap();
    file.write_all_at(b"end", size - 3).unwrap();
    let archive = tar(&root, &["--format=posix", "--sparse"]);
    assert!(archive.len() < 1 << 20, "GNU tar found the holes");
    let layer = Layer::write(&archive, true);
    let meta = fs::metadata(layer.path()).unwrap();
    assert!(meta.len() > size, "holes count for the size");
    assert!(std::os::unix::fs::MetadataExt::blocks(&meta) * 512 < 1 << 20, "holes take no room");
    let reader = layer.reader();
    let nid = reader.lookup(&reader.root().unwrap(), b"large").unwrap().unwrap();
    let inode = reader.inode(nid).unwrap();
    let check = |offset, expect: &[u8]| {
        let mut buffer = vec![1; expect.len()];
        reader.read_at(&inode, &mut buffer, offset).unwrap();
        assert_eq!(buffer, expect, "at {offset}");
    };
    check(0, &[0; 4096]);
    check((3 << 30) - 4, b"\0\0\0\0start of the middle");
    check(size - 4, b"\0end");
    // Unpacked too, where nothing else keeps a small image from filling the disk.
    let unpacked = unpack::Unpacked::of(&layer).unwrap();
    let meta = fs::metadata(unpacked.path().join("large")).unwrap();
    assert_eq!(meta.len(), size);
    assert!(std::os::unix::fs::MetadataExt::blocks(&meta) * 512 < 1 << 20, "holes take no room");
}

/// A tree on the disk.
struct Torture {
    scratch: tempfile::TempDir,
    root: PathBuf,
}

impl Torture {
    fn new() -> Self {
        let tree = Self::small();
        tree.names();
        tree.sparse_files();
        tree.attributes();
        tree
    }

    /// What the oldest formats can store.
    fn small() -> Self {
        let scratch = scratch();
        let root = scratch.path().join("root");
        fs::create_dir(&root).unwrap();
        let tree = Self { scratch, root };
        tree.sizes();
        tree.modes();
        tree.nodes();
        tree
    }

    /// Packs, unpacks, writes, mounts and compares.
    fn check(&self, options: &[&str]) {
        let archive = tar(&self.root, options);
        let unpacked = self.scratch.path().join("unpacked");
        fs::create_dir(&unpacked).unwrap();
        let archive_path = self.scratch.path().join("archive.tar");
        fs::write(&archive_path, &archive).unwrap();
        let status = Command::new("tar")
            .args(["-x", "-p", "--same-owner", "--numeric-owner", "--xattrs", "--xattrs-include=*", "-f"])
            .args([&archive_path, Path::new("-C"), &unpacked])
            .status()
            .unwrap();
        assert!(status.success());
        let layer = Layer::write(&archive, true);
        let written = snapshot::of_layer(&layer.reader());
        snapshot::assert_same(&snapshot::of_directory(&unpacked), &written);
        let mount = Mount::erofs(&layer.path());
        snapshot::assert_same(&snapshot::of_directory(&mount.path()), &written);
        unpack::assert_unpacks(&layer);
    }

    fn file(&self, name: impl AsRef<[u8]>, content: &[u8]) -> PathBuf {
        let path = self.root.join(OsStr::from_bytes(name.as_ref()));
        fs::write(&path, content).unwrap();
        path
    }

    fn directory(&self, name: impl AsRef<[u8]>) -> PathBuf {
        let path = self.root.join(OsStr::from_bytes(name.as_ref()));
        fs::create_dir(&path).unwrap();
        path
    }

    fn sizes(&self) {
        self.directory("sizes");
        for size in [0, 1, 511, 512, 513, 4095, 4096, 4097, 8191, 8192, 8193, 65_535, 65_536, 65_537, 1_000_000] {
            let content: Vec<u8> = (0..size).map(|index: u32| (index % 251) as u8 + 1).collect();
            self.file(format!("sizes/{size}"), &content);
        }
    }

    fn modes(&self) {
        for mode in [0, 0o4755, 0o2755, 0o6711, 0o1644, 0o7777] {
            let path = self.file(format!("mode-{mode:o}"), b"x");
            chown(&path, Some(mode), Some(12)).unwrap();
            fs::set_permissions(&path, fs::Permissions::from_mode(mode)).unwrap();
        }
        let directory = self.directory("sticky");
        fs::set_permissions(directory, fs::Permissions::from_mode(0o1777)).unwrap();
    }

    fn nodes(&self) {
        let node = |name: &str, kind, mode, device| {
            mknodat(CWD, self.root.join(name), kind, Mode::from_raw_mode(mode), device).unwrap();
        };
        node("fifo", FileType::Fifo, 0o640, 0);
        node("tty", FileType::CharacterDevice, 0o600, makedev(5, 1));
        node("disk", FileType::BlockDevice, 0o660, makedev(259, 4_000));
        symlink("sizes/1", self.root.join("link")).unwrap();
        lchown(self.root.join("link"), Some(33), Some(34)).unwrap();
        symlink("/no/such/thing", self.root.join("dangling")).unwrap();
        for (target, name) in [("sizes/4097", "file-again"), ("link", "link-again"), ("fifo", "fifo-again")] {
            fs::hard_link(self.root.join(target), self.root.join(name)).unwrap();
        }
    }

    fn names(&self) {
        for length in [59, 60, 99, 100, 101, 155, 254, 255] {
            self.file("n".repeat(length), b"name");
        }
        for name in [&b"!x"[..], b"-x", b" ", b".hidden", b"...", b"..x", b"new\nline", b"\xff\xfe", b"=", b"\xc3\xa4", b"\x01"]
        {
            self.file(name, name);
        }
        let many = self.directory("many");
        for index in 0..5_000 {
            File::create(many.join(format!("file-{index}"))).unwrap();
        }
        let mut deep = self.directory("deep");
        while deep.as_os_str().len() < 3_500 {
            deep = deep.join("d".repeat(200));
            fs::create_dir(&deep).unwrap();
        }
        fs::write(deep.join("bottom"), b"deep").unwrap();
        for length in [1, 59, 99, 100, 101, 255, 4_000, 4_032, 4_033, 4_095] {
            symlink("t".repeat(length), self.root.join(format!("target-{length}"))).unwrap();
        }
        // Each tenth directory has another number of names, so that last blocks differ in fill.
        for count in (0..300).step_by(10) {
            let path = self.directory(format!("fill-{count}"));
            for index in 0..count {
                File::create(path.join(format!("{index:03}"))).unwrap();
            }
        }
        mknodat(CWD, self.root.join("far"), FileType::CharacterDevice, Mode::from_raw_mode(0o600), makedev(4_000, 1_048_575))
            .unwrap();
    }

    fn sparse_files(&self) {
        let sparse = |name: &str, size: u64, pieces: &[(u64, usize)]| {
            let file = File::create(self.root.join(name)).unwrap();
            file.set_len(size).unwrap();
            for (offset, length) in pieces {
                file.write_all_at(&vec![b's'; *length], *offset).unwrap();
            }
        };
        sparse("sparse-empty", 3 << 20, &[]);
        sparse("sparse-start", 3 << 20, &[(0, 5_000)]);
        sparse("sparse-end", (3 << 20) + 77, &[((3 << 20) - 100, 177)]);
        let many: Vec<_> = (0..100).map(|index| (index * 65_536, 4_096)).collect();
        sparse("sparse-many", 100 * 65_536, &many);
        let other: Vec<_> = (0..40).map(|index| (index * 20_480 + 8_192, 12_000)).collect();
        sparse("sparse-odd", 900_001, &other);
    }

    fn attributes(&self) {
        let big = self.file("big-ids", b"x");
        chown(&big, Some(4_000_000_000), Some(u32::MAX - 1)).unwrap();
        for (name, seconds) in [("past", -1_234_567), ("epoch", 0), ("far-future", 8_000_000_000)] {
            let path = self.file(name, b"time");
            let time = Timespec { tv_sec: seconds, tv_nsec: 123_456_789 };
            utimensat(CWD, &path, &Timestamps { last_access: time, last_modification: time }, AtFlags::empty()).unwrap();
        }
    }

    fn with_xattrs(self) -> Self {
        let set = |name: &str, attribute: &str, value: &[u8]| {
            lsetxattr(self.root.join(name), attribute, value, XattrFlags::empty()).unwrap();
        };
        // A capability whose mask holds a newline and an equals sign: cap_kill and others.
        let capability = [&[1, 0, 0, 2][..], &[0x0a, 0x3d, 0x0a, 0], &[0; 12]].concat();
        set("sizes/4097", "security.capability", &capability);
        for index in 0..12 {
            set("sizes/1", &format!("user.number-{index}"), format!("value\n{index}=\0").as_bytes());
        }
        set("sizes/1", "user.empty", b"");
        set("sizes", "user.directory", &[b'd'; 3_000]);
        set("many", "user.directory", &[b'd'; 3_500]);
        set("sizes", "trusted.kept", b"t");
        set("link", "trusted.on-link", b"l");
        set("fifo", "security.on-fifo", b"f");
        set("", "user.root", b"r");
        self
    }
}

fn tar(root: &Path, options: &[&str]) -> Vec<u8> {
    let output = Command::new("tar")
        .args(["-c", "--numeric-owner", "--sort=name"])
        .args(options)
        .arg("-C")
        .args([root, Path::new(".")])
        .output()
        .expect("GNU tar is installed");
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    output.stdout
}

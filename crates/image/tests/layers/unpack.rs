//! Layers unpacked into directories: the same as mounted ones but for what the module says, whole or not there, and never outside.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::os::fd::AsFd;
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::{Path, PathBuf};

use funtainer_image::erofs::{UnpackError, UnpackSummary, remove, unpack};
use proptest::prelude::*;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_fd, fsconfig_set_flag, fsmount, fsopen,
};
use tempfile::TempDir;

use crate::make::{Archive, Header, Layer, image, need_root, scratch, sha256};
use crate::snapshot::{self, Content, Snapshot};

/// As many as there are.
const ALL_IDS: u32 = u32::MAX;

/// A directory with an unpacked layer in it.
pub(crate) struct Unpacked {
    parent: TempDir,
}

impl Unpacked {
    pub(crate) fn of(layer: &Layer) -> Result<Self, UnpackError> {
        let unpacked = Self { parent: scratch() };
        unpacked.unpack(layer.open(), ALL_IDS).map(|_| unpacked)
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.parent.path().join("layer")
    }

    fn unpack(&self, layer: File, ids: u32) -> Result<UnpackSummary, UnpackError> {
        unpack(layer, File::open(self.parent.path()).unwrap().as_fd(), "layer", ids)
    }

    fn names(&self) -> Vec<String> {
        let entries = fs::read_dir(self.parent.path()).unwrap();
        let mut names: Vec<String> = entries.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
        names.sort();
        names
    }
}

/// The layer as it is to look unpacked.
fn expected(layer: &Layer) -> Snapshot {
    let mut expected = snapshot::of_layer(&layer.reader());
    for facts in expected.values_mut() {
        let is_device = matches!(facts.content, Content::Block(..))
            || matches!(facts.content, Content::Character(..)) && facts.content != Content::Character(0, 0);
        if is_device {
            facts.content = Content::File(0, sha256(b""));
            facts.mode = 0;
        }
        if matches!(facts.content, Content::Symlink(_) | Content::Fifo) || is_device {
            facts.xattrs = BTreeMap::new();
        }
        facts.xattrs.retain(|name, _| {
            name.starts_with(b"user.") || name.starts_with(b"system.posix_acl_") || name == b"security.capability"
        });
    }
    expected
}

/// Unpacks a layer and compares.
pub(crate) fn assert_unpacks(layer: &Layer) {
    let unpacked = Unpacked::of(layer).unwrap();
    snapshot::assert_same(&snapshot::of_directory(&unpacked.path()), &expected(layer));
    assert_eq!(unpacked.names(), ["layer"]);
    remove(File::open(unpacked.parent.path()).unwrap().as_fd(), "layer").unwrap();
    assert_eq!(unpacked.names(), [""; 0]);
}

#[test]
fn an_overlay_for_users_hides_what_the_layers_hide() {
    need_root();
    let bottom =
        Archive::new().file("kept/a", b"1").file("gone", b"").file("opaque/old", b"").file("replaced/deep/x", b"").end();
    let middle = Archive::new().file("opaque/.wh..wh..opq", b"").file("opaque/new", b"2").file(".wh.gone", b"").end();
    let top =
        Archive::new().file(".wh.replaced", b"").file("replaced", b"3").file("kept/.wh.a", b"").file("kept/b", b"4").end();
    let layers = [Layer::write(&bottom, true), Layer::write(&middle, false), Layer::write(&top, false)];
    let unpacked: Vec<Unpacked> = layers.iter().map(|layer| Unpacked::of(layer).unwrap()).collect();
    let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
    for lower in unpacked.iter().rev() {
        fsconfig_set_fd(context.as_fd(), "lowerdir+", File::open(lower.path()).unwrap().as_fd()).unwrap();
    }
    fsconfig_set_flag(context.as_fd(), "userxattr").unwrap();
    fsconfig_set_flag(context.as_fd(), "ro").unwrap();
    fsconfig_create(context.as_fd()).unwrap();
    let mount = fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap();
    let root = PathBuf::from(format!("/proc/self/fd/{}", std::os::fd::AsRawFd::as_raw_fd(&mount)));
    let seen: Vec<String> = snapshot::of_directory(&root).into_keys().map(|path| String::from_utf8(path).unwrap()).collect();
    assert_eq!(seen, ["", "kept", "kept/b", "opaque", "opaque/new", "replaced"]);
}

#[test]
fn marks_of_an_archive_do_not_become_overlayfs_own() {
    need_root();
    let marks: [(&[u8], &[u8]); 3] = [
        (b"SCHILY.xattr.user.overlay.opaque", b"y"),
        (b"SCHILY.xattr.user.overlay.redirect", b"/etc"),
        (b"SCHILY.xattr.user.mine", b"1"),
    ];
    let layer = Layer::write(&Archive::new().pax(&marks).directory("d").end(), true);
    let unpacked = Unpacked::of(&layer).unwrap();
    let tree = snapshot::of_directory(&unpacked.path());
    let names: Vec<_> = tree[&b"d"[..]].xattrs.keys().map(|name| String::from_utf8_lossy(name).into_owned()).collect();
    assert_eq!(names, ["user.mine"]);
}

#[test]
fn a_mark_that_only_a_hostile_file_has_is_left_out() {
    need_root();
    // Our writer drops overlayfs's names, so a name of the same length is changed into one afterwards.
    let mut bytes = image(&Archive::new().pax(&[(b"SCHILY.xattr.user.overlaz.redirect", b"/etc")]).directory("d").end());
    patch(&mut bytes, b"overlaz.redirect", b"overlay.redirect");
    let unpacked = Unpacked { parent: scratch() };
    unpacked.unpack(file(&unpacked, &bytes), ALL_IDS).unwrap();
    assert!(snapshot::of_directory(&unpacked.path())[&b"d"[..]].xattrs.is_empty());
}

#[test]
fn ids_that_do_not_exist_become_nobody() {
    need_root();
    let mut header = Header::new(b"far", b'0', 0);
    header.octal(108, 8, 70_000).octal(116, 8, 1_000);
    let layer = Layer::write(&Archive::new().header(&header).end(), true);
    for (ids, owner) in [(65_536, (65_534, 1_000)), (500, (499, 499)), (1, (0, 0))] {
        let unpacked = Unpacked { parent: scratch() };
        unpacked.unpack(layer.open(), ids).unwrap();
        let meta = fs::metadata(unpacked.path().join("far")).unwrap();
        assert_eq!((meta.uid(), meta.gid()), owner, "with {ids} ids");
    }
}

#[test]
fn what_a_crash_left_is_made_anew_and_what_is_whole_stays() {
    need_root();
    let layer = Layer::write(&Archive::new().file("a", b"1").hard_link("b", "a").end(), true);
    let unpacked = Unpacked { parent: scratch() };
    let parent = unpacked.parent.path();
    for left in ["layer.new/deep/er", "layer.links"] {
        fs::create_dir_all(parent.join(left)).unwrap();
    }
    fs::write(parent.join("layer.new/a"), "half").unwrap();
    fs::write(parent.join("layer.links/7"), "old").unwrap();
    let summary = unpacked.unpack(layer.open(), ALL_IDS).unwrap();
    assert_eq!(summary, UnpackSummary { entries: 2, bytes: 1, devices: 0 });
    assert_eq!(unpacked.names(), ["layer"]);
    assert_eq!(fs::read(unpacked.path().join("b")).unwrap(), b"1");
    // Again: nothing is touched.
    fs::write(unpacked.path().join("a"), "touched").unwrap();
    assert_eq!(unpacked.unpack(layer.open(), ALL_IDS).unwrap(), UnpackSummary::default());
    assert_eq!(fs::read(unpacked.path().join("b")).unwrap(), b"touched");
}

#[test]
fn removal_follows_no_link() {
    need_root();
    let unpacked = Unpacked { parent: scratch() };
    let parent = unpacked.parent.path();
    fs::create_dir_all(parent.join("layer/d")).unwrap();
    fs::create_dir(parent.join("precious")).unwrap();
    fs::write(parent.join("precious/file"), "").unwrap();
    std::os::unix::fs::symlink("../../precious", parent.join("layer/d/link")).unwrap();
    std::os::unix::fs::symlink("precious", parent.join("top")).unwrap();
    let fd = File::open(parent).unwrap();
    remove(fd.as_fd(), "layer").unwrap();
    remove(fd.as_fd(), "layer").unwrap();
    assert!(remove(fd.as_fd(), "top").is_err(), "a link is no directory");
    assert!(parent.join("precious/file").exists());
}

#[test]
fn names_that_lead_out_are_refused() {
    need_root();
    for (was, is) in [(&b"victim"[..], &b"../abc"[..]), (b"victim", b"/etc/x"), (b"victim", b"a\0b\0c\0")] {
        let mut bytes = image(&Archive::new().file("victim", b"x").end());
        patch(&mut bytes, was, is);
        let unpacked = Unpacked { parent: scratch() };
        let result = unpacked.unpack(file(&unpacked, &bytes), ALL_IDS);
        if is.contains(&b'/') {
            let error = result.unwrap_err();
            assert!(matches!(error, UnpackError::Read(_)), "{error}");
        }
        assert!(!unpacked.parent.path().join("abc").exists());
    }
}

#[test]
fn a_directory_that_is_its_own_child_is_refused() {
    need_root();
    let mut bytes = image(&Archive::new().directory("a").directory("a/b").file("a/b/c", b"").end());
    // The entries of `a` are `.`, `..` and `b`: the last one is led back to where `.` leads.
    let entry = |nid: u64, at: u16, kind: u8| [&nid.to_le_bytes()[..], &at.to_le_bytes(), &[kind, 0]].concat();
    let reader = funtainer_image::erofs::Reader::new(file(&Unpacked { parent: scratch() }, &bytes)).unwrap();
    let root = reader.root().unwrap();
    let a = reader.lookup(&root, b"a").unwrap().unwrap();
    let b = reader.lookup(&reader.inode(a).unwrap(), b"b").unwrap().unwrap();
    let number =
        |nid: funtainer_image::erofs::Nid| format!("{nid:?}").trim_matches(|c: char| !c.is_ascii_digit()).parse().unwrap();
    let found = (39..64).find(|at| contains(&bytes, &entry(number(b), *at, 2))).expect("the entry of b");
    patch(&mut bytes, &entry(number(b), found, 2), &entry(number(a), found, 2));
    let unpacked = Unpacked { parent: scratch() };
    let error = unpacked.unpack(file(&unpacked, &bytes), ALL_IDS).unwrap_err();
    assert!(matches!(error, UnpackError::Damaged("a directory has two names")), "{error}");
}

#[test]
fn content_that_files_share_is_refused() {
    need_root();
    let mut archive = Archive::new();
    for index in 0..40 {
        archive = archive.file(&format!("{index:02}"), &vec![b'x'; 40_000]);
    }
    let mut bytes = image(&archive.end());
    // Each file's first block becomes that of the first file, and its size grows to nearly the layer's.
    let total = bytes.len();
    let size = 40_000_u64.to_le_bytes();
    let places: Vec<usize> = (0..total - 16).step_by(32).filter(|at| bytes[at + 8..at + 16] == size).collect();
    assert_eq!(places.len(), 40);
    for at in places {
        bytes[at + 8..at + 16].copy_from_slice(&(total as u64 - 8192).to_le_bytes());
        bytes[at + 16..at + 20].copy_from_slice(&1_u32.to_le_bytes());
    }
    let unpacked = Unpacked { parent: scratch() };
    let error = unpacked.unpack(file(&unpacked, &bytes), ALL_IDS).unwrap_err();
    assert!(matches!(error, UnpackError::Damaged("its files have more content than the layer")), "{error}");
}

/// A tree with everything in it that can be unpacked.
fn everything() -> Vec<u8> {
    let xattr: (&[u8], &[u8]) = (b"SCHILY.xattr.user.note", b"value");
    let mut device = Header::new(b"dev/disk", b'4', 0);
    device.octal(329, 8, 8).octal(337, 8, 1);
    Archive::new()
        .directory("d")
        .pax(&[xattr])
        .file("d/f", &[b'f'; 5000])
        .hard_link("d/g", "d/f")
        .symlink("d/l", "/etc/passwd")
        .entry(b"d/p", b'6', b"")
        .header(&device)
        .file(".wh.w", b"")
        .file("e/.wh..wh..opq", b"")
        .end()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 300, ..ProptestConfig::default() })]

    /// Whatever a layer holds, it is unpacked to its directory or refused: what lies beside it stays as it was.
    #[test]
    fn damage_never_leads_out(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..6)) {
        need_root();
        let mut bytes = image(&everything());
        // Behind the superblock, which has a checksum.
        let length = bytes.len() - 4096;
        for (at, value) in flips {
            bytes[4096 + at.index(length)] = value;
        }
        let unpacked = Unpacked { parent: scratch() };
        fs::write(unpacked.parent.path().join("sentinel"), "whole").unwrap();
        let _ = unpacked.unpack(file(&unpacked, &bytes), ALL_IDS);
        for name in unpacked.names() {
            prop_assert!(["layer", "layer.new", "layer.links", "sentinel"].contains(&name.as_str()), "{}", name);
        }
        prop_assert_eq!(fs::read(unpacked.parent.path().join("sentinel")).unwrap(), b"whole");
        let devices = devices_below(unpacked.parent.path());
        prop_assert!(devices.is_empty(), "{:?}", devices);
    }
}

/// Nodes other than whiteouts.
fn devices_below(root: &Path) -> Vec<PathBuf> {
    let mut pending = vec![root.to_owned()];
    let mut found = Vec::new();
    while let Some(directory) = pending.pop() {
        for entry in fs::read_dir(&directory).unwrap() {
            let path = entry.unwrap().path();
            let meta = fs::symlink_metadata(&path).unwrap();
            if meta.is_dir() {
                pending.push(path);
            } else if meta.file_type().is_block_device() || meta.file_type().is_char_device() && meta.rdev() != 0 {
                found.push(path);
            }
        }
    }
    found
}

/// An open file with these bytes that no name leads to.
fn file(unpacked: &Unpacked, bytes: &[u8]) -> File {
    let file = tempfile::tempfile_in(unpacked.parent.path()).unwrap();
    std::os::unix::fs::FileExt::write_all_at(&file, bytes, 0).unwrap();
    file
}

fn contains(bytes: &[u8], part: &[u8]) -> bool {
    bytes.windows(part.len()).any(|window| window == part)
}

/// Replaces the only occurrence.
fn patch(bytes: &mut [u8], was: &[u8], is: &[u8]) {
    let places: Vec<usize> =
        bytes.windows(was.len()).enumerate().filter(|(_, window)| *window == was).map(|(at, _)| at).collect();
    assert_eq!(places.len(), 1, "{}", was.escape_ascii());
    bytes[places[0]..places[0] + is.len()].copy_from_slice(is);
}

//! Layers that use directories which they do not have, over others that have them: as the kernel shows them, and as GNU tar unpacks them.

use std::collections::BTreeMap;
use std::fs;
use std::io::Write;
use std::os::unix::fs::MetadataExt;
use std::path::Path;
use std::process::{Command, Stdio};

use funtainer_image::erofs::{DeriveError, derive};
use funtainer_image::rootfs::{FileKind, Rootfs};
use proptest::prelude::*;

use crate::make::{Archive, Header, Layer, need_root, scratch};
use crate::mounted::Mount;
use crate::snapshot::{self, Content};

fn directory(archive: Archive, path: &str, mode: u64, owner: u64) -> Archive {
    let mut header = Header::new(path.as_bytes(), b'5', 0);
    header.octal(100, 8, mode).octal(108, 8, owner).octal(116, 8, owner + 1).octal(136, 12, 1234);
    archive.header(&header)
}

/// The layers of an image, each in the form that those below ask for; how many have another one.
fn stacked(archives: impl IntoIterator<Item = Archive>) -> (Vec<Layer>, usize) {
    let mut layers: Vec<Layer> = Vec::new();
    let mut changed = 0;
    for archive in archives {
        let layer = Layer::write(&archive.end(), layers.is_empty());
        let derived = layer.derived(&layers);
        changed += usize::from(derived.is_some());
        layers.push(derived.unwrap_or(layer));
    }
    (layers, changed)
}

fn rootfs(layers: &[Layer]) -> Rootfs {
    Rootfs::new(layers.iter().map(Layer::open).collect()).unwrap()
}

/// Kind letter, mode and owner of a path.
fn facts(rootfs: &Rootfs, path: &str) -> String {
    let Ok(stat) = rootfs.symlink_stat(path) else { return "-".to_owned() };
    let letter = match stat.kind {
        FileKind::Directory => 'd',
        FileKind::Symlink => 'l',
        _ => 'f',
    };
    format!("{letter}{:o}:{}", stat.mode, stat.uid)
}

#[test]
fn implied_directories_look_as_those_below() {
    let lower = directory(Archive::new(), "tmp", 0o1777, 0);
    let lower = directory(directory(lower, "home", 0o755, 0), "home/app", 0o700, 1000).file("home/app/old", b"");
    let middle = Archive::new().file("var/x", b"");
    let upper = Archive::new().file("tmp/x", b"").file("home/app/new", b"").file("var/y", b"").file("fresh/z", b"");
    let (layers, changed) = stacked([lower, middle, upper]);
    assert_eq!(changed, 1, "only what differs is written anew");
    let rootfs = rootfs(&layers);
    let expect = [("tmp", "d1777:0"), ("home/app", "d700:1000"), ("home", "d755:0"), ("var", "d755:0"), ("fresh", "d755:0")];
    for (path, facts_expected) in expect {
        assert_eq!(facts(&rootfs, path), facts_expected, "{path}");
    }
    for path in ["tmp/x", "home/app/old", "home/app/new", "var/x", "var/y", "fresh/z"] {
        assert_eq!(facts(&rootfs, path), "f644:0", "{path}");
    }
    let top = layers[2].reader();
    let home = top.lookup(&top.root().unwrap(), b"home").unwrap().unwrap();
    let app = top.lookup(&top.inode(home).unwrap(), b"app").unwrap().unwrap();
    let inode = top.inode(app).unwrap();
    assert_eq!((inode.gid, inode.mtime.seconds), (1001, 1234));
    assert!(!top.superblock().implied && !top.is_implied(&inode).unwrap());
}

#[test]
fn attributes_come_from_the_next_layer_that_has_the_directory() {
    let acl =
        [&2_u32.to_le_bytes()[..], &[1, 0, 7, 0], &[0xff; 4], &[4, 0, 5, 0], &[0xff; 4], &[32, 0, 0, 0], &[0xff; 4]].concat();
    let lower = directory(Archive::new(), "d", 0o711, 5);
    let middle = directory(
        Archive::new().pax(&[(b"SCHILY.xattr.user.note", b"kept"), (b"SCHILY.xattr.system.posix_acl_default", &acl)]),
        "d",
        0o750,
        7,
    );
    // The third takes its attributes from the second, and the fourth through the third.
    let (layers, changed) = stacked([lower, middle, Archive::new().file("d/a", b""), Archive::new().file("d/b", b"")]);
    assert_eq!(changed, 2);
    assert_eq!(facts(&rootfs(&layers), "d"), "d750:7");
    let reader = layers[3].reader();
    let inode = reader.inode(reader.lookup(&reader.root().unwrap(), b"d").unwrap().unwrap()).unwrap();
    let names: Vec<_> = reader.xattrs(&inode).unwrap().into_iter().map(|xattr| xattr.name).collect();
    assert_eq!(names, [&b"user.note"[..], b"system.posix_acl_default"]);
}

#[test]
fn what_was_deleted_gives_no_attributes() {
    let lower = || directory(directory(Archive::new(), "d", 0o711, 5), "d/e", 0o700, 6).file("d/e/old", b"");
    // Deleted by a layer between, and by the layer itself.
    let (layers, changed) = stacked([lower(), Archive::new().file(".wh.d", b""), Archive::new().file("d/e/new", b"")]);
    assert_eq!((changed, facts(&rootfs(&layers), "d")), (0, "d755:0".to_owned()));
    let (layers, changed) = stacked([lower(), Archive::new().file(".wh.d", b"").file("d/e/new", b"")]);
    assert_eq!((changed, facts(&rootfs(&layers), "d/e"), facts(&rootfs(&layers), "d/e/old")), (0, "d755:0".into(), "-".into()));
    // A directory that hides what is below is still the one below; what is in it is not.
    let (layers, _) = stacked([lower(), Archive::new().file("d/.wh..wh..opq", b"").file("d/e/new", b"")]);
    let rootfs = rootfs(&layers);
    assert_eq!([facts(&rootfs, "d"), facts(&rootfs, "d/e"), facts(&rootfs, "d/e/old")], ["d711:5", "d755:0", "-"]);
}

/// A merged `/usr`, as distributions have it, and a layer of a tool that does not know.
#[test]
fn links_below_are_followed() {
    need_root();
    let lower = directory(directory(Archive::new(), "usr", 0o755, 0), "usr/lib", 0o751, 3);
    let lower = lower.symlink("bin", "usr/bin").symlink("lib", "/usr/lib").symlink("sbin", "bin").file("usr/bin/old", b"old");
    let lower = lower.file("usr/bin/kept", b"").file("usr/lib/x/deep", b"").symlink("nowhere", "usr/none").file("file", b"");
    let upper = Archive::new()
        .file("bin/tool", b"tool")
        .file("bin/.wh.old", b"")
        .hard_link("bin/twin", "bin/tool")
        .file("lib/x/new", b"new")
        .file("sbin/daemon", b"")
        .file("usr/bin/direct", b"")
        .file("nowhere/x", b"")
        .symlink("own", "bin")
        .file("own/through", b"");
    let (layers, changed) = stacked([lower, upper]);
    assert_eq!(changed, 1);
    let rootfs = rootfs(&layers);
    for link in ["bin", "lib", "sbin"] {
        assert!(facts(&rootfs, link).starts_with('l'), "{link}");
    }
    for path in ["usr/bin/tool", "usr/bin/twin", "usr/bin/kept", "usr/lib/x/deep", "usr/lib/x/new", "usr/bin/daemon"] {
        assert!(facts(&rootfs, path).starts_with('f'), "{path}");
    }
    assert_eq!(facts(&rootfs, "usr/bin/old"), "-");
    assert_eq!(facts(&rootfs, "usr/lib"), "d751:3");
    assert_eq!(facts(&rootfs, "nowhere"), "d755:0", "a link to nothing is replaced");
    assert!(facts(&rootfs, "usr/bin/direct").starts_with('f') && facts(&rootfs, "usr/bin/through").starts_with('f'));
    assert_eq!(rootfs.read_file("bin/tool", 10).unwrap(), b"tool");

    let mounts: Vec<Mount> = layers.iter().map(|layer| Mount::erofs(&layer.path())).collect();
    let overlay = Mount::overlay(&mounts);
    assert_eq!(fs::read(overlay.path().join("usr/bin/tool")).unwrap(), b"tool");
    assert_eq!(fs::metadata(overlay.path().join("usr/bin/twin")).unwrap().nlink(), 2);
    assert!(!overlay.path().join("usr/bin/old").exists());
}

#[test]
fn a_direct_path_stands_before_one_through_a_link() {
    let lower = directory(Archive::new(), "usr/bin", 0o755, 0).symlink("bin", "usr/bin").file("usr/bin/d/below", b"");
    let upper =
        Archive::new().file("usr/bin/x", b"direct").file("bin/x", b"through").file("bin/d/y", b"").file("usr/bin/d/z", b"");
    let upper = directory(upper, "usr/bin/d", 0o700, 9);
    let (layers, _) = stacked([lower, upper]);
    let rootfs = rootfs(&layers);
    assert_eq!(rootfs.read_file("usr/bin/x", 100).unwrap(), b"direct");
    assert_eq!(facts(&rootfs, "bin/d"), "d700:9");
    assert_eq!(rootfs.list("bin/d").unwrap(), [&b"below"[..], b"y", b"z"]);
}

#[test]
fn an_explicit_directory_replaces_a_link() {
    let lower = directory(Archive::new(), "real", 0o711, 4).symlink("l", "real").file("real/inside", b"");
    let upper = directory(Archive::new(), "l", 0o755, 0).file("l/x", b"").file("l/inside/deep", b"");
    let (layers, changed) = stacked([lower, upper]);
    assert_eq!((changed, facts(&rootfs(&layers), "l"), facts(&rootfs(&layers), "real/x")), (0, "d755:0".into(), "-".into()));
}

#[test]
fn links_in_circles_are_left_and_many_are_refused() {
    let lower = Archive::new().symlink("a", "b").symlink("b", "a/x").symlink("self", "self").symlink("up", "../../..");
    let (layers, changed) = stacked([lower, Archive::new().file("a/x", b"").file("self/y", b"").file("up/z", b"")]);
    let rootfs = rootfs(&layers);
    // The one that leads above the root leads to it.
    assert_eq!((changed, facts(&rootfs, "z")), (1, "f644:0".to_owned()));
    assert_eq!((facts(&rootfs, "a"), facts(&rootfs, "self")), ("d755:0".into(), "d755:0".into()));

    let many = |count: usize| {
        let lower = (0..count).fold(Archive::new().directory("d"), |archive, n| archive.symlink(&format!("l{n}"), "d"));
        let upper = (0..count).fold(Archive::new(), |archive, n| archive.file(&format!("l{n}/f{n}"), b""));
        let (lower, upper) = (Layer::write(&lower.end(), true), Layer::write(&upper.end(), false));
        let out = tempfile::tempfile().unwrap();
        derive(&upper.reader(), &Rootfs::new(vec![lower.open()]).unwrap(), &out)
    };
    assert!(many(1024).unwrap());
    assert!(matches!(many(1025), Err(DeriveError::TooManyLinks)));
}

#[test]
fn holes_and_large_content_are_kept() {
    let content: Vec<u8> = (0..700_000_u32).map(|n| (n.wrapping_mul(2_654_435_761) >> 24) as u8).collect();
    let sparse = Archive::new().pax(&[
        (b"GNU.sparse.major", b"1"),
        (b"GNU.sparse.minor", b"0"),
        (b"GNU.sparse.name", b"d/sparse"),
        (b"GNU.sparse.realsize", b"50000001"),
    ]);
    let map = format!("{:\0<512}", "1\n50000000\n1\n");
    let sparse = sparse.entry(b"GNUSparseFile.0/sparse", b'0', &[map.as_bytes(), b"x"].concat());
    let upper = sparse.file("d/large", &content);
    let (layers, changed) = stacked([directory(Archive::new(), "d", 0o700, 1), upper]);
    assert_eq!(changed, 1);
    let rootfs = rootfs(&layers);
    assert_eq!(rootfs.read_file("d/large", 1 << 20).unwrap(), content);
    let read = rootfs.read_file("d/sparse", 1 << 26).unwrap();
    assert_eq!((read.len(), read[50_000_000], read.iter().filter(|byte| **byte != 0).count()), (50_000_001, b'x', 1));
    let blocks = layers[1].open().metadata().unwrap().blocks() * 512;
    assert!(blocks < 2 << 20, "{blocks} bytes on disk");
}

/// By path: kind, mode, owner, and content or target. The root is left out: overlayfs takes it from the writable layer.
type View = BTreeMap<Vec<u8>, (Content, u32, (u32, u32))>;

fn view(directory: &Path) -> View {
    let snapshot = snapshot::of_directory(directory);
    let facts = snapshot.into_iter().filter(|(path, _)| !path.is_empty());
    facts.map(|(path, facts)| (path, (facts.content, facts.mode, facts.owner))).collect()
}

fn unpack(tar: &[u8], to: &Path) {
    let mut child = Command::new("tar")
        .args([
            "--extract",
            "--numeric-owner",
            "--preserve-permissions",
            "--same-owner",
            "--delay-directory-restore",
            "--directory",
        ])
        .arg(to)
        .stdin(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .unwrap();
    child.stdin.take().unwrap().write_all(tar).unwrap();
    let output = child.wait_with_output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
}

/// Directories and links to them at the top, as a lowest layer has them: `a` and `c` are directories, others may lead there.
fn lowest() -> impl Strategy<Value = Archive> {
    let modes = prop::collection::vec((prop::sample::select(vec![0o700_u64, 0o755, 0o1777]), 0..3_u64), 4);
    let links = prop::collection::vec(prop::option::of(prop::sample::select(vec!["a", "a/b", "./c", "c/../a", "k"])), 3);
    (modes, links).prop_map(|(modes, links)| {
        let paths = ["a", "a/b", "c", "c/d"];
        let archive = paths
            .into_iter()
            .zip(modes)
            .fold(Archive::new(), |archive, (path, (mode, owner))| directory(archive, path, mode, owner));
        ["k", "l", "m"].into_iter().zip(links).fold(archive, |archive, (name, target)| match target {
            // No link to itself, which leads nowhere.
            Some(target) if target != name => archive.symlink(name, target),
            _ => archive.directory(name),
        })
    })
}

/// Files in those directories, most without an entry for the directory; names are used once in all layers.
fn upper(number: usize) -> impl Strategy<Value = Archive> {
    let parent = prop::sample::select(vec!["a", "a/b", "c", "c/d", "k", "k/b", "l", "l/d", "m", "m/new", "new", "new/deep"]);
    prop::collection::vec((parent, any::<bool>()), 0..8).prop_map(move |entries| {
        let mut archive = Archive::new();
        for (index, (parent, explicit)) in entries.into_iter().enumerate() {
            if explicit && parent.starts_with("new") {
                archive = directory(archive, parent, 0o710, 7);
            }
            archive = archive.file(&format!("{parent}/f{number}-{index}"), parent.as_bytes());
        }
        archive
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn layers_over_each_other_are_what_tar_unpacks(lowest in lowest(), first in upper(1), second in upper(2)) {
        need_root();
        let archives = [lowest, first, second];
        let directory = scratch();
        for archive in &archives {
            unpack(&archive.clone().end(), directory.path());
        }
        let (layers, _) = stacked(archives);
        let mounts: Vec<Mount> = layers.iter().map(|layer| Mount::erofs(&layer.path())).collect();
        let overlay = Mount::overlay(&mounts);
        prop_assert_eq!(view(&overlay.path()), view(directory.path()));
    }
}

//! The rules of layers: what an archive means.

use std::collections::BTreeMap;

use funtainer_image::erofs::{EntryReason, InodeKind, Reader, WriteError};
use proptest::prelude::*;

use crate::make::{Archive, Header, Layer, image, sha256, try_write};
use crate::snapshot::{Content, Snapshot, of_layer};

/// The paths of a layer with a letter each: f(ile), d(irectory), l(ink), w(hiteout), o(paque directory), n(ode).
fn shape(archive: Archive, base: bool) -> String {
    let layer = Layer::write(&archive.end(), base);
    let reader = layer.reader();
    let snapshot = of_layer(&reader);
    let letters = snapshot.iter().filter(|(path, _)| !path.is_empty()).map(|(path, facts)| {
        let opaque = ["trusted.overlay.opaque", "user.overlay.opaque"].map(|name| facts.xattrs.get(name.as_bytes()));
        let letter = match &facts.content {
            Content::File(..) => "f",
            Content::Directory if opaque.iter().all(|mark| mark.is_some_and(|value| value == b"y")) => "o",
            Content::Directory => "d",
            Content::Symlink(_) => "l",
            Content::Character(0, 0) if facts.mode == 0 => "w",
            _ => "n",
        };
        format!("{letter}:{}", String::from_utf8_lossy(path))
    });
    letters.collect::<Vec<_>>().join(" ")
}

fn refused(archive: Archive) -> EntryReason {
    match try_write(&archive.end()).unwrap_err() {
        WriteError::Entry { reason, .. } | WriteError::Layer(reason) => reason,
        other => panic!("{other}"),
    }
}

#[test]
fn paths_are_cleaned_and_stay_inside() {
    let archive = Archive::new().file("/abs", b"").file("./dot", b"").file("a//b/./c", b"").directory("d/");
    assert_eq!(shape(archive, true), "d:a d:a/b f:a/b/c f:abs d:d f:dot");
    for path in ["..", "../x", "a/../x", "a/..", "/../x", "./../x", "a/b/../../../x"] {
        assert_eq!(refused(Archive::new().file(path, b"")), EntryReason::DotDot, "{path}");
        assert_eq!(refused(Archive::new().directory("a/b").directory(path)), EntryReason::DotDot, "{path}");
        assert_eq!(refused(Archive::new().file("f", b"").hard_link("x", path)), EntryReason::DotDot, "{path}");
    }
    assert_eq!(refused(Archive::new().file("", b"")), EntryReason::Root);
    assert_eq!(refused(Archive::new().symlink(".", "x")), EntryReason::Root);
}

#[test]
fn names_have_a_length() {
    let long = |length: usize| Archive::new().pax(&[(b"path", &vec![b'n'; length])]).file("", b"");
    assert_eq!(shape(long(255), true), format!("f:{}", "n".repeat(255)));
    assert_eq!(refused(long(256)), EntryReason::NameTooLong(256));
    assert_eq!(refused(long(300)), EntryReason::NameTooLong(300));
    let deep = "d/".repeat(2_000);
    let archive = Archive::new().pax(&[(b"path", deep.as_bytes())]).file("", b"");
    assert_eq!(shape(archive, true).matches('d').count(), 2_000 + 2_001 * 1_000);
}

#[test]
fn missing_parents_are_made_and_the_root_has_metadata() {
    let mut root = Header::new(b"./", b'5', 0);
    root.octal(100, 8, 0o1700).octal(108, 8, 3).octal(136, 12, 99);
    let mut late = Header::new(b"a", b'5', 0);
    late.octal(100, 8, 0o700).octal(108, 8, 5);
    let archive = Archive::new().file("a/b/f", b"").header(&late).header(&root);
    let layer = Layer::write(&archive.end(), false);
    let snapshot = of_layer(&layer.reader());
    let check = |path: &str, mode, uid, seconds| {
        let facts = &snapshot[path.as_bytes()];
        assert_eq!((facts.mode, facts.owner.0, facts.mtime.0), (mode, uid, seconds), "{path}");
    };
    check("", 0o1700, 3, 99);
    check("a", 0o700, 5, 0);
    check("a/b", 0o755, 0, 0);
    check("a/b/f", 0o644, 0, 0);
}

#[test]
fn symbolic_links_on_the_way_stay_inside() {
    let archive = Archive::new().symlink("lib", "usr/lib").file("lib/x", b"");
    assert_eq!(shape(archive, true), "l:lib d:usr d:usr/lib f:usr/lib/x");
    let archive = Archive::new().symlink("a", "/b").symlink("b", "../../../../c/./d/").file("a/x", b"");
    assert_eq!(shape(archive, true), "l:a l:b d:c d:c/d f:c/d/x");
    // The last name is never followed.
    let archive = Archive::new().symlink("l", "/etc/passwd").file("l", b"mine");
    assert_eq!(shape(archive, true), "f:l");
    let archive = Archive::new().directory("d").symlink("l", "d").directory("l").file("l/x", b"");
    assert_eq!(shape(archive, true), "d:d d:l f:l/x");
    let hops = |count: usize| {
        let links =
            (0..count).fold(Archive::new(), |archive, index| archive.symlink(&format!("l{index}"), &format!("l{}", index + 1)));
        links.directory(&format!("l{count}")).file("l0/x", b"")
    };
    assert!(shape(hops(40), true).ends_with("f:l40/x l:l5 l:l6 l:l7 l:l8 l:l9"));
    assert_eq!(refused(hops(41)), EntryReason::Loop);
    assert_eq!(refused(Archive::new().symlink("l", "l").file("l/x", b"")), EntryReason::Loop);
    let circle = Archive::new().symlink("a", "b/x").symlink("b", "a/x").file("a/y", b"");
    assert_eq!(refused(circle), EntryReason::Loop);
    let blocked = Archive::new().file("f", b"").file("f/x", b"");
    assert_eq!(refused(blocked), EntryReason::ParentNotDirectory("f".to_owned()));
    // 40 links with 2,000 names each.
    let slow = Archive::new().symlink("l0", &"./".repeat(45));
    let slow = (1..40).fold(slow, |archive, index| {
        let target = format!("l{}/{}", index - 1, "./".repeat(2_000));
        archive.pax(&[(b"linkpath", target.as_bytes())]).symlink(&format!("l{index}"), "")
    });
    assert_eq!(refused(slow.file("l39/x", b"")), EntryReason::Loop);
}

#[test]
fn duplicates_replace_each_other() {
    let archive = Archive::new().file("f", b"first").file("f", b"second").symlink("f", "third").file("f", b"last");
    let layer = Layer::write(&archive.end(), true);
    assert_eq!(of_layer(&layer.reader())[&b"f"[..]].content, Content::File(4, sha256(b"last")));
    assert_eq!(shape(Archive::new().directory("x").file("x/y", b"").file("x", b""), true), "f:x");
    assert_eq!(shape(Archive::new().file("x", b"").directory("x").file("x/y", b""), true), "d:x f:x/y");
    assert_eq!(shape(Archive::new().directory("x").file("x/y", b"").directory("x"), true), "d:x f:x/y");
    // A parent that was looked up before and is another now.
    let archive = Archive::new().file("x/y", b"").file("x", b"").directory("x").file("x/z", b"");
    assert_eq!(shape(archive, true), "d:x f:x/z");
    let archive = Archive::new().symlink("l", "a").file("l/y", b"").symlink("l", "b").file("l/y", b"");
    assert_eq!(shape(archive, true), "d:a f:a/y d:b f:b/y l:l");
}

#[test]
fn hard_links_share_what_they_link_to() {
    let archive = Archive::new()
        .file("d/f", b"content")
        .symlink("s", "d")
        .hard_link("h", "s/f")
        .hard_link("i", "./d//f")
        .hard_link("t", "s")
        .hard_link("d/f", "d/f");
    let layer = Layer::write(&archive.end(), true);
    let snapshot = of_layer(&layer.reader());
    assert_eq!(snapshot[&b"h"[..]].same_as, b"d/f");
    assert_eq!((snapshot[&b"h"[..]].nlink, snapshot[&b"t"[..]].nlink), (3, 2));
    // The old content stays with the other name.
    let archive = Archive::new().file("f", b"one").hard_link("h", "f").file("f", b"three");
    let layer = Layer::write(&archive.end(), true);
    let snapshot = of_layer(&layer.reader());
    assert_eq!(snapshot[&b"h"[..]].content, Content::File(3, sha256(b"one")));
    assert_eq!((snapshot[&b"h"[..]].nlink, snapshot[&b"f"[..]].nlink), (1, 1));

    let missing = |name: &str| EntryReason::HardLinkMissing(name.to_owned());
    assert_eq!(refused(Archive::new().hard_link("h", "f")), missing("f"));
    assert_eq!(refused(Archive::new().hard_link("h", "h")), missing("h"));
    assert_eq!(refused(Archive::new().hard_link("h", "a/b")), missing("a/b"));
    assert_eq!(refused(Archive::new().file(".wh.f", b"").hard_link("h", "f")), missing("f"));
    let directory = |name: &str| EntryReason::HardLinkDirectory(name.to_owned());
    assert_eq!(refused(Archive::new().directory("d").hard_link("h", "d")), directory("d"));
    assert_eq!(refused(Archive::new().hard_link("h", "/")), directory("/"));
    // Data behind a link's header is the next header: nothing is skipped.
    let mut header = Header::new(b"h", b'1', 1_000);
    header.put(157, b"f");
    assert_eq!(shape(Archive::new().file("f", b"").header(&header).file("g", b""), true), "f:f f:g f:h");
}

#[test]
fn whiteouts_delete_only_what_lies_below() {
    let archive = Archive::new().file("a/.wh.gone", b"").file("a/kept", b"").file(".wh.x", b"");
    assert_eq!(shape(archive.clone(), false), "d:a w:a/gone f:a/kept w:x");
    assert_eq!(shape(archive, true), "d:a f:a/kept");
    // What the layer has itself wins, in any order; a directory hides the one below.
    assert_eq!(shape(Archive::new().file(".wh.f", b"").file("f", b""), false), "f:f");
    assert_eq!(shape(Archive::new().file("f", b"").file(".wh.f", b""), false), "f:f");
    assert_eq!(shape(Archive::new().file(".wh.d", b"").file("d/f", b""), false), "o:d f:d/f");
    assert_eq!(shape(Archive::new().file("d/f", b"").file(".wh.d", b""), false), "o:d f:d/f");
    assert_eq!(shape(Archive::new().file("d/f", b"").file(".wh.d", b""), true), "d:d f:d/f");
    // Nothing lies below an opaque directory.
    let archive = Archive::new().file("o/.wh.a", b"").file("o/.wh..wh..opq", b"").file("o/d/.wh.b", b"").file("o/f", b"");
    assert_eq!(shape(archive.clone(), false), "o:o d:o/d f:o/f");
    assert_eq!(shape(archive, true), "d:o d:o/d f:o/f");
    // What AUFS left behind is nothing.
    let archive = Archive::new().file(".wh..wh.aufs", b"").file(".wh..wh.plnk/x", b"").directory(".wh..wh.orph");
    assert_eq!(shape(archive, false), "");
    // overlayfs would take this for a whiteout, so it is one.
    let mut device = Header::new(b"dev", b'3', 0);
    device.octal(329, 8, 0).octal(337, 8, 0);
    assert_eq!(shape(Archive::new().header(&device), false), "w:dev");
    assert_eq!(shape(Archive::new().header(&device), true), "");

    for bad in [".wh.", "a/.wh...", "a/.wh..", ".wh.d/f"] {
        assert_eq!(refused(Archive::new().file(bad, b"")), EntryReason::Whiteout, "{bad}");
    }
    assert_eq!(refused(Archive::new().file(".wh..wh..opq", b"")), EntryReason::OpaqueRoot);
    assert_eq!(shape(Archive::new().file(".wh..wh..opq", b"").file("f", b""), true), "f:f");
}

#[test]
fn attributes_of_overlayfs_are_not_the_archives_to_set() {
    let records: [(&[u8], &[u8]); 5] = [
        (b"SCHILY.xattr.trusted.overlay.opaque", b"y"),
        (b"SCHILY.xattr.user.overlay.opaque", b"y"),
        (b"SCHILY.xattr.trusted.overlay.redirect", b"/etc"),
        (b"SCHILY.xattr.user.kept", b"u"),
        (b"SCHILY.xattr.trusted.kept", b"t"),
    ];
    let archive = Archive::new().pax(&records).directory("d").pax(&records).symlink("l", "d");
    let layer = Layer::write(&archive.end(), false);
    let snapshot = of_layer(&layer.reader());
    let names = |path: &[u8]| {
        let names = snapshot[path].xattrs.keys().map(|name| String::from_utf8_lossy(name).into_owned());
        names.collect::<Vec<_>>().join(" ")
    };
    assert_eq!(names(b"d"), "trusted.kept user.kept");
    // Linux has no user attributes on links.
    assert_eq!(names(b"l"), "trusted.kept");
    // The last entry's attributes count, alone.
    let archive = Archive::new().pax(&records).directory("d").directory("d");
    assert!(of_layer(&Layer::write(&archive.end(), false).reader())[&b"d"[..]].xattrs.is_empty());
}

#[test]
fn what_linux_cannot_have_is_refused() {
    let mut device = Header::new(b"dev", b'3', 0);
    device.octal(329, 8, 4_096).octal(337, 8, 1);
    assert_eq!(refused(Archive::new().header(&device)), EntryReason::Device(4_096, 1));
    device.octal(329, 8, 1).octal(337, 8, 1_048_576);
    assert_eq!(refused(Archive::new().header(&device)), EntryReason::Device(1, 1_048_576));
    assert_eq!(refused(Archive::new().symlink("l", "")), EntryReason::SymlinkEmpty);
    let name = format!("SCHILY.xattr.user.{}", "x".repeat(256));
    assert_eq!(refused(Archive::new().pax(&[(name.as_bytes(), b"")]).file("f", b"")), EntryReason::XattrName(256));
    let large = vec![0; 65_536];
    let archive = Archive::new().pax(&[(b"SCHILY.xattr.user.x", &large)]).file("f", b"");
    assert_eq!(refused(archive), EntryReason::XattrValue(65_536));
    let archive = Archive::new().pax(&[(b"SCHILY.xattr.system.posix_acl_access", b"user::rwx")]).file("f", b"");
    assert_eq!(refused(archive), EntryReason::Acl);
}

#[test]
fn the_same_archive_is_the_same_layer() {
    let archive = Archive::new().file("b", b"x").file("a/.wh.c", b"").hard_link("h", "b").end();
    assert_eq!(image(&archive), image(&archive));
}

#[test]
fn an_archive_without_entries_is_an_empty_layer() {
    for archive in [&[][..], &[0; 512], &[0; 1024], &[0; 10_240]] {
        let layer = Layer::write(archive, false);
        let snapshot = of_layer(&layer.reader());
        assert_eq!(snapshot.len(), 1);
        assert_eq!(snapshot[&b""[..]].mode, 0o755);
    }
}

/// What an entry does, for a model that knows nothing of links.
#[derive(Debug, Clone)]
enum Step {
    File(Vec<u8>),
    Directory(u32),
    Symlink(String),
    Fifo,
}

fn step() -> impl Strategy<Value = (String, Step)> {
    let path = prop::collection::vec(prop::sample::select(vec!["a", "b", "-", "é", ".c"]), 1..4);
    let content = prop::collection::vec(any::<u8>(), 0..20)
        .prop_flat_map(|bytes| prop::sample::select(vec![bytes.clone(), bytes.repeat(300), bytes.repeat(4_096)]));
    let step = prop_oneof![
        4 => content.prop_map(Step::File),
        4 => (0..0o7777_u32).prop_map(Step::Directory),
        1 => "[xyz]{1,90}".prop_map(Step::Symlink),
        1 => Just(Step::Fifo),
    ];
    (path.prop_map(|names| names.join("/")), step)
}

/// What the archive should come to; `None` where an entry goes through something that is no directory.
fn model(steps: &[(String, Step)]) -> Option<BTreeMap<Vec<u8>, (Content, u32)>> {
    let mut tree = BTreeMap::from([(Vec::new(), (Content::Directory, 0o755))]);
    for (path, step) in steps {
        for (slash, _) in path.match_indices('/') {
            let parent = tree.entry(path[..slash].into()).or_insert((Content::Directory, 0o755));
            if parent.0 != Content::Directory {
                return None;
            }
        }
        let (content, mode) = match step {
            Step::File(bytes) => (Content::File(bytes.len() as u64, sha256(bytes)), 0o644),
            Step::Directory(mode) => (Content::Directory, *mode),
            Step::Symlink(target) => (Content::Symlink(target.clone().into_bytes()), 0o777),
            Step::Fifo => (Content::Fifo, 0o644),
        };
        if content != Content::Directory {
            let below = format!("{path}/").into_bytes();
            tree.retain(|other, _| !other.starts_with(&below));
        }
        tree.insert(path.clone().into_bytes(), (content, mode));
    }
    Some(tree)
}

fn archive_of(steps: &[(String, Step)]) -> Archive {
    steps.iter().fold(Archive::new(), |archive, (path, step)| match step {
        Step::File(bytes) => archive.file(path, bytes),
        Step::Directory(mode) => {
            let mut header = Header::new(path.as_bytes(), b'5', 0);
            header.octal(100, 8, u64::from(*mode));
            archive.header(&header)
        }
        Step::Symlink(target) => archive.symlink(path, target),
        Step::Fifo => archive.entry(path.as_bytes(), b'6', b""),
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn a_layer_is_what_its_entries_say_in_order(steps in prop::collection::vec(step(), 0..40)) {
        // A link on the way is followed; the model does not know that, so each path keeps one kind of parent.
        let links: Vec<_> = steps.iter().filter(|(_, step)| matches!(step, Step::Symlink(_))).map(|(path, _)| format!("{path}/")).collect();
        let steps: Vec<_> = steps.iter().filter(|(path, _)| !links.iter().any(|link| path.starts_with(link))).cloned().collect();
        let archive = archive_of(&steps);
        let Some(expect) = model(&steps) else {
            prop_assert!(matches!(refused(archive), EntryReason::ParentNotDirectory(_)));
            return Ok(());
        };
        let layer = Layer::write(&archive.end(), true);
        let snapshot: Snapshot = of_layer(&layer.reader());
        let found: BTreeMap<_, _> = snapshot.into_iter().map(|(path, facts)| (path, (facts.content, facts.mode))).collect();
        prop_assert_eq!(found, expect);
    }
}

/// Walks all that a damaged layer shows, within bounds.
fn walk(reader: &Reader) {
    let Ok(root) = reader.root() else { return };
    let mut pending = vec![root];
    let mut buffer = vec![0; 10_000];
    for _ in 0..1_000 {
        let Some(inode) = pending.pop() else { return };
        let _ = reader.xattrs(&inode);
        let _ = reader.read_at(&inode, &mut buffer, 0);
        let _ = reader.read_at(&inode, &mut buffer, inode.size.saturating_sub(9_000));
        match inode.kind {
            InodeKind::Symlink => drop(reader.read_link(&inode)),
            InodeKind::Directory => {
                let _ = reader.lookup(&inode, b"name");
                let entries = reader.entries(&inode).unwrap_or_default();
                pending.extend(entries.iter().take(100).filter_map(|entry| reader.inode(entry.nid).ok()));
            }
            _ => {}
        }
    }
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(1_000))]

    #[test]
    fn a_damaged_layer_is_an_error_and_no_panic(flips in prop::collection::vec((any::<prop::sample::Index>(), any::<u8>()), 1..12)) {
        use std::os::unix::fs::FileExt;
        let archive = (0..150).fold(Archive::new(), |archive, index| archive.file(&format!("d/name-{index:040}"), b"content"));
        let archive = archive.pax(&[(b"SCHILY.xattr.user.x", b"value")]).file("f", &[1; 5_000]).symlink("l", "target").hard_link("h", "f");
        let mut bytes = image(&archive.end());
        let metadata = bytes.len() - 40_960.min(bytes.len() - 4_096);
        for (index, byte) in flips {
            let at = metadata + index.index(bytes.len() - metadata);
            bytes[at] = byte;
        }
        let file = tempfile::tempfile().unwrap();
        file.write_all_at(&bytes, 0).unwrap();
        walk(&Reader::new(file).unwrap());
    }
}

//! The view without a mount against the kernel's overlay of the same layers.

use std::collections::BTreeMap;
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use funtainer_image::rootfs::{FileKind, Rootfs, RootfsError};
use proptest::prelude::*;

use crate::make::{Archive, Header, Layer, need_root};
use crate::mounted::{Mount, Way};
use crate::snapshot::{self, Content};

/// By path: kind, mode, owner, size, and content or target.
type View = BTreeMap<Vec<u8>, (FileKind, u32, u32, u64, Vec<u8>)>;

fn of_rootfs(rootfs: &Rootfs) -> View {
    let mut view = View::new();
    let mut pending = vec![Vec::new()];
    while let Some(path) = pending.pop() {
        let os_path = Path::new(OsStr::from_bytes(&path));
        let stat = rootfs.symlink_stat(os_path).unwrap();
        let content = match stat.kind {
            FileKind::File => rootfs.read_file(os_path, 1 << 20).unwrap(),
            FileKind::Symlink => rootfs.read_link(os_path).unwrap(),
            FileKind::Directory => {
                let names = rootfs.list(os_path).unwrap();
                pending.extend(names.iter().map(|name| [&path[..], b"/", name].concat()));
                Vec::new()
            }
            _ => Vec::new(),
        };
        view.insert(path, (stat.kind, u32::from(stat.mode), stat.uid, stat.size, content));
    }
    view
}

fn of_mount(mount: &Mount) -> View {
    let root = mount.path();
    let facts = snapshot::of_directory(&root).into_iter();
    facts
        .map(|(path, facts)| {
            let full = root.join("").join(OsStr::from_bytes(&path));
            let (kind, size, content) = match facts.content {
                Content::File(size, _) => (FileKind::File, size, fs::read(full).unwrap()),
                Content::Directory => (FileKind::Directory, 0, Vec::new()),
                Content::Symlink(target) => (FileKind::Symlink, target.len() as u64, target),
                Content::Character(..) | Content::Block(..) => (FileKind::Device, 0, Vec::new()),
                Content::Fifo => (FileKind::Fifo, 0, Vec::new()),
            };
            let path = if path.is_empty() { path } else { [b"/", &path[..]].concat() };
            (path, (kind, facts.mode, facts.owner.0, size, content))
        })
        .collect()
}

fn rootfs(layers: &[Layer]) -> Rootfs {
    Rootfs::new(layers.iter().map(Layer::open).collect()).unwrap()
}

fn compare(way: Way, layers: &[Layer]) {
    let mounts: Vec<Mount> = layers.iter().map(|layer| Mount::erofs_by(way, &layer.path())).collect();
    let overlay = Mount::overlay(&mounts);
    assert_eq!(of_rootfs(&rootfs(layers)), of_mount(&overlay));
}

fn three() -> [Layer; 3] {
    let mut passwd = Header::new(b"etc/passwd", b'0', 4);
    passwd.octal(100, 8, 0o600).octal(108, 8, 42);
    let bottom = Archive::new()
        .header(&passwd)
        .data(b"root")
        .file("etc/group", b"wheel")
        .file("usr/bin/tool", b"old")
        .symlink("bin", "usr/bin")
        .file("gone/deep/file", b"")
        .file("hidden/old", b"")
        .file("replaced/x", b"")
        .file("was-file", b"");
    let middle = Archive::new()
        .file("usr/bin/tool", b"new")
        .file("etc/.wh.group", b"")
        .file(".wh.gone", b"")
        .file("hidden/.wh..wh..opq", b"")
        .file("hidden/new", b"")
        .file("replaced", b"now a file")
        .file("was-file/now", b"a directory");
    let top = Archive::new().file("gone/again", b"").symlink("replaced", "/etc/passwd").file("etc/hosts", b"");
    [Layer::write(&bottom.end(), true), Layer::write(&middle.end(), false), Layer::write(&top.end(), false)]
}

#[test]
fn the_view_is_the_kernels() {
    need_root();
    for way in Way::all() {
        compare(*way, &three());
    }
}

#[test]
fn paths_are_resolved_within_the_image() {
    let rootfs = rootfs(&three());
    let read = |path: &str| rootfs.read_file(path, 100).map(|bytes| String::from_utf8(bytes).unwrap());
    assert_eq!(read("/bin/tool").unwrap(), "new");
    assert_eq!(read("bin/../../../usr/./bin//tool").unwrap(), "new");
    assert_eq!(read("/replaced").unwrap(), "root");
    assert_eq!(rootfs.symlink_stat("/replaced").unwrap().kind, FileKind::Symlink);
    assert_eq!(rootfs.read_link("/bin").unwrap(), b"usr/bin");
    assert_eq!(rootfs.stat("/bin/").unwrap().kind, FileKind::Directory);
    assert_eq!(rootfs.symlink_stat("/bin/").unwrap().kind, FileKind::Directory);
    let stat = rootfs.stat("/etc/passwd").unwrap();
    assert_eq!((stat.mode, stat.uid, stat.size, stat.is_executable_file()), (0o600, 42, 4, false));
    assert_eq!(rootfs.list("/gone").unwrap(), [b"again"]);
    assert_eq!(rootfs.list("/hidden").unwrap(), [b"new"]);

    for missing in ["/etc/group", "/gone/deep", "/hidden/old", "/no/such", ""] {
        let found = read(missing);
        let expected = matches!(found, Err(RootfsError::NotFound(_))) || missing.is_empty();
        assert!(expected, "{missing}: {found:?}");
    }
    assert!(matches!(read("/etc"), Err(RootfsError::NotFile(_))));
    assert!(matches!(read("/etc/passwd/x"), Err(RootfsError::NotDirectory(_))));
    assert!(matches!(read("/etc/passwd/"), Err(RootfsError::NotDirectory(_))));
    assert!(matches!(rootfs.list("/etc/passwd"), Err(RootfsError::NotDirectory(_))));
    assert!(matches!(rootfs.read_link("/etc"), Err(RootfsError::NotSymlink(_))));
    assert_eq!(rootfs.read_start("/etc/passwd", 3).unwrap(), rootfs.read_file("/etc/passwd", 4).unwrap()[..3]);
    assert_eq!(rootfs.read_start("/etc/passwd", 100).unwrap().len(), 4);
    assert!(matches!(rootfs.read_start("/etc", 3), Err(RootfsError::NotFile(_))));
    assert!(matches!(rootfs.read_file("/etc/passwd", 3), Err(RootfsError::TooLarge { size: 4, limit: 3, .. })));
}

#[test]
fn loops_end() {
    let links = Archive::new().symlink("self", "self").symlink("a", "b").symlink("b", "/a/x").symlink("up", "../..");
    let rootfs = rootfs(&[Layer::write(&links.end(), true)]);
    assert!(matches!(rootfs.stat("/self"), Err(RootfsError::Loop(_))));
    assert!(matches!(rootfs.stat("/a"), Err(RootfsError::Loop(_))));
    assert!(matches!(rootfs.stat("/".repeat(5_000)), Err(RootfsError::Loop(_))));
    assert_eq!(rootfs.list("/up").unwrap().len(), 4);
}

#[test]
fn no_layers_are_an_empty_root() {
    let rootfs = Rootfs::new(Vec::new()).unwrap();
    assert_eq!(rootfs.stat("/").unwrap().mode, 0o755);
    assert!(rootfs.list("/").unwrap().is_empty());
    assert!(matches!(rootfs.stat("/bin"), Err(RootfsError::NotFound(_))));
}

fn layer() -> impl Strategy<Value = Archive> {
    let path = prop::collection::vec(prop::sample::select(vec!["a", "b", "c"]), 1..4).prop_map(|names| names.join("/"));
    let entry = (path, 0..7_u8, prop::sample::select(vec!["a", "../b", "/c", "b/c"]));
    prop::collection::vec(entry, 0..10).prop_map(|entries| {
        let mut archive = Archive::new();
        let mut taken: Vec<String> = Vec::new();
        for (path, kind, target) in entries {
            // No path through a file or a link of the same layer, and no name twice.
            if taken.iter().any(|other| format!("{path}/").starts_with(other) || other.starts_with(&format!("{path}/"))) {
                continue;
            }
            let (parent, name) = path.rsplit_once('/').map_or((String::new(), &*path), |(p, name)| (format!("{p}/"), name));
            archive = match kind {
                0 | 1 => archive.file(&path, path.as_bytes()),
                2 => archive.symlink(&path, target),
                3 | 4 => archive.file(&format!("{parent}.wh.{name}"), b""),
                5 => archive.file(&format!("{path}/.wh..wh..opq"), b"").file(&format!("{path}/z"), b""),
                _ => archive.directory(&path),
            };
            taken.push(format!("{path}/"));
        }
        archive
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(100))]

    #[test]
    fn the_view_is_the_kernels_for_any_layers(archives in prop::collection::vec(layer(), 2..5), base in any::<bool>()) {
        need_root();
        let way = Way::all()[0];
        // The lowest layer shows the same in both forms: its marks make overlayfs hide its whiteouts, since Linux 6.8.
        let forms = std::iter::once(base || way == Way::Attached).chain(std::iter::repeat(false));
        let layers: Vec<Layer> = archives.into_iter().zip(forms).map(|(archive, base)| Layer::write(&archive.end(), base)).collect();
        compare(way, &layers);
    }
}

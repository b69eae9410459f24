//! Everything that one can know of a tree, read from a directory or from a layer, to compare them.

use std::collections::{BTreeMap, HashMap};
use std::ffi::OsStr;
use std::fs;
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::os::unix::fs::{FileTypeExt, MetadataExt};
use std::path::Path;

use funtainer_image::erofs::{Inode, InodeKind, Reader};
use funtainer_model::Digest;
use sha2::{Digest as _, Sha256};

/// By path; the root is empty.
pub(crate) type Snapshot = BTreeMap<Vec<u8>, Facts>;

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Facts {
    pub(crate) content: Content,
    pub(crate) mode: u32,
    pub(crate) owner: (u32, u32),
    pub(crate) mtime: (i64, u32),
    pub(crate) nlink: u64,
    pub(crate) xattrs: BTreeMap<Vec<u8>, Vec<u8>>,
    /// The first path of the same inode.
    pub(crate) same_as: Vec<u8>,
}

#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Content {
    File(u64, Digest),
    Directory,
    Symlink(Vec<u8>),
    Character(u32, u32),
    Block(u32, u32),
    Fifo,
}

/// Compares two trees, and shows the first differences.
pub(crate) fn assert_same(left: &Snapshot, right: &Snapshot) {
    let paths: std::collections::BTreeSet<_> = left.keys().chain(right.keys()).collect();
    let different: Vec<String> = paths
        .into_iter()
        .filter(|path| left.get(*path) != right.get(*path))
        .map(|path| format!("{}:\n  {:?}\n  {:?}", path.escape_ascii(), left.get(path), right.get(path)))
        .collect();
    let first = &different[..different.len().min(5)];
    assert!(different.is_empty(), "{} paths differ, first:\n{}", different.len(), first.join("\n"));
}

/// The tree below a directory.
pub(crate) fn of_directory(root: &Path) -> Snapshot {
    let mut snapshot = Snapshot::new();
    let mut inodes = HashMap::new();
    let mut pending = vec![Vec::new()];
    while let Some(path) = pending.pop() {
        // The slash makes the root of a mount be entered.
        let full = root.join("").join(OsStr::from_bytes(&path));
        let meta = fs::symlink_metadata(&full).unwrap();
        let kind = meta.file_type();
        let device = (rustix::fs::major(meta.rdev()), rustix::fs::minor(meta.rdev()));
        let content = if kind.is_file() {
            let mut hash = Sha256::new();
            let mut file = fs::File::open(&full).unwrap();
            std::io::copy(&mut file, &mut HashWriter(&mut hash)).unwrap();
            Content::File(meta.len(), Digest::from_sha256(hash.finalize().into()))
        } else if kind.is_dir() {
            for entry in fs::read_dir(&full).unwrap() {
                pending.push(join(&path, entry.unwrap().file_name().as_bytes()));
            }
            Content::Directory
        } else if kind.is_symlink() {
            Content::Symlink(fs::read_link(&full).unwrap().into_os_string().into_vec())
        } else if kind.is_char_device() {
            Content::Character(device.0, device.1)
        } else if kind.is_block_device() {
            Content::Block(device.0, device.1)
        } else {
            assert!(kind.is_fifo(), "a layer holds no {kind:?}");
            Content::Fifo
        };
        inodes.entry((meta.dev(), meta.ino())).or_insert_with(Vec::new).push(path.clone());
        let facts = Facts {
            // ext4 counts subdirectories only up to a number.
            nlink: if content == Content::Directory { 0 } else { meta.nlink() },
            content,
            mode: meta.mode() & 0o7777,
            owner: (meta.uid(), meta.gid()),
            mtime: (meta.mtime(), meta.mtime_nsec() as u32),
            xattrs: xattrs(&full),
            same_as: Vec::new(),
        };
        snapshot.insert(path, facts);
    }
    group(&mut snapshot, inodes.into_values());
    snapshot
}

/// The tree of a layer.
pub(crate) fn of_layer(reader: &Reader) -> Snapshot {
    let mut snapshot = Snapshot::new();
    let mut inodes = HashMap::new();
    let mut pending = vec![(Vec::new(), reader.root().unwrap())];
    while let Some((path, inode)) = pending.pop() {
        if inode.kind == InodeKind::Directory {
            let entries = reader.entries(&inode).unwrap();
            let mut directories = 0;
            for entry in entries {
                assert_eq!(reader.lookup(&inode, &entry.name).unwrap(), Some(entry.nid));
                let child = reader.inode(entry.nid).unwrap();
                directories += u32::from(child.kind == InodeKind::Directory);
                pending.push((join(&path, &entry.name), child));
            }
            assert_eq!(inode.nlink, 2 + directories, "links of {}", path.escape_ascii());
        }
        inodes.entry(inode.nid).or_insert_with(Vec::new).push(path.clone());
        snapshot.insert(path, facts(reader, &inode));
    }
    group(&mut snapshot, inodes.into_values());
    snapshot
}

fn facts(reader: &Reader, inode: &Inode) -> Facts {
    let content = match inode.kind {
        InodeKind::File => Content::File(inode.size, content_digest(reader, inode)),
        InodeKind::Directory => Content::Directory,
        InodeKind::Symlink => Content::Symlink(reader.read_link(inode).unwrap()),
        InodeKind::CharacterDevice(major, minor) => Content::Character(major, minor),
        InodeKind::BlockDevice(major, minor) => Content::Block(major, minor),
        InodeKind::Fifo => Content::Fifo,
    };
    Facts {
        nlink: if content == Content::Directory { 0 } else { u64::from(inode.nlink) },
        content,
        mode: u32::from(inode.mode),
        owner: (inode.uid, inode.gid),
        mtime: (inode.mtime.seconds, inode.mtime.nanoseconds),
        xattrs: reader.xattrs(inode).unwrap().into_iter().map(|xattr| (xattr.name, xattr.value)).collect(),
        same_as: Vec::new(),
    }
}

fn content_digest(reader: &Reader, inode: &Inode) -> Digest {
    let mut hash = Sha256::new();
    let mut buffer = vec![0; 1 << 16];
    let mut offset = 0;
    loop {
        let read = reader.read_at(inode, &mut buffer, offset).unwrap();
        if read == 0 {
            return Digest::from_sha256(hash.finalize().into());
        }
        hash.update(&buffer[..read]);
        offset += read as u64;
    }
}

fn group(snapshot: &mut Snapshot, groups: impl Iterator<Item = Vec<Vec<u8>>>) {
    for paths in groups {
        let first = paths.iter().min().unwrap();
        for path in &paths {
            snapshot.get_mut(path).unwrap().same_as.clone_from(first);
        }
    }
}

fn join(path: &[u8], name: &[u8]) -> Vec<u8> {
    if path.is_empty() { name.to_vec() } else { [path, b"/", name].concat() }
}

fn xattrs(path: &Path) -> BTreeMap<Vec<u8>, Vec<u8>> {
    let mut names = vec![0; 1 << 16];
    let length = rustix::fs::llistxattr(path, &mut names).unwrap();
    let names = names[..length].split(|byte| *byte == 0).filter(|name| !name.is_empty());
    names
        .map(|name| {
            let mut value = vec![0; 1 << 16];
            let length = rustix::fs::lgetxattr(path, OsStr::from_bytes(name), &mut value).unwrap();
            value.truncate(length);
            (name.to_vec(), value)
        })
        .collect()
}

struct HashWriter<'a>(&'a mut Sha256);

impl std::io::Write for HashWriter<'_> {
    fn write(&mut self, bytes: &[u8]) -> std::io::Result<usize> {
        self.0.update(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> std::io::Result<()> {
        Ok(())
    }
}

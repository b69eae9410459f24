//! The root file system of an image as its function will see it, read from the layers without mounting them.
//!
//! The rules are overlayfs's (Documentation/filesystems/overlayfs.rst): the uppermost layer that has a name decides what
//! it is; directories merge down to the first layer where the name is no directory, is deleted by a whiteout (character
//! device 0:0), or is marked opaque. Symbolic links are followed as in a chroot: `/` and `..` never lead out.

use std::fs::File;
use std::os::unix::ffi::OsStrExt;
use std::path::Path;

use crate::erofs::{self, Inode, InodeKind, Nid, SYMLINK_HOPS_MAX, WALK_STEPS_MAX};
use crate::tar::{Xattr, printable};

/// Most names that one listing returns.
pub const LIST_MAX: usize = 1 << 20;

/// Why a path of an image cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum RootfsError {
    /// Nothing has the name.
    #[error("'{0}' is not in the image")]
    NotFound(String),
    /// The path leads through something that is no directory, or a directory was wanted.
    #[error("'{0}' is no directory in the image")]
    NotDirectory(String),
    /// A file was wanted.
    #[error("'{0}' is no file in the image")]
    NotFile(String),
    /// A symbolic link was wanted.
    #[error("'{0}' is no symbolic link in the image")]
    NotSymlink(String),
    /// The path leads over too many symbolic links.
    #[error("'{0}' leads over too many symbolic links in the image")]
    Loop(String),
    /// Larger than the caller takes.
    #[error("'{path}' has {size} bytes, more than {limit}")]
    TooLarge {
        /// The path.
        path: String,
        /// Its size in bytes.
        size: u64,
        /// The limit in bytes.
        limit: u64,
    },
    /// More names than are listed.
    #[error("'{0}' has more than {LIST_MAX} names")]
    TooMany(String),
    /// A layer cannot be read.
    #[error("layer {index} of the image cannot be read")]
    Layer {
        /// Which, from the bottom, starting at 0.
        index: usize,
        /// Why.
        #[source]
        source: erofs::ReadError,
    },
}

/// What a path of an image is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Stat {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits (0o7777).
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Bytes of content or of a link's target; 0 for all else.
    pub size: u64,
}

/// Kinds of files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character or block device.
    Device,
    /// A named pipe.
    Fifo,
}

/// The layers of an image, opened.
#[derive(Debug)]
pub struct Rootfs {
    /// From the bottom to the top.
    layers: Vec<erofs::Reader>,
}

impl Stat {
    /// Whether it is a file that root may execute: one with an execute bit.
    pub fn is_executable_file(&self) -> bool {
        self.kind == FileKind::File && self.mode & 0o111 != 0
    }
}

impl Rootfs {
    /// Opens the layers, given from the bottom to the top. None at all are an empty root.
    pub fn new(layers: Vec<File>) -> Result<Self, RootfsError> {
        let open = |(index, file)| erofs::Reader::new(file).map_err(|source| RootfsError::Layer { index, source });
        Ok(Self { layers: layers.into_iter().enumerate().map(open).collect::<Result<_, _>>()? })
    }

    /// What a path is, with a symbolic link at its end followed.
    pub fn stat(&self, path: impl AsRef<Path>) -> Result<Stat, RootfsError> {
        self.resolve(path.as_ref(), true).map(|node| node.stat())
    }

    /// What a path is itself: a symbolic link at its end is not followed.
    pub fn symlink_stat(&self, path: impl AsRef<Path>) -> Result<Stat, RootfsError> {
        self.resolve(path.as_ref(), false).map(|node| node.stat())
    }

    /// The inode of a path, a symbolic link at its end not followed, with its extended attributes; of a directory those of the uppermost layer.
    /// `None` where nothing is.
    pub(crate) fn inode(&self, path: impl AsRef<Path>) -> Result<Option<(Inode, Vec<Xattr>)>, RootfsError> {
        let (layer, inode) = match self.resolve(path.as_ref(), false) {
            Ok(Node::Leaf { layer, inode }) => (layer, inode),
            Ok(Node::Directory(merged)) => match merged.into_iter().next() {
                Some(uppermost) => uppermost,
                None => return Ok(None),
            },
            Err(RootfsError::NotFound(_) | RootfsError::NotDirectory(_)) => return Ok(None),
            Err(error) => return Err(error),
        };
        let xattrs = self.layer(layer, |reader| reader.xattrs(&inode))?;
        Ok(Some((inode, xattrs)))
    }

    /// The content of a file of at most `bytes_max` bytes, symbolic links followed.
    pub fn read_file(&self, path: impl AsRef<Path>, bytes_max: u64) -> Result<Vec<u8>, RootfsError> {
        let path = path.as_ref();
        let (layer, inode) = self.file(path)?;
        if inode.size > bytes_max {
            return Err(RootfsError::TooLarge { path: show(path), size: inode.size, limit: bytes_max });
        }
        let mut content = vec![0; inode.size as usize];
        self.layer(layer, |reader| reader.read_at(&inode, &mut content, 0))?;
        Ok(content)
    }

    /// The first bytes of a file, at most `bytes_max`, symbolic links followed.
    pub fn read_start(&self, path: impl AsRef<Path>, bytes_max: usize) -> Result<Vec<u8>, RootfsError> {
        let (layer, inode) = self.file(path.as_ref())?;
        let mut content = vec![0; inode.size.min(bytes_max as u64) as usize];
        self.layer(layer, |reader| reader.read_at(&inode, &mut content, 0))?;
        Ok(content)
    }

    /// The target of a symbolic link.
    pub fn read_link(&self, path: impl AsRef<Path>) -> Result<Vec<u8>, RootfsError> {
        let path = path.as_ref();
        match self.resolve(path, false)? {
            Node::Leaf { layer, inode } if inode.kind == InodeKind::Symlink => {
                self.layer(layer, |reader| reader.read_link(&inode))
            }
            _ => Err(RootfsError::NotSymlink(show(path))),
        }
    }

    /// The names in a directory in byte order, without `.` and `..`, symbolic links followed.
    pub fn list(&self, path: impl AsRef<Path>) -> Result<Vec<Vec<u8>>, RootfsError> {
        let path = path.as_ref();
        let Node::Directory(directory) = self.resolve(path, true)? else {
            return Err(RootfsError::NotDirectory(show(path)));
        };
        let mut names = std::collections::BTreeMap::new();
        for (layer, inode) in &directory {
            for entry in self.layer(*layer, |reader| reader.entries(inode))? {
                if names.len() >= LIST_MAX {
                    return Err(RootfsError::TooMany(show(path)));
                }
                if let std::collections::btree_map::Entry::Vacant(vacant) = names.entry(entry.name) {
                    let whiteout = self.layer(*layer, |reader| reader.inode(entry.nid))?.is_whiteout();
                    vacant.insert(!whiteout);
                }
            }
        }
        Ok(names.into_iter().filter_map(|(name, exists)| exists.then_some(name)).collect())
    }

    /// The regular file that a path leads to, and its layer.
    fn file(&self, path: &Path) -> Result<(usize, Inode), RootfsError> {
        match self.resolve(path, true)? {
            Node::Leaf { layer, inode } if inode.kind == InodeKind::File => Ok((layer, inode)),
            _ => Err(RootfsError::NotFile(show(path))),
        }
    }

    /// Follows a path from the root.
    fn resolve(&self, path: &Path, follow_last: bool) -> Result<Node, RootfsError> {
        let mut rest = path.as_os_str().as_bytes().to_vec();
        let mut start = 0;
        let mut hops = 0;
        let mut steps = 0;
        // The directories from the root to here; the root stays.
        let mut trail = vec![self.root()?];
        loop {
            steps += 1;
            if steps > WALK_STEPS_MAX {
                return Err(RootfsError::Loop(show(path)));
            }
            let end = rest[start..].iter().position(|byte| *byte == b'/').map_or(rest.len(), |slash| start + slash);
            let name = &rest[start..end];
            let is_last = rest[end..].iter().all(|byte| *byte == b'/');
            let next = (end + 1).min(rest.len());
            match name {
                b"" | b"." => {}
                b".." => trail.truncate((trail.len() - 1).max(1)),
                name => {
                    let directory = trail.last().expect("the root stays");
                    match self.child(directory, name)? {
                        None => return Err(RootfsError::NotFound(show(path))),
                        Some(Node::Directory(child)) => trail.push(child),
                        // A slash at the end follows too.
                        Some(Node::Leaf { layer, inode })
                            if inode.kind == InodeKind::Symlink && (follow_last || !is_last || end < rest.len()) =>
                        {
                            hops += 1;
                            if hops > SYMLINK_HOPS_MAX {
                                return Err(RootfsError::Loop(show(path)));
                            }
                            let target = self.layer(layer, |reader| reader.read_link(&inode))?;
                            if target.starts_with(b"/") {
                                trail.truncate(1);
                            }
                            rest = [&target, &rest[end..]].concat();
                            start = 0;
                            continue;
                        }
                        Some(leaf) if end == rest.len() => return Ok(leaf),
                        Some(_) => return Err(RootfsError::NotDirectory(show(path))),
                    }
                }
            }
            if end == rest.len() {
                return Ok(Node::Directory(trail.pop().expect("the root stays")));
            }
            start = next;
        }
    }

    fn root(&self) -> Result<Merged, RootfsError> {
        let layers = (0..self.layers.len()).rev();
        layers.map(|index| Ok((index, self.layer(index, erofs::Reader::root)?))).collect()
    }

    /// What a name in a merged directory is.
    fn child(&self, directory: &Merged, name: &[u8]) -> Result<Option<Node>, RootfsError> {
        let mut merged = Merged::new();
        for (layer, inode) in directory {
            let find = |reader: &erofs::Reader| {
                let nid: Option<Nid> = reader.lookup(inode, name)?;
                nid.map(|nid| reader.inode(nid)).transpose()
            };
            let Some(child) = self.layer(*layer, find)? else { continue };
            if child.kind != InodeKind::Directory {
                return Ok(match merged.is_empty() {
                    true if child.is_whiteout() => None,
                    true => Some(Node::Leaf { layer: *layer, inode: child }),
                    false => Some(Node::Directory(merged)),
                });
            }
            let opaque = self.layer(*layer, |reader| reader.is_opaque(&child))?;
            merged.push((*layer, child));
            if opaque {
                break;
            }
        }
        Ok((!merged.is_empty()).then_some(Node::Directory(merged)))
    }

    fn layer<T>(
        &self,
        index: usize,
        read: impl FnOnce(&erofs::Reader) -> Result<T, erofs::ReadError>,
    ) -> Result<T, RootfsError> {
        read(&self.layers[index]).map_err(|source| RootfsError::Layer { index, source })
    }
}

/// A directory: the ones of the layers that it is made of, from the top to the bottom, with their layers.
type Merged = Vec<(usize, Inode)>;

/// What a path leads to.
enum Node {
    Directory(Merged),
    Leaf { layer: usize, inode: Inode },
}

impl Node {
    fn stat(&self) -> Stat {
        let (inode, kind) = match self {
            Self::Directory(merged) => {
                let Some((_, inode)) = merged.first() else {
                    return Stat { kind: FileKind::Directory, mode: 0o755, uid: 0, gid: 0, size: 0 };
                };
                (inode, FileKind::Directory)
            }
            Self::Leaf { inode, .. } => {
                let kind = match inode.kind {
                    InodeKind::File => FileKind::File,
                    InodeKind::Directory => FileKind::Directory,
                    InodeKind::Symlink => FileKind::Symlink,
                    InodeKind::CharacterDevice(..) | InodeKind::BlockDevice(..) => FileKind::Device,
                    InodeKind::Fifo => FileKind::Fifo,
                };
                (inode, kind)
            }
        };
        let size = if matches!(kind, FileKind::File | FileKind::Symlink) { inode.size } else { 0 };
        Stat { kind, mode: inode.mode, uid: inode.uid, gid: inode.gid, size }
    }
}

fn show(path: &Path) -> String {
    printable(path.as_os_str().as_bytes())
}

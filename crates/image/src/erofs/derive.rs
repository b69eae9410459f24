//! A layer as it must be over the layers below it, where its archive leaves that open.
//!
//! An archive may use a directory that it does not have (`app/file` without `app/`). Unpacked over the layers below, as the OCI image
//! specification, "Applying Changesets", has it, such a directory is theirs: with their owner and mode, and where they have a symbolic link
//! to a directory in its place, behind that link. A layer is written before it is known what lies below, since one layer is
//! shared by many images: there an implied directory is a directory of its own, which carries a mark. [`derive()`] makes the second form that
//! is right over certain layers, and only where it differs: content is copied as it lies, the metadata behind it is written anew.
//!
//! Where a path through a link and a direct path lead to one name, the direct one stands: the order of the archive is not known any more.

use std::collections::{BTreeSet, HashMap};
use std::ffi::OsStr;
use std::fs::File;
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::FileExt;

use rustix::fs::SeekFrom;
use rustix::io::Errno;

use super::emit;
use super::format::{BLOCK_BYTES, encode_device};
use super::reader::{Inode, InodeKind, Nid, ReadError, Reader};
use super::tree::{
    Attributes, Directory, EntryReason, MODE_IMPLIED, Node, NodeId, NodeKind, ROOT, SYMLINK_HOPS_MAX, Tree, WALK_STEPS_MAX,
};
use super::writer::{Appender, WriteError, WriteOptions};
use super::xattr;
use crate::rootfs::{Rootfs, RootfsError};

/// Most implied directories of one layer that stand for links below. Broken builders make one for each of `/bin`, `/lib` and the like.
const RELOCATIONS_MAX: usize = 1024;
/// Bytes of content that are copied at once.
const COPY_BYTES: usize = 256 << 10;

/// Why the second form of a layer could not be made.
#[derive(Debug, thiserror::Error)]
pub enum DeriveError {
    /// The layer cannot be read.
    #[error(transparent)]
    Layer(#[from] ReadError),
    /// One below it cannot be read.
    #[error(transparent)]
    Below(#[from] RootfsError),
    /// Over a named limit.
    #[error("more than {RELOCATIONS_MAX} paths of the layer lead through symbolic links of the layers below")]
    TooManyLinks,
    /// It would be no layer.
    #[error(transparent)]
    Reason(#[from] EntryReason),
    /// It cannot be written.
    #[error(transparent)]
    Write(#[from] WriteError),
    /// The content cannot be copied.
    #[error("the content of the layer cannot be copied")]
    Copy(#[source] io::Error),
}

/// Writes `layer` to `out`, which must be empty, as it is over `below`; `false`, with nothing written, where it is that already.
pub fn derive(layer: &Reader, below: &Rootfs, out: &File) -> Result<bool, DeriveError> {
    if !layer.superblock().implied {
        return Ok(false);
    }
    let mut derivation = Derivation { tree: read_tree(layer)?, below, wanted: BTreeSet::new() };
    let moved = derivation.relocate()?;
    let changed = derivation.adopt()?;
    if !moved && !changed {
        return Ok(false);
    }
    let mut tree = derivation.tree;
    for node in &mut tree.nodes {
        if let NodeKind::Directory(directory) = &mut node.kind {
            directory.implied = false;
        }
    }
    copy_content(layer, out).map_err(DeriveError::Copy)?;
    let next_block = u64::from(layer.superblock().metadata_block);
    emit::emit(tree, Appender::new(out), next_block, WriteOptions { base: false })?;
    Ok(true)
}

/// A directory on the way, by the names from the root.
type Names = Vec<Box<[u8]>>;

struct Derivation<'a> {
    tree: Tree,
    below: &'a Rootfs,
    /// Directories that have implied ones in them, at any depth: the others need not be entered.
    wanted: BTreeSet<NodeId>,
}

/// A directory that exists below as well.
struct Visit {
    node: NodeId,
    path: Names,
    /// Whether something on the way to it, or itself, hides what lies below.
    hidden: bool,
}

/// What the layers below have in a place.
enum Below {
    Directory(Box<Inode>, Vec<crate::tar::Xattr>),
    Symlink(Vec<u8>),
    Other,
}

impl Derivation<'_> {
    /// Moves what was written into implied directories behind the links that stand there below. Whether there were any.
    fn relocate(&mut self) -> Result<bool, DeriveError> {
        self.find_wanted();
        let mut relocations = 0;
        let mut pending = vec![Visit { node: ROOT, path: Names::new(), hidden: self.tree.directory(ROOT).opaque }];
        while let Some(Visit { node, path, hidden }) = pending.pop() {
            if hidden {
                continue;
            }
            for (name, child) in self.wanted_children(node) {
                let child_path = joined(&path, &name);
                let directory = self.tree.directory(child);
                let (implied, hidden) = (directory.implied, directory.opaque);
                match self.below(&child_path)? {
                    Below::Directory(..) => pending.push(Visit { node: child, path: child_path, hidden }),
                    Below::Symlink(_) if implied => {
                        let Some(target) = self.resolve(&child_path)? else { continue };
                        relocations += 1;
                        if relocations > RELOCATIONS_MAX {
                            return Err(DeriveError::TooManyLinks);
                        }
                        let visit = self.relocate_one(node, &name, child, target)?;
                        pending.push(visit);
                    }
                    Below::Symlink(_) | Below::Other => {}
                }
            }
        }
        Ok(relocations > 0)
    }

    /// Moves the content of the implied directory `child` to where the link in its place leads.
    fn relocate_one(&mut self, parent: NodeId, name: &[u8], child: NodeId, target: Names) -> Result<Visit, DeriveError> {
        self.tree.directory_mut(parent).children.remove(name);
        let mut at = ROOT;
        let mut hidden = self.tree.directory(ROOT).opaque;
        self.wanted.insert(ROOT);
        for name in &target {
            at = match self.tree.directory(at).children.get(name).copied() {
                Some(known) if self.is_directory(known) => known,
                _ => self.tree.imply_directory(at, name)?,
            };
            // Made or not, all on the way is looked at again: attributes come later.
            self.wanted.insert(at);
            hidden |= self.tree.directory(at).opaque;
        }
        self.merge(child, at)?;
        Ok(Visit { node: at, path: target, hidden: hidden | self.tree.directory(at).opaque })
    }

    /// Puts the content of `from` into `to`; what is there already stays.
    fn merge(&mut self, from: NodeId, to: NodeId) -> Result<(), EntryReason> {
        let mut pending = vec![(from, to)];
        while let Some((from, to)) = pending.pop() {
            let Directory { children, whiteouts, opaque, .. } = std::mem::take(self.tree.directory_mut(from));
            if self.wanted.contains(&from) {
                self.wanted.insert(to);
            }
            let target = self.tree.directory_mut(to);
            target.opaque |= opaque;
            target.whiteouts.extend(whiteouts);
            for (name, child) in children {
                match self.tree.directory(to).children.get(&name).copied() {
                    None => self.tree.link(to, &name, child)?,
                    Some(there) if self.is_directory(there) && self.is_directory(child) => {
                        if self.tree.directory(there).implied && !self.tree.directory(child).implied {
                            let Node { attributes, xattrs, .. } = &mut self.tree.nodes[child as usize];
                            let (attributes, xattrs) = (*attributes, std::mem::take(xattrs));
                            self.tree.set_attributes(there, attributes, xattrs)?;
                            self.tree.directory_mut(there).implied = false;
                        }
                        pending.push((child, there));
                    }
                    Some(_) => {}
                }
            }
        }
        Ok(())
    }

    /// Gives implied directories what the layers below have in their place. Whether that changes any.
    fn adopt(&mut self) -> Result<bool, DeriveError> {
        let mut changed = false;
        let mut pending = vec![Visit { node: ROOT, path: Names::new(), hidden: self.tree.directory(ROOT).opaque }];
        while let Some(Visit { node, path, hidden }) = pending.pop() {
            if hidden {
                continue;
            }
            for (name, child) in self.wanted_children(node) {
                let child_path = joined(&path, &name);
                let Below::Directory(inode, xattrs) = self.below(&child_path)? else { continue };
                if self.tree.directory(child).implied {
                    let xattrs = xattr::encode(&xattrs, true)?;
                    changed |= (inode.mode, inode.uid, inode.gid) != (MODE_IMPLIED, 0, 0) || !xattrs.is_empty();
                    self.tree.set_attributes(child, attributes(&inode), xattrs)?;
                }
                pending.push(Visit { node: child, path: child_path, hidden: self.tree.directory(child).opaque });
            }
        }
        Ok(changed)
    }

    /// Follows a path to a directory as it will be seen: in this layer and the ones below, over the links of both. `None` where it leads to none.
    fn resolve(&self, path: &Names) -> Result<Option<Names>, DeriveError> {
        /// A directory on the way: its name, its node if this layer has it, and whether what lies below is hidden in it.
        struct Step {
            name: Box<[u8]>,
            node: Option<NodeId>,
            hidden: bool,
        }
        let root = Step { name: Box::default(), node: Some(ROOT), hidden: self.tree.directory(ROOT).opaque };
        let mut trail = vec![root];
        // The names still to follow, the next one last.
        let mut rest: Names = path.iter().rev().cloned().collect();
        let (mut hops, mut steps) = (0, 0);
        while let Some(name) = rest.pop() {
            steps += 1;
            if steps > WALK_STEPS_MAX {
                return Ok(None);
            }
            match &*name {
                b"" | b"." => continue,
                b".." => {
                    trail.truncate((trail.len() - 1).max(1));
                    continue;
                }
                _ => {}
            }
            let at = trail.last().expect("the root stays");
            let own = at.node.and_then(|node| self.tree.directory(node).children.get(&name).copied());
            let deleted = at.node.is_some_and(|node| self.tree.directory(node).whiteouts.contains(&name));
            let hidden = at.hidden || deleted;
            let below = |derivation: &Self| {
                let names: Names = trail[1..].iter().map(|step| step.name.clone()).chain([name.clone()]).collect();
                if hidden { Ok(Below::Other) } else { derivation.below(&names) }
            };
            let target = match own.map(|node| (node, &self.tree.nodes[node as usize].kind)) {
                Some((node, NodeKind::Directory(directory))) => match below(self)? {
                    Below::Symlink(target) if directory.implied => target,
                    found => {
                        // What is no directory below has nothing that could be seen in it.
                        let hidden = hidden || directory.opaque || !matches!(found, Below::Directory(..));
                        trail.push(Step { name, node: Some(node), hidden });
                        continue;
                    }
                },
                Some((_, NodeKind::Symlink(target))) => target.to_vec(),
                Some(_) => return Ok(None),
                None => match below(self)? {
                    Below::Directory(..) => {
                        trail.push(Step { name, node: None, hidden });
                        continue;
                    }
                    Below::Symlink(target) => target,
                    Below::Other => return Ok(None),
                },
            };
            hops += 1;
            if hops > SYMLINK_HOPS_MAX {
                return Ok(None);
            }
            if target.starts_with(b"/") {
                trail.truncate(1);
            }
            rest.extend(target.split(|byte| *byte == b'/').rev().map(Box::from));
        }
        Ok(Some(trail.into_iter().skip(1).map(|step| step.name).collect()))
    }

    fn below(&self, path: &Names) -> Result<Below, RootfsError> {
        let path = path.join(&b'/');
        Ok(match self.below.inode(OsStr::from_bytes(&path))? {
            Some((inode, xattrs)) if inode.kind == InodeKind::Directory => Below::Directory(Box::new(inode), xattrs),
            Some((inode, _)) if inode.kind == InodeKind::Symlink => {
                Below::Symlink(self.below.read_link(OsStr::from_bytes(&path))?)
            }
            // A file, or nothing.
            Some(_) | None => Below::Other,
        })
    }

    fn is_directory(&self, node: NodeId) -> bool {
        matches!(self.tree.nodes[node as usize].kind, NodeKind::Directory(_))
    }

    fn wanted_children(&self, node: NodeId) -> Vec<(Box<[u8]>, NodeId)> {
        let children = &self.tree.directory(node).children;
        let wanted = children.iter().filter(|(_, child)| self.is_directory(**child) && self.wanted.contains(child));
        wanted.map(|(name, child)| (name.clone(), *child)).collect()
    }

    fn find_wanted(&mut self) {
        for (index, node) in self.tree.nodes.iter().enumerate() {
            let NodeKind::Directory(directory) = &node.kind else { continue };
            if !directory.implied {
                continue;
            }
            let (mut at, mut parent) = (index as NodeId, directory.parent);
            while self.wanted.insert(at) && at != ROOT {
                at = parent;
                parent = self.tree.directory(at).parent;
            }
        }
    }
}

/// The tree of a stored layer; the marks of directories become what they stand for.
fn read_tree(layer: &Reader) -> Result<Tree, DeriveError> {
    let mut tree = Tree::new();
    let root = layer.root()?;
    tree.set_attributes(ROOT, attributes(&root), encoded(layer, &root)?)?;
    // Inodes with several names.
    let mut shared: HashMap<Nid, NodeId> = HashMap::new();
    let mut pending = vec![(ROOT, root)];
    while let Some((node, inode)) = pending.pop() {
        tree.directory_mut(node).opaque = layer.is_opaque(&inode)?;
        tree.directory_mut(node).implied = layer.is_implied(&inode)?;
        for entry in layer.entries(&inode)? {
            let child = layer.inode(entry.nid)?;
            if child.is_whiteout() {
                tree.whiteout(node, &entry.name)?;
                continue;
            }
            if let Some(known) = shared.get(&entry.nid) {
                tree.link(node, &entry.name, *known)?;
                continue;
            }
            let kind = match child.kind {
                InodeKind::Directory => NodeKind::Directory(Box::default()),
                InodeKind::File => NodeKind::File { size: child.size, block: child.block() },
                InodeKind::Symlink => NodeKind::Symlink(layer.read_link(&child)?.into()),
                InodeKind::CharacterDevice(major, minor) => NodeKind::CharacterDevice(encode_device(major, minor)),
                InodeKind::BlockDevice(major, minor) => NodeKind::BlockDevice(encode_device(major, minor)),
                InodeKind::Fifo => NodeKind::Fifo,
            };
            let id = tree.add(Node { kind, attributes: attributes(&child), xattrs: encoded(layer, &child)? })?;
            tree.link(node, &entry.name, id)?;
            if child.kind == InodeKind::Directory {
                pending.push((id, child));
            } else if child.nlink > 1 {
                shared.insert(entry.nid, id);
            }
        }
    }
    Ok(tree)
}

fn attributes(inode: &Inode) -> Attributes {
    Attributes { mode: inode.mode, uid: inode.uid, gid: inode.gid, mtime: inode.mtime }
}

/// The attributes of an inode without the marks of overlayfs and ours, which are written anew.
fn encoded(layer: &Reader, inode: &Inode) -> Result<Box<[u8]>, DeriveError> {
    Ok(xattr::encode(&layer.xattrs(inode)?, matches!(inode.kind, InodeKind::File | InodeKind::Directory))?)
}

/// Copies what lies before the metadata, holes as holes.
fn copy_content(layer: &Reader, out: &File) -> io::Result<()> {
    let (from, end) = (layer.file(), layer.superblock().metadata_offset());
    let mut buffer = vec![0; COPY_BYTES];
    let mut offset = BLOCK_BYTES;
    while offset < end {
        offset = match rustix::fs::seek(from, SeekFrom::Data(offset)) {
            Ok(data) => data,
            Err(Errno::NXIO) => return Ok(()),
            Err(error) => return Err(error.into()),
        };
        let hole = rustix::fs::seek(from, SeekFrom::Hole(offset))?.min(end);
        while offset < hole {
            let piece = &mut buffer[..(hole - offset).min(COPY_BYTES as u64) as usize];
            from.read_exact_at(piece, offset)?;
            out.write_all_at(piece, offset)?;
            offset += piece.len() as u64;
        }
    }
    Ok(())
}

fn joined(path: &Names, name: &[u8]) -> Names {
    path.iter().cloned().chain([name.into()]).collect()
}

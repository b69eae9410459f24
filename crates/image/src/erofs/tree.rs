//! The tree that a layer's archive describes, by the rules of the OCI image specification, "Image Layer Filesystem
//! Changeset". Only names and metadata are held; content is written as it comes.
//!
//! Each layer is written without the ones below it. A directory that the archive uses but does not have gets mode 0755 and owner 0:0, and is
//! marked as implied: where a lower layer has it with others, or has a symbolic link there, [`super::derive()`] makes a second form of the
//! layer that fits.

use std::collections::{BTreeMap, BTreeSet};

use crate::tar::{PATH_BYTES_MAX, Timestamp, printable};

use super::format::{S_IFBLK, S_IFCHR, S_IFDIR, S_IFIFO, S_IFLNK, S_IFREG};
use super::writer::{ENTRIES_MAX, IMAGE_BLOCKS_MAX, METADATA_BYTES_MAX};
use super::xattr::{XATTR_NAME_BYTES_MAX, XATTR_TOTAL_BYTES_MAX, XATTR_VALUE_BYTES_MAX};

/// Longest name of one file, in bytes, as Linux has it.
pub const NAME_BYTES_MAX: usize = 255;
/// Most symbolic links that one path may lead over, as Linux has it.
pub const SYMLINK_HOPS_MAX: usize = 40;
/// Most components that one path may lead over, those of symbolic links included.
pub const WALK_STEPS_MAX: usize = 4096;

/// Prefix of names that delete what lies below (OCI image specification, "Whiteouts").
const WHITEOUT: &[u8] = b".wh.";
/// Prefix of names that AUFS kept for itself.
const WHITEOUT_META: &[u8] = b".wh..wh.";
/// Hides all that lies below its directory.
const WHITEOUT_OPAQUE: &[u8] = b".wh..wh..opq";
/// Mode of directories that the archive uses but does not have.
pub(super) const MODE_IMPLIED: u16 = 0o755;

/// Why an entry cannot be part of a layer.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum EntryReason {
    /// The path leads out of where it starts.
    #[error("the path contains '..'")]
    DotDot,
    /// Over the limit.
    #[error("a name of {0} bytes; at most {NAME_BYTES_MAX} are allowed")]
    NameTooLong(usize),
    /// The path leads through something that is no directory.
    #[error("'{0}' on the way is no directory")]
    ParentNotDirectory(String),
    /// Too many links.
    #[error("the path leads over too many symbolic links (at most {SYMLINK_HOPS_MAX}) or names (at most {WALK_STEPS_MAX})")]
    Loop,
    /// A hard link to nothing that this layer has.
    #[error("the target '{0}' of the hard link is not in this layer")]
    HardLinkMissing(String),
    /// A hard link to a directory.
    #[error("the target '{0}' of the hard link is a directory")]
    HardLinkDirectory(String),
    /// The root is replaced by a file.
    #[error("the root can only be a directory")]
    Root,
    /// A layer that hides everything below it: overlayfs cannot do that for the root.
    #[error("the layer hides the whole root of the layers below it")]
    OpaqueRoot,
    /// A symbolic link to nothing.
    #[error("a symbolic link without target")]
    SymlinkEmpty,
    /// A whiteout of no name, or a file below a whiteout.
    #[error("a name with the prefix .wh. that deletes nothing")]
    Whiteout,
    /// Linux has no such device.
    #[error("device {0}:{1} cannot exist")]
    Device(u32, u32),
    /// Over the limit.
    #[error("the name of an extended attribute of {0} bytes; at most {XATTR_NAME_BYTES_MAX} are allowed")]
    XattrName(usize),
    /// Over the limit.
    #[error("the value of an extended attribute of {0} bytes; at most {XATTR_VALUE_BYTES_MAX} are allowed")]
    XattrValue(usize),
    /// Over the limit.
    #[error("more than {XATTR_TOTAL_BYTES_MAX} bytes of extended attributes")]
    XattrTotal,
    /// Linux would refuse every access to the file.
    #[error("a malformed access control list")]
    Acl,
    /// Over the limit.
    #[error("more than {ENTRIES_MAX} files and directories")]
    TooMany,
    /// Over the limit.
    #[error("more than {METADATA_BYTES_MAX} bytes of names, link targets and extended attributes")]
    MetadataTooLarge,
    /// Over the limit.
    #[error("the layer needs more than {IMAGE_BLOCKS_MAX} blocks")]
    ImageTooLarge,
}

/// Index of a node in its tree.
pub(super) type NodeId = u32;
/// The root, always a directory.
pub(super) const ROOT: NodeId = 0;

#[derive(Debug)]
pub(super) struct Tree {
    pub(super) nodes: Vec<Node>,
    /// Bytes of names, targets and attributes, for the limit.
    metadata_bytes: u64,
    /// The parent path looked up last, and what it was. Most entries share their parent with the one before.
    last_parent: Option<(Vec<u8>, NodeId)>,
}

/// An inode to be.
#[derive(Debug)]
pub(super) struct Node {
    pub(super) kind: NodeKind,
    pub(super) attributes: Attributes,
    /// Encoded extended attributes.
    pub(super) xattrs: Box<[u8]>,
}

#[derive(Debug, Clone, Copy, Default)]
pub(super) struct Attributes {
    /// Permission bits.
    pub(super) mode: u16,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: Timestamp,
}

#[derive(Debug)]
pub(super) enum NodeKind {
    Directory(Box<Directory>),
    File {
        size: u64,
        /// First block of the content; 0 where there is none.
        block: u32,
    },
    Symlink(Box<[u8]>),
    CharacterDevice(u32),
    BlockDevice(u32),
    Fifo,
}

#[derive(Debug, Default)]
pub(super) struct Directory {
    pub(super) parent: NodeId,
    pub(super) children: BTreeMap<Box<[u8]>, NodeId>,
    /// Names of lower layers that this layer deletes.
    pub(super) whiteouts: BTreeSet<Box<[u8]>>,
    /// Hides the whole directory of the lower layers.
    pub(super) opaque: bool,
    /// Used by the archive, but not in it.
    pub(super) implied: bool,
}

/// What the last name of an entry's path means.
#[derive(Debug)]
pub(super) enum Place<'a> {
    /// The root itself.
    Root,
    /// A name in a directory.
    Name(NodeId, &'a [u8]),
    /// Something of the directory's lower layers is deleted; done.
    Done,
}

impl NodeKind {
    /// The type bits of `st_mode`.
    pub(super) fn type_bits(&self) -> u16 {
        match self {
            Self::Directory(_) => S_IFDIR,
            Self::File { .. } => S_IFREG,
            Self::Symlink(_) => S_IFLNK,
            Self::CharacterDevice(_) => S_IFCHR,
            Self::BlockDevice(_) => S_IFBLK,
            Self::Fifo => S_IFIFO,
        }
    }
}

impl Tree {
    pub(super) fn new() -> Self {
        let attributes = Attributes { mode: MODE_IMPLIED, ..Attributes::default() };
        let root = Node { kind: NodeKind::Directory(Box::default()), attributes, xattrs: Box::default() };
        Self { nodes: vec![root], metadata_bytes: 0, last_parent: None }
    }

    /// Finds where an entry belongs, makes the directories on the way, and takes in whiteouts.
    pub(super) fn place<'a>(&mut self, path: &'a [u8]) -> Result<Place<'a>, EntryReason> {
        let Some((parent, name)) = split(path)? else { return Ok(Place::Root) };
        if path_components(parent).any(|component| component.starts_with(WHITEOUT_META)) {
            return Ok(Place::Done);
        }
        let directory = self.directory_at(parent)?;
        let Some(hidden) = name.strip_prefix(WHITEOUT) else { return Ok(Place::Name(directory, name)) };
        if name == WHITEOUT_OPAQUE {
            self.directory_mut(directory).opaque = true;
        } else if !name.starts_with(WHITEOUT_META) {
            self.whiteout(directory, hidden)?;
        }
        Ok(Place::Done)
    }

    /// Deletes a name of the lower layers.
    pub(super) fn whiteout(&mut self, directory: NodeId, name: &[u8]) -> Result<(), EntryReason> {
        if matches!(name, b"" | b"." | b"..") {
            return Err(EntryReason::Whiteout);
        }
        self.count_metadata(name.len())?;
        self.directory_mut(directory).whiteouts.insert(name.into());
        Ok(())
    }

    /// The node that a hard link's target names, which must not be a directory.
    pub(super) fn hard_link_target(&mut self, target: &[u8]) -> Result<NodeId, EntryReason> {
        let directory = || EntryReason::HardLinkDirectory(printable(target));
        let (parent, name) = split(target)?.ok_or_else(directory)?;
        let missing = || EntryReason::HardLinkMissing(printable(target));
        let parent = self.existing_directory(parent)?.ok_or_else(missing)?;
        let node = *self.directory(parent).children.get(name).ok_or_else(missing)?;
        match self.nodes[node as usize].kind {
            NodeKind::Directory(_) => Err(directory()),
            _ => Ok(node),
        }
    }

    /// Adds a node that no name leads to yet.
    pub(super) fn add(&mut self, node: Node) -> Result<NodeId, EntryReason> {
        if self.nodes.len() >= ENTRIES_MAX {
            return Err(EntryReason::TooMany);
        }
        let target = if let NodeKind::Symlink(target) = &node.kind { target.len() } else { 0 };
        self.count_metadata(node.xattrs.len() + target)?;
        self.nodes.push(node);
        Ok((self.nodes.len() - 1) as NodeId)
    }

    /// Gives a node a name; what had the name before goes.
    pub(super) fn link(&mut self, directory: NodeId, name: &[u8], node: NodeId) -> Result<(), EntryReason> {
        self.count_metadata(name.len())?;
        if let NodeKind::Directory(child) = &mut self.nodes[node as usize].kind {
            child.parent = directory;
        }
        if self.directory_mut(directory).children.insert(name.into(), node).is_some() {
            // The old path may have led through what is gone now.
            self.last_parent = None;
        }
        Ok(())
    }

    /// Makes a directory, or changes the metadata of the one that is there: its content stays.
    pub(super) fn make_directory(
        &mut self,
        directory: NodeId,
        name: &[u8],
        attributes: Attributes,
        xattrs: Box<[u8]>,
    ) -> Result<NodeId, EntryReason> {
        if let Some(node) = self.directory(directory).children.get(name).copied()
            && matches!(self.nodes[node as usize].kind, NodeKind::Directory(_))
        {
            self.set_attributes(node, attributes, xattrs)?;
            self.directory_mut(node).implied = false;
            return Ok(node);
        }
        let node = self.add(Node { kind: NodeKind::Directory(Box::default()), attributes, xattrs })?;
        self.link(directory, name, node)?;
        Ok(node)
    }

    /// Makes a directory that the archive does not have.
    pub(super) fn imply_directory(&mut self, directory: NodeId, name: &[u8]) -> Result<NodeId, EntryReason> {
        let attributes = Attributes { mode: MODE_IMPLIED, ..Attributes::default() };
        let node = self.make_directory(directory, name, attributes, Box::default())?;
        self.directory_mut(node).implied = true;
        Ok(node)
    }

    pub(super) fn set_attributes(
        &mut self,
        node: NodeId,
        attributes: Attributes,
        xattrs: Box<[u8]>,
    ) -> Result<(), EntryReason> {
        self.count_metadata(xattrs.len())?;
        let node = &mut self.nodes[node as usize];
        node.attributes = attributes;
        node.xattrs = xattrs;
        Ok(())
    }

    pub(super) fn directory(&self, node: NodeId) -> &Directory {
        match &self.nodes[node as usize].kind {
            NodeKind::Directory(directory) => directory,
            _ => unreachable!("only directories are looked into"),
        }
    }

    pub(super) fn directory_mut(&mut self, node: NodeId) -> &mut Directory {
        match &mut self.nodes[node as usize].kind {
            NodeKind::Directory(directory) => directory,
            _ => unreachable!("only directories are looked into"),
        }
    }

    /// The directory at a path; missing ones are made.
    fn directory_at(&mut self, path: &[u8]) -> Result<NodeId, EntryReason> {
        if let Some((last, node)) = &self.last_parent
            && last == path
        {
            return Ok(*node);
        }
        if path_components(path).any(|component| component.starts_with(WHITEOUT)) {
            return Err(EntryReason::Whiteout);
        }
        let node = self.walk(path, true)?.expect("a walk that makes directories ends at one");
        self.last_parent = Some((path.to_vec(), node));
        Ok(node)
    }

    fn existing_directory(&mut self, path: &[u8]) -> Result<Option<NodeId>, EntryReason> {
        self.walk(path, false)
    }

    /// Follows a path from the root, over symbolic links of this layer, and never out of it.
    fn walk(&mut self, path: &[u8], make: bool) -> Result<Option<NodeId>, EntryReason> {
        let mut path = path.to_vec();
        let mut rest = 0;
        let mut at = ROOT;
        let mut hops = 0;
        let mut steps = 0;
        while rest < path.len() {
            let end = path[rest..].iter().position(|byte| *byte == b'/').map_or(path.len(), |slash| rest + slash);
            let name = &path[rest..end];
            let next = (end + 1).min(path.len());
            steps += 1;
            if steps > WALK_STEPS_MAX {
                return Err(EntryReason::Loop);
            }
            if matches!(name, b"" | b".") {
                rest = next;
                continue;
            }
            // Only the target of a link can have this; above the root is the root.
            if name == b".." {
                at = self.directory(at).parent;
                rest = next;
                continue;
            }
            let Some(child) = self.directory(at).children.get(name).copied() else {
                if !make {
                    return Ok(None);
                }
                if name.len() > NAME_BYTES_MAX {
                    return Err(EntryReason::NameTooLong(name.len()));
                }
                at = self.imply_directory(at, name)?;
                rest = next;
                continue;
            };
            match &self.nodes[child as usize].kind {
                NodeKind::Directory(_) => {
                    at = child;
                    rest = next;
                }
                NodeKind::Symlink(target) => {
                    hops += 1;
                    if hops > SYMLINK_HOPS_MAX {
                        return Err(EntryReason::Loop);
                    }
                    if target.starts_with(b"/") {
                        at = ROOT;
                    }
                    path = [target, &b"/"[..], &path[next..]].concat();
                    rest = 0;
                }
                _ => return Err(EntryReason::ParentNotDirectory(printable(name))),
            }
        }
        Ok(Some(at))
    }

    fn count_metadata(&mut self, bytes: usize) -> Result<(), EntryReason> {
        self.metadata_bytes += bytes as u64;
        if self.metadata_bytes > METADATA_BYTES_MAX { Err(EntryReason::MetadataTooLarge) } else { Ok(()) }
    }
}

/// The path of the parent, and the name in it.
type ParentAndName<'a> = (&'a [u8], &'a [u8]);

/// Splits an archive's path into the path of its parent and its last name; `None` for the root.
fn split(path: &[u8]) -> Result<Option<ParentAndName<'_>>, EntryReason> {
    debug_assert!(path.len() <= PATH_BYTES_MAX, "the tar reader has the limit");
    let mut last = None;
    let mut start = 0;
    for component in path.split(|byte| *byte == b'/') {
        match component {
            b"" | b"." => {}
            b".." => return Err(EntryReason::DotDot),
            name if name.len() > NAME_BYTES_MAX => return Err(EntryReason::NameTooLong(name.len())),
            name => last = Some((&path[..start], name)),
        }
        start += component.len() + 1;
    }
    Ok(last)
}

fn path_components(path: &[u8]) -> impl Iterator<Item = &[u8]> {
    path.split(|byte| *byte == b'/')
}

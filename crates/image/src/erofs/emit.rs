//! Writes the metadata of a finished tree behind the content.
//!
//! Sizes of directories follow from names alone, so that the order is: sizes, places, bytes.

use std::io;

use super::format::{
    BLOCK_BYTES, DIRENT_BYTES, FORMAT_INLINE, FORMAT_PLAIN, INODE_BYTES, ROOT_NID, RawInode, SLOT_BYTES, Superblock,
    XATTR_HEADER_BYTES, file_type,
};
use super::tree::{Attributes, EntryReason, Node, NodeId, NodeKind, ROOT, Tree};
use super::writer::{Appender, IMAGE_BLOCKS_MAX, WriteError, WriteOptions};
use super::xattr;

/// Writes all that is not content. `next_block` is the first free block.
pub(super) fn emit(
    mut tree: Tree,
    mut out: Appender<'_>,
    next_block: u64,
    options: WriteOptions,
) -> Result<Superblock, WriteError> {
    let implied = mark(&mut tree, options).map_err(WriteError::Layer)?;
    let plan = Plan::new(&tree, next_block).map_err(WriteError::Layer)?;
    for (index, node) in plan.order.iter().enumerate() {
        plan.write_inode(&tree, &mut out, index, *node)?;
    }
    for node in &plan.order {
        plan.write_blocks(&tree, &mut out, *node)?;
    }
    let superblock = Superblock {
        inodes: plan.order.len() as u64,
        blocks: plan.end_block as u32,
        metadata_block: plan.metadata_block as u32,
        implied,
    };
    out.finish(plan.end_block * BLOCK_BYTES, &superblock.encode())?;
    Ok(superblock)
}

/// Turns the whiteouts of the directories into what overlayfs understands: a character device 0:0 per name, all of them
/// one inode. A directory that replaces one of the lower layers is opaque. Within opaque directories nothing lies below,
/// so there is nothing to delete, and a whiteout would show as a file.
///
/// Implied directories get their mark, too, unless nothing lies below; says whether there are any.
fn mark(tree: &mut Tree, options: WriteOptions) -> Result<bool, EntryReason> {
    if tree.directory(ROOT).opaque && !options.base {
        return Err(EntryReason::OpaqueRoot);
    }
    let mut whiteout = None;
    let mut any_implied = false;
    let mut pending = vec![(ROOT, options.base)];
    while let Some((node, nothing_below)) = pending.pop() {
        let directory = tree.directory_mut(node);
        // Of the directory itself: one that is only opaque has a directory below.
        let implied = std::mem::take(&mut directory.implied) && !nothing_below;
        let nothing_below = nothing_below || directory.opaque;
        let opaque = std::mem::take(&mut directory.opaque) && !options.base;
        let whiteouts = std::mem::take(&mut directory.whiteouts);
        let children: Vec<NodeId> = directory.children.values().copied().collect();
        let mut deletes = false;
        for name in whiteouts {
            match tree.directory(node).children.get(&name).copied() {
                Some(child) if is_directory(tree, child) => {
                    let child = tree.directory_mut(child);
                    child.opaque = true;
                    child.implied = false;
                }
                Some(_) => {}
                None if nothing_below => {}
                None => {
                    let id = match whiteout {
                        Some(id) => id,
                        None => *whiteout.insert(tree.add(Node {
                            kind: NodeKind::CharacterDevice(0),
                            attributes: Attributes::default(),
                            xattrs: Box::default(),
                        })?),
                    };
                    tree.link(node, &name, id)?;
                    deletes = true;
                }
            }
        }
        let marked = &mut tree.nodes[node as usize];
        if opaque {
            marked.xattrs = xattr::with_opaque(&marked.xattrs);
        }
        if deletes {
            marked.xattrs = xattr::with_origin(&marked.xattrs);
        }
        if implied {
            marked.xattrs = xattr::with_implied(&marked.xattrs);
            any_implied = true;
        }
        let directories = children.into_iter().filter(|child| is_directory(tree, *child));
        pending.extend(directories.map(|child| (child, nothing_below)));
    }
    Ok(any_implied)
}

fn is_directory(tree: &Tree, node: NodeId) -> bool {
    matches!(tree.nodes[node as usize].kind, NodeKind::Directory(_))
}

/// Where everything lies.
struct Plan {
    /// The nodes that a name leads to, breadth first: the inodes of a directory's children lie together.
    order: Vec<NodeId>,
    /// By node.
    places: Vec<PlacedNode>,
    metadata_block: u64,
    end_block: u64,
}

#[derive(Clone, Default)]
struct PlacedNode {
    nid: u64,
    nlink: u32,
    /// Size of a directory or symlink target.
    size: u64,
    /// First block of its data, where it has any.
    block: u64,
    /// Whether the last piece of its data follows the inode.
    inline: bool,
}

impl Plan {
    fn new(tree: &Tree, metadata_block: u64) -> Result<Self, EntryReason> {
        let mut plan =
            Self { order: Vec::new(), places: vec![PlacedNode::default(); tree.nodes.len()], metadata_block, end_block: 0 };
        plan.count(tree);
        let metadata_bytes = plan.place_inodes(tree);
        plan.end_block = metadata_block + metadata_bytes.div_ceil(BLOCK_BYTES);
        for node in &plan.order {
            let place = &mut plan.places[*node as usize];
            let blocks = if place.inline { place.size / BLOCK_BYTES } else { place.size.div_ceil(BLOCK_BYTES) };
            if blocks > 0 {
                place.block = plan.end_block;
                plan.end_block += blocks;
            }
        }
        if plan.end_block > IMAGE_BLOCKS_MAX { Err(EntryReason::ImageTooLarge) } else { Ok(plan) }
    }

    /// Orders the nodes, counts the names of each, and computes sizes.
    fn count(&mut self, tree: &Tree) {
        self.order.push(ROOT);
        self.places[ROOT as usize].nlink = 2;
        let mut next = 0;
        while let Some(node) = self.order.get(next).copied() {
            next += 1;
            match &tree.nodes[node as usize].kind {
                NodeKind::Directory(directory) => {
                    for child in directory.children.values() {
                        let is_directory = is_directory(tree, *child);
                        let place = &mut self.places[*child as usize];
                        if place.nlink == 0 {
                            self.order.push(*child);
                        }
                        if is_directory {
                            place.nlink = 2;
                            self.places[node as usize].nlink += 1;
                        } else {
                            place.nlink += 1;
                        }
                    }
                    self.places[node as usize].size = directory_bytes(tree, node);
                }
                NodeKind::Symlink(target) => self.places[node as usize].size = target.len() as u64,
                _ => {}
            }
        }
    }

    /// Gives each inode its place, and says how many bytes all of them take.
    fn place_inodes(&mut self, tree: &Tree) -> u64 {
        let mut at = u64::from(ROOT_NID) * SLOT_BYTES;
        for node in &self.order {
            let record = INODE_BYTES + xattr::area_bytes(&tree.nodes[*node as usize].xattrs);
            let place = &mut self.places[*node as usize];
            let tail = place.size % BLOCK_BYTES;
            place.inline = tail > 0 && record + tail <= BLOCK_BYTES;
            let whole = if place.inline { record + tail } else { record };
            // What must not cross a block: the inode's head, and a tail with all before it.
            let together = if place.inline { whole } else { INODE_BYTES };
            if at % BLOCK_BYTES + together > BLOCK_BYTES {
                at = at.next_multiple_of(BLOCK_BYTES);
            }
            place.nid = at / SLOT_BYTES;
            at = (at + whole).next_multiple_of(SLOT_BYTES);
        }
        at
    }

    fn write_inode(&self, tree: &Tree, out: &mut Appender<'_>, index: usize, id: NodeId) -> io::Result<()> {
        let node = &tree.nodes[id as usize];
        let place = &self.places[id as usize];
        let (size, union) = match node.kind {
            NodeKind::File { size, block } => (size, block),
            NodeKind::CharacterDevice(number) | NodeKind::BlockDevice(number) => (0, number),
            NodeKind::Directory(_) | NodeKind::Symlink(_) => (place.size, place.block as u32),
            NodeKind::Fifo => (0, 0),
        };
        let inode = RawInode {
            format: if place.inline { FORMAT_INLINE } else { FORMAT_PLAIN },
            xattr_icount: xattr::icount(&node.xattrs),
            mode: node.kind.type_bits() | node.attributes.mode,
            size,
            union,
            ino: index as u32 + 1,
            uid: node.attributes.uid,
            gid: node.attributes.gid,
            mtime: node.attributes.mtime.seconds,
            mtime_nsec: node.attributes.mtime.nanoseconds,
            nlink: place.nlink,
        };
        let at = self.metadata_block * BLOCK_BYTES + place.nid * SLOT_BYTES;
        out.write_at(at, &inode.encode())?;
        if !node.xattrs.is_empty() {
            out.write_at(out.end(), &[0; XATTR_HEADER_BYTES])?;
            out.write_at(out.end(), &node.xattrs)?;
        }
        if place.inline {
            let last = self.data_blocks(tree, id).pop().unwrap_or_default();
            out.write_at(out.end(), &last)?;
        }
        Ok(())
    }

    /// Writes the data that does not follow its inode.
    fn write_blocks(&self, tree: &Tree, out: &mut Appender<'_>, id: NodeId) -> io::Result<()> {
        let place = &self.places[id as usize];
        if place.block == 0 {
            return Ok(());
        }
        let mut blocks = self.data_blocks(tree, id);
        if place.inline {
            blocks.pop();
        }
        for (index, block) in blocks.iter().enumerate() {
            out.write_at((place.block + index as u64) * BLOCK_BYTES, block)?;
        }
        Ok(())
    }

    /// The data of a directory or symlink, by blocks.
    fn data_blocks(&self, tree: &Tree, id: NodeId) -> Vec<Vec<u8>> {
        match &tree.nodes[id as usize].kind {
            NodeKind::Symlink(target) => vec![target.to_vec()],
            NodeKind::Directory(_) => {
                let names = names(tree, id);
                by_blocks(&names).map(|names| self.directory_block(tree, names)).collect()
            }
            _ => Vec::new(),
        }
    }

    /// A block of a directory: fixed-size entries, then their names.
    fn directory_block(&self, tree: &Tree, names: &[(&[u8], NodeId)]) -> Vec<u8> {
        let mut block = Vec::with_capacity(BLOCK_BYTES as usize);
        let mut name_offset = names.len() * DIRENT_BYTES;
        for (name, node) in names {
            let mode = tree.nodes[*node as usize].kind.type_bits();
            block.extend_from_slice(&self.places[*node as usize].nid.to_le_bytes());
            block.extend_from_slice(&(name_offset as u16).to_le_bytes());
            block.extend_from_slice(&[file_type(mode), 0]);
            name_offset += name.len();
        }
        for (name, _) in names {
            block.extend_from_slice(name);
        }
        block
    }
}

/// The names of a directory, `.` and `..` among them, in the order that the kernel's binary search wants.
fn names(tree: &Tree, id: NodeId) -> Vec<(&[u8], NodeId)> {
    let directory = tree.directory(id);
    let mut names: Vec<(&[u8], NodeId)> = vec![(b".", id), (b"..", directory.parent)];
    names.extend(directory.children.iter().map(|(name, node)| (&**name, *node)));
    names.sort_unstable_by_key(|(name, _)| *name);
    names
}

/// Cuts names into runs that each fit a block.
fn by_blocks<'a, 'n>(mut names: &'a [(&'n [u8], NodeId)]) -> impl Iterator<Item = &'a [(&'n [u8], NodeId)]> {
    std::iter::from_fn(move || {
        let mut used = 0;
        let count = names
            .iter()
            .take_while(|(name, _)| {
                used += DIRENT_BYTES + name.len();
                used <= BLOCK_BYTES as usize
            })
            .count();
        let (block, rest) = names.split_at(count);
        names = rest;
        (!block.is_empty()).then_some(block)
    })
}

/// Size of a directory: whole blocks, and what is used of the last.
fn directory_bytes(tree: &Tree, id: NodeId) -> u64 {
    let names = names(tree, id);
    by_blocks(&names).fold(0_u64, |bytes, block| {
        let used: usize = block.iter().map(|(name, _)| DIRENT_BYTES + name.len()).sum();
        bytes.next_multiple_of(BLOCK_BYTES) + used as u64
    })
}

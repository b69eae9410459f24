//! From tar to erofs, in one pass.

use std::fs::File;
use std::io::{self, BufRead};
use std::os::unix::fs::FileExt;

use crate::tar::{self, DeviceNumber, Entry, EntryKind, TarError};

use super::emit;
use super::format::{BLOCK_BYTES, MAJOR_MAX, MINOR_MAX, encode_device};
use super::tree::{Attributes, EntryReason, Node, NodeId, NodeKind, Place, ROOT, Tree};
use super::xattr;

/// Most entries of one archive, and most inodes of one layer: they are held in memory, at about 250 bytes each.
pub const ENTRIES_MAX: usize = 1 << 20;
/// Most bytes of names, link targets and extended attributes of one layer, all held in memory.
pub const METADATA_BYTES_MAX: u64 = 256 << 20;
/// Largest layer in blocks of 4096 bytes, holes included: 1 TiB.
pub const IMAGE_BLOCKS_MAX: u64 = 1 << 28;
/// Mode of every symbolic link, symlink(7).
const MODE_SYMLINK: u16 = 0o777;
/// Writes are gathered up to this many bytes.
const BUFFER_BYTES: usize = 256 << 10;

/// How a layer is written.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct WriteOptions {
    /// Whether the layer lies at the bottom of its image, where there is nothing to delete: whiteouts and the marks of
    /// opaque directories are left out, so that the layer is whole without an overlay too.
    pub base: bool,
}

/// What was written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WriteSummary {
    /// Entries of the archive.
    pub entries: u64,
    /// Inodes of the layer.
    pub inodes: u64,
    /// Size of the file in bytes, holes included.
    pub image_bytes: u64,
    /// Where the metadata begins, in bytes; it reaches to the end.
    pub metadata_offset: u64,
}

/// Why no layer was written. The file is unusable then.
#[derive(Debug, thiserror::Error)]
pub enum WriteError {
    /// The archive cannot be read.
    #[error(transparent)]
    Tar(#[from] TarError),
    /// An entry cannot be part of a layer.
    #[error("entry '{entry}' at byte {offset} of the tar cannot be part of a layer")]
    Entry {
        /// Where in the archive, in bytes.
        offset: u64,
        /// The entry, escaped and cut.
        entry: String,
        /// What is wrong with it.
        #[source]
        reason: EntryReason,
    },
    /// The layer as a whole is over a limit.
    #[error(transparent)]
    Layer(EntryReason),
    /// The file cannot be written.
    #[error("the layer's file cannot be written")]
    Io(#[from] io::Error),
}

/// Writes the layer that the archive in `tar` describes to `out`, which must be empty. Nothing is synced.
/// What follows the archive's end stays in `tar`.
pub fn write<R: BufRead>(tar: &mut tar::Reader<R>, out: &File, options: WriteOptions) -> Result<WriteSummary, WriteError> {
    let mut writer = Writer { tree: Tree::new(), out: Appender::new(out), next_block: 1 };
    let mut entries = 0;
    while let Some(entry) = tar.next_entry()? {
        entries += 1;
        if entries > ENTRIES_MAX as u64 {
            return Err(wrong(&entry, EntryReason::TooMany));
        }
        writer.entry(tar, &entry)?;
    }
    let Writer { tree, out, next_block } = writer;
    let superblock = emit::emit(tree, out, next_block, options)?;
    Ok(WriteSummary {
        entries,
        inodes: superblock.inodes,
        image_bytes: u64::from(superblock.blocks) * BLOCK_BYTES,
        metadata_offset: superblock.metadata_offset(),
    })
}

struct Writer<'a> {
    tree: Tree,
    out: Appender<'a>,
    /// First block that nothing has yet.
    next_block: u64,
}

impl Writer<'_> {
    fn entry<R: BufRead>(&mut self, tar: &mut tar::Reader<R>, entry: &Entry) -> Result<(), WriteError> {
        let wrong = |reason| wrong(entry, reason);
        let directory_name = match self.tree.place(&entry.path).map_err(wrong)? {
            Place::Done => return Ok(()),
            Place::Root => None,
            Place::Name(directory, name) => Some((directory, name)),
        };
        let attributes = Attributes { mode: entry.mode, uid: entry.uid, gid: entry.gid, mtime: entry.mtime };
        let user_allowed = matches!(entry.kind, EntryKind::File | EntryKind::Directory);
        let xattrs = xattr::encode(&entry.xattrs, user_allowed).map_err(wrong)?;
        let Some((directory, name)) = directory_name else {
            if entry.kind != EntryKind::Directory {
                return Err(wrong(EntryReason::Root));
            }
            return self.tree.set_attributes(ROOT, attributes, xattrs).map_err(wrong);
        };
        let kind = match &entry.kind {
            EntryKind::Directory => {
                return self.tree.make_directory(directory, name, attributes, xattrs).map(drop).map_err(wrong);
            }
            EntryKind::HardLink(target) => {
                let node = self.tree.hard_link_target(target).map_err(wrong)?;
                return self.tree.link(directory, name, node).map_err(wrong);
            }
            // What overlayfs takes for a whiteout is one.
            EntryKind::CharacterDevice(DeviceNumber { major: 0, minor: 0 }) => {
                return self.tree.whiteout(directory, name).map_err(wrong);
            }
            EntryKind::File => self.content(tar, entry)?,
            EntryKind::Symlink(target) if target.is_empty() => return Err(wrong(EntryReason::SymlinkEmpty)),
            EntryKind::Symlink(target) => NodeKind::Symlink(target.as_slice().into()),
            EntryKind::CharacterDevice(number) => NodeKind::CharacterDevice(device(*number).map_err(wrong)?),
            EntryKind::BlockDevice(number) => NodeKind::BlockDevice(device(*number).map_err(wrong)?),
            EntryKind::Fifo => NodeKind::Fifo,
        };
        let mut node = Node { kind, attributes, xattrs };
        if let NodeKind::Symlink(_) = node.kind {
            // Linux has no permissions of symbolic links; archives say this or that.
            node.attributes.mode = MODE_SYMLINK;
        }
        self.add(directory, name, node).map_err(wrong)
    }

    fn add(&mut self, directory: NodeId, name: &[u8], node: Node) -> Result<(), EntryReason> {
        let node = self.tree.add(node)?;
        self.tree.link(directory, name, node)
    }

    /// Writes the content of a file.
    fn content<R: BufRead>(&mut self, tar: &mut tar::Reader<R>, entry: &Entry) -> Result<NodeKind, WriteError> {
        if entry.size == 0 {
            return Ok(NodeKind::File { size: 0, block: 0 });
        }
        let start = self.next_block;
        let end = start + entry.size.div_ceil(BLOCK_BYTES);
        if end > IMAGE_BLOCKS_MAX {
            return Err(wrong(entry, EntryReason::ImageTooLarge));
        }
        while let Some(chunk) = tar.next_chunk()? {
            self.out.write_at(start * BLOCK_BYTES + chunk.offset, chunk.bytes)?;
        }
        self.next_block = end;
        Ok(NodeKind::File { size: entry.size, block: start as u32 })
    }
}

/// Writes a file from front to back, with holes.
pub(super) struct Appender<'a> {
    file: &'a File,
    /// Where the buffer belongs.
    start: u64,
    buffer: Vec<u8>,
}

impl<'a> Appender<'a> {
    pub(super) fn new(file: &'a File) -> Self {
        Self { file, start: 0, buffer: Vec::with_capacity(BUFFER_BYTES) }
    }

    /// Writes at `offset`, which must not lie before the end of what was written.
    pub(super) fn write_at(&mut self, offset: u64, mut bytes: &[u8]) -> io::Result<()> {
        let gap = offset - self.end();
        if gap >= BLOCK_BYTES {
            self.flush()?;
            self.start = offset;
        } else {
            self.buffer.resize(self.buffer.len() + gap as usize, 0);
        }
        while self.buffer.len() + bytes.len() > BUFFER_BYTES {
            let (now, later) = bytes.split_at(BUFFER_BYTES.saturating_sub(self.buffer.len()));
            self.buffer.extend_from_slice(now);
            bytes = later;
            self.flush()?;
        }
        self.buffer.extend_from_slice(bytes);
        Ok(())
    }

    /// The end of what was written.
    pub(super) fn end(&self) -> u64 {
        self.start + self.buffer.len() as u64
    }

    /// Writes what is buffered, sets the size of the file, and then its first block.
    pub(super) fn finish(mut self, size: u64, first_block: &[u8]) -> io::Result<()> {
        self.flush()?;
        self.file.set_len(size)?;
        self.file.write_all_at(first_block, 0)
    }

    fn flush(&mut self) -> io::Result<()> {
        self.file.write_all_at(&self.buffer, self.start)?;
        self.start = self.end();
        self.buffer.clear();
        Ok(())
    }
}

fn device(DeviceNumber { major, minor }: DeviceNumber) -> Result<u32, EntryReason> {
    if major > MAJOR_MAX || minor > MINOR_MAX {
        return Err(EntryReason::Device(major, minor));
    }
    Ok(encode_device(major, minor))
}

fn wrong(entry: &Entry, reason: EntryReason) -> WriteError {
    WriteError::Entry { offset: entry.offset, entry: entry.printable_path(), reason }
}

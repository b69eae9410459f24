//! Reads the files that [`write()`](super::write()) makes, without mounting them. Every number is checked before it is used:
//! a damaged or hostile file yields errors, never a panic, an endless loop or a large allocation.

use std::fs::File;
use std::io;
use std::os::unix::fs::FileExt;

use crate::tar::{PATH_BYTES_MAX, Timestamp, Xattr};

use super::format::{
    BLOCK_BYTES, DIRENT_BYTES, FORMAT_INLINE, FORMAT_PLAIN, INODE_BYTES, ROOT_NID, RawInode, S_IFBLK, S_IFCHR, S_IFDIR,
    S_IFIFO, S_IFLNK, S_IFMT, S_IFREG, SLOT_BYTES, Superblock, SuperblockError, XATTR_HEADER_BYTES, u16_at, u64_at,
};
use super::tree::NAME_BYTES_MAX;
use super::writer::ENTRIES_MAX;
use super::xattr;

/// Names the place of an inode in its file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Nid(u64);

impl Nid {
    pub(super) fn number(self) -> u64 {
        self.0
    }
}

/// An inode.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Inode {
    /// Its place.
    pub nid: Nid,
    /// What it is.
    pub kind: InodeKind,
    /// Permission bits (0o7777).
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change of the content.
    pub mtime: Timestamp,
    /// How many names it has.
    pub nlink: u32,
    /// Bytes of content, or of a symbolic link's target, or of a directory's blocks.
    pub size: u64,
    data: Data,
}

/// What an inode is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InodeKind {
    /// A file.
    File,
    /// A directory.
    Directory,
    /// A symbolic link.
    Symlink,
    /// A character device with its major and minor number. 0:0 is a whiteout.
    CharacterDevice(u32, u32),
    /// A block device with its major and minor number.
    BlockDevice(u32, u32),
    /// A named pipe.
    Fifo,
}

/// A name in a directory.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DirEntry {
    /// The name.
    pub name: Vec<u8>,
    /// The inode that it leads to.
    pub nid: Nid,
}

/// Where an inode's data and attributes lie, in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Data {
    /// Start of the whole blocks.
    blocks: u64,
    /// Bytes of data that lie there; the others follow the attributes.
    blocks_bytes: u64,
    /// Start of the last piece.
    tail: u64,
    xattrs: u64,
    xattrs_bytes: u64,
}

/// Why a file cannot be read.
#[derive(Debug, thiserror::Error)]
pub enum ReadError {
    /// The file below failed.
    #[error("the layer's file cannot be read")]
    Io(#[from] io::Error),
    /// None of ours.
    #[error("the layer's file cannot be used")]
    Superblock(#[from] SuperblockError),
    /// An inode is damaged.
    #[error("inode {} of the layer is damaged: {what}", .nid.0)]
    Inode {
        /// Which.
        nid: Nid,
        /// What cannot be.
        what: &'static str,
    },
}

/// An open layer.
#[derive(Debug)]
pub struct Reader {
    file: File,
    superblock: Superblock,
}

impl Inode {
    /// Whether overlayfs takes it for a deleted name.
    pub fn is_whiteout(&self) -> bool {
        self.kind == InodeKind::CharacterDevice(0, 0)
    }

    /// First block of the content, 0 where there is none.
    pub(super) fn block(&self) -> u32 {
        if self.size == 0 { 0 } else { (self.data.blocks / BLOCK_BYTES) as u32 }
    }
}

impl Reader {
    /// Opens a layer and checks its superblock.
    pub fn new(file: File) -> Result<Self, ReadError> {
        let file_bytes = file.metadata()?.len();
        if file_bytes < BLOCK_BYTES {
            return Err(SuperblockError::Magic.into());
        }
        let mut block = [0; BLOCK_BYTES as usize];
        file.read_exact_at(&mut block, 0)?;
        let superblock = Superblock::parse(&block, file_bytes)?;
        Ok(Self { file, superblock })
    }

    /// What the superblock says.
    pub fn superblock(&self) -> &Superblock {
        &self.superblock
    }

    /// The root, always a directory.
    pub fn root(&self) -> Result<Inode, ReadError> {
        let root = self.inode(Nid(u64::from(ROOT_NID)))?;
        if root.kind == InodeKind::Directory { Ok(root) } else { Err(damaged(root.nid, "the root is no directory")) }
    }

    /// The inode at a place.
    pub fn inode(&self, nid: Nid) -> Result<Inode, ReadError> {
        let wrong = |what| damaged(nid, what);
        let end = self.end();
        let at = nid.0.checked_mul(SLOT_BYTES).and_then(|offset| offset.checked_add(self.superblock.metadata_offset()));
        let at = at.filter(|at| *at <= end - INODE_BYTES).ok_or_else(|| wrong("it lies outside the file"))?;
        let mut raw = [0; INODE_BYTES as usize];
        self.file.read_exact_at(&mut raw, at)?;
        let raw = RawInode::decode(&raw);
        let kind = kind(&raw).ok_or_else(|| wrong("its type"))?;
        if raw.mtime_nsec >= 1_000_000_000 {
            return Err(wrong("its time"));
        }
        let has_data = matches!(kind, InodeKind::File | InodeKind::Directory | InodeKind::Symlink);
        let size = raw.size;
        if !has_data && size != 0 {
            return Err(wrong("its size"));
        }
        let xattrs = at + INODE_BYTES;
        let xattrs_bytes = xattr::area_bytes_of(raw.xattr_icount);
        let tail = xattrs + xattrs_bytes;
        let tail_bytes = match raw.format {
            FORMAT_PLAIN => 0,
            FORMAT_INLINE if kind != InodeKind::File => size % BLOCK_BYTES,
            _ => return Err(wrong("its format")),
        };
        let blocks = u64::from(raw.union) * BLOCK_BYTES;
        let blocks_bytes = size - tail_bytes;
        let inside = tail.checked_add(tail_bytes).is_some_and(|last| last <= end)
            && (!has_data || blocks.checked_add(blocks_bytes).is_some_and(|last| last <= end))
            && (blocks_bytes == 0 || blocks >= BLOCK_BYTES);
        if !inside {
            return Err(wrong("its data lies outside the file"));
        }
        Ok(Inode {
            nid,
            kind,
            mode: raw.mode & !S_IFMT,
            uid: raw.uid,
            gid: raw.gid,
            mtime: Timestamp { seconds: raw.mtime, nanoseconds: raw.mtime_nsec },
            nlink: raw.nlink,
            size,
            data: Data { blocks, blocks_bytes, tail, xattrs, xattrs_bytes },
        })
    }

    /// Where the content of a file lies in the layer's file, in one piece, in bytes.
    pub(super) fn place(inode: &Inode) -> std::ops::Range<u64> {
        debug_assert_eq!(inode.kind, InodeKind::File, "only files have their content in one piece");
        inode.data.blocks..inode.data.blocks + inode.data.blocks_bytes
    }

    /// Bytes that the extended attributes of an inode take in the layer's file.
    pub(super) fn xattrs_bytes(inode: &Inode) -> u64 {
        inode.data.xattrs_bytes
    }

    /// Reads content from `offset` on; fewer bytes than asked for only at the end.
    pub fn read_at(&self, inode: &Inode, buffer: &mut [u8], offset: u64) -> Result<usize, ReadError> {
        let length = inode.size.saturating_sub(offset).min(buffer.len() as u64);
        let from_blocks = inode.data.blocks_bytes.saturating_sub(offset).min(length);
        let (first, second) = buffer[..length as usize].split_at_mut(from_blocks as usize);
        if !first.is_empty() {
            self.file.read_exact_at(first, inode.data.blocks + offset)?;
        }
        if !second.is_empty() {
            let skipped = offset.saturating_sub(inode.data.blocks_bytes);
            self.file.read_exact_at(second, inode.data.tail + skipped)?;
        }
        Ok(length as usize)
    }

    /// The target of a symbolic link.
    pub fn read_link(&self, inode: &Inode) -> Result<Vec<u8>, ReadError> {
        if inode.kind != InodeKind::Symlink || inode.size == 0 || inode.size > PATH_BYTES_MAX as u64 {
            return Err(damaged(inode.nid, "the target of the symbolic link"));
        }
        let mut target = vec![0; inode.size as usize];
        self.read_at(inode, &mut target, 0)?;
        Ok(target)
    }

    /// Looks a name up by the binary search that the kernel does.
    pub fn lookup(&self, directory: &Inode, name: &[u8]) -> Result<Option<Nid>, ReadError> {
        let blocks = directory_blocks(directory)?;
        let (mut low, mut high) = (0, blocks);
        // The last block whose first name is not behind the one sought.
        while low < high {
            let middle = low + (high - low) / 2;
            let block = self.directory_block(directory, middle)?;
            let (first, _) = block.entry(0)?;
            if first <= name {
                low = middle + 1;
            } else {
                high = middle;
            }
        }
        let Some(index) = low.checked_sub(1) else { return Ok(None) };
        let block = self.directory_block(directory, index)?;
        let (mut low, mut high) = (0, block.count);
        while low < high {
            let middle = low + (high - low) / 2;
            let (found, nid) = block.entry(middle)?;
            match found.cmp(name) {
                std::cmp::Ordering::Equal => return Ok(Some(nid)),
                std::cmp::Ordering::Less => low = middle + 1,
                std::cmp::Ordering::Greater => high = middle,
            }
        }
        Ok(None)
    }

    /// The names of a directory in byte order, without `.` and `..`.
    pub fn entries(&self, directory: &Inode) -> Result<Vec<DirEntry>, ReadError> {
        let mut entries: Vec<DirEntry> = Vec::new();
        let mut last: Vec<u8> = Vec::new();
        for index in 0..directory_blocks(directory)? {
            let block = self.directory_block(directory, index)?;
            for entry in 0..block.count {
                let (name, nid) = block.entry(entry)?;
                if name <= last.as_slice() {
                    return Err(damaged(directory.nid, "names are out of order"));
                }
                name.clone_into(&mut last);
                if entries.len() >= ENTRIES_MAX {
                    return Err(damaged(directory.nid, "more names than a layer can have"));
                }
                if !matches!(name, b"." | b"..") {
                    entries.push(DirEntry { name: name.to_vec(), nid });
                }
            }
        }
        Ok(entries)
    }

    /// The extended attributes: full names and values.
    pub fn xattrs(&self, inode: &Inode) -> Result<Vec<Xattr>, ReadError> {
        let mut xattrs = self.all_xattrs(inode)?;
        xattrs.retain(|xattr| !xattr::is_own(xattr));
        Ok(xattrs)
    }

    /// With the marks that are ours.
    fn all_xattrs(&self, inode: &Inode) -> Result<Vec<Xattr>, ReadError> {
        if inode.data.xattrs_bytes == 0 {
            return Ok(Vec::new());
        }
        // At most 256 KiB: the size counts words in 16 bits.
        let mut area = vec![0; inode.data.xattrs_bytes as usize];
        self.file.read_exact_at(&mut area, inode.data.xattrs)?;
        let decoded = xattr::decode(&area[XATTR_HEADER_BYTES..]).filter(|_| area[..XATTR_HEADER_BYTES].iter().all(|b| *b == 0));
        decoded.ok_or_else(|| damaged(inode.nid, "its extended attributes"))
    }

    /// Whether a directory hides those of the layers below.
    pub fn is_opaque(&self, inode: &Inode) -> Result<bool, ReadError> {
        Ok(xattr::is_opaque(&self.xattrs(inode)?))
    }

    /// Whether a directory is there only because the layer's archive has something in it, so that its owner, mode and attributes are those
    /// of the layers below.
    pub fn is_implied(&self, inode: &Inode) -> Result<bool, ReadError> {
        Ok(inode.kind == InodeKind::Directory && xattr::is_implied(&self.all_xattrs(inode)?))
    }

    /// The layer's file.
    pub(super) fn file(&self) -> &File {
        &self.file
    }

    fn directory_block(&self, directory: &Inode, index: u64) -> Result<DirectoryBlock, ReadError> {
        let offset = index * BLOCK_BYTES;
        let mut bytes = vec![0; (directory.size - offset).min(BLOCK_BYTES) as usize];
        self.read_at(directory, &mut bytes, offset)?;
        let wrong = || damaged(directory.nid, "a block of names");
        if bytes.len() < DIRENT_BYTES {
            return Err(wrong());
        }
        let names = usize::from(u16_at(&bytes, 8));
        let count = names / DIRENT_BYTES;
        if names % DIRENT_BYTES != 0 || count == 0 || names > bytes.len() {
            return Err(wrong());
        }
        Ok(DirectoryBlock { nid: directory.nid, bytes, count })
    }

    fn end(&self) -> u64 {
        u64::from(self.superblock.blocks) * BLOCK_BYTES
    }
}

/// A block of a directory, with at least one entry.
struct DirectoryBlock {
    nid: Nid,
    bytes: Vec<u8>,
    count: usize,
}

impl DirectoryBlock {
    fn entry(&self, index: usize) -> Result<(&[u8], Nid), ReadError> {
        let at = index * DIRENT_BYTES;
        let start = usize::from(u16_at(&self.bytes, at + 8));
        let name = if index + 1 < self.count {
            let end = usize::from(u16_at(&self.bytes, at + DIRENT_BYTES + 8));
            self.bytes.get(start..end)
        } else {
            self.bytes.get(start..).and_then(|rest| rest.split(|byte| *byte == 0).next())
        };
        let good = |name: &&[u8]| (1..=NAME_BYTES_MAX).contains(&name.len()) && !name.contains(&b'/') && !name.contains(&0);
        let name = name.filter(good).ok_or_else(|| damaged(self.nid, "a name"))?;
        Ok((name, Nid(u64_at(&self.bytes, at))))
    }
}

fn directory_blocks(directory: &Inode) -> Result<u64, ReadError> {
    if directory.kind == InodeKind::Directory {
        Ok(directory.size.div_ceil(BLOCK_BYTES))
    } else {
        Err(damaged(directory.nid, "it is no directory"))
    }
}

fn kind(raw: &RawInode) -> Option<InodeKind> {
    let device = ((raw.union >> 8) & 0xfff, (raw.union & 0xff) | (raw.union >> 12) & !0xff);
    Some(match raw.mode & S_IFMT {
        S_IFREG => InodeKind::File,
        S_IFDIR => InodeKind::Directory,
        S_IFLNK => InodeKind::Symlink,
        S_IFCHR => InodeKind::CharacterDevice(device.0, device.1),
        S_IFBLK => InodeKind::BlockDevice(device.0, device.1),
        S_IFIFO => InodeKind::Fifo,
        _ => return None,
    })
}

fn damaged(nid: Nid, what: &'static str) -> ReadError {
    ReadError::Inode { nid, what }
}

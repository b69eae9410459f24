//! Layers as read-only file systems: a writer that makes one erofs file out of a tar stream in one pass, and a reader.
//!
//! The format is the kernel's (`fs/erofs/erofs_fs.h`, Documentation/filesystems/erofs.rst); of its many features only
//! the few constants below are ever used, and [`Reader`] refuses all else. Who mounts such a file can refuse it too: a
//! superblock that differs from these constants was not written here.
//!
//! ```text
//! block 0           zeros, the superblock at byte 1024
//! block 1 ..        content of the files, each from a block's start, in the order of the archive
//! meta_blkaddr ..   inodes, with their extended attributes, symlink targets and the last pieces of directories
//! .. end            other blocks of directories, and symlink targets that do not fit
//! ```
//!
//! The output depends on the archive and the options alone: no clock, no random number, no order of a hash map.

mod derive;
mod emit;
mod format;
mod reader;
mod tree;
mod unpack;
mod writer;
mod xattr;

pub use derive::{DeriveError, derive};
pub use format::{
    BLOCK_BITS, BLOCK_BYTES, FEATURE_COMPAT, FEATURE_INCOMPAT, MAGIC, ROOT_NID, SUPERBLOCK_OFFSET, Superblock, SuperblockError,
};
pub use reader::{DirEntry, Inode, InodeKind, Nid, ReadError, Reader};
pub use tree::{EntryReason, NAME_BYTES_MAX, SYMLINK_HOPS_MAX, WALK_STEPS_MAX};
pub use unpack::{UnpackError, UnpackSummary, remove, unpack};
pub use writer::{ENTRIES_MAX, IMAGE_BLOCKS_MAX, METADATA_BYTES_MAX, WriteError, WriteOptions, WriteSummary, write};
pub use xattr::{XATTR_NAME_BYTES_MAX, XATTR_TOTAL_BYTES_MAX, XATTR_VALUE_BYTES_MAX};

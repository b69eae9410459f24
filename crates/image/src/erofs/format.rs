//! The structures on disk, little-endian.

/// Magic number of the superblock (`EROFS_SUPER_MAGIC_V1`).
pub const MAGIC: u32 = 0xE0F5_E1E2;
/// Where the superblock lies, in bytes.
pub const SUPERBLOCK_OFFSET: usize = 1024;
/// Logarithm of the block size.
pub const BLOCK_BITS: u8 = 12;
/// Size of a block in bytes: the page size, which every kernel with erofs takes.
pub const BLOCK_BYTES: u64 = 1 << BLOCK_BITS;
/// The compatible features that are set: superblock checksum (1) and own time per inode (2).
pub const FEATURE_COMPAT: u32 = 3;
/// The incompatible features that are set: none. No compression, no chunks, no extra devices, no fragments, no prefixes.
pub const FEATURE_INCOMPAT: u32 = 0;
/// The root's inode. Number 0 would mount too, but shows as inode 0, which programs take for "deleted".
pub const ROOT_NID: u16 = 2;

/// Volume name of a layer that has implied directories: what is below decides how they look. The kernel does not read it.
const NAME_IMPLIED: [u8; 16] = *b"implied\0\0\0\0\0\0\0\0\0";

/// Inode numbers count in units of this many bytes from the start of the metadata.
pub(super) const SLOT_BYTES: u64 = 32;
/// Size of an extended inode in bytes.
pub(super) const INODE_BYTES: u64 = 64;
/// Size of an entry of a directory without its name.
pub(super) const DIRENT_BYTES: usize = 12;
/// Size of the header before extended attributes.
pub(super) const XATTR_HEADER_BYTES: usize = 12;

/// `i_format` of an extended inode whose data is whole blocks.
pub(super) const FORMAT_PLAIN: u16 = 1;
/// `i_format` of an extended inode whose last piece of data follows it.
pub(super) const FORMAT_INLINE: u16 = 5;

pub(super) const S_IFMT: u16 = 0o170_000;
pub(super) const S_IFIFO: u16 = 0o010_000;
pub(super) const S_IFCHR: u16 = 0o020_000;
pub(super) const S_IFDIR: u16 = 0o040_000;
pub(super) const S_IFBLK: u16 = 0o060_000;
pub(super) const S_IFREG: u16 = 0o100_000;
pub(super) const S_IFLNK: u16 = 0o120_000;

/// The fields of a superblock that differ between our files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Superblock {
    /// Number of inodes.
    pub inodes: u64,
    /// Size of the file, in blocks.
    pub blocks: u32,
    /// Block where the metadata begins. From there to the end, all is metadata.
    pub metadata_block: u32,
    /// Whether some directories are there only because the archive has something in them ([`super::derive()`]).
    pub implied: bool,
}

/// Why a file is none of ours.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum SuperblockError {
    /// Not erofs.
    #[error("not an erofs file")]
    Magic,
    /// Damaged.
    #[error("the checksum of the superblock is wrong")]
    Checksum,
    /// Uses a feature that we never set, or a field that must be zero.
    #[error("the superblock uses features that are never written here")]
    Features,
    /// Points outside the file.
    #[error("the superblock names blocks outside the file")]
    Bounds,
}

impl Superblock {
    /// The first block of the file.
    pub(super) fn encode(&self) -> Vec<u8> {
        let mut block = vec![0; BLOCK_BYTES as usize];
        let sb = &mut block[SUPERBLOCK_OFFSET..];
        sb[0..4].copy_from_slice(&MAGIC.to_le_bytes());
        sb[8..12].copy_from_slice(&FEATURE_COMPAT.to_le_bytes());
        sb[12] = BLOCK_BITS;
        sb[14..16].copy_from_slice(&ROOT_NID.to_le_bytes());
        sb[16..24].copy_from_slice(&self.inodes.to_le_bytes());
        sb[36..40].copy_from_slice(&self.blocks.to_le_bytes());
        sb[40..44].copy_from_slice(&self.metadata_block.to_le_bytes());
        if self.implied {
            sb[64..80].copy_from_slice(&NAME_IMPLIED);
        }
        sb[80..84].copy_from_slice(&FEATURE_INCOMPAT.to_le_bytes());
        let checksum = checksum(sb);
        sb[4..8].copy_from_slice(&checksum.to_le_bytes());
        block
    }

    /// Reads the first block of a file of `file_bytes` bytes, and refuses everything that `encode` would
    /// not have written.
    pub fn parse(block: &[u8; BLOCK_BYTES as usize], file_bytes: u64) -> Result<Self, SuperblockError> {
        let sb = &block[SUPERBLOCK_OFFSET..];
        if u32_at(sb, 0) != MAGIC {
            return Err(SuperblockError::Magic);
        }
        let superblock = Self {
            inodes: u64_at(sb, 16),
            blocks: u32_at(sb, 36),
            metadata_block: u32_at(sb, 40),
            implied: sb[64..80] == NAME_IMPLIED,
        };
        let mut blank = sb.to_vec();
        blank[4..8].fill(0);
        if checksum(&blank) != u32_at(sb, 4) {
            return Err(SuperblockError::Checksum);
        }
        if superblock.encode() != block {
            return Err(SuperblockError::Features);
        }
        let inside = superblock.metadata_block >= 1
            && superblock.metadata_block < superblock.blocks
            && u64::from(superblock.blocks) * BLOCK_BYTES == file_bytes;
        if inside { Ok(superblock) } else { Err(SuperblockError::Bounds) }
    }

    /// Where the metadata begins, in bytes.
    pub fn metadata_offset(&self) -> u64 {
        u64::from(self.metadata_block) * BLOCK_BYTES
    }
}

/// CRC-32C without the final inversion, over the rest of the block from the superblock on, the field itself zero.
fn checksum(sb: &[u8]) -> u32 {
    !crc32c::crc32c(sb)
}

/// An extended inode.
#[derive(Debug, Clone, Copy)]
pub(super) struct RawInode {
    pub(super) format: u16,
    pub(super) xattr_icount: u16,
    pub(super) mode: u16,
    pub(super) size: u64,
    /// First block of the data, or the device number.
    pub(super) union: u32,
    pub(super) ino: u32,
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) mtime: i64,
    pub(super) mtime_nsec: u32,
    pub(super) nlink: u32,
}

impl RawInode {
    pub(super) fn encode(&self) -> [u8; INODE_BYTES as usize] {
        let mut raw = [0; INODE_BYTES as usize];
        raw[0..2].copy_from_slice(&self.format.to_le_bytes());
        raw[2..4].copy_from_slice(&self.xattr_icount.to_le_bytes());
        raw[4..6].copy_from_slice(&self.mode.to_le_bytes());
        raw[8..16].copy_from_slice(&self.size.to_le_bytes());
        raw[16..20].copy_from_slice(&self.union.to_le_bytes());
        raw[20..24].copy_from_slice(&self.ino.to_le_bytes());
        raw[24..28].copy_from_slice(&self.uid.to_le_bytes());
        raw[28..32].copy_from_slice(&self.gid.to_le_bytes());
        raw[32..40].copy_from_slice(&self.mtime.to_le_bytes());
        raw[40..44].copy_from_slice(&self.mtime_nsec.to_le_bytes());
        raw[44..48].copy_from_slice(&self.nlink.to_le_bytes());
        raw
    }

    pub(super) fn decode(raw: &[u8; INODE_BYTES as usize]) -> Self {
        Self {
            format: u16_at(raw, 0),
            xattr_icount: u16_at(raw, 2),
            mode: u16_at(raw, 4),
            size: u64_at(raw, 8),
            union: u32_at(raw, 16),
            ino: u32_at(raw, 20),
            uid: u32_at(raw, 24),
            gid: u32_at(raw, 28),
            mtime: u64_at(raw, 32) as i64,
            mtime_nsec: u32_at(raw, 40),
            nlink: u32_at(raw, 44),
        }
    }
}

/// The type of a directory's entry (`FT_*`) for a mode.
pub(super) fn file_type(mode: u16) -> u8 {
    match mode & S_IFMT {
        S_IFREG => 1,
        S_IFDIR => 2,
        S_IFCHR => 3,
        S_IFBLK => 4,
        S_IFIFO => 5,
        S_IFLNK => 7,
        _ => 0,
    }
}

/// Largest device class that Linux can have.
pub(super) const MAJOR_MAX: u32 = 0xfff;
/// Largest device number within a class that Linux can have.
pub(super) const MINOR_MAX: u32 = 0xf_ffff;

/// A device number as the kernel keeps it on disk (`new_encode_dev`).
pub(super) fn encode_device(major: u32, minor: u32) -> u32 {
    (minor & 0xff) | (major << 8) | ((minor & !0xff) << 12)
}

pub(super) fn u16_at(bytes: &[u8], at: usize) -> u16 {
    u16::from_le_bytes([bytes[at], bytes[at + 1]])
}

pub(super) fn u32_at(bytes: &[u8], at: usize) -> u32 {
    u32::from(u16_at(bytes, at)) | u32::from(u16_at(bytes, at + 2)) << 16
}

pub(super) fn u64_at(bytes: &[u8], at: usize) -> u64 {
    u64::from(u32_at(bytes, at)) | u64::from(u32_at(bytes, at + 4)) << 32
}

//! A streaming reader of tar archives, for layers: v7, ustar, GNU and PAX.
//!
//! It reads once, front to back, keeps one entry in memory, and believes nothing: each number is range-checked, each
//! size has a limit, and each error names the entry and the byte where it stands. Formats: POSIX.1-2017 `pax`
//! ("ustar Interchange Format", "pax Header Block"), and the GNU tar manual ("Basic Tar Format", "Storing Sparse Files").
//!
//! What it understands beyond the plain header: the prefix of ustar and star, GNU long names and links, base-256
//! numbers, PAX records with binary values (`path`, `linkpath`, `size`, `uid`, `gid`, `mtime`, `SCHILY.xattr.*`), and
//! sparse files in the old GNU form and the PAX forms 0.0, 0.1 and 1.0. Global PAX headers are skipped.
//!
//! ```
//! # fn main() -> Result<(), funtainer_image::tar::TarError> {
//! let archive = vec![0_u8; 1024];
//! let mut reader = funtainer_image::tar::Reader::new(archive.as_slice());
//! while let Some(entry) = reader.next_entry()? {
//!     while let Some(chunk) = reader.next_chunk()? {
//!         println!("{}: {} bytes at {}", entry.printable_path(), chunk.bytes.len(), chunk.offset);
//!     }
//! }
//! # Ok(())
//! # }
//! ```

mod error;
mod header;
mod pax;
mod sparse;

use std::io::BufRead;

pub(crate) use error::printable;
pub use error::{TarError, TarReason};

use header::{Header, Typeflag};
use pax::Records;
use sparse::Segment;

/// Size of the units that archives are made of, in bytes.
pub const BLOCK_BYTES: usize = 512;
/// Longest path of an entry or a link target, in bytes: Linux's `PATH_MAX` without its NUL.
pub const PATH_BYTES_MAX: usize = 4095;
/// Longest extended header (PAX records, GNU long name), in bytes. Room for every extended attribute an inode can have.
pub const EXTENSION_BYTES_MAX: u64 = 1 << 20;
/// Most pieces of one sparse file. A map is held in memory at 16 bytes a piece.
pub const SPARSE_SEGMENTS_MAX: usize = 1 << 20;
/// Largest size of one file, in bytes: what a signed 64-bit offset can name.
pub const FILE_BYTES_MAX: u64 = i64::MAX as u64;
/// Highest user or group id; the one above means "none" to the kernel.
pub const ID_MAX: u32 = u32::MAX - 1;

/// One entry of an archive. Paths are as the archive has them: not cleaned, not safe.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Entry {
    /// The name, at most [`PATH_BYTES_MAX`] bytes, without NUL.
    pub path: Vec<u8>,
    /// What it is, with what only that kind has.
    pub kind: EntryKind,
    /// Permission bits with setuid, setgid and sticky (0o7777).
    pub mode: u16,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Time of the last change of the content.
    pub mtime: Timestamp,
    /// Size of a file's content, holes included; 0 for all else.
    pub size: u64,
    /// Extended attributes in the archive's order: full name and value. A name may come twice; the last one counts.
    pub xattrs: Vec<Xattr>,
    /// Where the entry's own header stands in the archive, in bytes.
    pub offset: u64,
}

/// What an entry is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum EntryKind {
    /// A file; its content follows by [`Reader::next_chunk`].
    File,
    /// Another name of an earlier entry, whose path this is.
    HardLink(Vec<u8>),
    /// A symbolic link with its target.
    Symlink(Vec<u8>),
    /// A character device.
    CharacterDevice(DeviceNumber),
    /// A block device.
    BlockDevice(DeviceNumber),
    /// A directory.
    Directory,
    /// A named pipe.
    Fifo,
}

/// The number of a device. The archive's values, not checked against what Linux can have.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct DeviceNumber {
    /// Class of the device.
    pub major: u32,
    /// Which one of the class.
    pub minor: u32,
}

/// An extended attribute.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Xattr {
    /// The full name, such as `security.capability`.
    pub name: Vec<u8>,
    /// The value: any bytes.
    pub value: Vec<u8>,
}

/// A point in time.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Timestamp {
    /// Whole seconds since 1970, rounded down.
    pub seconds: i64,
    /// Nanoseconds after that, below 1,000,000,000.
    pub nanoseconds: u32,
}

/// A piece of a file's content. Between pieces lie holes, which read as zeros.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Chunk<'a> {
    /// Where in the file the piece lies, in bytes; pieces come in ascending order.
    pub offset: u64,
    /// The piece, never empty.
    pub bytes: &'a [u8],
}

/// Reads an archive entry by entry. After an error the reader must not be used again.
#[derive(Debug)]
pub struct Reader<R> {
    input: R,
    /// Bytes consumed from `input`.
    offset: u64,
    /// Bytes of the input's buffer that the last chunk borrowed.
    borrowed: usize,
    /// The printable name of the current entry, for errors.
    current: String,
    body: Body,
}

/// What is left of the current entry's content.
#[derive(Debug, Default)]
struct Body {
    /// Where the stored bytes belong, ascending.
    segments: Vec<Segment>,
    /// Segment in work.
    index: usize,
    /// Bytes of that segment already given out.
    done: u64,
    /// Stored bytes not yet read.
    left: u64,
    /// Bytes after them up to the next block.
    padding: u64,
}

impl Entry {
    /// The path for messages: escaped and cut.
    pub fn printable_path(&self) -> String {
        error::printable(&self.path)
    }
}

impl<R: BufRead> Reader<R> {
    /// A reader of the archive that `input` holds. Content is lent out of `input`'s buffer, so that should be large.
    pub fn new(input: R) -> Self {
        Self { input, offset: 0, borrowed: 0, current: String::new(), body: Body::default() }
    }

    /// The next entry, or `None` at the end of the archive; what is left of the last one's content is skipped.
    /// The end are two blocks of zeros, or the end of the input at a block's boundary.
    pub fn next_entry(&mut self) -> Result<Option<Entry>, TarError> {
        self.finish_body()?;
        let mut extensions = Extensions::default();
        loop {
            let start = self.offset;
            let Some(block) = self.header_block()? else {
                return if extensions.any { Err(self.fail(TarReason::ExtensionWithoutEntry)) } else { Ok(None) };
            };
            let header = Header::parse(&block).map_err(|reason| self.fail_at(start, reason))?;
            self.current = error::printable(&header.path());
            match header.typeflag {
                Typeflag::PaxGlobal | Typeflag::VolumeLabel => self.skip_content(&header)?,
                Typeflag::Pax => {
                    let text = self.extension(&header)?;
                    extensions.records = Records::parse(&text).map_err(|reason| self.fail_at(start, reason))?;
                    extensions.any = true;
                }
                Typeflag::GnuLongName => {
                    extensions.long_name = Some(until_nul(self.extension(&header)?));
                    extensions.any = true;
                }
                Typeflag::GnuLongLink => {
                    extensions.long_link = Some(until_nul(self.extension(&header)?));
                    extensions.any = true;
                }
                _ => return self.entry(&header, &block, extensions, start).map(Some),
            }
        }
    }

    /// The next piece of the current entry's content, or `None` when it is complete.
    pub fn next_chunk(&mut self) -> Result<Option<Chunk<'_>>, TarError> {
        self.release();
        let segment = loop {
            match self.body.segments.get(self.body.index) {
                None => return self.finish_body().map(|()| None),
                Some(segment) if segment.length == self.body.done => {
                    self.body.index += 1;
                    self.body.done = 0;
                }
                Some(segment) => break *segment,
            }
        };
        self.fill()?;
        let offset = segment.offset + self.body.done;
        // `fill` has put at least one byte into the buffer; asking again lends it without a second read.
        let buffer = match self.input.fill_buf() {
            Ok(buffer) => buffer,
            Err(error) => return Err(TarError::new(self.offset, &self.current, TarReason::Read(error))),
        };
        let length = (segment.length - self.body.done).min(buffer.len() as u64) as usize;
        self.body.done += length as u64;
        self.body.left -= length as u64;
        self.borrowed = length;
        Ok(Some(Chunk { offset, bytes: &buffer[..length] }))
    }

    /// Bytes of the archive read so far.
    pub fn offset(&self) -> u64 {
        self.offset + self.borrowed as u64
    }

    /// Gives the input back, for what follows the archive.
    pub fn into_inner(mut self) -> R {
        self.release();
        self.input
    }

    /// Builds the entry out of its header and what the extended headers before it said.
    fn entry(
        &mut self,
        header: &Header<'_>,
        block: &[u8; BLOCK_BYTES],
        extensions: Extensions,
        start: u64,
    ) -> Result<Entry, TarError> {
        let fail = |this: &Self, reason| this.fail_at(start, reason);
        let Extensions { records, long_name, long_link, .. } = extensions;
        let path = records.sparse.name.clone().or(records.path).or(long_name).unwrap_or_else(|| header.path());
        self.current = error::printable(&path);
        check_path(&path).map_err(|reason| fail(self, reason))?;
        let link = records.linkpath.or(long_link).unwrap_or_else(|| header.link());
        let ids = [records.uid.map_or_else(|| header.uid(), Ok), records.gid.map_or_else(|| header.gid(), Ok)];
        let [uid, gid] = ids;
        let (uid, gid) = (uid.map_err(|r| fail(self, r))?, gid.map_err(|r| fail(self, r))?);
        let mode = header.mode().map_err(|reason| fail(self, reason))?;
        let mtime = records.mtime.map_or_else(|| header.mtime(), Ok).map_err(|reason| fail(self, reason))?;
        let device = |this: &Self| header.device().map_err(|reason| fail(this, reason));
        let mut is_file = false;
        let kind = match header.typeflag {
            // Old archives mark directories by a slash at the end alone.
            Typeflag::File if path.ends_with(b"/") => EntryKind::Directory,
            Typeflag::File | Typeflag::GnuSparse => {
                is_file = true;
                EntryKind::File
            }
            Typeflag::HardLink => EntryKind::HardLink(link),
            Typeflag::Symlink => EntryKind::Symlink(link),
            Typeflag::CharacterDevice => EntryKind::CharacterDevice(device(self)?),
            Typeflag::BlockDevice => EntryKind::BlockDevice(device(self)?),
            Typeflag::Directory | Typeflag::GnuDirectory => EntryKind::Directory,
            Typeflag::Fifo => EntryKind::Fifo,
            Typeflag::Other(byte) => return Err(fail(self, TarReason::Type(byte))),
            Typeflag::Pax | Typeflag::PaxGlobal | Typeflag::GnuLongName | Typeflag::GnuLongLink | Typeflag::VolumeLabel => {
                unreachable!("extended headers are read before an entry is built")
            }
        };
        if let EntryKind::HardLink(target) | EntryKind::Symlink(target) = &kind {
            check_path(target).map_err(|reason| fail(self, reason))?;
        }
        let stored = if header.typeflag.has_content() {
            records.size.map_or_else(|| header.size(), Ok).map_err(|reason| fail(self, reason))?
        } else {
            0
        };
        let size = self.open_body(header, block, &records.sparse, is_file, stored)?;
        Ok(Entry { path, kind, mode, uid, gid, mtime, size, xattrs: records.xattrs, offset: start })
    }

    /// Sets up the content of an entry that stores `stored` bytes, and says how large the file is.
    fn open_body(
        &mut self,
        header: &Header<'_>,
        block: &[u8; BLOCK_BYTES],
        records: &sparse::Records,
        is_file: bool,
        stored: u64,
    ) -> Result<u64, TarError> {
        self.body = Body { left: stored, padding: padding(stored), ..Body::default() };
        if !is_file {
            return Ok(0);
        }
        let (segments, size) = if header.typeflag == Typeflag::GnuSparse {
            self.gnu_sparse_map(block)?
        } else if records.is_version_1() {
            let segments = self.pax_sparse_map_1()?;
            (segments, records.size.ok_or_else(|| self.fail(TarReason::Sparse("the size of the file is not said")))?)
        } else if records.is_sparse() {
            let size = records.size.ok_or_else(|| self.fail(TarReason::Sparse("the size of the file is not said")))?;
            (records.map.clone(), size)
        } else {
            (vec![Segment { offset: 0, length: stored }], stored)
        };
        // The map of version 1.0 stands in the content and has been read off it by now.
        sparse::check(&segments, size, self.body.left).map_err(|reason| self.fail(reason))?;
        self.body.segments = segments;
        Ok(size)
    }

    /// The map of the old GNU form: four pieces in the header, then blocks of 21.
    fn gnu_sparse_map(&mut self, block: &[u8; BLOCK_BYTES]) -> Result<(Vec<Segment>, u64), TarError> {
        let mut map = sparse::GnuMap::from_header(block).map_err(|reason| self.fail(reason))?;
        while map.continues {
            let mut next = [0; BLOCK_BYTES];
            self.read_exact(&mut next)?;
            map.extend(&next).map_err(|reason| self.fail(reason))?;
        }
        Ok((map.segments, map.size))
    }

    /// The map of the PAX form 1.0: lines of decimal numbers at the start of the content, padded to a block.
    fn pax_sparse_map_1(&mut self) -> Result<Vec<Segment>, TarError> {
        let mut map = sparse::TextMap::default();
        while !map.is_complete() {
            let Some(left) = self.body.left.checked_sub(BLOCK_BYTES as u64) else {
                return Err(self.fail(TarReason::Sparse("the map is longer than the content")));
            };
            let mut block = [0; BLOCK_BYTES];
            self.read_exact(&mut block)?;
            self.body.left = left;
            map.feed(&block).map_err(|reason| self.fail(reason))?;
        }
        Ok(map.segments)
    }

    /// The next header, or `None` at the end of the archive.
    fn header_block(&mut self) -> Result<Option<[u8; BLOCK_BYTES]>, TarError> {
        let mut block = [0; BLOCK_BYTES];
        if !self.read_block(&mut block)? {
            return Ok(None);
        }
        if !is_zero(&block) {
            return Ok(Some(block));
        }
        let second = self.offset;
        if self.read_block(&mut block)? && !is_zero(&block) {
            return Err(self.fail_at(second, TarReason::LoneZeroBlock));
        }
        Ok(None)
    }

    /// The content of an extended header.
    fn extension(&mut self, header: &Header<'_>) -> Result<Vec<u8>, TarError> {
        let size = header.size().map_err(|reason| self.fail(reason))?;
        if size > EXTENSION_BYTES_MAX {
            return Err(self.fail(TarReason::ExtensionTooLarge(size)));
        }
        let mut content = vec![0; size as usize];
        self.read_exact(&mut content)?;
        self.skip(padding(size))?;
        Ok(content)
    }

    fn skip_content(&mut self, header: &Header<'_>) -> Result<(), TarError> {
        let size = header.size().map_err(|reason| self.fail(reason))?;
        self.skip(size)?;
        self.skip(padding(size))
    }

    /// Skips what is left of the current entry.
    fn finish_body(&mut self) -> Result<(), TarError> {
        self.release();
        let body = std::mem::take(&mut self.body);
        self.skip(body.left)?;
        self.skip(body.padding)
    }

    /// Consumes what the last chunk had borrowed.
    fn release(&mut self) {
        let borrowed = std::mem::take(&mut self.borrowed);
        self.input.consume(borrowed);
        self.offset += borrowed as u64;
    }

    fn skip(&mut self, mut bytes: u64) -> Result<(), TarError> {
        while bytes > 0 {
            let step = bytes.min(self.fill()? as u64);
            self.input.consume(step as usize);
            self.offset += step;
            bytes -= step;
        }
        Ok(())
    }

    fn read_exact(&mut self, mut target: &mut [u8]) -> Result<(), TarError> {
        while !target.is_empty() {
            let read = self.read_some(target)?;
            if read == 0 {
                return Err(self.fail(TarReason::Truncated));
            }
            target = &mut target[read..];
        }
        Ok(())
    }

    /// Reads a whole block, or says `false` where the input ends before it.
    fn read_block(&mut self, block: &mut [u8; BLOCK_BYTES]) -> Result<bool, TarError> {
        let first = self.read_some(block)?;
        if first > 0 {
            self.read_exact(&mut block[first..])?;
        }
        Ok(first > 0)
    }

    /// Copies what the input has at hand; 0 at its end.
    fn read_some(&mut self, target: &mut [u8]) -> Result<usize, TarError> {
        let length = loop {
            match self.input.fill_buf() {
                Ok(buffer) => {
                    let length = buffer.len().min(target.len());
                    target[..length].copy_from_slice(&buffer[..length]);
                    break length;
                }
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.fail(TarReason::Read(error))),
            }
        };
        self.input.consume(length);
        self.offset += length as u64;
        Ok(length)
    }

    /// Makes the input's buffer hold at least one byte, and says how many it holds.
    fn fill(&mut self) -> Result<usize, TarError> {
        loop {
            match self.input.fill_buf() {
                Ok([]) => return Err(self.fail(TarReason::Truncated)),
                Ok(buffer) => return Ok(buffer.len()),
                Err(error) if error.kind() == std::io::ErrorKind::Interrupted => {}
                Err(error) => return Err(self.fail(TarReason::Read(error))),
            }
        }
    }

    fn fail(&self, reason: TarReason) -> TarError {
        self.fail_at(self.offset, reason)
    }

    fn fail_at(&self, offset: u64, reason: TarReason) -> TarError {
        TarError::new(offset, &self.current, reason)
    }
}

/// What the extended headers before an entry say of it.
#[derive(Debug, Default)]
struct Extensions {
    any: bool,
    records: Records,
    long_name: Option<Vec<u8>>,
    long_link: Option<Vec<u8>>,
}

fn check_path(path: &[u8]) -> Result<(), TarReason> {
    if path.len() > PATH_BYTES_MAX {
        return Err(TarReason::PathTooLong(path.len()));
    }
    if path.contains(&0) {
        return Err(TarReason::Nul);
    }
    Ok(())
}

/// GNU long names end in a NUL.
fn until_nul(mut text: Vec<u8>) -> Vec<u8> {
    if let Some(end) = text.iter().position(|byte| *byte == 0) {
        text.truncate(end);
    }
    text
}

fn is_zero(block: &[u8; BLOCK_BYTES]) -> bool {
    block.iter().all(|byte| *byte == 0)
}

/// Bytes from the end of a content of `size` bytes to the next block.
fn padding(size: u64) -> u64 {
    size.wrapping_neg() % BLOCK_BYTES as u64
}

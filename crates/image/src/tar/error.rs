//! Why an archive cannot be read.

use std::io;

use super::{EXTENSION_BYTES_MAX, PATH_BYTES_MAX, SPARSE_SEGMENTS_MAX};

/// Longest part of a name that a message shows, in bytes.
const PRINTED_BYTES_MAX: usize = 200;

/// An archive that cannot be read, with the place.
#[derive(Debug, thiserror::Error)]
#[error("entry '{entry}' at byte {offset} of the tar cannot be read")]
pub struct TarError {
    /// Where in the archive (uncompressed), in bytes.
    pub offset: u64,
    /// The entry, escaped and cut; empty before the first.
    pub entry: String,
    /// What is wrong.
    #[source]
    pub reason: TarReason,
}

/// What is wrong with an archive.
#[derive(Debug, thiserror::Error)]
pub enum TarReason {
    /// The stream below failed.
    #[error("the stream cannot be read")]
    Read(#[source] io::Error),
    /// The input ends inside an entry.
    #[error("the archive ends too early")]
    Truncated,
    /// The sum over the header is another one.
    #[error("the checksum of the header is wrong")]
    Checksum,
    /// A header's field is no number.
    #[error("the {0} of the header is no number")]
    Number(&'static str),
    /// A number is outside what can be stored.
    #[error("the {0} is out of range")]
    Range(&'static str),
    /// A kind of entry that layers do not have.
    #[error("entries of type 0x{0:02x} are not supported")]
    Type(u8),
    /// One block of zeros, then something else: two would be the end.
    #[error("a header follows a block of zeros")]
    LoneZeroBlock,
    /// The archive ends after an extended header.
    #[error("an extended header has no entry after it")]
    ExtensionWithoutEntry,
    /// Over the limit.
    #[error("an extended header of {0} bytes; at most {EXTENSION_BYTES_MAX} are allowed")]
    ExtensionTooLarge(u64),
    /// Records of a PAX header break their grammar.
    #[error("a record of the PAX header is malformed")]
    Pax,
    /// A known PAX record has a value that cannot be.
    #[error("the PAX record {0} has a value that cannot be")]
    PaxValue(&'static str),
    /// Over the limit.
    #[error("a path of {0} bytes; at most {PATH_BYTES_MAX} are allowed")]
    PathTooLong(usize),
    /// No file system has such names.
    #[error("a path contains a NUL byte")]
    Nul,
    /// The map of a sparse file is wrong.
    #[error("the map of a sparse file is wrong: {0}")]
    Sparse(&'static str),
    /// Over the limit.
    #[error("a sparse file has more than {SPARSE_SEGMENTS_MAX} pieces")]
    SparseSegments,
}

impl TarError {
    pub(super) fn new(offset: u64, entry: &str, reason: TarReason) -> Self {
        Self { offset, entry: entry.to_owned(), reason }
    }
}

/// A name for messages: escaped, and cut where it is long.
pub(crate) fn printable(name: &[u8]) -> String {
    let cut = &name[..name.len().min(PRINTED_BYTES_MAX)];
    let mut text = match std::str::from_utf8(cut) {
        Ok(text) if !text.chars().any(char::is_control) => text.to_owned(),
        _ => cut.escape_ascii().to_string(),
    };
    if cut.len() < name.len() {
        text.push_str("...");
    }
    text
}

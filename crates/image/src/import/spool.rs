//! The files of an archive that an image can need, spooled into a directory under numbers.

use std::collections::BTreeMap;
use std::fs::File;
use std::io::{self, BufRead, BufReader, Cursor, Read};
use std::os::unix::fs::FileExt;
use std::path::{Path, PathBuf};

use bytes::Bytes;
use flate2::bufread::MultiGzDecoder;
use tempfile::TempDir;

use super::ImportError;
use crate::error::ImageError;
use crate::manifest::MANIFEST_BYTES_MAX;
use crate::store::StoreError;
use crate::tar::{Entry, EntryKind, Reader, TarError, TarReason};

/// Most bytes of all files of an archive together, unpacked.
const ARCHIVE_BYTES_MAX: u64 = 64 << 30;
/// Most entries of an archive; a layout has one for each blob and directory.
const ENTRIES_MAX: u64 = 100_000;
/// Bytes that are read ahead.
const BUFFER_BYTES: usize = 128 << 10;
/// Most links from a path to its file: `docker save` makes chains of one.
const LINKS_MAX: usize = 8;

/// Beginnings of compressed files that are not read.
const FOREIGN_MAGIC: [(&[u8], &str); 4] =
    [(&[0x28, 0xb5, 0x2f, 0xfd], "zstd"), (&[0xfd, b'7', b'z', b'X'], "xz"), (b"BZh", "bzip2"), (b"PK\x03\x04", "zip")];
const GZIP_MAGIC: &[u8] = &[0x1f, 0x8b];

/// What an archive holds. The files go away with it.
#[derive(Debug)]
pub(super) struct Spool {
    dir: TempDir,
    files: BTreeMap<String, SpooledFile>,
    /// From a path to the path that it stands for.
    links: BTreeMap<String, String>,
}

/// One file of the archive.
#[derive(Debug, Clone)]
pub(super) struct SpooledFile {
    pub(super) path: PathBuf,
    pub(super) size: u64,
}

impl Spool {
    /// Takes an archive apart into a new directory below `tmp`. Blocks.
    pub(super) fn unpack(archive: impl Read, tmp: &Path) -> Result<Self, ImageError> {
        let dir = tempfile::tempdir_in(tmp).map_err(|source| StoreError::io("create a directory below", tmp, source))?;
        let mut spool = Self { dir, files: BTreeMap::new(), links: BTreeMap::new() };
        let mut input = BufReader::with_capacity(BUFFER_BYTES, archive);
        let head = peek(&mut input)?;
        if let Some((_, name)) = FOREIGN_MAGIC.iter().find(|(magic, _)| head.starts_with(magic)) {
            return Err(ImportError::Compression(name).into());
        }
        let packed = head.starts_with(GZIP_MAGIC);
        let input = BufReader::with_capacity(BUFFER_BYTES, Cursor::new(head).chain(input));
        if packed {
            spool.unpack_tar(BufReader::with_capacity(BUFFER_BYTES, MultiGzDecoder::new(input)))?;
        } else {
            spool.unpack_tar(input)?;
        }
        Ok(spool)
    }

    /// The file at a path of the archive, links followed.
    pub(super) fn file(&self, path: &str) -> Option<&SpooledFile> {
        let mut path = path;
        for _ in 0..=LINKS_MAX {
            if let Some(file) = self.files.get(path) {
                return Some(file);
            }
            path = self.links.get(path)?;
        }
        None
    }

    /// The content of a small file that `wanted_by` names.
    pub(super) fn read(&self, path: &str, bytes_max: u64, wanted_by: &str) -> Result<Bytes, ImageError> {
        let missing = || ImportError::Missing { file: path.to_owned(), wanted_by: wanted_by.to_owned() };
        let file = self.file(path).ok_or_else(missing)?;
        if file.size > bytes_max {
            return Err(ImportError::TooLarge { what: "the size of a JSON file in bytes", max: bytes_max }.into());
        }
        let bytes = std::fs::read(&file.path).map_err(|source| StoreError::io("read", &file.path, source))?;
        Ok(bytes.into())
    }

    fn unpack_tar(&mut self, input: impl BufRead) -> Result<(), ImageError> {
        let mut reader = Reader::new(input);
        let (mut entries, mut bytes) = (0, 0_u64);
        while let Some(entry) = reader.next_entry().map_err(from_tar)? {
            entries += 1;
            if entries > ENTRIES_MAX {
                return Err(ImportError::TooLarge { what: "the number of entries in the archive", max: ENTRIES_MAX }.into());
            }
            bytes = bytes.saturating_add(entry.size);
            if bytes > ARCHIVE_BYTES_MAX {
                return Err(ImportError::TooLarge { what: "the size of the archive in bytes", max: ARCHIVE_BYTES_MAX }.into());
            }
            self.take(&entry, &mut reader)?;
        }
        // What follows the end of the tar is read as well, so that a sender is not cut off in the middle of its padding.
        let drained = io::copy(&mut reader.into_inner().take(ARCHIVE_BYTES_MAX), &mut io::sink());
        drained.map_err(ImportError::Read)?;
        Ok(())
    }

    fn take(&mut self, entry: &Entry, reader: &mut Reader<impl BufRead>) -> Result<(), ImageError> {
        let Some(path) = clean(&entry.path).filter(|path| is_wanted(path)) else { return Ok(()) };
        // As in every tar, the last entry of a path counts.
        self.links.remove(&path);
        match &entry.kind {
            EntryKind::File => {
                let file = self.write(entry, reader)?;
                if let Some(old) = self.files.insert(path, file) {
                    std::fs::remove_file(&old.path).map_err(|source| StoreError::io("remove", &old.path, source))?;
                }
            }
            EntryKind::HardLink(target) => self.links.extend(clean(target).map(|target| (path, target))),
            EntryKind::Symlink(target) => {
                let parent = path.rsplit_once('/').map_or("", |(parent, _)| parent);
                let target = resolve(parent, target);
                self.links.extend(target.map(|target| (path, target)));
            }
            _ => {}
        }
        Ok(())
    }

    fn write(&self, entry: &Entry, reader: &mut Reader<impl BufRead>) -> Result<SpooledFile, ImageError> {
        // Files that are replaced free their name, so the number comes from the entry's place in the archive.
        let path = self.dir.path().join(entry.offset.to_string());
        let failed = |source| StoreError::io("write", &path, source);
        let file = File::create_new(&path).map_err(failed)?;
        while let Some(chunk) = reader.next_chunk().map_err(from_tar)? {
            file.write_all_at(chunk.bytes, chunk.offset).map_err(failed)?;
        }
        file.set_len(entry.size).map_err(failed)?;
        Ok(SpooledFile { path, size: entry.size })
    }
}

/// Whether an image can need the file: the fixed names of both formats, blobs, and what `docker save` calls configurations
/// (`HEX.json`) and layers (`HEX.tar`, `HEX/layer.tar`).
fn is_wanted(path: &str) -> bool {
    let fixed = matches!(path, "oci-layout" | "index.json" | "manifest.json");
    let is_hex = |text: &str| text.len() == 64 && text.bytes().all(|b| b.is_ascii_hexdigit());
    let blob = path.strip_prefix("blobs/sha256/").is_some_and(is_hex);
    let flat = path.strip_suffix(".json").or_else(|| path.strip_suffix(".tar")).is_some_and(is_hex);
    let nested = path.strip_suffix("/layer.tar").is_some_and(is_hex);
    fixed || blob || flat || nested
}

/// The path without leading, trailing and double slashes and without `.`; none if it leads upwards or is not UTF-8.
fn clean(path: &[u8]) -> Option<String> {
    resolve("", path).filter(|path| !path.is_empty())
}

/// `target` as seen from the directory `parent`.
fn resolve(parent: &str, target: &[u8]) -> Option<String> {
    let target = std::str::from_utf8(target).ok()?;
    let mut parts: Vec<&str> =
        if target.starts_with('/') { Vec::new() } else { parent.split('/').filter(|p| !p.is_empty()).collect() };
    for part in target.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()?),
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// The first bytes, as many as tell formats apart; fewer if there are no more.
fn peek(input: &mut impl Read) -> Result<Vec<u8>, ImportError> {
    let mut head = Vec::new();
    input.take(4).read_to_end(&mut head).map_err(ImportError::Read)?;
    Ok(head)
}

/// A stream that breaks is not a fault of the archive.
fn from_tar(error: TarError) -> ImportError {
    match error.reason {
        TarReason::Read(source) if source.kind() == io::ErrorKind::ConnectionAborted => ImportError::Read(source),
        _ => ImportError::Tar(error),
    }
}

/// The limit of files that list images is the one of manifests.
pub(super) const LIST_BYTES_MAX: u64 = MANIFEST_BYTES_MAX;

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn paths_are_cleaned_and_never_lead_upwards() {
        let check = |path: &str, expect: Option<&str>| assert_eq!(clean(path.as_bytes()).as_deref(), expect, "{path}");
        check("./index.json", Some("index.json"));
        check("/blobs//sha256/./x/", Some("blobs/sha256/x"));
        check("a/../index.json", Some("index.json"));
        check("../index.json", None);
        check("a/../../x", None);
        check("./", None);
        assert_eq!(resolve("a", b"../b/layer.tar").as_deref(), Some("b/layer.tar"));
        assert_eq!(clean(b"\xff"), None);
    }

    #[test]
    fn only_what_an_image_needs_is_wanted() {
        let hex = "ab".repeat(32);
        for path in ["oci-layout", "index.json", "manifest.json", &format!("blobs/sha256/{hex}"), &format!("{hex}/layer.tar")] {
            assert!(is_wanted(path), "{path}");
        }
        for path in ["repositories", "blobs/sha256/../x", "blobs/sha512/ab", "x.tar", &format!("{hex}/VERSION"), "a/index.json"]
        {
            assert!(!is_wanted(path), "{path}");
        }
    }
}

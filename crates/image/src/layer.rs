//! From a layer's blob to its erofs file, in one pass: inflate, verify both digests, parse, write.
//!
//! ```text
//! caller's thread:  source ─► count, sha256 ─► inflate ─► 64 KiB buffers ─┬─► thread: sha256 (diff_id)
//!                                                                         └─► thread: tar ─► erofs
//! ```
//!
//! The buffers go round; both queues are short, so that memory stays small and a slow disk slows the download down.
//! Nothing is trusted before the end: a file for which [`write()`] returned an error must be deleted.

mod blob;
mod pipe;

use std::error::Error;
use std::fmt;
use std::fs::File;
use std::io::{self, Read};

use funtainer_model::{Digest, ErrorCode, Failure, LayerId};

use crate::erofs::{self, WriteError, WriteOptions};

use blob::Stream;
use pipe::{Closed, Pipe};

/// Largest layer in bytes of its uncompressed tar: 64 GiB.
pub const TAR_BYTES_MAX: u64 = 64 << 30;
/// Up to this many bytes of tar, any ratio of compression is taken: 1 GiB.
pub const EXPANSION_FREE_BYTES: u64 = 1 << 30;
/// Beyond that, the tar may be at most this many times as large as its blob. Deflate can reach 1032; layers reach 10.
pub const EXPANSION_RATIO_MAX: u64 = 200;

/// Largest window of a zstd frame in bytes, which is held in memory: what `zstd` itself takes without being told to take more.
pub const ZSTD_WINDOW_BYTES_MAX: u64 = 128 << 20;

/// How a layer's blob is compressed, as its media type says.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Compression {
    /// A plain tar.
    None,
    /// gzip, of one or more members.
    Gzip,
    /// zstd (RFC 8878), of one or more frames, with windows of at most [`ZSTD_WINDOW_BYTES_MAX`].
    Zstd,
}

impl fmt::Display for Compression {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::None => "tar",
            Self::Gzip => "gzip",
            Self::Zstd => "zstd",
        })
    }
}

/// What the manifest says of a layer's blob.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerBlob {
    /// SHA-256 of the blob.
    pub digest: Digest,
    /// Size of the blob in bytes.
    pub size: u64,
    /// Compression of the blob.
    pub compression: Compression,
}

/// A layer that was written and verified.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct LayerSummary {
    /// Bytes of the uncompressed tar.
    pub tar_bytes: u64,
    /// Bytes of the erofs file, holes included.
    pub image_bytes: u64,
    /// Where its metadata begins, in bytes; it reaches to the end. Worth reading ahead before a mount.
    pub metadata_offset: u64,
    /// Entries of the archive.
    pub entries: u64,
    /// Inodes of the layer.
    pub inodes: u64,
}

/// Why a layer was not written.
#[derive(Debug, thiserror::Error)]
pub enum LayerError {
    /// The source of the blob failed.
    #[error("the blob {digest} cannot be read")]
    Source {
        /// Which blob.
        digest: Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// The blob is shorter or longer than its manifest says.
    #[error("the blob {digest} has {actual} bytes or more, its manifest says {expected}")]
    Size {
        /// Which blob.
        digest: Digest,
        /// What the manifest says, in bytes.
        expected: u64,
        /// How many bytes came; reading stops at the first that is too many.
        actual: u64,
    },
    /// The blob has another content than its name says.
    #[error("the blob {expected} has the digest {actual}")]
    BlobDigest {
        /// The name.
        expected: Digest,
        /// The content.
        actual: Digest,
    },
    /// The uncompressed layer is not the one that the image's configuration names.
    #[error("the layer {expected} has the diff_id {actual}")]
    DiffId {
        /// What the configuration says.
        expected: Digest,
        /// The content.
        actual: Digest,
    },
    /// The blob is not what its media type says.
    #[error("the blob {digest} is no valid {compression} stream")]
    Inflate {
        /// Which blob.
        digest: Digest,
        /// What it should be.
        compression: Compression,
        /// What is wrong.
        #[source]
        source: io::Error,
    },
    /// Over the limit.
    #[error("the layer {layer} has more than {TAR_BYTES_MAX} bytes")]
    TooLarge {
        /// Which layer.
        layer: Digest,
    },
    /// Over the limit.
    #[error("the blob {digest} expands to more than {EXPANSION_RATIO_MAX} times its size")]
    Expansion {
        /// Which blob.
        digest: Digest,
    },
    /// The archive is no layer.
    #[error("the layer {layer} cannot be used")]
    Archive {
        /// Which layer.
        layer: Digest,
        /// Why.
        #[source]
        source: WriteError,
    },
    /// The file could not be written or synced.
    #[error("the layer {layer} cannot be stored")]
    Store {
        /// Which layer.
        layer: Digest,
        /// Why.
        #[source]
        source: io::Error,
    },
}

impl LayerError {
    /// What users see of it: the whole chain in one sentence.
    pub fn failure(&self) -> Failure {
        let code = match self {
            Self::Source { .. } => ErrorCode::RegistryUnavailable,
            Self::Size { .. } | Self::BlobDigest { .. } => ErrorCode::DigestMismatch,
            // The blob is what the manifest names, so that the image itself is at fault.
            Self::DiffId { .. } | Self::Inflate { .. } | Self::Archive { .. } => ErrorCode::ImageInvalid,
            Self::TooLarge { .. } | Self::Expansion { .. } => ErrorCode::ImageUnsupported,
            Self::Store { .. } => ErrorCode::Internal,
        };
        let mut detail = self.to_string();
        let mut cause = self.source();
        while let Some(error) = cause {
            detail = format!("{detail}: {error}");
            cause = error.source();
        }
        Failure::new(code, detail)
    }
}

/// Writes the layer `layer` to `out` out of its blob, and syncs it.
///
/// `out` must be empty and open for writing. `source` yields the blob's bytes as they come; it is read to its end. The
/// call blocks, and starts two threads that end with it. On success both digests were right and the file is on disk.
pub fn write(source: impl Read, blob: &LayerBlob, layer: LayerId, out: &File) -> Result<LayerSummary, LayerError> {
    let mut stream = Stream::new(source, *blob);
    let options = WriteOptions { base: layer.base };
    let (pumped, hashed, written) = std::thread::scope(|scope| {
        let Pipe { mut sender, hash, parse } = pipe::new();
        let hash = scope.spawn(move || hash.sha256());
        let parse = scope.spawn(move || parse.write_layer(out, options));
        let pumped = pump(&mut stream, &mut sender, layer.diff_id);
        drop(sender);
        (pumped, hash.join().expect("hashing does not panic"), parse.join().expect("writing does not panic"))
    });
    let result = match (pumped, written) {
        // What comes before is the cause of what comes after.
        (Err(error @ LayerError::Source { .. }), _) => return Err(error),
        (_, Err(WriteError::Io(source))) => return Err(LayerError::Store { layer: layer.diff_id, source }),
        (Err(error), _) => Err(error),
        (Ok(_), Err(source)) => Err(LayerError::Archive { layer: layer.diff_id, source }),
        (Ok(tar_bytes), Ok(summary)) => Ok((tar_bytes, summary)),
    };
    // A damaged blob is worth another try and a bad image is not: so the digest is checked even after a failure.
    stream.into_blob().verify()?;
    let (tar_bytes, summary) = result?;
    if hashed != layer.diff_id {
        return Err(LayerError::DiffId { expected: layer.diff_id, actual: hashed });
    }
    out.sync_all().map_err(|source| LayerError::Store { layer: layer.diff_id, source })?;
    let erofs::WriteSummary { entries, inodes, image_bytes, metadata_offset } = summary;
    Ok(LayerSummary { tar_bytes, image_bytes, metadata_offset, entries, inodes })
}

/// Sends the uncompressed stream down the pipe, and says how long it is.
fn pump<R: Read>(stream: &mut Stream<R>, sender: &mut pipe::Sender, layer: Digest) -> Result<u64, LayerError> {
    let mut total = 0;
    loop {
        let mut buffer = sender.buffer();
        let length = stream.fill(&mut buffer)?;
        total += length as u64;
        if total > TAR_BYTES_MAX {
            return Err(LayerError::TooLarge { layer });
        }
        if total > EXPANSION_FREE_BYTES && total / EXPANSION_RATIO_MAX > stream.blob().bytes() {
            return Err(LayerError::Expansion { digest: stream.blob().digest() });
        }
        let is_last = length < buffer.len();
        buffer.truncate(length);
        // Where the writer has failed, its error counts.
        if (length > 0 && sender.send(buffer) == Err(Closed)) || is_last {
            return Ok(total);
        }
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write;

    use flate2::write::GzEncoder;
    use sha2::{Digest as _, Sha256};

    use super::*;
    use crate::rootfs::{FileKind, Rootfs};

    fn sha256(bytes: &[u8]) -> Digest {
        Digest::from_sha256(Sha256::digest(bytes).into())
    }

    fn archive(content: &[u8]) -> Vec<u8> {
        let mut archive = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_gnu();
        header.set_size(content.len() as u64);
        header.set_mode(0o755);
        header.set_uid(7);
        archive.append_data(&mut header, "usr/bin/tool", content).unwrap();
        archive.append_link(&mut tar_link(), "bin", "usr/bin").unwrap();
        archive.into_inner().unwrap()
    }

    fn tar_link() -> tar::Header {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        header
    }

    fn gzip(bytes: &[u8]) -> Vec<u8> {
        let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::default());
        encoder.write_all(bytes).unwrap();
        encoder.finish().unwrap()
    }

    fn zstd(bytes: &[u8]) -> Vec<u8> {
        ruzstd::encoding::compress_to_vec(bytes, ruzstd::encoding::CompressionLevel::Fastest)
    }

    /// A frame that decoders pass over (RFC 8878, section 3.1.2).
    fn skippable(bytes: &[u8]) -> Vec<u8> {
        [&0x184D_2A53_u32.to_le_bytes()[..], &(bytes.len() as u32).to_le_bytes(), bytes].concat()
    }

    fn run(blob: &[u8], compression: Compression, diff_id: Digest) -> (Result<LayerSummary, LayerError>, File) {
        let meta = LayerBlob { digest: sha256(blob), size: blob.len() as u64, compression };
        run_as(blob, &meta, diff_id)
    }

    fn run_as(blob: &[u8], meta: &LayerBlob, diff_id: Digest) -> (Result<LayerSummary, LayerError>, File) {
        let out = tempfile::tempfile().unwrap();
        (write(blob, meta, LayerId { diff_id, base: true }, &out), out)
    }

    #[test]
    fn a_layer_is_written_and_read() {
        let content = vec![b'x'; 300_000];
        let tar = archive(&content);
        let halves = tar.split_at(tar.len() / 3);
        let blobs = [
            (tar.clone(), Compression::None),
            (gzip(&tar), Compression::Gzip),
            ([gzip(halves.0), gzip(halves.1)].concat(), Compression::Gzip),
            (zstd(&tar), Compression::Zstd),
            ([zstd(halves.0), skippable(b"index"), zstd(halves.1), skippable(b"")].concat(), Compression::Zstd),
        ];
        for (blob, compression) in blobs {
            let (result, file) = run(&blob, compression, sha256(&tar));
            let summary = result.unwrap();
            assert_eq!(summary.tar_bytes, tar.len() as u64);
            assert_eq!(summary.entries, 2);
            assert_eq!(summary.inodes, 5);
            assert_eq!(file.metadata().unwrap().len(), summary.image_bytes);
            let rootfs = Rootfs::new(vec![file]).unwrap();
            let stat = rootfs.stat("/bin/tool").unwrap();
            assert_eq!((stat.kind, stat.mode, stat.uid, stat.size), (FileKind::File, 0o755, 7, 300_000));
            assert_eq!(rootfs.read_file("bin/tool", 300_000).unwrap(), content);
        }
    }

    #[test]
    fn the_digest_covers_what_follows_the_archive() {
        let mut tar = archive(b"x");
        tar.resize(tar.len() + 200_001, 7);
        assert!(run(&tar, Compression::None, sha256(&tar)).0.is_ok());
        assert!(run(&gzip(&tar), Compression::Gzip, sha256(&tar)).0.is_ok());
    }

    #[test]
    fn what_does_not_match_is_refused() {
        let tar = archive(b"x");
        let blob = gzip(&tar);
        let meta = LayerBlob { digest: sha256(&blob), size: blob.len() as u64, compression: Compression::Gzip };
        let (diff_id, other) = (sha256(&tar), sha256(b"other"));
        let check = |blob: &[u8], meta: LayerBlob, diff_id| run_as(blob, &meta, diff_id).0.unwrap_err();

        assert!(matches!(check(&blob, meta, other), LayerError::DiffId { .. }));
        assert!(matches!(check(&blob, LayerBlob { digest: other, ..meta }, diff_id), LayerError::BlobDigest { .. }));
        let shorter = LayerBlob { size: meta.size - 1, ..meta };
        assert!(matches!(check(&blob, shorter, diff_id), LayerError::Size { .. }));
        let longer = LayerBlob { size: meta.size + 1, ..meta };
        assert!(matches!(check(&blob, longer, diff_id), LayerError::Size { .. }));
        // Damage on the way is told from a bad image.
        let mut damaged = blob.clone();
        damaged[20] ^= 0xff;
        assert!(matches!(check(&damaged, meta, diff_id), LayerError::BlobDigest { .. }));
        assert!(matches!(run(&damaged, Compression::Gzip, diff_id).0.unwrap_err(), LayerError::Inflate { .. }));
        assert!(matches!(run(&blob, Compression::None, diff_id).0.unwrap_err(), LayerError::Archive { .. }));
        assert!(matches!(run(&tar, Compression::Gzip, diff_id).0.unwrap_err(), LayerError::Inflate { .. }));
        assert!(matches!(run(&tar, Compression::Zstd, diff_id).0.unwrap_err(), LayerError::Inflate { .. }));
        let packed = zstd(&tar);
        for cut in [0, 3, packed.len() / 2, packed.len() - 1] {
            let error = run(&packed[..cut], Compression::Zstd, diff_id).0.unwrap_err();
            assert!(matches!(error, LayerError::Inflate { .. }), "{cut}: {error}");
        }
        let cut = [packed, skippable(b"cut")].concat();
        assert!(matches!(run(&cut[..cut.len() - 1], Compression::Zstd, diff_id).0.unwrap_err(), LayerError::Inflate { .. }));
        let error = run(&gzip(&[b'1'; 4096]), Compression::Gzip, diff_id).0.unwrap_err();
        let Failure { code, detail, .. } = error.failure();
        assert_eq!(code, ErrorCode::ImageInvalid);
        let cause = "entry '' at byte 0 of the tar cannot be read: the checksum of the header is wrong";
        assert_eq!(detail, format!("the layer {diff_id} cannot be used: {cause}"));
    }

    #[test]
    fn a_window_that_takes_too_much_memory_is_refused() {
        // No single segment, no checksum; a window of 2^(10 + 21) bytes; then an empty last block.
        let frame = |window: u8| [&0xFD2F_B528_u32.to_le_bytes()[..], &[0, window << 3, 1, 0, 0]].concat();
        assert!(matches!(run(&frame(21), Compression::Zstd, sha256(b"")).0.unwrap_err(), LayerError::Inflate { .. }));
        assert!(matches!(run(&frame(17), Compression::Zstd, sha256(b"")).0, Ok(LayerSummary { tar_bytes: 0, .. })));
    }

    #[test]
    fn a_failing_source_and_a_full_disk_are_told_apart() {
        struct Failing;
        impl Read for Failing {
            fn read(&mut self, _: &mut [u8]) -> io::Result<usize> {
                Err(io::Error::from(io::ErrorKind::ConnectionReset))
            }
        }
        let tar = archive(b"x");
        let meta = LayerBlob { digest: sha256(&tar), size: tar.len() as u64, compression: Compression::None };
        let layer = LayerId { diff_id: sha256(&tar), base: true };
        let half = tar.as_slice().take(700).chain(Failing);
        let error = write(half, &meta, layer, &tempfile::tempfile().unwrap()).unwrap_err();
        assert!(matches!(error, LayerError::Source { .. }), "{error}");
        // A file that cannot be written to.
        let read_only = File::open("/dev/null").unwrap();
        let error = write(tar.as_slice(), &meta, layer, &read_only).unwrap_err();
        assert!(matches!(error, LayerError::Store { .. }), "{error}");
    }

    #[test]
    fn a_bomb_is_stopped() {
        let tar = archive(b"x");
        let zeros = gzip(&vec![0; 64 << 20]);
        let blob = [gzip(&tar), zeros.repeat(17)].concat();
        let error = run(&blob, Compression::Gzip, sha256(&tar)).0.unwrap_err();
        assert!(matches!(error, LayerError::Expansion { .. }), "{error}");
        assert_eq!(error.failure().code, ErrorCode::ImageUnsupported);
    }
}

//! The blob as it comes from its source: counted, hashed, inflated.

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;
use funtainer_model::Digest;
use ruzstd::decoding::{BlockDecodingStrategy, FrameDecoder};
use sha2::{Digest as _, Sha256};

use super::{Compression, LayerBlob, LayerError, ZSTD_WINDOW_BYTES_MAX};

/// Bytes that are read from the source at once.
const BUFFER_BYTES: usize = 64 << 10;

/// The uncompressed stream.
pub(super) enum Stream<R> {
    Plain(Box<Blob<R>>),
    Gzip(Box<MultiGzDecoder<Blob<R>>>),
    Zstd(Box<Zstd<R>>),
}

/// The frames of a zstd stream one after the other.
pub(super) struct Zstd<R> {
    blob: Blob<R>,
    decoder: FrameDecoder,
    /// Whether the decoder is within a frame.
    in_frame: bool,
    /// Whether there was a frame at all.
    any: bool,
}

/// The compressed stream.
pub(super) struct Blob<R> {
    source: R,
    meta: LayerBlob,
    hash: Sha256,
    /// Bytes read from the source.
    bytes: u64,
    buffer: Box<[u8]>,
    /// What of the buffer is still to be consumed.
    rest: std::ops::Range<usize>,
    /// Why the source cannot be read on.
    error: Option<LayerError>,
}

impl<R: Read> Stream<R> {
    pub(super) fn new(source: R, meta: LayerBlob) -> Self {
        let buffer = vec![0; BUFFER_BYTES].into_boxed_slice();
        let blob = Blob { source, meta, hash: Sha256::new(), bytes: 0, buffer, rest: 0..0, error: None };
        match meta.compression {
            Compression::None => Self::Plain(Box::new(blob)),
            Compression::Gzip => Self::Gzip(Box::new(MultiGzDecoder::new(blob))),
            Compression::Zstd => Self::Zstd(Box::new(Zstd::new(blob))),
        }
    }

    /// Reads until the buffer is full or the stream ends.
    pub(super) fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        let mut length = 0;
        while length < buffer.len() {
            let read = match self {
                Self::Plain(blob) => blob.read(&mut buffer[length..]),
                Self::Gzip(gzip) => gzip.read(&mut buffer[length..]),
                Self::Zstd(zstd) => zstd.read(&mut buffer[length..]),
            };
            match read {
                Ok(0) => break,
                Ok(read) => length += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    let blob = self.blob_mut();
                    let LayerBlob { digest, compression, .. } = blob.meta;
                    return Err(blob.error.take().unwrap_or(LayerError::Inflate { digest, compression, source }));
                }
            }
        }
        Ok(length)
    }

    pub(super) fn blob(&self) -> &Blob<R> {
        match self {
            Self::Plain(blob) => blob,
            Self::Gzip(gzip) => gzip.get_ref(),
            Self::Zstd(zstd) => &zstd.blob,
        }
    }

    pub(super) fn into_blob(self) -> Blob<R> {
        match self {
            Self::Plain(blob) => *blob,
            Self::Gzip(gzip) => gzip.into_inner(),
            Self::Zstd(zstd) => zstd.blob,
        }
    }

    fn blob_mut(&mut self) -> &mut Blob<R> {
        match self {
            Self::Plain(blob) => blob,
            Self::Gzip(gzip) => gzip.get_mut(),
            Self::Zstd(zstd) => &mut zstd.blob,
        }
    }
}

impl<R: Read> Zstd<R> {
    fn new(blob: Blob<R>) -> Self {
        let mut decoder = FrameDecoder::new();
        decoder.set_max_window_size(ZSTD_WINDOW_BYTES_MAX);
        Self { blob, decoder, in_frame: false, any: false }
    }

    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        loop {
            if !self.in_frame {
                if self.blob.fill_buf()?.is_empty() {
                    return if self.any { Ok(0) } else { Err(io::ErrorKind::UnexpectedEof.into()) };
                }
                self.next_frame()?;
                continue;
            }
            if self.decoder.can_collect() > 0 {
                return self.decoder.read(target);
            }
            if self.decoder.is_finished() {
                self.in_frame = false;
                continue;
            }
            let one = BlockDecodingStrategy::UptoBlocks(1);
            self.decoder.decode_blocks(&mut self.blob, one).map_err(io::Error::other)?;
        }
    }

    /// Begins a frame, or passes over one that only tools look at.
    fn next_frame(&mut self) -> io::Result<()> {
        use ruzstd::decoding::errors::{FrameDecoderError, ReadFrameHeaderError};
        self.any = true;
        match self.decoder.reset(&mut self.blob) {
            Ok(()) => self.in_frame = true,
            Err(FrameDecoderError::ReadFrameHeaderError(ReadFrameHeaderError::SkipFrame { length, .. })) => {
                let skipped = io::copy(&mut (&mut self.blob).take(length.into()), &mut io::sink())?;
                if skipped < length.into() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
            }
            Err(error) => return Err(io::Error::other(error)),
        }
        Ok(())
    }
}

impl<R: Read> Blob<R> {
    pub(super) fn digest(&self) -> Digest {
        self.meta.digest
    }

    /// Bytes read so far.
    pub(super) fn bytes(&self) -> u64 {
        self.bytes
    }

    /// Reads the rest, and checks size and digest of the whole.
    pub(super) fn verify(mut self) -> Result<(), LayerError> {
        loop {
            self.rest = 0..0;
            match self.fill_buf() {
                Ok([]) => break,
                Ok(_) => {}
                Err(source) => {
                    return Err(self.error.take().unwrap_or(LayerError::Source { digest: self.meta.digest, source }));
                }
            }
        }
        let LayerBlob { digest, size, .. } = self.meta;
        if self.bytes != size {
            return Err(LayerError::Size { digest, expected: size, actual: self.bytes });
        }
        let actual = Digest::from_sha256(self.hash.finalize().into());
        if actual == digest { Ok(()) } else { Err(LayerError::BlobDigest { expected: digest, actual }) }
    }

    /// Keeps an error for the caller; what stands between here and there only passes a token on.
    fn fail(&mut self, error: LayerError) -> io::Error {
        self.error = Some(error);
        io::Error::other("the blob cannot be read")
    }
}

impl<R: Read> BufRead for Blob<R> {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        while self.rest.is_empty() {
            let read = match self.source.read(&mut self.buffer) {
                Ok(0) => break,
                Ok(read) => read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => continue,
                Err(source) => return Err(self.fail(LayerError::Source { digest: self.meta.digest, source })),
            };
            self.bytes += read as u64;
            if self.bytes > self.meta.size {
                let LayerBlob { digest, size, .. } = self.meta;
                return Err(self.fail(LayerError::Size { digest, expected: size, actual: self.bytes }));
            }
            self.hash.update(&self.buffer[..read]);
            self.rest = 0..read;
        }
        Ok(&self.buffer[self.rest.clone()])
    }

    fn consume(&mut self, amount: usize) {
        self.rest.start = (self.rest.start + amount).min(self.rest.end);
    }
}

impl<R: Read> Read for Blob<R> {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let buffer = self.fill_buf()?;
        let length = buffer.len().min(target.len());
        target[..length].copy_from_slice(&buffer[..length]);
        self.consume(length);
        Ok(length)
    }
}

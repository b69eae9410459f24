//! The blob as it comes from its source: counted, hashed, inflated.

use std::io::{self, BufRead, Read};

use flate2::bufread::MultiGzDecoder;
use funtainer_model::Digest;
use sha2::{Digest as _, Sha256};

use super::{Compression, LayerBlob, LayerError};

/// Bytes that are read from the source at once.
const BUFFER_BYTES: usize = 64 << 10;

/// The uncompressed stream.
pub(super) enum Stream<R> {
    Plain(Box<Blob<R>>),
    Gzip(Box<MultiGzDecoder<Blob<R>>>),
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
        }
    }

    /// Reads until the buffer is full or the stream ends.
    pub(super) fn fill(&mut self, buffer: &mut [u8]) -> Result<usize, LayerError> {
        let mut length = 0;
        while length < buffer.len() {
            let read = match self {
                Self::Plain(blob) => blob.read(&mut buffer[length..]),
                Self::Gzip(gzip) => gzip.read(&mut buffer[length..]),
            };
            match read {
                Ok(0) => break,
                Ok(read) => length += read,
                Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
                Err(source) => {
                    let blob = self.blob_mut();
                    let digest = blob.meta.digest;
                    return Err(blob.error.take().unwrap_or(LayerError::Inflate { digest, source }));
                }
            }
        }
        Ok(length)
    }

    pub(super) fn blob(&self) -> &Blob<R> {
        match self {
            Self::Plain(blob) => blob,
            Self::Gzip(gzip) => gzip.get_ref(),
        }
    }

    pub(super) fn into_blob(self) -> Blob<R> {
        match self {
            Self::Plain(blob) => *blob,
            Self::Gzip(gzip) => gzip.into_inner(),
        }
    }

    fn blob_mut(&mut self) -> &mut Blob<R> {
        match self {
            Self::Plain(blob) => blob,
            Self::Gzip(gzip) => gzip.get_mut(),
        }
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

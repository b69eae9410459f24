//! The way of the uncompressed stream to its two readers: each buffer goes to both, and comes back when both are done.

use std::fs::File;
use std::io::{self, BufRead, Read};
use std::sync::Arc;
use std::sync::mpsc::{self, Receiver, SyncSender};

use funtainer_model::Digest;
use sha2::{Digest as _, Sha256};

use crate::erofs::{self, WriteError, WriteOptions, WriteSummary};
use crate::tar;

/// Size of a buffer in bytes. Larger ones were slower: they fall out of the processor's cache, and above 128 KiB the
/// allocator asks the kernel for each.
const BUFFER_BYTES: usize = 64 << 10;
/// Buffers that may wait for one reader.
const QUEUE_BUFFERS: usize = 8;

/// The three ends.
pub(super) struct Pipe {
    pub(super) sender: Sender,
    pub(super) hash: HashEnd,
    pub(super) parse: ParseEnd,
}

pub(super) struct Sender {
    hash: SyncSender<Arc<Vec<u8>>>,
    parse: SyncSender<Arc<Vec<u8>>>,
    returned: Receiver<Vec<u8>>,
}

pub(super) struct HashEnd {
    input: Receiver<Arc<Vec<u8>>>,
    returns: SyncSender<Vec<u8>>,
}

pub(super) struct ParseEnd {
    input: Receiver<Arc<Vec<u8>>>,
    returns: SyncSender<Vec<u8>>,
    current: Option<Arc<Vec<u8>>>,
    consumed: usize,
}

/// The parsing end is gone: it has failed.
#[derive(Debug, PartialEq, Eq)]
pub(super) struct Closed;

pub(super) fn new() -> Pipe {
    let (hash_sender, hash_input) = mpsc::sync_channel(QUEUE_BUFFERS);
    let (parse_sender, parse_input) = mpsc::sync_channel(QUEUE_BUFFERS);
    let (returns, returned) = mpsc::sync_channel(2 * QUEUE_BUFFERS);
    Pipe {
        sender: Sender { hash: hash_sender, parse: parse_sender, returned },
        hash: HashEnd { input: hash_input, returns: returns.clone() },
        parse: ParseEnd { input: parse_input, returns, current: None, consumed: 0 },
    }
}

impl Sender {
    /// A buffer to fill.
    pub(super) fn buffer(&self) -> Vec<u8> {
        let mut buffer = self.returned.try_recv().unwrap_or_default();
        buffer.resize(BUFFER_BYTES, 0);
        buffer
    }

    /// Sends a buffer to both readers; waits where they are behind.
    pub(super) fn send(&mut self, buffer: Vec<u8>) -> Result<(), Closed> {
        let buffer = Arc::new(buffer);
        self.parse.send(Arc::clone(&buffer)).map_err(|_| Closed)?;
        self.hash.send(buffer).map_err(|_| Closed)
    }
}

impl HashEnd {
    /// The digest of all that comes.
    pub(super) fn sha256(self) -> Digest {
        let mut hash = Sha256::new();
        for buffer in &self.input {
            hash.update(&**buffer);
            give_back(&self.returns, buffer);
        }
        Digest::from_sha256(hash.finalize().into())
    }
}

impl ParseEnd {
    /// Writes the layer, and takes in what follows the end of the archive, which the digest covers too.
    pub(super) fn write_layer(self, out: &File, options: WriteOptions) -> Result<WriteSummary, WriteError> {
        let mut archive = tar::Reader::new(self);
        let summary = erofs::write(&mut archive, out, options)?;
        let Self { input, returns, .. } = archive.into_inner();
        for buffer in &input {
            give_back(&returns, buffer);
        }
        Ok(summary)
    }
}

impl BufRead for ParseEnd {
    fn fill_buf(&mut self) -> io::Result<&[u8]> {
        // Buffers are never empty.
        if self.current.as_ref().is_none_or(|buffer| buffer.len() == self.consumed) {
            if let Some(buffer) = self.current.take() {
                give_back(&self.returns, buffer);
            }
            self.current = self.input.recv().ok();
            self.consumed = 0;
        }
        Ok(self.current.as_ref().map_or(&[], |buffer| &buffer[self.consumed..]))
    }

    fn consume(&mut self, amount: usize) {
        self.consumed += amount;
    }
}

impl Read for ParseEnd {
    fn read(&mut self, target: &mut [u8]) -> io::Result<usize> {
        let buffer = self.fill_buf()?;
        let length = buffer.len().min(target.len());
        target[..length].copy_from_slice(&buffer[..length]);
        self.consume(length);
        Ok(length)
    }
}

/// The last reader of a buffer gives it back; where nobody waits for it, it is freed.
fn give_back(returns: &SyncSender<Vec<u8>>, buffer: Arc<Vec<u8>>) {
    if let Some(buffer) = Arc::into_inner(buffer) {
        let _ = returns.try_send(buffer);
    }
}

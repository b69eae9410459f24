//! A bounded pipe from an async receiver of bytes to a reader on a blocking thread.
//!
//! The sender says when the bytes are complete. A sender that is dropped before that (its future was cancelled, its
//! connection broke) makes the reader fail, so that half a stream is never taken for a whole one.

use std::io::{self, Read};

use bytes::{Buf, Bytes};
use tokio::sync::mpsc;

/// Most chunks on the way. HTTP chunks have some 8 to 64 KiB, so this is about one megabyte for each layer under way.
const CHUNKS_MAX: usize = 16;

/// The end that is written to.
pub(crate) struct PipeSender(mpsc::Sender<Piece>);

/// The end that is read from. Its reads block the thread.
pub(crate) struct PipeReader {
    pieces: mpsc::Receiver<Piece>,
    current: Bytes,
    complete: bool,
}

/// The reader is gone: it failed, or has seen enough.
#[derive(Debug)]
pub(crate) struct ReaderGone;

enum Piece {
    Data(Bytes),
    End,
}

/// A pipe that holds at most [`CHUNKS_MAX`] chunks.
pub(crate) fn pipe() -> (PipeSender, PipeReader) {
    let (sender, pieces) = mpsc::channel(CHUNKS_MAX);
    (PipeSender(sender), PipeReader { pieces, current: Bytes::new(), complete: false })
}

impl PipeSender {
    /// Waits for room and sends.
    pub(crate) async fn send(&self, chunk: Bytes) -> Result<(), ReaderGone> {
        self.0.send(Piece::Data(chunk)).await.map_err(|_| ReaderGone)
    }

    /// Says that all bytes were sent.
    pub(crate) async fn finish(self) -> Result<(), ReaderGone> {
        self.0.send(Piece::End).await.map_err(|_| ReaderGone)
    }
}

impl Read for PipeReader {
    fn read(&mut self, buffer: &mut [u8]) -> io::Result<usize> {
        while self.current.is_empty() && !self.complete {
            match self.pieces.blocking_recv() {
                Some(Piece::Data(chunk)) => self.current = chunk,
                Some(Piece::End) => self.complete = true,
                None => return Err(io::Error::new(io::ErrorKind::ConnectionAborted, "the transfer was broken off")),
            }
        }
        let count = self.current.len().min(buffer.len());
        self.current.copy_to_slice(&mut buffer[..count]);
        Ok(count)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn whole_streams_end_and_broken_ones_fail() {
        for finished in [true, false] {
            let (sender, mut reader) = pipe();
            let reading = tokio::task::spawn_blocking(move || {
                let mut all = Vec::new();
                reader.read_to_end(&mut all).map(|_| all)
            });
            for _ in 0..CHUNKS_MAX * 2 {
                sender.send(Bytes::from_static(b"abc")).await.unwrap();
            }
            if finished {
                sender.finish().await.unwrap();
                assert_eq!(reading.await.unwrap().unwrap(), b"abc".repeat(CHUNKS_MAX * 2));
            } else {
                drop(sender);
                assert_eq!(reading.await.unwrap().unwrap_err().kind(), io::ErrorKind::ConnectionAborted);
            }
        }
    }
}

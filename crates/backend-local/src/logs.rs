//! Logs of functions: two bounded files for each, written by one thread.
//!
//! ```text
//! stderr, stdout of an instance ─► Capture (a task) ─► bounded channel ─► writer thread ─► DIR/SLUG.log, DIR/SLUG.old.log
//!                                    │ tail, copy for `run`                     └────────► followers
//! ```
//!
//! A line is `TIME INSTANCE STREAM TEXT`. An instance that writes faster than [`COST_PER_S_MAX`] waits on its own pipe: it can neither
//! fill the disk nor keep the others from writing. Nothing here is flushed to the disk by force: a log is no state.

mod writer;

use std::collections::VecDeque;
use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime};

use bytes::{Bytes, BytesMut};
use funtainer_model::{InstanceId, Slug};
use tokio::io::AsyncReadExt;
use tokio::net::unix::pipe;
use tokio::sync::{mpsc, oneshot};
use tokio::task::JoinHandle;

use writer::{Command, Entry, Writer};

/// Longest line in bytes; what is longer is cut into several. Also how much of an unfinished line is held back.
const LINE_BYTES_MAX: usize = 16 * 1024;
/// Bytes taken from a pipe at once: its default size.
const READ_BYTES: usize = 64 * 1024;
/// End of standard error that a failure can show, in bytes.
const TAIL_BYTES_MAX: usize = 4 * 1024;
/// Cost of a second's output of one stream at most, in bytes; each line costs [`LINE_COST`] more.
const COST_PER_S_MAX: usize = 4 * 1024 * 1024;
/// What a line costs besides its bytes: its time, instance and stream.
const LINE_COST: usize = 80;
/// Pieces of output under way to the writer; each has at most [`READ_BYTES`].
const QUEUE_MAX: usize = 64;

/// Which standard stream.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Stream {
    Stdout,
    Stderr,
}

/// The writer's door. Clones are the same; the thread ends with the last one and with the last [`Capture`].
#[derive(Clone)]
pub(crate) struct Logs {
    commands: mpsc::Sender<Command>,
}

/// A stream that is being read.
pub(crate) struct Capture {
    task: JoinHandle<()>,
    tail: Arc<Mutex<VecDeque<u8>>>,
}

impl Logs {
    /// Logs in this directory, which is made if missing.
    pub(crate) fn open(directory: PathBuf) -> io::Result<Self> {
        std::fs::create_dir_all(&directory)?;
        let (commands, receiver) = mpsc::channel(QUEUE_MAX);
        std::thread::Builder::new().name("logs".to_owned()).spawn(move || Writer::new(directory).run(receiver))?;
        Ok(Self { commands })
    }

    /// Reads a pipe to its end on the current runtime. `copy` gets the bytes as they are; the instance waits while it is full.
    pub(crate) fn capture(
        &self,
        slug: &Slug,
        instance: InstanceId,
        stream: Stream,
        pipe: OwnedFd,
        copy: Option<mpsc::Sender<Bytes>>,
    ) -> io::Result<Capture> {
        let pipe = pipe::Receiver::from_owned_fd(pipe)?;
        let tail = Arc::new(Mutex::new(VecDeque::new()));
        let pump =
            Pump { slug: slug.clone(), instance, stream, commands: self.commands.clone(), tail: Arc::clone(&tail), copy };
        Ok(Capture { task: tokio::spawn(pump.run(pipe)), tail })
    }

    /// The last `lines` lines of a log, then, with `follow`, what comes. A log that does not exist is empty.
    pub(crate) async fn read(&self, slug: &Slug, lines: usize, follow: bool) -> io::Result<mpsc::Receiver<Bytes>> {
        let (answer, read) = oneshot::channel();
        let command = Command::Read { slug: slug.clone(), lines, follow, answer };
        self.commands.send(command).await.map_err(|_| io::ErrorKind::BrokenPipe)?;
        read.await.map_err(|_| io::ErrorKind::BrokenPipe)?
    }

    /// Deletes a log and ends its followers.
    pub(crate) async fn forget(&self, slug: &Slug) {
        let (done, wait) = oneshot::channel();
        // An error means that the writer has ended, with it the platform.
        if self.commands.send(Command::Forget { slug: slug.clone(), done }).await.is_ok() {
            let _ = wait.await;
        }
    }
}

impl Capture {
    /// Waits for the end of the stream, but not longer than `at_most`.
    pub(crate) async fn drained(&mut self, at_most: Duration) {
        let _ = tokio::time::timeout(at_most, &mut self.task).await;
    }

    /// The last bytes so far, at most 4 KiB.
    pub(crate) fn tail(&self) -> Bytes {
        let tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
        tail.iter().copied().collect()
    }
}

impl Drop for Capture {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// Reads one stream of one instance.
struct Pump {
    slug: Slug,
    instance: InstanceId,
    stream: Stream,
    commands: mpsc::Sender<Command>,
    tail: Arc<Mutex<VecDeque<u8>>>,
    copy: Option<mpsc::Sender<Bytes>>,
}

impl Pump {
    async fn run(mut self, mut pipe: pipe::Receiver) {
        // Empty until there is output: most instances write little.
        let mut buffer = BytesMut::new();
        let mut rate = Rate::new(Instant::now());
        loop {
            if buffer.capacity() - buffer.len() < LINE_BYTES_MAX {
                if pipe.readable().await.is_err() {
                    return;
                }
                buffer.reserve(READ_BYTES);
            }
            let before = buffer.len();
            match pipe.read_buf(&mut buffer).await {
                Ok(0) => break,
                Ok(_) => {}
                Err(error) => {
                    tracing::warn!(instance = %self.instance, %error, "a log pipe cannot be read");
                    break;
                }
            }
            let new = &buffer[before..];
            let cost = new.len() + LINE_COST * new.split(|byte| *byte == b'\n').count();
            self.keep_tail(new);
            self.give_copy(new).await;
            let whole = match buffer.iter().rposition(|byte| *byte == b'\n') {
                Some(at) => at + 1,
                None if buffer.len() >= LINE_BYTES_MAX => buffer.len(),
                None => 0,
            };
            if whole > 0 {
                self.write(buffer.split_to(whole).freeze()).await;
            }
            if buffer.is_empty() {
                // A quiet instance holds no memory here.
                buffer = BytesMut::new();
            }
            if let Some(pause) = rate.spend(cost, Instant::now()) {
                tokio::time::sleep(pause).await;
            }
        }
        if !buffer.is_empty() {
            self.write(buffer.freeze()).await;
        }
    }

    async fn write(&self, text: Bytes) {
        let Self { slug, instance, stream, .. } = self;
        let entry = Entry { slug: slug.clone(), instance: *instance, stream: *stream, time: SystemTime::now(), text };
        // The writer only ends with the platform.
        let _ = self.commands.send(Command::Write(entry)).await;
    }

    fn keep_tail(&self, new: &[u8]) {
        if self.stream == Stream::Stderr {
            let new = &new[new.len().saturating_sub(TAIL_BYTES_MAX)..];
            let mut tail = self.tail.lock().unwrap_or_else(PoisonError::into_inner);
            let surplus = (tail.len() + new.len()).saturating_sub(TAIL_BYTES_MAX);
            tail.drain(..surplus);
            tail.extend(new);
        }
    }

    async fn give_copy(&mut self, new: &[u8]) {
        if let Some(copy) = &self.copy
            && copy.send(Bytes::copy_from_slice(new)).await.is_err()
        {
            self.copy = None;
        }
    }
}

/// What may be spent within a second.
struct Rate {
    second: Instant,
    spent: usize,
}

impl Rate {
    fn new(now: Instant) -> Self {
        Self { second: now, spent: 0 }
    }

    /// How long to wait after that much was spent.
    fn spend(&mut self, cost: usize, now: Instant) -> Option<Duration> {
        let gone = now.saturating_duration_since(self.second);
        if gone >= Duration::from_secs(1) {
            *self = Self::new(now);
        }
        self.spent += cost;
        if self.spent < COST_PER_S_MAX {
            return None;
        }
        let over = self.spent as f64 / COST_PER_S_MAX as f64;
        let pause = Duration::from_secs_f64(over).saturating_sub(now.saturating_duration_since(self.second));
        *self = Self::new(now + pause);
        Some(pause)
    }
}

#[cfg(test)]
mod tests;

//! The thread that owns the files.

use std::collections::HashMap;
use std::fs::{self, File, OpenOptions};
use std::io::{self, Read, Write};
use std::os::unix::fs::OpenOptionsExt;
use std::path::{Path, PathBuf};
use std::time::SystemTime;

use bytes::Bytes;
use funtainer_model::{InstanceId, Slug};
use tokio::sync::{mpsc, oneshot};

use super::{LINE_BYTES_MAX, Stream};

/// Size of a log at which it becomes the old one, in bytes; the one before is deleted. Two of these are what a function keeps.
pub(super) const FILE_BYTES_MAX: u64 = 8 * 1024 * 1024;
/// Files kept open: functions that write now.
const OPEN_MAX: usize = 256;
/// Pieces that a follower may be behind; what is more is left out and counted.
const BEHIND_MAX: usize = 256;
/// Bytes in one piece of an old log.
const PIECE_BYTES: usize = 64 * 1024;

/// What the thread is asked to do.
pub(super) enum Command {
    Write(Entry),
    Read { slug: Slug, lines: usize, follow: bool, answer: oneshot::Sender<io::Result<mpsc::Receiver<Bytes>>> },
    Forget { slug: Slug, done: oneshot::Sender<()> },
}

/// Whole lines of one stream, or the part of one that is too long.
pub(super) struct Entry {
    pub(super) slug: Slug,
    pub(super) instance: InstanceId,
    pub(super) stream: Stream,
    pub(super) time: SystemTime,
    pub(super) text: Bytes,
}

/// See the module.
pub(super) struct Writer {
    directory: PathBuf,
    open: HashMap<Slug, Open>,
    followers: HashMap<Slug, Vec<Follower>>,
}

struct Open {
    file: File,
    bytes: u64,
}

struct Follower {
    sender: mpsc::Sender<Bytes>,
    missed: u64,
}

impl Writer {
    pub(super) fn new(directory: PathBuf) -> Self {
        Self { directory, open: HashMap::new(), followers: HashMap::new() }
    }

    /// Until nobody can send commands any more.
    pub(super) fn run(mut self, mut commands: mpsc::Receiver<Command>) {
        while let Some(command) = commands.blocking_recv() {
            match command {
                Command::Write(entry) => self.write(&entry),
                Command::Read { slug, lines, follow, answer } => {
                    // Who asked may be gone.
                    let _ = answer.send(self.read(&slug, lines, follow));
                }
                Command::Forget { slug, done } => {
                    self.forget(&slug);
                    let _ = done.send(());
                }
            }
        }
    }

    fn write(&mut self, entry: &Entry) {
        let text = format(entry);
        if let Err(error) = self.append(&entry.slug, &text) {
            // Said once for each piece: a full disk is seen at the first.
            tracing::warn!(function = %entry.slug, %error, "a log cannot be written");
            self.open.remove(&entry.slug);
        }
        if let Some(followers) = self.followers.get_mut(&entry.slug) {
            let text = Bytes::from(text);
            followers.retain_mut(|follower| follower.give(&text));
            if followers.is_empty() {
                self.followers.remove(&entry.slug);
            }
        }
    }

    fn append(&mut self, slug: &Slug, text: &[u8]) -> io::Result<()> {
        let path = self.path(slug, false);
        if let Some(open) = self.open.get(slug)
            && open.bytes >= FILE_BYTES_MAX
        {
            fs::rename(&path, self.path(slug, true))?;
            self.open.remove(slug);
        }
        if !self.open.contains_key(slug) {
            if self.open.len() >= OPEN_MAX {
                self.open.clear();
            }
            let file = OpenOptions::new().append(true).create(true).mode(0o640).open(&path)?;
            let bytes = file.metadata()?.len();
            self.open.insert(slug.clone(), Open { file, bytes });
        }
        let open = self.open.get_mut(slug).expect("it was put there just now");
        open.bytes += text.len() as u64;
        open.file.write_all(text)
    }

    fn read(&mut self, slug: &Slug, lines: usize, follow: bool) -> io::Result<mpsc::Receiver<Bytes>> {
        let mut text = read_file(&self.path(slug, false))?;
        let mut start = last_lines(&text, lines);
        if start.missing > 0 {
            let mut old = read_file(&self.path(slug, true))?;
            start = last_lines(&old, start.missing);
            old.append(&mut text);
            text = old;
        }
        let mut text = Bytes::from(text).split_off(start.at);
        let pieces = text.len().div_ceil(PIECE_BYTES);
        let (sender, receiver) = mpsc::channel(pieces + if follow { BEHIND_MAX } else { 1 });
        while !text.is_empty() {
            let piece = text.split_to(text.len().min(PIECE_BYTES));
            sender.try_send(piece).expect("there is room for all pieces");
        }
        if follow {
            // Those that left while nothing was written.
            self.followers.retain(|_, followers| {
                followers.retain(|follower| !follower.sender.is_closed());
                !followers.is_empty()
            });
            self.followers.entry(slug.clone()).or_default().push(Follower { sender, missed: 0 });
        }
        Ok(receiver)
    }

    fn forget(&mut self, slug: &Slug) {
        self.open.remove(slug);
        self.followers.remove(slug);
        for old in [false, true] {
            if let Err(error) = fs::remove_file(self.path(slug, old))
                && error.kind() != io::ErrorKind::NotFound
            {
                tracing::warn!(function = %slug, %error, "a log cannot be deleted");
            }
        }
    }

    /// A slug is a DNS label: it has neither dots nor slashes.
    fn path(&self, slug: &Slug, old: bool) -> PathBuf {
        self.directory.join(format!("{slug}{}", if old { ".old.log" } else { ".log" }))
    }
}

impl Follower {
    /// False once it is gone.
    fn give(&mut self, text: &Bytes) -> bool {
        if self.missed > 0 {
            let notice = format!("({} bytes of the log left out: the reader is too slow)\n", self.missed);
            match self.sender.try_send(notice.into()) {
                Ok(()) => self.missed = 0,
                Err(mpsc::error::TrySendError::Full(_)) => {}
                Err(mpsc::error::TrySendError::Closed(_)) => return false,
            }
        }
        match self.sender.try_send(text.clone()) {
            Ok(()) => {}
            Err(mpsc::error::TrySendError::Full(_)) => self.missed += text.len() as u64,
            Err(mpsc::error::TrySendError::Closed(_)) => return false,
        }
        true
    }
}

/// `TIME INSTANCE STREAM TEXT` for each line, with a line feed at its end.
fn format(entry: &Entry) -> Vec<u8> {
    let time = jiff::Timestamp::try_from(entry.time).unwrap_or(jiff::Timestamp::UNIX_EPOCH);
    let stream = match entry.stream {
        Stream::Stdout => "stdout",
        Stream::Stderr => "stderr",
    };
    let prefix = format!("{time:.6} {} {stream} ", entry.instance);
    let text = entry.text.strip_suffix(b"\n").unwrap_or(&entry.text);
    let mut out = Vec::with_capacity(text.len() + 2 * prefix.len());
    for line in text.split(|byte| *byte == b'\n') {
        let line = line.strip_suffix(b"\r").unwrap_or(line);
        let mut rest = line;
        loop {
            let part;
            (part, rest) = rest.split_at(rest.len().min(LINE_BYTES_MAX));
            out.extend_from_slice(prefix.as_bytes());
            out.extend_from_slice(part);
            out.push(b'\n');
            if rest.is_empty() {
                break;
            }
        }
    }
    out
}

/// A whole file, which is bounded by how it is written; empty where there is none.
fn read_file(path: &Path) -> io::Result<Vec<u8>> {
    let mut text = Vec::new();
    match File::open(path) {
        Ok(file) => file.take(2 * FILE_BYTES_MAX).read_to_end(&mut text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => 0,
        Err(error) => return Err(error),
    };
    Ok(text)
}

/// Where the last lines start, and how many lines more were wanted.
struct Start {
    at: usize,
    missing: usize,
}

fn last_lines(text: &[u8], lines: usize) -> Start {
    if lines == 0 {
        return Start { at: text.len(), missing: 0 };
    }
    let mut missing = lines;
    let body = text.strip_suffix(b"\n").unwrap_or(text);
    for (at, byte) in body.iter().enumerate().rev() {
        if *byte == b'\n' {
            missing -= 1;
            if missing == 0 {
                return Start { at: at + 1, missing: 0 };
            }
        }
    }
    Start { at: 0, missing: if body.is_empty() { missing } else { missing - 1 } }
}

//! A command that somebody speaks with: of `run`, in an instance of its own, or of `exec`, in one that runs.

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use funtainer_contract::ExitFuture;
use funtainer_contract::terminal::Terminal;
use funtainer_model::{ErrorCode, Failure, StopSignal};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use crate::backend::{Backend, SignalTarget};

/// A running command. Dropping it ends the command; what it used is released behind it.
pub struct CommandHandle {
    /// Its standard streams. Taken by whoever speaks with it.
    pub streams: CommandStreams,
    /// Its end.
    pub exit: ExitFuture,
    /// By which it is sent signals.
    pub signals: Signals,
    /// Ends it and gives back what it holds.
    pub(crate) _kept: Box<dyn Send>,
}

/// The standard streams of a command.
pub enum CommandStreams {
    /// One for each.
    Pipes {
        /// Its standard input; drop it for end of file.
        stdin: Option<pipe::Sender>,
        /// Its standard output; ends when the last process that holds it has ended.
        stdout: Option<pipe::Receiver>,
        /// Its standard error.
        stderr: Errors,
    },
    /// All three are a terminal.
    Terminal(Terminal),
}

/// Where standard error comes from.
pub enum Errors {
    /// The stream itself.
    Pipe(pipe::Receiver),
    /// Copies of what goes into a log, bounded: the command waits while it is full.
    Log(mpsc::Receiver<Bytes>),
}

/// By which a command is sent signals.
#[derive(Clone)]
pub struct Signals {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) target: SignalTarget,
}

impl Signals {
    /// Which command.
    pub const fn target(&self) -> SignalTarget {
        self.target
    }

    /// Sends a signal to the command's first process. One that has ended takes none: that is no error.
    pub async fn send(&self, signal: StopSignal) {
        self.backend.signal(self.target, signal).await;
    }
}

impl CommandStreams {
    /// On the runtime that polls this.
    pub(crate) fn pipes(stdin: OwnedFd, stdout: OwnedFd, stderr: Errors) -> Result<Self, Failure> {
        let (stdin, stdout) = pipe::Sender::from_owned_fd(stdin)
            .and_then(|stdin| Ok((stdin, pipe::Receiver::from_owned_fd(stdout)?)))
            .map_err(|error| unusable(&error))?;
        Ok(Self::Pipes { stdin: Some(stdin), stdout: Some(stdout), stderr })
    }

    /// On the runtime that polls this.
    pub(crate) fn terminal(master: OwnedFd) -> Result<Self, Failure> {
        Terminal::new(master).map(Self::Terminal).map_err(|error| unusable(&error))
    }
}

impl Errors {
    /// On the runtime that polls this.
    pub(crate) fn pipe(stderr: OwnedFd) -> Result<Self, Failure> {
        pipe::Receiver::from_owned_fd(stderr).map(Self::Pipe).map_err(|error| unusable(&error))
    }
}

fn unusable(error: &io::Error) -> Failure {
    Failure::new(ErrorCode::Internal, format!("the command's streams cannot be used: {error}"))
}

/// One of the commands that there may be at once.
pub(crate) struct Place(Arc<AtomicUsize>);

impl Place {
    /// Refuses when `max` are taken.
    pub(crate) fn take(taken: &Arc<AtomicUsize>, max: usize) -> Result<Self, Failure> {
        let place = Self(Arc::clone(taken));
        if taken.fetch_add(1, Ordering::AcqRel) >= max {
            return Err(Failure::new(ErrorCode::QueueFull, format!("{max} commands are running already"))
                .with_hint("wait until one of them has ended"));
        }
        Ok(place)
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        self.0.fetch_sub(1, Ordering::AcqRel);
    }
}

//! One command, once: a revision of its own with a single instance, gone with its handle.

use bytes::Bytes;
use funtainer_contract::ExitFuture;
use funtainer_model::{Failure, FunctionSpec};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use crate::backend::ProgressSink;
use crate::engine::Engine;

/// A running command. Dropping it ends the command; what it used is released behind it.
pub struct RunHandle {
    /// Its standard input; drop it for end of file.
    pub stdin: Option<pipe::Sender>,
    /// Its standard output. Taken by whoever reads it; ends when the last process that holds it has ended.
    pub stdout: Option<pipe::Receiver>,
    /// Its standard error, bounded: the command waits while it is full.
    pub stderr: mpsc::Receiver<Bytes>,
    /// Its end.
    pub exit: ExitFuture,
}

impl Engine {
    /// Runs the command of an image once, with contract `stdio`, on the runtime that polls this. `spec.id` is replaced by a name
    /// of its own. Errors are those of a deploy (126 and 127 of `run` are `CommandNotExecutable` and `CommandNotFound`).
    pub async fn run(&self, spec: FunctionSpec, progress: ProgressSink) -> Result<RunHandle, Failure> {
        let _ = (spec, progress);
        Err(self.not_yet())
    }
}

//! One command, once: a revision of its own with a single instance, gone with its handle.

use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use funtainer_contract::{ExitFuture, stdio};
use funtainer_model::{ErrorCode, Failure, FunctionId, FunctionSpec};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;
use tokio::time::Instant;
use uuid::Uuid;

use crate::backend::{ProgressSink, Resolve};
use crate::engine::{Engine, Shared};
use crate::fleet::Mode;
use crate::per_call::{self, Command, Running};
use crate::revision::{Beginning, Instances, Revision};
use crate::rollout::resolve;
use crate::route::no_error;

/// Most commands at once: each has a sandbox, a zygote and a host id range of its own.
const RUNS_MAX: usize = 256;
/// Chunks of standard error that are held for a slow reader.
const STDERR_CHUNKS_MAX: usize = 16;

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
    /// Ends the instance first, then its revision.
    _running: Running,
    _transient: Transient,
}

/// A revision that nobody can call. Retired when dropped.
struct Transient {
    shared: Arc<Shared>,
    revision: Arc<Revision>,
    _place: Place,
}

/// One of [`RUNS_MAX`].
struct Place(Arc<AtomicUsize>);

impl Engine {
    /// Runs the command of an image once, with contract `stdio`, on the runtime that polls this. `spec.id` is replaced by a name
    /// of its own. Errors are those of a deploy (126 and 127 of `run` are `CommandNotExecutable` and `CommandNotFound`).
    pub async fn run(&self, spec: FunctionSpec, progress: ProgressSink) -> Result<RunHandle, Failure> {
        let shared = self.shared();
        shared.open_for_work()?;
        let place = Place::take(&shared.running)?;
        let record =
            resolve(&shared.ground.backend, FunctionSpec { id: transient_id()?, ..spec }, Resolve::IfMissing, &progress);
        let record = record.await?;
        let beginning = Beginning { record, mode: Mode::Trial, adopted: Vec::new(), last_error: no_error() };
        let revision = Revision::begin(&shared.ground, beginning);
        let transient = Transient::keep(shared, revision, place);
        let Instances::PerCall(live) = &transient.revision.instances else {
            return Err(Failure::new(ErrorCode::BadSetting, "a command is run with contract stdio"));
        };
        let (stderr_sink, stderr) = mpsc::channel(STDERR_CHUNKS_MAX);
        let Command { streams, exit, running, .. } =
            per_call::start(&shared.ground, &transient.revision.start, live, None, Some(stderr_sink)).await?;
        let (stdin, stdout) = open(streams)
            .map_err(|error| Failure::new(ErrorCode::Internal, format!("the command's streams cannot be used: {error}")))?;
        Ok(RunHandle { stdin: Some(stdin), stdout: Some(stdout), stderr, exit, _running: running, _transient: transient })
    }
}

fn open(streams: stdio::Streams) -> std::io::Result<(pipe::Sender, pipe::Receiver)> {
    Ok((pipe::Sender::from_owned_fd(streams.stdin)?, pipe::Receiver::from_owned_fd(streams.stdout)?))
}

/// A name that no function of a user has by chance.
fn transient_id() -> Result<FunctionId, Failure> {
    let name = format!("run-{}", Uuid::now_v7().as_simple());
    let name =
        name.parse().map_err(|error: funtainer_model::NameError| Failure::new(ErrorCode::Internal, error.to_string()))?;
    Ok(FunctionId::in_default(name))
}

impl Transient {
    fn keep(shared: &Arc<Shared>, revision: Arc<Revision>, place: Place) -> Self {
        let mut runs = shared.runs.lock().unwrap_or_else(PoisonError::into_inner);
        runs.insert(revision.record.id, Arc::clone(&revision));
        drop(runs);
        Self { shared: Arc::clone(shared), revision, _place: place }
    }
}

impl Drop for Transient {
    fn drop(&mut self) {
        let (shared, revision) = (Arc::clone(&self.shared), Arc::clone(&self.revision));
        let gone = revision.retire(&shared.ground, Instant::now() + Duration::ZERO, Duration::ZERO);
        let runtime = shared.ground.runtime.clone();
        runtime.spawn(async move {
            // A task that panicked has nothing left to wait for.
            let _ = gone.await;
            shared.ground.backend.forget_logs(&revision.record.spec.id).await;
            shared.runs.lock().unwrap_or_else(PoisonError::into_inner).remove(&revision.record.id);
        });
    }
}

impl Place {
    fn take(running: &Arc<AtomicUsize>) -> Result<Self, Failure> {
        let place = Self(Arc::clone(running));
        if running.fetch_add(1, Ordering::AcqRel) >= RUNS_MAX {
            return Err(Failure::new(ErrorCode::QueueFull, format!("{RUNS_MAX} commands are running already"))
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

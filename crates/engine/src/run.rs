//! One command, once: a revision of its own with a single instance, gone with its handle.

use std::sync::{Arc, PoisonError};
use std::time::Duration;

use funtainer_contract::terminal::TerminalSize;
use funtainer_contract::{StandardStreams, exec};
use funtainer_model::{ErrorCode, Failure, FunctionId, FunctionSpec};
use tokio::sync::mpsc;
use tokio::time::Instant;
use uuid::Uuid;

use crate::backend::{Access, ProgressSink, Resolve, SignalTarget};
use crate::command::{CommandHandle, CommandStreams, Errors, Place, Signals};
use crate::engine::{Engine, Shared};
use crate::fleet::Mode;
use crate::per_call::{self, Command};
use crate::revision::{Beginning, Instances, Revision};
use crate::rollout::resolve;
use crate::route::no_error;

/// Most commands at once: each has a sandbox, a zygote and a host id range of its own.
const RUNS_MAX: usize = 256;
/// Chunks of standard error that are held for a slow reader.
const STDERR_CHUNKS_MAX: usize = 16;

/// A revision that nobody can call. Retired when dropped.
struct Transient {
    shared: Arc<Shared>,
    revision: Arc<Revision>,
    _place: Place,
}

impl Engine {
    /// Runs the command of an image once, with contract `stdio`, on the runtime that polls this, with a terminal of the given size at first
    /// or with a stream for each. `spec.id` is replaced by a name of its own. Errors are those of a deploy (126 and 127 of `run` are
    /// `CommandNotExecutable` and `CommandNotFound`).
    pub async fn run(
        &self,
        spec: FunctionSpec,
        terminal: Option<TerminalSize>,
        progress: ProgressSink,
    ) -> Result<CommandHandle, Failure> {
        let shared = self.shared();
        shared.open_for_work()?;
        let place = Place::take(&shared.running, RUNS_MAX)?;
        let spec = FunctionSpec { id: transient_id()?, ..spec };
        let mut record = resolve(&shared.ground.backend, spec, Resolve::IfMissing, &progress).await?;
        if let Some(size) = terminal {
            record.plan.streams = StandardStreams::Terminal(size);
            exec::name_terminal(&mut record.plan.env);
        }
        let beginning = Beginning { record, mode: Mode::Trial, adopted: Vec::new(), last_error: no_error() };
        let revision = Revision::begin(&shared.ground, beginning);
        let transient = Transient::keep(shared, revision, place);
        let Instances::PerCall(live) = &transient.revision.instances else {
            return Err(Failure::new(ErrorCode::BadSetting, "a command is run with contract stdio"));
        };
        let (stderr_sink, stderr) = mpsc::channel(STDERR_CHUNKS_MAX);
        let Command { access, exit, running, .. } =
            per_call::start(&shared.ground, &transient.revision.start, live, None, Some(stderr_sink)).await?;
        let target = SignalTarget::Instance(running.instance());
        let streams = match access {
            Access::Streams { stdin, stdout } => CommandStreams::pipes(stdin, stdout, Errors::Log(stderr))?,
            Access::Terminal(master) => CommandStreams::terminal(master)?,
            Access::Network(_) => return Err(per_call::without_streams()),
        };
        let signals = Signals { backend: Arc::clone(&shared.ground.backend), target };
        // The instance ends first, then its revision.
        Ok(CommandHandle { streams, exit, signals, _kept: Box::new((running, transient)) })
    }
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

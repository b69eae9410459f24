//! A command in an instance that runs already.
//!
//! ```text
//! instance: the one named, else one that takes calls ─ none: started if asked for, else refused ─► backend ─► CommandHandle
//! ```
//! The command ends with its instance. While it runs, the instance does not end for its idleness; scaling, deploys and removals do not wait
//! for it.

use std::sync::Arc;
use std::time::Duration;

use funtainer_contract::ExitFuture;
use funtainer_contract::exec::ExecRequest;
use funtainer_model::{Contract, ErrorCode, ExecId, Failure, FunctionId, InstanceId, StopSignal};
use tokio::time::Instant;
use uuid::Uuid;

use crate::backend::{Exec, ExecStarted, ExecStreams, SignalTarget};
use crate::command::{CommandHandle, CommandStreams, Errors, Place, Signals};
use crate::engine::{Engine, Shared};
use crate::instance::InstanceState;
use crate::revision::{Ground, Revision};
use crate::rollout::ASKED_DRAIN;
use crate::route::Function;
use crate::throttle::Guest;
use crate::view::InstanceView;

/// Most commands at once, over all instances: each has pipes and a connection.
const EXECS_MAX: usize = 256;
/// How long a started instance may take to be shown.
const SHOWN_TIME_MAX: Duration = Duration::from_secs(1);

/// Where a command shall run, and what it is.
#[derive(Debug, Clone)]
pub struct ExecOrder {
    /// In this instance; else in one that takes calls.
    pub instance: Option<InstanceId>,
    /// Start one if there is none.
    pub start: bool,
    /// What.
    pub request: ExecRequest,
}

impl Engine {
    /// Runs a command in an instance of a function, on the runtime that polls this. Errors of the command itself are
    /// `CommandNotFound` and `CommandNotExecutable`.
    pub async fn exec(&self, id: &FunctionId, order: ExecOrder) -> Result<CommandHandle, Failure> {
        let shared = self.shared();
        shared.open_for_work()?;
        let place = Place::take(&shared.executing, EXECS_MAX)?;
        let function = shared.get(id)?;
        let ExecOrder { instance, start, request } = order;
        let (revision, instance) = match instance {
            Some(instance) => named(&function, instance)?,
            None => any(shared, &function, start).await?,
        };
        let guest = revision.throttle.guest(instance);
        let id = ExecId::from_uuid(Uuid::now_v7());
        let exec = Exec { id, instance, revision: Arc::clone(&revision.start), request };
        let ExecStarted { streams, exit } = shared.ground.backend.exec(exec).await?;
        let kept = Kept { ground: shared.ground.clone(), id, exit: exit.clone(), _guest: guest, _place: place };
        let streams = match streams {
            ExecStreams::Pipes { stdin, stdout, stderr } => CommandStreams::pipes(stdin, stdout, Errors::pipe(stderr)?)?,
            ExecStreams::Terminal(master) => CommandStreams::terminal(master)?,
        };
        let signals = Signals { backend: Arc::clone(&shared.ground.backend), target: SignalTarget::Exec(id) };
        Ok(CommandHandle { streams, exit, signals, _kept: Box::new(kept) })
    }
}

fn named(function: &Function, wanted: InstanceId) -> Result<(Arc<Revision>, InstanceId), Failure> {
    let all = function.revisions().into_iter().flat_map(|revision| {
        let views = revision.views();
        views.into_iter().map(move |view| (Arc::clone(&revision), view))
    });
    let Some((revision, view)) = { all }.find(|(_, view)| view.id == wanted) else {
        let detail = format!("function '{}' has no instance {wanted}", function.id);
        return Err(Failure::new(ErrorCode::InstanceUnknown, detail));
    };
    match view.state {
        InstanceState::Ready | InstanceState::Idle | InstanceState::Draining => Ok((revision, view.id)),
        state => {
            let detail = format!("instance {wanted} of function '{}' is {state}", function.id);
            Err(Failure::new(ErrorCode::NotRunning, detail).with_hint("try again once it is ready"))
        }
    }
}

/// The oldest instance that takes calls; after a start where that is asked for.
async fn any(shared: &Arc<Shared>, function: &Function, start: bool) -> Result<(Arc<Revision>, InstanceId), Failure> {
    let revision = function.current.load_full();
    if let Some(instance) = takes_calls(&revision) {
        return Ok((revision, instance));
    }
    let spec = &revision.record.spec;
    let none = || Failure::new(ErrorCode::NotRunning, format!("function '{}' has no running instance", function.id));
    if spec.contract == Contract::Stdio {
        return Err(none().with_hint(
            "a function of contract stdio has one only while a call runs; `funtainer run IMAGE` starts a fresh one",
        ));
    }
    if !start {
        return Err(none());
    }
    revision.scale(&shared.ground, spec.scale.min.max(1), Instant::now() + ASKED_DRAIN).await?;
    // What was started is shown a moment after it is ready; nothing is, where a deploy or a scale came in between.
    let shown = tokio::time::timeout(SHOWN_TIME_MAX, revision.shows(|views| oldest(views).is_some())).await;
    let instance = shown.ok().and_then(|()| takes_calls(&revision)).ok_or_else(none)?;
    Ok((revision, instance))
}

fn takes_calls(revision: &Revision) -> Option<InstanceId> {
    oldest(&revision.views())
}

fn oldest(views: &[InstanceView]) -> Option<InstanceId> {
    let ready = |state| matches!(state, InstanceState::Ready | InstanceState::Idle);
    views.iter().find(|view| ready(view.state)).map(|view| view.id)
}

/// Ends the command when dropped before its end.
struct Kept {
    ground: Ground,
    id: ExecId,
    exit: ExitFuture,
    _guest: Option<Guest>,
    _place: Place,
}

impl Drop for Kept {
    fn drop(&mut self) {
        if self.exit.borrow().is_none() {
            let (backend, id) = (Arc::clone(&self.ground.backend), self.id);
            self.ground.runtime.spawn(async move { backend.signal(SignalTarget::Exec(id), kill()).await });
        }
    }
}

fn kill() -> StopSignal {
    "KILL".parse().expect("SIGKILL is a signal")
}

//! Deploy and remove: how a function gets from one revision to the next without a failed call.
//!
//! ```text
//! prepare ─► plan ─► trial: one instance found good ─► stored ─► calls switched ─► old one drained
//! └──────────── given up: nothing changed ───────┘    └───── carried through, whoever waits ──────┘
//! ```
//!
//! The first half belongs to the request: when its future is dropped, the trial ends. The second half runs as a task of its own.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::Duration;

use funtainer_model::{Contract, ErrorCode, Failure, FunctionId, FunctionSpec, RevisionId};
use jiff::Timestamp;
use tokio::sync::OwnedMutexGuard;
use tokio::time::Instant;
use uuid::Uuid;

use crate::backend::{Backend, Progress, ProgressSink, Resolve};
use crate::engine::{Engine, Shared};
use crate::fleet::Mode;
use crate::owner::{LastError, STOP_GRACE};
use crate::revision::{Beginning, Ground, Revision};
use crate::route::{Function, no_error};
use crate::store::RevisionRecord;
use crate::view::FunctionView;

/// How long calls in flight may go on in instances that a user ends: as long as an instance has for its stop signal.
pub(crate) const ASKED_DRAIN: Duration = Duration::from_secs(10);

/// Resolves the image and makes a record of it that is not stored yet.
pub(crate) async fn resolve(
    backend: &Arc<dyn Backend>,
    spec: FunctionSpec,
    how: Resolve,
    progress: &ProgressSink,
) -> Result<RevisionRecord, Failure> {
    for text in backend.warnings(&spec.limits) {
        // Lossy by design, as all progress.
        let _ = progress.try_send(Progress::Warning { text });
    }
    let prepared = backend.prepare(&spec.image, how, progress.clone()).await?;
    let digest = prepared.digest;
    // Reads files of the image.
    let planned = tokio::task::spawn_blocking(move || {
        funtainer_contract::plan(&prepared.config, prepared.files.as_ref(), &spec).map(|plan| (spec, plan))
    });
    let (spec, plan) = planned
        .await
        .map_err(|error| Failure::new(ErrorCode::Internal, format!("the image could not be looked at: {error}")))?
        .map_err(|error| error.failure())?;
    let id = RevisionId::from_uuid(Uuid::now_v7());
    Ok(RevisionRecord { id, digest, spec, plan, created_at: Timestamp::now() })
}

impl Engine {
    /// Makes or replaces a function. For `http` it returns when one instance of the new revision was started and found good, for
    /// `stdio` when the image was checked. The old revision goes on until then, and for good if the deploy fails or this future
    /// is dropped.
    pub async fn deploy(&self, spec: FunctionSpec, progress: ProgressSink) -> Result<FunctionView, Failure> {
        let shared = self.shared();
        let id = spec.id.clone();
        let turn = shared.turn(&id).await;
        let result = deploy_in_turn(shared, turn, spec, &progress).await;
        if let Err(failure) = &result
            && let Some(function) = shared.routes.load().get(&id)
        {
            function.last_error.store(Some(Arc::new(failure.clone())));
        }
        result
    }

    /// Removes a function; calls in flight have 10 s to finish. Returns when its instances are reaped.
    pub async fn remove(&self, id: &FunctionId) -> Result<(), Failure> {
        let shared = Arc::clone(self.shared());
        let (id, turn) = (id.clone(), self.shared().turn(id).await);
        let function = shared.get(&id)?;
        let runtime = shared.ground.runtime.clone();
        // Carried through, whoever waits.
        let removal = runtime.spawn(async move {
            let _turn = turn;
            shared.store.remove(id.clone()).await.map_err(|error| error.failure())?;
            function.removed.store(true, Ordering::SeqCst);
            shared.routes.rcu(|routes| routes.without(&id));
            let drain_until = Instant::now() + ASKED_DRAIN;
            for revision in function.revisions() {
                // A task that panicked has nothing left to wait for.
                let _ = revision.retire(&shared.ground, drain_until, STOP_GRACE).await;
            }
            shared.ground.backend.forget_logs(&id).await;
            Ok(())
        });
        removal.await.unwrap_or_else(|error| Err(Failure::new(ErrorCode::Internal, format!("the removal broke off: {error}"))))
    }
}

async fn deploy_in_turn(
    shared: &Arc<Shared>,
    turn: OwnedMutexGuard<()>,
    spec: FunctionSpec,
    progress: &ProgressSink,
) -> Result<FunctionView, Failure> {
    shared.open_for_work()?;
    let id = spec.id.clone();
    check_name(shared, &id)?;
    let record = resolve(&shared.ground.backend, spec, Resolve::Deploy, progress).await?;
    let existing = shared.routes.load().get(&id).cloned();
    let last_error = existing.as_ref().map_or_else(no_error, |function| Arc::clone(&function.last_error));
    let trial = Trial::begin(&shared.ground, record, Arc::clone(&last_error));
    if trial.revision.record.spec.contract == Contract::Http {
        // Progress is lossy by design.
        let _ = progress.try_send(Progress::Starting);
        trial.revision.scale(&shared.ground, 1, Instant::now()).await?;
    }
    let shared = Arc::clone(shared);
    let runtime = shared.ground.runtime.clone();
    let carried = runtime.spawn(async move {
        // Held to the end, also where nobody waits for it.
        let _turn = turn;
        // A drain that began meanwhile would not see the new revision.
        shared.open_for_work()?;
        shared.store.deploy(trial.revision.record.clone()).await.map_err(|error| error.failure())?;
        last_error.store(None);
        let revision = trial.succeed();
        // Before the switch, so that it can start what the calls need.
        revision.activate();
        let function = if let Some(function) = existing {
            let former = function.switch(revision);
            let drain_until = Instant::now() + former.record.spec.timeouts.call;
            drop(former.retire(&shared.ground, drain_until, STOP_GRACE));
            function
        } else {
            let function = Function::new(revision, last_error);
            shared.routes.rcu(|routes| routes.with(&function));
            function
        };
        Ok(function.view())
    });
    carried.await.unwrap_or_else(|error| Err(Failure::new(ErrorCode::Internal, format!("the deploy broke off: {error}"))))
}

/// Refuses early what the index of the store would refuse at the end.
fn check_name(shared: &Shared, id: &FunctionId) -> Result<(), Failure> {
    let slug = id.slug();
    match shared.routes.load().find(slug.as_str()) {
        Some(other) if other.id != *id => {
            let detail = format!("function '{id}' and function '{}' would both be called at '{slug}'", other.id);
            Err(Failure::new(ErrorCode::NameTaken, detail))
        }
        _ => Ok(()),
    }
}

/// A revision without traffic. Ends when dropped, unless it succeeded.
struct Trial {
    revision: Arc<Revision>,
    ground: Option<Ground>,
}

impl Trial {
    fn begin(ground: &Ground, record: RevisionRecord, last_error: LastError) -> Self {
        let revision = Revision::begin(ground, Beginning { record, mode: Mode::Trial, adopted: Vec::new(), last_error });
        Self { revision, ground: Some(ground.clone()) }
    }

    fn succeed(mut self) -> Arc<Revision> {
        self.ground = None;
        Arc::clone(&self.revision)
    }
}

impl Drop for Trial {
    fn drop(&mut self) {
        if let Some(ground) = self.ground.take() {
            drop(self.revision.retire(&ground, Instant::now(), STOP_GRACE));
        }
    }
}

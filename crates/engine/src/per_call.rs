//! Instances that live for one call: a fresh container each, started by the call itself.
//!
//! The way from the call to the container has no task, no queue and no store between them once the call has its slot. An instance
//! belongs to its [`Running`], which goes with the body of the answer; whoever lets go of it early ends the container behind himself.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use funtainer_contract::{ExitFuture, StartPhases, stdio};
use funtainer_model::{ErrorCode, Failure, InstanceId};
use futures_util::future::join_all;
use tokio::sync::{mpsc, watch};
use uuid::Uuid;

use crate::backend::{Access, Backend, RevisionStart, Start, Started};
use crate::instance::InstanceState;
use crate::revision::Ground;
use crate::throttle::Permit;
use crate::view::InstanceView;

/// How long a command has between its stop signal and SIGKILL once nobody waits for it.
const ABANDONED_GRACE: Duration = Duration::from_secs(1);

/// The instances of a revision that there are now.
#[derive(Default)]
pub(crate) struct Live {
    by_id: watch::Sender<BTreeMap<InstanceId, InstanceView>>,
    gone: std::sync::atomic::AtomicBool,
}

/// A started command.
pub(crate) struct Command {
    pub(crate) access: Access,
    pub(crate) phases: StartPhases,
    pub(crate) exit: ExitFuture,
    pub(crate) running: Running,
}

/// Keeps the instance and its slot. Dropped after the end, it gives the slot back at once; before, it ends the instance first.
pub(crate) struct Running(Option<Held>);

struct Held {
    ground: Ground,
    live: Arc<Live>,
    instance: InstanceId,
    /// `None` until it is started.
    exit: Option<ExitFuture>,
    _permit: Option<Permit>,
}

/// Starts one command. Dropping the future ends the start.
pub(crate) async fn start(
    ground: &Ground,
    revision: &Arc<RevisionStart>,
    live: &Arc<Live>,
    permit: Option<Permit>,
    stderr: Option<mpsc::Sender<Bytes>>,
) -> Result<Command, Failure> {
    let instance = InstanceId::from_uuid(Uuid::now_v7());
    live.show(InstanceView::starting(instance));
    let held = Held { ground: ground.clone(), live: Arc::clone(live), instance, exit: None, _permit: permit };
    let mut running = Running(Some(held));
    let start = Start { instance, revision: Arc::clone(revision), stderr };
    let Started { pid, phases, access, exit } = match ground.backend.start(start).await {
        Ok(started) => started,
        Err(failure) => {
            running.nothing_left();
            return Err(failure);
        }
    };
    if let Some(held) = &mut running.0 {
        held.exit = Some(exit.clone());
    }
    live.show(InstanceView { id: instance, state: InstanceState::Ready, pid: Some(pid) });
    Ok(Command { access, phases, exit, running })
}

/// The streams of a command whose caller has none of its own.
pub(crate) fn streams(access: Access) -> Result<stdio::Streams, Failure> {
    match access {
        Access::Streams { stdin, stdout } => Ok(stdio::Streams { stdin, stdout }),
        Access::Network(_) | Access::Terminal(_) => Err(without_streams()),
    }
}

/// The failure of a backend that gave other streams than the plan says.
pub(crate) fn without_streams() -> Failure {
    Failure::new(ErrorCode::Internal, "the container was started without the streams that its contract needs")
}

impl Live {
    /// Oldest first.
    pub(crate) fn views(&self) -> Vec<InstanceView> {
        self.by_id.borrow().values().cloned().collect()
    }

    /// Waits until there is none.
    pub(crate) async fn empty(&self) {
        // Its sender is `self`.
        let _ = self.by_id.subscribe().wait_for(BTreeMap::is_empty).await;
    }

    /// Ends the youngest until `kept` are left, and waits until they are reaped.
    pub(crate) async fn end_all_but(&self, backend: &Arc<dyn Backend>, kept: usize, grace: Duration) {
        let surplus: Vec<InstanceId> = self.by_id.borrow().keys().skip(kept).copied().collect();
        self.by_id.send_modify(|by_id| {
            for id in &surplus {
                by_id.entry(*id).and_modify(|view| view.state = InstanceState::Draining);
            }
        });
        join_all(surplus.into_iter().map(|id| backend.stop(id, grace))).await;
    }

    /// Notes that nothing will be started again; `true` the first time.
    pub(crate) fn mark_gone(&self) -> bool {
        !self.gone.swap(true, std::sync::atomic::Ordering::AcqRel)
    }

    pub(crate) fn is_gone(&self) -> bool {
        self.gone.load(std::sync::atomic::Ordering::Acquire)
    }

    fn show(&self, view: InstanceView) {
        self.by_id.send_modify(|by_id| {
            by_id.insert(view.id, view);
        });
    }

    fn forget(&self, instance: InstanceId) {
        self.by_id.send_modify(|by_id| {
            by_id.remove(&instance);
        });
    }
}

impl Running {
    /// Which.
    pub(crate) fn instance(&self) -> InstanceId {
        self.0.as_ref().expect("it is taken by the drop, or where there was no start").instance
    }

    /// Its start failed.
    fn nothing_left(&mut self) {
        if let Some(held) = self.0.take() {
            held.live.forget(held.instance);
        }
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        let Some(held) = self.0.take() else { return };
        if held.exit.as_ref().is_some_and(|exit| exit.borrow().is_some()) {
            held.live.forget(held.instance);
            return;
        }
        held.live.show(InstanceView { state: InstanceState::Draining, ..held.live.view(held.instance) });
        let runtime = held.ground.runtime.clone();
        runtime.spawn(async move {
            held.ground.backend.stop(held.instance, ABANDONED_GRACE).await;
            held.live.forget(held.instance);
        });
    }
}

impl Live {
    fn view(&self, instance: InstanceId) -> InstanceView {
        self.by_id.borrow().get(&instance).cloned().unwrap_or_else(|| InstanceView::starting(instance))
    }
}

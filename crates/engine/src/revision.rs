//! One revision at work: its throttle, and who owns its instances.
//!
//! With contract `http` instances last, and a task owns them (`owner`). With `stdio` each call brings its own (`per_call`), and the
//! revision only knows which there are.

use std::sync::Arc;
use std::time::Duration;

use funtainer_contract::{Readiness, StartPlan};
use funtainer_model::{Contract, Failure, InstanceId};
use tokio::runtime::Handle;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::JoinHandle;
use tokio::time::Instant;

use crate::backend::{Backend, RevisionStart};
use crate::fleet::{Key, Mode, Policy};
use crate::instance::InstanceState;
use crate::owner::{self, Adopted, Command, LastError, OwnerParts, STOP_GRACE};
use crate::per_call::Live;
use crate::store::RevisionRecord;
use crate::throttle::{Slot, SlotParts, Throttle};
use crate::view::InstanceView;

/// A revision that can take calls.
pub(crate) struct Revision {
    /// What is stored of it.
    pub(crate) record: RevisionRecord,
    /// What its instances have in common.
    pub(crate) start: Arc<RevisionStart>,
    /// Slots and queue.
    pub(crate) throttle: Arc<Throttle>,
    /// Who has its instances.
    pub(crate) instances: Instances,
}

/// Who has the instances of a revision.
pub(crate) enum Instances {
    /// A task; its views end with it.
    Owned { commands: mpsc::UnboundedSender<Command>, views: watch::Receiver<Vec<InstanceView>> },
    /// The calls.
    PerCall(Arc<Live>),
}

/// What all revisions share.
#[derive(Clone)]
pub(crate) struct Ground {
    pub(crate) backend: Arc<dyn Backend>,
    /// Where background work runs.
    pub(crate) runtime: Handle,
}

/// What a revision begins with.
pub(crate) struct Beginning {
    pub(crate) record: RevisionRecord,
    pub(crate) mode: Mode,
    pub(crate) adopted: Vec<Adopted>,
    pub(crate) last_error: LastError,
}

impl Revision {
    pub(crate) fn begin(ground: &Ground, beginning: Beginning) -> Arc<Self> {
        let Beginning { record, mode, adopted, last_error } = beginning;
        let spec = &record.spec;
        let throttle = Throttle::new(spec.scale.queue);
        let start = Arc::new(RevisionStart {
            revision: record.id,
            function: spec.id.clone(),
            slug: spec.id.slug(),
            digest: record.digest,
            plan: record.plan.clone(),
            limits: spec.limits,
            start_timeout: spec.timeouts.start,
        });
        let instances = match spec.contract {
            Contract::Http => {
                let (commands, received) = mpsc::unbounded_channel();
                let (shown, views) = watch::channel(Vec::new());
                let parts = OwnerParts {
                    backend: Arc::clone(&ground.backend),
                    throttle: Arc::clone(&throttle),
                    revision: Arc::clone(&start),
                    policy: policy(&record),
                    mode,
                    adopted,
                    last_error,
                    commands: received,
                    views: shown,
                };
                ground.runtime.spawn(owner::run(parts));
                Instances::Owned { commands, views }
            }
            Contract::Stdio => {
                // One slot for each instance that there may be at once: a call brings its own instance, the slot counts.
                let parts = SlotParts {
                    key: Key(0),
                    instance: InstanceId::from_bytes([0; 16]),
                    client: None,
                    exit: None,
                    phases: None,
                    capacity: spec.scale.max,
                };
                throttle.open(&Slot::new(parts, &throttle));
                Instances::PerCall(Arc::default())
            }
        };
        Arc::new(Self { record, start, throttle, instances })
    }

    /// Its instances, oldest first.
    pub(crate) fn views(&self) -> Vec<InstanceView> {
        match &self.instances {
            Instances::Owned { views, .. } => views.borrow().clone(),
            Instances::PerCall(live) => live.views(),
        }
    }

    /// Waits until its lasting instances are as wanted, or nobody has any.
    pub(crate) async fn shows(&self, wanted: impl Fn(&[InstanceView]) -> bool) {
        if let Instances::Owned { views, .. } = &self.instances {
            // An error says that the task has ended.
            let _ = views.clone().wait_for(|views| wanted(views)).await;
        }
    }

    /// Whether its task has ended, or, without one, whether it was retired and nothing is left.
    pub(crate) fn is_gone(&self) -> bool {
        match &self.instances {
            Instances::Owned { commands, .. } => commands.is_closed(),
            Instances::PerCall(live) => live.is_gone(),
        }
    }

    /// Takes the calls of its function from now on, and keeps `min` instances.
    pub(crate) fn activate(&self) {
        if let Instances::Owned { commands, .. } = &self.instances {
            // A task that has ended was retired.
            let _ = commands.send(Command::Activate);
        }
    }

    /// An instance refused a connection: no call goes there any more, and its owner decides on.
    pub(crate) fn unreachable(&self, slot: &Slot) {
        self.throttle.close(slot);
        if let Instances::Owned { commands, .. } = &self.instances {
            let _ = commands.send(Command::Unreachable(slot.key));
        }
    }

    /// Has so many instances, once. Returns when all that were started are ready and all that were ended are reaped.
    pub(crate) async fn scale(&self, ground: &Ground, instances: u32, drain_until: Instant) -> Result<(), Failure> {
        match &self.instances {
            Instances::Owned { commands, .. } => {
                let (reply, answer) = oneshot::channel();
                let _ = commands.send(Command::Scale { instances, drain_until, reply });
                // A task that ends, because of a deploy or a removal meanwhile, has ended its instances.
                answer.await.unwrap_or(Ok(()))
            }
            Instances::PerCall(live) => {
                live.end_all_but(&ground.backend, instances as usize, STOP_GRACE).await;
                Ok(())
            }
        }
    }

    /// Returns when no call waits or is in flight, and no command runs.
    pub(crate) async fn settled(&self) {
        self.throttle.settled().await;
        if let Instances::PerCall(live) = &self.instances {
            live.empty().await;
        }
    }

    /// Takes no more calls: those in flight have until `drain_until`, then instances get their stop signal and `grace`.
    /// Returns at once; the task that it returns ends when the last instance is reaped.
    pub(crate) fn retire(self: &Arc<Self>, ground: &Ground, drain_until: Instant, grace: Duration) -> JoinHandle<()> {
        self.throttle.retire();
        let (this, backend) = (Arc::clone(self), Arc::clone(&ground.backend));
        ground.runtime.spawn(async move {
            match &this.instances {
                Instances::Owned { commands, .. } => {
                    let _ = commands.send(Command::Retire { drain_until, grace });
                    commands.closed().await;
                }
                Instances::PerCall(live) => {
                    let _ = tokio::time::timeout_at(drain_until, live.empty()).await;
                    live.end_all_but(&backend, 0, grace).await;
                    live.empty().await;
                    if live.mark_gone() {
                        backend.retire(this.record.id).await;
                    }
                }
            }
        })
    }
}

impl InstanceView {
    /// What views show before anything exists.
    pub(crate) fn starting(id: InstanceId) -> Self {
        Self { id, state: InstanceState::Starting, pid: None }
    }
}

/// The port that a plan's server was told.
pub(crate) fn port_of(plan: &StartPlan) -> Option<std::num::NonZeroU16> {
    match plan.readiness {
        Readiness::Listening { preferred } => Some(preferred),
        Readiness::Executed => None,
    }
}

fn policy(record: &RevisionRecord) -> Policy {
    let scale = &record.spec.scale;
    Policy {
        min: scale.min,
        max: scale.max,
        concurrency: record.plan.concurrency.get(),
        idle_timeout: scale.idle_timeout,
        drain_limit: record.spec.timeouts.call,
    }
}

//! Revisions whose zygotes exist, or did.

use std::collections::HashMap;
use std::sync::atomic::{AtomicBool, AtomicU16, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use funtainer_contract::terminal::TerminalSize;
use funtainer_contract::{StandardStreams, StartPlan};
use funtainer_engine::backend::RevisionStart;
use funtainer_model::{LayerId, Limits, RevisionId, Slug};
use funtainer_sandbox::protocol::{FileSpec, Request, RevisionSpec, SocketCounts, Streams, WindowSize};

use crate::backend::Shared;
use crate::sockets;
use crate::start::StartError;

/// All of them.
#[derive(Default)]
pub(crate) struct Revisions {
    records: Mutex<HashMap<RevisionId, Arc<Revision>>>,
}

/// One.
#[derive(Default)]
pub(crate) struct Revision {
    /// Whether its zygote exists as far as is known. Read by every start.
    open: AtomicBool,
    /// Held by who opens it; its layers once they were looked up.
    opening: tokio::sync::Mutex<Option<Vec<LayerId>>>,
    /// Where an instance was found listening although it was told another port; 0 for none.
    pub(crate) port: AtomicU16,
}

impl Revisions {
    /// The record of a revision, a new one if there is none.
    pub(crate) fn of(&self, revision: RevisionId) -> Arc<Revision> {
        Arc::clone(self.lock().entry(revision).or_default())
    }

    /// Its zygote is gone.
    pub(crate) fn ended(&self, revision: RevisionId) {
        if let Some(record) = self.lock().get(&revision) {
            record.closed();
        }
    }

    /// It will not be started again.
    pub(crate) fn forget(&self, revision: RevisionId) {
        let record = self.lock().remove(&revision);
        drop(record);
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<RevisionId, Arc<Revision>>> {
        self.records.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Revision {
    /// Makes sure that the zygote exists; starts at once wait for one.
    pub(crate) async fn open(&self, shared: &Shared, start: &RevisionStart) -> Result<(), StartError> {
        if self.open.load(Ordering::Acquire) {
            return Ok(());
        }
        let mut layers = self.opening.lock().await;
        if self.open.load(Ordering::Acquire) {
            return Ok(());
        }
        let layers = match &*layers {
            Some(layers) => layers.clone(),
            None => layers.insert(shared.images.layers(start.digest).await?).clone(),
        };
        let request = Request::OpenRevision {
            revision: start.revision,
            function: start.function.to_string(),
            title: start.slug.to_string(),
            spec: Box::new(spec(&start.plan, start.limits, layers, &start.slug)),
        };
        shared.link.command(&request, Vec::new()).await?;
        self.open.store(true, Ordering::Release);
        Ok(())
    }

    /// The zygote is gone.
    pub(crate) fn closed(&self) {
        self.open.store(false, Ordering::Release);
    }
}

/// The plan in the keeper's words.
fn spec(plan: &StartPlan, limits: Limits, layers: Vec<LayerId>, slug: &Slug) -> RevisionSpec {
    let (streams, sockets) = match plan.streams {
        StandardStreams::Log => (Streams::Log, sockets::AT_START),
        StandardStreams::Call => (Streams::Call, SocketCounts { v4: 0, v6: 0 }),
        StandardStreams::Terminal(TerminalSize { rows, columns }) => {
            (Streams::Terminal(WindowSize { rows, columns }), SocketCounts { v4: 0, v6: 0 })
        }
    };
    let file = |file: &funtainer_contract::PlannedFile| FileSpec {
        path: file.path.clone().into_bytes(),
        mode: file.mode,
        content: file.content.clone(),
    };
    RevisionSpec {
        layers,
        argv: plan.argv.iter().map(|arg| arg.clone().into_bytes()).collect(),
        env: plan.env.iter().map(|var| var.to_string().into_bytes()).collect(),
        working_dir: plan.working_dir.clone().into_bytes(),
        uid: plan.user.uid,
        gid: plan.user.gid,
        groups: plan.user.groups.clone(),
        limits,
        isolation: plan.isolation.clone(),
        volumes: plan.volumes.iter().map(|path| path.clone().into_bytes()).collect(),
        streams,
        files: plan.files.iter().map(file).collect(),
        listeners: plan.listeners.iter().map(|listener| listener.port.get()).collect(),
        sockets,
        stop_signal: plan.stop_signal,
        hostname: slug.to_string(),
    }
}

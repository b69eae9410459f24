//! The engine's doors, but for calls (`invoke`), commands (`run`, `exec`), deploys and removals (`rollout`).

use std::collections::{BTreeMap, HashMap};
use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use funtainer_model::{Contract, ErrorCode, Failure, FunctionId, ImageRef, RevisionId};
use futures_util::future::join_all;
use tokio::runtime::Handle;
use tokio::sync::{Mutex as AsyncMutex, OwnedMutexGuard, mpsc};
use tokio::time::Instant;

use crate::backend::{Backend, ImageSummary, Left, ProgressSink, Resolve};
use crate::fleet::Mode;
use crate::owner::{Adopted, STOP_GRACE};
use crate::revision::{Beginning, Ground, Revision};
use crate::rollout::ASKED_DRAIN;
use crate::route::{Function, RouteTable, Routes, no_error};
use crate::store::{RevisionRecord, Store};
use crate::view::{FunctionView, PulledImage};

/// What a drain keeps back of its time for the kernel to end and reap what does not end by itself.
const KILL_RESERVE: Duration = Duration::from_millis(500);
/// Calls in flight get at most this share of a drain, stop signals the rest.
const DRAIN_SHARE_OF_CALLS: f32 = 0.8;

/// What an engine is opened with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Directory of the state store; it exists and belongs to this process's user.
    pub state_dir: PathBuf,
}

/// Functions and their instances. One per process.
pub struct Engine {
    shared: Arc<Shared>,
}

/// What the tasks of the engine share.
pub(crate) struct Shared {
    pub(crate) ground: Ground,
    pub(crate) store: Store,
    pub(crate) routes: RouteTable,
    /// Set by a drain: no new calls, deploys or runs.
    closing: AtomicBool,
    /// Revisions of `run`.
    pub(crate) runs: Mutex<BTreeMap<RevisionId, Arc<Revision>>>,
    /// Commands of `run` that there are.
    pub(crate) running: Arc<AtomicUsize>,
    /// Commands in instances that there are.
    pub(crate) executing: Arc<AtomicUsize>,
    /// One deploy or removal of a function at a time.
    turns: Mutex<HashMap<FunctionId, Arc<AsyncMutex<()>>>>,
}

impl Engine {
    /// Opens the state, adopts or ends the instances that a former process left, and is then ready for calls.
    /// Its background work runs on the runtime that polls this.
    pub async fn open(settings: Settings, backend: Arc<dyn Backend>) -> Result<Arc<Self>, Failure> {
        let opened = tokio::task::spawn_blocking(move || Store::open(&settings.state_dir)).await;
        let (store, records) = opened
            .map_err(|error| Failure::new(ErrorCode::Internal, format!("opening the state broke off: {error}")))?
            .map_err(|error| error.failure())?;
        let ground = Ground { backend, runtime: Handle::current() };
        let mut left = ground.backend.list().await?;
        // They come in any order; the youngest is ended first, the oldest is shown first.
        left.sort_unstable_by_key(|left| left.instance);
        let routes = adopt(&ground, records, left);
        Ok(Arc::new(Self {
            shared: Arc::new(Shared {
                ground,
                store,
                routes: RouteTable::from_pointee(routes),
                closing: AtomicBool::new(false),
                runs: Mutex::default(),
                running: Arc::default(),
                executing: Arc::default(),
                turns: Mutex::default(),
            }),
        }))
    }

    pub(crate) fn shared(&self) -> &Arc<Shared> {
        &self.shared
    }

    /// All functions by namespace and name.
    pub fn list(&self) -> Vec<FunctionView> {
        self.shared.routes.load().all().map(|function| function.view()).collect()
    }

    /// One function.
    pub fn describe(&self, id: &FunctionId) -> Result<FunctionView, Failure> {
        Ok(self.shared.get(id)?.view())
    }

    /// The function that `name` means to people: a slug, or a canonical name in the namespace `default`.
    pub fn find(&self, name: &str) -> Result<FunctionId, Failure> {
        let routes = self.shared.routes.load();
        let function = routes.find(name);
        function.map(|function| function.id.clone()).ok_or_else(|| unknown(name))
    }

    /// Starts or ends instances until `instances` are there. Returns when all that were started are ready and all that were ended
    /// are reaped; calls in flight have 10 s to finish before the stop signal. No setting: calls start more, idleness ends them.
    /// 0 is always allowed, other numbers from `min` to `max`.
    pub async fn scale(&self, id: &FunctionId, instances: u32) -> Result<FunctionView, Failure> {
        self.shared.open_for_work()?;
        let function = self.shared.get(id)?;
        let revision = function.current.load_full();
        let scale = &revision.record.spec.scale;
        if instances != 0 && revision.record.spec.contract == Contract::Stdio {
            let detail = format!("function '{id}' starts a fresh instance for each call: it can be scaled to 0 only");
            return Err(Failure::new(ErrorCode::ScaleOutOfRange, detail).with_hint("scale it to 0 to end the calls in flight"));
        }
        if instances != 0 && !(scale.min..=scale.max).contains(&instances) {
            let or_none = if scale.min == 0 { "" } else { ", or none" };
            let detail = format!("function '{id}' can have {} to {} instances{or_none}: not {instances}", scale.min, scale.max);
            return Err(Failure::new(ErrorCode::ScaleOutOfRange, detail));
        }
        revision.scale(&self.shared.ground, instances, Instant::now() + ASKED_DRAIN).await?;
        Ok(function.view())
    }

    /// The last `lines` lines of a function's log, then, with `follow`, what comes until the receiver is dropped.
    pub async fn logs(&self, id: &FunctionId, lines: usize, follow: bool) -> Result<mpsc::Receiver<Bytes>, Failure> {
        self.shared.get(id)?;
        self.shared.ground.backend.logs(id, lines, follow).await
    }

    /// Fetches an image by asking its registry, which replaces an imported one of the name.
    pub async fn pull(&self, image: &ImageRef, progress: ProgressSink) -> Result<PulledImage, Failure> {
        self.shared.open_for_work()?;
        let prepared = self.shared.ground.backend.prepare(image, Resolve::Pull, progress).await?;
        Ok(PulledImage { reference: image.clone(), digest: prepared.digest })
    }

    /// Takes an OCI archive into the store. `name` replaces the archive's names.
    pub async fn import(
        &self,
        archive: mpsc::Receiver<std::io::Result<Bytes>>,
        name: Option<&ImageRef>,
        progress: ProgressSink,
    ) -> Result<Vec<ImageSummary>, Failure> {
        self.shared.open_for_work()?;
        self.shared.ground.backend.import(archive, name, progress).await
    }

    /// Images in the store.
    pub async fn images(&self) -> Result<Vec<ImageSummary>, Failure> {
        self.shared.ground.backend.images().await
    }

    /// Refuses new calls, deploys and commands, lets those in flight finish, and ends every instance; all within `limit`.
    pub async fn drain(&self, limit: Duration) {
        let shared = &self.shared;
        shared.closing.store(true, Ordering::SeqCst);
        let now = Instant::now();
        let revisions = shared.revisions();
        let settled = join_all(revisions.iter().map(|revision| revision.settled()));
        if tokio::time::timeout_at(now + limit.mul_f32(DRAIN_SHARE_OF_CALLS), settled).await.is_err() {
            tracing::warn!("calls did not finish within the time to drain; they are broken off");
        }
        let end = now + limit;
        let grace = end.saturating_duration_since(Instant::now()).saturating_sub(KILL_RESERVE);
        // Once more: a deploy may have been under way.
        let gone = shared
            .revisions()
            .iter()
            .map(|revision| revision.retire(&shared.ground, Instant::now(), grace))
            .collect::<Vec<_>>();
        if tokio::time::timeout_at(end.max(Instant::now() + KILL_RESERVE), join_all(gone)).await.is_err() {
            tracing::warn!("instances did not end within the time to drain; they end with the keeper");
        }
    }

    /// Ends what is left at once. All state is on disk already. A drain comes first where there is time for it.
    pub async fn shutdown(&self) {
        self.drain(Duration::ZERO).await;
    }
}

impl Shared {
    pub(crate) fn get(&self, id: &FunctionId) -> Result<Arc<Function>, Failure> {
        self.routes.load().get(id).cloned().ok_or_else(|| unknown(&id.name))
    }

    pub(crate) fn is_closing(&self) -> bool {
        self.closing.load(Ordering::Relaxed)
    }

    pub(crate) fn open_for_work(&self) -> Result<(), Failure> {
        if self.is_closing() { Err(Failure::new(ErrorCode::ShuttingDown, "the server is stopping")) } else { Ok(()) }
    }

    /// Waits until no other deploy or removal of the function is under way.
    pub(crate) async fn turn(&self, id: &FunctionId) -> OwnedMutexGuard<()> {
        let turn = {
            let mut turns = self.turns.lock().unwrap_or_else(PoisonError::into_inner);
            // Those that nobody holds or waits for.
            turns.retain(|_, turn| Arc::strong_count(turn) > 1);
            Arc::clone(turns.entry(id.clone()).or_default())
        };
        turn.lock_owned().await
    }

    fn revisions(&self) -> Vec<Arc<Revision>> {
        let mut all: Vec<_> = self.routes.load().all().flat_map(|function| function.revisions()).collect();
        all.extend(self.runs.lock().unwrap_or_else(PoisonError::into_inner).values().cloned());
        all
    }
}

fn unknown(name: impl std::fmt::Display) -> Failure {
    Failure::new(ErrorCode::FunctionUnknown, format!("there is no function '{name}'"))
}

/// Begins the stored revisions with the instances that can be gone on with, and ends the others behind.
fn adopt(ground: &Ground, records: Vec<RevisionRecord>, left: Vec<Left>) -> Routes {
    let lasting: HashMap<RevisionId, bool> =
        records.iter().map(|record| (record.id, record.spec.contract == Contract::Http)).collect();
    let mut adopted: HashMap<RevisionId, Vec<Adopted>> = HashMap::new();
    let mut stray: Vec<Left> = Vec::new();
    for mut left in left {
        let lasts = lasting.get(&left.revision).copied().unwrap_or(false) && left.exit.borrow().is_none();
        match left.access.take() {
            Some(connect) if lasts => {
                let Left { instance, revision, pid, exit, .. } = left;
                adopted.entry(revision).or_default().push(Adopted { instance, pid, connect, exit });
            }
            _ => stray.push(left),
        }
    }
    end_strays(ground, stray, &lasting);
    let mut functions = BTreeMap::new();
    for record in records {
        let last_error = no_error();
        let adopted = adopted.remove(&record.id).unwrap_or_default();
        let beginning = Beginning { record, mode: Mode::Active, adopted, last_error: Arc::clone(&last_error) };
        let function = Function::new(Revision::begin(ground, beginning), last_error);
        functions.insert(function.id.clone(), function);
    }
    Routes::of(functions)
}

/// Ends instances that cannot be gone on with, and then the revisions that nobody knows.
fn end_strays(ground: &Ground, stray: Vec<Left>, known: &HashMap<RevisionId, bool>) {
    if stray.is_empty() {
        return;
    }
    let mut unknown: Vec<RevisionId> =
        stray.iter().map(|left| left.revision).filter(|revision| !known.contains_key(revision)).collect();
    unknown.sort();
    unknown.dedup();
    tracing::info!(instances = stray.len(), "ending instances that a former process left");
    let backend = Arc::clone(&ground.backend);
    ground.runtime.spawn(async move {
        join_all(stray.iter().map(|left| backend.stop(left.instance, STOP_GRACE))).await;
        join_all(unknown.into_iter().map(|revision| backend.retire(revision))).await;
    });
}

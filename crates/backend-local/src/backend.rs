//! [`LocalBackend`]: the engine's doors, and what the keeper's events do.

use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::{Arc, OnceLock, Weak};
use std::time::{Duration, Instant};

use bytes::Bytes;
use funtainer_contract::{BoxFuture, Connect, StandardStreams};
use funtainer_engine::backend::{
    Backend, Exec, ExecStarted, ImageSummary, Left, Prepared, ProgressSink, Resolve, SignalTarget, Start, Started,
};
use funtainer_image::StoreError;
use funtainer_model::{ErrorCode, Failure, FunctionId, ImageRef, InstanceId, Limits, RevisionId, StopSignal};
use funtainer_sandbox::fds::Fds;
use funtainer_sandbox::protocol::{ExitRecord, Reply, Request};
use futures_util::future::join_all;
use tokio::runtime::Handle;
use tokio::sync::{mpsc, watch};

use crate::descriptor::Descriptor;
use crate::exec::Execs;
use crate::images::Images;
use crate::instance::{Begun, Instances};
use crate::link::{Answer, Event, Link, LinkError};
use crate::logs::{Logs, Stream};
use crate::machine;
use crate::readiness::{self, Wanted};
use crate::revision::Revisions;
use crate::sockets::{Connector, Sockets};

/// How long an instance of a former daemon may take to accept a connection. It was ready, unless it was just being started.
const ADOPT_TIME_MAX: Duration = Duration::from_millis(500);
/// How long the handshake with the keeper may take.
const HELLO_TIME_MAX: Duration = Duration::from_secs(10);

/// Containers on this machine, by the keeper at the other end of a socket. To be opened and used on a multi-threaded runtime; calls
/// may come from other runtimes.
pub struct LocalBackend {
    shared: Arc<Shared>,
    data_id: String,
}

/// Why a backend does not open.
#[derive(Debug, thiserror::Error)]
pub enum OpenError {
    /// The keeper does not answer as it should.
    #[error("the keeper does not answer")]
    Keeper(#[from] LinkError),
    /// The keeper does not answer in time.
    #[error("the keeper does not answer within 10 s")]
    Silent,
    /// The image store.
    #[error("the image store cannot be opened")]
    Store(#[from] StoreError),
    /// The directory of the logs.
    #[error("the directory for logs cannot be used")]
    Logs(#[source] io::Error),
}

/// Why the daemon is to end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Stop {
    /// The keeper was asked to stop; drain within this time.
    Asked(Duration),
    /// The keeper is gone, and every instance with it.
    KeeperGone,
}

/// What the doors, the starts and the events have in common.
pub(crate) struct Shared {
    pub(crate) link: Arc<Link>,
    pub(crate) images: Images,
    pub(crate) logs: Logs,
    pub(crate) instances: Instances,
    pub(crate) execs: Execs,
    pub(crate) revisions: Revisions,
    /// Where what is done behind a call runs.
    pub(crate) runtime: Handle,
    stop: watch::Sender<Option<Stop>>,
}

impl LocalBackend {
    /// Takes over the socket to the keeper and uses `data` (`store`, `logs` below it). Says `Hello` and waits for the answer.
    pub async fn open(control: OwnedFd, data: &Path) -> Result<Self, OpenError> {
        let place: Arc<OnceLock<Weak<Shared>>> = Arc::default();
        let events = Arc::clone(&place);
        // Events come after the greeting only: the place is filled by then.
        let link = Arc::new(Link::open(control, move |event| {
            if let Some(shared) = events.get().and_then(Weak::upgrade) {
                shared.event(event);
            }
        })?);
        let store = data.join("store");
        let images = {
            let link = Arc::clone(&link);
            tokio::task::spawn_blocking(move || Images::open(&store, &link)).await.map_err(StoreError::Thread)??
        };
        let shared = Arc::new(Shared {
            images,
            logs: Logs::open(data.join("logs")).map_err(OpenError::Logs)?,
            instances: Instances::default(),
            execs: Execs::default(),
            revisions: Revisions::default(),
            runtime: Handle::current(),
            stop: watch::channel(None).0,
            link,
        });
        place.set(Arc::downgrade(&shared)).expect("it is filled once");
        shared.watch_the_keeper();
        let hello = tokio::time::timeout(HELLO_TIME_MAX, shared.link.request(&Request::Hello, Vec::new()));
        match hello.await.map_err(|_| OpenError::Silent)??.reply {
            Reply::Welcome { data_id } => Ok(Self { shared, data_id }),
            _ => Err(LinkError::Unexpected.into()),
        }
    }

    /// Identity of the data directory, 16 hex digits.
    pub fn data_id(&self) -> &str {
        &self.data_id
    }

    /// Tells the keeper that calls are accepted.
    pub async fn ready(&self) -> Result<(), LinkError> {
        self.shared.link.command(&Request::Ready, Vec::new()).await
    }

    /// Waits until the daemon is to end.
    pub async fn stopped(&self) -> Stop {
        let mut stop = self.shared.stop.subscribe();
        let stop = stop.wait_for(Option::is_some).await;
        stop.ok().and_then(|stop| *stop).unwrap_or(Stop::KeeperGone)
    }
}

impl Backend for LocalBackend {
    fn prepare<'a>(
        &'a self,
        image: &'a ImageRef,
        how: Resolve,
        progress: ProgressSink,
    ) -> BoxFuture<'a, Result<Prepared, Failure>> {
        Box::pin(async move { self.shared.images.prepare(image, how, &progress).await })
    }

    fn warnings(&self, limits: &Limits) -> Vec<String> {
        machine::warnings(limits)
    }

    fn start(&self, start: Start) -> BoxFuture<'_, Result<Started, Failure>> {
        Box::pin(async move {
            let instance = start.instance;
            self.shared.start(start).await.map_err(|error| {
                tracing::debug!(%instance, error = &error as &dyn std::error::Error, "an instance did not become ready");
                error.failure()
            })
        })
    }

    fn stop(&self, instance: InstanceId, grace: Duration) -> BoxFuture<'_, ()> {
        Box::pin(self.shared.end(instance, grace))
    }

    fn exec(&self, exec: Exec) -> BoxFuture<'_, Result<ExecStarted, Failure>> {
        Box::pin(self.shared.exec(exec))
    }

    fn signal(&self, target: SignalTarget, signal: StopSignal) -> BoxFuture<'_, ()> {
        Box::pin(self.shared.signal_target(target, signal))
    }

    fn retire(&self, revision: RevisionId) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.shared.revisions.forget(revision);
            if let Err(error) = self.shared.link.command(&Request::EndRevision { revision }, Vec::new()).await {
                // It ends by itself after its time without instances.
                tracing::warn!(%revision, %error, "a zygote could not be ended");
            }
        })
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Left>, Failure>> {
        Box::pin(self.shared.adopt())
    }

    fn logs(&self, function: &FunctionId, lines: usize, follow: bool) -> BoxFuture<'_, Result<mpsc::Receiver<Bytes>, Failure>> {
        let slug = function.slug();
        Box::pin(async move {
            let read = self.shared.logs.read(&slug, lines, follow).await;
            read.map_err(|error| Failure::new(ErrorCode::Internal, format!("the log of {slug} cannot be read: {error}")))
        })
    }

    fn forget_logs(&self, function: &FunctionId) -> BoxFuture<'_, ()> {
        let slug = function.slug();
        Box::pin(async move { self.shared.logs.forget(&slug).await })
    }

    fn images(&self) -> BoxFuture<'_, Result<Vec<ImageSummary>, Failure>> {
        Box::pin(self.shared.images.list())
    }

    fn import<'a>(
        &'a self,
        archive: mpsc::Receiver<io::Result<Bytes>>,
        name: Option<&'a ImageRef>,
        progress: ProgressSink,
    ) -> BoxFuture<'a, Result<Vec<ImageSummary>, Failure>> {
        Box::pin(async move { self.shared.images.import(archive, name, &progress).await })
    }
}

impl Shared {
    fn watch_the_keeper(self: &Arc<Self>) {
        let (shared, mut gone) = (Arc::downgrade(self), self.link.gone());
        self.runtime.spawn(async move {
            // An error says that the link was dropped: nobody is left to be told.
            if gone.wait_for(|gone| *gone).await.is_ok()
                && let Some(shared) = shared.upgrade()
            {
                shared.instances.all_lost();
                shared.execs.all_lost();
                shared.stop.send_replace(Some(Stop::KeeperGone));
            }
        });
    }

    /// Called by the task that reads the link.
    fn event(self: &Arc<Self>, event: Event) {
        match event {
            Event::Exited(instance, record) => self.exited(instance, record),
            Event::ExecEnded(exec, status) => self.execs.ended(exec, status),
            Event::RevisionEnded(revision) => self.revisions.ended(revision),
            Event::Stop(grace_ms) => {
                self.stop.send_replace(Some(Stop::Asked(Duration::from_millis(grace_ms.into()))));
            }
            Event::Orphaned(instance) => {
                let shared = Arc::clone(self);
                self.runtime.spawn(async move { shared.kill(instance).await });
            }
        }
    }

    fn exited(self: &Arc<Self>, instance: InstanceId, record: ExitRecord) {
        let ending = self.instances.exited(instance, record);
        let shared = Arc::clone(self);
        self.runtime.spawn(async move {
            match ending {
                Some(ending) => shared.instances.finish(instance, ending).await,
                // Of a former daemon, and not listed yet: it is listed with its end.
                None if shared.instances.is_waiting(instance) => return,
                None => {}
            }
            shared.acknowledge(instance).await;
        });
    }

    async fn acknowledge(&self, instance: InstanceId) {
        if let Err(error) = self.link.command(&Request::AcknowledgeExit { instance }, Vec::new()).await {
            tracing::debug!(%instance, %error, "an exit could not be acknowledged");
        }
    }

    /// Kills an instance. One that has ended, or never came to exist, is no error.
    pub(crate) async fn kill(&self, instance: InstanceId) {
        self.signal(instance, kill_signal()).await;
    }

    pub(crate) async fn signal(&self, instance: InstanceId, signal: StopSignal) {
        if let Err(error) = self.link.command(&Request::Signal { instance, signal }, Vec::new()).await {
            tracing::debug!(%instance, %error, "an instance could not be signalled");
        }
    }

    async fn end(&self, instance: InstanceId, grace: Duration) {
        let Some((signal, mut exit)) = self.instances.ending(instance) else { return };
        if !grace.is_zero() && exit.borrow().is_none() {
            self.signal(instance, signal).await;
            if tokio::time::timeout(grace, exit.wait_for(Option::is_some)).await.is_ok() {
                return;
            }
        }
        self.kill(instance).await;
        // An error says that the record is gone, with it the instance.
        let _ = exit.wait_for(Option::is_some).await;
    }

    /// Takes over what a former daemon left.
    async fn adopt(self: &Arc<Self>) -> Result<Vec<Left>, Failure> {
        let listed = self.link.list().await.map_err(|error| {
            Failure::new(ErrorCode::ShuttingDown, format!("the keeper does not list its instances: {error}"))
        })?;
        let left = join_all(listed.into_iter().map(|answer| self.adopt_one(answer))).await;
        // Ends that were told between the list and now; those of nobody are taken note of, too.
        for (instance, record) in self.instances.all_known() {
            self.exited(instance, record);
        }
        Ok(left.into_iter().flatten().collect())
    }

    async fn adopt_one(self: &Arc<Self>, answer: Answer) -> Option<Left> {
        let Answer { reply: Reply::Listed { instance, revision, pid, descriptor, exit }, fds } = answer else { return None };
        if exit.is_some() {
            self.acknowledge(instance).await;
            return None;
        }
        let Some(descriptor) = Descriptor::from_bytes(&descriptor) else {
            tracing::warn!(%instance, "an instance of another version is ended");
            let begun = self.instances.begin(instance, StandardStreams::Log, kill_signal(), None);
            return Some(Left { instance, revision, pid, access: None, exit: begun.exit });
        };
        let sockets = (descriptor.streams == StandardStreams::Log).then(|| Arc::new(Sockets::new(&self.link, instance)));
        let Begun { exit, captures } =
            self.instances.begin(instance, descriptor.streams, descriptor.stop_signal, sockets.clone());
        drop(captures.send(self.recapture(instance, &descriptor, fds)));
        let access = match sockets {
            Some(sockets) => self.reach(pid, &descriptor, sockets).await,
            None => None,
        };
        Some(Left { instance, revision, pid, access, exit })
    }

    fn recapture(&self, instance: InstanceId, descriptor: &Descriptor, mut fds: Fds) -> Vec<crate::logs::Capture> {
        let streams = [Stream::Stderr, Stream::Stdout].into_iter().enumerate();
        let capture = |(at, stream)| {
            let pipe = fds.take(at)?;
            let captured = self.logs.capture(&descriptor.slug, instance, stream, pipe, None);
            captured.inspect_err(|error| tracing::warn!(%instance, %error, "a log pipe cannot be read")).ok()
        };
        streams.filter_map(capture).collect()
    }

    /// Finds out where an adopted instance accepts connections; `None` for one that does not.
    async fn reach(&self, pid: u32, descriptor: &Descriptor, sockets: Arc<Sockets>) -> Option<Arc<dyn Connect>> {
        let wanted = Wanted { pid, ports: &descriptor.ports, own: &descriptor.own, deadline: Instant::now() + ADOPT_TIME_MAX };
        let found = tokio::time::timeout(2 * ADOPT_TIME_MAX, readiness::wait(&sockets, &wanted)).await.ok()?.ok()?;
        sockets.ready(found.address, Some(found.connection));
        Some(Arc::new(Connector(sockets)))
    }
}

pub(crate) fn kill_signal() -> StopSignal {
    "KILL".parse().expect("SIGKILL is a signal")
}

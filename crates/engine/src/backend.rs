//! What the engine needs of a place where containers run. Declared here, at its consumer; implemented by `backend-local`
//! and, in tests, by a fake.

use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use funtainer_contract::exec::ExecRequest;
use funtainer_contract::{BoxFuture, Connect, ExitFuture, ImageFiles, StartPhases, StartPlan};
use funtainer_model::{
    Digest, ExecId, Failure, FunctionId, ImageConfig, ImageRef, InstanceId, Limits, RevisionId, Slug, StopSignal,
};
use serde::{Deserialize, Serialize};
use tokio::sync::mpsc;

/// A place where containers run. Every method can be called at any time and from any thread.
/// Errors are [`Failure`]s: the backend knows best what they mean to a user.
pub trait Backend: Send + Sync + 'static {
    /// Resolves the reference to a digest and makes its content ready for starts. Progress is said while it goes on.
    fn prepare<'a>(
        &'a self,
        image: &'a ImageRef,
        how: Resolve,
        progress: ProgressSink,
    ) -> BoxFuture<'a, Result<Prepared, Failure>>;

    /// What a user should know of limits that this machine cannot give or does not keep, as whole sentences; they are no reason to refuse.
    fn warnings(&self, _limits: &Limits) -> Vec<String> {
        Vec::new()
    }

    /// Starts one instance and returns when it is ready by the measure of its plan. On an error nothing of it is left.
    /// Dropping the future ends the start; what it made is released behind it.
    fn start(&self, start: Start) -> BoxFuture<'_, Result<Started, Failure>>;

    /// Asks the instance to end by its stop signal, kills it after `grace`, and returns when it is reaped.
    /// An unknown instance is one that has ended.
    fn stop(&self, instance: InstanceId, grace: Duration) -> BoxFuture<'_, ()>;

    /// Starts a command in a running instance and returns when its program runs. On an error nothing of it is left. It ends with its
    /// instance. Dropping the future ends it.
    fn exec(&self, exec: Exec) -> BoxFuture<'_, Result<ExecStarted, Failure>>;

    /// Sends a signal; what has ended takes none. SIGKILL ends an instance, or the process group of a command.
    fn signal(&self, target: SignalTarget, signal: StopSignal) -> BoxFuture<'_, ()>;

    /// No instance of the revision will be started again: its zygote and its place in caches can go.
    fn retire(&self, revision: RevisionId) -> BoxFuture<'_, ()>;

    /// The instances that a former process of the platform left, with what is needed to go on with them.
    /// Called once, before the first start.
    fn list(&self) -> BoxFuture<'_, Result<Vec<Left>, Failure>>;

    /// The log of a function: its last `lines` lines, then, with `follow`, what comes until the receiver is dropped.
    fn logs(&self, function: &FunctionId, lines: usize, follow: bool) -> BoxFuture<'_, Result<mpsc::Receiver<Bytes>, Failure>>;

    /// Deletes the log of a removed function.
    fn forget_logs(&self, function: &FunctionId) -> BoxFuture<'_, ()>;

    /// Images in the store.
    fn images(&self) -> BoxFuture<'_, Result<Vec<ImageSummary>, Failure>>;

    /// Takes an OCI archive (tar of a layout directory, plain or gzip) into the store and returns what it named.
    /// `name` replaces the archive's names.
    fn import<'a>(
        &'a self,
        archive: mpsc::Receiver<std::io::Result<Bytes>>,
        name: Option<&'a ImageRef>,
        progress: ProgressSink,
    ) -> BoxFuture<'a, Result<Vec<ImageSummary>, Failure>>;
}

/// How a reference becomes a digest.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Resolve {
    /// Imported names as they are in the store, others by asking the registry.
    Deploy,
    /// By asking the registry; replaces an imported name.
    Pull,
    /// As in the store if it is there, else by asking the registry: for `run`.
    IfMissing,
}

/// Progress of a long piece of work, for people. Lossy by design: a full or closed channel is no error.
pub type ProgressSink = mpsc::Sender<Progress>;

/// One step of progress.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "step", rename_all = "kebab-case")]
pub enum Progress {
    /// The reference was resolved.
    Resolved {
        /// To this digest.
        digest: Digest,
    },
    /// A layer is being fetched or converted.
    Layer {
        /// Digest of the compressed layer.
        layer: Digest,
        /// Bytes so far.
        bytes: u64,
        /// Bytes in all.
        total: u64,
    },
    /// A layer was already there.
    LayerPresent {
        /// Digest of the compressed layer.
        layer: Digest,
    },
    /// Something that is served otherwise than it was asked for.
    Warning {
        /// A sentence for people.
        text: String,
    },
    /// An instance is being started.
    Starting,
}

/// An image that is ready for starts.
#[derive(Clone)]
pub struct Prepared {
    /// Digest of the platform's manifest.
    pub digest: Digest,
    /// What the image says of itself.
    pub config: ImageConfig,
    /// Its files.
    pub files: Arc<dyn ImageFiles>,
}

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageSummary {
    /// Its name.
    pub reference: ImageRef,
    /// Digest of the platform's manifest.
    pub digest: Digest,
    /// Bytes of its layers as stored.
    pub size: u64,
    /// Whether it was imported rather than pulled.
    pub imported: bool,
}

/// What all instances of a revision have in common.
#[derive(Debug, Clone)]
pub struct RevisionStart {
    /// Which revision.
    pub revision: RevisionId,
    /// Of which function.
    pub function: FunctionId,
    /// For process titles, host names and log files.
    pub slug: Slug,
    /// The image.
    pub digest: Digest,
    /// What an instance needs.
    pub plan: StartPlan,
    /// What it may use.
    pub limits: Limits,
    /// How long it may take to become ready.
    pub start_timeout: Duration,
}

/// One start.
pub struct Start {
    /// Identity of the new instance.
    pub instance: InstanceId,
    /// What it is an instance of.
    pub revision: Arc<RevisionStart>,
    /// Where its standard error goes besides the log: for `run`. Bounded; the instance waits when it is full.
    pub stderr: Option<mpsc::Sender<Bytes>>,
}

/// A ready instance.
pub struct Started {
    /// Host pid of its init.
    pub pid: u32,
    /// Time of each phase.
    pub phases: StartPhases,
    /// How to reach it.
    pub access: Access,
    /// Its end.
    pub exit: ExitFuture,
}

/// A command in a running instance.
pub struct Exec {
    /// Its identity.
    pub id: ExecId,
    /// Where.
    pub instance: InstanceId,
    /// What that is an instance of.
    pub revision: Arc<RevisionStart>,
    /// What is asked for.
    pub request: ExecRequest,
}

/// A command that runs.
pub struct ExecStarted {
    /// Its standard streams.
    pub streams: ExecStreams,
    /// Its end; memory and processor time are those of its instance.
    pub exit: ExitFuture,
}

/// The standard streams of a command, our ends.
pub enum ExecStreams {
    /// One for each.
    Pipes {
        /// Write end.
        stdin: OwnedFd,
        /// Read end.
        stdout: OwnedFd,
        /// Read end.
        stderr: OwnedFd,
    },
    /// The master end of the terminal that is all three.
    Terminal(OwnedFd),
}

/// What a signal is sent to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum SignalTarget {
    /// The main program of an instance.
    Instance(InstanceId),
    /// A command in one.
    Exec(ExecId),
}

/// How to reach an instance.
pub enum Access {
    /// By TCP, to what listens inside.
    Network(Arc<dyn Connect>),
    /// By its standard streams; they are the call's alone.
    Streams {
        /// Write end.
        stdin: OwnedFd,
        /// Read end.
        stdout: OwnedFd,
    },
    /// By the terminal that its standard streams are: its master end.
    Terminal(OwnedFd),
}

/// An instance that a former process left.
pub struct Left {
    /// Which.
    pub instance: InstanceId,
    /// Of which revision.
    pub revision: RevisionId,
    /// Host pid of its init.
    pub pid: u32,
    /// How to reach it; `None` for one that cannot outlive the process that started it (its streams were that process's).
    pub access: Option<Arc<dyn Connect>>,
    /// Its end.
    pub exit: ExitFuture,
}

//! A call and its answer between the gateway, the engine and a dialect.

use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::pin::Pin;
use std::time::Duration;

use bytes::Bytes;
use funtainer_model::CallId;
use tokio::net::TcpStream;
use tokio::sync::watch;

/// A future that owns or borrows what it needs and can move between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One call: the prefix of the platform is stripped from the URI, hop-by-hop headers are gone.
#[derive(Debug)]
pub struct Call {
    /// Names the call in answers and logs.
    pub id: CallId,
    /// What the caller sent.
    pub request: http::Request<CallBody>,
}

/// The answer to a call. Dropping it ends the call.
#[derive(Debug)]
pub struct Answer {
    /// What the function said, as HTTP.
    pub response: http::Response<AnswerBody>,
}

/// How long each phase of a cold start took, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct StartPhases {
    /// From the decision to start until the sandbox is made and its sockets are here.
    pub sandbox: Duration,
    /// From there until the image's program is executed.
    pub exec: Duration,
    /// From there until it is ready by its dialect's measure.
    pub ready: Duration,
}

/// Makes connections to one instance. The stream belongs to the runtime on which the future is polled.
pub trait Connect: Send + Sync {
    /// Connects to the address the instance was found ready at, or to `other` where a dialect needs another port.
    fn connect(&self, other: Option<SocketAddr>) -> BoxFuture<'_, io::Result<TcpStream>>;
}

/// How an instance's main process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By exit(2) with this code.
    Code(u8),
    /// By this signal.
    Signal(u8),
    /// Nobody knows: its zygote ended with it.
    Lost,
}

/// What is known when an instance has ended and is reaped.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExitReport {
    /// How.
    pub exit: Exit,
    /// Whether the kernel killed it, or one of its processes, for memory.
    pub out_of_memory: bool,
    /// Highest memory use in bytes, where the kernel tells.
    pub memory_peak: Option<u64>,
    /// CPU time in microseconds, where the kernel tells.
    pub cpu_us: Option<u64>,
    /// The end of its standard error, at most 4 KiB.
    pub stderr_tail: Bytes,
}

/// Becomes `Some` once the instance is reaped; all its clones see it.
pub type ExitFuture = watch::Receiver<Option<ExitReport>>;

/// The body of a call. Never buffered whole.
#[derive(Debug)]
pub enum CallBody {
    /// Nothing.
    Empty,
    /// All of it is here.
    Full(Bytes),
    /// As it arrives from a client of the gateway.
    Incoming(hyper::body::Incoming),
    /// As it arrives over a channel; an error ends the call.
    Channel(tokio::sync::mpsc::Receiver<io::Result<Bytes>>),
}

/// The body of an answer. Never buffered whole; dropping it ends the call.
#[derive(Debug)]
pub struct AnswerBody {
    _todo: (),
}

/// Why a started instance gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum InvokeError {
    /// No connection to the instance.
    #[error("the function does not accept connections")]
    Connect(#[source] io::Error),
    /// The connection ended, or what came was no answer of the dialect.
    #[error("the function broke off before an answer")]
    Broken(#[source] Box<dyn std::error::Error + Send + Sync>),
    /// The command ended with another code than 0 before its answer began.
    #[error("the command ended with {exit:?}")]
    CommandFailed {
        /// How it ended.
        exit: Exit,
        /// Whether it was killed for memory.
        out_of_memory: bool,
        /// The end of its standard error.
        stderr_tail: Bytes,
    },
    /// The caller's body broke off.
    #[error("the caller's body broke off")]
    CallerGone(#[source] io::Error),
}

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

use crate::body::{AnswerBody, CallBody};

/// A future that owns or borrows what it needs and can move between threads.
pub type BoxFuture<'a, T> = Pin<Box<dyn Future<Output = T> + Send + 'a>>;

/// One call: the prefix of the platform is stripped from the URI, hop-by-hop headers are gone.
#[derive(Debug)]
pub struct Call {
    /// Names the call in answers and logs.
    pub id: CallId,
    /// What the caller sent.
    pub request: ::http::Request<CallBody>,
}

/// The answer to a call. Dropping it ends the call.
#[derive(Debug)]
pub struct Answer {
    /// What the function said, as HTTP.
    pub response: ::http::Response<AnswerBody>,
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
    /// Whether its writable layer had no room left, for bytes or for files, when it ended.
    pub writable_full: bool,
    /// Highest memory use in bytes, where the kernel tells.
    pub memory_peak: Option<u64>,
    /// CPU time in microseconds, where the kernel tells.
    pub cpu_us: Option<u64>,
    /// The end of its standard error, at most 4 KiB.
    pub stderr_tail: Bytes,
}

impl ExitReport {
    /// What to do where an instance has failed and its writable layer was full.
    pub const WRITABLE_FULL_HINT: &str = "its writable layer was full, for bytes or for files: give it more room with --writable, and as much --memory, or write less";

    /// Waits until the instance is reaped. [`Exit::Lost`], and nothing else known, where who would tell it is gone.
    pub async fn of(exit: &mut ExitFuture) -> Self {
        let known = exit.wait_for(Option::is_some).await.ok().and_then(|report| report.clone());
        known.unwrap_or_else(|| Self {
            exit: Exit::Lost,
            out_of_memory: false,
            writable_full: false,
            memory_peak: None,
            cpu_us: None,
            stderr_tail: Bytes::new(),
        })
    }

    /// What it used, and what it had too little of, in brackets behind a sentence about its end; empty where nothing is known.
    pub fn usage(&self) -> String {
        let memory = self.memory_peak.map(|bytes| format!("memory peak {}M", bytes.div_ceil(1 << 20)));
        let time = self.cpu_us.map(|us| format!("{}.{:03} s of processor time", us / 1_000_000, us / 1000 % 1000));
        let full = self.writable_full.then(|| "its writable layer was full".to_owned());
        let parts: Vec<String> = [memory, time, full].into_iter().flatten().collect();
        if parts.is_empty() { String::new() } else { format!(" ({})", parts.join(", ")) }
    }
}

/// Becomes `Some` once the instance is reaped; all its clones see it.
pub type ExitFuture = watch::Receiver<Option<ExitReport>>;

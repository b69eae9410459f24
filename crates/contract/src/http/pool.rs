//! Idle connections of one instance, by thread.
//!
//! ```text
//!            open                          end of the answer, ready
//!  (none) ─────────► leased ──────────────────────────────────────────► idle
//!                      ▲ │ anything else: closed                         │ │ too old, ended by the server: closed
//!                      │ └───────────────────► (none) ◄──────────────────┼─┘
//!                      └─────────────────────────────────────────────────┘ idle()
//! ```

use std::future::Future;
use std::io;
use std::mem;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, LazyLock, Mutex, MutexGuard, PoisonError};
use std::thread;
use std::time::{Duration, Instant};

use ::http::{Request, Response};
use hyper::body::Incoming;
use hyper::client::conn::TrySendError;
use hyper::client::conn::http1::{Builder, SendRequest};
use hyper_util::rt::TokioIo;
use tokio::task::AbortHandle;

use super::metered::{Allowance, Metered};
use crate::{CallBody, Connect};

/// Connections that one thread keeps to one instance; more than this were open at once, and closing the surplus is cheap.
const IDLE_MAX: usize = 256;
/// How long a connection is kept for the next call. Below the shortest keep-alive time of common servers (gunicorn: 2 s), so that a
/// call never meets a server that is just closing; a new connection costs about 20 µs.
const IDLE_TIME_MAX: Duration = Duration::from_millis(1_500);
/// How long a connection may take to become ready again after its answer has ended, for example because the server did not wait for
/// the end of the request.
const SETTLE_TIME_MAX: Duration = Duration::from_millis(100);
/// Header fields of an answer at most; hyper's own bound of 100 is below what some applications set.
const HEADERS_MAX: usize = 256;
/// Head of an answer at most, and what is read ahead of its body, in bytes.
const READ_BUFFER_BYTES_MAX: usize = 256 * 1024;

/// Twice the threads of the machine: threads that call get one each, as numbers are given out in the order of first calls.
static SHARDS: LazyLock<usize> =
    LazyLock::new(|| 2 * thread::available_parallelism().map_or(1, std::num::NonZero::get).next_power_of_two());
static THREADS: AtomicUsize = AtomicUsize::new(0);

thread_local! {
    static SHARD: usize = THREADS.fetch_add(1, Ordering::Relaxed) % *SHARDS;
}

/// The connections of one instance.
pub(super) struct Pool {
    connect: Arc<dyn Connect>,
    shards: Box<[Shard]>,
}

/// Of one thread. Aligned so that two threads never write one cache line (two lines are fetched together on x86-64).
#[repr(align(128))]
#[derive(Default)]
struct Shard {
    /// The latest last.
    idle: Mutex<Vec<Idle>>,
}

struct Idle {
    connection: Connection,
    since: Instant,
}

/// Dropping it closes the connection.
struct Connection {
    send: SendRequest<CallBody>,
    allowance: Allowance,
    task: AbortHandle,
}

impl Drop for Connection {
    fn drop(&mut self) {
        self.task.abort();
    }
}

/// A connection in use by one call.
pub(super) struct Lease {
    /// `None` once it is given back.
    connection: Option<Connection>,
    pool: Arc<Pool>,
    shard: usize,
    reusable: bool,
}

impl Pool {
    pub(super) fn new(connect: Arc<dyn Connect>) -> Self {
        Self { connect, shards: (0..*SHARDS).map(|_| Shard::default()).collect() }
    }

    /// An idle connection of this thread that a call can be sent over.
    pub(super) fn idle(self: &Arc<Self>) -> Option<Lease> {
        let shard = SHARD.with(|shard| *shard);
        let mut idle = self.shards[shard].lock();
        while let Some(Idle { connection, since }) = idle.pop() {
            if since.elapsed() > IDLE_TIME_MAX {
                // All below are older still.
                let old = mem::take(&mut *idle);
                drop(idle);
                drop(old);
                return None;
            }
            if connection.send.is_ready() {
                drop(idle);
                return Some(self.lease(connection, shard));
            }
        }
        None
    }

    /// A new connection.
    pub(super) async fn open(self: &Arc<Self>) -> io::Result<Lease> {
        let shard = SHARD.with(|shard| *shard);
        let stream = self.connect.connect(None).await?;
        stream.set_nodelay(true)?;
        let allowance = Allowance::default();
        // Nothing is asked for yet; what comes all the same is for hyper to judge.
        allowance.body();
        let (send, connection) = Builder::new()
            .max_headers(HEADERS_MAX)
            .max_buf_size(READ_BUFFER_BYTES_MAX)
            .handshake(TokioIo::new(Metered::new(stream, allowance.clone())))
            .await
            .map_err(io::Error::other)?;
        let task = tokio::spawn(async move {
            if let Err(error) = connection.await {
                tracing::debug!(%error, "a connection to a function ended");
            }
        });
        Ok(self.lease(Connection { send, allowance, task: task.abort_handle() }, shard))
    }

    fn lease(self: &Arc<Self>, connection: Connection, shard: usize) -> Lease {
        Lease { connection: Some(connection), pool: Arc::clone(self), shard, reusable: true }
    }

    fn keep(&self, connection: Connection, shard: usize) {
        let mut idle = self.shards[shard].lock();
        if idle.len() < IDLE_MAX {
            idle.push(Idle { connection, since: Instant::now() });
        }
    }
}

impl Shard {
    fn lock(&self) -> MutexGuard<'_, Vec<Idle>> {
        self.idle.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Lease {
    /// Sends a request. If nothing of it was sent it comes back in the error.
    pub(super) fn try_send(
        &mut self,
        request: Request<CallBody>,
    ) -> impl Future<Output = Result<Response<Incoming>, TrySendError<Request<CallBody>>>> + use<> {
        let connection = self.connection.as_mut().expect("a call is sent before its answer ends");
        connection.allowance.heads(READ_BUFFER_BYTES_MAX);
        connection.send.try_send_request(request)
    }

    /// The head of the answer is here.
    pub(super) fn head_came(&self) {
        if let Some(connection) = &self.connection {
            connection.allowance.body();
        }
    }

    /// The connection closes with the answer.
    pub(super) fn never_again(&mut self) {
        self.reusable = false;
    }

    /// The answer has ended cleanly. Again it does nothing.
    pub(super) fn give_back(&mut self) {
        let Some(mut connection) = self.connection.take() else { return };
        if !self.reusable || connection.send.is_closed() {
            return;
        }
        if connection.send.is_ready() {
            self.pool.keep(connection, self.shard);
            return;
        }
        let Ok(runtime) = tokio::runtime::Handle::try_current() else { return };
        let (pool, shard) = (Arc::clone(&self.pool), self.shard);
        runtime.spawn(async move {
            if let Ok(Ok(())) = tokio::time::timeout(SETTLE_TIME_MAX, connection.send.ready()).await {
                pool.keep(connection, shard);
            }
        });
    }
}

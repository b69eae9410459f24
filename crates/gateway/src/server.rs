//! Listeners, connections and their end.
//!
//! Each TCP listener has a thread and a single-threaded runtime of its own: what a connection needs stays on one core. The admin
//! socket is served on the runtime that calls [`serve`]. Both speak HTTP/1.1 by the same code.
//!
//! ```text
//! accept ──► room? ──no──► 503, close
//!              │yes
//!              ▼
//!   ┌─► head ──► answer ─┐     drain: idle connections close, busy ones after their answer,
//!   └────────────────────┘            those that are left when the time is over are cut
//!              │ end, or a head that cannot be parsed
//!              ▼
//!   (error answer) ──► shut down ──► read what is still coming for a moment ──► close
//! ```

mod connection;
mod wire;

use std::io;
use std::net::TcpListener as StdTcpListener;
use std::os::unix::net::UnixListener as StdUnixListener;
use std::sync::Arc;
use std::thread;
use std::time::Duration;

use funtainer_engine::Engine;
use funtainer_model::{ErrorCode, Failure};
use tokio::net::{TcpListener, TcpStream, UnixListener, UnixStream};
use tokio::sync::watch;
use tokio::task::{JoinHandle, JoinSet};
use tokio::time::Instant;

use crate::api;
use crate::route::{Door, Gateway};
pub(crate) use connection::{TunnelSlot, TunnelStream};
pub(crate) use wire::{Busy, WireState};

/// Longest head of a request in bytes, request line included. Eight times what most servers take; large values belong into bodies.
pub(crate) const HEAD_BYTES_MAX: usize = 64 * 1024;
/// How long a client may take for a head, and how long a connection may be idle.
const HEAD_TIMEOUT: Duration = Duration::from_mins(1);
/// Connections that one listener's thread serves at once: one descriptor and some 10 KiB each.
const CONNECTIONS_PER_LISTENER_MAX: usize = 8192;
/// Connections to the admin socket at once: it has few users, each with few.
const ADMIN_CONNECTIONS_MAX: usize = 1024;
/// Pause after accept(2) failed for want of descriptors or memory, so that the thread does not spin.
const ACCEPT_PAUSE: Duration = Duration::from_millis(50);

/// A running gateway.
#[derive(Debug)]
pub struct Server {
    stop: watch::Sender<Stop>,
    threads: Vec<thread::JoinHandle<()>>,
    admin: JoinHandle<()>,
}

/// Whether and until when connections may go on.
#[derive(Debug, Clone, Copy)]
enum Stop {
    Not,
    Until(Instant),
}

/// Tells answers without an end that the gateway stops.
#[derive(Debug, Clone)]
pub(crate) struct Stopping(watch::Receiver<Stop>);

/// Starts to serve calls on `listeners` and everything on `admin`.
pub fn serve(engine: Arc<Engine>, listeners: Vec<StdTcpListener>, admin: StdUnixListener) -> io::Result<Server> {
    let calls = listeners.first().map(StdTcpListener::local_addr).transpose()?;
    let (stop, stopped) = watch::channel(Stop::Not);
    let gateway = Arc::new(Gateway { api: api::router(Arc::clone(&engine), calls, Stopping(stopped.clone())), engine });
    admin.set_nonblocking(true)?;
    let admin = tokio::spawn(accept_loop(UnixListener::from_std(admin)?, Arc::clone(&gateway), stopped.clone()));
    let mut threads = Vec::with_capacity(listeners.len());
    for (number, listener) in listeners.into_iter().enumerate() {
        listener.set_nonblocking(true)?;
        let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
        let (gateway, stopped) = (Arc::clone(&gateway), stopped.clone());
        let serve = move || {
            runtime.block_on(async {
                match TcpListener::from_std(listener) {
                    Ok(listener) => accept_loop(listener, gateway, stopped).await,
                    Err(error) => tracing::error!(%error, "a listener cannot be served"),
                }
            });
        };
        threads.push(thread::Builder::new().name(format!("calls-{number}")).spawn(serve)?);
    }
    Ok(Server { stop, threads, admin })
}

impl Server {
    /// Accepts no more, lets calls in flight finish within `limit`, cuts the rest, and returns when all connections are closed.
    pub async fn drain(self, limit: Duration) {
        self.stop.send_replace(Stop::Until(Instant::now() + limit));
        let threads = tokio::task::spawn_blocking(|| {
            for thread in self.threads {
                if thread.join().is_err() {
                    tracing::error!("a thread that served calls has panicked");
                }
            }
        });
        if threads.await.is_err() || self.admin.await.is_err() {
            tracing::error!("the gateway's end has panicked");
        }
    }
}

impl Stopping {
    /// Waits until the gateway is to stop.
    pub(crate) async fn begun(&mut self) {
        Stop::deadline(&mut self.0).await;
    }
}

impl Stop {
    /// Waits for the stop and returns its deadline; for ever if nobody can say it any more.
    async fn deadline(stopped: &mut watch::Receiver<Self>) -> Instant {
        loop {
            if let Self::Until(deadline) = *stopped.borrow_and_update() {
                return deadline;
            }
            if stopped.changed().await.is_err() {
                std::future::pending::<()>().await;
            }
        }
    }
}

/// What the two kinds of listeners have in common.
trait Accept {
    type Stream: connection::Stream;
    /// Connections at once.
    const CONNECTIONS_MAX: usize;
    async fn accept(&self) -> io::Result<(Self::Stream, Door)>;
    /// Writes what fits at once; the rest is lost.
    fn write_now(stream: &Self::Stream, bytes: &[u8]);
}

impl Accept for TcpListener {
    type Stream = TcpStream;
    const CONNECTIONS_MAX: usize = CONNECTIONS_PER_LISTENER_MAX;

    async fn accept(&self) -> io::Result<(TcpStream, Door)> {
        let (stream, peer) = Self::accept(self).await?;
        stream.set_nodelay(true)?;
        Ok((stream, Door::calls(peer.ip())))
    }

    fn write_now(stream: &TcpStream, bytes: &[u8]) {
        let _ = stream.try_write(bytes);
    }
}

impl Accept for UnixListener {
    type Stream = UnixStream;
    const CONNECTIONS_MAX: usize = ADMIN_CONNECTIONS_MAX;

    async fn accept(&self) -> io::Result<(UnixStream, Door)> {
        Ok((Self::accept(self).await?.0, Door::Admin))
    }

    fn write_now(stream: &UnixStream, bytes: &[u8]) {
        let _ = stream.try_write(bytes);
    }
}

async fn accept_loop<L: Accept>(listener: L, gateway: Arc<Gateway>, mut stopped: watch::Receiver<Stop>) {
    let builder = connection::builder();
    let mut connections = JoinSet::new();
    let mut refused = 0_u64;
    let deadline = loop {
        let accepted = tokio::select! {
            accepted = listener.accept() => accepted,
            Some(_) = connections.join_next() => continue,
            deadline = Stop::deadline(&mut stopped) => break deadline,
        };
        match accepted {
            Ok((stream, _)) if connections.len() >= L::CONNECTIONS_MAX => {
                refused += 1;
                if refused.is_power_of_two() {
                    tracing::warn!(refused, limit = L::CONNECTIONS_MAX, "connections are refused: too many are open");
                }
                L::write_now(&stream, &connection::refusal(too_many_connections(L::CONNECTIONS_MAX)));
            }
            Ok((stream, door)) => {
                let serving = connection::serve(builder.clone(), stream, Arc::clone(&gateway), door, stopped.clone());
                connections.spawn(serving);
            }
            Err(error) if is_of_one_connection(&error) => {}
            Err(error) => {
                tracing::error!(%error, "a connection cannot be accepted");
                tokio::time::sleep(ACCEPT_PAUSE).await;
            }
        }
    };
    drop(listener);
    let all_closed = async { while connections.join_next().await.is_some() {} };
    if tokio::time::timeout_at(deadline, all_closed).await.is_err() {
        tracing::warn!(connections = connections.len(), "the time to drain is over: connections are cut");
        connections.shutdown().await;
    }
}

fn too_many_connections(limit: usize) -> Failure {
    Failure::new(ErrorCode::TooManyConnections, format!("{limit} connections are open already"))
}

/// Errors that accept(2) passes on from the new connection.
fn is_of_one_connection(error: &io::Error) -> bool {
    use io::ErrorKind as Kind;
    matches!(error.kind(), Kind::ConnectionAborted | Kind::ConnectionReset | Kind::ConnectionRefused | Kind::NotConnected)
}

//! One connection, from its first byte to its close.

use std::convert::Infallible;
use std::future::{Future, pending, poll_fn};
use std::io;
use std::pin::{Pin, pin};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, Waker, ready};
use std::time::Duration;

use bytes::Bytes;
use funtainer_model::{ErrorCode, Failure};
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, Interest, ReadBuf};
use tokio::net::{TcpStream, UnixStream};
use tokio::sync::watch;

use super::wire::{Wire, WireState};
use super::{HEAD_BYTES_MAX, HEAD_TIMEOUT, Stop};
use crate::rescue::{Occasion, Reader, Rescue};
use crate::route::{self, Door, Gateway};

/// Most header fields of a request; hyper parses them on the stack.
const HEAD_FIELDS_MAX: usize = 100;
/// How long and how much is still read after the last answer: closing at once would make the kernel reset the connection, and
/// the client could lose the answer, or, still writing, never look for it. Most clients see the answer after the first of these bytes.
const LINGER_TIME: Duration = Duration::from_secs(5);
const LINGER_BYTES_MAX: u64 = 64 * 1024 * 1024;
/// The same where the server stops: an answer needs no longer to a client that reads.
const LINGER_AT_STOP: Duration = Duration::from_secs(1);

/// A stream that a connection can be on.
pub(super) trait Stream: AsyncRead + AsyncWrite + Send + Unpin + 'static {
    /// Takes it apart for what follows an answer `101 Switching Protocols`.
    fn tunnel(self, early: Bytes) -> TunnelStream;
}

impl Stream for TcpStream {
    fn tunnel(self, early: Bytes) -> TunnelStream {
        let (reader, writer) = tokio::io::split(self);
        // Nothing is tunnelled to callers.
        TunnelStream { early, reader: Box::new(reader), writer: Box::new(writer), gone: Box::pin(pending()) }
    }
}

impl Stream for UnixStream {
    fn tunnel(self, early: Bytes) -> TunnelStream {
        let stream = Arc::new(self);
        let watched = Arc::clone(&stream);
        let gone = async move {
            // What is out of band is no part of any protocol here, so that this is the end of what comes.
            let _ = watched.ready(Interest::PRIORITY).await;
        };
        let (reader, writer) = (Box::new(Half(Arc::clone(&stream))), Box::new(Half(stream)));
        TunnelStream { early, reader, writer, gone: Box::pin(gone) }
    }
}

/// One direction of a Unix socket that is used in both.
struct Half(Arc<UnixStream>);

impl AsyncRead for Half {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        loop {
            ready!(self.0.poll_read_ready(cx))?;
            match self.0.try_read(buffer.initialize_unfilled()) {
                Ok(read) => {
                    buffer.advance(read);
                    return Poll::Ready(Ok(()));
                }
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                Err(error) => return Poll::Ready(Err(error)),
            }
        }
    }
}

impl AsyncWrite for Half {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        loop {
            ready!(self.0.poll_write_ready(cx))?;
            match self.0.try_write(bytes) {
                Err(error) if error.kind() == io::ErrorKind::WouldBlock => {}
                written => return Poll::Ready(written),
            }
        }
    }

    fn poll_flush(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(Ok(()))
    }

    fn poll_shutdown(self: Pin<&mut Self>, _cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        Poll::Ready(rustix::net::shutdown(&*self.0, rustix::net::Shutdown::Write).map_err(Into::into))
    }
}

/// What follows on a connection after an answer `101 Switching Protocols`.
pub(crate) type Tunnel = Box<dyn FnOnce(TunnelStream) -> Pin<Box<dyn Future<Output = ()> + Send>> + Send>;

/// The bytes that came behind the request, and both directions of the connection.
pub(crate) struct TunnelStream {
    /// Was read before the switch.
    pub(crate) early: Bytes,
    /// The rest of what comes.
    pub(crate) reader: Box<dyn AsyncRead + Send + Unpin>,
    /// The way back.
    pub(crate) writer: Box<dyn AsyncWrite + Send + Unpin>,
    /// Becomes ready when the client closes its end, also while nothing is read.
    pub(crate) gone: Pin<Box<dyn Future<Output = ()> + Send>>,
}

/// Where a handler that answers 101 leaves what follows. An extension of each request.
#[derive(Clone, Default)]
pub(crate) struct TunnelSlot(Arc<Mutex<Option<Tunnel>>>);

impl TunnelSlot {
    /// To be called before the answer 101 is given.
    pub(crate) fn put(&self, tunnel: Tunnel) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = Some(tunnel);
    }

    fn take(&self) -> Option<Tunnel> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).take()
    }
}

/// The settings of every connection.
pub(super) fn builder() -> http1::Builder {
    let mut builder = http1::Builder::new();
    builder.timer(TokioTimer::new()).header_read_timeout(HEAD_TIMEOUT).max_header_size(HEAD_BYTES_MAX);
    // One write for a head with a small body. Not `pipeline_flush`: it keeps an answer back while the next request is there in part.
    builder.writev(false);
    builder
}

/// Serves the connection until it ends or `stopped` says so.
pub(super) async fn serve<S: Stream>(
    builder: http1::Builder,
    stream: S,
    gateway: Arc<Gateway>,
    door: Door,
    mut stopped: watch::Receiver<Stop>,
) {
    let state = Arc::new(WireState::default());
    let slot = TunnelSlot::default();
    let service = hyper::service::service_fn(|mut request| {
        let (gateway, door, state) = (&gateway, &door, &state);
        if matches!(door, Door::Admin) {
            request.extensions_mut().insert(slot.clone());
        }
        async move { Ok::<_, Infallible>(route::answer(gateway, door, state, request).await) }
    });
    let mut connection = builder.serve_connection(TokioIo::new(Wire::new(stream, Arc::clone(&state))), service);
    // Asked when there is news, and by each new waker: to ask in every round would take a lock that all connections share. Outside of
    // tokio's budget, which would have it answer without keeping the waker.
    let news = stopped.clone();
    let mut stop = pin!(tokio::task::unconstrained(Stop::deadline(&mut stopped)));
    let mut asked: Option<Waker> = None;
    let mut stopping = false;
    let end = poll_fn(|cx| {
        state.next_round();
        let is_asked =
            asked.as_ref().is_some_and(|waker| waker.will_wake(cx.waker())) && matches!(news.has_changed(), Ok(false));
        if !stopping && !is_asked {
            asked = Some(cx.waker().clone());
            stopping = stop.as_mut().poll(cx).is_ready();
            if stopping {
                Pin::new(&mut connection).graceful_shutdown();
            }
        }
        Pin::new(&mut connection).poll(cx)
    })
    .await;
    let end_is_parse_error = matches!(&end, Err(error) if error.is_parse());
    let parts = connection.into_parts();
    let (mut stream, held_back, eof) = parts.io.into_inner().into_parts();
    match end {
        Ok(()) => {
            if let Some(tunnel) = slot.take() {
                tunnel(stream.tunnel(parts.read_buf)).await;
                return;
            }
        }
        Err(error) if error.is_parse() => {
            if held_back || error.is_parse_version_h2() {
                let _ = stream.write_all(&refusal(unparsable(&error))).await;
            }
        }
        Err(error) => {
            tracing::debug!(%error, "a connection broke off");
            return;
        }
    }
    // A connection that ends because the server does has been quiet, or its last request was answered.
    let answered_early = !stopping || end_is_parse_error;
    if stream.shutdown().await.is_ok() && !eof && answered_early {
        let rest = async { tokio::io::copy(&mut stream.take(LINGER_BYTES_MAX), &mut tokio::io::sink()).await };
        let rest = tokio::time::timeout(LINGER_TIME, rest);
        if stopping {
            let _ = tokio::time::timeout(LINGER_AT_STOP, rest).await;
        } else {
            tokio::select! {
                _ = rest => {}
                _ = stop => {}
            }
        }
    }
}

/// An answer outside of HTTP's give and take, as bytes. The connection ends with it.
pub(super) fn refusal(failure: Failure) -> Vec<u8> {
    let id = crate::call_id::new();
    let rescue = Rescue::from(failure);
    rescue.log(id, None);
    let (status, headers, body) = rescue.parts(Occasion::Call, Reader::Person, id);
    let mut bytes = format!("HTTP/1.1 {} {}\r\n", status.as_u16(), status.canonical_reason().unwrap_or_default()).into_bytes();
    for (name, value) in &headers {
        bytes.extend_from_slice(&[name.as_str().as_bytes(), b": ", value.as_bytes(), b"\r\n"].concat());
    }
    bytes.extend_from_slice(format!("content-length: {}\r\nconnection: close\r\n\r\n", body.len()).as_bytes());
    bytes.extend_from_slice(&body);
    bytes
}

fn unparsable(error: &hyper::Error) -> Failure {
    if error.is_parse_too_large() {
        let detail = format!("the head of the request has more than {HEAD_BYTES_MAX} bytes or {HEAD_FIELDS_MAX} fields");
        return Failure::new(ErrorCode::HeaderTooLarge, detail);
    }
    let hint = "send HTTP/1.1, without TLS";
    Failure::new(ErrorCode::BadRequest, format!("the request is not HTTP/1.1: {error}")).with_hint(hint)
}

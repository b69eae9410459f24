//! The dialect `http`: the image is an HTTP server. Calls go over pooled HTTP/1.1 connections, streamed both ways.
//!
//! A [`Client`] belongs to one instance and has one pool for each thread that calls it, so that on runtimes with one thread each
//! (the gateway's) a connection never leaves the core on which its caller is served.

mod head;
mod metered;
mod pool;

use std::io;
use std::pin::Pin;
use std::sync::Arc;
use std::task::{Context, Poll, ready};

use ::http::{Request, StatusCode};
use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

pub use head::strip_hop_by_hop;

use crate::{Answer, AnswerBody, BodyError, Call, CallBody, Connect, InvokeError};
use pool::{Lease, Pool};

/// New connections that one call tries: the first may have waited since the instance was found ready, and be stale as well.
const OPENED_MAX: u32 = 2;

/// Speaks HTTP/1.1 to one instance. Clones share their connections; with the last one idle connections are closed.
#[derive(Clone)]
pub struct Client {
    pool: Arc<Pool>,
}

impl Client {
    /// A client without connections yet.
    pub fn new(connect: Arc<dyn Connect>) -> Self {
        Self { pool: Arc::new(Pool::new(connect)) }
    }

    /// Sends the call over an idle connection or a new one and returns once the head of the answer is here. Needs a runtime with I/O
    /// and time; a new connection lives on it. Dropping the future or the answer closes the connection, which is how a server learns
    /// that nobody waits any more.
    ///
    /// A connection that turns out stale before anything of the call was sent is replaced without a word. After that nothing is
    /// sent twice: [`InvokeError::was_delivered`] tells the two apart.
    pub async fn invoke(&self, call: Call) -> Result<Answer, InvokeError> {
        let Call { id, mut request } = call;
        let not_delivered = |request: Request<CallBody>, source: io::Error| {
            Err(InvokeError::NotDelivered { call: Box::new(Call { id, request }), source })
        };
        head::rewrite_request(&mut request);
        let mut opened = 0;
        loop {
            let mut lease = if let Some(lease) = self.pool.idle() {
                lease
            } else {
                opened += 1;
                match self.pool.open().await {
                    Ok(lease) => lease,
                    Err(error) => return not_delivered(request, error),
                }
            };
            match lease.try_send(request).await {
                Ok(response) if response.status() == StatusCode::SWITCHING_PROTOCOLS => {
                    return Err(InvokeError::Broken("it switched to a protocol that was not asked for".into()));
                }
                Ok(mut response) => {
                    lease.head_came();
                    if !head::rewrite_response(&mut response) {
                        lease.never_again();
                    }
                    return Ok(Answer { response: response.map(|body| AnswerBody::upstream(Upstream::new(body, lease))) });
                }
                Err(mut failed) => match failed.take_message() {
                    Some(message) if opened == OPENED_MAX => {
                        return not_delivered(message, io::Error::other(failed.into_error()));
                    }
                    Some(message) => request = message,
                    None => return Err(broken(failed.into_error())),
                },
            }
        }
    }
}

/// The rest of an answer, with the connection it comes over.
pub(crate) struct Upstream {
    body: Incoming,
    /// Goes back to the pool with the end of the body; dropping it before closes the connection.
    lease: Lease,
}

impl Upstream {
    fn new(body: Incoming, lease: Lease) -> Self {
        let mut upstream = Self { body, lease };
        upstream.note_end();
        upstream
    }

    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let frame = ready!(Pin::new(&mut self.body).poll_frame(cx));
        match frame {
            None => self.lease.give_back(),
            Some(Ok(_)) => self.note_end(),
            Some(Err(_)) => {}
        }
        Poll::Ready(frame.map(|frame| frame.map_err(BodyError::Connection)))
    }

    pub(crate) fn is_end_stream(&self) -> bool {
        self.body.is_end_stream()
    }

    pub(crate) fn size_hint(&self) -> SizeHint {
        self.body.size_hint()
    }

    /// Where the length is known there is no further frame that would say the end.
    fn note_end(&mut self) {
        if self.body.is_end_stream() {
            self.lease.give_back();
        }
    }
}

fn broken(error: hyper::Error) -> InvokeError {
    let of_caller = std::error::Error::source(&error).and_then(|source| source.downcast_ref::<BodyError>()).is_some();
    if of_caller { InvokeError::CallerGone(error.into()) } else { InvokeError::Broken(error.into()) }
}

//! Bodies of calls and answers: streamed, never buffered whole, without an allocation for each frame.

use std::fmt;
use std::io;
use std::pin::Pin;
use std::task::{Context, Poll, ready};

use bytes::Bytes;
use http_body::{Body, Frame, SizeHint};
use hyper::body::Incoming;

use crate::http::Upstream;
use crate::stdio::Output;

/// Why a body broke off.
#[derive(Debug, thiserror::Error)]
pub enum BodyError {
    /// The HTTP connection that it came over did.
    #[error("the connection broke off within the body")]
    Connection(#[source] hyper::Error),
    /// The channel, pipe or file that it came from did.
    #[error("the body cannot be read")]
    Io(#[source] io::Error),
    /// The command ended with another code than 0 after its answer had begun.
    #[error("the command ended with {0:?} within its answer")]
    CommandFailed(crate::Exit),
}

/// The body of a call. Never buffered whole.
#[derive(Debug)]
pub enum CallBody {
    /// Nothing.
    Empty,
    /// All of it is here.
    Full(Bytes),
    /// As it arrives from a client of the gateway.
    Incoming(Incoming),
    /// As it arrives over a channel; an error ends the call.
    Channel(tokio::sync::mpsc::Receiver<io::Result<Bytes>>),
}

impl Body for CallBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let body = self.get_mut();
        match body {
            Self::Empty => Poll::Ready(None),
            Self::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                *body = Self::Empty;
                Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
            }
            Self::Incoming(incoming) => Pin::new(incoming).poll_frame(cx).map_err(BodyError::Connection),
            Self::Channel(channel) => {
                channel.poll_recv(cx).map(|item| item.map(|bytes| bytes.map(Frame::data).map_err(BodyError::Io)))
            }
        }
    }

    fn is_end_stream(&self) -> bool {
        match self {
            Self::Empty => true,
            Self::Full(bytes) => bytes.is_empty(),
            Self::Incoming(incoming) => incoming.is_end_stream(),
            Self::Channel(_) => false,
        }
    }

    fn size_hint(&self) -> SizeHint {
        match self {
            Self::Empty => SizeHint::with_exact(0),
            Self::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Self::Incoming(incoming) => incoming.size_hint(),
            Self::Channel(_) => SizeHint::default(),
        }
    }
}

/// The body of an answer. Never buffered whole; dropping it ends the call.
///
/// A guard put in by [`AnswerBody::with_guard`] is dropped exactly when the body has ended, has failed or is dropped: that is the
/// moment at which the instance's slot is free again.
pub struct AnswerBody {
    source: Source,
    guard: Option<Box<dyn Send>>,
}

/// Where an answer comes from.
enum Source {
    Empty,
    Full(Bytes),
    Upstream(Upstream),
    Output(Box<Output>),
}

impl AnswerBody {
    /// Nothing.
    pub fn empty() -> Self {
        Source::Empty.into()
    }

    /// All of it.
    pub fn full(bytes: Bytes) -> Self {
        if bytes.is_empty() { Self::empty() } else { Source::Full(bytes).into() }
    }

    pub(crate) fn upstream(upstream: Upstream) -> Self {
        Source::Upstream(upstream).into()
    }

    pub(crate) fn output(output: Box<Output>) -> Self {
        Source::Output(output).into()
    }

    /// The same, keeping `guard` until its end. A body that is empty already keeps it until it is polled or dropped.
    /// With a guard inside already, both are kept.
    pub fn with_guard(self, guard: Box<dyn Send>) -> Self {
        let guard = match self.guard {
            None => guard,
            Some(inner) => Box::new((inner, guard)),
        };
        Self { source: self.source, guard: Some(guard) }
    }

    fn end(&mut self) {
        self.source = Source::Empty;
        self.guard = None;
    }
}

impl From<Source> for AnswerBody {
    fn from(source: Source) -> Self {
        Self { source, guard: None }
    }
}

impl Body for AnswerBody {
    type Data = Bytes;
    type Error = BodyError;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        let body = self.get_mut();
        let frame = match &mut body.source {
            Source::Empty => None,
            Source::Full(bytes) => Some(Ok(Frame::data(std::mem::take(bytes)))),
            Source::Upstream(upstream) => ready!(upstream.poll_frame(cx)),
            Source::Output(output) => ready!(output.poll_frame(cx)),
        };
        // The end is known with the last frame where the length is: the slot is free before the caller has read it all.
        if !matches!(frame, Some(Ok(_))) || body.is_end_stream() {
            body.end();
        }
        Poll::Ready(frame)
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Empty => true,
            Source::Full(bytes) => bytes.is_empty(),
            Source::Upstream(upstream) => upstream.is_end_stream(),
            Source::Output(output) => output.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Empty => SizeHint::with_exact(0),
            Source::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Upstream(upstream) => upstream.size_hint(),
            Source::Output(_) => SizeHint::default(),
        }
    }
}

impl fmt::Debug for AnswerBody {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self.source {
            Source::Empty => "AnswerBody::Empty",
            Source::Full(_) => "AnswerBody::Full",
            Source::Upstream(_) => "AnswerBody::Upstream",
            Source::Output(_) => "AnswerBody::Output",
        })
    }
}

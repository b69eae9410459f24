//! Bodies of the gateway's answers.

use std::pin::Pin;
use std::task::{Context, Poll};

use bytes::Bytes;
use funtainer_contract::AnswerBody;
use funtainer_model::CallId;
use http_body::{Body as HttpBody, Frame, SizeHint};
use tokio::time::{Instant, Sleep};

use crate::server::Busy;

/// Why an answer broke off after its head. The connection is cut, which is how HTTP/1.1 says it.
#[derive(Debug, thiserror::Error)]
pub(crate) enum BodyBroken {
    /// The function's.
    #[error("the function's answer broke off")]
    Function(#[from] funtainer_contract::BodyError),
    /// The call's time is over.
    #[error("the call took too long")]
    Timeout,
    /// An own one's.
    #[error("the answer broke off")]
    Own(#[from] axum::Error),
}

/// The body of an answer. Never buffered whole, unless it is whole from the start.
pub(crate) struct Body {
    source: Source,
    /// Until the end, the connection has a call.
    busy: Option<Busy>,
}

enum Source {
    Full(Bytes),
    Function(Box<Function>),
    Own(axum::body::Body),
}

struct Function {
    call: CallId,
    body: AnswerBody,
    deadline: Instant,
    /// Made once the function lets the caller wait.
    timer: Option<Pin<Box<Sleep>>>,
}

impl Body {
    /// All of it.
    pub(crate) fn full(bytes: impl Into<Bytes>) -> Self {
        Self { source: Source::Full(bytes.into()), busy: None }
    }

    /// A function's, broken off at the end of the call's time.
    pub(crate) fn function(call: CallId, body: AnswerBody, deadline: Instant) -> Self {
        Self { source: Source::Function(Box::new(Function { call, body, deadline, timer: None })), busy: None }
    }

    /// An own one's.
    pub(crate) fn own(body: axum::body::Body) -> Self {
        Self { source: Source::Own(body), busy: None }
    }

    /// The same, with the mark of the connection's call.
    pub(crate) fn while_busy(self, busy: Busy) -> Self {
        Self { busy: Some(busy), ..self }
    }
}

impl HttpBody for Body {
    type Data = Bytes;
    type Error = BodyBroken;

    fn poll_frame(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyBroken>>> {
        let this = self.get_mut();
        let frame = match &mut this.source {
            Source::Full(bytes) => {
                let bytes = std::mem::take(bytes);
                Poll::Ready((!bytes.is_empty()).then(|| Ok(Frame::data(bytes))))
            }
            Source::Function(function) => function.poll_frame(cx),
            Source::Own(body) => Pin::new(body).poll_frame(cx).map_err(BodyBroken::from),
        };
        if matches!(frame, Poll::Ready(None | Some(Err(_)))) {
            this.busy = None;
        }
        frame
    }

    fn is_end_stream(&self) -> bool {
        match &self.source {
            Source::Full(bytes) => bytes.is_empty(),
            Source::Function(function) => function.body.is_end_stream(),
            Source::Own(body) => body.is_end_stream(),
        }
    }

    fn size_hint(&self) -> SizeHint {
        match &self.source {
            Source::Full(bytes) => SizeHint::with_exact(bytes.len() as u64),
            Source::Function(function) => function.body.size_hint(),
            Source::Own(body) => body.size_hint(),
        }
    }
}

impl Function {
    fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyBroken>>> {
        if let Poll::Ready(frame) = Pin::new(&mut self.body).poll_frame(cx) {
            return Poll::Ready(frame.map(|frame| frame.map_err(|error| self.broken(error.into()))));
        }
        let timer = self.timer.get_or_insert_with(|| Box::pin(tokio::time::sleep_until(self.deadline)));
        timer.as_mut().poll(cx).map(|()| Some(Err(self.broken(BodyBroken::Timeout))))
    }

    /// The head is gone: the log is the only place left to say why.
    fn broken(&self, error: BodyBroken) -> BodyBroken {
        tracing::warn!(call = %self.call, error = &error as &dyn std::error::Error, "an answer is broken off");
        error
    }
}

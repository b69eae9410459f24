//! The dialect `stdio`: the container is the call. The body goes to standard input, standard output is the answer, the exit code
//! says whether it is a good one.
//!
//! ```text
//!            exit 0, end of output                 exit 0
//!  waiting ──────────────────────► complete        ┌────► end, trailer X-Exit-Code: 0
//!     │  64 KiB, or 100 ms after the first byte    │
//!     ├──────────────────────────► streaming ──────┤
//!     │  another exit                              └────► broken off
//!     └──────────────────────────► CommandFailed   another exit
//! ```
//!
//! Everything runs within the task that polls the answer: no task, no thread and no channel stands between a call and its pipes.

use std::future::{Future, poll_fn};
use std::io;
use std::os::fd::OwnedFd;
use std::pin::{Pin, pin};
use std::task::{Context, Poll};
use std::time::Duration;

use ::http::header::{CONTENT_TYPE, HeaderName, HeaderValue, TRAILER};
use ::http::{HeaderMap, Response};
use bytes::{Buf, Bytes, BytesMut};
use funtainer_model::CallId;
use http_body::{Body, Frame};
use tokio::io::{AsyncReadExt, AsyncWrite};
use tokio::net::unix::pipe;
use tokio::time::Sleep;

use crate::{Answer, AnswerBody, BodyError, Call, CallBody, Exit, ExitFuture, ExitReport, InvokeError};

/// Output that is held back while the exit code may still come, in bytes: a whole pipe of the kernel's default size.
const HELD_BYTES_MAX: usize = 64 * 1024;
/// How long output is held back from its first byte on. People take a tenth of a second for immediate.
const HELD_TIME_MAX: Duration = Duration::from_millis(100);
/// Room for each read, in bytes: most answers of commands are shorter, long ones fill the kernel's pipe.
const READ_BYTES: [usize; 2] = [8 * 1024, 64 * 1024];
/// How much of the output is looked at to tell text from other bytes.
const SNIFFED_BYTES_MAX: usize = 1024;
/// Header or trailer that says the exit code.
const EXIT_CODE: HeaderName = HeaderName::from_static("x-exit-code");
const ZERO: HeaderValue = HeaderValue::from_static("0");

/// The daemon's ends of a command's standard input and output. No other copy may be kept: the end of the stream would never come.
#[derive(Debug)]
pub struct Streams {
    /// Write end.
    pub stdin: OwnedFd,
    /// Read end.
    pub stdout: OwnedFd,
}

/// Gives the call to a command that was just executed, and returns once its answer has begun. Needs a runtime with I/O and time.
/// Dropping the future or the answer closes the streams; ending the command is its owner's part.
pub async fn invoke(call: Call, streams: Streams, mut exit: ExitFuture) -> Result<Answer, InvokeError> {
    let Call { id, request } = call;
    let (stdin, stdout) = match open(streams) {
        Ok(pipes) => pipes,
        Err(source) => return Err(InvokeError::NotDelivered { call: Box::new(Call { id, request }), source }),
    };
    let mut output = Box::new(Output {
        id,
        input: Input::new(request.into_body(), stdin),
        stdout: Some(stdout),
        exit: Ended::Waiting(Box::pin(async move { ExitReport::of(&mut exit).await })),
        held: BytesMut::new(),
        finished: false,
    });
    let mut timer = None;
    let complete = poll_fn(|cx| output.poll_head(cx, &mut timer)).await?;
    Ok(Answer { response: respond(output, complete) })
}

/// A command's standard output after the head of its answer.
pub(crate) struct Output {
    id: CallId,
    input: Input,
    /// `None` after its end.
    stdout: Option<pipe::Receiver>,
    exit: Ended,
    /// Read, but not yet given on.
    held: BytesMut,
    /// Whether the last frame was given out.
    finished: bool,
}

enum Ended {
    Waiting(Pin<Box<dyn Future<Output = ExitReport> + Send + Sync>>),
    Known(ExitReport),
}

/// The way from the caller's body to standard input.
struct Input {
    body: CallBody,
    /// `None` once all was written, or once nobody reads.
    stdin: Option<pipe::Sender>,
    chunk: Bytes,
}

fn open(streams: Streams) -> io::Result<(pipe::Sender, pipe::Receiver)> {
    Ok((pipe::Sender::from_owned_fd(streams.stdin)?, pipe::Receiver::from_owned_fd(streams.stdout)?))
}

fn respond(mut output: Box<Output>, complete: bool) -> Response<AnswerBody> {
    let content_type = (!output.held.is_empty()).then(|| content_type(&output.held));
    let mut response = if complete {
        let mut response = Response::new(AnswerBody::full(output.held.split().freeze()));
        response.headers_mut().insert(EXIT_CODE, ZERO);
        response
    } else {
        let mut response = Response::new(AnswerBody::output(output));
        response.headers_mut().insert(TRAILER, HeaderValue::from_static("x-exit-code"));
        response
    };
    if let Some(content_type) = content_type {
        response.headers_mut().insert(CONTENT_TYPE, content_type);
    }
    response
}

/// Text is UTF-8 without the control characters that no text has.
fn content_type(start: &[u8]) -> HeaderValue {
    let start = &start[..start.len().min(SNIFFED_BYTES_MAX)];
    let utf8 = match std::str::from_utf8(start) {
        Ok(_) => true,
        // A character that is cut off at the end of what is looked at.
        Err(error) => error.error_len().is_none(),
    };
    let control = |byte: &u8| matches!(byte, 0x00..=0x08 | 0x0b | 0x0e..=0x1a | 0x1c..=0x1f | 0x7f);
    if utf8 && !start.iter().any(control) {
        HeaderValue::from_static("text/plain; charset=utf-8")
    } else {
        HeaderValue::from_static("application/octet-stream")
    }
}

impl Output {
    /// Until the head of the answer can be said: whether it is complete.
    fn poll_head(&mut self, cx: &mut Context<'_>, timer: &mut Option<Pin<Box<Sleep>>>) -> Poll<Result<bool, InvokeError>> {
        if let Poll::Ready(Err(error)) = self.input.poll(cx) {
            return Poll::Ready(Err(InvokeError::CallerGone(error.into())));
        }
        while self.held.len() < HELD_BYTES_MAX {
            match self.poll_read(cx) {
                Poll::Ready(Ok(0)) | Poll::Pending => break,
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Err(InvokeError::Broken(error.into()))),
            }
        }
        if let Some(report) = self.exit.poll(cx) {
            if report.exit != Exit::Code(0) {
                let ExitReport { exit, out_of_memory, writable_full, stderr_tail, .. } = report.clone();
                return Poll::Ready(Err(InvokeError::CommandFailed { exit, out_of_memory, writable_full, stderr_tail }));
            }
            if self.stdout.is_none() {
                return Poll::Ready(Ok(true));
            }
        }
        if self.held.len() >= HELD_BYTES_MAX {
            return Poll::Ready(Ok(false));
        }
        if !self.held.is_empty() {
            let timer = timer.get_or_insert_with(|| Box::pin(tokio::time::sleep(HELD_TIME_MAX)));
            return timer.as_mut().poll(cx).map(|()| Ok(false));
        }
        Poll::Pending
    }

    /// The next part of the body.
    pub(crate) fn poll_frame(&mut self, cx: &mut Context<'_>) -> Poll<Option<Result<Frame<Bytes>, BodyError>>> {
        if self.finished {
            return Poll::Ready(None);
        }
        if let Poll::Ready(Err(error)) = self.input.poll(cx) {
            self.finished = true;
            return Poll::Ready(Some(Err(error)));
        }
        if self.held.is_empty() {
            match self.poll_read(cx) {
                Poll::Ready(Ok(_)) => {}
                Poll::Ready(Err(error)) => return Poll::Ready(Some(Err(BodyError::Io(error)))),
                Poll::Pending => return Poll::Pending,
            }
        }
        if !self.held.is_empty() {
            return Poll::Ready(Some(Ok(Frame::data(self.held.split().freeze()))));
        }
        let Some(report) = self.exit.poll(cx) else { return Poll::Pending };
        self.finished = true;
        Poll::Ready(Some(match report.exit {
            Exit::Code(0) => Ok(Frame::trailers(HeaderMap::from_iter([(EXIT_CODE, ZERO)]))),
            exit => {
                tracing::warn!(call = %self.id, ?exit, out_of_memory = report.out_of_memory, "the command failed within its answer");
                Err(BodyError::CommandFailed(exit))
            }
        }))
    }

    pub(crate) fn is_end_stream(&self) -> bool {
        self.finished
    }

    /// Appends to `held`; 0 at the end of the output, and again after it.
    fn poll_read(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<usize>> {
        let Some(stdout) = &mut self.stdout else { return Poll::Ready(Ok(0)) };
        if self.held.capacity() == self.held.len() {
            self.held.reserve(if self.held.is_empty() { READ_BYTES[0] } else { READ_BYTES[1] });
        }
        let read = pin!(stdout.read_buf(&mut self.held)).poll(cx);
        if matches!(read, Poll::Ready(Ok(0))) {
            self.stdout = None;
        }
        read
    }
}

impl Ended {
    fn poll(&mut self, cx: &mut Context<'_>) -> Option<&ExitReport> {
        if let Self::Waiting(future) = self {
            match future.as_mut().poll(cx) {
                Poll::Ready(report) => *self = Self::Known(report),
                Poll::Pending => return None,
            }
        }
        match self {
            Self::Known(report) => Some(report),
            Self::Waiting(_) => None,
        }
    }
}

impl Input {
    fn new(body: CallBody, stdin: pipe::Sender) -> Self {
        let stdin = (!body.is_end_stream()).then_some(stdin);
        Self { body, stdin, chunk: Bytes::new() }
    }

    /// Ready once standard input is closed. A command that does not read to the end is none at fault: many never do.
    fn poll(&mut self, cx: &mut Context<'_>) -> Poll<Result<(), BodyError>> {
        while let Some(stdin) = &mut self.stdin {
            if self.chunk.is_empty() {
                match Pin::new(&mut self.body).poll_frame(cx) {
                    Poll::Ready(Some(Ok(frame))) => self.chunk = frame.into_data().unwrap_or_default(),
                    Poll::Ready(Some(Err(error))) => return Poll::Ready(Err(error)),
                    Poll::Ready(None) => self.close(),
                    Poll::Pending => return Poll::Pending,
                }
                continue;
            }
            match Pin::new(stdin).poll_write(cx, &self.chunk) {
                Poll::Ready(Ok(written)) => self.chunk.advance(written),
                Poll::Ready(Err(error)) if error.kind() == io::ErrorKind::BrokenPipe => self.close(),
                Poll::Ready(Err(error)) => return Poll::Ready(Err(BodyError::Io(error))),
                Poll::Pending => return Poll::Pending,
            }
        }
        Poll::Ready(Ok(()))
    }

    fn close(&mut self) {
        self.stdin = None;
        self.body = CallBody::Empty;
        self.chunk = Bytes::new();
    }
}

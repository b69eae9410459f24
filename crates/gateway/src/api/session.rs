//! What `run` and `exec` have in common: an upgraded connection on which a client speaks with a command.

use std::collections::VecDeque;
use std::future::pending;
use std::io;
use std::pin::pin;
use std::time::Duration;

use axum::response::{IntoResponse, Response};
use bytes::{Buf, Bytes, BytesMut};
use funtainer_contract::terminal::{END_OF_INPUT, Terminal};
use funtainer_contract::{Exit, ExitFuture, ExitReport};
use funtainer_engine::{CommandHandle, CommandStreams, Errors, Signals};
use funtainer_model::{ErrorCode, Failure};
use http::header::{CONNECTION, HeaderMap, HeaderValue, UPGRADE};
use http::{Method, StatusCode};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use super::frames::{FRAME_BYTES_MAX, Frame, FrameError, FrameReader, RunEnd};
use crate::rescue::{Occasion, Problem};
use crate::server::TunnelStream;

/// How long the rest of the output may take after the command is reaped: what it left behind may hold the streams open.
const REST_TIME: Duration = Duration::from_secs(1);
/// Input that waits for a command which does not read it. So far signals behind it are still heard.
const INPUT_WAITING_BYTES_MAX: usize = 256 * 1024;

/// Whether the request asks for an upgrade to this protocol.
pub(super) fn asks_for(protocol: &str, method: &Method, headers: &HeaderMap) -> bool {
    let names = |name: &http::HeaderName, what: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.split(',').any(|one| one.trim().eq_ignore_ascii_case(what)))
    };
    *method == Method::POST && names(&CONNECTION, "upgrade") && names(&UPGRADE, protocol)
}

/// The answer after which frames are spoken.
pub(super) fn switching(protocol: &'static str) -> Response {
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static(protocol));
    response
}

/// Why a conversation ends.
pub(super) enum Ended {
    /// The command has.
    Command(RunEnd),
    /// The client is gone, or said something wrong.
    Connection(FrameError),
}

impl From<io::Error> for Ended {
    fn from(error: io::Error) -> Self {
        Self::Connection(error.into())
    }
}

impl From<&Failure> for Ended {
    fn from(failure: &Failure) -> Self {
        Self::Command(RunEnd::Failed(Problem::new(failure, Occasion::Admin, None)))
    }
}

/// The half of a connection by which the server speaks.
pub(super) type Writer = Box<dyn AsyncWrite + Send + Unpin>;

/// Starts the command and speaks with the client until one of them has ended. What is left of the command ends with its handle.
/// `start` gives the writer back.
pub(super) async fn converse<F>(stream: TunnelStream, start: impl FnOnce(Writer) -> F)
where
    F: Future<Output = (Writer, Result<CommandHandle, Ended>)>,
{
    let TunnelStream { early, reader, writer, gone } = stream;
    let mut frames = FrameReader::new(&early, reader);
    let conversation = async {
        let (mut writer, started) = tokio::select! {
            started = start(writer) => started,
            error = frames.broken() => return Err(error),
        };
        let ended = match started {
            Ok(handle) => {
                writer.write_all(&Frame::Begun.encode()).await?;
                speak(handle, &mut frames, &mut writer).await
            }
            Err(ended) => ended,
        };
        match ended {
            Ended::Command(end) => {
                writer.write_all(&Frame::End(end).encode()).await?;
                Ok(writer.shutdown().await?)
            }
            Ended::Connection(error) => Err(error),
        }
    };
    let ended = tokio::select! {
        biased;
        ended = conversation => ended,
        // Also where nothing is read or written: the command neither reads nor says anything.
        () = gone => Err(io::Error::from(io::ErrorKind::UnexpectedEof).into()),
    };
    if let Err(error) = ended {
        tracing::debug!(%error, "a client is gone: its command ends");
    }
}

/// Speaks until the end of the command is known and its output has ended.
async fn speak<R, W>(mut handle: CommandHandle, frames: &mut FrameReader<R>, writer: &mut W) -> Ended
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let CommandHandle { streams, exit, signals, .. } = &mut handle;
    match streams {
        CommandStreams::Terminal(terminal) => {
            let input = feed(frames, Input::new(Sink::Terminal(terminal)), signals);
            relay(input, [Output::of(Source::Terminal(terminal)), Output::none()], exit, writer).await
        }
        CommandStreams::Pipes { stdin, stdout, stderr } => {
            let input = feed(frames, Input::new(Sink::Pipe(stdin.take())), signals);
            let stdout = stdout.as_mut().map_or_else(Output::none, |pipe| Output::of(Source::Pipe(pipe)));
            let stderr = Output::of(match stderr {
                Errors::Pipe(pipe) => Source::Pipe(pipe),
                Errors::Log(chunks) => Source::Log(chunks),
            });
            relay(input, [stdout, stderr], exit, writer).await
        }
    }
}

/// Sends on what the command says, standard output and standard error, while `input` is carried the other way.
async fn relay<W: AsyncWrite + Unpin>(
    input: impl Future<Output = FrameError>,
    [mut stdout, mut stderr]: [Output<'_>; 2],
    exit: &mut ExitFuture,
    writer: &mut W,
) -> Ended {
    let mut input = pin!(input);
    let mut report: Option<ExitReport> = None;
    let mut rest = pin!(tokio::time::sleep(Duration::MAX));
    loop {
        if let Some(report) = &report
            && stdout.has_ended()
            && stderr.has_ended()
        {
            return end_of(report);
        }
        let (bytes, make): (_, fn(Bytes) -> Frame) = tokio::select! {
            error = &mut input => return Ended::Connection(error),
            bytes = stdout.next() => (bytes, Frame::Stdout),
            bytes = stderr.next() => (bytes, Frame::Stderr),
            ended = ExitReport::of(exit), if report.is_none() => {
                report = Some(ended);
                rest.as_mut().reset(tokio::time::Instant::now() + REST_TIME);
                continue;
            },
            () = &mut rest => {
                (stdout, stderr) = (Output::none(), Output::none());
                continue;
            },
        };
        let mut bytes = bytes;
        while !bytes.is_empty() {
            let piece = bytes.split_to(bytes.len().min(FRAME_BYTES_MAX));
            if let Err(error) = writer.write_all(&make(piece).encode()).await {
                return error.into();
            }
        }
    }
}

/// Where something that the command says comes from.
enum Source<'a> {
    Pipe(&'a mut pipe::Receiver),
    Log(&'a mut mpsc::Receiver<Bytes>),
    Terminal(&'a Terminal),
}

/// One of a command's outputs, `None` after its end.
struct Output<'a> {
    source: Option<Source<'a>>,
    buffer: BytesMut,
}

impl<'a> Output<'a> {
    fn of(source: Source<'a>) -> Self {
        Self { source: Some(source), buffer: BytesMut::new() }
    }

    fn none() -> Self {
        Self { source: None, buffer: BytesMut::new() }
    }

    fn has_ended(&self) -> bool {
        self.source.is_none()
    }

    /// The next bytes, none at the end; never after it. Can be dropped without loss.
    async fn next(&mut self) -> Bytes {
        let read = match &mut self.source {
            None => pending().await,
            Some(Source::Log(chunks)) => match chunks.recv().await {
                Some(bytes) => return bytes,
                None => 0,
            },
            Some(Source::Pipe(pipe)) => {
                self.buffer.reserve(FRAME_BYTES_MAX);
                pipe.take(FRAME_BYTES_MAX as u64).read_buf(&mut self.buffer).await.unwrap_or(0)
            }
            Some(Source::Terminal(terminal)) => terminal.read(&mut self.buffer).await.unwrap_or(0),
        };
        if read == 0 {
            self.source = None;
        }
        self.buffer.split().freeze()
    }
}

/// Gives the client's input, signals and sizes to the command. Ends only when the client is gone: a command that reads no more is not the
/// client's fault.
async fn feed<R: AsyncRead + Unpin>(frames: &mut FrameReader<R>, mut input: Input<'_>, signals: &Signals) -> FrameError {
    loop {
        let frame = tokio::select! {
            frame = frames.next(), if input.has_room() => frame,
            () = input.write(), if !input.waiting.is_empty() => continue,
        };
        match frame {
            Ok(Some(Frame::Stdin(bytes))) => input.push(bytes),
            Ok(Some(Frame::StdinEnd)) => input.end(),
            Ok(Some(Frame::Resize(size))) => {
                if let Sink::Terminal(terminal) = &input.sink
                    && let Err(error) = terminal.resize(size)
                {
                    tracing::debug!(%error, "a terminal keeps its size");
                }
            }
            Ok(Some(Frame::Signal(signal))) => signals.send(signal).await,
            Ok(Some(frame)) => return FrameError::Kind(frame.kind()),
            Ok(None) => return io::Error::from(io::ErrorKind::UnexpectedEof).into(),
            Err(error) => return error,
        }
    }
}

/// Where the client's input goes.
enum Sink<'a> {
    /// `None` once it is closed, by whom ever.
    Pipe(Option<pipe::Sender>),
    Terminal(&'a Terminal),
}

/// The way of the client's input.
struct Input<'a> {
    sink: Sink<'a>,
    waiting: VecDeque<Bytes>,
    bytes: usize,
    /// The client has no more.
    ends: bool,
}

impl<'a> Input<'a> {
    fn new(sink: Sink<'a>) -> Self {
        Self { sink, waiting: VecDeque::new(), bytes: 0, ends: false }
    }

    fn has_room(&self) -> bool {
        self.bytes < INPUT_WAITING_BYTES_MAX
    }

    fn push(&mut self, bytes: Bytes) {
        if !bytes.is_empty() && !self.ends && !matches!(self.sink, Sink::Pipe(None)) {
            self.bytes += bytes.len();
            self.waiting.push_back(bytes);
        }
    }

    fn end(&mut self) {
        if let Sink::Terminal(_) = self.sink {
            self.push(Bytes::from_static(&[END_OF_INPUT]));
        }
        self.ends = true;
        self.close_at_end();
    }

    /// Writes some of what waits. Can be dropped without loss.
    async fn write(&mut self) {
        let Some(first) = self.waiting.front_mut() else { return };
        let written = match &mut self.sink {
            Sink::Pipe(None) => Ok(first.len()),
            Sink::Pipe(Some(pipe)) => pipe.write(first).await,
            Sink::Terminal(terminal) => terminal.write(first).await,
        };
        if let Ok(written) = written {
            first.advance(written);
            self.bytes -= written;
            if first.is_empty() {
                self.waiting.pop_front();
            }
            self.close_at_end();
        } else {
            // Nobody reads it any more.
            self.waiting.clear();
            self.bytes = 0;
            if let Sink::Pipe(pipe) = &mut self.sink {
                *pipe = None;
            }
        }
    }

    fn close_at_end(&mut self) {
        if let Sink::Pipe(pipe) = &mut self.sink
            && self.ends
            && self.waiting.is_empty()
        {
            *pipe = None;
        }
    }
}

fn end_of(report: &ExitReport) -> Ended {
    Ended::Command(match report.exit {
        _ if report.out_of_memory => RunEnd::OutOfMemory,
        Exit::Code(code) => RunEnd::Code(code),
        Exit::Signal(signal) => RunEnd::Signal(signal),
        Exit::Lost => {
            let failure = Failure::new(ErrorCode::SandboxFailed, "the command ended together with its sandbox");
            return Ended::from(&failure);
        }
    })
}

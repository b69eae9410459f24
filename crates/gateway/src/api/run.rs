//! `POST /run`: one command, once, with its standard streams.
//!
//! The request has the headers `Connection: upgrade` and `Upgrade: funtainer-run` and a [`RunRequest`] as its body.
//! The answer is `101 Switching Protocols`, or an error as everywhere. After it, both sides send frames:
//!
//! ```text
//! ┌────────┬──────────────────┬──────────────┐
//! │ kind   │ length           │ payload      │
//! │ u8     │ u32, big endian  │ length bytes │   at most 64 KiB
//! └────────┴──────────────────┴──────────────┘
//!
//!  kind                 from     payload
//!   1  standard input   client   bytes
//!   2  end of input     client   none
//!  16  standard output  server   bytes
//!  17  standard error   server   bytes
//!  18  progress         server   JSON of `funtainer_engine::backend::Progress`
//!  19  end              server   JSON of [`RunEnd`], the last frame
//! ```
//!
//! A client that breaks the connection ends the command. Another kind, or a longer frame, breaks the connection.

use std::future::pending;
use std::io;
use std::pin::pin;
use std::sync::Arc;
use std::time::Duration;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::{IntoResponse, Response};
use bytes::{Buf, BufMut, Bytes, BytesMut};
use funtainer_contract::{Exit, ExitFuture, ExitReport};
use funtainer_engine::backend::Progress;
use funtainer_engine::{Engine, RunHandle};
use funtainer_model::{ErrorCode, Failure, FunctionSpec};
use http::header::{CONNECTION, HeaderMap, HeaderValue, UPGRADE};
use http::{Method, StatusCode};
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::sync::mpsc;

use super::Failed;
use super::native::{RunRequest, body_json};
use crate::rescue::{Occasion, Problem};
use crate::server::{TunnelSlot, TunnelStream};

/// Name of the protocol in `Upgrade`.
pub const PROTOCOL: &str = "funtainer-run";
/// Most bytes of a frame's payload.
pub const FRAME_BYTES_MAX: usize = 64 * 1024;

/// Kind and length.
const FRAME_HEAD_BYTES: usize = 5;
/// Progress that waits for a slow reader; more is left out.
const PROGRESS_WAITING_MAX: usize = 16;
/// How long the rest of standard error may take after the command is reaped.
const STDERR_REST_TIME: Duration = Duration::from_secs(1);

/// A piece of the conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// For the command's standard input.
    Stdin(Bytes),
    /// No more of it comes.
    StdinEnd,
    /// From its standard output.
    Stdout(Bytes),
    /// From its standard error.
    Stderr(Bytes),
    /// What is being done before the command runs.
    Progress(Progress),
    /// How it ended.
    End(RunEnd),
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunEnd {
    /// By exit(2).
    Code(u8),
    /// By this signal.
    Signal(u8),
    /// By the kernel, for its memory.
    OutOfMemory,
    /// It did not run, or nobody knows how it ended.
    Failed(Problem),
}

/// Bytes that are no frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// No such kind.
    #[error("{0} is no kind of frame")]
    Kind(u8),
    /// Too long.
    #[error("a frame has {0} bytes, at most {FRAME_BYTES_MAX} are allowed")]
    TooLong(u32),
    /// An end of input with payload, or a payload that is not the JSON it should be.
    #[error("a frame of kind {0} has another payload than it should")]
    Payload(u8),
    /// The connection broke off.
    #[error("the connection broke off")]
    Io(#[from] io::Error),
}

/// Reads frames. A future of [`FrameReader::next`] can be dropped without loss.
#[derive(Debug)]
pub struct FrameReader<R> {
    reader: R,
    buffer: BytesMut,
}

impl Frame {
    /// The bytes of the frame.
    pub fn encode(&self) -> Bytes {
        let payload = match self {
            Self::Stdin(bytes) | Self::Stdout(bytes) | Self::Stderr(bytes) => bytes.clone(),
            Self::StdinEnd => Bytes::new(),
            Self::Progress(progress) => json(progress),
            Self::End(end) => json(end),
        };
        let mut frame = BytesMut::with_capacity(FRAME_HEAD_BYTES + payload.len());
        frame.put_u8(self.kind());
        frame.put_u32(payload.len() as u32);
        frame.put_slice(&payload);
        frame.freeze()
    }

    const fn kind(&self) -> u8 {
        match self {
            Self::Stdin(_) => 1,
            Self::StdinEnd => 2,
            Self::Stdout(_) => 16,
            Self::Stderr(_) => 17,
            Self::Progress(_) => 18,
            Self::End(_) => 19,
        }
    }

    /// Takes a frame from the start of `buffer` if it is there whole.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        let Some(mut head) = buffer.get(..FRAME_HEAD_BYTES) else { return Ok(None) };
        let (kind, length) = (head.get_u8(), head.get_u32());
        if !matches!(kind, 1 | 2 | 16..=19) {
            return Err(FrameError::Kind(kind));
        }
        if length as usize > FRAME_BYTES_MAX {
            return Err(FrameError::TooLong(length));
        }
        if buffer.len() < FRAME_HEAD_BYTES + length as usize {
            return Ok(None);
        }
        buffer.advance(FRAME_HEAD_BYTES);
        let payload = buffer.split_to(length as usize).freeze();
        let wrong = || FrameError::Payload(kind);
        Ok(Some(match kind {
            1 => Self::Stdin(payload),
            2 if payload.is_empty() => Self::StdinEnd,
            16 => Self::Stdout(payload),
            17 => Self::Stderr(payload),
            18 => Self::Progress(serde_json::from_slice(&payload).map_err(|_| wrong())?),
            19 => Self::End(serde_json::from_slice(&payload).map_err(|_| wrong())?),
            _ => return Err(wrong()),
        }))
    }
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Waits until the connection breaks, and keeps what comes meanwhile, up to a frame; more stays with the client.
    async fn broken(&mut self) -> FrameError {
        while self.buffer.len() < FRAME_BYTES_MAX {
            match self.reader.read_buf(&mut self.buffer).await {
                Ok(0) => return io::Error::from(io::ErrorKind::UnexpectedEof).into(),
                Ok(_) => {}
                Err(error) => return error.into(),
            }
        }
        pending().await
    }

    /// Reads from `reader`, behind what was already read.
    pub fn new(already: &[u8], reader: R) -> Self {
        Self { reader, buffer: already.into() }
    }

    /// The next frame; `None` at a clean end.
    pub async fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if let Some(frame) = Frame::decode(&mut self.buffer)? {
                return Ok(Some(frame));
            }
            self.buffer.reserve(FRAME_HEAD_BYTES + FRAME_BYTES_MAX);
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
                };
            }
        }
    }
}

pub(super) async fn run(
    State(engine): State<Arc<Engine>>,
    Extension(slot): Extension<TunnelSlot>,
    request: Request,
) -> Result<Response, Failed> {
    if !asks_for_upgrade(request.method(), request.headers()) {
        let detail = format!("/run needs the headers 'Connection: upgrade' and 'Upgrade: {PROTOCOL}'");
        return Err(Failure::new(ErrorCode::BadRequest, detail).with_hint("use `funtainer run`").into());
    }
    let spec = body_json::<RunRequest>(request.into_body()).await?.spec()?;
    slot.put(Box::new(move |stream| Box::pin(converse(engine, spec, stream))));
    let mut response = StatusCode::SWITCHING_PROTOCOLS.into_response();
    response.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    response.headers_mut().insert(UPGRADE, HeaderValue::from_static(PROTOCOL));
    Ok(response)
}

fn asks_for_upgrade(method: &Method, headers: &HeaderMap) -> bool {
    let names = |name: &http::HeaderName, what: &str| {
        headers
            .get_all(name)
            .iter()
            .filter_map(|value| value.to_str().ok())
            .any(|value| value.split(',').any(|one| one.trim().eq_ignore_ascii_case(what)))
    };
    *method == Method::POST && names(&CONNECTION, "upgrade") && names(&UPGRADE, PROTOCOL)
}

/// Why a conversation ends.
enum Ended {
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

/// Runs the command and speaks with the client until one of them has ended. What is left of the command ends with the handle.
async fn converse(engine: Arc<Engine>, spec: FunctionSpec, stream: TunnelStream) {
    let TunnelStream { early, reader, mut writer } = stream;
    let mut frames = FrameReader::new(&early, reader);
    let started = tokio::select! {
        started = start(&engine, spec, &mut writer) => started,
        error = frames.broken() => Err(Ended::Connection(error)),
    };
    let ended = match started {
        Ok(handle) => speak(handle, &mut frames, &mut writer).await,
        Err(ended) => ended,
    };
    match ended {
        Ended::Command(end) => {
            if let Err(error) = writer.write_all(&Frame::End(end).encode()).await {
                tracing::debug!(%error, "the client of a run did not wait for its end");
            }
        }
        Ended::Connection(error) => tracing::debug!(%error, "the client of a run is gone: its command ends"),
    }
    let _ = writer.shutdown().await;
}

async fn start<W: AsyncWrite + Unpin>(engine: &Engine, spec: FunctionSpec, writer: &mut W) -> Result<RunHandle, Ended> {
    let (sink, mut progress) = mpsc::channel(PROGRESS_WAITING_MAX);
    let mut starting = pin!(engine.run(spec, sink));
    loop {
        tokio::select! {
            biased;
            Some(step) = progress.recv() => writer.write_all(&Frame::Progress(step).encode()).await?,
            started = &mut starting => return started.map_err(|failure| failed(&failure)),
        }
    }
}

async fn speak<R, W>(mut handle: RunHandle, frames: &mut FrameReader<R>, writer: &mut W) -> Ended
where
    R: AsyncRead + Unpin,
    W: AsyncWrite + Unpin,
{
    let mut input = pin!(feed(frames, handle.stdin.take()));
    let mut stdout = handle.stdout.take();
    let mut stderr_open = true;
    let mut report: Option<ExitReport> = None;
    let mut rest = pin!(tokio::time::sleep(Duration::MAX));
    let mut buffer = BytesMut::new();
    loop {
        if let Some(report) = &report
            && stdout.is_none()
            && !stderr_open
        {
            return end_of(report);
        }
        buffer.reserve(FRAME_BYTES_MAX);
        let frame = tokio::select! {
            error = &mut input => return Ended::Connection(error),
            read = read_some(stdout.as_mut(), &mut buffer) => match read {
                Ok(0) | Err(_) => {
                    stdout = None;
                    continue;
                }
                Ok(_) => Frame::Stdout(buffer.split().freeze()),
            },
            bytes = handle.stderr.recv(), if stderr_open => {
                let Some(bytes) = bytes else {
                    stderr_open = false;
                    continue;
                };
                Frame::Stderr(bytes)
            }
            exit = reaped(&mut handle.exit), if report.is_none() => {
                report = Some(exit);
                rest.as_mut().reset(tokio::time::Instant::now() + STDERR_REST_TIME);
                continue;
            },
            () = &mut rest => {
                (stdout, stderr_open) = (None, false);
                continue;
            },
        };
        if let Err(error) = write_split(&frame, writer).await {
            return Ended::Connection(error.into());
        }
    }
}

/// Gives the client's input to the command. Ends only when the client is gone: a command that reads no more is not the client's fault.
async fn feed<R: AsyncRead + Unpin>(frames: &mut FrameReader<R>, mut stdin: Option<pipe::Sender>) -> FrameError {
    loop {
        match frames.next().await {
            Ok(Some(Frame::Stdin(bytes))) => {
                if let Some(pipe) = &mut stdin
                    && pipe.write_all(&bytes).await.is_err()
                {
                    stdin = None;
                }
            }
            Ok(Some(Frame::StdinEnd)) => stdin = None,
            Ok(Some(frame)) => return FrameError::Kind(frame.kind()),
            Ok(None) => return io::Error::from(io::ErrorKind::UnexpectedEof).into(),
            Err(error) => return error,
        }
    }
}

async fn read_some(pipe: Option<&mut pipe::Receiver>, buffer: &mut BytesMut) -> io::Result<usize> {
    match pipe {
        Some(pipe) => pipe.take(FRAME_BYTES_MAX as u64).read_buf(buffer).await,
        None => pending().await,
    }
}

async fn reaped(exit: &mut ExitFuture) -> ExitReport {
    match exit.wait_for(Option::is_some).await.as_deref() {
        Ok(Some(report)) => report.clone(),
        _ => ExitReport {
            exit: Exit::Lost,
            out_of_memory: false,
            writable_full: false,
            memory_peak: None,
            cpu_us: None,
            stderr_tail: Bytes::new(),
        },
    }
}

/// Writes output in frames of at most [`FRAME_BYTES_MAX`].
async fn write_split<W: AsyncWrite + Unpin>(frame: &Frame, writer: &mut W) -> io::Result<()> {
    let (bytes, make): (_, fn(Bytes) -> Frame) = match frame {
        Frame::Stderr(bytes) if bytes.len() > FRAME_BYTES_MAX => (bytes, Frame::Stderr),
        frame => return writer.write_all(&frame.encode()).await,
    };
    let mut bytes = bytes.clone();
    while !bytes.is_empty() {
        let piece = bytes.split_to(bytes.len().min(FRAME_BYTES_MAX));
        writer.write_all(&make(piece).encode()).await?;
    }
    Ok(())
}

fn end_of(report: &ExitReport) -> Ended {
    Ended::Command(match report.exit {
        _ if report.out_of_memory => RunEnd::OutOfMemory,
        Exit::Code(code) => RunEnd::Code(code),
        Exit::Signal(signal) => RunEnd::Signal(signal),
        Exit::Lost => {
            let failure = Failure::new(ErrorCode::SandboxFailed, "the command ended together with its sandbox");
            return failed(&failure);
        }
    })
}

fn failed(failure: &Failure) -> Ended {
    Ended::Command(RunEnd::Failed(Problem::new(failure, Occasion::Admin, None)))
}

fn json(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value).expect("own shapes are always JSON").into()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn frames_round_trip_in_pieces() {
        let frames = [
            Frame::Stdin(Bytes::from_static(b"in")),
            Frame::StdinEnd,
            Frame::Stdout(Bytes::new()),
            Frame::Stderr(Bytes::from(vec![0; FRAME_BYTES_MAX])),
            Frame::Progress(Progress::Starting),
            Frame::End(RunEnd::Code(3)),
            Frame::End(RunEnd::Failed(Problem::new(&Failure::new(ErrorCode::Internal, "x"), Occasion::Admin, None))),
        ];
        let bytes: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
        let (mut near, far) = tokio::io::duplex(7);
        let (already, rest) = bytes.split_at(3);
        let rest = rest.to_vec();
        let writing = tokio::spawn(async move { near.write_all(&rest).await });
        let mut reader = FrameReader::new(already, far);
        for frame in frames {
            assert_eq!(reader.next().await.unwrap(), Some(frame));
        }
        writing.await.unwrap().unwrap();
        assert_eq!(reader.next().await.unwrap(), None);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let decode = |bytes: &[u8]| Frame::decode(&mut bytes.into());
        assert!(matches!(decode(&[0, 0, 0, 0, 0]), Err(FrameError::Kind(0))));
        assert!(matches!(decode(&[1, 0, 1, 0, 1]), Err(FrameError::TooLong(65537))));
        assert!(matches!(decode(&[2, 0, 0, 0, 1, 7]), Err(FrameError::Payload(2))));
        assert!(matches!(decode(&[19, 0, 0, 0, 1, b'{']), Err(FrameError::Payload(19))));
        assert!(matches!(decode(&[1, 0, 0, 0, 2, 7]), Ok(None)));
        assert!(matches!(decode(&[1, 0]), Ok(None)));
    }

    #[tokio::test]
    async fn a_frame_that_breaks_off_is_an_error() {
        assert!(matches!(FrameReader::new(&[1, 0, 0, 0, 2, 7], tokio::io::empty()).next().await, Err(FrameError::Io(_))));
    }
}

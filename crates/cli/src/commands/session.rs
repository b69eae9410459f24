//! A command that this process's standard streams belong to, as long as it runs: what `run` and `exec` have in common.
//!
//! ```text
//! request, upgraded ─► progress ─► begun ─┬─ input, sizes and signals ─►
//!                                         └◄─ output ─ end: exit code
//! ```
//! Whatever happens, the terminal has its mode back before anything else is said.

use std::future::poll_fn;
use std::process::ExitCode;
use std::task::Poll;

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use funtainer_engine::backend::Progress;
use funtainer_gateway::api::frames::{FRAME_BYTES_MAX, Frame, FrameReader, RunEnd};
use funtainer_model::{ErrorCode, StopSignal};
use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::signal::unix::{Signal, SignalKind, signal};
use tokio::sync::mpsc;
use tokio::task::JoinSet;

use crate::args::Host;
use crate::client::{self, Body};
use crate::failure::{Failed, Unable};
use crate::progress::Show;
use crate::streams;
use crate::terminal::{self, Raw};

/// The platform failed.
const EXIT_PLATFORM: u8 = 125;
/// The command cannot be executed.
const EXIT_NOT_EXECUTABLE: u8 = 126;
/// The command is not in the image.
const EXIT_NOT_FOUND: u8 = 127;
/// Added to the number of the signal that killed the command.
const EXIT_SIGNAL: u8 = 128;
/// SIGKILL, by which the kernel ends what uses too much memory.
const KILL: u8 = 9;
/// So many requests to end that the command withstands end it.
const PATIENCE: u32 = 3;
/// Frames between their makers and the connection.
const FRAMES_WAITING_MAX: usize = 2;

/// What the command gets of this process.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Streams {
    /// Standard input; else it is empty.
    pub(super) input: bool,
    /// A terminal.
    pub(super) terminal: bool,
}

impl Streams {
    /// Whether this process has what the command shall get.
    pub(super) fn check(self) -> anyhow::Result<()> {
        if self.terminal && self.input && !terminal::is_here() {
            let hint = "leave -t out: what is piped in is no terminal";
            return Err(Unable { what: "standard input is no terminal".to_owned(), hint }.into());
        }
        Ok(())
    }
}

/// Asks for the command and speaks with it until its end.
pub(super) async fn hold(
    host: &Host,
    mut request: Request<Body>,
    protocol: &'static str,
    streams: Streams,
    show: Show,
) -> anyhow::Result<ExitCode> {
    // Before the command runs: none of them may end this process before it has put the terminal in order.
    let signals = Signals::listen(streams)?;
    request.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    request.headers_mut().insert(UPGRADE, HeaderValue::from_static(protocol));
    let session = async {
        let answer = client::checked(client::send(host, request).await?).await?;
        anyhow::ensure!(
            answer.status() == StatusCode::SWITCHING_PROTOCOLS,
            "the server answered with status {}",
            answer.status()
        );
        let stream = hyper::upgrade::on(answer).await.context("the server broke the connection off")?;
        Ok(tokio::io::split(TokioIo::new(stream)))
    };
    let mut signals = signals;
    let (reader, writer) = tokio::select! {
        session = session => session?,
        number = signals.next_ending() => return Ok((EXIT_SIGNAL + number).into()),
    };
    let ended = Session::begin(writer, streams, show).speak(FrameReader::new(&[], reader), signals).await;
    match ended? {
        Ended::Command(end) => exit_code(end),
        Ended::Signal(number) => Ok((EXIT_SIGNAL + number).into()),
    }
}

/// How a session ends.
enum Ended {
    /// With its command.
    Command(RunEnd),
    /// By a signal to this process, which leaves its command to the server to end.
    Signal(u8),
}

struct Session {
    streams: Streams,
    show: Show,
    frames: mpsc::Sender<Frame>,
    /// The terminal's mode, once the command runs.
    raw: Option<Raw>,
    begun: bool,
    /// Requests to end that were passed on.
    asked: u32,
    /// Ends with this.
    tasks: JoinSet<()>,
}

impl Session {
    fn begin(writer: impl AsyncWrite + Send + Unpin + 'static, streams: Streams, show: Show) -> Self {
        let (frames, waiting) = mpsc::channel(FRAMES_WAITING_MAX);
        let mut tasks = JoinSet::new();
        tasks.spawn(send(waiting, writer));
        Self { streams, show, frames, raw: None, begun: false, asked: 0, tasks }
    }

    async fn speak(mut self, mut frames: FrameReader<impl AsyncRead + Unpin>, mut signals: Signals) -> anyhow::Result<Ended> {
        let (mut stdout, mut stderr) = (streams::stdout()?, streams::stderr()?);
        loop {
            let frame = tokio::select! {
                frame = frames.next() => frame.context("the connection to the server is broken")?,
                signal = signals.next() => match self.signalled(signal)? {
                    Some(ended) => return Ok(ended),
                    None => continue,
                },
            };
            match frame {
                Some(Frame::Begun) => self.command_begins()?,
                Some(Frame::Stdout(bytes)) => {
                    self.show.end();
                    streams::bytes(&mut stdout, &bytes).await?;
                }
                Some(Frame::Stderr(bytes)) => {
                    self.show.end();
                    streams::bytes(&mut stderr, &bytes).await?;
                }
                // What the command itself says is not to drown in what is no news.
                Some(Frame::Progress(step)) if matches!(step, Progress::Layer { .. } | Progress::Warning { .. }) => {
                    self.show.step(&step);
                }
                Some(Frame::Progress(_)) => {}
                Some(Frame::End(end)) => return Ok(Ended::Command(end)),
                Some(Frame::Stdin(_) | Frame::StdinEnd | Frame::Resize(_) | Frame::Signal(_)) => {
                    anyhow::bail!("the server sent what only clients send")
                }
                None => anyhow::bail!("the server broke the connection off before the command's end"),
            }
        }
    }

    fn command_begins(&mut self) -> anyhow::Result<()> {
        self.begun = true;
        self.show.end();
        if self.streams.terminal && self.streams.input {
            self.raw = Some(Raw::enter().context("the terminal cannot be set to pass every key on")?);
            // It may have changed since it was asked for.
            self.tell(Frame::Resize(terminal::size()));
        }
        let frames = self.frames.clone();
        if self.streams.input {
            self.tasks.spawn(read_input(frames));
        } else if !self.streams.terminal {
            self.tell(Frame::StdinEnd);
        }
        Ok(())
    }

    /// What a signal to this process means; `Some` ends the session.
    fn signalled(&mut self, signal: Signalled) -> anyhow::Result<Option<Ended>> {
        match signal {
            Signalled::Resized => self.tell(Frame::Resize(terminal::size())),
            Signalled::Suspended => {
                self.raw = None;
                // Until it is continued.
                rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::STOP)?;
                if self.begun && self.streams.input {
                    self.raw = Some(Raw::enter().context("the terminal cannot be set to pass every key on")?);
                }
                self.tell(Frame::Resize(terminal::size()));
            }
            // Whoever looked on is gone.
            Signalled::Asked(number) if !self.begun || number == libc_number(SignalKind::hangup()) => {
                return Ok(Some(Ended::Signal(number)));
            }
            Signalled::Asked(number) => {
                if [SignalKind::interrupt(), SignalKind::terminate()].map(libc_number).contains(&number) {
                    self.asked += 1;
                    if self.asked >= PATIENCE {
                        return Ok(Some(Ended::Signal(number)));
                    }
                }
                let signal: StopSignal = number.to_string().parse().context("a signal without a number")?;
                self.tell(Frame::Signal(signal));
            }
        }
        Ok(None)
    }

    /// Sends a small frame behind what waits. It waits aside where the server does not read.
    fn tell(&mut self, frame: Frame) {
        if let Err(mpsc::error::TrySendError::Full(frame)) = self.frames.try_send(frame) {
            let frames = self.frames.clone();
            self.tasks.spawn(async move {
                // An error says that the session is over.
                let _ = frames.send(frame).await;
            });
        }
    }
}

async fn send(mut frames: mpsc::Receiver<Frame>, mut writer: impl AsyncWrite + Unpin) {
    while let Some(frame) = frames.recv().await {
        let written = async {
            writer.write_all(&frame.encode()).await?;
            writer.flush().await
        };
        // A server that takes no more says how the command ended: that is for the reader to find out.
        if written.await.is_err() {
            break;
        }
    }
    // Kept open: closing it would end the command.
    std::future::pending::<()>().await;
}

async fn read_input(frames: mpsc::Sender<Frame>) {
    let Ok(mut stdin) = streams::stdin() else { return };
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(FRAME_BYTES_MAX);
        let read = (&mut stdin).take(FRAME_BYTES_MAX as u64).read_buf(&mut buffer).await.unwrap_or(0);
        let bytes: Bytes = buffer.split().freeze();
        let frame = if read == 0 { Frame::StdinEnd } else { Frame::Stdin(bytes) };
        if frames.send(frame).await.is_err() || read == 0 {
            return;
        }
    }
}

/// A signal to this process.
#[derive(Debug, Clone, Copy)]
enum Signalled {
    /// That is meant for the command.
    Asked(u8),
    /// The terminal has another size.
    Resized,
    /// Somebody wants this process to stop for a while.
    Suspended,
}

/// The signals that this process answers by itself as long as this lives.
struct Signals {
    asked: Vec<(u8, Signal)>,
    resized: Option<Signal>,
    suspended: Option<Signal>,
}

impl Signals {
    fn listen(streams: Streams) -> anyhow::Result<Self> {
        let asked = [
            SignalKind::interrupt(),
            SignalKind::terminate(),
            SignalKind::hangup(),
            SignalKind::quit(),
            SignalKind::user_defined1(),
            SignalKind::user_defined2(),
        ];
        let listen = |kind| signal(kind).context("signals cannot be handled");
        let asked = asked.into_iter().map(|kind| Ok((libc_number(kind), listen(kind)?)));
        let asked = asked.collect::<anyhow::Result<_>>()?;
        let only_with_terminal = |kind| streams.terminal.then(|| listen(kind)).transpose();
        let stop = SignalKind::from_raw(rustix::process::Signal::TSTP.as_raw());
        Ok(Self { asked, resized: only_with_terminal(SignalKind::window_change())?, suspended: only_with_terminal(stop)? })
    }

    async fn next(&mut self) -> Signalled {
        let Self { asked, resized, suspended } = self;
        tokio::select! {
            number = any_of(asked) => Signalled::Asked(number),
            () = one(resized.as_mut()) => Signalled::Resized,
            () = one(suspended.as_mut()) => Signalled::Suspended,
        }
    }

    /// A signal that ends a program which does not know it.
    async fn next_ending(&mut self) -> u8 {
        any_of(&mut self.asked).await
    }
}

async fn any_of(signals: &mut [(u8, Signal)]) -> u8 {
    poll_fn(|cx| {
        let came = signals.iter_mut().find_map(|(number, signal)| signal.poll_recv(cx).is_ready().then_some(*number));
        came.map_or(Poll::Pending, Poll::Ready)
    })
    .await
}

async fn one(signal: Option<&mut Signal>) {
    match signal {
        Some(signal) => {
            signal.recv().await;
        }
        None => std::future::pending().await,
    }
}

fn libc_number(kind: SignalKind) -> u8 {
    kind.as_raw_value() as u8
}

/// The exit code; the platform's failures are errors.
fn exit_code(end: RunEnd) -> anyhow::Result<ExitCode> {
    Ok(match end {
        RunEnd::Failed(problem) => return Err(Failed(problem).into()),
        RunEnd::Code(code) => code.into(),
        RunEnd::Signal(signal) => EXIT_SIGNAL.saturating_add(signal).into(),
        RunEnd::OutOfMemory => {
            let code = ErrorCode::OutOfMemory;
            streams::error_line(&format!("error[{code}]: the command used more memory than it may\nhint: {}", code.hint()));
            (EXIT_SIGNAL + KILL).into()
        }
    })
}

/// The exit code for a command that did not run.
pub(crate) fn exit_of(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<Failed>().map(|Failed(problem)| problem.code) {
        Some(ErrorCode::CommandNotFound) => EXIT_NOT_FOUND,
        Some(ErrorCode::CommandNotExecutable) => EXIT_NOT_EXECUTABLE,
        _ => EXIT_PLATFORM,
    }
}

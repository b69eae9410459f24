//! The start of an instance, step by step. No step writes to a disk or waits for the end of another instance.
//!
//! ```text
//! pair, pipes ─► OpenRevision (first start only) ─► Start ─► Started: log captured ─► Sockets ─► Executed ─► accepts ─► ready
//!                     any failure, or the future is dropped: SIGKILL, then reaped as every other instance
//! ```

use std::io;
use std::os::fd::OwnedFd;
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use bytes::Bytes;
use funtainer_contract::{Exit, ExitFuture, ExitReport, PlanError, StandardStreams, StartPhases, program};
use funtainer_engine::backend::{Access, RevisionStart, Start, Started};
use funtainer_model::{ErrorCode, Failure, InstanceId};
use funtainer_sandbox::protocol::{InitMessage, InitStep, Refusal, Reply, Request};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::sync::mpsc;

use crate::backend::Shared;
use crate::descriptor::Descriptor;
use crate::instance::Begun;
use crate::link::{Answer, LinkError};
use crate::logs::Stream;
use crate::pair::InitPair;
use crate::readiness::{self, NotReady, Wanted};
use crate::revision::Revision;
use crate::sockets::{Connector, Sockets};

/// How long the end of an instance that failed to start is waited for after its kill.
const REAP_TIME_MAX: Duration = Duration::from_secs(10);
/// Most of a standard error tail that is shown in a failure, in bytes.
const TAIL_SHOWN_BYTES_MAX: usize = 1024;

/// Why an instance did not become ready.
#[derive(Debug, thiserror::Error)]
pub enum StartError {
    /// The keeper did not do its part.
    #[error("the keeper could not start an instance")]
    Keeper(#[from] LinkError),
    /// The image's layers are not in the store any more.
    #[error("the image of the function is not in the store any more")]
    ImageGone,
    /// The image's layers cannot be looked up.
    #[error("{0}")]
    Image(Failure),
    /// The sandbox could not be set up, or the program not be executed.
    #[error("{program}: {step:?} failed: {error}")]
    Init {
        /// The program of the image.
        program: String,
        /// What was being done.
        step: InitStep,
        /// Why it failed.
        error: io::Error,
    },
    /// The program was not executed, and the image's files say why.
    #[error(transparent)]
    Program(PlanError),
    /// The first process said something that it has no reason to say, or ended without a word.
    #[error("the instance's first process broke off")]
    Protocol,
    /// A system call of this process.
    #[error("{0} failed")]
    Io(&'static str, #[source] io::Error),
    /// It ended before it was ready.
    #[error("the function ended before it was ready")]
    Exited(ExitReport),
    /// It was not ready in time.
    #[error("the function was not ready in time")]
    Timeout {
        /// The time it had.
        after: Duration,
        /// The port it was told.
        told: u16,
        /// What listened in the end.
        seen: Vec<u16>,
    },
}

impl StartError {
    /// The failure as users meet it.
    pub fn failure(&self) -> Failure {
        match self {
            Self::Keeper(LinkError::Gone) => Failure::new(ErrorCode::ShuttingDown, "the keeper is gone"),
            Self::Keeper(source) => Failure::new(ErrorCode::SandboxFailed, format!("{self}: {source}")),
            Self::ImageGone => Failure::new(ErrorCode::ImageUnknown, self.to_string()).with_hint("deploy the function again"),
            Self::Image(failure) => failure.clone(),
            Self::Program(error) => error.failure(),
            Self::Init { program, step, error } => init_failure(program, *step, error),
            Self::Protocol => Failure::new(ErrorCode::SandboxFailed, self.to_string()),
            Self::Io(what, source) => Failure::new(ErrorCode::SandboxFailed, format!("{what} failed: {source}")),
            Self::Exited(report) => exit_failure(report),
            Self::Timeout { after, told, seen } => timeout_failure(*after, *told, seen),
        }
    }
}

impl Shared {
    /// See the module.
    pub(crate) async fn start(self: &Arc<Self>, start: Start) -> Result<Started, StartError> {
        let start_time = Instant::now();
        let Start { instance, revision: plan, stderr } = start;
        let revision = self.revisions.of(plan.revision);
        let sockets = (plan.plan.streams == StandardStreams::Log).then(|| Arc::new(Sockets::new(&self.link, instance)));
        let begun = self.instances.begin(instance, plan.plan.streams, plan.plan.stop_signal, sockets.clone());
        let exit = begun.exit.clone();
        let mut guard = Guard { shared: self, instance, sent: false, armed: true };
        let steps = Steps { shared: self, instance, plan: &plan, revision: &revision, start_time };
        match steps.run(begun, sockets, stderr, &mut guard.sent).await {
            Ok(started) => {
                guard.armed = false;
                Ok(started)
            }
            Err(error) => {
                let error = self.abandoned(instance, guard.sent, exit, error).await;
                guard.armed = false;
                Err(self.explained(error, &plan).await)
            }
        }
    }

    /// Looks into the image where the kernel says "no such file" both of a program and of its interpreter.
    async fn explained(&self, error: StartError, plan: &RevisionStart) -> StartError {
        let StartError::Init { step: InitStep::Exec, error: errno, .. } = &error else { return error };
        if errno.kind() != io::ErrorKind::NotFound {
            return error;
        }
        let Ok(files) = self.images.files(plan.digest).await else { return error };
        match program::check(&plan.plan, &files) {
            // What was mounted or written over the image is not seen: then the kernel's word stands.
            Ok(()) | Err(PlanError::ImageFile { .. }) => error,
            Err(why) => StartError::Program(why),
        }
    }

    /// Kills an instance that failed to start and waits until nothing of it is left. Its exit says more than a broken pair.
    async fn abandoned(&self, instance: InstanceId, sent: bool, mut exit: ExitFuture, error: StartError) -> StartError {
        if !sent || matches!(error, StartError::Keeper(_)) {
            self.instances.forget(instance);
            return error;
        }
        self.kill(instance).await;
        let reaped = tokio::time::timeout(REAP_TIME_MAX, exit.wait_for(Option::is_some)).await;
        match (error, reaped) {
            (StartError::Protocol, Ok(Ok(report))) => report.clone().map_or(StartError::Protocol, StartError::Exited),
            (error, _) => error,
        }
    }
}

/// Ends the instance if its start is dropped on the way.
struct Guard<'a> {
    shared: &'a Arc<Shared>,
    instance: InstanceId,
    /// Whether the keeper may know of it.
    sent: bool,
    armed: bool,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if !self.armed {
            return;
        }
        if self.sent {
            let (shared, instance) = (Arc::clone(self.shared), self.instance);
            self.shared.runtime.spawn(async move { shared.kill(instance).await });
        } else {
            self.shared.instances.forget(self.instance);
        }
    }
}

/// What the steps have in common.
struct Steps<'a> {
    shared: &'a Arc<Shared>,
    instance: InstanceId,
    plan: &'a RevisionStart,
    revision: &'a Arc<Revision>,
    start_time: Instant,
}

/// Our ends of a command's standard streams.
struct CallPipes {
    stdin: OwnedFd,
    stdout: OwnedFd,
}

/// What came before the program was executed.
struct Executed {
    /// When the sockets came.
    sandbox: Option<Duration>,
    /// The master end of its terminal.
    terminal: Option<OwnedFd>,
}

impl Steps<'_> {
    async fn run(
        &self,
        begun: Begun,
        sockets: Option<Arc<Sockets>>,
        stderr: Option<mpsc::Sender<Bytes>>,
        sent: &mut bool,
    ) -> Result<Started, StartError> {
        let Begun { exit, captures } = begun;
        let (mut pair, answer, pipes) = self.request(sent).await?;
        let Answer { reply: Reply::Started { pid }, mut fds } = answer else { return Err(LinkError::Unexpected.into()) };
        let made = self.start_time.elapsed();
        let mut streams = Vec::with_capacity(2);
        for (at, stream) in [Stream::Stderr, Stream::Stdout].into_iter().enumerate() {
            if let Some(pipe) = fds.take(at) {
                let copy = if stream == Stream::Stderr { stderr.clone() } else { None };
                let captured = self.shared.logs.capture(&self.plan.slug, self.instance, stream, pipe, copy);
                streams.push(captured.map_err(|error| StartError::Io("reading the log", error))?);
            }
        }
        // The receiver waits for the exit: it outlives this.
        drop(captures.send(streams));
        let mut phases = StartPhases::default();
        let Executed { sandbox, terminal } = self.executed(&mut pair, sockets.as_deref()).await?;
        phases.sandbox = sandbox.unwrap_or(made);
        phases.exec = self.start_time.elapsed().saturating_sub(phases.sandbox);
        let access = match (pipes, sockets, terminal) {
            (Some(CallPipes { stdin, stdout }), _, _) => Access::Streams { stdin, stdout },
            (None, None, Some(master)) => Access::Terminal(master),
            (None, Some(sockets), _) => {
                self.ready(&sockets, pid, exit.clone()).await?;
                phases.ready = self.start_time.elapsed().saturating_sub(phases.sandbox + phases.exec);
                Access::Network(Arc::new(Connector(sockets)))
            }
            (None, None, None) => return Err(StartError::Protocol),
        };
        Ok(Started { pid, phases, access, exit })
    }

    /// Makes the descriptors and asks for the start; a second time where the zygote has ended meanwhile.
    async fn request(&self, sent: &mut bool) -> Result<(InitPair, Answer, Option<CallPipes>), StartError> {
        let learned = Some(self.revision.port.load(Ordering::Relaxed)).filter(|port| *port != 0);
        let request = Request::Start {
            instance: self.instance,
            revision: self.plan.revision,
            descriptor: Descriptor::new(self.plan, learned).to_bytes(),
        };
        let mut again = true;
        loop {
            self.revision.open(self.shared, self.plan).await?;
            let (pair, theirs) = InitPair::new().map_err(|error| StartError::Io("socketpair", error))?;
            let mut descriptors = vec![theirs];
            let mut pipes = None;
            if self.plan.plan.streams == StandardStreams::Call {
                // The modes let a command open `/dev/stdin` and `/dev/stdout` again, whatever its user: inside, the pipe is a stranger's.
                let pipe = |mode| {
                    let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
                    rustix::fs::fchmod(&reader, Mode::from_raw_mode(mode))?;
                    Ok((reader, writer))
                };
                let pipe = |mode| pipe(mode).map_err(|error: Errno| StartError::Io("pipe", error.into()));
                let ((stdin_reader, stdin), (stdout, stdout_writer)) = (pipe(0o604)?, pipe(0o602)?);
                descriptors.extend([stdin_reader, stdout_writer]);
                pipes = Some(CallPipes { stdin, stdout });
            }
            *sent = true;
            match self.shared.link.request(&request, descriptors).await {
                Err(LinkError::Refused(Refusal::NoZygote)) if again => {
                    again = false;
                    *sent = false;
                    self.revision.closed();
                }
                Ok(answer) => return Ok((pair, answer, pipes)),
                Err(error) => return Err(error.into()),
            }
        }
    }

    /// Until the program is executed.
    async fn executed(&self, pair: &mut InitPair, sockets: Option<&Sockets>) -> Result<Executed, StartError> {
        let has_terminal = matches!(self.plan.plan.streams, StandardStreams::Terminal(_));
        let mut came = Executed { sandbox: None, terminal: None };
        loop {
            let message = pair.next().await.map_err(|error| StartError::Io("the init's socket", error))?;
            match message {
                Some((InitMessage::Sockets(counts), fds)) => {
                    let sockets = sockets.ok_or(StartError::Protocol)?;
                    sockets.add(counts, fds).map_err(|error| StartError::Io("taking sockets", error))?;
                    came.sandbox = Some(self.start_time.elapsed());
                }
                Some((InitMessage::Terminal, mut fds)) if has_terminal && came.terminal.is_none() => {
                    came.terminal = fds.take(0);
                }
                Some((InitMessage::Executed, _)) => return Ok(came),
                Some((InitMessage::ExecFailed { step, errno }, _)) => {
                    let program = self.plan.plan.argv.first().cloned().unwrap_or_default();
                    return Err(StartError::Init { program, step, error: io::Error::from_raw_os_error(errno) });
                }
                // No plan has listeners of the platform yet.
                Some((InitMessage::Listeners | InitMessage::Terminal, _)) | None => return Err(StartError::Protocol),
            }
        }
    }

    /// Until it accepts a connection.
    async fn ready(&self, sockets: &Arc<Sockets>, pid: u32, mut exit: ExitFuture) -> Result<(), StartError> {
        let after = self.plan.start_timeout;
        let told = Descriptor::new(self.plan, None).ports.first().copied().unwrap_or_default();
        let learned = self.revision.port.load(Ordering::Relaxed);
        let ports = [learned, told];
        let wanted = Wanted {
            pid,
            ports: if learned == 0 { &ports[1..] } else { &ports },
            own: &Descriptor::new(self.plan, None).own,
            deadline: self.start_time + after,
        };
        let found = tokio::select! {
            found = readiness::wait(sockets, &wanted) => found,
            report = exit.wait_for(Option::is_some) => {
                let report = report.ok().and_then(|report| report.clone());
                return Err(report.map_or(StartError::Protocol, StartError::Exited));
            }
        };
        match found {
            Ok(found) => {
                if !wanted.ports.contains(&found.address.port()) {
                    self.revision.port.store(found.address.port(), Ordering::Relaxed);
                }
                sockets.ready(found.address, Some(found.connection));
                Ok(())
            }
            Err(NotReady::Timeout(seen)) => Err(StartError::Timeout { after, told, seen: seen.into_iter().collect() }),
            Err(NotReady::Io(error)) => Err(StartError::Io("connecting to the function", error)),
        }
    }
}

fn init_failure(program: &str, step: InitStep, error: &io::Error) -> Failure {
    let errno = Errno::from_io_error(error);
    match (step, errno) {
        (InitStep::Exec, Some(Errno::NOENT | Errno::NOTDIR)) => Failure::new(
            ErrorCode::CommandNotFound,
            format!("'{program}' is not in the image, or the interpreter that it names is not: {error}"),
        ),
        (InitStep::Exec, _) => {
            Failure::new(ErrorCode::CommandNotExecutable, format!("'{program}' cannot be executed: {error}"))
        }
        (InitStep::WorkingDirectory, _) => {
            Failure::new(ErrorCode::ImageInvalid, format!("the working directory of the image cannot be entered: {error}"))
                .with_hint("check WORKDIR of the image")
        }
        (InitStep::Volumes, _) => Failure::new(
            ErrorCode::ImageInvalid,
            format!("a volume of the image, or a tmpfs, cannot be put in its place: {error}"),
        )
        .with_hint("check VOLUME of the image, and --tmpfs: each must lead to a directory of the image, or to nothing"),
        (InitStep::Mounts, Some(Errno::NOTDIR | Errno::LOOP)) => Failure::new(
            ErrorCode::ImageInvalid,
            "one of /dev, /proc and /sys of the image is no directory, so that nothing can be mounted there",
        ),
        (step, _) => Failure::new(ErrorCode::SandboxFailed, format!("the container could not be set up ({step:?}): {error}")),
    }
}

fn exit_failure(report: &ExitReport) -> Failure {
    if report.out_of_memory {
        let detail = format!("the function was killed for its memory before it was ready{}", report.usage());
        return Failure::new(ErrorCode::OutOfMemory, detail);
    }
    let how = match report.exit {
        Exit::Code(code) => format!("the function ended with exit code {code} before it was ready"),
        Exit::Signal(signal) => format!("the function was killed by signal {signal} before it was ready"),
        Exit::Lost => "the function ended together with its sandbox before it was ready".to_owned(),
    };
    let tail = &report.stderr_tail[report.stderr_tail.len().saturating_sub(TAIL_SHOWN_BYTES_MAX)..];
    let tail = String::from_utf8_lossy(tail);
    let detail = match tail.trim_start_matches('\u{fffd}').trim() {
        "" => how,
        tail => format!("{how}: {tail}"),
    };
    let failure = Failure::new(ErrorCode::InstanceExited, detail);
    if report.writable_full { failure.with_hint(ExitReport::WRITABLE_FULL_HINT) } else { failure }
}

fn timeout_failure(after: Duration, told: u16, seen: &[u16]) -> Failure {
    let after = funtainer_model::format_duration(after);
    match seen {
        [] => Failure::new(ErrorCode::StartTimeout, format!("nothing listened on a TCP port within {after} (PORT is {told})"))
            .with_hint("see `funtainer logs NAME`; a server must listen on PORT, --port sets another, --contract stdio is for commands"),
        [only] => Failure::new(ErrorCode::StartTimeout, format!("port {only} listens but took no connection within {after}")),
        several => {
            let list: Vec<_> = several.iter().map(ToString::to_string).collect();
            let list = list.join(", ");
            Failure::new(ErrorCode::PortAmbiguous, format!("the function listens on ports {list}, none of which is PORT ({told})"))
                .with_hint(format!("name the one to use with --port, for example --port {}", several[0]))
        }
    }
}

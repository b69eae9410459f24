//! Commands in running instances, step by step.
//!
//! ```text
//! planned ─► pair, pipes ─► Exec ─► Done ─► (Terminal) ─► the pair ends: it runs ─► ExecEnded: the end is published
//!               any failure, or the future is dropped: SIGKILL, then reaped as every other
//! ```

use std::collections::HashMap;
use std::io;
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use funtainer_contract::exec::{self, ExecPlan};
use funtainer_contract::{ExitFuture, ExitReport, ImageFiles, PlanError};
use funtainer_engine::backend::{Exec, ExecStarted, ExecStreams, SignalTarget};
use funtainer_model::{ErrorCode, ExecId, Failure, InstanceId};
use funtainer_sandbox::protocol::{ExecSpec, ExitRecord, InitMessage, InitStep, Refusal, Reply, Request, WindowSize};
use rustix::fs::Mode;
use rustix::io::Errno;
use rustix::pipe::{PipeFlags, pipe_with};
use tokio::sync::watch;

use crate::backend::{Shared, kill_signal};
use crate::instance;
use crate::link::LinkError;
use crate::pair::InitPair;

/// How long a command may take until its program is executed: it reads nothing and waits for nobody. Longer means that somebody inside holds
/// it up.
const EXEC_TIME_MAX: Duration = Duration::from_secs(30);

/// The commands that there are, and their ends.
#[derive(Default)]
pub(crate) struct Execs {
    ends: Mutex<HashMap<ExecId, watch::Sender<Option<ExitReport>>>>,
}

impl Execs {
    fn begin(&self, exec: ExecId) -> ExitFuture {
        let (sender, exit) = watch::channel(None);
        self.lock().insert(exec, sender);
        exit
    }

    fn forget(&self, exec: ExecId) {
        let end = self.lock().remove(&exec);
        drop(end);
    }

    /// A command is reaped.
    pub(crate) fn ended(&self, exec: ExecId, status: Option<i32>) {
        let end = self.lock().remove(&exec);
        if let Some(end) = end {
            end.send_replace(Some(report(status)));
        }
    }

    /// The keeper is gone, and every command with it.
    pub(crate) fn all_lost(&self) {
        let ends = std::mem::take(&mut *self.lock());
        for end in ends.into_values() {
            end.send_replace(Some(report(None)));
        }
    }

    fn lock(&self) -> MutexGuard<'_, HashMap<ExecId, watch::Sender<Option<ExitReport>>>> {
        self.ends.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

fn report(status: Option<i32>) -> ExitReport {
    instance::report(ExitRecord { status, out_of_memory: false, writable_full: false, memory_peak: 0, cpu_us: 0 }, Bytes::new())
}

/// Why a command does not run.
#[derive(Debug, thiserror::Error)]
pub(crate) enum ExecError {
    /// It cannot be planned.
    #[error("the command cannot be run")]
    Plan(#[source] PlanError),
    /// The image's files, which say who a user is, cannot be read.
    #[error("the image of the instance cannot be read")]
    Image(#[source] Failure),
    /// The keeper said no, or nothing.
    #[error("the command was not started")]
    Keeper(#[from] LinkError),
    /// A step of its process.
    #[error("{step:?} failed")]
    Step {
        /// Which.
        step: InitStep,
        /// Why.
        source: io::Error,
    },
    /// Its process said something that it has no reason to say.
    #[error("the command's process broke the protocol")]
    Protocol,
    /// Its program was not executed in time.
    #[error("the command was not executed within {} s", EXEC_TIME_MAX.as_secs())]
    Timeout,
    /// A system call of this process.
    #[error("{0} failed")]
    Io(&'static str, #[source] io::Error),
}

impl ExecError {
    /// The failure as users meet it.
    fn failure(&self, instance: InstanceId, program: &str, directory: &str) -> Failure {
        let failed = |detail: String| Failure::new(ErrorCode::SandboxFailed, detail);
        match self {
            Self::Plan(error) => exec::failure(error),
            Self::Image(failure) => failure.clone(),
            Self::Keeper(LinkError::Gone) => Failure::new(ErrorCode::ShuttingDown, "the keeper is gone"),
            _ if self.is_for_want_of_processes() => {
                failed(format!("instance {instance} has as many processes and threads as it may"))
                    .with_hint("end some of them, or deploy with a larger --pids")
            }
            Self::Keeper(LinkError::Refused(Refusal::NoInstance)) | Self::Step { step: InitStep::Enter, .. } => {
                Failure::new(ErrorCode::NotRunning, format!("instance {instance} is starting or has ended"))
            }
            Self::Keeper(LinkError::Refused(refusal @ Refusal::Exhausted(_))) => {
                Failure::new(ErrorCode::QueueFull, format!("instance {instance}: {refusal}"))
                    .with_hint("wait until one of its commands has ended")
            }
            Self::Keeper(source) => failed(format!("{self}: {source}")),
            Self::Step { step: InitStep::Exec, source } if is_missing(source) => {
                let detail = format!("'{program}' is not in the instance, or the interpreter that it names is not: {source}");
                Failure::new(ErrorCode::CommandNotFound, detail)
                    .with_hint("write the path of a program of the image; many images have a shell at /bin/sh, some have none")
            }
            Self::Step { step: InitStep::Exec, source } => {
                Failure::new(ErrorCode::CommandNotExecutable, format!("'{program}' cannot be executed: {source}"))
            }
            Self::Step { step: InitStep::WorkingDirectory, source } => {
                let detail = format!("the working directory '{directory}' cannot be entered: {source}");
                Failure::new(ErrorCode::BadSetting, detail).with_hint("give a directory of the instance with --workdir")
            }
            Self::Step { step, source } => failed(format!("the command could not be set up ({step:?}): {source}")),
            Self::Io(what, source) => failed(format!("{what} failed: {source}")),
            Self::Protocol | Self::Timeout => failed(self.to_string()),
        }
    }
}

impl ExecError {
    /// What fork(2) says of a control group that is full.
    fn is_for_want_of_processes(&self) -> bool {
        match self {
            Self::Keeper(LinkError::Refused(Refusal::System { errno, .. })) => *errno == Errno::AGAIN.raw_os_error(),
            Self::Step { step: InitStep::Enter, source } => Errno::from_io_error(source) == Some(Errno::AGAIN),
            _ => false,
        }
    }
}

fn is_missing(error: &io::Error) -> bool {
    matches!(Errno::from_io_error(error), Some(Errno::NOENT | Errno::NOTDIR))
}

impl Shared {
    /// See the module.
    pub(crate) async fn exec(self: &Arc<Self>, exec: Exec) -> Result<ExecStarted, Failure> {
        let program = exec.request.command.first().cloned().unwrap_or_default();
        let directory = exec.request.working_dir.clone().unwrap_or_else(|| exec.revision.plan.working_dir.clone());
        let instance = exec.instance;
        self.try_exec(exec).await.map_err(|error| {
            tracing::debug!(%instance, error = &error as &dyn std::error::Error, "a command was not started");
            error.failure(instance, &program, &directory)
        })
    }

    async fn try_exec(self: &Arc<Self>, exec: Exec) -> Result<ExecStarted, ExecError> {
        let Exec { id, instance, revision, request } = exec;
        let files = match &request.user {
            None => None,
            Some(_) => Some(self.images.files(revision.digest).await.map_err(|error| ExecError::Image(error.failure()))?),
        };
        // Reads files of the image.
        let planned = move || exec::exec(&revision.plan, files.as_ref().map(|files| files as &dyn ImageFiles), request);
        let plan = tokio::task::spawn_blocking(planned).await;
        let plan = plan.map_err(|error| ExecError::Io("planning a command", error.into()))?.map_err(ExecError::Plan)?;
        let (mut pair, theirs) = InitPair::new().map_err(|error| ExecError::Io("socketpair", error))?;
        let mut given = vec![theirs];
        let pipes = match plan.terminal {
            Some(_) => None,
            None => Some(Pipes::make(&mut given).map_err(|error| ExecError::Io("pipe", error))?),
        };
        let mut guard = Guard { shared: self, exec: id, armed: true };
        let exit = self.execs.begin(id);
        let asked = Request::Exec { exec: id, instance, spec: Box::new(spec(plan)) };
        match self.link.request(&asked, given).await {
            Ok(answer) if answer.reply == Reply::Done => {}
            Ok(_) => return Err(LinkError::Unexpected.into()),
            Err(error) => {
                // There is nothing to kill.
                if matches!(error, LinkError::Refused(_)) {
                    guard.armed = false;
                    self.execs.forget(id);
                }
                return Err(error.into());
            }
        }
        let terminal = tokio::time::timeout(EXEC_TIME_MAX, executed(&mut pair)).await.map_err(|_| ExecError::Timeout)??;
        let streams = match (pipes, terminal) {
            (Some(Pipes { stdin, stdout, stderr }), None) => ExecStreams::Pipes { stdin, stdout, stderr },
            (None, Some(master)) => ExecStreams::Terminal(master),
            // It was killed before it had its terminal.
            (None, None) => return Err(ExecError::Step { step: InitStep::Enter, source: Errno::SRCH.into() }),
            (Some(_), Some(_)) => return Err(ExecError::Protocol),
        };
        guard.armed = false;
        Ok(ExecStarted { streams, exit })
    }

    /// Sends a signal to what may have ended.
    pub(crate) async fn signal_target(&self, target: SignalTarget, signal: funtainer_model::StopSignal) {
        match target {
            SignalTarget::Instance(instance) => self.signal(instance, signal).await,
            SignalTarget::Exec(exec) => {
                if let Err(error) = self.link.command(&Request::SignalExec { exec, signal }, Vec::new()).await {
                    tracing::debug!(%exec, %error, "a command could not be signalled");
                }
            }
        }
    }
}

/// Until the program runs: its terminal if it has one.
async fn executed(pair: &mut InitPair) -> Result<Option<OwnedFd>, ExecError> {
    let mut terminal = None;
    loop {
        match pair.next().await.map_err(|error| ExecError::Io("the command's socket", error))? {
            Some((InitMessage::Terminal, mut fds)) if terminal.is_none() => terminal = fds.take(0),
            Some((InitMessage::ExecFailed { step, errno }, _)) => {
                return Err(ExecError::Step { step, source: io::Error::from_raw_os_error(errno) });
            }
            Some(_) => return Err(ExecError::Protocol),
            None => return Ok(terminal),
        }
    }
}

/// Our ends of a command's standard streams.
struct Pipes {
    stdin: OwnedFd,
    stdout: OwnedFd,
    stderr: OwnedFd,
}

impl Pipes {
    /// Adds the other ends to what is given away.
    fn make(given: &mut Vec<OwnedFd>) -> io::Result<Self> {
        // The modes let a command open `/dev/stdin` and the like again, whatever its user: inside, the pipe is a stranger's.
        let pipe = |mode| -> Result<(OwnedFd, OwnedFd), Errno> {
            let (reader, writer) = pipe_with(PipeFlags::CLOEXEC)?;
            rustix::fs::fchmod(&reader, Mode::from_raw_mode(mode))?;
            Ok((reader, writer))
        };
        let ((reader, stdin), (stdout, writer), (stderr, errors)) = (pipe(0o604)?, pipe(0o602)?, pipe(0o602)?);
        given.extend([reader, writer, errors]);
        Ok(Self { stdin, stdout, stderr })
    }
}

/// Ends the command if its start is given up on the way. Its record stays until it is reaped.
struct Guard<'a> {
    shared: &'a Arc<Shared>,
    exec: ExecId,
    armed: bool,
}

impl Drop for Guard<'_> {
    fn drop(&mut self) {
        if self.armed {
            let (shared, exec) = (Arc::clone(self.shared), self.exec);
            self.shared.runtime.spawn(async move {
                shared.signal_target(SignalTarget::Exec(exec), kill_signal()).await;
                shared.execs.forget(exec);
            });
        }
    }
}

/// The plan in the keeper's words.
fn spec(plan: ExecPlan) -> ExecSpec {
    ExecSpec {
        argv: plan.argv.into_iter().map(String::into_bytes).collect(),
        env: plan.env.iter().map(|var| var.to_string().into_bytes()).collect(),
        working_dir: plan.working_dir.into_bytes(),
        uid: plan.user.uid,
        gid: plan.user.gid,
        groups: plan.user.groups,
        terminal: plan.terminal.map(|size| WindowSize { rows: size.rows, columns: size.columns }),
    }
}

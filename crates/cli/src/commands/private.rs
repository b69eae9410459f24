//! A server for one command, where none answers: the same program, on the same data directory and under its lock, with an admin socket in a
//! directory of its own and no port.
//!
//! ```text
//! lock looked at ─ directory ─ `serve` in a process group of its own ─ ready ─ the command ─ SIGTERM ─ ended, directory removed
//! ```
//! It stops with this process, however that ends: its parent-death signal asks it to.

use std::fs::{self, DirBuilder, File};
use std::io::{self, BufRead as _, BufReader, Read as _};
use std::os::unix::fs::DirBuilderExt as _;
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::Context as _;
use rustix::fs::FlockOperation;
use rustix::process::{Pid, Signal, kill_process};
use tokio::sync::oneshot;

use crate::args::Host;
use crate::failure::{NotRunning, Unable};
use crate::serve::READY;

/// How long it may take to be ready: reading the state of many functions takes a second.
const READY_TIME_MAX: Duration = Duration::from_mins(1);
/// How long it may take to end: what it gives a command to end, and some.
const STOP_TIME_MAX: Duration = Duration::from_secs(15);
/// Most of its log that is kept, to say why it did not start.
const LOG_BYTES_MAX: u64 = 64 * 1024;

/// A server that runs for this process. Dropped, it is stopped, too.
pub(super) struct Private {
    host: Host,
    /// Stopped before its directory is removed.
    _server: Server,
    _directory: Directory,
}

impl Private {
    /// Starts it and waits until it is ready. `unanswered` is why.
    pub(super) async fn start(unanswered: NotRunning, data: &Path) -> anyhow::Result<Self> {
        may_start(&unanswered, data)?;
        let directory = Directory::make()?;
        let admin = directory.0.join("admin.sock");
        let mut command = Command::new("/proc/self/exe");
        command
            .arg0("funtainer")
            .args(["serve", "--listen", "none", "--parent", &std::process::id().to_string(), "--admin"])
            .arg(&admin)
            .arg("--data")
            .arg(data)
            // Ctrl-C is the command's: a terminal sends it to the whole group.
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped());
        let mut server = Server(command.spawn().context("the server for this command cannot be started")?);
        let (stdout, stderr) = (server.0.stdout.take(), server.0.stderr.take());
        // Threads: a process can only be waited for by blocking, and pipes must be emptied as long as it runs.
        let (said, ready) = oneshot::channel();
        std::thread::spawn(move || {
            let mut line = String::new();
            let read = stdout.map(|stdout| BufReader::new(stdout).read_line(&mut line));
            let _ = said.send(matches!(read, Some(Ok(_))) && line.trim_end() == READY);
        });
        let log = std::thread::spawn(move || stderr.map_or_else(String::new, head));
        match tokio::time::timeout(READY_TIME_MAX, ready).await {
            Ok(Ok(true)) => Ok(Self { host: Host::at(admin), _server: server, _directory: directory }),
            Ok(_) => {
                server.end(Duration::ZERO);
                let log = log.join().unwrap_or_default();
                Err(anyhow::anyhow!("{}", reason(&log)).context("the server for this command did not start"))
            }
            Err(_) => anyhow::bail!("the server for this command is not ready after {} s", READY_TIME_MAX.as_secs()),
        }
    }

    /// Where it answers.
    pub(super) fn host(&self) -> &Host {
        &self.host
    }

    /// Stops it, and waits for its end.
    pub(super) async fn stop(self) {
        // The end of the blocking wait is worth the wait: what it leaves behind is removed after it.
        let _ = tokio::task::spawn_blocking(move || drop(self)).await;
    }
}

/// Whether a server can be started here, and may use the data directory.
fn may_start(unanswered: &NotRunning, data: &Path) -> anyhow::Result<()> {
    let Ok(lock) = File::open(data.join("lock")) else { return Ok(()) };
    match rustix::fs::flock(&lock, FlockOperation::NonBlockingLockShared) {
        Err(rustix::io::Errno::WOULDBLOCK) => Err(Unable {
            what: format!("{unanswered}, but one is using the data directory {}", data.display()),
            hint: "name that server's socket with --host or FUNTAINER_HOST, or another directory with --data",
        }
        .into()),
        // What is wrong with it is the server's to say.
        _ => Ok(()),
    }
}

/// The server's process.
struct Server(Child);

impl Server {
    fn end(&mut self, grace: Duration) {
        let asked = kill_process(Pid::from_child(&self.0), Signal::TERM).is_ok() && ended(&mut self.0, grace);
        if !asked {
            // Fails only for one that has ended.
            let _ = self.0.kill();
        }
        let _ = self.0.wait();
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if matches!(self.0.try_wait(), Ok(None)) {
            self.end(STOP_TIME_MAX);
        }
    }
}

/// Whether a child ends within the time.
fn ended(child: &mut Child, within: Duration) -> bool {
    let Ok(handle) = rustix::process::pidfd_open(Pid::from_child(child), rustix::process::PidfdFlags::empty()) else {
        return false;
    };
    let mut polled = [rustix::event::PollFd::new(&handle, rustix::event::PollFlags::IN)];
    let within = rustix::event::Timespec::try_from(within).unwrap_or_default();
    matches!(rustix::event::poll(&mut polled, Some(&within)), Ok(1..))
}

/// The first bytes; the rest is read and thrown away.
fn head(mut stream: impl io::Read) -> String {
    let mut text = Vec::new();
    // What breaks off is as good as its end.
    let _ = stream.by_ref().take(LOG_BYTES_MAX).read_to_end(&mut text);
    let _ = io::copy(&mut stream, &mut io::sink());
    String::from_utf8_lossy(&text).into_owned()
}

/// The error that a server ended with, from its log.
fn reason(log: &str) -> String {
    let from = log.rfind("error: ").map_or(log, |at| &log[at + "error: ".len()..]);
    match from.trim() {
        "" => "it said nothing".to_owned(),
        text => text.to_owned(),
    }
}

/// A directory that only this user can enter; removed when dropped.
struct Directory(PathBuf);

impl Directory {
    fn make() -> anyhow::Result<Self> {
        let mut random = [0_u8; 8];
        rustix::rand::getrandom(&mut random, rustix::rand::GetRandomFlags::empty())?;
        let path = std::env::temp_dir().join(format!("funtainer-{:016x}", u64::from_ne_bytes(random)));
        // Fails where somebody else has made it.
        let made = DirBuilder::new().mode(0o700).create(&path);
        made.with_context(|| format!("the directory {} cannot be made", path.display()))?;
        Ok(Self(path))
    }
}

impl Drop for Directory {
    fn drop(&mut self) {
        // The server has removed its socket; what a killed one left goes, too.
        let _ = fs::remove_dir_all(&self.0);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_reason_is_the_last_error() {
        assert_eq!(reason("keeper: x\nerror: no such thing\nhint: make it\n"), "no such thing\nhint: make it");
        assert_eq!(reason("panicked\n"), "panicked");
        assert_eq!(reason(""), "it said nothing");
    }

    #[test]
    fn a_directory_is_ones_own_and_goes() {
        use std::os::unix::fs::PermissionsExt as _;
        let directory = Directory::make().unwrap();
        let path = directory.0.clone();
        assert_eq!(fs::metadata(&path).unwrap().permissions().mode() & 0o777, 0o700);
        fs::write(path.join("left"), "").unwrap();
        drop(directory);
        assert!(!path.exists());
    }
}

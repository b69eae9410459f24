//! Network namespaces of tests: what a server changes in one is gone with it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::process::{Command, Stdio};
use std::sync::OnceLock;

use anyhow::{Context, Result, ensure};
use rustix::thread::{LinkNameSpaceType, move_into_link_name_space};

use crate::process;

/// Longest that a tool of the network may take.
const LIMIT: std::time::Duration = std::time::Duration::from_secs(30);

/// A network namespace; `lo` is up.
#[derive(Debug)]
pub struct Namespace {
    handle: OwnedFd,
}

impl Namespace {
    /// Makes one.
    pub fn make() -> Result<Self> {
        // It is born with a process; afterwards the handle keeps it.
        let mut child = Command::new("unshare")
            .args(["--net", "sh", "-c", "ip link set lo up && echo made && read -r end"])
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .spawn()
            .context("cannot start unshare")?;
        let mut line = String::new();
        BufReader::new(child.stdout.take().context("no standard output")?).read_line(&mut line)?;
        let handle = File::open(format!("/proc/{}/ns/net", child.id())).context("the new network namespace");
        drop(child.stdin.take());
        child.wait()?;
        ensure!(line == "made\n", "no network namespace can be made");
        Ok(Self { handle: handle?.into() })
    }

    /// The calling thread's.
    pub fn current() -> Result<Self> {
        let path = "/proc/thread-self/ns/net";
        Ok(Self { handle: File::open(path).context(path)?.into() })
    }

    /// The one that a process is in.
    pub fn of(pid: i32) -> Result<Self> {
        let path = format!("/proc/{pid}/ns/net");
        Ok(Self { handle: File::open(&path).context(path)?.into() })
    }

    /// A path by which other programs find it.
    pub fn path(&self) -> String {
        format!("/proc/{}/fd/{}", std::process::id(), self.handle.as_raw_fd())
    }

    /// Moves the calling thread into it. What it starts from then on, threads and processes, is in it too.
    fn enter(&self) -> Result<()> {
        move_into_link_name_space(self.handle.as_fd(), Some(LinkNameSpaceType::Network))
            .context("cannot enter a network namespace")
    }

    /// Runs something in it.
    pub fn run<T: Send>(&self, body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
        let ran = std::thread::scope(|scope| scope.spawn(|| self.enter().and_then(|()| body())).join());
        ran.unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

/// Runs a shell script in the network namespace of the calling thread; it must succeed. What it printed.
pub fn shell(script: &str) -> Result<String> {
    process::succeed(Command::new("sh").args(["-ec", script]), LIMIT)
}

/// Where the first test of this process came from: the machine's own network.
static HOME: OnceLock<Namespace> = OnceLock::new();

/// Runs something in the machine's own network, which leads out where the machine's does: for what must be fetched.
pub fn at_home<T: Send>(body: impl FnOnce() -> Result<T> + Send) -> Result<T> {
    match HOME.get() {
        Some(home) => home.run(body),
        // No test has left it.
        None => body(),
    }
}

/// A network namespace for the calling thread, until this is dropped.
#[derive(Debug)]
pub struct Own {
    home: Namespace,
}

impl Own {
    /// Makes one and enters it.
    pub fn enter() -> Result<Self> {
        let home = Namespace::current()?;
        if HOME.get().is_none() {
            // Who comes second has left the same one.
            let _ = HOME.set(Namespace::current()?);
        }
        Namespace::make()?.enter()?;
        Ok(Self { home })
    }
}

impl Drop for Own {
    fn drop(&mut self) {
        // A thread that stays abroad is one of a test that failed for the same reason.
        let _ = self.home.enter();
    }
}

//! A person at a terminal: a program whose standard streams are one, and who types and reads at its other end.

use std::fs::File;
use std::io::{Read, Write};
use std::os::fd::OwnedFd;
use std::process::{Child, Command, ExitStatus};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{LocalModes, Winsize, tcgetattr, tcsetwinsize};

use crate::process::describe;
use crate::wait;

/// A program at a terminal of its own.
pub struct Session {
    child: Child,
    master: File,
    /// Kept, so that the terminal has its mode after the program's end.
    slave: OwnedFd,
    name: String,
    said: String,
}

impl Session {
    /// Starts the program as the leader of a session on a new terminal of this size.
    pub fn start(command: &Command, rows: u16, columns: u16) -> Result<Self> {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        unlockpt(&master)?;
        let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
        tcsetwinsize(&master, size(rows, columns))?;
        // It is no leader of a process group, so that the program takes its place without a fork.
        let mut leader = Command::new("setsid");
        leader.arg("--ctty").arg(command.get_program()).args(command.get_args());
        for (name, value) in command.get_envs() {
            match value {
                Some(value) => leader.env(name, value),
                None => leader.env_remove(name),
            };
        }
        let name = describe(command);
        let child = leader
            .stdin(slave.try_clone()?)
            .stdout(slave.try_clone()?)
            .stderr(slave.try_clone()?)
            .spawn()
            .with_context(|| format!("cannot start {name}"))?;
        Ok(Self { child, master: File::from(master), slave, name, said: String::new() })
    }

    /// Its process id.
    pub fn pid(&self) -> i32 {
        Pid::from_child(&self.child).as_raw_nonzero().get()
    }

    /// Types.
    pub fn keys(&mut self, keys: &str) -> Result<()> {
        Ok(self.master.write_all(keys.as_bytes())?)
    }

    /// Reads until this text comes; what came since the last time.
    pub fn expect(&mut self, text: &str, limit: Duration) -> Result<String> {
        let deadline = Instant::now() + limit;
        loop {
            if let Some(at) = self.said.find(text) {
                let rest = self.said.split_off(at + text.len());
                return Ok(std::mem::replace(&mut self.said, rest));
            }
            let left = deadline.saturating_duration_since(Instant::now());
            if !wait::readable(&self.master, left)? {
                bail!("{}\ndid not say {text:?} within {limit:?}, but {:?}", self.name, self.said);
            }
            let mut bytes = [0; 4096];
            let read = self.master.read(&mut bytes).unwrap_or(0);
            ensure!(read > 0, "{}\nended before it said {text:?}, and said {:?}", self.name, self.said);
            self.said.push_str(&String::from_utf8_lossy(&bytes[..read]));
        }
    }

    /// Changes the terminal's size, of which the kernel tells the program.
    pub fn resize(&self, rows: u16, columns: u16) -> Result<()> {
        Ok(tcsetwinsize(&self.master, size(rows, columns))?)
    }

    /// Whether the terminal has the mode that terminals begin with: lines are edited, keys are signals, what is typed is shown.
    pub fn is_in_order(&self) -> Result<bool> {
        Ok(tcgetattr(&self.slave)?.local_modes.contains(LocalModes::ICANON | LocalModes::ISIG | LocalModes::ECHO))
    }

    /// Sends the program a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Waits for its end, after which the terminal must be in order: how it ended and what else it said.
    pub fn finish(mut self, limit: Duration) -> Result<(ExitStatus, String)> {
        let deadline = Instant::now() + limit;
        // A program that cannot write does not end.
        let status = loop {
            if let Some(status) = self.child.try_wait()? {
                break status;
            }
            if Instant::now() >= deadline {
                self.child.kill()?;
                self.child.wait()?;
                bail!("{}\nstill ran after {limit:?}, and said {:?}", self.name, self.said);
            }
            self.take(Duration::from_millis(20))?;
        };
        while self.take(Duration::ZERO)? {}
        ensure!(self.is_in_order()?, "{}\nleft the terminal without its mode", self.name);
        Ok((status, std::mem::take(&mut self.said)))
    }

    /// Reads what there is; whether there was something.
    fn take(&mut self, limit: Duration) -> Result<bool> {
        if !wait::readable(&self.master, limit)? {
            return Ok(false);
        }
        let mut bytes = [0; 4096];
        let read = self.master.read(&mut bytes).unwrap_or(0);
        self.said.push_str(&String::from_utf8_lossy(&bytes[..read]));
        Ok(read > 0)
    }
}

impl Drop for Session {
    fn drop(&mut self) {
        // After a failed test; one that has ended cannot be killed.
        if matches!(self.child.try_wait(), Ok(None)) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn size(rows: u16, columns: u16) -> Winsize {
    Winsize { ws_row: rows, ws_col: columns, ws_xpixel: 0, ws_ypixel: 0 }
}

//! The emulated machine: boot, output, end.

use std::fs;
use std::io::{BufRead as _, BufReader};
use std::path::Path;
use std::process::{Child, ChildStdout, Command, Stdio};
use std::sync::mpsc::{Receiver, RecvTimeoutError, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};

use super::system::System;

/// How lines of the guest's own begin; see `run.sh`.
const MARK: &str = "funtainer-guest: ";
/// Longest time for the power to go off after the run's end.
const OFF_LIMIT: Duration = Duration::from_secs(30);
/// As much of the kernel's console as a failure shows.
const CONSOLE_LINES: usize = 60;

/// A guest about to be started.
pub(super) struct Machine<'a> {
    pub(super) system: &'a System,
    /// The disk with what the run brings.
    pub(super) payload: &'a Path,
    /// A directory for this run's files.
    pub(super) place: &'a Path,
    /// systemd is process 1.
    pub(super) systemd: bool,
}

impl Machine<'_> {
    /// Runs the guest until it is off, hands each line of output on, and returns the exit code of what ran in it.
    pub(super) fn run(&self, limit: Duration, line: &mut dyn FnMut(&str)) -> Result<u8> {
        let console = self.place.join("console");
        let start = Instant::now();
        let mut guest = Guest(self.command(&console)?.spawn().context("cannot start qemu-system-x86_64")?);
        let lines = read(guest.0.stdout.take().context("qemu has no standard output")?);
        let ended = follow(&lines, start, limit, line);
        let ended = ended.and_then(|code| guest.off(&lines).map(|()| code));
        drop(guest);
        let said = fs::read(&console).unwrap_or_default();
        let said = String::from_utf8_lossy(&said);
        if ended.is_err() {
            let said: Vec<_> = said.lines().collect();
            eprintln!("the last words of the guest's console:");
            for line in &said[said.len().saturating_sub(CONSOLE_LINES)..] {
                eprintln!("    {line}");
            }
        } else {
            eprintln!("the guest was on for {:.1} s", start.elapsed().as_secs_f64());
        }
        ended
    }

    fn command(&self, console: &Path) -> Result<Command> {
        let initial = self.place.join("initial.cpio");
        fs::write(&initial, self.system.initial()?)?;
        // The guest dies with us, whatever ends us.
        let mut command = Command::new("setpriv");
        command.args(["--pdeathsig", "KILL", "qemu-system-x86_64"]);
        command.args(["-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-nic", "none"]);
        command.args(["-machine", "q35", "-accel", "tcg,thread=multi", "-cpu", "max", "-smp", "2", "-m", "2048"]);
        command.arg("-kernel").arg(self.system.kernel()).arg("-initrd").arg(&initial);
        // Mitigations of real processors' faults cost much of an emulated one's time.
        let init = if self.systemd { "guest.systemd systemd.unit=guest.service" } else { "" };
        command.arg("-append").arg(format!("console=ttyS0 quiet panic=-1 oops=panic mitigations=off audit=0 {init}"));
        for (disk, kept) in [(&*self.system.disk(), "on"), (self.payload, "off")] {
            let disk = disk.to_str().context("the path of the target directory is no UTF-8")?.replace(',', ",,");
            command.args(["-drive", &format!("file={disk},format=raw,if=virtio,cache=unsafe,discard=unmap,snapshot={kept}")]);
        }
        command.args(["-device", "virtio-rng-pci", "-device", "virtio-serial-pci"]);
        command.args([
            "-chardev",
            "file,id=output,path=/proc/self/fd/1",
            "-device",
            "virtserialport,chardev=output,name=output",
        ]);
        let console = console.to_str().context("the path of the target directory is no UTF-8")?.replace(',', ",,");
        command.args(["-serial", &format!("file:{console}")]);
        // Where qemu keeps what the guest changes on the root file system.
        command.env("TMPDIR", self.place).stdin(Stdio::null()).stdout(Stdio::piped());
        Ok(command)
    }
}

/// Hands lines on until the one with the exit code.
fn follow(lines: &Receiver<String>, start: Instant, limit: Duration, line: &mut dyn FnMut(&str)) -> Result<u8> {
    loop {
        let got = match lines.recv_timeout(limit.saturating_sub(start.elapsed())) {
            Ok(got) => got,
            Err(RecvTimeoutError::Timeout) => bail!("the guest was not done after {} s", limit.as_secs()),
            Err(RecvTimeoutError::Disconnected) => bail!("the guest ended before what ran in it"),
        };
        match got.split_once(MARK).map(|(before, own)| (before, own.split_once(' '))) {
            Some(("", Some(("up", release)))) => {
                eprintln!("Linux {release} is up after {:.1} s", start.elapsed().as_secs_f64());
            }
            Some((before, Some(("exit", code)))) if let Ok(code) = code.parse() => {
                // Output without a newline at its end stands before it.
                if !before.is_empty() {
                    line(before);
                }
                return Ok(code);
            }
            _ => line(&got),
        }
    }
}

fn read(stdout: ChildStdout) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).split(b'\n').map_while(Result::ok) {
            let line = String::from_utf8_lossy(&line).trim_end_matches('\r').to_owned();
            if sender.send(line).is_err() {
                return;
            }
        }
    });
    receiver
}

/// Killed when dropped.
struct Guest(Child);

impl Guest {
    /// Waits until the power is off. Nothing but output of what the run left behind can come until then.
    fn off(&mut self, lines: &Receiver<String>) -> Result<()> {
        let deadline = Instant::now() + OFF_LIMIT;
        loop {
            match lines.recv_timeout(deadline.saturating_duration_since(Instant::now())) {
                Ok(_) => {}
                Err(RecvTimeoutError::Timeout) => bail!("the guest is still on {} s after its end", OFF_LIMIT.as_secs()),
                Err(RecvTimeoutError::Disconnected) => break,
            }
        }
        let status = self.0.wait()?;
        ensure!(status.success(), "qemu: {status}");
        Ok(())
    }
}

impl Drop for Guest {
    fn drop(&mut self) {
        // It has ended already, unless something failed.
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

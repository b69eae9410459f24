//! Other programs, run with a deadline and with everything they say.

use std::io::{Read, Write};
use std::process::{Child, Command, ExitCode, ExitStatus, Stdio};
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};

use crate::wait;

/// How long a program's output may still come after its end: longer means that somebody else holds the pipe.
const OUTPUT_GRACE: Duration = Duration::from_secs(10);

/// A program that has ended.
#[derive(Debug)]
pub struct Finished {
    /// How it ended.
    pub status: ExitStatus,
    /// Its standard output.
    pub stdout: Vec<u8>,
    /// Its standard error.
    pub stderr: Vec<u8>,
    /// From the start to the end.
    pub took: Duration,
}

impl Finished {
    /// The exit code; an error if a signal ended it.
    pub fn code(&self) -> Result<i32> {
        self.status.code().with_context(|| format!("ended by a signal: {}", self.status))
    }

    /// Standard output as text.
    pub fn out(&self) -> String {
        String::from_utf8_lossy(&self.stdout).into_owned()
    }

    /// Standard error as text.
    pub fn err(&self) -> String {
        String::from_utf8_lossy(&self.stderr).into_owned()
    }
}

/// A program that runs, with threads that feed and read it.
pub struct Running {
    child: Child,
    name: String,
    started: Instant,
    stdout: Receiver<Vec<u8>>,
    stderr: Receiver<Vec<u8>>,
}

/// Runs a program to its end, whatever that is; one that takes longer than `limit` is killed and is an error.
pub fn run(command: &mut Command, input: &[u8], limit: Duration) -> Result<Finished> {
    start(command, Some(input))?.finish(limit)
}

/// Runs a program that must succeed and returns its standard output.
pub fn succeed(command: &mut Command, limit: Duration) -> Result<String> {
    let name = describe(command);
    let finished = run(command, b"", limit)?;
    ensure!(finished.status.success(), "{name}\nfailed with {}\n{}{}", finished.status, finished.out(), finished.err());
    Ok(finished.out())
}

/// Starts a program; with `input` its standard input is that and then ends, without it stays open until [`Running::stdin`] is taken and dropped.
pub fn start(command: &mut Command, input: Option<&[u8]>) -> Result<Running> {
    let name = describe(command);
    let started = Instant::now();
    let mut child = command
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .with_context(|| format!("cannot start {name}"))?;
    if let (Some(input), Some(mut stdin)) = (input, if input.is_some() { child.stdin.take() } else { None }) {
        let input = input.to_vec();
        // The program may end without reading: that is its own affair.
        thread::spawn(move || drop(stdin.write_all(&input)));
    }
    let stdout = collect(child.stdout.take());
    let stderr = collect(child.stderr.take());
    Ok(Running { child, name, started, stdout, stderr })
}

impl Running {
    /// Its process id.
    pub fn pid(&self) -> i32 {
        Pid::from_child(&self.child).as_raw_nonzero().get()
    }

    /// Its standard input, if it was started without one.
    pub fn stdin(&mut self) -> Option<std::process::ChildStdin> {
        self.child.stdin.take()
    }

    /// Sends it a signal.
    pub fn signal(&self, signal: Signal) -> Result<()> {
        kill_process(Pid::from_child(&self.child), signal).with_context(|| format!("cannot signal {}", self.name))
    }

    /// Waits for its end.
    pub fn finish(mut self, limit: Duration) -> Result<Finished> {
        drop(self.child.stdin.take());
        let Some(status) = wait::exited(&mut self.child, limit)? else {
            self.child.kill()?;
            self.child.wait()?;
            let said =
                [&self.stdout, &self.stderr].map(|pipe| pipe.recv_timeout(wait::patient(OUTPUT_GRACE)).unwrap_or_default());
            bail!("{}\nstill ran after {limit:?}\n{}", self.name, String::from_utf8_lossy(&said.concat()));
        };
        let took = self.started.elapsed();
        let held = || format!("{}\nended, but somebody holds its output open", self.name);
        let stdout = self.stdout.recv_timeout(wait::patient(OUTPUT_GRACE)).with_context(held)?;
        let stderr = self.stderr.recv_timeout(wait::patient(OUTPUT_GRACE)).with_context(held)?;
        Ok(Finished { status, stdout, stderr, took })
    }
}

/// What a program of this crate ends with: its own code, or 1 after an error with all its causes in one line on standard error.
pub fn exit_code(done: Result<ExitCode>) -> ExitCode {
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

/// A command as it would be typed.
pub fn describe(command: &Command) -> String {
    let words = std::iter::once(command.get_program()).chain(command.get_args());
    let words: Vec<_> = words
        .map(|word| {
            let word = word.to_string_lossy();
            if word.is_empty() || word.contains([' ', '"', '\'', '$', '\n', '&', '|', ';', '<', '>']) {
                format!("'{}'", word.replace('\'', r"'\''"))
            } else {
                word.into_owned()
            }
        })
        .collect();
    words.join(" ")
}

fn collect(pipe: Option<impl Read + Send + 'static>) -> Receiver<Vec<u8>> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        let mut all = Vec::new();
        if let Some(mut pipe) = pipe {
            let _ = pipe.read_to_end(&mut all);
        }
        let _ = sender.send(all);
    });
    receiver
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn output_and_code_come_back() {
        let mut command = Command::new("sh");
        let finished = run(command.args(["-c", "cat; echo oops >&2; exit 3"]), b"in", Duration::from_secs(10)).unwrap();
        assert_eq!((finished.code().unwrap(), finished.out().as_str(), finished.err().as_str()), (3, "in", "oops\n"));
        assert!(succeed(Command::new("false").arg("x"), Duration::from_secs(10)).is_err());
    }

    #[test]
    fn what_runs_too_long_is_ended() {
        let error = run(Command::new("sleep").arg("1000"), b"", Duration::from_millis(50)).unwrap_err();
        assert!(error.to_string().contains("still ran"), "{error}");
    }

    #[test]
    fn commands_read_as_typed() {
        let mut command = Command::new("skopeo");
        assert_eq!(describe(command.args(["copy", "a b", ""])), "skopeo copy 'a b' ''");
    }
}

//! The backend with a real keeper and real containers. Needs root and a kernel with the features that `funtainer serve` needs.
//!
//! ```text
//! test (this program without arguments) ─► keeper (`keeper DIR`) ─► daemon (`daemon --listeners N`): runs the scenarios
//! ```
//! The first daemon ends by SIGKILL with an instance running; the second one adopts it and goes on. A failed scenario is written to
//! `DIR/logs/result`, which the test reads.

mod image;
mod scenarios;

use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitCode};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use funtainer_sandbox::keeper::{self, KeeperSettings, NetworkSettings};
use funtainer_sandbox::mount::Features;

/// Everything together takes about three seconds.
const DEADLINE: Duration = Duration::from_mins(2);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let result = match arguments.get(1).map(String::as_str) {
        Some("keeper") => run_keeper(Path::new(&arguments[2])),
        Some("daemon") => scenarios::run_daemon(arguments[3].parse().expect("a number of listeners")),
        // Names of tests, as `cargo test NAME` gives them: this one has none.
        _ => run_test(),
    };
    match result {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            eprintln!("test failed: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run_keeper(directory: &Path) -> Result<()> {
    let settings = KeeperSettings {
        listen: Some("127.0.0.1:0".parse()?),
        // The tests leave the machine's network alone.
        network: NetworkSettings::default(),
        mounts: Features::NEWEST,
        admin: directory.join("admin.sock"),
        data: directory.join("data"),
        daemon: ["keeper-test", "daemon"].map(Into::into).to_vec(),
        // For ordinary users only; these tests are root.
        unpack: ["keeper-test", "unpack"].map(Into::into).to_vec(),
        announce: |_| {},
        log: |line| eprintln!("keeper: {line}"),
    };
    keeper::run(settings)?;
    Ok(())
}

fn run_test() -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this test makes containers: run it as root");
    let directory = tempfile::Builder::new().prefix("funtainer-backend-").tempdir()?;
    let data = directory.path().join("data");
    std::fs::create_dir(&data)?;
    image::write_archive(&data.join("archive.tar")).context("making the image")?;
    let mut keeper = Keeper(Command::new(std::env::current_exe()?).arg("keeper").arg(directory.path()).spawn()?);
    let result = wait_for(&data.join("logs/result"), &mut keeper.0);
    let ended = keeper.end();
    let result = result?;
    ended?;
    ensure!(result == "passed", "{result}");
    println!("test keeper ... ok");
    Ok(())
}

fn wait_for(path: &PathBuf, keeper: &mut Child) -> Result<String> {
    let begun = Instant::now();
    let pid = rustix::process::Pid::from_child(keeper);
    let end = rustix::process::pidfd_open(pid, rustix::process::PidfdFlags::empty())?;
    while begun.elapsed() < DEADLINE {
        if let Ok(text) = std::fs::read_to_string(path) {
            return Ok(text);
        }
        let moment = rustix::event::Timespec { tv_sec: 0, tv_nsec: 10_000_000 };
        rustix::event::poll(&mut [rustix::event::PollFd::new(&end, rustix::event::PollFlags::IN)], Some(&moment))?;
        if let Some(status) = keeper.try_wait()? {
            bail!("the keeper ended: {status}");
        }
    }
    bail!("no result within {DEADLINE:?}")
}

/// The keeper's process; whatever happens, it is asked to clean up.
struct Keeper(Child);

impl Keeper {
    fn end(&mut self) -> Result<()> {
        let pid = rustix::process::Pid::from_child(&self.0);
        rustix::process::kill_process(pid, rustix::process::Signal::TERM)?;
        let status = self.0.wait()?;
        ensure!(status.success(), "the keeper's end: {status}");
        Ok(())
    }
}

impl Drop for Keeper {
    fn drop(&mut self) {
        if let Ok(None) = self.0.try_wait() {
            let _ = self.end();
        }
    }
}

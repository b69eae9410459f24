//! Functions that use up whatever they can get, beside a neighbour that goes on answering.

use std::process::Command;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use funtainer_e2e::image::catalog;
use funtainer_e2e::server::Server;

use crate::{ATTACKER, Outcome, attack, get_through, outcome, with_attacker};

/// What each may use.
const LIMITS: [&str; 8] = ["--memory", "64M", "--pids", "64", "--open-files", "1024", "--writable", "32M"];

/// Bombs: what they want, all of it more than the limits, and less than the control's machine has.
const BOMBS: [&str; 8] = [
    "processes=200",
    "threads=200",
    "memory=256",
    "fill=/tmp/full:256",
    "fill=/dev/shm/full:256",
    "inodes=/tmp:200000",
    "pipes=256",
    "descriptors=5000",
];

/// Fewest calls of the neighbour beside a bomb.
const CALLS_MIN: usize = 20;

/// Times of the neighbour's calls while something else goes on.
fn beside<T>(server: &Server, what: impl FnOnce() -> Result<T>) -> Result<(T, Vec<Duration>)> {
    let over = AtomicBool::new(false);
    let endpoint = server.tcp();
    std::thread::scope(|scope| {
        let neighbour = scope.spawn(|| -> Result<Vec<Duration>> {
            let mut times = Vec::new();
            loop {
                let start = Instant::now();
                funtainer_e2e::http::call(&endpoint, "GET", "/function/neighbour", &[], b"")?.expect(200)?;
                times.push(start.elapsed());
                if over.load(Ordering::Acquire) && times.len() >= CALLS_MIN {
                    return Ok(times);
                }
            }
        });
        let done = what();
        over.store(true, Ordering::Release);
        let times = neighbour.join().map_err(|_| anyhow::anyhow!("the neighbour's caller panicked"))?;
        Ok((done?, times.context("the neighbour does not answer")?))
    })
}

/// Told, not asserted: what a machine with other work makes of times proves nothing.
fn tell(bomb: &str, mut times: Vec<Duration>) {
    times.sort();
    let at = |part: usize| times[(times.len() - 1) * part / 100];
    eprintln!("beside {bomb}: {} calls of the neighbour, p50 {:?}, p95 {:?}", times.len(), at(50), at(95));
}

#[test]
fn nothing_can_be_used_up() -> Result<()> {
    with_attacker(|_, server| {
        server.deploy("neighbour", &catalog::hello()?, &["--min", "1"])?;
        let ((), alone) = beside(server, || Ok(()))?;
        tell("nothing", alone);
        for bomb in BOMBS {
            let run = ["run"].into_iter().chain(LIMITS).chain(["attacker:1", "--", bomb]);
            let (finished, times) = beside(server, || server.cli(run))?;
            tell(bomb, times);
            // Refused by an errno, or killed: then there is no line, and the run has failed.
            let held = match finished.out().strip_prefix(bomb).map(str::trim_start).and_then(outcome) {
                Some(Outcome::Held(_)) => true,
                Some(Outcome::Through(_)) => false,
                None => finished.code()? != 0,
            };
            ensure!(held, "{bomb} has got what it wanted: {finished:?}");
        }
        Ok(())
    })?;
    let attacks = BOMBS.map(|bomb| attack(bomb.replace("/tmp", "/mnt")));
    get_through("mount -t tmpfs -o size=1G none /mnt; mount -t tmpfs -o size=1G none /dev/shm; ulimit -n 20000", &attacks)
}

/// Signals that wait are the kernel's memory: they count towards the limit, or towards `RLIMIT_SIGPENDING`, which nobody inside can raise.
#[test]
fn signals_that_wait_are_bounded() -> Result<()> {
    with_attacker(|_, server| {
        let bomb = "signals=10000000";
        let finished = server.cli(["run", "--memory", "64M", "attacker:1", "--", bomb])?;
        ensure!(!finished.out().contains("through"), "{finished:?}");
        // Another function is not refused its own.
        let few = server.ok(["run", "attacker:1", "--", "signals=1000"])?;
        ensure!(few.contains("through"), "{few}");
        Ok(())
    })
}

/// Logs are bounded, whatever is said.
#[test]
fn a_log_that_never_ends() -> Result<()> {
    const MEBIBYTES: u64 = 128;
    let bomb = format!("log={MEBIBYTES}");
    with_attacker(|_, server| {
        server.deploy("neighbour", &catalog::hello()?, &["--min", "1"])?;
        server.ok(["deploy", "log", "--image", "attacker:1", "--contract", "stdio", "--arg", &bomb])?;
        let (answer, times) = beside(server, || server.call("POST", "/function/log", &[], b""))?;
        tell(&bomb, times);
        ensure!(answer.text().contains("through"), "it must be able to say all: {answer:?}");
        let kept = std::fs::read_dir(server.places().data.join("logs"))?;
        let kept: u64 = kept.map_while(Result::ok).filter_map(|entry| entry.metadata().ok()).map(|file| file.len()).sum();
        ensure!(kept < (MEBIBYTES << 20) / 4, "{kept} bytes of logs are kept");
        Ok(())
    })?;
    // The control: all of it does come.
    let said = funtainer_e2e::process::run(Command::new(ATTACKER).arg(&bomb).arg("wait"), b"", crate::LIMIT)?;
    let attacked = Command::new(ATTACKER).args(["--as-is", &bomb]).output()?;
    ensure!(said.code()? == 0 && attacked.stderr.len() as u64 > (MEBIBYTES << 20) * 99 / 100, "{}", attacked.stderr.len());
    Ok(())
}

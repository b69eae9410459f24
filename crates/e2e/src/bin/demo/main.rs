//! funtainer at work, for people: the steps as they would be typed, with the time of each, and nothing left afterwards.
//!
//! Every process and directory belongs to a value that some step holds, so that they go in each case: at the end, after a failure, and after an
//! interrupt, which takes effect between two commands.
//!
//! As root it shows the server of root and that of an ordinary user, whom it makes for that; as an ordinary user his own, or with `--sudo` that of root.
#![forbid(unsafe_code)]

mod steps;
mod who;

use std::process::ExitCode;
use std::sync::atomic::{AtomicBool, Ordering};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use tokio::signal::unix::{SignalKind, signal};

/// Set by SIGINT, SIGTERM and SIGHUP.
static INTERRUPTED: AtomicBool = AtomicBool::new(false);
/// Exit code of a program that SIGINT ended, as shells give it.
const INTERRUPTED_EXIT: u8 = 130;

fn main() -> ExitCode {
    let done = watch_signals().and_then(|()| {
        let start = Instant::now();
        steps::run(std::env::args().any(|argument| argument == "--sudo"))?;
        println!("\nAll of this took {}. To go on: README.md, and `funtainer --help`.", seconds(start.elapsed()));
        Ok(())
    });
    match done {
        Ok(()) => ExitCode::SUCCESS,
        Err(_) if INTERRUPTED.load(Ordering::SeqCst) => {
            eprintln!("\ninterrupted: everything that was started is ended");
            ExitCode::from(INTERRUPTED_EXIT)
        }
        Err(error) => {
            eprintln!("\nerror: {error:#}");
            ExitCode::FAILURE
        }
    }
}

/// Fails once an interrupt has come: the way out releases everything.
fn go_on() -> Result<()> {
    if INTERRUPTED.load(Ordering::SeqCst) {
        bail!("interrupted");
    }
    Ok(())
}

/// Waits for signals beside the steps.
fn watch_signals() -> Result<()> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let (mut interrupt, mut terminate, mut hangup) = {
        let _inside = runtime.enter();
        (signal(SignalKind::interrupt())?, signal(SignalKind::terminate())?, signal(SignalKind::hangup())?)
    };
    thread::Builder::new()
        .name("signals".to_owned())
        .spawn(move || {
            runtime.block_on(async {
                loop {
                    tokio::select! { _ = interrupt.recv() => {} _ = terminate.recv() => {} _ = hangup.recv() => {} }
                    INTERRUPTED.store(true, Ordering::SeqCst);
                }
            });
        })
        .context("cannot start a thread")?;
    Ok(())
}

fn millis(duration: Duration) -> String {
    format!("{:.2} ms", duration.as_secs_f64() * 1e3)
}

fn seconds(duration: Duration) -> String {
    format!("{:.2} s", duration.as_secs_f64())
}

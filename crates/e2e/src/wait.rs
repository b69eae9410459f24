//! Waiting for an event, never for a time: everything returns as soon as the thing has happened, and fails when the deadline has passed.
//!
//! Limits are for an ordinary machine. `FUNTAINER_TEST_PATIENCE`, a whole number, multiplies them all where everything is slower by that much.

use std::os::fd::AsFd;
use std::process::{Child, ExitStatus};
use std::sync::OnceLock;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail};
use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

/// What can be asked for only by looking again is looked at after this pause, ...
const PAUSE_MIN: Duration = Duration::from_millis(1);
/// ... which doubles up to this one.
const PAUSE_MAX: Duration = Duration::from_millis(50);

/// A limit as it is on this machine. What waits here does that itself.
pub fn patient(limit: Duration) -> Duration {
    static FACTOR: OnceLock<u32> = OnceLock::new();
    limit
        * *FACTOR.get_or_init(|| match std::env::var("FUNTAINER_TEST_PATIENCE") {
            Ok(factor) => factor.parse().expect("FUNTAINER_TEST_PATIENCE is a whole number"),
            Err(_) => 1,
        })
}

/// Looks until `probe` finds something; the error after `limit` names `what` and the last failure of the probe.
pub fn until<T>(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<Option<T>>) -> Result<T> {
    let (start, limit) = (Instant::now(), patient(limit));
    let mut pause = PAUSE_MIN;
    loop {
        let failure = match probe() {
            Ok(Some(found)) => return Ok(found),
            Ok(None) => None,
            Err(error) => Some(error),
        };
        if start.elapsed() >= limit {
            let waited = format!("waited {limit:?} in vain: {what}");
            return match failure {
                Some(error) => Err(error.context(waited)),
                None => bail!(waited),
            };
        }
        std::thread::park_timeout(pause);
        pause = (pause * 2).min(PAUSE_MAX);
    }
}

/// Looks until `probe` is true.
pub fn until_true(what: &str, limit: Duration, mut probe: impl FnMut() -> Result<bool>) -> Result<()> {
    until(what, limit, || Ok(probe()?.then_some(())))
}

/// Waits for the end of a child; nothing if it still runs after `limit`.
pub fn exited(child: &mut Child, limit: Duration) -> Result<Option<ExitStatus>> {
    if let Some(status) = child.try_wait()? {
        return Ok(Some(status));
    }
    let pidfd = pidfd_open(Pid::from_child(child), PidfdFlags::empty()).context("pidfd_open of a child")?;
    if readable(&pidfd, limit)? { Ok(Some(child.wait()?)) } else { Ok(None) }
}

/// Waits until a descriptor is readable: false after `limit`.
pub fn readable(fd: &impl AsFd, limit: Duration) -> Result<bool> {
    let deadline = Instant::now() + patient(limit);
    loop {
        let left = deadline.saturating_duration_since(Instant::now());
        let timeout = Timespec { tv_sec: left.as_secs() as i64, tv_nsec: left.subsec_nanos().into() };
        match poll(&mut [PollFd::new(fd, PollFlags::IN)], Some(&timeout)) {
            Ok(0) if left.is_zero() => return Ok(false),
            Ok(0) | Err(rustix::io::Errno::INTR) => {}
            Ok(_) => return Ok(true),
            Err(error) => return Err(error).context("poll"),
        }
    }
}

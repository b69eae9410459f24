//! The way out of an ordinary user's server, as the keeper watches over it; see `crate::uplink`.
//!
//! ```text
//! carrier found ─ hub ─► alive ──ended──► waits 100 ms, doubling to 5 s ──► alive
//!                                  └─ ten ends in a row, each soon after its start: given up
//! ```

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};

use super::{Keeper, TOKEN_UPLINK_END};
use crate::fds;
use crate::step::{StepError, at};
use crate::uplink::{self, Carrier, Plan};

/// Wait after the first end; it doubles with each further one in a row.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest such wait.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// One that has lived so long was good.
const LIFE_MIN: Duration = Duration::from_secs(10);
/// So many that were not, in a row, and there is no other one.
const ENDS_MAX: u32 = 10;

/// The hub, and what connects it.
pub(super) struct Uplink {
    carrier: Carrier,
    hub: OwnedFd,
    process: Option<Process>,
    /// Ends in a row that came too soon.
    ends: u32,
    respawn: Option<Instant>,
}

struct Process {
    pidfd: OwnedFd,
    born: Instant,
    /// The other end is the uplink's: it ends when this is closed.
    _life: OwnedFd,
}

impl Uplink {
    pub(super) fn hub(&self) -> BorrowedFd<'_> {
        self.hub.as_fd()
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        self.respawn
    }
}

impl Keeper {
    /// Finds a carrier and starts it; what is missing, if there is none.
    pub(super) fn open_uplink(&mut self) -> Result<(), String> {
        let carrier = Carrier::find()?;
        let hub = uplink::hub().map_err(|error| error.to_string())?;
        self.uplink = Some(Uplink { carrier, hub, process: None, ends: 0, respawn: None });
        self.start_uplink();
        Ok(())
    }

    fn start_uplink(&mut self) {
        if let Err(error) = self.try_start_uplink() {
            self.log(&format!("the way out of functions cannot be started: {error}"));
            self.uplink_failed();
        }
    }

    fn try_start_uplink(&mut self) -> Result<(), StepError> {
        let Some(uplink) = &mut self.uplink else { return Ok(()) };
        let (ours, theirs) = fds::pair().map_err(at("make the life line of an uplink"))?;
        let plan = Plan { carrier: &uplink.carrier, hub: uplink.hub.as_fd(), life: theirs.as_fd(), title: self.title };
        // SAFETY: the keeper has one thread, as was checked at its start.
        let (_, pidfd) = unsafe { uplink::fork(&plan) }.map_err(at("clone an uplink"))?;
        let watched = epoll::add(&self.epoll, &pidfd, EventData::new_u64(TOKEN_UPLINK_END), EventFlags::IN);
        uplink.process = Some(Process { pidfd, born: Instant::now(), _life: ours });
        watched.map_err(at("watch an uplink")).inspect_err(|_| self.end_uplink())
    }

    /// The end of an uplink.
    pub(super) fn uplink_ended(&mut self) {
        let Some(process) = self.uplink.as_ref().and_then(|uplink| uplink.process.as_ref()) else { return };
        if matches!(fds::pidfd_reap(process.pidfd.as_fd(), false), Ok(None)) {
            return;
        }
        let Some(uplink) = &mut self.uplink else { return };
        let Some(process) = uplink.process.take() else { return };
        let _ = epoll::delete(&self.epoll, &process.pidfd);
        if process.born.elapsed() >= LIFE_MIN {
            uplink.ends = 0;
        }
        let name = uplink.carrier.name();
        self.log(&format!("{name} ended: functions do not reach the outside until it is there again"));
        self.uplink_failed();
    }

    fn uplink_failed(&mut self) {
        let Some(uplink) = &mut self.uplink else { return };
        uplink.ends += 1;
        if uplink.ends >= ENDS_MAX {
            let name = uplink.carrier.name();
            self.log(&format!("{name} ended too often: functions do not reach the outside any more"));
            return;
        }
        let wait = BACKOFF_MIN.saturating_mul(1 << (uplink.ends - 1)).min(BACKOFF_MAX);
        uplink.respawn = Some(Instant::now() + wait);
    }

    pub(super) fn tick_uplink(&mut self, now: Instant) {
        if let Some(uplink) = &mut self.uplink
            && uplink.respawn.is_some_and(|at| at <= now)
        {
            uplink.respawn = None;
            self.start_uplink();
        }
    }

    /// Ends it, and with it the program.
    pub(super) fn end_uplink(&mut self) {
        let Some(process) = self.uplink.as_mut().and_then(|uplink| uplink.process.take()) else { return };
        let _ = epoll::delete(&self.epoll, &process.pidfd);
        // Fails only when it is dead; it is reaped in either case.
        let _ = fds::pidfd_signal(process.pidfd.as_fd(), libc::SIGKILL);
        if let Err(errno) = fds::pidfd_reap(process.pidfd.as_fd(), true) {
            self.log(&format!("an uplink cannot be reaped: {errno}"));
        }
    }
}

//! Pauses shorter than the runtime's own timer can make (it rounds up to a millisecond), by timerfd.

use std::io;
use std::os::fd::OwnedFd;
use std::time::Duration;

use rustix::time::{Itimerspec, TimerfdClockId, TimerfdFlags, TimerfdTimerFlags, Timespec, timerfd_create, timerfd_settime};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::descriptors;

/// A timer of the runtime on which it was made.
pub(crate) struct Timer {
    fd: AsyncFd<OwnedFd>,
}

impl Timer {
    /// A timer that does not run.
    pub(crate) fn new() -> io::Result<Self> {
        let fd = timerfd_create(TimerfdClockId::Monotonic, TimerfdFlags::NONBLOCK | TimerfdFlags::CLOEXEC)?;
        Ok(Self { fd: descriptors::watch(fd, Interest::READABLE)? })
    }

    /// Waits that long. Dropped before its end it can be called again.
    pub(crate) async fn pause(&mut self, time: Duration) -> io::Result<()> {
        let zero = Timespec { tv_sec: 0, tv_nsec: 0 };
        // A time of zero would disarm it.
        let time = time.max(Duration::from_nanos(1));
        let value = Timespec { tv_sec: time.as_secs() as i64, tv_nsec: time.subsec_nanos().into() };
        timerfd_settime(self.fd.get_ref(), TimerfdTimerFlags::empty(), &Itimerspec { it_interval: zero, it_value: value })?;
        let read = |fd: &OwnedFd| Ok(rustix::io::read(fd, &mut [0; 8])?);
        self.fd.async_io(Interest::READABLE, read).await.map(drop)
    }
}

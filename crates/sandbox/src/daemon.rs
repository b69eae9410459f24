//! The daemon's side of its birth: the descriptors that the keeper left at fixed numbers, and the filter on its system calls.

use std::os::fd::{BorrowedFd, FromRawFd, OwnedFd};
use std::sync::atomic::{AtomicBool, Ordering};

use rustix::io::Errno;
use rustix::net::sockopt;

use crate::seccomp::{DAEMON, Filter};
use crate::step::StepError;
use crate::userns;

/// Number of the socket to the keeper: seqpacket, [`crate::protocol`].
pub const CONTROL: i32 = 3;
/// Number of the listening Unix socket of the admin API.
pub const ADMIN: i32 = 4;
/// Number of the first TCP listener; the others follow.
pub const FIRST_TCP: i32 = 5;

/// What a daemon is born with. All are non-blocking and close-on-exec.
#[derive(Debug)]
pub struct Inherited {
    /// To the keeper.
    pub control: OwnedFd,
    /// Listener of the admin API.
    pub admin: OwnedFd,
    /// Listeners of calls, one per core, all of the same address.
    pub tcp: Vec<OwnedFd>,
}

/// Why nothing could be taken over.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum InheritError {
    /// Another call was faster: there is one owner.
    #[error("the inherited descriptors were taken already")]
    Taken,
    /// The process was not started by a keeper.
    #[error("descriptor {number} is no socket ({errno}): `funtainer daemon` is started by `funtainer serve`, not by hand")]
    NotThere {
        /// Its number.
        number: i32,
        /// What the kernel said.
        errno: Errno,
    },
}

/// Takes over the descriptors that the keeper left at [`CONTROL`], [`ADMIN`] and from [`FIRST_TCP`] on, `listeners` of the latter.
/// To be called first thing in the process and once: a second call is an error.
pub fn take_inherited_fds(listeners: usize) -> Result<Inherited, InheritError> {
    static TAKEN: AtomicBool = AtomicBool::new(false);
    let end = FIRST_TCP + i32::try_from(listeners).unwrap_or(i32::MAX - FIRST_TCP);
    for number in CONTROL..end {
        check(number).map_err(|errno| InheritError::NotThere { number, errno })?;
    }
    if TAKEN.swap(true, Ordering::AcqRel) {
        return Err(InheritError::Taken);
    }
    // SAFETY: the keeper left an open socket at each of these numbers, as was just seen, and gave them to this process alone; nothing in
    // it owns them, since it opened nothing at a fixed number and this function hands them out once.
    let take = |number| unsafe { OwnedFd::from_raw_fd(number) };
    Ok(Inherited { control: take(CONTROL), admin: take(ADMIN), tcp: (FIRST_TCP..end).map(take).collect() })
}

/// Puts the filter of [`DAEMON`] on this process, for good: it can execute nothing from here on. To be called before the first thread is
/// started, because threads that run already would stay without it.
pub fn confine() -> Result<(), StepError> {
    userns::no_new_privs()?;
    Filter::compile(&DAEMON).install()
}

/// Whether a socket stands at the number; it is close-on-exec and non-blocking afterwards.
fn check(number: i32) -> Result<(), Errno> {
    // SAFETY: borrowed for this function only; a number at which nothing is open makes the calls fail.
    let fd = unsafe { BorrowedFd::borrow_raw(number) };
    sockopt::socket_type(fd)?;
    rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::CLOEXEC)?;
    rustix::io::ioctl_fionbio(fd, true)
}

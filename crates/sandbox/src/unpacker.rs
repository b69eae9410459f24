//! `funtainer unpack`: unpacks or removes a layer's directory, in the user namespace of the functions that use it.
//!
//! ```text
//! cloned by the keeper ─ user namespace entered, root inside ─ own mount, network and ipc namespaces ─ pivoted into the directory of unpacked layers
//!   ─ capabilities for owners and modes alone, no_new_privs, filter ─ execveat(this program): `funtainer unpack ...`
//!       3: the layer's file   2: a pipe for one line on what went wrong   /: the directory
//! ```
//! What it reads is content of images. Its root is the directory that it fills, so that no path leads elsewhere; it has no network, no other
//! descriptor, and on the host it is nobody.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::thread::{CapabilitySet, LinkNameSpaceType, UnshareFlags};

use crate::clone::{Cloned, clone3};
use crate::executable::Executable;
use crate::mount;
use crate::seccomp::{self, Filter};
use crate::signals::{self, SignalSet};
use crate::step::{StepError, at};
use crate::{fds, userns};

/// The number at which the layer's file stands.
const LAYER: i32 = 3;
/// Where descriptors wait that are to be placed; above all of those.
const WAITING: i32 = 64;
/// What is needed to make files of any owner and mode, and to give them capabilities.
const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::SETFCAP);
/// Exit code of a child that could not become the program.
const EXIT_NOT_EXECUTED: i32 = 71;

/// What an unpacker is made from.
pub(crate) struct Plan<'a> {
    /// The user namespace.
    pub(crate) namespace: BorrowedFd<'a>,
    /// A detached mount of the directory.
    pub(crate) directory: BorrowedFd<'a>,
    /// The layer, where one is unpacked.
    pub(crate) layer: Option<BorrowedFd<'a>>,
    /// Write end of a pipe.
    pub(crate) report: BorrowedFd<'a>,
    /// The program.
    pub(crate) executable: &'a Executable,
    /// The whole command line.
    pub(crate) argv: &'a [CString],
}

/// An unpacker as its parent sees it.
#[derive(Debug)]
pub(crate) struct Forked {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
}

/// Starts an unpacker.
///
/// # Safety
/// No other thread may run in this process.
pub(crate) unsafe fn fork(plan: &Plan<'_>) -> Result<Forked, Errno> {
    let parent = rustix::process::getpid().as_raw_pid();
    // SAFETY: the caller promises one thread; the child executes or exits.
    match unsafe { clone3(0) }? {
        Cloned::Parent { pid, pidfd } => Ok(Forked { pid, pidfd }),
        Cloned::Child => {
            // A panic must not unwind into the keeper's frames.
            let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| become_unpacker(plan, parent)));
            if let Ok(StepError { step, errno }) = failed {
                // Without a reader nobody wants to know.
                let _ = rustix::io::write(plan.report, format!("{} {step}", errno.raw_os_error()).as_bytes());
            }
            // SAFETY: ends the child without running anything of the keeper's.
            unsafe { libc::_exit(EXIT_NOT_EXECUTED) }
        }
    }
}

/// The layer's file, in the executed program. Call it once, before anything is opened.
pub fn take_layer() -> Result<OwnedFd, Errno> {
    // SAFETY: borrowed for this call only; a number at which nothing is open makes it fail.
    rustix::io::fcntl_getfd(unsafe { BorrowedFd::borrow_raw(LAYER) })?;
    // SAFETY: the keeper put it there for this program, and nothing else has taken it: the caller calls once.
    let layer = unsafe { OwnedFd::from_raw_fd(LAYER) };
    rustix::io::fcntl_setfd(&layer, rustix::io::FdFlags::CLOEXEC)?;
    Ok(layer)
}

/// Turns this process into the program; returns only on failure.
fn become_unpacker(plan: &Plan<'_>, parent: i32) -> StepError {
    match set_up(plan, parent) {
        Ok(()) => plan.executable.execute(plan.argv),
        Err(error) => error,
    }
}

fn set_up(plan: &Plan<'_>, parent: i32) -> Result<(), StepError> {
    rustix::thread::move_into_link_name_space(plan.namespace, Some(LinkNameSpaceType::User))
        .map_err(at("enter a user namespace"))?;
    userns::become_root()?;
    let namespaces = UnshareFlags::NEWNS | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: these concern this process alone and touch no memory or descriptor.
    unsafe { rustix::thread::unshare_unsafe(namespaces) }.map_err(at("make the namespaces of an unpacker"))?;
    mount::make_private()?;
    let null = rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(at("open /dev/null"))?;
    let place = rustix::fs::open(c"/sys", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(at("open /sys"))?;
    mount::attach(plan.directory, place.as_fd())?;
    drop(place);
    // Through the mount that is there now: the descriptor's own is gone with the attachment.
    let root = rustix::fs::open(c"/sys", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(at("open the directory of unpacked layers"))?;
    mount::pivot(root.as_fd())?;
    drop(root);
    place_descriptors(plan, &null)?;
    userns::drop_bounding(KEPT)?;
    userns::no_new_privs()?;
    rustix::process::umask(Mode::empty());
    signals::reset_actions();
    signals::set_mask(&SignalSet::empty()).map_err(at("unblock signals"))?;
    // After the last change of ids, which would clear it (prctl(2)).
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(at("set the parent-death signal"))?;
    if rustix::process::getppid().is_none_or(|now| now.as_raw_pid() != parent) {
        return Err(StepError { step: "find the keeper alive", errno: Errno::SRCH });
    }
    Filter::compile(&seccomp::DEFAULT).install()
}

/// `/dev/null` at 0 and 1, the report at 2, the layer at 3; all else closes with the execution.
fn place_descriptors(plan: &Plan<'_>, null: &OwnedFd) -> Result<(), StepError> {
    let failed = "place the descriptors of an unpacker";
    let all = [(Some(null.as_fd()), 0), (Some(null.as_fd()), 1), (Some(plan.report), 2), (plan.layer, LAYER)];
    let mut waiting = Vec::new();
    for (fd, number) in all.into_iter().filter_map(|(fd, number)| fd.map(|fd| (fd, number))) {
        waiting.push((rustix::io::fcntl_dupfd_cloexec(fd, WAITING).map_err(at(failed))?, number));
    }
    for (fd, number) in &waiting {
        fds::place(fd.as_fd(), *number).map_err(at(failed))?;
    }
    // The copies are close-on-exec, like all else above.
    std::mem::forget(waiting);
    fds::cloexec_from(LAYER + i32::from(plan.layer.is_some())).map_err(at(failed))
}

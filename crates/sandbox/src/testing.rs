//! Children for tests on the real kernel.
//!
//! The test harness has threads, so a child must not allocate or lock between its birth and its end: bodies make system calls through this
//! crate's allocation-free functions, and tell what went wrong by a [`StepError`].

use std::ffi::CStr;
use std::os::fd::{AsFd, FromRawFd, OwnedFd};

use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use crate::fds::{Exit, pair, pidfd_reap, receive, send};
use crate::step::StepError;
use crate::userns;

/// Fails a test in plain words where it cannot run.
pub(crate) fn need_root() {
    assert!(rustix::process::geteuid().is_root(), "this test makes namespaces, mounts or control groups: run it as root");
}

/// Waits for what the kernel does a moment later.
#[track_caller]
pub(crate) fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = std::time::Instant::now() + std::time::Duration::from_secs(30);
    while !holds() {
        assert!(std::time::Instant::now() < deadline, "not in time: {what}");
        std::thread::yield_now();
    }
}

/// Host ids for the user namespaces of tests: apart from those of functions and of the probe.
pub(crate) const TEST_BASE: u32 = 0x6FFD_0000;

/// A child that runs a body and ends.
pub(crate) struct Child {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
    report: OwnedFd,
}

impl Child {
    /// Clones this process with the flags of clone(2) and runs `body` in the child. With `CLONE_NEWUSER` it is root in a namespace of
    /// [`TEST_BASE`] when the body starts.
    pub(crate) fn start(flags: libc::c_int, body: impl FnOnce() -> Result<(), StepError>) -> Self {
        let (report, inner) = pair().expect("a socket pair");
        let mut pidfd: libc::c_int = -1;
        let arguments: [u64; 8] = [
            flags as u64 | libc::CLONE_PIDFD as u64,
            (&raw mut pidfd).expose_provenance() as u64,
            0,
            0,
            libc::SIGCHLD as u64,
            0,
            0,
            0,
        ];
        // SAFETY: a structure clone_args of the first version with its size; the child has its own copy of the memory.
        let pid = unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments)) } as i32;
        assert!(pid >= 0, "clone3: {}", std::io::Error::last_os_error());
        if pid == 0 {
            let mut word = [0_u8; 1];
            let _ = receive(inner.as_fd(), &mut word, RecvFlags::empty());
            let born = if flags & libc::CLONE_NEWUSER == 0 { Ok(()) } else { userns::become_root() };
            let code = match born.and_then(|()| body()) {
                Ok(()) => 0,
                Err(error) => {
                    let errno = error.errno.raw_os_error().to_ne_bytes();
                    let _ = send(inner.as_fd(), &errno, &[], SendFlags::empty());
                    let _ = send(inner.as_fd(), error.step.as_bytes(), &[], SendFlags::empty());
                    1
                }
            };
            // SAFETY: ends the child without running anything of the parent's.
            unsafe { libc::_exit(code) };
        }
        // SAFETY: CLONE_PIDFD stored a new descriptor there.
        let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
        if flags & libc::CLONE_NEWUSER != 0 {
            userns::write_maps(pid, TEST_BASE).expect("the maps of a test's child");
        }
        drop(inner);
        let child = Self { pid, pidfd, report };
        // Fails only if the child is dead, which `finish` tells.
        let _ = send(child.report.as_fd(), b"g", &[], SendFlags::empty());
        child
    }

    /// Waits for the end of the child.
    pub(crate) fn finish(self) -> Result<Exit, (String, Errno)> {
        let mut errno = [0_u8; 4];
        let mut step = [0_u8; 200];
        if let Ok(Some(_)) = receive(self.report.as_fd(), &mut errno, RecvFlags::empty()) {
            let length = receive(self.report.as_fd(), &mut step, RecvFlags::empty()).ok().flatten().map_or(0, |got| got.bytes);
            let _ = pidfd_reap(self.pidfd.as_fd(), true);
            let step = String::from_utf8_lossy(&step[..length]).into_owned();
            return Err((step, Errno::from_raw_os_error(i32::from_ne_bytes(errno))));
        }
        Ok(pidfd_reap(self.pidfd.as_fd(), true).expect("a child of ours").expect("it has ended"))
    }

    /// Waits for the end of the child, which must have gone well.
    #[track_caller]
    pub(crate) fn succeed(self) {
        match self.finish() {
            Ok(exit) => assert_eq!(exit, Exit::Code(0)),
            Err((step, errno)) => panic!("the child failed: {step}: {errno}"),
        }
    }
}

/// Runs `body` in a child and panics with its error.
#[track_caller]
pub(crate) fn run(flags: libc::c_int, body: impl FnOnce() -> Result<(), StepError>) {
    Child::start(flags, body).succeed();
}

/// An assertion for bodies.
pub(crate) fn ensure(holds: bool, what: &'static str) -> Result<(), StepError> {
    if holds { Ok(()) } else { Err(StepError { step: what, errno: Errno::CANCELED }) }
}

/// Asserts in a body that something is refused with this errno.
pub(crate) fn refused<T>(result: Result<T, Errno>, errno: Errno, what: &'static str) -> Result<(), StepError> {
    match result {
        Err(found) if found == errno => Ok(()),
        Err(found) => Err(StepError { step: what, errno: found }),
        Ok(value) => {
            drop(value);
            Err(StepError { step: what, errno: Errno::CANCELED })
        }
    }
}

/// Device number of the file at a path.
pub(crate) fn device_of(path: &CStr) -> Result<u64, Errno> {
    Ok(rustix::fs::stat(path)?.st_rdev)
}

/// Runs `body` in a thread with a network namespace of its own, which goes with the thread. Unlike in a child, it may allocate there.
pub(crate) fn in_network<T: Send>(body: impl FnOnce() -> T + Send) -> T {
    need_root();
    let thread = move || {
        // SAFETY: CLONE_NEWNET concerns this thread alone, and touches no memory or descriptor.
        unsafe { rustix::thread::unshare_unsafe(rustix::thread::UnshareFlags::NEWNET) }.expect("a network namespace");
        body()
    };
    std::thread::scope(|scope| scope.spawn(thread).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
}

//! Signals as values: masks, waiting, sending with a number.

use std::mem::MaybeUninit;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use crate::step::checked;

/// The real-time signal by which the keeper asks an init to forward another one, whose number comes as the value. A real-time signal is
/// queued: two different ones in a row both arrive. The C libraries keep 32 to 34 for themselves.
pub(crate) const FORWARD: i32 = 40;

/// A set of signals.
pub(crate) struct SignalSet(libc::sigset_t);

impl SignalSet {
    pub(crate) fn empty() -> Self {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigemptyset initializes the whole set.
        Self(unsafe {
            libc::sigemptyset(set.as_mut_ptr());
            set.assume_init()
        })
    }

    pub(crate) fn all() -> Self {
        let mut set = MaybeUninit::uninit();
        // SAFETY: sigfillset initializes the whole set.
        Self(unsafe {
            libc::sigfillset(set.as_mut_ptr());
            set.assume_init()
        })
    }

    pub(crate) fn of(signals: &[i32]) -> Self {
        let mut set = Self::empty();
        for signal in signals {
            // SAFETY: the set is initialized; a number that is no signal leaves it as it is.
            unsafe { libc::sigaddset(&raw mut set.0, *signal) };
        }
        set
    }
}

/// Sets the mask of blocked signals of the calling thread.
pub(crate) fn set_mask(blocked: &SignalSet) -> Result<(), Errno> {
    // SAFETY: the set is initialized; the old one is not asked for.
    match unsafe { libc::pthread_sigmask(libc::SIG_SETMASK, &raw const blocked.0, std::ptr::null_mut()) } {
        0 => Ok(()),
        errno => Err(Errno::from_raw_os_error(errno)),
    }
}

/// Sets every signal to its default action: exec keeps what is ignored, and the Rust runtime ignores SIGPIPE.
pub(crate) fn reset_actions() {
    for signal in 1..=libc::SIGRTMAX() {
        // SAFETY: the default action runs no code of ours. Numbers that cannot be changed are refused, which is what is wanted of them.
        unsafe { libc::signal(signal, libc::SIG_DFL) };
    }
}

/// A signal that was waited for.
pub(crate) struct Signal {
    pub(crate) number: i32,
    /// What came with it by sigqueue(3); 0 otherwise.
    pub(crate) value: i32,
}

/// Waits for one of a set of blocked signals.
pub(crate) fn wait(set: &SignalSet) -> Result<Signal, Errno> {
    let mut info = MaybeUninit::<libc::siginfo_t>::zeroed();
    // SAFETY: the set is initialized and the kernel fills the structure, in which zeros are valid too.
    let (number, info) = unsafe { (libc::sigwaitinfo(&raw const set.0, info.as_mut_ptr()), info.assume_init()) };
    let number = checked(number.into())? as i32;
    // SAFETY: for SI_QUEUE the union holds the value (sigaction(2)); an integer was put there, and any bytes are a valid pointer.
    let value = if info.si_code == libc::SI_QUEUE { unsafe { info.si_value() }.sival_ptr.addr() as i32 } else { 0 };
    Ok(Signal { number, value })
}

/// Sends a signal to a child that is not reaped yet; a wrong number is nobody's harm.
pub(crate) fn kill(pid: i32, signal: i32) {
    // SAFETY: two integers. rustix knows named signals only.
    unsafe { libc::kill(pid, signal) };
}

/// Asks the init behind a handle to forward a signal to its main process.
pub(crate) fn forward(init: BorrowedFd<'_>, signal: i32) -> Result<(), Errno> {
    /// `siginfo_t` as the kernel has it for SI_QUEUE on 64-bit machines.
    #[repr(C)]
    struct Queued {
        number: i32,
        errno: i32,
        code: i32,
        padding: i32,
        pid: i32,
        uid: u32,
        value: u64,
        rest: [u64; 12],
    }
    const { assert!(size_of::<Queued>() == size_of::<libc::siginfo_t>()) };
    let info = Queued {
        number: FORWARD,
        errno: 0,
        code: libc::SI_QUEUE,
        padding: 0,
        pid: 0,
        uid: 0,
        value: signal as u64,
        rest: [0; 12],
    };
    // SAFETY: the structure has the kernel's size and form and lives through the call; the rest are integers.
    let result = unsafe { libc::syscall(libc::SYS_pidfd_send_signal, init.as_raw_fd(), FORWARD, &raw const info, 0) };
    checked(result).map(drop)
}

/// A child that has ended.
pub(crate) struct Reaped {
    pub(crate) pid: i32,
    /// Raw wait status.
    pub(crate) status: i32,
    /// Most memory that it, or a process that it had reaped, had at once, in bytes.
    pub(crate) memory_bytes: u64,
    /// Processor time of it and of all that it had reaped, in microseconds.
    pub(crate) cpu_us: u64,
}

/// Reaps any child that has ended, whatever signal it was to raise. `None` if there is none.
pub(crate) fn reap_any() -> Option<Reaped> {
    let mut status = 0;
    let mut usage = MaybeUninit::<libc::rusage>::zeroed();
    // SAFETY: integer and structure are live; the kernel fills the latter, in which zeros are valid too.
    let (pid, usage) =
        unsafe { (libc::wait4(-1, &raw mut status, libc::WNOHANG | libc::__WALL, usage.as_mut_ptr()), usage.assume_init()) };
    let microseconds = |time: libc::timeval| time.tv_sec as u64 * 1_000_000 + time.tv_usec as u64;
    (pid > 0).then(|| Reaped {
        pid,
        status,
        memory_bytes: (usage.ru_maxrss as u64) << 10,
        cpu_us: microseconds(usage.ru_utime) + microseconds(usage.ru_stime),
    })
}

/// A descriptor that becomes readable when one of the signals, which must be blocked, is pending.
pub(crate) fn descriptor(set: &SignalSet) -> Result<OwnedFd, Errno> {
    // SAFETY: the set is initialized.
    let result = unsafe { libc::signalfd(-1, &raw const set.0, libc::SFD_CLOEXEC | libc::SFD_NONBLOCK) };
    let fd = checked(result.into())?;
    // SAFETY: a new descriptor of ours.
    Ok(unsafe { OwnedFd::from_raw_fd(fd as i32) })
}

/// Takes the next pending signal from a [`descriptor`]; `None` when there is none.
pub(crate) fn next(descriptor: BorrowedFd<'_>) -> Option<i32> {
    // The number is the first field of struct signalfd_siginfo, which is read whole.
    let mut info = [0_u8; size_of::<libc::signalfd_siginfo>()];
    match rustix::io::read(descriptor, &mut info[..]) {
        Ok(read) if read == info.len() => Some(i32::from_ne_bytes([info[0], info[1], info[2], info[3]])),
        _ => None,
    }
}

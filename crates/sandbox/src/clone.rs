//! New processes by clone3(2).

use std::cell::UnsafeCell;
use std::os::fd::{AsRawFd, BorrowedFd, FromRawFd, OwnedFd};

use rustix::io::Errno;

use crate::step::checked;

/// Who one is after [`clone3`].
pub(crate) enum Cloned {
    /// The new process.
    Child,
    /// The one that was there before.
    Parent {
        /// Pid of the child in this process's pid namespace.
        pid: i32,
        /// Its handle.
        pidfd: OwnedFd,
    },
}

/// `struct clone_args` of clone(2), third version. A kernel that knows an older one takes it if what it does not know is zero.
#[derive(Default)]
#[repr(C)]
struct Arguments {
    flags: u64,
    pidfd: u64,
    child_tid: u64,
    parent_tid: u64,
    exit_signal: u64,
    stack: u64,
    stack_size: u64,
    tls: u64,
    set_tid: u64,
    set_tid_size: u64,
    cgroup: u64,
}

/// `CLONE_INTO_CGROUP` of clone(2), since 5.7: the child is born in the group whose directory is named. The crate `libc` has it too narrow.
const INTO_CGROUP: u64 = 0x2_0000_0000;

/// Forks with new namespaces (`CLONE_NEW*`). The child has a copy of the memory and of the descriptors; its end raises SIGCHLD.
///
/// # Safety
/// That of [`clone3_into`].
pub(crate) unsafe fn clone3(namespaces: i32) -> Result<Cloned, Errno> {
    // SAFETY: the caller promises the same.
    unsafe { clone3_into(namespaces, None) }
}

/// [`clone3`], on v2 into the control group of a directory.
///
/// A group that a child enters by itself costs it a grace period of the kernel, 8 ms on a quiet machine; one that it is born in none. The
/// caller needs the right to write `cgroup.procs` of that group and of the lowest one above it and its own.
///
/// # Safety
/// No other thread may run in this process: the child would have the locks that it held. The child must end in `_exit` or exec and never
/// return into its caller's frames, whose values belong to the parent (descriptors closed twice, files flushed twice).
pub(crate) unsafe fn clone3_into(namespaces: i32, group: Option<BorrowedFd<'_>>) -> Result<Cloned, Errno> {
    let mut pidfd: libc::c_int = -1;
    let flags = u64::from((libc::CLONE_PIDFD | namespaces).cast_unsigned());
    let arguments = Arguments {
        flags: flags | group.map_or(0, |_| INTO_CGROUP),
        pidfd: std::ptr::from_mut(&mut pidfd).expose_provenance() as u64,
        exit_signal: libc::SIGCHLD as u64,
        cgroup: group.map_or(0, |group| group.as_raw_fd() as u64),
        ..Arguments::default()
    };
    // SAFETY: the structure is the kernel's, with its size; the pointer in it is live. Without CLONE_VM the child runs on its own copy of
    // this stack. The caller answers for threads and for the child's way out. rustix has no clone.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<Arguments>()) };
    match checked(result)? {
        0 => Ok(Cloned::Child),
        pid => {
            // SAFETY: with CLONE_PIDFD the kernel stored a new descriptor of ours there.
            let pidfd = unsafe { OwnedFd::from_raw_fd(pidfd) };
            Ok(Cloned::Parent { pid: pid as i32, pidfd })
        }
    }
}

/// Forks a sibling: a child of this process's parent, in the namespaces that this process's children are born in, with this process's
/// signal at its end. Its pid as this process sees it; `None` in the sibling. See [`clone3`].
///
/// # Safety
/// As for [`clone3`].
pub(crate) unsafe fn clone_sibling() -> Result<Option<i32>, Errno> {
    // Without a signal of its own, as CLONE_PARENT asks for.
    let arguments = Arguments { flags: libc::CLONE_PARENT as u64, ..Arguments::default() };
    // SAFETY: as in `clone3`.
    let result = unsafe { libc::syscall(libc::SYS_clone3, &raw const arguments, size_of::<Arguments>()) };
    checked(result).map(|pid| (pid > 0).then_some(pid as i32))
}

/// Room of the stack that a [`vfork`]ed child runs on: a few system calls deep.
const VFORK_STACK_BYTES: usize = 64 << 10;

/// Memory for the stack of a [`vfork`]ed child, made ahead.
pub(crate) struct VforkStack {
    /// In cells: the child writes while this process holds references to the whole.
    memory: Box<[UnsafeCell<u128>]>,
}

impl VforkStack {
    pub(crate) fn new() -> Self {
        Self { memory: (0..VFORK_STACK_BYTES / size_of::<u128>()).map(|_| UnsafeCell::new(0)).collect() }
    }
}

/// Starts a child that shares this process's memory, and waits until it has executed a program or ended. Returns its pid.
///
/// # Safety
/// `child` must end in exec or `_exit`. It runs in this process's memory: it may write only what this process expects, and must not
/// allocate, lock, unwind or drop what this process owns.
pub(crate) unsafe fn vfork<T>(stack: &VforkStack, child: extern "C" fn(&T) -> libc::c_int, argument: &T) -> Result<i32, Errno> {
    let top = stack.memory.as_ptr_range().end.cast_mut().cast::<libc::c_void>();
    // SAFETY: a function that takes a reference has the same form as one that takes a pointer; clone hands it `argument`, which is live
    // while this process waits.
    let entry = unsafe {
        std::mem::transmute::<extern "C" fn(&T) -> libc::c_int, extern "C" fn(*mut libc::c_void) -> libc::c_int>(child)
    };
    let flags = libc::CLONE_VM | libc::CLONE_VFORK | libc::SIGCHLD;
    // SAFETY: the stack is ours, aligned to 16 bytes and grows down from its end; nobody else uses it, since this process waits
    // (CLONE_VFORK). The caller answers for what `child` does.
    let pid = unsafe { libc::clone(entry, top, flags, std::ptr::from_ref(argument).cast_mut().cast()) };
    checked(pid.into()).map(|pid| pid as i32)
}

//! The error of one kernel step, small enough to be made between clone and exec.

use rustix::io::Errno;

/// One step that the kernel refused. It is plain data without an allocation, so that a process which may not allocate can make it,
/// and a protocol can carry it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
#[error("{step}: {errno}")]
pub struct StepError {
    /// What was tried, as a few words: a system call and its object.
    pub step: &'static str,
    /// The kernel's answer.
    pub errno: Errno,
}

/// Names the step of an errno: `open().map_err(at("open the lock"))`.
pub fn at(step: &'static str) -> impl FnOnce(Errno) -> StepError {
    move |errno| StepError { step, errno }
}

/// The result of a raw system call: -1 becomes the errno of the calling thread.
pub fn checked(result: libc::c_long) -> Result<usize, Errno> {
    match usize::try_from(result) {
        Ok(value) => Ok(value),
        // The standard library reads the thread's errno here; it neither allocates nor locks.
        Err(_) => Err(Errno::from_io_error(&std::io::Error::last_os_error()).unwrap_or(Errno::IO)),
    }
}

/// The errno behind an error of the standard library; `EIO` where it carries none.
pub fn errno_of(error: &std::io::Error) -> Errno {
    Errno::from_io_error(error).unwrap_or(Errno::IO)
}

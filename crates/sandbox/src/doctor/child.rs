//! Trials in a process of their own: what they change of themselves ends with it.

use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::panic::AssertUnwindSafe;

use crate::clone::{Cloned, clone3};
use crate::fds;

/// Longest text of a trial.
const TEXT_BYTES_MAX: u64 = 64 << 10;
/// First byte of what a trial tells.
const GOOD: u8 = b'+';
const BAD: u8 = b'-';

/// Runs `trial` in a fork of this process, which must have one thread, and returns its text. A trial that dies is an error too.
pub(super) fn run(trial: impl FnOnce() -> Result<String, String>) -> Result<String, String> {
    let (mut reader, mut writer) = std::io::pipe().map_err(|error| format!("no pipe for a trial: {error}"))?;
    // SAFETY: the caller promises one thread; the child ends in `_exit`.
    let cloned = unsafe { clone3(0) }.map_err(|errno| format!("no process for a trial: {errno}"))?;
    let Cloned::Parent { pidfd, .. } = cloned else {
        drop(reader);
        // A panic must not unwind into the parent's frames.
        let told = std::panic::catch_unwind(AssertUnwindSafe(trial)).unwrap_or_else(|_| Err("the trial failed".to_owned()));
        let (mark, text) = match told {
            Ok(text) => (GOOD, text),
            Err(text) => (BAD, text),
        };
        let _ = writer.write_all(&[mark]).and_then(|()| writer.write_all(text.as_bytes()));
        // SAFETY: ends this process without running anything of its parent's.
        unsafe { libc::_exit(0) }
    };
    drop(writer);
    let mut told = Vec::new();
    let read = reader.by_ref().take(TEXT_BYTES_MAX).read_to_end(&mut told);
    // It ends by itself, unless it has more to say than fits.
    let _ = fds::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
    let _ = fds::pidfd_reap(pidfd.as_fd(), true);
    read.map_err(|error| format!("a trial cannot be heard: {error}"))?;
    match told.split_first() {
        Some((&GOOD, text)) => Ok(String::from_utf8_lossy(text).into_owned()),
        Some((_, text)) => Err(String::from_utf8_lossy(text).into_owned()),
        None => Err("the process of a trial was killed".to_owned()),
    }
}

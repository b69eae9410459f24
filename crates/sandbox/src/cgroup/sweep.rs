//! Ends what an earlier server left: its processes are killed, its groups removed.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

use super::{CgroupError, Layout, component, open_directory, open_file, open_root, write};
use crate::fds::{pidfd_ended, pidfd_signal};
use crate::step::{StepError, errno_of};

/// How long a sweep waits for the processes that it killed.
pub(super) const WAIT: Duration = Duration::from_secs(10);

/// Removes everything of the name: kills its processes, waits for their end, removes its groups from the leaves up. Nothing of the name
/// is fine.
pub fn sweep(layout: &Layout, name: &str) -> Result<(), CgroupError> {
    let component = component(name)?;
    let parents: Vec<&PathBuf> = match layout {
        Layout::V1(controllers) => controllers.iter().map(|controller| &controller.mount).collect(),
        Layout::V2(parent) => vec![parent],
    };
    for parent in parents {
        sweep_group(open_root(parent)?.as_fd(), &component, name)?;
    }
    Ok(())
}

/// As [`sweep`], in one directory.
pub(super) fn sweep_one(parent: &Path, name: &str) -> Result<(), CgroupError> {
    sweep_group(open_root(parent)?.as_fd(), &component(name)?, name)
}

/// Kills what is in a group and below it, and removes what is below: the group itself is its owner's to remove. Nothing there is fine.
pub(super) fn empty(group: &Path) -> Result<(), CgroupError> {
    let path = group.display().to_string();
    let directory = match open_root(group) {
        Err(CgroupError::Step { source: StepError { errno: Errno::NOENT, .. }, .. }) => return Ok(()),
        other => other?,
    };
    sweep_below(directory.as_fd(), &path)?;
    kill_and_wait(directory.as_fd(), &path, Instant::now() + WAIT)
}

/// Sweeps one group with all below it.
fn sweep_group(parent: BorrowedFd<'_>, name: &CString, path: &str) -> Result<(), CgroupError> {
    let fail = |step| move |errno| CgroupError::Step { path: path.to_owned(), source: StepError { step, errno } };
    let directory = match open_directory(parent, name) {
        Err(Errno::NOENT) => return Ok(()),
        other => other.map_err(fail("open a group to sweep"))?,
    };
    sweep_below(directory.as_fd(), path)?;
    let deadline = Instant::now() + WAIT;
    loop {
        kill_and_wait(directory.as_fd(), path, deadline)?;
        match rustix::fs::unlinkat(parent, &**name, AtFlags::REMOVEDIR) {
            Ok(()) | Err(Errno::NOENT) => return Ok(()),
            // A process leaves its group a moment after it has left the list of it.
            Err(Errno::BUSY) if Instant::now() < deadline => std::thread::sleep(Duration::from_millis(1)),
            Err(errno) => return Err(fail("remove a group")(errno)),
        }
    }
}

fn sweep_below(directory: BorrowedFd<'_>, path: &str) -> Result<(), CgroupError> {
    let fail = |errno| CgroupError::Step { path: path.to_owned(), source: StepError { step: "list a group", errno } };
    for entry in rustix::fs::Dir::read_from(directory).map_err(fail)? {
        let entry = entry.map_err(fail)?;
        let name = entry.file_name();
        if entry.file_type() == rustix::fs::FileType::Directory && name != c"." && name != c".." {
            sweep_group(directory, &name.to_owned(), &format!("{path}/{}", name.to_string_lossy()))?;
        }
    }
    Ok(())
}

/// Kills until nobody is left: a process may fork between the look at the list and the signal.
fn kill_and_wait(directory: BorrowedFd<'_>, path: &str, deadline: Instant) -> Result<(), CgroupError> {
    loop {
        let fail = |step| move |errno| CgroupError::Step { path: path.to_owned(), source: StepError { step, errno } };
        let pids = processes(directory).map_err(fail("read the processes of a group"))?;
        if pids.is_empty() {
            return Ok(());
        }
        for pid in pids {
            let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) else { continue };
            // The pid may have been given to somebody else since the list was read: with the handle in hand it is looked at again.
            if !processes(directory).map_err(fail("read the processes of a group"))?.contains(&pid) {
                continue;
            }
            pidfd_signal(pidfd.as_fd(), libc::SIGKILL).or_else(already_gone).map_err(fail("kill a process of a group"))?;
            let left = deadline.saturating_duration_since(Instant::now());
            let left = rustix::event::Timespec::try_from(left).unwrap_or_default();
            pidfd_ended(pidfd.as_fd(), Some(left)).map_err(fail("wait for a process of a group"))?;
        }
        if Instant::now() >= deadline {
            return Err(CgroupError::StillPopulated { path: path.to_owned() });
        }
    }
}

/// Sends SIGKILL to every process of a group: in one write where the kernel has `cgroup.kill` (v2 since 5.14), else one by one.
pub(super) fn kill_all(directory: BorrowedFd<'_>) -> Result<(), StepError> {
    let step = "kill the processes of a control group";
    match write(directory, "cgroup.kill", "1", step) {
        Err(StepError { errno: Errno::NOENT, .. }) => {}
        other => return other,
    }
    for pid in processes(directory).map_err(|errno| StepError { step, errno })? {
        if let Ok(pidfd) = rustix::process::pidfd_open(pid, PidfdFlags::empty()) {
            pidfd_signal(pidfd.as_fd(), libc::SIGKILL).or_else(already_gone).map_err(|errno| StepError { step, errno })?;
        }
    }
    Ok(())
}

fn already_gone(errno: Errno) -> Result<(), Errno> {
    if errno == Errno::SRCH { Ok(()) } else { Err(errno) }
}

/// The processes in a group itself, not in groups below.
pub(super) fn processes(directory: BorrowedFd<'_>) -> Result<Vec<Pid>, Errno> {
    let file = open_file(directory, "cgroup.procs", OFlags::RDONLY)?;
    let text = std::io::read_to_string(std::fs::File::from(file)).map_err(|error| errno_of(&error))?;
    // 0 stands for a process outside of our pid namespace, which cannot be named.
    Ok(text.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)).collect())
}

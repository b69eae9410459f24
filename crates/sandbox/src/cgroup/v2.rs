//! The unified tree.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;

use rustix::io::Errno;

use super::{CgroupError, GroupLimits, Hierarchy, Kind, Top, Usage, make_top, read, read_key, read_number, write};
use crate::step::StepError;

/// Makes the top group and lets instances have limits, as far as the tree above gives them: what it does not give is told by
/// [`Hierarchy::missing`], since only its owner may change it.
pub(super) fn open(mount: &PathBuf, name: &str) -> Result<Hierarchy, CgroupError> {
    let (root, directory) = make_top(mount, name)?;
    let offered = read(directory.as_fd(), "cgroup.controllers").unwrap_or_default();
    let has = |controller| offered.split_ascii_whitespace().any(|found| found == controller);
    let (memory, pids) = (has("memory"), has("pids"));

    let mut missing = Vec::new();
    for (there, words) in [(memory, "memory limit"), (pids, "process limit")] {
        if !there {
            missing.push(words);
        }
    }
    let hierarchy =
        Hierarchy { name: name.to_owned(), tops: vec![Top { root, directory, kind: Kind::V2 { memory, pids } }], missing };
    if let Err(source) = prepare(hierarchy.tops[0].directory.as_fd(), memory, pids) {
        // It is empty; the first error is the one to tell.
        let _ = hierarchy.close();
        return Err(CgroupError::Step { path: name.to_owned(), source });
    }
    Ok(hierarchy)
}

/// Hands the controllers down to the instances' groups; no swap for all of them together.
fn prepare(directory: BorrowedFd<'_>, memory: bool, pids: bool) -> Result<(), StepError> {
    for (there, controller) in [(memory, "+memory"), (pids, "+pids")] {
        if there {
            write(directory, "cgroup.subtree_control", controller, "enable a controller in our control group")?;
        }
    }
    if memory {
        // Not there without swap accounting.
        return or_absent(write(directory, "memory.swap.max", "0", "forbid swap in our control group"));
    }
    Ok(())
}

/// Sets the limits of an instance's group: over the memory limit all of it is killed, not one process at random.
pub(super) fn limit(directory: BorrowedFd<'_>, memory: bool, pids: bool, limits: GroupLimits) -> Result<(), StepError> {
    if memory {
        write(directory, "memory.max", &limits.memory_bytes.to_string(), "set the memory limit of a control group")?;
        write(directory, "memory.oom.group", "1", "set a control group to die as a whole")?;
    }
    if pids {
        write(directory, "pids.max", &limits.pids_max.to_string(), "set the process limit of a control group")?;
    }
    Ok(())
}

/// Adds what a group counted. Processor time is counted in every group, memory where the controller is.
pub(super) fn usage(directory: BorrowedFd<'_>, usage: &mut Usage) {
    // memory.peak: since 5.19.
    usage.memory_peak_bytes = read_number(directory, "memory.peak");
    usage.oom_kills = read_key(directory, "memory.events", "oom_kill").unwrap_or(0);
    usage.cpu_us = read_key(directory, "cpu.stat", "usage_usec");
}

fn or_absent(result: Result<(), StepError>) -> Result<(), StepError> {
    match result {
        Err(StepError { errno: Errno::NOENT | Errno::OPNOTSUPP, .. }) => Ok(()),
        other => other,
    }
}

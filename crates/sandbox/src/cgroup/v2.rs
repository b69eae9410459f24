//! The unified tree.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd};
use std::path::Path;
use std::rc::Rc;

use rustix::fs::{AtFlags, Mode};
use rustix::io::Errno;
use rustix::process::Uid;

use super::{
    CPU_PERIOD_US, CPU_WEIGHT_DEFAULT, CRADLE, CgroupError, GroupLimits, Hierarchy, Kind, Node, Place, Top, Usage, component,
    make_top, open_directory, read, read_key, read_number, remove_directory, write,
};
use crate::step::StepError;

/// Which controllers a tree gives to the groups in it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Offer {
    memory: bool,
    pids: bool,
    cpu: bool,
}

impl Offer {
    /// What the group may use.
    pub(super) fn of(directory: BorrowedFd<'_>) -> Self {
        let offered = read(directory, "cgroup.controllers").unwrap_or_default();
        let has = |controller| offered.split_ascii_whitespace().any(|found| found == controller);
        Self { memory: has("memory"), pids: has("pids"), cpu: has("cpu") }
    }

    /// Lets the groups in `directory` use it.
    pub(super) fn enable(self, directory: BorrowedFd<'_>) -> Result<(), StepError> {
        for (there, controller) in [(self.memory, "+memory"), (self.pids, "+pids"), (self.cpu, "+cpu")] {
            if there {
                write(directory, "cgroup.subtree_control", controller, "enable a controller in a control group")?;
            }
        }
        Ok(())
    }
}

/// Makes the top group and lets instances have limits, as far as the tree above gives them: what it does not give is told by
/// [`Hierarchy::missing`].
pub(super) fn open(parent: &Path, name: &str) -> Result<Hierarchy, CgroupError> {
    let (root, directory) = make_top(parent, name)?;
    let offer = Offer::of(directory.as_fd());
    let mut missing = Vec::new();
    for (there, words) in [(offer.memory, "memory limit"), (offer.pids, "process limit"), (offer.cpu, "processor limit")] {
        if !there {
            missing.push(words);
        }
    }
    let place = Rc::new(Place { directory, kind: Kind::V2(offer) });
    let hierarchy =
        Hierarchy { name: name.to_owned(), tops: vec![Top { root, place: Rc::clone(&place) }], seat: None, missing };
    if let Err(source) = prepare(place.directory.as_fd(), offer) {
        // It is empty; the first error is the one to tell.
        let _ = hierarchy.close();
        return Err(CgroupError::Step { path: name.to_owned(), source });
    }
    Ok(hierarchy)
}

/// Hands the controllers down; no swap for all of them together.
fn prepare(directory: BorrowedFd<'_>, offer: Offer) -> Result<(), StepError> {
    offer.enable(directory)?;
    if offer.memory {
        // Not there without swap accounting.
        return or_absent(write(directory, "memory.swap.max", "0", "forbid swap in our control group"));
    }
    Ok(())
}

/// Makes the node of a zygote with the leaf that the zygote is born into.
pub(super) fn nest(top: &Rc<Place>, name: CString, owner: u32, offer: Offer) -> Result<Node, StepError> {
    let fail = |step| move |errno| StepError { step, errno };
    let parent = top.directory.as_fd();
    let cradle_name = component(CRADLE).expect("a name");
    rustix::fs::mkdirat(parent, &*name, Mode::from_raw_mode(0o755)).map_err(fail("make the control group of a zygote"))?;
    let made = || {
        let directory = open_directory(parent, &name).map_err(fail("open the control group of a zygote"))?;
        offer.enable(directory.as_fd())?;
        let births = match hand_over(directory.as_fd(), owner) {
            Ok(()) => true,
            // An ordinary user cannot give to the ids of others: children enter by their doors instead.
            Err(Errno::PERM) => false,
            Err(errno) => return Err(fail("hand the control group of a zygote over")(errno)),
        };
        rustix::fs::mkdirat(&directory, &*cradle_name, Mode::from_raw_mode(0o755)).map_err(fail("make a zygote's leaf"))?;
        let cradle = open_directory(directory.as_fd(), &cradle_name).map_err(|errno| {
            let _ = remove_directory(directory.as_fd(), &cradle_name);
            fail("open a zygote's leaf")(errno)
        })?;
        Ok((directory, cradle, births))
    };
    match made() {
        Ok((directory, cradle, births)) => {
            let place = Rc::new(Place { directory, kind: Kind::V2(offer) });
            Ok(Node { top: Rc::clone(top), name, place, cradle, births })
        }
        Err(error) => {
            // It is empty; the first error is the one to tell.
            let _ = remove_directory(parent, &name);
            Err(error)
        }
    }
}

/// Gives the right to put processes into a group to a host id: of all its files `cgroup.procs` alone.
pub(super) fn hand_over(directory: BorrowedFd<'_>, owner: u32) -> Result<(), Errno> {
    rustix::fs::chownat(directory, "cgroup.procs", Some(Uid::from_raw(owner)), None, AtFlags::SYMLINK_NOFOLLOW)
}

/// Sets the limits of an instance's group: over the memory limit all of it is killed, not one process at random.
pub(super) fn limit(directory: BorrowedFd<'_>, offer: Offer, limits: GroupLimits) -> Result<(), StepError> {
    if offer.memory {
        write(directory, "memory.max", &limits.memory_bytes.to_string(), "set the memory limit of a control group")?;
        write(directory, "memory.oom.group", "1", "set a control group to die as a whole")?;
    }
    if offer.pids {
        write(directory, "pids.max", &limits.pids_max.to_string(), "set the process limit of a control group")?;
    }
    if offer.cpu {
        if limits.cpu_weight != CPU_WEIGHT_DEFAULT {
            write(directory, "cpu.weight", &limits.cpu_weight.to_string(), "set the processor share of a control group")?;
        }
        if let Some(milli) = limits.cpu_milli {
            let quota = format!("{} {CPU_PERIOD_US}", u64::from(milli) * CPU_PERIOD_US / 1000);
            // Not there where the kernel is built without quotas.
            write(directory, "cpu.max", &quota, "set the processor quota of a control group")?;
        }
    }
    Ok(())
}

/// Adds what a group counted. Processor time is counted in every group, memory where the controller is.
pub(super) fn usage(directory: BorrowedFd<'_>, usage: &mut Usage) {
    // memory.peak: since 5.19.
    usage.memory_peak_bytes = read_number(directory, "memory.peak");
    usage.memory_now_bytes = read_number(directory, "memory.current");
    // Of this group and none below; before 5.2 the two are one, since nothing is below.
    let local = read_key(directory, "memory.events.local", "oom_kill");
    usage.oom_kills = local.or_else(|| read_key(directory, "memory.events", "oom_kill")).unwrap_or(0);
    usage.cpu_us = read_key(directory, "cpu.stat", "usage_usec");
}

fn or_absent(result: Result<(), StepError>) -> Result<(), StepError> {
    match result {
        Err(StepError { errno: Errno::NOENT | Errno::OPNOTSUPP, .. }) => Ok(()),
        other => other,
    }
}

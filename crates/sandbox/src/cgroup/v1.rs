//! The first version of the interface: one tree per controller.

use std::os::fd::{AsFd, BorrowedFd};
use std::path::PathBuf;
use std::rc::Rc;

use super::view::Seat;
use super::{
    CPU_PERIOD_US, CPU_WEIGHT_DEFAULT, CgroupError, GroupLimits, Hierarchy, Kind, Mount, Place, Top, Usage, make_top, read_key,
    read_number, write,
};
use crate::step::StepError;

/// Controllers that instances have groups in. A mount with several of them counts once.
pub(super) const CONTROLLERS: [&str; 4] = ["memory", "pids", "cpu", "cpuacct"];
/// `cpu.shares` of a group with the default weight.
const SHARES_DEFAULT: u64 = 1024;
/// Least and greatest `cpu.shares` (`MIN_SHARES` and `MAX_SHARES` of kernel/sched).
const SHARES_RANGE: (u64, u64) = (2, 1 << 18);

/// A mounted controller.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Controller {
    /// `memory`, `pids`, `cpu` or `cpuacct`.
    pub name: &'static str,
    /// Root of its tree.
    pub mount: PathBuf,
}

impl Controller {
    /// The controllers that are mounted, the first mount of each, in the order of [`CONTROLLERS`].
    pub(super) fn find(mounts: &str) -> Vec<Self> {
        let found = CONTROLLERS.into_iter().filter_map(|name| {
            let mount = Mount::all(mounts)
                .find(|mount| mount.kind == "cgroup" && mount.options.split(',').any(|option| option == name))?;
            Some(Self { name, mount: mount.place })
        });
        found.collect()
    }
}

/// What a group is for: several where controllers are mounted together.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
#[expect(clippy::struct_excessive_bools, reason = "one for each controller, any of which can be there or not")]
pub(super) struct Role {
    memory: bool,
    pids: bool,
    cpu: bool,
    cpuacct: bool,
}

/// The controllers of a role, in the order in which the kernel lists them.
pub(super) fn names(role: Role) -> Vec<&'static str> {
    let all = [("cpu", role.cpu), ("cpuacct", role.cpuacct), ("memory", role.memory), ("pids", role.pids)];
    all.into_iter().filter_map(|(name, has)| has.then_some(name)).collect()
}

/// Makes the top groups.
pub(super) fn open(controllers: &[Controller], name: &str) -> Result<Hierarchy, CgroupError> {
    let mut places: Vec<(&PathBuf, Role)> = Vec::new();
    for controller in controllers {
        let role = match places.iter_mut().find(|(mount, _)| **mount == controller.mount) {
            Some((_, role)) => role,
            None => &mut places.push_mut((&controller.mount, Role::default())).1,
        };
        match controller.name {
            "memory" => role.memory = true,
            "pids" => role.pids = true,
            "cpu" => role.cpu = true,
            _ => role.cpuacct = true,
        }
    }
    let mut missing = Vec::new();
    let words = ["memory limit", "process limit", "processor limit", "processor time"];
    for (controller, words) in CONTROLLERS.into_iter().zip(words) {
        if !controllers.iter().any(|found| found.name == controller) {
            missing.push(words);
        }
    }
    let mut hierarchy = Hierarchy { name: name.to_owned(), tops: Vec::new(), seat: None, missing };
    for (mount, role) in places {
        let top = match make_top(mount, name) {
            Ok((root, directory)) => Top { root, place: Rc::new(Place { directory, kind: Kind::V1(role) }) },
            Err(error) => {
                // They are empty; the first error is the one to tell.
                let _ = hierarchy.close();
                return Err(error);
            }
        };
        let prepared = prepare(&top, role);
        hierarchy.tops.push(top);
        if let Err(source) = prepared {
            let _ = hierarchy.close();
            return Err(CgroupError::Step { path: name.to_owned(), source });
        }
    }
    hierarchy.seat = Seat::open(name);
    Ok(hierarchy)
}

/// Groups below inherit the swappiness of their parent when they are made.
fn prepare(top: &Top, role: Role) -> Result<(), StepError> {
    if role.memory {
        return write(top.place.directory.as_fd(), "memory.swappiness", "0", "set the swappiness of a control group");
    }
    Ok(())
}

/// Sets the limits of an instance's group.
pub(super) fn limit(directory: BorrowedFd<'_>, role: Role, limits: GroupLimits) -> Result<(), StepError> {
    if role.memory {
        let bytes = limits.memory_bytes.to_string();
        write(directory, "memory.limit_in_bytes", &bytes, "set the memory limit of a control group")?;
        // Memory and swap together; there only where the kernel accounts swap.
        match write(directory, "memory.memsw.limit_in_bytes", &bytes, "set the limit of memory and swap of a control group") {
            Ok(()) | Err(StepError { errno: rustix::io::Errno::NOENT | rustix::io::Errno::OPNOTSUPP, .. }) => {}
            error => return error,
        }
    }
    if role.pids {
        write(directory, "pids.max", &limits.pids_max.to_string(), "set the process limit of a control group")?;
    }
    if role.cpu {
        if limits.cpu_weight != CPU_WEIGHT_DEFAULT {
            let shares = shares(limits.cpu_weight).to_string();
            write(directory, "cpu.shares", &shares, "set the processor share of a control group")?;
        }
        if let Some(milli) = limits.cpu_milli {
            let (period, quota) = (CPU_PERIOD_US.to_string(), u64::from(milli) * CPU_PERIOD_US / 1000);
            write(directory, "cpu.cfs_period_us", &period, "set the processor period of a control group")?;
            write(directory, "cpu.cfs_quota_us", &quota.to_string(), "set the processor quota of a control group")?;
        }
    }
    Ok(())
}

/// A weight of v2 as v1 counts it, with the default for the default.
pub(super) fn shares(weight: u32) -> u64 {
    let (least, greatest) = SHARES_RANGE;
    (u64::from(weight) * SHARES_DEFAULT / u64::from(CPU_WEIGHT_DEFAULT)).clamp(least, greatest)
}

/// Adds what a group counted.
pub(super) fn usage(directory: BorrowedFd<'_>, role: Role, usage: &mut Usage) {
    if role.memory {
        usage.memory_peak_bytes = read_number(directory, "memory.max_usage_in_bytes");
        usage.memory_now_bytes = read_number(directory, "memory.usage_in_bytes");
        usage.oom_kills = read_key(directory, "memory.oom_control", "oom_kill").unwrap_or(0);
    }
    if role.cpuacct {
        usage.cpu_us = read_number(directory, "cpuacct.usage").map(|nanoseconds| nanoseconds / 1000);
    }
}

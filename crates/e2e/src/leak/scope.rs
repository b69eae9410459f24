//! A fence around the processes of one test: a control group in a hierarchy that the product does not use. On a machine that has the unified
//! hierarchy alone, what the product moves to groups of its own leaves the fence; those groups are known by their names.
//!
//! Membership is inherited by every child, whatever it does to its parents, sessions and titles, and whoever ends in between. So the leak check
//! finds the processes of this test, and does not take those of tests that run beside it for leaks.
//!
//! An ordinary user makes no control groups: the descendants of this process are his fence ([`Scope::descendants`]). Whoever loses its parent is given
//! to this process, so that it is among them.

use std::collections::BTreeSet;
use std::fs;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};

use super::parse::{cgroup_members, cgroup_mounts, processes};
use crate::wait;

/// Version 1 hierarchies that the product leaves alone, the best one first.
const UNUSED: [&str; 4] = ["name=systemd", "net_cls", "perf_event", "devices"];
/// How long the kernel may take to let go of a control group after its last process.
const REMOVE_LIMIT: Duration = Duration::from_secs(2);

static COUNT: AtomicU32 = AtomicU32::new(0);

/// The fence. What is still inside at its end is killed, so that a failed test does not disturb the next run.
#[derive(Debug)]
pub struct Scope(Fence);

#[derive(Debug)]
enum Fence {
    /// A control group.
    Group(PathBuf),
    /// Below this process.
    Descendants,
}

impl Scope {
    /// Makes a fence without processes.
    pub fn create() -> Result<Self> {
        let mounts = cgroup_mounts()?;
        let unused =
            UNUSED.iter().find_map(|name| mounts.iter().find(|(_, options)| options.split(',').any(|option| option == *name)));
        let (top, _) = unused
            .or_else(|| mounts.iter().find(|(_, options)| options == "cgroup2"))
            .context("no control group file system is mounted: the tests fence their processes by one")?;
        let name = format!("e2e-{}-{}", std::process::id(), COUNT.fetch_add(1, Ordering::Relaxed));
        let directory = top.join(name);
        fs::create_dir(&directory).with_context(|| format!("cannot create {}: tests run as root", directory.display()))?;
        Ok(Self(Fence::Group(directory)))
    }

    /// The fence of everything that this process starts from now on, directly or not.
    pub fn descendants() -> Result<Self> {
        rustix::process::set_child_subreaper(Some(rustix::process::getpid())).context("cannot become the parent of orphans")?;
        Ok(Self(Fence::Descendants))
    }

    /// The file into which a process writes its id to enter, if it must.
    pub fn entrance(&self) -> Option<PathBuf> {
        match &self.0 {
            Fence::Group(directory) => Some(directory.join("cgroup.procs")),
            Fence::Descendants => None,
        }
    }

    /// [`Scope::entrance`] of a scope from [`Scope::create`].
    pub fn procs(&self) -> PathBuf {
        self.entrance().expect("the fence is a control group")
    }

    /// The ids of the processes inside; zombies are no members any more.
    pub fn members(&self) -> Result<BTreeSet<i32>> {
        match &self.0 {
            Fence::Group(directory) => cgroup_members(directory),
            Fence::Descendants => below(std::process::id() as i32),
        }
    }

    /// Kills what is inside.
    pub fn kill(&self) -> Result<()> {
        wait::until_true("the processes of a test end", REMOVE_LIMIT, || {
            let members = self.members()?;
            for pid in &members {
                if let Some(pid) = rustix::process::Pid::from_raw(*pid) {
                    // It may have gone by itself.
                    let _ = rustix::process::kill_process(pid, rustix::process::Signal::KILL);
                }
            }
            Ok(members.is_empty())
        })
    }
}

impl Drop for Scope {
    fn drop(&mut self) {
        // The descendants are not all ours: there are those that other values hold.
        let Fence::Group(directory) = &self.0 else { return };
        let removed = self.kill().and_then(|()| {
            wait::until_true("a control group can be removed", REMOVE_LIMIT, || {
                fs::remove_dir(directory).map(|()| true).map_err(Into::into)
            })
        });
        if let Err(error) = removed {
            eprintln!("{error:#}: {}", directory.display());
        }
    }
}

/// The descendants of a process that live.
fn below(top: i32) -> Result<BTreeSet<i32>> {
    let all = processes()?;
    let mut found = BTreeSet::new();
    let mut pending = vec![top];
    while let Some(parent) = pending.pop() {
        for process in all.iter().filter(|process| process.parent == parent && process.state != 'Z') {
            if found.insert(process.pid) {
                pending.push(process.pid);
            }
        }
    }
    Ok(found)
}

/// The members of every control group with one of the names, in any hierarchy.
pub(super) fn members_of(directories: &BTreeSet<PathBuf>, names: &BTreeSet<String>) -> Result<BTreeSet<i32>> {
    let mut members = BTreeSet::new();
    for directory in directories.iter().filter(|directory| is_named(directory, names)) {
        members.extend(cgroup_members(directory)?);
    }
    Ok(members)
}

/// Whether the last part of a path is one of the names.
pub(super) fn is_named(path: &Path, names: &BTreeSet<String>) -> bool {
    path.file_name().and_then(|name| name.to_str()).is_some_and(|name| names.contains(name))
}

//! Where on the unified tree a server's groups go.
//!
//! 1. In the group that it was started in, if that is delegated to it: a unit of systemd with `Delegate=yes`, or the whole tree of a
//!    container that has nothing but this server in it.
//! 2. Else, under systemd, in a scope that systemd makes for it, `funtainer-ID.scope`.
//! 3. Else at the root of the tree. Without systemd that is nobody's, and the controllers are enabled there; under systemd it is
//!    systemd's, which knows nothing of our groups: that is said, and what the root does not give is missing.
//!
//! In the first two nobody may stay in the group itself, because controllers go to groups below only if no process is beside them
//! (cgroups(7), "no internal processes"): all that is there, which is this server, moves to the leaf `keeper`.

use std::os::fd::AsFd;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::bus::{self, BusError, Scope};
use super::v2::Offer;
use super::{CgroupError, Layout, open_file, open_root, sweep};
use crate::step::StepError;

/// Where the server's own processes are, if the group around them is its own.
pub const LEAF: &str = "keeper";
/// How often processes are moved until none is left: they may fork meanwhile.
const ROUNDS_MAX: usize = 100;
/// How long systemd may take to move this process into a scope, or to forget an old one.
const SCOPE_WAIT: Duration = Duration::from_secs(25);
/// A pause between two looks.
const LOOK: Duration = Duration::from_millis(2);
/// Where systemd says that it runs (sd_booted(3)).
pub(crate) const SYSTEMD: &str = "/run/systemd/system";

/// Where a server's groups go, with what an operator should know of it.
#[derive(Debug)]
pub struct Settled {
    /// For [`super::Hierarchy::open`].
    pub layout: Layout,
    /// Sentences for the log.
    pub notes: Vec<String>,
}

/// Why a place cannot be had.
#[derive(Debug, thiserror::Error)]
pub(super) enum PlaceError {
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    #[error("control group {0} has processes of another pid namespace")]
    Strangers(String),
    #[error("control group {0} does not become empty")]
    Restless(String),
    #[error("systemd gave no scope ({0})")]
    Bus(#[from] BusError),
    #[error("systemd did not move this process into its scope within {} s", SCOPE_WAIT.as_secs())]
    NotMoved,
}

impl Layout {
    /// Finds the place for the groups of the server `name`, as this module's documentation says. Moves this process, which must be the
    /// server itself; on v1 it does nothing.
    pub fn settle(self, name: &str) -> Settled {
        match self {
            Self::V1(_) => Settled { layout: self, notes: Vec::new() },
            Self::V2(mount) => settle(mount, name),
        }
    }
}

fn settle(mount: PathBuf, name: &str) -> Settled {
    let mut notes = Vec::new();
    let own = own_group();
    if let Some(unit) = own.as_ref().and_then(|own| delegated(&mount, own)) {
        match vacate(&unit) {
            Ok(()) => return Settled { layout: Layout::V2(unit), notes },
            Err(error) => notes.push(format!("{} is delegated to this server but cannot be used: {error}", unit.display())),
        }
    }
    let systemd = Path::new(SYSTEMD).is_dir();
    if systemd {
        match scope(&mount, name).and_then(|scope| vacate(&scope).map(|()| scope)) {
            Ok(scope) => return Settled { layout: Layout::V2(scope), notes },
            Err(error) => notes.push(format!(
                "control groups are made where systemd does not know of them, at {}/{name}: {error}; run `funtainer serve` in a unit with \
                 Delegate=yes",
                mount.display()
            )),
        }
    } else if let Err(error) = open_tree(&mount, own.as_deref()) {
        notes.push(format!("limits by control groups cannot be had at {}: {error}", mount.display()));
    }
    Settled { layout: Layout::V2(mount), notes }
}

/// The group of this process on the unified tree, relative to its mount; `None` if it lies outside of what is visible.
pub(crate) fn own_group() -> Option<PathBuf> {
    parse_own_group(&std::fs::read_to_string("/proc/self/cgroup").ok()?)
}

fn parse_own_group(text: &str) -> Option<PathBuf> {
    let path = text.lines().find_map(|line| line.strip_prefix("0::/"))?;
    // `/../x` is a group beside the root of this cgroup namespace; a removed one has a mark behind its name.
    let hidden = path.split('/').any(|part| part == "..") || path.ends_with(" (deleted)");
    (!hidden).then(|| PathBuf::from(path))
}

/// The unit around this process, if systemd has marked it as delegated: the group itself, or the one above if the process is in a leaf
/// already (`DelegateSubgroup=`, or another server in the same unit).
pub(crate) fn delegated(mount: &Path, own: &Path) -> Option<PathBuf> {
    let candidates = [Some(own), own.parent()].into_iter().flatten().filter(|group| !group.as_os_str().is_empty());
    candidates.map(|group| mount.join(group)).find(|group| is_marked(group))
}

/// systemd writes the mark as `trusted.delegate`, which root alone can read, and as `user.delegate`.
fn is_marked(group: &Path) -> bool {
    ["trusted.delegate", "user.delegate"].into_iter().any(|name| {
        let mut value = [0_u8; 8];
        let length = rustix::fs::getxattr(group, name, &mut value).unwrap_or(0);
        &value[..length] == b"1"
    })
}

/// Moves all processes of a group into its leaf, and hands its controllers down.
fn vacate(group: &Path) -> Result<(), PlaceError> {
    let path = group.display().to_string();
    let fail = |step| {
        let path = path.clone();
        move |errno| CgroupError::Step { path, source: StepError { step, errno } }
    };
    let directory = open_root(group)?;
    match rustix::fs::mkdirat(&directory, LEAF, Mode::from_raw_mode(0o755)) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(fail("make the server's leaf")(errno).into()),
    }
    let leaf = open_root(&group.join(LEAF))?;
    for _ in 0..ROUNDS_MAX {
        let listed = read_all(&group.join("cgroup.procs")).map_err(fail("read the processes of a group"))?;
        if listed.is_empty() {
            return Offer::of(directory.as_fd())
                .enable(directory.as_fd())
                .map_err(|source| CgroupError::Step { path, source }.into());
        }
        for pid in listed.lines() {
            if pid == "0" {
                return Err(PlaceError::Strangers(path));
            }
            let moved = open_file(leaf.as_fd(), "cgroup.procs", OFlags::WRONLY)
                .and_then(|procs| rustix::io::write(procs, pid.as_bytes()));
            match moved {
                Ok(_) | Err(Errno::SRCH) => {}
                Err(errno) => return Err(fail("move a process into the server's leaf")(errno).into()),
            }
        }
    }
    Err(PlaceError::Restless(path))
}

fn read_all(path: &Path) -> Result<String, Errno> {
    std::fs::read_to_string(path).map_err(|error| crate::step::errno_of(&error))
}

/// Lets groups at the root of a tree that no systemd manages have controllers.
pub(super) fn open_tree(mount: &Path, own: Option<&Path>) -> Result<(), PlaceError> {
    let directory = open_root(mount)?;
    let offer = Offer::of(directory.as_fd());
    let enabled = offer.enable(directory.as_fd());
    match enabled {
        // Processes are beside: this is the root of a container's tree. Where only this server is there it may move.
        Err(StepError { errno: Errno::BUSY, .. }) if own.is_some_and(|own| own.as_os_str().is_empty()) && is_alone(mount) => {
            vacate(mount)
        }
        other => other.map_err(|source| CgroupError::Step { path: mount.display().to_string(), source }.into()),
    }
}

/// Whether this process is the only one in a group.
fn is_alone(group: &Path) -> bool {
    read_all(&group.join("cgroup.procs")).is_ok_and(|listed| listed.trim_ascii() == std::process::id().to_string())
}

/// Has systemd make a scope with this process in it, and returns its directory.
fn scope(mount: &Path, name: &str) -> Result<PathBuf, PlaceError> {
    let unit = format!("{name}.scope");
    let deadline = Instant::now() + SCOPE_WAIT;
    // What a killed server left in the scope of this name, if systemd has not ended it yet.
    sweep::empty(&mount.join("system.slice").join(&unit))?;
    let scope = Scope { unit: &unit, description: "funtainer serve and its instances", pid: std::process::id() };
    loop {
        match ask(scope) {
            // The old one is empty, and about to be forgotten.
            Err(BusError::Refused { name, .. }) if name.ends_with(".UnitExists") && Instant::now() < deadline => {
                std::thread::sleep(LOOK);
            }
            other => break other?,
        }
    }
    loop {
        if let Some(own) = own_group().filter(|own| own.file_name().is_some_and(|last| last == unit.as_str())) {
            return Ok(mount.join(own));
        }
        if Instant::now() >= deadline {
            return Err(PlaceError::NotMoved);
        }
        std::thread::sleep(LOOK);
    }
}

/// Asks the manager of this user, by its bus or without one by its own socket.
fn ask(scope: Scope<'_>) -> Result<(), BusError> {
    let (bus, private) = manager_sockets();
    match bus::start_scope(&bus, true, scope) {
        Err(BusError::Stream { .. }) if private.exists() => bus::start_scope(&private, false, scope),
        other => other,
    }
}

/// Where the manager of this user listens, root's being the system's: its bus, and its own socket.
pub(crate) fn manager_sockets() -> (PathBuf, PathBuf) {
    let user = crate::userns::outer_uid();
    if user == 0 {
        return (PathBuf::from("/run/dbus/system_bus_socket"), PathBuf::from("/run/systemd/private"));
    }
    let runtime = std::env::var_os("XDG_RUNTIME_DIR").map_or_else(|| PathBuf::from(format!("/run/user/{user}")), PathBuf::from);
    (runtime.join("bus"), runtime.join("systemd/private"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_own_group_is_read() {
        for (text, expect) in [
            ("0::/\n", Some("")),
            ("0::/system.slice/funtainer.service\n", Some("system.slice/funtainer.service")),
            ("9:name=systemd:/\n4:memory:/x\n0::/a/b\n", Some("a/b")),
            ("4:memory:/x\n", None),
            ("0::/../beside\n", None),
            ("0::/gone (deleted)\n", None),
            ("", None),
        ] {
            assert_eq!(parse_own_group(text), expect.map(PathBuf::from), "{text:?}");
        }
    }
}

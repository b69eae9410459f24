//! The daemon's birth: from a copy of the keeper to an unprivileged program in a root of its own.
//!
//! Runs in the forked child, which is a process with one thread and may allocate. What the daemon sees: `/data` (the data directory), `/etc`
//! and `/usr` read-only (names, certificates, time zones), the directory that `/etc/resolv.conf` points into, `/proc`, `/dev/null`,
//! `/dev/random`, `/dev/urandom`. Its program is the keeper's own, by a descriptor: no directory on the way to it need be open to it.

use std::ffi::{CStr, CString};
use std::fs;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;
use rustix::thread::{CapabilitySet, UnshareFlags};

use super::data::DaemonUser;
use crate::daemon::{ADMIN, CONTROL, FIRST_TCP};
use crate::executable::Executable;
use crate::fds;
use crate::mount::{self, INERT, Tmpfs};
use crate::signals::{self, SignalSet};
use crate::step::{StepError, at, errno_of};
use crate::userns::{self, IdRange};

/// Room of the daemon's root: names only.
const ROOT_BYTES: u64 = 1 << 20;
/// Where descriptors wait that are to be placed at fixed numbers; above all of those.
const WAITING: i32 = 256;

/// What a daemon is made from.
pub(super) struct Birth<'a> {
    /// A detached mount of the data directory.
    pub(super) data: BorrowedFd<'a>,
    pub(super) user: DaemonUser,
    /// There is one id only, which is the keeper's too.
    pub(super) single: bool,
    pub(super) executable: &'a Executable,
    /// The whole command line.
    pub(super) argv: &'a [CString],
    pub(super) control: BorrowedFd<'a>,
    pub(super) admin: BorrowedFd<'a>,
    pub(super) listeners: &'a [OwnedFd],
    /// Pid of the keeper.
    pub(super) keeper: i32,
}

/// Turns this process into the daemon; returns only on failure.
pub(super) fn become_daemon(birth: &Birth<'_>) -> StepError {
    let failed = own_namespace(birth.single)
        .and_then(|()| enter(birth))
        .and_then(|()| place_descriptors(birth))
        .and_then(|()| drop_privileges(birth));
    match failed {
        Ok(()) => birth.executable.execute(birth.argv),
        Err(error) => error,
    }
}

/// With the keeper's own id, the daemon would be the owner of every user namespace that the keeper makes, and so have all power in them
/// (user_namespaces(7)). In one beside them it has none.
fn own_namespace(single: bool) -> Result<(), StepError> {
    if !single {
        return Ok(());
    }
    // SAFETY: these concern this process, which has one thread, and touch no memory or descriptor.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER | UnshareFlags::NEWNS) }
        .map_err(at("make the daemon's user namespace"))?;
    userns::write_maps(rustix::process::getpid().as_raw_pid(), IdRange::SINGLE)
}

/// Builds the root on the place of `/sys` and moves into it.
fn enter(birth: &Birth<'_>) -> Result<(), StepError> {
    mount::make_private()?;
    let mut trees = Vec::new();
    for (source, target, recursive) in [
        // With what lies on them: a user may not see below a mount of the host's (mount_namespaces(7)).
        (Path::new("/etc"), Path::new("etc"), true),
        (Path::new("/usr"), Path::new("usr"), true),
        (Path::new("/proc"), Path::new("proc"), true),
    ] {
        trees.push((clone_tree(source, recursive)?, target.to_owned()));
    }
    let resolver = resolver_directory();
    if let Some(directory) = &resolver {
        trees.push((clone_tree(directory, true)?, directory.strip_prefix("/").unwrap_or(directory).to_owned()));
    }

    let tmpfs = Tmpfs { size_bytes: ROOT_BYTES, uid: 0, gid: 0, mode: 0o755, attributes: INERT };
    let root = mount::tmpfs(&tmpfs)?;
    mount::attach(root.as_fd(), open_path(c"/sys")?.as_fd())?;
    mount::attach(birth.data, make_path(root.as_fd(), Path::new("data"))?.as_fd())?;
    if birth.single {
        close_to_daemon(root.as_fd())?;
    }
    for (tree, target) in trees {
        mount::attach(tree.as_fd(), make_path(root.as_fd(), &target)?.as_fd())?;
    }
    let (host, dev) = (open_path(c"/dev")?, make_path(root.as_fd(), Path::new("dev"))?);
    // A static program cannot look the libc's getrandom up: `random` is read once, to know that there is entropy, then `urandom`.
    for name in [c"null", c"random", c"urandom"] {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::CLOEXEC;
        rustix::fs::openat(&dev, name, flags, Mode::from_raw_mode(0o666)).map_err(at("make a file for a device"))?;
        mount::bind_file(host.as_fd(), name, dev.as_fd(), name)?;
    }
    drop((host, dev));
    mount::pivot(root.as_fd())?;
    for path in [c"/etc", c"/usr"] {
        mount::remount_tree_read_only(path)?;
    }
    if let Some(directory) = resolver {
        mount::remount_tree_read_only(&c_path(&directory)?)?;
    }
    Ok(())
}

/// What the keeper alone may write is the daemon's by its owner: mounts keep it out.
fn close_to_daemon(root: BorrowedFd<'_>) -> Result<(), StepError> {
    let data = mount::target(root, c"data")?;
    let store = mount::target(data.as_fd(), c"store")?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    let layers = rustix::mount::open_tree(&store, c"layers", flags).map_err(at("clone the directory of layers"))?;
    mount::set_read_only(layers.as_fd())?;
    mount::attach(layers.as_fd(), mount::target(store.as_fd(), c"layers")?.as_fd())?;
    let attributes = INERT | rustix::mount::MountAttrFlags::MOUNT_ATTR_RDONLY;
    let empty = mount::tmpfs(&Tmpfs { size_bytes: ROOT_BYTES, uid: 0, gid: 0, mode: 0o000, attributes })?;
    mount::attach(empty.as_fd(), mount::target(data.as_fd(), c"unpacked")?.as_fd())
}

/// The directory that `/etc/resolv.conf` leads to, where that is outside of `/etc` and `/usr` (systemd-resolved: `/run/systemd/resolve`).
fn resolver_directory() -> Option<PathBuf> {
    let file = fs::canonicalize("/etc/resolv.conf").ok()?;
    let directory = file.parent()?;
    let covered = directory == Path::new("/") || ["/etc", "/usr", "/proc"].iter().any(|root| directory.starts_with(root));
    (!covered).then(|| directory.to_owned())
}

fn clone_tree(path: &Path, recursive: bool) -> Result<OwnedFd, StepError> {
    let mut flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    if recursive {
        flags |= OpenTreeFlags::AT_RECURSIVE;
    }
    rustix::mount::open_tree(rustix::fs::CWD, path, flags).map_err(at("clone a directory of the host for the daemon"))
}

fn open_path(path: &CStr) -> Result<OwnedFd, StepError> {
    rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(at("open a mount point"))
}

/// Makes and opens a relative path beneath our own new root.
fn make_path(root: BorrowedFd<'_>, path: &Path) -> Result<OwnedFd, StepError> {
    let mut place = root.try_clone_to_owned().map_err(|e| StepError { step: "copy a descriptor", errno: errno_of(&e) })?;
    for name in path.components() {
        place = mount::target(place.as_fd(), &c_path(Path::new(name.as_os_str()))?)?;
    }
    Ok(place)
}

fn c_path(path: &Path) -> Result<CString, StepError> {
    CString::new(path.as_os_str().as_bytes()).map_err(|_| StepError { step: "name a path", errno: Errno::INVAL })
}

/// `/dev/null` at 0 and 1 (the standard output is the keeper's alone), the logs at 2, then what the daemon takes over; nothing else.
fn place_descriptors(birth: &Birth<'_>) -> Result<(), StepError> {
    let failed = "place the daemon's descriptors";
    let null = rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(at(failed))?;
    let order = [(null.as_fd(), 0), (null.as_fd(), 1), (birth.control, CONTROL), (birth.admin, ADMIN)];
    let listeners = birth.listeners.iter().map(AsFd::as_fd).zip(FIRST_TCP..);
    let mut waiting = Vec::new();
    for (fd, number) in order.into_iter().chain(listeners) {
        waiting.push((rustix::io::fcntl_dupfd_cloexec(fd, WAITING).map_err(at(failed))?, number));
    }
    let end = FIRST_TCP + birth.listeners.len() as i32;
    for (fd, number) in &waiting {
        fds::place(fd.as_fd(), *number).map_err(at(failed))?;
    }
    // The copies are close-on-exec, like all else above.
    std::mem::forget(waiting);
    std::mem::forget(null);
    fds::cloexec_from(end).map_err(at(failed))
}

fn drop_privileges(birth: &Birth<'_>) -> Result<(), StepError> {
    userns::drop_bounding(CapabilitySet::empty())?;
    userns::no_new_privs()?;
    userns::become_user(birth.user.uid, birth.user.gid, &[])?;
    userns::set_capabilities(CapabilitySet::empty())?;
    rustix::process::umask(Mode::from_raw_mode(0o077));
    signals::reset_actions();
    signals::set_mask(&SignalSet::empty()).map_err(at("unblock signals"))?;
    // Last: changing ids clears it (prctl(2)). A keeper that died before is no parent any more.
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(at("set the parent-death signal"))?;
    match rustix::process::getppid() {
        Some(parent) if parent.as_raw_pid() == birth.keeper => Ok(()),
        _ => Err(StepError { step: "find the keeper alive", errno: Errno::SRCH }),
    }
}

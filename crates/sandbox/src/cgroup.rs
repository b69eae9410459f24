//! Limits and accounts: one control group per instance, on either version of the interface.
//!
//! ```text
//! v1   MOUNT(memory)/funtainer-ID/INSTANCE   MOUNT(pids)/...   MOUNT(cpuacct)/...
//! v2   MOUNT/funtainer-ID/INSTANCE
//! ```
//! The top directory bears the id of a data directory, so that servers beside each other never touch each other's groups: nothing outside
//! of it is written, not even the root's `cgroup.subtree_control`. On v2 no process sits in an inner node; the keeper stays where it was.
//!
//! Lifecycle: [`Layout::detect`] → [`Hierarchy::open`] (sweeps what a killed server left) → [`Hierarchy::create`] per instance →
//! [`InstanceCgroup::usage`] when its last process is gone → [`InstanceCgroup::remove`] → [`Hierarchy::close`].

mod v1;
mod v2;

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::PathBuf;
use std::time::{Duration, Instant};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Pid, PidfdFlags};

use crate::fds::{pidfd_ended, pidfd_signal};
use crate::step::{StepError, errno_of};

/// `CLONE_INTO_CGROUP` of clone(2): the child is born in the group whose directory is named. The crate `libc` has it too narrow.
pub const CLONE_INTO_CGROUP: u64 = 0x2_0000_0000;
/// How many controllers an instance may have a group in.
const GROUPS_MAX: usize = v1::CONTROLLERS.len();
/// How long a sweep waits for the processes that it killed.
const SWEEP_WAIT: Duration = Duration::from_secs(10);
/// Longest file of a group that is read: `memory.stat` and the like are never asked for, lists of processes are read whole elsewhere.
const FILE_BYTES_MAX: usize = 4096;

/// Why a group cannot be used.
#[derive(Debug, thiserror::Error)]
pub enum CgroupError {
    /// `/proc/self/mountinfo` cannot be read.
    #[error("read /proc/self/mountinfo: {0}")]
    MountInfo(#[source] std::io::Error),
    /// No cgroup file system is mounted.
    #[error("no cgroup file system is mounted: mount one at /sys/fs/cgroup")]
    NotMounted,
    /// The name is no single component of a path.
    #[error("not a name for a control group: {0:?}")]
    Name(String),
    /// The kernel refused a step.
    #[error("control group {path}: {source}")]
    Step {
        /// The group, relative to the mount of its controller.
        path: String,
        /// Step and errno.
        source: StepError,
    },
    /// Processes of an earlier server cannot be ended.
    #[error("control group {path} still has processes {} s after SIGKILL", SWEEP_WAIT.as_secs())]
    StillPopulated {
        /// The group.
        path: String,
    },
}

/// Limits of one instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupLimits {
    /// Most memory in bytes: its processes, its tmpfs and its page cache. No swap.
    pub memory_bytes: u64,
    /// Most processes and threads.
    pub pids_max: u32,
}

/// What an instance used, read when its last process is gone. `None` where the kernel does not count it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Highest memory use in bytes.
    pub memory_peak_bytes: Option<u64>,
    /// Processor time in microseconds.
    pub cpu_us: Option<u64>,
    /// Processes that the kernel killed because the memory limit was reached.
    pub oom_kills: u64,
}

/// Which interface is used, and where it is mounted.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// Controllers mounted apart from each other, beside an empty v2 tree or none.
    V1(Vec<v1::Controller>),
    /// The unified tree.
    V2(PathBuf),
}

impl Layout {
    /// Finds the interface: v1 if `memory` is mounted as a controller of it, else the unified tree.
    pub fn detect() -> Result<Self, CgroupError> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").map_err(CgroupError::MountInfo)?;
        Self::parse(&mounts).ok_or(CgroupError::NotMounted)
    }

    /// The unified tree, even where it lies empty beside v1 controllers: for tests and for freezing.
    pub fn unified() -> Result<Self, CgroupError> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").map_err(CgroupError::MountInfo)?;
        Mount::all(&mounts)
            .find(|mount| mount.kind == "cgroup2")
            .map(|mount| Self::V2(mount.place))
            .ok_or(CgroupError::NotMounted)
    }

    fn parse(mounts: &str) -> Option<Self> {
        let controllers = v1::Controller::find(mounts);
        if controllers.iter().any(|controller| controller.name == "memory") {
            return Some(Self::V1(controllers));
        }
        Mount::all(mounts).find(|mount| mount.kind == "cgroup2").map(|mount| Self::V2(mount.place))
    }
}

/// One line of proc_pid_mountinfo(5), as far as cgroups need it.
struct Mount<'a> {
    place: PathBuf,
    kind: &'a str,
    options: &'a str,
}

impl<'a> Mount<'a> {
    fn all(text: &'a str) -> impl Iterator<Item = Self> {
        text.lines().filter_map(Self::parse)
    }

    fn parse(line: &'a str) -> Option<Self> {
        let (front, back) = line.split_once(" - ")?;
        let place = front.split(' ').nth(4)?;
        let mut back = back.split(' ');
        let (kind, options) = (back.next()?, back.nth(1)?);
        Some(Self { place: PathBuf::from(unescape(place)), kind, options })
    }
}

/// Blanks in mountinfo are written as octal numbers.
fn unescape(text: &str) -> String {
    text.replace("\\040", " ").replace("\\011", "\t").replace("\\012", "\n").replace("\\134", "\\")
}

/// The top group of one server in each controller.
#[derive(Debug)]
pub struct Hierarchy {
    name: String,
    tops: Vec<Top>,
    missing: Vec<&'static str>,
}

/// The top group in one mount.
#[derive(Debug)]
struct Top {
    /// The mount's root.
    root: OwnedFd,
    /// The group.
    directory: OwnedFd,
    kind: Kind,
}

/// What a group is for, which decides its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    V1(v1::Role),
    V2 { memory: bool, pids: bool },
}

impl Hierarchy {
    /// Makes the top groups `name`, after whatever was left of that name has been swept away: its processes are killed, its groups
    /// removed.
    pub fn open(layout: &Layout, name: &str) -> Result<Self, CgroupError> {
        component(name)?;
        sweep(layout, name)?;
        match layout {
            Layout::V1(controllers) => v1::open(controllers, name),
            Layout::V2(mount) => v2::open(mount, name),
        }
    }

    /// No groups at all: for a server that may make none. Instances have neither limits nor counts.
    pub fn none() -> Self {
        Self { name: String::new(), tops: Vec::new(), missing: Vec::new() }
    }

    /// Limits and counts that this machine does not offer, as words for a warning: `memory limit`, `process limit`, `processor time`.
    pub fn missing(&self) -> &[&'static str] {
        &self.missing
    }

    /// Makes the group of an instance with its limits.
    pub fn create(&self, instance: &str, limits: GroupLimits) -> Result<InstanceCgroup, CgroupError> {
        let name = component(instance)?;
        let mut cgroup = InstanceCgroup { name, groups: Vec::with_capacity(GROUPS_MAX) };
        for top in &self.tops {
            if let Err(source) = cgroup.add(top, limits) {
                let error = CgroupError::Step { path: format!("{}/{instance}", self.name), source };
                // Empty groups can always be removed; the first error is the one to tell.
                let _ = cgroup.remove();
                return Err(error);
            }
        }
        Ok(cgroup)
    }

    /// Removes the top groups. Those of all instances must be gone, else `EBUSY` and what remains is left for the next sweep: what can be
    /// removed is, and the first error is told.
    pub fn close(self) -> Result<(), CgroupError> {
        if self.tops.is_empty() {
            return Ok(());
        }
        let name = component(&self.name)?;
        let mut outcome = Ok(());
        for top in &self.tops {
            match rustix::fs::unlinkat(&top.root, &*name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => {
                    let source = StepError { step: "remove the top directory", errno };
                    outcome = outcome.and(Err(CgroupError::Step { path: self.name.clone(), source }));
                }
            }
        }
        outcome
    }
}

/// The group of one instance in each controller.
#[derive(Debug)]
pub struct InstanceCgroup {
    name: CString,
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    /// The top group, to remove this one from.
    top: OwnedFd,
    directory: OwnedFd,
    /// v1 `tasks` (which skips the global lock that `cgroup.procs` takes), v2 `cgroup.procs`; opened for writing by the keeper, whose
    /// right to move processes goes with the descriptor.
    door: OwnedFd,
    kind: Kind,
    removed: bool,
}

/// Whether a group could be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// It is gone in every controller.
    Done,
    /// A process is still in it, or not yet reaped: try again later.
    Busy,
}

impl InstanceCgroup {
    /// Descriptors for the child: it writes itself through each ([`attach_current`]). At most four.
    pub fn doors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.groups.iter().map(|group| group.door.as_fd())
    }

    /// The directory for `CLONE_INTO_CGROUP`; `None` on v1, whose groups are entered by their doors.
    pub fn directory(&self) -> Option<BorrowedFd<'_>> {
        self.groups.iter().find(|group| matches!(group.kind, Kind::V2 { .. })).map(|group| group.directory.as_fd())
    }

    /// Reads what was used so far. A file that is not there leaves its value out.
    pub fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        for group in &self.groups {
            match group.kind {
                Kind::V1(role) => v1::usage(group.directory.as_fd(), role, &mut usage),
                Kind::V2 { .. } => v2::usage(group.directory.as_fd(), &mut usage),
            }
        }
        usage
    }

    /// Kills every process in the group at once. Needed only where the end of a pid namespace does not do it.
    pub fn kill(&self) -> Result<(), StepError> {
        self.groups.first().map_or(Ok(()), |group| kill_all(group.directory.as_fd()))
    }

    /// Stops (`true`) or continues every process in the group. v2 only: `EOPNOTSUPP` elsewhere.
    pub fn freeze(&self, frozen: bool) -> Result<(), StepError> {
        let step = "freeze a control group";
        let directory = self.directory().ok_or(StepError { step, errno: Errno::OPNOTSUPP })?;
        write(directory, "cgroup.freeze", if frozen { "1" } else { "0" }, step)
    }

    /// Removes the group in every controller. Can be called again after [`Removal::Busy`].
    pub fn remove(&mut self) -> Result<Removal, StepError> {
        let mut removal = Removal::Done;
        for group in self.groups.iter_mut().filter(|group| !group.removed) {
            match rustix::fs::unlinkat(&group.top, &*self.name, AtFlags::REMOVEDIR) {
                Ok(()) | Err(Errno::NOENT) => group.removed = true,
                Err(Errno::BUSY) => removal = Removal::Busy,
                Err(errno) => return Err(StepError { step: "remove a control group", errno }),
            }
        }
        Ok(removal)
    }

    fn add(&mut self, top: &Top, limits: GroupLimits) -> Result<(), StepError> {
        let fail = |step| move |errno| StepError { step, errno };
        rustix::fs::mkdirat(&top.directory, &*self.name, Mode::from_raw_mode(0o755)).map_err(fail("make a control group"))?;
        let undo = |error| {
            // Nothing can be in it yet; a failure here is the lesser one.
            let _ = rustix::fs::unlinkat(&top.directory, &*self.name, AtFlags::REMOVEDIR);
            error
        };
        let made = || {
            let directory = open_directory(top.directory.as_fd(), &self.name).map_err(fail("open a control group"))?;
            let door = match top.kind {
                Kind::V1(role) => {
                    v1::limit(directory.as_fd(), role, limits)?;
                    open_file(directory.as_fd(), "tasks", OFlags::WRONLY)
                }
                Kind::V2 { memory, pids } => {
                    v2::limit(directory.as_fd(), memory, pids, limits)?;
                    open_file(directory.as_fd(), "cgroup.procs", OFlags::WRONLY)
                }
            }
            .map_err(fail("open the list of processes of a control group"))?;
            let top_again =
                rustix::io::fcntl_dupfd_cloexec(&top.directory, 0).map_err(fail("keep the parent of a control group"))?;
            Ok(Group { top: top_again, directory, door, kind: top.kind, removed: false })
        };
        self.groups.push(made().map_err(undo)?);
        Ok(())
    }
}

/// Moves the calling thread (v1 `tasks`) or process (v2 `cgroup.procs`) into the groups of `doors`.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn attach_current<'a>(doors: impl IntoIterator<Item = BorrowedFd<'a>>) -> Result<(), StepError> {
    for door in doors {
        // 0 is the writer itself, in whatever pid namespace it lives.
        rustix::io::write(door, b"0").map_err(|errno| StepError { step: "enter a control group", errno })?;
    }
    Ok(())
}

/// Removes everything of the name: kills its processes, waits for their end, removes its groups from the leaves up. Nothing of the name
/// is fine.
pub fn sweep(layout: &Layout, name: &str) -> Result<(), CgroupError> {
    let component = component(name)?;
    let mounts: Vec<&PathBuf> = match layout {
        Layout::V1(controllers) => controllers.iter().map(|controller| &controller.mount).collect(),
        Layout::V2(mount) => vec![mount],
    };
    for mount in mounts {
        let root = open_root(mount)?;
        match open_directory(root.as_fd(), &component) {
            Err(Errno::NOENT) => {}
            Err(errno) => {
                return Err(CgroupError::Step {
                    path: name.to_owned(),
                    source: StepError { step: "open a group to sweep", errno },
                });
            }
            Ok(_) => sweep_group(root.as_fd(), &component, name)?,
        }
    }
    Ok(())
}

/// Sweeps one group with all below it.
fn sweep_group(parent: BorrowedFd<'_>, name: &CString, path: &str) -> Result<(), CgroupError> {
    let fail = |step| move |errno| CgroupError::Step { path: path.to_owned(), source: StepError { step, errno } };
    let directory = open_directory(parent, name).map_err(fail("open a group to sweep"))?;
    for entry in rustix::fs::Dir::read_from(&directory).map_err(fail("list a group"))? {
        let entry = entry.map_err(fail("list a group"))?;
        let entry_name = entry.file_name();
        if entry.file_type() == rustix::fs::FileType::Directory && entry_name != c"." && entry_name != c".." {
            sweep_group(directory.as_fd(), &entry_name.to_owned(), &format!("{path}/{}", entry_name.to_string_lossy()))?;
        }
    }
    let deadline = Instant::now() + SWEEP_WAIT;
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
fn kill_all(directory: BorrowedFd<'_>) -> Result<(), StepError> {
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
fn processes(directory: BorrowedFd<'_>) -> Result<Vec<Pid>, Errno> {
    let file = open_file(directory, "cgroup.procs", OFlags::RDONLY)?;
    let text = std::io::read_to_string(std::fs::File::from(file)).map_err(|error| errno_of(&error))?;
    // 0 stands for a process outside of our pid namespace, which cannot be named.
    Ok(text.lines().filter_map(|line| Pid::from_raw(line.parse().ok()?)).collect())
}

/// One component of a path, not hidden, without a blank or a slash.
fn component(name: &str) -> Result<CString, CgroupError> {
    let fits = !name.is_empty()
        && name.len() <= 200
        && !name.starts_with('.')
        && name.bytes().all(|byte| byte.is_ascii_alphanumeric() || b"-_.".contains(&byte));
    if !fits {
        return Err(CgroupError::Name(name.to_owned()));
    }
    CString::new(name).map_err(|_| CgroupError::Name(name.to_owned()))
}

fn open_root(mount: &PathBuf) -> Result<OwnedFd, CgroupError> {
    rustix::fs::open(mount, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        CgroupError::Step { path: mount.display().to_string(), source: StepError { step: "open the mount", errno } }
    })
}

/// Makes and opens the top group beneath the root of a mount.
fn make_top(mount: &PathBuf, name: &str) -> Result<(OwnedFd, OwnedFd), CgroupError> {
    let fail = |step| move |errno| CgroupError::Step { path: name.to_owned(), source: StepError { step, errno } };
    let root = open_root(mount)?;
    let component = component(name)?;
    rustix::fs::mkdirat(&root, &*component, Mode::from_raw_mode(0o755)).map_err(fail("make the top directory"))?;
    let directory = open_directory(root.as_fd(), &component).map_err(fail("open the top directory"))?;
    Ok((root, directory))
}

fn open_directory(parent: BorrowedFd<'_>, name: &CString) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(parent, &**name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty())
}

fn open_file(directory: BorrowedFd<'_>, name: &str, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::openat(directory, name, flags | OFlags::CLOEXEC, Mode::empty())
}

/// Writes a value in one write, as the files of cgroups ask for.
fn write(directory: BorrowedFd<'_>, name: &str, value: &str, step: &'static str) -> Result<(), StepError> {
    open_file(directory, name, OFlags::WRONLY)
        .and_then(|file| rustix::io::write(file, value.as_bytes()))
        .map(drop)
        .map_err(|errno| StepError { step, errno })
}

/// Reads a small file; `None` if it is not there or not text.
fn read(directory: BorrowedFd<'_>, name: &str) -> Option<String> {
    let file = open_file(directory, name, OFlags::RDONLY).ok()?;
    let mut bytes = vec![0_u8; FILE_BYTES_MAX];
    let length = rustix::io::read(file, &mut bytes[..]).ok()?;
    bytes.truncate(length);
    String::from_utf8(bytes).ok()
}

fn read_number(directory: BorrowedFd<'_>, name: &str) -> Option<u64> {
    read(directory, name)?.trim_ascii().parse().ok()
}

/// The number behind `key` in a file of lines `key number`.
fn read_key(directory: BorrowedFd<'_>, name: &str, key: &str) -> Option<u64> {
    let text = read(directory, name)?;
    text.lines().filter_map(|line| line.split_once(' ')).find(|(found, _)| *found == key)?.1.trim_ascii().parse().ok()
}

#[cfg(test)]
mod tests;

//! Limits and accounts: one control group per instance, on either version of the interface.
//!
//! ```text
//! v1   MOUNT(memory)/funtainer-ID/INSTANCE   MOUNT(pids)/...   MOUNT(cpu)/...   MOUNT(cpuacct)/...
//! v2   PLACE/funtainer-ID/NEST/INSTANCE      one nest per zygote
//!                             └ zygote       the zygote itself
//!      PLACE/keeper                          keeper and daemon, where PLACE is ours alone (a unit or scope of systemd)
//! ```
//! The top directory bears the id of a data directory, so that servers beside each other never touch each other's groups. What PLACE is says
//! [`place`]. On v2 no process sits in an inner node. A nest's and an instance's `cgroup.procs` belong to the host id of the function's
//! root, because a zygote may then have its inits born in their groups (`CLONE_INTO_CGROUP`); files with limits belong to root always.
//!
//! Lifecycle: [`Layout::detect`] → [`Layout::settle`] → [`Hierarchy::open`] (sweeps what a killed server left) → [`Hierarchy::nest`] per zygote →
//! [`Nest::create`] per instance → [`InstanceCgroup::usage`] when its last process is gone → [`InstanceCgroup::remove`] → [`Nest::remove`] →
//! [`Hierarchy::close`].

pub mod bus;
pub mod place;
mod sweep;
mod v1;
mod v2;
mod view;

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::rc::Rc;

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use crate::step::StepError;

pub use place::Settled;
pub use sweep::sweep;
pub use view::ViewName;
pub(crate) use view::tree;

/// How many controllers an instance may have a group in.
const GROUPS_MAX: usize = v1::CONTROLLERS.len();
/// Longest file of a group that is read: `memory.stat` and the like are never asked for, lists of processes are read whole elsewhere.
const FILE_BYTES_MAX: usize = 4096;
/// The share of the processors that every group has unless told otherwise.
pub const CPU_WEIGHT_DEFAULT: u32 = 100;
/// What a quota of processor time is counted in, in microseconds: the kernel's default.
const CPU_PERIOD_US: u64 = 100_000;
/// The leaf of a nest in which its zygote is.
const CRADLE: &str = "zygote";

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
    #[error("control group {path} still has processes {} s after SIGKILL", sweep::WAIT.as_secs())]
    StillPopulated {
        /// The group.
        path: String,
    },
}

/// Limits of one instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct GroupLimits {
    /// Most memory in bytes: its processes, its tmpfs, its page cache and what the kernel keeps for it. No swap.
    pub memory_bytes: u64,
    /// Most processes and threads.
    pub pids_max: u32,
    /// Its share of busy processors beside other groups, 1 to 10,000 as v2 counts; [`CPU_WEIGHT_DEFAULT`].
    pub cpu_weight: u32,
    /// Most processor time, in thousandths of one processor, counted over 100 ms. At least 10, which is the kernel's least.
    pub cpu_milli: Option<u32>,
}

/// What an instance used, read when its last process is gone. `None` where the kernel does not count it.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Usage {
    /// Highest memory use in bytes; v2 counts it since 5.19.
    pub memory_peak_bytes: Option<u64>,
    /// Memory in use now: files on its tmpfs and page cache, when its processes are gone.
    pub memory_now_bytes: Option<u64>,
    /// Processor time in microseconds.
    pub cpu_us: Option<u64>,
    /// Processes that the kernel killed because memory ran out: their group's, or the machine's.
    pub oom_kills: u64,
}

/// Which interface is used, and where.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Layout {
    /// Controllers mounted apart from each other, beside an empty v2 tree or none.
    V1(Vec<v1::Controller>),
    /// The unified tree: the directory in which the top group is made, which is the mount unless [`Layout::settle`] found a better one.
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
    /// Where zygotes are, and with them their instances, in a controller that sets no limits here.
    seat: Option<view::Seat>,
    missing: Vec<&'static str>,
}

/// The top group in one mount.
#[derive(Debug)]
struct Top {
    /// The directory that it lies in.
    root: OwnedFd,
    place: Rc<Place>,
}

/// A group that others are made in.
#[derive(Debug)]
struct Place {
    directory: OwnedFd,
    kind: Kind,
}

/// What a group is for, which decides its files.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    V1(v1::Role),
    V2(v2::Offer),
}

impl Hierarchy {
    /// Makes the top groups `name`, after whatever was left of that name has been swept away: its processes are killed, its groups
    /// removed.
    pub fn open(layout: &Layout, name: &str) -> Result<Self, CgroupError> {
        component(name)?;
        sweep(layout, name)?;
        match layout {
            Layout::V1(controllers) => v1::open(controllers, name),
            Layout::V2(parent) => v2::open(parent, name),
        }
    }

    /// For a user who may make no groups: instances have none, so that only the sizes of their file systems and their resource limits
    /// hold them.
    pub fn absent() -> Self {
        let missing = vec!["memory limit", "process limit", "processor limit", "processor time"];
        Self { name: String::new(), tops: Vec::new(), seat: None, missing }
    }

    /// Limits and counts that this machine does not offer, as words for a warning: `memory limit`, `process limit`, `processor limit`,
    /// `processor time`.
    pub fn missing(&self) -> &[&'static str] {
        &self.missing
    }

    /// Makes the groups of a zygote, in which its instances are to have theirs. `owner` is the host id of root in the zygote's user
    /// namespace.
    pub fn nest(&self, name: &str, owner: u32) -> Result<Nest, CgroupError> {
        let component = component(name)?;
        let fail = |source| CgroupError::Step { path: format!("{}/{name}", self.name), source };
        match self.tops.first() {
            Some(Top { place, .. }) if let Kind::V2(offer) = place.kind => {
                let node = v2::nest(place, component, owner, offer).map_err(fail)?;
                Ok(Nest {
                    path: format!("{}/{name}", self.name),
                    owner,
                    places: vec![Rc::clone(&node.place)],
                    node: Some(node),
                })
            }
            _ => {
                let places = self.tops.iter().map(|top| Rc::clone(&top.place)).collect();
                Ok(Nest { path: self.name.clone(), owner, places, node: None })
            }
        }
    }

    /// Removes the top groups. Those of all instances must be gone, else `EBUSY` and what remains is left for the next sweep: what can be
    /// removed is, and the first error is told.
    pub fn close(self) -> Result<(), CgroupError> {
        if self.tops.is_empty() {
            return Ok(());
        }
        let name = component(&self.name)?;
        let mut outcome = Ok(());
        let roots = self.tops.iter().map(|top| &top.root).chain(self.seat.iter().map(view::Seat::root));
        for root in roots {
            if let Err(errno) = remove_directory(root.as_fd(), &name) {
                let source = StepError { step: "remove the top directory", errno };
                outcome = outcome.and(Err(CgroupError::Step { path: self.name.clone(), source }));
            }
        }
        outcome
    }
}

/// Whether a group could be removed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Removal {
    /// It is gone in every controller.
    Done,
    /// A process is still in it, or not yet reaped: try again later.
    Busy,
}

/// The groups of one zygote. On v1, where a process enters its groups by itself, they are the server's own.
#[derive(Debug)]
pub struct Nest {
    path: String,
    owner: u32,
    places: Vec<Rc<Place>>,
    node: Option<Node>,
}

/// A nest that is a group of its own.
#[derive(Debug)]
struct Node {
    top: Rc<Place>,
    name: CString,
    place: Rc<Place>,
    cradle: OwnedFd,
    /// Whether its zygote may have children born in the groups below.
    births: bool,
}

impl Nest {
    /// The directory of the group for the zygote itself, to be born into; `None` where it stays where its parent is.
    pub fn cradle(&self) -> Option<BorrowedFd<'_>> {
        self.node.as_ref().map(|node| node.cradle.as_fd())
    }

    /// Makes the group of an instance with its limits.
    pub fn create(&self, instance: &str, limits: GroupLimits) -> Result<InstanceCgroup, CgroupError> {
        let name = component(instance)?;
        let births = self.node.as_ref().is_some_and(|node| node.births);
        let mut cgroup = InstanceCgroup { name, births, groups: Vec::with_capacity(GROUPS_MAX) };
        for place in &self.places {
            if let Err(source) = cgroup.add(place, limits, births.then_some(self.owner)) {
                let error = CgroupError::Step { path: format!("{}/{instance}", self.path), source };
                // Empty groups can always be removed; the first error is the one to tell.
                let _ = cgroup.remove();
                return Err(error);
            }
        }
        Ok(cgroup)
    }

    /// Removes what is the zygote's own. Its instances' groups must be gone before; can be called again after [`Removal::Busy`].
    pub fn remove(&mut self) -> Result<Removal, StepError> {
        let Some(node) = &self.node else { return Ok(Removal::Done) };
        let cradle = component(CRADLE).expect("a name");
        for (parent, name) in [(&node.place, &cradle), (&node.top, &node.name)] {
            match remove_directory(parent.directory.as_fd(), name) {
                Ok(()) => {}
                Err(Errno::BUSY) => return Ok(Removal::Busy),
                Err(errno) => return Err(StepError { step: "remove the control group of a zygote", errno }),
            }
        }
        self.node = None;
        Ok(Removal::Done)
    }
}

/// A way into the groups of an instance.
#[derive(Debug)]
pub struct Entrance<'a> {
    /// Whether a process is born there; else it enters by itself.
    pub born: bool,
    /// One directory to be born in, or a door for each group.
    pub descriptors: Vec<BorrowedFd<'a>>,
}

/// The group of one instance in each controller.
#[derive(Debug)]
pub struct InstanceCgroup {
    name: CString,
    births: bool,
    groups: Vec<Group>,
}

#[derive(Debug)]
struct Group {
    /// What it lies in.
    place: Rc<Place>,
    directory: OwnedFd,
    /// v1 `tasks` (which skips the global lock that `cgroup.procs` takes), v2 `cgroup.procs`; opened for writing by the keeper, whose
    /// right to move processes goes with the descriptor.
    door: OwnedFd,
    removed: bool,
}

impl InstanceCgroup {
    /// Descriptors for the child: it writes itself through each ([`attach_current`]). At most four.
    pub fn doors(&self) -> impl Iterator<Item = BorrowedFd<'_>> {
        self.groups.iter().map(|group| group.door.as_fd())
    }

    /// The directory for `CLONE_INTO_CGROUP` by the zygote: a child that is born there needs no door. `None` on v1, and where the zygote may
    /// not.
    pub fn birthplace(&self) -> Option<BorrowedFd<'_>> {
        self.groups.first().filter(|_| self.births).map(|group| group.directory.as_fd())
    }

    /// How a process that a zygote makes comes in.
    pub fn entrance(&self) -> Entrance<'_> {
        match self.birthplace() {
            Some(group) => Entrance { born: true, descriptors: vec![group] },
            None => Entrance { born: false, descriptors: self.doors().collect() },
        }
    }

    /// Reads what was used so far. A file that is not there leaves its value out.
    pub fn usage(&self) -> Usage {
        let mut usage = Usage::default();
        for group in &self.groups {
            match group.place.kind {
                Kind::V1(role) => v1::usage(group.directory.as_fd(), role, &mut usage),
                Kind::V2(_) => v2::usage(group.directory.as_fd(), &mut usage),
            }
        }
        usage
    }

    /// Kills every process in the group at once. Needed only where the end of a pid namespace does not do it.
    pub fn kill(&self) -> Result<(), StepError> {
        self.groups.first().map_or(Ok(()), |group| sweep::kill_all(group.directory.as_fd()))
    }

    /// Stops (`true`) or continues every process in the group. v2 only: `EOPNOTSUPP` elsewhere.
    pub fn freeze(&self, frozen: bool) -> Result<(), StepError> {
        let step = "freeze a control group";
        let unified = self.groups.iter().find(|group| matches!(group.place.kind, Kind::V2(_)));
        let group = unified.ok_or(StepError { step, errno: Errno::OPNOTSUPP })?;
        write(group.directory.as_fd(), "cgroup.freeze", if frozen { "1" } else { "0" }, step)
    }

    /// Removes the group in every controller. Can be called again after [`Removal::Busy`].
    pub fn remove(&mut self) -> Result<Removal, StepError> {
        let mut removal = Removal::Done;
        for group in self.groups.iter_mut().filter(|group| !group.removed) {
            match remove_directory(group.place.directory.as_fd(), &self.name) {
                Ok(()) => group.removed = true,
                Err(Errno::BUSY) => removal = Removal::Busy,
                Err(errno) => return Err(StepError { step: "remove a control group", errno }),
            }
        }
        Ok(removal)
    }

    fn add(&mut self, place: &Rc<Place>, limits: GroupLimits, owner: Option<u32>) -> Result<(), StepError> {
        let fail = |step| move |errno| StepError { step, errno };
        let parent = place.directory.as_fd();
        rustix::fs::mkdirat(parent, &*self.name, Mode::from_raw_mode(0o755)).map_err(fail("make a control group"))?;
        let made = || {
            let directory = open_directory(parent, &self.name).map_err(fail("open a control group"))?;
            let door = match place.kind {
                Kind::V1(role) => {
                    v1::limit(directory.as_fd(), role, limits)?;
                    "tasks"
                }
                Kind::V2(offer) => {
                    v2::limit(directory.as_fd(), offer, limits)?;
                    if let Some(owner) = owner {
                        v2::hand_over(directory.as_fd(), owner).map_err(fail("hand a control group over"))?;
                    }
                    "cgroup.procs"
                }
            };
            let door = open_file(directory.as_fd(), door, OFlags::WRONLY)
                .map_err(fail("open the list of processes of a control group"))?;
            Ok(Group { place: Rc::clone(place), directory, door, removed: false })
        };
        let group = made().inspect_err(|_| {
            // Nothing can be in it yet; a failure here is the lesser one.
            let _ = remove_directory(parent, &self.name);
        })?;
        self.groups.push(group);
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

/// Removes an empty group; one that is gone is fine.
fn remove_directory(parent: BorrowedFd<'_>, name: &CString) -> Result<(), Errno> {
    match rustix::fs::unlinkat(parent, &**name, AtFlags::REMOVEDIR) {
        Ok(()) | Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(errno),
    }
}

fn open_root(mount: &Path) -> Result<OwnedFd, CgroupError> {
    rustix::fs::open(mount, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| {
        CgroupError::Step { path: mount.display().to_string(), source: StepError { step: "open the mount", errno } }
    })
}

/// Makes and opens the top group in a directory.
fn make_top(mount: &Path, name: &str) -> Result<(OwnedFd, OwnedFd), CgroupError> {
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

//! `funtainer init`: pid 1 of an instance, from its birth to its exit.
//!
//! ```text
//! born by the zygote's clone3 in new mount, pid, uts and ipc namespaces, in the network namespace that the zygote prepared
//!   cgroup ─ root attached ─ planned files ─ volumes, tmpfs ─ /dev /proc /sys ─ pivot ─ masks ─ host name ─ sockets sent ─ working directory
//!   ─ limits ─ bounding set ─ no_new_privs unless switched off
//!   ─ filter ─ vfork ┬ stdio, ids, capabilities, exec: the image's process
//!                    └ Executed sent, all descriptors closed, capabilities dropped but KILL
//!   ─ waits for signals: reaps orphans, forwards the stop signal ─ main process ended: its status to the shared page, exit
//! ```
//! From clone to exec nothing here allocates or locks; what needs an allocation was made by the zygote ([`Prepared`]).

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, SendFlags, SocketFlags, SocketType, ipproto};
use rustix::process::{Gid, Resource, Rlimit, Uid};
use rustix::thread::{CapabilitySet, UnshareFlags};

use crate::cgroup::ViewName;
use crate::clone::{VforkStack, vfork};
use crate::mount::{self, INERT, Tmpfs};
use crate::program::{Program, c_string};
use crate::protocol::{DESCRIPTORS_MAX, InitMessage, InitStep, LISTENERS_MAX, RevisionSpec, SocketCounts, Streams, WindowSize};
use crate::seccomp::Filter;
use crate::signals::{self, FORWARD, SignalSet};
use crate::step::StepError;
use crate::title::Title;
use crate::userns::{self, IdRange};
use crate::zygote::Plan;
use crate::{cgroup, fds, netns, terminal};

/// What a place in the shared page holds until the init has written its main process's wait status: no wait status looks like it.
pub(crate) const NO_STATUS: i32 = i32::MIN;
/// What it holds from the moment on when the program runs and the init has given up its powers: commands may come in.
pub(crate) const RUNNING: i32 = i32::MIN + 1;
/// Stands beside a wait status, which has 16 bits, where the writable layer had no room left when the main process ended.
pub(crate) const FULL: i32 = 1 << 16;
/// Where the zygote's root has an empty directory for the instance's root.
pub(crate) const ROOT_PLACE: &CStr = c"/root";
/// Where programs look for their control groups, below the root.
const VIEWS: &CStr = c"sys/fs/cgroup";
/// Where the zygote has the tree for that.
const VIEW_TREE: &CStr = c"/cgroup";
/// Where POSIX shared memory is.
const SHM: &str = "/dev/shm";
/// Room of `/dev/shm`, as Docker's default. Its pages count towards the memory limit.
const SHM_BYTES: u64 = 64 << 20;
/// Mode of a tmpfs where the image has nothing, as tmpfs itself has it.
const TMPFS_MODE: u32 = 0o1777;
/// Connections that may wait on one of the platform's listeners inside.
const LISTEN_BACKLOG: i32 = 128;
/// Exit code of an init that could not execute its program: nobody reads it, the daemon was told the step.
pub(crate) const EXIT_NOT_EXECUTED: i32 = 127;

/// What all instances of a revision have in common, made by the zygote.
pub(crate) struct Prepared {
    program: Program,
    filter: Filter,
    stack: VforkStack,
    title: Title,
    hostname: Vec<u8>,
    working_dir: CString,
    working_dir_parents: Vec<Place>,
    /// Upper ones first.
    extras: Vec<Extra>,
    /// Where control groups are seen, in the zygote's root.
    views: Vec<CString>,
    /// Whether all of them lie in one tree of the zygote's.
    view_tree: bool,
    shm_bytes: u64,
    files: Vec<PreparedFile>,
    listeners: Vec<u16>,
    sockets: SocketCounts,
    person: Person,
    ids: IdRange,
    /// Instead of the streams that come with a start.
    terminal: Option<WindowSize>,
    read_only_root: bool,
    no_new_privileges: bool,
    stop_signal: i32,
    open_files: u64,
    /// Most processes in the user namespace, where no control group limits them.
    processes: Option<u64>,
}

/// Who a program runs as.
pub(crate) struct Person {
    pub(crate) uid: Uid,
    pub(crate) gid: Gid,
    pub(crate) groups: Vec<Gid>,
    /// Capabilities: by the user that is asked for, also where root stands in for it because there is no other id.
    pub(crate) kept: CapabilitySet,
}

impl Person {
    /// Who these ids are in a user namespace with `ids`.
    pub(crate) fn new(ids: IdRange, uid: u32, gid: u32, groups: &[u32]) -> Self {
        let groups = if ids.is_single() { &[] } else { groups };
        Self {
            uid: Uid::from_raw(ids.inside(uid)),
            gid: Gid::from_raw(ids.inside(gid)),
            groups: groups.iter().map(|group| Gid::from_raw(*group)).collect(),
            kept: if uid == 0 { userns::KEPT } else { CapabilitySet::empty() },
        }
    }
}

/// A directory, by the path of its parent and its name there; both relative to the root.
struct Place {
    parent: CString,
    name: CString,
}

/// A directory that is not simply the image's.
struct Extra {
    /// From the root.
    path: CString,
    /// The directories on the way, without the last one.
    parents: Vec<Place>,
    place: Place,
    kind: ExtraKind,
}

#[derive(Clone, Copy)]
enum ExtraKind {
    /// Writable, with what the image has there.
    Volume,
    /// A file system in memory of this size.
    Tmpfs(u64),
}

impl Extra {
    fn new(path: &[u8], kind: ExtraKind) -> Option<Self> {
        let mut parents = places(path);
        let place = parents.pop()?;
        Some(Self { path: c_string(path), parents, place, kind })
    }

    /// All of a specification, upper ones first: none covers another.
    fn all(spec: &RevisionSpec) -> Vec<Self> {
        let volumes = spec.volumes.iter().map(|path| (path.as_slice(), ExtraKind::Volume));
        let tmpfs = spec.isolation.tmpfs.iter().filter(|mount| mount.path() != SHM).map(|mount| {
            let size = mount.size().unwrap_or(spec.limits.memory);
            (mount.path().as_bytes(), ExtraKind::Tmpfs(size.as_bytes()))
        });
        let mut all: Vec<Self> = volumes.chain(tmpfs).filter_map(|(path, kind)| Self::new(path, kind)).collect();
        all.sort_by_key(|extra| extra.parents.len());
        all
    }
}

struct PreparedFile {
    parents: Vec<Place>,
    place: Place,
    mode: Mode,
    content: Vec<u8>,
}

impl Prepared {
    /// From a plan with a checked specification.
    pub(crate) fn new(plan: &Plan<'_>, filter: Filter) -> Self {
        let Plan { spec, ids, title, processes, ref views, .. } = *plan;
        let files = spec.files.iter().map(|file| {
            let mut places = places(&file.path);
            let place = places.pop().unwrap_or(Place { parent: c".".to_owned(), name: c".".to_owned() });
            PreparedFile { parents: places, place, mode: Mode::from_raw_mode(file.mode), content: file.content.clone() }
        });
        Self {
            program: Program::new(&spec.argv, &spec.env),
            filter,
            stack: VforkStack::new(),
            title,
            hostname: spec.hostname.as_bytes().to_vec(),
            working_dir: c_string(&spec.working_dir),
            working_dir_parents: places(&spec.working_dir),
            extras: Extra::all(spec),
            views: views.iter().map(view_place).collect(),
            view_tree: has_view_tree(views),
            shm_bytes: spec
                .isolation
                .tmpfs
                .iter()
                .find(|mount| mount.path() == SHM)
                .map_or(SHM_BYTES, |mount| mount.size().unwrap_or(spec.limits.memory).as_bytes()),
            files: files.collect(),
            listeners: spec.listeners.clone(),
            sockets: spec.sockets,
            person: Person::new(ids, spec.uid, spec.gid, &spec.groups),
            ids,
            terminal: match spec.streams {
                Streams::Terminal(size) => Some(size),
                Streams::Log | Streams::Call => None,
            },
            read_only_root: spec.isolation.read_only,
            no_new_privileges: spec.isolation.no_new_privileges,
            stop_signal: spec.stop_signal.number().into(),
            open_files: spec.limits.open_files.into(),
            processes: processes.map(u64::from),
        }
    }

    /// The ids of the user namespace.
    pub(crate) fn ids(&self) -> IdRange {
        self.ids
    }

    /// Shows this text as the command line of this process.
    pub(crate) fn set_title(&self, title: &[u8]) {
        // SAFETY: a process of ours before its exec, with one thread, which reads neither arguments nor environment.
        unsafe { self.title.set(title) };
    }
}

/// Where an init puts a view before it changes its root.
fn view_place(name: &ViewName) -> CString {
    let parts = [ROOT_PLACE.to_bytes(), VIEWS.to_bytes()].into_iter().chain((!name.is_empty()).then_some(name.to_bytes()));
    c_string(&parts.collect::<Vec<_>>().join(&b'/'))
}

/// Whether views lie in a directory, rather than one in its place.
pub(crate) fn has_view_tree(views: &[ViewName]) -> bool {
    views.iter().any(|name| !name.is_empty())
}

/// Each directory on the way to `path`, and `path` itself, from the root on.
fn places(path: &[u8]) -> Vec<Place> {
    let mut parent = b".".to_vec();
    let mut places = Vec::new();
    for name in path.split(|byte| *byte == b'/').filter(|name| !name.is_empty() && *name != b".") {
        places.push(Place { parent: c_string(&parent), name: c_string(name) });
        parent.push(b'/');
        parent.extend_from_slice(name);
    }
    places
}

/// One start: what came with the order.
pub(crate) struct Start<'a> {
    /// The detached root file system.
    pub(crate) root: OwnedFd,
    /// Where [`InitMessage`]s go.
    pub(crate) daemon: OwnedFd,
    /// Standard input, output and error. What is not given is the terminal, where the instance has one, else `/dev/null`.
    pub(crate) streams: [Option<OwnedFd>; 3],
    /// The instance's cgroups in the zygote's views, as many as it has names for.
    pub(crate) views: &'a [CString],
    /// Doors of the cgroups.
    pub(crate) doors: Doors,
    /// Where the main process's wait status goes.
    pub(crate) status: &'a AtomicI32,
    /// What the network has.
    pub(crate) network: netns::Prepared,
}

/// The doors of an instance's cgroups.
pub(crate) type Doors = fds::Fds;

/// A step that did not work.
pub(crate) struct Failed {
    pub(crate) step: InitStep,
    pub(crate) errno: Errno,
}

/// Names the step of a refusal.
pub(crate) fn during(step: InitStep) -> impl Fn(StepError) -> Failed {
    move |error| Failed { step, errno: error.errno }
}

/// As [`during`], for bare errnos.
pub(crate) fn at(step: InitStep) -> impl Fn(Errno) -> Failed {
    move |errno| Failed { step, errno }
}

/// The whole life of an init.
pub(crate) fn run(prepared: &Prepared, start: Start<'_>) -> ! {
    prepared.set_title(b"funtainer init");
    // The name is for people; nothing depends on it.
    let _ = crate::title::set_name(c"funtainer-init");
    let status = start.status;
    let Start { root, daemon, streams, views, doors, network, .. } = start;
    let main = set_up(prepared, root, daemon.as_fd(), views, doors, network)
        .and_then(|own| execute(prepared, streams.each_ref().map(|given| given.as_ref().unwrap_or(&own).as_fd())));
    let message = match &main {
        Ok(_) => InitMessage::Executed,
        Err(failed) => InitMessage::ExecFailed { step: failed.step, errno: failed.errno.raw_os_error() },
    };
    // A daemon that is gone learns of the instance from the keeper.
    let _ = fds::send(daemon.as_fd(), &message.to_bytes(), &[], SendFlags::empty());
    let Ok(main) = main else { exit(EXIT_NOT_EXECUTED) };
    // From here on nothing of ours is open: what the image can reach of this process has nothing to give. The values above are
    // never dropped, since this function does not return.
    if fds::close_from(0).is_err() || userns::set_capabilities(CapabilitySet::KILL).is_err() {
        exit(EXIT_NOT_EXECUTED);
    }
    status.store(RUNNING, Ordering::Release);
    let wait_status = watch(main, prepared.stop_signal);
    let full = if !prepared.read_only_root && is_full() { FULL } else { 0 };
    status.store(wait_status | full, Ordering::Release);
    exit(0)
}

pub(crate) fn exit(code: i32) -> ! {
    // SAFETY: ends this process without running anything of its parent's that the copy of its memory holds.
    unsafe { libc::_exit(code) }
}

/// Whether the writable layer has no room left, for bytes or for files.
fn is_full() -> bool {
    rustix::fs::statfs(c"/").is_ok_and(|room| room.f_bavail == 0 || room.f_ffree == 0)
}

/// All before the program; returns what its streams are that were not given: the slave end of its terminal, or `/dev/null` inside.
fn set_up(
    prepared: &Prepared,
    root: OwnedFd,
    daemon: BorrowedFd<'_>,
    views: &[CString],
    doors: Doors,
    network: netns::Prepared,
) -> Result<OwnedFd, Failed> {
    enter_cgroup(doors)?;
    mounts(prepared, root, views)?;
    let system = at(InitStep::Network);
    rustix::system::sethostname(&prepared.hostname).map_err(&system)?;
    send_sockets(daemon, counts(prepared.sockets, network))?;
    send_listeners(daemon, &prepared.listeners)?;
    let own = match prepared.terminal {
        None => rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(at(InitStep::Mounts))?,
        Some(size) => send_terminal(daemon, size, prepared.person.uid)?,
    };
    enter_directory(&prepared.working_dir).map_err(at(InitStep::WorkingDirectory))?;
    if prepared.read_only_root {
        mount::remount_read_only(c"/").map_err(during(InitStep::Mounts))?;
    }
    confine(prepared)?;
    Ok(own)
}

/// Makes a terminal inside and sends its master end; the slave end.
pub(crate) fn send_terminal(daemon: BorrowedFd<'_>, size: WindowSize, owner: Uid) -> Result<OwnedFd, Failed> {
    let made = terminal::open(size, owner).map_err(at(InitStep::Terminal))?;
    let message = InitMessage::Terminal.to_bytes();
    fds::send(daemon, &message, &[made.master.as_fd()], SendFlags::empty()).map_err(at(InitStep::Terminal))?;
    Ok(made.slave)
}

/// What no program of an instance can undo, whether it is its first or a later one: no core files, a bound on open files, a filter, powers that
/// are gone.
pub(crate) fn confine(prepared: &Prepared) -> Result<(), Failed> {
    let privileges = at(InitStep::Privileges);
    // Not 0, which a piped core_pattern ignores (core(5)); no core fits into one byte.
    rustix::process::setrlimit(Resource::Core, Rlimit { current: Some(1), maximum: Some(1) }).map_err(&privileges)?;
    // Soft and hard: programs that close every descriptor they may have, or make a table of them, find the number that was meant. The
    // server's own hard limit stays above all.
    let most = rustix::process::getrlimit(Resource::Nofile).maximum;
    let most = Some(most.map_or(prepared.open_files, |most| most.min(prepared.open_files)));
    rustix::process::setrlimit(Resource::Nofile, Rlimit { current: most, maximum: most }).map_err(&privileges)?;
    if prepared.processes.is_some() {
        let most = prepared.processes;
        rustix::process::setrlimit(Resource::Nproc, Rlimit { current: most, maximum: most }).map_err(&privileges)?;
    }
    not_dumpable()?;
    userns::drop_bounding(userns::KEPT).map_err(during(InitStep::Privileges))?;
    // Without it setuid bits and file capabilities give what the bounding set holds. The filter needs it, or CAP_SYS_ADMIN, which ends with
    // the exec.
    if prepared.no_new_privileges {
        userns::no_new_privs().map_err(during(InitStep::Privileges))?;
    }
    prepared.filter.install().map_err(during(InitStep::Seccomp))
}

/// No process without power over the host's user namespace may trace this one from now on, or follow its links in `/proc`.
pub(crate) fn not_dumpable() -> Result<(), Failed> {
    userns::not_dumpable().map_err(during(InitStep::Privileges))
}

fn enter_cgroup(doors: Doors) -> Result<(), Failed> {
    for door in doors {
        cgroup::attach_current([door.as_fd()]).map_err(during(InitStep::Cgroup))?;
    }
    // After the attachment: the namespace's root is the group that one is in.
    // SAFETY: CLONE_NEWCGROUP concerns this process alone and touches no memory or descriptor.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWCGROUP) }.map_err(at(InitStep::Cgroup))
}

/// The root file system with all that lies in it; this process is in it afterwards.
fn mounts(prepared: &Prepared, root: OwnedFd, views: &[CString]) -> Result<(), Failed> {
    let failed = during(InitStep::Mounts);
    let open = |path: &CStr| {
        rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(at(InitStep::Mounts))
    };
    mount::attach(root.as_fd(), open(ROOT_PLACE)?.as_fd()).map_err(&failed)?;
    drop(root);
    let root = open(ROOT_PLACE)?;
    // Before anything of the kernel's is mounted: no link of the image leads there.
    files(prepared, root.as_fd()).map_err(at(InitStep::Files))?;
    extras(prepared, root.as_fd())?;
    make_directories(root.as_fd(), &prepared.working_dir_parents).map_err(at(InitStep::WorkingDirectory))?;

    let place = |name: &CStr| mount::target(root.as_fd(), name).map_err(&failed);
    mount::move_tree(c"/dev", place(c"dev")?.as_fd()).map_err(&failed)?;
    let shm = Tmpfs { size_bytes: prepared.shm_bytes, uid: 0, gid: 0, mode: 0o1777, attributes: INERT };
    for (name, made) in [
        (c"dev/pts", mount::devpts(prepared.ids)),
        (c"dev/shm", mount::tmpfs(&shm)),
        (c"dev/mqueue", mount::mqueue()),
        (c"proc", mount::procfs()),
        (c"sys", mount::sysfs()),
    ] {
        // The targets of /dev lie in our own tree, which `target` enters like the image's.
        mount::attach(made.map_err(&failed)?.as_fd(), place(name)?.as_fd()).map_err(&failed)?;
    }
    if prepared.view_tree {
        mount::move_tree(VIEW_TREE, place(VIEWS)?.as_fd()).map_err(&failed)?;
    }
    // The ways lead through mounts of ours alone: `/sys` lies over whatever the image has.
    for (place, view) in prepared.views.iter().zip(views) {
        mount::bind(view, place).map_err(&failed)?;
    }
    mount::pivot(root.as_fd()).map_err(&failed)?;
    mount::mask_all().map_err(&failed)
}

/// Writes the planned files into the image's root. The image's links are followed inside it, but for one at the file's own place, which is
/// replaced.
fn files(prepared: &Prepared, root: BorrowedFd<'_>) -> Result<(), Errno> {
    for file in &prepared.files {
        make_directories(root, &file.parents)?;
        let parent = open_inside(root, &file.place.parent)?;
        match rustix::fs::unlinkat(&parent, &file.place.name, rustix::fs::AtFlags::empty()) {
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let made = rustix::fs::openat(&parent, &file.place.name, flags, file.mode)?;
        rustix::fs::fchmod(&made, file.mode)?;
        let mut rest = &file.content[..];
        while !rest.is_empty() {
            let written = rustix::io::write(&made, rest)?;
            rest = &rest[written..];
        }
    }
    Ok(())
}

/// Makes volumes and mounts what was asked for. The image's links are followed inside its root.
///
/// A volume is part of the writable layer. Where the rest of that is to be read-only, its place gets a mount of its own, of the same file system: so
/// it has the image's content, owner and mode, and the room that the writable layer has. A tmpfs has the owner and mode of the image's directory,
/// and is everybody's where the image has none.
fn extras(prepared: &Prepared, root: BorrowedFd<'_>) -> Result<(), Failed> {
    let failed = at(InitStep::Volumes);
    if prepared.extras.is_empty() {
        return Ok(());
    }
    let identity = |directory: BorrowedFd<'_>| rustix::fs::fstat(directory).map(|found| (found.st_dev, found.st_ino));
    let root_identity = identity(root).map_err(&failed)?;
    for Extra { path, parents, place, kind } in &prepared.extras {
        make_directories(root, parents).map_err(&failed)?;
        let is_new = make_directory(root, place).map_err(&failed)?;
        let refused = during(InitStep::Volumes);
        let mount = match kind {
            ExtraKind::Volume if !prepared.read_only_root => continue,
            ExtraKind::Volume => mount::part(open_inside(root, path).map_err(&failed)?.as_fd()),
            ExtraKind::Tmpfs(size_bytes) => {
                let mut options = Tmpfs { size_bytes: *size_bytes, uid: 0, gid: 0, mode: TMPFS_MODE, attributes: INERT };
                if !is_new {
                    let image = open_inside(root, path).and_then(rustix::fs::fstat).map_err(&failed)?;
                    options.uid = image.st_uid;
                    options.gid = image.st_gid;
                    options.mode = image.st_mode & 0o7777;
                }
                mount::tmpfs(&options)
            }
        };
        let target = open_inside(root, path).map_err(&failed)?;
        // What lies on the root is out of sight, but for `/..`: there a root that is to be read-only could be written.
        if identity(target.as_fd()).map_err(&failed)? == root_identity {
            return Err(failed(Errno::BUSY));
        }
        mount::attach(mount.map_err(&refused)?.as_fd(), target.as_fd()).map_err(&refused)?;
    }
    Ok(())
}

/// Makes what is missing of a chain of directories.
fn make_directories(root: BorrowedFd<'_>, chain: &[Place]) -> Result<(), Errno> {
    chain.iter().try_for_each(|place| make_directory(root, place).map(drop))
}

/// Whether it was not there.
fn make_directory(root: BorrowedFd<'_>, place: &Place) -> Result<bool, Errno> {
    let parent = open_inside(root, &place.parent)?;
    match rustix::fs::mkdirat(&parent, &place.name, Mode::from_raw_mode(0o755)) {
        Ok(()) => Ok(true),
        Err(Errno::EXIST) => Ok(false),
        Err(errno) => Err(errno),
    }
}

fn open_inside(root: BorrowedFd<'_>, path: &CStr) -> Result<OwnedFd, Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    rustix::fs::openat2(root, path, flags, Mode::empty(), ResolveFlags::IN_ROOT | ResolveFlags::NO_MAGICLINKS)
}

/// By a descriptor that no link of `/proc` was followed for: none leads out through one that is open here.
pub(crate) fn enter_directory(path: &CStr) -> Result<(), Errno> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat2(CWD, path, flags, Mode::empty(), ResolveFlags::NO_MAGICLINKS)?;
    rustix::process::fchdir(directory)
}

/// What can be made of the wanted numbers: without IPv6 only one family.
pub(crate) fn counts(wanted: SocketCounts, network: netns::Prepared) -> SocketCounts {
    SocketCounts { v4: wanted.v4, v6: if network.ipv6 { wanted.v6 } else { 0 } }
}

/// Makes sockets in the network namespace of the calling thread and sends them in one message.
fn send_sockets(daemon: BorrowedFd<'_>, counts: SocketCounts) -> Result<(), Failed> {
    if counts.total() == 0 {
        return Ok(());
    }
    let mut sockets = [const { None::<OwnedFd> }; DESCRIPTORS_MAX];
    for (index, slot) in sockets.iter_mut().take(counts.total()).enumerate() {
        let made = if index < counts.v4.into() { netns::make_socket_v4() } else { netns::make_socket_v6() };
        *slot = Some(made.map_err(during(InitStep::Network))?);
    }
    send_all(daemon, InitMessage::Sockets(counts), &sockets[..counts.total()]).map_err(at(InitStep::Network))
}

/// [`send_sockets`] for a zygote that has entered an instance's network.
pub(crate) fn send_more_sockets(daemon: BorrowedFd<'_>, counts: SocketCounts) -> Result<(), Errno> {
    send_sockets(daemon, counts).map_err(|failed| failed.errno)
}

fn send_listeners(daemon: BorrowedFd<'_>, ports: &[u16]) -> Result<(), Failed> {
    if ports.is_empty() {
        return Ok(());
    }
    let mut listeners = [const { None::<OwnedFd> }; LISTENERS_MAX];
    for (slot, port) in listeners.iter_mut().zip(ports) {
        *slot = Some(listener(*port).map_err(at(InitStep::Network))?);
    }
    send_all(daemon, InitMessage::Listeners, &listeners[..ports.len()]).map_err(at(InitStep::Network))
}

fn listener(port: u16) -> Result<OwnedFd, Errno> {
    let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, flags, Some(ipproto::TCP))?;
    rustix::net::sockopt::set_socket_reuseaddr(&socket, true)?;
    rustix::net::bind(&socket, &std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, port))?;
    rustix::net::listen(&socket, LISTEN_BACKLOG)?;
    Ok(socket)
}

fn send_all(daemon: BorrowedFd<'_>, message: InitMessage, all: &[Option<OwnedFd>]) -> Result<(), Errno> {
    let Some(first) = all.first().and_then(Option::as_ref) else { return Ok(()) };
    // The first fills the array only to have a value.
    let mut borrowed = [first.as_fd(); DESCRIPTORS_MAX];
    for (slot, fd) in borrowed.iter_mut().zip(all.iter().flatten()) {
        *slot = fd.as_fd();
    }
    fds::send(daemon, &message.to_bytes(), &borrowed[..all.len()], SendFlags::empty())
}

/// What the child needs that becomes the image's process, and where it leaves its failure.
struct Child<'a> {
    prepared: &'a Prepared,
    stdio: [BorrowedFd<'a>; 3],
    step: AtomicI32,
    errno: AtomicI32,
}

/// Starts the image's process; its pid.
fn execute(prepared: &Prepared, stdio: [BorrowedFd<'_>; 3]) -> Result<i32, Failed> {
    let child = Child { prepared, stdio, step: AtomicI32::new(0), errno: AtomicI32::new(0) };
    // SAFETY: `become_program` makes system calls only, on what was prepared, and ends in exec or `_exit`; it writes the two atomics,
    // which this process reads after the child is out of its memory.
    let pid = unsafe { vfork(&prepared.stack, become_program, &child) }.map_err(at(InitStep::Exec))?;
    match child.errno.load(Ordering::Acquire) {
        0 => Ok(pid),
        errno => Err(Failed {
            step: InitStep::from_number(child.step.load(Ordering::Acquire) as u8).unwrap_or(InitStep::Exec),
            errno: Errno::from_raw_os_error(errno),
        }),
    }
}

/// The vforked child: returns, and thereby ends, only on failure.
extern "C" fn become_program(child: &Child<'_>) -> libc::c_int {
    let failed = match change(child) {
        Ok(()) => Failed { step: InitStep::Exec, errno: child.prepared.program.exec() },
        Err(failed) => failed,
    };
    child.step.store(failed.step as i32, Ordering::Release);
    child.errno.store(failed.errno.raw_os_error(), Ordering::Release);
    EXIT_NOT_EXECUTED
}

/// From a copy of the init to what an image's process is.
fn change(child: &Child<'_>) -> Result<(), Failed> {
    let prepared = child.prepared;
    let privileges = at(InitStep::Privileges);
    rustix::process::setsid().map_err(&privileges)?;
    // The three stand above 2, since the zygote keeps 0 to 2 occupied: none is overwritten before it is placed.
    for (fd, number) in child.stdio.into_iter().zip(0..) {
        fds::place(fd, number).map_err(&privileges)?;
    }
    fds::close_from(3).map_err(&privileges)?;
    if prepared.terminal.is_some() {
        // SAFETY: placed above, owned by nobody, and open until the exec.
        let terminal = unsafe { BorrowedFd::borrow_raw(0) };
        rustix::process::ioctl_tiocsctty(terminal).map_err(at(InitStep::Terminal))?;
    }
    become_person(&prepared.person)
}

/// The last step before exec: the ids, with the capabilities that they have, and no signal blocked.
pub(crate) fn become_person(person: &Person) -> Result<(), Failed> {
    rustix::process::umask(Mode::from_raw_mode(0o022));
    userns::become_user(person.uid, person.gid, &person.groups).map_err(during(InitStep::Privileges))?;
    userns::set_capabilities(person.kept).map_err(during(InitStep::Privileges))?;
    // Again: a change of ids sets what the sysctl fs.suid_dumpable says. It is the init's memory too, and other processes of the image may
    // look at this one already.
    not_dumpable()?;
    signals::set_mask(&SignalSet::empty()).map_err(at(InitStep::Privileges))
}

/// Until the main process ends: its wait status. Reaps whatever was orphaned; forwards what the keeper asks for.
fn watch(main: i32, stop_signal: i32) -> i32 {
    let all = SignalSet::all();
    loop {
        while let Some(signals::Reaped { pid, status, .. }) = signals::reap_any() {
            if pid == main {
                return status;
            }
        }
        let signal = match signals::wait(&all) {
            Ok(signal) if signal.number == FORWARD => signal.value,
            Ok(signal) if signal.number == libc::SIGTERM => stop_signal,
            // SIGCHLD wakes the loop; nothing else has a meaning here.
            Ok(_) | Err(_) => continue,
        };
        signals::kill(main, signal);
    }
}

//! `funtainer zygote NAME`: the parent of a revision's instances, pid 1 of their user and pid namespace.
//!
//! ```text
//! forked by the keeper ─ own descriptors only ─ waits for its id maps ─ root inside ─ minimal root ─ spare network ─ Ready
//!   ┌► order: Spawn ─ clone3 into the spare network ─ Spawned + pidfd ─ new spare network
//!   │  order: MoreSockets ─ into the instance's network, sockets, back ─ Sockets
//!   └─ SIGCHLD ─ inits reaped ─ Exited
//! socket closed by the keeper, or the keeper dead: it ends, and as pid 1 takes everything below it along
//! ```
//! Its root holds an empty directory for an instance's root, a whole `/proc` and `/sys` (an init may mount its own only where it sees a whole
//! one), and the tree of `/dev`. Instances get copies of that mount namespace, so it is kept small.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, Ordering};

use funtainer_model::InstanceId;
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::clone::{Cloned, clone3};
use crate::fds::{self, Fds};
use crate::init::{self, NO_STATUS, Prepared, Start};
use crate::mount::{self, Tmpfs};
use crate::netns;
use crate::orders::{DATAGRAM_BYTES, Order, Report};
use crate::protocol::{RevisionSpec, SocketCounts, Streams};
use crate::seccomp::{self, Filter};
use crate::signals::{self, SignalSet};
use crate::step::{StepError, at, checked};
use crate::title::Title;
use crate::userns::{self, IdRange};

/// Most instances of one zygote: the places in its shared page.
pub(crate) const INSTANCES_MAX: usize = 1024;
/// The namespaces that a zygote is born in.
const NAMESPACES: i32 = libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWNS;
/// The namespaces that an init is born in, besides the network.
const INIT_NAMESPACES: i32 = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC;
/// The number at which a zygote's socket stands.
const SOCKET: i32 = 3;
/// Room of the zygote's root: it holds names only.
const ROOT_BYTES: u64 = 64 << 10;

/// What a zygote is made from.
pub(crate) struct Plan<'a> {
    pub(crate) spec: &'a RevisionSpec,
    /// The ids of its user namespace.
    pub(crate) ids: IdRange,
    pub(crate) title: Title,
    /// Shown behind `funtainer zygote`.
    pub(crate) name: &'a str,
    /// The zygote's end of its pair.
    pub(crate) socket: BorrowedFd<'a>,
}

/// A zygote as its parent sees it.
#[derive(Debug)]
pub(crate) struct Forked {
    pub(crate) pid: i32,
    pub(crate) pidfd: OwnedFd,
}

/// Forks a zygote. It waits for [`Order::SetUp`], before which its id maps must be written.
///
/// # Safety
/// No other thread may run in this process.
pub(crate) unsafe fn fork(plan: &Plan<'_>) -> Result<Forked, Errno> {
    // SAFETY: the caller promises one thread; the child ends in `live`, which does not return.
    match unsafe { clone3(NAMESPACES) }? {
        Cloned::Parent { pid, pidfd } => Ok(Forked { pid, pidfd }),
        Cloned::Child => {
            // A panic must not unwind into the keeper's frames.
            let _ = std::panic::catch_unwind(AssertUnwindSafe(|| live(plan)));
            exit()
        }
    }
}

fn exit() -> ! {
    // SAFETY: ends this process without running anything of its parent's that the copy of its memory holds.
    unsafe { libc::_exit(1) }
}

/// The whole life; returning ends it.
fn live(plan: &Plan<'_>) {
    if own_descriptors(plan.socket).is_err() {
        return;
    }
    // SAFETY: the line above put the socket there, nothing else owns the number, and the process lives no longer than this function.
    let socket = unsafe { BorrowedFd::borrow_raw(SOCKET) };
    let mut buffer = [0_u8; DATAGRAM_BYTES];
    match fds::receive(socket, &mut buffer, RecvFlags::empty()) {
        Ok(Some(received)) if Order::decode(&buffer[..received.bytes]) == Some(Order::SetUp) => {}
        _ => return,
    }
    let mut zygote = match Zygote::set_up(plan, socket) {
        Ok(zygote) => zygote,
        Err(StepError { step, errno }) => {
            // Without a reader nobody wants to know.
            let _ = report(socket, &Report::SetUpFailed { errno: errno.raw_os_error(), step: step.to_owned() }, &[]);
            return;
        }
    };
    if report(socket, &Report::Ready, &[]).is_ok() {
        zygote.serve();
    }
}

/// Leaves the socket at [`SOCKET`] and `/dev/null` at 0 to 2: the keeper's descriptors were copied with it and are closed here.
fn own_descriptors(socket: BorrowedFd<'_>) -> Result<(), Errno> {
    let opened = rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())?;
    // Above all fixed numbers first: a number that is placed must not be one that is still to be copied.
    let null = rustix::io::fcntl_dupfd_cloexec(&opened, 64)?;
    drop(opened);
    let socket = rustix::io::fcntl_dupfd_cloexec(socket, 64)?;
    for number in 0..SOCKET {
        fds::place(null.as_fd(), number)?;
    }
    fds::place(socket.as_fd(), SOCKET)?;
    fds::close_from(SOCKET + 1)?;
    // Closed by number above, along with everything else.
    std::mem::forget((null, socket));
    Ok(())
}

fn report(socket: BorrowedFd<'_>, report: &Report, descriptors: &[BorrowedFd<'_>]) -> Result<(), Errno> {
    fds::send(socket, report.encode().as_bytes(), descriptors, SendFlags::empty())
}

/// A network namespace that this zygote made.
struct Network {
    /// Its handle, by which the zygote comes back into it.
    handle: OwnedFd,
    prepared: netns::Prepared,
}

struct Instance {
    id: InstanceId,
    pid: i32,
    /// Place in the shared page.
    place: usize,
    network: Network,
}

struct Zygote<'a> {
    socket: BorrowedFd<'a>,
    signals: OwnedFd,
    prepared: Prepared,
    streams: Streams,
    sockets: SocketCounts,
    statuses: Statuses,
    instances: Vec<Instance>,
    /// The network that the next instance gets, which this process is in; an error is tried again at the next start.
    spare: Option<Network>,
}

impl<'a> Zygote<'a> {
    fn set_up(plan: &Plan<'_>, socket: BorrowedFd<'a>) -> Result<Self, StepError> {
        userns::become_root()?;
        signals::reset_actions();
        let children = SignalSet::of(&[libc::SIGCHLD]);
        signals::set_mask(&SignalSet::all()).map_err(at("block signals"))?;
        let signals = signals::descriptor(&children).map_err(at("make a signalfd"))?;
        // Before the mounts: a sysfs belongs to a network namespace, and may be mounted by who owns that.
        let spare = Some(new_network()?);
        minimal_root()?;
        let limit = rustix::fs::open("/proc/sys/user/max_user_namespaces", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        limit.and_then(|file| rustix::io::write(file, b"0")).map_err(at("forbid nested user namespaces"))?;
        let prepared = Prepared::new(plan.spec, plan.ids, Filter::compile(&seccomp::DEFAULT), plan.title);
        let statuses = Statuses::new().map_err(at("map the shared page"))?;
        // SAFETY: one thread, which reads neither arguments nor environment.
        unsafe { plan.title.set(format!("funtainer zygote {}", plan.name).as_bytes()) };
        crate::title::set_name(c"funtainer-zygot").map_err(at("set the name of a zygote"))?;
        // Last: changing ids clears it (prctl(2)). A keeper that died before has closed its end of the socket, which is read next.
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
            .map_err(at("set the parent-death signal"))?;
        Ok(Self {
            socket,
            signals,
            prepared,
            streams: plan.spec.streams,
            sockets: plan.spec.sockets,
            statuses,
            instances: Vec::new(),
            spare,
        })
    }

    fn serve(&mut self) {
        loop {
            let mut polled =
                [PollFd::new(&self.socket, PollFlags::IN), PollFd::from_borrowed_fd(self.signals.as_fd(), PollFlags::IN)];
            match rustix::event::poll(&mut polled, None) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => return,
            }
            let [orders, children] = polled.map(|polled| !polled.revents().is_empty());
            if children && self.reap().is_err() || orders && self.obey().is_err() {
                return;
            }
        }
    }

    /// Reports every init that has ended.
    fn reap(&mut self) -> Result<(), Errno> {
        while signals::next(self.signals.as_fd()).is_some() {}
        while let Some((pid, own_status)) = signals::reap_any() {
            let Some(index) = self.instances.iter().position(|instance| instance.pid == pid) else { continue };
            let instance = self.instances.swap_remove(index);
            // An init that was killed wrote nothing: how it ended is how all of it ended.
            let status = match self.statuses.give_back(instance.place) {
                NO_STATUS => own_status,
                status => status,
            };
            report(self.socket, &Report::Exited { instance: instance.id, status }, &[])?;
        }
        Ok(())
    }

    /// Carries out one order; an error ends the zygote.
    fn obey(&mut self) -> Result<(), Errno> {
        let mut buffer = [0_u8; DATAGRAM_BYTES];
        let received = match fds::receive(self.socket, &mut buffer, RecvFlags::DONTWAIT) {
            Ok(Some(received)) => received,
            Err(fds::ReceiveError::Kernel(Errno::AGAIN)) => return Ok(()),
            Ok(None) | Err(_) => return Err(Errno::PIPE),
        };
        match Order::decode(&buffer[..received.bytes]) {
            Some(Order::Spawn(instance)) => self.spawn(instance, received.fds),
            Some(Order::MoreSockets(instance)) => self.more_sockets(instance, received.fds),
            Some(Order::SetUp) | None => Err(Errno::PROTO),
        }
    }

    fn spawn(&mut self, id: InstanceId, descriptors: Fds) -> Result<(), Errno> {
        match self.try_spawn(id, descriptors) {
            Ok(pidfd) => {
                report(self.socket, &Report::Spawned(id), &[pidfd.as_fd()])?;
                // The next start has its network ready. A failure is met again, and told, when one comes.
                self.spare = new_network().ok();
                Ok(())
            }
            Err(StepError { step, errno }) => report(
                self.socket,
                &Report::SpawnFailed { instance: id, errno: errno.raw_os_error(), step: step.to_owned() },
                &[],
            ),
        }
    }

    fn try_spawn(&mut self, id: InstanceId, mut descriptors: Fds) -> Result<OwnedFd, StepError> {
        let missing = || StepError { step: "take the descriptors of a start", errno: Errno::BADF };
        let mut taken = 0..;
        let mut next = || taken.next().and_then(|index| descriptors.take(index)).ok_or_else(missing);
        let (root, daemon) = (next()?, next()?);
        let stdin = match self.streams {
            Streams::Log => None,
            Streams::Call => Some(next()?),
        };
        let (stdout, stderr) = (next()?, next()?);
        let network = match self.spare.take() {
            Some(network) => network,
            None => new_network()?,
        };
        let Some(place) = self.statuses.take() else {
            self.spare = Some(network);
            return Err(StepError { step: "find a place for a wait status", errno: Errno::USERS });
        };
        let status = self.statuses.at(place);
        let prepared = network.prepared;
        // SAFETY: this process has one thread, and the child ends in `init::run`, which does not return.
        match unsafe { clone3(INIT_NAMESPACES) } {
            Ok(Cloned::Child) => {
                let start = Start { root, daemon, stdin, stdout, stderr, doors: descriptors, status, network: prepared };
                // A panic must not unwind into the zygote's frames.
                let _ = std::panic::catch_unwind(AssertUnwindSafe(|| init::run(&self.prepared, start)));
                exit()
            }
            Ok(Cloned::Parent { pid, pidfd }) => {
                self.instances.push(Instance { id, pid, place, network });
                Ok(pidfd)
            }
            Err(errno) => {
                self.statuses.give_back(place);
                self.spare = Some(network);
                Err(StepError { step: "clone an init", errno })
            }
        }
    }

    fn more_sockets(&mut self, id: InstanceId, mut descriptors: Fds) -> Result<(), Errno> {
        let errno = match (self.instances.iter().find(|instance| instance.id == id), descriptors.take(0)) {
            (Some(instance), Some(daemon)) => match self.send_sockets(instance, daemon.as_fd()) {
                Ok(()) => 0,
                Err(Abroad::Sockets(errno)) => errno.raw_os_error(),
                // In an instance's network there is no going on: the next instance would be born into it.
                Err(Abroad::Return(errno)) => return Err(errno),
            },
            _ => Errno::SRCH.raw_os_error(),
        };
        report(self.socket, &Report::Sockets { instance: id, errno }, &[])
    }

    fn send_sockets(&self, instance: &Instance, daemon: BorrowedFd<'_>) -> Result<(), Abroad> {
        let enter = |network: &Network| {
            rustix::thread::move_into_link_name_space(network.handle.as_fd(), Some(LinkNameSpaceType::Network))
        };
        // Where there is no spare one this process is still in the last instance's.
        let home = self.spare.as_ref().or_else(|| self.instances.last().map(|last| &last.network));
        let Some(home) = home else { return Err(Abroad::Sockets(Errno::SRCH)) };
        enter(&instance.network).map_err(Abroad::Sockets)?;
        let sent = init::send_more_sockets(daemon, init::counts(self.sockets, instance.network.prepared));
        enter(home).map_err(Abroad::Return)?;
        sent.map_err(Abroad::Sockets)
    }
}

/// What can go wrong in another network.
enum Abroad {
    /// Only the sockets.
    Sockets(Errno),
    /// The way back.
    Return(Errno),
}

/// A new network namespace for this process, with `lo` as instances get it.
fn new_network() -> Result<Network, StepError> {
    // SAFETY: CLONE_NEWNET concerns this process, which has one thread, and touches no memory or descriptor.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }.map_err(at("make a network namespace"))?;
    let prepared = netns::prepare()?;
    let handle = rustix::fs::open(c"/proc/self/ns/net", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(at("open a network namespace"))?;
    Ok(Network { handle, prepared })
}

/// Builds the zygote's root on the place of the host's `/sys`, which every machine has, and moves into it.
fn minimal_root() -> Result<(), StepError> {
    mount::make_private()?;
    // While the host's whole ones are in sight.
    let (proc, sys) = (mount::procfs()?, mount::sysfs()?);
    let attributes = mount::INERT;
    let root = mount::tmpfs(&Tmpfs { size_bytes: ROOT_BYTES, uid: 0, gid: 0, mode: 0o755, attributes })?;
    let place = rustix::fs::open(c"/sys", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(at("open /sys"))?;
    mount::attach(root.as_fd(), place.as_fd())?;
    for name in [c"proc", c"sys", c"dev", c"root"] {
        mount::target(root.as_fd(), name)?;
    }
    mount::attach(proc.as_fd(), mount::target(root.as_fd(), c"proc")?.as_fd())?;
    mount::attach(sys.as_fd(), mount::target(root.as_fd(), c"sys")?.as_fd())?;
    mount::device_tree(c"/dev", c"/sys/dev")?;
    mount::pivot(root.as_fd())
}

/// The page that zygote and inits share: a wait status for each instance.
struct Statuses {
    page: NonNull<AtomicI32>,
    taken: Vec<bool>,
}

impl Statuses {
    fn new() -> Result<Self, Errno> {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice. Shared with the children that are forked from here.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                INSTANCES_MAX * size_of::<AtomicI32>(),
                libc::PROT_READ | libc::PROT_WRITE,
                libc::MAP_SHARED | libc::MAP_ANONYMOUS,
                -1,
                0,
            )
        };
        if page == libc::MAP_FAILED {
            checked(-1)?;
        }
        let page = NonNull::new(page.cast()).ok_or(Errno::NOMEM)?;
        Ok(Self { page, taken: vec![false; INSTANCES_MAX] })
    }

    /// A free place, set to [`NO_STATUS`].
    fn take(&mut self) -> Option<usize> {
        let place = self.taken.iter().position(|taken| !taken)?;
        self.taken[place] = true;
        self.at(place).store(NO_STATUS, Ordering::Release);
        Some(place)
    }

    fn at(&self, place: usize) -> &'static AtomicI32 {
        assert!(place < INSTANCES_MAX, "places come from `take`");
        // SAFETY: within the mapping, which is aligned, zeroed (a valid value), never unmapped, and only used as atomics.
        unsafe { self.page.add(place).as_ref() }
    }

    /// Frees a place; what stood there.
    fn give_back(&mut self, place: usize) -> i32 {
        self.taken[place] = false;
        self.at(place).load(Ordering::Acquire)
    }
}

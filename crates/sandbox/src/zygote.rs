//! `funtainer zygote NAME`: the parent of a revision's instances, pid 1 of their user and pid namespace.
//!
//! ```text
//! forked by the keeper ─ own descriptors only ─ waits for its id maps ─ root inside ─ minimal root ─ spare network ─ Ready
//!   ┌► order: Spawn ─ clone3 into the spare network ─ Spawned + pidfd ─ new spare network
//!   │                 or into one that was made ahead
//!   │  order: MakeNetwork ─ new network for the keeper to connect ─ Network + handle and a socket in it
//!   │  order: MoreSockets ─ into the instance's network, sockets, back ─ Sockets
//!   │  order: Exec ─ a helper that makes a child inside the instance (`exec`) ─ ExecSpawned
//!   └─ SIGCHLD ─ inits and commands reaped ─ Exited, ExecEnded
//! socket closed by the keeper, or the keeper dead: it ends, and as pid 1 takes everything below it along
//! ```
//! Its root holds an empty directory for an instance's root, a whole `/proc` and `/sys` (an init may mount its own only where it sees a whole
//! one), and the tree of `/dev`. Instances get copies of that mount namespace, so it is kept small.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::ptr::NonNull;
use std::sync::atomic::{AtomicI32, Ordering};

use funtainer_model::{ExecId, InstanceId};
use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::cgroup::{self, ViewName};
use crate::clone::{Cloned, clone3_into};
use crate::fds::{self, Fds};
use crate::init::{self, FULL, NO_STATUS, Prepared, RUNNING, Start};
use crate::mount::{self, Tmpfs};
use crate::orders::{DATAGRAM_BYTES, End, NAMESPACES, Order, Report};
use crate::program::c_string;
use crate::protocol::{ExecSpec, MESSAGE_BYTES_MAX, Request, RevisionSpec, SocketCounts, Streams};
use crate::seccomp::{self, Filter};
use crate::signals::{self, Reaped, SignalSet};
use crate::step::{StepError, at, checked};
use crate::title::Title;
use crate::userns::{self, IdRange};
use crate::{exec, netns};

/// Most instances of one zygote: the places in its shared page.
pub(crate) const INSTANCES_MAX: usize = 1024;
/// Most commands in the instances of one zygote.
pub(crate) const EXECS_MAX: usize = 256;
/// The namespaces that a zygote is born in.
const OWN_NAMESPACES: i32 = libc::CLONE_NEWUSER | libc::CLONE_NEWPID | libc::CLONE_NEWNS;
/// The namespaces that an init is born in, besides the network.
const INIT_NAMESPACES: i32 = libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWUTS | libc::CLONE_NEWIPC;
/// The number at which a zygote's socket stands.
const SOCKET: i32 = 3;
/// Where its root has the views of what instances' control groups are made in, by their numbers.
const VIEWS: &str = "/groups";
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
    /// Most processes of all instances together, where no control group limits those of each.
    pub(crate) processes: Option<u32>,
    /// The control group that it is born in, where it has one.
    pub(crate) group: Option<BorrowedFd<'a>>,
    /// Where instances see their control groups; a view for each comes with the order to set up.
    pub(crate) views: Vec<ViewName>,
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
    let owner = userns::Owner::assume(plan.ids.base)?;
    // SAFETY: the caller promises one thread; the child ends in `live`, which does not return.
    let cloned = unsafe { clone3_into(OWN_NAMESPACES, plan.group) };
    match cloned? {
        Cloned::Parent { pid, pidfd } => Ok(Forked { pid, pidfd }),
        Cloned::Child => {
            // Its ids are those of its own namespace from here on.
            std::mem::forget(owner);
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
    let views = match fds::receive(socket, &mut buffer, RecvFlags::empty()) {
        Ok(Some(received)) if Order::decode(&buffer[..received.bytes]) == Some(Order::SetUp) => received.fds,
        _ => return,
    };
    let mut zygote = match Zygote::set_up(plan, socket, views) {
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

/// A command in an instance.
struct Exec {
    id: ExecId,
    /// Place in the shared page, where the helper leaves the pid.
    place: usize,
    state: ExecState,
}

/// How far a command is.
enum ExecState {
    /// Its helper is at work. With a signal that ends it as soon as there is something to end.
    Helped { helper: i32, doomed: bool },
    /// Its process is there, a child of this one.
    Born { pid: i32 },
}

struct Zygote<'a> {
    socket: BorrowedFd<'a>,
    signals: OwnedFd,
    prepared: Prepared,
    streams: Streams,
    /// How many views of control groups there are.
    views: usize,
    sockets: SocketCounts,
    statuses: Statuses,
    instances: Vec<Instance>,
    /// Where helpers leave the pids of commands.
    pids: Statuses,
    execs: Vec<Exec>,
    /// Ends of children whose helper has not told their pid yet: pid and wait status.
    unclaimed: Vec<(i32, i32)>,
    /// Networks that the keeper has connected, or is about to, by their numbers.
    ahead: Vec<(u32, Network)>,
    /// The network that the next instance gets where it needs none that leads out; an error is tried again at the next start.
    spare: Option<Network>,
}

impl<'a> Zygote<'a> {
    fn set_up(plan: &Plan<'_>, socket: BorrowedFd<'a>, views: Fds) -> Result<Self, StepError> {
        userns::become_root()?;
        // With all that are forked from here: nobody below opens their `/proc/PID/exe`, memory or descriptors.
        userns::not_dumpable()?;
        signals::reset_actions();
        let children = SignalSet::of(&[libc::SIGCHLD]);
        signals::set_mask(&SignalSet::all()).map_err(at("block signals"))?;
        let signals = signals::descriptor(&children).map_err(at("make a signalfd"))?;
        // Before the mounts: a sysfs belongs to a network namespace, and may be mounted by who owns that.
        let spare = Some(new_network()?);
        minimal_root(&plan.views, views)?;
        let limit = rustix::fs::open("/proc/sys/user/max_user_namespaces", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
        limit.and_then(|file| rustix::io::write(file, b"0")).map_err(at("forbid nested user namespaces"))?;
        let prepared = Prepared::new(plan, Filter::compile(&seccomp::DEFAULT));
        let statuses = Statuses::new(INSTANCES_MAX).map_err(at("map the shared page"))?;
        let pids = Statuses::new(EXECS_MAX).map_err(at("map the shared page"))?;
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
            views: plan.views.len(),
            sockets: plan.spec.sockets,
            statuses,
            instances: Vec::new(),
            ahead: Vec::new(),
            pids,
            execs: Vec::new(),
            unclaimed: Vec::new(),
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

    /// Reports every child that has ended.
    fn reap(&mut self) -> Result<(), Errno> {
        while signals::next(self.signals.as_fd()).is_some() {}
        while let Some(reaped) = signals::reap_any() {
            match self.instances.iter().position(|instance| instance.pid == reaped.pid) {
                Some(index) => self.instance_ended(index, &reaped)?,
                None => self.exec_child_ended(reaped.pid, reaped.status)?,
            }
        }
        Ok(())
    }

    fn instance_ended(&mut self, index: usize, init: &Reaped) -> Result<(), Errno> {
        let instance = self.instances.swap_remove(index);
        // An init that was killed wrote nothing: how it ended is how all of it ended.
        let (status, full) = match self.statuses.give_back(instance.place) {
            NO_STATUS | RUNNING => (init.status, false),
            told => (told & !FULL, told & FULL != 0),
        };
        let end = End { status, memory_bytes: init.memory_bytes, cpu_us: init.cpu_us, full };
        report(self.socket, &Report::Exited { instance: instance.id, end }, &[])
    }

    /// A helper, or what one has made.
    fn exec_child_ended(&mut self, ended: i32, status: i32) -> Result<(), Errno> {
        let is_child = |exec: &Exec| matches!(exec.state, ExecState::Born { pid } if pid == ended);
        if let Some(index) = self.execs.iter().position(is_child) {
            return self.exec_ended(index, Some(status));
        }
        let is_helper = |exec: &Exec| matches!(exec.state, ExecState::Helped { helper, .. } if helper == ended);
        let Some(index) = self.execs.iter().position(is_helper) else {
            // A helper that has not ended yet has made it. Without one it is nobody's.
            if self.execs.iter().any(|exec| matches!(exec.state, ExecState::Helped { .. })) {
                self.unclaimed.push((ended, status));
            }
            return Ok(());
        };
        let exec = &mut self.execs[index];
        let pid = match self.pids.at(exec.place).load(Ordering::Acquire) {
            NO_STATUS => return self.exec_ended(index, None),
            pid => pid,
        };
        if let ExecState::Helped { doomed: true, .. } = exec.state {
            // Still a child of ours: running, a zombie, or reaped above.
            if !self.unclaimed.iter().any(|(unclaimed, _)| *unclaimed == pid) {
                signals::kill(pid, libc::SIGKILL);
            }
        }
        exec.state = ExecState::Born { pid };
        let claimed = self.unclaimed.iter().position(|(unclaimed, _)| *unclaimed == pid);
        let claimed = claimed.map(|at| self.unclaimed.swap_remove(at));
        match claimed {
            Some((_, status)) => self.exec_ended(index, Some(status)),
            None => Ok(()),
        }
    }

    fn exec_ended(&mut self, index: usize, status: Option<i32>) -> Result<(), Errno> {
        let exec = self.execs.swap_remove(index);
        self.pids.give_back(exec.place);
        let ended = match status {
            Some(status) => Report::ExecEnded { exec: exec.id, status },
            None => Report::ExecLost(exec.id),
        };
        report(self.socket, &ended, &[])
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
            Some(Order::Spawn { instance, born, network }) => self.spawn(instance, born, network, received.fds),
            Some(Order::MoreSockets(instance)) => self.more_sockets(instance, received.fds),
            Some(Order::MakeNetwork(network)) => self.make_network(network),
            Some(Order::DropNetwork(network)) => {
                self.ahead.retain(|(number, _)| *number != network);
                Ok(())
            }
            Some(Order::Exec { instance, born }) => self.exec(instance, born, received.fds),
            Some(Order::SignalExec { exec, signal }) => self.signal_exec(exec, signal),
            Some(Order::SetUp) | None => Err(Errno::PROTO),
        }
    }

    fn spawn(&mut self, id: InstanceId, born: bool, network: u32, descriptors: Fds) -> Result<(), Errno> {
        match self.try_spawn(id, born, network, descriptors) {
            Ok(pidfd) => {
                report(self.socket, &Report::Spawned(id), &[pidfd.as_fd()])?;
                // The next start has its network ready. A failure is met again, and told, when one comes.
                if self.spare.is_none() {
                    self.spare = new_network().ok();
                }
                Ok(())
            }
            Err(StepError { step, errno }) => report(
                self.socket,
                &Report::SpawnFailed { instance: id, errno: errno.raw_os_error(), step: step.to_owned() },
                &[],
            ),
        }
    }

    /// A network for the keeper to connect.
    fn make_network(&mut self, number: u32) -> Result<(), Errno> {
        let made = new_network().and_then(|network| {
            netns::without_ipv6()?;
            Ok((netns::route_socket()?, network))
        });
        match made {
            Ok((route, network)) => {
                report(self.socket, &Report::Network(number), &[network.handle.as_fd(), route.as_fd()])?;
                self.ahead.push((number, network));
                Ok(())
            }
            Err(StepError { step, errno }) => {
                let failed = Report::NetworkFailed { network: number, errno: errno.raw_os_error(), step: step.to_owned() };
                report(self.socket, &failed, &[])
            }
        }
    }

    /// The network of the next instance, which this process is in afterwards.
    fn network(&mut self, number: u32) -> Result<Network, StepError> {
        let network = if number == 0 {
            self.spare.take().map_or_else(new_network, Ok)?
        } else {
            let index = self.ahead.iter().position(|(ahead, _)| *ahead == number);
            let absent = StepError { step: "find the network that was made ahead", errno: Errno::NOENT };
            self.ahead.swap_remove(index.ok_or(absent)?).1
        };
        enter(&network).map_err(at("enter a network"))?;
        Ok(network)
    }

    fn try_spawn(&mut self, id: InstanceId, born: bool, network: u32, mut descriptors: Fds) -> Result<OwnedFd, StepError> {
        let missing = || StepError { step: "take the descriptors of a start", errno: Errno::BADF };
        let mut taken = 0..;
        let mut next = || taken.next().and_then(|index| descriptors.take(index)).ok_or_else(missing);
        let (root, daemon) = (next()?, next()?);
        let streams = match self.streams {
            Streams::Log => [None, Some(next()?), Some(next()?)],
            Streams::Call => [Some(next()?), Some(next()?), Some(next()?)],
            Streams::Terminal(_) => [None, None, None],
        };
        let group = if born { Some(next()?) } else { None };
        let network = self.network(network)?;
        let Some(place) = self.statuses.take() else {
            return Err(StepError { step: "find a place for a wait status", errno: Errno::USERS });
        };
        let status = self.statuses.at(place);
        let views: Vec<CString> = (0..self.views).map(|index| c_string(format!("{VIEWS}/{index}/{id}").as_bytes())).collect();
        let prepared = network.prepared;
        // SAFETY: this process has one thread, and the child ends in `init::run`, which does not return.
        match unsafe { clone3_into(INIT_NAMESPACES, group.as_ref().map(AsFd::as_fd)) } {
            Ok(Cloned::Child) => {
                let start = Start { root, daemon, streams, views: &views, doors: descriptors, status, network: prepared };
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
                Err(StepError { step: "clone an init", errno })
            }
        }
    }

    fn exec(&mut self, instance: InstanceId, born: bool, mut descriptors: Fds) -> Result<(), Errno> {
        // The keeper encoded what it had checked: anything else here is a fault of one of us.
        let (exec, spec) = descriptors.take(0).and_then(|memory| read_exec(memory.as_fd(), instance)).ok_or(Errno::PROTO)?;
        let answer = match self.try_exec(exec, instance, born, &spec, descriptors) {
            Ok(()) => Report::ExecSpawned(exec),
            Err(StepError { step, errno }) => {
                Report::ExecNotSpawned { exec, errno: errno.raw_os_error(), step: step.to_owned() }
            }
        };
        report(self.socket, &answer, &[])
    }

    fn try_exec(
        &mut self,
        id: ExecId,
        instance: InstanceId,
        born: bool,
        spec: &ExecSpec,
        mut descriptors: Fds,
    ) -> Result<(), StepError> {
        let runs = |found: &Instance| self.statuses.at(found.place).load(Ordering::Acquire) == RUNNING;
        if !self.instances.iter().any(|found| found.id == instance && runs(found)) {
            return Err(StepError { step: "find a running instance", errno: Errno::SRCH });
        }
        let missing = || StepError { step: "take the descriptors of a command", errno: Errno::BADF };
        let mut taken = 1..;
        let mut next = || taken.next().and_then(|index| descriptors.take(index)).ok_or_else(missing);
        let daemon = next()?;
        let streams = if spec.terminal.is_some() { None } else { Some([next()?, next()?, next()?]) };
        let mut namespaces = [const { None }; NAMESPACES.len()];
        for namespace in &mut namespaces {
            *namespace = Some(next()?);
        }
        let namespaces = namespaces.map(|namespace| namespace.expect("each was filled"));
        let group = if born { Some(next()?) } else { None };
        let command = exec::Command::new(spec, self.prepared.ids());
        let Some(place) = self.pids.take() else {
            return Err(StepError { step: "find a place for a command", errno: Errno::USERS });
        };
        let pid = self.pids.at(place);
        // SAFETY: this process has one thread, and the child ends in `exec::help`, which does not return.
        match unsafe { clone3_into(0, group.as_ref().map(AsFd::as_fd)) } {
            Ok(Cloned::Child) => {
                let parts = exec::Parts { daemon, streams, namespaces, doors: descriptors };
                // A panic must not unwind into the zygote's frames.
                let _ = std::panic::catch_unwind(AssertUnwindSafe(|| exec::help(&self.prepared, &command, parts, pid)));
                exit()
            }
            Ok(Cloned::Parent { pid: helper, .. }) => {
                self.execs.push(Exec { id, place, state: ExecState::Helped { helper, doomed: false } });
                Ok(())
            }
            Err(errno) => {
                self.pids.give_back(place);
                Err(StepError { step: "clone a helper", errno })
            }
        }
    }

    fn signal_exec(&mut self, id: ExecId, signal: i32) -> Result<(), Errno> {
        let sent = match self.execs.iter_mut().find(|exec| exec.id == id).map(|exec| &mut exec.state) {
            // It is a child that was not reaped, so that neither number can be another's. Its group is its own once it has a session.
            Some(ExecState::Born { pid }) if signal == libc::SIGKILL => {
                signals::kill(-*pid, signal);
                signals::kill(*pid, signal);
                Ok(())
            }
            Some(ExecState::Born { pid }) => {
                signals::kill(*pid, signal);
                Ok(())
            }
            Some(ExecState::Helped { doomed, .. }) if signal == libc::SIGKILL => {
                *doomed = true;
                Ok(())
            }
            _ => Err(Errno::SRCH),
        };
        let errno = sent.err().map_or(0, Errno::raw_os_error);
        report(self.socket, &Report::ExecSignalled { exec: id, errno }, &[])
    }

    fn more_sockets(&mut self, id: InstanceId, mut descriptors: Fds) -> Result<(), Errno> {
        let errno = match (self.instances.iter().find(|instance| instance.id == id), descriptors.take(0)) {
            (Some(instance), Some(daemon)) => {
                self.send_sockets(instance, daemon.as_fd()).map_or_else(Errno::raw_os_error, |()| 0)
            }
            _ => Errno::SRCH.raw_os_error(),
        };
        report(self.socket, &Report::Sockets { instance: id, errno }, &[])
    }

    fn send_sockets(&self, instance: &Instance, daemon: BorrowedFd<'_>) -> Result<(), Errno> {
        // There is no way back: whoever needs a network enters it.
        enter(&instance.network)?;
        init::send_more_sockets(daemon, init::counts(self.sockets, instance.network.prepared))
    }
}

fn enter(network: &Network) -> Result<(), Errno> {
    rustix::thread::move_into_link_name_space(network.handle.as_fd(), Some(LinkNameSpaceType::Network))
}

/// The request that a memory file holds, if it is one for a command in this instance.
fn read_exec(memory: BorrowedFd<'_>, wanted: InstanceId) -> Option<(ExecId, Box<ExecSpec>)> {
    let mut bytes = vec![0; MESSAGE_BYTES_MAX + 1];
    let mut length = 0;
    loop {
        match rustix::io::pread(memory, &mut bytes[length..], length as u64).ok()? {
            0 => break,
            read => length += read,
        }
    }
    // The number of descriptors was checked where the request came in.
    match [1, 4].into_iter().find_map(|descriptors| Request::decode(&bytes[..length], descriptors).ok())?.1 {
        Request::Exec { exec, instance, spec } if instance == wanted => Some((exec, spec)),
        _ => None,
    }
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
fn minimal_root(names: &[ViewName], mut views: Fds) -> Result<(), StepError> {
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
    mount::target(root.as_fd(), c"groups")?;
    for index in 0..names.len() {
        let missing = StepError { step: "take a view of control groups", errno: Errno::BADF };
        let place = mount::target(root.as_fd(), &c_string(format!("groups/{index}").as_bytes()))?;
        mount::attach(views.take(index).ok_or(missing)?.as_fd(), place.as_fd())?;
    }
    if init::has_view_tree(names) {
        let place = mount::target(root.as_fd(), c"cgroup")?;
        cgroup::tree(place.as_fd(), names, views.take(names.len()).as_ref().map(AsFd::as_fd))?;
    }
    mount::pivot(root.as_fd())
}

/// Memory that zygote and children share: a number for each place, such as a wait status of an instance.
struct Statuses {
    page: NonNull<AtomicI32>,
    taken: Vec<bool>,
}

impl Statuses {
    fn new(places: usize) -> Result<Self, Errno> {
        // SAFETY: a new anonymous mapping at an address of the kernel's choice. Shared with the children that are forked from here.
        let page = unsafe {
            libc::mmap(
                std::ptr::null_mut(),
                places * size_of::<AtomicI32>(),
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
        Ok(Self { page, taken: vec![false; places] })
    }

    /// A free place, set to [`NO_STATUS`].
    fn take(&mut self) -> Option<usize> {
        let place = self.taken.iter().position(|taken| !taken)?;
        self.taken[place] = true;
        self.at(place).store(NO_STATUS, Ordering::Release);
        Some(place)
    }

    fn at(&self, place: usize) -> &'static AtomicI32 {
        assert!(place < self.taken.len(), "places come from `take`");
        // SAFETY: within the mapping, which is aligned, zeroed (a valid value), never unmapped, and only used as atomics.
        unsafe { self.page.add(place).as_ref() }
    }

    /// Frees a place; what stood there.
    fn give_back(&mut self, place: usize) -> i32 {
        self.taken[place] = false;
        self.at(place).load(Ordering::Acquire)
    }
}

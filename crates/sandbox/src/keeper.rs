//! `funtainer serve`: the keeper, root of all processes, with privilege and without foreign bytes.
//!
//! ```text
//! probe ─ data directory and lock ─ old cgroups swept ─ listeners ─ daemon born ┬─► events, until SIGTERM
//!                                                                               │   daemon's requests ─► zygotes' orders
//!                                                                               │   zygotes' reports  ─► daemon's replies and events
//!                                                                               │   daemon dead       ─► a new one
//! SIGTERM ─ Stop to the daemon ─ it exits, or 10 s pass ─ zygotes killed and reaped ─ cgroups and admin socket removed ─ end
//! ```
//! One thread and one epoll. Nothing here waits for a zygote or a daemon: sockets are non-blocking with a bounded queue, and who floods
//! or stalls is killed. What the daemon sends is checked, and what zygotes send too.
//!
//! Deadlines are looked at whenever the loop turns; `deadline` says when it must at the latest.

mod data;
mod exec;
mod instances;
mod jail;
mod layers;
mod link;
mod listen;
mod mode;
mod networks;
mod platform;
mod requests;
mod resident;
mod unpacked;
mod uplink;
mod zygotes;

use std::ffi::{CString, OsString};
use std::io;
use std::net::SocketAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::RecvFlags;
use rustix::process::{Resource, Rlimit};

use crate::cgroup::{CgroupError, Hierarchy, Layout};
use crate::clone::{Cloned, clone3};
use crate::executable::Executable;
use crate::mount::{self, Features, Missing, Mounts};
use crate::protocol::{MESSAGE_BYTES_MAX, Reply, number_of};
use crate::signals::{self, SignalSet};
use crate::step::{StepError, at};
use crate::title::{Title, TitleError};
use crate::{fds, protocol};

use data::DataDirectory;
use exec::Execs;
use instances::Instances;
use jail::Birth;
use layers::Layers;
use link::{Fault, Link};
use listen::{Admin, Tcp};
use mode::Mode;
pub use networks::NetworkSettings;
use networks::{Networks, Pool};
use unpacked::Unpacked;
use uplink::Uplink;
use zygotes::Zygotes;

/// What the daemon may take to drain, as it is told; the rest up to [`STOP_MAX`] is for its own end.
const STOP_GRACE: Duration = Duration::from_millis(9_500);
/// From SIGTERM to the daemon's death.
const STOP_MAX: Duration = Duration::from_secs(10);
/// Wait after the first death of a daemon that had not become ready; it doubles with each further one.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest such wait.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// So many such deaths in a row end the keeper.
const DEATHS_MAX: u32 = 10;
/// Messages of one peer handled before the others get their turn.
const TURN_MESSAGES: usize = 32;
/// Most open files that an instance can ask for (`fs.nr_open` as the kernel starts with it).
const OPEN_FILES_MAX: u64 = 1_048_576;
/// Events taken from the kernel at once.
const EVENTS: usize = 64;

const TOKEN_SIGNALS: u64 = 0;
const TOKEN_DAEMON: u64 = 1;
const TOKEN_DAEMON_END: u64 = 2;
const TOKEN_NET: u64 = 3;
const TOKEN_NET_END: u64 = 4;
const TOKEN_UPLINK_END: u64 = 5;
/// Zygote K has this plus 2 K for its socket, plus 1 for its end.
const TOKEN_ZYGOTES: u64 = 16;
/// Unpacker K has this plus K: far above what zygotes come to.
const TOKEN_UNPACKERS: u64 = 1 << 48;

/// How `funtainer serve` is set up.
#[derive(Debug, Clone)]
pub struct KeeperSettings {
    /// Where calls come in, port 0 lets the kernel choose; `None` for calls through the admin socket alone.
    pub listen: Option<SocketAddr>,
    /// Path of the admin socket.
    pub admin: PathBuf,
    /// Data directory.
    pub data: PathBuf,
    /// Command line of the daemon, which is this program again: `funtainer daemon`. `--listeners N` is put behind it.
    pub daemon: Vec<OsString>,
    /// Command line of an unpacker, likewise: `funtainer unpack`. What it is to do is put behind it; see `unpacker`.
    pub unpack: Vec<OsString>,
    /// Whether and how instances reach what is outside of this machine.
    pub network: NetworkSettings,
    /// The newest ways to mount that are tried: [`Features::NEWEST`]; a test can ask for those of an older kernel.
    pub mounts: Features,
    /// Told once, when the first daemon accepts calls, with the address that was bound.
    pub announce: fn(Option<SocketAddr>),
    /// Told what an operator should know, as one line without its end.
    pub log: fn(&str),
}

/// How a keeper came to its end.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Ended {
    /// It was asked to stop. Exit code 0.
    Stopped,
    /// Ten daemons in a row died before they were ready. Exit code 70 (`EX_SOFTWARE`, sysexits.h).
    DaemonFailed,
}

impl Ended {
    /// For the process.
    pub const fn exit_code(self) -> u8 {
        match self {
            Self::Stopped => 0,
            Self::DaemonFailed => 70,
        }
    }
}

/// Why a keeper could not start or go on.
#[derive(Debug, thiserror::Error)]
pub enum KeeperError {
    /// The kernel or the user lacks something. One line.
    #[error("this machine lacks {}: {}", .0.feature, .0.reason)]
    Missing(Missing),
    /// The process has more than one thread, so that it cannot fork.
    #[error("the keeper must be started before any thread")]
    Threads,
    /// Something in the data directory cannot be used.
    #[error("data directory {}", path.display())]
    Data {
        /// What.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Another keeper has it.
    #[error("data directory {} is in use by another `funtainer serve`", path.display())]
    Locked {
        /// Which.
        path: PathBuf,
    },
    /// A directory that only the keeper may write to is somebody else's.
    #[error("{} must belong to who runs `funtainer serve` and be writable by nobody else", path.display())]
    Foreign {
        /// Which.
        path: PathBuf,
    },
    /// The address cannot be listened on.
    #[error("listen on {address}")]
    Listen {
        /// Which.
        address: SocketAddr,
        /// Why.
        source: io::Error,
    },
    /// The admin socket cannot be made.
    #[error("admin socket {}", path.display())]
    Admin {
        /// Where.
        path: PathBuf,
        /// Why.
        source: io::Error,
    },
    /// Somebody answers on the admin socket.
    #[error("another server answers on the admin socket {}", path.display())]
    AdminInUse {
        /// Where.
        path: PathBuf,
    },
    /// The range of addresses for instances is not free.
    #[error("{0}")]
    Range(String),
    /// Control groups cannot be used.
    #[error(transparent)]
    Cgroup(#[from] CgroupError),
    /// Titles cannot be set.
    #[error(transparent)]
    Title(#[from] TitleError),
    /// A step of the keeper itself.
    #[error(transparent)]
    Step(#[from] StepError),
}

/// Who waits for an answer: a daemon that has died gets none.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Requester {
    /// Which daemon, counted from 1.
    generation: u64,
    /// The request's number.
    number: u32,
}

/// The daemon that runs.
struct Daemon {
    pid: i32,
    pidfd: OwnedFd,
    link: Link,
    /// It has said `Hello`: events mean something to it.
    greeted: bool,
    /// It has said `Ready`.
    ready: bool,
    /// It is to be dead; only its end is waited for.
    killed: bool,
}

/// When the next daemon is due.
#[derive(Default)]
struct Respawn {
    /// Deaths before ready in a row.
    deaths: u32,
    at: Option<Instant>,
}

struct Keeper {
    settings: KeeperSettings,
    executable: Executable,
    mode: Mode,
    title: Title,
    epoll: OwnedFd,
    signals: OwnedFd,
    data: DataDirectory,
    cgroups: Hierarchy,
    address: Option<SocketAddr>,
    tcp: Vec<OwnedFd>,
    admin: Admin,
    daemon: Option<Daemon>,
    /// Number of the daemon that runs, or ran last.
    generation: u64,
    respawn: Respawn,
    announced: bool,
    /// A daemon accepts calls, and that is not announced yet.
    announceable: bool,
    /// Since when the keeper is asked to stop.
    stopping: Option<Instant>,
    mounts: Mounts,
    layers: Layers,
    /// In a keeper that may not mount layers.
    unpacked: Option<Unpacked>,
    zygotes: Zygotes,
    instances: Instances,
    networks: Networks,
    /// In a keeper that may not change the host's network.
    uplink: Option<Uplink>,
    execs: Execs,
    /// Mounts whose release costs a grace period of the kernel: released when nothing waits.
    spent: Vec<mount::Writable>,
    buffer: Vec<u8>,
}

/// Runs the keeper until it is asked to stop (SIGTERM, SIGINT) or cannot go on. Must be called before any thread is started, and before
/// anything is opened: the program is executed anew once, with the same arguments, from a place that images cannot reach.
/// Everything it made is gone afterwards.
pub fn run(settings: KeeperSettings) -> Result<Ended, KeeperError> {
    if !rustix::process::geteuid().is_root() {
        // Before the next line: root of a user namespace may mount.
        crate::rootless::enter(settings.log).map_err(KeeperError::Missing)?;
    }
    let executable = Executable::settle()?;
    let mut keeper = Keeper::open(settings, executable)?;
    let ended = keeper.serve();
    // Both errors are kept: that of the work is returned, that of the clean-up is logged where it happens.
    keeper.close();
    ended
}

/// Removes a data directory, which no server may use, with all that is in it. Must be called before any thread is started; an ordinary user's
/// process is in a user namespace afterwards, since there alone can he remove what belongs to his subordinate ids.
pub fn remove_data(path: &Path, log: fn(&str)) -> Result<(), KeeperError> {
    if std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count) != 1 {
        return Err(KeeperError::Threads);
    }
    if !rustix::process::geteuid().is_root() {
        crate::rootless::enter(log).map_err(KeeperError::Missing)?;
    }
    data::remove(path)
}

impl Keeper {
    fn open(settings: KeeperSettings, executable: Executable) -> Result<Self, KeeperError> {
        if std::fs::read_dir("/proc/self/task").map_or(0, Iterator::count) != 1 {
            return Err(KeeperError::Threads);
        }
        // What is made below has the mode that its maker wrote, whatever the caller's shell masks.
        rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o022));
        let mode = Mode::decide()?;
        let data = DataDirectory::open(&settings.data, &mode)?;
        let mounts = match &mode {
            Mode::Root(_) => Mounts::probe(data.layers.as_fd(), settings.mounts),
            Mode::Rootless(_) => Mounts::probe_unpacked(data.layers.as_fd(), mode.range(0), settings.mounts),
        };
        let mounts = mounts.map_err(KeeperError::Missing)?;
        let unpacked = Unpacked::open(&data, &mode, settings.log)?;
        // SIGIO says that a lease is being broken, which is looked at where it matters; its default would end the process.
        let handled = SignalSet::of(&[libc::SIGTERM, libc::SIGINT, libc::SIGHUP, libc::SIGIO]);
        signals::set_mask(&handled).map_err(at("block signals"))?;
        let signals = signals::descriptor(&handled).map_err(at("make a signalfd"))?;
        raise_limits().map_err(at("raise the limit of open files"))?;
        // SAFETY: one thread, as was checked, which keeps no pointer into its arguments or environment.
        let title = unsafe { Title::prepare() }?;
        // SAFETY: as above; arguments were read by who called `run`.
        unsafe { title.set(b"funtainer serve") };
        let epoll = epoll::create(epoll::CreateFlags::CLOEXEC).map_err(at("make an epoll"))?;
        epoll::add(&epoll, &signals, EventData::new_u64(TOKEN_SIGNALS), EventFlags::IN).map_err(at("watch signals"))?;
        let cgroups = open_cgroups(&data.id, &mode, settings.log)?;
        if !cgroups.missing().is_empty() {
            let missing = cgroups.missing().join(", no ");
            (settings.log)(&format!("control groups here have no {missing}: instances run without"));
        }
        match mounts.left_from_before(data.layers.as_fd()) {
            Ok(devices) if devices.is_empty() => {}
            Ok(devices) => (settings.log)(&format!(
                "loop devices {devices:?} still have layers of an earlier server, since somebody holds mounts of them: each is free when its \
                 last user ends"
            )),
            Err(error) => (settings.log)(&format!("loop devices of an earlier server cannot be looked for: {error}")),
        }
        let tcp = settings.listen.map(listen::tcp).transpose();
        let (tcp, admin) = match tcp.and_then(|tcp| Ok((tcp, listen::admin(&settings.admin, &mode)?))) {
            Ok(listening) => listening,
            Err(error) => {
                // Both errors are told: the first is the one to act on.
                if let Err(left) = cgroups.close() {
                    (settings.log)(&format!("a control group remains: {left}"));
                }
                return Err(error);
            }
        };
        let (address, tcp) = tcp.map_or((None, Vec::new()), |Tcp { address, sockets }| (Some(address), sockets));
        let networks = Networks::new(settings.network.clone());
        Ok(Self {
            settings,
            executable,
            mode,
            title,
            epoll,
            signals,
            data,
            cgroups,
            address,
            tcp,
            admin,
            daemon: None,
            generation: 0,
            respawn: Respawn { deaths: 0, at: Some(Instant::now()) },
            announced: false,
            announceable: false,
            stopping: None,
            mounts,
            layers: Layers::default(),
            unpacked,
            zygotes: Zygotes::default(),
            instances: Instances::default(),
            networks,
            uplink: None,
            execs: Execs::default(),
            spent: Vec::new(),
            buffer: vec![0; MESSAGE_BYTES_MAX],
        })
    }

    fn log(&self, text: &str) {
        (self.settings.log)(text);
    }

    fn serve(&mut self) -> Result<Ended, KeeperError> {
        self.start_unpackers();
        let mut events = Vec::with_capacity(EVENTS);
        self.open_net();
        loop {
            self.spent.clear();
            self.tick_networks(Instant::now())?;
            self.tick_uplink(Instant::now());
            if let Some(ended) = self.tick(Instant::now()) {
                return Ok(ended);
            }
            let wait = self.deadline().map(|at| at.saturating_duration_since(Instant::now()));
            let wait = wait.map(|wait| Timespec::try_from(wait).unwrap_or_default());
            events.clear();
            match epoll::wait(&self.epoll, rustix::buffer::spare_capacity(&mut events), wait.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(errno) => return Err(at("wait for events")(errno).into()),
            }
            for event in &events {
                let (token, flags) = (event.data.u64(), event.flags);
                match token {
                    TOKEN_SIGNALS => self.on_signal(),
                    TOKEN_DAEMON => self.on_daemon(flags),
                    TOKEN_DAEMON_END => {
                        if let Some(ended) = self.daemon_ended() {
                            return Ok(ended);
                        }
                    }
                    unpacker if unpacker >= TOKEN_UNPACKERS => self.on_unpacker(unpacker - TOKEN_UNPACKERS),
                    TOKEN_NET => self.on_net(flags),
                    TOKEN_NET_END => self.net_ended(),
                    TOKEN_UPLINK_END => self.uplink_ended(),
                    zygote => self.on_zygote(zygote - TOKEN_ZYGOTES, flags),
                }
            }
        }
    }

    /// What is due.
    fn tick(&mut self, now: Instant) -> Option<Ended> {
        if self.respawn.at.is_some_and(|at| at <= now) {
            self.respawn.at = None;
            if let Err(error) = self.spawn_daemon() {
                // What is lacking (processes, memory, descriptors) may be there again later, and instances go on meanwhile.
                self.log(&format!("the daemon cannot be started: {error}"));
                if let Some(ended) = self.daemon_failed() {
                    return Some(ended);
                }
            }
        }
        let stop_due = self.stopping.is_some_and(|since| since + STOP_MAX <= now);
        match &self.daemon {
            Some(daemon) if daemon.link.deadline().is_some_and(|at| at <= now) => self.daemon_fault(Fault::Stalled),
            Some(_) if stop_due => self.kill_daemon("does not end"),
            None if self.stopping.is_some() => return Some(Ended::Stopped),
            _ => {}
        }
        self.tick_zygotes(now);
        self.announce();
        self.instances.retry_removals(now);
        None
    }

    /// The earliest moment at which something becomes due.
    fn deadline(&self) -> Option<Instant> {
        let daemon = self.daemon.as_ref().filter(|daemon| !daemon.killed);
        [
            self.respawn.at,
            daemon.and(self.stopping).map(|since| since + STOP_MAX),
            daemon.and_then(|daemon| daemon.link.deadline()),
            self.zygotes.deadline(),
            self.instances.deadline(),
            self.uplink.as_ref().and_then(Uplink::deadline),
            self.networks.deadline(),
            self.zygotes.pools().filter_map(Pool::deadline).min(),
        ]
        .into_iter()
        .flatten()
        .min()
    }

    fn on_signal(&mut self) {
        while let Some(signal) = signals::next(self.signals.as_fd()) {
            if signal == libc::SIGIO {
                continue;
            }
            if self.stopping.is_some() {
                self.kill_daemon("is to end at once: a second signal came");
                continue;
            }
            self.stopping = Some(Instant::now());
            self.respawn.at = None;
            // Nobody is to connect to a server that goes away.
            self.tcp.clear();
            self.event(&Reply::Stop { grace_ms: STOP_GRACE.as_millis() as u32 });
        }
    }

    fn spawn_daemon(&mut self) -> Result<(), KeeperError> {
        let (ours, theirs) = fds::pair().map_err(at("make the daemon's socket"))?;
        let mut argv = self.settings.daemon.clone();
        argv.extend(["--listeners".into(), self.tcp.len().to_string().into()]);
        let argv: Vec<CString> = argv.iter().filter_map(|text| CString::new(text.as_bytes()).ok()).collect();
        let data = self.data.mount_for_daemon()?;
        let birth = Birth {
            data: data.as_fd(),
            user: self.mode.daemon(),
            single: self.mode.is_single(),
            executable: &self.executable,
            argv: &argv,
            control: theirs.as_fd(),
            admin: self.admin.socket.as_fd(),
            listeners: &self.tcp,
            keeper: rustix::process::getpid().as_raw_pid(),
        };
        // SAFETY: one thread, as was checked at the start; the child executes or exits.
        let Cloned::Parent { pid, pidfd } = (unsafe { clone3(libc::CLONE_NEWNS) }).map_err(at("clone the daemon"))? else {
            let failed = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                let error = jail::become_daemon(&birth);
                (self.settings.log)(&format!("the daemon cannot be started: {error}"));
            }));
            drop(failed);
            // SAFETY: ends the child without running anything of the keeper's.
            unsafe { libc::_exit(71) }
        };
        let end = EventData::new_u64(TOKEN_DAEMON_END);
        let watched = epoll::add(&self.epoll, &pidfd, end, EventFlags::IN)
            .and_then(|()| Link::new(ours, &self.epoll, TOKEN_DAEMON))
            .map_err(at("watch the daemon"));
        let link = watched.inspect_err(|_| {
            // Neither can fail for a child of ours that is not reaped.
            let _ = epoll::delete(&self.epoll, &pidfd);
            let _ = fds::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
            let _ = fds::pidfd_reap(pidfd.as_fd(), true);
        })?;
        self.generation += 1;
        self.daemon = Some(Daemon { pid, pidfd, link, greeted: false, ready: false, killed: false });
        Ok(())
    }

    /// Ends the daemon; its death is an event like any other.
    fn kill_daemon(&mut self, why: &str) {
        if let Some(daemon) = self.daemon.as_mut().filter(|daemon| !daemon.killed) {
            daemon.killed = true;
            (self.settings.log)(&format!("the daemon (pid {}) {why}: it is killed", daemon.pid));
            // ESRCH only when it is dead already.
            let _ = fds::pidfd_signal(daemon.pidfd.as_fd(), libc::SIGKILL);
        }
    }

    fn daemon_ended(&mut self) -> Option<Ended> {
        let daemon = self.daemon.take()?;
        let exit = fds::pidfd_reap(daemon.pidfd.as_fd(), false);
        if matches!(exit, Ok(None)) {
            self.daemon = Some(daemon);
            return None;
        }
        // Forked children may hold the same open files for a moment: the watch ends here, not with the last of them.
        let _ = epoll::delete(&self.epoll, &daemon.pidfd);
        let _ = epoll::delete(&self.epoll, daemon.link.socket());
        if self.stopping.is_some() {
            return Some(Ended::Stopped);
        }
        self.kill_execs();
        self.log(&format!("the daemon (pid {}) ended: {exit:?}", daemon.pid));
        if daemon.ready {
            self.respawn = Respawn { deaths: 0, at: Some(Instant::now()) };
            return None;
        }
        self.daemon_failed()
    }

    /// A daemon was not ready when it ended, or could not be started: the next one is due later, unless that happens too often.
    fn daemon_failed(&mut self) -> Option<Ended> {
        let deaths = self.respawn.deaths + 1;
        if deaths >= DEATHS_MAX {
            self.log(&format!("{deaths} daemons in a row ended before they were ready: giving up"));
            return Some(Ended::DaemonFailed);
        }
        let wait = BACKOFF_MIN.saturating_mul(1 << (deaths - 1)).min(BACKOFF_MAX);
        self.respawn = Respawn { deaths, at: Some(Instant::now() + wait) };
        None
    }

    fn on_daemon(&mut self, flags: EventFlags) {
        if flags.contains(EventFlags::OUT)
            && let Some(daemon) = &mut self.daemon
            && let Err(fault) = daemon.link.flush(&self.epoll)
        {
            self.daemon_fault(fault);
            return;
        }
        let mut buffer = std::mem::take(&mut self.buffer);
        for _ in 0..TURN_MESSAGES {
            let Some(daemon) = self.daemon.as_ref().filter(|daemon| !daemon.killed && !daemon.link.is_busy()) else { break };
            match fds::receive(daemon.link.socket(), &mut buffer, RecvFlags::DONTWAIT) {
                Ok(Some(received)) => self.on_request(&buffer[..received.bytes], received.fds),
                Err(fds::ReceiveError::Kernel(Errno::AGAIN)) => break,
                // Reset: it closed its socket with a message of ours unread.
                Ok(None) | Err(fds::ReceiveError::Kernel(Errno::CONNRESET)) => {
                    self.daemon_fault(Fault::Gone);
                    break;
                }
                Err(error) => {
                    self.kill_daemon(&format!("sends what is no message ({error})"));
                    break;
                }
            }
        }
        self.buffer = buffer;
    }

    /// A datagram of the daemon.
    fn on_request(&mut self, datagram: &[u8], descriptors: fds::Fds) {
        let Some(number) = number_of(datagram) else {
            // Not even the header is right: the other side is not the daemon that this keeper belongs to.
            self.kill_daemon("sends what is no message");
            return;
        };
        let requester = Requester { generation: self.generation, number };
        match protocol::Request::decode(datagram, descriptors.len()) {
            Ok((_, request)) => self.handle(requester, request, descriptors),
            Err(error) => self.reply(requester, &Reply::Refused(protocol::Refusal::Malformed(error.to_string())), &[]),
        }
    }

    /// Answers a request, if who asked still lives.
    fn reply(&mut self, to: Requester, reply: &Reply, descriptors: &[std::os::fd::BorrowedFd<'_>]) {
        if to.generation == self.generation {
            self.send_to_daemon(to.number, reply, descriptors);
        }
    }

    /// Tells a daemon that has said `Hello`; another one asks by `List`.
    fn event(&mut self, event: &Reply) {
        if self.daemon.as_ref().is_some_and(|daemon| daemon.greeted) {
            self.send_to_daemon(0, event, &[]);
        }
    }

    fn send_to_daemon(&mut self, number: u32, reply: &Reply, descriptors: &[std::os::fd::BorrowedFd<'_>]) {
        let Some(daemon) = &mut self.daemon else { return };
        // Every part of a reply is bounded where it comes in.
        let datagram = reply.encode(number).expect("replies fit into a message");
        if let Err(fault) = daemon.link.send(&self.epoll, &datagram, descriptors) {
            self.daemon_fault(fault);
        }
    }

    fn daemon_fault(&mut self, fault: Fault) {
        match fault {
            // It is dying, of which its pidfd tells, or of no use any more. When asked to stop it is given the time that it has.
            Fault::Gone if self.stopping.is_some() => {
                if let Some(daemon) = &self.daemon {
                    // Nothing more can come, and a closed end would be told of in every round.
                    let _ = epoll::delete(&self.epoll, daemon.link.socket());
                }
            }
            Fault::Gone => self.kill_daemon("has closed its socket"),
            Fault::Stalled => self.kill_daemon("does not read its messages"),
        }
    }

    /// A daemon accepts calls, and it is known whether there are networks: the start, or a daemon's replacement, is over.
    fn announce(&mut self) {
        if !self.announceable || !self.networks.is_settled(Instant::now()) {
            return;
        }
        self.announceable = false;
        if !std::mem::replace(&mut self.announced, true) {
            (self.settings.announce)(self.address);
        }
        if let Err(error) = resident::release_once_used() {
            self.log(&format!("the memory of the start is not given back: {error}"));
        }
    }

    /// Ends and removes everything.
    fn close(mut self) {
        if let Some(daemon) = self.daemon.take() {
            let _ = fds::pidfd_signal(daemon.pidfd.as_fd(), libc::SIGKILL);
            if let Err(errno) = fds::pidfd_reap(daemon.pidfd.as_fd(), true) {
                self.log(&format!("the daemon (pid {}) cannot be reaped: {errno}", daemon.pid));
            }
        }
        self.close_zygotes();
        if let Some(unpacked) = &mut self.unpacked {
            unpacked.close();
        }
        self.close_net();
        self.end_uplink();
        if let Err(error) = self.cgroups.close() {
            (self.settings.log)(&format!("a control group remains: {error}"));
        }
    }
}

/// An ordinary user may have no control group to put instances in: then there are none.
fn open_cgroups(id: &str, mode: &Mode, log: fn(&str)) -> Result<Hierarchy, KeeperError> {
    let name = format!("funtainer-{id}");
    let opened = Layout::detect().and_then(|layout| {
        let settled = layout.settle(&name);
        for note in &settled.notes {
            log(note);
        }
        Hierarchy::open(&settled.layout, &name)
    });
    match opened {
        Err(error) if mode.is_rootless() => {
            log(&format!("no control group is delegated to this user ({error})"));
            Ok(Hierarchy::absent())
        }
        other => Ok(other?),
    }
}

/// An instance costs the keeper some descriptors, and the usual soft limit of 1,024 is for programs that use select(2). The hard limit is raised
/// as far as instances may ask for, where that is allowed (CAP_SYS_RESOURCE): theirs cannot be above it.
fn raise_limits() -> Result<(), Errno> {
    // Under sudo it is 0. Instances are to have 1, which alone keeps cores from a program behind a piped core_pattern (core(5)).
    let cores = rustix::process::getrlimit(Resource::Core);
    if cores.maximum == Some(0) {
        // Where that is not allowed, files stay as small as they can.
        let _ = rustix::process::setrlimit(Resource::Core, Rlimit { maximum: Some(1), ..cores });
    }
    let limit = rustix::process::getrlimit(Resource::Nofile);
    let wanted = limit.maximum.map(|maximum| maximum.max(OPEN_FILES_MAX));
    match rustix::process::setrlimit(Resource::Nofile, Rlimit { current: wanted, maximum: wanted }) {
        Err(Errno::PERM) => {
            rustix::process::setrlimit(Resource::Nofile, Rlimit { current: limit.maximum, maximum: limit.maximum })
        }
        other => other,
    }
}

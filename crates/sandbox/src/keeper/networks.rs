//! Networks of instances that lead out, made ahead, and the process that connects them (`net`).
//!
//! ```text
//! ordered ──zygote: Network──► made ──net: Plugged──► ready ──start──► used ──instance ended──► unplugged, forgotten
//!    └──NetworkFailed─────────────┴──PlugFailed─────────┴──zygote lost──────────────────────────^
//! ```
//! Each zygote whose instances reach out has a pool of ready ones. A start takes one and orders the next; where none is ready it waits in
//! line, which makes the pool larger. Nothing here waits for the process: it may be slow, or dead and about to be followed by another,
//! which is told what is in use.

use std::collections::{HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, OwnedFd};
use std::time::{Duration, Instant};

use funtainer_model::{InstanceId, Isolation, Network as Wanted, RevisionId};
use rustix::event::Timespec;
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::link::Link;
use super::uplink::Uplink;
use super::{Keeper, KeeperError, Requester, TOKEN_NET, TOKEN_NET_END, TURN_MESSAGES};
use crate::fds::{self, Fds};
use crate::net::resolver::Resolver;
use crate::net::{self, DATAGRAM_BYTES, Plan, Plug, Policy, Range};
use crate::orders;
use crate::protocol::{Refusal, Reply};
use crate::step::{StepError, at, errno_of};

/// Networks that a quiet zygote has ready: one for the next start, one for the start after it.
const POOL_MIN: usize = 2;
/// Most that a busy one has.
const POOL_MAX: usize = 16;
/// Networks that a zygote makes at once: it makes them one by one, and a start in between waits for all that were ordered before it.
const COMING_MAX: usize = 2;
/// How long a start may wait for a network. The daemon has a limit of its own for starts, and ends the wait when that has passed.
const START_WAIT_MAX: Duration = Duration::from_mins(1);
/// How long the opening of a revision waits for its first network, and the server's start for the process.
const OPEN_WAIT_MAX: Duration = Duration::from_secs(5);
/// After a network that could not be made no other is tried for so long, unless a start asks.
const RETRY: Duration = Duration::from_secs(1);
/// Waiting starts of a revision are told of once in this time.
const SAID_AGAIN: Duration = Duration::from_secs(10);
/// Wait after the first death of the process; it doubles with each further one in a row.
const BACKOFF_MIN: Duration = Duration::from_millis(100);
/// Longest such wait.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// So many deaths before it was ready, in a row, and there are no networks any more.
const DEATHS_MAX: u32 = 10;
/// Networks have numbers below this.
const NUMBERS: u32 = 1 << 30;
/// How long the process may take to put everything back when the keeper ends.
const CLOSE_WAIT: Timespec = Timespec { tv_sec: 10, tv_nsec: 0 };

/// Whether and how instances reach what is outside of this machine.
#[derive(Debug, Clone, Default)]
pub struct NetworkSettings {
    /// Whether any may. If not, nothing of the host's network is changed.
    pub on: bool,
    /// Where their addresses are taken from; `None` is the first free one of those that are tried.
    pub range: Option<Range>,
    /// Whom they ask for names, the first three; where none is named, whom the host asks.
    pub resolvers: Vec<Ipv4Addr>,
}

/// What the process is good for.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Service {
    /// There is none, or none any more.
    None,
    /// It sets up, since then.
    Starting(Instant),
    /// It connects networks, with addresses from there.
    Ready(Range),
}

/// The process that runs.
struct Process {
    pid: i32,
    pidfd: OwnedFd,
    link: Link,
}

/// How far a network is.
enum State {
    /// The zygote makes it.
    Ordered,
    /// It is there: its handle, and a socket in it. The process is asked to connect it, or will be.
    Made(OwnedFd, OwnedFd),
    /// It leads out.
    Ready(Ipv4Addr),
}

struct Network {
    /// Key of its zygote.
    zygote: u64,
    plug: Plug,
    state: State,
}

/// A start as it was asked for.
pub(super) struct Start {
    pub(super) requester: Requester,
    pub(super) id: InstanceId,
    pub(super) revision: RevisionId,
    pub(super) descriptor: Vec<u8>,
    pub(super) descriptors: Fds,
}

/// The networks of one zygote that no instance has yet.
pub(super) struct Pool {
    /// Number of the policy that its networks have.
    policy: Option<u32>,
    resolver: Resolver,
    ready: VecDeque<u32>,
    /// Ordered and not ready.
    coming: usize,
    /// How many are to be ready.
    target: usize,
    waiting: VecDeque<(Start, Instant)>,
    /// Who is told when the first is ready.
    openers: Vec<Requester>,
    opened: Instant,
    /// Starts that had to wait, ever.
    waits: u64,
    said: Option<Instant>,
    /// No other is made before, unless a start waits.
    retry: Option<Instant>,
}

impl Pool {
    fn new(policy: Option<u32>, resolver: Resolver) -> Self {
        Self {
            policy,
            resolver,
            ready: VecDeque::new(),
            coming: 0,
            target: POOL_MIN,
            waiting: VecDeque::new(),
            openers: Vec::new(),
            opened: Instant::now(),
            waits: 0,
            said: None,
            retry: None,
        }
    }

    /// The file that says whom the instances ask for names.
    pub(super) fn resolver(&self) -> String {
        self.resolver.file()
    }

    /// How many are to be ordered now.
    fn missing(&self, now: Instant) -> usize {
        if self.waiting.is_empty() && self.retry.is_some_and(|at| at > now) {
            return 0;
        }
        let wanted = (self.target + self.waiting.len()).saturating_sub(self.ready.len() + self.coming);
        wanted.min(COMING_MAX.saturating_sub(self.coming))
    }

    fn take(&mut self) -> Option<u32> {
        // Who waits comes first.
        if self.waiting.is_empty() { self.ready.pop_front() } else { None }
    }

    /// Puts a start into the line. True if that is to be told.
    fn wait(&mut self, start: Start, now: Instant) -> bool {
        self.waiting.push_back((start, now));
        self.waits += 1;
        self.target = (self.target * 2).min(POOL_MAX);
        let tell = self.said.is_none_or(|at| at + SAID_AGAIN <= now);
        if tell {
            self.said = Some(now);
        }
        tell
    }

    fn waits(&self, id: InstanceId) -> bool {
        self.waiting.iter().any(|(start, _)| start.id == id)
    }

    fn remove(&mut self, id: InstanceId) -> Option<Start> {
        let place = self.waiting.iter().position(|(start, _)| start.id == id)?;
        self.waiting.remove(place).map(|(start, _)| start)
    }

    /// Nobody has started anything for a while: what is too much.
    fn shrink(&mut self) -> Vec<u32> {
        self.target = POOL_MIN;
        self.ready.drain(self.ready.len().min(POOL_MIN)..).collect()
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let opened = (!self.openers.is_empty()).then(|| self.opened + OPEN_WAIT_MAX);
        let waited = self.waiting.front().map(|(_, since)| *since + START_WAIT_MAX);
        let short = self.ready.len() + self.coming < self.target;
        [opened, waited, self.retry.filter(|_| short)].into_iter().flatten().min()
    }
}

/// What a start does about its network.
enum Taken {
    /// It needs none that leads out.
    Needless,
    Network(u32),
    /// None is ready: it waits in the pool of this zygote.
    Later(u64),
}

/// All networks, and the process.
pub(super) struct Networks {
    settings: NetworkSettings,
    service: Service,
    process: Option<Process>,
    /// Deaths before it was ready, in a row.
    deaths: u32,
    respawn: Option<Instant>,
    /// The range that a process once had.
    range: Option<Range>,
    by_number: HashMap<u32, Network>,
    policies: HashMap<u32, Policy>,
    /// The number of the next network or policy.
    next: u32,
    /// Why the server cannot go on.
    refused: Option<String>,
}

impl Networks {
    pub(super) fn new(settings: NetworkSettings) -> Self {
        let service = if settings.on { Service::Starting(Instant::now()) } else { Service::None };
        Self {
            settings,
            service,
            process: None,
            deaths: 0,
            respawn: None,
            range: None,
            by_number: HashMap::new(),
            policies: HashMap::new(),
            next: 1,
            refused: None,
        }
    }

    fn number(&mut self) -> u32 {
        loop {
            let number = self.next;
            self.next = (self.next + 1) % NUMBERS;
            // After all of them some are still in use, and 0 is none.
            if number != 0 && !self.by_number.contains_key(&number) && !self.policies.contains_key(&number) {
                return number;
            }
        }
    }

    /// Whether it is known what there is.
    pub(super) fn is_settled(&self, now: Instant) -> bool {
        !matches!(self.service, Service::Starting(since) if since + OPEN_WAIT_MAX > now)
    }

    pub(super) fn deadline(&self) -> Option<Instant> {
        let settled = match self.service {
            Service::Starting(since) => Some(since + OPEN_WAIT_MAX),
            Service::None | Service::Ready(_) => None,
        };
        let stalled = self.process.as_ref().and_then(|process| process.link.deadline());
        [self.respawn, settled.filter(|at| *at > Instant::now()), stalled].into_iter().flatten().min()
    }

    /// A pool for a revision whose instances reach out. Its policy is told to the process.
    pub(super) fn pool(&mut self, epoll: &OwnedFd, isolation: &Isolation) -> Option<Pool> {
        let only = isolation.network == Wanted::Off;
        if self.service == Service::None || only && isolation.egress.is_empty() {
            return None;
        }
        let policy = (only || !isolation.egress.is_empty()).then(|| {
            let number = self.number();
            let policy = Policy { rules: isolation.egress.clone(), only };
            self.tell(epoll, &net::Order::AddPolicy { number, policy: policy.clone() }, &[]);
            self.policies.insert(number, policy);
            number
        });
        Some(Pool::new(policy, Resolver::find(&self.settings.resolvers)))
    }

    /// Sends an order to the process, if there is one: another one is told what there is by then.
    fn tell(&mut self, epoll: &OwnedFd, order: &net::Order, descriptors: &[std::os::fd::BorrowedFd<'_>]) {
        if let Some(process) = &mut self.process
            && process.link.send(epoll, &order.encode(), descriptors).is_err()
        {
            process.kill();
        }
    }

    /// Asks for the connection of a network that is there.
    fn plug(&mut self, epoll: &OwnedFd, number: u32) {
        let (Service::Ready(_), Some(process)) = (self.service, &mut self.process) else { return };
        let Some(Network { plug, state: State::Made(inside, route), .. }) = self.by_number.get(&number) else { return };
        let order = net::Order::Plug(plug.clone());
        if process.link.send(epoll, &order.encode(), &[inside.as_fd(), route.as_fd()]).is_err() {
            process.kill();
        }
    }

    /// A network is over, wherever it was.
    pub(super) fn forget(&mut self, epoll: &OwnedFd, number: u32) {
        if self.by_number.remove(&number).is_some_and(|network| !matches!(network.state, State::Ordered)) {
            self.tell(epoll, &net::Order::Unplug(number), &[]);
        }
    }

    /// A zygote is dead: its networks, of instances too, are over.
    pub(super) fn forget_all(&mut self, epoll: &OwnedFd, zygote: u64, pool: &Pool) {
        let of_zygote = self.by_number.iter().filter(|(_, network)| network.zygote == zygote);
        let numbers: Vec<u32> = of_zygote.map(|(number, _)| *number).collect();
        for number in numbers {
            self.forget(epoll, number);
        }
        if let Some(policy) = pool.policy.filter(|policy| self.policies.remove(policy).is_some()) {
            self.tell(epoll, &net::Order::RemovePolicy(policy), &[]);
        }
    }
}

impl Process {
    /// ESRCH only when it is dead already: its pidfd tells.
    fn kill(&self) {
        let _ = fds::pidfd_signal(self.pidfd.as_fd(), libc::SIGKILL);
    }
}

impl Keeper {
    /// Begins with networks, if there are to be any.
    pub(super) fn open_net(&mut self) {
        if !self.networks.settings.on {
            return;
        }
        if self.mode.is_rootless()
            && let Err(why) = self.open_uplink()
        {
            self.log(&format!("functions have no network besides their own loopback: {why}"));
            return self.without_networks();
        }
        let resolver = Resolver::find(&self.networks.settings.resolvers);
        if resolver.is_public {
            let servers: Vec<String> = resolver.servers.iter().map(ToString::to_string).collect();
            self.log(&format!(
                "this machine names no name server that functions could ask: they ask {}, unless you name others with --dns",
                servers.join(" and ")
            ));
        }
        self.start_net();
    }

    /// Starts the process, or the next one.
    fn start_net(&mut self) {
        if let Err(error) = self.try_start_net() {
            self.log(&format!("the process that connects networks cannot be started: {error}"));
            self.net_failed();
        }
    }

    fn try_start_net(&mut self) -> Result<(), StepError> {
        let (ours, theirs) = fds::pair().map_err(at("make the socket of the network process"))?;
        let directory =
            std::fs::File::open(&self.data.path).map_err(|error| at("open the data directory")(errno_of(&error)))?;
        let plan = Plan {
            socket: theirs.as_fd(),
            directory: directory.as_fd(),
            hub: self.uplink.as_ref().map(Uplink::hub),
            id: &self.data.id,
            wanted: self.networks.settings.range,
            resumed: self.networks.range,
            title: self.title,
            log: self.settings.log,
        };
        // SAFETY: the keeper has one thread, as was checked at its start.
        let (pid, pidfd) = unsafe { net::fork(&plan) }.map_err(at("clone the network process"))?;
        let watched = epoll::add(&self.epoll, &pidfd, EventData::new_u64(TOKEN_NET_END), EventFlags::IN)
            .and_then(|()| Link::new(ours, &self.epoll, TOKEN_NET))
            .map_err(at("watch the network process"));
        let link = watched.inspect_err(|_| {
            // It has closed socket, so that it ends; neither can fail for a child of ours that is not reaped.
            let _ = epoll::delete(&self.epoll, &pidfd);
            let _ = fds::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
            let _ = fds::pidfd_reap(pidfd.as_fd(), true);
        })?;
        self.networks.process = Some(Process { pid, pidfd, link });
        self.networks.service = Service::Starting(Instant::now());
        let policies = self.networks.policies.iter();
        let policies = policies.map(|(number, policy)| net::Order::AddPolicy { number: *number, policy: policy.clone() });
        let adopted = self.networks.by_number.values().filter_map(|network| match network.state {
            State::Ready(address) => Some(net::Order::Adopt { plug: network.plug.clone(), address }),
            State::Ordered | State::Made(..) => None,
        });
        let told: Vec<net::Order> = policies.chain(adopted).chain([net::Order::SetUp]).collect();
        for order in &told {
            self.networks.tell(&self.epoll, order, &[]);
        }
        Ok(())
    }

    pub(super) fn on_net(&mut self, flags: EventFlags) {
        let Some(process) = &mut self.networks.process else { return };
        if flags.contains(EventFlags::OUT) && process.link.flush(&self.epoll).is_err() {
            process.kill();
            return;
        }
        self.read_net(TURN_MESSAGES);
    }

    fn read_net(&mut self, max: usize) {
        let mut buffer = [0_u8; DATAGRAM_BYTES];
        for _ in 0..max {
            let Some(process) = &self.networks.process else { return };
            let report = match fds::receive(process.link.socket(), &mut buffer, RecvFlags::DONTWAIT) {
                Ok(Some(received)) => net::Report::decode(&buffer[..received.bytes], received.fds.len()),
                Err(fds::ReceiveError::Kernel(Errno::AGAIN)) => return,
                Ok(None) | Err(_) => {
                    // Closed: nothing but its end is to be waited for.
                    let _ = epoll::delete(&self.epoll, process.link.socket());
                    process.kill();
                    return;
                }
            };
            let Some(report) = report else {
                (self.settings.log)("the network process sends what is no report: it is killed");
                process.kill();
                return;
            };
            self.on_net_report(report);
        }
    }

    fn on_net_report(&mut self, report: net::Report) {
        match report {
            net::Report::Ready(range) => {
                self.networks.service = Service::Ready(range);
                self.networks.range = Some(range);
                self.networks.deaths = 0;
                let made: Vec<u32> = self.networks.by_number.keys().copied().collect();
                for number in made {
                    self.networks.plug(&self.epoll, number);
                }
            }
            net::Report::Unavailable(why) => {
                self.log(&format!("functions have no network besides their own loopback: {why}"));
                self.without_networks();
            }
            net::Report::RangeTaken(why) => self.networks.refused = Some(why),
            net::Report::Plugged { network, address } => self.network_ready(network, address),
            net::Report::PlugFailed { network, errno, step } => self.network_failed(network, errno, &step),
        }
    }

    /// The process is dead. What is in use goes on without it.
    pub(super) fn net_ended(&mut self) {
        let Some(process) = self.networks.process.as_ref() else { return };
        if matches!(fds::pidfd_reap(process.pidfd.as_fd(), false), Ok(None)) {
            return;
        }
        // A report that came before the end is read before it.
        self.read_net(usize::MAX);
        let Some(process) = self.networks.process.take() else { return };
        let _ = epoll::delete(&self.epoll, &process.pidfd);
        let _ = epoll::delete(&self.epoll, process.link.socket());
        if self.networks.service != Service::None && self.networks.refused.is_none() {
            self.log(&format!("the network process (pid {}) ended", process.pid));
            self.net_failed();
        }
    }

    fn net_failed(&mut self) {
        self.networks.deaths += 1;
        if self.networks.deaths >= DEATHS_MAX {
            self.log("the network process ended too often before it was ready: functions that start now have no network");
            self.without_networks();
            return;
        }
        if let Service::Ready(_) = self.networks.service {
            self.networks.service = Service::Starting(Instant::now());
        }
        let wait = BACKOFF_MIN.saturating_mul(1 << (self.networks.deaths - 1)).min(BACKOFF_MAX);
        self.networks.respawn = Some(Instant::now() + wait);
    }

    /// Instances start with their loopback alone from now on.
    fn without_networks(&mut self) {
        self.networks.service = Service::None;
        for (key, mut pool) in self.zygotes.take_pools() {
            self.networks.forget_all(&self.epoll, key, &pool);
            for requester in std::mem::take(&mut pool.openers) {
                self.reply(requester, &Reply::Done, &[]);
            }
            for (start, _) in std::mem::take(&mut pool.waiting) {
                self.start(start);
            }
        }
    }

    /// Starts an instance, now or when its network is there.
    pub(super) fn start(&mut self, start: Start) {
        if self.instances.exists(start.id) || self.zygotes.pools().any(|pool| pool.waits(start.id)) {
            let refused = Refusal::Malformed("the instance exists".to_owned());
            return self.reply(start.requester, &Reply::Refused(refused), &[]);
        }
        match self.take_network(start.revision) {
            Taken::Needless => self.begin(start, None),
            Taken::Network(network) => self.begin(start, Some(network)),
            Taken::Later(key) => self.wait_for_network(key, start),
        }
    }

    fn take_network(&mut self, revision: RevisionId) -> Taken {
        let Some((key, zygote)) = self.zygotes.ready(revision) else { return Taken::Needless };
        match zygote.pool.as_mut().map(Pool::take) {
            None => Taken::Needless,
            Some(Some(network)) => Taken::Network(network),
            Some(None) => Taken::Later(key),
        }
    }

    /// Starts, and has the next network made. Where the start fails at once its network is left to the next one.
    fn begin(&mut self, start: Start, network: Option<u32>) {
        let (requester, revision) = (start.requester, start.revision);
        let begun = self.try_start(start, network);
        let zygote = self.zygotes.ready(revision);
        if let (Err(_), Some(network), Some((_, zygote))) = (&begun, network, zygote)
            && let Some(pool) = &mut zygote.pool
        {
            pool.ready.push_front(network);
        }
        if let Some((key, _)) = self.zygotes.ready(revision) {
            self.refill(key);
        }
        if let Err(refused) = begun {
            self.reply(requester, &Reply::Refused(refused), &[]);
        }
    }

    fn wait_for_network(&mut self, key: u64, start: Start) {
        let (id, revision) = (start.id, start.revision);
        let Some(pool) = self.zygotes.get_mut(key).and_then(|zygote| zygote.pool.as_mut()) else { return };
        if pool.wait(start, Instant::now()) {
            let (waiting, waits) = (pool.waiting.len(), pool.waits);
            self.log(&format!(
                "no network is ready for instance {id} of revision {revision}: {waiting} starts wait ({waits} have so far)"
            ));
        }
        self.refill(key);
    }

    /// A zygote takes orders from now on. Its openers are told when it has a network; at once if it needs none.
    pub(super) fn fill(&mut self, key: u64, openers: Vec<Requester>) {
        match self.zygotes.get_mut(key).and_then(|zygote| zygote.pool.as_mut()) {
            Some(pool) => {
                pool.openers = openers;
                pool.opened = Instant::now();
                self.refill(key);
            }
            None => self.tell_openers(openers),
        }
    }

    /// Also told when the zygote is ready and its first network is not; `None` is for one that needs none.
    pub(super) fn opened_again(&mut self, key: u64, requester: Requester) {
        match self.zygotes.get_mut(key).and_then(|zygote| zygote.pool.as_mut()) {
            Some(pool) if !pool.openers.is_empty() => pool.openers.push(requester),
            _ => self.reply(requester, &Reply::Done, &[]),
        }
    }

    fn tell_openers(&mut self, openers: Vec<Requester>) {
        for requester in openers {
            self.reply(requester, &Reply::Done, &[]);
        }
    }

    /// Has networks made that are missing.
    fn refill(&mut self, key: u64) {
        let now = Instant::now();
        loop {
            let Some(zygote) = self.zygotes.get_mut(key).filter(|zygote| zygote.takes_orders()) else { return };
            let Some(pool) = zygote.pool.as_mut().filter(|pool| pool.missing(now) > 0) else { return };
            pool.coming += 1;
            let (policy, resolvers) = (pool.policy, pool.resolver.servers.clone());
            let number = self.networks.number();
            let plug = Plug { network: number, policy, resolvers };
            self.networks.by_number.insert(number, Network { zygote: key, plug, state: State::Ordered });
            self.order(key, orders::Order::MakeNetwork(number), &[]);
        }
    }

    /// A zygote has made a network; `None` if it was not to.
    pub(super) fn network_made(&mut self, key: u64, number: u32, inside: OwnedFd, route: OwnedFd) -> Option<()> {
        let Some(network) = self.networks.by_number.get_mut(&number) else {
            // It was given up meanwhile.
            self.order(key, orders::Order::DropNetwork(number), &[]);
            return Some(());
        };
        let ordered = network.zygote == key && matches!(network.state, State::Ordered);
        ordered.then_some(())?;
        network.state = State::Made(inside, route);
        self.networks.plug(&self.epoll, number);
        Some(())
    }

    /// A network leads out: who waited longest gets it.
    fn network_ready(&mut self, number: u32, address: Ipv4Addr) {
        let Some(network) = self.networks.by_number.get_mut(&number) else { return };
        network.state = State::Ready(address);
        let key = network.zygote;
        let Some(pool) = self.zygotes.get_mut(key).and_then(|zygote| zygote.pool.as_mut()) else { return };
        pool.coming = pool.coming.saturating_sub(1);
        pool.retry = None;
        let openers = std::mem::take(&mut pool.openers);
        let next = pool.waiting.pop_front();
        if next.is_none() {
            pool.ready.push_back(number);
        }
        self.tell_openers(openers);
        match next {
            Some((start, _)) => self.begin(start, Some(number)),
            None => self.refill(key),
        }
    }

    /// A network could not be made or connected: who waited longest learns why.
    pub(super) fn network_failed(&mut self, number: u32, errno: i32, step: &str) {
        let Some(network) = self.networks.by_number.remove(&number) else { return };
        let key = network.zygote;
        if !matches!(network.state, State::Ordered) {
            self.order(key, orders::Order::DropNetwork(number), &[]);
        }
        let reason = Errno::from_raw_os_error(errno);
        self.log(&format!("a network of an instance cannot be made: {step}: {reason}"));
        let Some(pool) = self.zygotes.get_mut(key).and_then(|zygote| zygote.pool.as_mut()) else { return };
        pool.coming = pool.coming.saturating_sub(1);
        pool.retry = Some(Instant::now() + RETRY);
        let openers = std::mem::take(&mut pool.openers);
        let next = pool.waiting.pop_front();
        self.tell_openers(openers);
        if let Some((start, _)) = next {
            let refused = Refusal::System { step: step.to_owned(), errno };
            self.reply(start.requester, &Reply::Refused(refused), &[]);
        }
        self.refill(key);
    }

    /// An instance is over, or never was: its network goes.
    pub(super) fn drop_network(&mut self, key: u64, number: Option<u32>) {
        let Some(number) = number else { return };
        self.networks.forget(&self.epoll, number);
        self.order(key, orders::Order::DropNetwork(number), &[]);
    }

    /// A start that waits is not wanted any more; false if there is none.
    pub(super) fn stop_waiting(&mut self, id: InstanceId) -> bool {
        let Some(start) = self.zygotes.pools_mut().find_map(|pool| pool.remove(id)) else { return false };
        self.reply(start.requester, &Reply::Refused(Refusal::NoInstance), &[]);
        true
    }

    /// A zygote is dead: who waited for its networks learns it.
    pub(super) fn pool_lost(&mut self, key: u64, pool: Pool) {
        self.networks.forget_all(&self.epoll, key, &pool);
        let starts = pool.waiting.into_iter().map(|(start, _)| start.requester);
        for requester in starts.chain(pool.openers) {
            self.reply(requester, &Reply::Refused(Refusal::NoZygote), &[]);
        }
    }

    pub(super) fn tick_networks(&mut self, now: Instant) -> Result<(), KeeperError> {
        if let Some(why) = self.networks.refused.take() {
            return Err(KeeperError::Range(why));
        }
        if self.networks.respawn.is_some_and(|at| at <= now) {
            self.networks.respawn = None;
            self.start_net();
        }
        if let Some(process) = &self.networks.process
            && process.link.deadline().is_some_and(|at| at <= now)
        {
            (self.settings.log)("the network process does not read its orders: it is killed");
            process.kill();
        }
        let due = self.zygotes.keys_where(|zygote| zygote.pool.as_ref().and_then(Pool::deadline).is_some_and(|at| at <= now));
        for key in due {
            self.tick_pool(key, now);
        }
        Ok(())
    }

    fn tick_pool(&mut self, key: u64, now: Instant) {
        let Some(pool) = self.zygotes.get_mut(key).and_then(|zygote| zygote.pool.as_mut()) else { return };
        let openers = if pool.opened + OPEN_WAIT_MAX <= now { std::mem::take(&mut pool.openers) } else { Vec::new() };
        let late = pool.waiting.iter().take_while(|(_, since)| *since + START_WAIT_MAX <= now).count();
        let late: Vec<Start> = pool.waiting.drain(..late).map(|(start, _)| start).collect();
        if pool.retry.is_some_and(|at| at <= now) {
            pool.retry = None;
        }
        self.tell_openers(openers);
        for start in late {
            let refused = Refusal::Exhausted("networks".to_owned());
            self.reply(start.requester, &Reply::Refused(refused), &[]);
        }
        self.refill(key);
    }

    /// The last instance of a zygote has ended: a small pool will do.
    pub(super) fn shrink_pool(&mut self, key: u64) {
        let Some(pool) = self.zygotes.get_mut(key).and_then(|zygote| zygote.pool.as_mut()) else { return };
        for number in pool.shrink() {
            self.drop_network(key, Some(number));
        }
    }

    /// Ends the process, which puts back what was changed on the host. Zygotes are dead by then.
    pub(super) fn close_net(&mut self) {
        let Some(process) = self.networks.process.take() else {
            if self.networks.range.is_some() {
                self.log(
                    "without a network process what it changed on this machine remains, until the next server puts it back",
                );
            }
            return;
        };
        let Process { pid, pidfd, link } = process;
        drop(link);
        match fds::pidfd_ended(pidfd.as_fd(), Some(CLOSE_WAIT)) {
            Ok(true) => {}
            // The next server of this data directory puts back what is left.
            other => {
                self.log(&format!("the network process (pid {pid}) does not end and is killed: {other:?}"));
                let _ = fds::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
            }
        }
        if let Err(errno) = fds::pidfd_reap(pidfd.as_fd(), true) {
            self.log(&format!("the network process (pid {pid}) cannot be reaped: {errno}"));
        }
    }
}

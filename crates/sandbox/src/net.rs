//! `funtainer net`: the process that connects instances with the outside, and the only one that speaks to the host's network.
//!
//! ```text
//! forked by the keeper ─ own descriptors, CAP_NET_ADMIN alone ─ is told what there is ─ SetUp
//!   ─ lock ─ what a killed one left is put back ─ range ─ table ─ forwarding ─ Ready
//!   ┌► Plug: address ─ veth pair ─ pin ─ both ends up ─ Plugged          first of all, starts may wait for it
//!   │  Unplug: pair removed ─ pin removed ─ connections forgotten        when there is time
//!   └─ something changed on the host ─ forwarding and foreign firewalls looked at again
//! socket closed by the keeper, or the keeper dead: everything is put back, and it ends
//! ```
//! Requests to the kernel's network can wait for locks that others hold: here they keep nobody waiting but those who need a network. A
//! successor of one that died is told by the keeper what is in use, and takes it over without a moment in which packets could pass
//! that should not.

mod conntrack;
mod firewall;
mod foreign;
mod host;
mod link;
pub(crate) mod look;
mod messages;
mod netlink;
mod nft;
mod range;
pub(crate) mod resolver;
#[cfg(test)]
mod tests;

use std::collections::{BTreeSet, HashMap, VecDeque};
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, FromRawFd, OwnedFd};
use std::panic::AssertUnwindSafe;
use std::time::{Duration, Instant};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use rustix::thread::{CapabilitySet, LinkNameSpaceType};

use crate::clone::{Cloned, clone3};
use crate::fds::{self, Fds};
use crate::signals::{self, SignalSet};
use crate::step::{StepError, at, errno_of};
use crate::title::Title;
use crate::{uplink, userns};

pub(crate) use firewall::Policy;
use firewall::{Failed, Firewall, Pinned, group};
use host::Record;
use link::{HostName, Pair};
pub(crate) use messages::{DATAGRAM_BYTES, Order, Plug, RESOLVERS_MAX, Report};
use netlink::{Events, Socket};
use range::{Addresses, collision};
pub use range::{Range, RangeError};
pub use resolver::can_be_asked;

/// The numbers at which the socket and the data directory stand.
const SOCKET: i32 = 3;
const DIRECTORY: i32 = 4;
/// The hub, where there is one, until it is entered.
const HUB: i32 = 5;
/// What it may do: change the network, and nothing else that root may.
const KEPT: CapabilitySet = CapabilitySet::NET_ADMIN;
/// Group of rtnetlink(7): addresses of IPv4.
const ADDRESS_EVENTS: u32 = 1 << (libc::RTNLGRP_IPV4_IFADDR - 1);
/// Groups of rtnetlink(7): links, routes of IPv4, settings of IPv4 interfaces.
const ROUTE_EVENTS: u32 =
    1 << (libc::RTNLGRP_LINK - 1) | 1 << (libc::RTNLGRP_IPV4_ROUTE - 1) | 1 << (libc::RTNLGRP_IPV4_NETCONF - 1);
/// Group of nfnetlink: tables, chains and rules.
const FILTER_EVENTS: u32 = 1 << (libc::NFNLGRP_NFTABLES - 1);
/// How long the program behind an uplink may take to connect the hub: it takes some 20 ms.
const UPLINK_WAIT: Duration = Duration::from_secs(4);
/// How long changes of the host are gathered before they are looked at.
const LOOK_AGAIN: Duration = Duration::from_millis(500);
/// Orders that can wait do so up to this number; beyond it they take turns with the others.
const LATER_MAX: usize = 256;
/// Most orders that wait: a keeper that sends more has lost count.
const QUEUE_MAX: usize = 1 << 16;

/// What the process is made from.
pub(crate) struct Plan<'a> {
    /// Its end of the pair.
    pub(crate) socket: BorrowedFd<'a>,
    /// The data directory.
    pub(crate) directory: BorrowedFd<'a>,
    /// The network namespace to work in instead of the host's, which an ordinary user may not change: see `uplink`.
    pub(crate) hub: Option<BorrowedFd<'a>>,
    /// The id of that.
    pub(crate) id: &'a str,
    /// The range that instances are to have; the first free one where none is named.
    pub(crate) wanted: Option<Range>,
    /// The range that a former process of this keeper had.
    pub(crate) resumed: Option<Range>,
    pub(crate) title: Title,
    /// Told what an operator should know.
    pub(crate) log: fn(&str),
}

/// Forks it. It waits to be told what there is.
///
/// # Safety
/// No other thread may run in this process.
pub(crate) unsafe fn fork(plan: &Plan<'_>) -> Result<(i32, OwnedFd), Errno> {
    // SAFETY: the caller promises one thread; the child ends in `_exit`.
    match unsafe { clone3(0) }? {
        Cloned::Parent { pid, pidfd } => Ok((pid, pidfd)),
        Cloned::Child => {
            // A panic must not unwind into the keeper's frames.
            let _ = std::panic::catch_unwind(AssertUnwindSafe(|| live(plan)));
            // SAFETY: ends this process without running anything of its parent's that the copy of its memory holds.
            unsafe { libc::_exit(1) }
        }
    }
}

/// The whole life; returning ends it.
fn live(plan: &Plan<'_>) {
    if own_descriptors(plan).is_err() {
        return;
    }
    // SAFETY: the line above put both there, nothing else owns the numbers, and the process lives no longer than this function.
    let (socket, directory) = unsafe { (BorrowedFd::borrow_raw(SOCKET), OwnedFd::from_raw_fd(DIRECTORY)) };
    match enter_hub(plan).and_then(|beyond| become_small(plan).map(|()| beyond)) {
        Ok(beyond) => serve(plan, socket, directory, beyond),
        Err(StepError { step, errno }) => {
            // Without a reader nobody wants to know.
            let _ = report(socket, &Report::Unavailable(format!("{step}: {errno}")));
        }
    }
}

/// Leaves the socket at [`SOCKET`], the data directory at [`DIRECTORY`], the hub at [`HUB`], `/dev/null` at 0 and 1 and the log at 2.
fn own_descriptors(plan: &Plan<'_>) -> Result<(), StepError> {
    let failed = "place the descriptors of the network process";
    let null = rustix::fs::open(c"/dev/null", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty()).map_err(at(failed))?;
    let mut waiting = Vec::new();
    for fd in [null.as_fd(), plan.socket, plan.directory].into_iter().chain(plan.hub) {
        // Above all fixed numbers first: a number that is placed must not be one that is still to be copied.
        waiting.push(rustix::io::fcntl_dupfd_cloexec(fd, 64).map_err(at(failed))?);
    }
    std::mem::forget(null);
    let hub = plan.hub.map(|_| (3, HUB));
    for (index, number) in [(0, 0), (0, 1), (1, SOCKET), (2, DIRECTORY)].into_iter().chain(hub) {
        fds::place(waiting[index].as_fd(), number).map_err(at(failed))?;
    }
    // Closed by number below, along with everything else.
    std::mem::forget(waiting);
    fds::close_from(if hub.is_some() { HUB + 1 } else { DIRECTORY + 1 }).map_err(at(failed))
}

/// The host beyond the hub, which is not worked in: its addresses are to be closed, and change.
struct Beyond {
    route: Socket,
    events: Events,
}

/// Goes over into the hub, if there is one, with an eye left on where it was before.
fn enter_hub(plan: &Plan<'_>) -> Result<Option<Beyond>, StepError> {
    if plan.hub.is_none() {
        return Ok(None);
    }
    // SAFETY: `own_descriptors` put it there, and nothing else owns the number.
    let hub = unsafe { OwnedFd::from_raw_fd(HUB) };
    // A socket belongs to the network that it is made in.
    let route = Socket::open(None).map_err(at("make a socket of rtnetlink"))?;
    let events = Events::open(None, ADDRESS_EVENTS).map_err(at("make a socket of rtnetlink"))?;
    rustix::thread::move_into_link_name_space(hub.as_fd(), Some(LinkNameSpaceType::Network))
        .map_err(at("enter the network of the uplink"))?;
    Ok(Some(Beyond { route, events }))
}

fn become_small(plan: &Plan<'_>) -> Result<(), StepError> {
    signals::reset_actions();
    // It ends with its socket: what is sent to a whole group of processes is for the keeper to understand.
    signals::set_mask(&SignalSet::all()).map_err(at("block signals"))?;
    // SAFETY: one thread, which reads neither arguments nor environment.
    unsafe { plan.title.set(b"funtainer net") };
    crate::title::set_name(c"funtainer-net").map_err(at("set the name of the network process"))?;
    userns::no_new_privs()?;
    userns::drop_bounding(KEPT)?;
    userns::set_capabilities(KEPT).map_err(|StepError { errno, .. }| StepError { step: "keep the capability NET_ADMIN", errno })
}

/// Works for the keeper until it is gone.
fn serve(plan: &Plan<'_>, keeper: BorrowedFd<'_>, directory: OwnedFd, beyond: Option<Beyond>) {
    let Some(told) = Told::receive(keeper) else { return };
    let refusal = match Net::set_up(plan, directory, told, beyond) {
        Ok(net) => {
            if report(keeper, &Report::Ready(net.range)).is_ok() {
                net.work(keeper);
            } else {
                net.put_back();
            }
            return;
        }
        Err(refusal) => refusal,
    };
    // Without a reader nobody wants to know.
    let _ = match refusal {
        Refusal::Taken(text) => report(keeper, &Report::RangeTaken(text)),
        Refusal::Lacking(text) => report(keeper, &Report::Unavailable(text)),
    };
}

fn report(keeper: BorrowedFd<'_>, report: &Report) -> Result<(), Errno> {
    fds::send(keeper, &report.encode(), &[], SendFlags::empty())
}

/// What the keeper tells before all else.
#[derive(Default)]
struct Told {
    adopted: Vec<(Plug, Ipv4Addr)>,
    policies: HashMap<u32, Policy>,
}

impl Told {
    fn receive(keeper: BorrowedFd<'_>) -> Option<Self> {
        let mut told = Self::default();
        let mut buffer = [0_u8; DATAGRAM_BYTES];
        loop {
            let received = fds::receive(keeper, &mut buffer, RecvFlags::empty()).ok()??;
            match Order::decode(&buffer[..received.bytes], received.fds.len())? {
                Order::Adopt { plug, address } => told.adopted.push((plug, address)),
                Order::AddPolicy { number, policy } => {
                    told.policies.insert(number, policy);
                }
                Order::SetUp => return Some(told),
                Order::RemovePolicy(_) | Order::Plug(_) | Order::Unplug(_) => return None,
            }
        }
    }
}

/// Why there is no network.
enum Refusal {
    /// The range that was asked for is not free.
    Taken(String),
    /// The host lacks something.
    Lacking(String),
}

fn lacking(what: &str, errno: Errno) -> Refusal {
    Refusal::Lacking(format!("{what}: {errno}"))
}

impl From<Failed> for Refusal {
    fn from(failed: Failed) -> Self {
        Self::Lacking(format!("nf_tables refuses {}: {}", failed.what, failed.errno))
    }
}

/// A network that is to be connected.
struct Waiting {
    plug: Plug,
    inside: OwnedFd,
    route: OwnedFd,
}

struct Net {
    log: fn(&str),
    /// Name of the table and comment of the rules.
    name: String,
    range: Range,
    record: Record,
    /// Held as long as anything is changed.
    _lock: OwnedFd,
    route: Socket,
    firewall: Firewall,
    /// Where this is not the host's network.
    beyond: Option<Beyond>,
    addresses: Addresses,
    pinned: HashMap<u32, Pinned>,
    policies: HashMap<u32, Policy>,
    /// Interfaces that forward for us alone, as the table knows them.
    forwarding: Vec<u32>,
    /// Largest packet.
    mtu: u32,
    plugs: VecDeque<Waiting>,
    later: VecDeque<Order>,
    /// What was said already.
    said: BTreeSet<String>,
    look_again: Option<Instant>,
}

impl Net {
    fn set_up(plan: &Plan<'_>, directory: OwnedFd, told: Told, mut beyond: Option<Beyond>) -> Result<Self, Refusal> {
        let lock = host::lock(directory.as_fd()).map_err(|error| lacking("lock the data directory", errno_of(&error)))?;
        let mut record = Record::open(directory).map_err(|error| lacking("read the file net", errno_of(&error)))?;
        let mut route = Socket::open(None).map_err(|errno| lacking("a socket of rtnetlink", errno))?;
        let name = firewall::table(plan.id).name;
        if plan.resumed.is_none() {
            clean_up(&mut record, &mut route, plan.id, plan.log);
        }
        probe(&mut route)?;
        let mut hidden = BTreeSet::new();
        if let Some(beyond) = &mut beyond {
            await_uplink(&mut route)?;
            hidden = beyond.addresses().map_err(|errno| lacking("list the addresses of the host", errno))?;
        }
        let range = claim(&mut route, &mut record, plan)?;
        let mut firewall = Firewall::open(plan.id, range)?;
        firewall.hide(hidden, beyond.is_some().then_some(Range::network(uplink::NETWORK.0, uplink::NETWORK.1)));
        let mut net = Self {
            log: plan.log,
            name,
            range,
            record,
            _lock: lock,
            route,
            firewall,
            beyond,
            addresses: Addresses::new(range),
            pinned: HashMap::new(),
            policies: told.policies,
            forwarding: Vec::new(),
            mtu: 1500,
            plugs: VecDeque::new(),
            later: VecDeque::new(),
            said: BTreeSet::new(),
            look_again: None,
        };
        match net.take_over(told.adopted) {
            Ok(()) => Ok(net),
            Err(refusal) => {
                if plan.resumed.is_none() {
                    net.put_back();
                }
                Err(refusal)
            }
        }
    }

    /// The table with what is in use; other interfaces of ours go.
    fn take_over(&mut self, adopted: Vec<(Plug, Ipv4Addr)>) -> Result<(), Refusal> {
        for (plug, address) in adopted {
            let index = link::index_of(&self.route, &HostName::of(address).to_string());
            if !self.addresses.note(plug.network, address) {
                continue;
            }
            // Without one the network is over, which the keeper learns by itself.
            if let Ok(index) = index {
                let Plug { network, policy, resolvers } = plug;
                self.pinned.insert(network, Pinned { index, address, policy, resolvers });
            }
        }
        self.install()?;
        let used: BTreeSet<Ipv4Addr> = self.pinned.values().map(|pinned| pinned.address).collect();
        remove_interfaces(&mut self.route, self.range, &used).map_err(|errno| lacking("remove interfaces", errno))?;
        self.look();
        Ok(())
    }

    fn install(&mut self) -> Result<(), Failed> {
        let policies = self.policies.iter().map(|(number, policy)| (*number, policy));
        self.firewall.install(policies, self.pinned.values(), &self.forwarding)
    }

    /// Makes the table anew if somebody has removed it, as a firewall does that is loaded anew: without it nothing is closed.
    fn stand(&mut self) {
        let stood = self.firewall.stands().and_then(|stands| {
            if stands {
                return Ok(());
            }
            (self.log)("other software has removed the table of the packet filter: it is made anew");
            self.install()
        });
        if let Err(Failed { what, errno }) = stood {
            (self.log)(&format!("nf_tables refuses {what}: {errno}"));
        }
    }

    /// Until the keeper is gone.
    fn work(mut self, keeper: BorrowedFd<'_>) {
        let events = (Events::open(None, ROUTE_EVENTS), Events::open(Some(rustix::net::netlink::NETFILTER), FILTER_EVENTS));
        let (Ok(route), Ok(filter)) = events else {
            self.put_back();
            return;
        };
        loop {
            let idle = self.plugs.is_empty() && self.later.is_empty();
            let wait = if idle { self.look_again.map(until) } else { Some(Timespec::default()) };
            // The same one twice does no harm.
            let beyond = self.beyond.as_ref().map_or(route.fd(), |beyond| beyond.events.fd());
            let mut polled = [keeper, route.fd(), filter.fd(), beyond].map(|fd| PollFd::from_borrowed_fd(fd, PollFlags::IN));
            match rustix::event::poll(&mut polled, wait.as_ref()) {
                Ok(_) | Err(Errno::INTR) => {}
                Err(_) => break,
            }
            let [orders, routes, filters, addresses] = polled.map(|polled| !polled.revents().is_empty());
            if addresses {
                self.look_beyond();
            }
            if orders && self.read(keeper).is_none() {
                break;
            }
            if filters {
                self.stand();
            }
            if routes || filters {
                route.clear();
                filter.clear();
                self.look_again.get_or_insert_with(|| Instant::now() + LOOK_AGAIN);
            }
            let overdue = self.later.len() > LATER_MAX;
            if self.plug_next(keeper).is_err() {
                break;
            }
            if self.plugs.is_empty() || overdue {
                self.do_later();
            }
            if self.look_again.is_some_and(|at| at <= Instant::now()) {
                self.look_again = None;
                self.look();
            }
        }
        self.put_back();
    }

    /// Takes all orders that there are; `None` when no more can come.
    fn read(&mut self, keeper: BorrowedFd<'_>) -> Option<()> {
        let mut buffer = [0_u8; DATAGRAM_BYTES];
        loop {
            let received = match fds::receive(keeper, &mut buffer, RecvFlags::DONTWAIT) {
                Ok(received) => received?,
                Err(fds::ReceiveError::Kernel(Errno::AGAIN)) => return Some(()),
                Err(_) => return None,
            };
            let order = Order::decode(&buffer[..received.bytes], received.fds.len())?;
            self.take(order, received.fds)?;
        }
    }

    fn take(&mut self, order: Order, mut descriptors: Fds) -> Option<()> {
        match order {
            Order::Plug(plug) => {
                let (inside, route) = (descriptors.take(0)?, descriptors.take(1)?);
                self.plugs.push_back(Waiting { plug, inside, route });
            }
            // The networks that follow may need it.
            Order::AddPolicy { number, policy } => {
                if let Err(Failed { what, errno }) = self.firewall.add_policy(number, &policy) {
                    // Its networks cannot be pinned then, which is reported of each.
                    (self.log)(&format!("nf_tables refuses {what}: {errno}"));
                }
                self.policies.insert(number, policy);
            }
            Order::Unplug(network) if self.plugs.iter().any(|waiting| waiting.plug.network == network) => {
                self.plugs.retain(|waiting| waiting.plug.network != network);
            }
            Order::Unplug(_) | Order::RemovePolicy(_) => self.later.push_back(order),
            Order::Adopt { .. } | Order::SetUp => return None,
        }
        (self.plugs.len() + self.later.len() <= QUEUE_MAX).then_some(())
    }

    fn plug_next(&mut self, keeper: BorrowedFd<'_>) -> Result<(), Errno> {
        let Some(Waiting { plug, inside, route }) = self.plugs.pop_front() else { return Ok(()) };
        let network = plug.network;
        // Those that are over may have the last addresses.
        let mut address = self.addresses.take(network);
        while address.is_none() && self.addresses.get(network).is_none() && !self.later.is_empty() {
            self.do_later();
            address = self.addresses.take(network);
        }
        let plugged = address
            .ok_or(StepError { step: "find a free address in the range of instances", errno: Errno::ADDRNOTAVAIL })
            .and_then(|address| self.plug(plug, address, inside.as_fd(), route).map(|()| address));
        let said = match plugged {
            Ok(address) => Report::Plugged { network, address },
            Err(StepError { step, errno }) => {
                Report::PlugFailed { network, errno: errno.raw_os_error(), step: step.to_owned() }
            }
        };
        report(keeper, &said)
    }

    /// Connects a network; after a failure nothing of it is left.
    fn plug(&mut self, plug: Plug, address: Ipv4Addr, inside: BorrowedFd<'_>, route: OwnedFd) -> Result<(), StepError> {
        let Plug { network, policy, resolvers } = plug;
        let name = HostName::of(address).to_string();
        let pair = Pair { address, group: group(self.range), mtu: self.mtu, inside };
        let index = match link::make_pair(&mut self.route, &pair) {
            Ok(index) => index,
            Err(errno) => {
                self.addresses.give_back(network);
                return Err(StepError { step: "make a veth pair", errno });
            }
        };
        self.pinned.insert(network, Pinned { index, address, policy, resolvers });
        let connected = self
            .firewall
            .pin(&self.pinned[&network])
            .map_err(|Failed { errno, .. }| StepError { step: "pin the address of an instance", errno })
            .and_then(|()| host::without_ipv6(&name).map_err(at("switch IPv6 off on a veth")))
            .and_then(|()| link::set_up_host(&mut self.route, index, address).map_err(at("bring the host's end of a veth up")))
            .and_then(|()| {
                Socket::adopt_route(route)
                    .and_then(|mut inside| link::set_up_inside(&mut inside, address))
                    .map_err(at("bring an instance's end of a veth up"))
            });
        connected.inspect_err(|_| self.unplug(network))
    }

    fn do_later(&mut self) {
        match self.later.pop_front() {
            Some(Order::Unplug(network)) => self.unplug(network),
            Some(Order::RemovePolicy(number)) => {
                self.policies.remove(&number);
                if let Err(Failed { errno, .. }) = self.firewall.remove_policy(number) {
                    (self.log)(&format!("the rules of a revision cannot be removed: {errno}"));
                }
            }
            _ => {}
        }
    }

    /// Removes what a network has on the host. Its interface may have gone with its namespace already.
    fn unplug(&mut self, network: u32) {
        let Some(pinned) = self.pinned.remove(&network) else {
            self.addresses.give_back(network);
            return;
        };
        let name = HostName::of(pinned.address);
        if let Err(errno) = link::remove(&mut self.route, &name) {
            (self.log)(&format!("the interface {name} cannot be removed: {errno}"));
            // The address is not given out again.
            return;
        }
        match self.firewall.unpin(&pinned) {
            Ok(()) | Err(Failed { errno: Errno::NOENT, .. }) => {}
            Err(Failed { what, errno }) => (self.log)(&format!("nf_tables refuses to forget {name} ({what}): {errno}")),
        }
        if let Err(errno) = conntrack::forget(self.firewall.socket(), pinned.address) {
            self.say(format!("connections of ended instances cannot be forgotten, and end by themselves: {errno}"));
        }
        self.addresses.give_back(network);
    }

    /// The host has other addresses: those are the ones that are closed now.
    fn look_beyond(&mut self) {
        let Some(beyond) = &mut self.beyond else { return };
        beyond.events.clear();
        let changed = match beyond.addresses() {
            Ok(addresses) => self.firewall.rehide(addresses),
            Err(errno) => return self.say(format!("the addresses of the host cannot be listed: {errno}")),
        };
        if let Err(Failed { what, errno }) = changed {
            self.say(format!("nf_tables refuses {what}: {errno}"));
        }
    }

    /// Looks at the host again: interfaces that forward for us, tables that would drop our packets.
    fn look(&mut self) {
        let seen = link::interfaces(&mut self.route).and_then(|interfaces| Ok((interfaces, link::routes(&mut self.route)?)));
        match seen {
            Ok((interfaces, routes)) => {
                self.mtu = host::mtu(&interfaces, &routes);
                self.forward(&host::outward(&interfaces, &routes, group(self.range)), &interfaces);
            }
            Err(errno) => self.say(format!("the interfaces of the host cannot be listed: {errno}")),
        }
        match foreign::pass(self.firewall.socket(), self.range, &self.name) {
            Ok(lines) => lines.into_iter().for_each(|line| self.say(line)),
            Err(errno) => self.say(format!("the tables of other software cannot be looked at: {errno}")),
        }
    }

    /// Switches forwarding on where answers can come by.
    fn forward(&mut self, outward: &[&link::Interface], interfaces: &[link::Interface]) {
        let all = match host::forwards_all() {
            Ok(all) => all,
            Err(errno) => return self.say(format!("net.ipv4.ip_forward cannot be read: {errno}")),
        };
        if all {
            // Whoever switched it on wants it on: there is nothing to guard, and nothing to put back.
            let _ = self.guard(&[]);
            let noted = self.record.note(|changed| changed.forwarding.clear());
            return self.noted(noted);
        }
        let off = |interface: &&&link::Interface| matches!(host::forwards(&interface.name), Ok(false));
        let new: Vec<&&link::Interface> = outward.iter().filter(off).collect();
        let exists = |name: &String| interfaces.iter().any(|interface| interface.name == *name);
        let noted = self.record.note(|changed| {
            changed.forwarding.retain(exists);
            changed.forwarding.extend(new.iter().map(|interface| interface.name.clone()));
        });
        let is_noted = noted.is_ok();
        self.noted(noted);
        let ours = &self.record.changed.forwarding;
        let guarded: Vec<u32> =
            interfaces.iter().filter(|interface| ours.contains(&interface.name)).map(|interface| interface.index).collect();
        // What cannot be noted or guarded is not switched on.
        if !is_noted || self.guard(&guarded).is_err() {
            return;
        }
        for interface in new {
            if let Err(errno) = host::set_forwards(&interface.name, true) {
                self.say(format!(
                    "forwarding of {0} cannot be switched on ({errno}), so that functions get no answers by it: run `sysctl -w net.ipv4.conf.{0}.forwarding=1`",
                    interface.name
                ));
            }
        }
    }

    /// From these interfaces packets are forwarded to instances alone.
    fn guard(&mut self, indexes: &[u32]) -> Result<(), ()> {
        match self.firewall.set_forwarding(&self.forwarding, indexes) {
            Ok(()) => {
                self.forwarding = indexes.to_vec();
                Ok(())
            }
            Err(Failed { what, errno }) => {
                self.say(format!("nf_tables refuses {what}: {errno}"));
                Err(())
            }
        }
    }

    fn noted(&mut self, noted: std::io::Result<()>) {
        if let Err(error) = noted {
            self.say(format!("the file net of the data directory cannot be written: {error}"));
        }
    }

    /// Tells something once.
    fn say(&mut self, text: impl Into<String>) {
        let text = text.into();
        if self.said.len() < LATER_MAX && !self.said.contains(&text) {
            (self.log)(&text);
            self.said.insert(text);
        }
    }

    /// The host is as it was.
    fn put_back(self) {
        let Self { mut record, mut route, mut firewall, name, range, log, .. } = self;
        undo(&mut record, &mut route, &mut firewall, &name, range, log);
    }
}

impl Beyond {
    fn addresses(&mut self) -> Result<BTreeSet<Ipv4Addr>, Errno> {
        Ok(link::addresses(&mut self.route)?.into_iter().map(|(address, _)| address).collect())
    }
}

/// Waits until the hub has a way out.
fn await_uplink(route: &mut Socket) -> Result<(), Refusal> {
    let failed = |errno| lacking("list the routes of the uplink", errno);
    let events = Events::open(None, ROUTE_EVENTS).map_err(failed)?;
    let deadline = Instant::now() + UPLINK_WAIT;
    loop {
        events.clear();
        let routes = link::routes(route).map_err(failed)?;
        if routes.iter().any(|route| route.prefix == 0 && route.kind == libc::RTN_UNICAST) {
            return Ok(());
        }
        let left = deadline.saturating_duration_since(Instant::now());
        if left.is_zero() {
            return Err(Refusal::Lacking(
                "the uplink has no way out: what pasta or slirp4netns says of it stands above".to_owned(),
            ));
        }
        let mut polled = [PollFd::from_borrowed_fd(events.fd(), PollFlags::IN)];
        match rustix::event::poll(&mut polled, Some(&until(Instant::now() + left))) {
            Ok(_) | Err(Errno::INTR) => {}
            Err(errno) => return Err(failed(errno)),
        }
    }
}

/// Puts back what a killed process of this data directory has left.
fn clean_up(record: &mut Record, route: &mut Socket, id: &str, log: fn(&str)) {
    if record.is_empty() {
        return;
    }
    // Without a range there are no interfaces, and any will do to name the table by.
    let noted = record.changed.range;
    let Some(range) = noted.or_else(|| Range::candidates().next()) else { return };
    log("a server of this data directory was killed: what it changed of the host's network is put back");
    match Firewall::open(id, range) {
        Ok(mut firewall) => undo(record, route, &mut firewall, &firewall::table(id).name, range, log),
        Err(Failed { what, errno }) => log(&format!("what a killed server left cannot be put back: {what}: {errno}")),
    }
}

fn undo(record: &mut Record, route: &mut Socket, firewall: &mut Firewall, name: &str, range: Range, log: fn(&str)) {
    let failed = |what: &str, errno: Errno| log(&format!("{what} cannot be put back: {errno}"));
    // Before the table that guards them.
    if matches!(host::forwards_all(), Ok(false)) {
        for interface in &record.changed.forwarding {
            match host::set_forwards(interface, false) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => failed(&format!("forwarding of {interface}"), errno),
            }
        }
    }
    if let Err(errno) = remove_interfaces(route, range, &BTreeSet::new()) {
        failed("an interface of an instance", errno);
    }
    if let Err(Failed { errno, .. }) = firewall.remove() {
        failed(&format!("the table {name}"), errno);
    }
    if let Err(errno) = foreign::put_back(firewall.socket(), name) {
        failed("the chain FORWARD of iptables", errno);
    }
    if record.changed.range == Some(range) {
        match link::release(route, range) {
            Ok(()) | Err(Errno::SRCH) => {}
            Err(errno) => failed(&format!("the route to {range}"), errno),
        }
    }
    if let Err(error) = record.remove() {
        log(&format!("the file net of the data directory cannot be removed: {error}"));
    }
}

/// Removes the interfaces of a range but those with certain addresses.
fn remove_interfaces(route: &mut Socket, range: Range, kept: &BTreeSet<Ipv4Addr>) -> Result<(), Errno> {
    let ours = link::interfaces(route)?.into_iter().filter(|interface| interface.group == group(range));
    let addresses = ours.filter_map(|interface| HostName::parse(&interface.name));
    for address in addresses.filter(|address| range.contains(*address) && !kept.contains(address)) {
        link::remove(route, &HostName::of(address))?;
    }
    Ok(())
}

/// Whether the kernel has veth pairs. That it has nf_tables with all that is needed is found by making the table.
fn probe(route: &mut Socket) -> Result<(), Refusal> {
    link::probe(route).map_err(|errno| lacking("the kernel refuses veth pairs", errno))
}

/// A range that nobody else has.
fn claim(route: &mut Socket, record: &mut Record, plan: &Plan<'_>) -> Result<Range, Refusal> {
    if let Some(range) = plan.resumed {
        return match link::claim(route, range) {
            // It stands from before.
            Ok(()) | Err(Errno::EXIST) => Ok(range),
            Err(errno) => Err(lacking("claim the range of instances", errno)),
        };
    }
    let networks = |route: &mut Socket| -> Result<Vec<Range>, Errno> {
        let routes = link::routes(route)?.into_iter().map(|route| Range::network(route.to, route.prefix));
        let addresses = link::addresses(route)?.into_iter().map(|(address, prefix)| Range::network(address, prefix));
        Ok(routes.chain(addresses).collect())
    };
    let networks = networks(route).map_err(|errno| lacking("list the routes of the host", errno))?;
    let candidates: Vec<Range> = plan.wanted.map_or_else(|| Range::candidates().collect(), |range| vec![range]);
    for range in candidates {
        if let Some(network) = collision(range, networks.iter().copied()) {
            if plan.wanted.is_some() {
                return Err(Refusal::Taken(format!("the range {range} collides with the host's route or address {network}")));
            }
            continue;
        }
        match link::claim(route, range) {
            Ok(()) => {
                return match record.note(|changed| changed.range = Some(range)) {
                    Ok(()) => Ok(range),
                    Err(error) => {
                        // Fails only if it is gone.
                        let _ = link::release(route, range);
                        Err(lacking("write the file net of the data directory", errno_of(&error)))
                    }
                };
            }
            Err(Errno::EXIST) if plan.wanted.is_some() => {
                return Err(Refusal::Taken(format!("the range {range} is another server's")));
            }
            // Another server was faster.
            Err(Errno::EXIST) => {}
            Err(errno) => return Err(lacking("claim a range of addresses", errno)),
        }
    }
    Err(Refusal::Lacking("no range of addresses is free: name one with --network-range".to_owned()))
}

fn until(at: Instant) -> Timespec {
    Timespec::try_from(at.saturating_duration_since(Instant::now())).unwrap_or_default()
}

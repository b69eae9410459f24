//! What packets of instances may do, as a table of nf_tables that belongs to one server.
//!
//! ```text
//! prerouting -310  pin      from one of ours: interface, hardware and IP address belong together, else dropped
//!            -151  egress   before anybody changes the destination, so that the one which the function asked for is judged:
//!                           too many connections? rules of its revision? a name server of its own? closed? else open
//! input       -10  input    to the host itself: what the rules, or a changed destination, let through; else dropped
//! forward     -10  forward  to one of ours: answers only; from an interface that forwards for us alone: to ours only
//! output      -10  output   the host's own processes to one of ours: answers, and errors about its packets
//! postrouting 100  nat      from ours to others: with the host's address
//! ```
//! Interfaces of ours are known by their group, which is the first address of the server's range: tables of several servers leave each
//! other's alone. A verdict to drop is final, one to accept is not: other tables of the host have their say too.

use std::collections::BTreeSet;
use std::net::Ipv4Addr;

use funtainer_model::{EgressRule, Protocol};
use rustix::io::Errno;

use super::link::{Mac, PREFIX};
use super::netlink::{Message, Refused, Socket};
use super::nft::{
    self, ADDRESS, Base, Comparison, Connection, DESTINATION_CHANGED, ESTABLISHED, Element, Expression, Family,
    HARDWARE_ADDRESS, Hook, INDEX, Meta, NEW, REGISTER, RELATED, Set, SetKind, Table, Verdict, word,
};
use super::range::Range;

/// Most connections of one instance that the host follows at once: its table has 65,536 places or more for all.
const CONNECTIONS_MAX: u32 = 4096;
/// Most instances whose connections are counted; beyond that new connections are refused.
const COUNTED_MAX: u32 = 65_536;
/// Most elements in one message: it tells its length in 16 bits.
const ELEMENTS_MAX: usize = 512;
/// Where names are asked for.
const DNS_PORT: u16 = 53;
/// Where clouds tell machines who they are, and what they may: every process of the machine could ask in its name. Link-local addresses
/// (nearly all clouds), that of Azure and that of Alibaba Cloud.
const METADATA: [(Ipv4Addr, u8); 3] =
    [(LINK_LOCAL.0, LINK_LOCAL.1), (Ipv4Addr::new(168, 63, 129, 16), 32), (Ipv4Addr::new(100, 100, 100, 200), 32)];
const LINK_LOCAL: (Ipv4Addr, u8) = (Ipv4Addr::new(169, 254, 0, 0), 16);
/// `ICMP_DEST_UNREACH` and `ICMP_TIME_EXCEEDED` (linux/icmp.h): errors about packets of the instance.
const ICMP_ERRORS: [u8; 2] = [3, 11];

const PINS: Set = Set { name: "pins", types: &[INDEX, HARDWARE_ADDRESS, ADDRESS], key_bytes: 16, kind: SetKind::Plain };
const RESOLVERS: Set = Set { name: "resolvers", types: &[INDEX, ADDRESS], key_bytes: 8, kind: SetKind::Plain };
const RULES: Set = Set { name: "rules", types: &[INDEX], key_bytes: 4, kind: SetKind::Verdicts };
const CLOSED: Set = Set { name: "closed", types: &[ADDRESS], key_bytes: 4, kind: SetKind::Ranges };
const HIDDEN: Set = Set { name: "hidden", types: &[ADDRESS], key_bytes: 4, kind: SetKind::Plain };
const FORWARDING: Set = Set { name: "forwarding", types: &[INDEX], key_bytes: 4, kind: SetKind::Plain };
const CONNECTIONS: Set = Set { name: "connections", types: &[INDEX], key_bytes: 4, kind: SetKind::Counted(COUNTED_MAX) };
const SETS: [Set; 7] = [PINS, RESOLVERS, RULES, CLOSED, HIDDEN, FORWARDING, CONNECTIONS];

/// What the instances of a revision may reach.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Policy {
    /// What is open besides.
    pub(crate) rules: Vec<EgressRule>,
    /// Nothing but that.
    pub(crate) only: bool,
}

/// A network that is in use, as the table knows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Pinned {
    /// Of the interface on the host's side.
    pub(super) index: u32,
    pub(super) address: Ipv4Addr,
    /// Number of its policy; `None` for what holds where nothing is said.
    pub(super) policy: Option<u32>,
    /// Name servers that it may ask.
    pub(super) resolvers: Vec<Ipv4Addr>,
}

/// Something that the packet filter of the kernel refused.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Failed {
    pub(super) what: &'static str,
    pub(super) errno: Errno,
}

/// The table.
#[derive(Debug)]
pub(super) struct Firewall {
    socket: Socket,
    table: Table,
    range: Range,
    /// Addresses of the host where the table is in another network than the host's, and the network between the two.
    hidden: BTreeSet<Ipv4Addr>,
    between: Option<Range>,
}

/// Changes with what they are about, for errors.
#[derive(Default)]
struct Changes {
    names: Vec<&'static str>,
    messages: Vec<Message>,
}

impl Changes {
    fn add(&mut self, name: &'static str, message: Message) {
        self.names.push(name);
        self.messages.push(message);
    }

    fn carry_out(self, socket: &mut Socket) -> Result<(), Failed> {
        nft::transact(socket, self.messages).map_err(|Refused { index, errno }| Failed {
            what: self.names.get(index).copied().unwrap_or("a change of the packet filter"),
            errno,
        })
    }
}

/// Name of the table of the server with this id.
pub(super) fn table(id: &str) -> Table {
    Table { family: Family::Inet, name: format!("funtainer-{id}") }
}

/// The group of the interfaces of a range.
pub(super) fn group(range: Range) -> u32 {
    range.base().to_bits()
}

impl Firewall {
    pub(super) fn open(id: &str, range: Range) -> Result<Self, Failed> {
        let socket = nft::open().map_err(|errno| Failed { what: "a socket to the packet filter", errno })?;
        Ok(Self { socket, table: table(id), range, hidden: BTreeSet::new(), between: None })
    }

    /// For a table that is not in the host's own network: the host's addresses, which are closed as they are there, and the network between
    /// the two. Before the table is made.
    pub(super) fn hide(&mut self, hidden: BTreeSet<Ipv4Addr>, between: Option<Range>) {
        (self.hidden, self.between) = (hidden, between);
    }

    /// The host has other addresses.
    pub(super) fn rehide(&mut self, hidden: BTreeSet<Ipv4Addr>) -> Result<(), Failed> {
        let mut changes = Changes::default();
        let gone: Vec<Element> = self.hidden.difference(&hidden).copied().map(address).collect();
        let come: Vec<Element> = hidden.difference(&self.hidden).copied().map(address).collect();
        if !gone.is_empty() {
            changes.add(HIDDEN.name, self.table.delete_elements(HIDDEN.name, &gone));
        }
        if !come.is_empty() {
            changes.add(HIDDEN.name, self.table.add_elements(HIDDEN.name, &come));
        }
        if !changes.messages.is_empty() {
            changes.carry_out(&mut self.socket)?;
        }
        self.hidden = hidden;
        Ok(())
    }

    pub(super) fn socket(&mut self) -> &mut Socket {
        &mut self.socket
    }

    /// Makes the table, in the place of a former one, with all that is in use. At every moment either the old one holds or the new one.
    pub(super) fn install<'a>(
        &mut self,
        policies: impl Iterator<Item = (u32, &'a Policy)>,
        pinned: impl Iterator<Item = &'a Pinned>,
        forwarding: &[u32],
    ) -> Result<(), Failed> {
        let mut changes = Changes::default();
        // There must be one to delete.
        changes.add("a table of family inet", self.table.add());
        changes.add("a table of family inet", self.table.delete());
        changes.add("a table of family inet", self.table.add());
        for (number, set) in (1..).zip(&SETS) {
            changes.add(set.name, self.table.add_set(set, number));
        }
        changes.add(CLOSED.name, self.table.add_elements(CLOSED.name, &self.closed()));
        if !self.hidden.is_empty() {
            let hidden: Vec<Element> = self.hidden.iter().copied().map(address).collect();
            changes.add(HIDDEN.name, self.table.add_elements(HIDDEN.name, &hidden));
        }
        self.put_chains(&mut changes);
        // They lead to chains, and elements lead to them.
        for (number, policy) in policies {
            self.put_policy(&mut changes, number, policy);
        }
        let pinned: Vec<&Pinned> = pinned.collect();
        for chunk in pinned.chunks(ELEMENTS_MAX / 4) {
            for (set, elements) in elements(chunk.iter().copied()) {
                changes.add(set, self.table.add_elements(set, &elements));
            }
        }
        if !forwarding.is_empty() {
            changes.add(FORWARDING.name, self.table.add_elements(FORWARDING.name, &indexes(forwarding)));
        }
        changes.carry_out(&mut self.socket)
    }

    /// Whether the table is there.
    pub(super) fn stands(&mut self) -> Result<bool, Failed> {
        match self.socket.ask(self.table.ask_for()) {
            Ok(()) => Ok(true),
            Err(Errno::NOENT) => Ok(false),
            Err(errno) => Err(Failed { what: "a look at its table", errno }),
        }
    }

    /// Removes the table; that there is none is as good.
    pub(super) fn remove(&mut self) -> Result<(), Failed> {
        let mut changes = Changes::default();
        changes.add("the removal of the table", self.table.delete());
        match changes.carry_out(&mut self.socket) {
            Err(Failed { errno: Errno::NOENT, .. }) => Ok(()),
            other => other,
        }
    }

    /// Takes a network in. Before its interface is up.
    pub(super) fn pin(&mut self, pinned: &Pinned) -> Result<(), Failed> {
        let mut changes = Changes::default();
        for (set, elements) in elements([pinned].into_iter()) {
            changes.add(set, self.table.add_elements(set, &elements));
        }
        changes.carry_out(&mut self.socket)
    }

    /// Forgets a network. After its interface is gone.
    pub(super) fn unpin(&mut self, pinned: &Pinned) -> Result<(), Failed> {
        let mut changes = Changes::default();
        for (set, elements) in elements([pinned].into_iter()) {
            changes.add(set, self.table.delete_elements(set, &elements));
        }
        changes.carry_out(&mut self.socket)
    }

    pub(super) fn add_policy(&mut self, number: u32, policy: &Policy) -> Result<(), Failed> {
        let mut changes = Changes::default();
        self.put_policy(&mut changes, number, policy);
        changes.carry_out(&mut self.socket)
    }

    /// No network may have it any more.
    pub(super) fn remove_policy(&mut self, number: u32) -> Result<(), Failed> {
        let mut changes = Changes::default();
        let chain = policy_chain(number);
        changes.add("the rules of a revision", self.table.flush_chain(&chain));
        changes.add("the rules of a revision", self.table.delete_chain(&chain));
        changes.carry_out(&mut self.socket)
    }

    /// From these interfaces packets are forwarded to ours alone, and no longer from others.
    pub(super) fn set_forwarding(&mut self, old: &[u32], new: &[u32]) -> Result<(), Failed> {
        let mut changes = Changes::default();
        let gone: Vec<u32> = old.iter().filter(|index| !new.contains(index)).copied().collect();
        let come: Vec<u32> = new.iter().filter(|index| !old.contains(index)).copied().collect();
        if !gone.is_empty() {
            changes.add(FORWARDING.name, self.table.delete_elements(FORWARDING.name, &indexes(&gone)));
        }
        if !come.is_empty() {
            changes.add(FORWARDING.name, self.table.add_elements(FORWARDING.name, &indexes(&come)));
        }
        if changes.messages.is_empty() { Ok(()) } else { changes.carry_out(&mut self.socket) }
    }

    fn put_chains(&self, changes: &mut Changes) {
        let (range, group) = (self.range, group(self.range));
        let base = |kind, number, priority| Some(Hook { kind, number, priority });
        let from_ours = || in_group(Meta::InGroup, Comparison::Equal, group);
        let to_ours = || in_group(Meta::OutGroup, Comparison::Equal, group);
        for chain in ["pinned", "leaving", "refused"] {
            changes.add("a chain", self.table.add_chain(chain, None));
        }
        for (chain, hook) in [
            ("pin", base("filter", libc::NF_INET_PRE_ROUTING, -310)),
            ("egress", base("filter", libc::NF_INET_PRE_ROUTING, -151)),
            ("input", base("filter", libc::NF_INET_LOCAL_IN, -10)),
            ("forward", base("filter", libc::NF_INET_FORWARD, -10)),
            ("output", base("filter", libc::NF_INET_LOCAL_OUT, -10)),
            ("nat", base("nat", libc::NF_INET_POST_ROUTING, 100)),
        ] {
            changes
                .add(if chain == "nat" { "address translation (nat)" } else { "a chain" }, self.table.add_chain(chain, hook));
        }
        let mut rule = |name: &'static str, chain: &str, parts: &[&[Expression]]| {
            changes.add(name, self.table.append(chain, &parts.concat()));
        };

        rule("an address check", "pin", &[&from_ours(), &jump("pinned")]);
        rule("an address check", "pinned", &[&pinned_key(), &[set(&PINS), Expression::Verdict(Verdict::Return)]]);
        rule("an address check", "pinned", &[&[Expression::Counter, Expression::Verdict(Verdict::Drop)]]);

        rule("a chain", "refused", &[&[Expression::Counter, Expression::Reject]]);
        rule("a chain", "refused", &[&drop_it()]);
        rule("a chain", "egress", &[&from_ours(), &jump("leaving")]);
        let more = Expression::MoreConnectionsThan { set: CONNECTIONS.name, count: CONNECTIONS_MAX };
        rule("a count of connections (connlimit)", "leaving", &[&state(NEW), &[meta(Meta::In), more], &jump("refused")]);
        rule("a rule by interface", "leaving", &[&[meta(Meta::In), Expression::Map { set: RULES.name }]]);
        for protocol in [libc::IPPROTO_TCP, libc::IPPROTO_UDP] {
            rule("a rule by port", "leaving", &[&to_resolver(protocol), &accept()]);
        }
        rule("the kind of an address (fib)", "leaving", &[&unlike_unicast(), &jump("refused")]);
        for closed in [&CLOSED, &HIDDEN] {
            rule("a rule by address", "leaving", &[&ipv4(), &[destination(), set(closed)], &jump("refused")]);
        }

        rule("the state of a connection (ct)", "input", &[&from_ours(), &destination_changed(), &accept()]);
        rule("a rule by interface", "input", &[&from_ours(), &[meta(Meta::In), Expression::Map { set: RULES.name }]]);
        for protocol in [libc::IPPROTO_TCP, libc::IPPROTO_UDP] {
            rule("a rule by port", "input", &[&from_ours(), &to_resolver(protocol), &accept()]);
        }
        rule("a rule by group", "input", &[&from_ours(), &[Expression::Counter], &drop_it()]);

        rule("the state of a connection (ct)", "forward", &[&to_ours(), &state(ESTABLISHED | RELATED), &accept()]);
        rule("a rule by group", "forward", &[&to_ours(), &[Expression::Counter], &drop_it()]);
        // Those of other servers are for their tables to judge.
        let to_none = [meta(Meta::OutName), Expression::Compare(Comparison::Unequal, PREFIX.as_bytes().to_vec())];
        rule("a rule by interface", "forward", &[&[meta(Meta::In), set(&FORWARDING)], &to_none, &drop_it()]);

        rule("the state of a connection (ct)", "output", &[&to_ours(), &state(ESTABLISHED | RELATED), &accept()]);
        for kind in ICMP_ERRORS {
            rule("a rule by protocol", "output", &[&to_ours(), &icmp(kind), &accept()]);
        }
        rule("a rule by group", "output", &[&to_ours(), &[Expression::Counter], &drop_it()]);

        let to_others = in_group(Meta::OutGroup, Comparison::Unequal, group);
        let from_range = within(Base::Network, SOURCE_OFFSET, range);
        rule("a new source address (masquerade)", "nat", &[&ipv4(), &from_range, &to_others, &[Expression::Masquerade]]);
    }

    /// Everything that no wide rule opens: metadata, and the addresses of other instances.
    fn closed(&self) -> Vec<Element> {
        let all = METADATA
            .into_iter()
            .map(|(address, prefix)| Range::network(address, prefix))
            .chain([self.range])
            .chain(self.between);
        let ends = all.flat_map(|range| {
            let start = Element::of(range.base().octets().to_vec());
            let behind = range.base().to_bits() | !range.mask().to_bits();
            let end = Element { is_end: true, ..Element::of((behind + 1).to_be_bytes().to_vec()) };
            [start, end]
        });
        ends.collect()
    }

    fn put_policy(&self, changes: &mut Changes, number: u32, policy: &Policy) {
        let (name, chain) = ("the rules of a revision", policy_chain(number));
        changes.add(name, self.table.add_chain(&chain, None));
        for rule in &policy.rules {
            for expressions in opened(rule) {
                changes.add(name, self.table.append(&chain, &expressions));
            }
        }
        if policy.only {
            changes.add(name, self.table.append(&chain, &jump("refused")));
        }
    }
}

/// Offsets of the addresses in an IPv4 header, of the destination port in a TCP and a UDP header.
const SOURCE_OFFSET: u32 = 12;
const DESTINATION_OFFSET: u32 = 16;
const PORT_OFFSET: u32 = 2;

fn policy_chain(number: u32) -> String {
    format!("rules-{number}")
}

/// The elements of networks, by set; a set without any is left out.
fn elements<'a>(pinned: impl Iterator<Item = &'a Pinned>) -> Vec<(&'static str, Vec<Element>)> {
    let (mut pins, mut resolvers, mut rules) = (Vec::new(), Vec::new(), Vec::new());
    for network in pinned {
        let index = network.index.to_ne_bytes();
        let address = network.address.octets();
        // Each part begins at a multiple of four bytes.
        pins.push(Element::of([&index[..], &Mac::of(network.address).0, &[0, 0], &address].concat()));
        for resolver in &network.resolvers {
            resolvers.push(Element::of([index, resolver.octets()].concat()));
        }
        if let Some(policy) = network.policy {
            let verdict = Some(Verdict::Jump(policy_chain(policy)));
            rules.push(Element { verdict, ..Element::of(index.to_vec()) });
        }
    }
    let all = [(PINS.name, pins), (RESOLVERS.name, resolvers), (RULES.name, rules)];
    all.into_iter().filter(|(_, elements)| !elements.is_empty()).collect()
}

fn address(address: Ipv4Addr) -> Element {
    Element::of(address.octets().to_vec())
}

fn indexes(indexes: &[u32]) -> Vec<Element> {
    indexes.iter().map(|index| Element::of(index.to_ne_bytes().to_vec())).collect()
}

/// What an `--egress` rule opens, as one rule or two. What is closed by default it opens only by its name: a single address, or a part of
/// the link-local addresses; `10.0.0.0/8` does not mean the host's own address in that network, `0.0.0.0/0` no metadata.
fn opened(rule: &EgressRule) -> Vec<Vec<Expression>> {
    let range = Range::network(rule.address(), rule.prefix());
    let link_local = Range::network(LINK_LOCAL.0, LINK_LOCAL.1);
    let is_named = rule.prefix() == 32 || rule.prefix() >= link_local.prefix() && link_local.contains(rule.address());
    let mut common = ipv4();
    if rule.prefix() > 0 {
        common.extend(within(Base::Network, DESTINATION_OFFSET, range));
    }
    if !is_named {
        common.extend([Expression::DestinationKind, equal(&unicast())]);
        for closed in [&CLOSED, &HIDDEN] {
            common.extend([destination(), Expression::Lookup { set: closed.name, inverted: true }]);
        }
    }
    let protocols: &[Option<i32>] = match (rule.protocol(), rule.ports()) {
        (Some(Protocol::Tcp), _) => &[Some(libc::IPPROTO_TCP)],
        (Some(Protocol::Udp), _) => &[Some(libc::IPPROTO_UDP)],
        (None, Some(_)) => &[Some(libc::IPPROTO_TCP), Some(libc::IPPROTO_UDP)],
        (None, None) => &[None],
    };
    let whole = |protocol: &Option<i32>| {
        let mut expressions = common.clone();
        if let Some(protocol) = protocol {
            expressions.extend(of_protocol(*protocol));
        }
        if let Some((first, last)) = rule.ports() {
            expressions.push(port());
            expressions.push(Expression::Compare(Comparison::AtLeast, first.to_be_bytes().to_vec()));
            expressions.push(Expression::Compare(Comparison::AtMost, last.to_be_bytes().to_vec()));
        }
        expressions.extend(accept());
        expressions
    };
    protocols.iter().map(whole).collect()
}

/// Accepts in a chain of iptables what comes from, and goes to, our interfaces with addresses of a range: whether it may is for the table
/// above to say. In exactly the words that iptables itself uses, so that it can show the rules.
pub(super) fn passing(range: Range) -> [Vec<Expression>; 2] {
    let rule = |name, offset| {
        let mut expressions = vec![meta(name), equal(PREFIX.as_bytes())];
        expressions.extend(within(Base::Network, offset, range));
        expressions.push(Expression::Counter);
        expressions.extend(accept());
        expressions
    };
    [rule(Meta::InName, SOURCE_OFFSET), rule(Meta::OutName, DESTINATION_OFFSET)]
}

fn meta(key: Meta) -> Expression {
    Expression::Meta { key, to: REGISTER }
}

fn equal(value: &[u8]) -> Expression {
    Expression::Compare(Comparison::Equal, value.to_vec())
}

fn set(set: &Set) -> Expression {
    Expression::Lookup { set: set.name, inverted: false }
}

fn accept() -> Vec<Expression> {
    vec![Expression::Verdict(Verdict::Accept)]
}

fn drop_it() -> Vec<Expression> {
    vec![Expression::Verdict(Verdict::Drop)]
}

fn jump(chain: &str) -> Vec<Expression> {
    vec![Expression::Verdict(Verdict::Jump(chain.to_owned()))]
}

fn in_group(key: Meta, comparison: Comparison, group: u32) -> Vec<Expression> {
    vec![meta(key), Expression::Compare(comparison, group.to_ne_bytes().to_vec())]
}

fn ipv4() -> Vec<Expression> {
    vec![meta(Meta::Family), equal(&[libc::NFPROTO_IPV4 as u8])]
}

fn of_protocol(protocol: i32) -> Vec<Expression> {
    vec![meta(Meta::Protocol), equal(&[protocol as u8])]
}

fn destination() -> Expression {
    Expression::Payload { base: Base::Network, offset: DESTINATION_OFFSET, bytes: 4, to: REGISTER }
}

fn port() -> Expression {
    Expression::Payload { base: Base::Transport, offset: PORT_OFFSET, bytes: 2, to: REGISTER }
}

/// The interface, hardware address and address that a packet comes from, as the key of [`PINS`].
fn pinned_key() -> Vec<Expression> {
    let mut all = ipv4();
    all.extend([meta(Meta::InKind), equal(&libc::ARPHRD_ETHER.to_ne_bytes())]);
    all.extend([
        meta(Meta::In),
        Expression::Payload { base: Base::Link, offset: 6, bytes: 6, to: word(1) },
        Expression::Payload { base: Base::Network, offset: SOURCE_OFFSET, bytes: 4, to: word(3) },
    ]);
    all
}

fn to_resolver(protocol: i32) -> Vec<Expression> {
    let mut all = of_protocol(protocol);
    all.extend([port(), equal(&DNS_PORT.to_be_bytes())]);
    all.extend(ipv4());
    all.extend([
        meta(Meta::In),
        Expression::Payload { base: Base::Network, offset: DESTINATION_OFFSET, bytes: 4, to: word(1) },
        set(&RESOLVERS),
    ]);
    all
}

fn unicast() -> [u8; 4] {
    u32::from(libc::RTN_UNICAST).to_ne_bytes()
}

/// To the host itself, to a broadcast or multicast address, or to one that is claimed and nobody's.
fn unlike_unicast() -> Vec<Expression> {
    vec![Expression::DestinationKind, Expression::Compare(Comparison::Unequal, unicast().to_vec())]
}

fn within(base: Base, offset: u32, range: Range) -> Vec<Expression> {
    vec![
        Expression::Payload { base, offset, bytes: 4, to: REGISTER },
        Expression::Mask(range.mask().octets().to_vec()),
        equal(&range.base().octets()),
    ]
}

fn bits(key: Connection, bits: u32) -> Vec<Expression> {
    vec![
        Expression::Connection(key),
        Expression::Mask(bits.to_ne_bytes().to_vec()),
        Expression::Compare(Comparison::Unequal, vec![0; 4]),
    ]
}

fn state(states: u32) -> Vec<Expression> {
    bits(Connection::State, states)
}

fn destination_changed() -> Vec<Expression> {
    bits(Connection::Status, DESTINATION_CHANGED)
}

fn icmp(kind: u8) -> Vec<Expression> {
    let mut all = of_protocol(libc::IPPROTO_ICMP);
    all.extend(ipv4());
    all.extend([Expression::Payload { base: Base::Transport, offset: 0, bytes: 1, to: REGISTER }, equal(&[kind])]);
    all
}

//! Interfaces, addresses, routes and neighbours, by rtnetlink(7).
//!
//! ```text
//!   instance                                      host
//!   eth0  ADDRESS/32  ───────── veth pair ─────── funtADDRESS   no address, in the group of this server
//!   default via 169.254.1.1                       ADDRESS/32 by funtADDRESS
//!   169.254.1.1 is at HOST_MAC (permanent)        ADDRESS is at its MAC (permanent), no ARP
//! ```
//! Neither side asks the other for anything: both know the one neighbour that they have.

use std::fmt;
use std::net::Ipv4Addr;
use std::os::fd::{AsRawFd as _, BorrowedFd};

use rustix::io::Errno;

use super::netlink::{Attributes, Message, Socket};
use super::range::Range;

/// The interface inside.
pub(super) const INSIDE: &str = "eth0";
/// Where packets leave to, as an instance sees it: an address of no network, since there is none between the two.
const GATEWAY: Ipv4Addr = Ipv4Addr::new(169, 254, 1, 1);
/// How the interfaces on the host's side are called, before the address: whoever writes rules of a firewall can name them all.
pub(crate) const PREFIX: &str = "funt";
/// `VETH_INFO_PEER` of linux/veth.h.
const VETH_INFO_PEER: u16 = 1;
/// `IFLA_INET_CONF` of linux/if_link.h.
const IFLA_INET_CONF: u16 = 1;
/// Settings of `net.ipv4.conf.IF` by their numbers in linux/ip.h, as the host's side of a pair has them.
const HOST_SETTINGS: [(u16, u32); 7] = [
    // FORWARDING: what comes from the instance is passed on.
    (1, 1),
    // PROXY_ARP, ACCEPT_REDIRECTS, SEND_REDIRECTS, ACCEPT_SOURCE_ROUTE, ACCEPT_LOCAL, ROUTE_LOCALNET.
    (3, 0),
    (4, 0),
    (6, 0),
    (9, 0),
    (23, 0),
    (26, 0),
];
/// `struct ifinfomsg`, `ifaddrmsg`, `rtmsg`.
const IFINFO_BYTES: usize = 16;
const IFADDR_BYTES: usize = 8;
const RTMSG_BYTES: usize = 12;

/// A hardware address.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Mac(pub(super) [u8; 6]);

impl Mac {
    /// Of the host's side of every pair; locally administered, as those below.
    const HOST: Self = Self([0x02, 0xf7, 0xff, 0xff, 0xff, 0xff]);

    /// Of the instance with an address.
    pub(super) fn of(address: Ipv4Addr) -> Self {
        let [a, b, c, d] = address.octets();
        Self([0x02, 0xf7, a, b, c, d])
    }
}

/// The name of the host's side of an instance's pair: 12 of the 15 bytes that a name may have.
pub(super) struct HostName(Ipv4Addr);

impl HostName {
    pub(super) fn of(address: Ipv4Addr) -> Self {
        Self(address)
    }

    /// The address behind a name of ours.
    pub(super) fn parse(name: &str) -> Option<Ipv4Addr> {
        let hex = name.strip_prefix(PREFIX).filter(|hex| hex.len() == 8)?;
        u32::from_str_radix(hex, 16).ok().map(Ipv4Addr::from_bits)
    }
}

impl fmt::Display for HostName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{PREFIX}{:08x}", self.0.to_bits())
    }
}

/// What a new pair is made from.
pub(super) struct Pair<'a> {
    pub(super) address: Ipv4Addr,
    /// The group of the host's side: by this, rules tell ours from others.
    pub(super) group: u32,
    /// Largest packet.
    pub(super) mtu: u32,
    /// The instance's network namespace.
    pub(super) inside: BorrowedFd<'a>,
}

/// Makes a pair with its ends in both namespaces, down, and returns the index of the host's side.
pub(super) fn make_pair(host: &mut Socket, pair: &Pair<'_>) -> Result<u32, Errno> {
    let name = HostName::of(pair.address).to_string();
    let group = pair.group.to_ne_bytes();
    let inside = pair.inside.as_raw_fd().to_ne_bytes();
    let end = |message: &mut Message, name: &str, mac: Mac| {
        message.text(libc::IFLA_IFNAME, name);
        message.attribute(libc::IFLA_ADDRESS, &mac.0);
        message.attribute(libc::IFLA_MTU, &pair.mtu.to_ne_bytes());
        // By default a veth has a queue for each processor that the machine could have.
        message.attribute(libc::IFLA_NUM_TX_QUEUES, &1_u32.to_ne_bytes());
        message.attribute(libc::IFLA_NUM_RX_QUEUES, &1_u32.to_ne_bytes());
    };
    let mut message = Message::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL).fixed(&ifinfo(0, 0, 0));
    end(&mut message, &name, Mac::HOST);
    message.attribute(libc::IFLA_GROUP, &group);
    message.nest(libc::IFLA_LINKINFO, |info| {
        info.text(libc::IFLA_INFO_KIND, "veth");
        info.nest(libc::IFLA_INFO_DATA, |data| {
            data.nest(VETH_INFO_PEER, |peer| {
                peer.put(&ifinfo(0, 0, 0));
                end(peer, INSIDE, Mac::of(pair.address));
                peer.attribute(libc::IFLA_NET_NS_FD, &inside);
            });
        });
    });
    host.ask(message)?;
    index_of(host, &name)
}

/// Index of an interface in the socket's namespace.
pub(super) fn index_of(socket: &Socket, name: &str) -> Result<u32, Errno> {
    rustix::net::netdevice::name_to_index(socket.fd(), name)
}

/// Brings the host's side up, with all that leads to the instance. Its pin must be in place before.
pub(super) fn set_up_host(host: &mut Socket, index: u32, address: Ipv4Addr) -> Result<(), Errno> {
    let settings = Message::new(libc::RTM_NEWLINK, 0).fixed(&ifinfo(index, 0, 0)).with_nest(libc::IFLA_AF_SPEC, |families| {
        families.nest(libc::AF_INET as u16, |inet| {
            inet.nest(IFLA_INET_CONF, |settings| {
                for (setting, value) in HOST_SETTINGS {
                    settings.attribute(setting, &value.to_ne_bytes());
                }
            });
        });
    });
    let up = (libc::IFF_UP | libc::IFF_NOARP) as u32;
    host.ask_all(vec![
        settings,
        Message::new(libc::RTM_NEWLINK, 0).fixed(&ifinfo(index, up, up)),
        neighbour(index, address, Mac::of(address)),
        route(&Route { to: address, prefix: 32, by: Some(index), ..Route::default() }),
    ])
    .map_err(|refused| refused.errno)
}

/// Brings the instance's side up, in its namespace, with all that leads out.
pub(super) fn set_up_inside(inside: &mut Socket, address: Ipv4Addr) -> Result<(), Errno> {
    let index = index_of(inside, INSIDE)?;
    let up = libc::IFF_UP as u32;
    let own = Message::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL)
        .fixed(&ifaddr(index, 32))
        .with(libc::IFA_LOCAL, &address.octets())
        .with(libc::IFA_ADDRESS, &address.octets());
    inside
        .ask_all(vec![
            Message::new(libc::RTM_NEWLINK, 0).fixed(&ifinfo(index, up, up)),
            own,
            neighbour(index, GATEWAY, Mac::HOST),
            route(&Route { to: GATEWAY, prefix: 32, by: Some(index), ..Route::default() }),
            route(&Route { via: Some(GATEWAY), by: Some(index), source: Some(address), ..Route::default() }),
        ])
        .map_err(|refused| refused.errno)
}

/// Removes an interface of ours, and with it its other end, its routes and neighbours; that there is none is as good. By its name: an
/// index could be another's by now.
pub(super) fn remove(host: &mut Socket, name: &HostName) -> Result<(), Errno> {
    remove_named(host, &name.to_string())
}

fn remove_named(host: &mut Socket, name: &str) -> Result<(), Errno> {
    match host.ask(Message::new(libc::RTM_DELLINK, 0).fixed(&ifinfo(0, 0, 0)).with_text(libc::IFLA_IFNAME, name)) {
        Err(Errno::NODEV) => Ok(()),
        other => other,
    }
}

/// Makes a pair and removes it.
pub(super) fn probe(host: &mut Socket) -> Result<(), Errno> {
    // Its process has no other, and no instance's name is like it.
    let name = format!("{PREFIX}p{}", std::process::id());
    host.ask(
        Message::new(libc::RTM_NEWLINK, libc::NLM_F_CREATE | libc::NLM_F_EXCL)
            .fixed(&ifinfo(0, 0, 0))
            .with_text(libc::IFLA_IFNAME, &name)
            .with_nest(libc::IFLA_LINKINFO, |info| info.text(libc::IFLA_INFO_KIND, "veth")),
    )?;
    remove_named(host, &name)
}

/// An interface of the socket's namespace.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Interface {
    pub(super) index: u32,
    pub(super) name: String,
    pub(super) group: u32,
    pub(super) mtu: u32,
    /// `IFF_*`.
    pub(super) flags: u32,
}

impl Interface {
    pub(super) fn is_loopback(&self) -> bool {
        self.flags & libc::IFF_LOOPBACK as u32 != 0
    }
}

/// All interfaces of the socket's namespace.
pub(super) fn interfaces(socket: &mut Socket) -> Result<Vec<Interface>, Errno> {
    let mut all = Vec::new();
    socket.dump(&Message::new(libc::RTM_GETLINK, 0).fixed(&ifinfo(0, 0, 0)), |kind, body| {
        let attributes = Attributes::after(IFINFO_BYTES, body);
        if let (libc::RTM_NEWLINK, Some(name), Some(index), Some(flags)) =
            (kind, attributes.text(libc::IFLA_IFNAME), word(body, 4), word(body, 8))
        {
            all.push(Interface {
                index,
                name: name.to_owned(),
                group: attributes.native(libc::IFLA_GROUP).unwrap_or(0),
                mtu: attributes.native(libc::IFLA_MTU).unwrap_or(0),
                flags,
            });
        }
    })?;
    Ok(all)
}

/// A route of IPv4.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Route {
    pub(super) to: Ipv4Addr,
    /// Bits of `to` that count; 0 is the default route.
    pub(super) prefix: u8,
    /// `RTN_*`.
    pub(super) kind: u8,
    /// `RT_TABLE_*`.
    pub(super) table: u32,
    /// Index of the interface.
    pub(super) by: Option<u32>,
    pub(super) via: Option<Ipv4Addr>,
    /// Where packets say that they come from.
    pub(super) source: Option<Ipv4Addr>,
}

impl Default for Route {
    fn default() -> Self {
        Self {
            to: Ipv4Addr::UNSPECIFIED,
            prefix: 0,
            kind: libc::RTN_UNICAST,
            table: libc::RT_TABLE_MAIN.into(),
            by: None,
            via: None,
            source: None,
        }
    }
}

/// All routes of IPv4 but those of the table `local`, which are the host's own addresses.
pub(super) fn routes(socket: &mut Socket) -> Result<Vec<Route>, Errno> {
    let mut all = Vec::new();
    let mut fixed = [0_u8; RTMSG_BYTES];
    fixed[0] = libc::AF_INET as u8;
    socket.dump(&Message::new(libc::RTM_GETROUTE, 0).fixed(&fixed), |kind, body| {
        let attributes = Attributes::after(RTMSG_BYTES, body);
        let address = |kind| attributes.big(kind).map(Ipv4Addr::from_bits);
        let Some(&[family, prefix, _, _, table, _, _, route_kind]) = body.first_chunk::<8>() else { return };
        let table = attributes.native(libc::RTA_TABLE).unwrap_or(table.into());
        if kind != libc::RTM_NEWROUTE || i32::from(family) != libc::AF_INET || table == u32::from(libc::RT_TABLE_LOCAL) {
            return;
        }
        // A route with several ways names them in a list.
        let ways = attributes.get(libc::RTA_MULTIPATH);
        let by = attributes.native(libc::RTA_OIF).or_else(|| word(ways?, 4));
        all.push(Route {
            to: address(libc::RTA_DST).unwrap_or(Ipv4Addr::UNSPECIFIED),
            prefix,
            kind: route_kind,
            table,
            by,
            via: address(libc::RTA_GATEWAY),
            source: address(libc::RTA_PREFSRC),
        });
    })?;
    Ok(all)
}

/// An address of the host, with the bits of it that its network has.
pub(super) fn addresses(socket: &mut Socket) -> Result<Vec<(Ipv4Addr, u8)>, Errno> {
    let mut all = Vec::new();
    socket.dump(&Message::new(libc::RTM_GETADDR, 0).fixed(&[libc::AF_INET as u8, 0, 0, 0, 0, 0, 0, 0]), |kind, body| {
        let attributes = Attributes::after(IFADDR_BYTES, body);
        let address = attributes.big(libc::IFA_LOCAL).or_else(|| attributes.big(libc::IFA_ADDRESS));
        if let (libc::RTM_NEWADDR, Some(address), Some(prefix)) = (kind, address, body.get(1)) {
            all.push((Ipv4Addr::from_bits(address), *prefix));
        }
    })?;
    Ok(all)
}

/// Claims a range for this server: packets to addresses in it that no instance has are refused, and nobody else can make the same route.
/// `EEXIST` if somebody has.
pub(super) fn claim(host: &mut Socket, range: Range) -> Result<(), Errno> {
    host.ask(route(&claim_of(range)))
}

/// Gives a claimed range back.
pub(super) fn release(host: &mut Socket, range: Range) -> Result<(), Errno> {
    host.ask(route_message(libc::RTM_DELROUTE, 0, &claim_of(range)))
}

fn claim_of(range: Range) -> Route {
    Route { to: range.base(), prefix: range.prefix(), kind: libc::RTN_UNREACHABLE, ..Route::default() }
}

fn route(route: &Route) -> Message {
    route_message(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_EXCL, route)
}

fn route_message(kind: u16, flags: i32, route: &Route) -> Message {
    let scope = match route.kind {
        libc::RTN_UNICAST if route.via.is_none() => libc::RT_SCOPE_LINK,
        _ => libc::RT_SCOPE_UNIVERSE,
    };
    // struct rtmsg: family, lengths of destination and source in bits, service, table, origin, scope, type, flags.
    let fixed =
        [libc::AF_INET as u8, route.prefix, 0, 0, route.table as u8, libc::RTPROT_STATIC, scope, route.kind, 0, 0, 0, 0];
    let mut message = Message::new(kind, flags).fixed(&fixed);
    if route.prefix > 0 {
        message.attribute(libc::RTA_DST, &route.to.octets());
    }
    if let Some(via) = route.via {
        message.attribute(libc::RTA_GATEWAY, &via.octets());
    }
    if let Some(by) = route.by {
        message.attribute(libc::RTA_OIF, &by.to_ne_bytes());
    }
    if let Some(source) = route.source {
        message.attribute(libc::RTA_PREFSRC, &source.octets());
    }
    message
}

fn neighbour(index: u32, address: Ipv4Addr, mac: Mac) -> Message {
    // struct ndmsg: family, padding, index, state, flags, type.
    let mut fixed = [0_u8; 12];
    fixed[0] = libc::AF_INET as u8;
    fixed[4..8].copy_from_slice(&index.to_ne_bytes());
    fixed[8..10].copy_from_slice(&libc::NUD_PERMANENT.to_ne_bytes());
    Message::new(libc::RTM_NEWNEIGH, libc::NLM_F_CREATE | libc::NLM_F_REPLACE)
        .fixed(&fixed)
        .with(libc::NDA_DST, &address.octets())
        .with(libc::NDA_LLADDR, &mac.0)
}

/// `struct ifinfomsg`: family, padding, type, index, flags, mask of the flags to change.
fn ifinfo(index: u32, flags: u32, change: u32) -> [u8; IFINFO_BYTES] {
    let mut bytes = [0; IFINFO_BYTES];
    bytes[4..8].copy_from_slice(&index.to_ne_bytes());
    bytes[8..12].copy_from_slice(&flags.to_ne_bytes());
    bytes[12..].copy_from_slice(&change.to_ne_bytes());
    bytes
}

/// `struct ifaddrmsg`: family, length of the prefix in bits, flags, scope, index.
fn ifaddr(index: u32, prefix: u8) -> [u8; IFADDR_BYTES] {
    let [a, b, c, d] = index.to_ne_bytes();
    [libc::AF_INET as u8, prefix, 0, libc::RT_SCOPE_UNIVERSE, a, b, c, d]
}

fn word(bytes: &[u8], at: usize) -> Option<u32> {
    bytes.get(at..at + 4)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_lead_back_to_addresses() {
        let address = Ipv4Addr::new(10, 208, 1, 254);
        let name = HostName::of(address).to_string();
        assert_eq!((name.as_str(), HostName::parse(&name)), ("funt0ad001fe", Some(address)));
        assert!(name.len() < libc::IFNAMSIZ);
        for other in ["funt", "funt0ad001f", "funt0ad001fe0", "eth0", "funt0ad001fg"] {
            assert_eq!(HostName::parse(other), None, "{other}");
        }
    }
}

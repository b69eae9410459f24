//! The network inside an instance: loopback only, and the sockets by which the platform reaches its servers.
//!
//! Besides 127.0.0.1 and ::1, `lo` has one address of each family that belongs to the platform ([`SOURCE_V4`], [`SOURCE_V6`]). The first
//! process of an instance makes unconnected TCP sockets bound to them, which the daemon connects: a server that trusts localhost does
//! not trust callers, since none comes from 127.0.0.1 or ::1.

use std::net::{Ipv4Addr, Ipv6Addr, SocketAddrV4, SocketAddrV6};
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::{AddressFamily, RecvFlags, SendFlags, SocketFlags, SocketType, ipproto};

use crate::step::{StepError, at, checked};

/// Where the platform's connections over IPv4 come from: the dummy address of RFC 7600 section 4, which no network routes.
pub const SOURCE_V4: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 8);

/// Where the platform's connections over IPv6 come from: a unique local address (RFC 4193).
pub const SOURCE_V6: Ipv6Addr = Ipv6Addr::new(0xfd00, 0xf00d, 0, 0, 0, 0, 0, 1);

/// NETLINK_ROUTE is protocol 0, which "no protocol named" means too.
const NETLINK_ROUTE: Option<rustix::net::Protocol> = None;

/// What a prepared network namespace can do.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Prepared {
    /// Whether the kernel has IPv6. Without it there are no sockets of that family.
    pub ipv6: bool,
}

/// Brings `lo` up in the calling thread's network namespace, gives it the source addresses, and lets every user listen on every port.
/// Needs CAP_NET_ADMIN over the namespace, and a writable `/proc/sys`.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn prepare() -> Result<Prepared, StepError> {
    let socket = route_socket()?;
    let lo = rustix::net::netdevice::name_to_index(&socket, "lo").map_err(at("find the interface lo"))?;

    ask(socket.as_fd(), &Request::link_up(lo)).map_err(at("bring lo up"))?;
    ask(socket.as_fd(), &Request::address(lo, libc::AF_INET as u8, &SOURCE_V4.octets()))
        .map_err(at("add the source address to lo"))?;
    let ipv6 = match ask(socket.as_fd(), &Request::address(lo, libc::AF_INET6 as u8, &SOURCE_V6.octets())) {
        Ok(()) => true,
        // No such family in this kernel, or switched off by ipv6.disable=1 or the sysctl disable_ipv6.
        Err(Errno::OPNOTSUPP | Errno::AFNOSUPPORT | Errno::ACCESS) => false,
        Err(errno) => return Err(StepError { step: "add the IPv6 source address to lo", errno }),
    };
    if ipv6 {
        // The kernel makes the route of a new IPv6 address in a worker of its own, some time later (addrconf_dad_work). Until then answers
        // to a first connection are dropped, and its retry comes after a second: this route bridges the time.
        ask(socket.as_fd(), &Request::local_route(lo, &SOURCE_V6.octets()))
            .map_err(at("add the route of the IPv6 source address"))?;
    }
    let setting =
        rustix::fs::open(c"/proc/sys/net/ipv4/ip_unprivileged_port_start", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(at("open the sysctl ip_unprivileged_port_start"))?;
    rustix::io::write(&setting, b"0").map_err(at("write the sysctl ip_unprivileged_port_start"))?;
    Ok(Prepared { ipv6 })
}

/// Interfaces that come into the calling thread's network namespace from now on have no IPv6. Where the kernel has none there is nothing
/// to do. Needs CAP_NET_ADMIN over the namespace, and a writable `/proc/sys`.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn without_ipv6() -> Result<(), StepError> {
    let setting = c"/proc/sys/net/ipv6/conf/default/disable_ipv6";
    match rustix::fs::open(setting, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()) {
        Ok(setting) => rustix::io::write(&setting, b"1").map(drop).map_err(at("write the sysctl disable_ipv6")),
        Err(Errno::NOENT) => Ok(()),
        Err(errno) => Err(StepError { step: "open the sysctl disable_ipv6", errno }),
    }
}

/// A socket of rtnetlink(7), which acts on the calling thread's network namespace wherever it goes.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn route_socket() -> Result<OwnedFd, StepError> {
    rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, NETLINK_ROUTE)
        .map_err(at("open a netlink socket"))
}

/// A TCP socket in the calling thread's network namespace, which [`prepare`] was run in: non-blocking, close-on-exec, bound to the source
/// address with a port that the kernel chooses at connect.
///
/// A refused socket can be connected again, with the same source. Since it does not block, an attempt that was under way
/// (`EINPROGRESS`) and failed must be asked for its outcome by calling `connect` again: that returns the error and makes the socket
/// ready for the next attempt. `SO_ERROR` only takes the error away: the next `connect` then returns `ECONNABORTED` once.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn make_socket_v4() -> Result<OwnedFd, StepError> {
    let socket = tcp(AddressFamily::INET)?;
    rustix::net::bind(&socket, &SocketAddrV4::new(SOURCE_V4, 0)).map_err(at("bind a socket to the source address"))?;
    Ok(socket)
}

/// As [`make_socket_v4`], for servers that listen on `::1` alone.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn make_socket_v6() -> Result<OwnedFd, StepError> {
    let socket = tcp(AddressFamily::INET6)?;
    rustix::net::bind(&socket, &SocketAddrV6::new(SOURCE_V6, 0, 0, 0))
        .map_err(at("bind a socket to the IPv6 source address"))?;
    Ok(socket)
}

fn tcp(family: AddressFamily) -> Result<OwnedFd, StepError> {
    let socket =
        rustix::net::socket_with(family, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, Some(ipproto::TCP))
            .map_err(at("make a TCP socket"))?;
    let on: libc::c_int = 1;
    // SAFETY: the value is a live integer, its size is passed. rustix does not know this option, by which the port is chosen at
    // connect, when the destination is known: without it the bind would reserve one of 28,000 ports for each idle socket. The option
    // is one of level IP for both families (ip(7)).
    let result = unsafe {
        libc::setsockopt(
            socket.as_raw_fd(),
            libc::IPPROTO_IP,
            libc::IP_BIND_ADDRESS_NO_PORT,
            (&raw const on).cast(),
            size_of_val(&on) as libc::socklen_t,
        )
    };
    checked(result.into()).map_err(at("set IP_BIND_ADDRESS_NO_PORT"))?;
    Ok(socket)
}

/// Room for the largest of our requests: header 16, `ifaddrmsg` 8, two attributes of an IPv6 address with 20 bytes each, 8 spare.
const REQUEST_BYTES: usize = 72;

/// One request of rtnetlink(7), ready to be sent.
struct Request {
    bytes: [u8; REQUEST_BYTES],
    length: usize,
}

impl Request {
    fn new(kind: u16, flags: i32) -> Self {
        let mut request = Self { bytes: [0; REQUEST_BYTES], length: 0 };
        // struct nlmsghdr: length (set when complete), type, flags, sequence, port.
        request.put(&0_u32.to_ne_bytes());
        request.put(&kind.to_ne_bytes());
        request.put(&((libc::NLM_F_REQUEST | libc::NLM_F_ACK | flags) as u16).to_ne_bytes());
        request.put(&1_u32.to_ne_bytes());
        request.put(&0_u32.to_ne_bytes());
        request
    }

    fn link_up(index: u32) -> Self {
        let mut request = Self::new(libc::RTM_NEWLINK, 0);
        // struct ifinfomsg: family, padding, type, index, flags, mask of the flags to change.
        request.put(&[libc::AF_UNSPEC as u8, 0, 0, 0]);
        request.put(&index.to_ne_bytes());
        request.put(&(libc::IFF_UP as u32).to_ne_bytes());
        request.put(&(libc::IFF_UP as u32).to_ne_bytes());
        request.finish()
    }

    /// The address alone (`/32`, `/128`), usable at once: nobody else can have it, so no duplicate is looked for.
    fn address(index: u32, family: u8, address: &[u8]) -> Self {
        let mut request = Self::new(libc::RTM_NEWADDR, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
        // struct ifaddrmsg: family, length of the prefix in bits, flags, scope, index.
        request.put(&[family, (address.len() * 8) as u8, libc::IFA_F_NODAD as u8, libc::RT_SCOPE_UNIVERSE]);
        request.put(&index.to_ne_bytes());
        request.attribute(libc::IFA_LOCAL, address);
        request.attribute(libc::IFA_ADDRESS, address);
        request.finish()
    }

    /// Packets to this one IPv6 address are for this machine.
    fn local_route(index: u32, address: &[u8; 16]) -> Self {
        let mut request = Self::new(libc::RTM_NEWROUTE, libc::NLM_F_CREATE | libc::NLM_F_EXCL);
        // struct rtmsg: family, lengths of destination and source in bits, service, table, origin, scope, type, flags.
        request.put(&[
            libc::AF_INET6 as u8,
            128,
            0,
            0,
            libc::RT_TABLE_LOCAL,
            libc::RTPROT_BOOT,
            libc::RT_SCOPE_UNIVERSE,
            libc::RTN_LOCAL,
        ]);
        request.put(&0_u32.to_ne_bytes());
        request.attribute(libc::RTA_DST, address);
        request.attribute(libc::RTA_OIF, &index.to_ne_bytes());
        request.finish()
    }

    fn attribute(&mut self, kind: u16, value: &[u8]) {
        // struct rtattr; all of our values are multiples of four bytes long, so none needs padding.
        self.put(&((4 + value.len()) as u16).to_ne_bytes());
        self.put(&kind.to_ne_bytes());
        self.put(value);
    }

    fn put(&mut self, bytes: &[u8]) {
        self.bytes[self.length..self.length + bytes.len()].copy_from_slice(bytes);
        self.length += bytes.len();
    }

    fn finish(mut self) -> Self {
        self.bytes[..4].copy_from_slice(&(self.length as u32).to_ne_bytes());
        self
    }
}

/// Sends one request and reads its acknowledgement.
fn ask(socket: BorrowedFd<'_>, request: &Request) -> Result<(), Errno> {
    rustix::net::send(socket, &request.bytes[..request.length], SendFlags::empty())?;
    let mut answer = [0_u8; 256];
    let (read, _) = rustix::net::recv(socket, &mut answer[..], RecvFlags::empty())?;
    // struct nlmsghdr and then, for type NLMSG_ERROR, struct nlmsgerr whose first field is 0 or a negative errno.
    let kind = u16::from_ne_bytes([answer[4], answer[5]]);
    if read < 20 || i32::from(kind) != libc::NLMSG_ERROR {
        return Err(Errno::PROTO);
    }
    match i32::from_ne_bytes([answer[16], answer[17], answer[18], answer[19]]) {
        0 => Ok(()),
        error => Err(Errno::from_raw_os_error(-error)),
    }
}

#[cfg(test)]
mod tests {
    use std::net::SocketAddr;

    use rustix::event::{PollFd, PollFlags, Timespec};
    use rustix::net::SocketAddrAny;

    use super::*;
    use crate::testing::{ensure, need_root, refused, run};

    const FRESH: libc::c_int = libc::CLONE_NEWUSER | libc::CLONE_NEWNET;
    /// Below 1024: `prepare` opens these ports to all users.
    const PORT: u16 = 80;

    /// A server on an address; not blocking.
    fn server(address: SocketAddr) -> Result<OwnedFd, StepError> {
        let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
        let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
        let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, None).map_err(at("make a server"))?;
        rustix::net::sockopt::set_socket_reuseaddr(&socket, true).map_err(at("set SO_REUSEADDR"))?;
        if address.is_ipv6() {
            rustix::net::sockopt::set_ipv6_v6only(&socket, true).map_err(at("set IPV6_V6ONLY"))?;
        }
        rustix::net::bind(&socket, &address).map_err(at("bind a server"))?;
        rustix::net::listen(&socket, 8).map_err(at("listen"))?;
        Ok(socket)
    }

    /// Connects a socket that does not block, and waits for the end of it. The outcome is asked for by a second `connect`: SO_ERROR would
    /// take the error away and leave the socket connecting, so that the next attempt ends with ECONNABORTED.
    fn connect(socket: BorrowedFd<'_>, to: SocketAddr) -> Result<(), Errno> {
        match rustix::net::connect(socket, &to) {
            Err(Errno::INPROGRESS) => {}
            other => return other,
        }
        let mut polled = [PollFd::from_borrowed_fd(socket, PollFlags::OUT)];
        // A lost packet would be sent again after a second: that is a failure here.
        if rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 0, tv_nsec: 700_000_000 }))? == 0 {
            return Err(Errno::TIMEDOUT);
        }
        match rustix::net::connect(socket, &to) {
            Ok(()) | Err(Errno::ISCONN) => Ok(()),
            other => other,
        }
    }

    /// Who a server says has connected.
    fn peer(server: BorrowedFd<'_>) -> Result<SocketAddr, StepError> {
        let mut polled = [PollFd::from_borrowed_fd(server, PollFlags::IN)];
        rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: 5, tv_nsec: 0 })).map_err(at("wait for a connection"))?;
        let (_, peer) = rustix::net::acceptfrom(server).map_err(at("accept"))?;
        peer.map(SocketAddr::try_from).ok_or(Errno::PROTO).and_then(|result| result).map_err(at("read the peer's address"))
    }

    fn reach(socket: &OwnedFd, listen: SocketAddr, to: SocketAddr, source: std::net::IpAddr) -> Result<(), StepError> {
        let server = server(listen)?;
        connect(socket.as_fd(), to).map_err(at("connect to the server"))?;
        let peer = peer(server.as_fd())?;
        ensure(peer.ip() == source, "the peer is the source address")?;
        ensure(!peer.ip().is_loopback() && peer.port() != 0, "the peer is not loopback")
    }

    #[test]
    fn sockets_reach_servers_on_every_local_address() {
        need_root();
        run(FRESH, || {
            let prepared = prepare()?;
            ensure(prepared.ipv6, "this kernel has IPv6")?;
            let v4 = |octets: [u8; 4]| SocketAddr::from((octets, PORT));
            let v6 = |address: Ipv6Addr| SocketAddr::from((address, PORT));
            // At once: a first connection must not wait for the kernel to finish what `prepare` asked for.
            reach(&make_socket_v6()?, v6(Ipv6Addr::LOCALHOST), v6(Ipv6Addr::LOCALHOST), SOURCE_V6.into())?;
            reach(&make_socket_v6()?, v6(Ipv6Addr::UNSPECIFIED), v6(Ipv6Addr::LOCALHOST), SOURCE_V6.into())?;
            reach(&make_socket_v4()?, v4([127, 0, 0, 1]), v4([127, 0, 0, 1]), SOURCE_V4.into())?;
            reach(&make_socket_v4()?, v4([0, 0, 0, 0]), v4([127, 0, 0, 1]), SOURCE_V4.into())
        });
    }

    #[test]
    fn a_v4_socket_reaches_a_server_of_both_families() {
        need_root();
        run(FRESH, || {
            prepare()?;
            let socket = make_socket_v4()?;
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let server =
                rustix::net::socket_with(AddressFamily::INET6, SocketType::STREAM, flags, None).map_err(at("make a server"))?;
            rustix::net::bind(&server, &SocketAddrV6::new(Ipv6Addr::UNSPECIFIED, PORT, 0, 0)).map_err(at("bind"))?;
            rustix::net::listen(&server, 8).map_err(at("listen"))?;
            connect(socket.as_fd(), SocketAddr::from(([127, 0, 0, 1], PORT))).map_err(at("connect"))?;
            let peer = peer(server.as_fd())?;
            ensure(peer.ip() == SOURCE_V4.to_ipv6_mapped(), "the peer is the mapped source address")
        });
    }

    #[test]
    fn a_refused_socket_can_be_connected_again_from_the_same_source() {
        need_root();
        run(FRESH, || {
            let prepared = prepare()?;
            let v4 = make_socket_v4()?;
            let to = SocketAddr::from(([127, 0, 0, 1], PORT));
            for _ in 0..3 {
                refused(connect(v4.as_fd(), to), Errno::CONNREFUSED, "nobody listens")?;
            }
            reach(&v4, to, to, SOURCE_V4.into())?;
            if prepared.ipv6 {
                let v6 = make_socket_v6()?;
                let to = SocketAddr::from((Ipv6Addr::LOCALHOST, PORT));
                for _ in 0..3 {
                    refused(connect(v6.as_fd(), to), Errno::CONNREFUSED, "nobody listens")?;
                }
                reach(&v6, to, to, SOURCE_V6.into())?;
            }
            Ok(())
        });
    }

    #[test]
    fn idle_sockets_hold_no_port() {
        need_root();
        run(FRESH, || {
            prepare()?;
            for socket in [make_socket_v4()?, make_socket_v6()?] {
                let address = rustix::net::getsockname(&socket).map_err(at("getsockname"))?;
                let address: SocketAddr = SocketAddrAny::try_into(address).map_err(at("read an address"))?;
                ensure(address.port() == 0, "the port is chosen at connect")?;
                ensure(address.ip() == SOURCE_V4 || address.ip() == SOURCE_V6, "the source address is fixed")?;
            }
            Ok(())
        });
    }

    #[test]
    fn an_ordinary_user_listens_on_port_80() {
        need_root();
        run(FRESH, || {
            prepare()?;
            crate::userns::become_user(rustix::process::Uid::from_raw(1000), rustix::process::Gid::from_raw(1000), &[])?;
            server(SocketAddr::from(([0, 0, 0, 0], PORT))).map(drop)
        });
    }

    #[test]
    fn without_ipv6_the_other_family_works() {
        need_root();
        run(FRESH, || {
            let setting = c"/proc/sys/net/ipv6/conf/all/disable_ipv6";
            let file =
                rustix::fs::open(setting, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty()).map_err(at("open a setting"))?;
            rustix::io::write(&file, b"1").map_err(at("switch IPv6 off"))?;
            let prepared = prepare()?;
            ensure(!prepared.ipv6, "IPv6 is off")?;
            let refusal = make_socket_v6().map(drop).map_err(|error| error.errno);
            refused(refusal, Errno::ADDRNOTAVAIL, "there is no socket of that family")?;
            let to = SocketAddr::from(([127, 0, 0, 1], PORT));
            reach(&make_socket_v4()?, to, to, SOURCE_V4.into())
        });
    }

    #[test]
    fn preparing_twice_says_that_the_address_is_there() {
        need_root();
        run(FRESH, || {
            prepare()?;
            match prepare() {
                Err(StepError { errno: Errno::EXIST, step }) => ensure(step.contains("source address"), "the step is named"),
                _ => ensure(false, "the second time is refused"),
            }
        });
    }
}

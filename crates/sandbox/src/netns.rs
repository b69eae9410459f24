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

/// How many sockets of each family an instance hands out at its start.
pub const SOCKETS_V4: usize = 12;
/// See [`SOCKETS_V4`]. Servers that listen on ::1 alone are rare.
pub const SOCKETS_V6: usize = 4;
/// All sockets of [`make_sockets`]; fits into one message of [`crate::fds`].
pub const SOCKETS: usize = SOCKETS_V4 + SOCKETS_V6;

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
    let socket = rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, NETLINK_ROUTE)
        .map_err(at("open a netlink socket"))?;
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
    let setting =
        rustix::fs::open(c"/proc/sys/net/ipv4/ip_unprivileged_port_start", OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(at("open the sysctl ip_unprivileged_port_start"))?;
    rustix::io::write(&setting, b"0").map_err(at("write the sysctl ip_unprivileged_port_start"))?;
    Ok(Prepared { ipv6 })
}

/// Sockets made inside an instance: IPv4 first, then IPv6.
#[derive(Debug)]
pub struct Sockets {
    slots: [Option<OwnedFd>; SOCKETS],
    count: usize,
}

impl Sockets {
    /// How many there are: [`SOCKETS`], or [`SOCKETS_V4`] without IPv6.
    pub const fn len(&self) -> usize {
        self.count
    }

    /// Never true: a failure to make one is an error.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Sends all sockets in one message after `bytes`.
    ///
    /// Neither allocates nor locks: may be called between clone and exec.
    pub fn send(&self, over: BorrowedFd<'_>, bytes: &[u8]) -> Result<(), Errno> {
        // The first slot fills the array only to have a value: `len` of them are real.
        let Some(first) = self.slots[0].as_ref() else { return Err(Errno::BADF) };
        let mut borrowed = [first.as_fd(); SOCKETS];
        for (slot, socket) in borrowed.iter_mut().zip(self.slots.iter().flatten()) {
            *slot = socket.as_fd();
        }
        crate::fds::send(over, bytes, &borrowed[..self.count], SendFlags::empty())
    }
}

/// Makes the sockets of an instance in the calling thread's network namespace, which [`prepare`] was run in: TCP, non-blocking,
/// close-on-exec, bound to the source addresses with a port that the kernel chooses at connect.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn make_sockets(prepared: Prepared) -> Result<Sockets, StepError> {
    let mut sockets = Sockets { slots: [const { None }; SOCKETS], count: 0 };
    let count = if prepared.ipv6 { SOCKETS } else { SOCKETS_V4 };
    for slot in &mut sockets.slots[..count] {
        *slot = Some(if sockets.count < SOCKETS_V4 { make_socket_v4() } else { make_socket_v6() }?);
        sockets.count += 1;
    }
    Ok(sockets)
}

/// One socket as [`make_sockets`] makes them.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn make_socket_v4() -> Result<OwnedFd, StepError> {
    let socket = tcp(AddressFamily::INET)?;
    rustix::net::bind(&socket, &SocketAddrV4::new(SOURCE_V4, 0)).map_err(at("bind a socket to the source address"))?;
    Ok(socket)
}

/// One socket as [`make_sockets`] makes them.
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

/// Largest of our requests: header 16, `ifaddrmsg` 8, two attributes of an IPv6 address with 20 bytes each, one of flags with 8.
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

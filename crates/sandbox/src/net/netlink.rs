//! Netlink (netlink(7)): messages, and sockets that send them and read the answers.
//!
//! The kernel handles a request within the `send` and puts the answer into the socket's queue before that returns. So nothing here waits
//! for an answer: one that is not there is an error (`EPROTO`). What can take time is the `send`, which takes the kernel's locks.

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::io::{Errno, retry_on_intr};
use rustix::net::netlink::SocketAddrNetlink;
use rustix::net::{AddressFamily, Protocol, RecvFlags, SendFlags, SocketFlags, SocketType};

/// `struct nlmsghdr`.
const HEADER_BYTES: usize = 16;
/// Room for one datagram of the kernel's: what it uses for dumps (`NLMSG_GOODSIZE`) and more.
const DATAGRAM_BYTES: usize = 64 << 10;
/// Room of the socket's queues: a whole table is sent, and acknowledged, at once.
const QUEUE_BYTES: usize = 4 << 20;
/// How often a dump that was overtaken by a change is begun anew.
const DUMPS_MAX: usize = 8;
/// `NLA_F_NESTED` of linux/netlink.h: newer message families insist on it.
const NESTED: u16 = 1 << 15;
/// The bits of an attribute's type that are none: `NLA_F_NESTED` and `NLA_F_NET_BYTEORDER`.
const TYPE_FLAGS: u16 = 3 << 14;

/// One message, with its header.
#[derive(Debug, Clone)]
pub(super) struct Message {
    bytes: Vec<u8>,
}

impl Message {
    /// A request of a kind (`RTM_*`, or a subsystem's) with flags besides `NLM_F_REQUEST`.
    pub(super) fn new(kind: u16, flags: i32) -> Self {
        let mut bytes = Vec::with_capacity(256);
        // Length, type, flags, sequence number, port: the length and the number when it is sent.
        bytes.extend_from_slice(&[0; 4]);
        bytes.extend_from_slice(&kind.to_ne_bytes());
        bytes.extend_from_slice(&((libc::NLM_F_REQUEST | flags) as u16).to_ne_bytes());
        bytes.extend_from_slice(&[0; 8]);
        Self { bytes }
    }

    /// A fixed part, filled up to four bytes.
    pub(super) fn fixed(mut self, part: &[u8]) -> Self {
        self.bytes.extend_from_slice(part);
        self.pad();
        self
    }

    /// An attribute.
    pub(super) fn with(mut self, kind: u16, value: &[u8]) -> Self {
        self.attribute(kind, value);
        self
    }

    /// An attribute that is a text; the kernel wants its end marked.
    pub(super) fn with_text(mut self, kind: u16, text: &str) -> Self {
        self.text(kind, text);
        self
    }

    /// An attribute that is made of attributes.
    pub(super) fn with_nest(mut self, kind: u16, inner: impl FnOnce(&mut Self)) -> Self {
        self.nest(kind, inner);
        self
    }

    pub(super) fn attribute(&mut self, kind: u16, value: &[u8]) {
        // All of ours are far shorter than the 64 KiB that the length can tell.
        self.bytes.extend_from_slice(&((4 + value.len()) as u16).to_ne_bytes());
        self.bytes.extend_from_slice(&kind.to_ne_bytes());
        self.bytes.extend_from_slice(value);
        self.pad();
    }

    pub(super) fn text(&mut self, kind: u16, text: &str) {
        let mut value = text.as_bytes().to_vec();
        value.push(0);
        self.attribute(kind, &value);
    }

    /// An integer as nf_tables and conntrack take them.
    pub(super) fn big(&mut self, kind: u16, value: u32) {
        self.attribute(kind, &value.to_be_bytes());
    }

    pub(super) fn nest(&mut self, kind: u16, inner: impl FnOnce(&mut Self)) {
        let start = self.bytes.len();
        self.bytes.extend_from_slice(&[0; 4]);
        inner(self);
        let length = (self.bytes.len() - start) as u16;
        self.bytes[start..start + 2].copy_from_slice(&length.to_ne_bytes());
        self.bytes[start + 2..start + 4].copy_from_slice(&(kind | NESTED).to_ne_bytes());
    }

    /// A fixed part within a nest.
    pub(super) fn put(&mut self, part: &[u8]) {
        self.bytes.extend_from_slice(part);
        self.pad();
    }

    pub(super) fn len(&self) -> usize {
        self.bytes.len()
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }

    fn number(&mut self, sequence: u32, acknowledged: bool) {
        let length = self.bytes.len() as u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        if acknowledged {
            self.bytes[6] |= libc::NLM_F_ACK as u8;
        }
        self.bytes[8..12].copy_from_slice(&sequence.to_ne_bytes());
    }
}

/// A message that was refused, among several.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Refused {
    /// Which, counted from 0; the last one where the kernel names none.
    pub(super) index: usize,
    pub(super) errno: Errno,
}

/// A netlink socket.
#[derive(Debug)]
pub(super) struct Socket {
    fd: OwnedFd,
    sequence: u32,
    buffer: Vec<u8>,
}

impl Socket {
    /// In the calling thread's network namespace. `None` is `NETLINK_ROUTE`, whose number is 0.
    pub(super) fn open(protocol: Option<Protocol>) -> Result<Self, Errno> {
        Ok(Self::from_fd(raw(protocol)?))
    }

    /// One that was made elsewhere, in another network namespace: it acts on that. What is no socket of rtnetlink is refused.
    pub(super) fn adopt_route(fd: OwnedFd) -> Result<Self, Errno> {
        let is_netlink = rustix::net::sockopt::socket_domain(&fd)? == AddressFamily::NETLINK;
        if !is_netlink || rustix::net::sockopt::socket_protocol(&fd)?.is_some() {
            return Err(Errno::PROTONOSUPPORT);
        }
        Ok(Self::from_fd(fd))
    }

    fn from_fd(fd: OwnedFd) -> Self {
        // Both need CAP_NET_ADMIN over the first namespace, which tests in a namespace of their own have not: then the usual sizes do.
        let _ = rustix::net::sockopt::set_socket_send_buffer_size_force(&fd, QUEUE_BYTES);
        let _ = rustix::net::sockopt::set_socket_recv_buffer_size_force(&fd, QUEUE_BYTES);
        Self { fd, sequence: 0, buffer: vec![0; DATAGRAM_BYTES] }
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Sends one request and reads its acknowledgement.
    pub(super) fn ask(&mut self, message: Message) -> Result<(), Errno> {
        self.ask_all(vec![message]).map_err(|refused| refused.errno)
    }

    /// Sends requests that are carried out one after the other, whether one fails or not, and reads their acknowledgements. The first
    /// that was refused is told.
    pub(super) fn ask_all(&mut self, mut messages: Vec<Message>) -> Result<(), Refused> {
        let last = messages.len().saturating_sub(1);
        let first = self.send(&mut messages, |_| true).map_err(|errno| Refused { index: last, errno })?;
        let mut refused = None;
        for _ in 0..messages.len() {
            let answer = self.answer(first).map_err(|errno| Refused { index: last, errno })?;
            if let Err(found) = answer.result {
                refused.get_or_insert(Refused { index: answer.index.min(last), errno: found });
            }
        }
        refused.map_or(Ok(()), Err)
    }

    /// Sends one transaction: all of it is carried out, or nothing. The first and last message are its marks.
    pub(super) fn transact(&mut self, mut messages: Vec<Message>) -> Result<(), Refused> {
        let last = messages.len().saturating_sub(2);
        // The acknowledgement of the last change comes with the errors of all, when the transaction is over.
        let first = self.send(&mut messages, |index| index == last).map_err(|errno| Refused { index: last, errno })?;
        let (mut refused, mut acknowledged) = (None, false);
        loop {
            match self.answer(first) {
                Ok(Answer { index, result: Err(errno) }) => {
                    refused.get_or_insert(Refused { index: index.min(last), errno });
                }
                Ok(Answer { index, result: Ok(()) }) => acknowledged |= index == last,
                Err(Errno::PROTO) => break,
                Err(errno) => return Err(Refused { index: last, errno }),
            }
        }
        match refused {
            Some(refused) => Err(refused),
            None if acknowledged => Ok(()),
            None => Err(Refused { index: last, errno: Errno::PROTO }),
        }
    }

    /// Asks for all of a kind, and hands each to `each`.
    pub(super) fn dump(&mut self, message: &Message, mut each: impl FnMut(u16, &[u8])) -> Result<(), Errno> {
        for _ in 0..DUMPS_MAX {
            let mut parts = Vec::new();
            if self.dump_once(message.clone(), &mut parts)? {
                for (kind, body) in &parts {
                    each(*kind, body);
                }
                return Ok(());
            }
        }
        Err(Errno::BUSY)
    }

    /// False if something changed meanwhile, so that parts may be missing.
    fn dump_once(&mut self, mut message: Message, parts: &mut Vec<(u16, Vec<u8>)>) -> Result<bool, Errno> {
        message.bytes[6..8].copy_from_slice(&((libc::NLM_F_REQUEST | libc::NLM_F_DUMP) as u16).to_ne_bytes());
        let first = self.send(&mut [message], |_| false)?;
        let mut whole = true;
        loop {
            let read = self.receive()?;
            for part in Messages(&self.buffer[..read]) {
                if part.sequence != first {
                    continue;
                }
                whole &= part.flags & libc::NLM_F_DUMP_INTR as u16 == 0;
                if i32::from(part.kind) == libc::NLMSG_DONE {
                    return match part.body.first_chunk::<4>().map(|code| i32::from_ne_bytes(*code)) {
                        Some(code) if code < 0 => Err(Errno::from_raw_os_error(-code)),
                        _ => Ok(whole),
                    };
                }
                match part.outcome() {
                    Some(Ok(())) => return Ok(whole),
                    Some(Err(errno)) => return Err(errno),
                    None => parts.push((part.kind, part.body.to_vec())),
                }
            }
        }
    }

    /// The number of the first message.
    fn send(&mut self, messages: &mut [Message], acknowledged: impl Fn(usize) -> bool) -> Result<u32, Errno> {
        // What an earlier request left unread is of no use.
        while self.receive().is_ok() {}
        let first = self.sequence.wrapping_add(1);
        let mut bytes = Vec::with_capacity(messages.iter().map(Message::len).sum());
        for (index, message) in messages.iter_mut().enumerate() {
            message.number(first.wrapping_add(index as u32), acknowledged(index));
            bytes.extend_from_slice(&message.bytes);
        }
        self.sequence = first.wrapping_add(messages.len() as u32);
        let kernel = SocketAddrNetlink::new(0, 0);
        let sent = retry_on_intr(|| rustix::net::sendto(&self.fd, &bytes, SendFlags::DONTWAIT, &kernel))?;
        if sent == bytes.len() { Ok(first) } else { Err(Errno::MSGSIZE) }
    }

    /// The next acknowledgement or error of the requests from `first` on.
    fn answer(&mut self, first: u32) -> Result<Answer, Errno> {
        loop {
            let read = self.receive()?;
            for part in Messages(&self.buffer[..read]) {
                let index = part.sequence.wrapping_sub(first) as usize;
                if let Some(result) = part.outcome() {
                    return Ok(Answer { index, result });
                }
            }
        }
    }

    /// One datagram, which is there already.
    fn receive(&mut self) -> Result<usize, Errno> {
        let (read, length) =
            match retry_on_intr(|| rustix::net::recv(&self.fd, &mut self.buffer[..], RecvFlags::DONTWAIT | RecvFlags::TRUNC)) {
                Ok(received) => received,
                Err(Errno::AGAIN) => return Err(Errno::PROTO),
                Err(errno) => return Err(errno),
            };
        if length > read { Err(Errno::MSGSIZE) } else { Ok(read) }
    }
}

/// A socket that is told of changes. What it is told is not read, only that there was something: who is told looks for itself.
#[derive(Debug)]
pub(super) struct Events {
    fd: OwnedFd,
}

impl Events {
    /// Groups by their bits: group N is `1 << (N - 1)`.
    pub(super) fn open(protocol: Option<Protocol>, groups: u32) -> Result<Self, Errno> {
        let fd = raw(protocol)?;
        rustix::net::bind(&fd, &SocketAddrNetlink::new(0, groups))?;
        Ok(Self { fd })
    }

    pub(super) fn fd(&self) -> BorrowedFd<'_> {
        self.fd.as_fd()
    }

    /// Reads all that there is. What was lost counts as having come.
    pub(super) fn clear(&self) {
        let mut byte = [0_u8; 1];
        loop {
            match rustix::net::recv(&self.fd, &mut byte[..], RecvFlags::DONTWAIT | RecvFlags::TRUNC) {
                Ok(_) | Err(Errno::NOBUFS | Errno::INTR) => {}
                Err(_) => return,
            }
        }
    }
}

fn raw(protocol: Option<Protocol>) -> Result<OwnedFd, Errno> {
    rustix::net::socket_with(AddressFamily::NETLINK, SocketType::RAW, SocketFlags::CLOEXEC, protocol)
}

struct Answer {
    index: usize,
    result: Result<(), Errno>,
}

/// One message of a datagram.
struct Part<'a> {
    kind: u16,
    flags: u16,
    sequence: u32,
    body: &'a [u8],
}

impl Part<'_> {
    /// What `NLMSG_ERROR` says: 0 is an acknowledgement.
    fn outcome(&self) -> Option<Result<(), Errno>> {
        if i32::from(self.kind) != libc::NLMSG_ERROR {
            return None;
        }
        Some(match self.body.first_chunk::<4>().map(|code| i32::from_ne_bytes(*code)) {
            Some(0) => Ok(()),
            Some(code) if code < 0 => Err(Errno::from_raw_os_error(-code)),
            _ => Err(Errno::PROTO),
        })
    }
}

/// The messages of a datagram; ends at the first that is not whole.
struct Messages<'a>(&'a [u8]);

impl<'a> Iterator for Messages<'a> {
    type Item = Part<'a>;

    fn next(&mut self) -> Option<Part<'a>> {
        let [l0, l1, l2, l3, k0, k1, f0, f1, s0, s1, s2, s3, ..] = *self.0.first_chunk::<HEADER_BYTES>()?;
        let length = u32::from_ne_bytes([l0, l1, l2, l3]) as usize;
        let body = self.0.get(HEADER_BYTES..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some(Part {
            kind: u16::from_ne_bytes([k0, k1]),
            flags: u16::from_ne_bytes([f0, f1]),
            sequence: u32::from_ne_bytes([s0, s1, s2, s3]),
            body,
        })
    }
}

/// The attributes of a message or of a nest, behind its fixed part; ends at the first that is not whole.
#[derive(Clone)]
pub(super) struct Attributes<'a>(&'a [u8]);

impl<'a> Attributes<'a> {
    pub(super) fn new(bytes: &'a [u8]) -> Self {
        Self(bytes)
    }

    /// Behind a fixed part of a message.
    pub(super) fn after(fixed: usize, body: &'a [u8]) -> Self {
        Self(body.get(fixed..).unwrap_or_default())
    }

    /// The first of a kind.
    pub(super) fn get(&self, kind: u16) -> Option<&'a [u8]> {
        self.clone().find(|(found, _)| *found == kind).map(|(_, value)| value)
    }

    /// The first of a kind, as an integer of this machine.
    pub(super) fn native(&self, kind: u16) -> Option<u32> {
        self.get(kind)?.first_chunk().map(|bytes| u32::from_ne_bytes(*bytes))
    }

    /// The first of a kind, as an integer in the network's order.
    pub(super) fn big(&self, kind: u16) -> Option<u32> {
        self.get(kind)?.first_chunk().map(|bytes| u32::from_be_bytes(*bytes))
    }

    /// The first of a kind, as a text without the mark of its end.
    pub(super) fn text(&self, kind: u16) -> Option<&'a str> {
        let bytes = self.get(kind)?;
        std::str::from_utf8(bytes.strip_suffix(&[0]).unwrap_or(bytes)).ok()
    }
}

impl<'a> Iterator for Attributes<'a> {
    type Item = (u16, &'a [u8]);

    fn next(&mut self) -> Option<Self::Item> {
        let [l0, l1, k0, k1] = *self.0.first_chunk::<4>()?;
        let length = usize::from(u16::from_ne_bytes([l0, l1]));
        let value = self.0.get(4..length)?;
        self.0 = self.0.get(length.next_multiple_of(4)..).unwrap_or_default();
        Some((u16::from_ne_bytes([k0, k1]) & !TYPE_FLAGS, value))
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn attributes_are_read_as_they_were_written() {
        let message = Message::new(16, libc::NLM_F_CREATE)
            .fixed(&[1, 2, 3])
            .with(7, &[9])
            .with_text(8, "eth0")
            .with_nest(9, |inner| inner.big(1, 0x0102_0304));
        assert_eq!(message.len() % 4, 0);
        let attributes = Attributes::after(4, &message.bytes[HEADER_BYTES..]);
        assert_eq!(attributes.get(7), Some(&[9][..]));
        assert_eq!(attributes.text(8), Some("eth0"));
        assert_eq!(Attributes::new(attributes.get(9).expect("the nest")).big(1), Some(0x0102_0304));
        assert_eq!(attributes.clone().count(), 3);
        assert_eq!(attributes.get(10), None);
    }

    proptest! {
        #[test]
        fn foreign_bytes_are_read_without_harm(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
            for part in Messages(&bytes) {
                let _ = part.outcome();
                prop_assert!(Attributes::new(part.body).count() <= bytes.len());
            }
            prop_assert!(Attributes::new(&bytes).count() <= bytes.len() / 4 + 1);
        }
    }
}

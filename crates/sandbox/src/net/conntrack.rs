//! Connections that the kernel follows, forgotten with the instance whose they were: an answer to one must not reach the next instance
//! that has its address.

use std::net::Ipv4Addr;

use rustix::io::Errno;

use super::netlink::{Attributes, Message, Socket};
use super::nft::GENERAL_BYTES;

// Kinds and attributes of linux/netfilter/nfnetlink_conntrack.h, by their numbers.
const GET: i32 = 1;
const DELETE: i32 = 2;
const TUPLE_ORIG: u16 = 1;
const ID: u16 = 12;
const FILTER: u16 = 25;
const FILTER_ORIG_FLAGS: u16 = 1;
const FILTER_REPLY_FLAGS: u16 = 2;
const TUPLE_IP: u16 = 1;
const IP_V4_SRC: u16 = 1;
/// `CTA_FILTER_F_CTA_IP_SRC` of the kernel: of the tuple only the source address counts.
const BY_SOURCE: u32 = 1 << 0;

fn message(kind: i32) -> Message {
    Message::new((libc::NFNL_SUBSYS_CTNETLINK << 8 | kind) as u16, 0).fixed(&[libc::AF_INET as u8, 0, 0, 0])
}

/// Forgets every connection that an address began.
pub(super) fn forget(socket: &mut Socket, address: Ipv4Addr) -> Result<(), Errno> {
    let mut gone = Vec::new();
    socket.dump(&begun_by(address), |_, body| {
        let attributes = Attributes::after(GENERAL_BYTES, body);
        let Some(tuple) = attributes.get(TUPLE_ORIG) else { return };
        let source = Attributes::new(tuple).get(TUPLE_IP).and_then(|ip| Attributes::new(ip).big(IP_V4_SRC));
        // A kernel that does not know the filter tells of all.
        if source == Some(address.to_bits()) {
            let mut deletion = message(DELETE).with(TUPLE_ORIG | 1 << 15, tuple);
            if let Some(id) = attributes.get(ID) {
                deletion.attribute(ID, id);
            }
            gone.push(deletion);
        }
    })?;
    for deletion in gone {
        match socket.ask(deletion) {
            // It ended by itself.
            Ok(()) | Err(Errno::NOENT) => {}
            Err(errno) => return Err(errno),
        }
    }
    Ok(())
}

fn begun_by(address: Ipv4Addr) -> Message {
    message(GET).with_nest(TUPLE_ORIG, |tuple| tuple.nest(TUPLE_IP, |ip| ip.attribute(IP_V4_SRC, &address.octets()))).with_nest(
        FILTER,
        |filter| {
            filter.attribute(FILTER_ORIG_FLAGS, &BY_SOURCE.to_ne_bytes());
            filter.attribute(FILTER_REPLY_FLAGS, &0_u32.to_ne_bytes());
        },
    )
}

//! Firewalls of the host that drop what is to be forwarded, as Docker makes them.
//!
//! A packet passes only if every table lets it. In the chain FORWARD of iptables (the table `filter` of family ip) two rules go to the top;
//! they accept what comes from and goes to our interfaces, about which our own table has decided already. They bear the server's name
//! as a comment, by which they are found and removed. The chain may appear or be emptied at any time, so it is looked at again whenever
//! something changes. What other software has made in other tables is told, with the command that opens it.

use std::os::fd::{AsRawFd as _, OwnedFd};

use rustix::io::Errno;
use rustix::net::{AddressFamily, SocketFlags, SocketType};

use super::firewall::passing;
use super::link::PREFIX;
use super::netlink::Socket;
use super::nft::{self, Chain, Family, Table};
use super::range::Range;
use crate::step::checked;

/// Where iptables keeps what is forwarded.
const FORWARD: &str = "FORWARD";
/// `XT_TABLE_MAXNAMELEN` of linux/netfilter/x_tables.h.
const TABLE_BYTES: usize = 32;
/// `IPT_SO_GET_INFO` and `IPT_SO_GET_ENTRIES` of linux/netfilter_ipv4/ip_tables.h.
const GET_INFO: libc::c_int = 64;
const GET_ENTRIES: libc::c_int = 65;
/// `struct ipt_getinfo`.
const INFO_BYTES: usize = 84;
/// Where the entries stand in `struct ipt_get_entries`.
const ENTRIES_OFFSET: usize = 40;
/// Where an entry says how far its target is, and how long a target's head is.
const TARGET_OFFSET: usize = 88;
const TARGET_HEAD_BYTES: usize = 32;
/// `-NF_DROP - 1`.
const LEGACY_DROP: i32 = -1;
/// Largest table that is looked at.
const LEGACY_BYTES_MAX: usize = 16 << 20;

fn iptables() -> Table {
    Table { family: Family::Ip, name: "filter".to_owned() }
}

/// Lets our packets pass where iptables would drop them. Says what else would drop them, one line each.
pub(super) fn pass(socket: &mut Socket, range: Range, name: &str) -> Result<Vec<String>, Errno> {
    let chains = nft::chains(socket)?;
    if let Some(chain) = chains.iter().find(|chain| is_iptables(chain)) {
        let table = iptables();
        let rules = nft::rules(socket, &table, FORWARD)?;
        let ours = rules.iter().filter(|rule| rule.comment.as_deref() == Some(name)).count();
        // At the top, or what stands before them would be asked first.
        let placed = ours == 2 && rules.iter().take(2).all(|rule| rule.comment.as_deref() == Some(name));
        if !placed && (chain.drops || rules.len() > ours) {
            let mut changes = removals(&rules, name);
            changes.extend(passing(range).iter().map(|rule| table.insert(FORWARD, rule, name)));
            nft::transact(socket, changes).map_err(|refused| refused.errno)?;
        }
    }
    Ok(others(&chains, range))
}

/// Whether the chain of iptables drops what no rule of it decides.
pub(super) fn iptables_drops(chains: &[Chain]) -> bool {
    chains.iter().any(|chain| is_iptables(chain) && chain.drops)
}

/// What else drops what is forwarded, one line each with the commands that open it.
pub(super) fn others(chains: &[Chain], range: Range) -> Vec<String> {
    let dropping = chains.iter().filter(|chain| drops_forwarded(chain) && !is_iptables(chain));
    let mut said: Vec<String> = dropping.map(command).collect();
    if legacy_drops() {
        said.push(format!(
            "iptables-legacy drops what is forwarded: functions reach nothing until you run `iptables-legacy -I FORWARD -i {PREFIX}+ -s {range} -j ACCEPT` and `iptables-legacy -I FORWARD -o {PREFIX}+ -d {range} -j ACCEPT`"
        ));
    }
    said
}

/// Removes our rules from the chain of iptables.
pub(super) fn put_back(socket: &mut Socket, name: &str) -> Result<(), Errno> {
    if !nft::chains(socket)?.iter().any(is_iptables) {
        return Ok(());
    }
    let rules = nft::rules(socket, &iptables(), FORWARD)?;
    let changes = removals(&rules, name);
    if changes.is_empty() { Ok(()) } else { nft::transact(socket, changes).map_err(|refused| refused.errno) }
}

fn removals(rules: &[nft::Rule], name: &str) -> Vec<super::netlink::Message> {
    let ours = rules.iter().filter(|rule| rule.comment.as_deref() == Some(name));
    ours.map(|rule| iptables().delete_rule(FORWARD, rule.handle)).collect()
}

fn is_iptables(chain: &Chain) -> bool {
    i32::from(chain.family) == libc::NFPROTO_IPV4 && chain.table == "filter" && chain.name == FORWARD && forwards(chain)
}

fn forwards(chain: &Chain) -> bool {
    chain.hook == Some(libc::NF_INET_FORWARD.cast_unsigned())
}

/// A base chain of IPv4 that drops what no rule of it decides.
fn drops_forwarded(chain: &Chain) -> bool {
    let family = i32::from(chain.family);
    (family == libc::NFPROTO_IPV4 || family == libc::NFPROTO_INET) && forwards(chain) && chain.drops
}

fn command(chain: &Chain) -> String {
    let family = if i32::from(chain.family) == libc::NFPROTO_INET { "inet" } else { "ip" };
    let place = format!("{family} {} {}", chain.table, chain.name);
    format!(
        "the chain {place} drops what is forwarded: functions reach only what its rules accept, unless you run `nft insert rule {place} iifname \"{PREFIX}*\" accept` and `nft insert rule {place} oifname \"{PREFIX}*\" accept`"
    )
}

/// Whether the old kind of iptables, which has tables of its own, drops what is forwarded.
fn legacy_drops() -> bool {
    // Asking for a table would make it: only those are asked for that there are.
    let names = std::fs::read_to_string("/proc/thread-self/net/ip_tables_names").unwrap_or_default();
    names.lines().any(|name| name == "filter") && legacy_policy().is_ok_and(|policy| policy == LEGACY_DROP)
}

/// The verdict at the end of the chain FORWARD.
fn legacy_policy() -> Result<i32, Errno> {
    let socket = rustix::net::socket_with(AddressFamily::INET, SocketType::DGRAM, SocketFlags::CLOEXEC, None)?;
    let mut info = [0_u8; INFO_BYTES];
    info[..6].copy_from_slice(b"filter");
    get(&socket, GET_INFO, &mut info)?;
    // Name, valid hooks, five first entries, five last entries, number of entries, size.
    let word = |at: usize| u32::from_ne_bytes([info[at], info[at + 1], info[at + 2], info[at + 3]]);
    let last = word(TABLE_BYTES + 4 + 20 + 4 * libc::NF_INET_FORWARD as usize) as usize;
    let size = word(INFO_BYTES - 4);
    let whole = ENTRIES_OFFSET + size as usize;
    if whole > LEGACY_BYTES_MAX {
        return Err(Errno::FBIG);
    }
    let mut entries = vec![0_u8; whole];
    entries[..6].copy_from_slice(b"filter");
    entries[TABLE_BYTES..TABLE_BYTES + 4].copy_from_slice(&size.to_ne_bytes());
    get(&socket, GET_ENTRIES, &mut entries)?;
    let entry = entries.get(ENTRIES_OFFSET + last..).ok_or(Errno::PROTO)?;
    let target = entry.get(TARGET_OFFSET..TARGET_OFFSET + 2).ok_or(Errno::PROTO)?;
    let verdict = usize::from(u16::from_ne_bytes([target[0], target[1]])) + TARGET_HEAD_BYTES;
    let verdict = entry.get(verdict..verdict + 4).ok_or(Errno::PROTO)?;
    Ok(i32::from_ne_bytes([verdict[0], verdict[1], verdict[2], verdict[3]]))
}

fn get(socket: &OwnedFd, option: libc::c_int, value: &mut [u8]) -> Result<(), Errno> {
    let mut length = value.len() as libc::socklen_t;
    // SAFETY: the buffer is live and its length is passed; the kernel writes at most that many bytes. rustix does not know the options
    // of iptables.
    let result =
        unsafe { libc::getsockopt(socket.as_raw_fd(), libc::IPPROTO_IP, option, value.as_mut_ptr().cast(), &raw mut length) };
    checked(result.into())?;
    if length as usize == value.len() { Ok(()) } else { Err(Errno::PROTO) }
}

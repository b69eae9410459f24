//! What is changed on the host, and put back: the switches that let packets pass from one interface to another, rules in the tables of
//! iptables, and the range of addresses.
//!
//! The kernel forwards a packet if the interface that it came by may (`net.ipv4.conf.IF.forwarding`). Answers to an instance come by the
//! host's own interfaces, so these must be switched on too. That is done for each alone, and what the host does not forward without us
//! it does not forward with us either: see `forwarding` in the firewall. Where `net.ipv4.ip_forward` is on, nothing is changed.
//!
//! Every change is written down in the file `net` of the data directory before it is made. Whoever finds that file at a start has been
//! killed, and puts back what it says.

use std::collections::BTreeSet;
use std::fmt::Write as _;
use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;

use super::link::{Interface, Route};
use super::range::Range;
use crate::step::errno_of;

/// Names in the data directory.
const FILE: &str = "net";
const UNFINISHED: &str = "net.new";
/// First line of the file.
const VERSION: &str = "funtainer network 1";
/// Longest file: beyond that it is none of ours.
const FILE_BYTES_MAX: u64 = 64 << 10;

/// What has been changed.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Changed {
    /// The range that is claimed.
    pub(super) range: Option<Range>,
    /// Interfaces whose forwarding was off.
    pub(super) forwarding: BTreeSet<String>,
}

/// The file that says it.
#[derive(Debug)]
pub(super) struct Record {
    directory: OwnedFd,
    /// The boot and the network namespace that the changes are of: in others there are none.
    place: String,
    pub(super) changed: Changed,
}

impl Record {
    /// Reads what a former process has left, if it was of this boot and this network namespace.
    pub(super) fn open(directory: OwnedFd) -> io::Result<Self> {
        let place = place()?;
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let text = match rustix::fs::openat(&directory, FILE, flags, Mode::empty()) {
            Ok(file) => {
                let mut text = String::new();
                fs::File::from(file).take(FILE_BYTES_MAX).read_to_string(&mut text)?;
                text
            }
            Err(Errno::NOENT) => String::new(),
            Err(errno) => return Err(errno.into()),
        };
        let changed = parse(&text, &place).unwrap_or_default();
        Ok(Self { directory, place, changed })
    }

    /// Whether there is anything to put back.
    pub(super) fn is_empty(&self) -> bool {
        self.changed == Changed::default()
    }

    /// Writes down what is about to be changed.
    pub(super) fn note(&mut self, change: impl FnOnce(&mut Changed)) -> io::Result<()> {
        let mut changed = self.changed.clone();
        change(&mut changed);
        if changed == self.changed {
            return Ok(());
        }
        self.write(&changed)?;
        self.changed = changed;
        Ok(())
    }

    /// Everything is put back.
    pub(super) fn remove(&mut self) -> io::Result<()> {
        self.changed = Changed::default();
        for name in [FILE, UNFINISHED] {
            match rustix::fs::unlinkat(&self.directory, name, AtFlags::empty()) {
                Ok(()) | Err(Errno::NOENT) => {}
                Err(errno) => return Err(errno.into()),
            }
        }
        Ok(())
    }

    /// Whole or not at all. That it outlives a loss of power is not needed: the changes do not.
    fn write(&self, changed: &Changed) -> io::Result<()> {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::TRUNC | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let file = rustix::fs::openat(&self.directory, UNFINISHED, flags, Mode::from_raw_mode(0o644))?;
        fs::File::from(file).write_all(format(changed, &self.place).as_bytes())?;
        rustix::fs::renameat(&self.directory, UNFINISHED, &self.directory, FILE)?;
        Ok(())
    }
}

/// The boot and the network namespace of this thread.
fn place() -> io::Result<String> {
    let boot = fs::read_to_string("/proc/sys/kernel/random/boot_id")?;
    let namespace = fs::read_link("/proc/thread-self/ns/net")?;
    Ok(format!("{} {}", boot.trim(), namespace.display()))
}

fn format(changed: &Changed, place: &str) -> String {
    let mut text = format!("{VERSION}\nplace {place}\n");
    if let Some(range) = changed.range {
        let _ = writeln!(text, "range {range}");
    }
    for name in &changed.forwarding {
        let _ = writeln!(text, "forwarding {name}");
    }
    text
}

/// `None` for what is not ours, or of another place.
fn parse(text: &str, place: &str) -> Option<Changed> {
    let mut lines = text.lines();
    (lines.next() == Some(VERSION)).then_some(())?;
    (lines.next()?.strip_prefix("place ") == Some(place)).then_some(())?;
    let mut changed = Changed::default();
    for line in lines {
        match line.split_once(' ')? {
            ("range", range) => changed.range = Some(range.parse().ok()?),
            ("forwarding", name) if is_name(name) => {
                changed.forwarding.insert(name.to_owned());
            }
            _ => return None,
        }
    }
    Some(changed)
}

/// Whether a text can be the name of an interface, and so a part of a path.
fn is_name(name: &str) -> bool {
    let fine = |byte: u8| byte != b'/' && !byte.is_ascii_whitespace() && byte != 0;
    !name.is_empty() && name.len() < libc::IFNAMSIZ && name != "." && name != ".." && name.bytes().all(fine)
}

/// Interfaces by which packets can come that are for instances: those that routes of the host lead to, but not our own.
pub(super) fn outward<'a>(interfaces: &'a [Interface], routes: &[Route], group: u32) -> Vec<&'a Interface> {
    let leads = |interface: &&Interface| {
        let index = Some(interface.index);
        routes.iter().any(|route| route.kind == libc::RTN_UNICAST && route.by == index)
    };
    let foreign = |interface: &&Interface| !interface.is_loopback() && interface.group != group;
    interfaces.iter().filter(foreign).filter(leads).collect()
}

/// Largest packet of the interface that the default route leads to; 1,500 bytes where there is none.
pub(super) fn mtu(interfaces: &[Interface], routes: &[Route]) -> u32 {
    let default = routes.iter().filter(|route| route.prefix == 0 && route.table == u32::from(libc::RT_TABLE_MAIN));
    let mtus = default.filter_map(|route| interfaces.iter().find(|interface| Some(interface.index) == route.by));
    // 68 bytes are the least that IPv4 works with (RFC 791), 65,535 the most that a veth takes.
    mtus.map(|interface| interface.mtu).min().unwrap_or(1500).clamp(68, 65_535)
}

/// Whether all interfaces forward.
pub(super) fn forwards_all() -> Result<bool, Errno> {
    read("/proc/sys/net/ipv4/ip_forward")
}

/// Whether an interface forwards.
pub(super) fn forwards(name: &str) -> Result<bool, Errno> {
    read(&forwarding(name))
}

/// Switches forwarding of an interface.
pub(super) fn set_forwards(name: &str, on: bool) -> Result<(), Errno> {
    fs::write(forwarding(name), if on { "1" } else { "0" }).map_err(|error| errno_of(&error))
}

/// No IPv6 on one of our interfaces. Without IPv6 in the kernel there is nothing to switch off.
pub(super) fn without_ipv6(name: &str) -> Result<(), Errno> {
    match fs::write(format!("/proc/sys/net/ipv6/conf/{name}/disable_ipv6"), "1") {
        Err(error) if error.kind() != io::ErrorKind::NotFound => Err(errno_of(&error)),
        _ => Ok(()),
    }
}

fn forwarding(name: &str) -> String {
    format!("/proc/sys/net/ipv4/conf/{name}/forwarding")
}

fn read(path: &str) -> Result<bool, Errno> {
    fs::read_to_string(path).map(|text| text.trim() != "0").map_err(|error| errno_of(&error))
}

/// Waits until no other process changes the host for this data directory: one that was left by a killed keeper may still be putting
/// things back. The lock is on the file `id`, which is always there and which nobody else locks; the kernel releases it.
pub(super) fn lock(directory: BorrowedFd<'_>) -> io::Result<OwnedFd> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, "id", flags, Mode::empty())?;
    rustix::io::retry_on_intr(|| rustix::fs::flock(file.as_fd(), rustix::fs::FlockOperation::LockExclusive))?;
    Ok(file)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn directory() -> (tempfile::TempDir, OwnedFd) {
        let made = tempfile::tempdir().expect("a directory");
        let opened = fs::File::open(made.path()).expect("the directory").into();
        (made, opened)
    }

    #[test]
    fn what_was_noted_is_read_by_the_next_process() {
        let (made, opened) = directory();
        let again = || fs::File::open(made.path()).expect("the directory").into();
        let mut record = Record::open(opened).expect("a record");
        assert!(record.is_empty());
        record.note(|changed| changed.range = "10.208.0.0/20".parse().ok()).expect("a note");
        record.note(|changed| changed.forwarding.extend(["eth0".to_owned(), "wlan0".to_owned()])).expect("a note");
        let mut next = Record::open(again()).expect("a record");
        assert_eq!(next.changed, record.changed);
        next.remove().expect("no record");
        assert_eq!(fs::read_dir(made.path()).expect("the directory").count(), 0);
        assert!(Record::open(again()).expect("a record").is_empty());
    }

    #[test]
    fn a_record_of_another_boot_or_namespace_or_form_says_nothing() {
        let place = "boot net:[1]";
        let changed = Changed { range: None, forwarding: BTreeSet::from(["eth0".to_owned()]) };
        let text = format(&changed, place);
        assert_eq!(parse(&text, place), Some(changed));
        for (text, place) in [
            (text.as_str(), "boot net:[2]"),
            ("", place),
            ("funtainer network 2\nplace boot net:[1]\n", place),
            ("funtainer network 1\nplace boot net:[1]\nforwarding ../../kernel\n", place),
            ("funtainer network 1\nplace boot net:[1]\nforwarding ..\n", place),
            ("funtainer network 1\nplace boot net:[1]\nrange 10.0.0.0/33\n", place),
            ("funtainer network 1\nplace boot net:[1]\nother x\n", place),
        ] {
            assert_eq!(parse(text, place), None, "{text}");
        }
    }

    proptest! {
        #[test]
        fn foreign_text_is_read_without_harm(text in ".{0,200}") {
            let _ = parse(&text, "x");
            let _ = parse(&format!("{VERSION}\nplace x\n{text}"), "x");
        }
    }
}

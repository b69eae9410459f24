//! When an instance that listens can take its first call, and where.
//!
//! What really listens decides: the port that the function was told, if something listens there, else the only other one. As long as
//! the first is possible the second is not taken: it must have been the only one for [`ELSEWHERE_SETTLES`], since many servers open a
//! port for themselves before the one for callers. A revision whose port was found elsewhere once is tried there first from then on.

use std::collections::BTreeSet;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::os::fd::OwnedFd;
use std::time::{Duration, Instant};

use crate::listeners;
use crate::sockets::{Attempt, Sockets, attempt};
use crate::timer::Timer;

/// Shortest pause between two tries; a refused try costs 15 µs.
const PAUSE_MIN: Duration = Duration::from_micros(100);
/// Longest pause.
const PAUSE_MAX: Duration = Duration::from_millis(5);
/// A pause is this part of the time gone so far: it adds at most 6 % to a start, and reaches [`PAUSE_MAX`] after 80 ms.
const PAUSE_PART: u32 = 16;
/// IPv6 is tried this many times less often: servers that listen on IPv6 alone are rare.
const V6_EVERY: u32 = 4;
/// How often the tables of listeners are read; it takes about 50 µs.
const TABLES_PAUSE: Duration = Duration::from_millis(50);
/// How long another port than the one told must be the only one before it is taken.
const ELSEWHERE_SETTLES: Duration = Duration::from_secs(1);

/// What is waited for.
pub(crate) struct Wanted<'a> {
    /// Pid of the instance's first process.
    pub(crate) pid: u32,
    /// Ports by which it is ready at once, best first.
    pub(crate) ports: &'a [u16],
    /// Ports of the platform's own listeners inside.
    pub(crate) own: &'a [u16],
    /// When to give up.
    pub(crate) deadline: Instant,
}

/// Where the instance was found.
pub(crate) struct Found {
    pub(crate) address: SocketAddr,
    /// A connection to it.
    pub(crate) connection: OwnedFd,
}

/// Why it was not.
#[derive(Debug)]
pub(crate) enum NotReady {
    /// In time. What listened in the end.
    Timeout(BTreeSet<u16>),
    /// The platform fails.
    Io(io::Error),
}

impl From<io::Error> for NotReady {
    fn from(error: io::Error) -> Self {
        Self::Io(error)
    }
}

/// Waits until the instance accepts a connection. Dropping the future ends the wait.
pub(crate) async fn wait(sockets: &Sockets, wanted: &Wanted<'_>) -> Result<Found, NotReady> {
    let began = Instant::now();
    let mut timer = None;
    let mut probes = Probes { sockets, held: Vec::new() };
    let mut elsewhere = Elsewhere { tables_due: began + TABLES_PAUSE, only: None, seen: BTreeSet::new() };
    for round in 0_u32.. {
        for &port in wanted.ports {
            if let Some(found) = probes.attempt((Ipv4Addr::LOCALHOST, port).into()).await? {
                return Ok(found);
            }
            if round % V6_EVERY == V6_EVERY - 1
                && let Some(found) = probes.attempt((Ipv6Addr::LOCALHOST, port).into()).await?
            {
                return Ok(found);
            }
        }
        let now = Instant::now();
        for address in elsewhere.candidates(wanted, now) {
            if let Some(found) = probes.attempt(address).await? {
                return Ok(found);
            }
        }
        if now >= wanted.deadline {
            break;
        }
        let pause = ((now - began) / PAUSE_PART).clamp(PAUSE_MIN, PAUSE_MAX);
        let timer = match &mut timer {
            Some(timer) => timer,
            none => none.insert(Timer::new()?),
        };
        timer.pause(pause).await?;
    }
    Err(NotReady::Timeout(elsewhere.seen))
}

/// One socket for each address that is tried; unconnected ones go back at the end.
struct Probes<'a> {
    sockets: &'a Sockets,
    held: Vec<(SocketAddr, OwnedFd)>,
}

impl Probes<'_> {
    async fn attempt(&mut self, address: SocketAddr) -> io::Result<Option<Found>> {
        let at = if let Some(at) = self.held.iter().position(|(held, _)| *held == address) {
            at
        } else {
            let fd = loop {
                match self.sockets.take(&address) {
                    Some(fd) => break fd,
                    None => self.sockets.provide(&address).await?,
                }
            };
            self.held.push((address, fd));
            self.held.len() - 1
        };
        match attempt(&self.held[at].1, &address)? {
            Attempt::Connected => Ok(Some(Found { address, connection: self.held.swap_remove(at).1 })),
            Attempt::Refused | Attempt::Pending => Ok(None),
        }
    }
}

impl Drop for Probes<'_> {
    fn drop(&mut self) {
        for (address, fd) in self.held.drain(..) {
            // One whose connection is still undecided cannot be used for another address.
            if matches!(attempt(&fd, &address), Ok(Attempt::Refused)) {
                self.sockets.put_back(&address, fd);
            }
        }
    }
}

/// What listens elsewhere, and since when it is the only port.
struct Elsewhere {
    tables_due: Instant,
    only: Option<(u16, Instant)>,
    seen: BTreeSet<u16>,
}

impl Elsewhere {
    /// Addresses to try besides the usual ones. Reads the tables when it is time to.
    fn candidates(&mut self, wanted: &Wanted<'_>, now: Instant) -> Vec<SocketAddr> {
        if now < self.tables_due && now < wanted.deadline {
            return Vec::new();
        }
        self.tables_due = now + TABLES_PAUSE;
        // An instance that has just ended has no tables: its end is noticed elsewhere.
        let Ok(listeners) = listeners::of_process(wanted.pid) else { return Vec::new() };
        self.seen = listeners::ports(&listeners, wanted.own);
        if let Some(port) = wanted.ports.iter().find(|port| self.seen.contains(port)) {
            // On another address than the usual ones.
            return listeners::reachable(&listeners, *port);
        }
        let only = if self.seen.len() == 1 { self.seen.first().copied() } else { None };
        self.only = match (only, self.only) {
            (Some(port), Some((before, since))) if port == before => Some((port, since)),
            (only, _) => only.map(|port| (port, now)),
        };
        match self.only {
            Some((port, since)) if now - since >= ELSEWHERE_SETTLES || now >= wanted.deadline => {
                listeners::reachable(&listeners, port)
            }
            _ => Vec::new(),
        }
    }
}

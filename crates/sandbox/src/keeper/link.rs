//! A non-blocking seqpacket socket with what could not be sent yet. The keeper never waits for who reads at the other end.

use std::collections::VecDeque;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::io::Errno;
use rustix::net::SendFlags;

use crate::fds;

/// Most messages that wait; the kernel's buffer holds some hundred besides.
const QUEUE_MAX: usize = 8192;
/// From here on nothing more is read from a peer that does not read: it would only ask for more answers.
const QUEUE_BUSY: usize = 64;
/// How long a peer may read nothing while messages wait.
const STALL_MAX: Duration = Duration::from_secs(10);

/// Why a peer is given up.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Fault {
    /// It is gone.
    Gone,
    /// It does not read.
    Stalled,
}

struct Waiting {
    bytes: Vec<u8>,
    descriptors: Vec<OwnedFd>,
}

/// One end of a pair, watched by an epoll.
pub(super) struct Link {
    socket: OwnedFd,
    token: u64,
    queue: VecDeque<Waiting>,
    /// When the kernel last took a message, while some wait.
    since: Instant,
}

impl Link {
    /// Watches `socket` under `token`.
    pub(super) fn new(socket: OwnedFd, epoll: &OwnedFd, token: u64) -> Result<Self, Errno> {
        rustix::io::ioctl_fionbio(&socket, true)?;
        epoll::add(epoll, &socket, EventData::new_u64(token), EventFlags::IN)?;
        Ok(Self { socket, token, queue: VecDeque::new(), since: Instant::now() })
    }

    pub(super) fn socket(&self) -> BorrowedFd<'_> {
        self.socket.as_fd()
    }

    /// Whether the peer reads well enough to be read from.
    pub(super) fn is_busy(&self) -> bool {
        self.queue.len() >= QUEUE_BUSY
    }

    /// Sends now, or keeps a copy for later.
    pub(super) fn send(&mut self, epoll: &OwnedFd, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) -> Result<(), Fault> {
        if self.queue.is_empty() {
            match fds::send(self.socket.as_fd(), bytes, descriptors, SendFlags::DONTWAIT) {
                Ok(()) => return Ok(()),
                Err(Errno::AGAIN) => self.since = Instant::now(),
                Err(_) => return Err(Fault::Gone),
            }
        }
        if self.queue.len() >= QUEUE_MAX {
            return Err(Fault::Stalled);
        }
        let copies =
            descriptors.iter().map(BorrowedFd::try_clone_to_owned).collect::<Result<_, _>>().map_err(|_| Fault::Stalled)?;
        self.queue.push_back(Waiting { bytes: bytes.to_vec(), descriptors: copies });
        self.watch(epoll)
    }

    /// Sends what waits, as far as the kernel takes it.
    pub(super) fn flush(&mut self, epoll: &OwnedFd) -> Result<(), Fault> {
        while let Some(first) = self.queue.front() {
            let descriptors: Vec<_> = first.descriptors.iter().map(AsFd::as_fd).collect();
            match fds::send(self.socket.as_fd(), &first.bytes, &descriptors, SendFlags::DONTWAIT) {
                Ok(()) => {
                    self.queue.pop_front();
                    self.since = Instant::now();
                }
                Err(Errno::AGAIN) => break,
                Err(_) => return Err(Fault::Gone),
            }
        }
        self.watch(epoll)
    }

    /// When the peer counts as stalled, unless it reads.
    pub(super) fn deadline(&self) -> Option<Instant> {
        (!self.queue.is_empty()).then(|| self.since + STALL_MAX)
    }

    fn watch(&self, epoll: &OwnedFd) -> Result<(), Fault> {
        let mut flags = EventFlags::empty();
        if !self.is_busy() {
            flags |= EventFlags::IN;
        }
        if !self.queue.is_empty() {
            flags |= EventFlags::OUT;
        }
        epoll::modify(epoll, &self.socket, EventData::new_u64(self.token), flags).map_err(|_| Fault::Gone)
    }
}

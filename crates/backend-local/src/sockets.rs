//! Connections into an instance: unconnected sockets that its first process made inside, and that are connected here.
//!
//! A socket that was refused can be connected again, so the same ones are the probe of readiness. When few are left, more are asked for.

use std::io;
use std::net::{SocketAddr, TcpStream as StdStream};
use std::os::fd::OwnedFd;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError, Weak};
use std::time::Duration;

use funtainer_contract::{BoxFuture, Connect};
use funtainer_model::InstanceId;
use funtainer_sandbox::fds::Fds;
use funtainer_sandbox::protocol::{InitMessage, Request, SocketCounts};
use rustix::io::Errno;
use tokio::net::TcpStream;

use crate::link::Link;
use crate::pair::InitPair;

/// Sockets that are made before the start: twelve calls at once have a connection each before more must be asked for.
pub(crate) const AT_START: SocketCounts = SocketCounts { v4: 12, v6: 4 };
/// More are asked for when fewer than this are left.
const LOW: usize = 4;
/// Unconnected sockets of one family kept at most; each holds its instance's network namespace and a descriptor of this process.
const KEPT_MAX: usize = 32;
/// How long a zygote may take to make sockets; it takes about 50 µs.
const REFILL_TIME_MAX: Duration = Duration::from_secs(5);
/// How soon a connection is asked for again where a server's queue is full, at first and at most.
const QUEUE_PAUSE_MIN: Duration = Duration::from_millis(1);
const QUEUE_PAUSE_MAX: Duration = Duration::from_millis(32);
/// How long the connection that found the instance ready waits for the first call. A server with one worker may take nobody else meanwhile.
const FIRST_TIME_MAX: Duration = Duration::from_secs(1);

/// The sockets of one instance.
pub(crate) struct Sockets {
    link: Weak<Link>,
    instance: InstanceId,
    state: Mutex<State>,
    /// Held by who asks for more.
    refill: tokio::sync::Mutex<()>,
}

#[derive(Default)]
struct State {
    v4: Vec<OwnedFd>,
    v6: Vec<OwnedFd>,
    target: Option<SocketAddr>,
    /// The connection that found the instance ready.
    first: Option<OwnedFd>,
}

/// How a try to connect stands.
#[derive(Debug, PartialEq, Eq)]
pub(crate) enum Attempt {
    /// Connected.
    Connected,
    /// Nobody listens there; the socket can be used again.
    Refused,
    /// Not decided: try the same socket and address again.
    Pending,
}

impl Sockets {
    pub(crate) fn new(link: &Arc<Link>, instance: InstanceId) -> Self {
        let (link, refill) = (Arc::downgrade(link), tokio::sync::Mutex::new(()));
        Self { link, instance, state: Mutex::default(), refill }
    }

    /// Takes in what came with a message.
    pub(crate) fn add(&self, counts: SocketCounts, fds: Fds) -> io::Result<()> {
        let mut state = self.lock();
        for (place, fd) in fds.into_iter().enumerate() {
            rustix::io::ioctl_fionbio(&fd, true)?;
            let family = if place < counts.v4.into() { &mut state.v4 } else { &mut state.v6 };
            if family.len() < KEPT_MAX {
                family.push(fd);
            }
        }
        Ok(())
    }

    /// A socket for the address's family, if one is here.
    pub(crate) fn take(&self, address: &SocketAddr) -> Option<OwnedFd> {
        self.lock().family(address).pop()
    }

    /// Gives an unconnected one back.
    pub(crate) fn put_back(&self, address: &SocketAddr, fd: OwnedFd) {
        self.lock().family(address).push(fd);
    }

    /// The instance was found ready at `target`, by this connection. It is the first call's, if one comes soon.
    pub(crate) fn ready(self: &Arc<Self>, target: SocketAddr, first: Option<OwnedFd>) {
        let mut state = self.lock();
        state.target = Some(target);
        // Those of the other family are only needed for a dialect that connects elsewhere.
        let other = if target.is_ipv4() { &mut state.v6 } else { &mut state.v4 };
        other.clear();
        if first.is_some() {
            state.first = first;
            let sockets = Arc::downgrade(self);
            tokio::spawn(async move {
                tokio::time::sleep(FIRST_TIME_MAX).await;
                if let Some(sockets) = sockets.upgrade() {
                    let unused = sockets.lock().first.take();
                    drop(unused);
                }
            });
        }
    }

    /// Closes everything: the instance has ended.
    pub(crate) fn close(&self) {
        let closed = std::mem::take(&mut *self.lock());
        drop(closed);
    }

    /// Makes sure that a socket for the address's family is here, and asks for more if none is.
    pub(crate) async fn provide(&self, address: &SocketAddr) -> io::Result<()> {
        let _turn = self.refill.lock().await;
        // Somebody else's turn may have brought some.
        if self.lock().family(address).is_empty() {
            tokio::time::timeout(REFILL_TIME_MAX, self.ask()).await.map_err(|_| io::Error::from(io::ErrorKind::TimedOut))??;
        }
        Ok(())
    }

    async fn ask(&self) -> io::Result<()> {
        let link = self.link.upgrade().ok_or_else(|| io::Error::other("the platform is stopping"))?;
        let (mut pair, theirs) = InitPair::new()?;
        let request = Request::MoreSockets { instance: self.instance };
        link.command(&request, vec![theirs]).await.map_err(io::Error::other)?;
        match pair.next().await? {
            Some((InitMessage::Sockets(counts), fds)) => self.add(counts, fds),
            Some(_) => Err(io::Error::other("another message than sockets")),
            None => Err(io::Error::other("the instance has ended")),
        }
    }

    async fn connect_to(self: Arc<Self>, other: Option<SocketAddr>) -> io::Result<TcpStream> {
        let (address, first) = {
            let mut state = self.lock();
            let first = if other.is_none() { state.first.take() } else { None };
            (other.or(state.target).ok_or(io::ErrorKind::NotConnected)?, first)
        };
        if let Some(first) = first {
            return TcpStream::from_std(StdStream::from(first));
        }
        let fd = loop {
            let (fd, left) = {
                let mut state = self.lock();
                let family = state.family(&address);
                (family.pop(), family.len())
            };
            match fd {
                Some(fd) => {
                    if left < LOW {
                        self.refill_behind(address);
                    }
                    break fd;
                }
                None => self.provide(&address).await?,
            }
        };
        if !insist(&fd, &address).await? {
            self.put_back(&address, fd);
            return Err(io::ErrorKind::ConnectionRefused.into());
        }
        TcpStream::from_std(StdStream::from(fd))
    }

    /// Asks for more on the side, unless somebody does already.
    fn refill_behind(self: &Arc<Self>, address: SocketAddr) {
        if self.refill.try_lock().is_err() {
            return;
        }
        let sockets = Arc::downgrade(self);
        tokio::spawn(async move {
            let Some(sockets) = sockets.upgrade() else { return };
            let Ok(_turn) = sockets.refill.try_lock() else { return };
            if sockets.lock().family(&address).len() < LOW
                && let Err(error) =
                    tokio::time::timeout(REFILL_TIME_MAX, sockets.ask()).await.map_err(io::Error::other).flatten()
            {
                // Who needs one asks again and gets the error.
                tracing::debug!(instance = %sockets.instance, %error, "no more sockets");
            }
        });
    }

    fn lock(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl State {
    fn family(&mut self, address: &SocketAddr) -> &mut Vec<OwnedFd> {
        if address.is_ipv4() { &mut self.v4 } else { &mut self.v6 }
    }
}

/// Connections to a ready instance, as dialects make them.
pub(crate) struct Connector(pub(crate) Arc<Sockets>);

impl Connect for Connector {
    fn connect(&self, other: Option<SocketAddr>) -> BoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(Arc::clone(&self.0).connect_to(other))
    }
}

/// Connects a non-blocking socket, or asks how that stands. Over the loopback interface the answer mostly comes within the first call,
/// and a second one tells it (the kernel's `inet_stream_connect`); a refused socket is then as it was before, its bound address included.
pub(crate) fn attempt(fd: &OwnedFd, address: &SocketAddr) -> io::Result<Attempt> {
    let mut begun = false;
    loop {
        return match rustix::net::connect(fd, address) {
            Ok(()) | Err(Errno::ISCONN) => Ok(Attempt::Connected),
            Err(Errno::INPROGRESS) if !begun => {
                begun = true;
                continue;
            }
            Err(Errno::INPROGRESS | Errno::ALREADY) => Ok(Attempt::Pending),
            Err(Errno::INTR) => continue,
            Err(Errno::CONNREFUSED | Errno::CONNABORTED | Errno::CONNRESET | Errno::ADDRNOTAVAIL | Errno::NETUNREACH) => {
                Ok(Attempt::Refused)
            }
            Err(error) => Err(error.into()),
        };
    }
}

/// Connects, or says false where nobody listens. A server whose queue is full drops what asks for a connection, and the kernel would ask
/// again after a second only: here it is asked anew after milliseconds.
async fn insist(fd: &OwnedFd, address: &SocketAddr) -> io::Result<bool> {
    let mut pause = QUEUE_PAUSE_MIN;
    loop {
        match attempt(fd, address)? {
            Attempt::Connected => return Ok(true),
            Attempt::Refused => return Ok(false),
            Attempt::Pending => {}
        }
        tokio::time::sleep(pause).await;
        if attempt(fd, address)? == Attempt::Connected {
            return Ok(true);
        }
        // The bound address stays (tcp_disconnect of the kernel).
        rustix::net::connect_unspec(fd)?;
        pause = QUEUE_PAUSE_MAX.min(pause * 2);
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use rustix::net::{AddressFamily, SocketFlags, SocketType};

    use super::*;

    fn unconnected() -> OwnedFd {
        rustix::net::socket_with(AddressFamily::INET, SocketType::STREAM, SocketFlags::CLOEXEC | SocketFlags::NONBLOCK, None)
            .unwrap()
    }

    #[tokio::test]
    async fn a_full_queue_is_waited_for_without_the_kernels_second() {
        let listener = rustix::net::socket(AddressFamily::INET, SocketType::STREAM, None).unwrap();
        rustix::net::bind(&listener, &SocketAddr::from(([127, 0, 0, 1], 0))).unwrap();
        rustix::net::listen(&listener, 0).unwrap();
        let listener = TcpListener::from(listener);
        let address = listener.local_addr().unwrap();
        let mut filling = Vec::new();
        loop {
            let fd = unconnected();
            let attempt = attempt(&fd, &address).unwrap();
            filling.push(fd);
            if attempt == Attempt::Pending {
                break;
            }
        }
        let begun = std::time::Instant::now();
        let fd = unconnected();
        let mut insisting = std::pin::pin!(insist(&fd, &address));
        tokio::select! {
            biased;
            _ = &mut insisting => panic!("the queue is full"),
            () = std::future::ready(()) => {}
        }
        // All but the last, which the kernel dropped.
        let accepted: Vec<_> = filling.iter().skip(1).map(|_| listener.accept().unwrap()).collect();
        assert!(insisting.await.unwrap());
        assert!(begun.elapsed() < Duration::from_millis(800), "{:?}", begun.elapsed());
        drop(accepted);
    }

    #[test]
    fn a_refused_socket_can_be_connected_again() {
        let reserved = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = reserved.local_addr().unwrap();
        drop(reserved);
        let fd = unconnected();
        for _ in 0..100 {
            assert_eq!(attempt(&fd, &address).unwrap(), Attempt::Refused);
        }
        let _listener = TcpListener::bind(address).unwrap();
        assert_eq!(attempt(&fd, &address).unwrap(), Attempt::Connected);
    }
}

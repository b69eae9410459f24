//! The daemon's end of the keeper's protocol: requests from any task, answers by number, events as they come.
//!
//! One task reads the socket; requests are written by who makes them. What breaks the protocol ends the link, as the end of the keeper
//! does: every waiting request then fails, and [`Link::gone`] says so.

use std::collections::HashMap;
use std::io;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use funtainer_model::{ExecId, InstanceId, RevisionId};
use funtainer_sandbox::fds::{self, Fds, ReceiveError};
use funtainer_sandbox::protocol::{ExitRecord, MESSAGE_BYTES_MAX, Refusal, Reply, Request};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;
use tokio::sync::{oneshot, watch};
use tokio::task::AbortHandle;

use crate::descriptors;

/// Why a request to the keeper has no good answer.
#[derive(Debug, thiserror::Error)]
pub enum LinkError {
    /// The keeper said no.
    #[error("the keeper refused: {0}")]
    Refused(#[source] Refusal),
    /// The keeper has ended, or the link was closed because it broke the protocol.
    #[error("the keeper is gone")]
    Gone,
    /// The request breaks a bound of the protocol; it was not sent.
    #[error("the request cannot be said to the keeper")]
    Request(#[source] funtainer_sandbox::protocol::CodecError),
    /// The keeper answered something that does not answer the request.
    #[error("the keeper answered with another message than expected")]
    Unexpected,
    /// The socket fails.
    #[error("the socket to the keeper fails")]
    Socket(#[source] io::Error),
}

/// What the keeper says without being asked.
#[derive(Debug, Clone, Copy)]
pub(crate) enum Event {
    /// An instance is reaped.
    Exited(InstanceId, ExitRecord),
    /// A command in an instance is reaped; its wait status if it is known.
    ExecEnded(ExecId, Option<i32>),
    /// A zygote is gone.
    RevisionEnded(RevisionId),
    /// The platform is to stop within so many milliseconds.
    Stop(u32),
    /// An instance was started for which nobody waits any more.
    Orphaned(InstanceId),
}

/// A reply with its descriptors.
#[derive(Debug)]
pub(crate) struct Answer {
    pub(crate) reply: Reply,
    pub(crate) fds: Fds,
}

/// See the module. Dropping it ends the reading task.
pub(crate) struct Link {
    shared: Arc<Shared>,
    numbers: AtomicU32,
    gone: watch::Receiver<bool>,
    reader: AbortHandle,
}

struct Shared {
    socket: AsyncFd<OwnedFd>,
    /// `None` once the link is closed.
    waiting: Mutex<Option<HashMap<u32, Waiting>>>,
}

enum Waiting {
    /// For one reply. The instance is that of a start.
    One(Option<InstanceId>, oneshot::Sender<Answer>),
    /// For a list of replies up to `Done`.
    Many(Vec<Answer>, oneshot::Sender<Vec<Answer>>),
}

/// Why the reading task ends.
#[derive(Debug, thiserror::Error)]
enum End {
    #[error("the keeper closed its end")]
    Closed,
    #[error(transparent)]
    Receive(#[from] ReceiveError),
    #[error(transparent)]
    Codec(#[from] funtainer_sandbox::protocol::CodecError),
    #[error("an answer to request {0}, which nobody made")]
    Number(u32),
    #[error("an event that is none")]
    Event,
    #[error(transparent)]
    Socket(io::Error),
}

impl Link {
    /// Takes the socket over and reads it on the current runtime. `events` is called by the reading task: it must not block.
    pub(crate) fn open(socket: OwnedFd, events: impl Fn(Event) + Send + Sync + 'static) -> Result<Self, LinkError> {
        let socket = rustix::io::ioctl_fionbio(&socket, true)
            .map_err(io::Error::from)
            .and_then(|()| descriptors::watch(socket, Interest::READABLE | Interest::WRITABLE))
            .map_err(LinkError::Socket)?;
        let shared = Arc::new(Shared { socket, waiting: Mutex::new(Some(HashMap::new())) });
        let (gone_sender, gone) = watch::channel(false);
        let reading = Arc::clone(&shared);
        let task = tokio::spawn(async move {
            let Err(end) = reading.read(&events).await;
            match end {
                End::Closed => tracing::info!("the keeper is gone"),
                end => tracing::error!(error = %end, "the keeper broke the protocol"),
            }
            // Dropping the senders fails every request that waits.
            *reading.waiting() = None;
            gone_sender.send_replace(true);
        });
        Ok(Self { shared, numbers: AtomicU32::new(1), gone, reader: task.abort_handle() })
    }

    /// Becomes true once the keeper is gone.
    pub(crate) fn gone(&self) -> watch::Receiver<bool> {
        self.gone.clone()
    }

    /// Sends a request with descriptors, which are closed here, and waits for its reply. A refusal is an error.
    /// Once this was polled the request may have been carried out; a start whose future is dropped comes back as [`Event::Orphaned`].
    pub(crate) async fn request(&self, request: &Request, descriptors: Vec<OwnedFd>) -> Result<Answer, LinkError> {
        let instance = match request {
            Request::Start { instance, .. } => Some(*instance),
            _ => None,
        };
        let (sender, receiver) = oneshot::channel();
        self.send(request, Waiting::One(instance, sender), descriptors).await?;
        let answer = receiver.await.map_err(|_| LinkError::Gone)?;
        match answer.reply {
            Reply::Refused(refusal) => Err(LinkError::Refused(refusal)),
            _ => Ok(answer),
        }
    }

    /// [`Self::request`] for what is answered by `Done` alone.
    pub(crate) async fn command(&self, request: &Request, descriptors: Vec<OwnedFd>) -> Result<(), LinkError> {
        match self.request(request, descriptors).await?.reply {
            Reply::Done => Ok(()),
            _ => Err(LinkError::Unexpected),
        }
    }

    /// All instances, each a [`Reply::Listed`].
    pub(crate) async fn list(&self) -> Result<Vec<Answer>, LinkError> {
        let (sender, receiver) = oneshot::channel();
        self.send(&Request::List, Waiting::Many(Vec::new(), sender), Vec::new()).await?;
        receiver.await.map_err(|_| LinkError::Gone)
    }

    async fn send(&self, request: &Request, waiting: Waiting, descriptors: Vec<OwnedFd>) -> Result<(), LinkError> {
        let number = loop {
            // 0 is that of events.
            let number = self.numbers.fetch_add(1, Ordering::Relaxed);
            if number != 0 {
                break number;
            }
        };
        let datagram = request.encode(number).map_err(LinkError::Request)?;
        self.shared.waiting().as_mut().ok_or(LinkError::Gone)?.insert(number, waiting);
        let mut unsent = Unsent { shared: &self.shared, number: Some(number) };
        let borrowed: Vec<BorrowedFd<'_>> = descriptors.iter().map(AsFd::as_fd).collect();
        let write = |socket: &OwnedFd| Ok(fds::send(socket.as_fd(), &datagram, &borrowed, SendFlags::DONTWAIT)?);
        // Mostly there is room: no wait for what the runtime knows of the socket.
        let sent = match write(self.shared.socket.get_ref()) {
            Err(error) if would_block(&error) => self.shared.socket.async_io(Interest::WRITABLE, write).await,
            sent => sent,
        };
        match sent {
            Ok(()) => {
                unsent.number = None;
                Ok(())
            }
            Err(error) if matches!(error.kind(), io::ErrorKind::BrokenPipe | io::ErrorKind::ConnectionReset) => {
                Err(LinkError::Gone)
            }
            Err(error) => Err(LinkError::Socket(error)),
        }
    }
}

impl Drop for Link {
    fn drop(&mut self) {
        self.reader.abort();
    }
}

/// Forgets a request that was not sent.
struct Unsent<'a> {
    shared: &'a Shared,
    number: Option<u32>,
}

impl Drop for Unsent<'_> {
    fn drop(&mut self) {
        if let (Some(number), Some(waiting)) = (self.number, self.shared.waiting().as_mut()) {
            waiting.remove(&number);
        }
    }
}

impl Shared {
    fn waiting(&self) -> MutexGuard<'_, Option<HashMap<u32, Waiting>>> {
        self.waiting.lock().unwrap_or_else(PoisonError::into_inner)
    }

    async fn read(&self, events: &(impl Fn(Event) + Send + Sync)) -> Result<std::convert::Infallible, End> {
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        loop {
            let receive = |socket: &OwnedFd| receive(socket.as_fd(), &mut buffer);
            let received = match self.socket.async_io(Interest::READABLE, receive).await.map_err(End::Socket)? {
                Ok(Some(received)) => received,
                Ok(None) => return Err(End::Closed),
                Err(error) => return Err(error.into()),
            };
            let (number, reply) = Reply::decode(&buffer[..received.bytes], received.fds.len())?;
            if number == 0 {
                events(event(&reply)?);
            } else if let Some(orphan) = self.answer(number, Answer { reply, fds: received.fds })? {
                events(Event::Orphaned(orphan));
            }
        }
    }

    /// Gives the answer to who waits. The instance if it was started and nobody does.
    fn answer(&self, number: u32, answer: Answer) -> Result<Option<InstanceId>, End> {
        let mut waiting = self.waiting();
        let waiting = waiting.as_mut().ok_or(End::Closed)?;
        match waiting.remove(&number).ok_or(End::Number(number))? {
            Waiting::One(instance, sender) => {
                let started = matches!(answer.reply, Reply::Started { .. });
                Ok(sender.send(answer).err().and(instance.filter(|_| started)))
            }
            Waiting::Many(mut answers, sender) => {
                if matches!(answer.reply, Reply::Listed { .. }) {
                    answers.push(answer);
                    waiting.insert(number, Waiting::Many(answers, sender));
                } else {
                    // Nobody may wait any more; what was listed goes with its descriptors.
                    drop(sender.send(answers));
                }
                Ok(None)
            }
        }
    }
}

fn event(reply: &Reply) -> Result<Event, End> {
    match *reply {
        Reply::Exited { instance, exit } => Ok(Event::Exited(instance, exit)),
        Reply::ExecEnded { exec, status } => Ok(Event::ExecEnded(exec, status)),
        Reply::RevisionEnded { revision } => Ok(Event::RevisionEnded(revision)),
        Reply::Stop { grace_ms } => Ok(Event::Stop(grace_ms)),
        _ => Err(End::Event),
    }
}

/// One datagram from a non-blocking socket; an outer error of kind `WouldBlock` where there is none.
pub(crate) fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8]) -> io::Result<Result<Option<fds::Received>, ReceiveError>> {
    match fds::receive(socket, buffer, RecvFlags::DONTWAIT) {
        Err(ReceiveError::Kernel(Errno::AGAIN)) => Err(io::ErrorKind::WouldBlock.into()),
        Err(ReceiveError::Kernel(Errno::CONNRESET)) => Ok(Ok(None)),
        result => Ok(result),
    }
}

fn would_block(error: &io::Error) -> bool {
    error.kind() == io::ErrorKind::WouldBlock
}

#[cfg(test)]
mod tests;

//! The seqpacket pair between the daemon and the first process of an instance.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use funtainer_sandbox::fds::{self, Fds};
use funtainer_sandbox::protocol::InitMessage;
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

use crate::{descriptors, link};

/// Our end. It belongs to the runtime on which it was made.
pub(crate) struct InitPair {
    socket: AsyncFd<OwnedFd>,
}

impl InitPair {
    /// Our end and the one to give away.
    pub(crate) fn new() -> io::Result<(Self, OwnedFd)> {
        let (ours, theirs) = fds::pair()?;
        rustix::io::ioctl_fionbio(&ours, true)?;
        Ok((Self { socket: descriptors::watch(ours, Interest::READABLE)? }, theirs))
    }

    /// The next message with its descriptors; `None` once the other side is gone. What is no message is an error.
    pub(crate) async fn next(&mut self) -> io::Result<Option<(InitMessage, Fds)>> {
        // One byte more than any message: a longer one is seen as such.
        let mut buffer = [0; InitMessage::BYTES + 1];
        let receive = |socket: &OwnedFd| link::receive(socket.as_fd(), &mut buffer);
        let received = self.socket.async_io(Interest::READABLE, receive).await?.map_err(io::Error::other)?;
        let Some(received) = received else { return Ok(None) };
        let message = InitMessage::from_bytes(&buffer[..received.bytes], received.fds.len()).map_err(io::Error::other)?;
        Ok(Some((message, received.fds)))
    }
}

//! Descriptors in the runtime's event loop.

use std::io;
use std::os::fd::OwnedFd;

use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Puts a non-blocking descriptor into the event loop of the current runtime.
#[expect(
    deprecated,
    reason = "deprecated for types that could change their number or close it; an OwnedFd within AsyncFd does neither"
)]
pub(crate) fn watch(fd: OwnedFd, interest: Interest) -> io::Result<AsyncFd<OwnedFd>> {
    AsyncFd::with_interest(fd, interest)
}

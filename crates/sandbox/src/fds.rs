//! Descriptors over Unix sockets, and handles of processes.
//!
//! One message is one datagram of a seqpacket socket: some bytes and at most [`FDS_MAX`] descriptors. A message that was cut, in its
//! bytes or in its descriptors, is an error, and every descriptor that came with it is closed.

use std::io::{IoSlice, IoSliceMut};
use std::mem::MaybeUninit;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd, RawFd};

use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::io::{Errno, retry_on_intr};
use rustix::net::{
    AddressFamily, RecvAncillaryBuffer, RecvAncillaryMessage, RecvFlags, ReturnFlags, SendAncillaryBuffer,
    SendAncillaryMessage, SendFlags, SocketFlags, SocketType,
};
use rustix::process::{Pid, PidfdFlags, WaitId, WaitIdOptions};

use crate::step::checked;

/// Most descriptors in one message. The kernel's own bound is 253; ours is what the largest message of the protocol needs.
pub const FDS_MAX: usize = 32;

/// The descriptors of one received message, in the order of sending. What is not taken is closed.
#[derive(Debug)]
pub struct Fds {
    slots: [Option<OwnedFd>; FDS_MAX],
    count: usize,
}

impl Fds {
    /// No descriptors.
    pub const fn new() -> Self {
        Self { slots: [const { None }; FDS_MAX], count: 0 }
    }

    /// How many descriptors came, taken ones included.
    pub const fn len(&self) -> usize {
        self.count
    }

    /// Whether none came.
    pub const fn is_empty(&self) -> bool {
        self.count == 0
    }

    /// Takes the descriptor at a position; `None` if there was none or it is taken already.
    pub fn take(&mut self, index: usize) -> Option<OwnedFd> {
        self.slots.get_mut(index)?.take()
    }

    /// False, and the descriptor is closed, when all slots are taken.
    fn push(&mut self, fd: OwnedFd) -> bool {
        let Some(slot) = self.slots.get_mut(self.count) else { return false };
        *slot = Some(fd);
        self.count += 1;
        true
    }
}

impl Default for Fds {
    fn default() -> Self {
        Self::new()
    }
}

impl IntoIterator for Fds {
    type Item = OwnedFd;
    type IntoIter = std::iter::Flatten<std::array::IntoIter<Option<OwnedFd>, FDS_MAX>>;

    /// The descriptors that were not taken, in order.
    fn into_iter(self) -> Self::IntoIter {
        self.slots.into_iter().flatten()
    }
}

/// One received message.
#[derive(Debug)]
pub struct Received {
    /// How many bytes stand in the caller's buffer.
    pub bytes: usize,
    /// The descriptors, close-on-exec.
    pub fds: Fds,
}

/// Why a message could not be received.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum ReceiveError {
    /// The kernel refused; `EAGAIN` on a non-blocking socket without a message.
    #[error("receive a message: {0}")]
    Kernel(Errno),
    /// The message has more bytes than the buffer. Its descriptors were closed.
    #[error("a message is larger than {buffer} bytes")]
    BytesTruncated {
        /// Size of the caller's buffer.
        buffer: usize,
    },
    /// The message carries more descriptors than [`FDS_MAX`], or the table of this process is full. Those that came were closed.
    #[error("a message carries more than {FDS_MAX} descriptors, or this process may not hold more")]
    FdsTruncated,
}

/// A connected pair of seqpacket sockets, close-on-exec and blocking.
pub fn pair() -> Result<(OwnedFd, OwnedFd), Errno> {
    rustix::net::socketpair(AddressFamily::UNIX, SocketType::SEQPACKET, SocketFlags::CLOEXEC, None)
}

/// Sends one message of `bytes` with `fds`. Never raises `SIGPIPE`; `EPIPE` says that the peer is gone, `EINVAL` that there are more than
/// [`FDS_MAX`] descriptors or no bytes (an empty message cannot be told from the end of the stream).
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn send(socket: BorrowedFd<'_>, bytes: &[u8], fds: &[BorrowedFd<'_>], flags: SendFlags) -> Result<(), Errno> {
    if bytes.is_empty() || fds.len() > FDS_MAX {
        return Err(Errno::INVAL);
    }
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = SendAncillaryBuffer::new(&mut space);
    if !fds.is_empty() && !control.push(SendAncillaryMessage::ScmRights(fds)) {
        return Err(Errno::INVAL);
    }
    let sent =
        retry_on_intr(|| rustix::net::sendmsg(socket, &[IoSlice::new(bytes)], &mut control, flags | SendFlags::NOSIGNAL))?;
    // A seqpacket socket takes a message whole or not at all.
    if sent == bytes.len() { Ok(()) } else { Err(Errno::IO) }
}

/// Receives one message into `buffer`; `None` is the end of the stream.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn receive(socket: BorrowedFd<'_>, buffer: &mut [u8], flags: RecvFlags) -> Result<Option<Received>, ReceiveError> {
    let capacity = buffer.len();
    let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(FDS_MAX))];
    let mut control = RecvAncillaryBuffer::new(&mut space);
    let message = retry_on_intr(|| {
        rustix::net::recvmsg(socket, &mut [IoSliceMut::new(buffer)], &mut control, flags | RecvFlags::CMSG_CLOEXEC)
    })
    .map_err(ReceiveError::Kernel)?;

    let mut fds = Fds::new();
    let mut fits = true;
    for part in control.drain() {
        if let RecvAncillaryMessage::ScmRights(rights) = part {
            for fd in rights {
                fits &= fds.push(fd);
            }
        }
    }
    if !fits || message.flags.contains(ReturnFlags::CTRUNC) {
        return Err(ReceiveError::FdsTruncated);
    }
    if message.flags.contains(ReturnFlags::TRUNC) {
        return Err(ReceiveError::BytesTruncated { buffer: capacity });
    }
    if message.bytes == 0 {
        return Ok(None);
    }
    Ok(Some(Received { bytes: message.bytes, fds }))
}

/// Closes every descriptor from `first` on.
///
/// One system call: may be called between clone and exec. Descriptors that Rust values still own must not be among those closed, or be
/// forgotten: the process must exec or exit next, or hold its descriptors as plain numbers.
pub fn close_from(first: RawFd) -> Result<(), Errno> {
    close_range(first.cast_unsigned(), u32::MAX, 0)
}

/// Marks every descriptor from `first` on as close-on-exec, which is safe at any time.
///
/// One system call: may be called between clone and exec.
pub fn cloexec_from(first: RawFd) -> Result<(), Errno> {
    close_range(first.cast_unsigned(), u32::MAX, libc::CLOSE_RANGE_CLOEXEC)
}

fn close_range(first: u32, last: u32, flags: libc::c_uint) -> Result<(), Errno> {
    // SAFETY: three integers, no memory. rustix has no wrapper; that no owned descriptor is pulled away is said to the callers above.
    checked(unsafe { libc::syscall(libc::SYS_close_range, first, last, flags) }).map(drop)
}

/// Puts `fd` at the number `to` (replacing what was there), open across exec. If it stands there already, only the flag is cleared.
///
/// One system call: may be called between clone and exec. The number `to` must not belong to a Rust value.
pub fn place(fd: BorrowedFd<'_>, to: RawFd) -> Result<(), Errno> {
    if fd.as_raw_fd() == to {
        return rustix::io::fcntl_setfd(fd, rustix::io::FdFlags::empty());
    }
    // SAFETY: two integers, no memory. rustix's dup2 wants an owned target, which a fixed number is not.
    checked(libc::c_long::from(unsafe { libc::dup2(fd.as_raw_fd(), to) })).map(drop)
}

/// How a process ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Exit {
    /// By itself with this code, 0 to 255.
    Code(i32),
    /// By this signal.
    Signal(i32),
}

/// A handle of a process of this pid namespace.
pub fn pidfd_open(pid: Pid) -> Result<OwnedFd, Errno> {
    rustix::process::pidfd_open(pid, PidfdFlags::empty())
}

/// Sends a signal, real-time ones included. `ESRCH` says that the process has ended and was reaped.
///
/// One system call: may be called between clone and exec.
pub fn pidfd_signal(pidfd: BorrowedFd<'_>, signal: i32) -> Result<(), Errno> {
    // SAFETY: a descriptor, an integer, a null pointer that the kernel takes as "like kill" (pidfd_send_signal(2)), no flags. rustix's
    // wrapper knows named signals only, and images may name a real-time one as their stop signal.
    checked(unsafe {
        libc::syscall(libc::SYS_pidfd_send_signal, pidfd.as_raw_fd(), signal, std::ptr::null::<libc::siginfo_t>(), 0)
    })
    .map(drop)
}

/// Whether the process has ended (reaped or not), waiting for at most `timeout`; without one, for as long as it takes.
pub fn pidfd_ended(pidfd: BorrowedFd<'_>, timeout: Option<Timespec>) -> Result<bool, Errno> {
    let mut polled = [PollFd::from_borrowed_fd(pidfd, PollFlags::IN)];
    Ok(retry_on_intr(|| rustix::event::poll(&mut polled, timeout.as_ref()))? > 0)
}

/// Reaps a child by its handle; `None` while it runs and `block` is false. `ECHILD` if it is no child of this process.
pub fn pidfd_reap(pidfd: BorrowedFd<'_>, block: bool) -> Result<Option<Exit>, Errno> {
    // __WALL: children that end without SIGCHLD are waited for too.
    let mut options = WaitIdOptions::EXITED | WaitIdOptions::from_bits_retain(libc::__WALL.cast_unsigned());
    if !block {
        options |= WaitIdOptions::NOHANG;
    }
    let status = retry_on_intr(|| rustix::process::waitid(WaitId::PidFd(pidfd.as_fd()), options))?;
    Ok(status.map(|status| match (status.exit_status(), status.terminating_signal()) {
        (Some(code), _) => Exit::Code(code),
        (None, signal) => Exit::Signal(signal.unwrap_or(libc::SIGKILL)),
    }))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::testing::{Child, ensure, run};

    fn open_null() -> OwnedFd {
        std::fs::File::open("/dev/null").expect("/dev/null").into()
    }

    /// Whether no writer of a pipe is left within the time. Children of other tests hold copies of it for a moment.
    fn writer_is_gone(reader: &OwnedFd, seconds: i64) -> bool {
        let mut polled = [PollFd::new(reader, PollFlags::IN)];
        rustix::event::poll(&mut polled, Some(&Timespec { tv_sec: seconds, tv_nsec: 0 })).expect("poll");
        polled[0].revents().contains(PollFlags::HUP)
    }

    #[test]
    fn bytes_and_descriptors_arrive_in_order() {
        let (ours, theirs) = pair().expect("pair");
        let pipes: Vec<_> = (0..FDS_MAX).map(|_| rustix::pipe::pipe().expect("pipe")).collect();
        let writers: Vec<_> = pipes.iter().map(|(_, writer)| writer.as_fd()).collect();
        send(ours.as_fd(), b"hello", &writers, SendFlags::empty()).expect("send");
        send(ours.as_fd(), b"more", &[], SendFlags::empty()).expect("send");

        let mut buffer = [0; 16];
        let mut received = receive(theirs.as_fd(), &mut buffer, RecvFlags::empty()).expect("receive").expect("a message");
        assert_eq!(&buffer[..received.bytes], b"hello");
        assert_eq!(received.fds.len(), FDS_MAX);
        for (index, (reader, _)) in pipes.iter().enumerate() {
            let writer = received.fds.take(index).expect("a descriptor");
            assert!(rustix::io::fcntl_getfd(&writer).expect("flags").contains(rustix::io::FdFlags::CLOEXEC));
            rustix::io::write(&writer, &[index as u8]).expect("write");
            let mut byte = [0];
            rustix::io::read(reader, &mut byte).expect("read");
            assert_eq!(usize::from(byte[0]), index);
        }
        assert!(received.fds.take(0).is_none() && received.fds.take(FDS_MAX).is_none());

        let received = receive(theirs.as_fd(), &mut buffer, RecvFlags::empty()).expect("receive").expect("a message");
        assert_eq!((&buffer[..received.bytes], received.fds.is_empty()), (&b"more"[..], true));
        drop(ours);
        assert!(receive(theirs.as_fd(), &mut buffer, RecvFlags::empty()).expect("receive").is_none());
    }

    /// Sends more than our own [`send`] would.
    fn send_many(socket: &OwnedFd, fds: &[BorrowedFd<'_>]) {
        let mut space = [MaybeUninit::uninit(); rustix::cmsg_space!(ScmRights(253))];
        let mut control = SendAncillaryBuffer::new(&mut space);
        assert!(control.push(SendAncillaryMessage::ScmRights(fds)));
        rustix::net::sendmsg(socket, &[IoSlice::new(b"x")], &mut control, SendFlags::empty()).expect("sendmsg");
    }

    #[test]
    fn too_many_descriptors_are_closed_and_told() {
        for count in [FDS_MAX + 1, FDS_MAX + 2, 253] {
            let (ours, theirs) = pair().expect("pair");
            let (reader, writer) = rustix::pipe::pipe().expect("pipe");
            send_many(&ours, &vec![writer.as_fd(); count]);
            drop(writer);
            let mut buffer = [0; 16];
            assert_eq!(receive(theirs.as_fd(), &mut buffer, RecvFlags::empty()).unwrap_err(), ReceiveError::FdsTruncated);
            assert!(writer_is_gone(&reader, 10), "{count} descriptors: one is left open");
        }
    }

    #[test]
    fn a_message_that_is_too_long_is_told_and_its_descriptors_closed() {
        let (ours, theirs) = pair().expect("pair");
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        send(ours.as_fd(), &[7; 100], &[writer.as_fd()], SendFlags::empty()).expect("send");
        drop(writer);
        let mut buffer = [0; 99];
        let error = receive(theirs.as_fd(), &mut buffer, RecvFlags::empty()).unwrap_err();
        assert_eq!(error, ReceiveError::BytesTruncated { buffer: 99 });
        assert!(writer_is_gone(&reader, 10));
    }

    #[test]
    fn what_is_not_taken_is_closed() {
        let (ours, theirs) = pair().expect("pair");
        let (reader, writer) = rustix::pipe::pipe().expect("pipe");
        send(ours.as_fd(), b"x", &[writer.as_fd(), writer.as_fd()], SendFlags::empty()).expect("send");
        drop(writer);
        let mut received = receive(theirs.as_fd(), &mut [0; 8], RecvFlags::empty()).expect("receive").expect("a message");
        let taken = received.fds.take(0);
        drop(received);
        assert!(!writer_is_gone(&reader, 0));
        drop(taken);
        assert!(writer_is_gone(&reader, 10));
    }

    #[test]
    fn wrong_messages_are_refused_by_the_sender() {
        let (ours, theirs) = pair().expect("pair");
        let null = open_null();
        assert_eq!(send(ours.as_fd(), b"", &[null.as_fd()], SendFlags::empty()), Err(Errno::INVAL));
        assert_eq!(send(ours.as_fd(), b"x", &[null.as_fd(); FDS_MAX + 1], SendFlags::empty()), Err(Errno::INVAL));
        drop(theirs);
        assert_eq!(send(ours.as_fd(), b"x", &[], SendFlags::empty()), Err(Errno::PIPE));
    }

    #[test]
    fn an_empty_socket_says_so_when_it_may_not_block() {
        let (_ours, theirs) = pair().expect("pair");
        let error = receive(theirs.as_fd(), &mut [0; 8], RecvFlags::DONTWAIT).unwrap_err();
        assert_eq!(error, ReceiveError::Kernel(Errno::AGAIN));
    }

    proptest! {
        #[test]
        fn any_message_arrives_as_it_was(bytes in proptest::collection::vec(any::<u8>(), 1..4096), count in 0..=FDS_MAX) {
            let (ours, theirs) = pair().expect("pair");
            let null = open_null();
            send(ours.as_fd(), &bytes, &vec![null.as_fd(); count], SendFlags::empty()).expect("send");
            let mut buffer = [0; 4096];
            let received = receive(theirs.as_fd(), &mut buffer, RecvFlags::empty()).expect("receive").expect("a message");
            prop_assert_eq!(&buffer[..received.bytes], &bytes[..]);
            prop_assert_eq!(received.fds.into_iter().count(), count);
        }
    }

    #[test]
    fn exits_are_told_apart() {
        let child = Child::start(0, || Ok(()));
        assert_eq!(child.finish(), Ok(Exit::Code(0)));

        let child = Child::start(0, || {
            loop {
                rustix::event::pause();
            }
        });
        assert_eq!(pidfd_ended(child.pidfd.as_fd(), Some(Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(false));
        assert_eq!(pidfd_reap(child.pidfd.as_fd(), false), Ok(None));
        // A real-time signal ends a process too.
        pidfd_signal(child.pidfd.as_fd(), 40).expect("signal");
        assert_eq!(pidfd_ended(child.pidfd.as_fd(), Some(Timespec { tv_sec: 10, tv_nsec: 0 })), Ok(true));
        assert_eq!(pidfd_reap(child.pidfd.as_fd(), false), Ok(Some(Exit::Signal(40))));
        assert_eq!(pidfd_signal(child.pidfd.as_fd(), libc::SIGKILL), Err(Errno::SRCH));
        assert_eq!(pidfd_reap(child.pidfd.as_fd(), true), Err(Errno::CHILD));
    }

    #[test]
    fn a_child_places_and_closes_descriptors() {
        run(0, || {
            let null = rustix::fs::open(
                c"/dev/null",
                rustix::fs::OFlags::RDWR | rustix::fs::OFlags::CLOEXEC,
                rustix::fs::Mode::empty(),
            )
            .map_err(crate::step::at("open"))?;
            place(null.as_fd(), 60).map_err(crate::step::at("place"))?;
            // SAFETY: the number was made open in the line above, and is not owned.
            let placed = unsafe { BorrowedFd::borrow_raw(60) };
            let flags = rustix::io::fcntl_getfd(placed).map_err(crate::step::at("flags"))?;
            ensure(flags.is_empty(), "a placed descriptor stays open across exec")?;
            cloexec_from(60).map_err(crate::step::at("mark"))?;
            let flags = rustix::io::fcntl_getfd(placed).map_err(crate::step::at("flags"))?;
            ensure(flags.contains(rustix::io::FdFlags::CLOEXEC), "a marked descriptor is closed on exec")?;
            place(placed, 60).map_err(crate::step::at("place where it is"))?;
            let flags = rustix::io::fcntl_getfd(placed).map_err(crate::step::at("flags"))?;
            ensure(flags.is_empty(), "a placed descriptor stays open across exec")?;
            close_from(60).map_err(crate::step::at("close"))?;
            ensure(rustix::io::fcntl_getfd(placed) == Err(Errno::BADF), "it is closed")
        });
    }
}

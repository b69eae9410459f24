//! The byte stream below hyper, for the two things that hyper does not tell.
//!
//! 1. hyper answers a head that it cannot parse by itself, with a bare status line. [`Wire`] holds such an answer back
//!    for one round of polling: where the round ends with a parse error, the held bytes were hyper's own and a real answer takes their
//!    place; otherwise they were part of a function's answer after all and are sent.
//! 2. hyper drops `Content-Length` silently where `Transfer-Encoding` is there too. [`WireState::head_has`] looks at the bytes.

use std::io;
use std::pin::Pin;
use std::sync::atomic::{AtomicU32, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::task::{Context, Poll, ready};

use tokio::io::{AsyncRead, AsyncWrite, ReadBuf};

/// A bare answer of hyper is a status line and at most the fields Connection, Content-Length and Date.
const BARE_ANSWER_BYTES_MAX: usize = 256;
/// How a bare answer starts: 400, 414 or 431.
const BARE_ANSWER_START: &[u8] = b"HTTP/1.1 4";
/// Found in every answer that is not hyper's.
const OWN_ANSWER_MARK: &[u8] = b"x-call-id:";

/// A stream below hyper. Exclusively used by one connection's task.
#[derive(Debug)]
pub(super) struct Wire<S> {
    stream: S,
    state: Arc<WireState>,
    /// Bytes that look like a bare answer, not yet sent, and the round in which they came.
    held: Vec<u8>,
    held_round: u32,
    /// The peer has closed its side.
    eof: bool,
}

/// What the connection's task and its service share with the [`Wire`].
#[derive(Debug, Default)]
pub(crate) struct WireState {
    round: AtomicU32,
    calls: AtomicU32,
    head: Mutex<Vec<u8>>,
}

/// Counts a call from its head until its answer is complete.
#[derive(Debug)]
pub(crate) struct Busy(Arc<WireState>);

impl WireState {
    /// A new round of polling starts.
    pub(super) fn next_round(&self) {
        self.round.store(self.round.load(Ordering::Relaxed).wrapping_add(1), Ordering::Relaxed);
    }

    /// A head was parsed. Forgets its bytes.
    pub(crate) fn busy(self: &Arc<Self>) -> Busy {
        self.calls.fetch_add(1, Ordering::Relaxed);
        self.head.lock().unwrap_or_else(PoisonError::into_inner).clear();
        Busy(Arc::clone(self))
    }

    /// Whether a line of what was read since the last call ended starts with `name` (lower case), in any case of letters.
    /// Where heads are pipelined, nothing was read and the answer is no.
    pub(crate) fn head_has(&self, name: &[u8]) -> bool {
        let head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        head.split(|byte| *byte == b'\n').any(|line| {
            line.get(..name.len()).is_some_and(|start| start.eq_ignore_ascii_case(name)) && line.get(name.len()) == Some(&b':')
        })
    }

    /// Whether what was read since the last call ended starts with `method` and a space: the head that was parsed last is there whole.
    pub(crate) fn head_starts_with(&self, method: &str) -> bool {
        let head = self.head.lock().unwrap_or_else(PoisonError::into_inner);
        head.strip_prefix(method.as_bytes()).is_some_and(|rest| rest.starts_with(b" "))
    }

    fn is_idle(&self) -> bool {
        self.calls.load(Ordering::Relaxed) == 0
    }
}

impl Drop for Busy {
    fn drop(&mut self) {
        self.0.calls.fetch_sub(1, Ordering::Relaxed);
    }
}

impl<S> Wire<S> {
    pub(super) fn new(stream: S, state: Arc<WireState>) -> Self {
        Self { stream, state, held: Vec::new(), held_round: 0, eof: false }
    }

    /// The stream, whether a bare answer of hyper was held back, and whether the peer has closed its side.
    pub(super) fn into_parts(self) -> (S, bool, bool) {
        (self.stream, !self.held.is_empty(), self.eof)
    }
}

impl<S: AsyncWrite + Unpin> Wire<S> {
    /// Sends what was held back in a former round.
    fn poll_release(&mut self, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        while !self.held.is_empty() {
            let sent = ready!(Pin::new(&mut self.stream).poll_write(cx, &self.held))?;
            if sent == 0 {
                return Poll::Ready(Err(io::ErrorKind::WriteZero.into()));
            }
            self.held.drain(..sent);
        }
        Poll::Ready(Ok(()))
    }

    fn holds_in_this_round(&self) -> bool {
        !self.held.is_empty() && self.held_round == self.state.round.load(Ordering::Relaxed)
    }
}

impl<S: AsyncRead + Unpin> AsyncRead for Wire<S> {
    fn poll_read(self: Pin<&mut Self>, cx: &mut Context<'_>, buffer: &mut ReadBuf<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        let before = buffer.filled().len();
        ready!(Pin::new(&mut this.stream).poll_read(cx, buffer))?;
        let new = &buffer.filled()[before..];
        this.eof |= new.is_empty() && buffer.remaining() > 0;
        if this.state.is_idle() {
            let mut head = this.state.head.lock().unwrap_or_else(PoisonError::into_inner);
            let room = super::HEAD_BYTES_MAX.saturating_sub(head.len());
            head.extend_from_slice(&new[..new.len().min(room)]);
        }
        Poll::Ready(Ok(()))
    }
}

impl<S: AsyncWrite + Unpin> AsyncWrite for Wire<S> {
    fn poll_write(self: Pin<&mut Self>, cx: &mut Context<'_>, bytes: &[u8]) -> Poll<io::Result<usize>> {
        let this = self.get_mut();
        let Some(start) = bare_answer(bytes) else {
            ready!(this.poll_release(cx))?;
            return Pin::new(&mut this.stream).poll_write(cx, bytes);
        };
        ready!(this.poll_release(cx))?;
        if start > 0 {
            return Pin::new(&mut this.stream).poll_write(cx, &bytes[..start]);
        }
        this.held.extend_from_slice(bytes);
        this.held_round = this.state.round.load(Ordering::Relaxed);
        Poll::Ready(Ok(bytes.len()))
    }

    fn poll_flush(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.holds_in_this_round() {
            // The next round sends it, unless there is none.
            cx.waker().wake_by_ref();
            return Poll::Ready(Ok(()));
        }
        ready!(this.poll_release(cx))?;
        Pin::new(&mut this.stream).poll_flush(cx)
    }

    fn poll_shutdown(self: Pin<&mut Self>, cx: &mut Context<'_>) -> Poll<io::Result<()>> {
        let this = self.get_mut();
        if this.holds_in_this_round() {
            return Poll::Ready(Ok(()));
        }
        ready!(this.poll_release(cx))?;
        Pin::new(&mut this.stream).poll_shutdown(cx)
    }
}

/// Where at the end of `bytes` something starts that could be a bare answer of hyper.
fn bare_answer(bytes: &[u8]) -> Option<usize> {
    if !bytes.ends_with(b"\r\n\r\n") {
        return None;
    }
    let from = bytes.len().saturating_sub(BARE_ANSWER_BYTES_MAX);
    let tail = &bytes[from..];
    let start = tail.windows(BARE_ANSWER_START.len()).rposition(|window| window == BARE_ANSWER_START)?;
    let marked = tail[start..].windows(OWN_ANSWER_MARK.len()).any(|window| window.eq_ignore_ascii_case(OWN_ANSWER_MARK));
    (!marked).then_some(from + start)
}

#[cfg(test)]
mod tests {
    use super::*;

    const BARE: &[u8] = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n";

    #[test]
    fn bare_answers_are_found_at_the_end_only() {
        assert_eq!(bare_answer(BARE), Some(0));
        assert_eq!(bare_answer(&[b"HTTP/1.1 200 OK\r\nx-call-id: 1\r\ncontent-length: 2\r\n\r\nhi", BARE].concat()), Some(54));
        assert_eq!(bare_answer(&[BARE, b"x"].concat()), None);
        assert_eq!(bare_answer(b"HTTP/1.1 404 Not Found\r\nX-Call-Id: 1\r\ncontent-length: 0\r\n\r\n"), None);
        assert_eq!(bare_answer(b""), None);
        assert_eq!(bare_answer(b"\r\n\r\n"), None);
    }

    #[test]
    fn fields_of_a_head_are_found_by_line() {
        let state = WireState::default();
        state
            .head
            .lock()
            .unwrap()
            .extend_from_slice(b"POST / HTTP/1.1\r\nContent-Length: 3\r\nX: transfer-encoding: x\r\n\r\n");
        assert!(state.head_has(b"content-length"));
        assert!(!state.head_has(b"transfer-encoding"));
    }

    #[tokio::test]
    async fn a_function_that_ends_like_a_bare_answer_is_sent_in_the_next_round() {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};

        let (near, mut far) = tokio::io::duplex(4096);
        let state = Arc::new(WireState::default());
        let mut wire = Wire::new(near, Arc::clone(&state));
        state.next_round();
        wire.write_all(BARE).await.unwrap();
        wire.flush().await.unwrap();
        assert!(!wire.held.is_empty());
        state.next_round();
        wire.flush().await.unwrap();
        let mut got = vec![0; BARE.len()];
        far.read_exact(&mut got).await.unwrap();
        assert_eq!(got, BARE);
        assert!(!wire.into_parts().1);
    }
}

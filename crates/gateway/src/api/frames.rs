//! The frames of [`run`](super::run) and [`exec`](super::exec), both ways.
//!
//! ```text
//! ┌────────┬──────────────────┬──────────────┐
//! │ kind   │ length           │ payload      │
//! │ u8     │ u32, big endian  │ length bytes │   at most 64 KiB
//! └────────┴──────────────────┴──────────────┘
//!
//!  kind                 from     payload
//!   1  standard input   client   bytes
//!   2  end of input     client   none
//!   3  size             client   lines and columns of its terminal, u16 each, big endian
//!   4  signal           client   number, one byte
//!  16  standard output  server   bytes; of a terminal all that is written to it
//!  17  standard error   server   bytes
//!  18  progress         server   JSON of `funtainer_engine::backend::Progress`
//!  19  end              server   JSON of [`RunEnd`], the last frame
//!  20  begun            server   none; the program runs, and signals reach it
//! ```
//!
//! Another kind, a longer frame or another payload breaks the connection.

use std::future::pending;
use std::io;

use bytes::{Buf, BufMut, Bytes, BytesMut};
use funtainer_contract::terminal::TerminalSize;
use funtainer_engine::backend::Progress;
use funtainer_model::StopSignal;
use serde::{Deserialize, Serialize};
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::rescue::Problem;

/// Most bytes of a frame's payload.
pub const FRAME_BYTES_MAX: usize = 64 * 1024;

/// Kind and length.
const FRAME_HEAD_BYTES: usize = 5;

/// A piece of the conversation.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Frame {
    /// For the command's standard input.
    Stdin(Bytes),
    /// No more of it comes.
    StdinEnd,
    /// Its terminal has another size.
    Resize(TerminalSize),
    /// A signal for it.
    Signal(StopSignal),
    /// From its standard output.
    Stdout(Bytes),
    /// From its standard error.
    Stderr(Bytes),
    /// What is being done before the command runs.
    Progress(Progress),
    /// How it ended.
    End(RunEnd),
    /// Its program runs.
    Begun,
}

/// How a command ended.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum RunEnd {
    /// By exit(2).
    Code(u8),
    /// By this signal.
    Signal(u8),
    /// By the kernel, for its memory.
    OutOfMemory,
    /// It did not run, or nobody knows how it ended.
    Failed(Problem),
}

/// Bytes that are no frame.
#[derive(Debug, thiserror::Error)]
pub enum FrameError {
    /// No such kind.
    #[error("{0} is no kind of frame")]
    Kind(u8),
    /// Too long.
    #[error("a frame has {0} bytes, at most {FRAME_BYTES_MAX} are allowed")]
    TooLong(u32),
    /// A payload that is not what the kind has.
    #[error("a frame of kind {0} has another payload than it should")]
    Payload(u8),
    /// The connection broke off.
    #[error("the connection broke off")]
    Io(#[from] io::Error),
}

/// Reads frames. A future of [`FrameReader::next`] can be dropped without loss.
#[derive(Debug)]
pub struct FrameReader<R> {
    reader: R,
    buffer: BytesMut,
}

impl Frame {
    /// The bytes of the frame.
    pub fn encode(&self) -> Bytes {
        let payload = match self {
            Self::Stdin(bytes) | Self::Stdout(bytes) | Self::Stderr(bytes) => bytes.clone(),
            Self::StdinEnd | Self::Begun => Bytes::new(),
            Self::Resize(TerminalSize { rows, columns }) => {
                let [[a, b], [c, d]] = [rows.to_be_bytes(), columns.to_be_bytes()];
                Bytes::copy_from_slice(&[a, b, c, d])
            }
            Self::Signal(signal) => Bytes::copy_from_slice(&[signal.number()]),
            Self::Progress(progress) => json(progress),
            Self::End(end) => json(end),
        };
        let mut frame = BytesMut::with_capacity(FRAME_HEAD_BYTES + payload.len());
        frame.put_u8(self.kind());
        frame.put_u32(payload.len() as u32);
        frame.put_slice(&payload);
        frame.freeze()
    }

    pub(super) const fn kind(&self) -> u8 {
        match self {
            Self::Stdin(_) => 1,
            Self::StdinEnd => 2,
            Self::Resize(_) => 3,
            Self::Signal(_) => 4,
            Self::Stdout(_) => 16,
            Self::Stderr(_) => 17,
            Self::Progress(_) => 18,
            Self::End(_) => 19,
            Self::Begun => 20,
        }
    }

    /// Takes a frame from the start of `buffer` if it is there whole.
    pub fn decode(buffer: &mut BytesMut) -> Result<Option<Self>, FrameError> {
        let Some(mut head) = buffer.get(..FRAME_HEAD_BYTES) else { return Ok(None) };
        let (kind, length) = (head.get_u8(), head.get_u32());
        if !matches!(kind, 1..=4 | 16..=20) {
            return Err(FrameError::Kind(kind));
        }
        if length as usize > FRAME_BYTES_MAX {
            return Err(FrameError::TooLong(length));
        }
        if buffer.len() < FRAME_HEAD_BYTES + length as usize {
            return Ok(None);
        }
        buffer.advance(FRAME_HEAD_BYTES);
        let payload = buffer.split_to(length as usize).freeze();
        let wrong = || FrameError::Payload(kind);
        Ok(Some(match kind {
            1 => Self::Stdin(payload),
            2 if payload.is_empty() => Self::StdinEnd,
            3 => {
                let [a, b, c, d] = payload[..].try_into().map_err(|_| wrong())?;
                Self::Resize(TerminalSize { rows: u16::from_be_bytes([a, b]), columns: u16::from_be_bytes([c, d]) })
            }
            4 => {
                let [number] = payload[..].try_into().map_err(|_| wrong())?;
                // The type's only door is its text form.
                Self::Signal(u8::to_string(&number).parse().map_err(|_| wrong())?)
            }
            16 => Self::Stdout(payload),
            17 => Self::Stderr(payload),
            18 => Self::Progress(serde_json::from_slice(&payload).map_err(|_| wrong())?),
            20 if payload.is_empty() => Self::Begun,
            19 => Self::End(serde_json::from_slice(&payload).map_err(|_| wrong())?),
            _ => return Err(wrong()),
        }))
    }
}

impl<R: AsyncRead + Unpin> FrameReader<R> {
    /// Waits until the connection breaks, and keeps what comes meanwhile, up to a frame; more stays with the client.
    pub(super) async fn broken(&mut self) -> FrameError {
        while self.buffer.len() < FRAME_BYTES_MAX {
            match self.reader.read_buf(&mut self.buffer).await {
                Ok(0) => return io::Error::from(io::ErrorKind::UnexpectedEof).into(),
                Ok(_) => {}
                Err(error) => return error.into(),
            }
        }
        pending().await
    }

    /// Reads from `reader`, behind what was already read.
    pub fn new(already: &[u8], reader: R) -> Self {
        Self { reader, buffer: already.into() }
    }

    /// The next frame; `None` at a clean end.
    pub async fn next(&mut self) -> Result<Option<Frame>, FrameError> {
        loop {
            if let Some(frame) = Frame::decode(&mut self.buffer)? {
                return Ok(Some(frame));
            }
            self.buffer.reserve(FRAME_HEAD_BYTES + FRAME_BYTES_MAX);
            if self.reader.read_buf(&mut self.buffer).await? == 0 {
                return if self.buffer.is_empty() {
                    Ok(None)
                } else {
                    Err(io::Error::from(io::ErrorKind::UnexpectedEof).into())
                };
            }
        }
    }
}

fn json(value: &impl Serialize) -> Bytes {
    serde_json::to_vec(value).expect("own shapes are always JSON").into()
}

#[cfg(test)]
mod tests {
    use funtainer_model::{ErrorCode, Failure};
    use tokio::io::AsyncWriteExt;

    use super::*;
    use crate::rescue::Occasion;

    #[tokio::test]
    async fn frames_round_trip_in_pieces() {
        let frames = [
            Frame::Stdin(Bytes::from_static(b"in")),
            Frame::StdinEnd,
            Frame::Resize(TerminalSize { rows: 24, columns: 0x150 }),
            Frame::Signal(StopSignal::TERM),
            Frame::Begun,
            Frame::Stdout(Bytes::new()),
            Frame::Stderr(Bytes::from(vec![0; FRAME_BYTES_MAX])),
            Frame::Progress(Progress::Starting),
            Frame::End(RunEnd::Code(3)),
            Frame::End(RunEnd::Failed(Problem::new(&Failure::new(ErrorCode::Internal, "x"), Occasion::Admin, None))),
        ];
        let bytes: Vec<u8> = frames.iter().flat_map(Frame::encode).collect();
        let (mut near, far) = tokio::io::duplex(7);
        let (already, rest) = bytes.split_at(3);
        let rest = rest.to_vec();
        let writing = tokio::spawn(async move { near.write_all(&rest).await });
        let mut reader = FrameReader::new(already, far);
        for frame in frames {
            assert_eq!(reader.next().await.unwrap(), Some(frame));
        }
        writing.await.unwrap().unwrap();
        assert_eq!(reader.next().await.unwrap(), None);
    }

    #[test]
    fn what_is_no_frame_is_refused() {
        let decode = |bytes: &[u8]| Frame::decode(&mut bytes.into());
        assert!(matches!(decode(&[0, 0, 0, 0, 0]), Err(FrameError::Kind(0))));
        assert!(matches!(decode(&[1, 0, 1, 0, 1]), Err(FrameError::TooLong(65537))));
        assert!(matches!(decode(&[2, 0, 0, 0, 1, 7]), Err(FrameError::Payload(2))));
        assert!(matches!(decode(&[3, 0, 0, 0, 2, 7, 7]), Err(FrameError::Payload(3))));
        assert!(matches!(decode(&[4, 0, 0, 0, 1, 0]), Err(FrameError::Payload(4))));
        assert!(matches!(decode(&[4, 0, 0, 0, 1, 65]), Err(FrameError::Payload(4))));
        assert!(matches!(decode(&[4, 0, 0, 0, 0]), Err(FrameError::Payload(4))));
        assert!(matches!(decode(&[5, 0, 0, 0, 0]), Err(FrameError::Kind(5))));
        assert!(matches!(decode(&[19, 0, 0, 0, 1, b'{']), Err(FrameError::Payload(19))));
        assert!(matches!(decode(&[1, 0, 0, 0, 2, 7]), Ok(None)));
        assert!(matches!(decode(&[1, 0]), Ok(None)));
    }

    #[tokio::test]
    async fn a_frame_that_breaks_off_is_an_error() {
        assert!(matches!(FrameReader::new(&[1, 0, 0, 0, 2, 7], tokio::io::empty()).next().await, Err(FrameError::Io(_))));
    }
}

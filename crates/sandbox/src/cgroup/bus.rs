//! As much of D-Bus as it takes to ask systemd for a scope: one connection, two calls, then it is closed.
//!
//! ```text
//! connect ─ NUL, AUTH EXTERNAL uid ─ OK ─ BEGIN ─ [Hello] ─ StartTransientUnit ─ its answer
//! ```
//! Source: the D-Bus Specification 0.43, "Authentication Protocol" and "Message Protocol"; org.freedesktop.systemd1(5). Little endian is
//! written, both orders are read. Every length is checked before it is used, every wait has an end, and what is no answer is passed over.

use std::io::{ErrorKind, Read as _, Write as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

/// How long one connection may take in all: systemd answers within milliseconds, unless it boots on a slow machine.
const TIME_MAX: Duration = Duration::from_secs(25);
/// Longest line of the authentication.
const LINE_BYTES_MAX: usize = 512;
/// Longest message that is read: answers here have a path or a text. The specification's own bound is 128 MiB.
const MESSAGE_BYTES_MAX: usize = 64 << 10;
/// Most messages that are passed over while an answer is waited for.
const MESSAGES_MAX: usize = 1000;
/// Bytes of a message before its fields.
const FIXED_BYTES: usize = 16;
/// `TasksMax` and the like without a limit.
const INFINITY: u64 = u64::MAX;

/// Why systemd could not be asked, or what it answered.
#[derive(Debug, thiserror::Error)]
pub enum BusError {
    /// Nobody listens there, or the connection broke.
    #[error("{}: {source}", path.display())]
    Stream {
        /// The socket.
        path: PathBuf,
        /// Why.
        source: std::io::Error,
    },
    /// The bus does not take this user.
    #[error("{}: the bus refuses this user", path.display())]
    Unauthorized {
        /// The socket.
        path: PathBuf,
    },
    /// What came is no D-Bus.
    #[error("{}: {what}", path.display())]
    Malformed {
        /// The socket.
        path: PathBuf,
        /// What is wrong with it.
        what: Malformed,
    },
    /// An answer, but no.
    #[error("{name}: {text}")]
    Refused {
        /// Name of the error, such as `org.freedesktop.systemd1.UnitExists`.
        name: String,
        /// What it says.
        text: String,
    },
    /// No answer in time, or too many other messages before it.
    #[error("{}: no answer within {} s", path.display(), TIME_MAX.as_secs())]
    Late {
        /// The socket.
        path: PathBuf,
    },
}

/// Bytes that are no message.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum Malformed {
    /// Neither `l` nor `B` stands first.
    #[error("a message of no known byte order")]
    Order,
    /// Another version than 1.
    #[error("a message of another version of D-Bus")]
    Version,
    /// Longer than this program reads.
    #[error("a message of more than {MESSAGE_BYTES_MAX} bytes")]
    Long,
    /// A length leads out of the message.
    #[error("a message that ends too early")]
    Short,
    /// A field has another type than the specification gives it, or a text is none.
    #[error("a message with a wrong field")]
    Field,
    /// A line of the authentication that is too long or no text.
    #[error("an answer to the authentication that is none")]
    Line,
}

/// A scope to be made.
#[derive(Debug, Clone, Copy)]
pub struct Scope<'a> {
    /// Name of the unit, with `.scope`.
    pub unit: &'a str,
    /// Shown by `systemctl status`.
    pub description: &'a str,
    /// The process that is moved into it.
    pub pid: u32,
}

/// Asks the systemd behind a socket to make a scope with its processes, which is then delegated to this program. The answer says that it
/// will; the process is moved a moment later. With `is_bus` a bus lies between, which is greeted first.
pub fn start_scope(socket: &Path, is_bus: bool, scope: Scope<'_>) -> Result<(), BusError> {
    let mut bus = Bus::connect(socket)?;
    bus.authenticate(crate::userns::outer_uid())?;
    if is_bus {
        let (path, name) = ("/org/freedesktop/DBus", "org.freedesktop.DBus");
        bus.call(&Call { path, interface: name, member: "Hello", destination: name, signature: "", body: &[] })?;
    }
    let body = scope_arguments(scope);
    bus.call(&Call {
        path: "/org/freedesktop/systemd1",
        interface: "org.freedesktop.systemd1.Manager",
        member: "StartTransientUnit",
        destination: "org.freedesktop.systemd1",
        signature: "ssa(sv)a(sa(sv))",
        body: &body,
    })
}

/// Name and mode of the unit, its properties, and no further units.
fn scope_arguments(scope: Scope<'_>) -> Vec<u8> {
    let mut body = Writer::default();
    body.text(scope.unit);
    body.text("fail");
    body.array(8, |properties| {
        let mut property = |name: &str, signature: &str, value: &dyn Fn(&mut Writer)| {
            properties.align(8);
            properties.text(name);
            properties.signature(signature);
            value(properties);
        };
        property("Description", "s", &|value| value.text(scope.description));
        property("PIDs", "au", &|value| value.array(4, |pids| pids.number(scope.pid)));
        property("Delegate", "b", &|value| value.number(1));
        // The default is a share of what the machine can have: instances have limits of their own.
        property("TasksMax", "t", &|value| value.long(INFINITY));
        // Nothing of it stays when it has ended, however it ended.
        property("CollectMode", "s", &|value| value.text("inactive-or-failed"));
    });
    body.array(8, |_| ());
    body.bytes
}

struct Call<'a> {
    path: &'a str,
    interface: &'a str,
    member: &'a str,
    destination: &'a str,
    signature: &'a str,
    body: &'a [u8],
}

impl Call<'_> {
    fn encode(&self, serial: u32) -> Vec<u8> {
        let mut message = Writer::default();
        // A call, for which no service is to be started.
        message.bytes.extend([b'l', 1, 2, 1]);
        message.number(self.body.len() as u32);
        message.number(serial);
        message.array(8, |fields| {
            let texts = [(1, "o", self.path), (2, "s", self.interface), (3, "s", self.member), (6, "s", self.destination)];
            for (code, signature, text) in texts {
                fields.align(8);
                fields.bytes.push(code);
                fields.signature(signature);
                fields.text(text);
            }
            if !self.signature.is_empty() {
                fields.align(8);
                fields.bytes.push(8);
                fields.signature("g");
                fields.signature(self.signature);
            }
        });
        message.align(8);
        message.bytes.extend(self.body);
        message.bytes
    }
}

/// One message in the making.
#[derive(Default)]
struct Writer {
    bytes: Vec<u8>,
}

impl Writer {
    fn align(&mut self, to: usize) {
        self.bytes.resize(self.bytes.len().next_multiple_of(to), 0);
    }

    fn number(&mut self, number: u32) {
        self.align(4);
        self.bytes.extend(number.to_le_bytes());
    }

    fn long(&mut self, number: u64) {
        self.align(8);
        self.bytes.extend(number.to_le_bytes());
    }

    fn text(&mut self, text: &str) {
        self.number(text.len() as u32);
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
    }

    fn signature(&mut self, text: &str) {
        self.bytes.push(text.len() as u8);
        self.bytes.extend(text.as_bytes());
        self.bytes.push(0);
    }

    /// An array whose elements are aligned to `to`; its length counts from the first of them.
    fn array(&mut self, to: usize, elements: impl FnOnce(&mut Self)) {
        self.number(0);
        let length = self.bytes.len() - 4;
        self.align(to);
        let start = self.bytes.len();
        elements(self);
        let bytes = (self.bytes.len() - start) as u32;
        self.bytes[length..length + 4].copy_from_slice(&bytes.to_le_bytes());
    }
}

struct Bus {
    stream: UnixStream,
    path: PathBuf,
    deadline: Instant,
    serial: u32,
}

impl Bus {
    fn connect(path: &Path) -> Result<Self, BusError> {
        let stream = UnixStream::connect(path).map_err(|source| BusError::Stream { path: path.to_owned(), source })?;
        Ok(Self { stream, path: path.to_owned(), deadline: Instant::now() + TIME_MAX, serial: 0 })
    }

    /// SASL's EXTERNAL: the kernel tells the other side who this is, the name is said in hex digits of its decimal digits.
    fn authenticate(&mut self, uid: u32) -> Result<(), BusError> {
        // A digit's code in hex is 3 and the digit.
        let name: String = uid.to_string().chars().flat_map(|digit| ['3', digit]).collect();
        self.write(format!("\0AUTH EXTERNAL {name}\r\n").as_bytes())?;
        let mut line = Vec::new();
        while !line.ends_with(b"\r\n") {
            if line.len() == LINE_BYTES_MAX {
                return Err(self.malformed(Malformed::Line));
            }
            // One by one: what follows the line belongs to the next step.
            let mut byte = [0];
            self.read(&mut byte)?;
            line.extend(byte);
        }
        if line.starts_with(b"OK ") {
            return self.write(b"BEGIN\r\n");
        }
        if line.starts_with(b"REJECTED") {
            return Err(BusError::Unauthorized { path: self.path.clone() });
        }
        Err(self.malformed(Malformed::Line))
    }

    /// Makes a call and waits for its answer.
    fn call(&mut self, call: &Call<'_>) -> Result<(), BusError> {
        self.serial += 1;
        self.write(&call.encode(self.serial))?;
        for _ in 0..MESSAGES_MAX {
            let mut bytes = vec![0; FIXED_BYTES];
            self.read(&mut bytes)?;
            let length = message_bytes(&bytes).map_err(|what| self.malformed(what))?;
            bytes.resize(length, 0);
            self.read(&mut bytes[FIXED_BYTES..])?;
            let answer = Answer::parse(&bytes).map_err(|what| self.malformed(what))?;
            match answer {
                Some(Answer { to, outcome }) if to == self.serial => {
                    return outcome.map_err(|(name, text)| BusError::Refused { name, text });
                }
                _ => {}
            }
        }
        Err(BusError::Late { path: self.path.clone() })
    }

    fn malformed(&self, what: Malformed) -> BusError {
        BusError::Malformed { path: self.path.clone(), what }
    }

    fn left(&self) -> Result<Duration, BusError> {
        let left = self.deadline.saturating_duration_since(Instant::now());
        if left.is_zero() { Err(BusError::Late { path: self.path.clone() }) } else { Ok(left) }
    }

    fn failed(&self, source: std::io::Error) -> BusError {
        match source.kind() {
            ErrorKind::WouldBlock | ErrorKind::TimedOut => BusError::Late { path: self.path.clone() },
            _ => BusError::Stream { path: self.path.clone(), source },
        }
    }

    fn write(&mut self, bytes: &[u8]) -> Result<(), BusError> {
        let left = self.left()?;
        self.stream
            .set_write_timeout(Some(left))
            .and_then(|()| self.stream.write_all(bytes))
            .map_err(|error| self.failed(error))
    }

    fn read(&mut self, mut bytes: &mut [u8]) -> Result<(), BusError> {
        while !bytes.is_empty() {
            let left = self.left()?;
            let read = self.stream.set_read_timeout(Some(left)).and_then(|()| self.stream.read(bytes));
            match read {
                Ok(0) => return Err(self.failed(ErrorKind::UnexpectedEof.into())),
                Ok(read) => bytes = &mut bytes[read..],
                Err(error) if error.kind() == ErrorKind::Interrupted => {}
                Err(error) => return Err(self.failed(error)),
            }
        }
        Ok(())
    }
}

/// An answer to a call.
#[derive(Debug, PartialEq, Eq)]
struct Answer {
    /// Number of the call.
    to: u32,
    /// An error has a name and a text.
    outcome: Result<(), (String, String)>,
}

impl Answer {
    /// Reads a whole message; `None` if it is something else than an answer.
    fn parse(bytes: &[u8]) -> Result<Option<Self>, Malformed> {
        let length = message_bytes(bytes.get(..FIXED_BYTES).ok_or(Malformed::Short)?)?;
        if bytes.len() != length {
            return Err(Malformed::Short);
        }
        let mut reader = Reader { bytes, at: 4, big: bytes[0] == b'B' };
        let body_bytes = reader.number()? as usize;
        let body_start = length - body_bytes;
        reader.at = 12;
        let fields_end = FIXED_BYTES + reader.number()? as usize;
        let (mut to, mut error, mut signature) = (None, None, "");
        while reader.at < fields_end {
            reader.align(8)?;
            let code = reader.byte()?;
            let kind = reader.signature()?;
            match (code, kind) {
                (5, "u") => to = Some(reader.number()?),
                (4, "s") => error = Some(reader.text()?.to_owned()),
                (8, "g") => signature = reader.signature()?,
                (4 | 5 | 8, _) => return Err(Malformed::Field),
                _ => reader.skip(kind)?,
            }
            if reader.at > fields_end {
                return Err(Malformed::Short);
            }
        }
        let outcome = match bytes[1] {
            2 => Ok(()),
            3 => {
                reader.at = body_start;
                let text = if signature.starts_with('s') { reader.text()? } else { "" };
                Err((error.ok_or(Malformed::Field)?, text.to_owned()))
            }
            _ => return Ok(None),
        };
        Ok(Some(Self { to: to.ok_or(Malformed::Field)?, outcome }))
    }
}

/// How long the message is that starts so.
fn message_bytes(fixed: &[u8]) -> Result<usize, Malformed> {
    let [order, _, _, version, ..] = *fixed else { return Err(Malformed::Short) };
    if order != b'l' && order != b'B' {
        return Err(Malformed::Order);
    }
    if version != 1 {
        return Err(Malformed::Version);
    }
    let mut reader = Reader { bytes: fixed, at: 4, big: order == b'B' };
    let body = reader.number()? as usize;
    reader.at = 12;
    let fields = reader.number()? as usize;
    if body > MESSAGE_BYTES_MAX || fields > MESSAGE_BYTES_MAX {
        return Err(Malformed::Long);
    }
    let length = (FIXED_BYTES + fields).next_multiple_of(8) + body;
    if length > MESSAGE_BYTES_MAX { Err(Malformed::Long) } else { Ok(length) }
}

struct Reader<'a> {
    bytes: &'a [u8],
    at: usize,
    big: bool,
}

impl<'a> Reader<'a> {
    fn take(&mut self, count: usize) -> Result<&'a [u8], Malformed> {
        let end = self.at.checked_add(count).ok_or(Malformed::Short)?;
        let taken = self.bytes.get(self.at..end).ok_or(Malformed::Short)?;
        self.at = end;
        Ok(taken)
    }

    fn align(&mut self, to: usize) -> Result<(), Malformed> {
        self.take(self.at.next_multiple_of(to) - self.at).map(drop)
    }

    fn byte(&mut self) -> Result<u8, Malformed> {
        self.take(1).map(|bytes| bytes[0])
    }

    fn number(&mut self) -> Result<u32, Malformed> {
        self.align(4)?;
        let bytes = self.take(4)?.try_into().map_err(|_| Malformed::Short)?;
        Ok(if self.big { u32::from_be_bytes(bytes) } else { u32::from_le_bytes(bytes) })
    }

    fn ended(&mut self, length: usize) -> Result<&'a str, Malformed> {
        let text = self.take(length)?;
        if self.byte()? != 0 {
            return Err(Malformed::Field);
        }
        std::str::from_utf8(text).map_err(|_| Malformed::Field)
    }

    fn text(&mut self) -> Result<&'a str, Malformed> {
        let length = self.number()? as usize;
        self.ended(length)
    }

    fn signature(&mut self) -> Result<&'a str, Malformed> {
        let length = self.byte()?.into();
        self.ended(length)
    }

    /// Passes over a value of one of the types that fields have.
    fn skip(&mut self, kind: &str) -> Result<(), Malformed> {
        match kind {
            "y" => self.byte().map(drop),
            "u" | "i" | "b" | "h" => self.number().map(drop),
            "s" | "o" => self.text().map(drop),
            "g" => self.signature().map(drop),
            _ => Err(Malformed::Field),
        }
    }
}

/// Reads any bytes as a message, for fuzzing: they are refused, or read within their bounds.
pub fn check_any(bytes: &[u8]) {
    if let Ok(Some(answer)) = Answer::parse(bytes) {
        assert!(bytes.len() <= MESSAGE_BYTES_MAX);
        if let Err((name, text)) = answer.outcome {
            assert!(name.len() + text.len() < bytes.len());
        }
    }
}

#[cfg(test)]
mod tests;

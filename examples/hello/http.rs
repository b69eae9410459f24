//! The little of HTTP/1.1 (RFC 9112) that a function needs, on the standard library alone: one thread per connection, keep-alive,
//! bodies with a length or in chunks.

use std::io::{self, Read, Write};
use std::net::{TcpListener, TcpStream};
use std::sync::Arc;
use std::thread;

/// Longest head of a request, in bytes.
const HEAD_BYTES_MAX: usize = 64 * 1024;
/// Stack of a connection's thread, in bytes: an idle connection costs what it touches.
const STACK_BYTES: usize = 64 * 1024;

/// A connection and what was read from it beyond the last request.
pub struct Connection {
    /// The connection itself, for answers of another form than [`Connection::answer`]'s.
    pub stream: TcpStream,
    unread: Vec<u8>,
}

/// The head of a request.
pub struct Head {
    /// `GET`, `POST`, ...
    pub method: String,
    /// Path and query as sent.
    pub target: String,
    /// Names as sent, values without blanks around them.
    pub headers: Vec<(String, String)>,
    /// Whether the connection stays after the answer.
    pub keep_alive: bool,
    framing: Framing,
    expects_continue: bool,
}

enum Framing {
    Length(u64),
    Chunked,
}

/// Accepts connections forever; each runs `answer` for each of its requests.
pub fn serve(
    listener: &TcpListener,
    answer: impl Fn(&mut Connection, Head) -> io::Result<()> + Send + Sync + 'static,
) -> io::Result<()> {
    let answer = Arc::new(answer);
    loop {
        let (stream, _) = listener.accept()?;
        let answer = Arc::clone(&answer);
        thread::Builder::new().stack_size(STACK_BYTES).spawn(move || {
            let _ = stream.set_nodelay(true);
            let mut connection = Connection { stream, unread: Vec::with_capacity(1024) };
            while let Ok(Some(head)) = connection.request() {
                let keep_alive = head.keep_alive;
                if answer(&mut connection, head).is_err() || !keep_alive {
                    break;
                }
            }
        })?;
    }
}

impl Connection {
    /// Reads a whole body, hands each piece to `piece`, and returns its length in bytes.
    pub fn body(&mut self, head: &Head, mut piece: impl FnMut(&[u8])) -> io::Result<u64> {
        if head.expects_continue {
            self.stream.write_all(b"HTTP/1.1 100 Continue\r\n\r\n")?;
        }
        match head.framing {
            Framing::Length(length) => self.exactly(length, &mut piece),
            Framing::Chunked => {
                let mut total = 0;
                loop {
                    let line = self.line()?;
                    let digits = line.split(';').next().unwrap_or_default().trim();
                    let length = u64::from_str_radix(digits, 16).map_err(|_| invalid("chunk size"))?;
                    if length == 0 {
                        while !self.line()?.is_empty() {}
                        return Ok(total);
                    }
                    total += self.exactly(length, &mut piece)?;
                    self.line()?;
                }
            }
        }
    }

    /// Answers with a whole body.
    pub fn answer(&mut self, head: &Head, status: &str, body: &[u8]) -> io::Result<()> {
        let connection = if head.keep_alive { "keep-alive" } else { "close" };
        let length = body.len();
        let mut answer = Vec::with_capacity(160 + length);
        write!(
            answer,
            "HTTP/1.1 {status}\r\nContent-Type: text/plain; charset=utf-8\r\nContent-Length: {length}\r\nConnection: {connection}\r\n\r\n"
        )?;
        if head.method != "HEAD" {
            answer.extend_from_slice(body);
        }
        self.stream.write_all(&answer)
    }

    /// The next request; nothing if the client has gone.
    fn request(&mut self) -> io::Result<Option<Head>> {
        let end = loop {
            if let Some(end) = find(&self.unread, b"\r\n\r\n") {
                break end;
            }
            if self.unread.len() > HEAD_BYTES_MAX {
                return Err(invalid("head too large"));
            }
            if self.fill()? == 0 {
                return Ok(None);
            }
        };
        let text = String::from_utf8_lossy(&self.unread[..end]).into_owned();
        self.unread.drain(..end + 4);
        parse(&text).map(Some)
    }

    fn exactly(&mut self, length: u64, piece: &mut impl FnMut(&[u8])) -> io::Result<u64> {
        let mut left = length;
        while left > 0 {
            if self.unread.is_empty() && self.fill()? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
            let count = usize::try_from(left).unwrap_or(usize::MAX).min(self.unread.len());
            piece(&self.unread[..count]);
            self.unread.drain(..count);
            left -= count as u64;
        }
        Ok(length)
    }

    fn line(&mut self) -> io::Result<String> {
        loop {
            if let Some(end) = find(&self.unread, b"\r\n") {
                let line = String::from_utf8_lossy(&self.unread[..end]).into_owned();
                self.unread.drain(..end + 2);
                return Ok(line);
            }
            if self.fill()? == 0 {
                return Err(io::ErrorKind::UnexpectedEof.into());
            }
        }
    }

    fn fill(&mut self) -> io::Result<usize> {
        let mut piece = [0; 16 * 1024];
        let count = self.stream.read(&mut piece)?;
        self.unread.extend_from_slice(&piece[..count]);
        Ok(count)
    }
}

fn parse(text: &str) -> io::Result<Head> {
    let mut lines = text.split("\r\n");
    let mut words = lines.next().unwrap_or_default().split(' ');
    let (Some(method), Some(target), Some(version)) = (words.next(), words.next(), words.next()) else {
        return Err(invalid("request line"));
    };
    let mut head = Head {
        method: method.to_owned(),
        target: target.to_owned(),
        headers: Vec::new(),
        keep_alive: version == "HTTP/1.1",
        framing: Framing::Length(0),
        expects_continue: false,
    };
    for line in lines {
        let (name, value) = line.split_once(':').ok_or_else(|| invalid("header"))?;
        let value = value.trim();
        if name.eq_ignore_ascii_case("connection") {
            head.keep_alive =
                if head.keep_alive { !value.eq_ignore_ascii_case("close") } else { value.eq_ignore_ascii_case("keep-alive") };
        } else if name.eq_ignore_ascii_case("content-length") {
            head.framing = Framing::Length(value.parse().map_err(|_| invalid("content-length"))?);
        } else if name.eq_ignore_ascii_case("transfer-encoding") {
            head.framing = Framing::Chunked;
        } else if name.eq_ignore_ascii_case("expect") {
            head.expects_continue = value.eq_ignore_ascii_case("100-continue");
        }
        head.headers.push((name.to_owned(), value.to_owned()));
    }
    Ok(head)
}

fn find(bytes: &[u8], what: &[u8]) -> Option<usize> {
    bytes.windows(what.len()).position(|window| window == what)
}

fn invalid(what: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

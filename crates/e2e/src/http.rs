//! An HTTP/1.1 client that hides nothing: heads, chunks and trailers as they come, and how a connection ended.

use std::fmt::Write as _;
use std::io::{self, BufRead, BufReader, Read, Write};
use std::net::{SocketAddr, TcpStream};
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::time::Duration;

use anyhow::{Context, Result, bail};

use crate::wait;

/// How long any read or write may take before it is a failure of the server.
const IO_TIMEOUT: Duration = Duration::from_secs(90);

/// Where a server listens.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Endpoint {
    /// Calls.
    Tcp(SocketAddr),
    /// The admin socket.
    Unix(PathBuf),
}

/// A connection with keep-alive.
pub struct Connection {
    stream: BufReader<Stream>,
}

/// A whole answer.
#[derive(Debug, Clone)]
pub struct Response {
    /// Such as 200.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    /// The body, without chunk framing.
    pub body: Vec<u8>,
    /// Names in lower case; only chunked answers have some.
    pub trailers: Vec<(String, String)>,
}

/// The head of an answer whose body is still to be read.
#[derive(Debug, Clone)]
pub struct Head {
    /// Such as 200.
    pub status: u16,
    /// Names in lower case.
    pub headers: Vec<(String, String)>,
    framing: Framing,
}

#[derive(Debug, Clone, Copy)]
enum Framing {
    None,
    Length(u64),
    Chunked,
    UntilClose,
}

#[derive(Debug)]
enum Stream {
    Tcp(TcpStream),
    Unix(UnixStream),
}

/// One request on a connection of its own.
pub fn call(endpoint: &Endpoint, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Response> {
    let mut connection = Connection::open(endpoint).with_context(|| format!("{method} {path}: cannot connect"))?;
    connection.call(method, path, headers, body)
}

impl Connection {
    /// Connects; the error keeps its kind, so that a refused connection can be told from others.
    pub fn open(endpoint: &Endpoint) -> io::Result<Self> {
        let stream = match endpoint {
            Endpoint::Tcp(address) => {
                let stream = TcpStream::connect(address)?;
                stream.set_nodelay(true)?;
                Stream::Tcp(stream)
            }
            Endpoint::Unix(path) => Stream::Unix(UnixStream::connect(path)?),
        };
        stream.limit(wait::patient(IO_TIMEOUT))?;
        Ok(Self { stream: BufReader::with_capacity(16 * 1024, stream) })
    }

    /// Sends a request with a body of known length and reads the whole answer.
    pub fn call(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Response> {
        let request = || format!("{method} {path}");
        let sent = self.send(method, path, headers, body);
        // A server may answer, and close, before it has read all: the answer counts, if there is one.
        let head = match (self.head(), sent) {
            (Ok(head), _) => head,
            (Err(_), Err(error)) | (Err(error), Ok(())) => return Err(error).with_context(request),
        };
        let mut content = Vec::new();
        let trailers = if method == "HEAD" {
            Vec::new()
        } else {
            self.body(&head, |piece| content.extend_from_slice(piece))
                .with_context(|| format!("{method} {path}: status {}, then {} bytes of body", head.status, content.len()))?
        };
        Ok(Response { status: head.status, headers: head.headers, body: content, trailers })
    }

    /// Sends a request with a body of known length.
    pub fn send(&mut self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> io::Result<()> {
        let mut head = format!("{method} {path} HTTP/1.1\r\nHost: funtainer.test\r\n");
        for (name, value) in headers {
            let _ = write!(head, "{name}: {value}\r\n");
        }
        if !body.is_empty() || matches!(method, "POST" | "PUT" | "PATCH") {
            let _ = write!(head, "Content-Length: {}\r\n", body.len());
        }
        head.push_str("\r\n");
        let mut bytes = head.into_bytes();
        bytes.extend_from_slice(body);
        self.raw(&bytes)
    }

    /// Sends bytes as they are.
    pub fn raw(&mut self, bytes: &[u8]) -> io::Result<()> {
        self.stream.get_mut().write_all(bytes)
    }

    /// Sends one chunk of a chunked body; an empty one ends the body.
    pub fn chunk(&mut self, piece: &[u8]) -> io::Result<()> {
        let mut bytes = format!("{:x}\r\n", piece.len()).into_bytes();
        bytes.extend_from_slice(piece);
        bytes.extend_from_slice(b"\r\n");
        self.raw(&bytes)
    }

    /// Reads the head of an answer; interim ones (1xx) are skipped.
    pub fn head(&mut self) -> io::Result<Head> {
        loop {
            let line = self.line()?;
            let status = line
                .strip_prefix("HTTP/1.1 ")
                .or_else(|| line.strip_prefix("HTTP/1.0 "))
                .and_then(|rest| rest.get(..3))
                .and_then(|code| code.parse().ok())
                .ok_or_else(|| invalid(format!("status line '{line}'")))?;
            let headers = self.fields()?;
            if status >= 200 || status == 101 {
                let framing = framing(status, &headers)?;
                return Ok(Head { status, headers, framing });
            }
        }
    }

    /// Reads a body to its end and returns the trailers. An end before the promised one is an error of kind `UnexpectedEof` or `ConnectionReset`.
    pub fn body(&mut self, head: &Head, mut piece: impl FnMut(&[u8])) -> io::Result<Vec<(String, String)>> {
        let mut left = head.framing;
        while let Some(bytes) = self.piece(&mut left)? {
            piece(&bytes);
        }
        if matches!(head.framing, Framing::Chunked) { self.fields() } else { Ok(Vec::new()) }
    }

    /// Reads the next piece of a body as soon as it is there: one chunk, or what has arrived.
    pub fn first_piece(&mut self, head: &Head) -> io::Result<Option<Vec<u8>>> {
        let mut framing = head.framing;
        self.piece(&mut framing)
    }

    /// Whether the server has closed the connection; waits for at most the time limit of a read.
    pub fn closed(&mut self) -> bool {
        let mut byte = [0];
        match self.stream.read(&mut byte) {
            Ok(0) => true,
            Ok(_) => false,
            Err(error) => !matches!(error.kind(), io::ErrorKind::WouldBlock | io::ErrorKind::TimedOut),
        }
    }

    fn piece(&mut self, framing: &mut Framing) -> io::Result<Option<Vec<u8>>> {
        match framing {
            Framing::None | Framing::Length(0) => Ok(None),
            Framing::Length(left) => {
                let bytes = self.stream.fill_buf()?;
                if bytes.is_empty() {
                    return Err(io::ErrorKind::UnexpectedEof.into());
                }
                let count = usize::try_from(*left).unwrap_or(usize::MAX).min(bytes.len());
                let piece = bytes[..count].to_vec();
                self.stream.consume(count);
                *left -= count as u64;
                Ok(Some(piece))
            }
            Framing::Chunked => {
                let line = self.line()?;
                let size = line.split(';').next().unwrap_or_default().trim();
                let size = usize::from_str_radix(size, 16).map_err(|_| invalid(format!("chunk size '{line}'")))?;
                if size == 0 {
                    return Ok(None);
                }
                let mut piece = vec![0; size];
                self.stream.read_exact(&mut piece)?;
                if !self.line()?.is_empty() {
                    return Err(invalid("no line end after a chunk".to_owned()));
                }
                Ok(Some(piece))
            }
            Framing::UntilClose => {
                let bytes = self.stream.fill_buf()?.to_vec();
                self.stream.consume(bytes.len());
                Ok((!bytes.is_empty()).then_some(bytes))
            }
        }
    }

    fn fields(&mut self) -> io::Result<Vec<(String, String)>> {
        let mut fields = Vec::new();
        loop {
            let line = self.line()?;
            if line.is_empty() {
                return Ok(fields);
            }
            let (name, value) = line.split_once(':').ok_or_else(|| invalid(format!("header '{line}'")))?;
            fields.push((name.to_ascii_lowercase(), value.trim().to_owned()));
        }
    }

    fn line(&mut self) -> io::Result<String> {
        let mut line = Vec::new();
        if self.stream.read_until(b'\n', &mut line)? == 0 || line.last() != Some(&b'\n') {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        Ok(String::from_utf8_lossy(&line).trim_end().to_owned())
    }
}

impl Response {
    /// The value of a header, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        value(&self.headers, name)
    }

    /// The value of a trailer, by its name in lower case.
    pub fn trailer(&self, name: &str) -> Option<&str> {
        value(&self.trailers, name)
    }

    /// The body as text.
    pub fn text(&self) -> String {
        String::from_utf8_lossy(&self.body).into_owned()
    }

    /// The body as JSON.
    pub fn json(&self) -> Result<serde_json::Value> {
        serde_json::from_slice(&self.body).with_context(|| format!("no JSON: {}", self.text()))
    }

    /// The answer, if it has that status; else an error with all of it.
    pub fn expect(self, status: u16) -> Result<Self> {
        if self.status != status {
            bail!("status {} where {status} was expected\n{:?}\n{}", self.status, self.headers, self.text());
        }
        Ok(self)
    }
}

impl Head {
    /// The value of a header, by its name in lower case.
    pub fn header(&self, name: &str) -> Option<&str> {
        value(&self.headers, name)
    }
}

fn value<'a>(fields: &'a [(String, String)], name: &str) -> Option<&'a str> {
    fields.iter().find(|(key, _)| key == name).map(|(_, value)| value.as_str())
}

/// RFC 9112 section 6.3.
fn framing(status: u16, headers: &[(String, String)]) -> io::Result<Framing> {
    if status == 204 || status == 304 || status == 101 {
        return Ok(Framing::None);
    }
    if value(headers, "transfer-encoding").is_some_and(|coding| coding.eq_ignore_ascii_case("chunked")) {
        return Ok(Framing::Chunked);
    }
    match value(headers, "content-length") {
        Some(length) => length.parse().map(Framing::Length).map_err(|_| invalid(format!("content-length '{length}'"))),
        None => Ok(Framing::UntilClose),
    }
}

fn invalid(what: String) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, what)
}

impl Stream {
    fn limit(&self, limit: Duration) -> io::Result<()> {
        match self {
            Self::Tcp(stream) => stream.set_read_timeout(Some(limit)).and(stream.set_write_timeout(Some(limit))),
            Self::Unix(stream) => stream.set_read_timeout(Some(limit)).and(stream.set_write_timeout(Some(limit))),
        }
    }
}

impl Read for Stream {
    fn read(&mut self, into: &mut [u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.read(into),
            Self::Unix(stream) => stream.read(into),
        }
    }
}

impl Write for Stream {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        match self {
            Self::Tcp(stream) => stream.write(bytes),
            Self::Unix(stream) => stream.write(bytes),
        }
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;
    use std::thread;

    use super::*;

    /// Answers one connection with `bytes`, whatever is asked.
    fn canned(bytes: &'static [u8]) -> Endpoint {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        thread::spawn(move || {
            let (mut stream, _) = listener.accept().unwrap();
            let _ = stream.read(&mut [0; 4096]);
            stream.write_all(bytes).unwrap();
        });
        Endpoint::Tcp(address)
    }

    #[test]
    fn chunks_and_trailers_are_read() {
        let server = canned(
            b"HTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n1;x=y\r\nd\r\n0\r\nX-Exit-Code: 0\r\n\r\n",
        );
        let response = call(&server, "GET", "/", &[], b"").unwrap();
        assert_eq!((response.status, response.text().as_str(), response.trailer("x-exit-code")), (200, "abcd", Some("0")));
    }

    #[test]
    fn a_body_that_ends_early_is_an_error() {
        for bytes in [
            &b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nabc"[..],
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n",
            b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nab",
            b"HTTP/1.1 200 OK\r\nContent-Le",
            b"",
        ] {
            assert!(call(&canned(bytes), "GET", "/", &[], b"").is_err(), "{}", String::from_utf8_lossy(bytes));
        }
    }
}

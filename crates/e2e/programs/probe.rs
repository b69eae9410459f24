//! The server that tests put into images: each path shows or does one thing.

mod appetite;
#[path = "../../../examples/hello/http.rs"]
mod http;

use std::io::{self, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::mpsc;
use std::time::Duration;
use std::{env, fs, process, thread};

use http::{Connection, Head};

/// How long a server elsewhere may take to accept a connection, and to answer.
const DIAL_TIME_MAX: Duration = Duration::from_secs(4);
/// Calls of `/hang` whose client has gone.
static HUNG_UP: AtomicU64 = AtomicU64::new(0);

fn main() -> io::Result<()> {
    println!("probe starts");
    if let Ok(millis) = env::var("PROBE_LATE_MS") {
        pause(number(&millis));
    }
    let told = env::var("PORT").unwrap_or_else(|_| "8080".to_owned());
    let ports = env::var("PROBE_LISTEN").unwrap_or(told);
    let mut listeners = Vec::new();
    for port in ports.split(',') {
        let port = port.parse().map_err(io::Error::other)?;
        listeners.push(match env::var("PROBE_V6") {
            Ok(_) => TcpListener::bind((std::net::Ipv6Addr::LOCALHOST, port))?,
            Err(_) => TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?,
        });
    }
    let threads: Vec<_> = listeners.into_iter().map(|listener| thread::spawn(move || http::serve(&listener, answer))).collect();
    for thread in threads {
        thread.join().map_err(|_| io::Error::other("a listener's thread panicked"))??;
    }
    Ok(())
}

fn answer(connection: &mut Connection, head: Head) -> io::Result<()> {
    let (path, query) = head.target.split_once('?').unwrap_or((&head.target, ""));
    let mut body = Vec::new();
    if path != "/count" && path != "/early" {
        connection.body(&head, |piece| body.extend_from_slice(piece))?;
    }
    let text = match path {
        "/echo" => return connection.answer(&head, "200 OK", &body),
        "/request" => {
            let headers: Vec<_> = head.headers.iter().map(|(name, value)| format!("{name}: {value}\n")).collect();
            format!("{} {}\n{}", head.method, head.target, headers.concat())
        }
        "/count" => format!("{}\n", connection.body(&head, |_| ())?),
        "/early" => return early(connection),
        "/env" => env::vars().map(|(name, value)| format!("{name}={value}\n")).collect(),
        "/args" => env::args().map(|arg| arg + "\n").collect(),
        "/pid" => format!("{}\n", process::id()),
        "/peer" => format!("{}\n", connection.stream.peer_addr()?.ip()),
        "/file" => match fs::read(query) {
            Ok(content) => return connection.answer(&head, "200 OK", &content),
            Err(error) => return connection.answer(&head, "404 Not Found", error.to_string().as_bytes()),
        },
        "/write" => match fs::write(query, &body) {
            Ok(()) => "written\n".to_owned(),
            Err(error) => return connection.answer(&head, "403 Forbidden", error.to_string().as_bytes()),
        },
        "/dial" => match dial(query) {
            Ok(said) => said,
            Err(error) => return connection.answer(&head, "502 Bad Gateway", error.to_string().as_bytes()),
        },
        "/slow" => {
            pause(number(query));
            "slow\n".to_owned()
        }
        "/status" => return connection.answer(&head, query, b"as asked\n"),
        "/hang" => return hang(connection),
        "/hung-up" => format!("{}\n", HUNG_UP.load(Ordering::SeqCst)),
        "/stream" => return stream(connection, &head, query),
        "/big" => return connection.answer(&head, "200 OK", &vec![b'x'; usize::try_from(number(query)).unwrap_or(0)]),
        "/cut" => return last(connection, b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\nConnection: close\r\n\r\nshort"),
        "/garbage" => return last(connection, b"this is not HTTP\r\n\r\n"),
        "/allocate" => {
            let bytes = usize::try_from(number(query)).unwrap_or(0) << 20;
            let touched = vec![1_u8; bytes];
            format!("{}\n", touched.iter().step_by(4096).map(|byte| u64::from(*byte)).sum::<u64>())
        }
        "/log" => {
            println!("out: {query}");
            eprintln!("err: {query}");
            "logged\n".to_owned()
        }
        "/exit" => process::exit(query.parse().unwrap_or(0)),
        path => appetite::answer(path, query).unwrap_or_else(|| "probe\n".to_owned()),
    };
    connection.answer(&head, "200 OK", text.as_bytes())
}

/// Writes bytes and closes.
fn last(connection: &mut Connection, bytes: &[u8]) -> io::Result<()> {
    connection.stream.write_all(bytes).and(Err(io::ErrorKind::ConnectionAborted.into()))
}

/// Answers before the body is there, and reads what still comes, so that the answer is not lost by a reset.
fn early(connection: &mut Connection) -> io::Result<()> {
    connection.stream.write_all(b"HTTP/1.1 403 Forbidden\r\nContent-Length: 0\r\nConnection: close\r\n\r\n")?;
    connection.stream.shutdown(Shutdown::Write)?;
    while matches!(connection.stream.read(&mut [0; 4096]), Ok(1..)) {}
    Err(io::ErrorKind::ConnectionAborted.into())
}

/// `tcp/ADDRESS:PORT` or `udp/ADDRESS:PORT`: what a server there says to a byte.
fn dial(query: &str) -> io::Result<String> {
    let (protocol, address) = query.split_once('/').ok_or(io::ErrorKind::InvalidInput)?;
    let address: SocketAddr = address.parse().map_err(io::Error::other)?;
    let mut said = [0; 200];
    let read = if protocol == "udp" {
        let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
        socket.set_read_timeout(Some(DIAL_TIME_MAX))?;
        socket.connect(address)?;
        socket.send(b"x")?;
        socket.recv(&mut said)?
    } else {
        let mut stream = TcpStream::connect_timeout(&address, DIAL_TIME_MAX)?;
        stream.set_read_timeout(Some(DIAL_TIME_MAX))?;
        stream.write_all(b"x")?;
        stream.read(&mut said)?
    };
    Ok(String::from_utf8_lossy(&said[..read]).into_owned())
}

/// Never answers; counts the moment at which the client goes.
fn hang(connection: &mut Connection) -> io::Result<()> {
    while matches!(connection.stream.read(&mut [0; 1024]), Ok(1..)) {}
    HUNG_UP.fetch_add(1, Ordering::SeqCst);
    Err(io::ErrorKind::ConnectionAborted.into())
}

/// `COUNT,MILLIS`: so many chunks with so long a pause after each.
fn stream(connection: &mut Connection, head: &Head, query: &str) -> io::Result<()> {
    let (count, millis) = query.split_once(',').unwrap_or((query, "0"));
    let stream = &mut connection.stream;
    stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain\r\nTransfer-Encoding: chunked\r\n\r\n")?;
    for line in 0..number(count) {
        let line = format!("line {line}\n");
        stream.write_all(format!("{:x}\r\n{line}\r\n", line.len()).as_bytes())?;
        pause(number(millis));
    }
    stream.write_all(b"0\r\n\r\n")?;
    if head.keep_alive { Ok(()) } else { Err(io::Error::other("closed as asked")) }
}

fn number(text: &str) -> u64 {
    text.parse().unwrap_or(0)
}

fn pause(millis: u64) {
    let (_keep, nothing) = mpsc::channel::<()>();
    let _ = nothing.recv_timeout(Duration::from_millis(millis));
}

//! Other machines, other functions, the host.

use std::io;
use std::net::{SocketAddr, TcpStream};
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr as UnixAddr, UnixListener, UnixStream};
use std::time::Duration;

use crate::kernel::call;
use crate::{Attack, Loot, got};

/// How long a peer may take that does not even refuse.
const ANSWER_MAX: Duration = Duration::from_secs(3);

pub(crate) const ATTACKS: &[Attack] = &[
    ("socket", socket),
    ("connect", |address| {
        let address: SocketAddr = address.parse().map_err(io::Error::other)?;
        TcpStream::connect_timeout(&address, ANSWER_MAX).map(|_| format!("{address} answers"))
    }),
    ("abstract", |name| {
        UnixStream::connect_addr(&UnixAddr::from_abstract_name(name)?).map(|_| format!("the abstract socket {name} answers"))
    }),
    ("unix", |path| UnixStream::connect(path).map(|_| format!("the socket {path} answers"))),
    ("interface-down", |_| interface_down()),
    ("shared-memory", |key| got(call(libc::SYS_shmget, [number(key)?.into(), 0.into(), 0.into()]))),
    ("semaphore", |key| got(call(libc::SYS_semget, [number(key)?.into(), 0.into(), 0.into()]))),
    ("message-queue", |key| got(call(libc::SYS_msgget, [number(key)?.into(), 0.into()]))),
    ("posix-queue", |name| {
        let name = std::ffi::CString::new(name).unwrap_or_default();
        got(call(libc::SYS_mq_open, [(*name).into(), libc::O_RDONLY.into(), 0.into(), 0.into()]))
    }),
    ("serve", serve),
];

fn number(text: &str) -> io::Result<i64> {
    text.parse().map_err(io::Error::other)
}

/// `FAMILY:KIND:PROTOCOL` by their numbers.
fn socket(what: &str) -> Loot {
    let fields: Result<Vec<i64>, _> = what.split(':').map(number).collect();
    let [family, kind, protocol] = fields?[..] else { return Err(io::Error::other("FAMILY:KIND:PROTOCOL is missing")) };
    got(call(libc::SYS_socket, [family.into(), kind.into(), protocol.into()]))
}

/// Switches `lo` off: what needs CAP_NET_ADMIN.
fn interface_down() -> Loot {
    let socket = std::net::UdpSocket::bind("127.0.0.1:0")?;
    // struct ifreq: name, flags (none: down).
    let mut request = [0_u8; 40];
    request[..2].copy_from_slice(b"lo");
    let socket = std::os::fd::AsRawFd::as_raw_fd(&socket);
    got(call(libc::SYS_ioctl, [socket.into(), libc::SIOCSIFFLAGS.into(), request.as_mut_slice().into()]))
}

/// The other side: what is to be found by an attacker elsewhere, by all means at once. `NAME:KEY`; says so, and stays until it is killed.
fn serve(what: &str) -> Loot {
    let (name, key) = what.split_once(':').ok_or_else(|| io::Error::other("NAME:KEY is missing"))?;
    let key = number(key)?;
    let _listener = UnixListener::bind_addr(&UnixAddr::from_abstract_name(name)?)?;
    let create = libc::IPC_CREAT | 0o666;
    let segment = call(libc::SYS_shmget, [key.into(), 4096.into(), create.into()])?;
    let semaphore = call(libc::SYS_semget, [key.into(), 1.into(), create.into()])?;
    let messages = call(libc::SYS_msgget, [key.into(), create.into()])?;
    let queue = std::ffi::CString::new(name).unwrap_or_default();
    let flags = libc::O_RDWR | libc::O_CREAT;
    call(libc::SYS_mq_open, [(*queue).into(), flags.into(), 0o666.into(), 0.into()])?;
    println!("serves");
    // Until whoever started it closes its standard input.
    io::copy(&mut io::stdin(), &mut io::sink())?;
    call(libc::SYS_shmctl, [segment.into(), libc::IPC_RMID.into(), 0.into()])?;
    call(libc::SYS_semctl, [semaphore.into(), 0.into(), libc::IPC_RMID.into(), 0.into()])?;
    call(libc::SYS_msgctl, [messages.into(), libc::IPC_RMID.into(), 0.into()])?;
    got(call(libc::SYS_mq_unlink, [(*queue).into()]))
}

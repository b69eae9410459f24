//! A terminal of a program inside, as the platform has it: its master end.

use std::io;
use std::os::fd::{AsFd, OwnedFd};

use bytes::BytesMut;
use rustix::termios::Winsize;
use serde::{Deserialize, Serialize};
use tokio::io::Interest;
use tokio::io::unix::AsyncFd;

/// Bytes that are read at once: what a terminal holds for its reader (kernel: `N_TTY_BUF_SIZE`).
const READ_BYTES: usize = 4096;
/// The key that ends the input of a program that reads lines, as terminals have it at first: Ctrl-D.
pub const END_OF_INPUT: u8 = 4;

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct TerminalSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

/// The master end of a terminal, on the runtime that polls it. Dropped, it hangs up: the programs on the terminal get SIGHUP.
#[derive(Debug)]
pub struct Terminal {
    master: AsyncFd<OwnedFd>,
}

impl Terminal {
    /// Takes over a master end. Needs a runtime with I/O.
    pub fn new(master: OwnedFd) -> io::Result<Self> {
        rustix::io::ioctl_fionbio(&master, true)?;
        #[expect(
            deprecated,
            reason = "deprecated for types that could change their number or close it; an OwnedFd within AsyncFd does neither"
        )]
        let master = AsyncFd::with_interest(master, Interest::READABLE | Interest::WRITABLE)?;
        Ok(Self { master })
    }

    /// Appends what the programs write; 0 once no program has the terminal open any more. Can be dropped without loss.
    pub async fn read(&self, buffer: &mut BytesMut) -> io::Result<usize> {
        let read = self.master.async_io(Interest::READABLE, |master| {
            let mut bytes = [0; READ_BYTES];
            let length = rustix::io::read(master, &mut bytes[..])?;
            buffer.extend_from_slice(&bytes[..length]);
            Ok(length)
        });
        match read.await {
            // What a master says when its last slave is closed (kernel: n_tty_read).
            Err(error) if error.raw_os_error() == Some(rustix::io::Errno::IO.raw_os_error()) => Ok(0),
            read => read,
        }
    }

    /// Gives the programs what was typed, as much as the terminal takes now, which is told. Can be dropped without loss.
    pub async fn write(&self, bytes: &[u8]) -> io::Result<usize> {
        self.master.async_io(Interest::WRITABLE, |master| Ok(rustix::io::write(master, bytes)?)).await
    }

    /// Tells the programs another size (SIGWINCH).
    pub fn resize(&self, size: TerminalSize) -> io::Result<()> {
        let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
        Ok(rustix::termios::tcsetwinsize(self.master.get_ref().as_fd(), size)?)
    }
}

#[cfg(test)]
mod tests {
    use std::fs::File;
    use std::io::{Read as _, Write as _};

    use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};

    use super::*;

    fn pair() -> (Terminal, File) {
        let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        unlockpt(&master).unwrap();
        let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
        (Terminal::new(master).unwrap(), slave.into())
    }

    #[tokio::test]
    async fn bytes_go_both_ways_until_the_slave_is_closed() {
        let (terminal, mut slave) = pair();
        slave.write_all(b"a\n").unwrap();
        let mut buffer = BytesMut::new();
        assert_eq!(terminal.read(&mut buffer).await.unwrap(), 3);
        assert_eq!(&buffer[..], b"a\r\n");
        assert_eq!(terminal.write(b"line\n").await.unwrap(), 5);
        let mut line = [0; 5];
        slave.read_exact(&mut line).unwrap();
        assert_eq!(&line, b"line\n");
        terminal.resize(TerminalSize { rows: 3, columns: 7 }).unwrap();
        let size = rustix::termios::tcgetwinsize(&slave).unwrap();
        assert_eq!((size.ws_row, size.ws_col), (3, 7));
        slave.write_all(b"last").unwrap();
        drop(slave);
        let mut rest = BytesMut::new();
        while terminal.read(&mut rest).await.unwrap() > 0 {}
        assert!(rest.ends_with(b"last"), "{rest:?}");
        assert_eq!(terminal.read(&mut rest).await.unwrap(), 0);
    }

    #[tokio::test]
    async fn much_input_waits_for_its_reader() {
        let (terminal, slave) = pair();
        let mut mode = rustix::termios::tcgetattr(&slave).unwrap();
        mode.make_raw();
        rustix::termios::tcsetattr(&slave, rustix::termios::OptionalActions::Now, &mode).unwrap();
        let much = vec![b'x'; 300_000];
        let reading = tokio::task::spawn_blocking(move || {
            let mut all = vec![0; 300_000];
            (&slave).read_exact(&mut all).unwrap();
            all
        });
        let mut rest = &much[..];
        while !rest.is_empty() {
            let written = terminal.write(rest).await.unwrap();
            rest = &rest[written..];
        }
        assert_eq!(reading.await.unwrap(), much);
    }
}

//! Terminals of instances: made inside, in the instance's own devpts, and nowhere else.
//!
//! Who makes one stands in the mount namespace of the instance already, where `/dev` and `/dev/pts` are mounts of ours that no capability of
//! a container can take away. Still nothing is believed: the multiplexer is opened without following any link and looked at before it is
//! used, and the other end is had from the kernel by the open multiplexer (`TIOCGPTPEER`), never by a path (CVE-2025-52565 was such a path).

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, FileType, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::process::Uid;
use rustix::pty::OpenptFlags;
use rustix::termios::Winsize;

use crate::protocol::WindowSize;

/// `f_type` of devpts (statfs(2), `DEVPTS_SUPER_MAGIC`).
const DEVPTS: i64 = 0x1cd1;
/// Device number of the multiplexer (kernel: Documentation/admin-guide/devices.txt).
const PTMX: (u32, u32) = (5, 2);
/// Device majors of terminals made by it.
const SLAVES: std::ops::RangeInclusive<u32> = 136..=143;

/// Both ends of a new terminal, close-on-exec.
pub(crate) struct Terminal {
    /// For who looks at it.
    pub(crate) master: OwnedFd,
    /// For the program.
    pub(crate) slave: OwnedFd,
}

/// Makes a terminal of this size that belongs to `owner`. The root directory of this process must be the instance's.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub(crate) fn open(size: WindowSize, owner: Uid) -> Result<Terminal, Errno> {
    let flags = OFlags::RDWR | OFlags::NOCTTY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let master = rustix::fs::openat2(CWD, c"/dev/pts/ptmx", flags, Mode::empty(), resolve)?;
    let found = device(master.as_fd())?;
    if found != PTMX || rustix::fs::fstatfs(&master)?.f_type != DEVPTS {
        return Err(Errno::NOTTY);
    }
    rustix::pty::unlockpt(&master)?;
    let slave = rustix::pty::ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC)?;
    if !SLAVES.contains(&device(slave.as_fd())?.0) {
        return Err(Errno::NOTTY);
    }
    rustix::fs::fchown(&slave, Some(owner), None)?;
    let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
    rustix::termios::tcsetwinsize(&master, size)?;
    Ok(Terminal { master, slave })
}

/// Major and minor number of a character device; `ENOTTY` for what is none.
fn device(file: BorrowedFd<'_>) -> Result<(u32, u32), Errno> {
    let found = rustix::fs::fstat(file)?;
    if FileType::from_raw_mode(found.st_mode) != FileType::CharacterDevice {
        return Err(Errno::NOTTY);
    }
    Ok((rustix::fs::major(found.st_rdev), rustix::fs::minor(found.st_rdev)))
}

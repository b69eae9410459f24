//! The sockets on which the world comes in. The keeper holds them, so that they outlive a daemon.

use std::io;
use std::net::{SocketAddr, TcpListener};
use std::num::NonZero;
use std::os::fd::OwnedFd;
use std::os::unix::fs::{FileTypeExt as _, PermissionsExt as _};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::{Path, PathBuf};
use std::{fs, thread};

use rustix::net::{AddressFamily, SocketFlags, SocketType, ipproto, sockopt};

use super::KeeperError;
use super::data::admin_group;
use super::mode::Mode;

/// Connections that may wait while a daemon is replaced; the kernel cuts it to net.core.somaxconn.
const BACKLOG: i32 = 4096;
/// Most listeners: one per core, as many as the daemon takes over by number.
const LISTENERS_MAX: usize = 64;

/// TCP listeners of one address.
#[derive(Debug)]
pub(super) struct Tcp {
    /// With the port that the kernel chose, if that was asked for.
    pub(super) address: SocketAddr,
    /// One per core, in one SO_REUSEPORT group.
    pub(super) sockets: Vec<OwnedFd>,
}

/// Binds one listener per core.
pub(super) fn tcp(address: SocketAddr) -> Result<Tcp, KeeperError> {
    let fail = |source: io::Error| KeeperError::Listen { address, source };
    let count = thread::available_parallelism().map_or(1, NonZero::get).min(LISTENERS_MAX);
    let family = if address.is_ipv4() { AddressFamily::INET } else { AddressFamily::INET6 };
    let mut bound = address;
    let mut sockets = Vec::with_capacity(count);
    for index in 0..count {
        let make = || -> io::Result<TcpListener> {
            let flags = SocketFlags::CLOEXEC | SocketFlags::NONBLOCK;
            let socket = rustix::net::socket_with(family, SocketType::STREAM, flags, Some(ipproto::TCP))?;
            sockopt::set_socket_reuseaddr(&socket, true)?;
            // The first binds without sharing: with it, root could silently share the port of somebody else who shares.
            if index > 0 {
                sockopt::set_socket_reuseport(&socket, true)?;
            }
            rustix::net::bind(&socket, &bound)?;
            sockopt::set_socket_reuseport(&socket, true)?;
            Ok(TcpListener::from(socket))
        };
        let listener = make().map_err(fail)?;
        bound = listener.local_addr().map_err(fail)?;
        sockets.push(listener);
    }
    // Only now: a connection that came between two binds would be on a listener that gets no more.
    for socket in &sockets {
        rustix::net::listen(socket, BACKLOG).map_err(|errno| fail(errno.into()))?;
    }
    Ok(Tcp { address: bound, sockets: sockets.into_iter().map(OwnedFd::from).collect() })
}

/// The admin socket; its file is removed when this is dropped.
#[derive(Debug)]
pub(super) struct Admin {
    pub(super) socket: OwnedFd,
    path: PathBuf,
}

impl Drop for Admin {
    fn drop(&mut self) {
        // Somebody else may have removed it: then it is as it should be.
        let _ = fs::remove_file(&self.path);
    }
}

/// Binds the admin socket: with mode 0660, of group `funtainer` if there is one; an ordinary user's is nobody else's. A stale one is replaced, a
/// live one refused.
pub(super) fn admin(path: &Path, mode: &Mode) -> Result<Admin, KeeperError> {
    let fail = |source: io::Error| KeeperError::Admin { path: path.to_owned(), source };
    if let Some(parent) = path.parent().filter(|parent| !parent.as_os_str().is_empty()) {
        fs::create_dir_all(parent).map_err(fail)?;
    }
    match fs::symlink_metadata(path) {
        Ok(found) if !found.file_type().is_socket() => {
            return Err(fail(io::Error::new(io::ErrorKind::AlreadyExists, "there is a file that is no socket")));
        }
        Ok(_) if UnixStream::connect(path).is_ok() => return Err(KeeperError::AdminInUse { path: path.to_owned() }),
        Ok(_) => fs::remove_file(path).map_err(fail)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {}
        Err(error) => return Err(fail(error)),
    }
    // Between bind and chmod nobody else may connect.
    let umask = rustix::process::umask(rustix::fs::Mode::from_raw_mode(0o177));
    let bound = UnixListener::bind(path);
    rustix::process::umask(umask);
    let listener = bound.map_err(fail)?;
    let admin = Admin { socket: listener.into(), path: path.to_owned() };
    if !mode.is_rootless() {
        if let Some(group) = admin_group() {
            std::os::unix::fs::chown(path, None, Some(group.as_raw())).map_err(fail)?;
        }
        fs::set_permissions(path, fs::Permissions::from_mode(0o660)).map_err(fail)?;
    }
    rustix::io::ioctl_fionbio(&admin.socket, true).map_err(|errno| fail(errno.into()))?;
    Ok(admin)
}

//! The platform's own layer: what every container of a revision has, whatever its image holds, at no cost of a start.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, FileType, Mode, OFlags, RawMode};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use super::Mounted;
use crate::step::StepError;

/// A small file in `/etc` of mode 0644 that belongs to root inside.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct EtcFile {
    /// Its name in `/etc`.
    pub name: &'static CStr,
    /// Its content.
    pub content: Vec<u8>,
}

/// Where each instance mounts something: made here once where an image does not have them.
const MOUNT_POINTS: [&CStr; 3] = [c"dev", c"proc", c"sys"];
/// Room of the file system: a few small files.
pub(super) const BYTES: u64 = 256 << 10;

/// What an image has at a name of its root.
enum Found {
    Nothing,
    Directory { mode: RawMode, uid: u32, gid: u32 },
    Other,
}

/// Fills an empty file system that is to lie on `layers` (the uppermost first, with their ids mapped), for the range from `owner` on.
///
/// A layer's directory takes the place of the ones below it, so that `/etc` gets the owner and mode of the image's. What lies at a file's
/// name in the image is hidden, a symbolic link among others; none is followed. An image whose `/etc` is no directory gets no files.
pub(super) fn fill(root: BorrowedFd<'_>, layers: &[Mounted], owner: u32, files: &[EtcFile]) -> Result<(), StepError> {
    let failed = |errno| StepError { step: "make the platform's layer", errno };
    for name in MOUNT_POINTS {
        if let Found::Nothing = find(layers, name)? {
            directory(root, name, 0o755, (owner, owner)).map_err(failed)?;
        }
    }
    let etc = match find(layers, c"etc")? {
        Found::Nothing => directory(root, c"etc", 0o755, (owner, owner)),
        Found::Directory { mode, uid, gid } => directory(root, c"etc", mode, (uid, gid)),
        Found::Other => return Ok(()),
    };
    let etc = etc.map_err(failed)?;
    for EtcFile { name, content } in files {
        file(etc.as_fd(), name, content, owner).map_err(failed)?;
    }
    Ok(())
}

fn find(layers: &[Mounted], name: &CStr) -> Result<Found, StepError> {
    for layer in layers {
        let stat = match rustix::fs::statat(layer.as_fd(), name, AtFlags::SYMLINK_NOFOLLOW) {
            Ok(stat) => stat,
            Err(Errno::NOENT) => continue,
            Err(errno) => return Err(StepError { step: "look into a layer", errno }),
        };
        return Ok(match FileType::from_raw_mode(stat.st_mode) {
            FileType::Directory => Found::Directory { mode: stat.st_mode & 0o7777, uid: stat.st_uid, gid: stat.st_gid },
            // Deleted by this layer.
            FileType::CharacterDevice if stat.st_rdev == 0 => Found::Nothing,
            _ => Found::Other,
        });
    }
    Ok(Found::Nothing)
}

fn directory(root: BorrowedFd<'_>, name: &CStr, mode: RawMode, owner: (u32, u32)) -> Result<OwnedFd, Errno> {
    rustix::fs::mkdirat(root, name, Mode::from_raw_mode(0o700))?;
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let created = rustix::fs::openat(root, name, flags, Mode::empty())?;
    rustix::fs::fchown(&created, Some(Uid::from_raw(owner.0)), Some(Gid::from_raw(owner.1)))?;
    rustix::fs::fchmod(&created, Mode::from_raw_mode(mode))?;
    Ok(created)
}

fn file(directory: BorrowedFd<'_>, name: &CStr, content: &[u8], owner: u32) -> Result<(), Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let created = rustix::fs::openat(directory, name, flags, Mode::from_raw_mode(0o600))?;
    let mut rest = content;
    while !rest.is_empty() {
        let written = rustix::io::write(&created, rest)?;
        rest = &rest[written..];
    }
    rustix::fs::fchown(&created, Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)))?;
    rustix::fs::fchmod(&created, Mode::from_raw_mode(0o644))
}

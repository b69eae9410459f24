//! The file of this program, out of the reach of images.
//!
//! Zygotes and inits are forked from the keeper and not executed anew. Until it executes the image's program, a process of an instance therefore
//! has the keeper's file behind its `/proc/self/exe`, and it is there that the kernel looks when an image's program names that link as its
//! interpreter (`#!/proc/self/exe`, or `PT_INTERP` of an ELF file). The image would run the host's program, and read it; this is how
//! CVE-2019-5736 came to write to it.
//!
//! So a keeper runs from a file that nobody can execute a second time, and does so by executing itself once, first thing:
//! ```text
//! serve ─► its file, mounted once more and in no tree ─► executed from there ─► that mount set noexec ─► the keeper
//!     └──► where it may not mount: a copy in memory, sealed ─► executed from there ─► the copy's mode set to 0 ─► the keeper
//! ```
//! The mount costs no memory: it is the same file in the same page cache. The copy costs the file's size. The flag and the mode are looked
//! at when a file is opened for execution, not when its mapped pages are.
//!
//! The links `/proc/PID/exe` of zygotes and inits are closed in another way: those processes are not dumpable.

use std::ffi::{CString, OsStr};
use std::fs::File;
use std::io;
use std::os::fd::{AsFd, AsRawFd as _, BorrowedFd, FromRawFd as _, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use rustix::fs::{Access, MemfdFlags, Mode, OFlags, SealFlags, Stat};
use rustix::io::{Errno, FdFlags};
use rustix::mount::{MountAttrFlags, OpenTreeFlags};

use crate::mount;
use crate::step::{StepError, at, errno_of};

/// The kernel's link to this process's file.
const OWN: &str = "/proc/self/exe";
/// Tells the executed keeper what it was executed from: `mount` or `copy`, the descriptor of that, the one of the original.
const MARKER: &str = "FUNTAINER_EXECUTED_FROM";

/// The original's descriptor stands from here on: above all fixed numbers that a daemon's descriptors are placed at.
const APART: i32 = 256;

/// The file that this program was started from, where everybody may execute it: for the daemon.
#[derive(Debug)]
pub(crate) struct Executable {
    original: OwnedFd,
}

/// What an executed keeper stands on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Ground {
    Mount,
    Copy,
}

impl Executable {
    /// Executes this program anew from a place of its own and closes that place; the first call of a process therefore does not return, but
    /// for a failure. Everything is read again: to be called before anything is opened.
    pub(crate) fn settle() -> Result<Self, StepError> {
        if let Some((ground, place, original)) = std::env::var_os(MARKER).and_then(|marker| inherited(&marker)) {
            close_ground(ground, place.as_fd())?;
            return match rustix::fs::access(OWN, Access::EXEC_OK) {
                Err(Errno::ACCESS) => {
                    let apart = rustix::io::fcntl_dupfd_cloexec(&original, APART).map_err(at("keep a descriptor"))?;
                    Ok(Self { original: apart })
                }
                // What follows would be a start over.
                _ => Err(StepError { step: "take the keeper's file out of reach", errno: Errno::PERM }),
            };
        }
        let original = rustix::fs::open(OWN, OFlags::PATH, Mode::empty()).map_err(at("open the keeper's file"))?;
        let (ground, place) = match mounted() {
            Ok(mount) => (Ground::Mount, mount),
            Err(_) => (Ground::Copy, copied()?),
        };
        rustix::io::fcntl_setfd(&place, FdFlags::empty()).map_err(at("keep a descriptor"))?;
        let marker = Marker { ground, place: place.as_raw_fd(), original: original.as_raw_fd() };
        let argv: Vec<CString> = std::env::args_os().filter_map(|text| CString::new(text.as_bytes()).ok()).collect();
        Err(execute(place.as_fd(), &argv, Some(marker)))
    }

    /// Turns this process into another one of the same program; returns only on failure.
    pub(crate) fn execute(&self, argv: &[CString]) -> StepError {
        execute(self.original.as_fd(), argv, None)
    }
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Marker {
    ground: Ground,
    place: i32,
    original: i32,
}

impl Marker {
    fn text(self) -> String {
        let ground = match self.ground {
            Ground::Mount => "mount",
            Ground::Copy => "copy",
        };
        format!("{ground},{},{}", self.place, self.original)
    }

    fn parse(text: &str) -> Option<Self> {
        let mut fields = text.split(',');
        let ground = match fields.next()? {
            "mount" => Ground::Mount,
            "copy" => Ground::Copy,
            _ => return None,
        };
        let mut number = || fields.next()?.parse().ok().filter(|number| *number > 2);
        let marker = Self { ground, place: number()?, original: number()? };
        (fields.next().is_none() && marker.place != marker.original).then_some(marker)
    }
}

/// Takes over what [`Executable::settle`] left before it executed this program; nothing if the variable came from somebody else.
fn inherited(marker: &OsStr) -> Option<(Ground, OwnedFd, OwnedFd)> {
    let Marker { ground, place, original } = Marker::parse(marker.to_str()?)?;
    let own = rustix::fs::stat(OWN).ok()?;
    // SAFETY: borrowed for this call; a number at which nothing is open makes it fail.
    let at_place = rustix::fs::fstat(unsafe { BorrowedFd::borrow_raw(place) }).ok()?;
    if (at_place.st_dev, at_place.st_ino) != (own.st_dev, own.st_ino) {
        return None;
    }
    for number in [place, original] {
        // SAFETY: as above.
        rustix::io::fcntl_setfd(unsafe { BorrowedFd::borrow_raw(number) }, FdFlags::CLOEXEC).ok()?;
    }
    // SAFETY: both are open, as was just seen, and came through the exec: nothing in this process, which has opened nothing yet, owns them.
    let take = |number| unsafe { OwnedFd::from_raw_fd(number) };
    Some((ground, take(place), take(original)))
}

/// A detached mount of this program's file.
fn mounted() -> Result<OwnedFd, StepError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    // By its path where this process has changed its mount namespace: the link leads to a mount of the former one, which cannot be cloned.
    let mount = rustix::mount::open_tree(rustix::fs::CWD, OWN, flags)
        .or_else(|_| rustix::mount::open_tree(rustix::fs::CWD, rustix::fs::readlink(OWN, Vec::new())?, flags))
        .map_err(at("mount the keeper's file"))?;
    let identity = |found: Stat| (found.st_dev, found.st_ino);
    if rustix::fs::fstat(&mount).map(identity) != rustix::fs::stat(OWN).map(identity) {
        return Err(StepError { step: "find the keeper's file at its path", errno: Errno::NOENT });
    }
    let flags = MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NOSUID;
    mount::add_flags(mount.as_fd(), flags).map_err(at("protect the keeper's file"))?;
    Ok(mount)
}

/// A copy of this program's file in memory, which nobody can change.
fn copied() -> Result<OwnedFd, StepError> {
    let failed = |step| move |error: io::Error| StepError { step, errno: errno_of(&error) };
    let flags = MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING;
    // Kernels before 6.3 do not know the flag, and make every such file executable.
    let made = rustix::fs::memfd_create(c"funtainer", flags | MemfdFlags::EXEC)
        .or_else(|_| rustix::fs::memfd_create(c"funtainer", flags))
        .map_err(at("make a copy of the keeper's file"))?;
    let mut copy = File::from(made);
    let mut own = File::open(OWN).map_err(failed("read the keeper's file"))?;
    io::copy(&mut own, &mut copy).map_err(failed("copy the keeper's file"))?;
    rustix::fs::fchmod(&copy, Mode::RUSR | Mode::XUSR).map_err(at("set the mode of the keeper's copy"))?;
    let seals = SealFlags::WRITE | SealFlags::SHRINK | SealFlags::GROW | SealFlags::SEAL;
    rustix::fs::fcntl_add_seals(&copy, seals).map_err(at("seal the keeper's copy"))?;
    Ok(copy.into())
}

/// From here on the file that this process runs from cannot be executed.
fn close_ground(ground: Ground, place: BorrowedFd<'_>) -> Result<(), StepError> {
    match ground {
        Ground::Mount => mount::add_flags(place, MountAttrFlags::MOUNT_ATTR_NOEXEC),
        Ground::Copy => rustix::fs::fchmod(place, Mode::empty()),
    }
    .map_err(at("close the keeper's file to execution"))
}

/// execveat(2) with the environment of this process.
fn execute(file: BorrowedFd<'_>, argv: &[CString], marker: Option<Marker>) -> StepError {
    let argv: Vec<_> = argv.iter().map(|argument| argument.as_ptr()).chain([std::ptr::null()]).collect();
    let variables = std::env::vars_os().filter(|(name, _)| name != MARKER);
    let variables = variables.chain(marker.map(|marker| (MARKER.into(), marker.text().into())));
    let env: Vec<CString> =
        variables.filter_map(|(name, value)| CString::new([name.as_bytes(), b"=", value.as_bytes()].concat()).ok()).collect();
    let env: Vec<_> = env.iter().map(|variable| variable.as_ptr()).chain([std::ptr::null()]).collect();
    // SAFETY: the path is empty and ends in NUL, both arrays end in a null pointer and hold pointers to strings that live; on success this
    // memory is gone, on failure the call returns. Needed because neither the standard library nor rustix executes a descriptor.
    unsafe {
        libc::syscall(libc::SYS_execveat, file.as_raw_fd(), c"".as_ptr(), argv.as_ptr(), env.as_ptr(), libc::AT_EMPTY_PATH)
    };
    let errno = errno_of(&io::Error::last_os_error());
    StepError { step: "execute this program again (its file must be executable by everybody)", errno }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn markers_are_read_back_and_others_are_none() {
        for ground in [Ground::Mount, Ground::Copy] {
            let marker = Marker { ground, place: 3, original: 14 };
            assert_eq!(Marker::parse(&marker.text()), Some(marker));
        }
        for text in ["", "mount", "mount,3", "mount,3,4,5", "mount,3,3", "mount,2,3", "copy,-1,3", "bind,3,4", "mount,x,4"] {
            assert_eq!(Marker::parse(text), None, "{text}");
        }
        // Descriptors that are not this program's file.
        assert!(inherited(OsStr::new("mount,1000,1001")).is_none());
    }

    /// Set in the processes that [`the_keepers_file_cannot_be_executed_again`] starts: how they are to settle.
    const HELPER: &str = "FUNTAINER_TEST_EXECUTABLE";

    #[test]
    fn the_keepers_file_cannot_be_executed_again() {
        for ground in ["mount", "copy"] {
            let output = std::process::Command::new(std::env::current_exe().expect("this test's file"))
                .args(["executable::tests::helper", "--exact", "--test-threads=1", "--nocapture"])
                .env(HELPER, ground)
                .output()
                .expect("a process");
            let said = String::from_utf8_lossy(&output.stdout);
            assert!(output.status.success() && said.contains("closed, and the original open"), "{ground}: {said}");
        }
    }

    #[test]
    fn helper() {
        let Some(ground) = std::env::var_os(HELPER) else { return };
        if ground == "copy" && std::env::var_os(MARKER).is_none() {
            // As `settle` does where it may not mount.
            let original = rustix::fs::open(OWN, OFlags::PATH, Mode::empty()).unwrap();
            let place = copied().unwrap();
            rustix::io::fcntl_setfd(&place, FdFlags::empty()).unwrap();
            let marker = Marker { ground: Ground::Copy, place: place.as_raw_fd(), original: original.as_raw_fd() };
            let argv: Vec<CString> = std::env::args_os().filter_map(|text| CString::new(text.as_bytes()).ok()).collect();
            panic!("{}", execute(place.as_fd(), &argv, Some(marker)));
        }
        let executable = Executable::settle().unwrap();
        let refused = std::process::Command::new(OWN).arg("--list").output().map_err(|error| error.kind());
        assert_eq!(refused.map(|output| output.status), Err(io::ErrorKind::PermissionDenied));
        // Written to by nobody either: the mount is read-only, the copy sealed.
        let written = File::options().append(true).open(OWN).and_then(|mut own| io::Write::write(&mut own, b"x"));
        assert!(written.is_err(), "written");
        let again = format!("/proc/self/fd/{}", executable.original.as_raw_fd());
        let listed = std::process::Command::new(again).arg("--list").output().expect("the original can be executed");
        assert!(String::from_utf8_lossy(&listed.stdout).contains("executable::tests::helper"));
        println!("closed, and the original open");
    }
}

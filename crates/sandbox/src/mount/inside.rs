//! What zygote and init do inside: attaching, /dev, pivot, masks.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{CWD, Mode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountAttrFlags, MountFlags, MountPropagationFlags, MoveMountFlags, OpenTreeFlags, UnmountFlags, mount, mount_bind,
    mount_change, move_mount, open_tree, unmount,
};

use super::{Attributes, INERT, Tmpfs, set_attributes, tmpfs};
use crate::step::{StepError, at};

/// Devices that a container gets, by their names in the host's `/dev`.
pub const DEVICES: [&CStr; 6] = [c"null", c"zero", c"full", c"random", c"urandom", c"tty"];

/// Links in `/dev`: name and target.
const LINKS: [(&CStr, &CStr); 5] = [
    (c"fd", c"/proc/self/fd"),
    (c"stdin", c"/proc/self/fd/0"),
    (c"stdout", c"/proc/self/fd/1"),
    (c"stderr", c"/proc/self/fd/2"),
    (c"ptmx", c"pts/ptmx"),
];

/// Places in `/dev` that each instance mounts over.
const PLACES: [&CStr; 3] = [c"pts", c"shm", c"mqueue"];

/// Room of the tmpfs under `/dev`: it holds names only.
const DEV_BYTES: u64 = 64 << 10;

/// What a container does not see: Docker's default list (moby `oci/defaults.go`).
pub const MASKED: [&CStr; 12] = [
    c"/proc/asound",
    c"/proc/acpi",
    c"/proc/interrupts",
    c"/proc/kcore",
    c"/proc/keys",
    c"/proc/latency_stats",
    c"/proc/timer_list",
    c"/proc/timer_stats",
    c"/proc/sched_debug",
    c"/proc/scsi",
    c"/sys/firmware",
    c"/sys/devices/virtual/powercap",
];

/// What a container cannot write: Docker's default list.
pub const READ_ONLY: [&CStr; 5] = [c"/proc/bus", c"/proc/fs", c"/proc/irq", c"/proc/sys", c"/proc/sysrq-trigger"];

/// No mount of this mount namespace is seen elsewhere, nor the other way round. The first act in a new mount namespace.
///
/// One system call: may be called between clone and exec.
pub fn make_private() -> Result<(), StepError> {
    mount_change(c"/", MountPropagationFlags::PRIVATE | MountPropagationFlags::REC).map_err(at("make all mounts private"))
}

/// Opens the directory `name` of the image to mount over it, and makes it if it is not there. No symbolic link is followed, at no place of
/// the name: an image cannot lead a mount elsewhere (`ELOOP`, or `ENOTDIR` for a link in the last place).
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn target(root: BorrowedFd<'_>, name: &CStr) -> Result<OwnedFd, StepError> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let resolve = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_MAGICLINKS;
    let open = || rustix::fs::openat2(root, name, flags, Mode::empty(), resolve);
    match open() {
        Err(Errno::NOENT) => {
            rustix::fs::mkdirat(root, name, Mode::from_raw_mode(0o755)).map_err(at("make a mount point"))?;
            open().map_err(at("open a new mount point"))
        }
        other => other.map_err(at("open a mount point")),
    }
}

/// Attaches a detached mount at an opened directory (or file, for a mount of one).
///
/// One system call: may be called between clone and exec.
pub fn attach(mount: BorrowedFd<'_>, target: BorrowedFd<'_>) -> Result<(), StepError> {
    move_mount(mount, c"", target, c"", MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH | MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH)
        .map_err(at("attach a mount"))
}

/// The part of a mount that is in sight at an opened directory, as a mount of its own: for [`attach`]. It stays writable where the mount itself
/// becomes read-only.
///
/// One system call: may be called between clone and exec.
pub fn part(directory: BorrowedFd<'_>) -> Result<OwnedFd, StepError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    open_tree(directory, c"", flags).map_err(at("clone a part of a mount"))
}

/// As [`part`], but read-only and without programs and devices: for a directory of the host's that an instance may look at.
pub fn view(directory: BorrowedFd<'_>) -> Result<OwnedFd, StepError> {
    let view = part(directory)?;
    let flags = INERT | MountAttrFlags::MOUNT_ATTR_RDONLY;
    let attributes = Attributes { set: u64::from(flags.bits()), ..Attributes::default() };
    set_attributes(view.as_fd(), c"", libc::AT_EMPTY_PATH, &attributes).map_err(at("set a view read-only"))?;
    Ok(view)
}

/// Binds the directory at a path over that at another, with the flags of its mount. For paths of our own: links are followed.
///
/// One system call: may be called between clone and exec.
pub fn bind(from: &CStr, to: &CStr) -> Result<(), StepError> {
    mount_bind(from, to).map_err(at("bind a directory"))
}

/// Moves a mount of this mount namespace, with all that is mounted on it, to an opened directory.
///
/// One system call: may be called between clone and exec.
pub fn move_tree(from: &CStr, target: BorrowedFd<'_>) -> Result<(), StepError> {
    move_mount(CWD, from, target, c"", MoveMountFlags::MOVE_MOUNT_T_EMPTY_PATH).map_err(at("move a mount"))
}

/// Binds the file `name` beneath `from` over the file `name_to` beneath `to`, neither of which may be a symbolic link.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn bind_file(from: BorrowedFd<'_>, name: &CStr, to: BorrowedFd<'_>, name_to: &CStr) -> Result<(), StepError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_SYMLINK_NOFOLLOW;
    let file = open_tree(from, name, flags).map_err(at("clone the mount of a file"))?;
    move_mount(&file, c"", to, name_to, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH).map_err(at("bind a file"))
}

/// Builds the tree of `/dev` on the directory `at_directory` of this mount namespace: a read-only tmpfs with the host's device nodes from
/// `host_dev` (usually `/dev`), the usual links, and the directories `pts`, `shm` and `mqueue` for each instance to mount over. Instances
/// take it by [`move_tree`] out of their own copy of the mount namespace.
pub fn device_tree(host_dev: &CStr, at_directory: &CStr) -> Result<(), StepError> {
    let host = rustix::fs::open(host_dev, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(at("open the host's /dev"))?;
    let place = rustix::fs::open(at_directory, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(at("open the place of the tree for /dev"))?;
    let root = tmpfs(&Tmpfs { size_bytes: DEV_BYTES, uid: 0, gid: 0, mode: 0o755, attributes: INERT })?;
    attach(root.as_fd(), place.as_fd())?;
    for name in DEVICES {
        let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
        rustix::fs::openat(&root, name, flags, Mode::from_raw_mode(0o666)).map_err(at("make a file for a device"))?;
        bind_file(host.as_fd(), name, root.as_fd(), name)?;
    }
    for (name, link) in LINKS {
        rustix::fs::symlinkat(link, &root, name).map_err(at("make a link in /dev"))?;
    }
    for name in PLACES {
        rustix::fs::mkdirat(&root, name, Mode::from_raw_mode(0o755)).map_err(at("make a directory in /dev"))?;
    }
    seal(root.as_fd())
}

/// Sets the mount behind a descriptor read-only, not those on it.
pub fn seal(mount: BorrowedFd<'_>) -> Result<(), StepError> {
    let attributes = Attributes { set: u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits()), ..Attributes::default() };
    set_attributes(mount, c"", libc::AT_EMPTY_PATH, &attributes).map_err(at("set a mount read-only"))
}

/// Makes `root` (an attached mount) the root of this mount namespace, and lets go of the old one with all that is mounted on it. The
/// working directory is `/` afterwards. Descriptors of the old root stay open: close them.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn pivot(root: BorrowedFd<'_>) -> Result<(), StepError> {
    rustix::process::fchdir(root).map_err(at("enter the new root"))?;
    // The same place for both: the old root comes to lie on top of the new one, and is taken off (pivot_root(2), "pivot_root(".", ".")").
    rustix::process::pivot_root(c".", c".").map_err(at("pivot_root"))?;
    unmount(c".", UnmountFlags::DETACH).map_err(at("detach the old root"))?;
    rustix::process::chdir(c"/").map_err(at("enter /"))
}

/// Sets the mount at `path` read-only, not those on it.
///
/// One system call: may be called between clone and exec.
pub fn remount_read_only(path: &CStr) -> Result<(), StepError> {
    let attributes = Attributes { set: u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits()), ..Attributes::default() };
    set_attributes(CWD, path, libc::AT_SYMLINK_NOFOLLOW, &attributes).map_err(at("set a mount read-only"))
}

/// Sets the mount at `path` read-only, and all that lie on it.
///
/// One system call: may be called between clone and exec.
pub fn remount_tree_read_only(path: &CStr) -> Result<(), StepError> {
    let attributes = Attributes { set: u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits()), ..Attributes::default() };
    set_attributes(CWD, path, libc::AT_SYMLINK_NOFOLLOW | libc::AT_RECURSIVE, &attributes)
        .map_err(at("set a tree of mounts read-only"))
}

/// Sets a mount read-only, by a descriptor of its root.
pub fn set_read_only(mount: BorrowedFd<'_>) -> Result<(), StepError> {
    let attributes = Attributes { set: u64::from(MountAttrFlags::MOUNT_ATTR_RDONLY.bits()), ..Attributes::default() };
    set_attributes(mount, c"", libc::AT_EMPTY_PATH, &attributes).map_err(at("set a mount read-only"))
}

/// Hides [`MASKED`] and write-protects [`READ_ONLY`]. After [`pivot`], and with our own mounts at `/proc`, `/sys` and `/dev`: then no
/// path here goes through the image.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn mask_all() -> Result<(), StepError> {
    let mut empty: Option<&CStr> = None;
    for path in MASKED {
        mask(path, &mut empty)?;
    }
    for path in READ_ONLY {
        match mount_bind(path, path) {
            Err(Errno::NOENT) => {}
            other => other.map_err(at("bind a path to protect it")).and_then(|()| remount_read_only(path))?,
        }
    }
    Ok(())
}

/// Puts `/dev/null` over a file, or an empty read-only directory over a directory. The first of these is a tmpfs, which the next ones
/// share: `empty` keeps its place.
fn mask(path: &'static CStr, empty: &mut Option<&'static CStr>) -> Result<(), StepError> {
    // A bind of a file over a directory is refused with ENOTDIR, before anything is changed.
    match mount_bind(c"/dev/null", path) {
        Ok(()) | Err(Errno::NOENT) => return Ok(()),
        Err(Errno::NOTDIR) => {}
        Err(errno) => return Err(StepError { step: "mask a file", errno }),
    }
    if let Some(first) = *empty {
        return mount_bind(first, path).map_err(at("mask a directory"));
    }
    let flags = MountFlags::RDONLY | MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
    mount(c"tmpfs", path, c"tmpfs", flags, c"size=4k,nr_inodes=2,mode=555").map_err(at("mask a directory"))?;
    *empty = Some(path);
    Ok(())
}

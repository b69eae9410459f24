//! The root file system of an instance, made by the keeper: layers, a writable upper one, the overlay of both.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{AtFlags, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, OpenTreeFlags, fsconfig_set_fd, fsconfig_set_flag, fsconfig_set_string, open_tree};
use rustix::process::{Gid, Uid};

use super::{Attributes, Tmpfs, create, open, read_only, set_attributes, tmpfs};
use crate::step::{StepError, at};

/// Where the superblock of erofs stands in its file.
const EROFS_SUPERBLOCK_OFFSET: u64 = 1024;
/// Magic number of erofs.
const EROFS_MAGIC: u32 = 0xE0F5_E1E2;
/// Most metadata that is read ahead of a mount; the rest comes when it is asked for. 8 MiB hold about 80,000 files.
const METADATA_READ_MAX: u64 = 8 << 20;
/// One read of it.
const METADATA_READ_STEP: usize = 64 << 10;

/// Mounts the erofs image in `file` read-only and `nodev`, attached nowhere. Mount each file once and clone it ([`idmapped`]): two mounts
/// by file share no page cache. `ENOTBLK` where the kernel mounts no files (before 6.12) or the file lies on tmpfs or an overlay.
/// Needs CAP_SYS_ADMIN in the first user namespace, and `/proc`.
///
/// The metadata, which our writer puts at the end, is read first: a first walk is then 1.5 times as fast.
pub fn erofs(file: BorrowedFd<'_>) -> Result<OwnedFd, StepError> {
    read_metadata(file).map_err(at("read the metadata of a layer"))?;
    let context = open(c"erofs", "fsopen erofs")?;
    let source = CString::new(format!("/proc/self/fd/{}", file.as_raw_fd())).expect("no NUL in it");
    fsconfig_set_string(&context, c"source", &*source).map_err(at("set the file of a layer"))?;
    read_only(&context)?;
    create(&context, MountAttrFlags::MOUNT_ATTR_RDONLY | MountAttrFlags::MOUNT_ATTR_NODEV, "mount a layer")
}

/// Reads the area of the inodes into the page cache. A file that is no erofs is left to the kernel's own check.
fn read_metadata(file: BorrowedFd<'_>) -> Result<(), Errno> {
    let mut superblock = [0_u8; 128];
    if rustix::io::pread(file, &mut superblock[..], EROFS_SUPERBLOCK_OFFSET)? < superblock.len() {
        return Ok(());
    }
    let word = |offset: usize| {
        u32::from_le_bytes([superblock[offset], superblock[offset + 1], superblock[offset + 2], superblock[offset + 3]])
    };
    let block_bits = u32::from(superblock[12]);
    if word(0) != EROFS_MAGIC || block_bits > 16 {
        return Ok(());
    }
    let size = rustix::fs::fstat(file)?.st_size as u64;
    let mut position = u64::from(word(40)) << block_bits;
    let end = size.min(position + METADATA_READ_MAX);
    let mut buffer = vec![0_u8; METADATA_READ_STEP];
    while position < end {
        match rustix::io::pread(file, &mut buffer[..], position)? {
            0 => break,
            read => position += read as u64,
        }
    }
    Ok(())
}

/// A clone of `mount` in which ids are those of the user namespace: id N of the image is id N inside, `base + N` on the host. `EPERM` if
/// the mount is such a clone already.
pub fn idmapped(mount: BorrowedFd<'_>, user_namespace: BorrowedFd<'_>) -> Result<OwnedFd, StepError> {
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let clone = open_tree(mount, c"", flags).map_err(at("clone the mount of a layer"))?;
    let attributes = Attributes {
        set: u64::from(MountAttrFlags::MOUNT_ATTR_IDMAP.bits()),
        userns_fd: user_namespace.as_raw_fd() as u64,
        ..Attributes::default()
    };
    set_attributes(clone.as_fd(), c"", libc::AT_EMPTY_PATH, &attributes).map_err(at("map the ids of a layer"))?;
    Ok(clone)
}

/// The writable part of a root file system: a tmpfs that vanishes with the last mount of it.
#[derive(Debug)]
pub struct Writable {
    /// A mount that no namespace has is taken apart when its own descriptor is closed; an overlay cannot be made of its directories then.
    _mount: OwnedFd,
    upper: OwnedFd,
    work: OwnedFd,
}

impl Writable {
    /// Makes it with room for `size_bytes`. It belongs to the host id `owner`, which is root inside. Pages count towards the memory limit
    /// of who writes them.
    pub fn make(size_bytes: u64, owner: u32) -> Result<Self, StepError> {
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV;
        let mount = tmpfs(&Tmpfs { size_bytes, uid: owner, gid: owner, mode: 0o700, attributes })?;
        let directory = |name, mode| -> Result<OwnedFd, Errno> {
            rustix::fs::mkdirat(&mount, name, Mode::from_raw_mode(mode))?;
            // The mode above is subject to the umask.
            let fd = rustix::fs::openat(&mount, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())?;
            rustix::fs::fchmod(&fd, Mode::from_raw_mode(mode))?;
            let (uid, gid) = (Uid::from_raw(owner), Gid::from_raw(owner));
            rustix::fs::chownat(&fd, c"", Some(uid), Some(gid), AtFlags::EMPTY_PATH)?;
            Ok(fd)
        };
        // `/` of the container has the mode and owner of the upper directory.
        let upper = directory(c"upper", 0o755).map_err(at("make the upper directory"))?;
        let work = directory(c"work", 0o700).map_err(at("make the work directory"))?;
        Ok(Self { _mount: mount, upper, work })
    }

    /// The upper directory: what is put here before the overlay is made stands over the layers (hosts, resolv.conf).
    pub fn upper(&self) -> BorrowedFd<'_> {
        self.upper.as_fd()
    }
}

/// Makes an overlay of `layers`, the **uppermost first**, under the writable part; `nodev`, attached nowhere. It holds all it needs: the
/// descriptors may be closed. `EINVAL` without a layer.
pub fn overlay(layers: &[BorrowedFd<'_>], writable: &Writable) -> Result<OwnedFd, StepError> {
    overlay_by(&open(c"overlay", "fsopen overlay")?, layers, writable)
}

/// As [`overlay`], in a user namespace that is not the first: the layers are directories, and overlayfs keeps its marks in `user.overlay.*`,
/// since `trusted.*` is for root of the machine. The upper file system must have such attributes, which tmpfs has since Linux 6.6.
pub fn overlay_of_user(layers: &[BorrowedFd<'_>], writable: &Writable) -> Result<OwnedFd, StepError> {
    let context = open(c"overlay", "fsopen overlay")?;
    fsconfig_set_flag(&context, c"userxattr").map_err(at("set userxattr of an overlay"))?;
    overlay_by(&context, layers, writable)
}

fn overlay_by(context: &OwnedFd, layers: &[BorrowedFd<'_>], writable: &Writable) -> Result<OwnedFd, StepError> {
    for layer in layers {
        fsconfig_set_fd(context, c"lowerdir+", layer).map_err(at("add a layer to an overlay"))?;
    }
    fsconfig_set_fd(context, c"upperdir", &writable.upper).map_err(at("set the upper directory of an overlay"))?;
    fsconfig_set_fd(context, c"workdir", &writable.work).map_err(at("set the work directory of an overlay"))?;
    // `nodev`: an image can carry the node of the host's disk, and container root could open it (reference: user_namespaces(7) hides
    // nodes of file systems mounted inside, which this one is not).
    create(context, MountAttrFlags::MOUNT_ATTR_NODEV, "mount an overlay")
}

//! Mounts, made by descriptors: nothing is found by a path that somebody else can change.
//!
//! Who does what, in the order of a start (sequence A):
//! 1. keeper, once per layer: [`Mounts::layer`] mounts the file; nobody else sees the mount, which lives as long as its handle.
//! 2. keeper, once per function: [`Mounts::idmapped`] clones it with the function's ids.
//! 3. keeper, per instance: [`Mounts::writable`] and [`Mounts::overlay`] make the root file system, which the init gets as a descriptor.
//! 4. zygote, once: [`make_private`], [`device_tree`].
//! 5. init: [`attach`] the root, [`target`] and [`attach`] for `/proc`, `/sys`, `/dev` and what lies in it, [`pivot`], [`mask_all`].
//!
//! Functions that the init calls neither allocate nor lock; they say so.
//!
//! [`Mounts::probe`] finds once, at the start, which ways the running kernel has, and what it lacks; all else follows from its [`Features`]:
//!
//! | | newest | oldest (Debian 12's 6.1) |
//! |---|---|---|
//! | a layer is mounted | from its file (6.12, on a disk) | from a loop device |
//! | mounts of layers and tmpfs | belong to no namespace | are attached in a namespace of the keeper's own (`workshop`) |
//! | the overlay is made | of descriptors (`lowerdir+`, 6.15) | by mount(2) of short paths there, and cloned |
//!
//! The result is the same: an overlay that is attached nowhere, as a descriptor.

mod inside;
mod layers;
mod loops;
mod platform;
pub(crate) mod probe;
mod workshop;

pub use inside::{
    DEVICES, MASKED, READ_ONLY, attach, bind, bind_file, device_tree, make_private, mask_all, move_tree, part, pivot,
    remount_read_only, remount_tree_read_only, seal, set_read_only, target, view,
};
pub use layers::{Mounted, Mounts, Writable};
pub use platform::EtcFile;
pub use probe::{Features, LayerSource, Missing, OverlayForm};

use std::ffi::CStr;
use std::os::fd::{AsRawFd, BorrowedFd, OwnedFd};

use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_flag, fsconfig_set_string, fsmount, fsopen,
};

use crate::step::{StepError, at, checked};
use crate::userns::IdRange;

/// `nosuid`, `nodev`, `noexec`: for file systems that hold no programs.
pub const INERT: MountAttrFlags =
    MountAttrFlags::MOUNT_ATTR_NOSUID.union(MountAttrFlags::MOUNT_ATTR_NODEV).union(MountAttrFlags::MOUNT_ATTR_NOEXEC);

/// The group of terminals.
const TTY_GROUP: u32 = 5;

/// How a tmpfs is made.
#[derive(Debug, Clone, Copy)]
pub struct Tmpfs {
    /// Most bytes that it may hold.
    pub size_bytes: u64,
    /// Owner of its root directory, as the caller's user namespace counts.
    pub uid: u32,
    /// Group of its root directory.
    pub gid: u32,
    /// Permission bits of its root directory.
    pub mode: u32,
    /// Flags of the mount.
    pub attributes: MountAttrFlags,
}

/// One file of a tmpfs for so many bytes of its room. A file that is empty costs the kernel about 1 KiB, its entry in an overlay as much
/// again: all of them together are bounded by about the room. Without a number of their own they are bounded by half the machine's memory.
const BYTES_PER_INODE: u64 = 2048;
/// Fewest files of a tmpfs.
const INODES_MIN: u64 = 256;

/// A new tmpfs, attached nowhere yet.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn tmpfs(options: &Tmpfs) -> Result<OwnedFd, StepError> {
    let context = open(c"tmpfs", "fsopen tmpfs")?;
    let mut digits = Digits::new();
    let inodes = (options.size_bytes / BYTES_PER_INODE).max(INODES_MIN);
    for (key, value) in [
        (c"size", options.size_bytes),
        (c"nr_inodes", inodes),
        (c"uid", u64::from(options.uid)),
        (c"gid", u64::from(options.gid)),
    ] {
        fsconfig_set_string(&context, key, digits.decimal(value)).map_err(at("set an option of a tmpfs"))?;
    }
    fsconfig_set_string(&context, c"mode", digits.octal(u64::from(options.mode))).map_err(at("set the mode of a tmpfs"))?;
    create(&context, options.attributes, "create a tmpfs")
}

/// A new procfs of the caller's pid namespace: `nosuid`, `nodev`, `noexec`. `EPERM` where no full proc is visible to the caller.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn procfs() -> Result<OwnedFd, StepError> {
    create(&open(c"proc", "fsopen proc")?, INERT, "create a procfs")
}

/// A new sysfs of the caller's network namespace, read-only. `EPERM` where no full sysfs is visible to the caller.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn sysfs() -> Result<OwnedFd, StepError> {
    create(&open(c"sysfs", "fsopen sysfs")?, INERT | MountAttrFlags::MOUNT_ATTR_RDONLY, "create a sysfs")
}

/// Most terminals of an instance: the kernel has some 3,000 for all (sysctl `kernel.pty.max` less `kernel.pty.reserve`).
const TERMINALS_MAX: &CStr = c"256";

/// A new devpts with a `ptmx` of its own that everybody may open; terminals belong to group 5 (`tty` in all distributions) where `ids` has it.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn devpts(ids: IdRange) -> Result<OwnedFd, StepError> {
    let context = open(c"devpts", "fsopen devpts")?;
    for (key, value) in [(c"ptmxmode", c"0666"), (c"mode", c"0620"), (c"gid", c"5"), (c"max", TERMINALS_MAX)] {
        if key == c"gid" && ids.count <= TTY_GROUP {
            continue;
        }
        fsconfig_set_string(&context, key, value).map_err(at("set an option of a devpts"))?;
    }
    let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID | MountAttrFlags::MOUNT_ATTR_NOEXEC;
    create(&context, attributes, "create a devpts")
}

/// The message queues of the caller's ipc namespace.
///
/// Neither allocates nor locks: may be called between clone and exec.
pub fn mqueue() -> Result<OwnedFd, StepError> {
    create(&open(c"mqueue", "fsopen mqueue")?, INERT, "create an mqueue file system")
}

pub(crate) fn open(kind: &CStr, step: &'static str) -> Result<OwnedFd, StepError> {
    fsopen(kind, FsOpenFlags::FSOPEN_CLOEXEC).map_err(at(step))
}

fn read_only(context: &OwnedFd) -> Result<(), StepError> {
    fsconfig_set_flag(context, c"ro").map_err(at("set a file system read-only"))
}

pub(crate) fn create(context: &OwnedFd, attributes: MountAttrFlags, step: &'static str) -> Result<OwnedFd, StepError> {
    fsconfig_create(context).and_then(|()| fsmount(context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)).map_err(at(step))
}

/// `struct mount_attr` of mount_setattr(2).
#[derive(Default)]
#[repr(C)]
struct Attributes {
    set: u64,
    clear: u64,
    propagation: u64,
    userns_fd: u64,
}

/// mount_setattr(2) on `path` beneath `directory`; an empty path means the mount behind the descriptor.
fn set_attributes(directory: BorrowedFd<'_>, path: &CStr, flags: libc::c_int, attributes: &Attributes) -> Result<(), Errno> {
    // SAFETY: the path ends in NUL and the structure is the kernel's first version, whose size is passed; both live through the call.
    // rustix has no wrapper.
    let result = unsafe {
        libc::syscall(
            libc::SYS_mount_setattr,
            directory.as_raw_fd(),
            path.as_ptr(),
            flags,
            std::ptr::from_ref(attributes),
            size_of::<Attributes>(),
        )
    };
    checked(result).map(drop)
}

/// Sets flags of the mount behind a descriptor, besides those that it has.
pub(crate) fn add_flags(mount: BorrowedFd<'_>, flags: MountAttrFlags) -> Result<(), Errno> {
    set_attributes(mount, c"", libc::AT_EMPTY_PATH, &Attributes { set: flags.bits().into(), ..Attributes::default() })
}

/// A number as a C string, without an allocation.
struct Digits([u8; Self::BYTES]);

impl Digits {
    /// `u64::MAX` has 20 decimal and 22 octal digits; NUL.
    const BYTES: usize = 23;

    const fn new() -> Self {
        Self([0; Self::BYTES])
    }

    fn decimal(&mut self, number: u64) -> &CStr {
        self.write(number, 10)
    }

    fn octal(&mut self, number: u64) -> &CStr {
        self.write(number, 8)
    }

    fn write(&mut self, mut number: u64, base: u64) -> &CStr {
        let mut start = Self::BYTES - 1;
        self.0[start] = 0;
        loop {
            start -= 1;
            self.0[start] = b'0' + (number % base) as u8;
            number /= base;
            if number == 0 {
                break;
            }
        }
        CStr::from_bytes_until_nul(&self.0[start..]).expect("the last byte is NUL")
    }
}

#[cfg(test)]
mod tests;

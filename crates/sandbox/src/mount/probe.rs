//! What the running kernel lacks, found by trying.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;

use super::{Writable, erofs, idmapped, overlay};
use crate::step::StepError;
use crate::userns;

/// A kernel feature that is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The feature in a few words.
    pub feature: &'static str,
    /// What the trial met and what cures it, as one sentence without its full stop.
    pub reason: String,
}

/// Host ids of the trial's user namespace: below those that functions get.
const TRIAL_BASE: u32 = 0x6FFE_0000;
/// Room of the trial's writable layer.
const TRIAL_BYTES: u64 = 1 << 20;

/// Tries what a start needs, in order, with a small layer in `store` (the directory where layers will lie: what can be mounted depends on
/// its file system). An empty list says that all of it works. The first failure hides those that build on it.
pub fn probe(store: BorrowedFd<'_>) -> Vec<Missing> {
    match try_all(store) {
        Ok(()) => Vec::new(),
        Err(missing) => vec![missing],
    }
}

fn try_all(store: BorrowedFd<'_>) -> Result<(), Missing> {
    if !rustix::process::geteuid().is_root() {
        return Err(Missing {
            feature: "root",
            reason: "the sandbox is made by root: run `funtainer serve` with sudo".to_owned(),
        });
    }
    let file = trial_layer(store).map_err(|errno| Missing {
        feature: "a writable data directory",
        reason: format!("a file for a trial cannot be written: {errno}"),
    })?;
    let namespace = userns::make(TRIAL_BASE).map_err(|error| missing_userns(&error))?;
    let layer = erofs(file.as_fd()).map_err(|error| missing_erofs(&error))?;
    let mapped = idmapped(layer.as_fd(), namespace.as_fd()).map_err(|error| Missing {
        feature: "idmapped erofs layers",
        reason: format!("Linux 6.14 or later is needed ({error})"),
    })?;
    let writable = Writable::make(TRIAL_BYTES, TRIAL_BASE).map_err(|error| Missing {
        feature: "tmpfs by descriptors",
        reason: format!("Linux 6.14 or later with tmpfs is needed ({error})"),
    })?;
    let root = overlay(&[mapped.as_fd()], &writable).map_err(|error| Missing {
        feature: "overlay by descriptors",
        reason: format!("Linux 6.14 or later with CONFIG_OVERLAY_FS is needed ({error})"),
    })?;
    try_root(&root)
}

/// The overlay shows the layer, and root inside may write.
fn try_root(root: &OwnedFd) -> Result<(), Missing> {
    let wrong = |reason: String| Missing { feature: "a writable root file system", reason };
    let stat = rustix::fs::fstat(root).map_err(|errno| wrong(format!("the trial's root cannot be read: {errno}")))?;
    if stat.st_uid != TRIAL_BASE {
        return Err(wrong(format!("the trial's root belongs to {} instead of {TRIAL_BASE}", stat.st_uid)));
    }
    rustix::fs::mkdirat(root, c"trial", Mode::from_raw_mode(0o755))
        .map_err(|errno| wrong(format!("the trial's root cannot be written: {errno}")))
}

fn missing_userns(error: &StepError) -> Missing {
    let reason = match error.errno {
        Errno::NOSPC => "the sysctl user.max_user_namespaces forbids user namespaces: raise it".to_owned(),
        Errno::PERM => format!("this machine or container forbids user namespaces, or root here lacks CAP_SETUID ({error})"),
        Errno::INVAL => "the kernel is built without CONFIG_USER_NS".to_owned(),
        _ => error.to_string(),
    };
    Missing { feature: "user namespaces", reason }
}

fn missing_erofs(error: &StepError) -> Missing {
    let reason = match error.errno {
        Errno::NODEV => "the kernel has no erofs: build or load CONFIG_EROFS_FS (`modprobe erofs`)".to_owned(),
        Errno::NOTBLK => {
            "Linux 6.12 or later with CONFIG_EROFS_FS_BACKED_BY_FILE is needed, and a data directory on a disk's file system (not on tmpfs \
             or an overlay): choose one with --data"
                .to_owned()
        }
        Errno::PERM => format!("root here may not mount: it lacks CAP_SYS_ADMIN in the first user namespace ({error})"),
        _ => format!("Linux 6.14 or later is needed ({error})"),
    };
    Missing { feature: "file-backed erofs", reason }
}

/// An unnamed file in `directory` with the smallest erofs: one empty root directory. Our writer's form (extended inode, checksum-free).
fn trial_layer(directory: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
    let here: &CStr = c".";
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    let file = rustix::fs::openat(directory, here, flags, Mode::from_raw_mode(0o600))?;
    let image = trial_image();
    let written = rustix::io::pwrite(&file, &image, 0)?;
    if written == image.len() { Ok(file) } else { Err(Errno::NOSPC) }
}

/// Two blocks of 4,096 bytes: the superblock at 1,024, and the root inode (number 2) with its two entries in the second block.
fn trial_image() -> Vec<u8> {
    const BLOCK: usize = 4096;
    const INODE: usize = BLOCK + 2 * 32;
    let mut image = vec![0_u8; 2 * BLOCK];
    let mut put = |offset: usize, bytes: &[u8]| image[offset..offset + bytes.len()].copy_from_slice(bytes);

    put(1024, &0xE0F5_E1E2_u32.to_le_bytes());
    put(1024 + 12, &[12]); // bits of a block's size
    put(1024 + 14, &2_u16.to_le_bytes()); // number of the root inode
    put(1024 + 16, &1_u64.to_le_bytes()); // inodes
    put(1024 + 36, &2_u32.to_le_bytes()); // blocks
    put(1024 + 40, &1_u32.to_le_bytes()); // block of the metadata

    put(INODE, &5_u16.to_le_bytes()); // extended, data inline
    put(INODE + 4, &0o040_755_u16.to_le_bytes());
    put(INODE + 8, &27_u64.to_le_bytes()); // two entries of 12 bytes, then "." and ".."
    put(INODE + 20, &1_u32.to_le_bytes());
    put(INODE + 44, &2_u32.to_le_bytes()); // links
    let entries = INODE + 64;
    put(entries, &2_u64.to_le_bytes());
    put(entries + 8, &[24, 0, 2]); // offset of the name, a directory
    put(entries + 12, &2_u64.to_le_bytes());
    put(entries + 20, &[25, 0, 2]);
    put(entries + 24, b"...");
    image
}

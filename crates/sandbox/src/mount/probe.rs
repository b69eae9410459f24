//! What the running kernel has and lacks, found by trying.

use std::ffi::CStr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use rustix::fs::{Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::net::{RecvFlags, SendFlags};

use super::{Mounts, attach, devpts, make_private, mqueue, procfs, sysfs, target};
use crate::clone::{Cloned, clone3};
use crate::step::{StepError, at};
use crate::userns::{self, IdRange};
use crate::{fds, netns};

/// A kernel feature that is not there.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Missing {
    /// The feature in a few words.
    pub feature: &'static str,
    /// What the trial met and what cures it, as one sentence without its full stop.
    pub reason: String,
}

/// Host ids of the trial's user namespace: below those that functions get.
pub(crate) const TRIAL_BASE: u32 = 0x6FFE_0000;
/// Namespaces of an instance that its zygote or it is born in.
const NAMESPACES: i32 =
    libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
/// The word by which the trial's child learns that it has its ids.
const GO: &[u8] = b"go";
/// Longest report of the trial's child: an errno and a step.
const REPORT_BYTES_MAX: usize = 128;
/// An attribute of the kind in which overlayfs keeps its marks for users.
const TRIAL_ATTRIBUTE: &str = "user.overlay.trial";
/// Room of the trial's writable layer.
const TRIAL_BYTES: u64 = 1 << 20;

/// How this kernel mounts layers and stacks them. Older ways do the same with more steps.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Features {
    /// What a layer is.
    pub layers: LayerSource,
    /// What an overlay is made of.
    pub overlay: OverlayForm,
}

impl Features {
    /// What the newest kernels have.
    pub const NEWEST: Self = Self { layers: LayerSource::File, overlay: OverlayForm::Descriptors };
    /// What every kernel has that can run this: the ways down to Linux 5.19.
    pub const OLDEST: Self = Self { layers: LayerSource::Loop, overlay: OverlayForm::Paths };
}

/// What a layer is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerSource {
    /// The image's file: Linux 6.12, and not on tmpfs or an overlay.
    File,
    /// A loop device over the file.
    Loop,
    /// A directory into which it was unpacked, with the ids that its user namespace has: for who may not mount it.
    Directory,
}

/// What an overlay is made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum OverlayForm {
    /// Descriptors of mounts that no namespace has: Linux 6.15.
    Descriptors,
    /// Paths in a mount namespace of the keeper's own.
    Paths,
}

impl Mounts {
    /// Tries what a start needs, in order, with a small layer in `store` (the directory where layers will lie: what can be mounted depends
    /// on its file system), and opens what works. Ways newer than `newest` are not tried: [`Features::NEWEST`] for all. The first failure
    /// hides those that build on it. Nothing is left of the trial.
    pub fn probe(store: BorrowedFd<'_>, newest: Features) -> Result<Self, Missing> {
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
        let layers = layer_source(file.as_fd(), newest.layers)?;
        let features = Features { layers, ..newest };
        let (mounts, root) = match (try_overlay(features, file.as_fd(), namespace.as_fd()), newest.overlay) {
            (Err(newer), OverlayForm::Descriptors) => {
                let features = Features { overlay: OverlayForm::Paths, ..features };
                try_overlay(features, file.as_fd(), namespace.as_fd()).map_err(|error| missing_overlay(&error, Some(&newer)))?
            }
            (tried, _) => tried.map_err(|error| missing_overlay(&error, None))?,
        };
        try_root(&root, TRIAL_BASE)?;
        try_inside(&root, TRIAL_BASE.into())?;
        Ok(mounts)
    }

    /// As [`Mounts::probe`], for root of a user namespace that is not the first: layers are directories, as `store` is one. `ids` is a range of
    /// functions.
    pub fn probe_unpacked(store: BorrowedFd<'_>, ids: IdRange, newest: Features) -> Result<Self, Missing> {
        userns::make(ids).map_err(|error| missing_userns(&error))?;
        try_attributes(store).map_err(|errno| Missing {
            feature: "a data directory with extended attributes",
            reason: format!(
                "the file system of the data directory takes no attributes of users ({errno}), in which overlayfs notes what layers \
                 hide: choose another one with --data"
            ),
        })?;
        let features = Features { layers: LayerSource::Directory, ..newest };
        let (mounts, root) = match (try_directories(features, store, ids), newest.overlay) {
            (Err(newer), OverlayForm::Descriptors) => {
                let features = Features { overlay: OverlayForm::Paths, ..features };
                try_directories(features, store, ids).map_err(|error| missing_overlay(&error, Some(&newer)))?
            }
            (tried, _) => tried.map_err(|error| missing_overlay(&error, None))?,
        };
        try_root(&root, ids.base)?;
        try_inside(&root, ids)?;
        Ok(mounts)
    }
}

/// A whole root file system over a directory, in one way.
fn try_directories(features: Features, store: BorrowedFd<'_>, ids: IdRange) -> Result<(Mounts, OwnedFd), StepError> {
    let mounts = Mounts::open(features)?;
    let writable = mounts.writable(TRIAL_BYTES, ids.base)?;
    try_attributes(writable.upper()).map_err(at("set an attribute of a user on tmpfs"))?;
    let root = mounts.overlay(&[mounts.directory(store)?], &writable)?;
    Ok((mounts, root))
}

/// Whether overlayfs could keep its marks on a directory.
fn try_attributes(directory: BorrowedFd<'_>) -> Result<(), Errno> {
    rustix::fs::fsetxattr(directory, TRIAL_ATTRIBUTE, b"y", XattrFlags::empty())?;
    rustix::fs::fremovexattr(directory, TRIAL_ATTRIBUTE)
}

/// From what this kernel mounts a layer.
pub(crate) fn layer_source(file: BorrowedFd<'_>, newest: LayerSource) -> Result<LayerSource, Missing> {
    let trial = |layers| {
        let features = Features { layers, overlay: OverlayForm::Descriptors };
        Mounts::open(features)?.layer(file).map(drop)
    };
    if newest == LayerSource::File {
        match trial(LayerSource::File) {
            Ok(()) => return Ok(LayerSource::File),
            // No kernel before 6.12 and no file system of the memory has them.
            Err(error) if error.errno == Errno::NOTBLK => {}
            Err(error) => return Err(missing_erofs(&error)),
        }
    }
    trial(LayerSource::Loop).map(|()| LayerSource::Loop).map_err(|error| missing_erofs(&error))
}

/// A whole root file system, in one way.
pub(crate) fn try_overlay(
    features: Features,
    file: BorrowedFd<'_>,
    ids: BorrowedFd<'_>,
) -> Result<(Mounts, OwnedFd), StepError> {
    let mounts = Mounts::open(features)?;
    let layer = mounts.layer(file)?;
    let mapped = [mounts.idmapped(&layer, ids)?];
    let root = mounts.overlay(&mapped, &mounts.writable(TRIAL_BYTES, TRIAL_BASE)?)?;
    Ok((mounts, root))
}

/// The overlay shows the layer, and root inside may write.
pub(crate) fn try_root(root: &OwnedFd, owner: u32) -> Result<(), Missing> {
    let wrong = |reason: String| Missing { feature: "a writable root file system", reason };
    let stat = rustix::fs::fstat(root).map_err(|errno| wrong(format!("the trial's root cannot be read: {errno}")))?;
    if stat.st_uid != owner {
        return Err(wrong(format!("the trial's root belongs to {} instead of {owner}", stat.st_uid)));
    }
    rustix::fs::mkdirat(root, c"trial", Mode::from_raw_mode(0o755))
        .map_err(|errno| wrong(format!("the trial's root cannot be written: {errno}")))
}

/// A child in all namespaces of an instance makes and attaches what an init would.
pub(crate) fn try_inside(root: &OwnedFd, ids: IdRange) -> Result<(), Missing> {
    let failed = |reason: String| Missing { feature: "a trial of all namespaces", reason };
    let (ours, theirs) = fds::pair().map_err(|errno| failed(errno.to_string()))?;
    // SAFETY: the child makes system calls by functions that neither allocate nor lock, and ends in `_exit`.
    let cloned =
        unsafe { clone3(NAMESPACES) }.map_err(|errno| missing_userns(&StepError { step: "clone a trial process", errno }))?;
    let Cloned::Parent { pid, pidfd } = cloned else { report_inside(theirs.as_fd(), root.as_fd(), ids) };
    drop(theirs);
    let told = userns::write_maps(pid, ids).map_err(|error| missing_userns(&error)).and_then(|()| {
        // The child's death, if it is dead, is told by the next message that does not come.
        let _ = fds::send(ours.as_fd(), GO, &[], SendFlags::empty());
        let mut report = [0_u8; REPORT_BYTES_MAX];
        match fds::receive(ours.as_fd(), &mut report, RecvFlags::empty()) {
            Ok(Some(received)) => Ok(report[..received.bytes].to_vec()),
            Ok(None) => Err(failed("the trial process was killed".to_owned())),
            Err(error) => Err(failed(error.to_string())),
        }
    });
    // It ends by itself, or waits for a word that will not come.
    let _ = fds::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
    let _ = fds::pidfd_reap(pidfd.as_fd(), true);
    match told?.split_first_chunk::<4>() {
        Some((errno, step)) if *errno != [0; 4] => {
            Err(missing_inside(&String::from_utf8_lossy(step), Errno::from_raw_os_error(i32::from_ne_bytes(*errno))))
        }
        _ => Ok(()),
    }
}

/// The whole life of the trial's child: waits for its ids, tries, tells an errno (0 if all works) and the step.
fn report_inside(socket: BorrowedFd<'_>, root: BorrowedFd<'_>, ids: IdRange) -> ! {
    let mut word = [0_u8; 8];
    let go = fds::receive(socket, &mut word, RecvFlags::empty());
    let outcome = if matches!(go, Ok(Some(_))) { make_all(root, ids) } else { Ok(()) };
    let mut report = [0_u8; REPORT_BYTES_MAX];
    let mut length = 4;
    if let Err(StepError { step, errno }) = outcome {
        report[..4].copy_from_slice(&errno.raw_os_error().to_ne_bytes());
        let text = &step.as_bytes()[..step.len().min(REPORT_BYTES_MAX - 4)];
        report[4..4 + text.len()].copy_from_slice(text);
        length += text.len();
    }
    let _ = fds::send(socket, &report[..length], &[], SendFlags::empty());
    // SAFETY: ends this process without running anything of its parent's.
    unsafe { libc::_exit(0) }
}

/// Neither allocates nor locks.
fn make_all(root: BorrowedFd<'_>, ids: IdRange) -> Result<(), StepError> {
    userns::become_root()?;
    make_private()?;
    netns::prepare()?;
    let proc = procfs()?;
    for made in [sysfs(), devpts(ids), mqueue()] {
        drop(made?);
    }
    // Over /proc of this mount namespace, which is nobody else's: the one directory that is there on every machine.
    let host =
        rustix::fs::open(c"/", OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty()).map_err(at("open /"))?;
    attach(root, target(host.as_fd(), c"proc")?.as_fd())?;
    attach(proc.as_fd(), target(root, c"proc")?.as_fd())
}

fn missing_inside(step: &str, errno: Errno) -> Missing {
    let reason = match (step, errno) {
        ("create a procfs" | "create a sysfs", Errno::PERM) => {
            "parts of /proc or /sys are covered here, as in a container: run the server on the machine itself, or in a container that \
             sees all of both (docker run --security-opt systempaths=unconfined)"
                .to_owned()
        }
        _ => format!("in the namespaces of a trial instance: {step}: {errno}"),
    };
    Missing { feature: "mounts in a user namespace", reason }
}

pub(crate) fn missing_userns(error: &StepError) -> Missing {
    let reason = match error.errno {
        Errno::NOSPC => "the sysctl user.max_user_namespaces forbids user namespaces: raise it".to_owned(),
        Errno::PERM => format!("this machine or container forbids user namespaces, or root here lacks CAP_SETUID ({error})"),
        Errno::INVAL => "the kernel is built without CONFIG_USER_NS".to_owned(),
        _ => error.to_string(),
    };
    Missing { feature: "user namespaces", reason }
}

fn missing_erofs(error: &StepError) -> Missing {
    let reason = match (error.step, error.errno) {
        (_, Errno::NODEV) => "the kernel has no erofs: build or load CONFIG_EROFS_FS (`modprobe erofs`)".to_owned(),
        ("open /dev/loop-control" | "open a loop device", _) | ("mount a layer", Errno::NOTBLK) => format!(
            "before Linux 6.12, and for a data directory on tmpfs or an overlay, layers need loop devices, which are not to be had here \
             ({error}): load them (`modprobe loop`), in a container pass /dev/loop-control and /dev/loop* in, or choose another \
             directory with --data on Linux 6.12 or later"
        ),
        (_, Errno::PERM) => format!("root here may not mount: it lacks CAP_SYS_ADMIN in the first user namespace ({error})"),
        _ => format!("a layer cannot be mounted ({error})"),
    };
    Missing { feature: "erofs layers", reason }
}

/// Why neither descriptors nor paths made a root file system; `newer` is what the first met.
pub(crate) fn missing_overlay(error: &StepError, newer: Option<&StepError>) -> Missing {
    let newer = newer.map(|newer| format!("; by descriptors: {newer}")).unwrap_or_default();
    let (feature, cure) = match (error.step, error.errno) {
        ("set an attribute of a user on tmpfs", _) => {
            ("tmpfs with extended attributes", "Linux 6.6 or later is needed for a user that is not root")
        }
        ("map the ids of a layer", _) => ("idmapped layers", "Linux 5.19 or later is needed"),
        ("mount an overlay", Errno::NODEV) => {
            ("an overlay", "the kernel has none: build or load CONFIG_OVERLAY_FS (`modprobe overlay`)")
        }
        ("mount an overlay", _) => ("an overlay", "Linux 5.19 or later is needed"),
        (_, Errno::PERM) => ("mounts by root", "root here may not mount: it lacks CAP_SYS_ADMIN or CAP_SYS_CHROOT"),
        _ => ("an overlay", "a root file system for a trial cannot be made"),
    };
    Missing { feature, reason: format!("{cure} ({error}{newer})") }
}

/// An unnamed file in `directory` with the smallest erofs: one empty root directory. Our writer's form (extended inode, checksum-free).
pub(crate) fn trial_layer(directory: BorrowedFd<'_>) -> Result<OwnedFd, Errno> {
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

//! Layers: committed by the keeper alone, mounted once each, lent to zygotes with their ids.

use std::collections::HashMap;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::{Rc, Weak};

use funtainer_model::LayerId;
use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::io::Errno;
use rustix::process::{Gid, Uid};

use crate::mount::{Mounted, Mounts};
use crate::protocol::Refusal;
use crate::step::{StepError, checked};

/// Where the superblock stands, and what of it is looked at: magic number, block size, features that a reader must know.
const SUPERBLOCK_OFFSET: u64 = 1024;
const SUPERBLOCK_BYTES: usize = 128;
const MAGIC: u32 = 0xE0F5_E1E2;
const FEATURE_INCOMPAT_OFFSET: usize = 80;
/// Mode of a committed layer.
const COMMITTED_MODE: u32 = 0o444;

/// The mounted layers. One that no zygote uses is unmounted.
#[derive(Default)]
pub(super) struct Layers {
    mounted: HashMap<LayerId, Weak<Mounted>>,
}

/// The layers of one zygote.
pub(super) struct Lent {
    /// With the zygote's ids; the uppermost first, as an overlay wants them.
    mapped: Vec<Mounted>,
    /// What they are clones of, for as long as the zygote lives.
    mounted: Vec<Rc<Mounted>>,
}

impl Lent {
    /// Directories, uppermost first, which have the zygote's ids already.
    pub(super) fn directories(mapped: Vec<Mounted>) -> Self {
        Self { mapped, mounted: Vec::new() }
    }

    /// Puts a layer that is the zygote's alone on top of the image's.
    pub(super) fn cover(&mut self, layer: Mounted) {
        self.mapped.insert(0, layer);
    }

    /// Uppermost first.
    pub(super) fn mapped(&self) -> &[Mounted] {
        &self.mapped
    }
}

impl Layers {
    /// Mounts what is not mounted yet, and maps ids. `layers` is bottom to top.
    pub(super) fn lend(
        &mut self,
        mounts: &Mounts,
        store: BorrowedFd<'_>,
        layers: &[LayerId],
        ids: BorrowedFd<'_>,
    ) -> Result<Lent, Refusal> {
        let mut lent = Lent { mapped: Vec::with_capacity(layers.len()), mounted: Vec::with_capacity(layers.len()) };
        for layer in layers.iter().rev() {
            let mounted = self.mount(mounts, store, *layer)?;
            lent.mapped.push(mounts.idmapped(&mounted, ids).map_err(refusal)?);
            lent.mounted.push(mounted);
        }
        self.mounted.retain(|_, mounted| mounted.strong_count() > 0);
        Ok(lent)
    }

    fn mount(&mut self, mounts: &Mounts, store: BorrowedFd<'_>, layer: LayerId) -> Result<Rc<Mounted>, Refusal> {
        if let Some(mounted) = self.mounted.get(&layer).and_then(Weak::upgrade) {
            return Ok(mounted);
        }
        let file = open_committed(store, layer)?;
        let mounted = Rc::new(mounts.layer(file.as_fd()).map_err(refusal)?);
        self.mounted.insert(layer, Rc::downgrade(&mounted));
        Ok(mounted)
    }
}

/// Opens a layer of the store for reading.
pub(super) fn open_committed(store: BorrowedFd<'_>, layer: LayerId) -> Result<OwnedFd, Refusal> {
    let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let file = match rustix::fs::openat(store, layer.file_name(), flags, Mode::empty()) {
        Ok(file) => file,
        Err(Errno::NOENT) => return Err(Refusal::NoLayer(layer)),
        Err(errno) => return Err(refusal(StepError { step: "open a layer", errno })),
    };
    let found = rustix::fs::fstat(&file).map_err(|errno| refusal(StepError { step: "look at a layer", errno }))?;
    // Nobody but root can have put it into the directory; a file that is not as it was committed was touched by hand.
    if found.st_uid != 0 || found.st_mode & 0o7777 != COMMITTED_MODE {
        return Err(refusal(StepError { step: "find a layer as it was committed", errno: Errno::PERM }));
    }
    Ok(file)
}

/// Takes a finished layer into the store. From here on it belongs to root and nobody writes it; a layer of that name stays as it is.
///
/// The daemon may still try to keep a writer: the change of owner forbids new ones, the lease proves that there is none, and a second look at it
/// catches who came between. In this order, because only the owner may take a lease, unless he is root of the machine.
pub(super) fn commit(store: BorrowedFd<'_>, layer: LayerId, file: &OwnedFd, daemon: Uid) -> Result<(), Refusal> {
    let malformed = |text: &str| Refusal::Malformed(text.to_owned());
    let failed = |step| move |errno| refusal(StepError { step, errno });
    let name = layer.file_name();
    if rustix::fs::statat(store, &*name, AtFlags::SYMLINK_NOFOLLOW).is_ok() {
        return Ok(());
    }
    let found = rustix::fs::fstat(file).map_err(failed("look at a layer"))?;
    let directory = rustix::fs::fstat(store).map_err(failed("look at the store"))?;
    if FileType::from_raw_mode(found.st_mode) != FileType::RegularFile || found.st_dev != directory.st_dev {
        return Err(malformed("the layer is no regular file on the store's file system"));
    }
    // Root's, if it was committed under another name: the daemon may read files that are nobody's to give away.
    if found.st_uid != daemon.as_raw() && !(found.st_uid == 0 && found.st_mode & 0o7777 == COMMITTED_MODE) {
        return Err(malformed("the layer is not the daemon's"));
    }
    if rustix::fs::fcntl_getfl(file).map_err(failed("look at a layer"))? & OFlags::RWMODE != OFlags::RDONLY {
        return Err(malformed("the layer's descriptor is not read-only"));
    }
    // An open file of our own: a lease belongs to the open file, and the daemon holds the one that it sent. Non-blocking: a write lease
    // of the daemon's would hold the keeper up for as long as it takes to break (45 s by default).
    let flags = OFlags::RDONLY | OFlags::NONBLOCK | OFlags::CLOEXEC;
    let file =
        &rustix::fs::open(format!("/proc/self/fd/{}", file.as_raw_fd()), flags, Mode::empty()).map_err(
            |errno| match errno {
                Errno::AGAIN => malformed("the layer has a lease"),
                errno => refusal(StepError { step: "open a layer again", errno }),
            },
        )?;
    check_superblock(file)?;
    let root = (Some(Uid::ROOT), Some(Gid::ROOT));
    rustix::fs::fchown(file, root.0, root.1)
        .and_then(|()| rustix::fs::fchmod(file, Mode::from_raw_mode(COMMITTED_MODE)))
        .map_err(failed("take over a layer"))?;
    let committed = prove_unwritten(file).and_then(|()| link(file, store, &name));
    if committed.is_err() {
        // What was refused is as it was; if not even that goes, the daemon can still remove it.
        let _ = rustix::fs::fchmod(file, Mode::from_raw_mode(found.st_mode & 0o7777))
            .and_then(|()| rustix::fs::fchown(file, Some(Uid::from_raw(found.st_uid)), Some(Gid::from_raw(found.st_gid))));
    }
    committed
}

/// Proves that nobody writes a file that belongs to root now.
fn prove_unwritten(file: &OwnedFd) -> Result<(), Refusal> {
    let malformed = |text: &str| Refusal::Malformed(text.to_owned());
    lease(file, libc::F_RDLCK).map_err(|errno| match errno {
        Errno::AGAIN => malformed("the layer still has a writer"),
        errno => refusal(StepError { step: "prove that a layer has no writer", errno }),
    })?;
    // A writer that was let in before the change waits for the lease, which is then no longer whole; the new lease is refused to one that
    // was faster.
    let whole = current_lease(file).is_ok_and(|kind| kind == libc::F_RDLCK) && lease(file, libc::F_RDLCK).is_ok();
    // Fails only if there is none any more.
    let _ = lease(file, libc::F_UNLCK);
    if whole { Ok(()) } else { Err(malformed("the layer got a writer")) }
}

/// By the path of the descriptor: by the descriptor itself (AT_EMPTY_PATH) only root of the machine may, before Linux 6.10.
fn link(file: &OwnedFd, store: BorrowedFd<'_>, name: &str) -> Result<(), Refusal> {
    let path = format!("/proc/self/fd/{}", file.as_raw_fd());
    match rustix::fs::linkat(CWD, path, store, name, AtFlags::SYMLINK_FOLLOW) {
        Ok(()) | Err(Errno::EXIST) => Ok(()),
        Err(errno) => Err(refusal(StepError { step: "link a layer into the store", errno })),
    }
}

/// Refuses what our writer never writes: the kernel's reader of compressed or chunked images need not be reachable for a daemon.
fn check_superblock(file: &OwnedFd) -> Result<(), Refusal> {
    let mut bytes = [0_u8; SUPERBLOCK_BYTES];
    let read = rustix::io::pread(file, &mut bytes[..], SUPERBLOCK_OFFSET)
        .map_err(|errno| refusal(StepError { step: "read the superblock of a layer", errno }))?;
    let word = |at: usize| u32::from_le_bytes([bytes[at], bytes[at + 1], bytes[at + 2], bytes[at + 3]]);
    if read < SUPERBLOCK_BYTES || word(0) != MAGIC {
        return Err(Refusal::Malformed("the layer is no erofs image".to_owned()));
    }
    match word(FEATURE_INCOMPAT_OFFSET) {
        0 => Ok(()),
        features => Err(Refusal::Malformed(format!("the layer uses erofs features {features:#x} that layers do not have"))),
    }
}

fn lease(file: &OwnedFd, kind: libc::c_int) -> Result<(), Errno> {
    // SAFETY: integers only. rustix has no leases.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_SETLEASE, kind) }.into()).map(drop)
}

fn current_lease(file: &OwnedFd) -> Result<libc::c_int, Errno> {
    // SAFETY: integers only.
    checked(unsafe { libc::fcntl(file.as_raw_fd(), libc::F_GETLEASE) }.into()).map(|kind| kind as libc::c_int)
}

/// As the protocol says it.
pub(super) fn refusal(error: StepError) -> Refusal {
    Refusal::System { step: error.step.to_owned(), errno: error.errno.raw_os_error() }
}

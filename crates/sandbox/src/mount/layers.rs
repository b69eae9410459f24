//! The root file system of an instance, made by the keeper: layers, a writable upper one, the overlay of both.

use std::ffi::CString;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::{
    MountAttrFlags, MountFlags, OpenTreeFlags, fsconfig_set_fd, fsconfig_set_flag, fsconfig_set_string, mount, open_tree,
};
use rustix::process::{Gid, Uid};

use super::platform::{self, EtcFile};
use super::workshop::{Place, Workshop};
use super::{Attributes, Features, LayerSource, OverlayForm, Tmpfs, create, loops, open, read_only, set_attributes, tmpfs};
use crate::step::{StepError, at};

/// Where the superblock of erofs stands in its file.
const EROFS_SUPERBLOCK_OFFSET: u64 = 1024;
/// Magic number of erofs.
const EROFS_MAGIC: u32 = 0xE0F5_E1E2;
/// Most metadata that is read ahead of a mount; the rest comes when it is asked for. 8 MiB hold about 80,000 files.
const METADATA_READ_MAX: u64 = 8 << 20;
/// One read of it.
const METADATA_READ_STEP: usize = 64 << 10;

/// Room for the options of mount(2) with their NUL: a page, of which the kernel cuts off without a word what is too long.
const OPTIONS_BYTES_MAX: usize = 4096;

/// Makes layers and root file systems in the way that this kernel can.
#[derive(Debug)]
pub struct Mounts {
    features: Features,
    /// Where mounts are attached, if that is what they need to be.
    workshop: Option<Rc<Workshop>>,
}

/// A mount that is seen nowhere. It goes when this is dropped, and what was made of it stays.
#[derive(Debug)]
pub struct Mounted {
    /// Dropped first: the descriptor of a mount that is taken off is of no more use.
    place: Option<Place>,
    mount: OwnedFd,
}

impl AsFd for Mounted {
    fn as_fd(&self) -> BorrowedFd<'_> {
        self.mount.as_fd()
    }
}

impl Mounts {
    /// For a kernel that has been probed ([`Mounts::probe`]), or a test's choice. Without [`OverlayForm::Descriptors`] this makes a mount
    /// namespace, and gives the calling thread a working directory of its own.
    pub fn open(features: Features) -> Result<Self, StepError> {
        let workshop = match features.overlay {
            OverlayForm::Descriptors => None,
            OverlayForm::Paths => Some(Rc::new(Workshop::open()?)),
        };
        Ok(Self { features, workshop })
    }

    /// What it was opened with.
    pub const fn features(&self) -> Features {
        self.features
    }

    /// Mounts the erofs image in `file` read-only and `nodev`. Mount each file once and clone it ([`Mounts::idmapped`]): two mounts of one
    /// file share no page cache. `ENOTBLK` for [`LayerSource::File`] where the kernel mounts no files (before 6.12) or the file lies on tmpfs
    /// or an overlay. Needs CAP_SYS_ADMIN in the first user namespace, and `/proc`.
    ///
    /// The metadata, which our writer puts at the end, is read first: a first walk is then 1.5 times as fast.
    pub fn layer(&self, file: BorrowedFd<'_>) -> Result<Mounted, StepError> {
        read_metadata(file).map_err(at("read the metadata of a layer"))?;
        let mount = match self.features.layers {
            LayerSource::File => erofs(file)?,
            // The mount is the device's user from here on.
            LayerSource::Loop => erofs(loops::bind(file)?.as_fd())?,
            LayerSource::Directory => {
                return Err(StepError { step: "mount a layer that is to be unpacked", errno: Errno::OPNOTSUPP });
            }
        };
        self.settle(mount)
    }

    /// A layer that was unpacked into a directory, for [`LayerSource::Directory`].
    pub fn directory(&self, directory: BorrowedFd<'_>) -> Result<Mounted, StepError> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        self.settle(open_tree(directory, c"", flags).map_err(at("clone the mount of a layer's directory"))?)
    }

    /// A clone of a layer in which ids are those of the user namespace: id N of the image is id N inside, `base + N` on the host. `EPERM`
    /// if the layer is such a clone already.
    pub fn idmapped(&self, layer: &Mounted, user_namespace: BorrowedFd<'_>) -> Result<Mounted, StepError> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let clone = || open_tree(layer, c"", flags).map_err(at("clone the mount of a layer"));
        let clone = match &self.workshop {
            None => clone()?,
            Some(workshop) => workshop.inside(clone)?,
        };
        let attributes = Attributes {
            set: u64::from(MountAttrFlags::MOUNT_ATTR_IDMAP.bits()),
            userns_fd: user_namespace.as_raw_fd() as u64,
            ..Attributes::default()
        };
        set_attributes(clone.as_fd(), c"", libc::AT_EMPTY_PATH, &attributes).map_err(at("map the ids of a layer"))?;
        self.settle(clone)
    }

    /// Makes the platform's own layer, to lie on `layers` (the uppermost first) for the ids from `owner` on.
    pub fn platform(&self, layers: &[Mounted], owner: u32, files: &[EtcFile]) -> Result<Mounted, StepError> {
        let attributes = MountAttrFlags::MOUNT_ATTR_NODEV;
        let mount = tmpfs(&Tmpfs { size_bytes: platform::BYTES, uid: owner, gid: owner, mode: 0o755, attributes })?;
        platform::fill(mount.as_fd(), layers, owner, files)?;
        self.settle(mount)
    }

    /// Makes the writable part of a root file system, with room for `size_bytes`. It belongs to the host id `owner`, which is root inside.
    /// Pages count towards the memory limit of who writes them.
    pub fn writable(&self, size_bytes: u64, owner: u32) -> Result<Writable, StepError> {
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
        if self.workshop.is_some() {
            rustix::fs::mkdirat(&mount, c"root", Mode::from_raw_mode(0o700)).map_err(at("make the place of an overlay"))?;
        }
        Ok(Writable { mount: self.settle(mount)?, upper, work })
    }

    /// Makes an overlay of `layers`, the **uppermost first**, under the writable part; `nodev`, attached nowhere. It holds all it needs: the
    /// descriptors may be closed, and the mounts dropped. `EINVAL` without a layer.
    pub fn overlay(&self, layers: &[Mounted], writable: &Writable) -> Result<OwnedFd, StepError> {
        match &self.workshop {
            None => overlay_of_descriptors(layers, writable, self.marks()),
            Some(workshop) => overlay_of_paths(workshop, layers, writable, self.marks()),
        }
    }

    /// The numbers of loop devices that still have layers of `store`, which another server must have mounted before: who holds a mount of
    /// one holds the device. Those that nobody uses are freed by this. To be asked before the first layer is mounted.
    pub fn left_from_before(&self, store: BorrowedFd<'_>) -> Result<Vec<usize>, StepError> {
        match self.features.layers {
            LayerSource::File | LayerSource::Directory => Ok(Vec::new()),
            LayerSource::Loop => loops::left(store),
        }
    }

    const fn marks(&self) -> Marks {
        match self.features.layers {
            LayerSource::File | LayerSource::Loop => Marks::Trusted,
            LayerSource::Directory => Marks::User,
        }
    }

    /// Attaches a mount where that is needed.
    fn settle(&self, mount: OwnedFd) -> Result<Mounted, StepError> {
        let place = self.workshop.as_ref().map(|workshop| workshop.attach(mount.as_fd())).transpose()?;
        Ok(Mounted { place, mount })
    }
}

/// The writable part of a root file system: a tmpfs that vanishes with the last mount of it.
#[derive(Debug)]
pub struct Writable {
    upper: OwnedFd,
    work: OwnedFd,
    /// A mount that no namespace has is taken apart when its own descriptor is closed; an overlay cannot be made of its directories then.
    mount: Mounted,
}

impl Writable {
    /// The upper directory: what is put here before the overlay is made stands over the layers (hosts, resolv.conf).
    pub fn upper(&self) -> BorrowedFd<'_> {
        self.upper.as_fd()
    }
}

/// Mounts what is behind `source`: an image's file, or a block device.
fn erofs(source: BorrowedFd<'_>) -> Result<OwnedFd, StepError> {
    let context = open(c"erofs", "fsopen erofs")?;
    let source = CString::new(format!("/proc/self/fd/{}", source.as_raw_fd())).expect("no NUL in it");
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

/// The name space of attributes in which overlayfs notes what a layer hides.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Marks {
    /// `trusted.overlay.*`, for root of the machine.
    Trusted,
    /// `user.overlay.*`, for root of another user namespace. tmpfs has them since Linux 6.6.
    User,
}

// Both with `nodev`: an image can carry the node of the host's disk, and container root could open it (user_namespaces(7) hides nodes of
// file systems mounted inside, which this one is not).

fn overlay_of_descriptors(layers: &[Mounted], writable: &Writable, marks: Marks) -> Result<OwnedFd, StepError> {
    let context = open(c"overlay", "fsopen overlay")?;
    if marks == Marks::User {
        fsconfig_set_flag(&context, c"userxattr").map_err(at("set the attributes of an overlay"))?;
    }
    for layer in layers {
        fsconfig_set_fd(&context, c"lowerdir+", layer).map_err(at("add a layer to an overlay"))?;
    }
    fsconfig_set_fd(&context, c"upperdir", &writable.upper).map_err(at("set the upper directory of an overlay"))?;
    fsconfig_set_fd(&context, c"workdir", &writable.work).map_err(at("set the work directory of an overlay"))?;
    create(&context, MountAttrFlags::MOUNT_ATTR_NODEV, "mount an overlay")
}

/// By mount(2), whose options have a page: `fsconfig` takes 255 bytes of one, which is 60 layers. The result is a clone; the mount itself lies on the writable
/// part and goes with it.
fn overlay_of_paths(workshop: &Workshop, layers: &[Mounted], writable: &Writable, marks: Marks) -> Result<OwnedFd, StepError> {
    let unattached = StepError { step: "find the place of a mount", errno: Errno::INVAL };
    let mut lower = Vec::with_capacity(layers.len());
    for layer in layers {
        lower.push(layer.place.as_ref().ok_or(unattached)?.name().to_string_lossy());
    }
    let base = writable.mount.place.as_ref().ok_or(unattached)?.name().to_string_lossy();
    // Numbers and slashes: nothing in it has a meaning of its own to the kernel.
    let marks = if marks == Marks::User { ",userxattr" } else { "" };
    let options = format!("lowerdir={},upperdir={base}/upper,workdir={base}/work{marks}", lower.join(":"));
    if options.len() >= OPTIONS_BYTES_MAX {
        return Err(StepError { step: "name the layers of an overlay in one page", errno: Errno::NAMETOOLONG });
    }
    let options = CString::new(options).expect("no NUL in it");
    let place = CString::new(format!("{base}/root")).expect("no NUL in it");
    workshop.inside(|| {
        mount(c"overlay", &*place, c"overlay", MountFlags::NODEV, &*options).map_err(at("mount an overlay"))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        open_tree(CWD, &*place, flags).map_err(at("clone the mount of an overlay"))
    })
}

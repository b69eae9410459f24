//! Layers as the kernel shows them. On newer kernels the mounts are detached: no path leads to them but their descriptor, and they end
//! with it. Before 6.15 an overlay takes no such mounts, and before 6.12 no file can be mounted: there layers are mounted on temporary
//! directories, from loop devices that mount(8) makes and the kernel clears.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::process::Command;

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, UnmountFlags, fsconfig_create, fsconfig_set_fd, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, unmount,
};
use tempfile::TempDir;

use crate::make::{Archive, Layer, need_root};
use crate::snapshot;

/// How layers are mounted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Way {
    /// By their files, seen nowhere: Linux 6.15.
    Detached,
    /// From loop devices, on directories.
    Attached,
}

impl Way {
    /// The ways that this kernel has, the newest first.
    pub(crate) fn all() -> &'static [Self] {
        let release = std::fs::read_to_string("/proc/sys/kernel/osrelease").unwrap();
        let mut numbers = release.split('.').map(|number| number.parse::<u32>().unwrap_or(0));
        if (numbers.next(), numbers.next()) >= (Some(6), Some(15)) {
            &[Self::Detached, Self::Attached]
        } else {
            &[Self::Attached]
        }
    }
}

/// A read-only mount, which ends with this.
pub(crate) enum Mount {
    Detached(OwnedFd),
    Attached(TempDir),
}

impl Mount {
    /// Mounts a layer in the newest way.
    pub(crate) fn erofs(image: &Path) -> Self {
        Self::erofs_by(Way::all()[0], image)
    }

    /// Mounts a layer in a way of [`Way::all`].
    pub(crate) fn erofs_by(way: Way, image: &Path) -> Self {
        match way {
            Way::Detached => {
                let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
                fsconfig_set_string(context.as_fd(), "source", image).unwrap();
                Self::finish(&context)
            }
            Way::Attached => Self::attach("erofs", "ro,loop", image),
        }
    }

    /// An overlay without an upper directory, from the bottom to the top.
    pub(crate) fn overlay(lowers: &[Self]) -> Self {
        if lowers.iter().any(|lower| matches!(lower, Self::Attached(_))) {
            let paths: Vec<String> = lowers.iter().rev().map(|lower| lower.path().display().to_string()).collect();
            return Self::attach("overlay", &format!("ro,lowerdir={}", paths.join(":")), Path::new("overlay"));
        }
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        for lower in lowers.iter().rev() {
            let Self::Detached(lower) = lower else { unreachable!("looked for above") };
            fsconfig_set_fd(context.as_fd(), "lowerdir+", lower.as_fd()).unwrap();
        }
        Self::finish(&context)
    }

    fn finish(context: &OwnedFd) -> Self {
        fsconfig_set_flag(context.as_fd(), "ro").unwrap();
        fsconfig_create(context.as_fd()).expect("the mount is refused: a target directory on a disk is needed, not on tmpfs");
        Self::Detached(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap())
    }

    fn attach(kind: &str, options: &str, source: &Path) -> Self {
        let place = tempfile::tempdir().unwrap();
        let mut mount = Command::new("mount");
        mount.args(["-t", kind, "-o", options]).arg(source).arg(place.path());
        let done = mount.output().expect("mount(8) is installed");
        assert!(done.status.success(), "{mount:?}: {}", String::from_utf8_lossy(&done.stderr));
        Self::Attached(place)
    }

    pub(crate) fn path(&self) -> PathBuf {
        match self {
            Self::Detached(mount) => PathBuf::from(format!("/proc/self/fd/{}", mount.as_raw_fd())),
            Self::Attached(place) => place.path().to_owned(),
        }
    }
}

impl Drop for Mount {
    fn drop(&mut self) {
        if let Self::Attached(place) = self {
            // Whoever still looks at it, such as a layer of an overlay, may go on.
            let taken_off = unmount(place.path(), UnmountFlags::DETACH);
            assert!(taken_off.is_ok() || std::thread::panicking(), "{}: {taken_off:?}", place.path().display());
        }
    }
}

#[test]
fn the_kernel_sees_what_the_reader_sees() {
    need_root();
    let acl = [&[2, 0, 0, 0][..], &[1, 0, 7, 0, 255, 255, 255, 255], &[2, 0, 6, 0, 5, 0, 0, 0]].concat();
    let acl = [&acl[..], &[4, 0, 5, 0, 255, 255, 255, 255], &[16, 0, 7, 0, 255, 255, 255, 255]].concat();
    let acl = [&acl[..], &[32, 0, 5, 0, 255, 255, 255, 255]].concat();
    let large = vec![b'\n'; 60_000];
    let mut archive = Archive::new()
        .pax(&[(b"SCHILY.xattr.system.posix_acl_access", &acl), (b"SCHILY.xattr.user.large", &large)])
        .file("acl", b"x")
        .pax(&[(b"SCHILY.xattr.system.posix_acl_default", &acl)])
        .directory("d")
        .symlink("d/link", &"x".repeat(100))
        .symlink("empty-owner", "d");
    // Attributes of each size, so that they end at, before and behind the end of a block, with names after them.
    for size in (3800..4200).step_by(12) {
        let value = vec![7; size];
        archive = archive.pax(&[(b"SCHILY.xattr.user.x", &value)]).directory(&format!("x/{size}"));
        archive = archive.pax(&[(b"SCHILY.xattr.trusted.x", &value)]).symlink(&format!("x/{size}/l"), &"t".repeat(90));
    }
    let layer = Layer::write(&archive.end(), true);
    for way in Way::all() {
        let mount = Mount::erofs_by(*way, &layer.path());
        snapshot::assert_same(&snapshot::of_directory(&mount.path()), &snapshot::of_layer(&layer.reader()));
    }
}

#[test]
fn directories_of_every_fill_can_be_searched() {
    need_root();
    // The last block goes from nearly empty over exactly full to the next.
    let mut archive = Archive::new();
    for extra in 0..60 {
        for name in 0..20 {
            archive = archive.file(&format!("{extra}/{name:0150}"), b"");
        }
        archive = archive.file(&format!("{extra}/{}", "y".repeat(90 + extra)), b"").file(&format!("{extra}/-"), b"");
    }
    let layer = Layer::write(&archive.end(), true);
    let mount = Mount::erofs(&layer.path());
    let snapshot = snapshot::of_layer(&layer.reader());
    assert_eq!(snapshot.len(), 1 + 60 * 23);
    snapshot::assert_same(&snapshot::of_directory(&mount.path()), &snapshot);
}

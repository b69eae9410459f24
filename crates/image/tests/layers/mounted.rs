//! Layers as the kernel shows them. The mounts are detached: no path leads to them but their descriptor, and they end
//! with it.

use std::os::fd::{AsFd, AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, fsconfig_create, fsconfig_set_fd, fsconfig_set_flag, fsconfig_set_string,
    fsmount, fsopen,
};

use crate::make::{Archive, Layer, need_root};
use crate::snapshot;

/// A detached mount.
pub(crate) struct Mount(OwnedFd);

impl Mount {
    /// Mounts a layer by its file.
    pub(crate) fn erofs(image: &Path) -> Self {
        let context = fsopen("erofs", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        fsconfig_set_string(context.as_fd(), "source", image).unwrap();
        Self::finish(&context)
    }

    /// An overlay without an upper directory, from the bottom to the top.
    pub(crate) fn overlay(lowers: &[Self]) -> Self {
        let context = fsopen("overlay", FsOpenFlags::FSOPEN_CLOEXEC).unwrap();
        for lower in lowers.iter().rev() {
            fsconfig_set_fd(context.as_fd(), "lowerdir+", lower.0.as_fd()).unwrap();
        }
        Self::finish(&context)
    }

    fn finish(context: &OwnedFd) -> Self {
        fsconfig_set_flag(context.as_fd(), "ro").unwrap();
        fsconfig_create(context.as_fd())
            .expect("the mount is refused: Linux 6.14 or later is needed, and a target directory on a disk, not on tmpfs");
        Self(fsmount(context.as_fd(), FsMountFlags::FSMOUNT_CLOEXEC, MountAttrFlags::empty()).unwrap())
    }

    pub(crate) fn path(&self) -> PathBuf {
        PathBuf::from(format!("/proc/self/fd/{}", self.0.as_raw_fd()))
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
    let mount = Mount::erofs(&layer.path());
    snapshot::assert_same(&snapshot::of_directory(&mount.path()), &snapshot::of_layer(&layer.reader()));
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

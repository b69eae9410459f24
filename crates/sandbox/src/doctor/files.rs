//! Layers and root file systems, and the directory that they lie in.

use std::os::fd::{AsFd as _, OwnedFd};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, XattrFlags};
use rustix::io::Errno;

use super::modules::{self, Presence};
use super::{Area, Feature, Finding, kernel};
use crate::mount::probe::{self, TRIAL_BASE};
use crate::mount::{Features, LayerSource, Missing, OverlayForm};
use crate::userns;

const DATA: Feature =
    Feature { area: Area::Files, name: "data directory", required: true, lost: "images, state and logs have no place" };
const LAYERS: Feature = Feature { area: Area::Files, name: "erofs layers", required: true, lost: "layers cannot be mounted" };
const LOOP_LAYERS: Feature = Feature {
    lost: "each layer takes a loop device, and its first mount some milliseconds more; starts cost the same",
    ..LAYERS
};
const IDMAPPED: Feature = Feature {
    area: Area::Files,
    name: "idmapped layers",
    required: true,
    lost: "a layer cannot be shown with the ids of a function",
};
const OVERLAY: Feature =
    Feature { area: Area::Files, name: "overlay", required: true, lost: "root file systems cannot be made of layers" };
const OVERLAY_BY_PATHS: Feature =
    Feature { lost: "mounts are made in a namespace of the server's own, which makes each start a little slower", ..OVERLAY };
const INSIDE: Feature = Feature {
    area: Area::Files,
    name: "proc, sys and pts inside",
    required: true,
    lost: "containers have no /proc, /sys and terminals of their own",
};

/// `TMPFS_MAGIC` and others of linux/magic.h, as statfs(2) tells them.
const NAMES: [(i64, &str); 13] = [
    (0x0102_1994, "tmpfs"),
    (0x8584_58f6, "ramfs"),
    (0x794c_7630, "overlay"),
    (0xef53, "ext4"),
    (0x5846_5342, "xfs"),
    (0x9123_683e, "btrfs"),
    (0xf2f5_2010, "f2fs"),
    (0x2fc1_2fc1, "zfs"),
    (0xca45_1a4e, "bcachefs"),
    (0x6969, "nfs"),
    (0xff53_4d42, "cifs"),
    (0x6573_5546, "fuse"),
    (0x0102_1997, "9p"),
];
/// Of these, what is gone at the next boot.
const IN_MEMORY: [&str; 2] = ["tmpfs", "ramfs"];
/// Less room than this is not enough for a usual image and what is made of it.
const ROOM_MIN: u64 = 1 << 30;

/// For root's server: a whole root file system is made, and put away.
pub(super) fn of_root(data: &Path) -> Vec<Finding> {
    let (directory, finding) = data_directory(data, true);
    let mut findings = vec![finding];
    let Some(file) = directory.and_then(|directory| probe::trial_layer(directory.as_fd()).ok()) else {
        let untried = |feature: Feature| feature.unknown("not tried: there is no data directory", "see data directory above");
        findings.extend([LAYERS, IDMAPPED, OVERLAY, INSIDE].map(untried));
        return findings;
    };
    let source = probe::layer_source(file.as_fd(), LayerSource::File);
    findings.push(layers(&source));
    let Ok(source) = source else {
        let untried = |feature: Feature| feature.unknown("not tried: no layer can be mounted", "see erofs layers above");
        findings.extend([IDMAPPED, OVERLAY, INSIDE].map(untried));
        return findings;
    };
    let Ok(ids) = userns::make(TRIAL_BASE) else {
        let untried = |feature: Feature| feature.unknown("not tried: there is no user namespace", "see user namespaces above");
        findings.extend([IDMAPPED, OVERLAY, INSIDE].map(untried));
        return findings;
    };
    findings.extend(overlay(source, &file, &ids));
    findings
}

/// For the server of an ordinary user, who unpacks layers: no more than the directory; the rest is told with the other parts.
pub(super) fn of_user(data: &Path) -> Vec<Finding> {
    vec![data_directory(data, false).1]
}

/// The nearest directory above that is there, with what is found of it.
fn data_directory(data: &Path, root: bool) -> (Option<OwnedFd>, Finding) {
    let choose = "choose another directory with --data";
    let Some(there) = nearest(data) else {
        return (None, DATA.missing(format!("{} is or lies below something that is no directory", data.display()), choose));
    };
    let shown = if there == data { data.display().to_string() } else { format!("{} (to be made)", data.display()) };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = match rustix::fs::open(&there, flags, Mode::empty()) {
        Ok(directory) => directory,
        Err(errno) => return (None, DATA.missing(format!("{}: {errno}", there.display()), choose)),
    };
    if let Err(errno) = rustix::fs::accessat(CWD, &there, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS) {
        let cure = format!("{choose}, or let this user write to {}", there.display());
        return (None, DATA.missing(format!("{}: {errno}", there.display()), cure));
    }
    let trial = match trial_file(&directory) {
        Ok(trial) => trial,
        Err(errno) => {
            let found = format!("{shown}: its file system has no unnamed files ({errno})");
            return (None, DATA.missing(found, choose));
        }
    };
    let found = rustix::fs::fstatfs(&directory).map(|stat| (name(stat.f_type), stat.f_bavail * stat.f_bsize.cast_unsigned()));
    let (kind, free) = found.unwrap_or(("unknown", u64::MAX));
    let size = format!("{shown} on {kind}, {:.1} GiB free", free as f64 / f64::from(1 << 30));
    let finding = if !root && let Err(errno) = attribute(&trial) {
        DATA.missing(
            format!("{shown} on {kind}, which takes no extended attributes of users ({errno})"),
            "choose a directory on ext4, xfs or btrfs with --data",
        )
    } else if IN_MEMORY.contains(&kind) {
        Feature { lost: "images and functions are gone at the next boot, and take memory", ..DATA }
            .degraded(size, "choose a directory on a disk with --data")
    } else if free < ROOM_MIN {
        Feature { lost: "larger images find no room", ..DATA }
            .degraded(size, "make room, or choose another directory with --data")
    } else {
        DATA.ok(size)
    };
    (Some(directory), finding)
}

/// `data`, or the nearest directory above it that is there.
fn nearest(data: &Path) -> Option<PathBuf> {
    let data = std::path::absolute(data).ok()?;
    let there = data.ancestors().find(|path| path.exists())?;
    there.is_dir().then(|| there.to_owned())
}

/// A file without a name: nothing is left of it.
fn trial_file(directory: &OwnedFd) -> Result<OwnedFd, Errno> {
    let flags = OFlags::RDWR | OFlags::TMPFILE | OFlags::CLOEXEC;
    rustix::fs::openat(directory, c".", flags, Mode::from_raw_mode(0o600))
}

/// What overlayfs notes in files of an ordinary user.
fn attribute(file: &OwnedFd) -> Result<(), Errno> {
    rustix::fs::fsetxattr(file, "user.overlay.trial", b"y", XattrFlags::empty())
}

fn name(magic: i64) -> &'static str {
    NAMES.iter().find(|(number, _)| *number == magic).map_or("another file system", |(_, name)| name)
}

fn layers(source: &Result<LayerSource, Missing>) -> Finding {
    match source {
        Ok(LayerSource::File) => LAYERS.ok("mounted from their files"),
        Ok(LayerSource::Loop) => LOOP_LAYERS.degraded(
            "mounted from loop devices",
            "Linux 6.12 or later mounts files, if they lie neither on tmpfs nor on an overlay",
        ),
        Ok(LayerSource::Directory) => LAYERS.ok("unpacked into directories"),
        Err(missing) => {
            let cure = match modules::find(Path::new("/"), &kernel::release(), "erofs") {
                Presence::Loadable => format!("{} (this kernel has the module erofs)", missing.reason),
                Presence::There | Presence::Absent | Presence::NoLists => missing.reason.clone(),
            };
            LAYERS.missing("a layer for a trial cannot be mounted", cure)
        }
    }
}

/// The overlay in the newest way that works, what it shows, and what an instance mounts in it.
fn overlay(source: LayerSource, file: &OwnedFd, ids: &OwnedFd) -> Vec<Finding> {
    let attempt = |overlay| probe::try_overlay(Features { layers: source, overlay }, file.as_fd(), ids.as_fd());
    let (made, newer) = match attempt(OverlayForm::Descriptors) {
        Ok(made) => (Ok(made), None),
        Err(newer) => (attempt(OverlayForm::Paths), Some(newer)),
    };
    let (_mounts, root) = match made {
        Ok(made) => made,
        Err(error) => {
            let missing = probe::missing_overlay(&error, newer.as_ref());
            let (idmapped, overlay) = if missing.feature == IDMAPPED.name {
                let untried = OVERLAY.unknown("not tried: ids cannot be mapped", "see idmapped layers above");
                (IDMAPPED.missing(error.to_string(), missing.reason), untried)
            } else {
                (IDMAPPED.ok("ids are mapped"), OVERLAY.missing(error.to_string(), missing.reason))
            };
            let inside = INSIDE.unknown("not tried: there is no root file system", "see overlay above");
            return vec![idmapped, overlay, inside];
        }
    };
    let overlay = match (probe::try_root(&root, probe::TRIAL_BASE), newer) {
        (Err(missing), _) => OVERLAY.missing("the root file system of a trial is not right", missing.reason),
        (Ok(()), None) => OVERLAY.ok("made of descriptors, on idmapped layers"),
        (Ok(()), Some(_)) => OVERLAY_BY_PATHS.degraded("made by paths", "Linux 6.15 or later makes it of descriptors"),
    };
    let inside = match probe::try_inside(&root, probe::TRIAL_BASE.into()) {
        Ok(()) => INSIDE.ok("made and attached in all namespaces of an instance"),
        Err(missing) => INSIDE.missing("an instance of a trial cannot make them", missing.reason),
    };
    vec![IDMAPPED.ok("a layer is shown with other ids"), overlay, inside]
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn a_directory_that_is_not_there_is_looked_for_above() {
        let made = tempfile::tempdir_in(env!("CARGO_MANIFEST_DIR")).unwrap();
        let data = made.path().join("a/b");
        let (directory, finding) = data_directory(&data, true);
        assert!(directory.is_some() && finding.found.contains("(to be made)"), "{finding:?}");
        assert!(matches!(finding.state, State::Ok | State::Degraded), "{finding:?}");
        assert_eq!(std::fs::read_dir(made.path()).unwrap().count(), 0, "something was made");
        std::fs::write(made.path().join("a"), "").unwrap();
        let (directory, finding) = data_directory(&data, true);
        assert!(directory.is_none() && finding.state == State::Missing, "{finding:?}");
    }

    #[test]
    fn a_directory_without_files_or_in_memory_is_told() {
        let (directory, finding) = data_directory(Path::new("/proc/x"), true);
        assert!(directory.is_none() && finding.state == State::Missing, "{finding:?}");
        let (_, finding) = data_directory(Path::new("/dev/shm/x"), true);
        assert_eq!((finding.state, finding.found.contains("on tmpfs")), (State::Degraded, true), "{finding:?}");
    }
}

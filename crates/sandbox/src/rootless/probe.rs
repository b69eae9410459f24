//! What an ordinary user's keeper lacks, found by trying what it will do, in its own namespaces.

use std::os::fd::BorrowedFd;

use rustix::fs::XattrFlags;
use rustix::io::Errno;

use crate::mount::{self, Missing, Writable};
use crate::userns::{self, IdRange};

/// Room of the trial's writable layer.
const TRIAL_BYTES: u64 = 1 << 20;
/// An attribute of the kind that overlayfs keeps.
const TRIAL_ATTRIBUTE: &str = "user.overlay.trial";

/// Tries what a start needs, in order; `store` is a directory of the data directory, `ids` a range of functions. An empty list says that all of it
/// works. The first failure hides those that build on it.
pub(crate) fn probe(store: BorrowedFd<'_>, ids: IdRange) -> Vec<Missing> {
    match try_all(store, ids) {
        Ok(()) => Vec::new(),
        Err(missing) => vec![missing],
    }
}

fn try_all(store: BorrowedFd<'_>, ids: IdRange) -> Result<(), Missing> {
    userns::make(ids).map_err(|error| super::Lacks::read().missing_namespace(&error))?;
    try_attributes(store).map_err(|errno| Missing {
        feature: "a data directory with extended attributes",
        reason: format!(
            "the file system of the data directory takes no attributes of users ({errno}), in which overlayfs notes what layers hide: choose \
             another one with --data"
        ),
    })?;
    let writable = Writable::make(TRIAL_BYTES, ids.base).map_err(|error| Missing {
        feature: "tmpfs in a user namespace",
        reason: format!("Linux 6.14 or later with tmpfs is needed ({error})"),
    })?;
    try_attributes(writable.upper()).map_err(|errno| Missing {
        feature: "tmpfs with extended attributes",
        reason: format!(
            "Linux 6.6 or later is needed for an ordinary user ({errno}); as root, `funtainer serve` works without"
        ),
    })?;
    let root = mount::overlay_of_user(&[store], &writable).map_err(|error| Missing {
        feature: "overlay in a user namespace",
        reason: match error.errno {
            Errno::NODEV => {
                "the kernel has no overlayfs, or may not load it for a user: as root, `modprobe overlay`".to_owned()
            }
            Errno::PERM | Errno::ACCESS => format!("this machine or container forbids it to ordinary users ({error})"),
            _ => format!("Linux 6.14 or later is needed ({error})"),
        },
    })?;
    mount::try_inside(&root, ids)
}

fn try_attributes(directory: BorrowedFd<'_>) -> Result<(), Errno> {
    rustix::fs::fsetxattr(directory, TRIAL_ATTRIBUTE, b"y", XattrFlags::empty())?;
    rustix::fs::fremovexattr(directory, TRIAL_ATTRIBUTE)
}

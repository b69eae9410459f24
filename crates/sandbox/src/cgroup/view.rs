//! What an instance sees of its own control groups, read-only, where programs look for their limits: `/sys/fs/cgroup`.
//!
//! ```text
//! v2   /sys/fs/cgroup                the instance's group
//! v1   /sys/fs/cgroup                a small tmpfs of the zygote's
//!                    /memory ...     the instance's group of each controller
//!                    /cpuset         the seat: a group of the server's, in which its zygotes are
//! ```
//! All are parts of the keeper's own mounts: to mount a cgroup file system inside would take the kernel's one lock of all groups at each start.
//! A zygote gets a view of what its instances' groups are made in, once; an init binds its own out of that, and loses sight of the rest by the
//! change of its root. An instance has nothing to set in `cpuset`, but programs take v1 for what it is only where they see that one, too
//! (OpenJDK 17).

use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;

use rustix::fs::OFlags;

use super::{CgroupError, Hierarchy, Kind, Mount, Nest, component, make_top, open_file, remove_directory, sweep, v1, write};
use crate::mount;
use crate::step::StepError;

/// The name of a view below `/sys/fs/cgroup`; empty for that directory itself.
pub type ViewName = CString;

/// Room of the tmpfs: it holds names only.
const TREE_BYTES: u64 = 64 << 10;

/// The group of zygotes in the controller `cpuset` of v1.
#[derive(Debug)]
pub(super) struct Seat {
    root: OwnedFd,
    directory: OwnedFd,
}

impl Seat {
    /// Its name as a view.
    const NAME: &CStr = c"cpuset";

    /// Makes the seat, with the processors and memory nodes that this process may use; `None` where the controller is not mounted, or there is
    /// no making it: nothing depends on it but what programs inside believe.
    pub(super) fn open(name: &str) -> Option<Self> {
        let mounts = std::fs::read_to_string("/proc/self/mountinfo").ok()?;
        let has = |mount: &Mount<'_>| mount.kind == "cgroup" && mount.options.split(',').any(|option| option == "cpuset");
        let place = Mount::all(&mounts).find(has)?.place;
        Self::make(&place, name).ok()
    }

    fn make(place: &Path, name: &str) -> Result<Self, CgroupError> {
        sweep::sweep_one(place, name)?;
        let (root, directory) = make_top(place, name)?;
        let seat = Self { root, directory };
        let status = std::fs::read_to_string("/proc/self/status").unwrap_or_default();
        let allowed = |key: &str| status.lines().find_map(|line| line.strip_prefix(key)).unwrap_or_default().trim_ascii();
        let step = "set the processors of a control group";
        let written = write(seat.directory.as_fd(), "cpuset.cpus", allowed("Cpus_allowed_list:"), step)
            .and_then(|()| write(seat.directory.as_fd(), "cpuset.mems", allowed("Mems_allowed_list:"), step));
        written.map_err(|source| {
            // It is empty; the first error is the one to tell.
            let _ = component(name).map(|name| remove_directory(seat.root.as_fd(), &name));
            CgroupError::Step { path: name.to_owned(), source }
        })?;
        Ok(seat)
    }

    /// The directory that it lies in.
    pub(super) const fn root(&self) -> &OwnedFd {
        &self.root
    }
}

impl Hierarchy {
    /// Takes the zygote with this pid to its seat; a view of that, for the zygote to attach.
    pub fn seat(&self, pid: i32) -> Result<Option<OwnedFd>, StepError> {
        let Some(Seat { directory, .. }) = &self.seat else { return Ok(None) };
        let fail = |errno| StepError { step: "seat a zygote in a control group", errno };
        let tasks = open_file(directory.as_fd(), "tasks", OFlags::WRONLY).map_err(fail)?;
        rustix::io::write(tasks, pid.to_string().as_bytes()).map_err(fail)?;
        mount::view(directory.as_fd()).map(Some)
    }
}

impl Nest {
    /// Where instances see their groups, in the order of [`Nest::views`].
    pub fn view_names(&self) -> Vec<ViewName> {
        let name = |kind| match kind {
            Kind::V1(role) => CString::new(v1::names(role).join(",")).expect("names of controllers are without NUL"),
            Kind::V2(_) => ViewName::default(),
        };
        self.places.iter().map(|place| name(place.kind)).collect()
    }

    /// A mount of each directory that instances' groups are made in, for the zygote to attach.
    pub fn views(&self) -> Result<Vec<OwnedFd>, StepError> {
        self.places.iter().map(|place| mount::view(place.directory.as_fd())).collect()
    }
}

/// Builds the directory of all views of v1 on a directory of this mount namespace, out of which instances take it by [`mount::move_tree`]: a tmpfs with a
/// place for each, and a view of the seat.
pub(crate) fn tree(at_directory: BorrowedFd<'_>, views: &[ViewName], seat: Option<BorrowedFd<'_>>) -> Result<(), StepError> {
    let fail = |errno| StepError { step: "make a place for a view", errno };
    let options = mount::Tmpfs { size_bytes: TREE_BYTES, uid: 0, gid: 0, mode: 0o755, attributes: mount::INERT };
    let root = mount::tmpfs(&options)?;
    mount::attach(root.as_fd(), at_directory)?;
    for name in views {
        mount::target(root.as_fd(), name)?;
        // Controllers that are mounted together are found by the name of each.
        for alone in name.to_bytes().split(|byte| *byte == b',').filter(|alone| *alone != name.to_bytes()) {
            rustix::fs::symlinkat(name.as_c_str(), &root, alone).map_err(fail)?;
        }
    }
    if let Some(seat) = seat {
        mount::attach(seat, mount::target(root.as_fd(), Seat::NAME)?.as_fd())?;
    }
    mount::seal(root.as_fd())
}

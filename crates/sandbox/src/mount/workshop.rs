//! A mount namespace for kernels that clone, and stack by an overlay, attached mounts only.
//!
//! Before 6.15 `open_tree` refuses to clone a mount that no namespace has, and an overlay refuses such mounts as layers. There the keeper
//! attaches them in a namespace that nobody else has: its root is an empty tmpfs, and each mount gets a directory with a number as name.
//! The keeper itself stays where it was and steps in for single acts ([`Workshop::inside`]), so that what it forks has no copies of these
//! mounts. They vanish with the last descriptor of the namespace, so with the keeper.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::ffi::{CStr, CString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::rc::Rc;

use rustix::fs::{AtFlags, CWD, Mode, OFlags};
use rustix::mount::{MoveMountFlags, UnmountFlags, move_mount, unmount};
use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use super::{INERT, Tmpfs, attach, make_private, pivot, tmpfs};
use crate::step::{StepError, at};

/// Room of the namespace's root: it holds directories only, and not more than the kernel allows mounts (`fs.mount-max`, 100,000).
const ROOT_BYTES: u64 = 64 << 20;

/// A mount namespace of this process, which it is not in.
#[derive(Debug)]
pub(super) struct Workshop {
    namespace: OwnedFd,
    /// Its root directory.
    root: OwnedFd,
    numbers: RefCell<Numbers>,
}

impl Workshop {
    /// Makes it. Needs CAP_SYS_ADMIN and CAP_SYS_CHROOT, and the calling thread must share its working directory with no other one; a
    /// thread that does is given one of its own for good (unshare(2), `CLONE_FS`).
    pub(super) fn open() -> Result<Self, StepError> {
        // SAFETY: CLONE_FS concerns the root and the working directory of this thread, no memory and no descriptor.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::FS) }.map_err(at("have a working directory of one's own"))?;
        let home = Home::remember()?;
        // SAFETY: CLONE_NEWNS concerns the mounts that this thread sees, no memory and no descriptor.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(at("make a mount namespace"))?;
        let made = Self::furnish();
        home.enter();
        made
    }

    /// The first acts in the namespace.
    fn furnish() -> Result<Self, StepError> {
        let namespace = own_namespace()?;
        make_private()?;
        let root = tmpfs(&Tmpfs { size_bytes: ROOT_BYTES, uid: 0, gid: 0, mode: 0o700, attributes: INERT })?;
        let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let place = rustix::fs::open(c"/proc", flags, Mode::empty()).map_err(at("open a place for a root"))?;
        attach(root.as_fd(), place.as_fd())?;
        pivot(root.as_fd())?;
        Ok(Self { namespace, root, numbers: RefCell::default() })
    }

    /// Does something in the namespace, with its root as the working directory. Nothing else may be done there: no process may be born.
    pub(super) fn inside<T>(&self, act: impl FnOnce() -> Result<T, StepError>) -> Result<T, StepError> {
        let home = Home::remember()?;
        enter(self.namespace.as_fd()).map_err(at("enter the mount namespace of the layers"))?;
        let done = act();
        home.enter();
        done
    }

    /// Attaches a detached mount. It is taken off when the result is dropped.
    pub(super) fn attach(self: &Rc<Self>, mount: BorrowedFd<'_>) -> Result<Place, StepError> {
        let number = self.numbers.borrow_mut().take();
        let name = CString::new(number.to_string()).expect("no NUL in it");
        let made = match rustix::fs::mkdirat(&self.root, &*name, Mode::from_raw_mode(0o700)) {
            Ok(()) => {
                let attached = self.inside(|| {
                    move_mount(mount, c"", CWD, &*name, MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH)
                        .map_err(at("attach a mount in the namespace of the layers"))
                });
                attached.inspect_err(|_| {
                    // The error above is the one to tell; a directory that stays is found again by its number.
                    let _ = rustix::fs::unlinkat(&self.root, &*name, AtFlags::REMOVEDIR);
                })
            }
            Err(errno) => Err(StepError { step: "make a place for a mount", errno }),
        };
        match made {
            Ok(()) => Ok(Place { workshop: Rc::clone(self), number, name }),
            Err(error) => {
                self.numbers.borrow_mut().give_back(number);
                Err(error)
            }
        }
    }
}

/// Where a mount is attached.
#[derive(Debug)]
pub(super) struct Place {
    workshop: Rc<Workshop>,
    number: u32,
    name: CString,
}

impl Place {
    /// Its path, relative to the working directory that [`Workshop::inside`] gives.
    pub(super) fn name(&self) -> &CStr {
        &self.name
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        // Lazily: descriptors of it may be open, and an overlay keeps what it needs. What is mounted on it goes along.
        let gone = self.workshop.inside(|| {
            unmount(&*self.name, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW).map_err(at("take a mount off"))?;
            rustix::fs::unlinkat(&self.workshop.root, &*self.name, AtFlags::REMOVEDIR)
                .map_err(at("remove the place of a mount"))
        });
        debug_assert!(gone.is_ok(), "{gone:?}");
        // A place that cannot be cleared is not used again.
        if gone.is_ok() {
            self.workshop.numbers.borrow_mut().give_back(self.number);
        }
    }
}

/// The numbers that places have for names, the lowest first: short names let an overlay have many layers.
#[derive(Debug, Default)]
struct Numbers {
    /// Free ones below `next`.
    free: BTreeSet<u32>,
    next: u32,
}

impl Numbers {
    fn take(&mut self) -> u32 {
        self.free.pop_first().unwrap_or_else(|| {
            self.next += 1;
            self.next - 1
        })
    }

    fn give_back(&mut self, number: u32) {
        self.free.insert(number);
    }
}

/// Where this thread is: its mount namespace, root and working directory.
struct Home {
    namespace: OwnedFd,
    root: OwnedFd,
    directory: OwnedFd,
}

impl Home {
    fn remember() -> Result<Self, StepError> {
        let open = |path: &CStr| {
            let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
            rustix::fs::open(path, flags, Mode::empty()).map_err(at("remember the working directory"))
        };
        Ok(Self { namespace: own_namespace()?, root: open(c"/")?, directory: open(c".")? })
    }

    /// Goes back there.
    ///
    /// # Panics
    /// If that is not possible: whatever this process did next, it would do among the wrong mounts.
    fn enter(self) {
        let back = enter(self.namespace.as_fd())
            .and_then(|()| rustix::process::fchdir(&self.root))
            .and_then(|()| rustix::process::chroot(c"."))
            .and_then(|()| rustix::process::fchdir(&self.directory));
        back.expect("the way back into the mount namespace of this process");
    }
}

fn own_namespace() -> Result<OwnedFd, StepError> {
    rustix::fs::open(c"/proc/thread-self/ns/mnt", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
        .map_err(at("open a mount namespace"))
}

fn enter(namespace: BorrowedFd<'_>) -> Result<(), rustix::io::Errno> {
    rustix::thread::move_into_link_name_space(namespace, Some(LinkNameSpaceType::Mount))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_lowest_free_number_comes_first() {
        let mut numbers = Numbers::default();
        assert_eq!([0; 4].map(|_| numbers.take()), [0, 1, 2, 3]);
        numbers.give_back(2);
        numbers.give_back(0);
        assert_eq!([0; 3].map(|_| numbers.take()), [0, 2, 4]);
    }
}

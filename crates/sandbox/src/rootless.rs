//! The keeper of an ordinary user: root of a user namespace of its own, nobody more outside of it.
//!
//! ```text
//! ids found (/etc/subuid, /etc/subgid) ─ user namespace ─┬ newuidmap, newgidmap: 0 is the user, 1 and up are its subordinate ids
//!                                                        └ else: 0 is the user, and there is no other id
//!   ─ entered ─ root inside ─ mount namespace of its own ─ this program executed anew (`executable`) ─ ids read from the namespace's maps
//! ```
//! From there on the keeper does what it does as root, with what the kernel grants to root of a user namespace: zygotes and their user namespaces
//! lie below this one, the overlay is mounted in it (with `userxattr`), the daemon gets the id 1, functions get ranges from 2 on. What the
//! kernel does not grant has another way: layers are unpacked instead of mounted (`keeper::unpack`), and control groups are used where they were
//! delegated.
//!
//! Everything in the namespace is the user's own doing for the host: no program with privilege runs but newuidmap and newgidmap (uidmap), which
//! check the maps against the administrator's files.

mod lacks;
mod subordinate;

use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::process::{Command, Stdio};

use rustix::thread::{LinkNameSpaceType, UnshareFlags};

use crate::mount::{self, Missing};
use crate::step::{StepError, at, errno_of};
use crate::userns::{self, IDS, IdRange};

use lacks::Lacks;
use subordinate::{Mapped, Subordinate};

/// The daemon's id in the keeper's namespace.
const DAEMON: u32 = 1;
/// First id of the functions' ranges there.
const FUNCTIONS: u32 = 2;
/// What distributions give to each user. With fewer, some images lack ids that they use.
const IDS_USUAL: u32 = IDS;

/// The ids that there are in the keeper's user namespace besides 0, which is the user.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Ids {
    /// Subordinate ids: 1 and up.
    Subordinate(Subordinate),
    /// None.
    Single,
}

impl Ids {
    /// How many ranges of ids there are for functions.
    pub(crate) fn slots(&self) -> u32 {
        match self {
            Self::Subordinate(ids) => ((ids.count() - DAEMON) / IDS).max(1),
            Self::Single => 1,
        }
    }

    /// One of them.
    pub(crate) fn range(&self, slot: u32) -> IdRange {
        match self {
            Self::Subordinate(ids) => {
                let before = slot * IDS;
                // The usual allotment has one id less than a range, since the daemon has one.
                IdRange { base: FUNCTIONS + before, count: (ids.count() - DAEMON - before).min(IDS) }
            }
            Self::Single => IdRange::SINGLE,
        }
    }

    /// The daemon's user and group.
    pub(crate) fn daemon(&self) -> u32 {
        match self {
            Self::Subordinate(_) => DAEMON,
            Self::Single => 0,
        }
    }

    /// A name for a range that says which ids of the host these are: what belongs to them is theirs for as long as the administrator's files do
    /// not change.
    pub(crate) fn host_name(&self, slot: u32) -> String {
        let range = self.range(slot);
        match self {
            Self::Subordinate(ids) => {
                let (uid, gid) = ids.host(range.base - 1);
                format!("{uid}-{gid}-{}", range.count)
            }
            Self::Single => "single".to_owned(),
        }
    }
}

/// Makes the user namespace, enters it, becomes its root, and takes a mount namespace of its own. `log` is told of what is worse than it could be.
/// What there is then is told by [`own_ids`].
///
/// The process must have one thread. On failure it may be in the namespace already: it must end.
pub(crate) fn enter(log: fn(&str)) -> Result<(), Missing> {
    let namespace = match subordinate_namespace(log)? {
        Some(namespace) => namespace,
        None => single_namespace()?,
    };
    become_root_of(namespace.as_fd()).map_err(|error| Lacks::read().missing_namespace(&error))
}

/// The ids of the user namespace that this process is root of; nothing in the first one, which has all. Takes a mount namespace of its own there.
pub(crate) fn own_ids() -> Result<Option<Ids>, StepError> {
    let read =
        |path| std::fs::read_to_string(path).map_err(|error| StepError { step: "read an id map", errno: errno_of(&error) });
    let (uids, gids) = (read("/proc/self/uid_map")?, read("/proc/self/gid_map")?);
    let ids = match Subordinate::from_maps(&uids, &gids) {
        Mapped::Everything => return Ok(None),
        Mapped::Some(ids) => Ids::Subordinate(ids),
        Mapped::RootAlone => Ids::Single,
    };
    own_mounts()?;
    Ok(Some(ids))
}

/// With the user's subordinate ids, where it has some and the programs to use them.
fn subordinate_namespace(log: fn(&str)) -> Result<Option<OwnedFd>, Missing> {
    let found = match Subordinate::find() {
        Ok(found) => found,
        Err(why) => {
            log(&single_warning(&why.to_string()));
            return Ok(None);
        }
    };
    let mut refused = None;
    let made = userns::make_with(|pid| {
        let mapped = run("newuidmap", pid, &found.uid_map()).and_then(|()| run("newgidmap", pid, &found.gid_map()));
        mapped.map_err(|text| {
            refused = Some(text);
            StepError { step: "write the id maps of a user namespace", errno: rustix::io::Errno::PERM }
        })
    });
    match (made, refused) {
        (Ok(namespace), _) => {
            if found.count() < IDS_USUAL {
                log(&format!(
                    "there are {} subordinate ids: what an image gives to a higher id becomes nobody's (see subuid(5))",
                    found.count()
                ));
            }
            Ok(Some(namespace))
        }
        (Err(_), Some(text)) => {
            log(&single_warning(&text));
            Ok(None)
        }
        (Err(error), None) => Err(Lacks::read().missing_namespace(&error)),
    }
}

fn single_warning(why: &str) -> String {
    format!(
        "only one user id can be used, since {why}: every file and process of an image is yours outside, images whose programs change their user \
         do not work, and functions are not kept apart by their ids"
    )
}

/// With the user's own id alone.
fn single_namespace() -> Result<OwnedFd, Missing> {
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    userns::make_with(|pid| -> Result<(), StepError> {
        userns::write_proc(pid, "setgroups", b"deny").map_err(at("write setgroups"))?;
        userns::write_proc(pid, "uid_map", format!("0 {uid} 1\n").as_bytes()).map_err(at("write uid_map"))?;
        userns::write_proc(pid, "gid_map", format!("0 {gid} 1\n").as_bytes()).map_err(at("write gid_map"))
    })
    .map_err(|error| Lacks::read().missing_namespace(&error))
}

/// Runs one of the two programs; what it says where it refuses.
fn run(program: &str, pid: i32, map: &[[u32; 3]]) -> Result<(), String> {
    let numbers = map.iter().flatten().map(u32::to_string);
    let mut command = Command::new(program);
    command.arg(pid.to_string()).args(numbers).stdin(Stdio::null()).stdout(Stdio::null());
    match command.output() {
        Ok(output) if output.status.success() => Ok(()),
        Ok(output) => {
            let said = String::from_utf8_lossy(&output.stderr);
            Err(format!("{program} refused: {}", said.lines().next().unwrap_or("it does not say why")))
        }
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => {
            Err(format!("{program} is not installed (on Debian and Ubuntu: apt install uidmap)"))
        }
        Err(error) => Err(format!("{program} cannot be executed: {error}")),
    }
}

fn become_root_of(namespace: BorrowedFd<'_>) -> Result<(), StepError> {
    rustix::thread::move_into_link_name_space(namespace, Some(LinkNameSpaceType::User))
        .map_err(at("enter a user namespace"))?;
    let (uid, gid) = (rustix::process::Uid::ROOT, rustix::process::Gid::ROOT);
    // The user's groups stay: they may be what opens the data directory. Zygotes and the daemon give them up.
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(at("setresgid"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(at("setresuid"))?;
    own_mounts()
}

fn own_mounts() -> Result<(), StepError> {
    // SAFETY: CLONE_NEWNS concerns this process, which has one thread, and touches no memory or descriptor.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNS) }.map_err(at("make a mount namespace"))?;
    mount::make_private()
}

#[cfg(test)]
mod tests {
    use super::*;

    impl Ids {
        /// This many subordinate ids.
        pub(crate) fn of(count: u32) -> Self {
            ids(&format!("ada:100000:{count}\n"))
        }
    }

    fn ids(text: &str) -> Ids {
        Ids::Subordinate(Subordinate::from_files(text, text, &["ada"], 1000, 1000).expect("ids"))
    }

    #[test]
    fn the_usual_allotment_is_one_range_without_its_last_id() {
        let ids = ids("ada:100000:65536\n");
        assert_eq!((ids.slots(), ids.daemon()), (1, 1));
        assert_eq!(ids.range(0), IdRange { base: 2, count: 65_535 });
        assert_eq!(ids.host_name(0), "100001-100001-65535");
    }

    #[test]
    fn a_large_allotment_has_a_range_for_each_of_several_functions() {
        let ids = ids("ada:100000:65536\nada:500000:131073\n");
        assert_eq!(ids.slots(), 3);
        assert_eq!(ids.range(0), IdRange { base: 2, count: IDS });
        assert_eq!(ids.range(1), IdRange { base: 2 + IDS, count: IDS });
        assert_eq!(ids.range(2), IdRange { base: 2 + 2 * IDS, count: IDS });
        assert_eq!(ids.host_name(0), "100001-100001-65536");
        // The first allotment ends within this range; the name tells where the range begins.
        assert_eq!(ids.host_name(1), "500001-500001-65536");
    }

    #[test]
    fn a_small_allotment_is_all_that_there_is() {
        let ids = ids("ada:100000:1000\n");
        assert_eq!((ids.slots(), ids.range(0)), (1, IdRange { base: 2, count: 999 }));
    }

    #[test]
    fn without_any_there_is_root_alone() {
        assert_eq!((Ids::Single.slots(), Ids::Single.range(0), Ids::Single.daemon()), (1, IdRange::SINGLE, 0));
    }
}

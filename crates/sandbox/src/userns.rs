//! Users and their powers: user namespaces, capabilities, ids.

use std::io::Write;
use std::os::fd::{AsFd, OwnedFd};

use rustix::io::Errno;
use rustix::process::{Gid, Pid, Signal, Uid};
use rustix::thread::{CapabilitiesSecureBits, CapabilitySet, CapabilitySets};

use crate::clone::{Cloned, clone3};
use crate::fds::{Exit, pidfd_reap, pidfd_signal};
use crate::step::{StepError, at, errno_of};

/// How many ids each function has: 0 to 65,535 inside, as images expect.
pub const IDS: u32 = 0x1_0000;

/// The ids of a user namespace: 0 to `count - 1` inside are `base` to `base + count - 1` in the namespace above it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct IdRange {
    /// What 0 inside is above.
    pub base: u32,
    /// How many there are, at least one.
    pub count: u32,
}

impl IdRange {
    /// Root alone, which is root above.
    pub const SINGLE: Self = Self { base: 0, count: 1 };

    /// Whether there is but one id: then nothing inside can have another owner, and groups cannot be set.
    pub const fn is_single(self) -> bool {
        self.count == 1
    }

    /// What an id of an image is inside: itself, or 0 where there is no other.
    pub const fn inside(self, id: u32) -> u32 {
        if self.is_single() { 0 } else { id }
    }

    /// The range as `/proc/PID/uid_map` takes it.
    fn map(self) -> String {
        format!("0 {} {}\n", self.base, self.count)
    }
}

/// A whole range of [`IDS`] ids from a first one on.
impl From<u32> for IdRange {
    fn from(base: u32) -> Self {
        Self { base, count: IDS }
    }
}

/// What a container's root may do within its namespaces: the default of Docker less `NET_RAW`, `MKNOD`, `AUDIT_WRITE` and `SYS_CHROOT`.
pub const KEPT: CapabilitySet = CapabilitySet::CHOWN
    .union(CapabilitySet::DAC_OVERRIDE)
    .union(CapabilitySet::FOWNER)
    .union(CapabilitySet::FSETID)
    .union(CapabilitySet::KILL)
    .union(CapabilitySet::SETGID)
    .union(CapabilitySet::SETUID)
    .union(CapabilitySet::SETPCAP)
    .union(CapabilitySet::SETFCAP)
    .union(CapabilitySet::NET_BIND_SERVICE);

/// Number of the last capability that any kernel so far has (`CAP_CHECKPOINT_RESTORE`) with room for those to come: one past it is
/// `EINVAL`, which ends the loop over the bounding set.
const CAPABILITIES_MAX: u32 = 63;

/// Makes a user namespace with these ids (a number alone is the first of [`IDS`]), and returns its descriptor (what `/proc/PID/ns/user` is).
/// For idmapped mounts, and for children to enter. Needs CAP_SETUID and CAP_SETGID over the ids.
pub fn make(ids: impl Into<IdRange>) -> Result<OwnedFd, StepError> {
    let ids = ids.into();
    make_with(|pid| write_maps(pid, ids))
}

/// As [`make`], where `write` gives the new namespace its maps by the pid of the process that is in it.
///
/// A namespace needs a process to be born in: one is cloned for it, and reaped before this returns.
pub(crate) fn make_with<E: From<StepError>>(write: impl FnOnce(i32) -> Result<(), E>) -> Result<OwnedFd, E> {
    let child = Sleeper::spawn(libc::CLONE_NEWUSER)?;
    write(child.pid)?;
    let path = format!("/proc/{}/ns/user", child.pid);
    let namespace =
        std::fs::File::open(path).map_err(|error| StepError { step: "open a new user namespace", errno: errno_of(&error) })?;
    Ok(namespace.into())
}

/// Makes a namespace of another kind (`CLONE_NEW*`), and returns its descriptor (what `/proc/PID/ns/NAME` is). In the same way.
pub(crate) fn namespace_of_child(kind: i32, name: &str) -> Result<OwnedFd, StepError> {
    let child = Sleeper::spawn(kind)?;
    let namespace = std::fs::File::open(format!("/proc/{}/ns/{name}", child.pid))
        .map_err(|error| StepError { step: "open a new namespace", errno: errno_of(&error) })?;
    Ok(namespace.into())
}

/// The user of this process as the host sees it, or the namespace above: root of an ordinary user's namespace is that user there.
pub fn outer_uid() -> u32 {
    let id = rustix::process::geteuid().as_raw();
    outer_of(id, &std::fs::read_to_string("/proc/self/uid_map").unwrap_or_default())
}

fn outer_of(id: u32, map: &str) -> u32 {
    let mut outer = map.lines().filter_map(|line| {
        let mut numbers = line.split_ascii_whitespace().map_while(|number| number.parse::<u32>().ok());
        let (inside, outside, count) = (numbers.next()?, numbers.next()?, numbers.next()?);
        id.checked_sub(inside).filter(|offset| *offset < count).map(|offset| outside + offset)
    });
    outer.next().unwrap_or(id)
}

/// Writes `/proc/PID/FILE` in one write, as the id maps ask for.
pub(crate) fn write_proc(pid: i32, file: &str, bytes: &[u8]) -> Result<(), Errno> {
    let open = std::fs::OpenOptions::new().write(true).open(format!("/proc/{pid}/{file}"));
    open.and_then(|mut file| file.write_all(bytes)).map_err(|error| errno_of(&error))
}

/// Gives the process `pid` (born with `CLONE_NEWUSER`) the map of [`make`].
pub fn write_maps(pid: i32, ids: impl Into<IdRange>) -> Result<(), StepError> {
    let map = ids.into().map();
    write_proc(pid, "uid_map", map.as_bytes()).map_err(at("write uid_map"))?;
    write_proc(pid, "gid_map", map.as_bytes()).map_err(at("write gid_map"))
}

/// Becomes root of the user namespace that this process is in: all three user and group ids 0, no supplementary groups.
///
/// Raw system calls on the calling thread only: may be called between clone and exec.
pub fn become_root() -> Result<(), StepError> {
    become_user(Uid::ROOT, Gid::ROOT, &[])
}

/// Sets the supplementary groups, then all group ids, then all user ids of the calling thread. Leaving uid 0 clears the effective and
/// permitted capabilities (capabilities(7)).
///
/// In a user namespace that denies setgroups(2), which one of a single id does, the groups of the host's user stay: there is no way to give
/// them up (user_namespaces(7)). They open nothing that the mounts do not show.
///
/// Raw system calls on the calling thread only, where the C library would signal all threads: may be called between clone and exec.
pub fn become_user(uid: Uid, gid: Gid, groups: &[Gid]) -> Result<(), StepError> {
    match rustix::thread::set_thread_groups(groups) {
        Err(Errno::PERM) if groups.is_empty() && setgroups_is_denied() => {}
        other => other.map_err(at("setgroups"))?,
    }
    rustix::thread::set_thread_res_gid(gid, gid, gid).map_err(at("setresgid"))?;
    rustix::thread::set_thread_res_uid(uid, uid, uid).map_err(at("setresuid"))
}

/// Whether nobody may set groups in this user namespace. Neither allocates nor locks.
fn setgroups_is_denied() -> bool {
    let flags = rustix::fs::OFlags::RDONLY | rustix::fs::OFlags::CLOEXEC;
    let mut word = [0_u8; 8];
    let read = rustix::fs::open(c"/proc/self/setgroups", flags, rustix::fs::Mode::empty())
        .and_then(|file| rustix::io::read(file, &mut word[..]));
    read.is_ok_and(|length| word[..length].starts_with(b"deny"))
}

/// Takes all but `kept` out of the bounding set, for good: no exec brings them back. Needs CAP_SETPCAP.
///
/// Raw system calls: may be called between clone and exec.
pub fn drop_bounding(kept: CapabilitySet) -> Result<(), StepError> {
    for number in 0..=CAPABILITIES_MAX {
        let capability = CapabilitySet::from_bits_retain(1 << number);
        if kept.contains(capability) {
            continue;
        }
        match rustix::thread::remove_capability_from_bounding_set(capability) {
            Ok(()) => {}
            Err(Errno::INVAL) => return Ok(()),
            Err(errno) => return Err(StepError { step: "drop a capability from the bounding set", errno }),
        }
    }
    Ok(())
}

/// Leaves the calling thread with `kept` as effective and permitted capabilities, none inheritable, none ambient.
///
/// Raw system calls: may be called between clone and exec.
pub fn set_capabilities(kept: CapabilitySet) -> Result<(), StepError> {
    rustix::thread::clear_ambient_capability_set().map_err(at("clear the ambient capabilities"))?;
    let sets = CapabilitySets { effective: kept, permitted: kept, inheritable: CapabilitySet::empty() };
    rustix::thread::set_capabilities(None, sets).map_err(at("capset"))
}

/// No exec gives new powers from now on: neither setuid bits nor file capabilities count.
///
/// One system call: may be called between clone and exec.
pub fn no_new_privs() -> Result<(), StepError> {
    rustix::thread::set_no_new_privs(true).map_err(at("set no_new_privs"))
}

/// Closes this process to all that are not root over the user namespace which it was executed in, as `ptrace` does (prctl(2),
/// `PR_SET_DUMPABLE`): links, memory and descriptors under its `/proc/PID`. An exec ends it.
///
/// One system call: may be called between clone and exec.
pub fn not_dumpable() -> Result<(), StepError> {
    rustix::process::set_dumpable_behavior(rustix::process::DumpableBehavior::NotDumpable).map_err(at("set not dumpable"))
}

/// While it lives, this process has another effective user id, with all its capabilities: a user namespace that is made now belongs to that id.
///
/// What the kernel counts by user (signals that wait, message queues, locked memory, processes, namespaces) it counts twice for those inside a
/// user namespace: for their own id, and for the owner of the namespace. If all namespaces belonged to root, then one function could use up
/// what all functions, and the host's root, may have of these.
#[derive(Debug)]
pub(crate) struct Owner {
    former: Uid,
    bits: CapabilitiesSecureBits,
    /// With whom, and by which signal, this process is to end: a change of ids makes the kernel forget it (prctl(2), PR_SET_PDEATHSIG).
    parent: (Option<Pid>, Option<Signal>),
}

impl Owner {
    /// Takes the id on. Needs CAP_SETUID and CAP_SETPCAP.
    pub(crate) fn assume(id: u32) -> Result<Self, Errno> {
        let bits = rustix::thread::capabilities_secure_bits()?;
        // Without the bit a change of ids takes the capabilities away.
        rustix::thread::set_capabilities_secure_bits(bits | CapabilitiesSecureBits::NO_SETUID_FIXUP)?;
        let parent = (rustix::process::getppid(), rustix::process::parent_process_death_signal()?);
        let owner = Self { former: rustix::process::geteuid(), bits, parent };
        effective(Uid::from_raw(id))?;
        Ok(owner)
    }
}

impl Drop for Owner {
    fn drop(&mut self) {
        // Neither is refused to a process that has its capabilities.
        let back = effective(self.former).and_then(|()| rustix::thread::set_capabilities_secure_bits(self.bits));
        assert!(back.is_ok(), "the ids of the keeper cannot be restored: {back:?}");
        let (parent, Some(signal)) = self.parent else { return };
        let watched = rustix::process::set_parent_process_death_signal(Some(signal));
        assert!(watched.is_ok(), "the parent-death signal cannot be set again: {watched:?}");
        // A parent that died meanwhile sent none. Fails for no process that lives.
        if rustix::process::getppid() != parent {
            let _ = rustix::process::kill_process(rustix::process::getpid(), signal);
        }
    }
}

/// Changes the effective id of the calling thread only.
fn effective(id: Uid) -> Result<(), Errno> {
    rustix::thread::set_thread_res_uid(None, id, None)
}

/// A child in a new namespace that does nothing; killed and reaped when dropped.
struct Sleeper {
    pid: i32,
    pidfd: OwnedFd,
}

impl Sleeper {
    fn spawn(namespace: i32) -> Result<Self, StepError> {
        let parent = rustix::process::getpid().as_raw_pid();
        // SAFETY: the child makes raw system calls only, so that it needs no lock which another thread might have held, and does not
        // return from the function that it enters.
        match unsafe { clone3(namespace) }.map_err(at("clone a process in a new namespace"))? {
            Cloned::Child => sleep_until_killed(parent),
            Cloned::Parent { pid, pidfd } => Ok(Self { pid, pidfd }),
        }
    }
}

impl Drop for Sleeper {
    fn drop(&mut self) {
        // It can only fail with ESRCH, when somebody else has ended and reaped it.
        if pidfd_signal(self.pidfd.as_fd(), libc::SIGKILL).is_ok() {
            let reaped: Result<Option<Exit>, Errno> = pidfd_reap(self.pidfd.as_fd(), true);
            debug_assert!(reaped.is_ok(), "the child of a user namespace cannot be reaped: {reaped:?}");
        }
    }
}

/// The whole life of the child: dies with its parent, else by its signal.
fn sleep_until_killed(parent: i32) -> ! {
    // SAFETY: raw system calls without memory, safe in a child of a process with threads.
    unsafe {
        libc::syscall(libc::SYS_prctl, libc::PR_SET_PDEATHSIG, libc::SIGKILL, 0, 0, 0);
        // A parent that died before the line above sent no signal.
        while libc::syscall(libc::SYS_getppid) == libc::c_long::from(parent) {
            libc::syscall(libc::SYS_ppoll, 0, 0, 0, 0, 0);
        }
        libc::_exit(1)
    }
}

#[cfg(test)]
mod tests {
    use rustix::fs::{Mode, OFlags};

    use super::*;
    use crate::testing::{Child, TEST_BASE, device_of, ensure, need_root, refused, run};

    #[test]
    fn a_namespace_has_the_map_and_leaves_no_process() {
        need_root();
        let namespace = make(TEST_BASE).expect("a user namespace");
        let uid = std::process::Command::new("nsenter")
            .arg(format!("--user=/proc/{}/fd/{}", std::process::id(), std::os::fd::AsRawFd::as_raw_fd(&namespace)))
            .args(["cat", "/proc/self/uid_map", "/proc/self/gid_map"])
            .output()
            .expect("nsenter of util-linux");
        let text = String::from_utf8(uid.stdout).expect("text");
        let maps: Vec<Vec<&str>> = text.lines().map(|line| line.split_whitespace().collect()).collect();
        let map = vec!["0".to_owned(), TEST_BASE.to_string(), IDS.to_string()];
        assert_eq!(maps, vec![map.clone(), map]);
    }

    #[test]
    fn root_of_a_namespace_is_who_he_is_above() {
        let first = "         0          0 4294967295\n";
        assert_eq!((outer_of(0, first), outer_of(1000, first)), (0, 1000));
        let own = "         0       1000          1\n         1     100000      65536\n";
        assert_eq!((outer_of(0, own), outer_of(2, own)), (1000, 100_001));
        assert_eq!((outer_of(70_000, own), outer_of(70_000, "no map")), (70_000, 70_000));
    }

    #[test]
    fn who_was_another_owner_still_ends_with_its_parent() {
        need_root();
        run(0, || {
            rustix::process::set_parent_process_death_signal(Some(Signal::TERM)).map_err(at("set the signal"))?;
            drop(Owner::assume(TEST_BASE).map_err(at("become another owner"))?);
            let signal = rustix::process::parent_process_death_signal().map_err(at("look at the signal"))?;
            ensure(signal == Some(Signal::TERM) && rustix::process::geteuid().is_root(), "all is as before")
        });
    }

    #[test]
    fn two_maps_cannot_be_written() {
        need_root();
        let child = Child::start(libc::CLONE_NEWUSER, || Ok(()));
        let error = write_maps(child.pid, TEST_BASE).expect_err("the maps are written already");
        assert_eq!((error.step, error.errno), ("write uid_map", Errno::PERM));
        child.succeed();
    }

    #[test]
    fn a_map_past_the_last_id_is_refused() {
        need_root();
        let error = make(u32::MAX - 10).expect_err("there are no such ids");
        assert_eq!((error.step, error.errno), ("write uid_map", Errno::INVAL));
    }

    #[test]
    fn capabilities_are_dropped_for_good() {
        need_root();
        run(libc::CLONE_NEWUSER | libc::CLONE_NEWNS, || {
            no_new_privs()?;
            drop_bounding(KEPT)?;
            set_capabilities(KEPT)?;
            let sets = rustix::thread::capabilities(None).map_err(at("capget"))?;
            ensure(
                sets.effective == KEPT && sets.permitted == KEPT && sets.inheritable.is_empty(),
                "only the kept ones are left",
            )?;
            for number in 0..64 {
                let capability = CapabilitySet::from_bits_retain(1 << number);
                // Numbers that this kernel does not know are no bits of the set.
                let bound = rustix::thread::capability_is_in_bounding_set(capability).unwrap_or(false);
                ensure(bound == KEPT.contains(capability), "the bounding set is what is kept")?;
            }
            let all = CapabilitySets { effective: CapabilitySet::SYS_ADMIN, permitted: CapabilitySet::SYS_ADMIN, ..sets };
            refused(rustix::thread::set_capabilities(None, all), Errno::PERM, "capabilities do not come back")?;
            refused(rustix::mount::mount_bind(c"/", c"/mnt"), Errno::PERM, "mounting is over")?;
            // The others end with the user.
            become_user(Uid::from_raw(33), Gid::from_raw(33), &[Gid::from_raw(33), Gid::from_raw(44)])?;
            let sets = rustix::thread::capabilities(None).map_err(at("capget"))?;
            ensure(sets.effective.is_empty() && sets.permitted.is_empty(), "an ordinary user has none")?;
            refused(rustix::thread::set_thread_res_uid(Uid::ROOT, Uid::ROOT, Uid::ROOT), Errno::PERM, "root does not come back")
        });
    }

    #[test]
    fn what_is_kept_is_dockers_default_less_four() {
        // CHOWN, DAC_OVERRIDE, FOWNER, FSETID, KILL, SETGID, SETUID, SETPCAP, NET_BIND_SERVICE, SETFCAP by their numbers.
        let numbers = [0, 1, 3, 4, 5, 6, 7, 8, 10, 31];
        assert_eq!(KEPT.bits(), numbers.iter().map(|number| 1_u64 << number).sum());
    }

    #[test]
    fn root_inside_is_nobody_outside() {
        need_root();
        run(libc::CLONE_NEWUSER, || {
            ensure(rustix::process::getuid().is_root(), "the child is root")?;
            ensure(device_of(c"/dev/null").map_err(at("stat /dev/null"))? == 0x103, "the host's files can be seen")?;
            let open = rustix::fs::open(c"/etc/shadow", OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty());
            refused(open.map(drop), Errno::ACCESS, "a file of the host's root is closed")
        });
    }
}

//! The way out of an ordinary user's server: a program that carries packets between a network namespace and the sockets of this user.
//!
//! ```text
//! keeper ─ hub: a network namespace of its own ─┬─ `funtainer net` works in it as it does on a machine of root's: pairs, packet filter, addresses
//!                                               └─ pasta or slirp4netns: an interface `uplink` with a default route
//! ```
//! The program is a child of `funtainer uplink`, pid 1 of a pid namespace: with that, and so with the keeper, everything of it ends. It is told to
//! forward nothing into the hub, and to open nothing of the host's loopback; which of the host's other addresses are closed is for the
//! packet filter in the hub.

use std::ffi::OsStr;
use std::fs;
use std::net::Ipv4Addr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::process::CommandExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};

use rustix::event::{PollFd, PollFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;
use rustix::process::{Pid, PidfdFlags};

use crate::clone::{Cloned, clone3};
use crate::fds;
use crate::mount::{self, Tmpfs};
use crate::signals::{self, SignalSet};
use crate::step::{StepError, at, errno_of};
use crate::title::Title;

/// Name of the interface in the hub.
const INTERFACE: &str = "uplink";
/// Its network: addresses that nobody has (RFC 6890, reserved for protocols of the IETF), so that none of the world's are hidden.
pub(crate) const NETWORK: (Ipv4Addr, u8) = (Ipv4Addr::new(192, 0, 0, 0), 25);
/// The hub's own address and the one to which it sends everything, as slirp4netns chooses them.
const ADDRESS: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 100);
const GATEWAY: Ipv4Addr = Ipv4Addr::new(192, 0, 0, 2);
/// Where the hub is shown: in a directory that every machine has, and that no such program needs.
const PLACE: &str = "/sys";
const HUB_NAME: &str = "hub";
const HUB: &str = "/sys/hub";
/// Room of the file system there: a name.
const ROOT_BYTES: u64 = 64 << 10;
/// Where programs are looked for besides `PATH`.
const DIRECTORIES: [&str; 4] = ["/usr/bin", "/usr/local/bin", "/usr/sbin", "/bin"];
/// The device by which packets are carried.
const DEVICE: &str = "/dev/net/tun";

/// A program that carries packets.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Carrier {
    kind: Kind,
    path: PathBuf,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kind {
    /// Of passt.
    Pasta,
    Slirp4netns,
}

impl Kind {
    const fn name(self) -> &'static str {
        match self {
            Self::Pasta => "pasta",
            Self::Slirp4netns => "slirp4netns",
        }
    }
}

impl Carrier {
    /// The one of this machine; what is missing, as a sentence that says how to get it.
    pub(crate) fn find() -> Result<Self, String> {
        let path = std::env::var_os("PATH").unwrap_or_default();
        let directories: Vec<PathBuf> = std::env::split_paths(&path).chain(DIRECTORIES.iter().map(PathBuf::from)).collect();
        let found = [Kind::Pasta, Kind::Slirp4netns].into_iter().find_map(|kind| {
            let mut paths = directories.iter().map(|directory| directory.join(kind.name()));
            Some(Self { kind, path: paths.find(|path| path.is_absolute() && is_program(path))? })
        });
        let found = found
            .ok_or("neither pasta nor slirp4netns is installed (on Debian and Ubuntu: apt install passt, or slirp4netns)")?;
        match fs::File::options().read(true).write(true).open(DEVICE) {
            Ok(_) => Ok(found),
            Err(error) if error.kind() == std::io::ErrorKind::PermissionDenied => {
                Err(format!("{DEVICE} is closed to ordinary users: as root, `chmod 666 {DEVICE}` (most systems have it so)"))
            }
            Err(error) => Err(format!("{DEVICE} cannot be opened ({error}): as root, `modprobe tun`")),
        }
    }

    /// Its name, for messages.
    pub(crate) fn name(&self) -> &'static str {
        self.kind.name()
    }

    /// The command for the hub at a path.
    fn command(&self, hub: &str) -> Command {
        let mut command = Command::new(&self.path);
        match self.kind {
            Kind::Pasta => command
                // In front, only errors said, one version of the protocol.
                .args(["--foreground", "--quiet", "--ipv4-only"])
                .args(["--config-net", "--ns-ifname", INTERFACE])
                .args([
                    "--address",
                    &ADDRESS.to_string(),
                    "--netmask",
                    &NETWORK.1.to_string(),
                    "--gateway",
                    &GATEWAY.to_string(),
                ])
                // Else the gateway's address would be the host's loopback, and ports would be forwarded both ways.
                .arg("--no-map-gw")
                .args(["--tcp-ports", "none", "--udp-ports", "none", "--tcp-ns", "none", "--udp-ns", "none"])
                .args(["--netns-only", "--netns", hub]),
            Kind::Slirp4netns => command
                .args(["--configure", "--mtu=65520", "--disable-host-loopback"])
                .arg(format!("--cidr={}/{}", NETWORK.0, NETWORK.1))
                .args(["--netns-type=path", hub, INTERFACE]),
        };
        command
    }
}

fn is_program(path: &Path) -> bool {
    rustix::fs::access(path, rustix::fs::Access::EXEC_OK).is_ok() && path.is_file()
}

/// A network namespace that no process is in; it lasts as long as the handle.
pub(crate) fn hub() -> Result<OwnedFd, StepError> {
    crate::userns::namespace_of_child(libc::CLONE_NEWNET, "net")
}

/// What an uplink is made from.
pub(crate) struct Plan<'a> {
    pub(crate) carrier: &'a Carrier,
    /// The hub.
    pub(crate) hub: BorrowedFd<'a>,
    /// The end of a pair whose other end only the keeper has: it is readable when the keeper is gone.
    pub(crate) life: BorrowedFd<'a>,
    pub(crate) title: Title,
}

/// Starts an uplink. It ends with its program, with status 0 whatever came of that.
///
/// # Safety
/// No other thread may run in this process.
pub(crate) unsafe fn fork(plan: &Plan<'_>) -> Result<(i32, OwnedFd), Errno> {
    // SAFETY: the caller promises one thread; the child ends in `_exit`.
    match unsafe { clone3(libc::CLONE_NEWPID | libc::CLONE_NEWNS) }? {
        Cloned::Parent { pid, pidfd } => Ok((pid, pidfd)),
        Cloned::Child => {
            // A panic must not unwind into the keeper's frames.
            let _ = std::panic::catch_unwind(std::panic::AssertUnwindSafe(|| {
                if let Err(error) = live(plan) {
                    // The keeper says what it knows too; there is nobody else to tell.
                    eprintln!("uplink: {error}");
                }
            }));
            // SAFETY: ends this process, and as pid 1 all below it, without running anything of its parent's.
            unsafe { libc::_exit(0) }
        }
    }
}

/// The number at which the life line stands.
const LIFE: i32 = 3;

fn live(plan: &Plan<'_>) -> Result<(), StepError> {
    signals::reset_actions();
    // What is sent to a whole group of processes is for the keeper to understand.
    signals::set_mask(&SignalSet::all()).map_err(at("block signals"))?;
    // SAFETY: one thread, which reads neither arguments nor environment by the area that is written.
    unsafe { plan.title.set(b"funtainer uplink") };
    crate::title::set_name(c"funtainer-uplin").map_err(at("set the name of an uplink"))?;
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL))
        .map_err(at("set the parent-death signal"))?;
    show_hub(plan.hub)?;
    let life = rustix::io::fcntl_dupfd_cloexec(plan.life, 64).map_err(at("keep the life line"))?;
    fds::place(life.as_fd(), LIFE).map_err(at("keep the life line"))?;
    fds::close_from(LIFE + 1).map_err(at("close the keeper's descriptors"))?;
    // Closed by number above.
    std::mem::forget(life);
    // SAFETY: placed above, owned by nothing else, and open as long as this process.
    let life = unsafe { BorrowedFd::borrow_raw(LIFE) };
    rustix::io::fcntl_setfd(life, rustix::io::FdFlags::CLOEXEC).map_err(at("keep the life line"))?;

    let mut command = plan.carrier.command(HUB);
    command.stdin(Stdio::null()).stdout(Stdio::null()).env_clear().current_dir("/");
    if let Some(path) = std::env::var_os("PATH") {
        command.env("PATH", path);
    }
    // SAFETY: between fork and exec one system call on a set that is made here, which neither allocates nor locks.
    unsafe { command.pre_exec(|| signals::set_mask(&SignalSet::empty()).map_err(Into::into)) };
    let failed =
        |error: std::io::Error| StepError { step: "execute the program that carries packets", errno: errno_of(&error) };
    let mut child = command.spawn().map_err(failed)?;
    let ended = rustix::process::pidfd_open(Pid::from_child(&child), PidfdFlags::empty()).map_err(at("watch a program"))?;
    let mut polled = [PollFd::from_borrowed_fd(life, PollFlags::IN), PollFd::new(&ended, PollFlags::IN)];
    rustix::io::retry_on_intr(|| rustix::event::poll(&mut polled, None)).map_err(at("wait for a program"))?;
    if let Ok(Some(status)) = child.try_wait() {
        eprintln!("uplink: {} ended: {status}", program_name(command.get_program()));
    }
    // Else the keeper is gone, and with this process the program goes.
    Ok(())
}

/// Gives the hub a path, by which alone the programs take it: they close what they inherit. In this mount namespace only.
fn show_hub(hub: BorrowedFd<'_>) -> Result<(), StepError> {
    mount::make_private()?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
    let hub = rustix::mount::open_tree(hub, c"", flags).map_err(at("mount the handle of a hub"))?;
    let root = mount::tmpfs(&Tmpfs { size_bytes: ROOT_BYTES, uid: 0, gid: 0, mode: 0o755, attributes: mount::INERT })?;
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::CLOEXEC;
    let place = rustix::fs::openat(&root, HUB_NAME, flags, Mode::from_raw_mode(0o444)).map_err(at("make a place for a hub"))?;
    let directory = rustix::fs::open(PLACE, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
        .map_err(at("open a place for a hub"))?;
    mount::attach(root.as_fd(), directory.as_fd())?;
    mount::attach(hub.as_fd(), place.as_fd())
}

fn program_name(program: &OsStr) -> String {
    Path::new(program).file_name().unwrap_or(program).display().to_string()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(kind: Kind) -> Vec<String> {
        let command = Carrier { kind, path: "/usr/bin/x".into() }.command("/proc/7/fd/9");
        command.get_args().map(|word| word.to_string_lossy().into_owned()).collect()
    }

    #[test]
    fn nothing_is_forwarded_into_the_hub_and_no_loopback_is_opened() {
        let pasta = words(Kind::Pasta);
        assert!(pasta.contains(&"--no-map-gw".to_owned()));
        for ports in ["--tcp-ports", "--udp-ports", "--tcp-ns", "--udp-ns"] {
            let place = pasta.iter().position(|word| word == ports).expect("the flag");
            assert_eq!(pasta[place + 1], "none", "{ports}");
        }
        assert!(words(Kind::Slirp4netns).contains(&"--disable-host-loopback".to_owned()));
    }

    #[test]
    fn both_find_the_hub_and_make_the_same_interface() {
        for kind in [Kind::Pasta, Kind::Slirp4netns] {
            let words = words(kind);
            assert!(words.contains(&"/proc/7/fd/9".to_owned()) && words.contains(&INTERFACE.to_owned()), "{words:?}");
        }
    }

    #[test]
    fn a_hub_is_another_network() {
        crate::testing::need_root();
        let hub = hub().expect("a network namespace");
        let own = std::fs::metadata("/proc/self/ns/net").expect("the own one");
        let found = rustix::fs::fstat(&hub).expect("a handle");
        assert_ne!(found.st_ino, std::os::unix::fs::MetadataExt::ino(&own));
    }
}

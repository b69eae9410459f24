//! What an ordinary user's server needs: user namespaces without privilege, ids, and a way out.

use std::os::fd::AsFd as _;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD, Mode, OFlags, XattrFlags};
use rustix::io::Errno;
use rustix::mount::{MountAttrFlags, fsconfig_set_flag, fsconfig_set_string};
use rustix::process::{DumpableBehavior, Gid, Uid};
use rustix::thread::UnshareFlags;

use super::{Area, Feature, Finding, child, number};
use crate::mount::{self, INERT, Tmpfs};
use crate::step::{StepError, at, errno_of};
use crate::userns;

const NAMESPACES: Feature = Feature {
    area: Area::OrdinaryUsers,
    name: "unprivileged user namespaces",
    required: true,
    lost: "an ordinary user can start no server",
};
const ATTRIBUTES: Feature = Feature {
    area: Area::OrdinaryUsers,
    name: "attributes on tmpfs",
    required: true,
    lost: "an ordinary user's overlay cannot note what a layer hides",
};
const OVERLAY: Feature = Feature {
    area: Area::OrdinaryUsers,
    name: "overlay of a user",
    required: true,
    lost: "an ordinary user can make no root file system of layers",
};
const PROC: Feature = Feature {
    area: Area::OrdinaryUsers,
    name: "proc of a user",
    required: true,
    lost: "an ordinary user's containers have no /proc",
};
const MAPPERS: Feature = Feature {
    area: Area::OrdinaryUsers,
    name: "newuidmap, newgidmap",
    required: false,
    lost: "containers of ordinary users have one user id: images whose programs change their user do not work",
};
const IDS: Feature = Feature {
    area: Area::OrdinaryUsers,
    name: "subordinate ids",
    required: false,
    lost: "containers of ordinary users have one user id: images whose programs change their user do not work",
};
const TUN: Feature = Feature {
    area: Area::OrdinaryUsers,
    name: "/dev/net/tun",
    required: false,
    lost: "functions of ordinary users reach nothing outside (as with --network off)",
};
const EGRESS: Feature = Feature {
    area: Area::OrdinaryUsers,
    name: "pasta or slirp4netns",
    required: false,
    lost: "functions of ordinary users reach nothing outside (as with --network off)",
};

/// Who is tried where root asks: a user that owns nothing (`nobody`).
const ANYBODY: u32 = 65_534;
/// An attribute as overlayfs keeps them for users.
const ATTRIBUTE: &str = "user.overlay.trial";
/// Room of a trial's tmpfs.
const TRIAL_BYTES: u64 = 1 << 20;
/// Where programs with privilege are, whatever `PATH` says.
const PROGRAMS: [&str; 3] = ["/usr/bin", "/bin", "/usr/local/bin"];

/// For the calling user's server; as root, for anybody's.
pub(super) fn look(root: bool) -> Vec<Finding> {
    // Root's server needs nothing of all this.
    let needed = |feature: Feature| Feature { required: feature.required && !root, ..feature };
    let mut findings = vec![namespaces(needed(NAMESPACES), root)];
    let there = findings[0].lost.is_none();
    for (feature, trial, cure) in [
        (ATTRIBUTES, try_attributes as Trial, "use Linux 6.6 or later"),
        (OVERLAY, try_overlay, "load it as root (`modprobe overlay`), or use Linux 6.6 or later"),
        (
            PROC,
            try_proc,
            "run the server on the machine itself, or in a container that sees all of /proc (docker run --security-opt \
             systempaths=unconfined)",
        ),
    ] {
        let feature = needed(feature);
        findings.push(if there {
            match in_namespaces(root, trial) {
                Ok(_) => feature.ok("works in a user namespace"),
                Err(error) => feature.missing(error, cure),
            }
        } else {
            feature.unknown("not tried: there is no user namespace", "see unprivileged user namespaces above")
        });
    }
    findings.extend([mappers(), ids(root), tun(root), egress()]);
    findings
}

type Trial = fn() -> Result<(), StepError>;

/// Runs a trial as root of a user namespace with the user's own id alone, in a process that ends with it.
fn in_namespaces(root: bool, trial: Trial) -> Result<String, String> {
    child::run(|| {
        enter(root).map_err(|error| error.to_string())?;
        // The pid namespace is that of children.
        child::run(|| trial().map(|()| String::new()).map_err(|error| error.to_string()))
    })
}

fn enter(root: bool) -> Result<(), StepError> {
    if root {
        userns::become_user(Uid::from_raw(ANYBODY), Gid::from_raw(ANYBODY), &[])?;
        // A change of the user makes /proc/self root's.
        rustix::process::set_dumpable_behavior(DumpableBehavior::Dumpable).map_err(at("set dumpable"))?;
    }
    let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
    // SAFETY: a new user namespace concerns this process, which has one thread; no memory or descriptor is touched.
    unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWUSER) }.map_err(at("make a user namespace"))?;
    for (file, text) in
        [("setgroups", "deny".to_owned()), ("uid_map", format!("0 {uid} 1\n")), ("gid_map", format!("0 {gid} 1\n"))]
    {
        std::fs::write(format!("/proc/self/{file}"), text)
            .map_err(|error| StepError { step: "write the ids of a user namespace", errno: errno_of(&error) })?;
    }
    let namespaces =
        UnshareFlags::NEWNS | UnshareFlags::NEWPID | UnshareFlags::NEWNET | UnshareFlags::NEWIPC | UnshareFlags::NEWUTS;
    // SAFETY: as above.
    unsafe { rustix::thread::unshare_unsafe(namespaces) }.map_err(at("make namespaces in a user namespace"))?;
    mount::make_private()
}

fn trial_tmpfs() -> Result<std::os::fd::OwnedFd, StepError> {
    mount::tmpfs(&Tmpfs { size_bytes: TRIAL_BYTES, uid: 0, gid: 0, mode: 0o700, attributes: INERT })
}

fn try_attributes() -> Result<(), StepError> {
    let mount = trial_tmpfs()?;
    // What mounts are made as opens no files: fsmount(2), O_PATH.
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let directory = rustix::fs::openat(&mount, c".", flags, Mode::empty()).map_err(at("open a tmpfs"))?;
    rustix::fs::fsetxattr(&directory, ATTRIBUTE, b"y", XattrFlags::empty()).map_err(at("set an attribute of a tmpfs"))
}

/// Of directories of a tmpfs that lies over `/proc`, which this mount namespace alone sees so.
fn try_overlay() -> Result<(), StepError> {
    let place =
        rustix::fs::open(c"/proc", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(at("open a place for a tmpfs"))?;
    mount::attach(trial_tmpfs()?.as_fd(), place.as_fd())?;
    for name in ["lower", "upper", "work"] {
        std::fs::create_dir(Path::new("/proc").join(name))
            .map_err(|error| StepError { step: "make a directory of a trial", errno: errno_of(&error) })?;
    }
    let context = mount::open(c"overlay", "fsopen overlay")?;
    for (key, value) in [(c"lowerdir", c"/proc/lower"), (c"upperdir", c"/proc/upper"), (c"workdir", c"/proc/work")] {
        fsconfig_set_string(&context, key, value).map_err(at("set a directory of an overlay"))?;
    }
    fsconfig_set_flag(&context, c"userxattr").map_err(at("make an overlay that notes in user attributes"))?;
    mount::create(&context, MountAttrFlags::MOUNT_ATTR_NODEV, "mount an overlay").map(drop)
}

fn try_proc() -> Result<(), StepError> {
    mount::procfs().map(drop)
}

fn namespaces(feature: Feature, root: bool) -> Finding {
    let who = if root { "made by a user without privilege" } else { "made by this user" };
    match in_namespaces(root, || Ok(())) {
        Ok(_) => feature.ok(who),
        Err(error) => feature.missing(error, Settings::read().cure()),
    }
}

/// What the administrator has set; `None` where the machine has no such setting.
#[derive(Debug, Clone, Copy, Default)]
struct Settings {
    /// `kernel.unprivileged_userns_clone`, of Debian and others.
    clone: Option<u64>,
    /// `user.max_user_namespaces`.
    most: Option<u64>,
    /// `kernel.apparmor_restrict_unprivileged_userns`, of Ubuntu.
    apparmor: Option<u64>,
}

impl Settings {
    fn read() -> Self {
        Self {
            clone: number("/proc/sys/kernel/unprivileged_userns_clone"),
            most: number("/proc/sys/user/max_user_namespaces"),
            apparmor: number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
        }
    }

    fn cure(self) -> &'static str {
        match self {
            Self { clone: Some(0), .. } => {
                "as root: sysctl -w kernel.unprivileged_userns_clone=1 (and in /etc/sysctl.d/ for the next boot)"
            }
            Self { most: Some(0), .. } => {
                "as root: sysctl -w user.max_user_namespaces=65536 (and in /etc/sysctl.d/ for the next boot)"
            }
            Self { apparmor: Some(1), .. } => {
                "as root: sysctl -w kernel.apparmor_restrict_unprivileged_userns=0, or better a profile for funtainer with the rule `userns,`"
            }
            _ => {
                "the machine or container forbids it (its seccomp or LSM policy), or the kernel is built without CONFIG_USER_NS"
            }
        }
    }
}

fn mappers() -> Finding {
    let install = "install them: apt install uidmap (Debian, Ubuntu), dnf install shadow-utils (Fedora)";
    let (programs, missing): (Vec<_>, Vec<_>) =
        ["newuidmap", "newgidmap"].into_iter().map(|name| (name, program(name))).partition(|(_, path)| path.is_some());
    if let Some((name, _)) = missing.first() {
        return MAPPERS.missing(format!("{name} is not installed"), install);
    }
    match programs.iter().find(|(_, path)| path.as_ref().is_some_and(|path| !has_privilege(path))) {
        Some((name, _)) => MAPPERS.missing(format!("{name} is not setuid"), "chmod u+s /usr/bin/newuidmap /usr/bin/newgidmap"),
        None => MAPPERS.ok("installed, with the privilege that they need"),
    }
}

/// Setuid root, or with capabilities of its own.
fn has_privilege(program: &Path) -> bool {
    let setuid = program.metadata().is_ok_and(|found| found.uid() == 0 && found.permissions().mode() & 0o4000 != 0);
    setuid || rustix::fs::getxattr(program, "security.capability", &mut [0_u8; 64]).is_ok()
}

fn ids(root: bool) -> Finding {
    let read = |path| std::fs::read_to_string(path).unwrap_or_default();
    let (uids, gids, passwd) = (read("/etc/subuid"), read("/etc/subgid"), read("/etc/passwd"));
    if root {
        let users = |text: &str| text.lines().filter(|line| line.split(':').count() == 3).count();
        return match users(&uids).min(users(&gids)) {
            0 => IDS.missing("no user has any", "usermod --add-subuids 100000-165535 --add-subgids 100000-165535 USER"),
            1 => IDS.ok("one user has some"),
            several => IDS.ok(format!("{several} users have some")),
        };
    }
    let uid = rustix::process::geteuid().as_raw();
    let name = name_of(&passwd, uid).unwrap_or_else(|| uid.to_string());
    let cure = format!("as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {name}");
    match count(&uids, &name, uid).min(count(&gids, &name, uid)) {
        0 => IDS.missing(format!("/etc/subuid and /etc/subgid have none for {name}"), cure),
        few if few < 65_536 => IDS.degraded(format!("{few}, images use up to 65536"), cure),
        enough => IDS.ok(format!("{enough}")),
    }
}

fn name_of(passwd: &str, uid: u32) -> Option<String> {
    let mut lines = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let line = lines.find(|fields| fields.get(2).and_then(|field| field.parse().ok()) == Some(uid))?;
    Some(line[0].to_owned())
}

/// How many ids a file of subuid(5) gives to a user, by name and by number.
fn count(text: &str, name: &str, uid: u32) -> u64 {
    let own = |user: &str| user == name || user.parse() == Ok(uid);
    let lines = text.lines().map(|line| line.trim().split(':').collect::<Vec<_>>());
    let counts = lines.filter_map(|fields| match fields[..] {
        [user, _, count] if own(user) => count.parse::<u32>().ok(),
        _ => None,
    });
    counts.map(u64::from).sum()
}

fn tun(root: bool) -> Finding {
    let path = "/dev/net/tun";
    let access = if root {
        match std::fs::metadata(path) {
            Ok(found) if found.permissions().mode() & 0o006 == 0o006 => Ok(()),
            Ok(_) => Err(Errno::ACCESS),
            Err(error) => Err(errno_of(&error)),
        }
    } else {
        rustix::fs::accessat(CWD, path, Access::READ_OK | Access::WRITE_OK, AtFlags::EACCESS)
    };
    match access {
        Ok(()) => TUN.ok("can be opened by everybody who needs it"),
        Err(Errno::ACCESS) => TUN.missing("for root only", format!("as root: chmod 0666 {path} (as distributions have it)")),
        Err(errno) => {
            TUN.missing(errno.to_string(), "as root: modprobe tun (in a container: docker run --device /dev/net/tun)")
        }
    }
}

fn egress() -> Finding {
    let found: Vec<&str> = ["pasta", "slirp4netns"].into_iter().filter(|name| program(name).is_some()).collect();
    if found.is_empty() {
        EGRESS.missing(
            "neither is installed",
            "install one: apt install passt (Debian 12, Ubuntu 24.04 and later) or apt install slirp4netns",
        )
    } else {
        EGRESS.ok(format!("{} can be used", found.join(" and ")))
    }
}

/// The first program of this name, as a shell would find it.
fn program(name: &str) -> Option<PathBuf> {
    let path = std::env::var_os("PATH").unwrap_or_default();
    let directories = std::env::split_paths(&path).chain(PROGRAMS.map(PathBuf::from));
    let mut files = directories.map(|directory| directory.join(name));
    files.find(|path| path.metadata().is_ok_and(|found| found.is_file() && found.permissions().mode() & 0o111 != 0))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn ids_are_counted_by_name_and_by_number() {
        let text = "ada:100000:65536\n1000:300000:10\nadam:5:9\nada:1\n# ada:1:2\nada:9:x\n";
        assert_eq!(count(text, "ada", 1000), 65_546);
        assert_eq!(count(text, "bob", 1001), 0);
        assert_eq!(name_of("root:x:0:0::/:/bin/sh\nada:x:1000:1000::/:/bin/sh\n", 1000).as_deref(), Some("ada"));
    }

    #[test]
    fn the_setting_that_forbids_is_named() {
        let none = Settings::default();
        for (settings, part) in [
            (Settings { clone: Some(0), ..none }, "unprivileged_userns_clone=1"),
            (Settings { clone: Some(1), most: Some(0), ..none }, "max_user_namespaces=65536"),
            (Settings { most: Some(9), apparmor: Some(1), ..none }, "apparmor_restrict"),
            (none, "CONFIG_USER_NS"),
        ] {
            assert!(settings.cure().contains(part), "{settings:?}");
        }
    }
}

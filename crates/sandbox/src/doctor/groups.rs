//! Control groups: which interface, which controllers, and whose they are.

use std::path::{Path, PathBuf};

use rustix::fs::{Access, AtFlags, CWD};

use super::{Area, Feature, Finding};
use crate::cgroup::Layout;
use crate::cgroup::place::{SYSTEMD, delegated, manager_sockets, own_group};

const INTERFACE: Feature = Feature {
    area: Area::ControlGroups,
    name: "interface",
    required: true,
    lost: "nothing limits an instance, so nothing is started",
};
const MEMORY: Feature = Feature {
    area: Area::ControlGroups,
    name: "memory",
    required: false,
    lost: "no limit of memory (--memory): one function can use up the machine",
};
const PIDS: Feature = Feature {
    area: Area::ControlGroups,
    name: "pids",
    required: false,
    lost: "no limit of processes (--pids): one function can use up the process ids",
};
const CPU: Feature = Feature {
    area: Area::ControlGroups,
    name: "cpu",
    required: false,
    lost: "no share and no bound of processors (--cpu-weight, --cpus), no account of their time",
};
const KILL: Feature = Feature {
    area: Area::ControlGroups,
    name: "freeze and kill",
    required: false,
    lost: "what a killed server left is killed process by process at the next start",
};
const PLACE: Feature = Feature {
    area: Area::ControlGroups,
    name: "place",
    required: false,
    lost: "systemd does not know of the groups, and may change what was enabled for them",
};

/// What is found of the machine, as text: what is said of it is a function of this.
#[derive(Debug, Default)]
struct Seen {
    layout: Option<Layout>,
    /// Mount of the unified tree, whichever is used.
    unified: Option<PathBuf>,
    /// The group of this process there.
    own: Option<PathBuf>,
    systemd: bool,
}

impl Seen {
    fn now() -> Self {
        let unified = match Layout::unified() {
            Ok(Layout::V2(mount)) => Some(mount),
            _ => None,
        };
        Self { layout: Layout::detect().ok(), unified, own: own_group(), systemd: Path::new(SYSTEMD).is_dir() }
    }

    /// The directory whose controllers a server would have.
    fn directory(&self, root: bool) -> Option<PathBuf> {
        let mount = self.unified.as_ref()?;
        if root {
            return Some(mount.clone());
        }
        // A user's manager has what the system's gave it; `user@UID.service` is the uppermost group that is the user's.
        let uid = rustix::process::geteuid().as_raw();
        let manager = mount.join(format!("user.slice/user-{uid}.slice/user@{uid}.service"));
        if manager.is_dir() { Some(manager) } else { self.own.as_ref().map(|own| mount.join(own)) }
    }
}

/// For root's server, else for that of the calling user.
pub(super) fn look(root: bool) -> Vec<Finding> {
    let seen = Seen::now();
    let Some(layout) = &seen.layout else {
        let feature = Feature { required: root, ..INTERFACE };
        return vec![feature.missing(
            "no control groups are mounted",
            "mount -t cgroup2 none /sys/fs/cgroup (in a container: let it have /sys/fs/cgroup)",
        )];
    };
    let mut findings = match layout {
        Layout::V1(controllers) => {
            let names: Vec<&str> = controllers.iter().map(|controller| controller.name).collect();
            let writable = controllers.iter().all(|controller| is_writable(&controller.mount));
            let mut findings = vec![interface_v1(root, writable, seen.unified.is_some())];
            if root {
                findings.extend(of_v1(&names));
            }
            findings
        }
        Layout::V2(_) => {
            let directory = seen.directory(root);
            let enabled = directory.as_ref().and_then(|path| std::fs::read_to_string(path.join("cgroup.controllers")).ok());
            let writable = directory.as_ref().is_some_and(|path| is_writable(path));
            let mut findings = vec![interface_v2(root, writable, directory.as_deref())];
            if root || writable {
                findings.extend(of_v2(root, enabled.as_deref().unwrap_or_default()));
                findings.push(place(root, &seen, directory.as_deref()));
            }
            findings
        }
    };
    if root {
        findings.push(kill(&seen));
    }
    findings
}

fn interface_v1(root: bool, writable: bool, unified: bool) -> Finding {
    let found = if unified { "v1 controllers beside a v2 tree" } else { "v1" };
    match (root, writable) {
        (true, true) => INTERFACE.ok(found),
        (true, false) => INTERFACE.missing(format!("{found}, mounted read-only"), writable_cure()),
        // Version 1 cannot be handed to users: cgroups(7).
        (false, _) => of_user(format!("{found}, which is root's alone"), "boot with systemd.unified_cgroup_hierarchy=1"),
    }
}

fn interface_v2(root: bool, writable: bool, directory: Option<&Path>) -> Finding {
    match (root, writable) {
        (true, true) => INTERFACE.ok("v2"),
        (true, false) => INTERFACE.missing("v2, mounted read-only", writable_cure()),
        (false, true) => {
            let whose = directory.map_or_else(String::new, |path| format!(", {} is yours", path.display()));
            INTERFACE.ok(format!("v2{whose}"))
        }
        (false, false) => of_user(
            "v2, nothing of it is this user's".to_owned(),
            "log in by systemd (`machinectl shell USER@`, ssh), or run in a unit of that user with Delegate=yes",
        ),
    }
}

fn of_user(found: String, cure: &str) -> Finding {
    let feature = Feature {
        required: false,
        lost: "instances are limited by the sizes of their file systems and their resource limits only",
        ..INTERFACE
    };
    feature.degraded(found, cure)
}

fn writable_cure() -> &'static str {
    "remount it: mount -o remount,rw /sys/fs/cgroup (in a container: docker run --privileged --cgroupns=private)"
}

/// `mounted`: the controllers that there are mounts of.
fn of_v1(mounted: &[&str]) -> Vec<Finding> {
    let has = |name: &str| mounted.contains(&name);
    let cure = |name: &str| format!("mkdir /sys/fs/cgroup/{name} && mount -t cgroup -o {name} none /sys/fs/cgroup/{name}");
    let memory = if has("memory") { MEMORY.ok("mounted") } else { MEMORY.missing("not mounted", memory_cure()) };
    let pids = if has("pids") { PIDS.ok("mounted") } else { PIDS.missing("not mounted", cure("pids")) };
    let cpu = match (has("cpu"), has("cpuacct")) {
        (true, true) => CPU.ok("cpu and cpuacct are mounted"),
        (true, false) => {
            Feature { lost: "no account of processor time", ..CPU }.degraded("cpuacct is not mounted", cure("cpuacct"))
        }
        (false, true) => Feature { lost: "no share and no bound of processors (--cpu-weight, --cpus)", ..CPU }
            .degraded("cpu is not mounted", cure("cpu")),
        (false, false) => CPU.missing("not mounted", cure("cpu,cpuacct")),
    };
    vec![memory, pids, cpu]
}

/// `enabled`: the file `cgroup.controllers` of the server's place.
fn of_v2(root: bool, enabled: &str) -> Vec<Finding> {
    let find = |feature: Feature, name: &str, cure: String| {
        if enabled.split_whitespace().any(|found| found == name) {
            feature.ok("can be used")
        } else {
            feature.missing("the tree does not offer it", cure)
        }
    };
    let delegate = "as root: mkdir -p /etc/systemd/system/user@.service.d && printf '[Service]\\nDelegate=cpu memory pids\\n' \
                    > /etc/systemd/system/user@.service.d/delegate.conf && systemctl daemon-reload, then log in anew";
    let cure = |of_root: &str| if root { of_root.to_owned() } else { delegate.to_owned() };
    vec![
        find(MEMORY, "memory", cure(memory_cure())),
        find(PIDS, "pids", cure("use a kernel with CONFIG_CGROUP_PIDS=y, as all distributions' are")),
        find(
            CPU,
            "cpu",
            cure(
                "end processes with real-time priority outside of the root group, or use a kernel without CONFIG_RT_GROUP_SCHED",
            ),
        ),
    ]
}

fn memory_cure() -> &'static str {
    "boot with cgroup_enable=memory (some kernels, such as Raspberry Pi's, leave it off)"
}

/// Under whose hands the groups would be.
fn place(root: bool, seen: &Seen, directory: Option<&Path>) -> Finding {
    let unit = seen.unified.as_ref().zip(seen.own.as_ref()).and_then(|(mount, own)| delegated(mount, own));
    if let Some(unit) = unit {
        return PLACE.ok(format!("{} is delegated to who runs in it", unit.display()));
    }
    let (bus, private) = manager_sockets();
    let manager = bus.exists() || private.exists();
    match (root, seen.systemd) {
        (true, true) if manager => PLACE.ok("systemd makes a scope for the server, or a unit with Delegate=yes has it"),
        (true, true) => PLACE.degraded(
            "systemd runs, but cannot be asked for a scope",
            "start the server in a unit with Delegate=yes (systemd-run -p Delegate=yes funtainer serve)",
        ),
        (true, false) => PLACE.ok("the root of the tree, which no systemd manages"),
        (false, true) if manager && directory.is_some_and(is_writable) => {
            PLACE.ok("this user's systemd makes a scope for the server")
        }
        (false, _) => {
            PLACE.degraded("nothing is delegated to this user", "systemd-run --user --scope -p Delegate=yes funtainer serve")
        }
    }
}

/// `cgroup.kill` came with Linux 5.14, `cgroup.freeze` with 5.2; both are in every group but the root of the tree.
fn kill(seen: &Seen) -> Finding {
    if seen.unified.is_some() {
        KILL.ok("the v2 tree freezes and kills whole groups")
    } else {
        KILL.degraded("there is no v2 tree", "mkdir /sys/fs/cgroup/unified && mount -t cgroup2 none /sys/fs/cgroup/unified")
    }
}

fn is_writable(path: &Path) -> bool {
    rustix::fs::accessat(CWD, path, Access::WRITE_OK | Access::EXEC_OK, AtFlags::EACCESS).is_ok()
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    fn states(findings: &[Finding]) -> Vec<State> {
        findings.iter().map(|finding| finding.state).collect()
    }

    #[test]
    fn controllers_of_the_first_version_are_looked_for_among_the_mounts() {
        use State::{Degraded, Missing, Ok};
        for (mounted, expect) in [
            (&["memory", "pids", "cpu", "cpuacct"][..], [Ok, Ok, Ok]),
            (&["memory", "pids", "cpuacct"], [Ok, Ok, Degraded]),
            (&["memory", "cpu"], [Ok, Missing, Degraded]),
            (&[], [Missing, Missing, Missing]),
        ] {
            assert_eq!(states(&of_v1(mounted)), expect, "{mounted:?}");
        }
    }

    #[test]
    fn controllers_of_the_second_version_are_what_the_place_offers() {
        use State::{Missing, Ok};
        assert_eq!(states(&of_v2(true, "cpuset cpu io memory hugetlb pids\n")), [Ok, Ok, Ok]);
        assert_eq!(states(&of_v2(false, "memory pids")), [Ok, Ok, Missing]);
        assert_eq!(states(&of_v2(true, "")), [Missing, Missing, Missing]);
        assert!(of_v2(false, "memory pids")[2].cure.as_ref().is_some_and(|cure| cure.contains("Delegate=cpu")));
    }

    #[test]
    fn what_is_roots_alone_is_no_fault_of_a_users() {
        assert_eq!(interface_v1(true, true, true).state, State::Ok);
        assert_eq!(interface_v1(true, false, false).state, State::Missing);
        let user = interface_v1(false, false, true);
        assert_eq!((user.state, user.required), (State::Degraded, false));
        assert_eq!(interface_v2(false, false, None).state, State::Degraded);
        assert_eq!(interface_v2(false, true, Some(Path::new("/x"))).found, "v2, /x is yours");
    }
}

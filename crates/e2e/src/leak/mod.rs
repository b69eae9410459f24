//! The leak check: what the machine has more than before, and should not have.
//!
//! ```text
//! Snapshot::take ──► the test runs, the server stops ──► Subject::leaks(before) ──► must be empty
//! ```
//!
//! Checked are processes, mounts, network namespaces, control groups named `funtainer-*`, loop devices, listening ports, the host's network (interfaces,
//! routes, the packet filter, forwarding), and files in the data directory and at the admin socket that a stopped server has no use for. On a machine for itself (without a [`Subject::scope`]) everything new counts.
//! Beside other tests (with one) that counts which belongs to the test: by its [`Scope`], its data directory, or the id of that.
//! The `leakcheck` program does the same for people.

mod network;
pub mod parse;
mod scope;

use std::collections::{BTreeMap, BTreeSet};
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};
use std::time::{Duration, Instant};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

use parse::{Process, if_there};
pub use scope::Scope;

use crate::wait;

/// How long what belongs to an ended server may take to go: the kernel tears namespaces down by itself, later.
pub const SETTLE_LIMIT: Duration = Duration::from_secs(1);
/// The parent of the kernel's own threads.
const KERNEL_THREADS: i32 = 2;
/// What a stopped server leaves in its data directory, by its documentation.
const DATA_ENTRIES: [&str; 6] = ["lock", "id", "store", "state", "logs", "unpacked"];

/// A thing that should have gone.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Leak {
    /// What it is.
    pub kind: Kind,
    /// Which one.
    pub what: String,
}

/// The kinds of things that can be left behind.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Kind {
    /// A process that is no zombie of the host's init.
    Process,
    /// A mount in this mount namespace.
    Mount,
    /// A network namespace with a process in it.
    NetworkNamespace,
    /// A control group directory.
    Cgroup,
    /// A loop device with a file.
    LoopDevice,
    /// A port on which somebody listens.
    Listener,
    /// An interface, a route, a rule or a setting of the host's network.
    HostNetwork,
    /// A file or socket.
    File,
}

/// What the machine has at one moment.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub struct Snapshot {
    processes: BTreeSet<Process>,
    mounts: BTreeSet<String>,
    network_namespaces: BTreeMap<u64, i32>,
    cgroups: BTreeSet<PathBuf>,
    loop_devices: BTreeMap<String, String>,
    ports: BTreeSet<u16>,
    #[serde(default)]
    network: BTreeSet<String>,
}

/// Whose leaks are looked for.
#[derive(Debug, Default)]
pub struct Subject<'a> {
    /// Only things of this fence and of the directories below count; without, everything new on the machine does.
    pub scope: Option<&'a Scope>,
    /// Data directories of servers that have stopped.
    pub data: Vec<PathBuf>,
    /// Admin sockets of servers that have stopped.
    pub admin: Vec<PathBuf>,
    /// Ports on which they listened.
    pub ports: Vec<u16>,
    /// Whether the network namespace of the calling thread is the subject's alone: then all that is new in it counts.
    pub own_network: bool,
    /// Whether files count: after a `kill -9` some can remain, until the next start sweeps them.
    pub killed: bool,
}

impl Snapshot {
    /// Looks at the machine.
    pub fn take() -> Result<Self> {
        Ok(Self {
            processes: parse::processes()?.into_iter().collect(),
            mounts: parse::mounts("self")?,
            network_namespaces: parse::network_namespaces()?,
            cgroups: parse::product_cgroups()?,
            loop_devices: parse::loop_devices()?,
            ports: parse::listening_ports()?,
            network: network::state()?,
        })
    }
}

impl Subject<'_> {
    /// Everything that is new since `before`, once it has had [`SETTLE_LIMIT`] to go.
    pub fn leaks(&self, before: &Snapshot) -> Result<Vec<Leak>> {
        self.leaks_after(before, SETTLE_LIMIT)
    }

    /// The same with another time to settle.
    pub fn leaks_after(&self, before: &Snapshot, settle: Duration) -> Result<Vec<Leak>> {
        let (start, settle) = (Instant::now(), wait::patient(settle));
        loop {
            let leaks = self.leaks_now(before)?;
            if leaks.is_empty() || start.elapsed() >= settle {
                return Ok(leaks);
            }
            std::thread::park_timeout(Duration::from_millis(10));
        }
    }

    /// The ids of the processes of the subject: those in the fence, and where the product's own control groups lie out of it, those in them.
    /// Without a fence none.
    pub fn members(&self) -> Result<BTreeSet<i32>> {
        let Some(scope) = self.scope else { return Ok(BTreeSet::new()) };
        Ok(&scope.members()? | &scope::members_of(&parse::product_cgroups()?, &self.cgroup_names()?)?)
    }

    fn leaks_now(&self, before: &Snapshot) -> Result<Vec<Leak>> {
        let now = Snapshot::take()?;
        let names = self.cgroup_names()?;
        let mut found = Found::default();
        let suspects = self.processes(before, &now, &names)?;
        for process in &suspects {
            found.add(
                Kind::Process,
                format!("{} '{}' (state {}, parent {})", process.pid, process.title, process.state, process.parent),
            );
        }
        for mount in now.mounts.difference(&before.mounts) {
            if self.scope.is_none() || self.data.iter().chain(&self.admin).any(|path| mentions(mount, path)) {
                found.add(Kind::Mount, mount.clone());
            }
        }
        for (inode, holder) in &now.network_namespaces {
            let ours = self.scope.is_none() || suspects.iter().any(|process| process.pid == *holder);
            if ours && !before.network_namespaces.contains_key(inode) {
                found.add(Kind::NetworkNamespace, format!("net:[{inode}], in it process {holder}"));
            }
        }
        for directory in now.cgroups.difference(&before.cgroups) {
            if !self.killed && (self.scope.is_none() || scope::is_named(directory, &names)) {
                found.add(Kind::Cgroup, directory.display().to_string());
            }
        }
        for (device, file) in &now.loop_devices {
            let ours = self.scope.is_none() || self.data.iter().any(|data| mentions(file, data));
            if !self.killed && ours && before.loop_devices.get(device) != Some(file) {
                found.add(Kind::LoopDevice, format!("/dev/{device} on {file}"));
            }
        }
        for port in self.ports.iter().filter(|port| now.ports.contains(port) && !before.ports.contains(port)) {
            found.add(Kind::Listener, format!("port {port}"));
        }
        if self.scope.is_none() || self.own_network {
            for part in now.network.symmetric_difference(&before.network) {
                let gone = if now.network.contains(part) { "" } else { "gone: " };
                found.add(Kind::HostNetwork, format!("{gone}{part}"));
            }
        }
        if !self.killed {
            self.files(&mut found)?;
        }
        Ok(found.0)
    }

    /// New processes that belong to the subject.
    fn processes(&self, before: &Snapshot, now: &Snapshot, names: &BTreeSet<String>) -> Result<Vec<Process>> {
        let members = match self.scope {
            Some(scope) => Some(&scope.members()? | &scope::members_of(&now.cgroups, names)?),
            None => None,
        };
        let old: BTreeSet<_> = before.processes.iter().map(|process| (process.pid, process.start)).collect();
        let ours = |process: &&Process| match &members {
            Some(members) => members.contains(&process.pid),
            // The kernel's own threads come and go; this program is no leak of itself.
            None => process.parent != KERNEL_THREADS && process.pid != std::process::id() as i32,
        };
        let is_new = |process: &&Process| !old.contains(&(process.pid, process.start));
        // A zombie that waits for the host's init is that one's affair.
        let lives = |process: &&Process| process.state != 'Z' || process.parent != 1;
        Ok(now.processes.iter().filter(ours).filter(is_new).filter(lives).cloned().collect())
    }

    /// Names of the control groups that belong to the data directories.
    fn cgroup_names(&self) -> Result<BTreeSet<String>> {
        let mut names = BTreeSet::new();
        for data in &self.data {
            let id = data.join("id");
            if let Some(id) = if_there(fs::read_to_string(&id)).with_context(|| format!("cannot read {}", id.display()))? {
                let name = format!("funtainer-{}", id.trim());
                // The second one where systemd has made a scope for the server.
                names.extend([format!("{name}.scope"), name]);
            }
        }
        Ok(names)
    }

    fn files(&self, found: &mut Found) -> Result<()> {
        for admin in self.admin.iter().filter(|admin| admin.exists()) {
            found.add(Kind::File, admin.display().to_string());
        }
        for data in &self.data {
            for entry in entries(data)? {
                if !DATA_ENTRIES.iter().any(|known| entry.ends_with(known)) {
                    found.add(Kind::File, entry.display().to_string());
                }
            }
            for entry in entries(&data.join("store/tmp"))? {
                found.add(Kind::File, entry.display().to_string());
            }
            for range in entries(&data.join("unpacked"))? {
                // Whole layers have no ending but `.base`.
                let unfinished = |entry: &&PathBuf| entry.extension().is_some_and(|ending| ending != "base");
                for entry in entries(&range)?.iter().filter(unfinished) {
                    found.add(Kind::File, entry.display().to_string());
                }
            }
        }
        Ok(())
    }
}

#[derive(Default)]
struct Found(Vec<Leak>);

impl Found {
    fn add(&mut self, kind: Kind, what: String) {
        self.0.push(Leak { kind, what });
    }
}

impl fmt::Display for Leak {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let kind = match self.kind {
            Kind::Process => "process",
            Kind::Mount => "mount",
            Kind::NetworkNamespace => "network namespace",
            Kind::Cgroup => "control group",
            Kind::LoopDevice => "loop device",
            Kind::Listener => "listener",
            Kind::HostNetwork => "host network",
            Kind::File => "file",
        };
        write!(f, "{kind}: {}", self.what)
    }
}

fn mentions(text: &str, path: &Path) -> bool {
    path.to_str().is_some_and(|path| text.contains(path))
}

fn entries(directory: &Path) -> Result<Vec<PathBuf>> {
    let Some(entries) = if_there(fs::read_dir(directory))? else {
        return Ok(Vec::new());
    };
    let mut all = entries.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
    all.sort();
    Ok(all)
}

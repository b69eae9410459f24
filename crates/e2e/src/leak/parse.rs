//! What the kernel shows of processes, mounts, namespaces, control groups, loop devices and listeners (proc(5), sysfs(5), cgroups(7)).

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::io::{self, ErrorKind};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde::{Deserialize, Serialize};

/// How deep below a mount of the control group file system the product's directories are looked for.
const CGROUP_DEPTH_MAX: usize = 8;

/// One process.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
pub struct Process {
    /// Its id in the host's namespace.
    pub pid: i32,
    /// When it started, in clock ticks after boot: with the id, its identity.
    pub start: u64,
    /// Its parent's id.
    pub parent: i32,
    /// `R`, `S`, `Z`, ... as in proc_pid_stat(5).
    pub state: char,
    /// Its command line with blanks between the arguments; the kernel's name in brackets if it has none.
    pub title: String,
}

/// Every process.
pub fn processes() -> Result<Vec<Process>> {
    let mut all = Vec::new();
    for pid in pids()? {
        if let Some(process) = process(pid)? {
            all.push(process);
        }
    }
    Ok(all)
}

/// One process; nothing if there is none with that id.
pub fn process(pid: i32) -> Result<Option<Process>> {
    let Some(stat) = if_there(fs::read_to_string(format!("/proc/{pid}/stat")))? else {
        return Ok(None);
    };
    let (name, rest) = stat.rsplit_once(')').with_context(|| format!("/proc/{pid}/stat: {stat}"))?;
    let fields: Vec<_> = rest.split_ascii_whitespace().collect();
    // Fields are numbered from 1 in the manual; the first after the name is field 3.
    let field =
        |number: usize| fields.get(number - 3).copied().with_context(|| format!("/proc/{pid}/stat has no field {number}"));
    let command = if_there(fs::read(format!("/proc/{pid}/cmdline")))?.unwrap_or_default();
    let command = String::from_utf8_lossy(&command).replace('\0', " ").trim_end().to_owned();
    let name = name.split_once('(').map_or(name, |(_, name)| name);
    Ok(Some(Process {
        pid,
        start: field(22)?.parse()?,
        parent: field(4)?.parse()?,
        state: field(3)?.chars().next().unwrap_or('?'),
        title: if command.is_empty() { format!("[{name}]") } else { command },
    }))
}

/// The lines of a process's mounts (proc_pid_mountinfo(5)), without the ids, which are given anew.
pub fn mounts(pid: &str) -> Result<BTreeSet<String>> {
    let Some(text) = if_there(fs::read_to_string(format!("/proc/{pid}/mountinfo")))? else {
        return Ok(BTreeSet::new());
    };
    Ok(text.lines().map(|line| line.splitn(4, ' ').skip(3).collect::<String>()).collect())
}

/// The namespace of a kind (`net`, `mnt`, ...) that a process is in; nothing if it has gone, or has more privileges than root has here (then it
/// was not started from here).
pub fn namespace(pid: i32, kind: &str) -> Result<Option<u64>> {
    let link = match fs::read_link(format!("/proc/{pid}/ns/{kind}")) {
        Err(error) if error.kind() == ErrorKind::PermissionDenied => None,
        link => if_there(link)?,
    };
    Ok(link.and_then(|link| link.to_str()?.strip_prefix(kind)?.strip_prefix(":[")?.strip_suffix(']')?.parse().ok()))
}

/// Network namespaces that processes are in, each with the id of one of them.
pub fn network_namespaces() -> Result<BTreeMap<u64, i32>> {
    let mut all = BTreeMap::new();
    for pid in pids()? {
        if let Some(inode) = namespace(pid, "net")? {
            all.entry(inode).or_insert(pid);
        }
    }
    Ok(all)
}

/// Every control group directory whose name starts with `funtainer-`, in every hierarchy.
pub fn product_cgroups() -> Result<BTreeSet<PathBuf>> {
    let mut found = BTreeSet::new();
    for (top, _) in cgroup_mounts()? {
        walk_cgroups(&top, CGROUP_DEPTH_MAX, &mut |directory| {
            if directory.file_name().is_some_and(|name| name.to_string_lossy().starts_with("funtainer-")) {
                found.insert(directory.to_owned());
            }
        })?;
    }
    Ok(found)
}

/// Mount points of control group hierarchies with their options: `cgroup2` or the controllers and names of version 1.
pub fn cgroup_mounts() -> Result<Vec<(PathBuf, String)>> {
    let text = fs::read_to_string("/proc/self/mountinfo").context("/proc/self/mountinfo")?;
    let mut all = Vec::new();
    for line in text.lines() {
        let Some((before, after)) = line.split_once(" - ") else { continue };
        let after: Vec<_> = after.split(' ').collect();
        let (Some(point), Some(kind)) = (before.split(' ').nth(4), after.first()) else { continue };
        match *kind {
            "cgroup" => all.push((PathBuf::from(point), after.get(2).unwrap_or(&"").to_string())),
            "cgroup2" => all.push((PathBuf::from(point), "cgroup2".to_owned())),
            _ => {}
        }
    }
    Ok(all)
}

/// The ids of the processes in a control group and below it.
pub fn cgroup_members(directory: &Path) -> Result<BTreeSet<i32>> {
    let mut members = BTreeSet::new();
    let mut failure = None;
    walk_cgroups(directory, CGROUP_DEPTH_MAX, &mut |directory| match if_there(fs::read_to_string(
        directory.join("cgroup.procs"),
    )) {
        Ok(text) => members.extend(text.unwrap_or_default().lines().filter_map(|line| line.parse::<i32>().ok())),
        Err(error) => failure = Some(error),
    })?;
    match failure {
        Some(error) => Err(error).with_context(|| format!("cannot read {}", directory.display())),
        None => Ok(members),
    }
}

/// Loop devices in use, with the file behind each.
pub fn loop_devices() -> Result<BTreeMap<String, String>> {
    let mut all = BTreeMap::new();
    for entry in fs::read_dir("/sys/block").context("/sys/block")? {
        let entry = entry?;
        if let Some(file) = if_there(fs::read_to_string(entry.path().join("loop/backing_file")))? {
            all.insert(entry.file_name().to_string_lossy().into_owned(), file.trim_end().to_owned());
        }
    }
    Ok(all)
}

/// Ports on which somebody in the network namespace of the calling thread listens by TCP.
pub fn listening_ports() -> Result<BTreeSet<u16>> {
    let mut ports = BTreeSet::new();
    for table in ["/proc/thread-self/net/tcp", "/proc/thread-self/net/tcp6"] {
        let text = if_there(fs::read_to_string(table))?.unwrap_or_default();
        for line in text.lines().skip(1) {
            let fields: Vec<_> = line.split_ascii_whitespace().collect();
            // State 0A is TCP_LISTEN.
            if let (Some(local), Some(&"0A")) = (fields.get(1), fields.get(3)) {
                ports.extend(local.rsplit_once(':').and_then(|(_, port)| u16::from_str_radix(port, 16).ok()));
            }
        }
    }
    Ok(ports)
}

/// Nothing where the thing has gone meanwhile, or was never there.
pub(super) fn if_there<T>(result: io::Result<T>) -> Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        // ESRCH (3) and ENODEV (19): the process or control group went between open and read.
        Err(error) if matches!(error.kind(), ErrorKind::NotFound) || matches!(error.raw_os_error(), Some(3 | 19)) => Ok(None),
        Err(error) => Err(error.into()),
    }
}

fn pids() -> Result<Vec<i32>> {
    let mut all = Vec::new();
    for entry in fs::read_dir("/proc").context("/proc")? {
        all.extend(entry?.file_name().to_str().and_then(|name| name.parse::<i32>().ok()));
    }
    Ok(all)
}

fn walk_cgroups(directory: &Path, depth: usize, visit: &mut impl FnMut(&Path)) -> Result<()> {
    visit(directory);
    if depth == 0 {
        return Ok(());
    }
    let Some(entries) = if_there(fs::read_dir(directory))? else {
        return Ok(());
    };
    for entry in entries {
        let Some(entry) = if_there(entry)? else { continue };
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            walk_cgroups(&entry.path(), depth - 1, visit)?;
        }
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_process_is_seen() {
        let own = process(std::process::id() as i32).unwrap().unwrap();
        assert!(own.title.contains("e2e"), "{own:?}");
        assert!(processes().unwrap().contains(&own) || own.state != 'R');
        assert!(network_namespaces().unwrap().contains_key(&namespace(own.pid, "net").unwrap().unwrap()));
        assert!(process(i32::MAX).unwrap().is_none());
    }

    /// In a network of its own: elsewhere another process can listen on the port as soon as it is free.
    #[test]
    fn listeners_are_seen_while_they_are_there() {
        let seen = crate::network::Namespace::make().unwrap().run(|| {
            let listener = std::net::TcpListener::bind("0.0.0.0:0")?;
            let port = listener.local_addr()?.port();
            let before = listening_ports()?.contains(&port);
            drop(listener);
            Ok((before, listening_ports()?.contains(&port)))
        });
        assert_eq!(seen.unwrap(), (true, false));
    }
}

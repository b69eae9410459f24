//! `funtainer doctor`: what this machine has and lacks for `funtainer serve`, what is lost without it, and how it is had.
//!
//! What can be tried is tried, by the code that a start uses: in namespaces and processes that are gone when this returns. Nothing on the
//! machine is changed; as with a start of the server, the kernel may load a module for a file system that is asked for.
//!
//! Root is told what holds for root's server, and which parts ordinary users would find for theirs; an ordinary user is told what
//! holds for a server of that user.

mod child;
mod files;
mod groups;
mod kernel;
mod modules;
mod network;
mod process;
mod users;

use std::path::Path;

/// What a feature belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Area {
    /// The kernel itself.
    Kernel,
    /// Layers, root file systems, the data directory.
    Files,
    /// Limits and accounts of instances.
    ControlGroups,
    /// The way out of instances.
    Network,
    /// What the server's own process may have.
    Process,
    /// The server of an ordinary user.
    OrdinaryUsers,
}

impl Area {
    /// All, in the order of a report.
    pub const ALL: [Self; 6] =
        [Self::Kernel, Self::Files, Self::ControlGroups, Self::Network, Self::Process, Self::OrdinaryUsers];

    /// In words.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Kernel => "kernel",
            Self::Files => "files and layers",
            Self::ControlGroups => "control groups",
            Self::Network => "network",
            Self::Process => "the server's process",
            Self::OrdinaryUsers => "ordinary users",
        }
    }
}

/// How it stands with a feature.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum State {
    /// It is there.
    Ok,
    /// Something else stands in for it, or a part of it is not there.
    Degraded,
    /// It is not there.
    Missing,
    /// That cannot be found out here.
    Unknown,
}

impl State {
    /// In one word.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Ok => "ok",
            Self::Degraded => "degraded",
            Self::Missing => "missing",
            Self::Unknown => "unknown",
        }
    }
}

/// One thing that a server uses.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Feature {
    area: Area,
    name: &'static str,
    /// Without it there is no server.
    required: bool,
    /// What is not to be had without it.
    lost: &'static str,
}

impl Feature {
    fn ok(self, found: impl Into<String>) -> Finding {
        self.finding(State::Ok, found.into(), None)
    }

    fn degraded(self, found: impl Into<String>, cure: impl Into<String>) -> Finding {
        self.finding(State::Degraded, found.into(), Some(cure.into()))
    }

    fn missing(self, found: impl Into<String>, cure: impl Into<String>) -> Finding {
        self.finding(State::Missing, found.into(), Some(cure.into()))
    }

    fn unknown(self, found: impl Into<String>, cure: impl Into<String>) -> Finding {
        self.finding(State::Unknown, found.into(), Some(cure.into()))
    }

    fn finding(self, state: State, found: String, cure: Option<String>) -> Finding {
        let lost = cure.is_some().then(|| self.lost.to_owned());
        Finding { area: self.area, feature: self.name, state, required: self.required, found, lost, cure }
    }
}

/// How it stands with one feature on this machine.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Finding {
    /// What it belongs to.
    pub area: Area,
    /// Its name, which stays the same from version to version.
    pub feature: &'static str,
    /// How it stands.
    pub state: State,
    /// Without it there is no server.
    pub required: bool,
    /// What was found, as a few words without a full stop.
    pub found: String,
    /// What is lost without it; `None` if it is there.
    pub lost: Option<String>,
    /// How it is had, as a command or a sentence; `None` if it is there.
    pub cure: Option<String>,
}

/// What was found.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Report {
    /// Whether it is about root's server; else about that of the calling user.
    pub root: bool,
    /// In the order of [`Area::ALL`].
    pub findings: Vec<Finding>,
}

impl Report {
    /// Whether a server can start here, as far as is known.
    pub fn is_sound(&self) -> bool {
        !self.findings.iter().any(|finding| finding.required && finding.state == State::Missing)
    }
}

/// Looks at everything, for a server with the data directory `data`, which need not be there. Takes some tens of milliseconds.
///
/// Must be called by a process with one thread, which has no use for its limit of open files: it forks, and the limit is raised.
pub fn examine(data: &Path) -> Report {
    let root = rustix::process::geteuid().is_root();
    let mut findings = kernel::look(root);
    if root {
        findings.extend(files::of_root(data));
    } else {
        findings.extend(files::of_user(data));
    }
    findings.extend(groups::look(root));
    if root {
        findings.extend(network::look());
    }
    findings.extend(process::look());
    findings.extend(users::look(root));
    Report { root, findings }
}

/// A number that the kernel shows in a file; `None` where it has no such file.
fn number(path: &str) -> Option<u64> {
    std::fs::read_to_string(path).ok()?.trim().parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    const FEATURE: Feature = Feature { area: Area::Kernel, name: "x", required: true, lost: "all" };

    #[test]
    fn what_is_not_there_says_what_is_lost_and_how_it_is_had() {
        let missing = FEATURE.missing("nothing", "get it");
        assert_eq!((missing.lost.as_deref(), missing.cure.as_deref()), (Some("all"), Some("get it")));
        assert_eq!((FEATURE.ok("y").lost, FEATURE.ok("y").cure), (None, None));
    }

    #[test]
    fn only_what_is_required_and_missing_forbids_a_server() {
        let optional = Feature { required: false, ..FEATURE };
        let sound = |finding| Report { root: true, findings: vec![FEATURE.ok(""), finding] }.is_sound();
        assert!(!sound(FEATURE.missing("", "")));
        assert!(sound(optional.missing("", "")));
        assert!(sound(FEATURE.degraded("", "")));
        assert!(sound(FEATURE.unknown("", "")));
    }
}

//! What the server's own process may have.

use rustix::process::{Resource, Rlimit};

use super::{Area, Feature, Finding, number};

const OPEN_FILES: Feature = Feature {
    area: Area::Process,
    name: "open files",
    required: false,
    lost: "instances get no more open files than this, and the server runs fewer of them",
};
const TERMINALS: Feature = Feature {
    area: Area::Process,
    name: "terminals",
    required: false,
    lost: "`exec -t` and `run -t` find no terminal when these are used up",
};

/// Open files that an instance has by default.
const OPEN_FILES_USUAL: u64 = 65_536;
/// What a keeper asks for: the most that the kernel gives by default (`fs.nr_open`).
const OPEN_FILES_MAX: u64 = 1_048_576;
/// Fewer free terminals than that are few.
const TERMINALS_MIN: u64 = 64;

pub(super) fn look() -> Vec<Finding> {
    vec![open_files(), terminals(number("/proc/sys/kernel/pty/max"), number("/proc/sys/kernel/pty/nr"))]
}

/// Asks for as many as a keeper does, for this process alone.
fn open_files() -> Finding {
    let before = rustix::process::getrlimit(Resource::Nofile).maximum;
    if before.is_some_and(|most| most < OPEN_FILES_MAX) {
        let wanted = Some(OPEN_FILES_MAX);
        // Refused without CAP_SYS_RESOURCE.
        let _ = rustix::process::setrlimit(Resource::Nofile, Rlimit { current: wanted, maximum: wanted });
    }
    match rustix::process::getrlimit(Resource::Nofile).maximum {
        None => OPEN_FILES.ok("no limit"),
        Some(most) if most >= OPEN_FILES_USUAL => OPEN_FILES.ok(format!("at most {most}")),
        Some(most) => OPEN_FILES.degraded(
            format!("at most {most}"),
            "raise the hard limit: LimitNOFILE=1048576 in a unit of systemd, or `nofile` in /etc/security/limits.conf",
        ),
    }
}

fn terminals(most: Option<u64>, used: Option<u64>) -> Finding {
    let cure = "sysctl -w kernel.pty.max=4096 (and in /etc/sysctl.d/ for the next boot)";
    match (most, used) {
        (Some(most), Some(used)) if most.saturating_sub(used) >= TERMINALS_MIN => {
            TERMINALS.ok(format!("{used} of {most} are in use"))
        }
        (Some(most), Some(used)) => TERMINALS.degraded(format!("{used} of {most} are in use"), cure),
        _ => TERMINALS.missing(
            "the kernel shows none in /proc/sys/kernel/pty",
            "use a kernel with CONFIG_UNIX98_PTYS=y, as all distributions' are",
        ),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn used_up_terminals_are_told() {
        for (most, used, state) in [
            (Some(4096), Some(3), State::Ok),
            (Some(100), Some(99), State::Degraded),
            (Some(10), Some(20), State::Degraded),
            (None, None, State::Missing),
        ] {
            assert_eq!(terminals(most, used).state, state, "{most:?} {used:?}");
        }
    }
}

//! The kernel itself: its version, user namespaces, the filter of system calls.

use rustix::io::Errno;

use super::{Area, Feature, Finding, child};
use crate::mount::probe;
use crate::seccomp::{DEFAULT, Filter};
use crate::userns;

const VERSION: Feature = Feature {
    area: Area::Kernel,
    name: "version",
    required: true,
    lost: "what containers are made of is not there, or was never tried",
};
const USER_NAMESPACES: Feature = Feature {
    area: Area::Kernel,
    name: "user namespaces",
    required: true,
    lost: "root inside a container would be root outside, so nothing is started",
};
const SECCOMP: Feature = Feature {
    area: Area::Kernel,
    name: "seccomp",
    required: true,
    lost: "programs could make every system call, so nothing is started",
};

/// The oldest kernel that is tested, and the oldest that has every part.
const TESTED: (u32, u32) = (6, 1);
const OLDEST: (u32, u32) = (5, 19);

/// `root`: as root's server makes them; else that part is told with the other parts of an ordinary user.
pub(super) fn look(root: bool) -> Vec<Finding> {
    let mut findings = vec![version(&release())];
    if root {
        findings.push(match userns::make(probe::TRIAL_BASE) {
            Ok(_) => USER_NAMESPACES.ok(limit()),
            Err(error) => {
                let cure = if error.errno == Errno::NOSPC {
                    "sysctl -w user.max_user_namespaces=65536 (and in /etc/sysctl.d/ for the next boot)".to_owned()
                } else {
                    probe::missing_userns(&error).reason
                };
                USER_NAMESPACES.missing(error.to_string(), cure)
            }
        });
    }
    findings.push(seccomp());
    findings
}

/// Such as `6.1.0-28-amd64`.
pub(super) fn release() -> String {
    rustix::system::uname().release().to_string_lossy().into_owned()
}

fn version(release: &str) -> Finding {
    let cure = "install a newer kernel (Debian 12 and Ubuntu 24.04 have one)";
    match parse(release) {
        Some(version) if version >= TESTED => VERSION.ok(format!("Linux {release}, 6.1 or later is needed")),
        Some(version) if version >= OLDEST => VERSION.degraded(format!("Linux {release}, older than any that is tested"), cure),
        Some(_) => VERSION.missing(format!("Linux {release}, 6.1 or later is needed"), cure),
        None => VERSION.unknown(format!("Linux {release}, which says no version"), "see that it is 6.1 or later"),
    }
}

fn parse(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|other: char| !other.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

fn limit() -> String {
    match super::number("/proc/sys/user/max_user_namespaces") {
        Some(most) => format!("made and given ids; at most {most} on this machine"),
        None => "made and given ids".to_owned(),
    }
}

/// The real filter, in a process that ends with it.
fn seccomp() -> Finding {
    let tried = child::run(|| {
        userns::no_new_privs()
            .and_then(|()| Filter::compile(&DEFAULT).install())
            .map(|()| String::new())
            .map_err(|error| error.to_string())
    });
    match tried {
        Ok(_) => SECCOMP.ok("the filter for instances can be installed"),
        Err(error) => SECCOMP.missing(error, "use a kernel with CONFIG_SECCOMP_FILTER=y, as all distributions' are"),
    }
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn versions_are_compared_as_numbers() {
        for (release, state) in [
            ("6.18.44-fc-v782", State::Ok),
            ("6.1.0-28-amd64", State::Ok),
            ("10.0", State::Ok),
            ("5.19.0", State::Degraded),
            ("6.0.12", State::Degraded),
            ("5.15.0-91-generic", State::Missing),
            ("5.4", State::Missing),
            ("linux", State::Unknown),
        ] {
            assert_eq!(version(release).state, state, "{release}");
        }
    }
}

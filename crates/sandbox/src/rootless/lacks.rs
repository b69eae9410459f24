//! Why this machine refuses user namespaces to ordinary users, and what cures it.

use std::fs;

use rustix::io::Errno;

use crate::mount::Missing;
use crate::step::StepError;

/// What the host's settings say; `None` where it has no such setting.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(super) struct Lacks {
    /// `kernel.unprivileged_userns_clone`, of Debian and others: 0 forbids.
    clone: Option<u64>,
    /// `user.max_user_namespaces`: 0 forbids.
    max: Option<u64>,
    /// `kernel.apparmor_restrict_unprivileged_userns`, of Ubuntu: 1 lets only those programs have capabilities in one that AppArmor has a profile for.
    apparmor: Option<u64>,
}

impl Lacks {
    pub(super) fn read() -> Self {
        let number = |path| fs::read_to_string(path).ok()?.trim().parse().ok();
        Self {
            clone: number("/proc/sys/kernel/unprivileged_userns_clone"),
            max: number("/proc/sys/user/max_user_namespaces"),
            apparmor: number("/proc/sys/kernel/apparmor_restrict_unprivileged_userns"),
        }
    }

    /// What is missing where a user namespace cannot be made, or gives no powers.
    pub(super) fn missing_namespace(self, error: &StepError) -> Missing {
        let reason = match self {
            Self { clone: Some(0), .. } => {
                "the administrator has forbidden them: as root, `sysctl -w kernel.unprivileged_userns_clone=1`, and the same in /etc/sysctl.d/ \
                 for the next boot"
                    .to_owned()
            }
            Self { max: Some(0), .. } => {
                "the administrator has forbidden them: as root, `sysctl -w user.max_user_namespaces=65536`, and the same in /etc/sysctl.d/ for \
                 the next boot"
                    .to_owned()
            }
            Self { apparmor: Some(1), .. } if matches!(error.errno, Errno::PERM | Errno::ACCESS) => format!(
                "AppArmor forbids them to programs without a profile ({error}): as root, put the lines `abi <abi/4.0>,`, `include \
                 <tunables/global>` and `profile funtainer {} flags=(unconfined) {{ userns, }}` into /etc/apparmor.d/funtainer and run \
                 `apparmor_parser -r /etc/apparmor.d/funtainer`",
                program()
            ),
            _ => match error.errno {
                Errno::INVAL => "the kernel is built without CONFIG_USER_NS".to_owned(),
                Errno::NOSPC | Errno::USERS => {
                    format!("there are too many, or they are too deep ({error}): as root, raise the sysctl user.max_user_namespaces")
                }
                _ => format!("this machine or container forbids them ({error})"),
            },
        };
        Missing { feature: "user namespaces for ordinary users", reason }
    }
}

/// Path of this program, for a profile.
fn program() -> String {
    std::env::current_exe().map_or_else(|_| "/usr/local/bin/funtainer".to_owned(), |path| path.display().to_string())
}

#[cfg(test)]
mod tests {
    use super::*;

    fn reason(lacks: Lacks, errno: Errno) -> String {
        lacks.missing_namespace(&StepError { step: "write uid_map", errno }).reason
    }

    #[test]
    fn the_setting_that_forbids_is_named() {
        let none = Lacks::default();
        let table = [
            (Lacks { clone: Some(0), ..none }, Errno::PERM, "kernel.unprivileged_userns_clone=1"),
            (Lacks { clone: Some(1), max: Some(0), ..none }, Errno::NOSPC, "user.max_user_namespaces=65536"),
            (Lacks { apparmor: Some(1), ..none }, Errno::PERM, "apparmor_parser -r"),
            (Lacks { apparmor: Some(1), ..none }, Errno::NOSPC, "raise the sysctl"),
            (Lacks { apparmor: Some(0), ..none }, Errno::PERM, "forbids them (write uid_map"),
            (none, Errno::INVAL, "CONFIG_USER_NS"),
        ];
        for (lacks, errno, part) in table {
            let said = reason(lacks, errno);
            assert!(said.contains(part), "{said}");
        }
    }
}

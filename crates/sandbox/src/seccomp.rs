//! The filter on system calls.
//!
//! A profile is data. That of instances ([`DEFAULT`]) is as strict as Docker's default profile for a container with our capabilities,
//! stricter where that is said; it is compiled once by each zygote into a program that every instance installs. The server's daemon has one
//! of its own ([`DAEMON`]).
//!
//! What a call meets, in this order:
//! ```text
//! another architecture's numbers (i386, x32, arm)  the process is killed
//! allowed                                          the call goes on
//! checked                                          the call goes on if its argument passes, else EPERM
//! denied                                           EPERM
//! clone3, and every number not named               ENOSYS: C libraries and run-times fall back to older calls
//! ```
//! At installation the kernel runs the program once for every number, to find those that it always allows and need not be filtered: the
//! time goes with the length of the path to each. So the program is a balanced tree over ranges of equal verdict, not a chain.

#[macro_use]
mod profile;
mod daemon;
mod program;

pub use daemon::DAEMON;
pub use profile::{Check, DEFAULT, Named, Profile, Test};

use rustix::io::Errno;

use crate::step::{StepError, checked};

/// The kernel's code of the architecture whose numbers are served (linux/audit.h).
#[cfg(target_arch = "x86_64")]
pub const ARCHITECTURE: u32 = 0xC000_003E;
/// The kernel's code of the architecture whose numbers are served (linux/audit.h).
#[cfg(target_arch = "aarch64")]
pub const ARCHITECTURE: u32 = 0xC000_00B7;

/// What the filter says to a call.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Verdict {
    /// It goes on.
    Allow,
    /// It does nothing and returns this errno.
    Fail(u16),
    /// The whole process is killed by SIGSYS.
    Kill,
}

impl Verdict {
    /// The value that a filter program returns (seccomp(2)).
    pub const fn code(self) -> u32 {
        match self {
            Self::Allow => libc::SECCOMP_RET_ALLOW,
            Self::Fail(errno) => libc::SECCOMP_RET_ERRNO | errno as u32,
            Self::Kill => libc::SECCOMP_RET_KILL_PROCESS,
        }
    }
}

/// A compiled profile. It can be installed any number of times.
pub struct Filter {
    instructions: Box<[libc::sock_filter]>,
}

impl Filter {
    /// Compiles a profile (about 0.1 ms).
    pub fn compile(profile: &Profile) -> Self {
        Self { instructions: program::compile(profile).into_boxed_slice() }
    }

    /// The program, as the kernel takes it.
    pub fn instructions(&self) -> &[libc::sock_filter] {
        &self.instructions
    }

    /// Puts the filter on the calling thread and all that it will make, for good. Needs `no_new_privs`, or CAP_SYS_ADMIN.
    ///
    /// One system call: may be called between clone and exec. The calls made afterwards must be allowed by the profile.
    pub fn install(&self) -> Result<(), StepError> {
        let program = libc::sock_fprog {
            // A profile of all numbers has a few hundred instructions; the kernel takes 4,096.
            len: self.instructions.len() as u16,
            filter: self.instructions.as_ptr().cast_mut(),
        };
        // SAFETY: the kernel reads `len` instructions behind the pointer, which live as long as `self`, and writes nothing. rustix has
        // no wrapper.
        let result = unsafe { libc::syscall(libc::SYS_seccomp, libc::SECCOMP_SET_MODE_FILTER, 0, &raw const program) };
        match checked(result) {
            Ok(_) => Ok(()),
            Err(errno) => Err(StepError { step: "install the system call filter", errno }),
        }
    }
}

impl std::fmt::Debug for Filter {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Filter").field("instructions", &self.instructions.len()).finish()
    }
}

/// `EPERM` as a verdict: what denied calls get.
const DENIED: Verdict = Verdict::Fail(Errno::PERM.raw_os_error() as u16);
/// `ENOSYS` as a verdict.
const ABSENT: Verdict = Verdict::Fail(Errno::NOSYS.raw_os_error() as u16);

#[cfg(test)]
mod tests;

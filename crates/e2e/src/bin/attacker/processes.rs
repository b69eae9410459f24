//! Other processes: the init that is pid 1, those of the host, and a runtime that is careless on its way in.

use std::fs::File;
use std::io;
use std::os::fd::AsRawFd as _;
use std::os::unix::fs::chroot;
use std::os::unix::process::CommandExt as _;
use std::path::Path;
use std::process::Command;

use crate::kernel::call;
use crate::{Attack, Loot, got};

/// PTRACE_SEIZE and PTRACE_ATTACH of linux/ptrace.h.
const SEIZE: i64 = 0x4206;

pub(crate) const ATTACKS: &[Attack] = &[
    ("trace", |pid| got(call(libc::SYS_ptrace, [SEIZE.into(), number(pid)?.into(), 0.into(), 0.into()]))),
    ("signal", |pid| got(call(libc::SYS_kill, [number(pid)?.into(), 0.into()]))),
    ("take-descriptor", |pid| {
        let pidfd = call(libc::SYS_pidfd_open, [number(pid)?.into(), 0.into()])?;
        got(call(libc::SYS_pidfd_getfd, [pidfd.into(), 0.into(), 0.into()]))
    }),
    ("many-processes", |_| {
        let seen = std::fs::read_dir("/proc")?.map_while(Result::ok);
        let count = seen.filter(|entry| entry.file_name().to_string_lossy().bytes().all(|byte| byte.is_ascii_digit())).count();
        if count > 8 { Ok(format!("{count} processes are seen")) } else { Err(io::Error::other(format!("{count} processes"))) }
    }),
    ("priority", |_| got(call(libc::SYS_setpriority, [0.into(), 0.into(), (-20).into()]))),
    // SCHED_FIFO with priority 1.
    ("real-time", |_| got(call(libc::SYS_sched_setscheduler, [0.into(), 1.into(), 1_i32.to_ne_bytes().as_slice().into()]))),
    ("more-files", |_| {
        let unlimited = crate::kernel::words([-1, -1]);
        let raised = crate::kernel::words([2_000_000, 2_000_000]);
        call(libc::SYS_prlimit64, [0.into(), 7.into(), raised.as_slice().into(), 0.into()])
            .or_else(|_| call(libc::SYS_prlimit64, [0.into(), 7.into(), unlimited.as_slice().into(), 0.into()]))
            .map(|_| "the limit of open files is raised".to_owned())
    }),
    ("interpret", interpret),
    ("wait", |_| io::copy(&mut io::stdin(), &mut io::sink()).map(|_| "waited".to_owned())),
];

fn number(text: &str) -> io::Result<i64> {
    text.parse().map_err(io::Error::other)
}

/// Executes a file that names an interpreter: what it prints then is the loot.
fn interpret(path: &str) -> Loot {
    Err(Command::new(path).exec())
}

/// What a runtime must not do (CVE-2024-21626): a descriptor of the host's stays open, as number 7, while it enters a root and then a
/// working directory that the image has chosen.
pub(crate) fn enter_carelessly(outside: &Path, root: &Path, directory: &str) -> io::Result<File> {
    let leaked = File::open(outside)?;
    call(libc::SYS_dup2, [leaked.as_raw_fd().into(), 7.into()])?;
    chroot(root)?;
    std::env::set_current_dir(directory)?;
    Ok(leaked)
}

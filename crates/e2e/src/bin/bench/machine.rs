//! The machine that was measured on.

use std::fs;

use anyhow::{Context, Result};
use serde::Serialize;

/// What a reader must know to compare numbers.
#[derive(Serialize)]
pub(crate) struct Machine {
    /// As the kernel names it.
    pub(crate) processor: String,
    /// Logical processors.
    pub(crate) cores: usize,
    /// In MiB.
    pub(crate) memory_mib: u64,
    /// Its release.
    pub(crate) kernel: String,
    /// Whether a hypervisor is below: page faults and switches are dear then.
    pub(crate) is_virtual: bool,
}

/// Looks at this machine.
pub(crate) fn describe() -> Result<Machine> {
    let processors = fs::read_to_string("/proc/cpuinfo").context("/proc/cpuinfo")?;
    let value = |name: &str| {
        let line = processors.lines().find(|line| line.starts_with(name))?;
        line.split_once(':').map(|(_, value)| value.trim().to_owned())
    };
    Ok(Machine {
        processor: value("model name").unwrap_or_else(|| std::env::consts::ARCH.to_owned()),
        cores: std::thread::available_parallelism()?.get(),
        memory_mib: meminfo("MemTotal")? / 1024,
        kernel: rustix::system::uname().release().to_string_lossy().into_owned(),
        is_virtual: value("flags").is_some_and(|flags| flags.split(' ').any(|flag| flag == "hypervisor")),
    })
}

/// A line of /proc/meminfo, in KiB.
pub(crate) fn meminfo(name: &str) -> Result<u64> {
    kib("/proc/meminfo", name)
}

/// A line `Name:  123 kB` of a file of proc(5), in KiB.
pub(crate) fn kib(path: &str, name: &str) -> Result<u64> {
    let text = fs::read_to_string(path).with_context(|| path.to_owned())?;
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name)?.strip_prefix(':'))
        .with_context(|| format!("{path} has no {name}"))?;
    Ok(line.trim().trim_end_matches(" kB").parse()?)
}

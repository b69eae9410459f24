//! What this machine has, beside what a function asks for.

use funtainer_model::{ByteSize, Limits};

/// What the machine has.
#[derive(Debug, Clone, Copy)]
struct Machine {
    memory: Option<ByteSize>,
    processors: Option<usize>,
    /// Open files that one process of this server may have; none where there is no bound.
    open_files: Option<u64>,
}

/// Sentences on limits above what this machine has: they are taken, as Docker takes them, and never reached.
pub(crate) fn warnings(limits: &Limits) -> Vec<String> {
    let meminfo = std::fs::read_to_string("/proc/meminfo").unwrap_or_default();
    Machine {
        memory: memory(&meminfo),
        processors: std::thread::available_parallelism().ok().map(Into::into),
        open_files: rustix::process::getrlimit(rustix::process::Resource::Nofile).maximum,
    }
    .beside(limits)
}

impl Machine {
    fn beside(self, limits: &Limits) -> Vec<String> {
        let mut warnings = Vec::new();
        if let Some(memory) = self.memory
            && limits.memory > memory
        {
            warnings.push(format!(
                "--memory {} is more than this machine has ({}M): whoever needs memory last is killed before the limit is reached",
                limits.memory,
                memory.as_bytes() >> 20
            ));
        }
        if let (Some(processors), Some(cpus)) = (self.processors, limits.cpus)
            && cpus.milli() as usize > processors * 1000
        {
            warnings.push(format!("--cpus {cpus} is more than this machine has ({processors}): it limits nothing"));
        }
        if let Some(most) = self.open_files
            && u64::from(limits.open_files) > most
        {
            warnings.push(format!(
                "--open-files {} is more than this server may give: instances get {most}; start `funtainer serve` with a higher hard limit \
                 (LimitNOFILE= of its unit, or `ulimit -Hn`)",
                limits.open_files
            ));
        }
        warnings
    }
}

/// `MemTotal` of proc_meminfo(5).
fn memory(meminfo: &str) -> Option<ByteSize> {
    let line = meminfo.lines().find_map(|line| line.strip_prefix("MemTotal:"))?;
    let kibibytes: u64 = line.trim().strip_suffix("kB")?.trim().parse().ok()?;
    kibibytes.checked_mul(1024).map(ByteSize::bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_memory_is_read() {
        assert_eq!(memory("MemTotal:       24672000 kB\nMemFree: 1 kB\n"), Some(ByteSize::bytes(24_672_000 << 10)));
        for text in ["", "MemTotal:", "MemTotal: 1", "MemTotal: x kB", "MemTotal: 99999999999999999999 kB"] {
            assert_eq!(memory(text), None, "{text:?}");
        }
    }

    #[test]
    fn what_the_machine_lacks_is_said() {
        let machine = Machine { memory: Some(ByteSize::mebibytes(1024)), processors: Some(2), open_files: Some(20_000) };
        let limits =
            Limits { open_files: 20_000, cpus: "2".parse().ok(), memory: ByteSize::mebibytes(1024), ..Limits::default() };
        assert!(machine.beside(&limits).is_empty());
        let limits = Limits { open_files: 20_001, cpus: "2.5".parse().ok(), memory: ByteSize::mebibytes(2048), ..limits };
        let said = machine.beside(&limits).join("\n");
        for words in ["--memory 2G is more than this machine has (1024M)", "--cpus 2.5", "instances get 20000"] {
            assert!(said.contains(words), "{said}");
        }
        assert!(Machine { memory: None, processors: None, open_files: None }.beside(&limits).is_empty());
    }
}

//! What one instance may use and reach.

use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::ByteSize;

/// Least memory that a sandbox with its page tables and writable layer starts in.
const MEMORY_MIN: ByteSize = ByteSize::mebibytes(4);
/// Most memory, and most room of a writable layer: more than machines have, and little enough for the kernel's counters. What is above it
/// is a slip.
const MEMORY_MAX: ByteSize = ByteSize::bytes(16 << 40);
/// Least room of a writable layer: its directories need a page each.
const WRITABLE_MIN: ByteSize = ByteSize::mebibytes(1);
/// Range of `cpu.weight` (Linux, Documentation/admin-guide/cgroup-v2.rst).
const CPU_WEIGHT_MAX: u16 = 10_000;
/// Fewest processes: the init and the command.
const PIDS_MIN: u32 = 2;
/// Most processes: `PID_MAX_LIMIT` of a 64-bit kernel.
const PIDS_MAX: u32 = 4_194_304;
/// Fewest open files: the standard streams and what a dynamic linker opens.
const OPEN_FILES_MIN: u32 = 16;
/// Most open files: `fs.nr_open` as the kernel starts with it.
const OPEN_FILES_MAX: u32 = 1_048_576;
/// Most tmpfs mounts of one instance.
const TMPFS_MAX: usize = 16;
/// Most rules of one function.
const EGRESS_MAX: usize = 64;
/// Longest path of a mount (the kernel's PATH_MAX less its NUL).
const PATH_BYTES_MAX: usize = 4095;

/// What one instance may use.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Limits {
    /// Memory of all its processes together, page cache and writable layer included.
    pub memory: ByteSize,
    /// Processor time per time, if it is bounded.
    #[serde(default)]
    pub cpus: Option<Cpus>,
    /// Share of the processors where they are contended for: 1 to 10,000; twice the weight is twice the time.
    #[serde(default = "cpu_weight")]
    pub cpu_weight: u16,
    /// Processes and threads.
    #[serde(default = "pids")]
    pub pids: u32,
    /// Room of the writable layer; as much as the memory where nothing is said, and never more than counts as memory.
    #[serde(default)]
    pub writable: Option<ByteSize>,
    /// Open files of one process (RLIMIT_NOFILE).
    #[serde(default = "open_files")]
    pub open_files: u32,
}

/// A number of processors in thousandths, at least 0.01. Text form: a decimal number such as `0.5` or `2`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Cpus(u32);

/// What one instance may reach, and how its root file system is.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default)]
pub struct Isolation {
    /// Whether setuid bits and file capabilities of the image are without effect (prctl(2), `PR_SET_NO_NEW_PRIVS`).
    pub no_new_privileges: bool,
    /// Whether the root file system has no writable layer.
    pub read_only: bool,
    /// File systems in memory.
    pub tmpfs: Vec<TmpfsMount>,
    /// Whether it reaches anything outside.
    pub network: Network,
    /// What is open besides.
    pub egress: Vec<EgressRule>,
}

/// A file system in memory. Text form: `PATH` or `PATH:SIZE`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct TmpfsMount {
    path: String,
    size: Option<ByteSize>,
}

/// Whether an instance reaches anything outside.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Network {
    /// The outside, but not this machine, other instances, or link-local addresses.
    #[default]
    On,
    /// Nothing but itself.
    Off,
}

/// Addresses and ports that are open. Text form: `ADDRESS[/PREFIX][:PORT[-PORT]][/tcp|/udp]`, such as `10.0.0.0/8`, `10.1.2.3:5432/tcp`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EgressRule {
    address: Ipv4Addr,
    prefix: u8,
    ports: Option<(u16, u16)>,
    protocol: Option<Protocol>,
}

/// A transport protocol with ports.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Protocol {
    /// TCP.
    Tcp,
    /// UDP.
    Udp,
}

/// Limits or mounts that cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum IsolationError {
    /// Too little memory to start anything.
    #[error("memory {0} is too little, the least is {MEMORY_MIN}")]
    Memory(ByteSize),
    /// Too little room for a writable layer.
    #[error("a writable layer of {0} is too little, the least is {WRITABLE_MIN}")]
    Writable(ByteSize),
    /// More memory than there can be.
    #[error("{what} of {size} is too much, the most is {MEMORY_MAX}")]
    TooLarge {
        /// The setting.
        what: &'static str,
        /// Its value.
        size: ByteSize,
    },
    /// No number of processors.
    #[error("'{0}' is no number of processors: write a decimal number from 0.01 up, such as 0.5 or 2")]
    Cpus(String),
    /// Outside a range.
    #[error("{what} is {actual}, it must be from {min} to {max}")]
    Range {
        /// The setting.
        what: &'static str,
        /// Its value.
        actual: u64,
        /// Least value.
        min: u64,
        /// Greatest value.
        max: u64,
    },
    /// No file system in memory.
    #[error("'{0}' is no tmpfs: write an absolute path without '..', and a size behind a colon if you like, such as /tmp:64M")]
    Tmpfs(String),
    /// A place of the platform's.
    #[error("no tmpfs can be at {0}: /dev, /proc and /sys are the platform's; only the size of /dev/shm can be set")]
    TmpfsReserved(String),
    /// One place for two.
    #[error("two tmpfs are wanted at {0}")]
    TmpfsTwice(String),
    /// No rule.
    #[error(
        "'{0}' is no egress rule: write ADDRESS[/PREFIX][:PORT[-PORT]][/tcp or /udp], such as 10.0.0.0/8 or 10.1.2.3:5432/tcp"
    )]
    Egress(String),
    /// Bits of the address behind the prefix.
    #[error("egress rule '{text}' has address bits behind its prefix: {meant} is meant")]
    EgressBits {
        /// As it was written.
        text: String,
        /// With the bits cleared.
        meant: String,
    },
    /// No such setting.
    #[error("'{0}' is no network setting: use on or off")]
    Network(String),
}

const fn cpu_weight() -> u16 {
    100
}

const fn pids() -> u32 {
    4096
}

const fn open_files() -> u32 {
    65_536
}

impl Default for Limits {
    fn default() -> Self {
        Self {
            memory: ByteSize::mebibytes(512),
            cpus: None,
            cpu_weight: cpu_weight(),
            pids: pids(),
            writable: None,
            open_files: open_files(),
        }
    }
}

impl Limits {
    /// Whether an instance can be started with them.
    pub fn check(&self) -> Result<(), IsolationError> {
        if self.memory < MEMORY_MIN {
            return Err(IsolationError::Memory(self.memory));
        }
        if let Some(writable) = self.writable.filter(|writable| *writable < WRITABLE_MIN) {
            return Err(IsolationError::Writable(writable));
        }
        for (what, size) in [("memory", Some(self.memory)), ("a writable layer", self.writable)] {
            if let Some(size) = size.filter(|size| *size > MEMORY_MAX) {
                return Err(IsolationError::TooLarge { what, size });
            }
        }
        let within = |what, actual: u32, min: u32, max: u32| {
            if (min..=max).contains(&actual) {
                return Ok(());
            }
            Err(IsolationError::Range { what, actual: actual.into(), min: min.into(), max: max.into() })
        };
        within("cpu weight", self.cpu_weight.into(), 1, CPU_WEIGHT_MAX.into())?;
        within("number of processes", self.pids, PIDS_MIN, PIDS_MAX)?;
        within("number of open files", self.open_files, OPEN_FILES_MIN, OPEN_FILES_MAX)
    }

    /// Room of the writable layer in bytes.
    pub fn writable_bytes(&self) -> u64 {
        self.writable.unwrap_or(self.memory).as_bytes()
    }
}

impl Cpus {
    /// So many thousandths of a processor; at least 10, which is the least that the kernel's scheduler keeps to (1 ms in 100 ms).
    pub fn from_milli(milli: u32) -> Option<Self> {
        (milli >= 10).then_some(Self(milli))
    }

    /// Thousandths of a processor.
    pub const fn milli(self) -> u32 {
        self.0
    }
}

impl FromStr for Cpus {
    type Err = IsolationError;

    fn from_str(text: &str) -> Result<Self, IsolationError> {
        let wrong = || IsolationError::Cpus(text.to_owned());
        let (whole, part) = text.split_once('.').unwrap_or((text, "0"));
        let digits = |text: &str| !text.is_empty() && text.bytes().all(|byte| byte.is_ascii_digit());
        if !digits(whole) || !digits(part) || whole.len() > 5 || part.len() > 3 {
            return Err(wrong());
        }
        let number = |text: &str| text.parse::<u32>().map_err(|_| wrong());
        let milli = number(whole)? * 1000 + number(&format!("{part:0<3}"))?;
        Self::from_milli(milli).ok_or_else(wrong)
    }
}

impl fmt::Display for Cpus {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.0 % 1000 {
            0 => write!(f, "{}", self.0 / 1000),
            part => write!(f, "{}.{}", self.0 / 1000, format!("{part:03}").trim_end_matches('0')),
        }
    }
}

impl Default for Isolation {
    fn default() -> Self {
        Self { no_new_privileges: true, read_only: false, tmpfs: Vec::new(), network: Network::On, egress: Vec::new() }
    }
}

impl Isolation {
    /// Whether an instance can be started with it.
    pub fn check(&self) -> Result<(), IsolationError> {
        let at_most = |what, actual: usize, max: usize| {
            if actual <= max {
                return Ok(());
            }
            Err(IsolationError::Range { what, actual: actual as u64, min: 0, max: max as u64 })
        };
        at_most("number of tmpfs", self.tmpfs.len(), TMPFS_MAX)?;
        at_most("number of egress rules", self.egress.len(), EGRESS_MAX)?;
        for (index, mount) in self.tmpfs.iter().enumerate() {
            if self.tmpfs[..index].iter().any(|other| other.path == mount.path) {
                return Err(IsolationError::TmpfsTwice(mount.path.clone()));
            }
        }
        Ok(())
    }
}

impl TmpfsMount {
    /// A file system at an absolute path, `/dev/shm` among them but nothing else in `/dev`, `/proc` and `/sys`; with as much room as the instance has memory, where no size is given.
    pub fn new(path: &str, size: Option<ByteSize>) -> Result<Self, IsolationError> {
        let parts: Vec<&str> = path.split('/').filter(|part| !part.is_empty() && *part != ".").collect();
        let fine = path.starts_with('/') && path.len() <= PATH_BYTES_MAX && !path.contains('\0');
        if !fine || parts.is_empty() || parts.contains(&"..") || size.is_some_and(|size| size.as_bytes() == 0) {
            return Err(IsolationError::Tmpfs(path.to_owned()));
        }
        if matches!(parts[0], "dev" | "proc" | "sys") && parts != ["dev", "shm"] {
            return Err(IsolationError::TmpfsReserved(path.to_owned()));
        }
        Ok(Self { path: format!("/{}", parts.join("/")), size })
    }

    /// Absolute, without `.`, `..` and doubled slashes, never `/`.
    pub fn path(&self) -> &str {
        &self.path
    }

    /// Its room.
    pub const fn size(&self) -> Option<ByteSize> {
        self.size
    }
}

impl FromStr for TmpfsMount {
    type Err = IsolationError;

    fn from_str(text: &str) -> Result<Self, IsolationError> {
        let wrong = || IsolationError::Tmpfs(text.to_owned());
        match text.rsplit_once(':') {
            None => Self::new(text, None),
            Some((path, size)) => Self::new(path, Some(size.parse().map_err(|_| wrong())?)),
        }
        .map_err(|error| match error {
            IsolationError::Tmpfs(_) => wrong(),
            other => other,
        })
    }
}

impl fmt::Display for TmpfsMount {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self.size {
            None => f.write_str(&self.path),
            Some(size) => write!(f, "{}:{size}", self.path),
        }
    }
}

impl FromStr for Network {
    type Err = IsolationError;

    fn from_str(text: &str) -> Result<Self, IsolationError> {
        match text {
            "on" => Ok(Self::On),
            "off" => Ok(Self::Off),
            other => Err(IsolationError::Network(other.to_owned())),
        }
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::On => "on",
            Self::Off => "off",
        })
    }
}

impl EgressRule {
    /// A rule; `None` where bits of the address lie behind the prefix, the prefix is over 32, the ports are 0 or in the wrong order.
    pub fn new(address: Ipv4Addr, prefix: u8, ports: Option<(u16, u16)>, protocol: Option<Protocol>) -> Option<Self> {
        let ordered = ports.is_none_or(|(first, last)| 0 < first && first <= last);
        (prefix <= 32 && masked(address, prefix) == address && ordered).then_some(Self { address, prefix, ports, protocol })
    }

    /// First address.
    pub const fn address(&self) -> Ipv4Addr {
        self.address
    }

    /// Number of leading bits that count, 0 to 32.
    pub const fn prefix(&self) -> u8 {
        self.prefix
    }

    /// First and last port; all where it is `None`.
    pub const fn ports(&self) -> Option<(u16, u16)> {
        self.ports
    }

    /// Protocol; any where it is `None`: with ports TCP and UDP, without ports everything.
    pub const fn protocol(&self) -> Option<Protocol> {
        self.protocol
    }
}

fn masked(address: Ipv4Addr, prefix: u8) -> Ipv4Addr {
    let mask = u32::MAX.checked_shl(32 - u32::from(prefix.min(32))).unwrap_or(0);
    Ipv4Addr::from_bits(address.to_bits() & mask)
}

impl FromStr for EgressRule {
    type Err = IsolationError;

    fn from_str(text: &str) -> Result<Self, IsolationError> {
        let wrong = || IsolationError::Egress(text.to_owned());
        let (rest, protocol) = match text.rsplit_once('/') {
            Some((rest, "tcp")) => (rest, Some(Protocol::Tcp)),
            Some((rest, "udp")) => (rest, Some(Protocol::Udp)),
            _ => (text, None),
        };
        let (network, ports) = match rest.split_once(':') {
            None => (rest, None),
            Some((network, ports)) => {
                let (first, last) = ports.split_once('-').unwrap_or((ports, ports));
                (network, Some((first.parse().map_err(|_| wrong())?, last.parse().map_err(|_| wrong())?)))
            }
        };
        let (address, prefix) = network.split_once('/').unwrap_or((network, "32"));
        let address: Ipv4Addr = address.parse().map_err(|_| wrong())?;
        let prefix: u8 = prefix.parse().ok().filter(|prefix| *prefix <= 32).ok_or_else(wrong)?;
        let meant = masked(address, prefix);
        if meant != address {
            return Err(IsolationError::EgressBits { text: text.to_owned(), meant: format!("{meant}/{prefix}") });
        }
        Self::new(address, prefix, ports, protocol).ok_or_else(wrong)
    }
}

impl fmt::Display for EgressRule {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.address, self.prefix)?;
        match self.ports {
            None => {}
            Some((first, last)) if first == last => write!(f, ":{first}")?,
            Some((first, last)) => write!(f, ":{first}-{last}")?,
        }
        match self.protocol {
            None => Ok(()),
            Some(Protocol::Tcp) => f.write_str("/tcp"),
            Some(Protocol::Udp) => f.write_str("/udp"),
        }
    }
}

macro_rules! by_text {
    ($($type:ty),*) => {$(
        impl TryFrom<String> for $type {
            type Error = IsolationError;

            fn try_from(text: String) -> Result<Self, IsolationError> {
                text.parse()
            }
        }

        impl From<$type> for String {
            fn from(value: $type) -> Self {
                value.to_string()
            }
        }
    )*};
}

by_text!(Cpus, TmpfsMount, EgressRule);

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn processors() {
        let milli = |text: &str| text.parse::<Cpus>().unwrap().milli();
        assert_eq!((milli("0.5"), milli("2"), milli("1.25"), milli("0.01"), milli("16.125")), (500, 2000, 1250, 10, 16_125));
        for wrong in ["", "0", "0.001", "-1", "1.", ".5", "1e3", "1.2345", "many", "+1", "1000000"] {
            assert!(wrong.parse::<Cpus>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn file_systems_in_memory() {
        let mount: TmpfsMount = "/var//tmp/./x/:64M".parse().unwrap();
        assert_eq!(
            (mount.path(), mount.size(), mount.to_string().as_str()),
            ("/var/tmp/x", "64M".parse().ok(), "/var/tmp/x:64M")
        );
        assert_eq!("/tmp".parse::<TmpfsMount>().unwrap().size(), None);
        assert_eq!("/dev/shm:1G".parse::<TmpfsMount>().unwrap().path(), "/dev/shm");
        assert_eq!("/device".parse::<TmpfsMount>().unwrap().path(), "/device");
        for wrong in ["", "/", "tmp", "/a/../b", "/tmp:", "/tmp:much", "/tmp:0", "/dev", "/dev/x", "/proc/1:1M", "/./sys/"] {
            assert!(wrong.parse::<TmpfsMount>().is_err(), "{wrong}");
        }
        let twice = Isolation { tmpfs: vec!["/a".parse().unwrap(), "/a/:1M".parse().unwrap()], ..Isolation::default() };
        assert_eq!(twice.check(), Err(IsolationError::TmpfsTwice("/a".to_owned())));
    }

    #[test]
    fn rules() {
        for (text, shown) in [
            ("10.0.0.0/8", "10.0.0.0/8"),
            ("10.1.2.3:5432", "10.1.2.3/32:5432"),
            ("0.0.0.0/0:80-90/udp", "0.0.0.0/0:80-90/udp"),
            ("192.168.1.0/24/tcp", "192.168.1.0/24/tcp"),
        ] {
            assert_eq!(text.parse::<EgressRule>().unwrap().to_string(), shown);
        }
        for wrong in [
            "",
            "10.0.0.0/33",
            "10.0.0.0/8:0",
            "10.0.0.0/8:9-8",
            "::1",
            "10.0.0.0/8/sctp",
            "host",
            "10.0.0.1/8",
            "1.2.3.4:70000",
        ] {
            assert!(wrong.parse::<EgressRule>().is_err(), "{wrong}");
        }
    }

    #[test]
    fn limits_have_bounds() {
        Limits::default().check().unwrap();
        Limits { memory: "16T".parse().unwrap(), ..Limits::default() }.check().unwrap();
        let refused = |change: fn(&mut Limits)| {
            let mut limits = Limits::default();
            change(&mut limits);
            assert!(limits.check().is_err(), "{limits:?}");
        };
        refused(|limits| limits.memory = ByteSize::bytes(1));
        refused(|limits| limits.memory = "99999G".parse().unwrap());
        refused(|limits| limits.writable = "17T".parse().ok());
        refused(|limits| limits.cpu_weight = 0);
        refused(|limits| limits.cpu_weight = 10_001);
        refused(|limits| limits.pids = 1);
        refused(|limits| limits.writable = Some(ByteSize::bytes(4096)));
        refused(|limits| limits.open_files = 3);
    }

    #[test]
    fn what_was_stored_before_has_the_defaults() {
        let limits: Limits = serde_json::from_str(r#"{"memory":67108864}"#).unwrap();
        assert_eq!(limits, Limits { memory: ByteSize::mebibytes(64), ..Limits::default() });
        assert_eq!(serde_json::from_str::<Isolation>("{}").unwrap(), Isolation::default());
    }

    proptest! {
        #[test]
        fn texts_round_trip(milli in 10_u32..10_000_000, address: u32, prefix in 0_u8..=32, ports: Option<(u16, u16)>, number in 0..3) {
            let cpus = Cpus::from_milli(milli).unwrap();
            prop_assert_eq!(cpus.to_string().parse::<Cpus>(), Ok(cpus));
            let protocol = [None, Some(Protocol::Tcp), Some(Protocol::Udp)][number as usize];
            if let Some(rule) = EgressRule::new(masked(Ipv4Addr::from_bits(address), prefix), prefix, ports, protocol) {
                prop_assert_eq!(rule.to_string().parse::<EgressRule>(), Ok(rule));
            }
        }

        #[test]
        fn no_text_panics(text in ".{0,30}") {
            let _ = (text.parse::<Cpus>(), text.parse::<TmpfsMount>(), text.parse::<EgressRule>());
        }
    }
}

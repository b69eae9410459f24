//! The protocol between the keeper and its zygotes: fixed datagrams over one seqpacket pair per zygote.
//!
//! ```text
//! kind u8 │ zero u8 × 3 │ value i32 │ instance or command 16 bytes │ of the failures: text, at most 96 bytes
//!                                                                  │ of Exited: memory u64 │ processor time u64 │ full u8
//! ```
//! Networks have numbers, the keeper's to give, from 1 on. Descriptors of `SetUp`: the views of what instances' cgroups are made in, then of the
//! seat, if zygotes have one. Of `Spawn`: root file system, init pair, stdin where it is given, stdout, stderr, then the entrance to the cgroups.
//! `MoreSockets`: the pair.
//! `Exec`: a sealed memory file with the `Exec` request, the command's pair, its three streams unless it has a terminal, the namespaces of
//! [`NAMESPACES`], then the entrance. The entrance is the directory of the cgroup to be born in (value 1), or the doors of the cgroups to enter
//! (value 0); `Spawn` adds twice the network's number to the value. `Spawned`: the init's pidfd. `Network`: its handle, then a socket of
//! rtnetlink(7) that was made in it. The others carry none. Both sides are one process image, yet the keeper checks what it reads: a zygote
//! shares a kernel with what it started.

use funtainer_model::{ExecId, InstanceId};
use rustix::thread::LinkNameSpaceType;

/// The namespaces of an instance in the order in which a command enters them, by their names in `/proc/PID/ns`.
pub(crate) const NAMESPACES: [(&str, LinkNameSpaceType); 6] = [
    ("net", LinkNameSpaceType::Network),
    ("ipc", LinkNameSpaceType::InterProcessCommunication),
    ("uts", LinkNameSpaceType::HostNameAndNISDomainName),
    ("cgroup", LinkNameSpaceType::ControlGroup),
    ("pid", LinkNameSpaceType::ProcessID),
    ("mnt", LinkNameSpaceType::Mount),
];

/// Bytes of a datagram without a text.
pub(crate) const FIXED_BYTES: usize = 24;
/// Longest text.
pub(crate) const TEXT_BYTES: usize = 96;
/// Longest datagram.
pub(crate) const DATAGRAM_BYTES: usize = FIXED_BYTES + TEXT_BYTES;

/// From the keeper.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Order {
    /// The id maps are written: set up.
    SetUp,
    /// Start an instance.
    Spawn {
        /// Which.
        instance: InstanceId,
        /// Whether it is born in its cgroup; else it enters it.
        born: bool,
        /// The network that was made ahead for it; 0 for one that leads nowhere. Below 2^30.
        network: u32,
    },
    /// Make sockets in an instance's network.
    MoreSockets(InstanceId),
    /// Make a network ahead.
    MakeNetwork(u32),
    /// It is not used any more, or never will be.
    DropNetwork(u32),
    /// Start a command in an instance.
    Exec {
        /// Which.
        instance: InstanceId,
        /// Whether it is born in the instance's cgroup; else it enters it.
        born: bool,
    },
    /// Send a signal to a command.
    SignalExec { exec: ExecId, signal: i32 },
}

/// From a zygote.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Report {
    /// It can start instances.
    Ready,
    /// It cannot, and ends.
    SetUpFailed { errno: i32, step: String },
    /// The init lives; its pidfd comes with this.
    Spawned(InstanceId),
    /// There is no init; what came with the order is closed.
    SpawnFailed { instance: InstanceId, errno: i32, step: String },
    /// The init is reaped.
    Exited { instance: InstanceId, end: End },
    /// The sockets are sent, or could not be made (errno).
    Sockets { instance: InstanceId, errno: i32 },
    /// The network is there, with nothing but `lo`.
    Network(u32),
    /// It is not.
    NetworkFailed { network: u32, errno: i32, step: String },
    /// A command is on its way into its instance.
    ExecSpawned(ExecId),
    /// It is not; what came with the order is closed.
    ExecNotSpawned { exec: ExecId, errno: i32, step: String },
    /// The signal is sent (0), or why not: ESRCH for a command that does not run, or does not run yet.
    ExecSignalled { exec: ExecId, errno: i32 },
    /// A command is reaped, with its wait status.
    ExecEnded { exec: ExecId, status: i32 },
    /// There never was a process that could become the command.
    ExecLost(ExecId),
}

/// What a zygote knows of the end of an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct End {
    /// The wait status of its main process.
    pub(crate) status: i32,
    /// Most memory that one of its processes had at once, in bytes; those that were reaped within it (getrusage(2), `ru_maxrss`).
    pub(crate) memory_bytes: u64,
    /// Processor time of these processes together in microseconds.
    pub(crate) cpu_us: u64,
    /// Whether its writable layer had no room left.
    pub(crate) full: bool,
}

impl End {
    const BYTES: usize = 17;

    fn encode(self) -> [u8; Self::BYTES] {
        let mut bytes = [0; Self::BYTES];
        bytes[..8].copy_from_slice(&self.memory_bytes.to_le_bytes());
        bytes[8..16].copy_from_slice(&self.cpu_us.to_le_bytes());
        bytes[16] = self.full.into();
        bytes
    }

    fn decode(status: i32, bytes: &[u8]) -> Option<Self> {
        let bytes: &[u8; Self::BYTES] = bytes.try_into().ok()?;
        let number = |at: usize| Some(u64::from_le_bytes(bytes[at..at + 8].try_into().ok()?));
        let full = match bytes[16] {
            0 => false,
            1 => true,
            _ => return None,
        };
        Some(Self { status, memory_bytes: number(0)?, cpu_us: number(8)?, full })
    }
}

/// A datagram with its length.
pub(crate) struct Datagram {
    bytes: [u8; DATAGRAM_BYTES],
    length: usize,
}

impl Datagram {
    fn new(kind: u8, value: i32, id: [u8; 16], text: &str) -> Self {
        // The texts are our own, in ASCII.
        Self::with(kind, value, id, &text.as_bytes()[..text.len().min(TEXT_BYTES)])
    }

    fn with(kind: u8, value: i32, id: [u8; 16], tail: &[u8]) -> Self {
        let mut bytes = [0; DATAGRAM_BYTES];
        bytes[0] = kind;
        bytes[4..8].copy_from_slice(&value.to_le_bytes());
        bytes[8..FIXED_BYTES].copy_from_slice(&id);
        bytes[FIXED_BYTES..FIXED_BYTES + tail.len()].copy_from_slice(tail);
        Self { bytes, length: FIXED_BYTES + tail.len() }
    }

    pub(crate) fn as_bytes(&self) -> &[u8] {
        &self.bytes[..self.length]
    }
}

/// The fields of a datagram.
struct Fields<'a> {
    kind: u8,
    value: i32,
    id: [u8; 16],
    tail: &'a [u8],
}

impl<'a> Fields<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (fixed, tail) = bytes.split_first_chunk::<FIXED_BYTES>()?;
        let [kind, 0, 0, 0, v0, v1, v2, v3, id @ ..] = *fixed else { return None };
        (tail.len() <= TEXT_BYTES).then_some(Self { kind, value: i32::from_le_bytes([v0, v1, v2, v3]), id, tail })
    }
}

/// The id of what concerns neither an instance nor a command.
const NOBODY: [u8; 16] = [0; 16];

impl Order {
    /// Whether a report answers it.
    pub(crate) const fn is_answered(self) -> bool {
        !matches!(self, Self::DropNetwork(_))
    }

    pub(crate) fn encode(self) -> Datagram {
        match self {
            Self::SetUp => Datagram::new(1, 0, NOBODY, ""),
            Self::Spawn { instance, born, network } => {
                Datagram::new(2, (network << 1 | u32::from(born)).cast_signed(), instance.to_bytes(), "")
            }
            Self::MoreSockets(instance) => Datagram::new(3, 0, instance.to_bytes(), ""),
            Self::Exec { instance, born } => Datagram::new(4, born.into(), instance.to_bytes(), ""),
            Self::SignalExec { exec, signal } => Datagram::new(5, signal, exec.to_bytes(), ""),
            Self::MakeNetwork(network) => Datagram::new(8, network.cast_signed(), NOBODY, ""),
            Self::DropNetwork(network) => Datagram::new(9, network.cast_signed(), NOBODY, ""),
        }
    }

    /// `None` for what is no order.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let Fields { kind, value, id, tail: b"" } = Fields::parse(bytes)? else { return None };
        let (instance, number) = (InstanceId::from_bytes(id), value.cast_unsigned());
        let order = match kind {
            1 => Self::SetUp,
            2 => Self::Spawn { instance, born: number & 1 == 1, network: number >> 1 },
            3 => Self::MoreSockets(instance),
            4 => Self::Exec { instance, born: value == 1 },
            5 => Self::SignalExec { exec: ExecId::from_bytes(id), signal: value },
            8 => Self::MakeNetwork(number),
            9 => Self::DropNetwork(number),
            _ => return None,
        };
        // One order has one form: what a kind has no use for is zero.
        (order.encode().as_bytes() == bytes).then_some(order)
    }
}

impl Report {
    pub(crate) fn encode(&self) -> Datagram {
        match self {
            Self::Ready => Datagram::new(17, 0, NOBODY, ""),
            Self::SetUpFailed { errno, step } => Datagram::new(18, *errno, NOBODY, step),
            Self::Spawned(instance) => Datagram::new(19, 0, instance.to_bytes(), ""),
            Self::SpawnFailed { instance, errno, step } => Datagram::new(20, *errno, instance.to_bytes(), step),
            Self::Exited { instance, end } => Datagram::with(21, end.status, instance.to_bytes(), &end.encode()),
            Self::Sockets { instance, errno } => Datagram::new(22, *errno, instance.to_bytes(), ""),
            Self::ExecSpawned(exec) => Datagram::new(23, 0, exec.to_bytes(), ""),
            Self::ExecNotSpawned { exec, errno, step } => Datagram::new(24, *errno, exec.to_bytes(), step),
            Self::ExecSignalled { exec, errno } => Datagram::new(25, *errno, exec.to_bytes(), ""),
            Self::ExecEnded { exec, status } => Datagram::new(26, *status, exec.to_bytes(), ""),
            Self::ExecLost(exec) => Datagram::new(27, 0, exec.to_bytes(), ""),
            Self::Network(network) => Datagram::new(28, network.cast_signed(), NOBODY, ""),
            Self::NetworkFailed { network, errno, step } => {
                // The place of an id has the errno: a failure is nobody's.
                let mut place = NOBODY;
                place[..4].copy_from_slice(&errno.to_le_bytes());
                Datagram::new(29, network.cast_signed(), place, step)
            }
        }
    }

    /// How many descriptors it carries.
    const fn descriptors(&self) -> usize {
        match self {
            Self::Spawned(_) => 1,
            Self::Network(_) => 2,
            _ => 0,
        }
    }

    /// Whether it answers an order; the others come by themselves.
    pub(crate) fn is_answer(&self) -> bool {
        !matches!(self, Self::Exited { .. } | Self::ExecEnded { .. } | Self::ExecLost(_))
    }

    /// `None` for what is no report, or comes with another number of descriptors than belongs to it.
    pub(crate) fn decode(bytes: &[u8], descriptors: usize) -> Option<Self> {
        let Fields { kind, value, id, tail } = Fields::parse(bytes)?;
        let text = || std::str::from_utf8(tail).ok().map(ToOwned::to_owned);
        let (instance, exec) = (InstanceId::from_bytes(id), ExecId::from_bytes(id));
        let report = match kind {
            17 => Self::Ready,
            18 => Self::SetUpFailed { errno: value, step: text()? },
            19 => Self::Spawned(instance),
            20 => Self::SpawnFailed { instance, errno: value, step: text()? },
            21 => Self::Exited { instance, end: End::decode(value, tail)? },
            22 => Self::Sockets { instance, errno: value },
            28 => Self::Network(value.cast_unsigned()),
            29 => {
                let [e0, e1, e2, e3, ..] = id;
                let errno = i32::from_le_bytes([e0, e1, e2, e3]);
                Self::NetworkFailed { network: value.cast_unsigned(), errno, step: text()? }
            }
            23 => Self::ExecSpawned(exec),
            24 => Self::ExecNotSpawned { exec, errno: value, step: text()? },
            25 => Self::ExecSignalled { exec, errno: value },
            26 => Self::ExecEnded { exec, status: value },
            27 => Self::ExecLost(exec),
            _ => return None,
        };
        let expected = report.descriptors();
        // One report has one form: what a kind has no use for is zero.
        (descriptors == expected && report.encode().as_bytes() == bytes).then_some(report)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn instance() -> impl Strategy<Value = InstanceId> {
        any::<[u8; 16]>().prop_map(InstanceId::from_bytes)
    }

    fn exec() -> impl Strategy<Value = ExecId> {
        any::<[u8; 16]>().prop_map(ExecId::from_bytes)
    }

    fn end() -> impl Strategy<Value = End> {
        any::<(i32, u64, u64, bool)>().prop_map(|(status, memory_bytes, cpu_us, full)| End {
            status,
            memory_bytes,
            cpu_us,
            full,
        })
    }

    fn report() -> impl Strategy<Value = Report> {
        let step = "[a-z ]{0,96}";
        prop_oneof![
            Just(Report::Ready),
            (any::<i32>(), step).prop_map(|(errno, step)| Report::SetUpFailed { errno, step }),
            instance().prop_map(Report::Spawned),
            (instance(), any::<i32>(), step).prop_map(|(instance, errno, step)| Report::SpawnFailed { instance, errno, step }),
            (instance(), end()).prop_map(|(instance, end)| Report::Exited { instance, end }),
            (instance(), any::<i32>()).prop_map(|(instance, errno)| Report::Sockets { instance, errno }),
            any::<u32>().prop_map(Report::Network),
            (any::<u32>(), any::<i32>(), step).prop_map(|(network, errno, step)| Report::NetworkFailed {
                network,
                errno,
                step
            }),
            exec().prop_map(Report::ExecSpawned),
            (exec(), any::<i32>(), step).prop_map(|(exec, errno, step)| Report::ExecNotSpawned { exec, errno, step }),
            (exec(), any::<i32>()).prop_map(|(exec, errno)| Report::ExecSignalled { exec, errno }),
            (exec(), any::<i32>()).prop_map(|(exec, status)| Report::ExecEnded { exec, status }),
            exec().prop_map(Report::ExecLost),
        ]
    }

    proptest! {
        #[test]
        fn reports_round_trip(report in report()) {
            let fds = report.descriptors();
            let datagram = report.encode();
            prop_assert_eq!(Report::decode(datagram.as_bytes(), fds), Some(report.clone()));
            prop_assert_eq!(Report::decode(datagram.as_bytes(), fds + 1), None);
        }

        #[test]
        fn orders_round_trip(
            instance in instance(),
            exec in exec(),
            signal in any::<i32>(),
            born in any::<bool>(),
            network in 0_u32..1 << 30,
        ) {
            for order in [
                Order::SetUp,
                Order::Spawn { instance, born, network },
                Order::MoreSockets(instance),
                Order::Exec { instance, born },
                Order::SignalExec { exec, signal },
                Order::MakeNetwork(network),
                Order::DropNetwork(network),
            ] {
                prop_assert_eq!(Order::decode(order.encode().as_bytes()), Some(order));
            }
        }

        #[test]
        fn what_is_read_is_what_would_be_written(bytes in proptest::collection::vec(any::<u8>(), 0..160), kind in 15_u8..32) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            for descriptors in 0..3 {
                if let Some(report) = Report::decode(&bytes, descriptors) {
                    let datagram = report.encode();
                    prop_assert_eq!(datagram.as_bytes(), &bytes[..]);
                }
            }
        }
    }
}

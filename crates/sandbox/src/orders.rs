//! The protocol between the keeper and its zygotes: fixed datagrams over one seqpacket pair per zygote.
//!
//! ```text
//! kind u8 │ zero u8 × 3 │ value i32 │ instance or command 16 bytes │ text (of the failures only, at most 96 bytes)
//! ```
//! Descriptors of `Spawn`: root file system, init pair, stdin where it is given, stdout, stderr, then the doors of the cgroups. `MoreSockets`: the pair.
//! `Exec`: a sealed memory file with the `Exec` request, the command's pair, its three streams unless it has a terminal, the namespaces of
//! [`NAMESPACES`], then the doors of the cgroups. `Spawned`: the init's pidfd. The others carry none. Both sides are one process image, yet the keeper checks what it reads: a zygote
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
    Spawn(InstanceId),
    /// Make sockets in an instance's network.
    MoreSockets(InstanceId),
    /// Start a command in this instance.
    Exec(InstanceId),
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
    /// The init is reaped, with the wait status of its main process.
    Exited { instance: InstanceId, status: i32 },
    /// The sockets are sent, or could not be made (errno).
    Sockets { instance: InstanceId, errno: i32 },
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

/// A datagram with its length.
pub(crate) struct Datagram {
    bytes: [u8; DATAGRAM_BYTES],
    length: usize,
}

impl Datagram {
    fn new(kind: u8, value: i32, id: [u8; 16], text: &str) -> Self {
        let mut bytes = [0; DATAGRAM_BYTES];
        bytes[0] = kind;
        bytes[4..8].copy_from_slice(&value.to_le_bytes());
        bytes[8..FIXED_BYTES].copy_from_slice(&id);
        // The texts are our own, in ASCII.
        let text = &text.as_bytes()[..text.len().min(TEXT_BYTES)];
        bytes[FIXED_BYTES..FIXED_BYTES + text.len()].copy_from_slice(text);
        Self { bytes, length: FIXED_BYTES + text.len() }
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
    text: &'a str,
}

impl<'a> Fields<'a> {
    fn parse(bytes: &'a [u8]) -> Option<Self> {
        let (fixed, text) = bytes.split_first_chunk::<FIXED_BYTES>()?;
        let [kind, 0, 0, 0, v0, v1, v2, v3, id @ ..] = *fixed else { return None };
        let text = std::str::from_utf8(text).ok().filter(|text| text.len() <= TEXT_BYTES)?;
        Some(Self { kind, value: i32::from_le_bytes([v0, v1, v2, v3]), id, text })
    }
}

/// The id of what concerns neither an instance nor a command.
const NOBODY: [u8; 16] = [0; 16];

impl Order {
    pub(crate) fn encode(self) -> Datagram {
        match self {
            Self::SetUp => Datagram::new(1, 0, NOBODY, ""),
            Self::Spawn(instance) => Datagram::new(2, 0, instance.to_bytes(), ""),
            Self::MoreSockets(instance) => Datagram::new(3, 0, instance.to_bytes(), ""),
            Self::Exec(instance) => Datagram::new(4, 0, instance.to_bytes(), ""),
            Self::SignalExec { exec, signal } => Datagram::new(5, signal, exec.to_bytes(), ""),
        }
    }

    /// `None` for what is no order.
    pub(crate) fn decode(bytes: &[u8]) -> Option<Self> {
        let Fields { kind, value, id, text: "" } = Fields::parse(bytes)? else { return None };
        let instance = InstanceId::from_bytes(id);
        match (kind, value) {
            (1, 0) => Some(Self::SetUp),
            (2, 0) => Some(Self::Spawn(instance)),
            (3, 0) => Some(Self::MoreSockets(instance)),
            (4, 0) => Some(Self::Exec(instance)),
            (5, signal) => Some(Self::SignalExec { exec: ExecId::from_bytes(id), signal }),
            _ => None,
        }
    }
}

impl Report {
    pub(crate) fn encode(&self) -> Datagram {
        match self {
            Self::Ready => Datagram::new(17, 0, NOBODY, ""),
            Self::SetUpFailed { errno, step } => Datagram::new(18, *errno, NOBODY, step),
            Self::Spawned(instance) => Datagram::new(19, 0, instance.to_bytes(), ""),
            Self::SpawnFailed { instance, errno, step } => Datagram::new(20, *errno, instance.to_bytes(), step),
            Self::Exited { instance, status } => Datagram::new(21, *status, instance.to_bytes(), ""),
            Self::Sockets { instance, errno } => Datagram::new(22, *errno, instance.to_bytes(), ""),
            Self::ExecSpawned(exec) => Datagram::new(23, 0, exec.to_bytes(), ""),
            Self::ExecNotSpawned { exec, errno, step } => Datagram::new(24, *errno, exec.to_bytes(), step),
            Self::ExecSignalled { exec, errno } => Datagram::new(25, *errno, exec.to_bytes(), ""),
            Self::ExecEnded { exec, status } => Datagram::new(26, *status, exec.to_bytes(), ""),
            Self::ExecLost(exec) => Datagram::new(27, 0, exec.to_bytes(), ""),
        }
    }

    /// Whether it answers an order; the others come by themselves.
    pub(crate) fn is_answer(&self) -> bool {
        !matches!(self, Self::Exited { .. } | Self::ExecEnded { .. } | Self::ExecLost(_))
    }

    /// `None` for what is no report, or comes with another number of descriptors than belongs to it.
    pub(crate) fn decode(bytes: &[u8], descriptors: usize) -> Option<Self> {
        let Fields { kind, value, id, text } = Fields::parse(bytes)?;
        let (instance, exec) = (InstanceId::from_bytes(id), ExecId::from_bytes(id));
        let report = match kind {
            17 => Self::Ready,
            18 => Self::SetUpFailed { errno: value, step: text.to_owned() },
            19 => Self::Spawned(instance),
            20 => Self::SpawnFailed { instance, errno: value, step: text.to_owned() },
            21 => Self::Exited { instance, status: value },
            22 => Self::Sockets { instance, errno: value },
            23 => Self::ExecSpawned(exec),
            24 => Self::ExecNotSpawned { exec, errno: value, step: text.to_owned() },
            25 => Self::ExecSignalled { exec, errno: value },
            26 => Self::ExecEnded { exec, status: value },
            27 => Self::ExecLost(exec),
            _ => return None,
        };
        let expected = usize::from(matches!(report, Self::Spawned(_)));
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

    fn report() -> impl Strategy<Value = Report> {
        let step = "[a-z ]{0,96}";
        prop_oneof![
            Just(Report::Ready),
            (any::<i32>(), step).prop_map(|(errno, step)| Report::SetUpFailed { errno, step }),
            instance().prop_map(Report::Spawned),
            (instance(), any::<i32>(), step).prop_map(|(instance, errno, step)| Report::SpawnFailed { instance, errno, step }),
            (instance(), any::<i32>()).prop_map(|(instance, status)| Report::Exited { instance, status }),
            (instance(), any::<i32>()).prop_map(|(instance, errno)| Report::Sockets { instance, errno }),
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
            let fds = usize::from(matches!(report, Report::Spawned(_)));
            let datagram = report.encode();
            prop_assert_eq!(Report::decode(datagram.as_bytes(), fds), Some(report.clone()));
            prop_assert_eq!(Report::decode(datagram.as_bytes(), fds + 1), None);
        }

        #[test]
        fn orders_round_trip(instance in instance(), exec in exec(), signal in any::<i32>()) {
            let signal = Order::SignalExec { exec, signal };
            for order in [Order::SetUp, Order::Spawn(instance), Order::MoreSockets(instance), Order::Exec(instance), signal] {
                prop_assert_eq!(Order::decode(order.encode().as_bytes()), Some(order));
            }
        }

        #[test]
        fn what_is_read_is_what_would_be_written(bytes in proptest::collection::vec(any::<u8>(), 0..160), kind in 15_u8..30) {
            let mut bytes = bytes;
            if let Some(first) = bytes.first_mut() {
                *first = kind;
            }
            for descriptors in 0..2 {
                if let Some(report) = Report::decode(&bytes, descriptors) {
                    let datagram = report.encode();
                    prop_assert_eq!(datagram.as_bytes(), &bytes[..]);
                }
            }
        }
    }
}

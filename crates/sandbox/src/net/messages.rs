//! The words between the keeper and `funtainer net`: fixed datagrams over one seqpacket pair.
//!
//! ```text
//! kind u8 │ zero u8 × 3 │ number u32 │ what the kind has besides
//! ```
//! Integers are little-endian, addresses as they are written. Descriptors of `Plug`: the network namespace, then a socket of rtnetlink(7)
//! that was made in it. The others carry none. Numbers of networks and policies are the keeper's to give, from 1 on.

use std::net::Ipv4Addr;

use funtainer_model::{EgressRule, Protocol};

use super::firewall::Policy;
use super::range::Range;

/// Longest text.
pub(crate) const TEXT_BYTES: usize = 400;
/// Longest datagram: the rules of a policy, or a text, with what stands before.
pub(crate) const DATAGRAM_BYTES: usize = 1024;
/// Most name servers of a network, as in resolv.conf(5).
pub(crate) const RESOLVERS_MAX: usize = 3;
/// Most rules of a policy.
const RULES_MAX: usize = 64;
/// Address, prefix, protocol, first and last port.
const RULE_BYTES: usize = 10;

/// What a network is to have.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Plug {
    /// Number of the network.
    pub(crate) network: u32,
    /// Number of its policy; `None` for what holds where nothing is said.
    pub(crate) policy: Option<u32>,
    /// Name servers that it may ask; at most [`RESOLVERS_MAX`].
    pub(crate) resolvers: Vec<Ipv4Addr>,
}

/// From the keeper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Order {
    /// A network has this address: a former process gave it.
    Adopt { plug: Plug, address: Ipv4Addr },
    /// What revisions may reach that have more, or less, than the rest.
    AddPolicy { number: u32, policy: Policy },
    /// No network has it any more.
    RemovePolicy(u32),
    /// All that there was has been told: set up.
    SetUp,
    /// Connect a network.
    Plug(Plug),
    /// A network is over.
    Unplug(u32),
}

/// From the process.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Report {
    /// Networks can be connected; their addresses are in this range.
    Ready(Range),
    /// They cannot, and the process ends. What is lacking.
    Unavailable(String),
    /// The range that was asked for collides with something.
    RangeTaken(String),
    /// The network leads out; this is its address.
    Plugged { network: u32, address: Ipv4Addr },
    /// It does not.
    PlugFailed { network: u32, errno: i32, step: String },
}

/// Bytes of a datagram in the making.
struct Writer(Vec<u8>);

impl Writer {
    fn new(kind: u8, number: u32) -> Self {
        let mut bytes = Vec::with_capacity(64);
        bytes.extend_from_slice(&[kind, 0, 0, 0]);
        bytes.extend_from_slice(&number.to_le_bytes());
        Self(bytes)
    }

    fn put(mut self, bytes: &[u8]) -> Self {
        self.0.extend_from_slice(bytes);
        self
    }

    fn plug(self, plug: &Plug) -> Self {
        let resolvers = &plug.resolvers[..plug.resolvers.len().min(RESOLVERS_MAX)];
        let mut all = self.put(&plug.policy.unwrap_or(0).to_le_bytes());
        for resolver in resolvers {
            all = all.put(&resolver.octets());
        }
        all
    }

    fn text(self, text: &str) -> Self {
        let mut end = text.len().min(TEXT_BYTES);
        while !text.is_char_boundary(end) {
            end -= 1;
        }
        self.put(&text.as_bytes()[..end])
    }
}

/// What is left to read of a datagram.
struct Reader<'a>(&'a [u8]);

impl Reader<'_> {
    fn array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let (taken, rest) = self.0.split_first_chunk()?;
        self.0 = rest;
        Some(*taken)
    }

    fn number(&mut self) -> Option<u32> {
        self.array().map(u32::from_le_bytes)
    }

    fn address(&mut self) -> Option<Ipv4Addr> {
        self.array().map(|octets: [u8; 4]| Ipv4Addr::from(octets))
    }

    fn plug(&mut self, network: u32) -> Option<Plug> {
        let policy = Some(self.number()?).filter(|policy| *policy != 0);
        let mut resolvers = Vec::new();
        while !self.0.is_empty() {
            resolvers.push(self.address()?);
        }
        (network != 0 && resolvers.len() <= RESOLVERS_MAX).then_some(Plug { network, policy, resolvers })
    }

    fn policy(&mut self) -> Option<Policy> {
        let [only] = self.array().filter(|[only]: &[u8; 1]| *only <= 1)?;
        let mut rules = Vec::new();
        while !self.0.is_empty() {
            let [a, b, c, d, prefix, protocol, f0, f1, l0, l1] = self.array::<RULE_BYTES>()?;
            let protocol = match protocol {
                0 => None,
                6 => Some(Protocol::Tcp),
                17 => Some(Protocol::Udp),
                _ => return None,
            };
            let ports = (u16::from_le_bytes([f0, f1]), u16::from_le_bytes([l0, l1]));
            let ports = if ports == (0, 0) { None } else { Some(ports) };
            rules.push(EgressRule::new(Ipv4Addr::new(a, b, c, d), prefix, ports, protocol)?);
        }
        (rules.len() <= RULES_MAX).then_some(Policy { rules, only: only == 1 })
    }

    fn text(&mut self) -> Option<String> {
        let text = std::str::from_utf8(std::mem::take(&mut self.0)).ok()?;
        (text.len() <= TEXT_BYTES).then(|| text.to_owned())
    }
}

fn put_policy(mut writer: Writer, policy: &Policy) -> Writer {
    writer = writer.put(&[policy.only.into()]);
    for rule in &policy.rules {
        let protocol = match rule.protocol() {
            None => 0,
            Some(Protocol::Tcp) => 6,
            Some(Protocol::Udp) => 17,
        };
        let (first, last) = rule.ports().unwrap_or((0, 0));
        writer = writer.put(&rule.address().octets()).put(&[rule.prefix(), protocol]);
        writer = writer.put(&first.to_le_bytes()).put(&last.to_le_bytes());
    }
    writer
}

/// Kind, number and rest of a datagram.
fn split(bytes: &[u8]) -> Option<(u8, u32, Reader<'_>)> {
    let (fixed, rest) = bytes.split_first_chunk::<8>()?;
    let [kind, 0, 0, 0, n0, n1, n2, n3] = *fixed else { return None };
    Some((kind, u32::from_le_bytes([n0, n1, n2, n3]), Reader(rest)))
}

impl Order {
    /// How many descriptors it carries.
    pub(crate) fn descriptors(&self) -> usize {
        if matches!(self, Self::Plug(_)) { 2 } else { 0 }
    }

    pub(crate) fn encode(&self) -> Vec<u8> {
        let writer = match self {
            Self::Adopt { plug, address } => Writer::new(1, plug.network).put(&address.octets()).plug(plug),
            Self::AddPolicy { number, policy } => put_policy(Writer::new(2, *number), policy),
            Self::RemovePolicy(number) => Writer::new(3, *number),
            Self::SetUp => Writer::new(4, 0),
            Self::Plug(plug) => Writer::new(5, plug.network).plug(plug),
            Self::Unplug(network) => Writer::new(6, *network),
        };
        writer.0
    }

    /// `None` for what is no order.
    pub(crate) fn decode(bytes: &[u8], descriptors: usize) -> Option<Self> {
        let (kind, number, mut rest) = split(bytes)?;
        let order = match kind {
            1 => {
                let address = rest.address()?;
                Self::Adopt { plug: rest.plug(number)?, address }
            }
            2 => Self::AddPolicy { number, policy: rest.policy()? },
            3 => Self::RemovePolicy(number),
            4 => Self::SetUp,
            5 => Self::Plug(rest.plug(number)?),
            6 => Self::Unplug(number),
            _ => return None,
        };
        // One order has one form.
        (order.descriptors() == descriptors && order.encode() == bytes).then_some(order)
    }
}

impl Report {
    pub(crate) fn encode(&self) -> Vec<u8> {
        let writer = match self {
            Self::Ready(range) => Writer::new(17, 0).put(&range.base().octets()).put(&[range.prefix()]),
            Self::Unavailable(text) => Writer::new(18, 0).text(text),
            Self::RangeTaken(text) => Writer::new(19, 0).text(text),
            Self::Plugged { network, address } => Writer::new(20, *network).put(&address.octets()),
            Self::PlugFailed { network, errno, step } => Writer::new(21, *network).put(&errno.to_le_bytes()).text(step),
        };
        writer.0
    }

    /// `None` for what is no report.
    pub(crate) fn decode(bytes: &[u8], descriptors: usize) -> Option<Self> {
        let (kind, network, mut rest) = split(bytes)?;
        let report = match kind {
            17 => {
                let address = rest.address()?;
                let [prefix] = rest.array()?;
                Self::Ready(format!("{address}/{prefix}").parse().ok()?)
            }
            18 => Self::Unavailable(rest.text()?),
            19 => Self::RangeTaken(rest.text()?),
            20 => Self::Plugged { network, address: rest.address()? },
            21 => {
                let errno = rest.array().map(i32::from_le_bytes)?;
                Self::PlugFailed { network, errno, step: rest.text()? }
            }
            _ => return None,
        };
        (descriptors == 0 && report.encode() == bytes).then_some(report)
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn address() -> impl Strategy<Value = Ipv4Addr> {
        any::<u32>().prop_map(Ipv4Addr::from_bits)
    }

    fn plug() -> impl Strategy<Value = Plug> {
        let policy = proptest::option::of(1..u32::MAX);
        let resolvers = proptest::collection::vec(address(), 0..=RESOLVERS_MAX);
        (1..u32::MAX, policy, resolvers).prop_map(|(network, policy, resolvers)| Plug { network, policy, resolvers })
    }

    fn rule() -> impl Strategy<Value = EgressRule> {
        let ports =
            proptest::option::of((1..=u16::MAX, 0..100_u16).prop_map(|(first, more)| (first, first.saturating_add(more))));
        let protocol = prop_oneof![Just(None), Just(Some(Protocol::Tcp)), Just(Some(Protocol::Udp))];
        (any::<u32>(), 0..=32_u8, ports, protocol).prop_map(|(bits, prefix, ports, protocol)| {
            let network = Range::network(Ipv4Addr::from_bits(bits), prefix);
            EgressRule::new(network.base(), prefix, ports, protocol).expect("a rule")
        })
    }

    fn order() -> impl Strategy<Value = Order> {
        let policy = (proptest::collection::vec(rule(), 0..=RULES_MAX), any::<bool>());
        prop_oneof![
            (plug(), address()).prop_map(|(plug, address)| Order::Adopt { plug, address }),
            (any::<u32>(), policy)
                .prop_map(|(number, (rules, only))| Order::AddPolicy { number, policy: Policy { rules, only } }),
            any::<u32>().prop_map(Order::RemovePolicy),
            Just(Order::SetUp),
            plug().prop_map(Order::Plug),
            any::<u32>().prop_map(Order::Unplug),
        ]
    }

    fn report() -> impl Strategy<Value = Report> {
        let text = ".{0,100}";
        prop_oneof![
            (0_u32..4096).prop_map(|part| Report::Ready(Range::network(Ipv4Addr::from_bits(0x0A00_0000 | part << 12), 20))),
            text.prop_map(Report::Unavailable),
            text.prop_map(Report::RangeTaken),
            (any::<u32>(), address()).prop_map(|(network, address)| Report::Plugged { network, address }),
            (any::<u32>(), any::<i32>(), text).prop_map(|(network, errno, step)| Report::PlugFailed { network, errno, step }),
        ]
    }

    proptest! {
        #[test]
        fn orders_round_trip(order in order()) {
            let bytes = order.encode();
            prop_assert!(bytes.len() <= DATAGRAM_BYTES);
            prop_assert_eq!(Order::decode(&bytes, order.descriptors()), Some(order.clone()));
            prop_assert_eq!(Order::decode(&bytes, order.descriptors() + 1), None);
        }

        #[test]
        fn reports_round_trip(report in report()) {
            let bytes = report.encode();
            prop_assert!(bytes.len() <= DATAGRAM_BYTES);
            prop_assert_eq!(Report::decode(&bytes, 0), Some(report.clone()));
            prop_assert_eq!(Report::decode(&bytes, 1), None);
        }

        #[test]
        fn what_is_read_is_what_would_be_written(bytes in proptest::collection::vec(any::<u8>(), 0..120), kind in 0_u8..24) {
            let mut bytes = bytes;
            if bytes.len() > 4 {
                bytes[..4].copy_from_slice(&[kind, 0, 0, 0]);
            }
            for descriptors in 0..3 {
                if let Some(order) = Order::decode(&bytes, descriptors) {
                    prop_assert_eq!(order.encode(), bytes.clone());
                }
                if let Some(report) = Report::decode(&bytes, descriptors) {
                    prop_assert_eq!(report.encode(), bytes.clone());
                }
            }
        }
    }

    #[test]
    fn long_texts_are_cut_between_letters() {
        let bytes = Report::Unavailable("é".repeat(TEXT_BYTES)).encode();
        let Some(Report::Unavailable(text)) = Report::decode(&bytes, 0) else { panic!("not read") };
        assert_eq!(text.len(), TEXT_BYTES);
    }
}

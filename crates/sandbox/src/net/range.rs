//! The addresses of instances: where they are taken from, and who has which.

use std::collections::{HashMap, HashSet};
use std::fmt;
use std::net::Ipv4Addr;
use std::str::FromStr;

/// Fewest addresses that a range may have: 62 for instances.
const PREFIX_MAX: u8 = 26;
/// Most: beyond that it is hardly private to this purpose.
const PREFIX_MIN: u8 = 8;
/// Size of the ranges that are tried where none is named: 4,094 instances and networks made ahead.
const TRIED_PREFIX: u8 = 20;
/// Where those are looked for, one after the other: private addresses (RFC 1918) that other software rarely takes, then those for
/// benchmarks (RFC 2544), which no network routes.
const TRIED: [Range; 3] = [
    Range { base: 0x0AD0_0000, prefix: 12 }, // 10.208.0.0/12
    Range { base: 0xAC1C_0000, prefix: 14 }, // 172.28.0.0/14
    Range { base: 0xC612_0000, prefix: 15 }, // 198.18.0.0/15
];

/// A range of IPv4 addresses.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub struct Range {
    base: u32,
    prefix: u8,
}

/// Why a text is no range for instances.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum RangeError {
    /// Not an address, a slash and a number.
    #[error("not a range such as 10.208.0.0/20")]
    Form,
    /// Too large or too small.
    #[error("a range has between /{PREFIX_MIN} and /{PREFIX_MAX}")]
    Size,
    /// The address has bits behind the prefix.
    #[error("the address has bits behind the prefix: did you mean {0}?")]
    Bits(Range),
    /// Loopback, link-local, multicast or reserved.
    #[error("addresses in it cannot be an instance's")]
    Special,
}

impl Range {
    /// Its first address.
    pub fn base(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(self.base)
    }

    /// How many bits its addresses have in common.
    pub fn prefix(self) -> u8 {
        self.prefix
    }

    /// Any network, special ones too; bits behind the prefix do not count.
    pub(super) fn network(address: Ipv4Addr, prefix: u8) -> Self {
        let prefix = prefix.min(32);
        Self { base: address.to_bits() & mask(prefix), prefix }
    }

    /// Those that are tried in turn where none is named.
    pub(super) fn candidates() -> impl Iterator<Item = Self> {
        TRIED.into_iter().flat_map(|within| {
            let step = 1 << (32 - TRIED_PREFIX);
            let bases = (within.base..=within.last()).step_by(step);
            bases.map(|base| Self { base, prefix: TRIED_PREFIX })
        })
    }

    pub(super) fn contains(self, address: Ipv4Addr) -> bool {
        address.to_bits() & mask(self.prefix) == self.base
    }

    pub(super) fn overlaps(self, other: Self) -> bool {
        let common = mask(self.prefix.min(other.prefix));
        self.base & common == other.base & common
    }

    /// The mask as an address.
    pub(super) fn mask(self) -> Ipv4Addr {
        Ipv4Addr::from_bits(mask(self.prefix))
    }

    fn last(self) -> u32 {
        self.base | !mask(self.prefix)
    }
}

fn mask(prefix: u8) -> u32 {
    u32::MAX.checked_shl(32 - u32::from(prefix)).unwrap_or(0)
}

impl fmt::Display for Range {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.base(), self.prefix)
    }
}

impl FromStr for Range {
    type Err = RangeError;

    fn from_str(text: &str) -> Result<Self, RangeError> {
        let (address, prefix) = text.split_once('/').ok_or(RangeError::Form)?;
        let address: Ipv4Addr = address.parse().map_err(|_| RangeError::Form)?;
        let prefix: u8 = prefix.parse().ok().filter(|prefix| *prefix <= 32).ok_or(RangeError::Form)?;
        if !(PREFIX_MIN..=PREFIX_MAX).contains(&prefix) {
            return Err(RangeError::Size);
        }
        let range = Self::network(address, prefix);
        if range.base() != address {
            return Err(RangeError::Bits(range));
        }
        let special = [
            Self::network(Ipv4Addr::UNSPECIFIED, 8),
            Self::network(Ipv4Addr::LOCALHOST, 8),
            Self::network(Ipv4Addr::new(169, 254, 0, 0), 16),
            // Multicast and all that is reserved behind it.
            Self::network(Ipv4Addr::new(224, 0, 0, 0), 3),
        ];
        if special.iter().any(|special| special.overlaps(range)) { Err(RangeError::Special) } else { Ok(range) }
    }
}

/// The first network that a range meets; the default route meets none.
pub(super) fn collision(range: Range, mut networks: impl Iterator<Item = Range>) -> Option<Range> {
    networks.find(|network| network.prefix > 0 && network.overlaps(range))
}

/// Which network has which address. What is given back is given out again as late as can be.
#[derive(Debug)]
pub(super) struct Addresses {
    range: Range,
    by_network: HashMap<u32, Ipv4Addr>,
    taken: HashSet<u32>,
    /// Where to look next.
    next: u32,
}

impl Addresses {
    pub(super) fn new(range: Range) -> Self {
        Self { range, by_network: HashMap::new(), taken: HashSet::new(), next: range.base + 1 }
    }

    pub(super) fn get(&self, network: u32) -> Option<Ipv4Addr> {
        self.by_network.get(&network).copied()
    }

    /// Notes that a network has an address; false if it cannot have it.
    pub(super) fn note(&mut self, network: u32, address: Ipv4Addr) -> bool {
        let free = self.range.contains(address) && !self.by_network.contains_key(&network);
        if free && self.taken.insert(address.to_bits()) {
            self.by_network.insert(network, address);
            return true;
        }
        false
    }

    /// An address for a network; `None` when all are taken, or if it has one.
    pub(super) fn take(&mut self, network: u32) -> Option<Ipv4Addr> {
        // Neither the first nor the last, which are the network itself and all of it, by old custom.
        let (first, last) = (self.range.base + 1, self.range.last() - 1);
        let upward = (self.next.clamp(first, last)..=last).chain(first..self.next.clamp(first, last));
        let found = upward.into_iter().find(|address| !self.taken.contains(address)).map(Ipv4Addr::from_bits)?;
        self.next = if found.to_bits() == last { first } else { found.to_bits() + 1 };
        self.note(network, found).then_some(found)
    }

    pub(super) fn give_back(&mut self, network: u32) {
        if let Some(address) = self.by_network.remove(&network) {
            self.taken.remove(&address.to_bits());
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn ranges_are_parsed_or_refused_with_the_reason() {
        for (text, expect) in [
            ("10.208.0.0/20", Ok("10.208.0.0/20")),
            ("192.168.77.0/26", Ok("192.168.77.0/26")),
            ("11.0.0.0/8", Ok("11.0.0.0/8")),
            ("10.208.0.0", Err("not a range such as 10.208.0.0/20")),
            ("10.208.0/20", Err("not a range such as 10.208.0.0/20")),
            ("fd00::/64", Err("not a range such as 10.208.0.0/20")),
            ("10.0.0.0/33", Err("not a range such as 10.208.0.0/20")),
            ("10.0.0.0/27", Err("a range has between /8 and /26")),
            ("0.0.0.0/0", Err("a range has between /8 and /26")),
            ("10.208.0.1/20", Err("the address has bits behind the prefix: did you mean 10.208.0.0/20?")),
            ("127.1.0.0/16", Err("addresses in it cannot be an instance's")),
            ("169.254.0.0/20", Err("addresses in it cannot be an instance's")),
            ("224.0.0.0/8", Err("addresses in it cannot be an instance's")),
            ("255.255.255.0/24", Err("addresses in it cannot be an instance's")),
        ] {
            let found = text.parse::<Range>().map(|range| range.to_string()).map_err(|error| error.to_string());
            assert_eq!(found, expect.map(str::to_owned).map_err(str::to_owned), "{text}");
        }
    }

    #[test]
    fn candidates_are_many_and_lie_apart() {
        let all: Vec<Range> = Range::candidates().collect();
        assert_eq!((all.len(), all[0].to_string().as_str()), (256 + 64 + 32, "10.208.0.0/20"));
        assert!(all.windows(2).all(|pair| !pair[0].overlaps(pair[1])));
        for range in all {
            assert_eq!(range.to_string().parse(), Ok(range));
        }
    }

    #[test]
    fn overlaps_are_found_whichever_is_larger() {
        let range = |text: &str| {
            let (address, prefix) = text.split_once('/').expect("a prefix");
            Range::network(address.parse().expect("an address"), prefix.parse().expect("a number"))
        };
        for (one, other, expect) in [
            ("10.208.0.0/20", "10.0.0.0/8", true),
            ("10.208.0.0/20", "10.208.15.255/32", true),
            ("10.208.0.0/20", "10.208.16.0/20", false),
            ("10.208.0.0/20", "0.0.0.0/0", true),
        ] {
            assert_eq!(range(one).overlaps(range(other)), expect, "{one} {other}");
            assert_eq!(range(other).overlaps(range(one)), expect, "{other} {one}");
        }
    }

    #[test]
    fn an_address_is_given_out_again_as_late_as_can_be() {
        let mut addresses = Addresses::new("10.208.0.0/26".parse().expect("a range"));
        let first = addresses.take(0).expect("an address");
        assert_eq!(first, Ipv4Addr::new(10, 208, 0, 1));
        addresses.give_back(0);
        let given: Vec<Ipv4Addr> = (1..=62).map(|network| addresses.take(network).expect("an address")).collect();
        assert_eq!(given.iter().position(|address| *address == first), Some(61));
        assert_eq!(addresses.take(63), None);
        addresses.give_back(5);
        assert_eq!(addresses.take(63), Some(given[4]));
        assert_eq!(addresses.take(63), None, "one network has one address");
    }

    proptest! {
        #[test]
        fn no_two_networks_have_one_address(events in proptest::collection::vec((any::<bool>(), 0_u32..80), 0..300)) {
            let mut addresses = Addresses::new("10.208.0.0/26".parse().expect("a range"));
            let mut model: HashMap<u32, Ipv4Addr> = HashMap::new();
            for (take, network) in events {
                if take {
                    let expect = !model.contains_key(&network) && model.len() < 62;
                    let taken = addresses.take(network);
                    prop_assert_eq!(taken.is_some(), expect);
                    if let Some(address) = taken {
                        prop_assert!(!model.values().any(|other| *other == address));
                        model.insert(network, address);
                    }
                } else {
                    addresses.give_back(network);
                    model.remove(&network);
                }
                prop_assert_eq!(addresses.get(network), model.get(&network).copied());
            }
        }
    }
}

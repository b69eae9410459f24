//! Whose keeper this is, root's or an ordinary user's, and which ids it gives out.

use std::collections::HashMap;

use rustix::process::{Gid, Uid};

use super::KeeperError;
use super::data::DaemonUser;
use crate::rootless::{self, Ids};
use crate::userns::{self, IdRange};

/// First host id of the functions' ranges under root.
const RANGES_BASE: u32 = 0x7000_0000;
/// Most functions that run at once under root.
const SLOTS_MAX: u32 = 0x8000;

const _: () =
    assert!(RANGES_BASE as u64 + SLOTS_MAX as u64 * userns::IDS as u64 <= 0xFFFF_0000, "ids end below the reserved ones");

/// Decided at the start, for good.
#[derive(Debug)]
pub(super) enum Mode {
    /// Root of the machine.
    Root(DaemonUser),
    /// Root of a user namespace of its own, an ordinary user outside.
    Rootless(Ids),
}

impl Mode {
    /// By the user namespace that this process is root of.
    pub(super) fn decide() -> Result<Self, KeeperError> {
        Ok(rootless::own_ids()?.map_or_else(|| Self::Root(DaemonUser::find()), Self::Rootless))
    }

    pub(super) fn is_rootless(&self) -> bool {
        matches!(self, Self::Rootless(_))
    }

    /// Whether the daemon has the keeper's own id, since there is no other.
    pub(super) fn is_single(&self) -> bool {
        matches!(self, Self::Rootless(Ids::Single))
    }

    /// Who the daemon is.
    pub(super) fn daemon(&self) -> DaemonUser {
        match self {
            Self::Root(user) => *user,
            Self::Rootless(ids) => DaemonUser { uid: Uid::from_raw(ids.daemon()), gid: Gid::from_raw(ids.daemon()) },
        }
    }

    /// The range of ids of a slot.
    pub(super) fn range(&self, slot: u32) -> IdRange {
        match self {
            Self::Root(_) => IdRange::from(RANGES_BASE + slot * userns::IDS),
            Self::Rootless(ids) => ids.range(slot),
        }
    }

    /// How many slots there are.
    pub(super) fn slots(&self) -> u32 {
        match self {
            Self::Root(_) => SLOTS_MAX,
            Self::Rootless(ids) => ids.slots(),
        }
    }
}

/// Ranges of ids, one per function that has a zygote. Where they are few, functions share them.
#[derive(Debug, Default)]
pub(super) struct Slots {
    /// Slot and number of users.
    by_function: HashMap<String, (u32, usize)>,
    /// Functions in each.
    functions: Vec<usize>,
}

impl Slots {
    /// The slot of a function: the one that it has, else a free one, of those the first that `suits`, else where `mode` has them shared the one
    /// with the fewest functions.
    pub(super) fn acquire(&mut self, function: &str, mode: &Mode, suits: impl Fn(u32) -> bool) -> Option<u32> {
        if let Some((slot, users)) = self.by_function.get_mut(function) {
            *users += 1;
            return Some(*slot);
        }
        let free = |slot: u32| self.functions.get(slot as usize).is_none_or(|functions| *functions == 0);
        let known = self.functions.len() as u32;
        let end = mode.slots().min(known + 1);
        let slot = match mode {
            Mode::Root(_) => (0..end).find(|slot| free(*slot))?,
            Mode::Rootless(_) => {
                let suitable = (0..mode.slots()).find(|slot| free(*slot) && suits(*slot));
                let fewest = || (0..end).min_by_key(|slot| self.functions.get(*slot as usize).copied().unwrap_or(0));
                suitable.or_else(|| (0..end).find(|slot| free(*slot))).or_else(fewest)?
            }
        };
        if self.functions.len() <= slot as usize {
            self.functions.resize(slot as usize + 1, 0);
        }
        self.functions[slot as usize] += 1;
        self.by_function.insert(function.to_owned(), (slot, 1));
        Some(slot)
    }

    pub(super) fn release(&mut self, function: &str) {
        let Some((slot, users)) = self.by_function.get_mut(function) else { return };
        *users -= 1;
        if *users == 0 {
            self.functions[*slot as usize] -= 1;
            self.by_function.remove(function);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn root() -> Mode {
        let id = 0x6FFF_FF00;
        Mode::Root(DaemonUser { uid: Uid::from_raw(id), gid: Gid::from_raw(id) })
    }

    fn rootless(count: u32) -> Mode {
        Mode::Rootless(Ids::of(count))
    }

    #[test]
    fn no_two_functions_of_root_share_a_range() {
        let mut slots = Slots::default();
        let mode = root();
        let mut take = |function| slots.acquire(function, &mode, |_| true).unwrap();
        assert_eq!((take("a"), take("b"), take("a"), take("c")), (0, 1, 0, 2));
        slots.release("b");
        assert_eq!(slots.acquire("d", &mode, |_| true), Some(1));
        slots.release("a");
        assert_eq!(slots.acquire("e", &mode, |_| true), Some(3), "a is used once more");
        slots.release("a");
        assert_eq!(slots.acquire("f", &mode, |_| true), Some(0));
    }

    #[test]
    fn few_ranges_are_shared_evenly_and_a_suitable_one_is_taken_first() {
        let mut slots = Slots::default();
        let mode = rootless(3 * userns::IDS + 1);
        assert_eq!(mode.slots(), 3);
        assert_eq!(slots.acquire("a", &mode, |slot| slot == 2), Some(2));
        assert_eq!(slots.acquire("b", &mode, |slot| slot == 2), Some(0), "the suitable one is taken");
        assert_eq!(slots.acquire("c", &mode, |_| false), Some(1));
        assert_eq!(slots.acquire("d", &mode, |_| true), Some(0));
        assert_eq!(slots.acquire("e", &mode, |_| true), Some(1));
        slots.release("a");
        assert_eq!(slots.acquire("f", &mode, |_| false), Some(2));
    }

    #[test]
    fn one_range_is_everybodys() {
        for mode in [rootless(userns::IDS), rootless(1_000), Mode::Rootless(Ids::Single)] {
            let mut slots = Slots::default();
            for function in ["a", "b", "c"] {
                assert_eq!(slots.acquire(function, &mode, |_| false), Some(0));
            }
        }
    }
}

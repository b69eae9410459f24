//! Single flight: of all who want the same thing made, one makes it and the others wait for that.

use std::collections::HashMap;
use std::hash::Hash;
use std::sync::{Arc, Mutex, Weak};

use tokio::sync::OwnedMutexGuard;

/// What is being made now, by key.
#[derive(Debug)]
pub(crate) struct Flights<K>(Mutex<HashMap<K, Weak<tokio::sync::Mutex<()>>>>);

impl<K> Default for Flights<K> {
    fn default() -> Self {
        Self(Mutex::default())
    }
}

impl<K: Eq + Hash> Flights<K> {
    /// Waits until nobody else makes the thing of `key`. The caller looks whether it exists by then, and holds the guard while
    /// it makes it; a maker that fails or is cancelled drops the guard, and the next one tries.
    pub(crate) async fn enter(&self, key: K) -> OwnedMutexGuard<()> {
        let lock = {
            let mut locks = self.0.lock().expect("no holder panics");
            locks.retain(|_, lock| lock.strong_count() > 0);
            let slot = locks.entry(key).or_default();
            slot.upgrade().unwrap_or_else(|| {
                let lock = Arc::default();
                *slot = Arc::downgrade(&lock);
                lock
            })
        };
        lock.lock_owned().await
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn one_key_has_one_holder_and_leaves_nothing() {
        let flights = Flights::<&str>::default();
        let first = flights.enter("a").await;
        let other = flights.enter("b").await;
        assert!(futures_util::FutureExt::now_or_never(flights.enter("a")).is_none());
        drop((first, other));
        drop(flights.enter("a").await);
        drop(flights.enter("c").await);
        assert_eq!(flights.0.lock().unwrap().len(), 1, "only the last key may still be noted");
    }
}

//! Names for calls: UUID version 7 (RFC 9562 section 5.7), without a lock and nearly without system calls.

use std::cell::RefCell;
use std::time::{SystemTime, UNIX_EPOCH};

use funtainer_model::CallId;
use uuid::Builder;

/// Random bytes of one id; the version and the variant overwrite six bits of them.
const RANDOM_BYTES: usize = 10;
/// Fetched at once: getrandom(2) gives up to 256 bytes whole, whatever signals arrive.
const FETCHED_BYTES: usize = 25 * RANDOM_BYTES;

struct Randomness {
    bytes: [u8; FETCHED_BYTES],
    used: usize,
}

thread_local! {
    static RANDOMNESS: RefCell<Randomness> = const { RefCell::new(Randomness { bytes: [0; FETCHED_BYTES], used: FETCHED_BYTES }) };
}

/// A new name.
pub(crate) fn new() -> CallId {
    let millis = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |since| since.as_millis() as u64);
    let random = RANDOMNESS.with_borrow_mut(Randomness::take);
    CallId::from_uuid(Builder::from_unix_timestamp_millis(millis, &random).into_uuid())
}

impl Randomness {
    fn take(&mut self) -> [u8; RANDOM_BYTES] {
        if self.used == FETCHED_BYTES {
            rustix::rand::getrandom(&mut self.bytes, rustix::rand::GetRandomFlags::empty())
                .expect("the kernel has random bytes once it is up");
            self.used = 0;
        }
        let mut random = [0; RANDOM_BYTES];
        random.copy_from_slice(&self.bytes[self.used..self.used + RANDOM_BYTES]);
        self.used += RANDOM_BYTES;
        random
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    #[test]
    fn names_are_distinct_and_of_version_7() {
        let names: HashSet<_> = (0..1000).map(|_| super::new().to_string()).collect();
        assert_eq!(names.len(), 1000);
        assert!(names.iter().all(|name| name.as_bytes()[14] == b'7'));
    }
}

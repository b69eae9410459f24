//! Whatever a hostile daemon, keeper or init sends: it is refused, or it has exactly one form on the wire.
#![no_main]

use funtainer_sandbox::protocol::{MAGIC, VERSION, check_any};
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (u8, bool, u32, &[u8])| {
    let (kind, of_keeper, number, rest) = input;
    check_any(rest);
    // The same behind a right header, which is seldom met by chance.
    let kind = u16::from(kind % 16) | if of_keeper { 0x100 } else { 0 };
    let mut datagram = Vec::with_capacity(12 + rest.len());
    for part in [&MAGIC.to_le_bytes()[..], &VERSION.to_le_bytes(), &kind.to_le_bytes(), &[0, 0], &number.to_le_bytes(), rest] {
        datagram.extend_from_slice(part);
    }
    check_any(&datagram);
});

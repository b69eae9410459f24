//! Whatever stands on the other side of a bus's socket: its messages are refused, or read within their bounds.
#![no_main]

use funtainer_sandbox::cgroup::bus::check_any;
use libfuzzer_sys::fuzz_target;

fuzz_target!(|input: (bool, u8, &[u8], &[u8])| {
    let (big, kind, fields, body) = input;
    check_any(body);
    // The same behind right lengths, which are seldom met by chance.
    let word = |number: usize| if big { (number as u32).to_be_bytes() } else { (number as u32).to_le_bytes() };
    let mut message = vec![if big { b'B' } else { b'l' }, kind % 5, 0, 1];
    for part in [&word(body.len())[..], &word(1), &word(fields.len()), fields] {
        message.extend_from_slice(part);
    }
    message.resize(message.len().next_multiple_of(8), 0);
    message.extend_from_slice(body);
    check_any(&message);
});

//! Whatever a hostile daemon, keeper or init sends: it is refused, or it has exactly one form on the wire.
#![no_main]

use libfuzzer_sys::fuzz_target;

fuzz_target!(|datagram: &[u8]| {
    funtainer_sandbox::protocol::check_any(datagram);
});

//! What the platform puts into `/etc` of every container, over whatever its image has there.

use super::networks::Pool;
use crate::mount::EtcFile;
use crate::protocol::RevisionSpec;

/// Names of addresses that every machine has, as Docker writes them.
const HOSTS: &str = "127.0.0.1\tlocalhost\n\
    ::1\tlocalhost ip6-localhost ip6-loopback\n\
    fe00::0\tip6-localnet\n\
    ff00::0\tip6-mcastprefix\n\
    ff02::1\tip6-allnodes\n\
    ff02::2\tip6-allrouters\n";

/// All of them, for the instances of a revision, whose networks come from a pool if they lead out.
pub(super) fn files(spec: &RevisionSpec, pool: Option<&Pool>) -> [EtcFile; 3] {
    [
        EtcFile { name: c"hostname", content: format!("{}\n", spec.hostname).into_bytes() },
        EtcFile { name: c"hosts", content: hosts(&spec.hostname).into_bytes() },
        EtcFile { name: c"resolv.conf", content: pool.map_or_else(no_resolver, Pool::resolver).into_bytes() },
    ]
}

/// The name of its own leads an instance to itself: servers look it up to find an address to listen on.
fn hosts(hostname: &str) -> String {
    format!("{HOSTS}127.0.0.1\t{hostname}\n")
}

/// Without a name server the C libraries ask 127.0.0.1, which refuses at once: no look-up waits for an answer that cannot come.
fn no_resolver() -> String {
    "# no name server can be reached\n".to_owned()
}

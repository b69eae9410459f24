//! What the keeper keeps of an instance for a later daemon: a small JSON text that only daemons read.

use funtainer_contract::{Readiness, StandardStreams};
use funtainer_engine::backend::RevisionStart;
use funtainer_model::{Slug, StopSignal};
use serde::{Deserialize, Serialize};

/// Version of the form; an instance with another one is ended rather than guessed at.
const VERSION: u32 = 1;

/// See the module.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub(crate) struct Descriptor {
    version: u32,
    /// Name of the function's log.
    pub(crate) slug: Slug,
    /// Where it listens, best guess first; empty for one that does not.
    pub(crate) ports: Vec<u16>,
    /// Ports of the platform's own listeners inside.
    pub(crate) own: Vec<u16>,
    /// Whether its standard streams were a daemon's.
    pub(crate) streams: StandardStreams,
    /// What asks it to end.
    pub(crate) stop_signal: StopSignal,
}

impl Descriptor {
    /// Of a new instance. `learned` is a port at which one of the revision was found although it was told another.
    pub(crate) fn new(revision: &RevisionStart, learned: Option<u16>) -> Self {
        let preferred = match revision.plan.readiness {
            Readiness::Listening { preferred } => Some(preferred.get()),
            Readiness::Executed => None,
        };
        Self {
            version: VERSION,
            slug: revision.slug.clone(),
            ports: learned.filter(|_| preferred.is_some()).into_iter().chain(preferred).collect(),
            own: revision.plan.listeners.iter().map(|listener| listener.port.get()).collect(),
            streams: revision.plan.streams,
            stop_signal: revision.plan.stop_signal,
        }
    }

    pub(crate) fn to_bytes(&self) -> Vec<u8> {
        serde_json::to_vec(self).expect("a descriptor has text keys and plain values")
    }

    /// `None` for what another version of the program wrote.
    pub(crate) fn from_bytes(bytes: &[u8]) -> Option<Self> {
        serde_json::from_slice(bytes).ok().filter(|descriptor: &Self| descriptor.version == VERSION)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn it_comes_back_as_it_was_and_others_do_not() {
        let descriptor = Descriptor {
            version: VERSION,
            slug: "a-1".parse().unwrap(),
            ports: vec![9090, 8080],
            own: vec![],
            streams: StandardStreams::Log,
            stop_signal: StopSignal::TERM,
        };
        let bytes = descriptor.to_bytes();
        assert!(bytes.len() <= funtainer_sandbox::protocol::DESCRIPTOR_BYTES_MAX);
        assert_eq!(Descriptor::from_bytes(&bytes), Some(descriptor.clone()));
        assert_eq!(Descriptor::from_bytes(&Descriptor { version: 2, ..descriptor }.to_bytes()), None);
        for foreign in [&b""[..], b"{}", b"\xff", br#"{"version":1,"slug":"A"}"#] {
            assert_eq!(Descriptor::from_bytes(foreign), None);
        }
    }
}

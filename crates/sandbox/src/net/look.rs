//! What `funtainer doctor` asks: whether the machine has what this process needs. Nothing of the host is changed.

use rustix::io::Errno;

use super::firewall::Firewall;
use super::netlink::Socket;
use super::range::Range;
use super::{foreign, host, link, nft};

/// Makes a veth pair in the caller's network namespace, which is to be one that nobody else uses, and removes it.
pub(crate) fn try_veth() -> Result<(), Errno> {
    link::probe(&mut Socket::open(None)?)
}

/// Makes the whole table of a server in the caller's network namespace, which is to be one that nobody else uses, and removes it. The error names
/// what the packet filter refused.
pub(crate) fn try_firewall() -> Result<(), String> {
    let range = Range::candidates().next().expect("there are some");
    let tried = Firewall::open("doctor", range).and_then(|mut firewall| {
        firewall.install(std::iter::empty(), std::iter::empty(), &[])?;
        firewall.remove()
    });
    tried.map_err(|failed| format!("{}: {}", failed.what, failed.errno))
}

/// Whether the host forwards between all its interfaces (`net.ipv4.ip_forward`).
pub(crate) fn forwards_all() -> Result<bool, Errno> {
    host::forwards_all()
}

/// Firewalls of the host that drop what is forwarded.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Dropping {
    /// The chain `FORWARD` of iptables does, as Docker has it: packets of instances are let through for as long as a server runs.
    pub(crate) iptables: bool,
    /// Others, which are the administrator's to open: each with the commands that do.
    pub(crate) others: Vec<String>,
}

/// Looks at the tables of the caller's network namespace.
pub(crate) fn dropping() -> Result<Dropping, Errno> {
    let range = Range::candidates().next().expect("there are some");
    let chains = nft::chains(&mut nft::open()?)?;
    Ok(Dropping { iptables: foreign::iptables_drops(&chains), others: foreign::others(&chains, range) })
}

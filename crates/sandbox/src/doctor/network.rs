//! The way out of an instance: what makes it, and what of the host stands in it.

use std::path::Path;

use rustix::thread::UnshareFlags;

use super::modules::{self, Presence};
use super::{Area, Feature, Finding, child, kernel};
use crate::net::look;

/// What is lost without any of these.
const LOST: &str = "functions reach nothing outside (as with --network off)";
const VETH: Feature = Feature { area: Area::Network, name: "veth", required: false, lost: LOST };
const PACKET_FILTER: Feature = Feature { area: Area::Network, name: "nf_tables", required: false, lost: LOST };
const FORWARDING: Feature = Feature { area: Area::Network, name: "forwarding", required: false, lost: LOST };
const FIREWALLS: Feature = Feature { area: Area::Network, name: "firewalls of the host", required: false, lost: LOST };

/// Modules that the table of a server needs besides `nf_tables` itself.
const FILTER_MODULES: [&str; 6] = ["nft_ct", "nft_masq", "nft_fib_inet", "nft_reject_inet", "nft_connlimit", "nf_conntrack"];

/// For root's server: that of an ordinary user has another way out.
pub(super) fn look() -> Vec<Finding> {
    vec![veth(), packet_filter(), forwarding(), firewalls()]
}

fn presence(name: &str) -> Presence {
    modules::find(Path::new("/"), &kernel::release(), name)
}

/// In a network namespace that ends with its process.
fn in_namespace(trial: impl FnOnce() -> Result<(), String>) -> Result<String, String> {
    child::run(|| {
        // SAFETY: a new network namespace concerns this process, which has one thread; no memory or descriptor is touched.
        unsafe { rustix::thread::unshare_unsafe(UnshareFlags::NEWNET) }
            .map_err(|errno| format!("make a network namespace: {errno}"))?;
        trial().map(|()| String::new())
    })
}

fn veth() -> Finding {
    if presence("veth") == Presence::Loadable {
        return VETH.ok("the module will be loaded by the first server");
    }
    match in_namespace(|| look::try_veth().map_err(|errno| errno.to_string())) {
        Ok(_) => VETH.ok("a pair was made in a network namespace of its own"),
        Err(error) => VETH.missing(error, "use a kernel with CONFIG_VETH (the module veth), as all distributions' are"),
    }
}

fn packet_filter() -> Finding {
    // Asking would load them.
    if presence("nf_tables") == Presence::Loadable {
        let absent: Vec<&str> = FILTER_MODULES.into_iter().filter(|name| presence(name) == Presence::Absent).collect();
        return if absent.is_empty() {
            PACKET_FILTER.ok("the modules will be loaded by the first server")
        } else {
            PACKET_FILTER.missing(format!("this kernel has no {}", absent.join(", ")), filter_cure())
        };
    }
    match in_namespace(look::try_firewall) {
        Ok(_) => PACKET_FILTER.ok("a server's table was made in a network namespace of its own"),
        Err(error) => PACKET_FILTER.missing(error, filter_cure()),
    }
}

fn filter_cure() -> &'static str {
    "use a kernel with CONFIG_NF_TABLES_INET and CONFIG_NFT_{CT,MASQ,FIB_INET,REJECT_INET,CONNLIMIT}, as all distributions' are (some split them off: linux-modules-extra)"
}

fn forwarding() -> Finding {
    let writable = rustix::fs::accessat(
        rustix::fs::CWD,
        "/proc/sys/net/ipv4/ip_forward",
        rustix::fs::Access::WRITE_OK,
        rustix::fs::AtFlags::EACCESS,
    );
    match (look::forwards_all(), writable) {
        (Ok(true), _) => FORWARDING.ok("net.ipv4.ip_forward is on: a server changes nothing"),
        (Ok(false), Ok(())) => FORWARDING
            .ok("net.ipv4.ip_forward is off: a server forwards for its instances alone, and puts that back at its end"),
        (Ok(false), Err(errno)) => FORWARDING.missing(
            format!("net.ipv4.ip_forward is off and cannot be changed here ({errno})"),
            "sysctl -w net.ipv4.ip_forward=1 (for a container: docker run --sysctl net.ipv4.ip_forward=1)",
        ),
        (Err(errno), _) => FORWARDING.missing(
            format!("/proc/sys/net/ipv4/ip_forward: {errno}"),
            "use a kernel with IPv4 and a /proc/sys that can be seen",
        ),
    }
}

fn firewalls() -> Finding {
    // Where the packet filter is not loaded it has no tables.
    if presence("nf_tables") == Presence::Loadable {
        return FIREWALLS.ok("none has a table");
    }
    match look::dropping() {
        Ok(found) if !found.others.is_empty() => {
            FIREWALLS.degraded(format!("what is forwarded is dropped by {}", found.others.len()), found.others.join("; "))
        }
        Ok(found) if found.iptables => FIREWALLS.ok(
            "iptables drops what is forwarded, as Docker has it: a server lets its instances through, and puts that back at its end",
        ),
        Ok(_) => FIREWALLS.ok("none drops what is forwarded"),
        Err(errno) => FIREWALLS.unknown(format!("the packet filter cannot be asked ({errno})"), "see nf_tables above"),
    }
}

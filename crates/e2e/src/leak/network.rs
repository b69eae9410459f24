//! The host's network as text: what a server could leave in it, one line each.

use std::collections::BTreeSet;
use std::fs;
use std::io::ErrorKind;
use std::net::Ipv4Addr;
use std::process::Command;

use anyhow::{Context, Result, bail, ensure};

use super::parse::if_there;

/// Where the kernel lists interfaces and routes of the calling thread's network namespace.
const INTERFACES: &str = "/proc/thread-self/net/dev";
const ROUTES: &str = "/proc/thread-self/net/route";
/// Settings of each interface.
const SETTINGS: &str = "/proc/sys/net/ipv4/conf";

/// Interfaces, routes, forwarding that is on, and the rules of the packet filter, where the program that shows them is there.
pub(super) fn state() -> Result<BTreeSet<String>> {
    let mut all = BTreeSet::new();
    for line in fs::read_to_string(INTERFACES).context(INTERFACES)?.lines() {
        if let Some((name, _)) = line.split_once(':') {
            all.insert(format!("interface {}", name.trim()));
        }
    }
    for line in fs::read_to_string(ROUTES).context(ROUTES)?.lines().skip(1) {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let [name, to, gateway, ..] = fields[..] else { bail!("a line of {ROUTES}: {line}") };
        all.insert(format!("route to {} by {name} {}", address(to)?, address(gateway)?));
    }
    for entry in fs::read_dir(SETTINGS).context(SETTINGS)? {
        let path = entry?.path().join("forwarding");
        if if_there(fs::read_to_string(&path))?.is_some_and(|value| value.trim() == "1") {
            all.insert(format!("{} is 1", path.display()));
        }
    }
    all.extend(rules()?);
    Ok(all)
}

/// As the kernel prints it: the bytes of the address, read as an integer of this machine.
fn address(hex: &str) -> Result<Ipv4Addr> {
    let bits = u32::from_str_radix(hex, 16).with_context(|| format!("an address in {ROUTES}: {hex}"))?;
    Ok(Ipv4Addr::from(bits.to_ne_bytes()))
}

/// Each rule with the table and chain around it, without its counters.
fn rules() -> Result<Vec<String>> {
    if !rustix::process::geteuid().is_root() {
        // An ordinary user neither sees nor changes them.
        return Ok(Vec::new());
    }
    let output = match Command::new("nft").args(["--stateless", "list", "ruleset"]).output() {
        Ok(output) => output,
        Err(error) if error.kind() == ErrorKind::NotFound => return Ok(Vec::new()),
        Err(error) => return Err(error).context("nft list ruleset"),
    };
    ensure!(output.status.success(), "nft list ruleset: {}", String::from_utf8_lossy(&output.stderr));
    let mut around: Vec<String> = Vec::new();
    let mut all = Vec::new();
    for line in String::from_utf8_lossy(&output.stdout).lines().map(str::trim).filter(|line| !line.is_empty()) {
        if line == "}" {
            around.pop();
            continue;
        }
        all.push(format!("{} {line}", around.join(" ")));
        if let Some(name) = line.strip_suffix(" {") {
            around.push(name.to_owned());
        }
    }
    Ok(all)
}

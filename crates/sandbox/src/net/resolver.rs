//! Whom instances ask for names: resolv.conf(5) of the host, made fit for a network of its own.
//!
//! A name server on a loopback address of the host (systemd-resolved's 127.0.0.53, NetworkManager's dnsmasq) is out of reach for an
//! instance. Such software writes down whom it asks itself, and that is taken. Servers with IPv6 addresses are left out, since instances
//! reach IPv4 only. Where nothing is left the public servers are taken that Docker takes too.

use std::fs;
use std::io::Read as _;
use std::net::Ipv4Addr;
use std::path::Path;

use super::RESOLVERS_MAX;

/// Where the host's resolver is set up, and where it says whom it asks.
const FILES: [&str; 3] = ["/etc/resolv.conf", "/run/systemd/resolve/resolv.conf", "/run/NetworkManager/no-stub-resolv.conf"];
/// Longest file that is read.
const FILE_BYTES_MAX: u64 = 16 << 10;
/// Longest line that is passed on.
const LINE_BYTES_MAX: usize = 1024;
/// Google's public servers, as Docker has them for the same case.
const PUBLIC: [Ipv4Addr; 2] = [Ipv4Addr::new(8, 8, 8, 8), Ipv4Addr::new(8, 8, 4, 4)];

/// What instances are told.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Resolver {
    /// From one to [`RESOLVERS_MAX`].
    pub(crate) servers: Vec<Ipv4Addr>,
    /// Whether the servers are the public ones, because the host names none that instances could ask.
    pub(crate) is_public: bool,
    /// The lines `search` and `options` of the host.
    lines: Vec<String>,
}

impl Resolver {
    /// With servers that an operator has named; else as the host has it.
    pub(crate) fn find(named: &[Ipv4Addr]) -> Self {
        Self::choose(named, FILES.iter().map(|path| read(Path::new(path)).unwrap_or_default()))
    }

    fn choose(named: &[Ipv4Addr], files: impl Iterator<Item = String>) -> Self {
        let mut lines = None;
        let mut servers = named.to_vec();
        for text in files {
            // Those of the first file: the others are about servers.
            lines.get_or_insert_with(|| passed_on(&text));
            if servers.is_empty() {
                servers = reachable(&text);
            }
        }
        let is_public = servers.is_empty();
        if is_public {
            servers.extend(PUBLIC);
        }
        servers.truncate(RESOLVERS_MAX);
        Self { servers, is_public, lines: lines.unwrap_or_default() }
    }

    /// The file `/etc/resolv.conf` of an instance.
    pub(crate) fn file(&self) -> String {
        let servers = self.servers.iter().map(|server| format!("nameserver {server}\n"));
        servers.chain(self.lines.iter().map(|line| format!("{line}\n"))).collect()
    }
}

fn read(path: &Path) -> Option<String> {
    let mut bytes = Vec::new();
    fs::File::open(path).ok()?.take(FILE_BYTES_MAX).read_to_end(&mut bytes).ok()?;
    Some(String::from_utf8_lossy(&bytes).into_owned())
}

/// The name servers in a file that an instance could reach.
fn reachable(text: &str) -> Vec<Ipv4Addr> {
    let mut servers = Vec::new();
    for line in text.lines() {
        let mut words = line.split_ascii_whitespace();
        if words.next() != Some("nameserver") {
            continue;
        }
        let server = words.next().and_then(|word| word.parse().ok()).filter(can_be_asked);
        if let Some(server) = server.filter(|server| !servers.contains(server)) {
            servers.push(server);
        }
    }
    servers
}

/// Whether instances can ask a name server: not one of the host's own loopback.
pub fn can_be_asked(server: &Ipv4Addr) -> bool {
    !server.is_loopback() && !server.is_unspecified() && !server.is_multicast() && !server.is_broadcast()
}

fn passed_on(text: &str) -> Vec<String> {
    let fine = |line: &&str| {
        let printable = line.bytes().all(|byte| byte == b' ' || byte == b'\t' || byte.is_ascii_graphic());
        let kept = matches!(line.split_ascii_whitespace().next(), Some("search" | "options" | "domain"));
        kept && printable && line.len() <= LINE_BYTES_MAX
    };
    text.lines().map(str::trim).filter(fine).map(str::to_owned).collect()
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(named: &[&str], files: &[&str], expect: &str) {
        let named: Vec<Ipv4Addr> = named.iter().map(|server| server.parse().expect("an address")).collect();
        let found = Resolver::choose(&named, files.iter().map(ToString::to_string));
        assert_eq!(found.file(), expect, "{named:?} {files:?}");
    }

    #[test]
    fn servers_that_can_be_reached_are_taken() {
        check(&[], &["nameserver 10.0.0.2\nsearch example.org\n"], "nameserver 10.0.0.2\nsearch example.org\n");
        // systemd-resolved: its own file names the stub, the other whom it asks.
        check(
            &[],
            &["nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch lan\n", "nameserver 192.168.1.1\nsearch other\n"],
            "nameserver 192.168.1.1\noptions edns0 trust-ad\nsearch lan\n",
        );
        // dnsmasq of NetworkManager.
        check(&[], &["nameserver 127.0.1.1\n", "", "nameserver 10.9.9.9\n"], "nameserver 10.9.9.9\n");
        check(&[], &["nameserver 127.0.0.1\n", "nameserver ::1\n"], "nameserver 8.8.8.8\nnameserver 8.8.4.4\n");
        check(&[], &[], "nameserver 8.8.8.8\nnameserver 8.8.4.4\n");
        check(&["1.1.1.1"], &["nameserver 10.0.0.2\nsearch a\n"], "nameserver 1.1.1.1\nsearch a\n");
        check(
            &[],
            &["nameserver fe80::1%eth0\nnameserver\nnameserver x\n nameserver 10.0.0.2 # office\nnameserver 10.0.0.2\n"],
            "nameserver 10.0.0.2\n",
        );
        check(
            &[],
            &["nameserver 1.0.0.1\nnameserver 1.0.0.2\nnameserver 1.0.0.3\nnameserver 1.0.0.4\n"],
            "nameserver 1.0.0.1\nnameserver 1.0.0.2\nnameserver 1.0.0.3\n",
        );
    }

    proptest! {
        #[test]
        fn foreign_text_becomes_no_other_lines(text in "(nameserver|search|options)?[ -~\n\r\t\u{0}é]{0,200}") {
            let found = Resolver::choose(&[], [text].into_iter());
            for line in found.file().lines() {
                let word = line.split_ascii_whitespace().next();
                prop_assert!(matches!(word, Some("nameserver" | "search" | "options" | "domain")), "{}", line);
            }
            prop_assert!(!found.servers.is_empty() && found.servers.len() <= RESOLVERS_MAX);
        }
    }
}

//! What listens inside an instance, by `/proc/PID/net/tcp` and `tcp6` (proc(5)) of its first process.

use std::collections::BTreeSet;
use std::fs;
use std::io::{self, Read};
use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};

/// Bytes read of one table at most, 150 bytes a socket: a function with more sockets than this is looked at in part.
const TABLE_BYTES_MAX: u64 = 1024 * 1024;
/// TCP_LISTEN of the kernel's include/net/tcp_states.h.
const LISTEN: &str = "0A";

/// The addresses that are listened on in the network namespace of a process.
pub(crate) fn of_process(pid: u32) -> io::Result<Vec<SocketAddr>> {
    let mut listeners = Vec::new();
    for table in ["tcp", "tcp6"] {
        let mut text = Vec::new();
        match fs::File::open(format!("/proc/{pid}/net/{table}")) {
            Ok(file) => file.take(TABLE_BYTES_MAX).read_to_end(&mut text)?,
            // A kernel without IPv6.
            Err(error) if error.kind() == io::ErrorKind::NotFound && table == "tcp6" => 0,
            Err(error) => return Err(error),
        };
        listeners.extend(parse(&String::from_utf8_lossy(&text)));
    }
    Ok(listeners)
}

/// The listening sockets of a table; lines of another form are passed over.
///
/// ```text
///   sl  local_address rem_address   st ...
///    0: 0100007F:1F90 00000000:0000 0A ...
/// ```
pub(crate) fn parse(table: &str) -> Vec<SocketAddr> {
    let listening = |line: &str| {
        let mut fields = line.split_ascii_whitespace().skip(1);
        let (local, state) = (fields.next()?, fields.nth(1)?);
        if state == LISTEN { address(local) } else { None }
    };
    table.lines().filter_map(listening).collect()
}

/// The ports among the addresses, without those in `own`.
pub(crate) fn ports(listeners: &[SocketAddr], own: &[u16]) -> BTreeSet<u16> {
    listeners.iter().map(SocketAddr::port).filter(|port| !own.contains(port)).collect()
}

/// Addresses by which the listeners on a port can be reached, best first: IPv4 where both may do, since most sockets are.
pub(crate) fn reachable(listeners: &[SocketAddr], port: u16) -> Vec<SocketAddr> {
    let (v4, v6) = (IpAddr::from(Ipv4Addr::LOCALHOST), IpAddr::from(Ipv6Addr::LOCALHOST));
    let mut addresses: Vec<SocketAddr> = Vec::new();
    for listener in listeners.iter().filter(|listener| listener.port() == port) {
        let ips = match listener.ip() {
            IpAddr::V4(ip) if ip.is_unspecified() => [Some(v4), None],
            // It may take IPv4 too, unless it says IPV6_V6ONLY.
            IpAddr::V6(ip) if ip.is_unspecified() => [Some(v4), Some(v6)],
            ip => [Some(ip), None],
        };
        for ip in ips.into_iter().flatten() {
            let address = SocketAddr::new(ip, port);
            if !addresses.contains(&address) {
                addresses.push(address);
            }
        }
    }
    addresses.sort_by_key(SocketAddr::is_ipv6);
    addresses
}

/// `0100007F:1F90`: the address as 32-bit words in the machine's byte order, the port as a number.
fn address(text: &str) -> Option<SocketAddr> {
    let (ip, port) = text.split_once(':')?;
    let port = hex(port, 4)? as u16;
    let ip = match ip.len() {
        8 => IpAddr::from(hex(ip, 8)?.to_ne_bytes()),
        32 => {
            let mut bytes = [0; 16];
            for (at, place) in bytes.chunks_exact_mut(4).enumerate() {
                place.copy_from_slice(&hex(ip.get(at * 8..at * 8 + 8)?, 8)?.to_ne_bytes());
            }
            let ip = Ipv6Addr::from(bytes);
            ip.to_ipv4_mapped().map_or(IpAddr::V6(ip), IpAddr::V4)
        }
        _ => return None,
    };
    Some(SocketAddr::new(ip, port))
}

fn hex(text: &str, digits: usize) -> Option<u32> {
    if text.len() != digits || !text.bytes().all(|byte| byte.is_ascii_hexdigit()) {
        return None;
    }
    u32::from_str_radix(text, 16).ok()
}

#[cfg(test)]
mod tests {
    use std::net::TcpListener;

    use super::*;

    const HEAD: &str = "  sl  local_address rem_address   st tx_queue rx_queue tr tm->when retrnsmt   uid  timeout inode\n";

    #[test]
    #[cfg(target_endian = "little")]
    fn tables_of_the_kernel() {
        let check = |lines: &str, expect: &[&str]| {
            let found: Vec<_> = parse(&format!("{HEAD}{lines}")).iter().map(ToString::to_string).collect();
            assert_eq!(found, expect, "{lines}");
        };
        check(
            "   0: 0100007F:1F90 00000000:0000 0A 00000000:00000000 00:00000000 00000000     0        0 123\n",
            &["127.0.0.1:8080"],
        );
        check("   1: 00000000:0050 00000000:0000 0A 0:0 0:0\n   2: 0100007F:1F90 0100007F:1234 01 0:0\n", &["0.0.0.0:80"]);
        check("   0: 00000000000000000000000001000000:1F90 00000000000000000000000000000000:0000 0A 0\n", &["[::1]:8080"]);
        check("   0: 0000000000000000FFFF00000100007F:1F90 00000000000000000000000000000000:0000 0A 0\n", &["127.0.0.1:8080"]);
        for hostile in [
            "",
            "   0:\n",
            "0: zz:zz 0 0A",
            "0: 0100007F 0 0A",
            "0: 0100007F:1F900 0 0A",
            "0: +100007F:1F90 0 0A",
            "0: é000000:1F90 0 0A",
        ] {
            check(hostile, &[]);
        }
    }

    #[test]
    fn addresses_to_reach_them_by() {
        let check = |listeners: &[&str], expect: &[&str]| {
            let listeners: Vec<SocketAddr> = listeners.iter().map(|text| text.parse().unwrap()).collect();
            let found: Vec<_> = reachable(&listeners, 80).iter().map(ToString::to_string).collect();
            assert_eq!(found, expect, "{listeners:?}");
        };
        check(&["0.0.0.0:80", "0.0.0.0:81"], &["127.0.0.1:80"]);
        check(&["[::]:80"], &["127.0.0.1:80", "[::1]:80"]);
        check(&["[::1]:80", "127.0.0.1:80"], &["127.0.0.1:80", "[::1]:80"]);
        check(&["127.0.0.5:80"], &["127.0.0.5:80"]);
        check(&["0.0.0.0:81"], &[]);
    }

    #[test]
    fn the_running_kernel_is_understood() {
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        assert!(of_process(std::process::id()).unwrap().contains(&address));
    }
}

//! What functions reach, and what they do not: each machine here is a network namespace with a veth to another one that plays the world outside.
//! Every refusal has its control: the same thing asked for from where it must work.

use std::io::{Read, Write};
use std::net::{IpAddr, Ipv4Addr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use funtainer_e2e::image::catalog;
use funtainer_e2e::leak::parse;
use funtainer_e2e::network::{Namespace, shell};
use funtainer_e2e::server::{Extra, Server, tail};
use funtainer_e2e::user::{Subordinate, User};
use funtainer_e2e::wait;
use funtainer_e2e::world::{World, scenario_in};
use rustix::process::{Pid, Signal, kill_process};

const LIMIT: Duration = Duration::from_mins(1);
/// How long something that must not come is waited for.
const SILENCE: Duration = Duration::from_secs(3);
/// The machine, and the world beyond its veth.
const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
/// A database in a private network, and the metadata services of clouds.
const DATABASE: Ipv4Addr = Ipv4Addr::new(10, 7, 7, 7);
const METADATA: [Ipv4Addr; 3] =
    [Ipv4Addr::new(169, 254, 169, 254), Ipv4Addr::new(168, 63, 129, 16), Ipv4Addr::new(100, 100, 100, 200)];
/// Ports on which the world answers by TCP and UDP.
const PORTS: [u16; 4] = [53, 80, 443, 5432];
/// A port of the machine itself.
const HOST_PORT: u16 = 80;

/// A machine with a way out.
struct Machine {
    outside: Namespace,
}

impl Machine {
    /// Makes the network namespace of this thread one.
    fn make() -> Result<Self> {
        let outside = Namespace::make()?;
        shell(&format!(
            "ip link add up0 type veth peer name down0 netns {}
             ip address add {HOST}/24 dev up0
             ip link set up0 up
             ip route add default via {OUTSIDE}",
            outside.path()
        ))?;
        outside.run(|| {
            shell(&format!(
                "ip address add {OUTSIDE}/24 dev down0; ip link set down0 up; ip address add {DATABASE}/32 dev lo"
            ))?;
            for address in METADATA {
                shell(&format!("ip address add {address}/32 dev lo"))?;
            }
            let addresses = [&[OUTSIDE, DATABASE], &METADATA[..]].concat();
            PORTS.into_iter().try_for_each(|port| answer(port, &addresses))
        })?;
        answer(HOST_PORT, &[HOST])?;
        // The first packet waits for the other side's hardware address.
        wait::until_true("the outside is there", LIMIT, || Ok(dial(OUTSIDE, 80).is_ok()))?;
        Ok(Self { outside })
    }
}

/// Servers on addresses of this network namespace: who connects, or sends something, is told its address.
fn answer(port: u16, addresses: &[Ipv4Addr]) -> Result<()> {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            thread::spawn(move || {
                let peer = stream.peer_addr()?.ip();
                let _ = stream.read(&mut [0])?;
                stream.write_all(peer.to_string().as_bytes())
            });
        }
    });
    // One for each: a socket that is bound to all would answer from another address than was asked.
    for address in addresses {
        let socket = UdpSocket::bind((*address, port))?;
        thread::spawn(move || {
            let mut bytes = [0; 512];
            while let Ok((length, peer)) = socket.recv_from(&mut bytes) {
                let reply = if length == 1 { peer.ip().to_string().into_bytes() } else { name_answer(&bytes[..length]) };
                let _ = socket.send_to(&reply, peer);
            }
        });
    }
    Ok(())
}

/// The answer of a name server to a question with one name (RFC 1035): every name is at [`DATABASE`], if IPv4 is asked for.
fn name_answer(question: &[u8]) -> Vec<u8> {
    let mut answer = question.to_vec();
    let Some(end) = question.get(12..).and_then(|rest| rest.iter().position(|byte| *byte == 0)) else { return answer };
    let end = 12 + end + 5;
    answer.truncate(end);
    let is_a = question.get(end - 4..end - 2) == Some(&[0, 1]);
    // A response, recursion available; one answer or none, and nothing else.
    answer[2..4].copy_from_slice(&[0x81, 0x80]);
    answer[6..12].copy_from_slice(&[0, u8::from(is_a), 0, 0, 0, 0]);
    if is_a {
        answer.extend_from_slice(&[0xc0, 12, 0, 1, 0, 1, 0, 0, 0, 60, 0, 4]);
        answer.extend_from_slice(&DATABASE.octets());
    }
    answer
}

/// What a server says by TCP to this thread's network namespace.
fn dial(to: Ipv4Addr, port: u16) -> Result<IpAddr> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((to, port)), SILENCE)?;
    stream.set_read_timeout(Some(SILENCE))?;
    stream.write_all(b"x")?;
    let mut said = String::new();
    stream.read_to_string(&mut said)?;
    Ok(said.parse()?)
}

/// The same by UDP.
fn dial_udp(to: Ipv4Addr, port: u16) -> Result<IpAddr> {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0))?;
    socket.set_read_timeout(Some(SILENCE))?;
    socket.connect((to, port))?;
    socket.send(b"x")?;
    let mut said = [0; 64];
    let length = socket.recv(&mut said)?;
    Ok(String::from_utf8_lossy(&said[..length]).parse()?)
}

/// A function that dials for the tests.
struct Dialer<'a> {
    server: &'a Server,
    name: &'a str,
}

impl<'a> Dialer<'a> {
    fn deploy(server: &'a Server, name: &'a str, flags: &[&str]) -> Result<Self> {
        server.deploy(name, &catalog::probe(&[], &[])?, flags)?;
        Ok(Self { server, name })
    }

    fn dial(&self, protocol: &str, to: Ipv4Addr, port: u16) -> Result<Result<String, String>> {
        let path = format!("/function/{}/dial?{protocol}/{to}:{port}", self.name);
        let answer = self.server.call("GET", &path, &[], b"")?;
        ensure!(matches!(answer.status, 200 | 502), "{answer:?}");
        Ok(if answer.status == 200 { Ok(answer.text()) } else { Err(answer.text()) })
    }

    fn reaches(&self, protocol: &str, to: Ipv4Addr, port: u16) -> Result<()> {
        let said = self.dial(protocol, to, port)?;
        ensure!(said == Ok(HOST.to_string()), "{} asked {to}:{port} by {protocol}: {said:?}", self.name);
        Ok(())
    }

    fn misses(&self, protocol: &str, to: Ipv4Addr, port: u16) -> Result<()> {
        let said = self.dial(protocol, to, port)?;
        ensure!(said.is_err(), "{} reached {to}:{port} by {protocol}: {said:?}", self.name);
        Ok(())
    }

    /// The network namespace of its instance, and the instance's address in it.
    fn inside(&self) -> Result<(Namespace, Ipv4Addr)> {
        let pid = *self.server.init_pids(self.name)?.first().context("no instance")?;
        let inside = Namespace::of(pid)?;
        let line = inside.run(|| shell("ip -4 -o address show dev eth0"))?;
        let address = line.split_whitespace().nth(3).and_then(|text| text.strip_suffix("/32")).context(line.clone())?;
        Ok((inside, address.parse()?))
    }
}

fn on_a_machine(test: impl FnOnce(&World, &Machine) -> Result<()>) -> Result<()> {
    scenario_in(Machine::make, test)
}

fn extra(flags: &[&str]) -> Extra {
    Extra { flags: flags.iter().map(ToString::to_string).collect(), wrapper: Vec::new() }
}

/// With the outside as its name server.
fn serve(world: &World) -> Result<Server> {
    world.serve_with(&extra(&["--dns", &OUTSIDE.to_string()]))
}

#[test]
fn the_outside_is_open_and_what_is_near_is_closed() -> Result<()> {
    on_a_machine(|world, _| {
        let server = serve(world)?;
        let one = Dialer::deploy(&server, "one", &["--min", "1"])?;
        let two = Dialer::deploy(&server, "two", &["--min", "1"])?;
        for protocol in ["tcp", "udp"] {
            one.reaches(protocol, OUTSIDE, 80)?;
            one.reaches(protocol, OUTSIDE, 53)?;
        }
        one.reaches("tcp", DATABASE, 5432)?;

        for address in METADATA {
            ensure!(dial(address, 80)? == dial_udp(address, 80)? && dial(address, 53)? == IpAddr::from(HOST), "the control");
            for port in [80, 53] {
                one.misses("tcp", address, port)?;
                one.misses("udp", address, port)?;
            }
        }
        ensure!(dial(HOST, HOST_PORT)? == dial_udp(HOST, HOST_PORT)?, "the control");
        one.misses("tcp", HOST, HOST_PORT)?;
        one.misses("udp", HOST, HOST_PORT)?;
        one.misses("tcp", HOST, server.address().port())?;
        // The first address of instances' routes is nobody's, not the host's.
        one.misses("tcp", Ipv4Addr::new(169, 254, 1, 1), HOST_PORT)?;

        let (inside, address) = two.inside()?;
        ensure!(inside.run(|| Ok(TcpStream::connect((address, 8080))?)).is_ok(), "the control: it listens on all addresses");
        one.misses("tcp", address, 8080)?;
        one.misses("udp", address, 8080)?;
        let from_host = TcpStream::connect_timeout(&(address, 8080).into(), SILENCE);
        ensure!(from_host.is_err(), "processes of the host reach an instance past the gateway");
        Ok(())
    })
}

#[test]
fn nobody_outside_reaches_an_instance() -> Result<()> {
    on_a_machine(|world, machine| {
        let server = serve(world)?;
        let one = Dialer::deploy(&server, "one", &["--min", "1"])?;
        let (_, address) = one.inside()?;
        one.reaches("tcp", OUTSIDE, 80)?;
        machine.outside.run(|| {
            shell(&format!("ip route add 10.208.0.0/12 via {HOST}"))?;
            let connected = TcpStream::connect_timeout(&(address, 8080).into(), SILENCE);
            ensure!(connected.is_err(), "the outside reaches an instance");
            // Nor does the machine forward to others since functions need that of it.
            shell(&format!("ip route add 198.51.100.0/24 via {HOST}"))?;
            Ok(())
        })?;
        // Another network behind the machine, which it did not forward to before.
        let other = Namespace::make()?;
        shell(&format!(
            "ip link add up1 type veth peer name down1 netns {}; ip address add 198.51.100.1/24 dev up1; ip link set up1 up",
            other.path()
        ))?;
        other.run(|| {
            shell("ip address add 198.51.100.2/24 dev down1; ip link set down1 up; ip route add default via 198.51.100.1")?;
            answer(80, &[])
        })?;
        wait::until_true("the other network is there", LIMIT, || Ok(dial(Ipv4Addr::new(198, 51, 100, 2), 80).is_ok()))?;
        // A function reaches it, so that the machine forwards between them.
        wait::until_true("a function reaches the other network", LIMIT, || {
            Ok(one.dial("tcp", Ipv4Addr::new(198, 51, 100, 2), 80)?.is_ok())
        })?;
        machine.outside.run(|| {
            ensure!(dial(Ipv4Addr::new(198, 51, 100, 2), 80).is_err(), "the machine has become a router for others");
            Ok(())
        })?;
        shell("ip link del up1").map(drop)
    })
}

#[test]
fn rules_open_by_address_and_port() -> Result<()> {
    on_a_machine(|world, _| {
        let server = serve(world)?;
        let [metadata, ..] = METADATA;
        let flags = ["--egress", &format!("{metadata}:80/tcp"), "--egress", &format!("{HOST}:{HOST_PORT}/tcp")];
        let opened = Dialer::deploy(&server, "opened", &flags)?;
        opened.reaches("tcp", metadata, 80)?;
        opened.misses("udp", metadata, 80)?;
        opened.misses("tcp", metadata, 443)?;
        let said = opened.dial("tcp", HOST, HOST_PORT)?;
        ensure!(said.as_ref().is_ok_and(|address| address.starts_with("10.208.")), "the host: {said:?}");
        opened.misses("udp", HOST, HOST_PORT)?;
        opened.misses("tcp", HOST, server.address().port())?;
        // What is open by default stays so.
        opened.reaches("tcp", OUTSIDE, 443)?;

        // A wide rule opens nothing that is closed by default.
        let wide = Dialer::deploy(&server, "wide", &["--egress", "0.0.0.0/0"])?;
        wide.reaches("tcp", OUTSIDE, 80)?;
        wide.misses("tcp", metadata, 80)?;
        wide.misses("tcp", HOST, HOST_PORT)
    })
}

#[test]
fn without_a_network_only_rules_open() -> Result<()> {
    on_a_machine(|world, _| {
        let server = serve(world)?;
        let only = ["--network", "off", "--egress", &format!("{OUTSIDE}:80-90/tcp"), "--egress", "10.7.0.0/16:5432"];
        let only = Dialer::deploy(&server, "only", &only)?;
        only.reaches("tcp", OUTSIDE, 80)?;
        only.reaches("tcp", DATABASE, 5432)?;
        only.reaches("udp", DATABASE, 5432)?;
        only.misses("udp", OUTSIDE, 80)?;
        for port in [443, 53] {
            only.misses("tcp", OUTSIDE, port)?;
            only.misses("udp", OUTSIDE, port)?;
        }
        only.misses("tcp", DATABASE, 80)?;
        only.misses("tcp", HOST, HOST_PORT)?;

        let off = Dialer::deploy(&server, "off", &["--network", "off"])?;
        off.misses("tcp", OUTSIDE, 80)?;
        let devices = server.get("/function/off/file?/proc/net/dev")?.text();
        ensure!(!devices.contains("eth0"), "{devices}");
        let resolver = server.get("/function/off/file?/etc/resolv.conf")?.text();
        ensure!(!resolver.contains("nameserver"), "{resolver}");
        Ok(())
    })
}

#[test]
fn names_are_resolved_beside_a_resolver_on_loopback() -> Result<()> {
    on_a_machine(|world, _| {
        let home = world.home();
        let write = |name: &str, text: String| std::fs::write(home.join(name), text);
        write("stub", "nameserver 127.0.0.53\noptions edns0 trust-ad\nsearch example.org\n".to_owned())?;
        std::fs::create_dir(home.join("resolve"))?;
        write("resolve/resolv.conf", format!("nameserver {OUTSIDE}\nsearch elsewhere.example\n"))?;
        let script = format!(
            "mkdir -p /run/systemd/resolve && mount --bind {0}/resolve /run/systemd/resolve && \
             mount --bind {0}/stub $(readlink -f /etc/resolv.conf) && exec \"$@\"",
            home.display()
        );
        // A tmpfs on /run, or the place to mount at would stay.
        let script = format!("mount -t tmpfs none /run && {script}");
        let wrapper = ["unshare", "--mount", "--propagation", "private", "sh", "-c", &script, "sh"];
        let wrapper = wrapper.iter().map(ToString::to_string).collect();
        let server = world.serve_with(&Extra { flags: Vec::new(), wrapper })?;
        server.import(&catalog::busybox(&["/bin/sh", "-c"])?, "sh:1")?;
        let written = server.ok(["run", "sh:1", "--", "cat /etc/resolv.conf"])?;
        ensure!(written == format!("nameserver {OUTSIDE}\noptions edns0 trust-ad\nsearch example.org\n"), "{written}");
        let found = server.ok(["run", "sh:1", "--", "nslookup database.example.org"])?;
        ensure!(found.contains(&DATABASE.to_string()), "{found}");
        Ok(())
    })
}

#[test]
fn a_firewall_that_drops_what_is_forwarded_is_passed_and_left_as_it_was() -> Result<()> {
    let machine = || {
        let machine = Machine::make()?;
        shell(
            "iptables -P FORWARD DROP
             iptables -N DOCKER-USER
             iptables -A DOCKER-USER -j RETURN
             iptables -A FORWARD -j DOCKER-USER
             iptables -A FORWARD -o docker0 -j ACCEPT",
        )?;
        Ok((machine, shell("iptables -S")?))
    };
    scenario_in(machine, |world, (_, rules)| {
        let server = serve(world)?;
        let one = Dialer::deploy(&server, "one", &["--min", "1"])?;
        one.reaches("tcp", OUTSIDE, 80)?;
        one.misses("tcp", METADATA[0], 80)?;
        ensure!(shell("iptables -S")? != *rules, "the control");
        // It is emptied and made anew while the server runs, as when Docker starts after it.
        shell("iptables -F FORWARD")?;
        wait::until_true("the rules are back", LIMIT, || Ok(one.dial("tcp", OUTSIDE, 80)?.is_ok()))?;
        shell("iptables -A FORWARD -j DOCKER-USER; iptables -A FORWARD -o docker0 -j ACCEPT")?;
        ensure!(server.stop()?.success());
        let after = shell("iptables -S")?;
        ensure!(after == *rules, "{after}\nwas\n{rules}");
        Ok(())
    })
}

#[test]
fn the_old_iptables_is_named_with_the_command_that_opens_it() -> Result<()> {
    let machine = || {
        let machine = Machine::make()?;
        shell("iptables-legacy -P FORWARD DROP")?;
        Ok(machine)
    };
    scenario_in(machine, |world, _| {
        let server = serve(world)?;
        let one = Dialer::deploy(&server, "one", &["--min", "1"])?;
        one.misses("tcp", OUTSIDE, 80)?;
        let log = tail(&server.places().log);
        let line = log.lines().find(|line| line.contains("iptables-legacy drops")).context(log.clone())?;
        let commands: Vec<&str> = line.split('`').skip(1).step_by(2).collect();
        ensure!(commands.len() == 2, "{line}");
        for command in commands {
            shell(command)?;
        }
        one.reaches("tcp", OUTSIDE, 80)?;
        shell("iptables-legacy -F FORWARD").map(drop)
    })
}

#[test]
fn addresses_are_pinned_on_the_hosts_side() -> Result<()> {
    on_a_machine(|world, machine| {
        let server = serve(world)?;
        let one = Dialer::deploy(&server, "one", &["--min", "1"])?;
        let two = Dialer::deploy(&server, "two", &["--min", "1"])?;
        let ((attacker, own), (_, neighbour)) = (one.inside()?, two.inside()?);
        let catcher = machine.outside.run(|| {
            let socket = UdpSocket::bind((OUTSIDE, 9))?;
            socket.set_read_timeout(Some(SILENCE))?;
            Ok(socket)
        })?;
        // The attacker has CAP_NET_ADMIN and CAP_NET_RAW in the network of the instance: more than any image is given.
        let send = |from: Ipv4Addr, setup: &str| {
            attacker.run(|| {
                shell(setup)?;
                UdpSocket::bind((from, 0))?.send_to(from.to_string().as_bytes(), (OUTSIDE, 9))?;
                Ok(())
            })
        };
        let caught = || {
            let mut bytes = [0; 64];
            catcher.recv(&mut bytes).ok().map(|length| String::from_utf8_lossy(&bytes[..length]).into_owned())
        };
        send(own, "true")?;
        ensure!(caught() == Some(own.to_string()), "the control");
        for stranger in [neighbour, Ipv4Addr::new(10, 208, 15, 1), Ipv4Addr::new(198, 51, 100, 1), OUTSIDE] {
            send(stranger, &format!("ip address add {stranger}/32 dev lo"))?;
            ensure!(caught().is_none(), "a packet with the address {stranger} got out");
            attacker.run(|| shell(&format!("ip address del {stranger}/32 dev lo")))?;
        }
        // With a new hardware address the kernel forgets its neighbours.
        let change = |mac: &str| {
            format!(
                "ip link set eth0 address {mac}; ip neighbour replace 169.254.1.1 lladdr 02:f7:ff:ff:ff:ff dev eth0 nud permanent"
            )
        };
        send(own, &change("02:f7:00:00:00:99"))?;
        ensure!(caught().is_none(), "a packet with another hardware address got out");
        // With the neighbour's hardware address, and telling everybody so.
        let [_, _, c, d] = neighbour.octets();
        let theirs = format!("02:f7:0a:d0:{c:02x}:{d:02x}");
        attacker.run(|| {
            shell(&format!("{}; ip address add {neighbour}/32 dev eth0", change(&theirs)))?;
            shell(&format!("busybox arping -c 2 -w 2 -U -I eth0 {neighbour} || true"))
        })?;
        let neighbours = shell("ip neighbour")?;
        ensure!(
            neighbours.lines().all(|line| !line.starts_with("10.208.") || line.trim_end().ends_with("PERMANENT")),
            "{neighbours}"
        );
        two.reaches("tcp", OUTSIDE, 80)?;
        send(neighbour, "true")?;
        ensure!(caught().is_none(), "a packet as the neighbour's got out");
        attacker.run(|| shell(&format!("ip address del {neighbour}/32 dev eth0")))?;

        // Back to what it was given, it reaches the outside again.
        let [_, _, c, d] = own.octets();
        send(own, &change(&format!("02:f7:0a:d0:{c:02x}:{d:02x}")))?;
        ensure!(caught() == Some(own.to_string()), "the control");
        // IPv6 leads nowhere, even where somebody switches it on.
        shell("ip address add fd77::1/64 dev up0 nodad")?;
        let six = attacker.run(|| {
            shell("echo 0 > /proc/sys/net/ipv6/conf/eth0/disable_ipv6; ip address add fd77::2/64 dev eth0 nodad; ip route add fd77::1 dev eth0")?;
            shell("busybox ping -6 -c 1 -W 1 fd77::1 > /dev/null 2>&1 && echo reached || echo silent")
        })?;
        ensure!(six == "silent\n", "{six}");
        shell("ip address del fd77::1/64 dev up0").map(drop)
    })
}

/// The process that connects networks.
fn net_pid(server: &Server) -> Result<i32> {
    let keeper = server.pid();
    let all = parse::processes()?;
    let found = all.iter().find(|process| process.parent == keeper && process.title == "funtainer net");
    Ok(found.with_context(|| format!("keeper {keeper} has no network process"))?.pid)
}

fn signal(pid: i32, signal: Signal) -> Result<()> {
    Ok(kill_process(Pid::from_raw(pid).context("a process id is positive")?, signal)?)
}

#[test]
fn a_start_without_a_network_at_hand_waits() -> Result<()> {
    on_a_machine(|world, _| {
        let server = serve(world)?;
        let one = Dialer::deploy(&server, "one", &["--concurrency", "1", "--max", "8"])?;
        let net = net_pid(&server)?;
        signal(net, Signal::STOP)?;
        let scaled = server.begin(["scale", "one", "8"])?;
        let told = wait::until_true("the log tells of starts that wait", LIMIT, || {
            Ok(tail(&server.places().log).contains("no network is ready for instance"))
        });
        // Nothing else waits: calls are answered meanwhile.
        let answered = server.get("/function/one");
        signal(net, Signal::CONT)?;
        told?;
        answered?;
        let finished = scaled.finish(LIMIT)?;
        ensure!(finished.status.success(), "{finished:?}");
        ensure!(server.instances("one")? == 8);
        one.reaches("tcp", OUTSIDE, 80)
    })
}

#[test]
fn the_network_process_is_killed() -> Result<()> {
    on_a_machine(|world, _| {
        let server = serve(world)?;
        let one = Dialer::deploy(&server, "one", &["--min", "1", "--egress", &format!("{}:80", METADATA[0])])?;
        let two = Dialer::deploy(&server, "two", &["--min", "1"])?;
        let only = ["--min", "1", "--network", "off", "--egress", &format!("{OUTSIDE}:80")];
        let only = Dialer::deploy(&server, "only", &only)?;
        let (_, neighbour) = two.inside()?;
        for _ in 0..3 {
            let net = net_pid(&server)?;
            signal(net, Signal::KILL)?;
            // What is in use goes on, and stays closed.
            one.reaches("tcp", OUTSIDE, 80)?;
            one.misses("tcp", neighbour, 8080)?;
            wait::until_true("another one", LIMIT, || Ok(net_pid(&server).is_ok_and(|pid| pid != net)))?;
            server.ok(["scale", "two", "3"])?;
            one.reaches("tcp", METADATA[0], 80)?;
            one.misses("tcp", METADATA[0], 443)?;
            two.reaches("tcp", OUTSIDE, 80)?;
            two.misses("tcp", METADATA[0], 80)?;
            only.reaches("tcp", OUTSIDE, 80)?;
            only.misses("tcp", OUTSIDE, 443)?;
            server.ok(["scale", "two", "1"])?;
        }
        Ok(())
    })
}

#[test]
fn a_packet_filter_that_is_emptied_is_filled_again() -> Result<()> {
    on_a_machine(|world, _| {
        let server = serve(world)?;
        let only = ["--min", "1", "--network", "off", "--egress", &format!("{OUTSIDE}:80")];
        let only = Dialer::deploy(&server, "only", &only)?;
        only.reaches("tcp", OUTSIDE, 80)?;
        // What `systemctl reload nftables` does.
        shell("nft flush ruleset")?;
        wait::until_true("the table is back", LIMIT, || Ok(shell("nft list tables")?.contains("funtainer")))?;
        only.reaches("tcp", OUTSIDE, 80)?;
        only.misses("tcp", OUTSIDE, 443)?;
        only.misses("tcp", HOST, HOST_PORT)?;
        server.ok(["scale", "only", "3"])?;
        only.reaches("tcp", OUTSIDE, 80)
    })
}

#[test]
fn what_a_killed_server_changed_is_put_back() -> Result<()> {
    on_a_machine(|world, _| {
        shell("iptables -P FORWARD DROP")?;
        let rules = shell("iptables -S")?;
        let forwarding = "/proc/sys/net/ipv4/conf/up0/forwarding";
        let mut server = serve(world)?;
        let places = server.places().clone();
        Dialer::deploy(&server, "one", &["--min", "1"])?.reaches("tcp", OUTSIDE, 80)?;
        ensure!(std::fs::read_to_string(forwarding)? == "1\n", "the control");

        // The keeper alone: its network process sees to it.
        let net = net_pid(&server)?;
        signal(server.pid(), Signal::KILL)?;
        ensure!(server.ended(LIMIT)?.is_some());
        wait::until_true("the network process ends", LIMIT, || Ok(parse::process(net)?.is_none()))?;
        ensure!(shell("iptables -S")? == rules && std::fs::read_to_string(forwarding)? == "0\n");
        ensure!(!shell("nft list tables")?.contains("funtainer"));

        // Both at once: the next server of the data directory does.
        let mut server = world.serve_at(&places, "127.0.0.1:0")?;
        let net = net_pid(&server)?;
        signal(net, Signal::STOP)?;
        signal(server.pid(), Signal::KILL)?;
        signal(net, Signal::KILL)?;
        ensure!(server.ended(LIMIT)?.is_some());
        ensure!(shell("nft list tables")?.contains("funtainer"), "the control");
        ensure!(std::fs::read_to_string(forwarding)? == "1\n", "the control");
        let server = world.serve_at(&places, "127.0.0.1:0")?;
        ensure!(server.get("/function/one/dial?tcp/203.0.113.2:80")?.text() == HOST.to_string());
        ensure!(shell("nft list tables")?.lines().filter(|line| line.contains("funtainer")).count() == 1);
        ensure!(server.stop()?.success());
        ensure!(shell("iptables -S")? == rules && std::fs::read_to_string(forwarding)? == "0\n");
        // What the test itself changed.
        shell("iptables -P FORWARD ACCEPT; nft delete table ip filter").map(drop)
    })
}

#[test]
fn ranges_are_each_servers_own() -> Result<()> {
    on_a_machine(|world, _| {
        let servers = [serve(world)?, serve(world)?];
        let mut networks = Vec::new();
        for server in &servers {
            let one = Dialer::deploy(server, "one", &["--min", "1"])?;
            one.reaches("tcp", OUTSIDE, 80)?;
            networks.push(one.inside()?.1.octets());
        }
        ensure!(networks[0][..2] == networks[1][..2] && networks[0][2] >> 4 != networks[1][2] >> 4, "{networks:?}");

        let named = world.serve_with(&extra(&["--network-range", "192.168.40.0/24"]))?;
        let one = Dialer::deploy(&named, "one", &["--min", "1"])?;
        one.reaches("tcp", OUTSIDE, 80)?;
        ensure!(one.inside()?.1.octets()[..3] == [192, 168, 40]);
        for (range, why) in [
            ("192.168.40.0/24", "collides with the host's route or address 192.168.40.0/24"),
            ("203.0.0.0/16", "collides with the host's route or address 203.0.113.0/24"),
        ] {
            let refused =
                world.serve_with(&extra(&["--network-range", range])).err().context("a range that is taken is given")?;
            ensure!(format!("{refused:#}").contains(why), "{refused:#}");
        }
        Ok(())
    })
}

#[test]
fn without_what_networks_need_functions_run_alone() -> Result<()> {
    on_a_machine(|world, _| {
        let wrapper = ["setpriv", "--bounding-set=-net_admin", "--inh-caps=-net_admin"].map(str::to_owned).to_vec();
        let server = world.serve_with(&Extra { flags: Vec::new(), wrapper })?;
        let one = Dialer::deploy(&server, "one", &[])?;
        ensure!(server.get("/function/one")?.text() == "probe\n");
        one.misses("tcp", OUTSIDE, 80)?;
        let log = tail(&server.places().log);
        ensure!(log.contains("functions have no network besides their own loopback"), "{log}");
        Ok(())
    })
}

#[test]
fn a_server_can_leave_the_network_alone() -> Result<()> {
    on_a_machine(|world, _| {
        let before = shell("nft list ruleset; ip -o link; ip route")?;
        let server = world.serve_with(&extra(&["--network", "off"]))?;
        let one = Dialer::deploy(&server, "one", &["--egress", "0.0.0.0/0"])?;
        one.misses("tcp", OUTSIDE, 80)?;
        ensure!(shell("nft list ruleset; ip -o link; ip route")? == before);
        ensure!(net_pid(&server).is_err());
        Ok(())
    })
}

/// An ordinary user's server, whose functions reach the outside by one of the two programs for that.
fn by(hidden: &str, test: impl FnOnce(&World, &Machine, &Server) -> Result<()>) -> Result<()> {
    let user = User::create(Subordinate::Usual)?.with_tun()?.without(hidden)?;
    on_a_machine(|world, machine| {
        let server = world.serve_as_with(&user, &["--dns", &OUTSIDE.to_string()])?;
        test(world, machine, &server)
    })
}

/// What holds for root's server holds for an ordinary user's, in the network that he can make.
fn the_same_without_root(hidden: &str) -> Result<()> {
    // Not an address of the interface by which packets leave.
    let other_own = Ipv4Addr::new(198, 51, 100, 7);
    by(hidden, |_, _, server| {
        let one = Dialer::deploy(server, "one", &["--min", "1"])?;
        let two = Dialer::deploy(server, "two", &["--min", "1"])?;
        for protocol in ["tcp", "udp"] {
            one.reaches(protocol, OUTSIDE, 80)?;
            one.reaches(protocol, OUTSIDE, 53)?;
        }
        one.reaches("tcp", DATABASE, 5432)?;
        for address in METADATA {
            ensure!(dial(address, 80)? == IpAddr::from(HOST), "the control");
            one.misses("tcp", address, 80)?;
            one.misses("udp", address, 53)?;
        }
        ensure!(dial(HOST, HOST_PORT)? == dial_udp(HOST, HOST_PORT)?, "the control");
        let gateway = Ipv4Addr::new(192, 0, 0, 2);
        for address in [HOST, gateway, Ipv4Addr::new(169, 254, 1, 1)] {
            one.misses("tcp", address, HOST_PORT)?;
            one.misses("udp", address, HOST_PORT)?;
        }
        one.misses("tcp", HOST, server.address().port())?;
        one.misses("tcp", gateway, server.address().port())?;
        // An address that the machine gets while the server runs.
        shell(&format!("ip address add {other_own}/32 dev lo"))?;
        ensure!(dial(other_own, HOST_PORT).is_ok(), "the control");
        wait::until_true("the machine's new address is closed", LIMIT, || Ok(one.dial("tcp", other_own, HOST_PORT)?.is_err()))?;
        shell(&format!("ip address del {other_own}/32 dev lo"))?;

        let (inside, address) = two.inside()?;
        ensure!(inside.run(|| Ok(TcpStream::connect((address, 8080))?)).is_ok(), "the control: it listens on all addresses");
        one.misses("tcp", address, 8080)?;

        let [metadata, ..] = METADATA;
        let flags =
            ["--network", "off", "--egress", &format!("{metadata}:80/tcp"), "--egress", &format!("{HOST}:{HOST_PORT}/tcp")];
        let opened = Dialer::deploy(server, "opened", &flags)?;
        opened.reaches("tcp", metadata, 80)?;
        opened.misses("tcp", metadata, 443)?;
        opened.reaches("tcp", HOST, HOST_PORT)?;
        opened.misses("tcp", HOST, server.address().port())?;
        opened.misses("tcp", OUTSIDE, 80)
    })
}

#[test]
fn an_ordinary_users_functions_go_out_by_pasta() -> Result<()> {
    the_same_without_root("slirp4netns")
}

#[test]
fn an_ordinary_users_functions_go_out_by_slirp4netns() -> Result<()> {
    the_same_without_root("pasta")
}

#[test]
fn the_way_out_of_an_ordinary_users_server_comes_back_and_ends_with_it() -> Result<()> {
    by("slirp4netns", |world, _, server| {
        let one = Dialer::deploy(server, "one", &["--min", "1"])?;
        one.reaches("tcp", OUTSIDE, 80)?;
        let titled = |title: &str| -> Result<Vec<i32>> {
            let members = world.scope().members()?;
            let all = members.iter().filter_map(|pid| parse::process(*pid).transpose()).collect::<Result<Vec<_>>>()?;
            Ok(all.iter().filter(|process| process.title.starts_with(title)).map(|process| process.pid).collect())
        };
        for title in ["/usr/bin/pasta", "funtainer uplink", "funtainer net"] {
            let [pid] = titled(title)?[..] else { anyhow::bail!("{title}: {:?}", titled(title)?) };
            kill_process(Pid::from_raw(pid).context("a process id is positive")?, Signal::KILL)?;
            wait::until_true("there is another one", LIMIT, || Ok(titled(title)?.iter().any(|other| *other != pid)))?;
            wait::until_true("the outside is reached again", LIMIT, || Ok(one.dial("tcp", OUTSIDE, 80)?.is_ok()))?;
            one.misses("tcp", HOST, HOST_PORT)?;
        }
        kill_process(Pid::from_raw(server.pid()).context("a process id is positive")?, Signal::KILL)?;
        wait::until_true("with the keeper everything of it ends", LIMIT, || Ok(world.scope().members()?.is_empty()))?;
        // Stale sockets are replaced by the next server.
        Ok(std::fs::remove_file(&server.places().admin)?)
    })
}

#[test]
fn an_ordinary_user_without_a_way_out_is_told_what_is_missing() -> Result<()> {
    let users = [
        (User::create(Subordinate::Usual)?.with_tun()?.without("pasta")?.without("slirp4netns")?, "apt install passt"),
        (User::create(Subordinate::None)?, "/dev/net/tun"),
    ];
    on_a_machine(|world, _| {
        for (user, words) in &users {
            let server = world.serve_as(user)?;
            let log = tail(&server.places().log);
            ensure!(log.contains("no network besides their own loopback") && log.contains(words), "{log}");
            let one = Dialer::deploy(&server, "one", &[])?;
            one.misses("tcp", OUTSIDE, 80)?;
        }
        Ok(())
    })
}

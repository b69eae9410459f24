//! The process at work, in network namespaces that the tests make: a host, the outside beyond it, and instances.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream, UdpSocket};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{Scope, ScopedJoinHandle};

use rustix::thread::LinkNameSpaceType;

use super::*;
use crate::testing::in_network;

/// Longest wait for anything.
const DEADLINE: Duration = Duration::from_mins(3);
/// Longest wait for what must not come.
const SILENCE: Duration = Duration::from_secs(3);
const ID: &str = "0123456789abcdef";
/// Addresses of the world below.
const HOST: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 1);
const OUTSIDE: Ipv4Addr = Ipv4Addr::new(203, 0, 113, 2);
const PRIVATE: Ipv4Addr = Ipv4Addr::new(10, 7, 7, 7);
const METADATA: Ipv4Addr = Ipv4Addr::new(169, 254, 169, 254);

/// A network namespace.
struct Namespace {
    handle: OwnedFd,
    route: OwnedFd,
}

impl Namespace {
    fn new() -> Self {
        in_network(|| {
            crate::netns::prepare().expect("a network like an instance's");
            Self {
                handle: std::fs::File::open("/proc/thread-self/ns/net").expect("a namespace").into(),
                route: netlink_socket(),
            }
        })
    }

    /// Runs something in it.
    fn run<T: Send>(&self, body: impl FnOnce() -> T + Send) -> T {
        let handle = self.handle.as_fd();
        let thread = || {
            rustix::thread::move_into_link_name_space(handle, Some(LinkNameSpaceType::Network)).expect("the namespace");
            body()
        };
        std::thread::scope(|scope| scope.spawn(thread).join()).unwrap_or_else(|panic| std::panic::resume_unwind(panic))
    }
}

fn netlink_socket() -> OwnedFd {
    rustix::net::socket_with(
        rustix::net::AddressFamily::NETLINK,
        rustix::net::SocketType::RAW,
        rustix::net::SocketFlags::CLOEXEC,
        None,
    )
    .expect("a socket of rtnetlink")
}

/// A shell in the network namespace of the calling thread.
#[track_caller]
fn shell(script: &str) -> String {
    let output = Command::new("sh").args(["-ec", script]).output().expect("a shell");
    assert!(output.status.success(), "{script}\n{}", String::from_utf8_lossy(&output.stderr));
    String::from_utf8(output.stdout).expect("text")
}

/// The namespace of the calling thread becomes a host: an interface to the outside, where there are servers on all addresses.
fn host() -> Namespace {
    let outside = Namespace::new();
    let descriptor = std::os::fd::AsRawFd::as_raw_fd(&outside.handle);
    shell("ip link set lo up");
    shell(&format!("ip link add up0 type veth peer name down0 netns /proc/{}/fd/{descriptor}", std::process::id()));
    shell(&format!(
        "ip address add {HOST}/24 dev up0 && ip link set up0 up && ip route add default via {OUTSIDE} && echo 0 > /proc/sys/net/ipv4/ip_forward"
    ));
    outside.run(|| {
        shell(&format!(
            "ip address add {OUTSIDE}/24 dev down0 && ip link set down0 up
             for address in {PRIVATE} {METADATA} 100.100.100.200 168.63.129.16; do ip address add $address/32 dev lo; done"
        ));
    });
    shell(&format!("ping -c 1 -W 10 {OUTSIDE} > /dev/null || true"));
    outside
}

/// `funtainer net`, as a thread in the host's namespace.
struct Process<'scope> {
    keeper: OwnedFd,
    thread: ScopedJoinHandle<'scope, ()>,
}

static SAID: AtomicU32 = AtomicU32::new(0);

fn say(line: &str) {
    SAID.fetch_add(1, Ordering::Relaxed);
    eprintln!("net: {line}");
}

impl<'scope> Process<'scope> {
    fn start<'env>(
        scope: &'scope Scope<'scope, 'env>,
        directory: &std::path::Path,
        wanted: Option<Range>,
        resumed: Option<Range>,
        told: &[Order],
    ) -> Self {
        std::fs::write(directory.join("id"), ID).expect("a data directory");
        let (keeper, socket) = fds::pair().expect("a pair");
        let opened: OwnedFd = std::fs::File::open(directory).expect("a directory").into();
        let thread = scope.spawn(move || {
            let plan = Plan {
                hub: None,
                socket: socket.as_fd(),
                directory: opened.as_fd(),
                id: ID,
                wanted,
                resumed,
                title: Title::nowhere(),
                log: say,
            };
            serve(&plan, socket.as_fd(), opened.try_clone().expect("a descriptor"), None);
        });
        let process = Self { keeper, thread };
        for order in told.iter().chain([&Order::SetUp]) {
            process.order(order, &[]);
        }
        process
    }

    /// What it says to a range, and ends.
    fn start_alone(directory: &std::path::Path, range: &str) -> Report {
        let wanted = Some(range.parse().expect("a range"));
        std::thread::scope(|scope| {
            let process = Process::start(scope, directory, wanted, None, &[]);
            let report = process.report();
            process.end();
            report
        })
    }

    fn order(&self, order: &Order, descriptors: &[BorrowedFd<'_>]) {
        fds::send(self.keeper.as_fd(), &order.encode(), descriptors, SendFlags::empty()).expect("an order is taken");
    }

    #[track_caller]
    fn report(&self) -> Report {
        let mut polled = [PollFd::new(&self.keeper, PollFlags::IN)];
        let wait = Timespec { tv_sec: DEADLINE.as_secs() as i64, tv_nsec: 0 };
        assert_eq!(rustix::event::poll(&mut polled, Some(&wait)), Ok(1), "nothing is reported");
        let mut buffer = [0_u8; DATAGRAM_BYTES];
        let received = fds::receive(self.keeper.as_fd(), &mut buffer, RecvFlags::empty()).expect("a report").expect("a report");
        Report::decode(&buffer[..received.bytes], received.fds.len()).expect("a report")
    }

    #[track_caller]
    fn ready(&self) -> Range {
        match self.report() {
            Report::Ready(range) => range,
            other => panic!("{other:?}"),
        }
    }

    #[track_caller]
    fn plug(&self, network: u32, policy: Option<u32>, namespace: &Namespace) -> Ipv4Addr {
        let plug = Plug { network, policy, resolvers: vec![OUTSIDE] };
        self.order(&Order::Plug(plug), &[namespace.handle.as_fd(), namespace.route.as_fd()]);
        match self.report() {
            Report::Plugged { network: found, address } if found == network => address,
            other => panic!("{other:?}"),
        }
    }

    /// The keeper is gone.
    fn end(self) {
        drop(self.keeper);
        self.thread.join().expect("an orderly end");
    }
}

/// Sends `word` to a TCP server at an address, which answers with the address that it sees; `None` if it cannot be reached.
fn ask(to: Ipv4Addr, port: u16) -> Option<IpAddr> {
    let mut stream = TcpStream::connect_timeout(&SocketAddr::from((to, port)), SILENCE).ok()?;
    stream.set_read_timeout(Some(DEADLINE)).expect("a timeout");
    stream.write_all(b"x").ok()?;
    let mut text = String::new();
    stream.read_to_string(&mut text).ok()?;
    text.parse().ok()
}

/// Servers on a port in the namespace of the calling thread: each caller is told its address. They end with the test's process.
fn serve_tcp(port: u16) {
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port)).expect("a server");
    std::thread::spawn(move || {
        for stream in listener.incoming() {
            let Ok(mut stream) = stream else { continue };
            let peer = stream.peer_addr().expect("a peer").ip();
            let _ = stream.read(&mut [0]).and_then(|_| stream.write_all(peer.to_string().as_bytes()));
        }
    });
}

#[test]
fn instances_reach_the_outside_and_nothing_near() {
    in_network(|| {
        let outside = host();
        outside.run(|| [53, 80, 5432].into_iter().for_each(serve_tcp));
        [53, 80].into_iter().for_each(serve_tcp);
        let directory = tempfile::tempdir().expect("a directory");
        let (one, two) = (Namespace::new(), Namespace::new());
        // The control: from the host all of them answer.
        for address in [OUTSIDE, PRIVATE, METADATA, HOST] {
            shell(&format!("ip route replace {address} via {OUTSIDE} 2> /dev/null || true"));
            assert!(ask(address, 80).is_some(), "{address}");
        }
        std::thread::scope(|scope| {
            let process = Process::start(scope, directory.path(), None, None, &[]);
            let range = process.ready();
            let addresses = [process.plug(1, None, &one), process.plug(2, None, &two)];
            assert!(addresses.iter().all(|address| range.contains(*address)) && addresses[0] != addresses[1]);
            two.run(|| serve_tcp(80));
            one.run(|| {
                assert_eq!(ask(OUTSIDE, 80), Some(HOST.into()), "the outside sees the host's address");
                assert_eq!(ask(PRIVATE, 5432), Some(HOST.into()), "a database in a private network");
                for closed in [METADATA, HOST, addresses[1], Ipv4Addr::new(100, 100, 100, 200), Ipv4Addr::new(168, 63, 129, 16)]
                {
                    assert_eq!(ask(closed, 80), None, "{closed}");
                }
                assert_eq!(ask(METADATA, 53), None, "a name server that is none of its own");
            });
            // Nobody calls an instance from outside of it, not even the host.
            assert_eq!(ask(addresses[1], 80), None);
            assert_eq!(two.run(|| ask(addresses[1], 80)), Some(addresses[1].into()), "the server is there");
            process.end();
        });
    });
}

#[test]
fn the_host_is_as_it_was_afterwards() {
    in_network(|| {
        let outside = host();
        let look = || {
            shell(
                "nft list ruleset; ip -4 route; ip -o link | cut -d: -f2 | sort; cat /proc/sys/net/ipv4/conf/*/forwarding /proc/sys/net/ipv4/ip_forward",
            )
        };
        // What Docker does.
        shell(
            "iptables -P FORWARD DROP; iptables -N DOCKER-USER; iptables -A FORWARD -j DOCKER-USER; iptables -A DOCKER-USER -j RETURN",
        );
        let rules = shell("iptables -S");
        let before = look();
        let directory = tempfile::tempdir().expect("a directory");
        let one = Namespace::new();
        outside.run(|| serve_tcp(80));
        std::thread::scope(|scope| {
            let process = Process::start(scope, directory.path(), None, None, &[]);
            process.ready();
            process.plug(1, None, &one);
            assert_eq!(one.run(|| ask(OUTSIDE, 80)), Some(HOST.into()));
            let with = shell("iptables -S");
            assert!(with.contains("-A FORWARD -s 10.208.0.0/20 -i funt+ -m comment --comment"), "{with}");
            assert!(shell("cat /proc/sys/net/ipv4/ip_forward /proc/sys/net/ipv4/conf/up0/forwarding") == "0\n1\n");
            process.end();
        });
        assert_eq!(shell("iptables -S"), rules);
        assert_eq!(look(), before);
        let left: Vec<_> = std::fs::read_dir(directory.path()).expect("the directory").collect();
        assert_eq!(left.len(), 1, "{left:?}");
        one.run(|| assert!(!shell("ip -o link").contains("eth0")));
    });
}

/// A number that the kernel keeps for the network namespace of the calling thread.
fn followed() -> u32 {
    std::fs::read_to_string("/proc/sys/net/netfilter/nf_conntrack_count").expect("a count").trim().parse().expect("a number")
}

/// Datagrams to so many ports of an address, each a connection for who follows them.
fn flood(to: Ipv4Addr, ports: std::ops::Range<u16>) {
    let socket = UdpSocket::bind((Ipv4Addr::UNSPECIFIED, 0)).expect("a socket");
    for port in ports {
        // What is refused is told by the next call.
        let _ = socket.send_to(b"x", (to, port));
    }
}

#[track_caller]
fn until(what: &str, mut holds: impl FnMut() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !holds() {
        assert!(Instant::now() < deadline, "in vain: {what}");
        std::thread::park_timeout(Duration::from_millis(5));
    }
}

#[test]
fn connections_of_an_instance_are_bounded_and_end_with_it() {
    in_network(|| {
        let outside = host();
        outside.run(|| serve_tcp(80));
        let directory = tempfile::tempdir().expect("a directory");
        let (one, two) = (Namespace::new(), Namespace::new());
        std::thread::scope(|scope| {
            let process = Process::start(scope, directory.path(), None, None, &[]);
            process.ready();
            process.plug(1, None, &one);
            process.plug(2, None, &two);
            one.run(|| flood(OUTSIDE, 10_000..16_000));
            let bounded = followed();
            assert!((4096..4196).contains(&bounded), "{bounded} connections are followed");
            assert_eq!(two.run(|| ask(OUTSIDE, 80)), Some(HOST.into()), "another instance has room");
            // The control: without the rule there is no bound.
            let rule = shell(
                "nft --handle list chain inet funtainer-0123456789abcdef leaving | grep 'ct count' | sed 's/.*handle //'",
            );
            shell(&format!("nft delete rule inet funtainer-0123456789abcdef leaving handle {rule}"));
            one.run(|| flood(OUTSIDE, 20_000..26_000));
            let unbounded = followed();
            assert!(unbounded > 9000, "{unbounded} connections are followed");

            process.order(&Order::Unplug(1), &[]);
            until("the connections of the ended instance are forgotten", || followed() < 10);
            assert_eq!(two.run(|| ask(OUTSIDE, 80)), Some(HOST.into()), "those of others are not");
            process.end();
        });
    });
}

#[test]
fn a_successor_takes_over_what_is_in_use() {
    in_network(|| {
        let outside = host();
        outside.run(|| [80, 443].into_iter().for_each(serve_tcp));
        let directory = tempfile::tempdir().expect("a directory");
        let (one, two, three) = (Namespace::new(), Namespace::new(), Namespace::new());
        let rules = vec!["169.254.169.254:80/tcp".parse().expect("a rule")];
        let policy = Order::AddPolicy { number: 7, policy: Policy { rules, only: true } };
        std::thread::scope(|scope| {
            let process = Process::start(scope, directory.path(), None, None, std::slice::from_ref(&policy));
            let range = process.ready();
            let addresses = [process.plug(1, Some(7), &one), process.plug(2, None, &two)];
            process.plug(3, None, &three);
            // It dies: nothing is put back. The lock goes with the thread, as it would with a process.
            let Process { keeper, thread } = process;
            fds::send(keeper.as_fd(), b"no order", &[], SendFlags::empty()).expect("an order is taken");
            let record = std::fs::read(directory.path().join("net")).expect("a record");
            thread.join().expect("an end");
            // A fault of the keeper's makes it put everything back; what a killed one leaves is made again.
            std::fs::write(directory.path().join("net"), record).expect("a record");
            drop(keeper);

            let adopt = |network, policy, address| {
                let plug = Plug { network, policy, resolvers: vec![OUTSIDE] };
                Order::Adopt { plug, address }
            };
            let told = [policy, adopt(1, Some(7), addresses[0]), adopt(2, None, addresses[1])];
            let process = Process::start(scope, directory.path(), None, Some(range), &told);
            assert_eq!(process.ready(), range);
            // Their interfaces went with the first process: the networks are over, and their addresses still theirs.
            let four = Namespace::new();
            let address = process.plug(4, None, &four);
            assert!(!addresses.contains(&address), "{address}");
            assert_eq!(four.run(|| ask(OUTSIDE, 80)), Some(HOST.into()));
            process.order(&Order::Unplug(1), &[]);
            process.order(&Order::RemovePolicy(7), &[]);
            until("the policy is removed", || !shell("nft list ruleset").contains("chain rules-7"));
            process.end();
        });
    });
}

#[test]
fn what_is_no_network_is_refused_and_leaves_nothing() {
    in_network(|| {
        let _outside = host();
        let directory = tempfile::tempdir().expect("a directory");
        let one = Namespace::new();
        let (impostor, _other) = fds::pair().expect("a pair");
        let file: OwnedFd = std::fs::File::open("/dev/null").expect("a file").into();
        let ids: OwnedFd = std::fs::File::open("/proc/self/ns/user").expect("a namespace").into();
        std::thread::scope(|scope| {
            let process = Process::start(scope, directory.path(), None, None, &[]);
            process.ready();
            let interfaces = || shell("ip -o link | cut -d: -f2");
            let before = interfaces();
            for (network, (inside, route)) in
                (1..).zip([(&file, &one.route), (&ids, &one.route), (&one.handle, &impostor), (&one.handle, &file)])
            {
                let plug = Plug { network, policy: None, resolvers: Vec::new() };
                process.order(&Order::Plug(plug), &[inside.as_fd(), route.as_fd()]);
                let report = process.report();
                assert!(matches!(report, Report::PlugFailed { network: found, .. } if found == network), "{report:?}");
                assert_eq!(interfaces(), before);
            }
            assert!(!shell("nft list set inet funtainer-0123456789abcdef pins").contains("elements"));
            // A policy that was never told: its network is none.
            let plug = Plug { network: 9, policy: Some(99), resolvers: Vec::new() };
            process.order(&Order::Plug(plug), &[one.handle.as_fd(), one.route.as_fd()]);
            assert!(matches!(process.report(), Report::PlugFailed { network: 9, .. }));
            assert_eq!(interfaces(), before);
            process.plug(10, None, &one);
            process.end();
        });
    });
}

#[test]
fn an_empty_range_says_so_and_what_is_given_back_is_used_again() {
    in_network(|| {
        let _outside = host();
        let directory = tempfile::tempdir().expect("a directory");
        let range: Range = "10.99.0.0/26".parse().expect("a range");
        std::thread::scope(|scope| {
            let process = Process::start(scope, directory.path(), Some(range), None, &[]);
            assert_eq!(process.ready(), range);
            let namespaces: Vec<Namespace> = (0..62).map(|_| Namespace::new()).collect();
            for (network, namespace) in (1..).zip(&namespaces) {
                process.plug(network, None, namespace);
            }
            let last = Namespace::new();
            let plug = Plug { network: 63, policy: None, resolvers: Vec::new() };
            process.order(&Order::Plug(plug), &[last.handle.as_fd(), last.route.as_fd()]);
            let report = process.report();
            let Report::PlugFailed { network: 63, step, .. } = &report else { panic!("{report:?}") };
            assert!(step.contains("free address"), "{step}");
            process.order(&Order::Unplug(5), &[]);
            assert_eq!(process.plug(64, None, &last), Ipv4Addr::new(10, 99, 0, 5));
            process.end();
        });
        let taken = Process::start_alone(directory.path(), "203.0.113.0/24");
        assert!(matches!(&taken, Report::RangeTaken(why) if why.contains("203.0.113.0/24")), "{taken:?}");
    });
}

//! The process at work, in network namespaces that the tests make: a host, the outside beyond it, and instances.

use std::io::{Read as _, Write as _};
use std::net::{IpAddr, SocketAddr, TcpListener, TcpStream};
use std::os::fd::AsFd as _;
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::thread::{Scope, ScopedJoinHandle};

use rustix::thread::LinkNameSpaceType;

use super::*;
use crate::testing::in_network;

/// Longest wait for anything.
const DEADLINE: Duration = Duration::from_secs(30);
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
                socket: socket.as_fd(),
                directory: opened.as_fd(),
                id: ID,
                wanted,
                resumed,
                title: Title::nowhere(),
                log: say,
            };
            serve(&plan, socket.as_fd(), opened.try_clone().expect("a descriptor"));
        });
        let process = Self { keeper, thread };
        for order in told.iter().chain([&Order::SetUp]) {
            process.order(order, &[]);
        }
        process
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

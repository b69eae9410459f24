//! Time from a daemon's `Start` to the first byte that the image's process writes, back to back and after 100 ms of quiet.
//!
//! `cargo run --release -p funtainer-sandbox --example start_bench`; needs root, busybox-static and erofs-utils, and a directory for temporary
//! files (`TMPDIR`) on a disk. With `KEEPER_HOST_OLDEST` set, layers are mounted and stacked as on the oldest kernels. The image's process is
//! `busybox echo`, with its streams as a call's.

use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use funtainer_model::{ByteSize, Digest, InstanceId, Isolation, LayerId, Limits, RevisionId, StopSignal};
use funtainer_sandbox::fds;
use funtainer_sandbox::protocol::{MESSAGE_BYTES_MAX, Reply, Request, RevisionSpec, SocketCounts, Streams};
use rustix::net::{RecvFlags, SendFlags};
use rustix::pipe::{PipeFlags, pipe_with};

/// Starts of each row.
const ROUNDS: usize = 300;
/// Their memory limit.
const MEMORY_BYTES: u64 = 64 << 20;

fn main() {
    let directory = PathBuf::from(format!("{}/start-bench-{}", std::env::temp_dir().display(), std::process::id()));
    std::fs::create_dir_all(directory.join("root/bin")).expect("make a directory");
    std::fs::copy("/bin/busybox", directory.join("root/bin/busybox")).expect("busybox-static is installed");
    let image = directory.join("image");
    let made = Command::new("mkfs.erofs").arg(&image).arg(directory.join("root")).stdout(Stdio::null()).status();
    assert!(made.expect("erofs-utils is installed").success());

    let mut bench = Bench::new(&directory, &image);
    let mut rows = Vec::new();
    for (name, sockets, pause) in [
        ("back to back, no sockets", false, Duration::ZERO),
        ("back to back, 16 sockets", true, Duration::ZERO),
        ("10 ms apart, 16 sockets", true, Duration::from_millis(10)),
        ("after 100 ms of quiet, no sockets", false, Duration::from_millis(100)),
        ("after 100 ms of quiet, 16 sockets", true, Duration::from_millis(100)),
    ] {
        let rounds = if pause > Duration::from_millis(50) { ROUNDS / 5 } else { ROUNDS };
        let mut times: Vec<Duration> = (0..rounds).map(|_| bench.start(sockets, pause)).collect();
        times.sort();
        let at = |part: usize| times[(times.len() - 1) * part / 100].as_micros();
        rows.push(format!("{name:36} p10 {:6} p50 {:6} p95 {:6} µs  n={rounds}", at(10), at(50), at(95)));
    }
    println!("{}", rows.join("\n"));
    println!("keeper VmRSS {}", bench.resident());
    drop(bench);
    std::fs::remove_dir_all(directory).expect("remove the directory");
}

struct Bench {
    keeper: Child,
    control: std::os::fd::OwnedFd,
    stub: UnixStream,
    number: u32,
    admin: PathBuf,
}

impl Bench {
    fn new(directory: &Path, image: &Path) -> Self {
        let admin = directory.join("admin.sock");
        let host = std::env::current_exe().expect("know oneself").with_file_name("keeper_host");
        let mut keeper = Command::new(host)
            .arg("serve")
            .args([&admin, &directory.join("data")])
            .stdout(Stdio::piped())
            .spawn()
            .expect("keeper_host is built: cargo build --examples");
        let stub = loop {
            if let Ok(stub) = UnixStream::connect(&admin) {
                break stub;
            }
            assert!(keeper.try_wait().expect("look at the keeper").is_none(), "the keeper ended");
            std::thread::yield_now();
        };
        let mut received = fds::receive(stub.as_fd(), &mut [0], RecvFlags::empty()).expect("receive").expect("a descriptor");
        let control = received.fds.take(0).expect("a descriptor");
        rustix::io::ioctl_fionbio(&control, false).expect("block");
        let mut bench = Self { keeper, control, stub, number: 0, admin };
        bench.ask(&Request::Hello);
        bench.ask(&Request::Ready);
        let mut line = String::new();
        BufReader::new(bench.keeper.stdout.take().expect("piped")).read_line(&mut line).expect("its line");
        let layer = LayerId { diff_id: Digest::from_sha256([1; 32]), base: true };
        let file = bench.stage(image);
        let number = bench.send(&Request::CommitLayer { layer }, &[file.as_fd()]);
        assert_eq!(bench.answer(number), Reply::Done);
        for sockets in [false, true] {
            let spec = RevisionSpec {
                layers: vec![layer],
                argv: [&b"/bin/busybox"[..], b"echo", b"hello"].map(<[u8]>::to_vec).to_vec(),
                env: Vec::new(),
                working_dir: b"/".to_vec(),
                uid: 0,
                gid: 0,
                groups: Vec::new(),
                limits: Limits { memory: ByteSize::bytes(MEMORY_BYTES), ..Limits::default() },
                isolation: Isolation::default(),
                volumes: Vec::new(),
                streams: Streams::Call,
                files: Vec::new(),
                listeners: Vec::new(),
                sockets: if sockets { SocketCounts { v4: 12, v6: 4 } } else { SocketCounts { v4: 0, v6: 0 } },
                stop_signal: StopSignal::TERM,
                hostname: "bench".to_owned(),
            };
            let (function, title) = ("bench".to_owned(), "bench".to_owned());
            let opened =
                bench.ask(&Request::OpenRevision { revision: revision(sockets), function, title, spec: Box::new(spec) });
            assert_eq!(opened, Reply::Done);
        }
        bench
    }

    /// Puts an image where the daemon has its own, as it would: the keeper takes files of its daemon's, by the daemon's mount, only.
    fn stage(&self, image: &Path) -> std::fs::File {
        let keeper = self.keeper.id();
        let children = std::fs::read_to_string(format!("/proc/{keeper}/task/{keeper}/children")).expect("look at the keeper");
        let is_daemon = |pid: &&str| {
            let title = std::fs::read(format!("/proc/{pid}/cmdline")).unwrap_or_default();
            title.split(|byte| *byte == 0).any(|word| word == b"daemon")
        };
        let daemon = children.split_whitespace().find(is_daemon).expect("the daemon runs");
        let store = PathBuf::from(format!("/proc/{daemon}/root/data/store"));
        let staged = store.join("staged");
        std::fs::copy(image, &staged).expect("copy the image");
        let owner = std::fs::metadata(store).expect("look at the store");
        std::os::unix::fs::chown(&staged, Some(owner.uid()), Some(owner.gid())).expect("give the image to the daemon");
        std::fs::File::open(staged).expect("open the image")
    }

    fn send(&mut self, request: &Request, descriptors: &[std::os::fd::BorrowedFd<'_>]) -> u32 {
        self.number += 1;
        let datagram = request.encode(self.number).expect("within bounds");
        fds::send(self.control.as_fd(), &datagram, descriptors, SendFlags::empty()).expect("send");
        self.number
    }

    fn answer(&mut self, to: u32) -> Reply {
        loop {
            let (number, reply) = self.receive();
            if number == to {
                return reply;
            }
        }
    }

    fn receive(&mut self) -> (u32, Reply) {
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        let received =
            fds::receive(self.control.as_fd(), &mut buffer, RecvFlags::empty()).expect("receive").expect("a message");
        Reply::decode(&buffer[..received.bytes], received.fds.len()).expect("a reply")
    }

    fn ask(&mut self, request: &Request) -> Reply {
        let number = self.send(request, &[]);
        self.answer(number)
    }

    /// One start, to its end; the time to its first byte.
    fn start(&mut self, sockets: bool, pause: Duration) -> Duration {
        std::thread::sleep(pause);
        let instance = InstanceId::from_bytes(u128::from(self.number).to_be_bytes());
        let (_init, theirs) = fds::pair().expect("a pair");
        let (stdin, stdin_write) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        let (stdout_read, stdout) = pipe_with(PipeFlags::CLOEXEC).expect("a pipe");
        drop(stdin_write);
        let request = Request::Start { instance, revision: revision(sockets), descriptor: Vec::new() };
        let begun = Instant::now();
        let number = self.send(&request, &[theirs.as_fd(), stdin.as_fd(), stdout.as_fd()]);
        drop((stdin, stdout, theirs));
        let mut output = std::fs::File::from(stdout_read);
        let mut byte = [0];
        let read = output.read(&mut byte).expect("read");
        let took = begun.elapsed();
        assert_eq!((read, byte), (1, *b"h"), "the program did not run");
        assert!(matches!(self.answer(number), Reply::Started { .. }));
        loop {
            if let (0, Reply::Exited { instance: ended, exit }) = self.receive() {
                assert_eq!((ended, exit.status), (instance, Some(0)));
                break;
            }
        }
        assert_eq!(self.ask(&Request::AcknowledgeExit { instance }), Reply::Done);
        took
    }

    fn resident(&self) -> String {
        let status = std::fs::read_to_string(format!("/proc/{}/status", self.keeper.id())).unwrap_or_default();
        status.lines().find_map(|line| line.strip_prefix("VmRSS:")).unwrap_or("unknown").trim().to_owned()
    }
}

impl Drop for Bench {
    fn drop(&mut self) {
        // SIGTERM, so that nothing of it remains.
        let pid = rustix::process::Pid::from_child(&self.keeper);
        if rustix::process::kill_process(pid, rustix::process::Signal::TERM).is_ok() {
            // The stub daemon ends by a byte.
            let _ = (&self.stub).write_all(&[0]);
            let _ = self.keeper.wait();
        }
        let _ = std::fs::remove_file(&self.admin);
    }
}

fn revision(sockets: bool) -> RevisionId {
    RevisionId::from_bytes(u128::from(sockets).to_be_bytes())
}

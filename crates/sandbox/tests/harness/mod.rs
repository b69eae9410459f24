//! A real keeper, with the caller in the place of its daemon.
#![expect(unreachable_pub, reason = "a module of several test programs")]
#![expect(dead_code, reason = "each test program uses a part of it")]

use std::collections::VecDeque;
use std::fs;
use std::io::{BufRead as _, BufReader, Read as _, Write as _};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::MetadataExt as _;
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdout, Command, ExitStatus, Stdio};
use std::time::{Duration, Instant};

use funtainer_model::{ByteSize, Digest, ExecId, InstanceId, Isolation, LayerId, Limits, RevisionId, StopSignal};
use funtainer_sandbox::fds;
use funtainer_sandbox::mount::{Features, Mounts};
use funtainer_sandbox::protocol::{
    ExecSpec, ExitRecord, InitMessage, MESSAGE_BYTES_MAX, Refusal, Reply, Request, RevisionSpec, SocketCounts, Streams,
    WindowSize,
};
use rustix::event::{PollFd, PollFlags, Timespec};
use rustix::net::{RecvFlags, SendFlags};
use rustix::pipe::{PipeFlags, pipe_with};

/// Longest wait for anything, on an ordinary machine.
const DEADLINE: Duration = Duration::from_secs(20);
/// Between two looks at what cannot be waited for otherwise.
const PAUSE: Duration = Duration::from_millis(1);
/// Memory limit of the instances here.
pub const MEMORY: u64 = 64 << 20;

/// Longest wait for anything: a multiple where `FUNTAINER_TEST_PATIENCE` says that the machine is slower by so much.
pub fn deadline() -> Duration {
    let patience = std::env::var("FUNTAINER_TEST_PATIENCE");
    DEADLINE * patience.map_or(1, |factor| factor.parse().expect("FUNTAINER_TEST_PATIENCE is a whole number"))
}

/// A running keeper; killed when dropped.
pub struct Server {
    pub child: Child,
    pub stdout: BufReader<ChildStdout>,
    pub admin: PathBuf,
    pub data: PathBuf,
    directory: tempfile::TempDir,
}

impl Server {
    pub fn new() -> Self {
        Self::with_env(&[])
    }

    pub fn with_env(env: &[(&str, &str)]) -> Self {
        let directory = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        Self::on(directory, env)
    }

    fn on(directory: tempfile::TempDir, env: &[(&str, &str)]) -> Self {
        assert!(rustix::process::geteuid().is_root(), "the tests of the sandbox need root: run them with sudo");
        // Short: the path of a Unix socket has at most 107 bytes.
        let admin = PathBuf::from(format!("/tmp/{}.sock", directory.path().file_name().unwrap().to_str().unwrap()));
        let data = directory.path().join("data");
        let mut command = Command::new(keeper_host());
        command.arg("serve").args([&admin, &data]).envs(env.iter().copied()).stdin(Stdio::null()).stdout(Stdio::piped());
        let mut child = command.spawn().unwrap();
        let stdout = BufReader::new(child.stdout.take().unwrap());
        Self { child, stdout, admin, data, directory }
    }

    /// The same data directory with a new keeper; the old one must be dead.
    pub fn restart(self) -> Self {
        let mut old = std::mem::ManuallyDrop::new(self);
        old.child.wait().unwrap();
        // Not dropped as a whole: the data directory lives on.
        let directory = std::mem::replace(&mut old.directory, tempfile::tempdir().unwrap());
        Self::on(directory, &[])
    }

    pub fn pid(&self) -> i32 {
        self.child.id() as i32
    }

    /// The data directory on the daemon's own mount, through which alone files of its can be committed.
    pub fn data_of_daemon(&self) -> PathBuf {
        let titled = |pid: &&str| {
            fs::read(format!("/proc/{pid}/cmdline")).is_ok_and(|title| title.windows(8).any(|part| part == b"\0daemon\0"))
        };
        until("the daemon is there", || {
            self.assert_alive();
            let children = fs::read_to_string(format!("/proc/{0}/task/{0}/children", self.pid())).unwrap();
            let daemon = children.split_whitespace().find(titled).map(str::to_owned);
            daemon.map(|pid| PathBuf::from(format!("/proc/{pid}/root/data")))
        })
    }

    /// Takes the daemon's place: greets, says that it is ready.
    pub fn client(&self) -> Client {
        let mut client = Client::connect(self);
        assert!(matches!(client.ask(&Request::Hello), Reply::Welcome { .. }));
        assert_eq!(client.ask(&Request::Ready), Reply::Done);
        client
    }

    /// A keeper that has ended answers no more: nobody waits for that until a deadline.
    fn assert_alive(&self) {
        use rustix::process::{Pid, WaitId, WaitIdOptions, waitid};
        let pid = WaitId::Pid(Pid::from_raw(self.pid()).unwrap());
        // Its status stays for the one who waits for it.
        let ended = waitid(pid, WaitIdOptions::EXITED | WaitIdOptions::NOHANG | WaitIdOptions::NOWAIT).unwrap();
        assert!(ended.is_none(), "the keeper has ended: {ended:?}");
    }

    pub fn announced(&mut self) -> String {
        let mut line = String::new();
        self.stdout.read_line(&mut line).unwrap();
        line
    }

    pub fn signal(&self, signal: i32) {
        let pidfd = fds::pidfd_open(rustix::process::Pid::from_raw(self.pid()).unwrap()).unwrap();
        fds::pidfd_signal(pidfd.as_fd(), signal).unwrap();
    }

    pub fn wait(&mut self) -> ExitStatus {
        until("the keeper ends", || self.child.try_wait().unwrap())
    }

    /// Stops it in order; its exit code.
    pub fn stop(&mut self, mut client: Client) -> Option<i32> {
        self.signal(15);
        while !matches!(client.event(), Reply::Stop { .. }) {}
        client.end_daemon(0);
        self.wait().code()
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        // A test that failed leaves nothing behind either: what a killed keeper leaves to the next one's sweep is removed here.
        let _ = self.child.kill();
        let _ = self.child.wait();
        let _ = fs::remove_file(&self.admin);
        let Ok(id) = fs::read_to_string(self.data.join("id")) else { return };
        within(|| {
            for top in cgroups(&id) {
                for entry in fs::read_dir(&top).into_iter().flatten().flatten() {
                    let _ = fs::remove_dir(entry.path());
                }
                let _ = fs::remove_dir(top);
            }
            cgroups(&id).is_empty()
        });
    }
}

/// Built by `cargo test` beside the tests.
pub fn keeper_host() -> PathBuf {
    let own = std::env::current_exe().unwrap();
    let directory = own.ancestors().find(|path| path.join("examples").is_dir()).expect("a target directory");
    let host = directory.join("examples/keeper_host");
    assert!(
        host.exists(),
        "{} is missing: run `cargo test` without `--test`, or `cargo build --examples` first",
        host.display()
    );
    host
}

/// The daemon's side of the protocol.
pub struct Client {
    pub control: OwnedFd,
    /// The stub daemon's life line.
    pub stub: UnixStream,
    next: u32,
    pub events: VecDeque<Reply>,
}

impl Client {
    fn connect(server: &Server) -> Self {
        let stub = until("the daemon accepts", || {
            server.assert_alive();
            UnixStream::connect(&server.admin).ok()
        });
        let mut byte = [0];
        let mut received = fds::receive(stub.as_fd(), &mut byte, RecvFlags::empty()).unwrap().expect("a descriptor");
        let control = received.fds.take(0).unwrap();
        rustix::io::ioctl_fionbio(&control, true).unwrap();
        Self { control, stub, next: 0, events: VecDeque::new() }
    }

    /// The stub daemon exits with this code.
    pub fn end_daemon(&mut self, code: u8) {
        self.stub.write_all(&[code]).unwrap();
    }

    pub fn send_raw(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        until("the keeper reads", || match fds::send(self.control.as_fd(), bytes, descriptors, SendFlags::DONTWAIT) {
            Err(rustix::io::Errno::AGAIN) => None,
            Err(errno) => panic!("send to the keeper: {errno}"),
            Ok(()) => Some(()),
        });
    }

    pub fn send(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> u32 {
        self.next += 1;
        self.send_raw(&request.encode(self.next).unwrap(), descriptors);
        self.next
    }

    /// The next message; `None` when the keeper has closed.
    pub fn receive(&mut self) -> Option<(u32, Reply, Vec<OwnedFd>)> {
        let (bytes, descriptors) = receive(self.control.as_fd())?;
        let (number, reply) = Reply::decode(&bytes, descriptors.len()).unwrap();
        Some((number, reply, descriptors))
    }

    /// The answer to a request; events that come before it are kept.
    pub fn answer(&mut self, to: u32) -> (Reply, Vec<OwnedFd>) {
        loop {
            let (number, reply, descriptors) = self.receive().expect("an answer");
            if number == to {
                return (reply, descriptors);
            }
            assert_eq!(number, 0, "an answer that nobody waits for: {reply:?}");
            self.events.push_back(reply);
        }
    }

    pub fn ask_with(&mut self, request: &Request, descriptors: &[BorrowedFd<'_>]) -> (Reply, Vec<OwnedFd>) {
        let number = self.send(request, descriptors);
        self.answer(number)
    }

    pub fn ask(&mut self, request: &Request) -> Reply {
        self.ask_with(request, &[]).0
    }

    pub fn event(&mut self) -> Reply {
        if let Some(event) = self.events.pop_front() {
            return event;
        }
        let (number, event, _) = self.receive().expect("an event");
        assert_eq!(number, 0, "no event: {event:?}");
        event
    }

    /// Waits for an event of which something is wanted; those before it are kept.
    fn event_that<T>(&mut self, wanted: impl Fn(&Reply) -> Option<T>) -> T {
        let mut others = VecDeque::new();
        let found = loop {
            let event = self.event();
            match wanted(&event) {
                Some(found) => break found,
                None => others.push_back(event),
            }
        };
        others.append(&mut self.events);
        self.events = others;
        found
    }

    /// Waits for the end of an instance and acknowledges it.
    pub fn exit_of(&mut self, id: InstanceId) -> ExitRecord {
        let exit = self.event_that(|event| match event {
            Reply::Exited { instance, exit } if *instance == id => Some(*exit),
            _ => None,
        });
        assert_eq!(self.ask(&Request::AcknowledgeExit { instance: id }), Reply::Done);
        exit
    }

    pub fn commit(&mut self, store: &Path, layer: LayerId, image: &Path) -> Reply {
        let staged = store.join("store/staged-by-commit");
        stage(store, image, &staged);
        let file = fs::File::open(&staged).unwrap();
        // A child that another test forks holds a copy of the writer until it executes.
        let reply = until("no writer is left", || {
            let reply = self.ask_with(&Request::CommitLayer { layer }, &[file.as_fd()]).0;
            (!matches!(&reply, Reply::Refused(Refusal::Malformed(text)) if text.contains("still has a writer")))
                .then_some(reply)
        });
        fs::remove_file(&staged).unwrap();
        reply
    }

    pub fn open(&mut self, revision: RevisionId, spec: RevisionSpec) -> Reply {
        let (function, title) = (format!("function of {revision}"), "test".to_owned());
        self.ask(&Request::OpenRevision { revision, function, title, spec: Box::new(spec) })
    }

    /// Starts an instance whose streams are the log.
    pub fn start(&mut self, revision: RevisionId, instance: InstanceId) -> Result<Started, Refusal> {
        let (ours, theirs) = fds::pair().unwrap();
        let (reply, mut descriptors) = self.ask_with(&start_request(revision, instance), &[theirs.as_fd()]);
        match reply {
            Reply::Started { pid } => {
                assert_eq!(descriptors.len(), 2);
                let stdout = descriptors.pop();
                Ok(Started { instance, pid, init: ours, stderr: descriptors.remove(0), stdin: None, stdout: stdout.unwrap() })
            }
            Reply::Refused(refusal) => Err(refusal),
            other => panic!("{other:?}"),
        }
    }

    /// Asks for a command in an instance.
    pub fn exec(&mut self, instance: InstanceId, exec: ExecId, spec: ExecSpec) -> Result<Exec, Refusal> {
        let (pair, theirs) = fds::pair().unwrap();
        let pipe = || pipe_with(PipeFlags::CLOEXEC).unwrap();
        let [(stdin_read, stdin), (stdout, stdout_write), (stderr, stderr_write)] = [pipe(), pipe(), pipe()];
        let all = [theirs.as_fd(), stdin_read.as_fd(), stdout_write.as_fd(), stderr_write.as_fd()];
        let streams = spec.terminal.is_none().then_some([stdin, stdout, stderr]);
        let sent = if streams.is_some() { &all[..] } else { &all[..1] };
        match self.ask_with(&Request::Exec { exec, instance, spec: Box::new(spec) }, sent).0 {
            Reply::Done => Ok(Exec { id: exec, pair, streams }),
            Reply::Refused(refusal) => Err(refusal),
            other => panic!("{other:?}"),
        }
    }

    /// Waits for the end of a command.
    pub fn end_of_exec(&mut self, id: ExecId) -> Option<i32> {
        self.event_that(|event| match event {
            Reply::ExecEnded { exec, status } if *exec == id => Some(*status),
            _ => None,
        })
    }

    /// Starts an instance whose streams are a call's.
    pub fn call(&mut self, revision: RevisionId, instance: InstanceId) -> Result<Started, Refusal> {
        let (ours, theirs) = fds::pair().unwrap();
        let (stdin_read, stdin) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let (stdout, stdout_write) = pipe_with(PipeFlags::CLOEXEC).unwrap();
        let request = Request::Start { instance, revision, descriptor: Vec::new() };
        let sent = [theirs.as_fd(), stdin_read.as_fd(), stdout_write.as_fd()];
        let (reply, mut descriptors) = self.ask_with(&request, &sent);
        match reply {
            Reply::Started { pid } => {
                Ok(Started { instance, pid, init: ours, stderr: descriptors.remove(0), stdin: Some(stdin), stdout })
            }
            Reply::Refused(refusal) => Err(refusal),
            other => panic!("{other:?}"),
        }
    }
}

/// A command in an instance.
pub struct Exec {
    pub id: ExecId,
    pub pair: OwnedFd,
    /// Standard input, output and error; none with a terminal.
    pub streams: Option<[OwnedFd; 3]>,
}

impl Exec {
    /// Its terminal, if it says one, and how its exec went: `None` when the program runs.
    pub fn begun(&self) -> (Option<OwnedFd>, Option<InitMessage>) {
        let mut terminal = None;
        while let Some((bytes, mut descriptors)) = receive(self.pair.as_fd()) {
            match InitMessage::from_bytes(&bytes, descriptors.len()).unwrap() {
                InitMessage::Terminal => terminal = descriptors.pop(),
                other => return (terminal, Some(other)),
            }
        }
        (terminal, None)
    }

    /// All that it writes to standard output and to standard error.
    pub fn output(&mut self) -> (String, String) {
        let [stdin, stdout, stderr] = self.streams.take().unwrap();
        drop(stdin);
        let text = |fd: OwnedFd| {
            let mut text = Vec::new();
            fs::File::from(fd).read_to_end(&mut text).unwrap();
            String::from_utf8_lossy(&text).into_owned()
        };
        (text(stdout), text(stderr))
    }
}

pub struct Started {
    pub instance: InstanceId,
    pub pid: u32,
    pub init: OwnedFd,
    pub stderr: OwnedFd,
    pub stdin: Option<OwnedFd>,
    pub stdout: OwnedFd,
}

impl Started {
    /// The next message of the init; `None` when it is gone.
    pub fn message(&self) -> Option<(InitMessage, Vec<OwnedFd>)> {
        let (bytes, descriptors) = receive(self.init.as_fd())?;
        Some((InitMessage::from_bytes(&bytes, descriptors.len()).unwrap(), descriptors))
    }

    /// Waits until the program runs, or does not; the sockets that came before.
    pub fn executed(&self) -> (InitMessage, Vec<OwnedFd>) {
        let mut sockets = Vec::new();
        loop {
            match self.message().expect("a message of the init") {
                (InitMessage::Sockets(_) | InitMessage::Listeners, came) => sockets.extend(came),
                (last, _) => return (last, sockets),
            }
        }
    }

    pub fn output(self) -> String {
        let mut text = String::new();
        fs::File::from(self.stdout).read_to_string(&mut text).unwrap();
        text
    }
}

fn receive(socket: BorrowedFd<'_>) -> Option<(Vec<u8>, Vec<OwnedFd>)> {
    assert!(readable(socket, deadline()), "nothing came within {:?}", deadline());
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    let received = fds::receive(socket, &mut buffer, RecvFlags::empty()).unwrap_or(None)?;
    buffer.truncate(received.bytes);
    Some((buffer, received.fds.into_iter().collect()))
}

pub fn readable(fd: BorrowedFd<'_>, within: Duration) -> bool {
    let mut polled = [PollFd::from_borrowed_fd(fd, PollFlags::IN)];
    rustix::event::poll(&mut polled, Some(&Timespec::try_from(within).unwrap())).unwrap() > 0
}

/// Asks until there is an answer.
pub fn until<T>(what: &str, mut ask: impl FnMut() -> Option<T>) -> T {
    let start = Instant::now();
    loop {
        if let Some(answer) = ask() {
            return answer;
        }
        assert!(start.elapsed() < deadline(), "not within {:?}: {what}", deadline());
        std::thread::park_timeout(PAUSE);
    }
}

/// Whether it becomes true in time.
pub fn within(mut is: impl FnMut() -> bool) -> bool {
    let start = Instant::now();
    loop {
        if is() {
            return true;
        }
        if start.elapsed() >= deadline() {
            return false;
        }
        std::thread::park_timeout(PAUSE);
    }
}

pub fn instance(number: u128) -> InstanceId {
    InstanceId::from_bytes(number.to_be_bytes())
}

pub fn exec(number: u128) -> ExecId {
    ExecId::from_bytes(number.to_be_bytes())
}

/// The request for a start whose streams are not a call's.
pub fn start_request(revision: RevisionId, instance: InstanceId) -> Request {
    Request::Start { instance, revision, descriptor: b"opaque".to_vec() }
}

/// A command of root without a terminal.
pub fn command(argv: &[&str]) -> ExecSpec {
    ExecSpec {
        argv: argv.iter().map(|argument| argument.as_bytes().to_vec()).collect(),
        env: vec![b"PATH=/bin".to_vec()],
        working_dir: b"/".to_vec(),
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        terminal: None,
    }
}

/// A script with a terminal.
pub fn on_terminal(script: &str, rows: u16, columns: u16) -> ExecSpec {
    ExecSpec { terminal: Some(WindowSize { rows, columns }), ..command(&["sh", "-c", script]) }
}

pub fn revision(number: u128) -> RevisionId {
    RevisionId::from_bytes(number.to_be_bytes())
}

pub fn layer(number: u8) -> LayerId {
    LayerId { diff_id: Digest::from_sha256([number; 32]), base: true }
}

/// Copies a layer's file as the daemon of the data directory would have made it.
pub fn stage(data: &Path, image: &Path, to: &Path) {
    fs::copy(image, to).unwrap();
    let daemon = fs::metadata(data.join("store")).unwrap();
    std::os::unix::fs::chown(to, Some(daemon.uid()), Some(daemon.gid())).unwrap();
}

/// What runs `argv` over layer 1, streams to the log.
pub fn spec(argv: &[&str]) -> RevisionSpec {
    RevisionSpec {
        layers: vec![layer(1)],
        argv: argv.iter().map(|argument| argument.as_bytes().to_vec()).collect(),
        env: vec![b"PATH=/bin".to_vec()],
        working_dir: b"/".to_vec(),
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        limits: Limits { memory: ByteSize::bytes(MEMORY), ..Limits::default() },
        isolation: Isolation::default(),
        volumes: Vec::new(),
        streams: Streams::Log,
        files: Vec::new(),
        listeners: Vec::new(),
        sockets: SocketCounts { v4: 12, v6: 4 },
        stop_signal: StopSignal::TERM,
        hostname: "test".to_owned(),
    }
}

/// An erofs image of a root with busybox, made once per test program.
pub fn busybox_image() -> &'static Path {
    static IMAGE: std::sync::OnceLock<PathBuf> = std::sync::OnceLock::new();
    IMAGE.get_or_init(|| {
        let image = Path::new(env!("CARGO_TARGET_TMPDIR")).join("busybox.erofs");
        let tree = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let root = &tree.path().join("root");
        fs::create_dir(root).unwrap();
        for directory in ["bin", "etc", "home"] {
            fs::create_dir(root.join(directory)).unwrap();
        }
        fs::copy("/bin/busybox", root.join("bin/busybox")).expect("busybox-static is installed");
        for applet in [
            "sh", "cat", "sleep", "id", "echo", "ls", "mkdir", "mount", "ps", "true", "false", "kill", "nc", "wc", "dd", "env",
            "pwd", "readlink", "stat", "stty", "touch", "tty",
        ] {
            std::os::unix::fs::symlink("busybox", root.join("bin").join(applet)).unwrap();
        }
        fs::write(root.join("bin/plain"), "not executable").unwrap();
        let script = |name: &str, text: &str| {
            use std::os::unix::fs::PermissionsExt as _;
            fs::write(root.join("bin").join(name), text).unwrap();
            fs::set_permissions(root.join("bin").join(name), fs::Permissions::from_mode(0o755)).unwrap();
        };
        script("orphan-script", "#!/no/such/interpreter\n");
        script("connections", "#!/bin/sh\ncat /proc/net/tcp\n");
        script("garbage", "\u{1}\u{2}\u{3}");
        std::os::unix::fs::symlink("/proc/self/fd", root.join("etc/fds")).unwrap();
        std::os::unix::fs::symlink("../home/resolver", root.join("etc/resolv.conf")).unwrap();
        fs::create_dir(root.join("data")).unwrap();
        fs::write(root.join("data/seed"), "from the image").unwrap();
        std::os::unix::fs::chown(root.join("data"), Some(1000), Some(100)).unwrap();
        for (name, target) in [("to-root", "/"), ("to-proc", "/proc"), ("to-nothing", "nowhere/at/all"), ("to-data", "data")] {
            std::os::unix::fs::symlink(target, root.join(name)).unwrap();
        }
        let made = Command::new("mkfs.erofs").args(["-T0"]).arg(root.join("../new")).arg(root).output();
        let made = made.expect("erofs-utils is installed");
        assert!(made.status.success(), "{}", String::from_utf8_lossy(&made.stderr));
        // In one step: another test program may be at the same.
        fs::rename(tree.path().join("new"), &image).unwrap();
        image
    })
}

/// A keeper with layer 1 in its store, and its client.
pub fn ready() -> (Server, Client) {
    let server = Server::new();
    let mut client = server.client();
    assert_eq!(client.commit(&server.data_of_daemon(), layer(1), busybox_image()), Reply::Done);
    (server, client)
}

/// The top control groups of a data directory, wherever they are mounted.
pub fn cgroups(id: &str) -> Vec<PathBuf> {
    let mounts = fs::read_to_string("/proc/self/mounts").unwrap();
    let mounts = mounts.lines().filter(|line| line.split(' ').nth(2).is_some_and(|kind| kind.starts_with("cgroup")));
    let tops = mounts.map(|line| Path::new(line.split(' ').nth(1).unwrap()).join(format!("funtainer-{id}")));
    tops.filter(|path| path.exists()).collect()
}

/// How many directories lie in one.
pub fn directories(path: &Path) -> usize {
    fs::read_dir(path).unwrap().filter(|entry| entry.as_ref().unwrap().file_type().unwrap().is_dir()).count()
}

/// The only child of the keeper that is called a zygote.
pub fn zygote_of(server: &Server) -> i32 {
    children(server.pid()).into_iter().find(|pid| title(*pid).starts_with("funtainer zygote")).unwrap()
}

fn children(pid: i32) -> Vec<i32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

fn title(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}

/// What could leak, as numbers: descriptors of keeper and zygote, its children, mounts it sees, control groups of the keeper.
pub fn traces(server: &Server, zygote: i32) -> Vec<usize> {
    let count = |path: String| fs::read_dir(path).unwrap().count();
    let id = fs::read_to_string(server.data.join("id")).unwrap();
    let mut traces = vec![
        count(format!("/proc/{}/fd", server.pid())),
        count(format!("/proc/{zygote}/fd")),
        children(zygote).len(),
        fs::read_to_string(format!("/proc/{zygote}/mountinfo")).unwrap().lines().count(),
    ];
    traces.extend(cgroups(&id).iter().map(|path| directories(path)));
    traces
}

/// Makes `keeper_host` mount in the ways of the oldest kernels.
const OLDEST: &str = "KEEPER_HOST_OLDEST";

/// Runs the tests of this program again, those whose names contain one of `names` (none: all), with a keeper that mounts in the ways of the
/// oldest kernels. `caller` is the test that calls this. Nothing where the kernel has no other ways.
pub fn again_in_the_oldest_ways(caller: &str, names: &[&str]) {
    let store = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let store = fs::File::open(store.path()).unwrap();
    if Mounts::probe(store.as_fd(), Features::NEWEST).unwrap().features() == Features::OLDEST {
        return;
    }
    let again =
        Command::new(std::env::current_exe().unwrap()).args(["--skip", caller]).args(names).env(OLDEST, "1").output().unwrap();
    let text = String::from_utf8_lossy(&again.stdout);
    assert!(again.status.success() && !text.contains("running 0 tests"), "{text}{}", String::from_utf8_lossy(&again.stderr));
}

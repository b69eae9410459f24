//! A backend without containers: an instance is a task that answers HTTP on a loopback port, or copies one pipe to another.

use std::collections::BTreeMap;
use std::io;
use std::net::SocketAddr;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use funtainer_contract::{BoxFuture, Connect, Exit, ExitReport, FileKind, FileStat, ImageFiles, StandardStreams, StartPhases};
use funtainer_engine::backend::{
    Access, Backend, Exec, ExecStarted, ExecStreams, ImageSummary, Left, Prepared, ProgressSink, Resolve, RevisionStart,
    SignalTarget, Start, Started,
};
use funtainer_model::{
    Digest, ErrorCode, ExecId, Failure, FunctionId, ImageConfig, ImageRef, InstanceId, RevisionId, StopSignal,
};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::unix::pipe;
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{Notify, mpsc, watch};
use tokio::task::AbortHandle;

/// What the fake does next, and what was done to it.
#[derive(Default)]
pub(crate) struct Fake {
    /// Content of the one image.
    pub(crate) digest: Mutex<u8>,
    /// How long a start takes.
    pub(crate) start_delay: Mutex<Duration>,
    /// So many of the next starts fail.
    pub(crate) failing: AtomicUsize,
    pub(crate) starts: AtomicUsize,
    pub(crate) stops: AtomicUsize,
    pub(crate) retired: Mutex<Vec<RevisionId>>,
    /// Instances that exist.
    pub(crate) alive: Mutex<BTreeMap<InstanceId, Alive>>,
    /// The most that existed at once.
    pub(crate) alive_max: AtomicUsize,
    /// Answers of calls to `/hold` wait for this.
    pub(crate) release: Arc<Notify>,
    /// Commands in instances that run: where, and their ends.
    pub(crate) execs: Mutex<BTreeMap<ExecId, (InstanceId, End)>>,
    /// Signals that were sent, but those that end something.
    pub(crate) signals: Mutex<Vec<(SignalTarget, u8)>>,
    /// Calls that have arrived at an instance.
    pub(crate) arrived: Arc<watch::Sender<usize>>,
}

/// By which the end of something is told.
pub(crate) type End = watch::Sender<Option<ExitReport>>;

pub(crate) struct Alive {
    pub(crate) revision: Arc<RevisionStart>,
    address: Option<SocketAddr>,
    task: AbortHandle,
    exit: watch::Sender<Option<ExitReport>>,
}

struct Dial(SocketAddr);

impl Connect for Dial {
    fn connect(&self, _other: Option<SocketAddr>) -> BoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(self.0))
    }
}

struct Files;

impl ImageFiles for Files {
    fn stat(&self, path: &str) -> io::Result<Option<FileStat>> {
        let stat = FileStat { kind: FileKind::Regular, mode: 0o755, uid: 0, gid: 0, size: 1 };
        Ok((path == "/app").then_some(stat))
    }

    fn read(&self, _path: &str, _bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn read_start(&self, _path: &str, _bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }
}

impl Fake {
    pub(crate) fn starts(&self) -> usize {
        self.starts.load(Ordering::SeqCst)
    }

    pub(crate) fn stops(&self) -> usize {
        self.stops.load(Ordering::SeqCst)
    }

    pub(crate) fn alive(&self) -> usize {
        self.instances().len()
    }

    /// Waits until so many instances exist.
    pub(crate) async fn wait_alive(&self, count: usize) {
        wait_until("instances", || self.alive() == count).await;
    }

    /// Waits until so many calls have arrived at instances, over all.
    pub(crate) async fn wait_arrived(&self, count: usize) {
        let mut arrived = self.arrived.subscribe();
        let wait = arrived.wait_for(|arrived| *arrived >= count);
        let known = tokio::time::timeout(Duration::from_secs(30), wait).await;
        assert!(known.is_ok(), "{count} calls did not arrive within 30 s of paused time");
    }

    /// An instance dies by itself.
    pub(crate) async fn kill(&self, instance: InstanceId, exit: Exit) {
        let alive = self.alive.lock().unwrap().remove(&instance);
        if let Some(alive) = alive {
            alive.task.abort();
            // Without time, which may stand still.
            while !alive.task.is_finished() {
                tokio::task::yield_now().await;
            }
            alive.exit.send_replace(Some(report(exit)));
        }
    }

    /// Its server goes, but its end is not known.
    pub(crate) async fn deafen(&self, instance: InstanceId) {
        let task = self.alive.lock().unwrap().get(&instance).map(|alive| alive.task.clone()).unwrap();
        task.abort();
        wait_until("the end of the server", || task.is_finished()).await;
    }

    pub(crate) fn instances(&self) -> Vec<InstanceId> {
        let mut alive = self.alive.lock().unwrap();
        alive.retain(|_, alive| alive.exit.borrow().is_none());
        alive.keys().copied().collect()
    }

    /// As if another engine had started it before.
    pub(crate) async fn leave(&self, revision: Arc<RevisionStart>, instance: InstanceId) {
        let start = Start { instance, revision, stderr: None };
        drop(self.start_now(start).await);
    }

    async fn start_now(&self, start: Start) -> Result<Started, Failure> {
        self.starts.fetch_add(1, Ordering::SeqCst);
        let delay = *self.start_delay.lock().unwrap();
        if !delay.is_zero() {
            tokio::time::sleep(delay).await;
        }
        let fails = self.failing.fetch_update(Ordering::SeqCst, Ordering::SeqCst, |left| left.checked_sub(1)).is_ok();
        if fails {
            return Err(Failure::new(ErrorCode::InstanceExited, "the fake was told to fail"));
        }
        let (exit, ended) = watch::channel(None);
        let (access, address, task) = match start.revision.plan.streams {
            StandardStreams::Log => {
                let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
                let address = listener.local_addr().unwrap();
                let server = Server { instance: start.instance, release: self.release.clone(), arrived: self.arrived.clone() };
                let task = tokio::spawn(server.serve(listener)).abort_handle();
                (Access::Network(Arc::new(Dial(address))), Some(address), task)
            }
            StandardStreams::Terminal(_) => return Err(Failure::new(ErrorCode::Internal, "the fake has no terminals")),
            StandardStreams::Call => {
                let (stdin_read, stdin) = io::pipe().unwrap();
                let (stdout, stdout_write) = io::pipe().unwrap();
                let stdin_read = pipe::Receiver::from_owned_fd(stdin_read.into()).unwrap();
                let stdout_write = pipe::Sender::from_owned_fd(stdout_write.into()).unwrap();
                if let Some(stderr) = start.stderr {
                    stderr.try_send(Bytes::from_static(b"a word on stderr")).unwrap();
                }
                let command = Command { release: self.release.clone(), arrived: self.arrived.clone(), exit: exit.clone() };
                let task = tokio::spawn(command.copy(stdin_read, stdout_write)).abort_handle();
                (Access::Streams { stdin: stdin.into(), stdout: stdout.into() }, None, task)
            }
        };
        let mut alive = self.alive.lock().unwrap();
        alive.insert(start.instance, Alive { revision: start.revision, address, task, exit });
        drop(alive);
        self.alive_max.fetch_max(self.alive(), Ordering::SeqCst);
        let milli = Duration::from_millis(1);
        Ok(Started { pid: 4711, phases: StartPhases { sandbox: milli, exec: milli, ready: milli }, access, exit: ended })
    }
}

impl Backend for Fake {
    fn prepare<'a>(&'a self, image: &'a ImageRef, _: Resolve, _: ProgressSink) -> BoxFuture<'a, Result<Prepared, Failure>> {
        Box::pin(async move {
            let program = match image.repository() {
                "library/unknown" => return Err(Failure::new(ErrorCode::ImageUnknown, "no such image")),
                "library/empty" => "/not-there",
                _ => "/app",
            };
            let config = ImageConfig { entrypoint: vec![program.to_owned()], ..ImageConfig::default() };
            let digest = Digest::from_sha256([*self.digest.lock().unwrap(); 32]);
            Ok(Prepared { digest, config, files: Arc::new(Files) })
        })
    }

    fn start(&self, start: Start) -> BoxFuture<'_, Result<Started, Failure>> {
        Box::pin(self.start_now(start))
    }

    fn stop(&self, instance: InstanceId, _grace: Duration) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            self.stops.fetch_add(1, Ordering::SeqCst);
            self.kill(instance, Exit::Signal(15)).await;
        })
    }

    fn exec(&self, exec: Exec) -> BoxFuture<'_, Result<ExecStarted, Failure>> {
        Box::pin(async move {
            if !self.instances().contains(&exec.instance) {
                return Err(Failure::new(ErrorCode::NotRunning, "the fake has no such instance"));
            }
            let (stdin_read, stdin) = io::pipe().unwrap();
            let (stdout, stdout_write) = io::pipe().unwrap();
            let (stderr, _) = io::pipe().unwrap();
            let (end, exit) = watch::channel(None);
            self.execs.lock().unwrap().insert(exec.id, (exec.instance, end.clone()));
            let from = pipe::Receiver::from_owned_fd(stdin_read.into()).unwrap();
            let to = pipe::Sender::from_owned_fd(stdout_write.into()).unwrap();
            let command = Command { release: self.release.clone(), arrived: self.arrived.clone(), exit: end };
            tokio::spawn(command.copy(from, to));
            let streams = ExecStreams::Pipes { stdin: stdin.into(), stdout: stdout.into(), stderr: stderr.into() };
            Ok(ExecStarted { streams, exit })
        })
    }

    fn signal(&self, target: SignalTarget, signal: StopSignal) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            match target {
                SignalTarget::Exec(exec) if signal.number() == 9 => {
                    let end = self.execs.lock().unwrap().remove(&exec);
                    if let Some((_, end)) = end {
                        end.send_replace(Some(report(Exit::Signal(9))));
                    }
                }
                target => self.signals.lock().unwrap().push((target, signal.number())),
            }
        })
    }

    fn retire(&self, revision: RevisionId) -> BoxFuture<'_, ()> {
        self.retired.lock().unwrap().push(revision);
        Box::pin(std::future::ready(()))
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Left>, Failure>> {
        let left = |(instance, alive): (&InstanceId, &Alive)| Left {
            instance: *instance,
            revision: alive.revision.revision,
            pid: 4711,
            access: alive.address.map(|address| Arc::new(Dial(address)) as Arc<dyn Connect>),
            exit: alive.exit.subscribe(),
        };
        let all = self.alive.lock().unwrap().iter().map(left).collect();
        Box::pin(std::future::ready(Ok(all)))
    }

    fn logs(&self, _: &FunctionId, _: usize, _: bool) -> BoxFuture<'_, Result<mpsc::Receiver<Bytes>, Failure>> {
        let (sink, lines) = mpsc::channel(1);
        sink.try_send(Bytes::from_static(b"a line\n")).unwrap();
        Box::pin(std::future::ready(Ok(lines)))
    }

    fn forget_logs(&self, _: &FunctionId) -> BoxFuture<'_, ()> {
        Box::pin(std::future::ready(()))
    }

    fn images(&self) -> BoxFuture<'_, Result<Vec<ImageSummary>, Failure>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }

    fn import<'a>(
        &'a self,
        _: mpsc::Receiver<io::Result<Bytes>>,
        _: Option<&'a ImageRef>,
        _: ProgressSink,
    ) -> BoxFuture<'a, Result<Vec<ImageSummary>, Failure>> {
        Box::pin(std::future::ready(Ok(Vec::new())))
    }
}

#[derive(Clone)]
struct Server {
    instance: InstanceId,
    release: Arc<Notify>,
    arrived: Arc<watch::Sender<usize>>,
}

impl Server {
    async fn serve(self, listener: TcpListener) {
        // Its connections end with it.
        let mut connections = tokio::task::JoinSet::new();
        loop {
            let (stream, _) = listener.accept().await.unwrap();
            connections.spawn(self.clone().talk(stream));
        }
    }

    async fn talk(self, mut stream: TcpStream) {
        let mut received = Vec::new();
        loop {
            while !received.ends_with(b"\r\n\r\n") {
                if stream.read_buf(&mut received).await.unwrap_or(0) == 0 {
                    return;
                }
            }
            let hold = received.starts_with(b"GET /hold");
            let released = self.release.notified();
            self.arrived.send_modify(|arrived| *arrived += 1);
            if received.starts_with(b"GET /break") {
                return;
            }
            if hold {
                released.await;
            }
            received.clear();
            let body = self.instance.to_string();
            let answer = format!("HTTP/1.1 200 OK\r\ncontent-length: {}\r\n\r\n{body}", body.len());
            if stream.write_all(answer.as_bytes()).await.is_err() {
                return;
            }
        }
    }
}

struct Command {
    release: Arc<Notify>,
    arrived: Arc<watch::Sender<usize>>,
    exit: watch::Sender<Option<ExitReport>>,
}

impl Command {
    /// Like `cat`; input that starts with `hold` waits for the release, with `fail` ends with code 3.
    async fn copy(self, mut from: pipe::Receiver, mut to: pipe::Sender) {
        let mut all = Vec::new();
        from.read_to_end(&mut all).await.unwrap();
        let released = self.release.notified();
        self.arrived.send_modify(|arrived| *arrived += 1);
        if all.starts_with(b"hold") {
            released.await;
        }
        let written = to.write_all(&all).await.is_ok();
        drop(to);
        let code = if all.starts_with(b"fail") { 3 } else { u8::from(!written) };
        self.exit.send_replace(Some(report(Exit::Code(code))));
    }
}

fn report(exit: Exit) -> ExitReport {
    ExitReport {
        exit,
        out_of_memory: false,
        writable_full: false,
        memory_peak: None,
        cpu_us: None,
        stderr_tail: Bytes::from_static(b"the tail"),
    }
}

/// Lets other tasks go on until the condition holds. Time may pass, but only where nothing else can go on.
pub(crate) async fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let wait = async {
        while !condition() {
            tokio::time::sleep(Duration::from_micros(100)).await;
        }
    };
    assert!(tokio::time::timeout(Duration::from_secs(30), wait).await.is_ok(), "{what}: not within 30 s of paused time");
}

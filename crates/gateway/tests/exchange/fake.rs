//! A backend without containers: an `http` instance is a thread-less server in this process, a `stdio` one a pair of pipes.

use std::collections::HashMap;
use std::io::{self, Read as _, Write as _};
use std::net::SocketAddr;
use std::num::NonZeroU16;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use funtainer_contract::{BoxFuture, Connect, Exit, ExitReport, FileKind, FileStat, ImageFiles, StandardStreams, StartPhases};
use funtainer_engine::backend::{
    Access, Backend, Exec, ExecStarted, ExecStreams, ImageSummary, Left, Prepared, Progress, ProgressSink, Resolve,
    SignalTarget, Start, Started,
};
use funtainer_model::{
    Digest, ErrorCode, ExecId, Failure, FunctionId, ImageConfig, ImageRef, InstanceId, RevisionId, StopSignal,
};
use rustix::pty::{OpenptFlags, ioctl_tiocgptpeer, openpt, unlockpt};
use rustix::termios::{Winsize, tcgetwinsize, tcsetwinsize};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::{mpsc, watch};

pub(crate) const DIGEST: Digest = Digest::from_sha256([0xab; 32]);

/// Images are named by what they do: `echo` answers with the head it got, `silent` never answers, `missing` does not exist.
/// Commands in instances: `cat` copies its input, `deaf` never reads and ends when it is killed, `line` has a terminal, reads a line from it
/// and writes it back with the size that the terminal has then.
#[derive(Default)]
pub(crate) struct FakeBackend {
    /// Commands in instances that have not ended.
    pub(crate) execs: Arc<Mutex<HashMap<ExecId, End>>>,
    /// Signals but KILL.
    pub(crate) signals: Mutex<Vec<u8>>,
}

type End = watch::Sender<Option<ExitReport>>;

impl Backend for FakeBackend {
    fn prepare<'a>(
        &'a self,
        image: &'a ImageRef,
        _how: Resolve,
        progress: ProgressSink,
    ) -> BoxFuture<'a, Result<Prepared, Failure>> {
        Box::pin(async move {
            if image.repository().ends_with("missing") {
                return Err(Failure::new(ErrorCode::ImageUnknown, format!("{} has no {image}", image.registry())));
            }
            let _ = progress.try_send(Progress::Resolved { digest: DIGEST });
            let config = ImageConfig {
                entrypoint: vec![format!("/bin/{}", image.repository().rsplit('/').next().unwrap())],
                exposed_ports: vec![NonZeroU16::new(8000).unwrap()],
                ..ImageConfig::default()
            };
            Ok(Prepared { digest: DIGEST, config, files: Arc::new(OneFile) })
        })
    }

    fn start(&self, start: Start) -> BoxFuture<'_, Result<Started, Failure>> {
        Box::pin(async move {
            let plan = &start.revision.plan;
            let phases = StartPhases { sandbox: Duration::from_millis(1), ..StartPhases::default() };
            let program = plan.argv[0].clone();
            if plan.streams == StandardStreams::Call {
                return Ok(command(&program, start.stderr, phases));
            }
            let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
            let address = listener.local_addr().unwrap();
            tokio::spawn(async move {
                while let Ok((stream, _)) = listener.accept().await {
                    tokio::spawn(server(program.clone(), stream));
                }
            });
            // The sender is kept until the test's runtime ends: the instance lives as long.
            let (alive, exit) = watch::channel(None);
            std::mem::forget(alive);
            Ok(Started { pid: 4711, phases, access: Access::Network(Arc::new(To(address))), exit })
        })
    }

    fn stop(&self, _instance: InstanceId, _grace: Duration) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn exec(&self, exec: Exec) -> BoxFuture<'_, Result<ExecStarted, Failure>> {
        Box::pin(async move {
            let (end, exit) = watch::channel(None);
            self.execs.lock().unwrap().insert(exec.id, end);
            let (execs, id) = (Arc::clone(&self.execs), exec.id);
            let ended = move |code| {
                let end = execs.lock().unwrap().remove(&id);
                end.unwrap().send_replace(Some(report(Exit::Code(code))));
            };
            let program = exec.request.command[0].as_str();
            if program == "line" {
                let size = exec.request.terminal.unwrap();
                let master = openpt(OpenptFlags::RDWR | OpenptFlags::NOCTTY | OpenptFlags::CLOEXEC).unwrap();
                unlockpt(&master).unwrap();
                let slave = ioctl_tiocgptpeer(&master, OpenptFlags::RDWR | OpenptFlags::NOCTTY).unwrap();
                let size = Winsize { ws_row: size.rows, ws_col: size.columns, ws_xpixel: 0, ws_ypixel: 0 };
                tcsetwinsize(&slave, size).unwrap();
                std::thread::spawn(move || line(slave.into(), ended));
                return Ok(ExecStarted { streams: ExecStreams::Terminal(master), exit });
            }
            let (stdin_read, stdin) = io::pipe().unwrap();
            let (stdout, stdout_write) = io::pipe().unwrap();
            let (stderr, stderr_write) = io::pipe().unwrap();
            if program == "cat" {
                std::thread::spawn(move || {
                    let (mut stdin, mut stdout, mut stderr) = (stdin_read, stdout_write, stderr_write);
                    io::copy(&mut stdin, &mut stdout).unwrap();
                    stderr.write_all(b"done").unwrap();
                    drop((stdout, stderr));
                    ended(0);
                });
            } else {
                // The ends stay open for as long as the test's runtime.
                std::mem::forget((stdin_read, stdout_write, stderr_write));
            }
            let streams = ExecStreams::Pipes { stdin: stdin.into(), stdout: stdout.into(), stderr: stderr.into() };
            Ok(ExecStarted { streams, exit })
        })
    }

    fn signal(&self, target: SignalTarget, signal: StopSignal) -> BoxFuture<'_, ()> {
        Box::pin(async move {
            match target {
                SignalTarget::Exec(exec) if signal.number() == 9 => {
                    let end = self.execs.lock().unwrap().remove(&exec);
                    if let Some(end) = end {
                        end.send_replace(Some(report(Exit::Signal(9))));
                    }
                }
                _ => self.signals.lock().unwrap().push(signal.number()),
            }
        })
    }

    fn retire(&self, _revision: RevisionId) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn list(&self) -> BoxFuture<'_, Result<Vec<Left>, Failure>> {
        Box::pin(async { Ok(Vec::new()) })
    }

    fn logs(&self, _: &FunctionId, lines: usize, follow: bool) -> BoxFuture<'_, Result<mpsc::Receiver<Bytes>, Failure>> {
        Box::pin(async move {
            let (sender, receiver) = mpsc::channel(4);
            let _ = sender.try_send(Bytes::from(format!("the last of {lines} lines\n")));
            if follow {
                tokio::spawn(async move { sender.closed().await });
            }
            Ok(receiver)
        })
    }

    fn forget_logs(&self, _function: &FunctionId) -> BoxFuture<'_, ()> {
        Box::pin(async {})
    }

    fn images(&self) -> BoxFuture<'_, Result<Vec<ImageSummary>, Failure>> {
        Box::pin(async { Ok(vec![summary("localhost/fake/echo:1".parse().unwrap(), 1)]) })
    }

    fn import<'a>(
        &'a self,
        mut archive: mpsc::Receiver<io::Result<Bytes>>,
        name: Option<&'a ImageRef>,
        progress: ProgressSink,
    ) -> BoxFuture<'a, Result<Vec<ImageSummary>, Failure>> {
        Box::pin(async move {
            let mut size = 0;
            while let Some(chunk) = archive.recv().await {
                let chunk =
                    chunk.map_err(|error| Failure::new(ErrorCode::ImageInvalid, format!("the archive broke off: {error}")))?;
                size += chunk.len() as u64;
            }
            let _ = progress.try_send(Progress::LayerPresent { layer: DIGEST });
            let name = name.cloned().unwrap_or_else(|| "localhost/imported:1".parse().unwrap());
            Ok(vec![summary(name, size)])
        })
    }
}

fn summary(reference: ImageRef, size: u64) -> ImageSummary {
    ImageSummary { reference, digest: DIGEST, size, imported: true }
}

struct To(SocketAddr);

impl Connect for To {
    fn connect(&self, _other: Option<SocketAddr>) -> BoxFuture<'_, io::Result<TcpStream>> {
        Box::pin(TcpStream::connect(self.0))
    }
}

/// Every path is an executable file.
struct OneFile;

impl ImageFiles for OneFile {
    fn stat(&self, _path: &str) -> io::Result<Option<FileStat>> {
        Ok(Some(FileStat { kind: FileKind::Regular, mode: 0o755, uid: 0, gid: 0, size: 1 }))
    }

    fn read(&self, _path: &str, _bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }

    fn read_start(&self, _path: &str, _bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
        Ok(None)
    }
}

/// Answers each request with what it got, byte by byte as the gateway sent it.
async fn server(program: String, mut stream: TcpStream) {
    let mut got = Vec::new();
    let mut buffer = [0; 4096];
    loop {
        let read = stream.read(&mut buffer).await.unwrap_or(0);
        if read == 0 {
            return;
        }
        got.extend_from_slice(&buffer[..read]);
        let text = String::from_utf8_lossy(&got).into_owned();
        let Some((head, body)) = text.split_once("\r\n\r\n") else { continue };
        let length = head.lines().find_map(|line| line.strip_prefix("content-length: ")).map_or(0, |n| n.parse().unwrap());
        let whole =
            if head.contains("transfer-encoding: chunked") { body.ends_with("0\r\n\r\n") } else { body.len() >= length };
        if !whole {
            continue;
        }
        let answer = match program.as_str() {
            "/bin/silent" => return std::future::pending().await,
            "/bin/half" => {
                let _ = stream.write_all(b"HTTP/1.1 200 OK\r\nContent-Length: 10\r\n\r\nhalf").await;
                return std::future::pending().await;
            }
            "/bin/garbage" => "I speak no HTTP\r\n\r\n".to_owned(),
            "/bin/liar" => {
                "HTTP/1.1 200 OK\r\nConnection: x-hop\r\nX-Hop: 1\r\nKeep-Alive: timeout=5\r\nX-Call-Id: mine\r\nX-Funtainer-Error: internal\r\nContent-Length: 2\r\n\r\nhi".to_owned()
            }
            "/bin/trap" => {
                let trap = "HTTP/1.1 431 Request Header Fields Too Large\r\ncontent-length: 0\r\n\r\n";
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{trap}", trap.len())
            }
            "/bin/chunky" => {
                "HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nTrailer: X-Sum\r\n\r\n3\r\nabc\r\n0\r\nX-Sum: 6\r\n\r\n".to_owned()
            }
            _ => {
                let got = text.replace("\r\n", "\n");
                format!("HTTP/1.1 200 OK\r\nContent-Length: {}\r\n\r\n{got}", got.len())
            }
        };
        got.clear();
        if stream.write_all(answer.as_bytes()).await.is_err() {
            return;
        }
    }
}

fn report(exit: Exit) -> ExitReport {
    ExitReport { exit, out_of_memory: false, writable_full: false, memory_peak: None, cpu_us: None, stderr_tail: Bytes::new() }
}

/// Reads a line from a terminal and writes it back with the terminal's size.
fn line(mut slave: std::fs::File, ended: impl FnOnce(u8)) {
    let mut line = [0; 100];
    let read = slave.read(&mut line).unwrap();
    let size = tcgetwinsize(&slave).unwrap();
    let text = String::from_utf8_lossy(&line[..read]).trim_end().to_owned();
    write!(slave, "{text} {} {}", size.ws_row, size.ws_col).unwrap();
    drop(slave);
    ended(0);
}

/// `cat` copies its input, `fail` ends with 3.
fn command(program: &str, stderr: Option<mpsc::Sender<Bytes>>, phases: StartPhases) -> Started {
    let (stdin_read, stdin) = io::pipe().unwrap();
    let (stdout, stdout_write) = io::pipe().unwrap();
    let (ended, exit) = watch::channel(None);
    let fails = program.ends_with("fail");
    std::thread::spawn(move || {
        let (mut stdin, mut stdout) = (stdin_read, stdout_write);
        let code = if fails {
            if let Some(stderr) = stderr {
                let _ = stderr.blocking_send(Bytes::from_static(b"it went wrong\n"));
            }
            3
        } else {
            let _ = io::copy(&mut stdin, &mut stdout);
            0
        };
        drop((stdin, stdout));
        let stderr_tail = if fails { Bytes::from_static(b"it went wrong\n") } else { Bytes::new() };
        let report = ExitReport {
            exit: Exit::Code(code),
            out_of_memory: false,
            writable_full: false,
            memory_peak: None,
            cpu_us: None,
            stderr_tail,
        };
        ended.send_replace(Some(report));
    });
    Started { pid: 4712, phases, access: Access::Streams { stdin: stdin.into(), stdout: stdout.into() }, exit }
}

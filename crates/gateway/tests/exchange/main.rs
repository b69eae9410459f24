//! Whole exchanges through the doors of a running gateway: its listeners, a real engine, and a backend that is a fake.

mod calls;
mod exec;
mod fake;
mod hostile;
mod native;

use std::io::{Read, Write};
use std::net::{SocketAddr, TcpListener, TcpStream};
use std::os::unix::net::{UnixListener, UnixStream};
use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use funtainer_engine::{Engine, Settings};
use funtainer_gateway::Server;

/// How long anything may take before a test fails.
const DEADLINE: Duration = Duration::from_secs(20);

/// A running gateway.
struct Running {
    address: SocketAddr,
    admin: PathBuf,
    server: Option<Server>,
    engine: Arc<Engine>,
    backend: Arc<fake::FakeBackend>,
    runtime: tokio::runtime::Runtime,
    _directory: tempfile::TempDir,
}

impl Running {
    fn start() -> Self {
        let directory = tempfile::tempdir().unwrap();
        let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
        let listener = TcpListener::bind("127.0.0.1:0").unwrap();
        let address = listener.local_addr().unwrap();
        let admin = directory.path().join("admin.sock");
        let admin_listener = UnixListener::bind(&admin).unwrap();
        let settings = Settings { state_dir: directory.path().to_owned() };
        let backend = Arc::<fake::FakeBackend>::default();
        let (engine, server) = runtime.block_on(async {
            let engine = Engine::open(settings, Arc::clone(&backend) as _).await.unwrap();
            let server = funtainer_gateway::serve(Arc::clone(&engine), vec![listener], admin_listener).unwrap();
            (engine, server)
        });
        Self { address, admin, server: Some(server), engine, backend, runtime, _directory: directory }
    }

    /// Sends `request` by TCP and returns all that comes until the gateway closes.
    fn calls(&self, request: impl AsRef<[u8]>) -> String {
        let mut stream = TcpStream::connect(self.address).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        exchange(&mut stream, request.as_ref())
    }

    /// The same by the admin socket.
    fn admin(&self, request: impl AsRef<[u8]>) -> String {
        let mut stream = UnixStream::connect(&self.admin).unwrap();
        stream.set_read_timeout(Some(DEADLINE)).unwrap();
        exchange(&mut stream, request.as_ref())
    }

    /// A request with a JSON body by the admin socket.
    fn admin_json(&self, method_and_path: &str, json: &str) -> String {
        self.admin(format!(
            "{method_and_path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\nContent-Length: {}\r\n\r\n{json}",
            json.len()
        ))
    }

    fn deploy(&self, json: &str) {
        let answer = self.admin_json("POST /functions", json);
        assert!(answer.starts_with("HTTP/1.1 200 "), "{answer}");
    }
}

impl Drop for Running {
    fn drop(&mut self) {
        self.runtime.block_on(async {
            if let Some(server) = self.server.take() {
                tokio::join!(server.drain(DEADLINE), self.engine.drain(DEADLINE));
            }
        });
    }
}

fn exchange(stream: &mut (impl Read + Write), request: &[u8]) -> String {
    // The gateway may answer and close before all is sent.
    let _ = stream.write_all(request);
    let mut answer = Vec::new();
    stream.read_to_end(&mut answer).unwrap();
    tamed(&String::from_utf8_lossy(&answer))
}

/// Without what differs from run to run.
fn tamed(answer: &str) -> String {
    let mut text = String::new();
    // Lengths differ with the number of digits of pids and times.
    let masked = ["application/json", "application/x-ndjson"].iter().any(|media_type| answer.contains(media_type));
    for line in answer.replace("\r\n", "\n").lines() {
        if masked && !line.is_empty() && line.bytes().all(|b| b.is_ascii_hexdigit()) {
            continue;
        }
        let line = match line.split_once(": ") {
            Some(("x-call-id", id)) => {
                assert_eq!((id.len(), &id[14..15]), (36, "7"), "a UUID of version 7");
                "x-call-id: [id]".to_owned()
            }
            Some(("content-length", _)) if masked => "content-length: [n]".to_owned(),
            Some(("date", _)) => "date: [date]".to_owned(),
            Some(("server-timing", timing)) => {
                let phases: Vec<_> = timing.split(", ").map(|phase| phase.split_once(";dur=").unwrap().0).collect();
                format!("server-timing: {}", phases.join(";dur=[ms], ") + ";dur=[ms]")
            }
            _ => replaced(line),
        };
        text.push_str(&line);
        text.push('\n');
    }
    text
}

/// A line of a body, with ids, pids and times masked.
fn replaced(line: &str) -> String {
    let mut line = line.to_owned();
    for (name, quoted) in [("call_id", true), ("revision", true), ("id", true), ("deployed_at", true), ("pid", false)] {
        let start = format!("\"{name}\":{}", if quoted { "\"" } else { "" });
        let mut from = 0;
        while let Some(at) = line[from..].find(&start) {
            let value = from + at + start.len();
            let end =
                line[value..].find(if quoted { &['"'] as &[char] } else { &[',', '}'] }).map_or(line.len(), |end| value + end);
            line.replace_range(value..end, &format!("[{name}]"));
            from = value;
        }
    }
    line
}

//! A registry that lies: a tiny HTTP server whose every answer is given by the test.

use std::io::{BufRead, BufReader, Read, Write};
use std::net::{Ipv4Addr, Shutdown, SocketAddr, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc::{self, Receiver};
use std::sync::{Arc, Mutex};

use funtainer_model::{Digest, ImageRef};
use serde_json::{Value, json};

use crate::support::{gzip, sha256};

/// What was asked for.
#[derive(Debug, Clone)]
pub(crate) struct Asked {
    pub(crate) method: String,
    /// With query.
    pub(crate) path: String,
    pub(crate) authorization: Option<String>,
}

/// What it is answered.
pub(crate) enum Answer {
    /// Status, further header lines, body; the length is said rightly.
    Whole(u16, String, Vec<u8>),
    /// As `Whole` with 200, but the length is said as given.
    Claims(usize, Vec<u8>),
    /// A 200 without a length: the end of the connection ends it.
    Unsized(Vec<u8>),
    /// Nothing: the connection is closed.
    Hangup,
    /// The body of a 200 of the length, then silence until the client goes away.
    Stalls(usize, Vec<u8>),
}

type Handler = dyn Fn(&Asked) -> Answer + Send + Sync;

pub(crate) struct Liar {
    address: SocketAddr,
    asked: Arc<Mutex<Vec<Asked>>>,
    stop: Arc<AtomicBool>,
    /// One message for each stalled client that went away.
    pub(crate) left: Receiver<()>,
}

impl Liar {
    pub(crate) fn start(handler: impl Fn(&Asked) -> Answer + Send + Sync + 'static) -> Self {
        let listener = TcpListener::bind((Ipv4Addr::LOCALHOST, 0)).unwrap();
        let address = listener.local_addr().unwrap();
        let (asked, stop) = (Arc::new(Mutex::new(Vec::new())), Arc::new(AtomicBool::new(false)));
        let (leaving, left) = mpsc::channel();
        let (log, stopped, handler): (_, _, Arc<Handler>) = (Arc::clone(&asked), Arc::clone(&stop), Arc::new(handler));
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if stopped.load(Ordering::Relaxed) {
                    return;
                }
                let (log, handler, leaving) = (Arc::clone(&log), Arc::clone(&handler), leaving.clone());
                std::thread::spawn(move || {
                    let Some(asked) = read_request(&stream) else { return };
                    let answer = handler(&asked);
                    let head = asked.method == "HEAD";
                    log.lock().unwrap().push(asked);
                    if reply(stream, answer, head) {
                        let _ = leaving.send(());
                    }
                });
            }
        });
        Self { address, asked, stop, left }
    }

    pub(crate) fn address(&self) -> SocketAddr {
        self.address
    }

    pub(crate) fn reference(&self) -> ImageRef {
        format!("{}/lie:1", self.address).parse().unwrap()
    }

    /// What was asked for so far, without versions and digests that come first.
    pub(crate) fn asked(&self) -> Vec<Asked> {
        self.asked.lock().unwrap().clone()
    }

    pub(crate) fn count(&self, method: &str, part: &str) -> usize {
        self.asked().iter().filter(|asked| asked.method == method && asked.path.contains(part)).count()
    }
}

impl Drop for Liar {
    fn drop(&mut self) {
        self.stop.store(true, Ordering::Relaxed);
        let _ = TcpStream::connect(self.address);
    }
}

fn read_request(stream: &TcpStream) -> Option<Asked> {
    let mut lines = BufReader::new(stream).lines();
    let first = lines.next()?.ok()?;
    let mut words = first.split(' ');
    let (method, path) = (words.next()?.to_owned(), words.next()?.to_owned());
    let mut authorization = None;
    for line in lines.map_while(Result::ok).take_while(|line| !line.is_empty()) {
        if let Some((name, value)) = line.split_once(':')
            && name.eq_ignore_ascii_case("authorization")
        {
            authorization = Some(value.trim().to_owned());
        }
    }
    Some(Asked { method, path, authorization })
}

/// Whether it was a client that went away while the answer stalled.
fn reply(mut stream: TcpStream, answer: Answer, head_only: bool) -> bool {
    let length = |length: usize| format!("Content-Length: {length}\r\n");
    let (status, headers, body, stalls) = match answer {
        Answer::Whole(status, headers, body) => (status, headers + &length(body.len()), body, false),
        Answer::Claims(claimed, body) => (200, length(claimed), body, false),
        Answer::Unsized(body) => (200, String::new(), body, false),
        Answer::Stalls(claimed, body) => (200, length(claimed), body, true),
        Answer::Hangup => return false,
    };
    let mut bytes = format!("HTTP/1.1 {status} X\r\n{headers}Connection: close\r\n\r\n").into_bytes();
    if !head_only {
        bytes.extend_from_slice(&body);
    }
    if stream.write_all(&bytes).is_err() {
        return stalls;
    }
    if stalls {
        let _ = stream.read(&mut [0]);
        return true;
    }
    let _ = stream.shutdown(Shutdown::Write);
    let _ = stream.read_to_end(&mut Vec::new());
    false
}

/// An image as a registry would serve it: each part can be replaced by a test.
#[derive(Clone)]
pub(crate) struct Served {
    pub(crate) layer: Vec<u8>,
    pub(crate) config: Vec<u8>,
    pub(crate) manifest: Vec<u8>,
}

impl Served {
    pub(crate) fn new(tar: &[u8]) -> Self {
        let layer = gzip(tar);
        let config = json!({
            "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" }, "os": "linux",
            "rootfs": {"type": "layers", "diff_ids": [sha256(tar)]},
        });
        let config = config.to_string().into_bytes();
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": descriptor("application/vnd.oci.image.config.v1+json", &config),
            "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", &layer)],
        });
        Self { layer, config, manifest: manifest.to_string().into_bytes() }
    }

    pub(crate) fn digest(&self) -> Digest {
        sha256(&self.manifest)
    }

    /// The right answer to a question.
    pub(crate) fn answer(&self, asked: &Asked) -> Answer {
        let whole = |headers: String, body: &[u8]| Answer::Whole(200, headers, body.to_vec());
        let is = |body: &[u8]| asked.path.contains(&sha256(body).hex());
        if asked.path.contains("/manifests/") {
            let headers = "Content-Type: application/vnd.oci.image.manifest.v1+json\r\n";
            whole(format!("{headers}Docker-Content-Digest: {}\r\n", self.digest()), &self.manifest)
        } else if is(&self.config) {
            whole(String::new(), &self.config)
        } else if is(&self.layer) {
            whole(String::new(), &self.layer)
        } else {
            Answer::Whole(404, String::new(), b"{}".to_vec())
        }
    }
}

pub(crate) fn descriptor(media_type: &str, bytes: &[u8]) -> Value {
    json!({"mediaType": media_type, "digest": sha256(bytes), "size": bytes.len()})
}

//! A real registry, layouts to push, and a committer without a keeper.

use std::fs::{self, File};
use std::io::{self, BufRead, BufReader, Write};
use std::os::fd::AsRawFd;
use std::os::unix::fs::PermissionsExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::mpsc;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use flate2::{Compression, write::GzEncoder};
use funtainer_image::{CommitLayer, Image, ImageError, ImageStore, Progress, PullPolicy};
use funtainer_model::{Digest, ImageRef, LayerId};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;
use serde_json::{Value, json};
use sha2::Digest as _;
use tempfile::TempDir;

/// Longest wait for anything in a test.
pub(crate) const DEADLINE: Duration = Duration::from_secs(30);

/// A `docker-registry` process with a directory of its own. Killed when dropped.
pub(crate) struct Registry {
    child: Child,
    port: u16,
    dir: Option<TempDir>,
}

impl Registry {
    /// An open registry on a free loopback port.
    pub(crate) fn start() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut registry = Self::start_in(dir.path(), "");
        registry.dir = Some(dir);
        registry
    }

    /// A registry that keeps its content in `dir`, and whose configuration has `more` at its end.
    pub(crate) fn start_in(dir: &Path, more: &str) -> Self {
        let config = dir.join("config.yml");
        let text = format!(
            "version: 0.1\nstorage:\n  filesystem:\n    rootdirectory: {}/data\nhttp:\n  addr: 127.0.0.1:0\n{more}",
            dir.display()
        );
        fs::write(&config, text).unwrap();
        let child = Command::new("docker-registry")
            .arg("serve")
            .arg(&config)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::piped())
            .spawn()
            .expect("docker-registry is installed (apt-get install docker-registry)");
        // From here on it is killed whatever happens.
        let mut registry = Self { child, port: 0, dir: None };
        let log = BufReader::new(registry.child.stderr.take().unwrap());
        let (sender, receiver) = mpsc::channel();
        std::thread::spawn(move || {
            // The log is read to its end, or the registry would block on a full pipe.
            for line in log.lines().map_while(Result::ok) {
                let port = line
                    .split_once("listening on 127.0.0.1:")
                    .map(|(_, rest)| rest.split(['"', ',']).next().unwrap().to_owned());
                if let Some(port) = port {
                    let _ = sender.send(port.parse::<u16>().unwrap());
                }
            }
        });
        registry.port = receiver.recv_timeout(DEADLINE).expect("docker-registry says where it listens");
        registry
    }

    pub(crate) fn reference(&self, name: &str) -> ImageRef {
        format!("127.0.0.1:{}/{name}", self.port).parse().unwrap()
    }

    /// Pushes the image that the layout calls `latest`.
    pub(crate) fn push(&self, layout: &Layout, name: &str, options: &[&str]) {
        let from = format!("oci:{}:latest", layout.path().display());
        let to = format!("docker://127.0.0.1:{}/{name}", self.port);
        run(Command::new("skopeo")
            .args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"])
            .args(options)
            .args([&from, &to]));
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

pub(crate) fn run(command: &mut Command) -> String {
    let output = command.output().unwrap_or_else(|error| panic!("{command:?}: {error}"));
    let text = |bytes: &[u8]| String::from_utf8_lossy(bytes).into_owned();
    assert!(output.status.success(), "{command:?}: {}{}", text(&output.stdout), text(&output.stderr));
    text(&output.stdout)
}

/// An OCI image layout that grows in a temporary directory.
pub(crate) struct Layout(TempDir);

impl Layout {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        fs::create_dir_all(dir.path().join("blobs/sha256")).unwrap();
        fs::write(dir.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#).unwrap();
        Self(dir)
    }

    /// A layout with one image of `layers` (tars), called `latest`.
    pub(crate) fn of(layers: &[Vec<u8>]) -> Self {
        let layout = Self::new();
        let image = layout.image(layers, "amd64", &json!({"Cmd": ["/bin/app"], "Env": ["A=b"]}));
        layout.index(&[named(image, "latest")]);
        layout
    }

    pub(crate) fn path(&self) -> &Path {
        self.0.path()
    }

    /// Adds a blob and returns its descriptor.
    pub(crate) fn blob(&self, media_type: &str, bytes: &[u8]) -> Value {
        let digest = sha256(bytes);
        fs::write(self.path().join("blobs/sha256").join(digest.hex()), bytes).unwrap();
        json!({"mediaType": media_type, "digest": digest, "size": bytes.len()})
    }

    /// Adds an image with gzipped layers and returns its descriptor.
    pub(crate) fn image(&self, layers: &[Vec<u8>], architecture: &str, config: &Value) -> Value {
        let diff_ids: Vec<Digest> = layers.iter().map(|tar| sha256(tar)).collect();
        let config = json!({
            "architecture": architecture, "os": "linux", "config": config,
            "rootfs": {"type": "layers", "diff_ids": diff_ids},
        });
        let config = self.blob("application/vnd.oci.image.config.v1+json", config.to_string().as_bytes());
        let blobs = layers.iter().map(|tar| self.blob("application/vnd.oci.image.layer.v1.tar+gzip", &gzip(tar)));
        let manifest = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config, "layers": blobs.collect::<Vec<_>>(),
        });
        self.blob("application/vnd.oci.image.manifest.v1+json", manifest.to_string().as_bytes())
    }

    /// Writes `index.json`.
    pub(crate) fn index(&self, entries: &[Value]) {
        let index = json!({"schemaVersion": 2, "manifests": entries});
        fs::write(self.path().join("index.json"), index.to_string()).unwrap();
    }

    /// The layout as an archive.
    pub(crate) fn archive(&self) -> Vec<u8> {
        let mut builder = tar::Builder::new(Vec::new());
        builder.append_dir_all(".", self.path()).unwrap();
        builder.into_inner().unwrap()
    }
}

/// The descriptor with a name for it.
pub(crate) fn named(mut descriptor: Value, name: &str) -> Value {
    descriptor["annotations"] = json!({"org.opencontainers.image.ref.name": name});
    descriptor
}

/// The descriptor with a platform.
pub(crate) fn on_platform(mut descriptor: Value, os: &str, architecture: &str) -> Value {
    descriptor["platform"] = json!({"os": os, "architecture": architecture});
    descriptor
}

pub(crate) fn digest_of(descriptor: &Value) -> Digest {
    descriptor["digest"].as_str().unwrap().parse().unwrap()
}

/// A tar with one file of `size` bytes that does not compress.
pub(crate) fn layer(path: &str, size: usize) -> Vec<u8> {
    let mut state = size as u64 | 1;
    let content: Vec<u8> = std::iter::repeat_with(|| {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        state as u8
    })
    .take(size)
    .collect();
    let mut builder = tar::Builder::new(Vec::new());
    let mut header = tar::Header::new_ustar();
    header.set_size(size as u64);
    header.set_mode(0o755);
    header.set_mtime(1);
    header.set_cksum();
    builder.append_data(&mut header, path, content.as_slice()).unwrap();
    builder.into_inner().unwrap()
}

pub(crate) fn gzip(bytes: &[u8]) -> Vec<u8> {
    let mut encoder = GzEncoder::new(Vec::new(), Compression::fast());
    encoder.write_all(bytes).unwrap();
    encoder.finish().unwrap()
}

pub(crate) fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_sha256(sha2::Sha256::digest(bytes).into())
}

/// Links finished layers itself, as the keeper would, and remembers which.
pub(crate) struct Linker {
    layers: PathBuf,
    pub(crate) committed: Mutex<Vec<LayerId>>,
}

impl CommitLayer for Linker {
    fn commit(&self, layer: LayerId, finished: File) -> BoxFuture<'_, io::Result<()>> {
        async move {
            assert!(has_no_writer(&finished), "the writing descriptor is still open");
            finished.set_permissions(fs::Permissions::from_mode(0o444))?;
            let from = format!("/proc/self/fd/{}", finished.as_raw_fd());
            let from = fs::read_link(from)?;
            fs::hard_link(from, self.layers.join(layer.file_name()))?;
            self.committed.lock().unwrap().push(layer);
            Ok(())
        }
        .boxed()
    }
}

/// A read lease is only given out while nobody has the file open for writing (fcntl(2), `F_SETLEASE`).
fn has_no_writer(file: &File) -> bool {
    let writable = fs::read_dir("/proc/self/fd").unwrap().flatten().any(|entry| {
        let same = fs::read_link(entry.path()).ok() == fs::read_link(format!("/proc/self/fd/{}", file.as_raw_fd())).ok();
        let info = fs::read_to_string(format!("/proc/self/fdinfo/{}", entry.file_name().display())).unwrap_or_default();
        // The last octal digit of the flags is the access mode: 0 is read-only.
        same && info.lines().any(|line| line.starts_with("flags:") && !line.ends_with('0'))
    });
    !writable
}

/// A store in a temporary directory.
pub(crate) struct Store {
    pub(crate) dir: TempDir,
    pub(crate) linker: Arc<Linker>,
    pub(crate) images: ImageStore,
}

impl Store {
    pub(crate) fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let linker = Arc::new(Linker { layers: dir.path().join("layers"), committed: Mutex::default() });
        let images = ImageStore::open(dir.path(), linker.clone()).unwrap();
        Self { dir, linker, images }
    }

    pub(crate) async fn pull(&self, image: &ImageRef) -> Result<Image, ImageError> {
        self.images.pull(image, PullPolicy::FromRegistry, &|_: Progress| ()).await
    }

    pub(crate) fn files(&self, below: &str) -> Vec<String> {
        let mut names: Vec<String> = fs::read_dir(self.dir.path().join(below))
            .unwrap()
            .map(|entry| entry.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        names
    }

    /// Waits until nothing is being written any more.
    pub(crate) fn wait_for_empty_tmp(&self) {
        let start = Instant::now();
        while !self.files("tmp").is_empty() {
            assert!(start.elapsed() < DEADLINE, "left in tmp: {:?}", self.files("tmp"));
            std::thread::yield_now();
        }
    }
}

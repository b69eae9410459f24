//! The images of the tests: ordinary ones, and one for each way in which an image can be odd.

use std::fs::{self, File};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use super::{Compression, Config, Image, Layer, Tree, program};
use crate::{network, paths, process};

/// How long Debian's packages may take to come.
const DEBIAN_LIMIT: Duration = Duration::from_mins(5);
/// What the root file system for Python holds; changed together with its name in the cache.
const PYTHON_PACKAGES: &str = "python3-minimal,libpython3.11-stdlib,ca-certificates";
/// Its name in the cache.
const PYTHON_ROOT: &str = "debian-12-python-1";
/// Applets that the busybox images have as commands.
const APPLETS: [&str; 33] = [
    "sh", "cat", "chroot", "dd", "echo", "env", "grep", "head", "hostname", "id", "kill", "ln", "ls", "mkdir", "mknod",
    "mount", "nc", "nslookup", "ping", "ps", "pwd", "readlink", "rm", "sed", "sleep", "stat", "tail", "touch", "tr", "true",
    "umount", "unshare", "wc",
];

/// `examples/hello`: a static server on an empty file system.
pub fn hello() -> Result<Image> {
    let tree = Tree::new().host_file("hello", &program::hello()?)?;
    Image::build(vec![tree.layer(Compression::Gzip)?], &Config::command(&["/hello"]))
}

/// The same with another greeting: a second revision.
pub fn hello_with(greeting: &str) -> Result<Image> {
    let tree = Tree::new().host_file("hello", &program::hello()?)?;
    let config = Config { env: vec![format!("GREETING={greeting}")], ..Config::command(&["/hello"]) };
    Image::build(vec![tree.layer(Compression::Gzip)?], &config)
}

/// The server of many behaviours on an otherwise empty file system, with variables that change how it listens.
pub fn probe(env: &[&str], exposed: &[u16]) -> Result<Image> {
    let tree = Tree::new().directory("tmp", 0o1777)?.host_file("probe", &program::probe()?)?;
    let config = Config {
        env: env.iter().map(ToString::to_string).collect(),
        exposed: exposed.to_vec(),
        ..Config::command(&["/probe"])
    };
    Image::build(vec![tree.layer(Compression::Plain)?], &config)
}

/// Busybox with its applets and one command.
pub fn busybox(command: &[&str]) -> Result<Image> {
    busybox_with(&Config::command(command))
}

/// Busybox with its applets and any configuration.
pub fn busybox_with(config: &Config) -> Result<Image> {
    Image::build(vec![busybox_layer()?], config)
}

/// `examples/upper`: a shell script as a function.
pub fn upper() -> Result<Image> {
    let script = Tree::new().host_file("bin/upper", &paths::repository().join("examples/upper/upper.sh"))?;
    Image::build(vec![busybox_layer()?, script.layer(Compression::Gzip)?], &Config::command(&["/bin/upper"]))
}

/// `examples/python`: a Debian root file system, a layer that removes and replaces some of it, and the application.
pub fn python() -> Result<Image> {
    let changes = Tree::new()
        .whiteout("etc/debian_version")?
        .directory("etc", 0o755)?
        .file("etc/motd", 0o644, b"changed by the second layer\n")?
        .directory("app", 0o755)?;
    let application = Tree::new().host_file("app/app.py", &paths::repository().join("examples/python/app.py"))?;
    let config = Config {
        cmd: vec!["python3".into(), "/app/app.py".into()],
        env: vec!["PATH=/usr/local/bin:/usr/bin:/bin".into(), "PYTHONDONTWRITEBYTECODE=1".into()],
        exposed: vec![8000],
        working_dir: "/app".into(),
        ..Config::default()
    };
    Image::build(vec![python_root()?, changes.layer(Compression::Plain)?, application.layer(Compression::Gzip)?], &config)
}

/// Ends at once with code 3, having said why.
pub fn exits() -> Result<Image> {
    busybox(&["/bin/sh", "-c", "echo no database in sight >&2; exit 3"])
}

/// Runs, and listens on nothing.
pub fn never_listens() -> Result<Image> {
    busybox(&["/bin/sh", "-c", "echo waiting for nothing; exec sleep 100000"])
}

/// A file without execute bits as its command.
pub fn not_executable() -> Result<Image> {
    let tree = Tree::new().file("program", 0o644, b"#!/bin/sh\necho never\n")?;
    Image::build(vec![busybox_layer()?, tree.layer(Compression::Gzip)?], &Config::command(&["/program"]))
}

/// A program whose interpreter the image does not have.
pub fn interpreter_missing() -> Result<Image> {
    let tree = Tree::new().file("program", 0o755, b"#!/usr/bin/perl\n")?;
    Image::build(vec![tree.layer(Compression::Gzip)?], &Config::command(&["/program"]))
}

/// A command that is not in the image.
pub fn command_missing() -> Result<Image> {
    busybox(&["/usr/bin/nowhere"])
}

/// Neither ENTRYPOINT nor CMD.
pub fn no_command() -> Result<Image> {
    Image::build(vec![busybox_layer()?], &Config::default())
}

/// The layer with busybox and links to it.
pub fn busybox_layer() -> Result<Layer> {
    let mut tree =
        Tree::new().directory("bin", 0o755)?.directory("tmp", 0o1777)?.host_file("bin/busybox", &program::busybox()?)?;
    for applet in APPLETS {
        tree = tree.symlink(&format!("bin/{applet}"), "busybox")?;
    }
    tree.layer(Compression::Gzip)
}

/// A Debian root file system with Python, as one layer. Made once: fetching and compressing it takes half a minute.
pub fn python_root() -> Result<Layer> {
    let cache = paths::cache()?;
    let record = cache.join(format!("{PYTHON_ROOT}.json"));
    let lock = File::create(cache.join(format!("{PYTHON_ROOT}.lock")))?;
    lock.lock().context("cannot lock the cache")?;
    if let Ok(known) = fs::read(&record) {
        let layer: Layer = serde_json::from_slice(&known)?;
        if layer.blob().exists() {
            return Ok(layer);
        }
    }
    let temporary = paths::scratch("debian")?;
    let tar = temporary.path().join("root.tar");
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--variant=extract", &format!("--include={PYTHON_PACKAGES}"), "bookworm"]).arg(&tar);
    network::at_home(|| process::succeed(&mut command, DEBIAN_LIMIT))?;
    let layer = Layer::from_tar(&fs::read(&tar)?, Compression::Gzip)?;
    super::write_whole(&record, &serde_json::to_vec(&layer)?)?;
    Ok(layer)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// The layouts are read by the tools that everybody uses.
    #[test]
    fn layouts_are_what_skopeo_and_umoci_read() {
        let image = upper().unwrap();
        let layout = image.layout().display();
        let limit = Duration::from_mins(1);
        let said = process::succeed(Command::new("skopeo").args(["inspect", &format!("oci:{layout}:latest")]), limit).unwrap();
        let said: serde_json::Value = serde_json::from_str(&said).unwrap();
        assert_eq!(said["Digest"], image.digest());
        assert_eq!(said["Layers"].as_array().unwrap().len(), 2);

        let bundle = paths::scratch("bundle").unwrap();
        let bundle = bundle.path().join("bundle");
        let mut unpack = Command::new("umoci");
        unpack.args(["unpack", "--rootless", "--image", &format!("{layout}:latest")]).arg(&bundle);
        process::succeed(&mut unpack, limit).unwrap();
        assert_eq!(fs::read_link(bundle.join("rootfs/bin/sh")).unwrap().to_str(), Some("busybox"));
        assert!(fs::read_to_string(bundle.join("rootfs/bin/upper")).unwrap().contains("tr a-z A-Z"));
    }

    #[test]
    fn the_same_content_has_the_same_digest() {
        assert_eq!(hello().unwrap().digest(), hello().unwrap().digest());
        assert_ne!(hello().unwrap().digest(), hello_with("bonjour").unwrap().digest());
    }
}

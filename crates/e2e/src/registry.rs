//! Debian's `docker-registry` as a process of its own, on a free loopback port.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener, TcpStream};
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result};
use rustix::process::{Pid, Signal, kill_process};
use tempfile::TempDir;

use crate::image::Image;
use crate::{paths, process, wait};

/// How long the registry may take until it listens, and until it ends.
const PATIENCE: Duration = Duration::from_secs(20);
/// How long an image may take to be pushed.
const PUSH_LIMIT: Duration = Duration::from_mins(2);
/// Another process can take a port between its choice and the registry's bind: so often is another one tried.
const ATTEMPTS: u32 = 5;

/// A registry that runs. Its content stays in the cache between runs: an image that is there already is only announced.
pub struct Registry {
    child: Child,
    home: TempDir,
    address: SocketAddr,
}

impl Registry {
    /// Starts one over the common content.
    pub fn start() -> Result<Self> {
        Self::over(&paths::cache()?.join("registry"))
    }

    /// Starts one over the content of a directory.
    pub fn over(storage: &Path) -> Result<Self> {
        fs::create_dir_all(storage)?;
        let mut attempt = 1;
        loop {
            match Self::attempt(storage) {
                Err(_) if attempt < ATTEMPTS => attempt += 1,
                result => return result,
            }
        }
    }

    fn attempt(storage: &Path) -> Result<Self> {
        let home = paths::scratch("registry")?;
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let settings = home.path().join("config.yml");
        fs::write(&settings, configuration(storage, address))?;
        let log = fs::File::create(home.path().join("log"))?;
        let mut child = Command::new("docker-registry")
            .arg("serve")
            .arg(&settings)
            .env("OTEL_TRACES_EXPORTER", "none")
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .process_group(0)
            .spawn()
            .context("cannot start docker-registry: `cargo xtask test` installs it")?;
        let listening = wait::until("the registry listens", PATIENCE, || {
            anyhow::ensure!(child.try_wait()?.is_none(), "docker-registry ended");
            Ok(TcpStream::connect(address).ok())
        });
        match listening {
            Ok(_) => Ok(Self { child, home, address }),
            Err(error) => {
                let _ = child.kill();
                let _ = child.wait();
                let said = fs::read_to_string(home.path().join("log")).unwrap_or_default();
                Err(error.context(said))
            }
        }
    }

    /// `127.0.0.1:PORT`, the first part of its images' names.
    pub fn name(&self) -> String {
        self.address.to_string()
    }

    /// The name under which the registry serves `repository:tag`.
    pub fn reference(&self, repository: &str, tag: &str) -> String {
        format!("{}/{repository}:{tag}", self.address)
    }

    /// Pushes an image with skopeo and returns its reference.
    pub fn push(&self, image: &Image, repository: &str, tag: &str) -> Result<String> {
        let reference = self.reference(repository, tag);
        process::succeed(&mut self.push_command(image, &reference), PUSH_LIMIT)?;
        Ok(reference)
    }

    /// The command that pushes an image.
    pub fn push_command(&self, image: &Image, reference: &str) -> Command {
        let mut command = Command::new("skopeo");
        command.args(["--insecure-policy", "copy", "--quiet", "--dest-tls-verify=false"]);
        command.arg(format!("oci:{}:latest", image.layout().display())).arg(format!("docker://{reference}"));
        command
    }

    /// What it has logged.
    pub fn log(&self) -> String {
        fs::read_to_string(self.home.path().join("log")).unwrap_or_default()
    }

    /// Where its log lies.
    pub fn home(&self) -> PathBuf {
        self.home.path().to_owned()
    }
}

impl Drop for Registry {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.child), Signal::TERM);
        if !matches!(wait::exited(&mut self.child, PATIENCE), Ok(Some(_))) {
            let _ = self.child.kill();
            let _ = self.child.wait();
        }
    }
}

fn configuration(storage: &Path, address: SocketAddr) -> String {
    format!(
        "version: 0.1\nlog: {{level: warn}}\nstorage:\n  filesystem: {{rootdirectory: {}}}\n  delete: {{enabled: true}}\nhttp: {{addr: '{address}'}}\n",
        storage.display()
    )
}

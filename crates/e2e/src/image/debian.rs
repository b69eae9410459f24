//! Debian's packages as layers: one base that many images share, and a layer for each set of packages on it.
//!
//! All are made in one run, which takes a minute or two, and stay in the cache under a key of everything that they are made from.

use std::collections::BTreeMap;
use std::fs::{self, File};
use std::hash::{DefaultHasher, Hash, Hasher};
use std::process::{Command, Stdio};
use std::time::Duration;

use anyhow::{Context, Result, ensure};

use super::{Compression, Layer, write_whole};
use crate::{network, paths, wait};

const SUITE: &str = "bookworm";
/// Sets by name: the packages that an image of that name is known for.
const SETS: [(&str, &str); 7] = [
    ("nginx", "nginx-light"),
    ("apache", "apache2"),
    ("redis", "redis-server"),
    ("postgres", "postgresql-15"),
    ("jvm", "openjdk-17-jre-headless"),
    ("node", "nodejs"),
    ("numpy", "python3-numpy"),
];
/// What makes them.
const SCRIPT: &str = include_str!("debian.sh");
/// How long that may take where packages come slowly.
const LIMIT: Duration = Duration::from_mins(15);

/// The base alone: Debian's essential packages and apt.
pub fn base() -> Result<Layer> {
    layer("base")
}

/// What installing a set changes on the base.
pub fn packages(set: &str) -> Result<Layer> {
    layer(set)
}

/// Makes all layers unless they are there; what takes long is said on standard error.
pub fn prepare() -> Result<()> {
    layers().map(drop)
}

fn layer(name: &str) -> Result<Layer> {
    layers()?.remove(name).with_context(|| format!("no layer of Debian's packages is called {name}"))
}

fn layers() -> Result<BTreeMap<String, Layer>> {
    let sources = paths::repository().join("crates/e2e/programs/popular");
    let mut hasher = DefaultHasher::new();
    (SUITE, SETS, SCRIPT).hash(&mut hasher);
    fs::read(sources.join("Server.java")).context("cannot read Server.java")?.hash(&mut hasher);
    let cache = paths::cache()?;
    let record = cache.join(format!("debian-{SUITE}-{:016x}.json", hasher.finish()));
    // Who comes second waits for the first.
    let lock = File::create(cache.join("debian.lock"))?;
    lock.lock().context("cannot lock the cache")?;
    if let Ok(known) = fs::read(&record) {
        let layers: BTreeMap<String, Layer> = serde_json::from_slice(&known)?;
        if layers.values().all(|layer| layer.blob().exists()) {
            return Ok(layers);
        }
    }
    let directory = paths::scratch("layers")?;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "--pid", "--fork", "--kill-child", "--mount-proc"]);
    command.args(["bash", "-c", SCRIPT, "debian.sh"]);
    command.args([directory.path(), &sources]).arg(SUITE);
    command.args(SETS.map(|(name, packages)| format!("{name}={packages}")));
    command.stdin(Stdio::null()).stdout(Stdio::null());
    let mut child = network::at_home(|| command.spawn().context("cannot start unshare"))?;
    let Some(status) = wait::exited(&mut child, LIMIT)? else {
        // All that it started ends with it.
        child.kill()?;
        child.wait()?;
        anyhow::bail!("Debian's packages did not become layers within {LIMIT:?}");
    };
    ensure!(status.success(), "Debian's packages did not become layers: {status}");
    let mut layers = BTreeMap::new();
    for name in std::iter::once("base").chain(SETS.map(|(name, _)| name)) {
        let tar = fs::read(directory.path().join(format!("{name}.tar")))?;
        layers.insert(name.to_owned(), Layer::from_tar(&tar, Compression::Plain)?);
    }
    write_whole(&record, &serde_json::to_vec(&layers)?)?;
    Ok(layers)
}

//! Where things lie: the repository, what is kept between runs, and where a run works.

use std::path::PathBuf;

use anyhow::{Context, Result, bail};

/// Temporary directories are made here: on a disk by convention, because layers are mounted from files and tmpfs cannot serve that.
const SCRATCH: &str = "/var/tmp";

/// The top of the repository.
pub fn repository() -> PathBuf {
    PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../.."))
}

/// What is expensive to make and stays between runs: compiled programs, root filesystems, the registry's content.
pub fn cache() -> Result<PathBuf> {
    let target = std::env::var_os("CARGO_TARGET_DIR").map_or_else(|| repository().join("target"), PathBuf::from);
    let cache = target.join("e2e");
    std::fs::create_dir_all(&cache).with_context(|| format!("cannot create {}", cache.display()))?;
    Ok(cache.canonicalize()?)
}

/// The binary under test: `FUNTAINER_BIN`, which `cargo xtask` sets.
pub fn funtainer() -> Result<PathBuf> {
    let Some(path) = std::env::var_os("FUNTAINER_BIN") else {
        bail!("FUNTAINER_BIN names no binary to test: run `cargo xtask test`, or set it to a built funtainer")
    };
    let path = PathBuf::from(path);
    path.canonicalize().with_context(|| format!("FUNTAINER_BIN={} cannot be used", path.display()))
}

/// A fresh directory that is removed at its end.
pub fn scratch(purpose: &str) -> Result<tempfile::TempDir> {
    tempfile::Builder::new()
        .prefix(&format!("funtainer-{purpose}-"))
        .tempdir_in(SCRATCH)
        .with_context(|| format!("cannot create a directory in {SCRATCH}"))
}

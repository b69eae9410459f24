//! Programs for images: compiled from this repository's sources by the installed `rustc` into one static file each.

use std::fs;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result};

use crate::{paths, process};

/// How long a compilation may take on a busy machine.
const COMPILE_LIMIT: Duration = Duration::from_mins(3);
/// How each is compiled: small, static, quick to start.
const FLAGS: [&str; 14] = [
    "--edition",
    "2024",
    "-C",
    "opt-level=3",
    "-C",
    "target-feature=+crt-static",
    "-C",
    "panic=abort",
    "-C",
    "codegen-units=1",
    "-C",
    "strip=symbols",
    "-C",
    "lto=fat",
];

/// What says which versions of Go's modules are fetched.
const GO_MODULE: [&str; 2] = ["go.mod", "go.sum"];

/// The server of `examples/hello`.
pub fn hello() -> Result<PathBuf> {
    compile("hello", "examples/hello/main.rs", &["examples/hello/http.rs"])
}

/// The server whose paths each do one thing that a test asks for.
pub fn probe() -> Result<PathBuf> {
    compile("probe", "crates/e2e/programs/probe.rs", &["examples/hello/http.rs", "crates/e2e/programs/appetite.rs"])
}

/// `runtimetest` of OCI runtime-tools: looks from within whether a container is what its config.json says. Fetched and built by Go, once.
pub fn runtimetest() -> Result<PathBuf> {
    const PACKAGE: &str = "github.com/opencontainers/runtime-tools/cmd/runtimetest";
    let module = paths::repository().join("crates/e2e/programs/runtimetest");
    let mut hasher = DefaultHasher::new();
    for name in GO_MODULE {
        fs::read(module.join(name)).with_context(|| format!("cannot read {name}"))?.hash(&mut hasher);
    }
    let programs = paths::cache()?.join("programs");
    fs::create_dir_all(&programs)?;
    let program = programs.join(format!("runtimetest-{:016x}", hasher.finish()));
    if program.exists() {
        return Ok(program);
    }
    let temporary = tempfile::tempdir_in(&programs)?;
    // Go may write to its module's files.
    for name in GO_MODULE {
        fs::copy(module.join(name), temporary.path().join(name))?;
    }
    let mut command = Command::new("go");
    command.args(["build", "-o", "program", PACKAGE]).current_dir(temporary.path());
    command.envs([("GOFLAGS", "-mod=mod -buildvcs=false"), ("GOTOOLCHAIN", "local"), ("CGO_ENABLED", "0")]);
    process::succeed(&mut command, COMPILE_LIMIT)?;
    fs::rename(temporary.path().join("program"), &program)?;
    Ok(program)
}

/// Debian's static busybox.
pub fn busybox() -> Result<PathBuf> {
    let path = PathBuf::from("/bin/busybox");
    anyhow::ensure!(
        path.exists(),
        "{} is missing: `apt-get install busybox-static`, as `cargo xtask test` does",
        path.display()
    );
    Ok(path)
}

fn compile(name: &str, main: &str, modules: &[&str]) -> Result<PathBuf> {
    let top = paths::repository();
    let mut hasher = DefaultHasher::new();
    FLAGS.hash(&mut hasher);
    for source in std::iter::once(&main).chain(modules) {
        let path = top.join(source);
        fs::read(&path).with_context(|| format!("cannot read {}", path.display()))?.hash(&mut hasher);
    }
    let programs = paths::cache()?.join("programs");
    fs::create_dir_all(&programs)?;
    let program = programs.join(format!("{name}-{:016x}", hasher.finish()));
    if !program.exists() {
        rustc(&top.join(main), &programs, &program)?;
    }
    Ok(program)
}

fn rustc(main: &Path, programs: &Path, program: &Path) -> Result<()> {
    let temporary = tempfile::tempdir_in(programs)?;
    let output = temporary.path().join("program");
    let mut command = Command::new(std::env::var_os("RUSTC").unwrap_or_else(|| "rustc".into()));
    command.args(FLAGS).arg("-o").arg(&output).arg(main);
    process::succeed(&mut command, COMPILE_LIMIT)?;
    fs::rename(&output, program)?;
    Ok(())
}

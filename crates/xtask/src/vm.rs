//! `cargo xtask vm`: tests and programs on Debian 12's kernel with pure cgroup v2, in a virtual machine.
//!
//! The guest is a Debian root file system ([`system`], made once and kept in `target/vm`), whose changes are forgotten at its end, and a second
//! disk with what this run brings ([`payload`]). It is emulated without KVM ([`machine`]), so that it works wherever qemu does, and has no network.
//! Programs find the same paths as here: the workspace is mounted where it is on the host.

mod archive;
mod left_out;
mod machine;
mod payload;
mod system;

use std::ffi::OsString;
use std::fs::{self, File};
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use clap::{Args, ValueEnum};

use crate::{build, packages};
use payload::{Payload, Selection};
use system::succeed;

/// By how much the guest is slower than an ordinary machine, for the limits of tests.
const PATIENCE: &str = "8";
/// Test programs run this many tests at once: the guest has two processors, and waits less than it computes.
const THREADS: &str = "2";
/// Tests of the sandbox that ask systemd for control groups, or find themselves in a unit's; by parts of their names.
const SANDBOX_UNDER_SYSTEMD: [&str; 3] = ["cgroup::", "an_instance_runs_and_ends", "the_memory_limit_holds_and_is_told"];
/// Test programs of the crate `e2e` for the boot with systemd.
const E2E_UNDER_SYSTEMD: [&str; 2] = ["systemd", "titles"];

/// What to run, and in which guest.
#[derive(Args)]
pub(crate) struct Options {
    /// The tests to run; without it, the command after `--`.
    #[arg(value_enum)]
    suite: Option<Suite>,
    /// Only tests whose name contains one of these texts, or all of a test program of that name.
    #[arg(requires = "suite")]
    filters: Vec<String>,
    /// Boot with systemd as process 1, instead of a script that mounts what an init mounts.
    #[arg(long)]
    systemd: bool,
    /// Seconds until the guest is switched off.
    #[arg(long, value_name = "SECONDS", default_value_t = 900)]
    timeout: u64,
    /// Brings a file or directory into the guest, at the same absolute path; may be repeated.
    #[arg(long = "bring", value_name = "PATH")]
    bring: Vec<PathBuf>,
    /// After `--`: the command, run as root in the top of the workspace with `funtainer` in its path; or, with a suite, arguments of the
    /// test programs.
    #[arg(last = true)]
    words: Vec<OsString>,
}

/// A set of tests.
#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Suite {
    /// Unit and integration tests of the crate `funtainer-sandbox`.
    Sandbox,
    /// Tests of the binary: those that another kernel can change. `FUNTAINER_BIN` names another one than a debug build.
    E2e,
    /// Both in a guest without systemd, then what concerns systemd in one with it, each with its own time limit.
    All,
}

/// A run of a guest.
pub(crate) struct Run {
    payload: Payload,
    systemd: bool,
    limit: Duration,
}

/// `cargo xtask vm`.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let limit = Duration::from_secs(options.timeout);
    let mut line = |line: &str| println!("{line}");
    if options.suite == Some(Suite::All) {
        let plain = options.filters.is_empty() && options.words.is_empty() && options.bring.is_empty() && !options.systemd;
        ensure!(plain, "`cargo xtask vm all` takes no more than --timeout");
        return Ok(if all(&funtainer()?, limit, &mut line)? { ExitCode::SUCCESS } else { ExitCode::FAILURE });
    }
    let mut payload = Payload::new()?;
    for path in &options.bring {
        payload.bring(path)?;
    }
    let selection = Selection { programs: None, filters: &options.filters, words: &options.words };
    match options.suite {
        Some(Suite::Sandbox) => sandbox(&mut payload, &selection)?,
        Some(_) if options.systemd => {
            e2e(&mut payload, &funtainer()?, &Selection { programs: Some(&E2E_UNDER_SYSTEMD), ..selection })?;
        }
        Some(_) => e2e(&mut payload, &funtainer()?, &selection)?,
        None => {
            ensure!(
                !options.words.is_empty(),
                "nothing to run: name a suite (`cargo xtask vm sandbox`) or a command (`cargo xtask vm -- uname -r`)"
            );
            payload.install("funtainer", &funtainer()?)?;
            payload.command(&options.words)?;
        }
    }
    let run = Run { payload, systemd: options.systemd, limit };
    Ok(ExitCode::from(run.start(&mut line)?))
}

/// Everything that runs on the other kernel, in two boots; false if a test failed.
pub(crate) fn all(funtainer: &Path, limit: Duration, line: &mut dyn FnMut(&str)) -> Result<bool> {
    let mut good = true;
    let mut payload = Payload::new()?;
    sandbox(&mut payload, &Selection::default())?;
    e2e(&mut payload, funtainer, &Selection::default())?;
    good &= Run { payload, systemd: false, limit }.start(line)? == 0;
    let mut payload = Payload::new()?;
    let filters = SANDBOX_UNDER_SYSTEMD.map(str::to_owned);
    sandbox(&mut payload, &Selection { filters: &filters, ..Selection::default() })?;
    e2e(&mut payload, funtainer, &Selection { programs: Some(&E2E_UNDER_SYSTEMD), ..Selection::default() })?;
    good &= Run { payload, systemd: true, limit }.start(line)? == 0;
    Ok(good)
}

fn sandbox(payload: &mut Payload, selection: &Selection<'_>) -> Result<()> {
    slow(payload)?;
    payload.tests("funtainer-sandbox", selection)
}

fn e2e(payload: &mut Payload, funtainer: &Path, selection: &Selection<'_>) -> Result<()> {
    slow(payload)?;
    payload.install("funtainer", funtainer)?;
    payload.set("FUNTAINER_BIN", "/usr/local/bin/funtainer")?;
    // There is no compiler in the guest: the programs of images are made here, where the tests look first.
    let image = build::program("image")?;
    for name in ["hello", "probe", "runtimetest"] {
        succeed(build::outside(Command::new(&image)).arg(name).arg(payload.target().join("images").join(name)))?;
    }
    payload.bring(&payload.target().join("e2e/programs"))?;
    payload.tests("funtainer-e2e", selection)
}

fn slow(payload: &mut Payload) -> Result<()> {
    payload.set("FUNTAINER_TEST_PATIENCE", PATIENCE)?;
    payload.set("RUST_TEST_THREADS", THREADS)
}

impl Run {
    /// Boots, hands each line of output on, and returns the exit code.
    pub(crate) fn start(self, line: &mut dyn FnMut(&str)) -> Result<u8> {
        packages::install(packages::VM)?;
        let directory = directory()?;
        let system = system::ready(&directory)?;
        let place = Place::new(&directory)?;
        let disk = self.payload.write(&place.0)?;
        machine::Machine { system: &system, payload: &disk, place: &place.0, systemd: self.systemd }.run(self.limit, line)
    }
}

/// The product for commands: the one that the environment names, or a debug build.
fn funtainer() -> Result<PathBuf> {
    if let Some(path) = std::env::var_os("FUNTAINER_BIN") {
        let path = PathBuf::from(path);
        ensure!(path.is_file(), "FUNTAINER_BIN names {}, which is no file", path.display());
        return Ok(path);
    }
    build::funtainer_for_debugging()
}

/// `target/vm`.
fn directory() -> Result<PathBuf> {
    let directory = build::metadata()?.target_directory.into_std_path_buf().join("vm");
    fs::create_dir_all(&directory).with_context(|| format!("cannot make {}", directory.display()))?;
    Ok(directory)
}

/// The files of one run of a guest, removed with it. What killed runs left is removed by the next one.
struct Place(PathBuf);

impl Place {
    fn new(directory: &Path) -> Result<Self> {
        let lock = File::create(directory.join("lock"))?;
        lock.lock().context("cannot lock target/vm")?;
        for entry in fs::read_dir(directory)? {
            let entry = entry?;
            let name = entry.file_name();
            let owner = name.to_str().and_then(|name| name.strip_prefix("run-"));
            if owner.is_some_and(|pid| !Path::new("/proc").join(pid).exists()) {
                fs::remove_dir_all(entry.path())?;
            }
        }
        let place = directory.join(format!("run-{}", std::process::id()));
        if place.exists() {
            bail!("{} is in use by this very process", place.display());
        }
        fs::create_dir(&place).with_context(|| format!("cannot make {}", place.display()))?;
        Ok(Self(place))
    }
}

impl Drop for Place {
    fn drop(&mut self) {
        if let Err(error) = fs::remove_dir_all(&self.0) {
            eprintln!("warning: {} cannot be removed: {error}", self.0.display());
        }
    }
}

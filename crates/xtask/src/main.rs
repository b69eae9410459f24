//! Developer commands of funtainer: `cargo xtask demo`, `test`, `bench`, `tidy`.
//!
//! Each command prepares the machine, builds what it needs with cargo, and hands the path of the built binary on as `FUNTAINER_BIN`. What is then
//! shown or tested lives in the crate `e2e`, because it is done through the public doors only.
#![forbid(unsafe_code)]

mod build;
mod gate;
mod machine;
mod packages;
mod tidy;
mod vm;

use std::ffi::OsString;
use std::os::unix::process::CommandExt;
use std::path::PathBuf;
use std::process::{Command, ExitCode};

use anyhow::{Context, Result, ensure};
use clap::{Parser, Subcommand};

/// Developer commands of funtainer.
///
/// `demo` shows what funtainer does, `test` is what a change must pass, `vm` runs on another kernel, `bench` measures, `tidy` checks the rules that no compiler knows.
#[derive(Parser)]
#[command(name = "cargo xtask", bin_name = "cargo xtask", after_help = AFTER_HELP)]
struct Arguments {
    #[command(subcommand)]
    task: Task,
}

const AFTER_HELP: &str = "Examples:
  cargo xtask demo                 from an image in a registry to an answered call, with the time of each phase; needs no root
  cargo xtask test                 everything that a change must pass; as root, 10 to 30 minutes on two cores
  cargo xtask test --only tests --filter stdio
                                   the tests whose name contains 'stdio'
  cargo xtask vm sandbox cgroup    the sandbox's tests whose name contains 'cgroup', on Debian 12's kernel
  cargo xtask vm -- funtainer doctor
                                   a command there, as root
  cargo xtask image hello          an image from examples/hello, to import or to push
  cargo xtask bench --quick        the numbers of SPECIFICATION.md, with fewer rounds";

#[derive(Subcommand)]
enum Task {
    /// Show funtainer at work: a registry, a server, an image made here, calls cold and warm, and nothing left afterwards.
    ///
    /// As root: a server of root, then one of an ordinary user who is made for that. As an ordinary user: that user's own server (Linux 6.6 or
    /// later), or with --sudo one of root.
    ///
    /// Installs docker-registry and skopeo with apt where they are missing and root is there to do it, and starts no service. Under five minutes with
    /// the first build, seconds without.
    Demo {
        /// As an ordinary user: build as that user, and raise only `funtainer serve`, by sudo.
        #[arg(long)]
        sudo: bool,
    },
    /// Run everything that a change must pass: format, lints, tidy, documentation, tests.
    ///
    /// Installs what the tests need with apt, and starts no service. The tests start real containers and need root and Linux 6.1 or later.
    Test(gate::Options),
    /// Run tests or a command on Debian 12's kernel with pure cgroup v2, in a virtual machine.
    ///
    /// Installs qemu and mmdebstrap with apt where they are missing. The first run makes the guest's Debian in target/vm; each further one boots
    /// in seconds. The exit code is that of the tests or of the command.
    Vm(vm::Options),
    /// Measure cold and warm calls against `runc run` and nginx, and memory, in one interleaved run.
    Bench {
        /// Fewer rounds: for a look, not for the papers.
        #[arg(long)]
        quick: bool,
        /// Print the results as JSON instead of a table.
        #[arg(long)]
        json: bool,
    },
    /// Write an example of `examples/` as an OCI image layout directory, without any container tool.
    ///
    /// Prints the directory: `funtainer image import` and `skopeo copy oci:DIR:latest ...` take it.
    Image {
        /// `hello`, `python` or `upper`.
        example: String,
        /// The directory to write; without it, one below target/images.
        directory: Option<PathBuf>,
    },
    /// Check what no compiler does: edges between crates, `unsafe`, size of files, open ends, licences.
    Tidy,
}

fn main() -> ExitCode {
    let done: Result<ExitCode> = match Arguments::parse().task {
        Task::Demo { sudo } => demo(sudo).map(|()| ExitCode::SUCCESS),
        Task::Test(options) => gate::run(&options),
        Task::Vm(options) => vm::run(&options),
        Task::Bench { quick, json } => bench(quick, json).map(|()| ExitCode::SUCCESS),
        Task::Image { example, directory } => image(&example, directory).map(|()| ExitCode::SUCCESS),
        Task::Tidy => tidy::run().map(|()| ExitCode::SUCCESS),
    };
    done.unwrap_or_else(|error| {
        eprintln!("error: {error:#}");
        ExitCode::FAILURE
    })
}

fn demo(sudo: bool) -> Result<()> {
    if machine::is_root() {
        ensure!(!sudo, "--sudo is for ordinary users, and this is root");
        machine::builds_in_own_tree()?;
    }
    machine::has_kernel()?;
    packages::provide(packages::DEMO, sudo)?;
    let binary = build::funtainer()?;
    let demo = build::program("demo")?;
    let flag = sudo.then_some("--sudo");
    become_program(build::outside(Command::new(demo)).args(flag).env("FUNTAINER_BIN", binary))
}

fn bench(quick: bool, json: bool) -> Result<()> {
    machine::can_run_containers()?;
    packages::install(packages::BENCH)?;
    let binary = build::funtainer()?;
    let bench = build::program("bench")?;
    let flags =
        [(quick, "--quick"), (json, "--json")].into_iter().filter(|(set, _)| *set).map(|(_, flag)| OsString::from(flag));
    become_program(build::outside(Command::new(bench)).args(flags).env("FUNTAINER_BIN", binary))
}

fn image(example: &str, directory: Option<PathBuf>) -> Result<()> {
    packages::install(if matches!(example, "hello" | "upper") { packages::IMAGE } else { packages::DEBIAN_IMAGE })?;
    become_program(build::outside(Command::new(build::program("image")?)).arg(example).args(directory))
}

/// Goes on as another program: signals reach it directly, and its exit code is ours.
fn become_program(command: &mut Command) -> Result<()> {
    let error = command.exec();
    Err(error).with_context(|| format!("cannot execute {}", command.get_program().display()))
}

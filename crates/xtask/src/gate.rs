//! `cargo xtask test`: the steps that a change must pass, each with its time.

use std::ffi::OsStr;
use std::io::{BufRead, BufReader};
use std::process::{Command, ExitCode, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use clap::{Args, ValueEnum};

use crate::{build, machine, packages, tidy};

/// Scenarios at once: each has a server and some containers, and waits most of the time.
const SCENARIO_THREADS: &str = "4";

/// Which steps.
#[derive(Args)]
pub(crate) struct Options {
    /// Only this step; may be repeated.
    #[arg(long, value_enum)]
    only: Vec<Step>,
    /// Only tests whose name contains this text.
    #[arg(long, value_name = "TEXT")]
    filter: Option<String>,
}

#[derive(Clone, Copy, PartialEq, Eq, ValueEnum)]
enum Step {
    /// `cargo fmt --check`, examples included.
    Format,
    /// `cargo clippy`, warnings are errors.
    Lints,
    /// The project's own rules.
    Tidy,
    /// `cargo doc`, warnings are errors.
    Docs,
    /// Fuzz targets compile.
    Fuzz,
    /// Unit tests, and the scenarios over the release binary.
    Tests,
    /// The demo, from the image to the last clean-up.
    Demo,
}

const STEPS: [(Step, &str); 7] = [
    (Step::Format, "format"),
    (Step::Lints, "lints"),
    (Step::Tidy, "tidy"),
    (Step::Docs, "docs"),
    (Step::Fuzz, "fuzz targets"),
    (Step::Demo, "demo"),
    (Step::Tests, "tests"),
];

/// Tests that passed and failed, by cargo's own lines.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq)]
struct Tally {
    passed: u64,
    failed: u64,
}

/// Runs the steps. The last line counts the tests, whatever happened: those who watch a run look there.
pub(crate) fn run(options: &Options) -> Result<ExitCode> {
    let chosen = |step: Step| options.only.is_empty() || options.only.contains(&step);
    if chosen(Step::Tests) || chosen(Step::Demo) {
        machine::can_run_containers()?;
        packages::install(packages::TEST)?;
    }
    let start = Instant::now();
    let mut tally = Tally::default();
    let mut failed = Vec::new();
    for (step, title) in STEPS.into_iter().filter(|(step, _)| chosen(*step)) {
        println!("== {title}");
        let began = Instant::now();
        let outcome = take(step, options, &mut tally);
        let took = seconds(began.elapsed());
        match outcome {
            Ok(()) => println!("== {title}: good after {took}\n"),
            Err(error) => {
                println!("== {title}: FAILED after {took}: {error:#}\n");
                failed.push(title);
            }
        }
    }
    println!("all steps took {}", seconds(start.elapsed()));
    if !failed.is_empty() {
        println!("failed: {}", failed.join(", "));
    }
    println!("{} passed, {} failed", tally.passed, tally.failed.max(failed.len() as u64));
    Ok(if failed.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
}

fn take(step: Step, options: &Options, tally: &mut Tally) -> Result<()> {
    match step {
        Step::Format => format(),
        Step::Lints => {
            succeed(build::cargo().args(["clippy", "--locked", "--workspace", "--all-targets", "--", "-D", "warnings"]))
        }
        Step::Tidy => tidy::run(),
        Step::Docs => {
            let mut command = build::cargo();
            command.args(["doc", "--locked", "--workspace", "--no-deps", "--document-private-items"]);
            succeed(command.env("RUSTDOCFLAGS", "-D warnings"))
        }
        Step::Fuzz => fuzz(),
        Step::Tests => tests(options.filter.as_deref(), tally),
        Step::Demo => succeed(build::outside(Command::new(build::program("demo")?)).env("FUNTAINER_BIN", build::funtainer()?)),
    }
}

/// The workspace, and the programs for images, which are no packages.
fn format() -> Result<()> {
    succeed(build::cargo().args(["fmt", "--all", "--check"]))?;
    let top = build::metadata()?.workspace_root.into_std_path_buf();
    let sources = ["examples/hello/main.rs", "crates/e2e/programs/probe.rs"].map(|source| top.join(source));
    succeed(build::outside(Command::new("rustfmt")).args(["--edition", "2024", "--check"]).args(sources))
}

/// Type-checks every fuzz target, so that none rots. Building one with its sanitizer takes longer than all tests, and needs nightly and
/// cargo-fuzz: `cargo +nightly fuzz run TARGET` does it for who fuzzes.
fn fuzz() -> Result<()> {
    let top = build::metadata()?.workspace_root.into_std_path_buf();
    let manifest = top.join("fuzz/Cargo.toml");
    ensure!(manifest.exists(), "{} is missing: every parser of foreign bytes has a fuzz target", manifest.display());
    let mut command = build::cargo();
    command.args(["check", "--locked", "--all-targets", "--manifest-path"]).arg(manifest);
    succeed(command.arg("--target-dir").arg(top.join("target/fuzz")))
}

/// Unit tests first, because they fail fastest; then the scenarios.
fn tests(filter: Option<&str>, tally: &mut Tally) -> Result<()> {
    let binary = build::funtainer()?;
    // What takes minutes the first time says so, rather than to let a test look as if it hung.
    succeed(build::outside(Command::new(build::program("image")?)).arg("layers"))?;
    let units = ["--workspace", "--exclude", "funtainer-e2e"];
    let mut outcomes = Vec::new();
    for (packages, threads) in [(&units[..], None), (&["--package", "funtainer-e2e"], Some(SCENARIO_THREADS))] {
        let mut command = build::cargo();
        command.args(["test", "--locked", "--no-fail-fast"]).args(packages).args(filter).env("FUNTAINER_BIN", &binary);
        if let Some(threads) = threads {
            command.env("RUST_TEST_THREADS", threads);
        }
        outcomes.push(counted(&mut command, tally)?);
    }
    ensure!(outcomes.iter().all(|good| *good), "{} tests failed", tally.failed);
    ensure!(tally.passed > 0, "no test ran");
    Ok(())
}

/// Runs `cargo test`, shows what it says and counts the tests.
fn counted(command: &mut Command, tally: &mut Tally) -> Result<bool> {
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start cargo")?;
    let stdout = child.stdout.take().context("cargo has no standard output")?;
    for line in BufReader::new(stdout).split(b'\n') {
        let line = line.context("cannot read what cargo says")?;
        let line = String::from_utf8_lossy(&line);
        println!("{line}");
        tally.count(&line);
    }
    Ok(child.wait()?.success())
}

impl Tally {
    /// Adds a line such as `test result: ok. 12 passed; 0 failed; 0 ignored; ...`.
    fn count(&mut self, line: &str) {
        let Some(rest) = line.strip_prefix("test result: ") else { return };
        for part in rest.split([';', '.']) {
            let mut words = part.split_whitespace();
            match (words.next().and_then(|number| number.parse::<u64>().ok()), words.next()) {
                (Some(number), Some("passed")) => self.passed += number,
                (Some(number), Some("failed")) => self.failed += number,
                _ => {}
            }
        }
    }
}

fn succeed(command: &mut Command) -> Result<()> {
    let words: Vec<_> = std::iter::once(command.get_program()).chain(command.get_args()).map(OsStr::to_string_lossy).collect();
    let name = words.join(" ");
    let status = command.stdin(Stdio::null()).status().with_context(|| format!("cannot start {name}"))?;
    ensure!(status.success(), "{name}: {status}");
    Ok(())
}

fn seconds(duration: Duration) -> String {
    format!("{:.1} s", duration.as_secs_f64())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn result_lines_are_counted_and_others_are_not() {
        let mut tally = Tally::default();
        for line in [
            "test result: ok. 12 passed; 0 failed; 0 ignored; 0 measured; 3 filtered out; finished in 0.20s",
            "test result: FAILED. 1 passed; 2 failed; 0 ignored; 0 measured; 0 filtered out; finished in 1.20s",
            "test result_lines ... ok",
            "7 passed",
        ] {
            tally.count(line);
        }
        assert_eq!(tally, Tally { passed: 13, failed: 2 });
    }

    #[test]
    fn every_step_is_in_the_list() {
        for step in Step::value_variants() {
            assert!(STEPS.iter().any(|(listed, _)| listed == step));
        }
    }
}

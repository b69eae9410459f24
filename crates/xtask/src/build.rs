//! Building with cargo, and finding what was built by cargo's own messages.

use std::ffi::{OsStr, OsString};
use std::io::BufReader;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use cargo_metadata::{Artifact, Message, Metadata, MetadataCommand};

/// What `cargo run` tells the program that it runs about that program's package, by the start of the name.
///
/// None of it is a setting (those are `CARGO_HOME`, `CARGO_TARGET_DIR`, `CARGO_PROFILE_*` and so on, which stay). Build scripts ask to be run
/// again when one of these changes, so handing them on would build half of the workspace anew at each switch between `cargo` and `cargo xtask`.
/// <https://doc.rust-lang.org/cargo/reference/environment-variables.html#environment-variables-cargo-sets-for-crates>
const OF_THE_OUTER_PACKAGE: [&str; 9] = [
    "CARGO_BIN_EXE_",
    "CARGO_BIN_NAME",
    "CARGO_CFG_",
    "CARGO_CRATE_NAME",
    "CARGO_FEATURE_",
    "CARGO_MANIFEST_",
    "CARGO_PKG_",
    "CARGO_PRIMARY_PACKAGE",
    "CARGO_TARGET_TMPDIR",
];

/// The cargo that started us, as if a person had started it.
pub(crate) fn cargo() -> Command {
    outside(Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into())))
}

/// A command that learns nothing about this package: for cargo, and for programs that may start cargo.
pub(crate) fn outside(mut command: Command) -> Command {
    for name in outer_variables() {
        command.env_remove(name);
    }
    command
}

fn outer_variables() -> impl Iterator<Item = OsString> {
    std::env::vars_os().map(|(name, _)| name).filter(|name| is_of_the_outer_package(name))
}

fn is_of_the_outer_package(name: &OsStr) -> bool {
    name == "CARGO" || OF_THE_OUTER_PACKAGE.iter().any(|start| name.as_encoded_bytes().starts_with(start.as_bytes()))
}

/// The top of the workspace, its packages and the edges between them.
pub(crate) fn metadata() -> Result<Metadata> {
    let mut command = MetadataCommand::new();
    for name in outer_variables().filter(|name| name != "CARGO") {
        command.env_remove(name);
    }
    command.other_options(["--locked".to_owned()]).exec().context("cargo metadata failed")
}

/// Builds the product as it is shipped: one static file.
pub(crate) fn funtainer() -> Result<PathBuf> {
    executable(&["--release", "--package", "funtainer-cli"], "funtainer")
}

/// Builds a program of the crate `e2e`.
pub(crate) fn program(name: &str) -> Result<PathBuf> {
    executable(&["--package", "funtainer-e2e", "--bin", name], name)
}

/// Builds the product with debug assertions, in the fraction of the time.
pub(crate) fn funtainer_for_debugging() -> Result<PathBuf> {
    executable(&["--package", "funtainer-cli"], "funtainer")
}

/// The built tests of a package.
pub(crate) struct Tests {
    /// Where the package is, which is where cargo runs tests.
    pub(crate) directory: PathBuf,
    /// The main source file of each test program, and the program.
    pub(crate) programs: Vec<(PathBuf, PathBuf)>,
    /// Programs and examples of the package that tests may start.
    pub(crate) helpers: Vec<PathBuf>,
}

/// Builds a package's tests without running them.
pub(crate) fn tests(package: &str) -> Result<Tests> {
    let metadata = metadata()?;
    let found = metadata.workspace_packages().into_iter().find(|found| found.name == package);
    let found = found.with_context(|| format!("there is no package {package}"))?;
    let directory = found.manifest_path.parent().context("a manifest is in a directory")?.to_path_buf().into_std_path_buf();
    let mut tests = Tests { directory, programs: Vec::new(), helpers: Vec::new() };
    build(&["test", "--no-run"], &["--package", package], |artifact| {
        if artifact.package_id == found.id
            && let Some(executable) = artifact.executable
        {
            let executable = executable.into_std_path_buf();
            if artifact.profile.test {
                tests.programs.push((artifact.target.src_path.into_std_path_buf(), executable));
            } else {
                tests.helpers.push(executable);
            }
        }
    })?;
    tests.programs.sort();
    Ok(tests)
}

fn executable(arguments: &[&str], name: &str) -> Result<PathBuf> {
    let mut path = None;
    build(&["build"], arguments, |artifact| {
        if artifact.target.name == name
            && let Some(executable) = artifact.executable
        {
            path = Some(executable.into_std_path_buf());
        }
    })?;
    path.with_context(|| format!("cargo build {} named no executable {name}", arguments.join(" ")))
}

/// Runs a command of cargo's and hands on what it made.
fn build(command: &[&str], arguments: &[&str], mut made: impl FnMut(Artifact)) -> Result<()> {
    let mut cargo = cargo();
    cargo.args(command).args(["--locked", "--message-format=json-render-diagnostics"]).args(arguments);
    let mut child = cargo.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start cargo")?;
    let stdout = child.stdout.take().context("cargo has no standard output")?;
    for message in Message::parse_stream(BufReader::new(stdout)) {
        if let Message::CompilerArtifact(artifact) = message.context("cargo's messages cannot be read")? {
            made(artifact);
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "cargo {} {} failed", command.join(" "), arguments.join(" "));
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_inner_cargo_hears_the_settings_and_nothing_of_this_package() {
        for name in
            ["CARGO", "CARGO_MANIFEST_DIR", "CARGO_MANIFEST_PATH", "CARGO_PKG_NAME", "CARGO_PKG_VERSION_PRE", "CARGO_BIN_NAME"]
        {
            assert!(is_of_the_outer_package(OsStr::new(name)), "{name}");
        }
        for name in [
            "CARGO_HOME",
            "CARGO_TARGET_DIR",
            "CARGO_TARGET_X86_64_UNKNOWN_LINUX_GNU_LINKER",
            "CARGO_TERM_COLOR",
            "CARGO_NET_OFFLINE",
            "CARGO_PROFILE_RELEASE_LTO",
            "CARGO_BUILD_JOBS",
            "CARGO_REGISTRIES_MINE_TOKEN",
            "CARGO_INCREMENTAL",
            "RUSTUP_TOOLCHAIN",
            "PATH",
        ] {
            assert!(!is_of_the_outer_package(OsStr::new(name)), "{name}");
        }
        let removed: Vec<_> =
            cargo().get_envs().filter(|(_, value)| value.is_none()).map(|(name, _)| name.to_owned()).collect();
        assert!(
            removed.iter().any(|name| name == "CARGO_PKG_NAME"),
            "cargo test sets it, the inner cargo must not see it: {removed:?}"
        );
    }
}

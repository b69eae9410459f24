//! Building with cargo, and finding what was built by cargo's own messages.

use std::ffi::{OsStr, OsString};
use std::io::BufReader;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use cargo_metadata::{Message, Metadata, MetadataCommand};

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

fn executable(arguments: &[&str], name: &str) -> Result<PathBuf> {
    let mut command = cargo();
    command.args(["build", "--locked", "--message-format=json-render-diagnostics"]).args(arguments);
    let mut child = command.stdin(Stdio::null()).stdout(Stdio::piped()).spawn().context("cannot start cargo")?;
    let stdout = child.stdout.take().context("cargo has no standard output")?;
    let mut path = None;
    for message in Message::parse_stream(BufReader::new(stdout)) {
        if let Message::CompilerArtifact(artifact) = message.context("cargo's messages cannot be read")?
            && artifact.target.name == name
            && let Some(executable) = artifact.executable
        {
            path = Some(executable.into_std_path_buf());
        }
    }
    let status = child.wait()?;
    ensure!(status.success(), "cargo build {} failed", arguments.join(" "));
    path.with_context(|| format!("cargo build {} named no executable {name}", arguments.join(" ")))
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

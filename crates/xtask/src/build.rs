//! Building with cargo, and finding what was built by cargo's own messages.

use std::io::BufReader;
use std::path::PathBuf;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};
use cargo_metadata::{Message, Metadata, MetadataCommand};

/// The cargo that started us.
pub(crate) fn cargo() -> Command {
    Command::new(std::env::var_os("CARGO").unwrap_or_else(|| "cargo".into()))
}

/// The top of the workspace, its packages and the edges between them.
pub(crate) fn metadata() -> Result<Metadata> {
    MetadataCommand::new().other_options(["--locked".to_owned()]).exec().context("cargo metadata failed")
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

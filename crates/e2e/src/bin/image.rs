//! Writes an example of this repository as an OCI image layout, without any container tool.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use funtainer_e2e::image::catalog;
use funtainer_e2e::{paths, process};

/// Write an example as an OCI image layout directory.
#[derive(Parser)]
#[command(name = "image")]
struct Arguments {
    /// Which one.
    #[arg(value_enum)]
    example: Example,
    /// The directory to write; it must not exist, or hold a former layout.
    #[arg(value_name = "DIR")]
    directory: Option<PathBuf>,
}

#[derive(Clone, Copy, ValueEnum)]
enum Example {
    /// An HTTP server in one static file.
    Hello,
    /// Python's http.server on a Debian root file system (fetched with mmdebstrap).
    Python,
    /// A shell script on busybox, for contract stdio.
    Upper,
    /// The server of the tests, which is no example.
    #[value(hide = true)]
    Probe,
}

fn main() -> ExitCode {
    process::exit_code(write().map(|()| ExitCode::SUCCESS))
}

fn write() -> Result<()> {
    let Arguments { example, directory } = Arguments::parse();
    let (name, image) = match example {
        Example::Hello => ("hello", catalog::hello()?),
        Example::Python => ("python", catalog::python()?),
        Example::Upper => ("upper", catalog::upper()?),
        Example::Probe => ("probe", catalog::probe(&[], &[])?),
    };
    let directory = directory.unwrap_or_else(|| paths::repository().join("target/images").join(name));
    if directory.exists() {
        ensure!(directory.join("oci-layout").exists(), "{} is there and is no image layout", directory.display());
        std::fs::remove_dir_all(&directory)?;
    }
    let parent = directory.parent().context("the directory has a parent")?;
    std::fs::create_dir_all(parent).with_context(|| format!("cannot create {}", parent.display()))?;
    process::succeed(Command::new("cp").arg("--recursive").arg(image.layout()).arg(&directory), Duration::from_mins(1))?;
    let directory = directory.canonicalize()?;
    let here = std::env::current_dir()?;
    println!("{}", directory.strip_prefix(&here).unwrap_or(&directory).display());
    Ok(())
}

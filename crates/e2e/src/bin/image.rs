//! Writes an example of this repository as an OCI image layout, without any container tool.
#![forbid(unsafe_code)]

use std::path::PathBuf;
use std::process::{Command, ExitCode};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use clap::{Parser, ValueEnum};
use funtainer_e2e::image::{catalog, debian, popular, program};
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
    /// nginx of Debian, as the official image has it.
    Nginx,
    /// Apache of Debian.
    Apache,
    /// Redis of Debian, with a volume.
    Redis,
    /// PostgreSQL of Debian, which makes its database at the start, in a volume.
    Postgres,
    /// A server of one class on OpenJDK.
    Jvm,
    /// A server of one script on Node.
    Node,
    /// A command on Python and numpy, for contract stdio.
    Numpy,
    /// Debian's `su`, and a program with a file capability.
    Privileged,
    /// Only the layers of Debian's packages that the last eight share; no image is written.
    Layers,
    /// The server of the tests, which is no example.
    #[value(hide = true)]
    Probe,
    /// The program of OCI runtime-tools alone, where tests look for it; no image is written.
    #[value(hide = true)]
    Runtimetest,
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
        Example::Nginx => ("nginx", popular::nginx()?),
        Example::Apache => ("apache", popular::apache()?),
        Example::Redis => ("redis", popular::redis()?),
        Example::Postgres => ("postgres", popular::postgres()?),
        Example::Jvm => ("jvm", popular::jvm()?),
        Example::Node => ("node", popular::node()?),
        Example::Numpy => ("numpy", popular::numpy()?),
        Example::Privileged => ("privileged", popular::privileged()?),
        Example::Layers => return debian::prepare(),
        Example::Probe => ("probe", catalog::probe(&[], &[])?),
        Example::Runtimetest => return program::runtimetest().map(drop),
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

//! Tells what a machine has more than before: `leakcheck save FILE`, then whatever is to be checked, then `leakcheck compare FILE`.
#![forbid(unsafe_code)]

use std::fs;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Context, Result};
use clap::{Parser, Subcommand};
use funtainer_e2e::leak::{Snapshot, Subject};
use funtainer_e2e::process;

/// Tells what a machine has more than before.
///
/// Processes, mounts, network namespaces, control groups named funtainer-*, loop devices, listening ports, and files that a stopped server should
/// not leave. What is new is printed, one thing a line, and the exit code is 1; else it is 0.
#[derive(Parser)]
#[command(
    name = "leakcheck",
    after_help = "Example:\n  leakcheck save before.json\n  funtainer serve --data /var/tmp/data & ...; kill %1; wait\n  leakcheck compare before.json --data /var/tmp/data"
)]
struct Arguments {
    #[command(subcommand)]
    command: Command,
}

#[derive(Subcommand)]
enum Command {
    /// Write down what the machine has now.
    Save {
        /// Where to write it (JSON).
        file: PathBuf,
    },
    /// Print what is new since then; what is about to go has a second for it.
    Compare {
        /// What `save` wrote.
        file: PathBuf,
        /// Data directory of a server that has stopped; may be repeated.
        #[arg(long, value_name = "DIR")]
        data: Vec<PathBuf>,
        /// Admin socket of a server that has stopped; may be repeated.
        #[arg(long, value_name = "SOCKET")]
        admin: Vec<PathBuf>,
        /// Port on which a server listened; may be repeated.
        #[arg(long = "port", value_name = "PORT")]
        ports: Vec<u16>,
        /// The server was killed: files and control groups may remain until the next start.
        #[arg(long)]
        killed: bool,
    },
}

fn main() -> ExitCode {
    process::exit_code(check())
}

fn check() -> Result<ExitCode> {
    match Arguments::parse().command {
        Command::Save { file } => {
            let snapshot = serde_json::to_vec(&Snapshot::take()?)?;
            fs::write(&file, snapshot).with_context(|| format!("cannot write {}", file.display()))?;
            Ok(ExitCode::SUCCESS)
        }
        Command::Compare { file, data, admin, ports, killed } => {
            let before = fs::read(&file).with_context(|| format!("cannot read {}", file.display()))?;
            let before: Snapshot =
                serde_json::from_slice(&before).with_context(|| format!("{} is no snapshot", file.display()))?;
            let leaks = Subject { scope: None, data, admin, ports, own_network: false, killed }.leaks(&before)?;
            for leak in &leaks {
                println!("{leak}");
            }
            Ok(if leaks.is_empty() { ExitCode::SUCCESS } else { ExitCode::FAILURE })
        }
    }
}

//! The numbers of SPECIFICATION.md: funtainer beside `runc run` and nginx, interleaved in one run, so that a noisy machine is noisy for all.
//!
//! Cold calls, warm throughput, a neighbour's latency and memory are measured one after the other; within each, funtainer and its peer take turns.
#![forbid(unsafe_code)]

mod cold;
mod machine;
mod memory;
mod neighbour;
mod peers;
mod report;
mod warm;

use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::Result;
use clap::Parser;
use funtainer_e2e::leak::Scope;
use funtainer_e2e::paths;
use funtainer_e2e::server::{COMMAND_LIMIT, Places, Server};
use funtainer_e2e::user::{Subordinate, User};

use report::Report;

/// Measure cold and warm calls against `runc run` and nginx, a neighbour beside bombs, and memory.
#[derive(Parser)]
#[command(name = "bench")]
struct Arguments {
    /// Fewer rounds: for a look, not for the papers.
    #[arg(long)]
    quick: bool,
    /// Print the results as JSON instead of a table.
    #[arg(long)]
    json: bool,
}

/// How much is measured.
struct Plan {
    /// Rounds of cold starts; in each, every kind has its turn.
    cold_rounds: usize,
    /// Rounds of warm load.
    warm_rounds: usize,
    /// Length of one warm load.
    warm_seconds: u64,
    /// Calls of the neighbour beside each bomb.
    neighbour_calls: usize,
    /// Idle instances for the memory.
    idle_instances: usize,
    /// How often the memory is measured.
    memory_rounds: usize,
}

impl Plan {
    const FULL: Self = Self {
        cold_rounds: 300,
        warm_rounds: 5,
        warm_seconds: 4,
        neighbour_calls: 2000,
        idle_instances: 100,
        memory_rounds: 3,
    };
    const QUICK: Self =
        Self { cold_rounds: 40, warm_rounds: 2, warm_seconds: 2, neighbour_calls: 500, idle_instances: 50, memory_rounds: 1 };
}

fn main() -> ExitCode {
    funtainer_e2e::process::exit_code(measure().map(|()| ExitCode::SUCCESS))
}

fn measure() -> Result<()> {
    let arguments = Arguments::parse();
    let plan = if arguments.quick { Plan::QUICK } else { Plan::FULL };
    let start = Instant::now();
    let home = paths::scratch("bench")?;
    let scope = Scope::create()?;
    let places =
        Places { data: home.path().join("data"), admin: home.path().join("admin.sock"), log: home.path().join("serve.log") };
    let server = Server::start(&places, "127.0.0.1:0", Some(&scope))?;

    note("cold calls");
    let user = User::create(Subordinate::Usual)?.with_tun()?;
    let rootless = Server::start_as(&user, "127.0.0.1:0", None, &[])?;
    let cold = cold::measure(&server, &rootless, home.path(), &plan)?;
    let status = rootless.stop()?;
    anyhow::ensure!(status.success(), "funtainer serve of an ordinary user ended with {status}");
    note("warm throughput");
    let warm = warm::measure(&server, home.path(), &plan)?;
    note("a neighbour beside bombs");
    let neighbour = neighbour::measure(&server, &plan)?;
    note("memory");
    let memory = memory::measure(&server, &scope, &plan)?;
    let status = server.stop()?;
    anyhow::ensure!(status.success(), "funtainer serve ended with {status}");

    let report =
        Report { machine: machine::describe()?, cold, warm, neighbour, memory, took_seconds: start.elapsed().as_secs() };
    if arguments.json {
        println!("{}", serde_json::to_string_pretty(&report)?);
    } else {
        print!("{report}");
    }
    Ok(())
}

/// Sets the number of instances; returns when those that were ended are reaped.
fn scale(server: &Server, name: &str, instances: usize) -> Result<()> {
    let body = format!(r#"{{"instances":{instances}}}"#);
    server.ask("POST", &format!("/functions/{name}/scale"), body.as_bytes())?.expect(200).map(drop)
}

/// What is being done, for those who wait.
fn note(what: &str) {
    eprintln!("bench: {what}");
}

/// How long anything may take before the run is given up.
const PATIENCE: Duration = COMMAND_LIMIT;

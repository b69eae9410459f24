//! The funtainer executable: the command line, and the two processes of the server.
#![forbid(unsafe_code)]

mod args;
mod client;
mod commands;
mod daemon;
mod failure;
mod places;
mod progress;
mod serve;
mod streams;
mod terminal;
mod unpack;

use std::process::ExitCode;

use clap::Parser;

use args::{Cli, Command};
use failure::OutputClosed;

fn main() -> ExitCode {
    let Cli { host, output, command } = Cli::parse();
    let is_run = matches!(command, Command::Run(_) | Command::Exec(_));
    let result = match command {
        Command::Serve(serve) => serve::serve(serve),
        Command::Reset(reset) => serve::reset(reset),
        Command::Daemon(daemon) => daemon::daemon(&daemon),
        Command::Unpack(unpack) => return unpack::unpack(&unpack),
        Command::Doctor(doctor) => commands::doctor(output, &doctor),
        command => ask(&host.unwrap_or_else(places::server), output, command),
    };
    match result {
        Ok(code) => code,
        Err(error) if error.is::<OutputClosed>() => ExitCode::SUCCESS,
        Err(error) => {
            streams::error_line(&failure::said(&error, output));
            if is_run { commands::exit_of(&error).into() } else { ExitCode::FAILURE }
        }
    }
}

fn ask(host: &args::Host, output: args::Output, command: Command) -> anyhow::Result<ExitCode> {
    let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build()?;
    let result = runtime.block_on(commands::run(host, output, command));
    // A read of standard input that nobody waits for any more must not hold the process.
    runtime.shutdown_background();
    result
}

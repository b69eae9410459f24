//! `serve`: this process becomes the keeper. `reset`: what it left is removed.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::ExitCode;

use funtainer_sandbox::keeper::{self, KeeperSettings, NetworkSettings};
use funtainer_sandbox::mount::Features;

use funtainer_model::Network;

use crate::args::{Reset, Serve};
use crate::places;

/// What a server without a port says when it is ready.
pub(crate) const READY: &str = "listening on the admin socket";

/// Runs the server until it is asked to stop. No thread may be there yet.
pub(crate) fn serve(serve: Serve) -> anyhow::Result<ExitCode> {
    if let Some(parent) = serve.parent {
        // It is asked to stop, as by an operator.
        rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::TERM))?;
        let found = rustix::process::getppid().map(rustix::process::Pid::as_raw_pid);
        anyhow::ensure!(found == Some(parent), "the process that this server is for has ended");
    }
    let settings = KeeperSettings {
        listen: serve.listen.0,
        admin: serve.admin.map_or_else(places::admin, Ok)?,
        data: serve.data.map_or_else(places::data, Ok)?,
        daemon: vec!["funtainer".into(), "daemon".into()],
        unpack: vec!["funtainer".into(), "unpack".into()],
        mounts: Features::NEWEST,
        network: NetworkSettings { on: serve.network == Network::On, range: serve.network_range, resolvers: serve.dns },
        announce,
        log,
    };
    Ok(keeper::run(settings)?.exit_code().into())
}

/// Removes the data directory. No thread may be there yet.
pub(crate) fn reset(reset: Reset) -> anyhow::Result<ExitCode> {
    let data = reset.data.map_or_else(places::data, Ok)?;
    anyhow::ensure!(reset.yes, "{} would be removed with all functions, images and logs: say so with --yes", data.display());
    keeper::remove_data(&data, |_| {})?;
    Ok(ExitCode::SUCCESS)
}

fn announce(address: Option<SocketAddr>) {
    let mut stdout = std::io::stdout().lock();
    let written = match address {
        Some(address) => writeln!(stdout, "listening on http://{address}"),
        None => writeln!(stdout, "{READY}"),
    };
    // Nobody need wait for it.
    let _ = written.and_then(|()| stdout.flush());
}

fn log(line: &str) {
    let _ = writeln!(std::io::stderr(), "keeper: {line}");
}

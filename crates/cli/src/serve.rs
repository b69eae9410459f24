//! `serve`: this process becomes the keeper. `reset`: what it left is removed.

use std::io::Write as _;
use std::net::SocketAddr;
use std::process::ExitCode;

use funtainer_sandbox::keeper::{self, KeeperSettings};
use funtainer_sandbox::mount::Features;

use crate::args::{Reset, Serve};
use crate::places;

/// Runs the server until it is asked to stop. No thread may be there yet.
pub(crate) fn serve(serve: Serve) -> anyhow::Result<ExitCode> {
    let settings = KeeperSettings {
        listen: serve.listen,
        admin: serve.admin.map_or_else(places::admin, Ok)?,
        data: serve.data.map_or_else(places::data, Ok)?,
        daemon: vec!["funtainer".into(), "daemon".into()],
        unpack: vec!["funtainer".into(), "unpack".into()],
        mounts: Features::NEWEST,
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

fn announce(address: SocketAddr) {
    let mut stdout = std::io::stdout().lock();
    // Nobody need wait for it.
    let _ = writeln!(stdout, "listening on http://{address}").and_then(|()| stdout.flush());
}

fn log(line: &str) {
    let _ = writeln!(std::io::stderr(), "keeper: {line}");
}

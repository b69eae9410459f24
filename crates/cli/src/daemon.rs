//! `daemon`: the unprivileged side of the server, started by the keeper.

use std::process::ExitCode;

use crate::args::Daemon;

pub(crate) fn daemon(daemon: &Daemon) -> anyhow::Result<ExitCode> {
    let _inherited = funtainer_sandbox::daemon::take_inherited_fds(daemon.listeners)?;
    Ok(ExitCode::SUCCESS)
}

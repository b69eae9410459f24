//! `daemon`: the unprivileged side of the server, started by the keeper in a root of its own with the data directory at `/data`.
//!
//! ```text
//! descriptors ─ filter ─ log ─ TLS provider ─ backend (Hello) ─ engine (state, adoption) ─ gateway ─ Ready ─┬─► Stop: drain, exit 0
//!                                                                                                 └─► keeper gone: exit 1
//! ```

use std::io::IsTerminal as _;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::Path;
use std::process::ExitCode;
use std::sync::Arc;

use anyhow::Context as _;
use funtainer_backend_local::{LocalBackend, Stop};
use funtainer_engine::{Engine, Settings};
use funtainer_sandbox::daemon::{Inherited, confine, take_inherited_fds};
use tokio::signal::unix::{SignalKind, signal};
use tracing_subscriber::EnvFilter;

use crate::args::Daemon;

/// Where the keeper puts the data directory.
const DATA: &str = "/data";
/// What is logged where nothing is set.
const LOG_DEFAULT: &str = "info";

/// Serves until the keeper says otherwise.
pub(crate) fn daemon(daemon: &Daemon) -> anyhow::Result<ExitCode> {
    let inherited = take_inherited_fds(daemon.listeners)?;
    // Executed by a descriptor, it would be a number in process lists that show no arguments. The name is for people alone.
    let _ = rustix::thread::set_name(c"funtainer");
    confine().context("the filter on system calls cannot be installed")?;
    start_log();
    rustls::crypto::ring::default_provider()
        .install_default()
        .map_err(|_| anyhow::anyhow!("another TLS provider was installed before"))?;
    let runtime = tokio::runtime::Builder::new_multi_thread().enable_all().build().context("the runtime cannot be started")?;
    let code = runtime.block_on(serve(inherited))?;
    // What still runs in the background has nobody to work for.
    runtime.shutdown_background();
    Ok(code)
}

async fn serve(inherited: Inherited) -> anyhow::Result<ExitCode> {
    // Ctrl-C on a terminal goes to the whole group of processes, a service manager's SIGTERM to all of a unit. What they mean is the
    // keeper's to say; registering keeps them from ending this process.
    let _interrupt = signal(SignalKind::interrupt()).context("SIGINT cannot be handled")?;
    let _terminate = signal(SignalKind::terminate()).context("SIGTERM cannot be handled")?;
    let data = Path::new(DATA);
    let backend = Arc::new(LocalBackend::open(inherited.control, data).await.context("the backend cannot be opened")?);
    let settings = Settings { state_dir: data.join("state") };
    let engine = Engine::open(settings, Arc::clone(&backend) as _).await.context("the engine cannot be opened")?;
    let listeners = inherited.tcp.into_iter().map(TcpListener::from).collect();
    let server = funtainer_gateway::serve(Arc::clone(&engine), listeners, UnixListener::from(inherited.admin))
        .context("the gateway cannot be started")?;
    backend.ready().await.context("the keeper cannot be told that calls are accepted")?;
    tracing::info!(data = backend.data_id(), "calls are accepted");
    match backend.stopped().await {
        Stop::Asked(grace) => {
            tracing::info!(grace_ms = grace.as_millis(), "the server stops");
            tokio::join!(server.drain(grace), engine.drain(grace));
            Ok(ExitCode::SUCCESS)
        }
        Stop::KeeperGone => {
            tracing::error!("the keeper is gone, and every instance with it");
            Ok(ExitCode::FAILURE)
        }
    }
}

fn start_log() {
    let filter = ["FUNTAINER_LOG", "RUST_LOG"]
        .into_iter()
        .find_map(|name| std::env::var(name).ok())
        .map_or_else(|| EnvFilter::new(LOG_DEFAULT), EnvFilter::new);
    let ansi = std::io::stderr().is_terminal();
    tracing_subscriber::fmt().with_env_filter(filter).with_writer(std::io::stderr).with_ansi(ansi).init();
}

//! `POST /run`: one command, once, with its standard streams.
//!
//! The request has the headers `Connection: upgrade` and `Upgrade: funtainer-run` and a [`RunRequest`] as its body.
//! The answer is `101 Switching Protocols`, or an error as everywhere. After it, both sides send [`frames`](super::frames).
//! A client that breaks the connection ends the command.

use std::pin::pin;
use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use funtainer_contract::terminal::TerminalSize;
use funtainer_engine::{CommandHandle, Engine};
use funtainer_model::{ErrorCode, Failure, FunctionSpec};
use tokio::io::AsyncWriteExt;
use tokio::sync::mpsc;

use super::Failed;
use super::frames::Frame;
use super::native::{RunRequest, body_json};
use super::session::{Ended, Writer, asks_for, converse, switching};
use crate::server::TunnelSlot;

/// Name of the protocol in `Upgrade`.
pub const PROTOCOL: &str = "funtainer-run";

/// Progress that waits for a slow reader; more is left out.
const PROGRESS_WAITING_MAX: usize = 16;

pub(super) async fn run(
    State(engine): State<Arc<Engine>>,
    Extension(slot): Extension<TunnelSlot>,
    request: Request,
) -> Result<Response, Failed> {
    if !asks_for(PROTOCOL, request.method(), request.headers()) {
        let detail = format!("/run needs the headers 'Connection: upgrade' and 'Upgrade: {PROTOCOL}'");
        return Err(Failure::new(ErrorCode::BadRequest, detail).with_hint("use `funtainer run`").into());
    }
    let request = body_json::<RunRequest>(request.into_body()).await?;
    let (terminal, spec) = (request.terminal, request.spec()?);
    slot.put(Box::new(move |stream| {
        let start = async move |mut writer| {
            let started = start(&engine, spec, terminal, &mut writer).await;
            (writer, started)
        };
        Box::pin(converse(stream, start))
    }));
    Ok(switching(PROTOCOL))
}

async fn start(
    engine: &Engine,
    spec: FunctionSpec,
    terminal: Option<TerminalSize>,
    writer: &mut Writer,
) -> Result<CommandHandle, Ended> {
    let (sink, mut progress) = mpsc::channel(PROGRESS_WAITING_MAX);
    let mut starting = pin!(engine.run(spec, terminal, sink));
    loop {
        tokio::select! {
            biased;
            Some(step) = progress.recv() => writer.write_all(&Frame::Progress(step).encode()).await?,
            started = &mut starting => return started.map_err(|failure| Ended::from(&failure)),
        }
    }
}

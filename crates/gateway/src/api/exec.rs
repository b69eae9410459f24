//! `POST /functions/NAME/exec`: a command in a running instance of a function, with its standard streams.
//!
//! The request has the headers `Connection: upgrade` and `Upgrade: funtainer-exec` and an [`ExecRequest`] as its body.
//! The answer is `101 Switching Protocols`, or an error as everywhere. After it, both sides send [`frames`](super::frames).
//! A client that breaks the connection ends the command.

use std::sync::Arc;

use axum::Extension;
use axum::extract::{Request, State};
use axum::response::Response;
use funtainer_engine::Engine;
use funtainer_model::{ErrorCode, Failure};

use super::Failed;
use super::native::{ExecRequest, Name, body_json};
use super::session::{Ended, asks_for, converse, switching};
use crate::server::TunnelSlot;

/// Name of the protocol in `Upgrade`.
pub const PROTOCOL: &str = "funtainer-exec";

pub(super) async fn exec(
    State(engine): State<Arc<Engine>>,
    Extension(slot): Extension<TunnelSlot>,
    Name(name): Name,
    request: Request,
) -> Result<Response, Failed> {
    if !asks_for(PROTOCOL, request.method(), request.headers()) {
        let detail = format!("exec needs the headers 'Connection: upgrade' and 'Upgrade: {PROTOCOL}'");
        return Err(Failure::new(ErrorCode::BadRequest, detail).with_hint("use `funtainer exec`").into());
    }
    let id = engine.find(&name)?;
    let order = body_json::<ExecRequest>(request.into_body()).await?.order()?;
    slot.put(Box::new(move |stream| {
        let start = async move |writer| {
            let started = engine.exec(&id, order).await;
            (writer, started.map_err(|failure| Ended::from(&failure)))
        };
        Box::pin(converse(stream, start))
    }));
    Ok(switching(PROTOCOL))
}

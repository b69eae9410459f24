//! APIs of the admin socket, one file each.

pub mod exec;
pub mod frames;
pub mod native;
pub mod run;
mod session;

use std::net::SocketAddr;
use std::sync::Arc;

use axum::Router;
use axum::response::IntoResponse;
use funtainer_engine::Engine;
use funtainer_model::{CallId, Failure};
use http::header::ALLOW;
use http::{Request, Response};
use hyper::body::Incoming;
use tower_service::Service;

use crate::body::Body;
use crate::rescue::{Occasion, Reader, Rescue};
use crate::server::Stopping;

/// All APIs. `calls` is where functions are called by TCP.
pub(crate) fn router(engine: Arc<Engine>, calls: Option<SocketAddr>, stopping: Stopping) -> Router {
    native::router(engine, calls, stopping)
}

/// Answers a request to the admin socket that is no call.
pub(crate) async fn answer(router: &Router, id: CallId, request: Request<Incoming>) -> Response<Body> {
    let reader = Reader::of(request.headers(), Reader::Program);
    let Ok(mut response) = router.clone().call(request.map(axum::body::Body::new)).await;
    let Some(Failed(mut rescue)) = response.extensions_mut().remove::<Failed>() else {
        return response.map(Body::own);
    };
    rescue.allow = response.headers().get(ALLOW).cloned();
    rescue.log(id, None);
    rescue.answer(Occasion::Admin, reader, id)
}

/// What a handler failed with. Who reads it decides the form, so it travels as an extension.
#[derive(Debug, Clone)]
struct Failed(Rescue);

impl From<Failure> for Failed {
    fn from(failure: Failure) -> Self {
        Self(failure.into())
    }
}

impl IntoResponse for Failed {
    fn into_response(self) -> axum::response::Response {
        let mut response = axum::response::Response::default();
        response.extensions_mut().insert(self);
        response
    }
}

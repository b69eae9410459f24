//! The native API: HTTP/1.1 with JSON on the admin socket.
//!
//! | request | answer |
//! |---|---|
//! | `GET /version` | [`Version`] |
//! | `GET /functions` | list of [`Function`] |
//! | `POST /functions` with [`DeployRequest`] | [`Function`] |
//! | `GET /functions/NAME` | [`Function`] |
//! | `DELETE /functions/NAME` | nothing, 204 |
//! | `POST /functions/NAME/scale` with [`ScaleRequest`] | [`Function`] |
//! | `GET /functions/NAME/logs?tail=N&follow=true` | text, streamed |
//! | `GET /images` | list of [`Image`] |
//! | `POST /images/pull` with [`PullRequest`] | [`Pulled`] |
//! | `POST /images/import?name=REF` with a tar of an OCI layout | [`Imported`] |
//! | `POST /functions/NAME/exec` with [`ExecRequest`], upgraded | see [`exec`](super::exec) |
//! | `POST /run` with [`RunRequest`], upgraded | see [`run`](super::run) |
//!
//! NAME is a slug or a canonical name, percent-encoded. Deploy, pull and import answer with a stream of [`Event`]s, one JSON a line,
//! where `Accept` says `application/x-ndjson`; its status is 200 whatever comes. Errors are [`Problem`]s. A client that goes away
//! ends what it asked for.

mod types;

use std::future::Future;
use std::io;
use std::net::{Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;

use axum::body::Body;
use axum::extract::{FromRequestParts, Path, Query, Request, State};
use axum::response::{IntoResponse, Response};
use axum::routing::{get, post};
use axum::{Extension, Router};
use bytes::{BufMut, Bytes, BytesMut};
use funtainer_engine::Engine;
use funtainer_engine::backend::{Progress, ProgressSink};
use funtainer_model::{ErrorCode, Failure};
use futures_util::stream::{self, StreamExt};
use http::header::{ACCEPT, CONTENT_TYPE, HeaderValue};
use http::request::Parts;
use http::{Method, StatusCode, Uri};
use http_body_util::{BodyExt, LengthLimitError, Limited};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::sync::mpsc;

use super::Failed;
use crate::rescue::{Occasion, Problem};
use crate::route::shown;
use crate::server::Stopping;
use types::image_ref;

pub use types::{
    API_VERSION, ContainerSettings, DeployRequest, Event, ExecRequest, Function, FunctionSettings, Image, ImportQuery,
    Imported, Instance, LogsQuery, PullRequest, Pulled, RunRequest, ScaleRequest, Version,
};

/// Media type of a stream of [`Event`]s.
pub const NDJSON: &str = "application/x-ndjson";

/// Most bytes of a JSON body: over ten times the most that settings can have.
const JSON_BYTES_MAX: usize = 1024 * 1024;
/// Lines of a log where the request does not say how many.
const LOG_LINES_DEFAULT: usize = 1000;
/// Progress that waits for a slow reader; more is left out.
const PROGRESS_WAITING_MAX: usize = 64;
/// Chunks of an archive between the connection and the store.
const ARCHIVE_CHUNKS_WAITING_MAX: usize = 4;

type Answer = Result<Response, Failed>;
type Context = State<Arc<Engine>>;

/// What `GET /version` says of the place where functions are called.
#[derive(Debug, Clone)]
struct CallsUrl(Option<String>);

pub(super) fn router(engine: Arc<Engine>, calls: Option<SocketAddr>, stopping: Stopping) -> Router {
    Router::new()
        .route("/version", get(version))
        .route("/functions", get(list).post(deploy))
        .route("/functions/{name}", get(describe).delete(remove))
        .route("/functions/{name}/scale", post(scale))
        .route("/functions/{name}/logs", get(logs))
        .route("/functions/{name}/exec", post(super::exec::exec))
        .route("/images", get(images))
        .route("/images/pull", post(pull))
        .route("/images/import", post(import))
        .route("/run", post(super::run::run))
        .fallback(unknown_path)
        .method_not_allowed_fallback(method_not_allowed)
        .layer(Extension(CallsUrl(calls.map(|address| format!("http://{}", reachable(address))))))
        .layer(Extension(stopping))
        .with_state(engine)
}

async fn version(Extension(CallsUrl(url)): Extension<CallsUrl>) -> Answer {
    Ok(json(&Version { version: env!("CARGO_PKG_VERSION").to_owned(), api: API_VERSION, pid: std::process::id(), url }))
}

async fn list(State(engine): Context) -> Answer {
    let functions: Vec<_> = engine.list().into_iter().map(Function::from).collect();
    Ok(json(&functions))
}

async fn deploy(State(engine): Context, request: Request) -> Answer {
    let (form, body) = Form::of(request);
    let spec = body_json::<DeployRequest>(body).await?.spec()?;
    form.answer(move |progress| async move { engine.deploy(spec, progress).await.map(Function::from) }).await
}

async fn describe(State(engine): Context, Name(name): Name) -> Answer {
    let id = engine.find(&name)?;
    Ok(json(&Function::from(engine.describe(&id)?)))
}

async fn remove(State(engine): Context, Name(name): Name) -> Answer {
    let id = engine.find(&name)?;
    engine.remove(&id).await?;
    Ok(StatusCode::NO_CONTENT.into_response())
}

async fn scale(State(engine): Context, Name(name): Name, request: Request) -> Answer {
    let id = engine.find(&name)?;
    let ScaleRequest { instances } = body_json(request.into_body()).await?;
    Ok(json(&Function::from(engine.scale(&id, instances).await?)))
}

async fn logs(State(engine): Context, Extension(stopping): Extension<Stopping>, Name(name): Name, uri: Uri) -> Answer {
    let id = engine.find(&name)?;
    let LogsQuery { tail, follow } = query(&uri)?;
    let lines = engine.logs(&id, tail.unwrap_or(LOG_LINES_DEFAULT), follow).await?;
    // Whoever follows would hold the gateway's end up for ever.
    let lines = stream::unfold((lines, stopping), |(mut lines, mut stopping)| async {
        let bytes = tokio::select! {
            biased;
            bytes = lines.recv() => bytes?,
            () = stopping.begun() => return None,
        };
        Some((Ok::<_, io::Error>(bytes), (lines, stopping)))
    });
    let mut response = Response::new(Body::from_stream(lines));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    Ok(response)
}

async fn images(State(engine): Context) -> Answer {
    let images: Vec<_> = engine.images().await?.into_iter().map(Image::from).collect();
    Ok(json(&images))
}

async fn pull(State(engine): Context, request: Request) -> Answer {
    let (form, body) = Form::of(request);
    let image = image_ref(&body_json::<PullRequest>(body).await?.image)?;
    let pull = move |progress| async move {
        let pulled = engine.pull(&image, progress).await?;
        Ok(Pulled { image: pulled.reference, digest: pulled.digest })
    };
    form.answer(pull).await
}

async fn import(State(engine): Context, request: Request) -> Answer {
    let ImportQuery { name } = query(request.uri())?;
    let name = name.as_deref().map(image_ref).transpose()?;
    let (form, body) = Form::of(request);
    let import = move |progress| async move {
        let (chunks, archive) = mpsc::channel(ARCHIVE_CHUNKS_WAITING_MAX);
        let mut chunks_sent = std::pin::pin!(send_chunks(body, chunks));
        let mut import = std::pin::pin!(engine.import(archive, name.as_ref(), progress));
        let images = tokio::select! {
            images = &mut import => images?,
            () = &mut chunks_sent => import.await?,
        };
        Ok(Imported { images: images.into_iter().map(Image::from).collect() })
    };
    form.answer(import).await
}

/// An address to connect to for a listener that is on all of them.
fn reachable(mut address: SocketAddr) -> SocketAddr {
    if address.ip().is_unspecified() {
        address.set_ip(if address.is_ipv4() { Ipv4Addr::LOCALHOST.into() } else { Ipv6Addr::LOCALHOST.into() });
    }
    address
}

async fn unknown_path(uri: Uri) -> Answer {
    let detail = format!("there is nothing at {}", shown(uri.path()));
    Err(Failure::new(ErrorCode::UnknownPath, detail).with_hint("docs/api.md lists the paths of the admin API").into())
}

async fn method_not_allowed(method: Method, uri: Uri) -> Answer {
    let detail = format!("{} does not take {}", shown(uri.path()), shown(method.as_str()));
    Err(Failure::new(ErrorCode::MethodNotAllowed, detail).into())
}

/// The function's name in the path, decoded.
pub(super) struct Name(pub(super) String);

impl<S: Send + Sync> FromRequestParts<S> for Name {
    type Rejection = Failed;

    async fn from_request_parts(parts: &mut Parts, state: &S) -> Result<Self, Failed> {
        let Path(name) = Path::from_request_parts(parts, state).await.map_err(|error| {
            let detail = format!("the name in {} is not percent-encoded UTF-8", shown(parts.uri.path()));
            tracing::debug!(%error, "{detail}");
            Failed::from(Failure::new(ErrorCode::BadRequest, detail))
        })?;
        Ok(Self(name))
    }
}

/// Sends the body on until it ends or nobody takes it any more.
async fn send_chunks(body: Body, chunks: mpsc::Sender<io::Result<Bytes>>) {
    let mut body = body.into_data_stream();
    while let Some(chunk) = body.next().await {
        let broken = chunk.is_err();
        if chunks.send(chunk.map_err(io::Error::other)).await.is_err() || broken {
            return;
        }
    }
}

/// How the answer to long work is given.
#[derive(Debug, Clone, Copy)]
enum Form {
    /// When it is done.
    Whole,
    /// As it goes on.
    Events,
}

impl Form {
    fn of(request: Request) -> (Self, Body) {
        let (parts, body) = request.into_parts();
        let events = parts.headers.get_all(ACCEPT).iter().any(|accept| accept.as_bytes().starts_with(NDJSON.as_bytes()));
        (if events { Self::Events } else { Self::Whole }, body)
    }

    async fn answer<T, F>(self, work: impl FnOnce(ProgressSink) -> F + Send + 'static) -> Answer
    where
        T: Serialize + Send + 'static,
        F: Future<Output = Result<T, Failure>> + Send + 'static,
    {
        let (sink, progress) = mpsc::channel(PROGRESS_WAITING_MAX);
        let work = work(sink);
        match self {
            Self::Whole => {
                drop(progress);
                Ok(json(&work.await?))
            }
            Self::Events => {
                let lines = stream::unfold(Some((Box::pin(work), progress)), next_event);
                let mut response = Response::new(Body::from_stream(lines.map(Ok::<_, io::Error>)));
                response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static(NDJSON));
                Ok(response)
            }
        }
    }
}

type Work<F> = Option<(std::pin::Pin<Box<F>>, mpsc::Receiver<Progress>)>;

/// The next line, and what remains.
async fn next_event<T, F>(work: Work<F>) -> Option<(Bytes, Work<F>)>
where
    T: Serialize,
    F: Future<Output = Result<T, Failure>>,
{
    let (mut work, mut progress) = work?;
    let result = tokio::select! {
        biased;
        Some(step) = progress.recv() => return Some((line(&Event::<()>::Progress(step)), Some((work, progress)))),
        result = &mut work => result,
    };
    let last = match result {
        Ok(done) => line(&Event::Done(done)),
        Err(failure) => line(&Event::<()>::Error(Problem::new(&failure, Occasion::Admin, None))),
    };
    Some((last, None))
}

fn line(event: &impl Serialize) -> Bytes {
    let mut line = BytesMut::new().writer();
    serde_json::to_writer(&mut line, event).expect("own shapes are always JSON");
    let mut line = line.into_inner();
    line.put_u8(b'\n');
    line.freeze()
}

fn json(value: &impl Serialize) -> Response {
    let mut response = Response::new(Body::from(line(value)));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("application/json"));
    response
}

/// The body as JSON; an error names the path to what is wrong.
pub(super) async fn body_json<T: DeserializeOwned>(body: Body) -> Result<T, Failure> {
    let bytes = match Limited::new(body, JSON_BYTES_MAX).collect().await {
        Ok(body) => body.to_bytes(),
        Err(error) if error.is::<LengthLimitError>() => {
            let detail = format!("the request's JSON has more than {JSON_BYTES_MAX} bytes");
            return Err(Failure::new(ErrorCode::BodyTooLarge, detail));
        }
        Err(error) => return Err(Failure::new(ErrorCode::BadRequest, format!("the request's body broke off: {error}"))),
    };
    let mut json = serde_json::Deserializer::from_slice(&bytes);
    let value = serde_path_to_error::deserialize(&mut json).map_err(|error| {
        let path = error.path().to_string();
        let at = if path == "." { String::new() } else { format!(" at '{path}'") };
        bad_json(&format!("{at}: {}", error.into_inner()))
    })?;
    json.end().map_err(|error| bad_json(&format!(": {error}")))?;
    Ok(value)
}

fn bad_json(what: &str) -> Failure {
    Failure::new(ErrorCode::BadRequest, format!("the request's JSON is not as expected{what}"))
        .with_hint("docs/api.md shows the JSON of each request")
}

fn query<T: DeserializeOwned>(uri: &Uri) -> Result<T, Failure> {
    let Query(query) = Query::try_from_uri(uri).map_err(|error| {
        let detail = format!("the query of {} is not as expected: {}", shown(uri.path()), error.body_text());
        Failure::new(ErrorCode::BadRequest, detail).with_hint("docs/api.md shows the parameters of each path")
    })?;
    Ok(query)
}

//! The client's side of the admin API: one connection to the Unix socket for each command.

use std::fmt::Write as _;
use std::io;

use anyhow::Context as _;
use bytes::{Bytes, BytesMut};
use funtainer_gateway::Problem;
use funtainer_gateway::api::native::{Event, NDJSON};
use funtainer_gateway::{ERROR_CODE, PROBLEM_JSON};
use http::header::{ACCEPT, CONTENT_TYPE, HOST, HeaderValue};
use http::{Method, Request, Response};
use http_body_util::combinators::UnsyncBoxBody;
use http_body_util::{BodyExt, Full, Limited};
use hyper::body::Incoming;
use hyper::client::conn::http1;
use hyper_util::rt::TokioIo;
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::net::UnixStream;

use crate::args::Host;
use crate::failure::{Failed, NotRunning};
use crate::progress::Show;

/// Most bytes of an answer that is read whole: a list of all functions fits many times.
const ANSWER_BYTES_MAX: usize = 64 * 1024 * 1024;
/// Longest line of a stream of events.
const EVENT_BYTES_MAX: usize = 16 * 1024 * 1024;

/// A body to send.
pub(crate) type Body = UnsyncBoxBody<Bytes, io::Error>;

/// Nothing.
pub(crate) fn empty() -> Body {
    full(Bytes::new())
}

/// All of it.
pub(crate) fn full(bytes: impl Into<Bytes>) -> Body {
    Full::new(bytes.into()).map_err(|never| match never {}).boxed_unsync()
}

/// Whether a server answers at all: why not, if there is none.
pub(crate) async fn answers(host: &Host) -> anyhow::Result<Option<NotRunning>> {
    match UnixStream::connect(host.socket()).await.map_err(|error| NotRunning::new(host, error)) {
        Ok(_) => Ok(None),
        Err(unanswered) if unanswered.is_absence() => Ok(Some(unanswered)),
        Err(unanswered) => Err(unanswered.into()),
    }
}

/// Sends a request and returns the head of its answer; the body follows. Any status is a success.
pub(crate) async fn send(host: &Host, mut request: Request<Body>) -> anyhow::Result<Response<Incoming>> {
    let stream = UnixStream::connect(host.socket()).await.map_err(|error| NotRunning::new(host, error))?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await.context("the server does not speak HTTP")?;
    // Ends with its last request, or with this process.
    tokio::spawn(connection.with_upgrades());
    request.headers_mut().insert(HOST, HeaderValue::from_static("funtainer"));
    sender.send_request(request).await.context("the server broke the connection off")
}

/// A request without body, or with a JSON one, answered by JSON.
pub(crate) async fn json<T: DeserializeOwned>(
    host: &Host,
    method: Method,
    path: &str,
    body: Option<&impl Serialize>,
) -> anyhow::Result<T> {
    let answer = checked(send(host, request(method, path, body)?).await?).await?;
    let bytes = whole(answer).await?;
    serde_json::from_slice(&bytes).context("the server answered with JSON of another version")
}

/// The same, for an answer without content.
pub(crate) async fn done(host: &Host, method: Method, path: &str) -> anyhow::Result<()> {
    checked(send(host, request(method, path, None::<&()>)?).await?).await?;
    Ok(())
}

/// A request whose progress is shown while it goes on.
pub(crate) async fn events<T: DeserializeOwned>(host: &Host, mut request: Request<Body>, show: &mut Show) -> anyhow::Result<T> {
    request.headers_mut().insert(ACCEPT, HeaderValue::from_static(NDJSON));
    let mut answer = checked(send(host, request).await?).await?.into_body();
    let mut buffer = BytesMut::new();
    while let Some(frame) = answer.frame().await {
        let Ok(bytes) = frame.context("the server broke the connection off")?.into_data() else { continue };
        buffer.extend_from_slice(&bytes);
        while let Some(end) = buffer.iter().position(|byte| *byte == b'\n') {
            let line = buffer.split_to(end + 1);
            match serde_json::from_slice(&line).context("the server answered with JSON of another version")? {
                Event::Progress(step) => show.step(&step),
                Event::Done(done) => {
                    show.end();
                    return Ok(done);
                }
                Event::Error(problem) => {
                    show.end();
                    return Err(Failed(problem).into());
                }
            }
        }
        anyhow::ensure!(
            buffer.len() <= EVENT_BYTES_MAX,
            "the server answered with a line of more than {EVENT_BYTES_MAX} bytes"
        );
    }
    anyhow::bail!("the server broke the connection off before it was done")
}

/// The request for a path of the native API.
pub(crate) fn request(method: Method, path: &str, body: Option<&impl Serialize>) -> anyhow::Result<Request<Body>> {
    let builder = Request::builder().method(method).uri(path);
    Ok(match body {
        Some(value) => builder.header(CONTENT_TYPE, "application/json").body(full(serde_json::to_vec(value)?))?,
        None => builder.body(empty())?,
    })
}

/// The answer, unless the platform reports a failure.
pub(crate) async fn checked(answer: Response<Incoming>) -> anyhow::Result<Response<Incoming>> {
    if answer.headers().contains_key(ERROR_CODE) {
        return Err(failure(answer).await);
    }
    anyhow::ensure!(answer.status().as_u16() < 400, "the server answered with status {}", answer.status());
    Ok(answer)
}

/// The failure that the platform reports with this answer.
pub(crate) async fn failure(answer: Response<Incoming>) -> anyhow::Error {
    let is_problem = answer.headers().get(CONTENT_TYPE).is_some_and(|media_type| media_type == PROBLEM_JSON);
    match whole(answer).await {
        Err(error) => error,
        Ok(body) => match serde_json::from_slice::<Problem>(&body) {
            Ok(problem) if is_problem => Failed(problem).into(),
            // Asked for as text, or of another version.
            _ => anyhow::anyhow!("{}", String::from_utf8_lossy(&body).trim().trim_start_matches("error: ").to_owned()),
        },
    }
}

async fn whole(answer: Response<Incoming>) -> anyhow::Result<Bytes> {
    match Limited::new(answer.into_body(), ANSWER_BYTES_MAX).collect().await {
        Ok(body) => Ok(body.to_bytes()),
        Err(error) => Err(anyhow::anyhow!(error).context("the server's answer broke off")),
    }
}

/// One segment of a path, RFC 3986 section 3.3: what is not unreserved is percent-encoded.
pub(crate) fn segment(text: &str) -> String {
    text.bytes().fold(String::new(), |mut encoded, byte| {
        if byte.is_ascii_alphanumeric() || matches!(byte, b'-' | b'.' | b'_' | b'~') {
            encoded.push(char::from(byte));
        } else {
            let _ = write!(encoded, "%{byte:02X}");
        }
        encoded
    })
}

#[cfg(test)]
mod tests {
    use super::segment;

    #[test]
    fn segments_hide_what_would_end_them() {
        assert_eq!(segment("a b@c/d?é"), "a%20b%40c%2Fd%3F%C3%A9");
        assert_eq!(segment("hello-1_x.y~"), "hello-1_x.y~");
    }
}

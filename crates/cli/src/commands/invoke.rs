//! `invoke`: a call through the admin socket.

use std::fmt::Write as _;
use std::io::{self, IsTerminal};
use std::process::ExitCode;

use anyhow::Context as _;
use funtainer_gateway::ERROR_CODE;
use futures_util::stream;
use http::header::{HeaderMap, HeaderName, HeaderValue, TE};
use http::{Method, Request, Response};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::{Frame, Incoming};
use rustix::fs::FileType;
use tokio::io::{AsyncRead, AsyncReadExt};

use crate::args::{Host, Invoke, Output};
use crate::client::{self, Body};
use crate::streams;

/// Bytes of a body read and sent at once.
const CHUNK_BYTES: usize = 64 * 1024;

pub(super) async fn invoke(host: &Host, form: Output, invoke: Invoke) -> anyhow::Result<ExitCode> {
    let body = body(invoke.data.as_deref()).await?;
    let method = match invoke.method {
        Some(name) => Method::from_bytes(name.as_bytes()).with_context(|| format!("'{name}' is no method"))?,
        None if body.is_some() => Method::POST,
        None => Method::GET,
    };
    let rest = if invoke.path.starts_with(['/', '?']) { invoke.path } else { format!("/{}", invoke.path) };
    let uri = format!("/function/{}{rest}", client::segment(&invoke.name));
    let mut request = Request::builder()
        .method(method)
        .uri(&uri)
        .body(body.unwrap_or_else(client::empty))
        .with_context(|| format!("'{rest}' is no path"))?;
    *request.headers_mut() = headers(&invoke.header)?;
    // The exit code of a command comes behind its output.
    request.headers_mut().insert(TE, HeaderValue::from_static("trailers"));
    let answer = client::send(host, request).await?;
    if answer.headers().contains_key(ERROR_CODE) {
        return Err(client::failure(answer).await);
    }
    if invoke.include {
        streams::line(&head(&answer))?;
    }
    let status = answer.status();
    write_body(answer.into_body()).await?;
    if status.as_u16() < 400 {
        return Ok(ExitCode::SUCCESS);
    }
    let text = format!("the function answered with status {status}");
    streams::error_line(&crate::failure::said(&anyhow::anyhow!(text), form));
    Ok(ExitCode::FAILURE)
}

async fn write_body(mut body: Incoming) -> anyhow::Result<()> {
    let mut stdout = streams::stdout()?;
    while let Some(frame) = body.frame().await {
        let frame = frame.context("the function broke off within its answer (see `funtainer logs`)")?;
        if let Ok(bytes) = frame.into_data() {
            streams::bytes(&mut stdout, &bytes).await?;
        }
    }
    Ok(())
}

/// What is sent; `None` where nothing is.
async fn body(data: Option<&str>) -> anyhow::Result<Option<Body>> {
    match data {
        Some("-" | "@-") => Ok(Some(stream(streams::stdin()?))),
        Some(data) => match data.strip_prefix('@') {
            Some(path) => {
                let opened = async {
                    let file = tokio::fs::File::open(path).await?;
                    // It could be opened, and not be read.
                    let directory = file.metadata().await?.is_dir();
                    if directory { io::Result::Err(io::ErrorKind::IsADirectory.into()) } else { Ok(file) }
                };
                let file = opened.await.with_context(|| format!("{path} cannot be read"))?;
                Ok(Some(stream(file)))
            }
            None => Ok(Some(client::full(data.to_owned()))),
        },
        None if stdin_has_data() => Ok(Some(stream(streams::stdin()?))),
        None => Ok(None),
    }
}

/// Whether somebody gave an input: a terminal and /dev/null are none, and a closed one is not either.
fn stdin_has_data() -> bool {
    let kind = rustix::fs::fstat(io::stdin()).map(|stat| FileType::from_raw_mode(stat.st_mode));
    !io::stdin().is_terminal() && matches!(kind, Ok(FileType::Fifo | FileType::RegularFile | FileType::Socket))
}

fn stream(source: impl AsyncRead + Send + Unpin + 'static) -> Body {
    let frames = stream::unfold(source, |mut source| async {
        let mut chunk = bytes::BytesMut::with_capacity(CHUNK_BYTES);
        match source.read_buf(&mut chunk).await {
            Ok(0) => None,
            Ok(_) => Some((Ok(Frame::data(chunk.freeze())), source)),
            Err(error) => Some((Err(error), source)),
        }
    });
    BodyExt::boxed_unsync(StreamBody::new(frames))
}

fn headers(lines: &[String]) -> anyhow::Result<HeaderMap> {
    let mut headers = HeaderMap::new();
    for line in lines {
        let parsed = line.split_once(':').and_then(|(name, value)| {
            Some((HeaderName::from_bytes(name.trim().as_bytes()).ok()?, HeaderValue::from_str(value.trim()).ok()?))
        });
        let (name, value) = parsed.with_context(|| format!("'{line}' is no header: write 'Name: value'"))?;
        headers.append(name, value);
    }
    Ok(headers)
}

fn head(answer: &Response<Incoming>) -> String {
    let mut text = format!("{:?} {}\n", answer.version(), answer.status());
    for (name, value) in answer.headers() {
        let _ = writeln!(text, "{name}: {}", String::from_utf8_lossy(value.as_bytes()));
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn headers_as_curl_has_them() {
        let headers = headers(&["A: b".into(), "x-y:z: 1".into()]).unwrap();
        assert_eq!((headers["a"].to_str().unwrap(), headers["x-y"].to_str().unwrap()), ("b", "z: 1"));
        assert!(super::headers(&["nothing".into()]).is_err());
        assert!(super::headers(&["a b: c".into()]).is_err());
    }

    #[tokio::test]
    async fn data_is_text_or_a_file() {
        let whole = |body: Option<Body>| async { body.unwrap().collect().await.unwrap().to_bytes() };
        assert_eq!(whole(body(Some("x=1")).await.unwrap()).await, "x=1");
        let file = tempfile::NamedTempFile::new().unwrap();
        std::fs::write(file.path(), "content").unwrap();
        assert_eq!(whole(body(Some(&format!("@{}", file.path().display()))).await.unwrap()).await, "content");
        assert!(body(Some("@/nowhere/at/all")).await.is_err());
        let directory = body(Some("@/")).await.map(drop).unwrap_err();
        assert_eq!(format!("{directory:#}"), "/ cannot be read: is a directory");
    }
}

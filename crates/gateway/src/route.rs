//! From a request to who answers it, and the heads on their way through.
//!
//! `ANY /function/NAME[/rest][?query]` calls a function: the prefix is stripped, what concerned the caller's connection is left
//! out, and `X-Forwarded-For`, `-Proto`, `-Host` and `X-Call-Id` are set. `/healthz` says that calls are taken. On the admin
//! socket everything else is the admin API's ([`crate::api`]).

use std::borrow::Cow;
use std::net::IpAddr;
use std::sync::Arc;

use funtainer_contract::{Call, CallBody};
use funtainer_engine::{Cold, Engine, Invoked};
use funtainer_model::{CallId, ErrorCode, Failure};
use http::header::{
    CONNECTION, CONTENT_LENGTH, CONTENT_TYPE, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE,
};
use http::uri::PathAndQuery;
use http::{Method, Request, Response, Uri, Version};
use hyper::body::{Body as _, Incoming};

use crate::api;
use crate::body::Body;
use crate::rescue::{CALL_ID, ERROR_CODE, Occasion, Reader, Rescue, call_id_value};
use crate::server::WireState;

/// Functions are called below this path.
const FUNCTION_PREFIX: &str = "/function/";
/// Most bytes of the addresses that former proxies left in `X-Forwarded-For`; a longer list is replaced.
const FORWARDED_FOR_BYTES_MAX: usize = 1024;

const FORWARDED_FOR: HeaderName = HeaderName::from_static("x-forwarded-for");
const FORWARDED_PROTO: HeaderName = HeaderName::from_static("x-forwarded-proto");
const FORWARDED_HOST: HeaderName = HeaderName::from_static("x-forwarded-host");
const SERVER_TIMING: HeaderName = HeaderName::from_static("server-timing");

/// By which door a connection came.
#[derive(Debug, Clone)]
pub(crate) enum Door {
    /// A TCP listener, from this address.
    Calls(HeaderValue),
    /// The admin socket.
    Admin,
}

/// What every connection needs.
pub(crate) struct Gateway {
    pub(crate) engine: Arc<Engine>,
    pub(crate) api: axum::Router,
}

impl Door {
    /// The door of a TCP connection from `peer`.
    pub(crate) fn calls(peer: IpAddr) -> Self {
        // A v4 caller of a v6 listener is written as v4.
        Self::Calls(HeaderValue::from_str(&peer.to_canonical().to_string()).expect("addresses are digits, dots and colons"))
    }

    fn occasion(&self) -> Occasion {
        match self {
            Self::Calls(_) => Occasion::Call,
            Self::Admin => Occasion::Admin,
        }
    }

    fn reader(&self, headers: &HeaderMap) -> Reader {
        Reader::of(headers, if matches!(self, Self::Admin) { Reader::Program } else { Reader::Person })
    }
}

/// Answers one request. Never fails: what goes wrong is an answer.
pub(crate) async fn answer(
    gateway: &Gateway,
    door: &Door,
    wire: &Arc<WireState>,
    request: Request<Incoming>,
) -> Response<Body> {
    let id = crate::call_id::new();
    let reader = door.reader(request.headers());
    let framing = Framing::of(&request, wire);
    let busy = wire.busy();
    let ends_here = !matches!(framing, Framing::Certain);
    let result = match framing {
        Framing::Refused(failure) => Err((Rescue::from(failure), Occasion::Call)),
        Framing::Certain | Framing::Uncertain => dispatch(gateway, door, id, request).await,
    };
    let mut response = result.unwrap_or_else(|(rescue, occasion)| rescue.answer(occasion, reader, id));
    let headers = response.headers_mut();
    headers.insert(CALL_ID, call_id_value(id));
    if ends_here {
        headers.insert(CONNECTION, HeaderValue::from_static("close"));
    }
    response.map(|body| body.while_busy(busy))
}

async fn dispatch(
    gateway: &Gateway,
    door: &Door,
    id: CallId,
    request: Request<Incoming>,
) -> Result<Response<Body>, (Rescue, Occasion)> {
    // Shares its bytes with the request's.
    let uri = request.uri().clone();
    let path = uri.path();
    if let Some(rest) = path.strip_prefix(FUNCTION_PREFIX) {
        let name_end = rest.find('/').unwrap_or(rest.len());
        if name_end > 0 {
            let name = percent_decoded(&rest[..name_end]).map_err(|failure| (failure.into(), Occasion::Call))?;
            return call(gateway, door, id, &name, FUNCTION_PREFIX.len() + name_end, request)
                .await
                .map_err(|rescue| (rescue, Occasion::Call));
        }
    }
    if path == "/healthz" {
        return healthz(request.method()).map_err(|rescue| (rescue, Occasion::Call));
    }
    match door {
        Door::Admin => Ok(api::answer(&gateway.api, id, request).await),
        Door::Calls(_) => {
            let failure = Failure::new(ErrorCode::UnknownPath, format!("there is nothing at {}", shown(path)));
            let hint = "functions are called at /function/NAME; all else is served on the admin socket only";
            Err((failure.with_hint(hint).into(), door.occasion()))
        }
    }
}

async fn call(
    gateway: &Gateway,
    door: &Door,
    id: CallId,
    name: &str,
    prefix_bytes: usize,
    request: Request<Incoming>,
) -> Result<Response<Body>, Rescue> {
    let (mut parts, body) = request.into_parts();
    refuse_upgrade(&parts.headers)?;
    let original_host = parts.uri.authority().and_then(|authority| HeaderValue::from_str(authority.as_str()).ok());
    parts.uri = without_prefix(&parts.uri, prefix_bytes);
    rewrite_head(&mut parts.headers, door, original_host, id);
    let body = if body.is_end_stream() { CallBody::Empty } else { CallBody::Incoming(body) };
    let call = Call { id, request: Request::from_parts(parts, body) };
    match gateway.engine.invoke(name, call).await {
        Ok(Invoked { answer, cold, deadline }) => {
            let mut response = answer.response;
            let headers = response.headers_mut();
            headers.remove(ERROR_CODE);
            if let Some(cold) = cold {
                headers.append(SERVER_TIMING, server_timing(&cold));
            }
            Ok(response.map(|body| Body::function(id, body, deadline)))
        }
        Err(error) => {
            let rescue = Rescue::from(&error);
            rescue.log(id, Some(&error));
            Err(rescue)
        }
    }
}

fn healthz(method: &Method) -> Result<Response<Body>, Rescue> {
    if *method != Method::GET && *method != Method::HEAD {
        let failure = Failure::new(ErrorCode::MethodNotAllowed, format!("/healthz does not take {}", shown(method.as_str())));
        return Err(Rescue { allow: Some(HeaderValue::from_static("GET,HEAD")), ..failure.into() });
    }
    let mut response = Response::new(Body::full("ok\n"));
    response.headers_mut().insert(CONTENT_TYPE, HeaderValue::from_static("text/plain; charset=utf-8"));
    Ok(response)
}

/// What is known about where the request ends.
enum Framing {
    /// All is clear.
    Certain,
    /// `Transfer-Encoding`, and the head's bytes were not seen whole: the connection ends with the answer, so that nothing behind the
    /// request is taken for another one.
    Uncertain,
    /// It must not be served.
    Refused(Failure),
}

impl Framing {
    fn of(request: &Request<Incoming>, wire: &WireState) -> Self {
        let headers = request.headers();
        let refused = |detail: &str, hint: &str| Self::Refused(Failure::new(ErrorCode::BadRequest, detail).with_hint(hint));
        let hosts = headers.get_all(HOST).iter().count();
        if hosts > 1 || (hosts == 0 && request.version() == Version::HTTP_11) {
            // RFC 9112 section 3.2.
            return refused("an HTTP/1.1 request has exactly one header Host", "send one Host");
        }
        if !headers.contains_key(TRANSFER_ENCODING) {
            return Self::Certain;
        }
        // RFC 9112 section 6.3: an attempt to make two parties see different requests.
        if wire.head_has(CONTENT_LENGTH.as_str().as_bytes()) {
            return refused(
                "the request has both Content-Length and Transfer-Encoding",
                "send Content-Length for a body of known length, and Transfer-Encoding: chunked for others",
            );
        }
        if wire.head_starts_with(request.method().as_str()) { Self::Certain } else { Self::Uncertain }
    }
}

/// Whoever asks for h2c is content with HTTP/1.1 (RFC 9113 section 3.1); whoever asks for WebSocket is not.
fn refuse_upgrade(headers: &HeaderMap) -> Result<(), Rescue> {
    let Some(protocol) = headers.get(UPGRADE) else { return Ok(()) };
    if protocol.as_bytes().eq_ignore_ascii_case(b"h2c") {
        return Ok(());
    }
    let detail = format!("the connection cannot be upgraded to {}", shown(&String::from_utf8_lossy(protocol.as_bytes())));
    Err(Failure::new(ErrorCode::UpgradeUnsupported, detail).into())
}

fn rewrite_head(headers: &mut HeaderMap, door: &Door, authority: Option<HeaderValue>, id: CallId) {
    let trailers = headers.get(TE).is_some_and(|te| te.as_bytes().eq_ignore_ascii_case(b"trailers"));
    funtainer_contract::http::strip_hop_by_hop(headers);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if let Some(authority) = authority {
        // RFC 9112 section 3.2.2: the absolute form outranks Host.
        headers.insert(HOST, authority);
    }
    if let Door::Calls(peer) = door {
        let before = headers.get(FORWARDED_FOR).filter(|before| !before.is_empty() && before.len() <= FORWARDED_FOR_BYTES_MAX);
        let list = match before {
            None => peer.clone(),
            Some(before) => HeaderValue::from_bytes(&[before.as_bytes(), b", ", peer.as_bytes()].concat())
                .expect("two header values and a comma"),
        };
        headers.insert(FORWARDED_FOR, list);
    }
    headers.insert(FORWARDED_PROTO, HeaderValue::from_static("http"));
    match headers.get(HOST).cloned() {
        Some(host) => headers.insert(FORWARDED_HOST, host),
        None => headers.remove(FORWARDED_HOST),
    };
    headers.insert(CALL_ID, call_id_value(id));
}

/// Origin form without the first `prefix_bytes` of the path.
fn without_prefix(uri: &Uri, prefix_bytes: usize) -> Uri {
    let rest = uri.path_and_query().map_or("", |whole| &whole.as_str()[prefix_bytes..]);
    let origin = match rest {
        "" => PathAndQuery::from_static("/"),
        rest if rest.starts_with('/') => rest.parse().expect("a part of a valid target from a slash on"),
        query => format!("/{query}").parse().expect("a slash and a valid query"),
    };
    Uri::from(origin)
}

/// RFC 3986 section 2.1. A name without `%` is borrowed.
fn percent_decoded(text: &str) -> Result<Cow<'_, str>, Failure> {
    if !text.contains('%') {
        return Ok(Cow::Borrowed(text));
    }
    let wrong = || Failure::new(ErrorCode::BadRequest, format!("'{}' is not percent-encoded UTF-8", shown(text)));
    let mut bytes = Vec::with_capacity(text.len());
    let mut rest = text.as_bytes();
    while let [first, after @ ..] = rest {
        rest = after;
        if *first == b'%' {
            let digit = |at: usize| after.get(at).and_then(|digit| char::from(*digit).to_digit(16));
            let (Some(high), Some(low)) = (digit(0), digit(1)) else { return Err(wrong()) };
            bytes.push((high * 16 + low) as u8);
            rest = &after[2..];
        } else {
            bytes.push(*first);
        }
    }
    String::from_utf8(bytes).map(Cow::Owned).map_err(|_| wrong())
}

/// Milliseconds of each phase, as the Server-Timing specification (W3C) writes them.
fn server_timing(cold: &Cold) -> HeaderValue {
    let Cold { queue, phases } = cold;
    let millis = |duration: std::time::Duration| duration.as_secs_f64() * 1000.0;
    let text = format!(
        "cold;dur={:.3}, queue;dur={:.3}, sandbox;dur={:.3}, exec;dur={:.3}, ready;dur={:.3}",
        millis(*queue + phases.sandbox + phases.exec + phases.ready),
        millis(*queue),
        millis(phases.sandbox),
        millis(phases.exec),
        millis(phases.ready),
    );
    HeaderValue::from_str(&text).expect("words and numbers")
}

/// Foreign text in a sentence: without control characters, and not longer than a line.
pub(crate) fn shown(text: &str) -> String {
    const CHARS_MAX: usize = 100;
    let mut short: String = text.chars().take(CHARS_MAX).map(|c| if c.is_control() { '\u{fffd}' } else { c }).collect();
    if text.chars().nth(CHARS_MAX).is_some() {
        short.push('…');
    }
    short
}

#[cfg(test)]
mod tests {
    use std::time::Duration;

    use funtainer_contract::StartPhases;

    use super::*;

    #[test]
    fn prefixes_are_stripped() {
        let check = |uri: &str, expect: &str| {
            let uri: Uri = uri.parse().unwrap();
            assert_eq!(without_prefix(&uri, "/function/f".len()).to_string(), expect, "{uri}");
        };
        check("/function/f", "/");
        check("/function/f/", "/");
        check("/function/f?x=/", "/?x=/");
        check("/function/f/a//b?x", "/a//b?x");
        check("http://host:1/function/f/a", "/a");
        check("/function/f//evil.example/", "//evil.example/");
    }

    #[test]
    fn names_are_decoded() {
        let check = |text: &str, expect: Option<&str>| assert_eq!(percent_decoded(text).ok().as_deref(), expect, "{text}");
        check("plain", Some("plain"));
        check("a%20b%40c", Some("a b@c"));
        check("%41", Some("A"));
        check("%", None);
        check("%4", None);
        check("%zz", None);
        check("%+1", None);
        check("%ff", None);
        check("%C3%A9", Some("é"));
    }

    #[test]
    fn timing_names_each_phase() {
        let phases = StartPhases {
            sandbox: Duration::from_micros(1200),
            exec: Duration::from_micros(300),
            ready: Duration::from_micros(500),
        };
        let cold = Cold { queue: Duration::from_micros(25), phases };
        assert_eq!(
            server_timing(&cold).to_str().unwrap(),
            "cold;dur=2.025, queue;dur=0.025, sandbox;dur=1.200, exec;dur=0.300, ready;dur=0.500"
        );
    }

    #[test]
    fn foreign_text_is_tamed() {
        assert_eq!(shown("a\nb\u{1b}"), "a\u{fffd}b\u{fffd}");
        assert_eq!(shown(&"x".repeat(1000)).chars().count(), 101);
    }

    #[test]
    fn addresses_of_former_proxies_stay_in_bounds() {
        let check = |before: Option<String>, expect: &str| {
            let mut headers = HeaderMap::new();
            if let Some(before) = before {
                headers.insert(FORWARDED_FOR, HeaderValue::from_str(&before).unwrap());
            }
            rewrite_head(&mut headers, &Door::calls("::ffff:10.0.0.1".parse().unwrap()), None, crate::call_id::new());
            assert_eq!(headers[FORWARDED_FOR], expect);
        };
        check(None, "10.0.0.1");
        check(Some("1.2.3.4".into()), "1.2.3.4, 10.0.0.1");
        check(Some("9".repeat(2000)), "10.0.0.1");
    }
}

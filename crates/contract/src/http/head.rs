//! Heads on their way through: what belongs to one connection only is left out (RFC 9110 section 7.6.1).

use ::http::header::{
    CONNECTION, CONTENT_LENGTH, EXPECT, HOST, HeaderMap, HeaderName, HeaderValue, TE, TRANSFER_ENCODING, UPGRADE,
};
use ::http::uri::PathAndQuery;
use ::http::{Request, Response, Uri, Version};

/// Most names that one `Connection` header is read for; a head with more is made to attack, its surplus names stay.
const CONNECTION_NAMES_MAX: usize = 32;

const KEEP_ALIVE: HeaderName = HeaderName::from_static("keep-alive");
const PROXY_CONNECTION: HeaderName = HeaderName::from_static("proxy-connection");

/// Removes what only concerns the connection that the head came over: the hop-by-hop fields and those that `Connection` names.
/// To be called before the platform adds fields of its own, which a caller could name in `Connection` otherwise.
pub fn strip_hop_by_hop(headers: &mut HeaderMap) {
    if headers.contains_key(CONNECTION) {
        strip_named(headers);
    }
    for name in [TRANSFER_ENCODING, UPGRADE, TE, KEEP_ALIVE, PROXY_CONNECTION] {
        headers.remove(name);
    }
}

/// Makes a caller's head one of this hop: HTTP/1.1, origin form, with a `Host` and the length of the body as it really is.
pub(super) fn rewrite_request<B>(request: &mut Request<B>) {
    let trailers = says_trailers(request.headers());
    let authority = request.uri().authority().and_then(|authority| HeaderValue::from_str(authority.as_str()).ok());
    if request.uri().scheme().is_some() || request.uri().authority().is_some() {
        let path = request.uri().path_and_query().cloned().unwrap_or_else(|| PathAndQuery::from_static("/"));
        *request.uri_mut() = Uri::from(path);
    }
    *request.version_mut() = Version::HTTP_11;
    let headers = request.headers_mut();
    strip_hop_by_hop(headers);
    // The body's own size decides, so that the two can never differ.
    headers.remove(CONTENT_LENGTH);
    // Answered on the caller's connection as soon as the body is read.
    headers.remove(EXPECT);
    if trailers {
        headers.insert(TE, HeaderValue::from_static("trailers"));
    }
    if !headers.contains_key(HOST) {
        headers.insert(HOST, authority.unwrap_or(HeaderValue::from_static("localhost")));
    }
}

/// Makes a function's head one for the caller, and tells whether the connection can be used again by what the head says.
pub(super) fn rewrite_response<B>(response: &mut Response<B>) -> bool {
    let http10 = response.version() != Version::HTTP_11;
    *response.version_mut() = Version::HTTP_11;
    let headers = response.headers_mut();
    let reusable = if http10 { names(headers, "keep-alive") } else { !names(headers, "close") };
    if headers.contains_key(TRANSFER_ENCODING) {
        // RFC 9112 section 6.3: Transfer-Encoding overrides it, and it must not be given on.
        headers.remove(CONTENT_LENGTH);
    }
    strip_hop_by_hop(headers);
    reusable
}

fn names(headers: &HeaderMap, what: &str) -> bool {
    headers
        .get_all(CONNECTION)
        .iter()
        .filter_map(|value| value.to_str().ok())
        .any(|value| value.split(',').any(|name| name.trim().eq_ignore_ascii_case(what)))
}

fn says_trailers(headers: &HeaderMap) -> bool {
    headers.get(TE).and_then(|value| value.to_str().ok()).is_some_and(|value| {
        value.split(',').any(|coding| coding.split(';').next().is_some_and(|name| name.trim().eq_ignore_ascii_case("trailers")))
    })
}

fn strip_named(headers: &mut HeaderMap) {
    let mut named = Vec::new();
    for value in headers.get_all(CONNECTION) {
        let Ok(value) = value.to_str() else { continue };
        for name in value.split(',').map(str::trim) {
            if name.is_empty() || name.eq_ignore_ascii_case("keep-alive") || name.eq_ignore_ascii_case("close") {
                continue;
            }
            match HeaderName::from_bytes(name.as_bytes()) {
                // RFC 9110 section 7.6.1: fields for every recipient are never listed. These decide where a message ends and goes.
                Ok(name) if name != HOST && name != CONTENT_LENGTH && named.len() < CONNECTION_NAMES_MAX => named.push(name),
                _ => {}
            }
        }
    }
    headers.remove(CONNECTION);
    for name in named {
        headers.remove(name);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn request(head: &[(&str, &str)]) -> Request<()> {
        let mut builder = Request::builder().uri("/a?b").version(Version::HTTP_10);
        for (name, value) in head {
            builder = builder.header(*name, *value);
        }
        builder.body(()).unwrap()
    }

    fn rewritten(head: &[(&str, &str)]) -> Vec<String> {
        let mut request = request(head);
        rewrite_request(&mut request);
        let mut lines: Vec<_> =
            request.headers().iter().map(|(name, value)| format!("{name}: {}", value.to_str().unwrap())).collect();
        lines.sort();
        lines
    }

    #[test]
    fn requests_lose_what_was_for_one_hop() {
        let check = |head: &[(&str, &str)], expect: &[&str]| assert_eq!(rewritten(head), expect, "{head:?}");
        check(&[("host", "h"), ("x", "1")], &["host: h", "x: 1"]);
        check(&[], &["host: localhost"]);
        check(
            &[
                ("host", "h"),
                ("connection", "close, X-Hop ,upgrade"),
                ("x-hop", "1"),
                ("upgrade", "websocket"),
                ("keep-alive", "3"),
            ],
            &["host: h"],
        );
        check(&[("host", "h"), ("connection", "x-a"), ("connection", "x-b"), ("x-a", "1"), ("x-b", "1")], &["host: h"]);
        check(&[("host", "h"), ("connection", "host, content-length")], &["host: h"]);
        check(&[("host", "h"), ("connection", "(bad, ,"), ("proxy-connection", "close")], &["host: h"]);
        check(&[("host", "h"), ("transfer-encoding", "chunked"), ("content-length", "9")], &["host: h"]);
        check(&[("host", "h"), ("te", "gzip, trailers;q=0.5")], &["host: h", "te: trailers"]);
        check(&[("host", "h"), ("te", "gzip"), ("expect", "100-continue")], &["host: h"]);
    }

    #[test]
    fn requests_have_origin_form() {
        let check = |uri: &str, expect_uri: &str, expect_host: &str| {
            let mut request = Request::builder().uri(uri).body(()).unwrap();
            rewrite_request(&mut request);
            assert_eq!(
                (request.uri().to_string().as_str(), request.headers()[HOST].to_str().unwrap()),
                (expect_uri, expect_host)
            );
            assert_eq!(request.version(), Version::HTTP_11);
        };
        check("http://example.com:81/p?q", "/p?q", "example.com:81");
        check("http://example.com", "/", "example.com");
        check("/p", "/p", "localhost");
        check("*", "*", "localhost");
    }

    #[test]
    fn responses_tell_whether_the_connection_stays() {
        let check = |version: Version, head: &[(&str, &str)], expect: bool, left: usize| {
            let mut builder = Response::builder().version(version);
            for (name, value) in head {
                builder = builder.header(*name, *value);
            }
            let mut response = builder.body(()).unwrap();
            assert_eq!(rewrite_response(&mut response), expect, "{version:?} {head:?}");
            assert_eq!(response.version(), Version::HTTP_11);
            assert_eq!(response.headers().len(), left, "{head:?}");
        };
        check(Version::HTTP_11, &[("content-length", "1")], true, 1);
        check(Version::HTTP_11, &[("connection", "Close")], false, 0);
        check(Version::HTTP_11, &[("connection", "x-private, close"), ("x-private", "1")], false, 0);
        check(Version::HTTP_10, &[], false, 0);
        check(Version::HTTP_10, &[("connection", "Keep-Alive"), ("keep-alive", "timeout=5")], true, 0);
        check(Version::HTTP_11, &[("transfer-encoding", "chunked"), ("content-length", "3"), ("trailer", "x")], true, 1);
    }
}

//! Tokens for anonymous pulls, as the distribution project's "Token Authentication Specification" has them: the registry
//! answers 401 and names the place (`realm`) where a token is given out.

use std::collections::HashMap;
use std::time::Duration;

use funtainer_model::ImageRef;
use reqwest::header::HeaderMap;
use reqwest::{Method, StatusCode, Url};
use serde::Deserialize;
use tokio::time::Instant;

use super::ClientError;
use super::http::{self, Http, Request};

/// Most bytes of a token's answer.
const TOKEN_BYTES_MAX: u64 = 256 << 10;
/// How long a token lasts that does not say (the specification's default).
const LIFETIME_DEFAULT: Duration = Duration::from_mins(1);
/// A token is given up this long before its end, so that none runs out on the way.
const LIFETIME_MARGIN: Duration = Duration::from_secs(10);
/// Longest that a token is kept, whatever it says.
const LIFETIME_MAX: Duration = Duration::from_hours(1);

/// The Bearer challenge of a `WWW-Authenticate` header (RFC 6750 section 3).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Challenge {
    /// Where tokens are given out.
    realm: String,
    /// Who asks for the token.
    service: Option<String>,
    /// What it must be good for.
    scope: Option<String>,
}

/// What a realm gave out.
#[derive(Clone)]
pub(super) struct Token {
    secret: String,
    until: Instant,
}

#[derive(Deserialize)]
struct TokenAnswer {
    token: Option<String>,
    access_token: Option<String>,
    expires_in: Option<u64>,
}

impl std::fmt::Debug for Token {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.debug_struct("Token").field("until", &self.until).finish_non_exhaustive()
    }
}

impl Token {
    pub(super) fn secret(&self) -> &str {
        &self.secret
    }

    pub(super) fn expired(&self, now: Instant) -> bool {
        now >= self.until
    }
}

/// Asks the realm of `challenge` for a token that pulls from the repository of `image`.
pub(super) async fn fetch(http: &Http, image: &ImageRef, challenge: &Challenge) -> Result<Token, ClientError> {
    let registry = image.registry();
    let protocol = |what: &str| ClientError::Protocol { registry: registry.to_owned(), what: what.to_owned() };
    let mut url = Url::parse(&challenge.realm).map_err(|_| protocol("its realm is no address"))?;
    let plain_allowed = Url::parse(&format!("http://{registry}/")).is_ok_and(|own| http::is_loopback(&own));
    if url.scheme() != "https" && !(plain_allowed && http::is_loopback(&url)) {
        return Err(protocol("it asks for tokens to be fetched without encryption"));
    }
    let scope = challenge.scope.clone().unwrap_or_else(|| format!("repository:{}:pull", image.repository()));
    url.query_pairs_mut()
        .extend_pairs(challenge.service.iter().map(|service| ("service", service)))
        .append_pair("scope", &scope);
    let asked = Instant::now();
    let request = Request { registry, method: Method::GET, url, headers: &HeaderMap::new(), bearer: None };
    let response = http.send(&request).await?;
    let status = response.status();
    if matches!(status, StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN) {
        return Err(ClientError::Forbidden { registry: registry.to_owned(), said: Some("no anonymous token".to_owned()) });
    }
    if status != StatusCode::OK {
        let said = Some("from its token service".to_owned());
        return Err(ClientError::Status { registry: registry.to_owned(), status: status.as_u16(), said });
    }
    let body = http::read(registry, response, TOKEN_BYTES_MAX).await?;
    let answer: TokenAnswer = serde_json::from_slice(&body).map_err(|_| protocol("its token service sent no token"))?;
    let secret = answer.token.or(answer.access_token).filter(|text| !text.is_empty());
    let secret = secret.ok_or_else(|| protocol("its token service sent no token"))?;
    let lifetime = answer.expires_in.map_or(LIFETIME_DEFAULT, Duration::from_secs).min(LIFETIME_MAX);
    Ok(Token { secret, until: asked + lifetime.saturating_sub(LIFETIME_MARGIN) })
}

impl Challenge {
    /// The first Bearer challenge with a realm in the values of `WWW-Authenticate`.
    pub fn find_bearer<'a>(values: impl Iterator<Item = &'a str>) -> Option<Self> {
        values.flat_map(parse_challenges).find_map(|(scheme, mut parameters)| {
            let realm = parameters.remove("realm")?;
            let (service, scope) = (parameters.remove("service"), parameters.remove("scope"));
            scheme.eq_ignore_ascii_case("bearer").then_some(Self { realm, service, scope })
        })
    }
}

/// Schemes with their parameters (RFC 9110 section 11.6.1). What is not understood ends the list.
fn parse_challenges(value: &str) -> Vec<(String, HashMap<String, String>)> {
    let mut challenges: Vec<(String, HashMap<String, String>)> = Vec::new();
    let mut rest = value;
    loop {
        rest = rest.trim_start_matches([' ', '\t', ',']);
        let end = rest.find(|c: char| !is_token(c)).unwrap_or(rest.len());
        if end == 0 {
            return challenges;
        }
        let word = &rest[..end];
        rest = rest[end..].trim_start_matches([' ', '\t']);
        let Some(after) = rest.strip_prefix('=') else {
            challenges.push((word.to_owned(), HashMap::new()));
            continue;
        };
        let Some((text, after)) = parse_value(after.trim_start_matches([' ', '\t'])) else { return challenges };
        rest = after;
        let Some((_, parameters)) = challenges.last_mut() else { return challenges };
        parameters.insert(word.to_ascii_lowercase(), text);
    }
}

/// A token or a quoted string, and what follows it.
fn parse_value(text: &str) -> Option<(String, &str)> {
    let Some(quoted) = text.strip_prefix('"') else {
        let end = text.find(|c: char| !is_token(c)).unwrap_or(text.len());
        return Some((text[..end].to_owned(), &text[end..]));
    };
    let mut value = String::new();
    let mut chars = quoted.char_indices();
    while let Some((at, c)) = chars.next() {
        match c {
            '"' => return Some((value, &quoted[at + 1..])),
            '\\' => value.push(chars.next()?.1),
            c => value.push(c),
        }
    }
    None
}

fn is_token(c: char) -> bool {
    c.is_ascii_alphanumeric() || "!#$%&'*+-.^_`|~".contains(c)
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn challenges() {
        let check = |value: &str, expect: Option<(&str, Option<&str>, Option<&str>)>| {
            let found = Challenge::find_bearer(std::iter::once(value));
            let found = found.as_ref().map(|c| (c.realm.as_str(), c.service.as_deref(), c.scope.as_deref()));
            assert_eq!(found, expect, "{value}");
        };
        check(
            r#"Bearer realm="https://auth.docker.io/token",service="registry.docker.io",scope="repository:a/b:pull,push""#,
            Some(("https://auth.docker.io/token", Some("registry.docker.io"), Some("repository:a/b:pull,push"))),
        );
        check(r#"bearer Realm = "x" , service=s"#, Some(("x", Some("s"), None)));
        check(r#"Basic realm="b", Bearer realm="x\"y""#, Some(("x\"y", None, None)));
        check(r#"Negotiate, Bearer realm="x""#, Some(("x", None, None)));
        check(r#"Basic realm="b""#, None);
        check("Bearer", None);
        check(r#"Bearer realm="unfinished"#, None);
        check(r#"realm="x""#, None);
        check("", None);
    }

    proptest! {
        #[test]
        fn no_header_panics(value in ".{0,100}", tail in r#"Bearer [a-z="\\, é]{0,40}"#) {
            let _ = Challenge::find_bearer([value.as_str(), tail.as_str()].into_iter());
        }
    }
}

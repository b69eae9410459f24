//! One request with its redirects, timeouts and retries.

use std::net::{IpAddr, Ipv4Addr, Ipv6Addr, SocketAddr};
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use reqwest::header::{AUTHORIZATION, HeaderMap, HeaderValue, LOCATION, RETRY_AFTER};
use reqwest::{Client, ClientBuilder, Method, Response, StatusCode, Url};
use rustls::{ClientConfig, RootCertStore};
use tokio::sync::Mutex;

use super::ClientError;

/// Longest wait for a connection, with TLS.
const CONNECT_TIMEOUT: Duration = Duration::from_secs(10);
/// Longest silence of a registry, before its answer and inside of it. Registries that fetch from elsewhere take long.
const SILENCE_TIMEOUT: Duration = Duration::from_mins(1);
/// How often one request is sent at most.
const ATTEMPTS_MAX: u32 = 4;
/// First pause before a repetition; each further one is twice as long.
const PAUSE_FIRST: Duration = Duration::from_millis(200);
/// Longest pause that a registry can ask for with `Retry-After`.
const PAUSE_MAX: Duration = Duration::from_secs(10);
/// Most redirects of one request; blob stores are one or two away.
const REDIRECTS_MAX: u32 = 5;

/// Connections to registries, kept between requests.
#[derive(Debug, Default)]
pub(super) struct Http {
    /// For loopback: trusts no certificate, asks no resolver, uses no proxy.
    plain: Mutex<Option<Client>>,
    /// For everything else; made when needed, since it loads the machine's root certificates and name servers. Made anew after a
    /// failed connection, since both change while a server runs.
    secure: Mutex<Option<Client>>,
}

/// A question without body.
#[derive(Debug)]
pub(super) struct Request<'a> {
    pub(super) registry: &'a str,
    /// GET or HEAD.
    pub(super) method: Method,
    pub(super) url: Url,
    pub(super) headers: &'a HeaderMap,
    /// Sent to the origin of `url` only, not to where it redirects.
    pub(super) bearer: Option<&'a str>,
}

impl Http {
    /// Sends the request until there is an answer that is neither a passing fault nor a redirect.
    pub(super) async fn send(&self, request: &Request<'_>) -> Result<Response, ClientError> {
        let mut pause = PAUSE_FIRST;
        for attempt in 1.. {
            let result = self.follow(request).await;
            let wait = match &result {
                Ok(response) if is_passing(response.status()) => retry_after(response).unwrap_or(pause).min(PAUSE_MAX),
                Err(error) if error.is_transient() => pause,
                _ => return result,
            };
            if attempt == ATTEMPTS_MAX {
                return result;
            }
            tracing::debug!(registry = request.registry, path = request.url.path(), attempt, ?wait, "asking again");
            tokio::time::sleep(wait).await;
            pause *= 2;
        }
        unreachable!("the loop ends by return")
    }

    async fn follow(&self, request: &Request<'_>) -> Result<Response, ClientError> {
        let protocol = |what: String| ClientError::Protocol { registry: request.registry.to_owned(), what };
        let mut url = request.url.clone();
        for _ in 0..=REDIRECTS_MAX {
            let client = self.client(&url, request).await?;
            let mut builder = client.request(request.method.clone(), url.clone()).headers(request.headers.clone());
            if let Some(token) = request.bearer.filter(|_| url.origin() == request.url.origin()) {
                let mut value = HeaderValue::try_from(format!("Bearer {token}"))
                    .map_err(|_| protocol("its token has characters that no header can carry".to_owned()))?;
                value.set_sensitive(true);
                builder = builder.header(AUTHORIZATION, value);
            }
            let response = match builder.send().await {
                Ok(response) => response,
                Err(source) => {
                    if source.is_connect() {
                        self.secure.lock().await.take();
                    }
                    return Err(transport(request.registry, source));
                }
            };
            if !is_redirect(response.status()) {
                return Ok(response);
            }
            let location = response.headers().get(LOCATION).and_then(|value| value.to_str().ok());
            let location = location.ok_or_else(|| protocol("a redirect without location".to_owned()))?;
            url = url.join(location).map_err(|_| protocol("a redirect to no address".to_owned()))?;
        }
        Err(protocol(format!("more than {REDIRECTS_MAX} redirects")))
    }

    /// The client that may speak to `url`. Plain HTTP stays on loopback, and only a registry that is there itself leads to it:
    /// otherwise a registry on the internet could make this machine ask its own services.
    async fn client(&self, url: &Url, request: &Request<'_>) -> Result<Client, ClientError> {
        let (slot, is_plain) = match url.scheme() {
            "http" if is_loopback(url) && is_loopback(&request.url) => (&self.plain, true),
            "https" => (&self.secure, false),
            _ => {
                return Err(ClientError::Protocol {
                    registry: request.registry.to_owned(),
                    what: format!("it leads to {} without encryption", url.host_str().unwrap_or("another address")),
                });
            }
        };
        let mut slot = slot.lock().await;
        if let Some(client) = &*slot {
            return Ok(client.clone());
        }
        let client = if is_plain { plain(request.registry)? } else { secure(request.registry).await? };
        Ok(slot.insert(client).clone())
    }
}

/// Whether the host of `url` is this machine: 127.0.0.0/8, `::1` or `localhost`.
pub(super) fn is_loopback(url: &Url) -> bool {
    let host = url.host_str().unwrap_or_default();
    let bare = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')).unwrap_or(host);
    bare.eq_ignore_ascii_case("localhost") || bare.parse::<IpAddr>().is_ok_and(|address| address.is_loopback())
}

/// The body, of at most `bytes_max`.
pub(super) async fn read(registry: &str, mut response: Response, bytes_max: u64) -> Result<Bytes, ClientError> {
    let mut body = Vec::new();
    while let Some(chunk) = response.chunk().await.map_err(|source| transport(registry, source))? {
        if (body.len() + chunk.len()) as u64 > bytes_max {
            let what = format!("more than {bytes_max} bytes where a short answer was expected");
            return Err(ClientError::Protocol { registry: registry.to_owned(), what });
        }
        body.extend_from_slice(&chunk);
    }
    Ok(body.into())
}

/// The address stays out of errors: after a redirect it carries a signature.
pub(super) fn transport(registry: &str, source: reqwest::Error) -> ClientError {
    ClientError::Transport { registry: registry.to_owned(), source: source.without_url() }
}

fn plain(registry: &str) -> Result<Client, ClientError> {
    // Certificates of loopback registries are never looked at, so none are trusted.
    let builder = builder(RootCertStore::empty(), registry)?.no_proxy();
    let this_machine =
        [IpAddr::from(Ipv4Addr::LOCALHOST), Ipv6Addr::LOCALHOST.into()].map(|address| SocketAddr::new(address, 0));
    builder.resolve_to_addrs("localhost", &this_machine).build().map_err(|source| transport(registry, source))
}

async fn secure(registry: &str) -> Result<Client, ClientError> {
    let found = tokio::task::spawn_blocking(rustls_native_certs::load_native_certs).await;
    let found = found.map_err(|error| ClientError::Roots(error.to_string()))?;
    let mut roots = RootCertStore::empty();
    let (added, ignored) = roots.add_parsable_certificates(found.certs);
    if added == 0 {
        let why = found.errors.first().map_or_else(|| "none were found".to_owned(), ToString::to_string);
        return Err(ClientError::Roots(why));
    }
    tracing::debug!(added, ignored, "root certificates loaded");
    builder(roots, registry)?.build().map_err(|source| transport(registry, source))
}

/// What both kinds have in common. The provider is named here, so that nothing depends on one set for the whole process.
fn builder(roots: RootCertStore, registry: &str) -> Result<ClientBuilder, ClientError> {
    let provider = Arc::new(rustls::crypto::ring::default_provider());
    let tls = ClientConfig::builder_with_provider(provider)
        .with_safe_default_protocol_versions()
        .map_err(|error| ClientError::Protocol { registry: registry.to_owned(), what: error.to_string() })?
        .with_root_certificates(roots)
        .with_no_client_auth();
    Ok(Client::builder()
        .tls_backend_preconfigured(tls)
        .user_agent(concat!("funtainer/", env!("CARGO_PKG_VERSION")))
        .redirect(reqwest::redirect::Policy::none())
        .connect_timeout(CONNECT_TIMEOUT)
        .read_timeout(SILENCE_TIMEOUT))
}

fn is_passing(status: StatusCode) -> bool {
    status == StatusCode::TOO_MANY_REQUESTS || (status.is_server_error() && status != StatusCode::NOT_IMPLEMENTED)
}

fn is_redirect(status: StatusCode) -> bool {
    matches!(status.as_u16(), 301 | 302 | 303 | 307 | 308)
}

/// `Retry-After` in seconds (RFC 9110 section 10.2.3); its other form, a date, is not worth a clock.
fn retry_after(response: &Response) -> Option<Duration> {
    let seconds = response.headers().get(RETRY_AFTER)?.to_str().ok()?.parse().ok()?;
    Some(Duration::from_secs(seconds))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn loopback_is_this_machine_however_it_is_written() {
        let check = |url: &str, expect: bool| assert_eq!(is_loopback(&Url::parse(url).unwrap()), expect, "{url}");
        for url in ["http://127.0.0.1:5000/", "http://127.1/", "http://127.9.9.9/", "http://[::1]:5/", "http://LocalHost/"] {
            check(url, true);
        }
        for url in
            ["http://128.0.0.1/", "http://localhost.example/", "http://127.0.0.1.example/", "http://[::2]/", "http://0.0.0.0/"]
        {
            check(url, false);
        }
    }
}

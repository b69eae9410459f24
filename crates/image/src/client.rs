//! The client side of the OCI distribution specification 1.1 ("Pull"): names to digests, manifests, blobs.
//!
//! Anonymous only. A registry on a loopback address is spoken to in plain HTTP, every other one by HTTPS under the
//! machine's root certificates. Everything that is asked for is safe to repeat (GET and HEAD), so passing faults are
//! retried with growing pauses. Manifests are verified here; blobs are verified by who reads them, while they pass.

mod auth;
mod http;

use std::collections::HashMap;
use std::sync::Mutex;

use bytes::Bytes;
use funtainer_model::{Digest, ErrorCode, Failure, ImageRef};
use reqwest::header::{ACCEPT, CONTENT_TYPE, HeaderMap, HeaderValue, WWW_AUTHENTICATE};
use reqwest::{Method, Response, StatusCode, Url};
use tokio::time::Instant;

pub use self::auth::Challenge;
use self::auth::Token;
use self::http::{Http, Request};
use crate::hash::sha256;
use crate::manifest::{self, Descriptor, MANIFEST_BYTES_MAX};

/// The registry that `docker.io` means.
const DOCKER_HUB: &str = "registry-1.docker.io";
/// Most repositories for which tokens are remembered; past that all are forgotten, and asked for again.
const TOKENS_MAX: usize = 1024;
/// Most bytes read of an answer that says why something failed.
const ERROR_BYTES_MAX: u64 = 64 << 10;
/// Most characters of a registry's own words that are repeated to a user.
const ERROR_CHARS_MAX: usize = 200;

/// Speaks to registries. One for a whole program: connections and tokens are kept.
#[derive(Debug, Default)]
pub struct RegistryClient {
    http: Http,
    tokens: Mutex<HashMap<Scope, Token>>,
}

/// What a name leads to.
#[derive(Debug)]
pub struct Resolved {
    /// Digest of the manifest or index.
    pub digest: Digest,
    /// Its bytes, where the registry would not say the digest without them.
    pub document: Option<RawDocument>,
}

/// A manifest or an index, verified against its digest and not yet parsed.
#[derive(Debug, Clone)]
pub struct RawDocument {
    /// As the registry sent it.
    pub bytes: Bytes,
    /// `Content-Type` of the answer.
    pub content_type: Option<String>,
}

/// The bytes of a blob as they arrive. Never more than the descriptor says; not verified.
#[derive(Debug)]
pub struct Blob {
    response: Response,
    registry: String,
    expected: u64,
    received: u64,
}

/// Why a registry did not give what it was asked for.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    /// No such repository, tag or blob.
    #[error("{registry} has no such image{}", in_brackets(.said.as_deref()))]
    Unknown {
        /// `host[:port]`.
        registry: String,
        /// The registry's own words.
        said: Option<String>,
    },
    /// Credentials are missing, or the image is not public.
    #[error("{registry} denies access without credentials; images that do not exist look the same on some registries{}", in_brackets(.said.as_deref()))]
    Forbidden {
        /// `host[:port]`.
        registry: String,
        /// The registry's own words.
        said: Option<String>,
    },
    /// No answer.
    #[error("{registry} cannot be reached")]
    Transport {
        /// `host[:port]`.
        registry: String,
        /// Why; without the address, which can carry signatures.
        #[source]
        source: reqwest::Error,
    },
    /// An answer that says the registry is in trouble.
    #[error("{registry} answers with status {status}{}", in_brackets(.said.as_deref()))]
    Status {
        /// `host[:port]`.
        registry: String,
        /// Its HTTP status.
        status: u16,
        /// The registry's own words.
        said: Option<String>,
    },
    /// An answer that breaks the specification.
    #[error("{registry} gives an answer that cannot be used: {what}")]
    Protocol {
        /// `host[:port]`.
        registry: String,
        /// What is wrong with it.
        what: String,
    },
    /// The bytes are not those that were asked for.
    #[error("{registry} sent {actual} for {expected}")]
    Digest {
        /// `host[:port]`.
        registry: String,
        /// The digest that was asked for.
        expected: Digest,
        /// The digest of what came.
        actual: Digest,
    },
    /// The number of bytes is not the one that the descriptor says.
    #[error("{registry} sent {actual} bytes of a blob of {expected}")]
    Size {
        /// `host[:port]`.
        registry: String,
        /// From the descriptor.
        expected: u64,
        /// What came, as far as it was read.
        actual: u64,
    },
    /// This machine cannot check whom it speaks to.
    #[error("this machine has no usable root certificates: {0}")]
    Roots(String),
}

impl RegistryClient {
    /// A client without connections; nothing is sent or loaded yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// The digest that the tag of `image` has in its registry now. A reference with a digest is its own answer.
    pub async fn resolve(&self, image: &ImageRef) -> Result<Resolved, ClientError> {
        if let Some(digest) = image.digest() {
            return Ok(Resolved { digest: *digest, document: None });
        }
        let tag = image.tag().map_or("latest", |tag| tag.as_str());
        let url = url(image, &format!("manifests/{tag}"))?;
        let response = self.ask(image, Method::HEAD, url.clone(), &accept_manifests()).await?;
        if response.status().is_success()
            && let Some(digest) = response.headers().get("docker-content-digest").and_then(|value| value.to_str().ok())
            && let Ok(digest) = digest.parse()
        {
            return Ok(Resolved { digest, document: None });
        }
        // The answer to HEAD has no words in it; that of GET says why, or has the manifest itself.
        let document = self.document(image, url).await?;
        Ok(Resolved { digest: sha256(&document.bytes), document: Some(document) })
    }

    /// The manifest or index with `digest`, verified.
    pub async fn manifest(&self, image: &ImageRef, digest: &Digest) -> Result<RawDocument, ClientError> {
        let url = url(image, &format!("manifests/{digest}"))?;
        let document = self.document(image, url).await?;
        let actual = sha256(&document.bytes);
        if actual != *digest {
            return Err(ClientError::Digest { registry: image.registry().to_owned(), expected: *digest, actual });
        }
        Ok(document)
    }

    /// Starts to receive a blob of the repository of `image`.
    pub async fn blob(&self, image: &ImageRef, blob: &Descriptor) -> Result<Blob, ClientError> {
        let url = url(image, &format!("blobs/{}", blob.digest))?;
        let response = self.ask(image, Method::GET, url, &HeaderMap::new()).await?;
        let registry = image.registry().to_owned();
        if response.status() == StatusCode::NOT_FOUND {
            let what = format!("it has no {}, which its own manifest names", blob.digest);
            return Err(ClientError::Protocol { registry, what });
        }
        let response = succeeded(image, response).await?;
        if let Some(length) = response.content_length()
            && length != blob.size
        {
            return Err(ClientError::Size { registry, expected: blob.size, actual: length });
        }
        Ok(Blob { response, registry, expected: blob.size, received: 0 })
    }

    async fn document(&self, image: &ImageRef, url: Url) -> Result<RawDocument, ClientError> {
        let response = self.ask(image, Method::GET, url, &accept_manifests()).await?;
        let response = succeeded(image, response).await?;
        let content_type = response.headers().get(CONTENT_TYPE).and_then(|value| value.to_str().ok()).map(str::to_owned);
        let bytes = http::read(image.registry(), response, MANIFEST_BYTES_MAX).await?;
        Ok(RawDocument { bytes, content_type })
    }

    /// One question with the token that its repository needs, which is fetched when the registry asks for it.
    async fn ask(&self, image: &ImageRef, method: Method, url: Url, headers: &HeaderMap) -> Result<Response, ClientError> {
        let scope = Scope::of(image);
        let known = self.known_token(&scope);
        let mut request = Request { registry: image.registry(), method, url, headers, bearer: known.as_deref() };
        let response = self.http.send(&request).await?;
        if response.status() != StatusCode::UNAUTHORIZED {
            return Ok(response);
        }
        let challenges = response.headers().get_all(WWW_AUTHENTICATE).iter().filter_map(|value| value.to_str().ok());
        let Some(challenge) = Challenge::find_bearer(challenges) else { return Ok(response) };
        drop(response);
        let token = auth::fetch(&self.http, image, &challenge).await?;
        request.bearer = Some(token.secret());
        let response = self.http.send(&request).await?;
        self.remember(scope, token.clone());
        Ok(response)
    }

    fn known_token(&self, scope: &Scope) -> Option<String> {
        let mut tokens = self.tokens.lock().expect("no holder panics");
        if tokens.get(scope)?.expired(Instant::now()) {
            tokens.remove(scope);
        }
        tokens.get(scope).map(|token| token.secret().to_owned())
    }

    fn remember(&self, scope: Scope, token: Token) {
        let mut tokens = self.tokens.lock().expect("no holder panics");
        if tokens.len() >= TOKENS_MAX {
            tokens.clear();
        }
        tokens.insert(scope, token);
    }
}

impl Blob {
    /// The next bytes; none once all of them came.
    pub async fn chunk(&mut self) -> Result<Option<Bytes>, ClientError> {
        let chunk = self.response.chunk().await.map_err(|source| http::transport(&self.registry, source))?;
        self.received += chunk.as_ref().map_or(0, |bytes| bytes.len() as u64);
        let wrong_size = self.received > self.expected || (chunk.is_none() && self.received < self.expected);
        if wrong_size {
            return Err(ClientError::Size { registry: self.registry.clone(), expected: self.expected, actual: self.received });
        }
        Ok(chunk)
    }

    /// All of them, for small blobs: at most the descriptor's size is held in memory.
    pub async fn bytes(mut self) -> Result<Bytes, ClientError> {
        let mut all = Vec::new();
        while let Some(chunk) = self.chunk().await? {
            all.extend_from_slice(&chunk);
        }
        Ok(all.into())
    }
}

impl ClientError {
    /// Whether the same request may well succeed a little later.
    pub fn is_transient(&self) -> bool {
        match self {
            Self::Transport { source, .. } => !source.is_connect(),
            Self::Status { .. } => true,
            _ => false,
        }
    }

    /// The failure as a user meets it, for the image called `image`.
    pub fn failure(&self, image: &ImageRef) -> Failure {
        let detail = format!("{image}: {}", crate::error::chain(self));
        match self {
            Self::Unknown { .. } => Failure::new(ErrorCode::ImageUnknown, detail),
            Self::Forbidden { .. } => Failure::new(ErrorCode::ImageForbidden, detail),
            Self::Digest { .. } | Self::Size { .. } => Failure::new(ErrorCode::DigestMismatch, detail),
            Self::Transport { .. } | Self::Status { .. } | Self::Protocol { .. } => {
                Failure::new(ErrorCode::RegistryUnavailable, detail)
            }
            Self::Roots(_) => Failure::new(ErrorCode::RegistryUnavailable, detail)
                .with_hint("install the package ca-certificates, or set SSL_CERT_FILE for `funtainer serve`"),
        }
    }
}

/// What a token is good for.
#[derive(Debug, Clone, PartialEq, Eq, Hash)]
struct Scope {
    registry: String,
    repository: String,
}

impl Scope {
    fn of(image: &ImageRef) -> Self {
        Self { registry: image.registry().to_owned(), repository: image.repository().to_owned() }
    }
}

/// Where `rest` of the image's repository lies (OCI distribution specification, "Endpoints").
fn url(image: &ImageRef, rest: &str) -> Result<Url, ClientError> {
    let host = if image.registry() == "docker.io" { DOCKER_HUB } else { image.registry() };
    let wrong = |_| ClientError::Protocol { registry: host.to_owned(), what: "its name is no host".to_owned() };
    let base = Url::parse(&format!("https://{host}/")).map_err(wrong)?;
    let scheme = if http::is_loopback(&base) { "http" } else { "https" };
    Url::parse(&format!("{scheme}://{host}/v2/{}/{rest}", image.repository())).map_err(wrong)
}

fn accept_manifests() -> HeaderMap {
    // In one line: some registries read only the first of several.
    let types = HeaderValue::try_from(manifest::ACCEPT.join(", ")).expect("media types are plain text");
    HeaderMap::from_iter([(ACCEPT, types)])
}

/// The answer if it is a good one, else the error that it means.
async fn succeeded(image: &ImageRef, response: Response) -> Result<Response, ClientError> {
    let status = response.status();
    if status == StatusCode::OK {
        return Ok(response);
    }
    let registry = image.registry().to_owned();
    let said = match http::read(&registry, response, ERROR_BYTES_MAX).await {
        Ok(body) => words(&body),
        Err(_) => None,
    };
    Err(match status {
        StatusCode::NOT_FOUND => ClientError::Unknown { registry, said },
        StatusCode::UNAUTHORIZED | StatusCode::FORBIDDEN => ClientError::Forbidden { registry, said },
        status => ClientError::Status { registry, status: status.as_u16(), said },
    })
}

/// The first message of an error body (OCI distribution specification, "Error Codes"), made fit to be printed.
fn words(body: &[u8]) -> Option<String> {
    let parsed: serde_json::Value = serde_json::from_slice(body).ok()?;
    let first = parsed.get("errors")?.get(0)?;
    let text = first.get("message").or_else(|| first.get("code"))?.as_str()?;
    let clean: String = text.chars().filter(|c| !c.is_control()).take(ERROR_CHARS_MAX).collect();
    (!clean.is_empty()).then_some(clean)
}

fn in_brackets(said: Option<&str>) -> String {
    said.map_or_else(String::new, |text| format!(" ({text})"))
}

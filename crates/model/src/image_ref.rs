//! References to images: `[registry/]repository[:tag][@digest]`, as the OCI distribution specification (section "Pulling
//! manifests") and the Docker reference grammar write them.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::Digest;

/// The registry that names without one mean, as `docker` has it.
const REGISTRY_DEFAULT: &str = "docker.io";
/// Names without a path are official images there.
const LIBRARY: &str = "library/";
/// Longest repository name in bytes, with the registry (OCI distribution specification, "Pulling manifests").
const REPOSITORY_BYTES_MAX: usize = 255;
/// Longest tag in bytes (same section).
const TAG_BYTES_MAX: usize = 128;

/// Names one image in one registry. Always has a tag or a digest; without either, `latest` is meant.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct ImageRef {
    registry: String,
    repository: String,
    tag: Option<Tag>,
    digest: Option<Digest>,
}

/// A tag: `[A-Za-z0-9_][A-Za-z0-9._-]{0,127}`.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub struct Tag(String);

/// Why a text names no image.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum ImageRefError {
    /// The text has nothing before the tag or digest.
    #[error("'{0}' names no repository")]
    NoRepository(String),
    /// The registry part is no `host[:port]`.
    #[error("'{0}' is no registry: expected host or host:port")]
    Registry(String),
    /// A path component breaks the grammar.
    #[error("'{0}' is no repository name: lower-case letters, digits and single separators ('.', '_', '__', '-') only")]
    Repository(String),
    /// Too long.
    #[error("repository name is {0} bytes long, at most {REPOSITORY_BYTES_MAX} are allowed")]
    TooLong(usize),
    /// The tag breaks the grammar.
    #[error("'{0}' is no tag: up to {TAG_BYTES_MAX} letters, digits, '_', '.', '-', not starting with '.' or '-'")]
    Tag(String),
    /// The digest is none.
    #[error("the digest of the reference cannot be used")]
    Digest(#[source] crate::DigestError),
}

impl ImageRef {
    /// `host[:port]` of the registry.
    pub fn registry(&self) -> &str {
        &self.registry
    }

    /// The repository in the registry, without leading slash.
    pub fn repository(&self) -> &str {
        &self.repository
    }

    /// The tag, where one was given or meant.
    pub fn tag(&self) -> Option<&Tag> {
        self.tag.as_ref()
    }

    /// The digest, where one was given; it outranks the tag.
    pub fn digest(&self) -> Option<&Digest> {
        self.digest.as_ref()
    }

    /// The same repository, pinned to `digest` and without tag.
    pub fn with_digest(&self, digest: Digest) -> Self {
        Self { tag: None, digest: Some(digest), ..self.clone() }
    }
}

impl Tag {
    /// The text.
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Debug for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Debug::fmt(&self.0, f)
    }
}

impl fmt::Display for Tag {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl FromStr for Tag {
    type Err = ImageRefError;

    fn from_str(text: &str) -> Result<Self, ImageRefError> {
        let word = |b: u8| b.is_ascii_alphanumeric() || b == b'_';
        let good = text.len() <= TAG_BYTES_MAX
            && text.bytes().next().is_some_and(word)
            && text.bytes().all(|b| word(b) || matches!(b, b'.' | b'-'));
        if good { Ok(Self(text.to_owned())) } else { Err(ImageRefError::Tag(text.to_owned())) }
    }
}

impl FromStr for ImageRef {
    type Err = ImageRefError;

    fn from_str(text: &str) -> Result<Self, ImageRefError> {
        let (rest, digest) = match text.split_once('@') {
            Some((rest, digest)) => (rest, Some(digest.parse().map_err(ImageRefError::Digest)?)),
            None => (text, None),
        };
        let last_component = rest.rfind('/').map_or(0, |slash| slash + 1);
        let (name, tag) = match rest[last_component..].find(':') {
            // `host:5000` alone is a port, not a tag; but Docker reads `name:tag`, and so do people.
            Some(colon) => (&rest[..last_component + colon], Some(rest[last_component + colon + 1..].parse()?)),
            None => (rest, None),
        };
        if name.is_empty() {
            return Err(ImageRefError::NoRepository(text.to_owned()));
        }
        let (registry, path) = match name.split_once('/') {
            Some((first, path)) if first.contains(['.', ':']) || first == "localhost" => {
                check_registry(first)?;
                (first, path.to_owned())
            }
            Some(_) => (REGISTRY_DEFAULT, name.to_owned()),
            None => (REGISTRY_DEFAULT, format!("{LIBRARY}{name}")),
        };
        if registry.len() + 1 + path.len() > REPOSITORY_BYTES_MAX {
            return Err(ImageRefError::TooLong(registry.len() + 1 + path.len()));
        }
        if path.is_empty() || !path.split('/').all(is_component) {
            return Err(ImageRefError::Repository(path));
        }
        let tag = match (&digest, tag) {
            (None, None) => Some(Tag("latest".to_owned())),
            (_, tag) => tag,
        };
        Ok(Self { registry: registry.to_owned(), repository: path, tag, digest })
    }
}

/// The full form, always with the registry.
impl fmt::Display for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.registry, self.repository)?;
        if let Some(tag) = &self.tag {
            write!(f, ":{tag}")?;
        }
        if let Some(digest) = &self.digest {
            write!(f, "@{digest}")?;
        }
        Ok(())
    }
}

impl fmt::Debug for ImageRef {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        fmt::Display::fmt(self, f)
    }
}

impl TryFrom<String> for ImageRef {
    type Error = ImageRefError;

    fn try_from(text: String) -> Result<Self, ImageRefError> {
        text.parse()
    }
}

impl From<ImageRef> for String {
    fn from(image: ImageRef) -> Self {
        image.to_string()
    }
}

/// `host`, `host:port` or `[v6]:port`.
fn check_registry(text: &str) -> Result<(), ImageRefError> {
    let wrong = || ImageRefError::Registry(text.to_owned());
    let (host, port) = match text.rfind(':') {
        Some(colon) if !text.ends_with(']') => (&text[..colon], Some(&text[colon + 1..])),
        _ => (text, None),
    };
    if let Some(port) = port {
        port.parse::<std::num::NonZeroU16>().map_err(|_| wrong())?;
    }
    if let Some(v6) = host.strip_prefix('[').and_then(|host| host.strip_suffix(']')) {
        return v6.parse::<std::net::Ipv6Addr>().map(drop).map_err(|_| wrong());
    }
    let label = |label: &str| {
        !label.is_empty()
            && !label.starts_with('-')
            && !label.ends_with('-')
            && label.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-')
    };
    if host.split('.').all(label) { Ok(()) } else { Err(wrong()) }
}

/// `[a-z0-9]+((\.|_|__|-+)[a-z0-9]+)*`
fn is_component(text: &str) -> bool {
    let word = |b: u8| b.is_ascii_lowercase() || b.is_ascii_digit();
    let bytes = text.as_bytes();
    let (Some(first), Some(last)) = (bytes.first(), bytes.last()) else { return false };
    if !word(*first) || !word(*last) {
        return false;
    }
    bytes
        .split(|b| word(*b))
        .all(|separator| matches!(separator, b"" | b"." | b"_" | b"__") || separator.iter().all(|b| *b == b'-'))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn check(text: &str, expect: &str) {
        assert_eq!(text.parse::<ImageRef>().unwrap().to_string(), expect, "{text}");
    }

    #[test]
    fn short_names_mean_what_docker_means() {
        check("nginx", "docker.io/library/nginx:latest");
        check("nginx:1.27", "docker.io/library/nginx:1.27");
        check("me/app", "docker.io/me/app:latest");
        check("localhost/app", "localhost/app:latest");
        check("127.0.0.1:5000/a/b:v1", "127.0.0.1:5000/a/b:v1");
        check("[::1]:5000/app", "[::1]:5000/app:latest");
        let digest = format!("sha256:{}", "ab".repeat(32));
        check(&format!("ghcr.io/a/b@{digest}"), &format!("ghcr.io/a/b@{digest}"));
        check(&format!("ghcr.io/a/b:v1@{digest}"), &format!("ghcr.io/a/b:v1@{digest}"));
    }

    #[test]
    fn what_is_no_reference_is_refused() {
        for bad in [
            "",
            ":tag",
            "@sha256:00",
            "UPPER",
            "a//b",
            "/a",
            "a/",
            "a:",
            "a:.b",
            "a..b",
            "a___b",
            "host:0/a",
            "host:x/a",
            "-.example/a",
            "a b",
            "a@b",
            "[::1/a",
            "a\n",
            "../etc",
        ] {
            assert!(bad.parse::<ImageRef>().is_err(), "{bad:?}");
        }
        assert!(format!("a/{}", "b".repeat(255)).parse::<ImageRef>().is_err());
        assert!(format!("a:{}", "b".repeat(129)).parse::<ImageRef>().is_err());
    }

    proptest! {
        #[test]
        fn parsing_never_panics_and_the_full_form_is_stable(text in ".{0,80}") {
            if let Ok(image) = text.parse::<ImageRef>() {
                prop_assert_eq!(image.to_string().parse::<ImageRef>().unwrap(), image);
            }
        }

        #[test]
        fn full_forms_are_stable(text in "([a-z]{1,5}(\\.[a-z]{1,4}|:[1-9][0-9]{0,3})/)?[a-z0-9]{1,5}([._-]{1,2}[a-z0-9]){0,2}(:[a-z0-9._-]{1,6})?") {
            if let Ok(image) = text.parse::<ImageRef>() {
                prop_assert_eq!(image.to_string().parse::<ImageRef>().unwrap(), image);
            }
        }
    }
}

//! What can go wrong between a name and an image that is ready to be mounted.

use std::error::Error;

use funtainer_model::{ErrorCode, Failure, ImageRef, LayerId};

use crate::client::ClientError;
use crate::erofs::{DeriveError, WriteError};
use crate::import::ImportError;
use crate::layer::LayerError;
use crate::manifest::ManifestError;
use crate::rootfs::RootfsError;
use crate::store::StoreError;

/// Why an image cannot be had.
#[derive(Debug, thiserror::Error)]
pub enum ImageError {
    /// The registry did not give it.
    #[error("{image} cannot be pulled")]
    Registry {
        /// What was asked for.
        image: ImageRef,
        /// Why.
        #[source]
        source: Box<ClientError>,
    },
    /// Its manifest or configuration cannot be used.
    #[error("{image} cannot be used")]
    Manifest {
        /// The image, or what stands for it while it has no name.
        image: String,
        /// Why.
        #[source]
        source: ManifestError,
    },
    /// One of its layers cannot be used.
    #[error("a layer of {image} cannot be used")]
    Layer {
        /// The image, or what stands for it while it has no name.
        image: String,
        /// Why.
        #[source]
        source: LayerError,
    },
    /// One of its layers cannot be put over the ones below it.
    #[error("layer {} of {image} cannot be put over the ones below it", layer.diff_id)]
    Derive {
        /// The image, or what stands for it while it has no name.
        image: String,
        /// The upper one.
        layer: LayerId,
        /// Why.
        #[source]
        source: DeriveError,
    },
    /// Layers that are stored cannot be read.
    #[error("the stored layers of {image} cannot be read")]
    Rootfs {
        /// The image.
        image: String,
        /// Why.
        #[source]
        source: RootfsError,
    },
    /// The archive that should bring it cannot be used.
    #[error("the archive cannot be imported")]
    Import(#[source] ImportError),
    /// The local store fails.
    #[error("the image store fails")]
    Store(#[source] StoreError),
}

impl ImageError {
    /// The failure as a user meets it.
    pub fn failure(&self) -> Failure {
        match self {
            Self::Registry { image, source } => source.failure(image),
            Self::Manifest { image, source } => source.failure(image),
            Self::Layer { image, source } => {
                let failure = source.failure();
                Failure { detail: format!("{image}: {}", failure.detail), ..failure }
            }
            Self::Derive { source, .. } => {
                let code = match source {
                    DeriveError::TooManyLinks | DeriveError::Reason(_) | DeriveError::Write(WriteError::Layer(_)) => {
                        ErrorCode::ImageUnsupported
                    }
                    _ => ErrorCode::Internal,
                };
                Failure::new(code, chain(self))
            }
            Self::Rootfs { image, source } => {
                Failure::new(ErrorCode::Internal, format!("{image}: stored layers cannot be read: {}", chain(source)))
            }
            Self::Import(source) => source.failure(),
            Self::Store(source) => Failure::new(ErrorCode::Internal, format!("image store: {}", chain(source))),
        }
    }

    /// Whether the same pull may well succeed a little later.
    pub(crate) fn is_transient(&self) -> bool {
        matches!(self, Self::Registry { source, .. } if source.is_transient())
    }
}

/// Says of what the registry's failure kept us.
pub(crate) fn registry_failed(image: &ImageRef) -> impl Fn(ClientError) -> ImageError {
    |source| ImageError::Registry { image: image.clone(), source: source.into() }
}

impl From<StoreError> for ImageError {
    fn from(source: StoreError) -> Self {
        Self::Store(source)
    }
}

impl From<ImportError> for ImageError {
    fn from(source: ImportError) -> Self {
        Self::Import(source)
    }
}

/// Layers of the HTTP client between an error and what happened; they tell a user nothing.
const LAYERS_OF_THE_CLIENT: [&str; 5] =
    ["error sending request", "client error (Connect)", "tcp connect error", "dns error", "error resolving DNS"];
/// How the resolver begins where a name has no address; what follows is its query in Rust's notation.
const NO_ADDRESS: &str = "no records found for Query";

/// An error with its causes in one line. A cause that its effect already names is not said twice.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        // Some layers repeat their cause.
        let mut told = more.as_str();
        while let Some(rest) = LAYERS_OF_THE_CLIENT.iter().find_map(|layer| told.strip_prefix(layer)) {
            told = rest.strip_prefix(": ").unwrap_or(rest);
        }
        told = told.strip_prefix("DNS error: ").unwrap_or(told);
        if told.starts_with(NO_ADDRESS) {
            told = "the name has no address (DNS)";
        }
        if !told.is_empty() && !text.ends_with(told) {
            text = format!("{text}: {told}");
        }
        cause = error.source();
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Debug, thiserror::Error)]
    #[error("{0}")]
    struct Link(&'static str, #[source] Option<Box<Link>>);

    fn chained(texts: &[&'static str]) -> String {
        let links = texts.iter().rev().fold(None, |cause, text| Some(Box::new(Link(text, cause))));
        chain(&*links.unwrap())
    }

    #[test]
    fn causes_are_told_once_and_layers_not_at_all() {
        assert_eq!(chained(&["a", "b", "b"]), "a: b");
        assert_eq!(
            chained(&[
                "x cannot be reached",
                "error sending request",
                "client error (Connect)",
                "tcp connect error",
                "refused"
            ]),
            "x cannot be reached: refused"
        );
        assert_eq!(
            chained(&[
                "x cannot be reached",
                "client error (Connect)",
                "dns error",
                "error resolving DNS: DNS error: no records found for Query { name: 1 }",
                "DNS error: no records found for Query { name: 1 }",
            ]),
            "x cannot be reached: the name has no address (DNS)"
        );
    }
}

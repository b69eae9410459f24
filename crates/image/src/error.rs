//! What can go wrong between a name and an image that is ready to be mounted.

use std::error::Error;

use funtainer_model::{ErrorCode, Failure, ImageRef};

use crate::client::ClientError;
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

/// An error with its causes in one line. A cause that its effect already names is not said twice.
pub(crate) fn chain(error: &dyn Error) -> String {
    let mut text = error.to_string();
    let mut cause = error.source();
    while let Some(error) = cause {
        let more = error.to_string();
        if !text.ends_with(&more) {
            text = format!("{text}: {more}");
        }
        cause = error.source();
    }
    text
}

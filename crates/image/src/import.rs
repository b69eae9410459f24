//! Images from archives: an OCI image layout (OCI image specification, "Image Layout") or what `docker save` writes, as a tar,
//! plain or gzipped.
//!
//! The stream is first spooled into `tmp`, since an archive may name its content after it: each file that an image can need
//! becomes a file with a number for a name, so nothing in the archive chooses a path. Then the images are planned from
//! its index, their layers are written as a pull would write them, and at last they get their names. An import therefore needs
//! room for the archive and for its layers.

mod plan;
mod spool;

use std::io::{self, BufReader};
use std::path::PathBuf;

use bytes::Bytes;
use funtainer_model::{Digest, ErrorCode, Failure, ImageRef, ImageRefError, LayerId};
use futures_util::{Stream, StreamExt};

use self::plan::{Plan, PlannedImage};
use self::spool::Spool;
use crate::error::ImageError;
use crate::pipe::{PipeSender, pipe};
use crate::pull::{OnProgress, Progress};
use crate::store::{Image, ImageStore, StoreError};
use crate::tar::TarError;

/// Bytes of a layer that are read from its file at once.
const CHUNK_BYTES: usize = 64 << 10;
/// Most names that an error lists.
const NAMES_SHOWN_MAX: usize = 8;

/// Why an archive cannot be imported.
#[derive(Debug, thiserror::Error)]
pub enum ImportError {
    /// The stream broke.
    #[error("the archive did not arrive as a whole")]
    Read(#[source] io::Error),
    /// Not a tar, or a damaged one.
    #[error("the archive cannot be read as tar or gzipped tar")]
    Tar(#[source] TarError),
    /// Packed in a way that is not read.
    #[error("the archive is compressed with {0}")]
    Compression(&'static str),
    /// Over a named limit.
    #[error("{what} exceeds {max}")]
    TooLarge {
        /// Which size or number.
        what: &'static str,
        /// The limit.
        max: u64,
    },
    /// Another kind of archive.
    #[error(
        "the archive is neither an OCI image layout, which has oci-layout and index.json, nor from `docker save`, which has manifest.json"
    )]
    NoLayout,
    /// A layout of another version.
    #[error("oci-layout says version '{0}', expected 1.0.0")]
    LayoutVersion(String),
    /// Something is named but not there.
    #[error("{wanted_by} names {file}, which is not in the archive")]
    Missing {
        /// Path in the archive.
        file: String,
        /// Which file names it.
        wanted_by: String,
    },
    /// A file is not the JSON that it should be.
    #[error("{file} is not valid JSON of its format")]
    Json {
        /// Path in the archive.
        file: String,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// A file has other content than its name says.
    #[error("{file} does not have the content that its name says: it is {actual}")]
    Digest {
        /// Path in the archive.
        file: String,
        /// Of its content.
        actual: Digest,
    },
    /// Nothing to import.
    #[error("{0} lists no images")]
    Empty(&'static str),
    /// There is no full name for an image.
    #[error("the archive gives its image no full name{}", .found.as_ref().map_or_else(String::new, |tag| format!(", only the tag '{tag}'")))]
    NoName {
        /// What it has instead.
        found: Option<String>,
    },
    /// The name is none.
    #[error("the archive gives its image a name that cannot be used")]
    Name(#[source] ImageRefError),
    /// One name for many images.
    #[error("the archive has several images ({0}), which cannot all have the one name")]
    Several(String),
}

impl ImportError {
    /// The failure as a user meets it.
    pub fn failure(&self) -> Failure {
        let code = match self {
            Self::Read(_) => ErrorCode::BadRequest,
            Self::Compression(_) => ErrorCode::ImageUnsupported,
            Self::NoName { .. } | Self::Name(_) | Self::Several(_) => ErrorCode::BadImageReference,
            _ => ErrorCode::ImageInvalid,
        };
        let failure = Failure::new(code, crate::error::chain(self));
        match self {
            Self::Read(_) => failure.with_hint("send the archive again"),
            Self::Tar(_) | Self::NoLayout | Self::LayoutVersion(_) => {
                failure.with_hint("make one with `skopeo copy docker://REF oci-archive:FILE:NAME` or `docker save`")
            }
            Self::Compression(_) => failure.with_hint("unpack the archive, or pack it with gzip"),
            Self::NoName { .. } | Self::Name(_) => failure.with_hint("give the image a name with --name"),
            Self::Several(_) => failure.with_hint("leave --name out, or make an archive with one image"),
            _ => failure,
        }
    }
}

impl ImageStore {
    /// Imports every image of an archive, whose bytes come in pieces of any size, and gives it the names that the archive has, or `name` instead. Nothing has a name
    /// before its image is complete. Dropping the future ends it and leaves nothing half-made.
    pub async fn import(
        &self,
        archive: impl Stream<Item = io::Result<Bytes>> + Send,
        name: Option<&ImageRef>,
        progress: OnProgress<'_>,
    ) -> Result<Vec<Image>, ImageError> {
        let spool = self.spool(archive).await?;
        let (platform, name) = (self.platform.clone(), name.cloned());
        let planning = tokio::task::spawn_blocking(move || Plan::make(spool, &platform, name.as_ref()));
        let plan = planning.await.map_err(StoreError::Thread)??;
        let mut images = Vec::new();
        for planned in &plan.images {
            images.extend(self.import_one(planned, progress).await?);
        }
        // Large files take long to delete.
        tokio::task::spawn_blocking(move || drop(plan)).await.map_err(StoreError::Thread)?;
        Ok(images)
    }

    /// Receives the stream and takes it apart at the same time.
    async fn spool(&self, archive: impl Stream<Item = io::Result<Bytes>> + Send) -> Result<Spool, ImageError> {
        let (sender, reader) = pipe();
        let tmp = self.disk.tmp().to_owned();
        let unpacking = tokio::task::spawn_blocking(move || Spool::unpack(reader, &tmp));
        let (received, unpacked) = futures_util::join!(receive(archive, sender), unpacking);
        let unpacked = unpacked.map_err(StoreError::Thread)?;
        received.map_err(ImportError::Read)?;
        unpacked
    }

    async fn import_one(&self, planned: &PlannedImage, progress: OnProgress<'_>) -> Result<Vec<Image>, ImageError> {
        let found = &planned.found;
        progress(Progress::Resolved { digest: found.digest });
        for (layer, at) in found.layers() {
            self.import_layer(planned, layer, at, progress).await?;
        }
        self.derive_layers(planned.label(), found).await?;
        self.write_blob(found.manifest.config.digest, planned.config.clone()).await?;
        self.write_blob(found.digest, planned.document.clone()).await?;
        let mut images = Vec::new();
        for name in &planned.names {
            let _flight = self.image_flights.enter(name.clone()).await;
            let image = self.complete(name, found).await?;
            self.set_name(name, found.digest, true).await?;
            images.push(image);
        }
        Ok(images)
    }

    async fn import_layer(
        &self,
        planned: &PlannedImage,
        layer: LayerId,
        at: usize,
        progress: OnProgress<'_>,
    ) -> Result<(), ImageError> {
        let blob = planned.found.manifest.layers[at];
        let (digest, total) = (blob.digest, blob.size);
        let _flight = self.layer_flights.enter(layer).await;
        if self.has_layer(layer).await? {
            progress(Progress::LayerPresent { layer: digest, total });
            return Ok(());
        }
        let _slot = self.layer_slots.acquire().await.expect("the semaphore is never closed");
        let path: PathBuf = planned.layer_files[at].clone();
        let file = std::fs::File::open(&path).map_err(|source| StoreError::io("open", &path, source))?;
        let finished = self.write_layer(planned.label(), layer, blob, BufReader::with_capacity(CHUNK_BYTES, file)).await?;
        self.commit(layer, finished).await?;
        progress(Progress::LayerStored { layer: digest, total });
        Ok(())
    }
}

/// Moves the stream into the pipe until its end, or until the reader has seen enough.
async fn receive(archive: impl Stream<Item = io::Result<Bytes>>, sender: PipeSender) -> io::Result<()> {
    let mut archive = std::pin::pin!(archive);
    while let Some(chunk) = archive.next().await {
        if sender.send(chunk?).await.is_err() {
            return Ok(());
        }
    }
    let _ = sender.finish().await;
    Ok(())
}

/// A few names for people.
fn listed(names: impl IntoIterator<Item = String>) -> String {
    let mut names: Vec<String> = names.into_iter().collect();
    let more = names.len().saturating_sub(NAMES_SHOWN_MAX);
    names.truncate(NAMES_SHOWN_MAX);
    let text = names.join(", ");
    if more > 0 { format!("{text} and {more} more") } else { text }
}

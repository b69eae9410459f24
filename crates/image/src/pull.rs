//! From a name to an image that is here as a whole.

use std::fs::File;
use std::sync::PoisonError;
use std::time::Duration;

use funtainer_model::{Digest, ImageRef, LayerId};
use futures_util::{StreamExt, TryStreamExt, stream};
use tempfile::{NamedTempFile, TempPath};

use crate::client::{Blob, ClientError, RawDocument};
use crate::erofs;
use crate::error::{ImageError, registry_failed};
use crate::hash::sha256;
use crate::layer::{self, LayerBlob};
use crate::manifest::{Descriptor, Document, INDEX_DEPTH_MAX, Manifest, ManifestError};
use crate::names::NameRecord;
use crate::pipe::{PipeSender, ReaderGone, pipe};
use crate::rootfs::Rootfs;
use crate::store::{self, Disk, Found, Image, ImageStore, StoreError};

/// How often one layer is fetched at most when its connection breaks.
const LAYER_ATTEMPTS_MAX: u32 = 3;
/// Pause before a layer is fetched again.
const LAYER_PAUSE: Duration = Duration::from_millis(500);
/// A layer tells of its progress at its beginning, its end, and each time so many bytes came.
const PROGRESS_STEP_BYTES: u64 = 1 << 20;

/// Most layers that are noted to fit over what lies below them: a note saves another look, nothing else.
const FITTING_MAX: usize = 4096;

/// Whether a registry is asked.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum PullPolicy {
    /// A name that was imported means what was imported; any other tag is resolved now. For deploys.
    PreferImported,
    /// The registry is asked, and its answer replaces what was imported. For an explicit pull.
    FromRegistry,
    /// A name that is in the store means what it means there; only another one is resolved. For a single run.
    IfMissing,
}

/// What a pull tells while it runs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Progress {
    /// The name was resolved to this manifest; layers come next.
    Resolved {
        /// Of the manifest for this machine's platform.
        digest: Digest,
    },
    /// The layer is here already.
    LayerPresent {
        /// As it is transferred.
        layer: Digest,
        /// Its bytes as they would have been transferred.
        total: u64,
    },
    /// Some of the layer came.
    LayerReceived {
        /// As it is transferred.
        layer: Digest,
        /// Bytes so far.
        received: u64,
        /// Bytes in all.
        total: u64,
    },
    /// The layer came, was verified and is in its place.
    LayerStored {
        /// As it is transferred.
        layer: Digest,
        /// Bytes in all.
        total: u64,
    },
}

/// Who is told.
pub type OnProgress<'a> = &'a (dyn Fn(Progress) + Send + Sync);

impl ImageStore {
    /// The digest of the manifest that `image` means on this machine's platform. Layers are not fetched.
    pub async fn resolve(&self, image: &ImageRef, policy: PullPolicy) -> Result<Digest, ImageError> {
        Ok(self.find(image, policy).await?.digest)
    }

    /// Makes the image complete and gives its name to it. Layers that are here are not fetched, and a second pull of the
    /// same image or layer waits for the first. Dropping the future ends the transfer and leaves nothing half-made.
    pub async fn pull(&self, image: &ImageRef, policy: PullPolicy, progress: OnProgress<'_>) -> Result<Image, ImageError> {
        let _flight = self.image_flights.enter(image.clone()).await;
        let found = self.find(image, policy).await?;
        progress(Progress::Resolved { digest: found.digest });
        let layers = found.layers();
        // All may wait for a slot: how many are fetched at once is a matter of the whole store.
        let mut fetches = Vec::with_capacity(layers.len());
        for (layer, at) in &layers {
            fetches.push(self.ensure_layer(image, *layer, &found.manifest.layers[*at], progress));
        }
        stream::iter(fetches).buffer_unordered(layers.len()).try_collect::<Vec<()>>().await?;
        self.derive_layers(image, &found).await?;
        let complete = self.complete(image, &found).await?;
        let imported = self.stored_name(image, policy).is_some_and(|name| name.imported);
        self.set_name(image, found.digest, imported).await?;
        Ok(complete)
    }

    /// What the name means without a registry, as far as the policy lets that count.
    fn stored_name(&self, image: &ImageRef, policy: PullPolicy) -> Option<NameRecord> {
        self.name(image).filter(|name| match policy {
            PullPolicy::PreferImported => name.imported,
            PullPolicy::FromRegistry => false,
            PullPolicy::IfMissing => true,
        })
    }

    /// Manifest and configuration of what `image` means, from the disk where they are there.
    async fn find(&self, image: &ImageRef, policy: PullPolicy) -> Result<Found, ImageError> {
        if let Some(name) = self.stored_name(image, policy)
            && let Some(found) = self.find_local(image, name.digest).await?
        {
            return Ok(found);
        }
        let failed = registry_failed(image);
        let wrong = |source| ImageError::Manifest { image: image.to_string(), source };
        let resolved = self.registry.resolve(image).await.map_err(&failed)?;
        let (mut digest, mut at_hand) = (resolved.digest, resolved.document);
        for _ in 0..=INDEX_DEPTH_MAX {
            match self.document(image, digest, at_hand.take()).await? {
                Document::Manifest(manifest) => {
                    let config = self.config(image, &manifest).await?;
                    let config = manifest.parse_config(&config, &self.platform).map_err(wrong)?;
                    return Ok(Found { digest, manifest, config });
                }
                Document::Index(index) => digest = index.choose(&self.platform).map_err(wrong)?.descriptor.digest,
            }
        }
        Err(wrong(ManifestError::TooLarge {
            what: "the number of nested indexes",
            actual: INDEX_DEPTH_MAX as u64 + 1,
            max: INDEX_DEPTH_MAX as u64,
        }))
    }

    /// The document with `digest`: from the disk, from `at_hand` (verified), or from the registry. Kept once it is understood.
    async fn document(&self, image: &ImageRef, digest: Digest, at_hand: Option<RawDocument>) -> Result<Document, ImageError> {
        let wrong = |source| ImageError::Manifest { image: image.to_string(), source };
        if let Some(bytes) = self.read_blob(digest).await? {
            return Document::parse(&bytes, None).map_err(wrong);
        }
        let raw = match at_hand {
            Some(raw) => raw,
            None => self.registry.manifest(image, &digest).await.map_err(registry_failed(image))?,
        };
        let document = Document::parse(&raw.bytes, raw.content_type.as_deref()).map_err(wrong)?;
        self.write_blob(digest, raw.bytes).await?;
        Ok(document)
    }

    async fn config(&self, image: &ImageRef, manifest: &Manifest) -> Result<bytes::Bytes, ImageError> {
        let failed = registry_failed(image);
        let expected = manifest.config.digest;
        if let Some(bytes) = self.read_blob(expected).await? {
            return Ok(bytes);
        }
        let blob = self.registry.blob(image, &manifest.config).await.map_err(&failed)?;
        let bytes = blob.bytes().await.map_err(&failed)?;
        let actual = sha256(&bytes);
        if actual != expected {
            return Err(failed(ClientError::Digest { registry: image.registry().to_owned(), expected, actual }));
        }
        self.write_blob(expected, bytes.clone()).await?;
        Ok(bytes)
    }

    async fn ensure_layer(
        &self,
        image: &ImageRef,
        layer: LayerId,
        blob: &LayerBlob,
        progress: OnProgress<'_>,
    ) -> Result<(), ImageError> {
        let (digest, total) = (blob.digest, blob.size);
        // Who holds a slot waits for no flight, so flights and slots cannot wait for each other.
        let _flight = self.layer_flights.enter(layer).await;
        if self.has_layer(layer).await? {
            progress(Progress::LayerPresent { layer: digest, total });
            return Ok(());
        }
        let _slot = self.layer_slots.acquire().await.expect("the semaphore is never closed");
        for attempt in 1.. {
            match self.fetch_layer(image, layer, blob, progress).await {
                Err(error) if error.is_transient() && attempt < LAYER_ATTEMPTS_MAX => {
                    tracing::debug!(%image, %digest, attempt, error = crate::error::chain(&error), "fetching a layer again");
                    tokio::time::sleep(LAYER_PAUSE).await;
                }
                Err(error) => return Err(error),
                Ok(()) => break,
            }
        }
        progress(Progress::LayerStored { layer: digest, total });
        Ok(())
    }

    async fn fetch_layer(
        &self,
        image: &ImageRef,
        layer: LayerId,
        blob: &LayerBlob,
        progress: OnProgress<'_>,
    ) -> Result<(), ImageError> {
        let failed = registry_failed(image);
        let body = self.registry.blob(image, &Descriptor { digest: blob.digest, size: blob.size }).await.map_err(&failed)?;
        let (sender, reader) = pipe();
        let writing = self.write_layer(image.to_string(), layer, *blob, reader);
        // Both sides run to their end whatever the other does, so that no thread still writes when this returns.
        let (pumped, written) = futures_util::join!(pump(body, sender, blob, progress), writing);
        pumped.map_err(&failed)?;
        self.commit(layer, written?).await
    }

    /// Unpacks a layer from `reader` into a new file in `tmp`, on a thread of its own.
    pub(crate) async fn write_layer(
        &self,
        image: String,
        layer: LayerId,
        blob: LayerBlob,
        reader: impl std::io::Read + Send + 'static,
    ) -> Result<FinishedLayer, ImageError> {
        let tmp = self.disk.tmp().to_owned();
        let written = tokio::task::spawn_blocking(move || {
            let io = |source| StoreError::io("write a layer below", &tmp, source);
            let file = NamedTempFile::new_in(&tmp).map_err(io)?;
            layer::write(reader, &blob, layer, file.as_file()).map_err(|source| ImageError::Layer { image, source })?;
            let readable = File::open(file.path()).map_err(io)?;
            // The writing descriptor is closed here: the committer may insist that there is none.
            Ok(FinishedLayer { path: file.into_temp_path(), readable })
        });
        written.await.map_err(|error| ImageError::Store(StoreError::Thread(error)))?
    }

    /// Makes the forms of an image's layers that the ones below them ask for, where those differ from what is there. All layers are here.
    pub(crate) async fn derive_layers(&self, image: impl ToString, found: &Found) -> Result<(), ImageError> {
        let mut chain: Vec<LayerId> = Vec::new();
        for (layer, _) in found.layers() {
            let form = if layer.base { layer } else { self.derive_layer(image.to_string(), layer, &chain).await? };
            chain.push(form);
        }
        Ok(())
    }

    /// The form of `layer` to use over `below`; made if it is not there.
    async fn derive_layer(&self, image: String, layer: LayerId, below: &[LayerId]) -> Result<LayerId, ImageError> {
        let form = store::derived(layer, below);
        let _flight = self.layer_flights.enter(form).await;
        if self.fitting.lock().unwrap_or_else(PoisonError::into_inner).contains(&form) {
            return Ok(layer);
        }
        if self.has_layer(form).await? {
            return Ok(form);
        }
        let (disk, below) = (self.disk.clone(), below.to_vec());
        let derived = tokio::task::spawn_blocking(move || derive(&disk, &image, layer, &below));
        if let Some(finished) = derived.await.map_err(|error| ImageError::Store(StoreError::Thread(error)))?? {
            self.commit(form, finished).await?;
            return Ok(form);
        }
        let mut fitting = self.fitting.lock().unwrap_or_else(PoisonError::into_inner);
        if fitting.len() >= FITTING_MAX {
            fitting.clear();
        }
        fitting.insert(form);
        Ok(layer)
    }

    pub(crate) async fn commit(&self, layer: LayerId, finished: FinishedLayer) -> Result<(), ImageError> {
        let FinishedLayer { path, readable } = finished;
        let committed = self.committer.commit(layer, readable).await;
        drop(path);
        committed.map_err(|source| StoreError::Commit { layer, source }.into())
    }
}

/// A layer that is written and on disk. Its name in `tmp` goes away with it.
pub(crate) struct FinishedLayer {
    path: TempPath,
    readable: File,
}

/// The other form of a layer in a new file in `tmp`; none where the layer fits over `below` as it is.
fn derive(disk: &Disk, image: &str, layer: LayerId, below: &[LayerId]) -> Result<Option<FinishedLayer>, ImageError> {
    let wrong = |source| ImageError::Derive { image: image.to_owned(), layer, source };
    let file = disk.open_layers(&[layer])?.pop().expect("as many files as layers");
    let reader = erofs::Reader::new(file).map_err(|error| wrong(error.into()))?;
    if !reader.superblock().implied {
        return Ok(None);
    }
    let below = Rootfs::new(disk.open_layers(below)?).map_err(|error| wrong(error.into()))?;
    let io = |source| ImageError::Store(StoreError::io("write a layer below", disk.tmp(), source));
    let out = NamedTempFile::new_in(disk.tmp()).map_err(io)?;
    if !erofs::derive(&reader, &below, out.as_file()).map_err(wrong)? {
        return Ok(None);
    }
    out.as_file().sync_all().map_err(io)?;
    let readable = File::open(out.path()).map_err(io)?;
    Ok(Some(FinishedLayer { path: out.into_temp_path(), readable }))
}

/// Moves a blob into the pipe. A reader that gave up has its own error to tell.
async fn pump(mut body: Blob, sender: PipeSender, blob: &LayerBlob, progress: OnProgress<'_>) -> Result<(), ClientError> {
    let (layer, total) = (blob.digest, blob.size);
    let (mut received, mut told) = (0, 0);
    while let Some(chunk) = body.chunk().await? {
        received += chunk.len() as u64;
        if told == 0 || received - told >= PROGRESS_STEP_BYTES || received == total {
            told = received;
            progress(Progress::LayerReceived { layer, received, total });
        }
        let Ok(()) = sender.send(chunk).await else { return Ok(()) };
    }
    let (Ok(()) | Err(ReaderGone)) = sender.finish().await;
    Ok(())
}

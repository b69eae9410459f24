//! The content store: one directory, everything in it named by what it holds.
//!
//! ```text
//! DIR/blobs/sha256/HEX    manifests, indexes and configurations, verified
//! DIR/layers/NAME         layers as file systems (LayerId::file_name); only the committer writes here. Where the layers below ask for
//!                         another form of a layer (erofs::derive), that one lies beside it, named by all of them
//! DIR/names.json          which name means which manifest
//! DIR/tmp/                what is being written; swept when the store is opened
//! ```
//!
//! Content gets its name only after its digest was verified and its bytes are on disk, so a file that has a name is
//! whole. A crash leaves files in `tmp` at most. One store is used by one process at a time: who opens it holds the lock of
//! the data directory.

use std::collections::HashSet;
use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex};

use bytes::Bytes;
use funtainer_model::{Digest, ImageConfig, ImageRef, LayerId};
use futures_util::future::BoxFuture;
use tokio::sync::Semaphore;

use crate::client::RegistryClient;
use crate::error::ImageError;
use crate::flight::Flights;
use crate::hash::sha256;
use crate::manifest::{CONFIG_BYTES_MAX, Document, Manifest, ParsedConfig, Platform};
use crate::names::{NameRecord, Names};
use crate::rootfs::Rootfs;

/// Layers that are fetched and written at once, over all pulls: each one hashes and unpacks on a thread of its own.
const LAYERS_AT_ONCE: usize = 3;

/// Puts finished layers where instances are made from.
///
/// The place belongs to who has privilege, so that a process that reads foreign bytes cannot change what is mounted later.
pub trait CommitLayer: Send + Sync {
    /// Makes `finished` the file of `layer` (its [`LayerId::file_name`]), read-only and durable. The descriptor is open for
    /// reading, nobody has the file open for writing, and its bytes are on disk. A layer that is there already is a success.
    fn commit(&self, layer: LayerId, finished: File) -> BoxFuture<'_, io::Result<()>>;
}

/// An image that is here as a whole.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Image {
    /// The name it was asked for by.
    pub reference: ImageRef,
    /// Digest of the manifest for this machine's platform.
    pub digest: Digest,
    /// What a start depends on.
    pub config: ImageConfig,
    /// Its layers from the bottom up, none twice, the first in its base form.
    pub layers: Vec<LayerId>,
    /// Bytes of its layers on disk; layers are shared between images.
    pub size: u64,
}

/// A name in the store.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct NamedImage {
    /// The full name.
    pub reference: ImageRef,
    /// What it means, and since when.
    pub record: NameRecord,
    /// Bytes of its layers on disk; none while a part of it is missing.
    pub size: Option<u64>,
}

/// The images of this machine.
pub struct ImageStore {
    pub(crate) disk: Disk,
    pub(crate) committer: Arc<dyn CommitLayer>,
    pub(crate) registry: RegistryClient,
    pub(crate) platform: Platform,
    pub(crate) image_flights: Flights<ImageRef>,
    pub(crate) layer_flights: Flights<LayerId>,
    pub(crate) layer_slots: Semaphore,
    names: Arc<Names>,
    /// Layers with implied directories that fit what lies below as they are, by the names that their other forms would have.
    pub(crate) fitting: Mutex<HashSet<LayerId>>,
}

/// The directories of a store. Its functions block on the disk.
#[derive(Debug, Clone)]
pub(crate) struct Disk {
    blobs: PathBuf,
    layers: PathBuf,
    tmp: PathBuf,
}

/// A manifest with its configuration.
#[derive(Debug)]
pub(crate) struct Found {
    pub(crate) digest: Digest,
    pub(crate) manifest: Manifest,
    pub(crate) config: ParsedConfig,
}

/// Why the store itself fails.
#[derive(Debug, thiserror::Error)]
pub enum StoreError {
    /// The disk or its permissions.
    #[error("cannot {action} {}", path.display())]
    Io {
        /// What was tried.
        action: &'static str,
        /// On what.
        path: PathBuf,
        /// Why it failed.
        #[source]
        source: io::Error,
    },
    /// The file of names is damaged.
    #[error("{} is damaged: move it away, and import again what was imported", path.display())]
    Names {
        /// The file.
        path: PathBuf,
        /// Where it is damaged.
        #[source]
        source: serde_json::Error,
    },
    /// The file of names was written by a program of another version.
    #[error("{} has version {version}, which this program does not know", path.display())]
    Version {
        /// The file.
        path: PathBuf,
        /// Its version.
        version: u32,
    },
    /// Over a named limit.
    #[error("there are {max} image names already, no more are kept")]
    TooManyNames {
        /// The limit.
        max: usize,
    },
    /// The layer could not be put in its place.
    #[error("layer {} cannot be committed", layer.file_name())]
    Commit {
        /// Which layer.
        layer: LayerId,
        /// Why.
        #[source]
        source: io::Error,
    },
    /// A layer that was here a moment ago is not any more.
    #[error("layers of {0} were removed meanwhile")]
    Vanished(ImageRef),
    /// A thread of the store panicked.
    #[error("a thread of the image store failed")]
    Thread(#[source] tokio::task::JoinError),
}

impl ImageStore {
    /// Opens the store in `dir` and removes what a crash left in `tmp`. Missing directories are made; `layers` is only made
    /// where it does not exist, since it usually belongs to the committer. Blocks on the disk.
    pub fn open(dir: &Path, committer: Arc<dyn CommitLayer>) -> Result<Self, StoreError> {
        let disk = Disk { blobs: dir.join("blobs/sha256"), layers: dir.join("layers"), tmp: dir.join("tmp") };
        for path in [&disk.blobs, &disk.layers, &disk.tmp] {
            fs::create_dir_all(path).map_err(|source| StoreError::io("create", path, source))?;
        }
        disk.sweep()?;
        let names = Names::open(dir.join("names.json"))?;
        Ok(Self {
            disk,
            committer,
            registry: RegistryClient::new(),
            platform: Platform::native(),
            image_flights: Flights::default(),
            layer_flights: Flights::default(),
            layer_slots: Semaphore::new(LAYERS_AT_ONCE),
            names: Arc::new(names),
            fitting: Mutex::default(),
        })
    }

    /// The image with the manifest `digest`, if every part of it is here. Asks no registry. `reference` is only carried along.
    pub async fn get(&self, reference: &ImageRef, digest: Digest) -> Result<Option<Image>, ImageError> {
        match self.find_local(reference, digest).await? {
            Some(found) => Ok(self.image(reference, &found).await?),
            None => Ok(None),
        }
    }

    /// Every name that was pulled or imported, in the order of the names.
    pub async fn images(&self) -> Result<Vec<NamedImage>, ImageError> {
        let all = self.names.all();
        let mut images = Vec::with_capacity(all.len());
        for (reference, record) in all {
            let size = self.get(&reference, record.digest).await.ok().flatten().map(|image| image.size);
            images.push(NamedImage { reference, record, size });
        }
        Ok(images)
    }

    /// The files of an image, read from its layers without a mount. Blocks on the disk.
    pub fn rootfs(&self, image: &Image) -> Result<Rootfs, ImageError> {
        let files = self.disk.open_layers(&image.layers)?;
        Rootfs::new(files).map_err(|source| ImageError::Rootfs { image: image.reference.to_string(), source })
    }

    /// What the store knows of `name`.
    pub(crate) fn name(&self, name: &ImageRef) -> Option<NameRecord> {
        self.names.get(name)
    }

    pub(crate) async fn set_name(&self, name: &ImageRef, digest: Digest, imported: bool) -> Result<(), StoreError> {
        let (names, name, tmp) = (Arc::clone(&self.names), name.clone(), self.disk.tmp.clone());
        blocking(move || names.set(&name, digest, imported, &tmp)).await
    }

    /// Manifest and configuration from the disk alone; none if one is missing or damaged.
    pub(crate) async fn find_local(&self, reference: &ImageRef, digest: Digest) -> Result<Option<Found>, ImageError> {
        let wrong = |source| ImageError::Manifest { image: reference.to_string(), source };
        let Some(bytes) = self.read_blob(digest).await? else { return Ok(None) };
        let Document::Manifest(manifest) = Document::parse(&bytes, None).map_err(wrong)? else { return Ok(None) };
        let Some(bytes) = self.read_blob(manifest.config.digest).await? else { return Ok(None) };
        let config = manifest.parse_config(&bytes, &self.platform).map_err(wrong)?;
        Ok(Some(Found { digest, manifest, config }))
    }

    /// The image if all of its layers are here.
    pub(crate) async fn image(&self, reference: &ImageRef, found: &Found) -> Result<Option<Image>, StoreError> {
        let wanted: Vec<LayerId> = found.layers().into_iter().map(|(layer, _)| layer).collect();
        let disk = self.disk.clone();
        let Some((layers, size)) = blocking(move || disk.chain(&wanted)).await? else { return Ok(None) };
        Ok(Some(Image {
            reference: reference.clone(),
            digest: found.digest,
            config: found.config.config.clone(),
            layers,
            size,
        }))
    }

    /// The image whose layers were all made sure of just now.
    pub(crate) async fn complete(&self, reference: &ImageRef, found: &Found) -> Result<Image, StoreError> {
        self.image(reference, found).await?.ok_or_else(|| StoreError::Vanished(reference.clone()))
    }

    pub(crate) async fn read_blob(&self, digest: Digest) -> Result<Option<Bytes>, StoreError> {
        let disk = self.disk.clone();
        blocking(move || disk.read_blob(digest)).await
    }

    /// Keeps bytes that hash to `digest`.
    pub(crate) async fn write_blob(&self, digest: Digest, bytes: Bytes) -> Result<(), StoreError> {
        let disk = self.disk.clone();
        blocking(move || replace_file(&disk.blob(digest), &disk.tmp, &bytes)).await
    }

    pub(crate) async fn has_layer(&self, layer: LayerId) -> Result<bool, StoreError> {
        let disk = self.disk.clone();
        blocking(move || disk.layer_size(layer)).await.map(|size| size.is_some())
    }
}

impl Found {
    /// The layers to mount from the bottom up, each with its place in the manifest. Of a layer that occurs twice only the upper
    /// occurrence counts: whatever the lower one shows or hides, the upper one shows or hides as well.
    pub(crate) fn layers(&self) -> Vec<(LayerId, usize)> {
        let diff_ids = &self.config.diff_ids;
        let last = diff_ids.iter().enumerate().filter(|(at, id)| !diff_ids[at + 1..].contains(id));
        last.enumerate().map(|(order, (at, id))| (LayerId { diff_id: *id, base: order == 0 }, at)).collect()
    }
}

impl Disk {
    pub(crate) fn tmp(&self) -> &Path {
        &self.tmp
    }

    fn blob(&self, digest: Digest) -> PathBuf {
        self.blobs.join(digest.hex())
    }

    /// A blob whose bytes still have its digest; a damaged one counts as missing, and is then fetched again.
    fn read_blob(&self, digest: Digest) -> Result<Option<Bytes>, StoreError> {
        let path = self.blob(digest);
        let file = match File::open(&path) {
            Ok(file) => file,
            Err(error) if error.kind() == io::ErrorKind::NotFound => return Ok(None),
            Err(source) => return Err(StoreError::io("open", &path, source)),
        };
        let mut bytes = Vec::new();
        file.take(CONFIG_BYTES_MAX + 1).read_to_end(&mut bytes).map_err(|source| StoreError::io("read", &path, source))?;
        if sha256(&bytes) != digest {
            tracing::warn!(path = %path.display(), "a stored blob is damaged and will be fetched again");
            return Ok(None);
        }
        Ok(Some(bytes.into()))
    }

    fn layer_size(&self, layer: LayerId) -> Result<Option<u64>, StoreError> {
        let path = self.layers.join(layer.file_name());
        match fs::symlink_metadata(&path) {
            Ok(metadata) => Ok(Some(metadata.len())),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(None),
            Err(source) => Err(StoreError::io("look at", &path, source)),
        }
    }

    /// The layers as they are to be mounted, each in the form that those below it ask for, and their bytes; none while one is missing.
    fn chain(&self, wanted: &[LayerId]) -> Result<Option<(Vec<LayerId>, u64)>, StoreError> {
        let (mut chain, mut bytes) = (Vec::with_capacity(wanted.len()), 0);
        for layer in wanted {
            let other = if layer.base { None } else { Some(derived(*layer, &chain)) };
            let mut found = None;
            for form in other.into_iter().chain([*layer]) {
                if let Some(size) = self.layer_size(form)? {
                    found = Some((form, size));
                    break;
                }
            }
            let Some((form, size)) = found else { return Ok(None) };
            chain.push(form);
            bytes += size;
        }
        Ok(Some((chain, bytes)))
    }

    /// The files of layers.
    pub(crate) fn open_layers(&self, layers: &[LayerId]) -> Result<Vec<File>, StoreError> {
        let open = |layer: &LayerId| {
            let path = self.layers.join(layer.file_name());
            File::open(&path).map_err(|source| StoreError::io("open", &path, source))
        };
        layers.iter().map(open).collect()
    }

    fn sweep(&self) -> Result<(), StoreError> {
        let entries = fs::read_dir(&self.tmp).map_err(|source| StoreError::io("list", &self.tmp, source))?;
        for entry in entries {
            let entry = entry.map_err(|source| StoreError::io("list", &self.tmp, source))?;
            let path = entry.path();
            let is_dir = entry.file_type().is_ok_and(|kind| kind.is_dir());
            let removed = if is_dir { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(|source| StoreError::io("remove", &path, source))?;
        }
        Ok(())
    }
}

/// The name of the form of `layer` that fits over `below` (bottom to top).
pub(crate) fn derived(layer: LayerId, below: &[LayerId]) -> LayerId {
    let names = below.iter().chain([&layer]).map(|layer| layer.file_name() + "\n");
    let text = std::iter::once("funtainer derived layer 1\n".to_owned()).chain(names).collect::<String>();
    LayerId { diff_id: sha256(text.as_bytes()), base: false }
}

impl StoreError {
    pub(crate) fn io(action: &'static str, path: &Path, source: io::Error) -> Self {
        Self::Io { action, path: path.to_owned(), source }
    }
}

/// Gives `path` new content as a whole: written to `tmp` (same file system), on disk before the name, the name on disk before the
/// return.
pub(crate) fn replace_file(path: &Path, tmp: &Path, bytes: &[u8]) -> Result<(), StoreError> {
    let failed = |action| move |source| StoreError::io(action, path, source);
    let mut file = tempfile::NamedTempFile::new_in(tmp).map_err(|source| StoreError::io("write below", tmp, source))?;
    file.write_all(bytes).map_err(failed("write"))?;
    file.as_file().sync_all().map_err(failed("write"))?;
    file.persist(path).map_err(|error| StoreError::io("write", path, error.error))?;
    let parent = path.parent().unwrap_or(Path::new("."));
    File::open(parent).and_then(|dir| dir.sync_all()).map_err(|source| StoreError::io("write", parent, source))
}

/// Runs disk work on a thread that may block.
pub(crate) async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> Result<T, StoreError> + Send + 'static,
) -> Result<T, StoreError> {
    tokio::task::spawn_blocking(work).await.map_err(StoreError::Thread)?
}

//! The image store of this machine, in the engine's words. Finished layers are handed to the keeper.

use std::fs::File;
use std::io;
use std::path::Path;
use std::sync::{Arc, Weak};

use bytes::Bytes;
use funtainer_contract as contract;
use funtainer_contract::{FileStat, ImageFiles};
use funtainer_engine::backend::{self, ImageSummary, Prepared, ProgressSink, Resolve};
use funtainer_image::rootfs::{FileKind, Rootfs, RootfsError};
use funtainer_image::{CommitLayer, Image, ImageStore, Progress, PullPolicy, StoreError};
use funtainer_model::{Digest, Failure, ImageRef, LayerId};
use funtainer_sandbox::protocol::Request;
use futures_util::future::BoxFuture;
use tokio::sync::mpsc;

use crate::link::Link;
use crate::start::StartError;

/// See the module.
pub(crate) struct Images {
    store: ImageStore,
}

impl Images {
    /// Blocks on the disk.
    pub(crate) fn open(directory: &Path, link: &Arc<Link>) -> Result<Self, StoreError> {
        Ok(Self { store: ImageStore::open(directory, Arc::new(Committer(Arc::downgrade(link))))? })
    }

    pub(crate) async fn prepare(&self, reference: &ImageRef, how: Resolve, sink: &ProgressSink) -> Result<Prepared, Failure> {
        let policy = match how {
            Resolve::Deploy => PullPolicy::PreferImported,
            Resolve::Pull => PullPolicy::FromRegistry,
            Resolve::IfMissing => PullPolicy::IfMissing,
        };
        let tell = |progress| tell(sink, progress);
        let image = self.store.pull(reference, policy, &tell).await.map_err(|error| error.failure())?;
        let files = Arc::new(Files(self.store.rootfs(&image).map_err(|error| error.failure())?));
        Ok(Prepared { digest: image.digest, config: image.config, files })
    }

    pub(crate) async fn import(
        &self,
        mut archive: mpsc::Receiver<io::Result<Bytes>>,
        name: Option<&ImageRef>,
        sink: &ProgressSink,
    ) -> Result<Vec<ImageSummary>, Failure> {
        let archive = futures_util::stream::poll_fn(move |cx| archive.poll_recv(cx));
        let tell = |progress| tell(sink, progress);
        let images = self.store.import(archive, name, &tell).await.map_err(|error| error.failure())?;
        let summary =
            |image: Image| ImageSummary { reference: image.reference, digest: image.digest, size: image.size, imported: true };
        Ok(images.into_iter().map(summary).collect())
    }

    /// Those that are here as a whole.
    pub(crate) async fn list(&self) -> Result<Vec<ImageSummary>, Failure> {
        let images = self.store.images().await.map_err(|error| error.failure())?;
        let summary = |image: funtainer_image::NamedImage| {
            let funtainer_image::NamedImage { reference, record, size } = image;
            size.map(|size| ImageSummary { reference, digest: record.digest, size, imported: record.imported })
        };
        Ok(images.into_iter().filter_map(summary).collect())
    }

    /// The layers of an image that was prepared once, from the bottom up.
    pub(crate) async fn layers(&self, digest: Digest) -> Result<Vec<LayerId>, StartError> {
        Ok(self.get(digest).await?.layers)
    }

    /// The files of an image that was prepared once.
    pub(crate) async fn files(&self, digest: Digest) -> Result<impl ImageFiles + use<>, StartError> {
        let image = self.get(digest).await?;
        self.store.rootfs(&image).map(Files).map_err(|error| StartError::Image(error.failure()))
    }

    async fn get(&self, digest: Digest) -> Result<Image, StartError> {
        let reference: ImageRef = format!("image@{digest}").parse().map_err(|_| StartError::ImageGone)?;
        let image = self.store.get(&reference, digest).await.map_err(|error| StartError::Image(error.failure()))?;
        image.ok_or(StartError::ImageGone)
    }
}

fn tell(sink: &ProgressSink, progress: Progress) {
    let progress = match progress {
        Progress::Resolved { digest } => backend::Progress::Resolved { digest },
        Progress::LayerPresent { layer, .. } => backend::Progress::LayerPresent { layer },
        Progress::LayerReceived { layer, received, total } => backend::Progress::Layer { layer, bytes: received, total },
        Progress::LayerStored { layer, total } => backend::Progress::Layer { layer, bytes: total, total },
    };
    // Lossy by design: who is told may be slow or gone.
    let _ = sink.try_send(progress);
}

/// Finished layers go to the keeper, which alone writes where they are mounted from.
struct Committer(Weak<Link>);

impl CommitLayer for Committer {
    fn commit(&self, layer: LayerId, finished: File) -> BoxFuture<'_, io::Result<()>> {
        Box::pin(async move {
            let link = self.0.upgrade().ok_or_else(|| io::Error::other("the platform is stopping"))?;
            link.command(&Request::CommitLayer { layer }, vec![finished.into()]).await.map_err(io::Error::other)
        })
    }
}

/// An image's files as dialects read them.
struct Files(Rootfs);

impl ImageFiles for Files {
    fn stat(&self, path: &str) -> io::Result<Option<FileStat>> {
        let Some(stat) = found(self.0.stat(path))? else { return Ok(None) };
        let kind = match stat.kind {
            FileKind::File => contract::FileKind::Regular,
            FileKind::Directory => contract::FileKind::Directory,
            _ => contract::FileKind::Other,
        };
        Ok(Some(FileStat { kind, mode: stat.mode.into(), uid: stat.uid, gid: stat.gid, size: stat.size }))
    }

    fn read(&self, path: &str, bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
        found(self.0.read_file(path, bytes_max as u64))
    }

    fn read_start(&self, path: &str, bytes_max: usize) -> io::Result<Option<Vec<u8>>> {
        found(self.0.read_start(path, bytes_max))
    }
}

fn found<T>(result: Result<T, RootfsError>) -> io::Result<Option<T>> {
    match result {
        Ok(value) => Ok(Some(value)),
        Err(RootfsError::NotFound(_) | RootfsError::NotDirectory(_) | RootfsError::NotFile(_)) => Ok(None),
        Err(error) => Err(io::Error::other(error)),
    }
}

//! The engine's doors, but for calls (`invoke`) and commands (`run`).

use std::path::PathBuf;
use std::sync::Arc;
use std::time::Duration;

use bytes::Bytes;
use funtainer_model::{ErrorCode, Failure, FunctionId, FunctionSpec, ImageRef};
use tokio::sync::mpsc;

use crate::backend::{Backend, ImageSummary, ProgressSink};
use crate::view::{FunctionView, PulledImage};

/// What an engine is opened with.
#[derive(Debug, Clone)]
pub struct Settings {
    /// Directory of the state store; it exists and belongs to this process's user.
    pub state_dir: PathBuf,
}

/// Functions and their instances. One per process.
pub struct Engine {
    backend: Arc<dyn Backend>,
}

impl Engine {
    /// Opens the state, adopts or ends the instances that a former process left, and is then ready for calls.
    /// Its background work runs on the runtime that polls this.
    pub async fn open(settings: Settings, backend: Arc<dyn Backend>) -> Result<Arc<Self>, Failure> {
        let _ = settings;
        Ok(Arc::new(Self { backend }))
    }

    pub(crate) fn not_yet(&self) -> Failure {
        let _ = &self.backend;
        Failure::new(ErrorCode::Internal, "the engine is not written yet")
    }

    /// Makes or replaces a function. For `http` it returns when one instance of the new revision was started and found good, for
    /// `stdio` when the image was checked. The old revision goes on until then, and for good if the deploy fails or this future
    /// is dropped.
    pub async fn deploy(&self, spec: FunctionSpec, progress: ProgressSink) -> Result<FunctionView, Failure> {
        let _ = (spec, progress);
        Err(self.not_yet())
    }

    /// Removes a function; calls in flight have 10 s to finish. Returns when its instances are reaped.
    pub async fn remove(&self, id: &FunctionId) -> Result<(), Failure> {
        let _ = id;
        Err(self.not_yet())
    }

    /// All functions by name.
    pub fn list(&self) -> Vec<FunctionView> {
        let _ = &self.backend;
        Vec::new()
    }

    /// One function.
    pub fn describe(&self, id: &FunctionId) -> Result<FunctionView, Failure> {
        let _ = id;
        Err(self.not_yet())
    }

    /// The function that `name` means to people: a slug, or a canonical name in the namespace `default`.
    pub fn find(&self, name: &str) -> Result<FunctionId, Failure> {
        let _ = name;
        Err(self.not_yet())
    }

    /// Starts or ends instances until `instances` are there. Returns when all that were started are ready and all that were ended
    /// are reaped. No setting: calls start more, idleness ends them.
    pub async fn scale(&self, id: &FunctionId, instances: u32) -> Result<FunctionView, Failure> {
        let _ = (id, instances);
        Err(self.not_yet())
    }

    /// The last `lines` lines of a function's log, then, with `follow`, what comes until the receiver is dropped.
    pub async fn logs(&self, id: &FunctionId, lines: usize, follow: bool) -> Result<mpsc::Receiver<Bytes>, Failure> {
        self.backend.logs(id, lines, follow).await
    }

    /// Fetches an image by asking its registry, which replaces an imported one of the name.
    pub async fn pull(&self, image: &ImageRef, progress: ProgressSink) -> Result<PulledImage, Failure> {
        let _ = (image, progress);
        Err(self.not_yet())
    }

    /// Takes an OCI archive into the store. `name` replaces the archive's names.
    pub async fn import(
        &self,
        archive: mpsc::Receiver<std::io::Result<Bytes>>,
        name: Option<&ImageRef>,
        progress: ProgressSink,
    ) -> Result<Vec<ImageSummary>, Failure> {
        self.backend.import(archive, name, progress).await
    }

    /// Images in the store.
    pub async fn images(&self) -> Result<Vec<ImageSummary>, Failure> {
        self.backend.images().await
    }

    /// Refuses new calls, lets those in flight finish, and ends every instance; all within `limit`.
    pub async fn drain(&self, limit: Duration) {
        let _ = limit;
    }

    /// Ends what is left at once and closes the state. A drain comes first where there is time for it.
    pub async fn shutdown(&self) {
        self.drain(Duration::ZERO).await;
    }
}

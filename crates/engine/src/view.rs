//! What the engine shows of itself: plain values, a picture of one moment.

use std::num::{NonZeroU16, NonZeroU32};

use funtainer_model::{Digest, Failure, FunctionId, FunctionSpec, ImageRef, InstanceId, RevisionId, Slug};
use jiff::Timestamp;

pub use crate::instance::InstanceState;

/// A function as it is now.
#[derive(Debug, Clone)]
pub struct FunctionView {
    /// Who it is.
    pub id: FunctionId,
    /// Its DNS label.
    pub slug: Slug,
    /// The revision that gets the calls.
    pub revision: RevisionId,
    /// The image as it was named at the deploy.
    pub image: ImageRef,
    /// What the name was resolved to.
    pub digest: Digest,
    /// The port that the function was told to listen on; none for a contract without one.
    pub port: Option<NonZeroU16>,
    /// Calls that one instance takes at once.
    pub concurrency: NonZeroU32,
    /// Everything that its user asked for.
    pub spec: FunctionSpec,
    /// When the current revision was deployed.
    pub deployed_at: Timestamp,
    /// Its instances, those of former revisions that still finish their calls included, oldest first.
    pub instances: Vec<InstanceView>,
    /// The last deploy, start or instance that failed since the current revision was deployed, or since this process began.
    pub last_error: Option<Failure>,
}

/// An instance as it is now.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct InstanceView {
    /// Which.
    pub id: InstanceId,
    /// Where it is in its life.
    pub state: InstanceState,
    /// Host pid of its init; none before it is started.
    pub pid: Option<u32>,
}

/// An image that was pulled.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct PulledImage {
    /// Its name.
    pub reference: ImageRef,
    /// Digest of the platform's manifest.
    pub digest: Digest,
}

//! OCI images: a client for registries, a content store, layers as read-only erofs files, and the root file systems that they
//! make up.
//!
//! ```text
//! name ─► client ─► manifest ─► layers ─► layer::write ─► CommitLayer      (pull)
//! archive ─► spool ─► plan ───────┘                                        (import)
//! ```
//!
//! [`ImageStore`] is the way in. The crate runs nothing, mounts nothing, and needs no privilege; content has a name only once
//! its digest is verified.
#![forbid(unsafe_code)]

pub mod client;
pub mod erofs;
pub mod layer;
pub mod manifest;
pub mod rootfs;
pub mod tar;

mod error;
mod flight;
mod hash;
mod import;
mod names;
mod pipe;
mod pull;
mod store;

pub use error::ImageError;
pub use import::ImportError;
pub use names::NameRecord;
pub use pull::{OnProgress, Progress, PullPolicy};
pub use store::{CommitLayer, Image, ImageStore, NamedImage, StoreError};

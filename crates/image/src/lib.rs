//! OCI images: layers as read-only erofs files, and the root file systems that they make up.
#![forbid(unsafe_code)]

pub mod erofs;
pub mod layer;
pub mod rootfs;
pub mod tar;

//! SHA-256 of bytes at hand.

use funtainer_model::Digest;
use sha2::{Digest as _, Sha256};

/// The digest of `bytes`.
pub(crate) fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

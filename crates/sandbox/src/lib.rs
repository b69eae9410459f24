//! The keeper, zygotes and instances.

pub mod protocol;

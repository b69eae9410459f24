//! Functions, revisions, instances, throttling, scaling and state.
#![forbid(unsafe_code)]

pub mod backend;

//! The crate through its public doors: against Debian's real `docker-registry`, and against registries that lie.

mod hostile;
mod https;
mod import;
mod liar;
mod pull;
mod store;
mod support;
mod token;

//! The engine's backend on this machine: the image store, and the daemon's side of the keeper's protocol.
//!
//! - `link`, `pair`: messages to and from the keeper and the first processes of instances.
//! - `start`, `readiness`, `sockets`: from a revision to a connection. `listeners` reads what listens, `timer` waits for less than a
//!   millisecond.
//! - `exec`: commands in running instances.
//! - `instance`, `revision`: what exists. `descriptor` is what a later daemon learns of an instance.
//! - `logs`: two bounded files for each function.
//! - `images`: the image store in the engine's words. `machine`: what is asked for beyond what this machine has.
//!
//! Nothing here decides how many instances there are, and nothing needs privilege. Every descriptor is close-on-exec and no copy of one
//! that leads into an instance is kept: what its holder drops is closed.
#![forbid(unsafe_code)]

mod backend;
mod descriptor;
mod descriptors;
mod exec;
mod images;
mod instance;
mod link;
mod listeners;
mod logs;
mod machine;
mod pair;
mod readiness;
mod revision;
mod sockets;
mod start;
mod timer;

pub use backend::{LocalBackend, OpenError, Stop};
pub use link::LinkError;
pub use start::StartError;

//! funtainer as its users meet it: the binary, its command line, its sockets.
//!
//! A test describes a [`scenario`](world::scenario): it gets a [`World`](world::World), starts real things in it (the server under test, Debian's registry,
//! images made from this repository's programs) and speaks to them. When it is done, and also when it failed, everything is stopped and
//! the [leak check](leak) looks at what the machine has more than before.
//!
//! Nothing here knows the product's crates: what is tested is what a user can reach.
#![forbid(unsafe_code)]

pub mod http;
pub mod image;
pub mod leak;
pub mod load;
pub mod network;
pub mod paths;
pub mod process;
pub mod pty;
pub mod registry;
pub mod server;
pub mod user;
pub mod wait;
pub mod world;

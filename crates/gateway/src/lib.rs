//! Every client-facing dialect: listeners, routes, limits and errors.
//!
//! Calls come in by TCP, everything else by the admin socket; both lead to an [`Engine`](funtainer_engine::Engine). The gateway knows the
//! dialects of clients and nothing of containers.
//!
//! - `server`: listeners, connections, drain.
//! - `route`: who answers a request, and the heads on their way through.
//! - `rescue`: the one mapper from failures to answers.
//! - [`api`]: one file for each API.
#![forbid(unsafe_code)]

pub mod api;
mod body;
mod call_id;
mod rescue;
mod route;
mod server;

pub use rescue::{ERROR_CODE, PROBLEM_JSON, Problem};
pub use server::{Server, serve};

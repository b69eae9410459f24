//! Functions, revisions, instances, throttling, scaling and state.
//!
//! An [`Engine`] turns a [`FunctionSpec`](funtainer_model::FunctionSpec) into an immutable revision, and a call into a slot on one
//! of the revision's instances. It has no HTTP server and makes no system call: containers are the business of a
//! [`Backend`](backend::Backend), clients that of the gateway.
//!
//! - `store`: what must outlive the process, in SQLite.
//! - `route`: the table from names to functions, read by every call.
//! - `throttle`: slots, and the bounded queue of the calls that found none.
//! - `instance`, `fleet`: pure state machines of one instance and of all instances of a revision.
//! - `owner`: the task that owns a revision's instances and does what `fleet` decides.
//! - `invoke`, `per_call`: one call, on a lasting instance (`http`) or a fresh one (`stdio`).
//! - `rollout`: deploy and remove.
//! - `run`, `exec`, `command`: a command in an instance of its own, or in one that runs, and who speaks with it.
#![forbid(unsafe_code)]

pub mod backend;
mod command;
mod engine;
mod exec;
mod fleet;
mod instance;
mod invoke;
mod owner;
mod per_call;
mod revision;
mod rollout;
mod route;
mod run;
mod store;
mod throttle;
mod view;

pub use command::{CommandHandle, CommandStreams, Errors, Signals};
pub use engine::{Engine, Settings};
pub use exec::ExecOrder;
pub use invoke::{Cold, InvokeFailure, Invoked};
pub use view::{FunctionView, InstanceState, InstanceView, PulledImage};

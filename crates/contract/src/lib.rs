//! Dialects from the platform to a function, one file each.
//!
//! A dialect answers two questions: what an instance of an image needs in order to be started ([`plan()`]), and how a call is
//! spoken to a started one ([`http`], [`stdio`]). It knows how to connect, never a container, and never the dialect of a client.
#![forbid(unsafe_code)]

pub mod accounts;
mod body;
mod call;
mod error;
pub mod exec;
pub mod http;
mod plan;
pub mod program;
pub mod stdio;
pub mod terminal;

pub use body::{AnswerBody, BodyError, CallBody};
pub use call::{Answer, BoxFuture, Call, Connect, Exit, ExitFuture, ExitReport, StartPhases};
pub use error::InvokeError;
pub use plan::{
    FileKind, FileStat, ImageFiles, Listener, PlanError, PlannedFile, Readiness, StandardStreams, StartPlan, User, plan,
};

//! Dialects from the platform to a function, one file each.
//!
//! A dialect answers two questions: what an instance of an image needs in order to be started ([`plan`]), and how a call is
//! spoken to a started one ([`http`], [`stdio`]). It knows how to connect, never a container, and never the dialect of a client.
#![forbid(unsafe_code)]

mod call;
mod plan;

pub use call::{
    Answer, AnswerBody, BoxFuture, Call, CallBody, Connect, Exit, ExitFuture, ExitReport, InvokeError, StartPhases,
};
pub use plan::{FileKind, FileStat, ImageFiles, Listener, PlanError, PlannedFile, Readiness, StandardStreams, StartPlan, User};

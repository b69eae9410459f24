//! Why a call got no answer.

use std::error::Error;
use std::io;

use bytes::Bytes;
use funtainer_model::{ErrorCode, Failure};

use crate::{Call, Exit, ExitReport};

/// Most of a standard error tail that goes into a [`Failure`], in bytes: it is one sentence for a person, all of it is in the log.
const TAIL_SHOWN_BYTES_MAX: usize = 1024;

/// Why a started instance gave no answer.
#[derive(Debug, thiserror::Error)]
pub enum InvokeError {
    /// Nothing of the call reached the instance, so that it can be sent to another one.
    #[error("the function does not accept connections")]
    NotDelivered {
        /// The call as it was given, body untouched.
        call: Box<Call>,
        /// What went wrong.
        source: io::Error,
    },
    /// The connection ended, or what came was no answer of the dialect.
    #[error("the function broke off before an answer")]
    Broken(#[source] Box<dyn Error + Send + Sync>),
    /// The command ended with another code than 0 before its answer began.
    #[error("the command ended with {exit:?}")]
    CommandFailed {
        /// How it ended.
        exit: Exit,
        /// Whether it was killed for memory.
        out_of_memory: bool,
        /// Whether its writable layer was full.
        writable_full: bool,
        /// The end of its standard error.
        stderr_tail: Bytes,
    },
    /// The caller's body broke off.
    #[error("the caller's body broke off")]
    CallerGone(#[source] Box<dyn Error + Send + Sync>),
}

impl InvokeError {
    /// Whether the instance may have seen something of the call. If not, the same call can be sent again to any instance.
    pub fn was_delivered(&self) -> bool {
        !matches!(self, Self::NotDelivered { .. })
    }

    /// The call, where nothing of it was delivered.
    pub fn into_undelivered(self) -> Option<Call> {
        match self {
            Self::NotDelivered { call, .. } => Some(*call),
            _ => None,
        }
    }

    /// The failure as users meet it.
    pub fn failure(&self) -> Failure {
        match self {
            Self::NotDelivered { source, .. } => {
                Failure::new(ErrorCode::FunctionFailed, format!("the function does not accept connections: {source}"))
            }
            Self::Broken(source) => {
                let code = if source.downcast_ref::<hyper::Error>().is_some_and(hyper::Error::is_parse) {
                    ErrorCode::FunctionProtocol
                } else {
                    ErrorCode::FunctionFailed
                };
                Failure::new(code, format!("the function broke off before an answer: {source}"))
            }
            Self::CommandFailed { out_of_memory: true, .. } => {
                Failure::new(ErrorCode::OutOfMemory, "the command was killed for its memory")
            }
            Self::CommandFailed { exit, writable_full, stderr_tail, .. } => {
                let failure = Failure::new(ErrorCode::CommandFailed, command_failed_detail(*exit, stderr_tail));
                if *writable_full { failure.with_hint(ExitReport::WRITABLE_FULL_HINT) } else { failure }
            }
            Self::CallerGone(_) => {
                let detail = "the request's body broke off, or its chunks cannot be read";
                Failure::new(ErrorCode::BadRequest, detail).with_hint("send the whole body, framed as the request's head says")
            }
        }
    }
}

fn command_failed_detail(exit: Exit, stderr_tail: &[u8]) -> String {
    let how = match exit {
        Exit::Code(code) => format!("the command ended with exit code {code}"),
        Exit::Signal(signal) => format!("the command was killed by signal {signal}"),
        Exit::Lost => "the command ended together with its sandbox".to_owned(),
    };
    let tail = &stderr_tail[stderr_tail.len().saturating_sub(TAIL_SHOWN_BYTES_MAX)..];
    let tail = String::from_utf8_lossy(tail);
    // A tail that starts within a character starts with a replacement: leave it out.
    match tail.trim_start_matches('\u{fffd}').trim() {
        "" => how,
        tail => format!("{how}: {tail}"),
    }
}

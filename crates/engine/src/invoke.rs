//! One call: from a name to an answer.

use std::time::Duration;

use funtainer_contract::{Answer, Call, InvokeError, StartPhases};
use funtainer_model::{ErrorCode, Failure, FunctionId};
use tokio::time::Instant;

use crate::engine::Engine;

/// Seconds that a refused caller is asked to wait: an instance starts in milliseconds, and a call of average length frees a slot.
const RETRY_AFTER: Duration = Duration::from_secs(1);

/// The answer to a call and how it came about.
#[derive(Debug)]
pub struct Invoked {
    /// What the function said. The call's slot is held until its body is dropped.
    pub answer: Answer,
    /// Set if the call waited for an instance to start.
    pub cold: Option<Cold>,
    /// When the call's time is over: whoever sends the body on breaks it off then.
    pub deadline: Instant,
}

/// What a cold call waited for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub struct Cold {
    /// From the call's arrival until the start of its instance began, or, where that had begun before, nothing.
    pub queue: Duration,
    /// The start itself.
    pub phases: StartPhases,
}

/// Why a call has no answer.
#[derive(Debug, thiserror::Error)]
pub enum InvokeFailure {
    /// No function of the name.
    #[error("there is no function '{0}'")]
    Unknown(String),
    /// Removed while the call waited.
    #[error("function '{0}' was removed while the call waited")]
    Removed(FunctionId),
    /// The bounded queue has no room.
    #[error("{waiting} calls wait for function '{function}' already")]
    QueueFull {
        /// Of which function.
        function: FunctionId,
        /// How many wait.
        waiting: usize,
    },
    /// The call's time was over before it had a slot.
    #[error("no instance of function '{function}' became free within {} ms", limit.as_millis())]
    QueueTimeout {
        /// Of which function.
        function: FunctionId,
        /// The call's time.
        limit: Duration,
    },
    /// The call's time was over before the answer began.
    #[error("function '{function}' gave no answer within {} ms", limit.as_millis())]
    Timeout {
        /// Which function.
        function: FunctionId,
        /// The call's time.
        limit: Duration,
    },
    /// No instance could be started.
    #[error("no instance of function '{function}' could be started: {failure}")]
    Start {
        /// Of which function.
        function: FunctionId,
        /// Why.
        failure: Failure,
    },
    /// A started instance gave no answer.
    #[error("function '{function}' failed")]
    Invoke {
        /// Which function.
        function: FunctionId,
        /// Why.
        #[source]
        source: InvokeError,
        /// What its end tells, where the instance ended.
        exit: Option<funtainer_contract::ExitReport>,
    },
    /// The platform stops.
    #[error("the server is stopping")]
    ShuttingDown,
}

impl InvokeFailure {
    /// The failure as users meet it.
    pub fn failure(&self) -> Failure {
        let code = match self {
            Self::Unknown(_) => ErrorCode::FunctionUnknown,
            Self::Removed(_) => ErrorCode::FunctionRemoved,
            Self::QueueFull { .. } => ErrorCode::QueueFull,
            Self::QueueTimeout { .. } => ErrorCode::QueueTimeout,
            Self::Timeout { .. } => ErrorCode::CallTimeout,
            Self::Start { failure, .. } => {
                return Failure { code: failure.code, detail: self.to_string(), hint: failure.hint.clone() };
            }
            Self::Invoke { .. } => ErrorCode::FunctionFailed,
            Self::ShuttingDown => ErrorCode::ShuttingDown,
        };
        Failure::new(code, self.to_string())
    }

    /// For the header `Retry-After`, where a later try has hope.
    pub fn retry_after(&self) -> Option<Duration> {
        match self {
            Self::QueueFull { .. } | Self::QueueTimeout { .. } | Self::ShuttingDown => Some(RETRY_AFTER),
            _ => None,
        }
    }
}

impl Engine {
    /// Calls the function `name`: its slug, or its canonical name in the namespace `default`. Streams are polled on the runtime
    /// that polls this. Dropping the future or the answer ends the call.
    pub async fn invoke(&self, name: &str, call: Call) -> Result<Invoked, InvokeFailure> {
        let _ = call;
        Err(InvokeFailure::Unknown(name.to_owned()))
    }
}

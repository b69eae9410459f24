//! One call: from a name to an answer.

use std::sync::Arc;
use std::time::Duration;

use funtainer_contract::{Answer, Call, ExitFuture, ExitReport, InvokeError, StartPhases, stdio};
use funtainer_model::{ErrorCode, Failure, FunctionId};
use tokio::time::{Instant, timeout, timeout_at};

use crate::engine::Engine;
use crate::owner::{describe_exit, ended};
use crate::per_call::{self, Command, Live};
use crate::revision::{Ground, Instances, Revision};
use crate::route::Function;
use crate::throttle::{Permit, Refusal, Waited};

/// How often a call is given to an instance that turns out not to accept connections: to one that has just died, to the one that
/// takes its place, and once more. Nothing of it was delivered before.
const DELIVERIES_MAX: u32 = 3;
/// How long a failed call waits for the reason: an instance that died is reaped within milliseconds.
const EXIT_WAIT: Duration = Duration::from_millis(100);
/// Seconds that a refused caller is asked to wait: an instance starts in milliseconds, and a call of average length frees a slot.
const RETRY_AFTER: Duration = Duration::from_secs(1);
/// Characters of an unknown name that its error repeats: it can be as long as a request's head, and be anything.
const NAME_SHOWN_CHARS_MAX: usize = 100;

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
    #[error("there is no function '{}'", .0.chars().take(NAME_SHOWN_CHARS_MAX).collect::<String>().escape_debug())]
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
        exit: Option<ExitReport>,
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
            Self::Invoke { function, source, exit } => return invoke_failure(function, source, exit.as_ref()),
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

fn invoke_failure(function: &FunctionId, source: &InvokeError, exit: Option<&ExitReport>) -> Failure {
    let Some(exit) = exit else {
        let failure = source.failure();
        return Failure { detail: format!("function '{function}': {}", failure.detail), ..failure };
    };
    let code = if exit.out_of_memory { ErrorCode::OutOfMemory } else { ErrorCode::FunctionFailed };
    Failure::new(code, format!("function '{function}' broke off before an answer: its instance {}", describe_exit(exit)))
}

impl Engine {
    /// Calls the function `name`: its slug, or its canonical name in the namespace `default`. Streams are polled on the runtime
    /// that polls this. Dropping the future or the answer ends the call.
    pub async fn invoke(&self, name: &str, mut call: Call) -> Result<Invoked, InvokeFailure> {
        let shared = self.shared();
        if shared.is_closing() {
            return Err(InvokeFailure::ShuttingDown);
        }
        let function = shared.routes.load().find(name).cloned().ok_or_else(|| InvokeFailure::Unknown(name.to_owned()))?;
        let arrival = Instant::now();
        let (mut admitted, mut deliveries) = (false, 0);
        loop {
            let revision = function.current.load_full();
            let limit = revision.record.spec.timeouts.call;
            let attempt = Attempt { ground: &shared.ground, function: &function, revision: &revision, arrival, limit };
            let Some((permit, waited)) = attempt.slot(admitted).await? else {
                if function.is_removed() {
                    return Err(InvokeFailure::Removed(function.id.clone()));
                }
                if shared.is_closing() {
                    return Err(InvokeFailure::ShuttingDown);
                }
                admitted = true;
                continue;
            };
            if let Instances::PerCall(live) = &revision.instances {
                return attempt.fresh(live, permit, call).await;
            }
            match attempt.lasting(permit, waited, call).await {
                Ok(invoked) => return Ok(invoked),
                Err(InvokeFailure::Invoke { source: InvokeError::NotDelivered { call: same, source }, function, exit }) => {
                    deliveries += 1;
                    if deliveries == DELIVERIES_MAX {
                        let source = InvokeError::NotDelivered { call: same, source };
                        return Err(InvokeFailure::Invoke { function, source, exit });
                    }
                    (call, admitted) = (*same, true);
                }
                Err(failure) => return Err(failure),
            }
        }
    }
}

/// One try of a call at one revision.
struct Attempt<'a> {
    ground: &'a Ground,
    function: &'a Function,
    revision: &'a Revision,
    arrival: Instant,
    limit: Duration,
}

impl Attempt<'_> {
    fn deadline(&self) -> Instant {
        self.arrival + self.limit
    }

    /// A slot; `None` if the revision takes no calls any more.
    async fn slot(&self, admitted: bool) -> Result<Option<(Permit, Waited)>, InvokeFailure> {
        let function = || self.function.id.clone();
        match timeout_at(self.deadline(), self.revision.throttle.acquire(admitted)).await {
            Ok(Ok(granted)) => Ok(Some(granted)),
            Ok(Err(Refusal::Retired)) => Ok(None),
            Ok(Err(Refusal::Full { waiting })) => Err(InvokeFailure::QueueFull { function: function(), waiting }),
            Ok(Err(Refusal::Failed(failure))) => Err(InvokeFailure::Start { function: function(), failure }),
            Err(_) => Err(InvokeFailure::QueueTimeout { function: function(), limit: self.limit }),
        }
    }

    /// A call to an instance that serves many.
    async fn lasting(&self, permit: Permit, waited: Waited, call: Call) -> Result<Invoked, InvokeFailure> {
        let slot = Arc::clone(permit.slot());
        let started_for_it = waited == Waited::Yes && slot.ready_at >= self.arrival;
        let cold = slot.phases.filter(|_| started_for_it).map(|phases| self.cold(phases, slot.ready_at));
        let Some(client) = &slot.client else {
            let failure = Failure::new(ErrorCode::Internal, format!("instance {} cannot be reached", slot.instance));
            return Err(InvokeFailure::Start { function: self.function.id.clone(), failure });
        };
        match timeout_at(self.deadline(), client.invoke(call)).await {
            Ok(Ok(answer)) => {
                slot.note_served();
                Ok(self.invoked(answer, cold, Box::new(permit)))
            }
            Ok(Err(source)) => {
                if !source.was_delivered() {
                    self.revision.unreachable(&slot);
                }
                drop(permit);
                Err(self.failed(source, slot.exit.clone()).await)
            }
            Err(_) => Err(InvokeFailure::Timeout { function: self.function.id.clone(), limit: self.limit }),
        }
    }

    /// A call with an instance of its own.
    async fn fresh(&self, live: &Arc<Live>, permit: Permit, call: Call) -> Result<Invoked, InvokeFailure> {
        let function = || self.function.id.clone();
        let timed_out = |_| InvokeFailure::Timeout { function: function(), limit: self.limit };
        let starting = per_call::start(self.ground, &self.revision.start, live, Some(permit), None);
        let started = timeout_at(self.deadline(), starting).await.map_err(timed_out)?;
        let failed = |failure: Failure| {
            self.function.last_error.store(Some(Arc::new(failure.clone())));
            InvokeFailure::Start { function: function(), failure }
        };
        let Command { access, phases, exit, running } = started.map_err(failed)?;
        let streams = per_call::streams(access).map_err(failed)?;
        let cold = self.cold(phases, Instant::now());
        match timeout_at(self.deadline(), stdio::invoke(call, streams, exit)).await.map_err(timed_out)? {
            Ok(answer) => Ok(self.invoked(answer, Some(cold), Box::new(running))),
            Err(source) => Err(self.failed(source, None).await),
        }
    }

    /// What a call that could go on at `ready_at` has waited for.
    fn cold(&self, phases: StartPhases, ready_at: Instant) -> Cold {
        let waited = ready_at.saturating_duration_since(self.arrival);
        Cold { queue: waited.saturating_sub(phases.sandbox + phases.exec + phases.ready), phases }
    }

    fn invoked(&self, answer: Answer, cold: Option<Cold>, guard: Box<dyn Send>) -> Invoked {
        let response = answer.response.map(|body| body.with_guard(guard));
        Invoked { answer: Answer { response }, cold, deadline: self.deadline() }
    }

    /// The failure with what the end of the instance tells, where it comes at once.
    async fn failed(&self, source: InvokeError, exit: Option<ExitFuture>) -> InvokeFailure {
        let exit = match exit {
            Some(exit) if matches!(source, InvokeError::Broken(_)) => timeout(EXIT_WAIT, ended(exit)).await.ok(),
            _ => None,
        };
        InvokeFailure::Invoke { function: self.function.id.clone(), source, exit }
    }
}

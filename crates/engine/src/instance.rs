//! The life of one instance, as a pure function.
//!
//! ```text
//!              begin            ready             quiet
//!  Preparing ─────────► Starting ─────► Ready ◄─────────► Idle
//!      │                 │   │            │      called     │
//!      │ close     close │   │ exited     ├─────────────────┤
//!      │                 │   │            │ close           │ exited
//!      ▼                 ▼   │            ▼                 ▼
//!   Stopped ◄──────── Draining ───────────│────────────► Failed
//!             exited         └────────────┴─────────────────▲
//! ```
//!
//! The happy path: `Preparing` (wanted, nothing exists of it), `Starting` (the backend makes it), `Ready` (takes calls),
//! `Draining` (takes no new call, finishes those it has, then gets its stop signal), `Stopped`. `Idle` is a quiet instance that
//! `min` keeps. An instance that ends by itself before it was asked to has `Failed`.

use std::fmt;

/// Where an instance is in its life.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum InstanceState {
    /// It is wanted; nothing of it exists yet.
    Preparing,
    /// The backend makes it and waits until it is ready.
    Starting,
    /// It takes calls.
    Ready,
    /// It takes calls, had none for the whole idle timeout when it was last looked at, and stays because of `min`.
    Idle,
    /// It takes no new calls, finishes those it has, and ends.
    Draining,
    /// It ended as it was asked to, and is reaped.
    Stopped,
    /// It did not become ready, or ended by itself.
    Failed,
}

/// What happens to an instance.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub(crate) enum Change {
    /// The backend was asked to start it.
    Begin,
    /// The backend has started it.
    Ready,
    /// It had no call for the idle timeout.
    Quiet,
    /// It has calls again.
    Called,
    /// It shall end.
    Close,
    /// It is reaped, or was never made.
    Exited,
}

impl InstanceState {
    /// The state after `change`; `None` where the change cannot happen to an instance in this state.
    pub(crate) fn after(self, change: Change) -> Option<Self> {
        match (self, change) {
            (Self::Preparing, Change::Begin) => Some(Self::Starting),
            (Self::Starting, Change::Ready) | (Self::Idle, Change::Called) => Some(Self::Ready),
            (Self::Ready, Change::Quiet) => Some(Self::Idle),
            (Self::Preparing, Change::Close) | (Self::Draining, Change::Exited) => Some(Self::Stopped),
            (Self::Starting | Self::Ready | Self::Idle, Change::Close) => Some(Self::Draining),
            (Self::Starting | Self::Ready | Self::Idle, Change::Exited) => Some(Self::Failed),
            _ => None,
        }
    }

    /// Whether it takes calls.
    pub(crate) fn is_open(self) -> bool {
        matches!(self, Self::Ready | Self::Idle)
    }

    /// Whether it takes calls or will: the number of such instances is what scaling decides on.
    pub(crate) fn counts(self) -> bool {
        matches!(self, Self::Preparing | Self::Starting | Self::Ready | Self::Idle)
    }

    /// Whether nothing is left of it.
    pub(crate) fn is_over(self) -> bool {
        matches!(self, Self::Stopped | Self::Failed)
    }

    /// The lower-case word, as views show it.
    pub const fn as_str(self) -> &'static str {
        match self {
            Self::Preparing => "preparing",
            Self::Starting => "starting",
            Self::Ready => "ready",
            Self::Idle => "idle",
            Self::Draining => "draining",
            Self::Stopped => "stopped",
            Self::Failed => "failed",
        }
    }
}

impl fmt::Display for InstanceState {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.as_str())
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::{Change, InstanceState};

    const CHANGES: [Change; 6] = [Change::Begin, Change::Ready, Change::Quiet, Change::Called, Change::Close, Change::Exited];

    #[test]
    fn the_happy_path() {
        let path = [Change::Begin, Change::Ready, Change::Quiet, Change::Called, Change::Close, Change::Exited];
        let end = path.iter().try_fold(InstanceState::Preparing, |state, change| state.after(*change));
        assert_eq!(end, Some(InstanceState::Stopped));
    }

    proptest! {
        #[test]
        fn what_is_over_stays_over_and_everything_else_can_end(changes in proptest::collection::vec(0_usize..6, 0..40)) {
            let mut state = InstanceState::Preparing;
            for change in changes {
                let Some(next) = state.after(CHANGES[change]) else { continue };
                prop_assert!(!state.is_over());
                // Once it takes no more calls it never does again.
                prop_assert!(state != InstanceState::Draining || next == InstanceState::Stopped);
                state = next;
            }
            if !state.is_over() {
                let closed = state.after(Change::Close).unwrap_or(state);
                let over = closed.is_over() || closed.after(Change::Exited).is_some_and(InstanceState::is_over);
                prop_assert!(over, "{state}");
            }
        }
    }
}

//! All instances of one revision: when to start and when to end which. Pure: time is an argument, and what is to be done comes back
//! as a list of effects, which `owner` carries out.
//!
//! - Up: enough instances for the calls in flight and in the queue, at least `min`, at most `max`; starts under way count.
//! - Down: an instance without a call for the idle timeout ends, unless `min` keeps it.
//! - Failing: a start that fails ends the waiting of all calls if nothing else is ready or on its way. The next start waits for a
//!   back-off that grows with each failure in a row, so that a broken image cannot spin.
//! - Ending: an instance first takes no new calls, then, when its last one is over or its patience is at its end, gets its stop signal.

use std::collections::BTreeMap;
use std::time::Duration;

use tokio::time::Instant;

use crate::instance::{Change, InstanceState};

/// The wait after the second failure in a row; after the first there is none. Doubles with each.
const BACKOFF_FIRST: Duration = Duration::from_millis(100);
/// The longest wait between two starts of a revision that fails.
const BACKOFF_MAX: Duration = Duration::from_secs(5);
/// An instance that ends within this time of becoming ready, without having answered a call, counts as a failed start.
const STABLE_AFTER: Duration = Duration::from_secs(10);
/// How often at most busy instances are looked at for idleness.
const LOOK_EVERY_MIN: Duration = Duration::from_millis(100);

/// Names an instance within its fleet, in the order of their making.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) struct Key(pub(crate) u64);

/// The settings that decisions depend on.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Policy {
    /// Instances that are kept without calls.
    pub(crate) min: u32,
    /// Instances at most.
    pub(crate) max: u32,
    /// Calls that one instance takes at once.
    pub(crate) concurrency: u32,
    /// How long an instance stays without a call.
    pub(crate) idle_timeout: Duration,
    /// How long calls may go on in an instance that takes no new ones.
    pub(crate) drain_limit: Duration,
}

/// Which calls a revision gets.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Mode {
    /// None yet: instances are started by hand only.
    Trial,
    /// Those of its function.
    Active,
    /// No new ones, for ever.
    Retired,
}

/// The instances of a revision.
#[derive(Debug)]
pub(crate) struct Fleet {
    policy: Policy,
    mode: Mode,
    instances: BTreeMap<Key, Instance>,
    key_next: u64,
    /// Set by a scale below `min`: `min` is not kept up until the next call.
    parked: bool,
    /// Failures in a row.
    failures: u32,
    /// When the last of them was.
    failed_at: Option<Instant>,
}

#[derive(Debug)]
struct Instance {
    state: InstanceState,
    /// When it became ready.
    ready_at: Option<Instant>,
    /// In `Draining`: how long its calls may go on.
    drain_until: Option<Instant>,
    /// In `Draining`: whether the backend was asked to end it.
    ending: bool,
}

/// What is seen at the moment of a decision.
#[derive(Debug, Default)]
pub(crate) struct Sight {
    /// Calls in the queue.
    pub(crate) waiting: usize,
    /// Of every instance that is or was open.
    pub(crate) loads: BTreeMap<Key, Load>,
}

/// What an instance does.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Load {
    /// Calls in flight.
    pub(crate) in_flight: u32,
    /// When its last call ended, or it became ready.
    pub(crate) last_used: Instant,
    /// Whether it ever answered a call.
    pub(crate) served: bool,
}

/// What happened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Event {
    /// Somebody waits, a closed instance has finished, or it is time to look.
    Look,
    /// A start succeeded.
    Started(Key),
    /// A start failed; nothing is left of the instance.
    StartFailed(Key),
    /// An instance refused a connection.
    Unreachable(Key),
    /// An instance is reaped that was not asked to end.
    Exited(Key),
    /// An instance that was asked to end is reaped.
    Reaped(Key),
    /// So many instances are wanted now.
    Scale {
        /// How many.
        instances: u32,
        /// How long the calls of those that end may go on.
        drain_until: Instant,
    },
    /// The revision gets its function's calls.
    Activate,
    /// The revision gets no more calls.
    Retire {
        /// How long the calls in flight may go on.
        drain_until: Instant,
    },
}

/// What is to be done.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Effect {
    /// Start the instance.
    Start(Key),
    /// End the start that is under way.
    Abort(Key),
    /// Let calls in.
    Open(Key),
    /// Let no more calls in.
    Close(Key),
    /// Ask it to end, and report when it is reaped.
    Stop(Key),
    /// Nothing is left of it.
    Forget(Key),
    /// Give the waiting calls the last failure.
    FailWaiting,
    /// Look again then at the latest.
    LookAt(Instant),
}

impl Sight {
    fn served(&self, key: Key) -> bool {
        self.loads.get(&key).is_some_and(|load| load.served)
    }
}

impl Fleet {
    pub(crate) fn new(policy: Policy, mode: Mode) -> Self {
        Self { policy, mode, instances: BTreeMap::new(), key_next: 0, parked: false, failures: 0, failed_at: None }
    }

    /// Takes in an instance that a former process started.
    pub(crate) fn adopt(&mut self, now: Instant) -> Key {
        let key = self.add(InstanceState::Ready);
        self.instances.entry(key).and_modify(|instance| instance.ready_at = Some(now));
        key
    }

    /// Where the instance is in its life; `None` once nothing is left of it.
    pub(crate) fn state(&self, key: Key) -> Option<InstanceState> {
        self.instances.get(&key).map(|instance| instance.state)
    }

    /// Whether it is retired and nothing is left.
    pub(crate) fn is_over(&self) -> bool {
        self.mode == Mode::Retired && self.instances.is_empty()
    }

    /// Takes in an event and says what is to be done, in order.
    pub(crate) fn decide(&mut self, event: Event, sight: &Sight, now: Instant) -> Vec<Effect> {
        let mut effects = Vec::new();
        let mut waiting = sight.waiting;
        // First, for what is closed below was still open when the loads were read: a call may have come in since.
        self.end_drained(sight, now, &mut effects);
        self.note_health(sight, now);
        match event {
            Event::Look => {}
            Event::Started(key) => self.started(key, now, &mut effects),
            Event::StartFailed(key) => {
                if self.end(key, &mut effects) == Some(InstanceState::Failed) {
                    self.note_failure(now);
                    if self.count(InstanceState::counts) == 0 {
                        effects.push(Effect::FailWaiting);
                        waiting = 0;
                    }
                }
            }
            Event::Unreachable(key) => {
                if self.instances.get(&key).is_some_and(|instance| instance.state.is_open()) {
                    self.note_end_of(key, sight, now);
                    self.close(key, now + self.policy.drain_limit, &mut effects);
                }
            }
            Event::Exited(key) => {
                if self.instances.get(&key).is_some_and(|instance| instance.state.is_open()) {
                    self.note_end_of(key, sight, now);
                    effects.push(Effect::Close(key));
                }
                self.end(key, &mut effects);
            }
            Event::Reaped(key) => {
                self.end(key, &mut effects);
            }
            Event::Scale { instances, drain_until } => self.scale(instances, drain_until, sight, &mut effects),
            Event::Activate => {
                if self.mode == Mode::Trial {
                    self.mode = Mode::Active;
                    self.parked = false;
                }
            }
            Event::Retire { drain_until } => self.retire(drain_until, &mut effects),
        }
        if waiting > 0 {
            self.parked = false;
        }
        self.end_idle(waiting, sight, now, &mut effects);
        self.start_wanted(waiting, sight, now, &mut effects);
        self.look_later(waiting, sight, now, &mut effects);
        effects
    }

    fn started(&mut self, key: Key, now: Instant, effects: &mut Vec<Effect>) {
        let Some(instance) = self.instances.get_mut(&key) else { return };
        if let Some(state) = instance.state.after(Change::Ready) {
            instance.state = state;
            instance.ready_at = Some(now);
            effects.push(Effect::Open(key));
        }
    }

    /// Begins the end of instances, or starts, until `wanted` are left.
    fn scale(&mut self, wanted: u32, drain_until: Instant, sight: &Sight, effects: &mut Vec<Effect>) {
        if self.mode == Mode::Retired {
            return;
        }
        self.parked = wanted < self.policy.min;
        let wanted = wanted as usize;
        let mut alive: Vec<Key> = self.alive().collect();
        if alive.len() > wanted {
            // Those that are not ready yet first, then the quiet ones, the youngest of equals.
            alive.sort_by_key(|key| {
                let open = self.instances[key].state.is_open();
                (open, sight.loads.get(key).map_or(0, |load| load.in_flight), std::cmp::Reverse(*key))
            });
            for key in alive.drain(..alive.len() - wanted) {
                self.close(key, drain_until, effects);
            }
        }
        for _ in alive.len()..wanted {
            self.start(effects);
        }
    }

    fn retire(&mut self, drain_until: Instant, effects: &mut Vec<Effect>) {
        self.mode = Mode::Retired;
        for key in self.alive().collect::<Vec<_>>() {
            self.close(key, drain_until, effects);
        }
        for instance in self.instances.values_mut() {
            instance.drain_until = instance.drain_until.map(|until| until.min(drain_until));
        }
    }

    /// Asks closed instances to end whose calls are over, or whose time is.
    fn end_drained(&mut self, sight: &Sight, now: Instant, effects: &mut Vec<Effect>) {
        for (key, instance) in &mut self.instances {
            let busy = sight.loads.get(key).is_some_and(|load| load.in_flight > 0);
            let patient = instance.drain_until.is_none_or(|until| now < until);
            if instance.state == InstanceState::Draining && !instance.ending && !(busy && patient) {
                instance.ending = true;
                effects.push(Effect::Stop(*key));
            }
        }
    }

    /// Ends what was quiet for the idle timeout, youngest first, or notes that `min` keeps it.
    fn end_idle(&mut self, waiting: usize, sight: &Sight, now: Instant, effects: &mut Vec<Effect>) {
        if self.mode != Mode::Active || waiting > 0 {
            return;
        }
        let kept = if self.parked { 0 } else { self.policy.min as usize };
        let mut open = self.count(InstanceState::is_open);
        for key in self.alive().collect::<Vec<_>>().into_iter().rev() {
            let state = self.instances[&key].state;
            let Some(load) = sight.loads.get(&key).filter(|_| state.is_open()) else { continue };
            let quiet = load.in_flight == 0 && now.saturating_duration_since(load.last_used) >= self.policy.idle_timeout;
            if quiet && open > kept {
                open -= 1;
                self.close(key, now + self.policy.drain_limit, effects);
            } else {
                let change = if quiet { Change::Quiet } else { Change::Called };
                self.change(key, change);
            }
        }
    }

    fn start_wanted(&mut self, waiting: usize, sight: &Sight, now: Instant, effects: &mut Vec<Effect>) {
        if self.mode != Mode::Active || self.retry_at(now).is_some() {
            return;
        }
        for _ in self.count(InstanceState::counts)..self.wanted(waiting, sight) {
            self.start(effects);
        }
    }

    /// Instances for the calls that are here; at least `min`, at most `max`.
    fn wanted(&self, waiting: usize, sight: &Sight) -> usize {
        let kept = if self.parked { 0 } else { self.policy.min as usize };
        if waiting == 0 {
            return kept;
        }
        let in_flight: usize = self.alive().filter_map(|key| sight.loads.get(&key)).map(|load| load.in_flight as usize).sum();
        let for_calls = (in_flight + waiting).div_ceil(self.policy.concurrency.max(1) as usize);
        for_calls.clamp(kept, self.policy.max as usize)
    }

    fn look_later(&self, waiting: usize, sight: &Sight, now: Instant, effects: &mut Vec<Effect>) {
        let mut next: Option<Instant> = None;
        let mut note = |at: Instant| next = Some(next.map_or(at, |next| next.min(at)));
        for (key, instance) in &self.instances {
            match (instance.state, sight.loads.get(key)) {
                (InstanceState::Draining, load) if !instance.ending => {
                    let busy = load.is_some_and(|load| load.in_flight > 0);
                    note(instance.drain_until.filter(|_| busy).unwrap_or(now));
                }
                (InstanceState::Ready, load) if self.mode == Mode::Active => {
                    let used = load.filter(|load| load.in_flight == 0).map_or(now, |load| load.last_used);
                    note((used + self.policy.idle_timeout).max(now + LOOK_EVERY_MIN));
                }
                _ => {}
            }
        }
        if let Some(at) = self.retry_at(now)
            && self.mode == Mode::Active
            && self.count(InstanceState::counts) < self.wanted(waiting, sight)
        {
            note(at);
        }
        effects.extend(next.map(Effect::LookAt));
    }

    fn start(&mut self, effects: &mut Vec<Effect>) {
        let key = self.add(InstanceState::Preparing);
        self.change(key, Change::Begin);
        effects.push(Effect::Start(key));
    }

    fn close(&mut self, key: Key, drain_until: Instant, effects: &mut Vec<Effect>) {
        let Some(instance) = self.instances.get_mut(&key) else { return };
        let before = instance.state;
        let Some(after) = before.after(Change::Close) else { return };
        instance.state = after;
        instance.drain_until = Some(drain_until);
        if before == InstanceState::Starting {
            instance.ending = true;
            effects.push(Effect::Abort(key));
        } else {
            effects.push(Effect::Close(key));
        }
    }

    /// Forgets an instance of which nothing is left, and returns how it ended.
    fn end(&mut self, key: Key, effects: &mut Vec<Effect>) -> Option<InstanceState> {
        let last = self.change(key, Change::Exited)?;
        debug_assert!(last.is_over());
        self.instances.remove(&key);
        effects.push(Effect::Forget(key));
        Some(last)
    }

    /// Starts are in order again once an instance that became ready after the last failure was of use, or has lasted.
    fn note_health(&mut self, sight: &Sight, now: Instant) {
        let Some(failed_at) = self.failed_at else { return };
        let healthy = self.instances.iter().any(|(key, instance)| {
            instance
                .ready_at
                .is_some_and(|at| at > failed_at && (now.saturating_duration_since(at) >= STABLE_AFTER || sight.served(*key)))
        });
        if healthy {
            self.failures = 0;
            self.failed_at = None;
        }
    }

    /// An open instance ended by itself: a failure if it never was of use.
    fn note_end_of(&mut self, key: Key, sight: &Sight, now: Instant) {
        let ready_at = self.instances.get(&key).and_then(|instance| instance.ready_at);
        let young = ready_at.is_some_and(|at| now.saturating_duration_since(at) < STABLE_AFTER);
        if young && !sight.served(key) {
            self.note_failure(now);
        }
    }

    fn note_failure(&mut self, now: Instant) {
        self.failures = self.failures.saturating_add(1);
        self.failed_at = Some(now);
    }

    /// No start before, while there is a back-off.
    fn retry_at(&self, now: Instant) -> Option<Instant> {
        let at = self.failed_at? + backoff(self.failures)?;
        (now < at).then_some(at)
    }

    fn add(&mut self, state: InstanceState) -> Key {
        let key = Key(self.key_next);
        self.key_next += 1;
        self.instances.insert(key, Instance { state, ready_at: None, drain_until: None, ending: false });
        key
    }

    fn change(&mut self, key: Key, change: Change) -> Option<InstanceState> {
        let instance = self.instances.get_mut(&key)?;
        instance.state = instance.state.after(change)?;
        Some(instance.state)
    }

    fn alive(&self) -> impl Iterator<Item = Key> {
        self.instances.iter().filter(|(_, instance)| instance.state.counts()).map(|(key, _)| *key)
    }

    fn count(&self, of: fn(InstanceState) -> bool) -> usize {
        self.instances.values().filter(|instance| of(instance.state)).count()
    }
}

/// How long to wait after the given number of failures in a row.
fn backoff(failures: u32) -> Option<Duration> {
    let doublings = failures.checked_sub(2)?;
    Some(BACKOFF_FIRST.saturating_mul(2_u32.saturating_pow(doublings)).min(BACKOFF_MAX))
}

#[cfg(test)]
mod tests;

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;

const POLICY: Policy =
    Policy { min: 0, max: 4, concurrency: 2, idle_timeout: Duration::from_mins(1), drain_limit: Duration::from_mins(5) };

/// The least patience with calls that the steps below give.
const PATIENCE_MIN: Duration = Duration::from_secs(10);

/// A fleet with what is around it: instances with calls, and a clock.
struct World {
    fleet: Fleet,
    policy: Policy,
    now: Instant,
    waiting: usize,
    loads: BTreeMap<Key, Load>,
    starting: BTreeSet<Key>,
    open: BTreeSet<Key>,
    closed: BTreeMap<Key, Instant>,
    stopping: BTreeSet<Key>,
    forgotten: BTreeSet<Key>,
    retired: bool,
    look_at: Option<Instant>,
}

impl World {
    fn new(policy: Policy, mode: Mode) -> Self {
        let now = Instant::now();
        let fleet = Fleet::new(policy, mode);
        let (loads, starting, open, closed) = (BTreeMap::new(), BTreeSet::new(), BTreeSet::new(), BTreeMap::new());
        let (stopping, forgotten) = (BTreeSet::new(), BTreeSet::new());
        Self {
            fleet,
            policy,
            now,
            waiting: 0,
            loads,
            starting,
            open,
            closed,
            stopping,
            forgotten,
            retired: false,
            look_at: None,
        }
    }

    fn decide(&mut self, event: Event) -> Vec<Effect> {
        self.retired |= matches!(event, Event::Retire { .. });
        let sight = Sight { waiting: self.waiting, loads: self.loads.clone() };
        let effects = self.fleet.decide(event, &sight, self.now);
        self.look_at = None;
        for effect in &effects {
            self.apply(*effect);
        }
        self.check();
        effects
    }

    /// Does what was decided, and refuses what makes no sense.
    fn apply(&mut self, effect: Effect) {
        match effect {
            Effect::Start(key) => {
                assert!(!self.retired, "a start after the end");
                assert!(!self.loads.contains_key(&key) && !self.forgotten.contains(&key));
                assert!(self.starting.insert(key));
            }
            Effect::Abort(key) => {
                assert!(self.starting.remove(&key), "{key:?} was not being started");
                self.stopping.insert(key);
            }
            Effect::Open(key) => {
                assert!(self.starting.remove(&key) && self.open.insert(key));
                self.loads.insert(key, Load { in_flight: 0, last_used: self.now, served: false });
            }
            Effect::Close(key) => {
                assert!(self.open.remove(&key), "{key:?} was not open");
                self.closed.insert(key, self.now);
            }
            Effect::Stop(key) => {
                let closed_at = self.closed.remove(&key).expect("closed before, and not asked twice");
                let busy = self.loads.get(&key).is_some_and(|load| load.in_flight > 0);
                assert!(!busy || self.now >= closed_at + PATIENCE_MIN, "{key:?} still has calls");
                assert!(self.stopping.insert(key));
            }
            Effect::Forget(key) => {
                assert!(self.forgotten.insert(key), "{key:?} is forgotten twice");
                for set in [&mut self.starting, &mut self.open, &mut self.stopping] {
                    set.remove(&key);
                }
                self.closed.remove(&key);
                self.loads.remove(&key);
            }
            Effect::FailWaiting => {
                assert!(self.starting.is_empty() && self.open.is_empty(), "something is on its way for them");
                self.waiting = 0;
            }
            Effect::LookAt(at) => self.look_at = Some(at),
        }
    }

    fn check(&self) {
        let alive = self.starting.len() + self.open.len();
        assert!(alive <= self.policy.max as usize, "{alive} instances");
        for key in self.starting.iter().chain(&self.open) {
            assert!(self.fleet.state(*key).is_some_and(InstanceState::counts));
        }
        assert_eq!(self.fleet.is_over(), self.retired && alive + self.closed.len() + self.stopping.len() == 0);
        // Who waits is served, or somebody looks again.
        if self.waiting > 0 && self.fleet.mode == Mode::Active {
            assert!(alive > 0 || self.look_at.is_some(), "calls wait for nothing");
        }
        // What is closed ends by itself: by the end of a call, or by time.
        for key in self.closed.keys() {
            assert!(self.look_at.is_some(), "nobody looks after {key:?}");
        }
    }

    fn with_ready(policy: Policy, count: u32) -> Self {
        let mut world = Self::new(policy, Mode::Active);
        let drain_until = world.now;
        world.decide(Event::Scale { instances: count, drain_until });
        for key in world.starting.clone() {
            world.decide(Event::Started(key));
        }
        assert_eq!(world.open.len(), count as usize);
        world
    }

    fn busy(&mut self, key: Key, in_flight: u32) {
        self.loads.get_mut(&key).unwrap().in_flight = in_flight;
    }

    fn pass(&mut self, time: Duration) -> Vec<Effect> {
        self.now += time;
        self.decide(Event::Look)
    }
}

fn starts(effects: &[Effect]) -> usize {
    effects.iter().filter(|effect| matches!(effect, Effect::Start(_))).count()
}

#[test]
fn instances_for_calls() {
    let check = |ready: u32, in_flight: u32, waiting: usize, expect: usize| {
        let mut world = World::with_ready(POLICY, ready);
        for key in world.open.clone() {
            world.busy(key, in_flight);
        }
        world.waiting = waiting;
        let effects = world.decide(Event::Look);
        assert_eq!(starts(&effects), expect, "{ready} ready with {in_flight} each and {waiting} waiting");
        // Starts under way count: nothing more the second time.
        assert_eq!(starts(&world.decide(Event::Look)), 0);
    };
    check(0, 0, 0, 0);
    check(0, 0, 1, 1);
    check(0, 0, 2, 1);
    check(0, 0, 3, 2);
    check(0, 0, 100, 4);
    check(1, 2, 0, 0);
    check(1, 2, 1, 1);
    check(1, 2, 3, 2);
    check(2, 2, 100, 2);
    check(4, 2, 100, 0);
}

#[test]
fn min_is_there_as_soon_as_the_revision_is_active() {
    let mut world = World::new(Policy { min: 3, ..POLICY }, Mode::Trial);
    assert_eq!(starts(&world.decide(Event::Look)), 0);
    let drain_until = world.now;
    assert_eq!(starts(&world.decide(Event::Scale { instances: 1, drain_until })), 1);
    world.decide(Event::Started(Key(0)));
    assert_eq!(starts(&world.decide(Event::Activate)), 2);
}

#[test]
fn idle_ones_end_youngest_first_and_min_stays() {
    let mut world = World::with_ready(Policy { min: 1, ..POLICY }, 3);
    world.busy(Key(1), 1);
    let effects = world.pass(Duration::from_mins(1));
    assert!(effects.contains(&Effect::Close(Key(2))) && effects.contains(&Effect::Close(Key(0))), "{effects:?}");
    assert_eq!(world.open, BTreeSet::from([Key(1)]));
    world.busy(Key(1), 0);
    world.pass(Duration::from_mins(1));
    assert_eq!(world.fleet.state(Key(1)), Some(InstanceState::Idle));
    assert_eq!(world.look_at.filter(|at| *at > world.now), None, "nothing will change by time");
    world.busy(Key(1), 1);
    world.pass(Duration::ZERO);
    assert_eq!(world.fleet.state(Key(1)), Some(InstanceState::Ready));
}

#[test]
fn a_closed_instance_ends_with_its_last_call_or_its_patience() {
    let mut world = World::with_ready(POLICY, 2);
    world.busy(Key(0), 1);
    world.busy(Key(1), 1);
    let drain_until = world.now + Duration::from_secs(10);
    let effects = world.decide(Event::Scale { instances: 0, drain_until });
    assert!(!effects.iter().any(|effect| matches!(effect, Effect::Stop(_))), "{effects:?}");
    assert_eq!(world.look_at, Some(drain_until));
    world.busy(Key(1), 0);
    assert!(world.decide(Event::Look).contains(&Effect::Stop(Key(1))));
    assert!(world.pass(Duration::from_secs(10)).contains(&Effect::Stop(Key(0))));
}

#[test]
fn a_call_that_came_in_before_the_close_was_done_is_not_cut_off() {
    let mut world = World::with_ready(POLICY, 1);
    let effects = world.pass(Duration::from_mins(1));
    assert_eq!(effects, [Effect::Close(Key(0)), Effect::LookAt(world.now)]);
    world.busy(Key(0), 1);
    assert!(!world.decide(Event::Look).contains(&Effect::Stop(Key(0))));
}

#[test]
fn failures_in_a_row_wait_longer_and_longer() {
    let mut world = World::new(POLICY, Mode::Active);
    let mut waits = Vec::new();
    for _ in 0..9 {
        world.waiting = 1;
        if starts(&world.decide(Event::Look)) == 0 {
            let at = world.look_at.unwrap();
            waits.push((at - world.now).as_millis());
            world.now = at;
            assert_eq!(starts(&world.decide(Event::Look)), 1);
        }
        let key = *world.starting.first().unwrap();
        assert!(world.decide(Event::StartFailed(key)).contains(&Effect::FailWaiting));
    }
    assert_eq!(waits, [100, 200, 400, 800, 1_600, 3_200, 5_000]);
}

#[test]
fn a_start_that_lasts_or_serves_forgives_failures() {
    for serve in [true, false] {
        let mut world = World::new(POLICY, Mode::Active);
        world.fleet.failures = 5;
        world.fleet.failed_at = Some(world.now);
        world.now += BACKOFF_MAX;
        world.waiting = 1;
        world.decide(Event::Look);
        world.decide(Event::Started(Key(0)));
        world.waiting = 0;
        assert_eq!(world.fleet.failures, 5);
        if serve {
            world.loads.get_mut(&Key(0)).unwrap().served = true;
            world.pass(Duration::ZERO);
        } else {
            world.pass(STABLE_AFTER);
        }
        assert_eq!(world.fleet.failures, 0);
    }
}

#[test]
fn an_early_death_without_a_call_is_a_failure_and_a_late_one_is_not() {
    let check = |served: bool, age: Duration, expect: u32| {
        let mut world = World::with_ready(POLICY, 1);
        world.loads.get_mut(&Key(0)).unwrap().served = served;
        world.now += age;
        world.decide(Event::Exited(Key(0)));
        assert_eq!(world.fleet.failures, expect, "served {served}, {age:?} old");
        assert_eq!(world.fleet.state(Key(0)), None);
    };
    check(false, Duration::from_secs(1), 1);
    check(true, Duration::from_secs(1), 0);
    check(false, Duration::from_secs(11), 0);
}

#[test]
fn a_failure_beside_a_ready_instance_fails_nobody() {
    let mut world = World::with_ready(POLICY, 1);
    world.busy(Key(0), 2);
    world.waiting = 1;
    world.decide(Event::Look);
    assert!(!world.decide(Event::StartFailed(Key(1))).contains(&Effect::FailWaiting));
}

#[derive(Debug, Clone)]
enum Step {
    Pass(u64),
    Call,
    EndCall(usize),
    Started(usize),
    StartFailed(usize),
    Exited(usize),
    Unreachable(usize),
    Reaped(usize),
    Scale(u32),
    Activate,
    Retire,
}

fn step() -> impl Strategy<Value = Step> {
    prop_oneof![
        3 => (0_u64..120_000).prop_map(Step::Pass),
        6 => Just(Step::Call),
        4 => any::<usize>().prop_map(Step::EndCall),
        6 => any::<usize>().prop_map(Step::Started),
        2 => any::<usize>().prop_map(Step::StartFailed),
        1 => any::<usize>().prop_map(Step::Exited),
        1 => any::<usize>().prop_map(Step::Unreachable),
        3 => any::<usize>().prop_map(Step::Reaped),
        1 => (0_u32..=4).prop_map(Step::Scale),
        1 => Just(Step::Activate),
        1 => prop_oneof![9 => Just(Step::Call), 1 => Just(Step::Retire)],
    ]
}

fn pick(set: &BTreeSet<Key>, index: usize) -> Option<Key> {
    set.iter().nth(index.checked_rem(set.len())?).copied()
}

impl World {
    fn step(&mut self, step: &Step) {
        match *step {
            Step::Pass(millis) => {
                self.pass(Duration::from_millis(millis));
            }
            Step::Call => self.call(),
            Step::EndCall(index) => {
                let busy = self.loads.iter().filter(|(_, load)| load.in_flight > 0).map(|(key, _)| *key).collect();
                if let Some(key) = pick(&busy, index) {
                    let load = self.loads.get_mut(&key).unwrap();
                    *load = Load { in_flight: load.in_flight - 1, last_used: self.now, served: true };
                    self.decide(Event::Look);
                }
            }
            Step::Started(index) => {
                if let Some(key) = pick(&self.starting, index) {
                    self.decide(Event::Started(key));
                }
            }
            Step::StartFailed(index) => {
                if let Some(key) = pick(&self.starting, index) {
                    self.decide(Event::StartFailed(key));
                }
            }
            Step::Exited(index) => {
                let all = &(&self.open | &self.closed.keys().copied().collect()) | &self.stopping;
                if let Some(key) = pick(&all, index) {
                    self.decide(Event::Exited(key));
                }
            }
            Step::Unreachable(index) => {
                if let Some(key) = pick(&(&self.open | &self.closed.keys().copied().collect()), index) {
                    self.decide(Event::Unreachable(key));
                }
            }
            Step::Reaped(index) => {
                if let Some(key) = pick(&self.stopping, index) {
                    self.decide(Event::Reaped(key));
                }
            }
            Step::Scale(instances) => {
                self.decide(Event::Scale { instances, drain_until: self.now + PATIENCE_MIN });
            }
            Step::Activate => {
                self.decide(Event::Activate);
            }
            Step::Retire => {
                self.waiting = 0;
                self.decide(Event::Retire { drain_until: self.now + PATIENCE_MIN });
            }
        }
    }

    /// A call takes a slot or waits, as the throttle has it.
    fn call(&mut self) {
        let room = |load: &&mut Load| load.in_flight < self.policy.concurrency;
        let mut open = self.loads.iter_mut().filter(|(key, _)| self.open.contains(key)).map(|(_, load)| load);
        if let Some(load) = open.find(room) {
            load.in_flight += 1;
        } else if !self.retired && self.fleet.mode == Mode::Active {
            self.waiting += 1;
            self.decide(Event::Look);
        }
    }
}

proptest! {
    #[test]
    fn any_history_keeps_the_rules_and_can_be_ended(
        steps in proptest::collection::vec(step(), 0..200),
        min in 0_u32..3,
        trial: bool,
    ) {
        let mode = if trial { Mode::Trial } else { Mode::Active };
        let mut world = World::new(Policy { min, ..POLICY }, mode);
        for step in &steps {
            world.step(step);
        }
        world.step(&Step::Retire);
        world.pass(Duration::from_secs(10));
        world.pass(Duration::ZERO);
        for key in world.stopping.clone() {
            world.decide(Event::Reaped(key));
        }
        prop_assert!(world.fleet.is_over());
    }

    #[test]
    fn idleness_never_goes_below_min(
        steps in proptest::collection::vec(prop_oneof![
            (0_u64..120_000).prop_map(Step::Pass),
            Just(Step::Call),
            any::<usize>().prop_map(Step::EndCall),
            any::<usize>().prop_map(Step::Started),
            any::<usize>().prop_map(Step::Reaped),
        ], 0..200),
        min in 0_u32..4,
    ) {
        let mut world = World::new(Policy { min, ..POLICY }, Mode::Active);
        world.decide(Event::Look);
        for step in &steps {
            world.step(step);
            prop_assert!(world.starting.len() + world.open.len() >= min as usize);
        }
    }
}

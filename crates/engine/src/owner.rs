//! The task that owns the instances of one revision: it alone starts and ends them, one event after the other.
//!
//! Its events are the demand of waiting calls, ends of starts, exits, ends of stops, commands and time; `fleet` decides, and
//! [`Owner::act`] is the one place where something is done. It waits for nothing but the next event.

use std::collections::{BTreeMap, BTreeSet};
use std::sync::Arc;
use std::time::Duration;

use arc_swap::ArcSwapOption;
use funtainer_contract::{BoxFuture, Connect, Exit, ExitFuture, ExitReport, StartPhases, http};
use funtainer_model::{ErrorCode, Failure, InstanceId};
use futures_util::StreamExt as _;
use futures_util::stream::FuturesUnordered;
use tokio::sync::{mpsc, oneshot, watch};
use tokio::task::AbortHandle;
use tokio::time::Instant;
use uuid::Uuid;

use crate::backend::{Access, Backend, RevisionStart, Start, Started};
use crate::fleet::{Effect, Event, Fleet, Key, Load, Mode, Policy, Sight};
use crate::instance::InstanceState;
use crate::throttle::{Refusal, Slot, SlotParts, Throttle};
use crate::view::InstanceView;

/// How long an instance has between its stop signal and SIGKILL.
pub(crate) const STOP_GRACE: Duration = Duration::from_secs(10);

/// The last failure of a function, for `describe`.
pub(crate) type LastError = Arc<ArcSwapOption<Failure>>;

/// What an owner is asked to do. The channel needs no bound: each command belongs to a request that waits, or to a call.
pub(crate) enum Command {
    /// Have so many instances. Answered when those that were started are ready and those that were ended are reaped.
    Scale {
        /// How many.
        instances: u32,
        /// How long the calls of those that end may go on.
        drain_until: Instant,
        /// The answer.
        reply: oneshot::Sender<Result<(), Failure>>,
    },
    /// Take the function's calls.
    Activate,
    /// An instance refused a connection; it is closed already.
    Unreachable(Key),
    /// End everything, then the task.
    Retire {
        /// How long the calls in flight may go on.
        drain_until: Instant,
        /// How long an instance has between its stop signal and SIGKILL.
        grace: Duration,
    },
}

/// What an owner is made of.
pub(crate) struct OwnerParts {
    pub(crate) backend: Arc<dyn Backend>,
    pub(crate) throttle: Arc<Throttle>,
    pub(crate) revision: Arc<RevisionStart>,
    pub(crate) policy: Policy,
    pub(crate) mode: Mode,
    pub(crate) adopted: Vec<Adopted>,
    pub(crate) last_error: LastError,
    pub(crate) commands: mpsc::UnboundedReceiver<Command>,
    pub(crate) views: watch::Sender<Vec<InstanceView>>,
}

/// An instance that a former process started.
pub(crate) struct Adopted {
    pub(crate) instance: InstanceId,
    pub(crate) pid: u32,
    pub(crate) connect: Arc<dyn Connect>,
    pub(crate) exit: ExitFuture,
}

/// Runs until the revision is retired and the last of its instances is reaped.
pub(crate) async fn run(parts: OwnerParts) {
    Owner::new(parts).run().await;
}

struct Owner {
    backend: Arc<dyn Backend>,
    throttle: Arc<Throttle>,
    revision: Arc<RevisionStart>,
    fleet: Fleet,
    members: BTreeMap<Key, Member>,
    starts: FuturesUnordered<BoxFuture<'static, (Key, Result<Started, Failure>)>>,
    exits: FuturesUnordered<BoxFuture<'static, (Key, ExitReport)>>,
    stops: FuturesUnordered<BoxFuture<'static, Key>>,
    commands: mpsc::UnboundedReceiver<Command>,
    scales: Vec<Scaling>,
    look_at: Option<Instant>,
    last_error: LastError,
    grace: Duration,
    /// Whether the last one that could send a command is gone.
    deserted: bool,
    views: watch::Sender<Vec<InstanceView>>,
}

struct Member {
    instance: InstanceId,
    pid: Option<u32>,
    slot: Option<Arc<Slot>>,
    start: Option<AbortHandle>,
}

/// A scale that is not at its end.
struct Scaling {
    starting: BTreeSet<Key>,
    ending: BTreeSet<Key>,
    failure: Option<Failure>,
    reply: oneshot::Sender<Result<(), Failure>>,
}

enum Happening {
    Look,
    Start(Key, Result<Started, Failure>),
    Exit(Key, ExitReport),
    Reaped(Key),
    Command(Command),
    /// Nobody can reach this revision any more.
    Deserted,
}

impl Owner {
    fn new(parts: OwnerParts) -> Self {
        let OwnerParts { backend, throttle, revision, policy, mode, adopted, last_error, commands, views } = parts;
        let mut owner = Self {
            backend,
            throttle,
            revision,
            fleet: Fleet::new(policy, mode),
            members: BTreeMap::new(),
            starts: FuturesUnordered::new(),
            exits: FuturesUnordered::new(),
            stops: FuturesUnordered::new(),
            commands,
            scales: Vec::new(),
            look_at: None,
            last_error,
            grace: STOP_GRACE,
            deserted: false,
            views,
        };
        for Adopted { instance, pid, connect, exit } in adopted {
            let key = owner.fleet.adopt(Instant::now());
            owner.members.insert(key, Member { instance, pid: Some(pid), slot: None, start: None });
            owner.give_slot(key, connect, None, exit);
            owner.act(Effect::Open(key));
        }
        owner
    }

    async fn run(mut self) {
        self.decide(Event::Look);
        self.show();
        while !self.fleet.is_over() {
            let happening = self.next().await;
            self.handle(happening);
            self.show();
        }
        self.throttle.retire();
        self.backend.retire(self.revision.revision).await;
    }

    async fn next(&mut self) -> Happening {
        let look_at = self.look_at;
        let time = async {
            match look_at {
                Some(at) => tokio::time::sleep_until(at).await,
                None => std::future::pending().await,
            }
        };
        tokio::select! {
            biased;
            Some((key, result)) = self.starts.next() => Happening::Start(key, result),
            Some((key, report)) = self.exits.next() => Happening::Exit(key, report),
            Some(key) = self.stops.next() => Happening::Reaped(key),
            command = self.commands.recv(), if !self.deserted => command.map_or(Happening::Deserted, Happening::Command),
            () = self.throttle.demand() => Happening::Look,
            () = time => Happening::Look,
        }
    }

    fn handle(&mut self, happening: Happening) {
        match happening {
            Happening::Look => self.decide(Event::Look),
            Happening::Start(key, result) => self.start_ended(key, result),
            Happening::Exit(key, report) => self.exited(key, &report),
            Happening::Reaped(key) => self.decide(Event::Reaped(key)),
            Happening::Deserted => {
                self.deserted = true;
                self.decide(Event::Retire { drain_until: Instant::now() });
            }
            Happening::Command(Command::Activate) => self.decide(Event::Activate),
            Happening::Command(Command::Unreachable(key)) => self.decide(Event::Unreachable(key)),
            Happening::Command(Command::Retire { drain_until, grace }) => {
                self.grace = grace;
                self.decide(Event::Retire { drain_until });
            }
            Happening::Command(Command::Scale { instances, drain_until, reply }) => {
                self.decide(Event::Scale { instances, drain_until });
                let of = |wanted: &[InstanceState]| {
                    let state = |key: &&Key| self.fleet.state(**key).is_some_and(|state| wanted.contains(&state));
                    self.members.keys().filter(state).copied().collect()
                };
                let starting = of(&[InstanceState::Preparing, InstanceState::Starting]);
                let ending = of(&[InstanceState::Draining]);
                self.scales.push(Scaling { starting, ending, failure: None, reply });
            }
        }
        self.answer_scales();
    }

    fn start_ended(&mut self, key: Key, result: Result<Started, Failure>) {
        let wanted = self.fleet.state(key) == Some(InstanceState::Starting);
        if let Some(member) = self.members.get_mut(&key) {
            member.start = None;
            member.pid = result.as_ref().ok().map(|started| started.pid);
        }
        match result {
            Ok(Started { access: Access::Network(connect), phases, exit, .. }) if wanted => {
                self.give_slot(key, connect, Some(phases), exit);
                self.decide(Event::Started(key));
            }
            Err(failure) if wanted => {
                tracing::warn!(function = %self.revision.function, code = %failure.code, %failure, "a start failed");
                self.start_failed(key, failure);
            }
            Ok(started) if wanted => {
                drop(started);
                let detail = "the container was started with streams where it should have a network";
                self.end(key, Duration::ZERO);
                self.start_failed(key, Failure::new(ErrorCode::Internal, detail));
            }
            // Ended while it was being started: what was made of it is reaped before it is forgotten.
            Ok(_) => self.end(key, self.grace),
            Err(_) => self.end(key, Duration::ZERO),
        }
    }

    fn start_failed(&mut self, key: Key, failure: Failure) {
        for scale in self.scales.iter_mut().filter(|scale| scale.starting.contains(&key)) {
            scale.failure = Some(failure.clone());
        }
        self.last_error.store(Some(Arc::new(failure)));
        self.decide(Event::StartFailed(key));
    }

    fn exited(&mut self, key: Key, report: &ExitReport) {
        if self.fleet.state(key).is_some_and(InstanceState::is_open)
            && let Some(member) = self.members.get(&key)
        {
            let failure = unexpected_exit(member.instance, report);
            tracing::warn!(function = %self.revision.function, %failure, "an instance ended by itself");
            self.last_error.store(Some(Arc::new(failure)));
        }
        self.decide(Event::Exited(key));
    }

    fn decide(&mut self, event: Event) {
        let sight = self.look();
        let effects = self.fleet.decide(event, &sight, Instant::now());
        self.look_at = None;
        for effect in effects {
            self.act(effect);
        }
    }

    fn look(&self) -> Sight {
        let load = |slot: &Arc<Slot>| Load {
            in_flight: slot.in_flight(),
            last_used: self.throttle.last_used(slot),
            served: slot.has_served(),
        };
        let loads = self.members.iter().filter_map(|(key, member)| Some((*key, load(member.slot.as_ref()?)))).collect();
        Sight { waiting: self.throttle.waiting(), loads }
    }

    /// The one place where what was decided is done.
    fn act(&mut self, effect: Effect) {
        match effect {
            Effect::Start(key) => self.start(key),
            Effect::Abort(key) => {
                if let Some(start) = self.members.get(&key).and_then(|member| member.start.as_ref()) {
                    start.abort();
                }
            }
            Effect::Open(key) => {
                if let Some(slot) = self.members.get(&key).and_then(|member| member.slot.clone()) {
                    self.throttle.open(&slot);
                    self.throttle.serve_queue();
                }
            }
            Effect::Close(key) => {
                if let Some(slot) = self.members.get(&key).and_then(|member| member.slot.as_ref()) {
                    self.throttle.close(slot);
                }
            }
            Effect::Stop(key) => self.end(key, self.grace),
            Effect::Forget(key) => {
                self.members.remove(&key);
            }
            Effect::FailWaiting => {
                let failure = self.last_error.load_full();
                let unknown = || Failure::new(ErrorCode::Internal, "no instance could be started");
                self.throttle
                    .refuse_waiting(&Refusal::Failed(failure.map_or_else(unknown, |failure| Failure::clone(&failure))));
            }
            Effect::LookAt(at) => self.look_at = Some(at),
        }
    }

    fn start(&mut self, key: Key) {
        let instance = InstanceId::from_uuid(Uuid::now_v7());
        let backend = Arc::clone(&self.backend);
        let start = Start { instance, revision: Arc::clone(&self.revision), stderr: None };
        let task = tokio::spawn(async move { backend.start(start).await });
        self.members.insert(key, Member { instance, pid: None, slot: None, start: Some(task.abort_handle()) });
        self.starts.push(Box::pin(async move {
            let result = task.await.unwrap_or_else(|error| {
                Err(Failure::new(ErrorCode::Internal, format!("the start of instance {instance} broke off: {error}")))
            });
            (key, result)
        }));
    }

    fn end(&mut self, key: Key, grace: Duration) {
        let Some(instance) = self.members.get(&key).map(|member| member.instance) else { return };
        let backend = Arc::clone(&self.backend);
        self.stops.push(Box::pin(async move {
            backend.stop(instance, grace).await;
            key
        }));
    }

    fn give_slot(&mut self, key: Key, connect: Arc<dyn Connect>, phases: Option<StartPhases>, exit: ExitFuture) {
        let Some(member) = self.members.get_mut(&key) else { return };
        let parts = SlotParts {
            key,
            instance: member.instance,
            client: Some(http::Client::new(connect)),
            exit: Some(exit.clone()),
            phases,
            capacity: self.revision.plan.concurrency.get(),
        };
        member.slot = Some(Slot::new(parts, &self.throttle));
        self.exits.push(Box::pin(async move { (key, ended(exit).await) }));
    }

    fn answer_scales(&mut self) {
        let fleet = &self.fleet;
        let starting = |key: &Key| matches!(fleet.state(*key), Some(InstanceState::Preparing | InstanceState::Starting));
        for scale in &mut self.scales {
            scale.starting.retain(starting);
            scale.ending.retain(|key| fleet.state(*key).is_some());
        }
        for scale in self.scales.extract_if(.., |scale| scale.starting.is_empty() && scale.ending.is_empty()) {
            // Who asked may have gone.
            let _ = scale.reply.send(scale.failure.map_or(Ok(()), Err));
        }
    }

    fn show(&self) {
        let view = |(key, member): (&Key, &Member)| {
            let state = self.fleet.state(*key)?;
            Some(InstanceView { id: member.instance, state, pid: member.pid })
        };
        let now: Vec<InstanceView> = self.members.iter().filter_map(view).collect();
        self.views.send_if_modified(|shown| {
            let changed = *shown != now;
            *shown = now;
            changed
        });
    }
}

/// Waits until the instance is reaped.
pub(crate) async fn ended(mut exit: ExitFuture) -> ExitReport {
    ExitReport::of(&mut exit).await
}

fn unexpected_exit(instance: InstanceId, report: &ExitReport) -> Failure {
    let how = describe_exit(report);
    let code = if report.out_of_memory { ErrorCode::OutOfMemory } else { ErrorCode::InstanceExited };
    let detail = format!("instance {instance} {how}{}", report.usage());
    match code {
        _ if report.writable_full => Failure::new(code, detail).with_hint(ExitReport::WRITABLE_FULL_HINT),
        ErrorCode::OutOfMemory => Failure::new(code, detail),
        // The code's own words are about a start.
        _ => Failure::new(code, detail).with_hint("see `funtainer logs NAME`; a server should run until it is asked to end"),
    }
}

/// The second half of a sentence about an instance.
pub(crate) fn describe_exit(report: &ExitReport) -> String {
    match report.exit {
        _ if report.out_of_memory => "was killed for its memory".to_owned(),
        Exit::Code(code) => format!("ended with exit code {code}"),
        Exit::Signal(signal) => format!("was ended by signal {signal}"),
        Exit::Lost => "ended together with its sandbox".to_owned(),
    }
}

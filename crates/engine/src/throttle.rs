//! Slots of the instances of one revision, and the bounded queue of the calls that found none.
//!
//! A slot is taken and given back by one atomic operation on its instance; no lock is taken and nobody is asked while slots are
//! free. A call that finds none waits its turn in a queue behind a lock of this revision alone. First come, first served: whoever
//! arrives while others wait joins them.
//!
//! Why no wake-up is lost: a waiter first enters the queue (raises `waiting`) and then looks for a slot once more; who gives a slot
//! back first lowers the load and then reads `waiting`. All four are sequentially consistent, so at least one sees the other.

use std::collections::BTreeMap;
use std::sync::atomic::{AtomicBool, AtomicU32, AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use arc_swap::ArcSwap;
use funtainer_contract::{ExitFuture, StartPhases, http};
use funtainer_model::{Failure, InstanceId};
use tokio::sync::{Notify, oneshot};
use tokio::time::Instant;

use crate::fleet::Key;

/// Instances that are compared before the least loaded of them is taken: reading more loads than this costs more than it gains.
const COMPARED_MAX: usize = 64;
/// Set in a load: the instance takes no new calls.
const CLOSED: u32 = 1 << 31;

/// One instance, as calls see it.
pub(crate) struct Slot {
    /// Its key within its fleet.
    pub(crate) key: Key,
    /// Its identity.
    pub(crate) instance: InstanceId,
    /// How calls reach it; `None` where a call brings its own instance.
    pub(crate) client: Option<http::Client>,
    /// Its end; `None` where a call brings its own instance.
    pub(crate) exit: Option<ExitFuture>,
    /// When it became ready.
    pub(crate) ready_at: Instant,
    /// How long its start took; `None` for one that a former process started.
    pub(crate) phases: Option<StartPhases>,
    /// Set once it has answered a call.
    served: AtomicBool,
    capacity: u32,
    /// Calls in flight, and [`CLOSED`].
    load: AtomicU32,
    /// Microseconds from the throttle's epoch to the end of its last call.
    last_used_us: AtomicU64,
    /// Commands that run in it.
    guests: AtomicU32,
}

/// What [`Slot::new`] is made of.
pub(crate) struct SlotParts {
    pub(crate) key: Key,
    pub(crate) instance: InstanceId,
    pub(crate) client: Option<http::Client>,
    pub(crate) exit: Option<ExitFuture>,
    pub(crate) phases: Option<StartPhases>,
    /// Calls at once.
    pub(crate) capacity: u32,
}

/// The slots and the queue of one revision.
pub(crate) struct Throttle {
    slots: ArcSwap<Vec<Arc<Slot>>>,
    /// Length of the queue.
    waiting: AtomicUsize,
    queue: Mutex<Queue>,
    queue_max: usize,
    /// Where the comparison starts among more than [`COMPARED_MAX`] instances.
    cursor: AtomicUsize,
    /// Wakes the owner of the instances: somebody waits, or a closed instance has finished.
    demand: Notify,
    /// Whether somebody waits for [`Throttle::settled`].
    watched: AtomicBool,
    settled: Notify,
    epoch: Instant,
}

#[derive(Default)]
struct Queue {
    ticket_next: u64,
    waiters: BTreeMap<u64, oneshot::Sender<Result<Permit, Refusal>>>,
    retired: bool,
}

/// A slot in use. Given back when dropped.
pub(crate) struct Permit {
    throttle: Arc<Throttle>,
    slot: Arc<Slot>,
}

/// A command in an instance, which is in use as long as this lives.
pub(crate) struct Guest {
    throttle: Arc<Throttle>,
    slot: Arc<Slot>,
}

impl Drop for Guest {
    fn drop(&mut self) {
        self.slot.last_used_us.fetch_max(self.throttle.micros(Instant::now()), Ordering::Relaxed);
        self.slot.guests.fetch_sub(1, Ordering::SeqCst);
    }
}

/// Whether a call was in the queue.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Waited {
    Yes,
    No,
}

/// Why there is no slot.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Refusal {
    /// The queue is full.
    Full {
        /// How many wait.
        waiting: usize,
    },
    /// The revision takes no calls any more: look the function up again.
    Retired,
    /// No instance could be started.
    Failed(Failure),
}

impl Slot {
    pub(crate) fn new(parts: SlotParts, throttle: &Throttle) -> Arc<Self> {
        let SlotParts { key, instance, client, exit, phases, capacity } = parts;
        let now = Instant::now();
        Arc::new(Self {
            key,
            instance,
            client,
            exit,
            ready_at: now,
            phases,
            served: AtomicBool::new(false),
            capacity,
            load: AtomicU32::new(0),
            last_used_us: AtomicU64::new(throttle.micros(now)),
            guests: AtomicU32::new(0),
        })
    }

    /// Calls in flight.
    pub(crate) fn in_flight(&self) -> u32 {
        self.load.load(Ordering::SeqCst) & !CLOSED
    }

    /// It has answered a call. Written once: the line stays shared between the cores afterwards.
    pub(crate) fn note_served(&self) {
        if !self.has_served() {
            self.served.store(true, Ordering::Relaxed);
        }
    }

    /// Whether it ever answered a call.
    pub(crate) fn has_served(&self) -> bool {
        self.served.load(Ordering::Relaxed)
    }

    /// Ends the taking of calls.
    fn close(&self) {
        self.load.fetch_or(CLOSED, Ordering::SeqCst);
    }

    fn try_take(&self) -> bool {
        let more = |load| if load >= self.capacity { None } else { Some(load + 1) };
        self.load.fetch_update(Ordering::SeqCst, Ordering::SeqCst, more).is_ok()
    }
}

impl Throttle {
    /// Without slots. At most `queue_max` calls wait.
    pub(crate) fn new(queue_max: u32) -> Arc<Self> {
        Arc::new(Self {
            slots: ArcSwap::default(),
            waiting: AtomicUsize::new(0),
            queue: Mutex::default(),
            queue_max: queue_max as usize,
            cursor: AtomicUsize::new(0),
            demand: Notify::new(),
            watched: AtomicBool::new(false),
            settled: Notify::new(),
            epoch: Instant::now(),
        })
    }

    /// A slot at once, or as soon as it is this call's turn. `admitted` calls have been in a queue of this function before: they are
    /// never refused for its length. Dropping the future leaves the queue.
    pub(crate) async fn acquire(self: &Arc<Self>, admitted: bool) -> Result<(Permit, Waited), Refusal> {
        if self.waiting.load(Ordering::SeqCst) == 0
            && let Some(permit) = self.try_acquire()
        {
            return Ok((permit, Waited::No));
        }
        let (place, granted) = self.enter(admitted)?;
        self.serve_queue();
        if self.waiting.load(Ordering::SeqCst) > 0 {
            self.demand.notify_one();
        }
        let answer = granted.await;
        drop(place);
        // The sender is never dropped unused while the throttle lives, and `self` is alive.
        answer.unwrap_or(Err(Refusal::Retired)).map(|permit| (permit, Waited::Yes))
    }

    /// Adds an instance.
    pub(crate) fn open(&self, slot: &Arc<Slot>) {
        self.slots.rcu(|slots| {
            let mut slots = Vec::clone(slots);
            slots.push(Arc::clone(slot));
            slots
        });
    }

    /// Gives waiting calls the slots that are free.
    pub(crate) fn serve_queue(self: &Arc<Self>) {
        let mut unused = None;
        let mut queue = self.lock();
        while !queue.waiters.is_empty() {
            let Some(permit) = unused.take().or_else(|| self.try_acquire()) else { break };
            let Some((_, waiter)) = queue.waiters.pop_first() else { break };
            // Who has gone meanwhile gives the slot to the next.
            if let Err(Ok(back)) = waiter.send(Ok(permit)) {
                unused = Some(back);
            }
        }
        self.note_length(&queue);
        drop(queue);
        drop(unused);
    }

    /// Takes an instance away from new calls; those in flight go on.
    pub(crate) fn close(&self, slot: &Slot) {
        self.slots.rcu(|slots| slots.iter().filter(|other| other.key != slot.key).cloned().collect::<Vec<_>>());
        slot.close();
    }

    /// Gives every waiting call this answer.
    pub(crate) fn refuse_waiting(&self, refusal: &Refusal) {
        let mut queue = self.lock();
        let waiters = std::mem::take(&mut queue.waiters);
        self.note_length(&queue);
        drop(queue);
        for waiter in waiters.into_values() {
            // Who has gone needs no answer.
            let _ = waiter.send(Err(refusal.clone()));
        }
    }

    /// Takes no calls from now on, and sends those that wait to look the function up again.
    pub(crate) fn retire(&self) {
        self.lock().retired = true;
        for slot in self.slots.swap(Arc::default()).iter() {
            slot.close();
        }
        self.refuse_waiting(&Refusal::Retired);
    }

    /// Calls in the queue.
    pub(crate) fn waiting(&self) -> usize {
        self.waiting.load(Ordering::SeqCst)
    }

    /// Returns when somebody waits for a slot or a closed instance has finished its calls.
    pub(crate) async fn demand(&self) {
        self.demand.notified().await;
    }

    /// Returns when no call waits or is in flight on an open instance.
    pub(crate) async fn settled(&self) {
        self.watched.store(true, Ordering::SeqCst);
        loop {
            let mut changed = std::pin::pin!(self.settled.notified());
            changed.as_mut().enable();
            let in_flight: u32 = self.slots.load().iter().map(|slot| slot.in_flight()).sum();
            if in_flight == 0 && self.waiting() == 0 {
                return;
            }
            changed.await;
        }
    }

    /// Notes that a command runs in an instance that takes calls; `None` for another one.
    pub(crate) fn guest(self: &Arc<Self>, instance: InstanceId) -> Option<Guest> {
        let slot = self.slots.load().iter().find(|slot| slot.instance == instance).cloned()?;
        slot.guests.fetch_add(1, Ordering::SeqCst);
        Some(Guest { throttle: Arc::clone(self), slot })
    }

    /// When the instance's last call or command ended, or it became ready; now if a command runs in it.
    pub(crate) fn last_used(&self, slot: &Slot) -> Instant {
        if slot.guests.load(Ordering::SeqCst) > 0 {
            return Instant::now();
        }
        self.epoch + Duration::from_micros(slot.last_used_us.load(Ordering::Relaxed))
    }

    fn micros(&self, now: Instant) -> u64 {
        u64::try_from(now.saturating_duration_since(self.epoch).as_micros()).unwrap_or(u64::MAX)
    }

    /// A slot on the least loaded of the instances looked at; the oldest of equals, so that the younger ones can become idle.
    fn try_acquire(self: &Arc<Self>) -> Option<Permit> {
        let slots = self.slots.load();
        loop {
            let slot = self.least_loaded(&slots)?;
            if slot.try_take() {
                return Some(Permit { throttle: Arc::clone(self), slot: Arc::clone(slot) });
            }
        }
    }

    fn least_loaded<'a>(&self, slots: &'a [Arc<Slot>]) -> Option<&'a Arc<Slot>> {
        let first = if slots.len() > COMPARED_MAX { self.cursor.fetch_add(1, Ordering::Relaxed) % slots.len() } else { 0 };
        let mut best: Option<(u32, &Arc<Slot>)> = None;
        for (looked_at, slot) in slots[first..].iter().chain(&slots[..first]).enumerate() {
            if looked_at >= COMPARED_MAX && best.is_some() {
                break;
            }
            let load = slot.load.load(Ordering::SeqCst);
            if load < slot.capacity && best.is_none_or(|(least, _)| load < least) {
                best = Some((load, slot));
                if load == 0 {
                    break;
                }
            }
        }
        best.map(|(_, slot)| slot)
    }

    fn enter(self: &Arc<Self>, admitted: bool) -> Result<(Place, oneshot::Receiver<Result<Permit, Refusal>>), Refusal> {
        let mut queue = self.lock();
        if queue.retired {
            return Err(Refusal::Retired);
        }
        let waiting = queue.waiters.len();
        // Without any instance a first call waits for the start that it causes, whatever the length of the queue.
        let room = if self.slots.load().is_empty() { self.queue_max.max(1) } else { self.queue_max };
        if waiting >= room && !admitted {
            return Err(Refusal::Full { waiting });
        }
        let ticket = queue.ticket_next;
        queue.ticket_next += 1;
        let (sender, receiver) = oneshot::channel();
        queue.waiters.insert(ticket, sender);
        self.note_length(&queue);
        Ok((Place { throttle: Arc::clone(self), ticket }, receiver))
    }

    fn note_length(&self, queue: &Queue) {
        self.waiting.store(queue.waiters.len(), Ordering::SeqCst);
        self.note_change();
    }

    fn note_change(&self) {
        if self.watched.load(Ordering::SeqCst) {
            self.settled.notify_waiters();
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing between a lock and its end panics half-way through a change.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

impl Permit {
    /// The instance.
    pub(crate) fn slot(&self) -> &Arc<Slot> {
        &self.slot
    }
}

impl Drop for Permit {
    fn drop(&mut self) {
        let (throttle, slot) = (&self.throttle, &self.slot);
        slot.last_used_us.store(throttle.micros(Instant::now()), Ordering::Relaxed);
        if slot.load.fetch_sub(1, Ordering::SeqCst) == CLOSED | 1 {
            throttle.demand.notify_one();
        }
        if throttle.waiting.load(Ordering::SeqCst) > 0 {
            throttle.serve_queue();
        }
        throttle.note_change();
    }
}

/// A place in the queue, left when dropped; without effect once the queue has let go of it.
struct Place {
    throttle: Arc<Throttle>,
    ticket: u64,
}

impl Drop for Place {
    fn drop(&mut self) {
        let mut queue = self.throttle.lock();
        if queue.waiters.remove(&self.ticket).is_some() {
            self.throttle.note_length(&queue);
        }
    }
}

#[cfg(test)]
mod tests;

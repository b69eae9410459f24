//! Zygotes as the keeper sees them, and what they report.
//!
//! ```text
//! SettingUp ──Ready──► Ready ──idle 600 s, or EndRevision and no instance──► killed ──► reaped: forgotten
//!     └──SetUpFailed, no answer in time, garbage, socket closed────────────────^
//! ```

use std::collections::{HashMap, VecDeque};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use funtainer_model::{InstanceId, Limits, RevisionId};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fs::{Mode, OFlags};
use rustix::io::Errno;
use rustix::net::RecvFlags;

use super::instances::{Leftover, cgroup_refusal};
use super::layers::{Lent, refusal};
use super::link::{Fault, Link};
use super::mode::Slots;
use super::networks::Pool;
use super::unpacked::{Parked, Presence};
use super::{Keeper, Requester, TOKEN_ZYGOTES, TURN_MESSAGES, platform};
use crate::cgroup::Nest;
use crate::fds;
use crate::orders::{DATAGRAM_BYTES, Order, Report};
use crate::protocol::{Refusal, Reply, RevisionSpec, Streams};
use crate::step::StepError;
use crate::userns::{self, IdRange};
use crate::zygote::{self, Forked, Plan};

/// A zygote without instances ends after this.
const IDLE_MAX: Duration = Duration::from_mins(10);
/// How long a zygote may owe an answer without giving any; far above what a loaded machine needs.
const ANSWER_MAX: Duration = Duration::from_secs(30);
/// Most zygotes: each is a process of the host and holds its layers open.
const ZYGOTES_MAX: usize = 1024;

/// How far a zygote is.
enum State {
    /// Who waits for it.
    SettingUp(Vec<Requester>),
    Ready,
    /// Killed, not reaped yet. Why, if its openers are to be told.
    Ending,
}

pub(super) struct Zygote {
    revision: RevisionId,
    function: String,
    /// Its host ids.
    pub(super) ids: IdRange,
    pub(super) streams: Streams,
    pub(super) limits: Limits,
    pub(super) layers: Lent,
    /// Networks that lead out, if its instances have such.
    pub(super) pool: Option<Pool>,
    /// Where its control groups and those of its instances are.
    pub(super) nest: Nest,
    pid: i32,
    pidfd: OwnedFd,
    link: Link,
    state: State,
    /// Instances that are not reaped.
    pub(super) live: usize,
    /// Since when there is none.
    idle_since: Instant,
    /// Ends with its last instance.
    ending: bool,
    /// Orders not answered yet.
    owed: usize,
    /// When the zygote last answered, or was first asked.
    heard: Instant,
    /// Who asked for sockets, in order.
    sockets: VecDeque<(InstanceId, Requester)>,
}

/// All zygotes.
#[derive(Default)]
pub(super) struct Zygotes {
    by_key: HashMap<u64, Zygote>,
    /// Those that can be used.
    by_revision: HashMap<RevisionId, u64>,
    next_key: u64,
    pub(super) slots: Slots,
}

impl Zygotes {
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.by_key.values().filter_map(Zygote::deadline).min()
    }

    /// A zygote that takes orders.
    pub(super) fn ready(&mut self, revision: RevisionId) -> Option<(u64, &mut Zygote)> {
        let key = *self.by_revision.get(&revision)?;
        self.by_key.get_mut(&key).filter(|zygote| matches!(zygote.state, State::Ready)).map(|zygote| (key, zygote))
    }

    pub(super) fn get_mut(&mut self, key: u64) -> Option<&mut Zygote> {
        self.by_key.get_mut(&key)
    }

    pub(super) fn pools(&self) -> impl Iterator<Item = &Pool> {
        self.by_key.values().filter_map(|zygote| zygote.pool.as_ref())
    }

    pub(super) fn pools_mut(&mut self) -> impl Iterator<Item = &mut Pool> {
        self.by_key.values_mut().filter_map(|zygote| zygote.pool.as_mut())
    }

    /// Takes all pools away, with the keys of their zygotes.
    pub(super) fn take_pools(&mut self) -> Vec<(u64, Pool)> {
        self.by_key.iter_mut().filter_map(|(key, zygote)| Some((*key, zygote.pool.take()?))).collect()
    }

    pub(super) fn keys_where(&self, holds: impl Fn(&Zygote) -> bool) -> Vec<u64> {
        self.by_key.iter().filter(|(_, zygote)| holds(zygote)).map(|(key, _)| *key).collect()
    }

    /// The zygote with this key is not to be used any more.
    fn retire(&mut self, key: u64) {
        if let Some(zygote) = self.by_key.get_mut(&key) {
            if self.by_revision.get(&zygote.revision) == Some(&key) {
                self.by_revision.remove(&zygote.revision);
            }
            zygote.kill();
        }
    }
}

impl Zygote {
    fn deadline(&self) -> Option<Instant> {
        let answer = (self.owed > 0).then(|| self.heard + ANSWER_MAX);
        let idle = (self.live == 0 && matches!(self.state, State::Ready)).then(|| self.idle_since + IDLE_MAX);
        [answer, idle, self.link.deadline()].into_iter().flatten().min().filter(|_| !matches!(self.state, State::Ending))
    }

    /// Sends an order; an error means that the zygote is to be given up.
    pub(super) fn order(&mut self, epoll: &OwnedFd, order: Order, descriptors: &[BorrowedFd<'_>]) -> Result<(), Fault> {
        if order.is_answered() {
            if self.owed == 0 {
                self.heard = Instant::now();
            }
            self.owed += 1;
        }
        self.link.send(epoll, order.encode().as_bytes(), descriptors)
    }

    pub(super) fn takes_orders(&self) -> bool {
        matches!(self.state, State::Ready)
    }

    /// ESRCH only when it is dead already: its pidfd tells.
    fn kill(&mut self) {
        if let State::SettingUp(_) | State::Ready = self.state {
            let _ = fds::pidfd_signal(self.pidfd.as_fd(), libc::SIGKILL);
        }
        if let State::Ready = self.state {
            self.state = State::Ending;
        }
    }

    /// An instance is reaped.
    pub(super) fn instance_gone(&mut self) {
        self.live = self.live.saturating_sub(1);
        if self.live == 0 {
            self.idle_since = Instant::now();
        }
    }
}

impl Keeper {
    pub(super) fn tick_zygotes(&mut self, now: Instant) {
        let due = |zygote: &Zygote| {
            zygote.deadline().is_some_and(|at| at <= now)
                || zygote.ending && zygote.live == 0 && matches!(zygote.state, State::Ready)
        };
        let due: Vec<u64> = self.zygotes.by_key.iter().filter(|(_, zygote)| due(zygote)).map(|(key, _)| *key).collect();
        for key in due {
            self.zygotes.retire(key);
        }
    }

    /// Makes the zygote of a revision, or finds it; who asked is answered when it is ready.
    pub(super) fn open_revision(
        &mut self,
        requester: Requester,
        revision: RevisionId,
        function: String,
        title: &str,
        spec: &RevisionSpec,
    ) {
        if let Some(zygote) = self.zygotes.by_revision.get(&revision).and_then(|key| self.zygotes.by_key.get_mut(key)) {
            zygote.ending = false;
            zygote.idle_since = Instant::now();
            match &mut zygote.state {
                State::SettingUp(waiting) => waiting.push(requester),
                State::Ready | State::Ending => {
                    let key = self.zygotes.by_revision[&revision];
                    self.opened_again(key, requester);
                }
            }
            return;
        }
        if spec.layers.is_empty() {
            let text = "an image without layers has nothing to run".to_owned();
            self.reply(requester, &Reply::Refused(Refusal::Malformed(text)), &[]);
            return;
        }
        if self.zygotes.by_key.len() >= ZYGOTES_MAX {
            self.reply(requester, &Reply::Refused(Refusal::Exhausted("zygotes".to_owned())), &[]);
            return;
        }
        let (mode, unpacked) = (&self.mode, &self.unpacked);
        let suits = |slot| unpacked.as_ref().is_none_or(|unpacked| unpacked.has_all(mode, slot, &spec.layers));
        let Some(slot) = self.zygotes.slots.acquire(&function, mode, suits) else {
            self.reply(requester, &Reply::Refused(Refusal::Exhausted("host id ranges".to_owned())), &[]);
            return;
        };
        match self.unpack_all(slot, &spec.layers) {
            Ok(Presence::There) => {}
            // Comes back here when they are.
            Ok(Presence::Coming) => {
                let spec = Box::new(spec.clone());
                return self.park(Parked { requester, revision, function, title: title.to_owned(), spec, slot });
            }
            Err(refused) => {
                self.zygotes.slots.release(&function);
                return self.reply(requester, &Reply::Refused(refused), &[]);
            }
        }
        let ids = self.mode.range(slot);
        let key = self.zygotes.next_key;
        let pool = self.networks.pool(&self.epoll, &spec.isolation);
        match self.fork_zygote(key, slot, title, spec, pool.as_ref()) {
            Ok((Forked { pid, pidfd }, link, layers, nest)) => {
                let views = nest.views();
                self.zygotes.next_key += 1;
                let now = Instant::now();
                let zygote = Zygote {
                    revision,
                    function,
                    ids,
                    streams: spec.streams,
                    limits: spec.limits,
                    layers,
                    pool,
                    nest,
                    pid,
                    pidfd,
                    link,
                    state: State::SettingUp(vec![requester]),
                    live: 0,
                    idle_since: now,
                    ending: false,
                    owed: 0,
                    heard: now,
                    sockets: VecDeque::new(),
                };
                self.zygotes.by_key.insert(key, zygote);
                self.zygotes.by_revision.insert(revision, key);
                let seat = self.cgroups.seat(pid).unwrap_or_else(|error| {
                    self.log(&format!("a zygote (pid {pid}) has no seat: {error}"));
                    None
                });
                match views {
                    Ok(views) => {
                        let views: Vec<BorrowedFd<'_>> = views.iter().chain(&seat).map(AsFd::as_fd).collect();
                        self.order(key, Order::SetUp, &views);
                    }
                    // Who waits for it is answered by its end.
                    Err(error) => self.give_up(key, &error.to_string()),
                }
            }
            Err(refused) => {
                self.zygotes.slots.release(&function);
                if let Some(pool) = &pool {
                    self.networks.forget_all(&self.epoll, key, pool);
                }
                self.reply(requester, &Reply::Refused(refused), &[]);
            }
        }
    }

    fn fork_zygote(
        &mut self,
        key: u64,
        slot: u32,
        name: &str,
        spec: &RevisionSpec,
        pool: Option<&Pool>,
    ) -> Result<(Forked, Link, Lent, Nest), Refusal> {
        let failed = |step| move |errno| refusal(StepError { step, errno });
        let ids = self.mode.range(slot);
        let (ours, theirs) = fds::pair().map_err(failed("make a zygote's socket"))?;
        let nest = self.cgroups.nest(&format!("zygote-{key}"), ids.base).map_err(|error| cgroup_refusal(&error))?;
        let processes = self.cgroups.missing().contains(&"process limit").then_some(spec.limits.pids);
        let (group, views) = (nest.cradle(), nest.view_names());
        let plan = Plan { spec, ids, title: self.title, name, socket: theirs.as_fd(), processes, group, views };
        // SAFETY: the keeper has one thread, as was checked at its start.
        let forked = match unsafe { zygote::fork(&plan) } {
            Ok(forked) => forked,
            Err(errno) => {
                self.instances.release(Leftover::Zygote(nest));
                return Err(failed("clone a zygote")(errno));
            }
        };
        let equipped = self.equip_zygote(&forked, slot, spec, pool, ours, key);
        match equipped {
            Ok((link, layers)) => Ok((forked, link, layers, nest)),
            Err(error) => {
                // It waits for its first order, so that it dies at once.
                let _ = fds::pidfd_signal(forked.pidfd.as_fd(), libc::SIGKILL);
                let _ = epoll::delete(&self.epoll, &forked.pidfd);
                if let Err(errno) = fds::pidfd_reap(forked.pidfd.as_fd(), true) {
                    self.log(&format!("a zygote (pid {}) cannot be reaped: {errno}", forked.pid));
                }
                self.instances.release(Leftover::Zygote(nest));
                Err(error)
            }
        }
    }

    /// Ids, layers and watches of a zygote that waits for its first order.
    fn equip_zygote(
        &mut self,
        forked: &Forked,
        slot: u32,
        spec: &RevisionSpec,
        pool: Option<&Pool>,
        socket: OwnedFd,
        key: u64,
    ) -> Result<(Link, Lent), Refusal> {
        userns::write_maps(forked.pid, self.mode.range(slot)).map_err(refusal)?;
        let path = format!("/proc/{}/ns/user", forked.pid);
        let ids = rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| refusal(StepError { step: "open a user namespace", errno }))?;
        let mut layers = match &self.unpacked {
            None => self.layers.lend(&self.mounts, self.data.layers.as_fd(), &spec.layers, ids.as_fd())?,
            Some(unpacked) => unpacked.lend(&self.mounts, slot, &spec.layers)?,
        };
        let owner = self.mode.range(slot).base;
        layers.cover(self.mounts.platform(layers.mapped(), owner, &platform::files(spec, pool)).map_err(refusal)?);
        let failed = |errno| refusal(StepError { step: "watch a zygote", errno });
        let token = TOKEN_ZYGOTES + 2 * key;
        epoll::add(&self.epoll, &forked.pidfd, EventData::new_u64(token + 1), EventFlags::IN).map_err(failed)?;
        let link = Link::new(socket, &self.epoll, token).map_err(failed)?;
        Ok((link, layers))
    }

    /// The zygote of the revision ends with its last instance.
    pub(super) fn end_revision(&mut self, requester: Requester, revision: RevisionId) {
        if let Some(zygote) = self.zygotes.by_revision.get(&revision).and_then(|key| self.zygotes.by_key.get_mut(key)) {
            zygote.ending = true;
        }
        self.reply(requester, &Reply::Done, &[]);
    }

    /// Asks the zygote of an instance for sockets.
    pub(super) fn more_sockets(&mut self, requester: Requester, key: u64, instance: InstanceId, daemon: &OwnedFd) {
        if let Some(zygote) = self.zygotes.by_key.get_mut(&key) {
            zygote.sockets.push_back((instance, requester));
            self.order(key, Order::MoreSockets(instance), &[daemon.as_fd()]);
        }
    }

    pub(super) fn order(&mut self, key: u64, order: Order, descriptors: &[BorrowedFd<'_>]) {
        if let Some(zygote) = self.zygotes.by_key.get_mut(&key)
            && let Err(fault) = zygote.order(&self.epoll, order, descriptors)
        {
            self.give_up(key, &format!("{fault:?}"));
        }
    }

    /// Ends a zygote that is at fault, with all that it started.
    pub(super) fn give_up(&mut self, key: u64, why: &str) {
        if let Some(zygote) = self.zygotes.by_key.get(&key).filter(|zygote| !matches!(zygote.state, State::Ending)) {
            self.log(&format!("the zygote of revision {} (pid {}) is killed: {why}", zygote.revision, zygote.pid));
            self.zygotes.retire(key);
        }
    }

    /// An event of a zygote's socket or end; `index` is twice its key, plus one for its end.
    pub(super) fn on_zygote(&mut self, index: u64, flags: EventFlags) {
        let (key, end) = (index / 2, index % 2 == 1);
        // A report that came before the end is read before it.
        if flags.contains(EventFlags::OUT)
            && let Some(zygote) = self.zygotes.by_key.get_mut(&key)
            && let Err(fault) = zygote.link.flush(&self.epoll)
        {
            self.give_up(key, &format!("{fault:?}"));
        }
        self.read_reports(key, if end { usize::MAX } else { TURN_MESSAGES });
        if end {
            self.zygote_ended(key);
        }
    }

    fn read_reports(&mut self, key: u64, max: usize) {
        let mut buffer = [0_u8; DATAGRAM_BYTES];
        for _ in 0..max {
            let Some(zygote) = self.zygotes.by_key.get_mut(&key) else { return };
            let (bytes, descriptors) = match fds::receive(zygote.link.socket(), &mut buffer, RecvFlags::DONTWAIT) {
                Ok(Some(received)) => (received.bytes, received.fds),
                Err(fds::ReceiveError::Kernel(Errno::AGAIN)) => return,
                Ok(None) => {
                    // Closed: nothing more can come, and nothing but its end is to be waited for.
                    let _ = epoll::delete(&self.epoll, zygote.link.socket());
                    self.zygotes.retire(key);
                    return;
                }
                Err(error) => return self.give_up(key, &error.to_string()),
            };
            let Some(report) = Report::decode(&buffer[..bytes], descriptors.len()) else {
                return self.give_up(key, "it sends what is no report");
            };
            if self.on_report(key, report, descriptors).is_none() {
                return self.give_up(key, "it reports what cannot be");
            }
        }
    }

    /// Takes note of a report; `None` if it does not fit what is known.
    fn on_report(&mut self, key: u64, report: Report, mut descriptors: fds::Fds) -> Option<()> {
        let zygote = self.zygotes.by_key.get_mut(&key)?;
        zygote.heard = Instant::now();
        if report.is_answer() {
            zygote.owed = zygote.owed.checked_sub(1)?;
        }
        match report {
            Report::Ready => {
                let State::SettingUp(waiting) = std::mem::replace(&mut zygote.state, State::Ready) else { return None };
                zygote.idle_since = Instant::now();
                self.fill(key, waiting);
            }
            Report::SetUpFailed { errno, step } => {
                let State::SettingUp(waiting) = std::mem::replace(&mut zygote.state, State::Ending) else { return None };
                let revision = zygote.revision;
                self.zygotes.by_revision.remove(&revision);
                for requester in waiting {
                    self.reply(requester, &Reply::Refused(Refusal::System { step: step.clone(), errno }), &[]);
                }
            }
            Report::Spawned(instance) => self.instance_spawned(key, instance, descriptors.take(0)?)?,
            Report::SpawnFailed { instance, errno, step } => {
                self.instance_not_spawned(key, instance, Refusal::System { step, errno })?;
            }
            Report::Exited { instance, end } => self.instance_exited(key, instance, end)?,
            Report::ExecSpawned(exec) => self.exec_spawned(key, exec)?,
            Report::ExecNotSpawned { exec, errno: libc::ESRCH, .. } => {
                self.exec_not_spawned(key, exec, Refusal::NoInstance)?;
            }
            Report::ExecNotSpawned { exec, errno, step } => {
                self.exec_not_spawned(key, exec, Refusal::System { step, errno })?;
            }
            Report::ExecSignalled { exec, errno } => self.exec_signalled(key, exec, errno)?,
            Report::ExecEnded { exec, status } => self.exec_ended(key, exec, Some(status))?,
            Report::ExecLost(exec) => self.exec_ended(key, exec, None)?,
            Report::Sockets { instance, errno } => {
                let (asked, requester) = zygote.sockets.pop_front()?;
                if asked != instance {
                    return None;
                }
                let reply = match errno {
                    0 => Reply::Done,
                    libc::ESRCH => Reply::Refused(Refusal::NoInstance),
                    errno => Reply::Refused(Refusal::System { step: "make sockets in an instance".to_owned(), errno }),
                };
                self.reply(requester, &reply, &[]);
            }
            Report::Network(network) => {
                let (inside, route) = (descriptors.take(0)?, descriptors.take(1)?);
                self.network_made(key, network, inside, route)?;
            }
            Report::NetworkFailed { network, errno, step } => self.network_failed(network, errno, &step),
        }
        Some(())
    }

    /// A zygote is dead, and with it all that it started.
    fn zygote_ended(&mut self, key: u64) {
        let Some(zygote) = self.zygotes.by_key.get(&key) else { return };
        if matches!(fds::pidfd_reap(zygote.pidfd.as_fd(), false), Ok(None)) {
            return;
        }
        self.zygotes.retire(key);
        let Some(zygote) = self.zygotes.by_key.remove(&key) else { return };
        // Forked children may hold the same open files for a moment: the watch ends here, not with the last of them.
        let _ = epoll::delete(&self.epoll, &zygote.pidfd);
        let _ = epoll::delete(&self.epoll, zygote.link.socket());
        self.zygotes.slots.release(&zygote.function);
        let setting_up = match zygote.state {
            State::SettingUp(waiting) => waiting,
            State::Ready | State::Ending => Vec::new(),
        };
        for requester in setting_up.into_iter().chain(zygote.sockets.into_iter().map(|(_, requester)| requester)) {
            self.reply(requester, &Reply::Refused(Refusal::NoZygote), &[]);
        }
        if let Some(pool) = zygote.pool {
            self.pool_lost(key, pool);
        }
        self.execs_lost(key);
        self.instances_lost(key);
        self.instances.release(Leftover::Zygote(zygote.nest));
        self.event(&Reply::RevisionEnded { revision: zygote.revision });
    }

    /// Kills all zygotes, waits for their ends and removes what their instances had.
    pub(super) fn close_zygotes(&mut self) {
        let keys: Vec<u64> = self.zygotes.by_key.keys().copied().collect();
        for key in &keys {
            self.zygotes.retire(*key);
        }
        for key in keys {
            let Some(zygote) = self.zygotes.by_key.get(&key) else { continue };
            // The kernel ends what was killed; a disk that hangs may delay it.
            match fds::pidfd_ended(zygote.pidfd.as_fd(), Some(CLOSE_WAIT)) {
                Ok(true) => self.zygote_ended(key),
                other => self.log(&format!("the zygote with pid {} does not end: {other:?}", zygote.pid)),
            }
        }
        self.instances.remove_all();
    }
}

/// How long the end of one killed zygote is waited for when the keeper ends.
const CLOSE_WAIT: rustix::event::Timespec = rustix::event::Timespec { tv_sec: 5, tv_nsec: 0 };

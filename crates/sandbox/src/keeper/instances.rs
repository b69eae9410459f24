//! Instances as the keeper sees them.
//!
//! ```text
//! Starting ──Spawned──► Running ──Exited, or zygote lost──► Ended ──AcknowledgeExit──► forgotten
//!     └──SpawnFailed, or zygote lost: refused, forgotten
//! ```
//! The end of an instance is told when nothing of it is left: its control groups are removed before.

use std::collections::HashMap;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::time::{Duration, Instant};

use funtainer_model::{Cpus, InstanceId, RevisionId};
use rustix::fs::{FileType, Mode};
use rustix::pipe::{PipeFlags, pipe_with};

use super::layers::refusal;
use super::networks::Start;
use super::{Keeper, Requester};
use crate::cgroup::{CgroupError, Entrance, GroupLimits, InstanceCgroup, Nest, Removal};
use crate::fds::{self, Fds};
use crate::orders::{End, Order};
use crate::protocol::{ExitRecord, Refusal, Reply, Streams};
use crate::signals;
use crate::step::{StepError, errno_of};
use crate::zygote;

/// Most instances, ended ones that are not acknowledged included. Each running one costs the keeper up to a dozen descriptors.
const INSTANCES_MAX: usize = 1024;
/// A busy control group is tried again after this.
const REMOVAL_RETRY: Duration = Duration::from_millis(20);
/// How long they are tried when the keeper ends.
const REMOVAL_WAIT: Duration = Duration::from_secs(1);
/// Permission bits of a log pipe: a process that has changed its user may open `/dev/stdout` again, for writing only.
const LOG_MODE: u32 = 0o622;

enum State {
    Starting(Requester),
    Running { pid: u32, pidfd: OwnedFd },
    Ended { pid: u32, exit: ExitRecord },
}

pub(super) struct Instance {
    revision: RevisionId,
    /// Key of its zygote.
    zygote: u64,
    /// As the daemon gave it.
    descriptor: Vec<u8>,
    /// Read ends: standard error, then standard output if that is a log too. Empty after the end.
    logs: Vec<OwnedFd>,
    cgroup: Option<InstanceCgroup>,
    /// Number of the network that was made ahead for it.
    network: Option<u32>,
    state: State,
}

/// What a command needs to know of the instance that it is to enter.
pub(super) struct Running<'a> {
    /// Key of its zygote.
    pub(super) zygote: u64,
    /// Of its init.
    pub(super) pid: u32,
    pub(super) pidfd: BorrowedFd<'a>,
    pub(super) entrance: Entrance<'a>,
}

/// All instances.
#[derive(Default)]
pub(super) struct Instances {
    by_id: HashMap<InstanceId, Instance>,
    removals: Vec<Leftover>,
    retry: Option<Instant>,
}

/// Control groups whose last process the kernel may not have let go of. Those of instances come before the one that they lie in.
pub(super) enum Leftover {
    Instance(InstanceCgroup),
    Zygote(Nest),
}

impl Leftover {
    /// Whether it is gone. What the kernel refuses for another reason than a process is tried again too: there is no other cure.
    fn remove(&mut self) -> bool {
        let removed = match self {
            Self::Instance(cgroup) => cgroup.remove(),
            Self::Zygote(nest) => nest.remove(),
        };
        matches!(removed, Ok(Removal::Done))
    }
}

impl Instances {
    pub(super) fn deadline(&self) -> Option<Instant> {
        self.retry
    }

    /// Whether there is one with this id, ended or not.
    pub(super) fn exists(&self, id: InstanceId) -> bool {
        self.by_id.contains_key(&id)
    }

    pub(super) fn retry_removals(&mut self, now: Instant) {
        if self.retry.is_none_or(|at| at > now) {
            return;
        }
        self.removals.retain_mut(|left| !left.remove());
        self.retry = (!self.removals.is_empty()).then(|| now + REMOVAL_RETRY);
    }

    /// An instance whose init lives as far as is known.
    pub(super) fn running(&self, id: InstanceId) -> Option<Running<'_>> {
        let instance = self.by_id.get(&id)?;
        let State::Running { pid, pidfd } = &instance.state else { return None };
        let entrance = instance.cgroup.as_ref()?.entrance();
        Some(Running { zygote: instance.zygote, pid: *pid, pidfd: pidfd.as_fd(), entrance })
    }

    /// The last act: every process is dead, whatever is left goes now.
    pub(super) fn remove_all(&mut self) {
        let instances = self.by_id.drain().filter_map(|(_, instance)| instance.cgroup).map(Leftover::Instance);
        let mut left: Vec<_> = instances.chain(self.removals.drain(..)).collect();
        let deadline = Instant::now() + REMOVAL_WAIT;
        loop {
            left.retain_mut(|left| !left.remove());
            if left.is_empty() || Instant::now() >= deadline {
                // What stays is swept by the next start; the hierarchy's own removal will say so.
                return;
            }
            // A process leaves its group a moment after its death is told.
            std::thread::sleep(Duration::from_millis(1));
        }
    }

    pub(super) fn release(&mut self, mut left: Leftover) {
        if !left.remove() {
            self.removals.push(left);
            self.retry.get_or_insert_with(|| Instant::now() + REMOVAL_RETRY);
        }
    }
}

/// Both ends of a log pipe.
struct Pipe {
    read: OwnedFd,
    write: OwnedFd,
}

impl Pipe {
    fn log() -> Result<Self, Refusal> {
        let failed = |errno| refusal(StepError { step: "make a log pipe", errno });
        let (read, write) = pipe_with(PipeFlags::CLOEXEC).map_err(failed)?;
        rustix::fs::fchmod(&write, Mode::from_raw_mode(LOG_MODE)).map_err(failed)?;
        Ok(Self { read, write })
    }
}

/// How many of the streams are logs: standard error, then standard output.
const fn logs_of(streams: Streams) -> usize {
    match streams {
        Streams::Log => 2,
        Streams::Call => 1,
        Streams::Terminal(_) => 0,
    }
}

/// What a start comes with.
struct StartDescriptors {
    daemon: OwnedFd,
    /// Standard input and output of the call.
    call: Option<(OwnedFd, OwnedFd)>,
}

impl StartDescriptors {
    /// Takes them out, if they are of the number and kinds that the revision's streams ask for.
    fn take(mut descriptors: Fds, streams: Streams) -> Result<Self, Refusal> {
        let wrong = |text: &str| Refusal::Malformed(text.to_owned());
        let expected = match streams {
            Streams::Log | Streams::Terminal(_) => 1,
            Streams::Call => 3,
        };
        if descriptors.len() != expected {
            return Err(wrong("the start's descriptors do not fit the revision's streams"));
        }
        let daemon = take_descriptor(&mut descriptors, 0, &[FileType::Socket])?;
        let mut take = |index| take_descriptor(&mut descriptors, index, &STREAM_KINDS);
        let call = if expected == 3 { Some((take(1)?, take(2)?)) } else { None };
        Ok(Self { daemon, call })
    }
}

/// What a stream for the image's programs may be.
pub(super) const STREAM_KINDS: [FileType; 2] = [FileType::Fifo, FileType::Socket];

/// Takes a descriptor that is to be given to an instance.
pub(super) fn take_descriptor(descriptors: &mut Fds, index: usize, allowed: &[FileType]) -> Result<OwnedFd, Refusal> {
    let wrong = |text: &str| Refusal::Malformed(text.to_owned());
    let fd = descriptors.take(index).ok_or_else(|| wrong("a descriptor is missing"))?;
    let found = rustix::fs::fstat(&fd).map_err(|errno| refusal(StepError { step: "look at a descriptor", errno }))?;
    // A directory of the host, for one, would be a way out for the image.
    if allowed.contains(&FileType::from_raw_mode(found.st_mode)) {
        Ok(fd)
    } else {
        Err(wrong("a descriptor is neither pipe nor socket"))
    }
}

impl Keeper {
    /// Makes what an instance needs of the keeper and orders its start; the answer comes when its init lives.
    pub(super) fn try_start(&mut self, start: Start, network: Option<u32>) -> Result<(), Refusal> {
        let Start { requester, id, revision, descriptor, descriptors } = start;
        if self.instances.by_id.len() >= INSTANCES_MAX {
            return Err(Refusal::Exhausted("instances".to_owned()));
        }
        let (key, zygote) = self.zygotes.ready(revision).ok_or(Refusal::NoZygote)?;
        if zygote.live >= zygote::INSTANCES_MAX {
            return Err(Refusal::Exhausted("instances of one revision".to_owned()));
        }
        let streams = zygote.streams;
        let StartDescriptors { daemon, call } = StartDescriptors::take(descriptors, streams)?;
        let limits = zygote.limits;
        let group = GroupLimits {
            memory_bytes: limits.memory.as_bytes(),
            pids_max: limits.pids,
            cpu_weight: limits.cpu_weight.into(),
            cpu_milli: limits.cpus.map(Cpus::milli),
        };
        let cgroup = zygote.nest.create(&id.to_string(), group).map_err(|error| cgroup_refusal(&error))?;
        let made = (|| {
            let writable = self.mounts.writable(limits.writable_bytes(), zygote.ids.base).map_err(refusal)?;
            let root = self.mounts.overlay(zygote.layers.mapped(), &writable).map_err(refusal)?;
            let mut logs = Vec::with_capacity(2);
            for _ in 0..logs_of(streams) {
                logs.push(Pipe::log()?);
            }
            Ok((writable, root, logs))
        })();
        let (writable, root, logs) = match made {
            Ok(made) => made,
            Err(refused) => {
                self.instances.release(Leftover::Instance(cgroup));
                return Err(refused);
            }
        };
        // Not now: the last close of a detached mount waits for the kernel.
        self.spent.push(writable);

        let mut sent = vec![root.as_fd(), daemon.as_fd()];
        if let Some((stdin, stdout)) = &call {
            sent.extend([stdin.as_fd(), stdout.as_fd()]);
        }
        // Standard output comes before standard error.
        sent.extend(logs.iter().rev().map(|log| log.write.as_fd()));
        let Entrance { born, descriptors } = cgroup.entrance();
        sent.extend(descriptors);
        let order = Order::Spawn { instance: id, born, network: network.unwrap_or(0) };
        let ordered = zygote.order(&self.epoll, order, &sent);
        zygote.live += 1;
        let logs = logs.into_iter().map(|log| log.read).collect();
        let state = State::Starting(requester);
        let instance = Instance { revision, zygote: key, descriptor, logs, cgroup: Some(cgroup), network, state };
        self.instances.by_id.insert(id, instance);
        if let Err(fault) = ordered {
            // The end of the zygote answers for the instance.
            self.give_up(key, &format!("{fault:?}"));
        }
        Ok(())
    }

    /// A zygote says that an init lives; `None` if it was not to start one.
    pub(super) fn instance_spawned(&mut self, key: u64, id: InstanceId, pidfd: OwnedFd) -> Option<()> {
        let pid = pid_of(&pidfd)?;
        let instance = self.instances.by_id.get_mut(&id).filter(|instance| instance.zygote == key)?;
        let State::Starting(requester) = instance.state else { return None };
        if requester.generation != self.generation || self.daemon.is_none() {
            // Who asked is dead, and what it held of the instance with it.
            let _ = fds::pidfd_signal(pidfd.as_fd(), libc::SIGKILL);
        }
        instance.state = State::Running { pid, pidfd };
        let logs: Vec<OwnedFd> = instance.logs.iter().map(OwnedFd::try_clone).collect::<Result<_, _>>().ok()?;
        let logs: Vec<_> = logs.iter().map(AsFd::as_fd).collect();
        self.reply(requester, &Reply::Started { pid }, &logs);
        Some(())
    }

    /// A zygote says that it could not start an init.
    pub(super) fn instance_not_spawned(&mut self, key: u64, id: InstanceId, refused: Refusal) -> Option<()> {
        let instance = self.instances.by_id.get(&id).filter(|instance| instance.zygote == key)?;
        let State::Starting(requester) = instance.state else { return None };
        self.forget(id);
        if let Some(zygote) = self.zygotes.get_mut(key) {
            zygote.instance_gone();
        }
        self.reply(requester, &Reply::Refused(refused), &[]);
        Some(())
    }

    /// A zygote says that it has reaped an init.
    pub(super) fn instance_exited(&mut self, key: u64, id: InstanceId, end: End) -> Option<()> {
        let instance = self.instances.by_id.get(&id).filter(|instance| instance.zygote == key)?;
        let State::Running { .. } = instance.state else { return None };
        if let Some(zygote) = self.zygotes.get_mut(key) {
            zygote.instance_gone();
            if zygote.live == 0 {
                self.shrink_pool(key);
            }
        }
        self.end_instance(id, Some(end));
        Some(())
    }

    /// A zygote is dead: so are its instances.
    pub(super) fn instances_lost(&mut self, key: u64) {
        let of_zygote = self.instances.by_id.iter().filter(|(_, instance)| instance.zygote == key);
        let lost: Vec<InstanceId> = of_zygote.map(|(id, _)| *id).collect();
        for id in lost {
            match self.instances.by_id.get(&id).map(|instance| &instance.state) {
                Some(State::Starting(requester)) => {
                    let requester = *requester;
                    self.forget(id);
                    self.reply(requester, &Reply::Refused(Refusal::NoZygote), &[]);
                }
                Some(State::Running { .. }) => self.end_instance(id, None),
                Some(State::Ended { .. }) | None => {}
            }
        }
    }

    /// Records the end of a running instance and tells it.
    fn end_instance(&mut self, id: InstanceId, end: Option<End>) {
        let Some(instance) = self.instances.by_id.get_mut(&id) else { return };
        let State::Running { pid, .. } = instance.state else { return };
        let usage = instance.cgroup.as_ref().map(InstanceCgroup::usage).unwrap_or_default();
        // Where no group counts, what one process had at most, and what is left of them all, come nearest.
        let seen = usage.memory_now_bytes.max(end.map(|end| end.memory_bytes));
        let exit = ExitRecord {
            status: end.map(|end| end.status),
            out_of_memory: usage.oom_kills > 0,
            writable_full: end.is_some_and(|end| end.full),
            memory_peak: usage.memory_peak_bytes.or(seen).unwrap_or(0),
            cpu_us: usage.cpu_us.or(end.map(|end| end.cpu_us)).unwrap_or(0),
        };
        instance.state = State::Ended { pid, exit };
        instance.logs.clear();
        let (zygote, network) = (instance.zygote, instance.network.take());
        if let Some(cgroup) = instance.cgroup.take() {
            self.instances.release(Leftover::Instance(cgroup));
        }
        self.drop_network(zygote, network);
        self.event(&Reply::Exited { instance: id, exit });
    }

    fn forget(&mut self, id: InstanceId) {
        let Some(instance) = self.instances.by_id.remove(&id) else { return };
        if let Some(cgroup) = instance.cgroup {
            self.instances.release(Leftover::Instance(cgroup));
        }
        self.drop_network(instance.zygote, instance.network);
    }

    /// Sends a signal to the main process of an instance; SIGKILL to its init, and so to all of it.
    pub(super) fn signal(&mut self, requester: Requester, id: InstanceId, signal: i32) {
        if signal == libc::SIGKILL && self.stop_waiting(id) {
            return self.reply(requester, &Reply::Done, &[]);
        }
        let sent = match self.instances.by_id.get(&id).map(|instance| &instance.state) {
            Some(State::Running { pidfd, .. }) if signal == libc::SIGKILL => fds::pidfd_signal(pidfd.as_fd(), signal),
            Some(State::Running { pidfd, .. }) => signals::forward(pidfd.as_fd(), signal),
            _ => Err(rustix::io::Errno::SRCH),
        };
        let reply = match sent {
            Ok(()) => Reply::Done,
            Err(rustix::io::Errno::SRCH) => Reply::Refused(Refusal::NoInstance),
            Err(errno) => Reply::Refused(refusal(StepError { step: "send a signal", errno })),
        };
        self.reply(requester, &reply, &[]);
    }

    /// The zygote of a running instance.
    pub(super) fn zygote_of(&self, id: InstanceId) -> Option<u64> {
        let instance = self.instances.by_id.get(&id)?;
        matches!(instance.state, State::Running { .. }).then_some(instance.zygote)
    }

    /// Tells of every instance but those whose start is not answered.
    pub(super) fn list(&mut self, requester: Requester) {
        let ids: Vec<InstanceId> = self.instances.by_id.keys().copied().collect();
        for id in ids {
            let Some(instance) = self.instances.by_id.get(&id) else { continue };
            let (pid, exit) = match instance.state {
                State::Starting(_) => continue,
                State::Running { pid, .. } => (pid, None),
                State::Ended { pid, exit } => (pid, Some(exit)),
            };
            let listed =
                Reply::Listed { instance: id, revision: instance.revision, pid, descriptor: instance.descriptor.clone(), exit };
            let logs: Result<Vec<OwnedFd>, _> = instance.logs.iter().map(OwnedFd::try_clone).collect();
            match logs {
                Ok(logs) => self.reply(requester, &listed, &logs.iter().map(AsFd::as_fd).collect::<Vec<_>>()),
                Err(error) => {
                    let failed = StepError { step: "copy the descriptor of a log", errno: errno_of(&error) };
                    return self.reply(requester, &Reply::Refused(refusal(failed)), &[]);
                }
            }
        }
        self.reply(requester, &Reply::Done, &[]);
    }

    /// The daemon knows of an end: the record goes.
    pub(super) fn acknowledge(&mut self, requester: Requester, id: InstanceId) {
        let reply = match self.instances.by_id.get(&id).map(|instance| &instance.state) {
            Some(State::Ended { .. }) => {
                self.forget(id);
                Reply::Done
            }
            _ => Reply::Refused(Refusal::NoInstance),
        };
        self.reply(requester, &reply, &[]);
    }
}

/// The pid behind a handle as this process sees it, `Pid:` of its fdinfo (pidfd_open(2)), 0 if that process is reaped already. `None` for
/// what is no handle, or one of a process outside of what this one sees.
fn pid_of(pidfd: &OwnedFd) -> Option<u32> {
    use std::os::fd::AsRawFd as _;
    let text = std::fs::read_to_string(format!("/proc/self/fdinfo/{}", pidfd.as_raw_fd())).ok()?;
    let pid = text.lines().find_map(|line| line.strip_prefix("Pid:"))?;
    match pid.trim().parse::<i32>().ok()? {
        -1 => Some(0),
        pid => u32::try_from(pid).ok().filter(|pid| *pid != 0),
    }
}

pub(super) fn cgroup_refusal(error: &CgroupError) -> Refusal {
    let errno = match error {
        CgroupError::Step { source, .. } => source.errno.raw_os_error(),
        _ => libc::EIO,
    };
    Refusal::System { step: error.to_string(), errno }
}

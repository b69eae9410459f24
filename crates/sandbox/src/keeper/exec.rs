//! Commands in running instances as the keeper sees them.
//!
//! ```text
//! Starting ──ExecSpawned──► Running ──ExecEnded, ExecLost, or zygote lost──► told, forgotten
//!     └──ExecNotSpawned, or zygote lost: refused, forgotten
//! ```
//! The keeper opens the instance's namespaces, which its zygote may not: an init is not dumpable. A command belongs to the daemon that asked
//! for it, which holds its streams: when that daemon dies, its commands are killed.

use std::collections::{HashMap, VecDeque};
use std::io::Write as _;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};

use funtainer_model::{ExecId, InstanceId};
use rustix::event::Timespec;
use rustix::fs::{FileType, MemfdFlags, Mode, OFlags, SealFlags};
use rustix::io::Errno;

use super::instances::{STREAM_KINDS, take_descriptor};
use super::layers::refusal;
use super::{Keeper, Requester};
use crate::cgroup::Entrance;
use crate::fds::{self, Fds};
use crate::orders::{NAMESPACES, Order};
use crate::protocol::{ExecSpec, Refusal, Reply, Request};
use crate::step::{StepError, errno_of};
use crate::zygote;

/// Most commands in one instance at once.
const EXECS_PER_INSTANCE_MAX: usize = 16;

struct Exec {
    instance: InstanceId,
    /// Key of the zygote.
    zygote: u64,
    /// Who asked, for the answer that is owed.
    starting: Option<Requester>,
    /// The daemon that it belongs to.
    generation: u64,
}

/// All commands.
#[derive(Default)]
pub(super) struct Execs {
    by_id: HashMap<ExecId, Exec>,
    /// By zygote, in order: signals whose outcome is owed, and to whom; nobody where the keeper itself sends them.
    signals: HashMap<u64, VecDeque<(ExecId, Option<Requester>)>>,
}

impl Keeper {
    /// Orders a command; the answer comes when its helper lives.
    pub(super) fn exec(
        &mut self,
        requester: Requester,
        exec: ExecId,
        instance: InstanceId,
        spec: Box<ExecSpec>,
        descriptors: Fds,
    ) {
        if let Err(refused) = self.try_exec(requester, exec, instance, spec, descriptors) {
            self.reply(requester, &Reply::Refused(refused), &[]);
        }
    }

    fn try_exec(
        &mut self,
        requester: Requester,
        exec: ExecId,
        instance: InstanceId,
        spec: Box<ExecSpec>,
        mut descriptors: Fds,
    ) -> Result<(), Refusal> {
        if self.execs.by_id.contains_key(&exec) {
            return Err(Refusal::Malformed("the command exists".to_owned()));
        }
        let running = self.instances.running(instance).ok_or(Refusal::NoInstance)?;
        let key = running.zygote;
        let in_instance = self.execs.by_id.values().filter(|exec| exec.instance == instance).count();
        let in_zygote = self.execs.by_id.values().filter(|exec| exec.zygote == key).count();
        if in_instance >= EXECS_PER_INSTANCE_MAX || in_zygote >= zygote::EXECS_MAX {
            return Err(Refusal::Exhausted("commands in one instance".to_owned()));
        }
        let mut theirs = vec![take_descriptor(&mut descriptors, 0, &[FileType::Socket])?];
        for index in 1..descriptors.len() {
            theirs.push(take_descriptor(&mut descriptors, index, &STREAM_KINDS)?);
        }
        let namespaces = open_namespaces(running.pid, running.pidfd)?;
        let memory = sealed(&Request::Exec { exec, instance, spec })?;
        let sent: Vec<BorrowedFd<'_>> = std::iter::once(&memory).chain(&theirs).chain(&namespaces).map(AsFd::as_fd).collect();
        let Entrance { born, descriptors } = running.entrance;
        let sent = [sent, descriptors].concat();
        let zygote = self.zygotes.get_mut(key).ok_or(Refusal::NoInstance)?;
        let ordered = zygote.order(&self.epoll, Order::Exec { instance, born }, &sent);
        let generation = requester.generation;
        self.execs.by_id.insert(exec, Exec { instance, zygote: key, starting: Some(requester), generation });
        if let Err(fault) = ordered {
            // The end of the zygote answers for the command.
            self.give_up(key, &format!("{fault:?}"));
        }
        Ok(())
    }

    /// A zygote says that a command is on its way; `None` if it was not to start one.
    pub(super) fn exec_spawned(&mut self, key: u64, exec: ExecId) -> Option<()> {
        let requester = self.execs.by_id.get_mut(&exec).filter(|exec| exec.zygote == key)?.starting.take()?;
        if requester.generation != self.generation || self.daemon.is_none() {
            // Who asked is dead.
            self.order_signal(key, exec, libc::SIGKILL, None);
        }
        self.reply(requester, &Reply::Done, &[]);
        Some(())
    }

    /// A zygote says that it could not start a command.
    pub(super) fn exec_not_spawned(&mut self, key: u64, exec: ExecId, refused: Refusal) -> Option<()> {
        let requester = self.execs.by_id.get(&exec).filter(|exec| exec.zygote == key)?.starting?;
        self.execs.by_id.remove(&exec);
        self.reply(requester, &Reply::Refused(refused), &[]);
        Some(())
    }

    /// A zygote says that it has reaped a command, or that there never was one.
    pub(super) fn exec_ended(&mut self, key: u64, exec: ExecId, status: Option<i32>) -> Option<()> {
        self.execs.by_id.get(&exec).filter(|exec| exec.zygote == key && exec.starting.is_none())?;
        let ended = self.execs.by_id.remove(&exec)?;
        if ended.generation == self.generation {
            self.event(&Reply::ExecEnded { exec, status });
        }
        Some(())
    }

    /// A zygote says what came of a signal.
    pub(super) fn exec_signalled(&mut self, key: u64, exec: ExecId, errno: i32) -> Option<()> {
        let (asked, requester) = self.execs.signals.get_mut(&key)?.pop_front()?;
        if asked != exec {
            return None;
        }
        let reply = match errno {
            0 => Reply::Done,
            libc::ESRCH => Reply::Refused(Refusal::NoExec),
            errno => Reply::Refused(Refusal::System { step: "send a signal to a command".to_owned(), errno }),
        };
        if let Some(requester) = requester {
            self.reply(requester, &reply, &[]);
        }
        Some(())
    }

    /// Sends a signal to a command; SIGKILL to its process group.
    pub(super) fn signal_exec(&mut self, requester: Requester, exec: ExecId, signal: i32) {
        match self.execs.by_id.get(&exec).map(|exec| exec.zygote) {
            Some(key) => self.order_signal(key, exec, signal, Some(requester)),
            None => self.reply(requester, &Reply::Refused(Refusal::NoExec), &[]),
        }
    }

    fn order_signal(&mut self, key: u64, exec: ExecId, signal: i32, requester: Option<Requester>) {
        self.execs.signals.entry(key).or_default().push_back((exec, requester));
        self.order(key, Order::SignalExec { exec, signal }, &[]);
    }

    /// The daemon is dead, and with it the other ends of its commands' streams.
    pub(super) fn kill_execs(&mut self) {
        // Those whose start is not answered yet are killed by the answer.
        let running = self.execs.by_id.iter().filter(|(_, exec)| exec.starting.is_none());
        let running: Vec<(ExecId, u64)> = running.map(|(id, exec)| (*id, exec.zygote)).collect();
        for (exec, key) in running {
            self.order_signal(key, exec, libc::SIGKILL, None);
        }
    }

    /// A zygote is dead: so are its commands.
    pub(super) fn execs_lost(&mut self, key: u64) {
        let of_zygote = self.execs.by_id.iter().filter(|(_, exec)| exec.zygote == key);
        let lost: Vec<ExecId> = of_zygote.map(|(id, _)| *id).collect();
        for exec in lost {
            let Some(Exec { starting, generation, .. }) = self.execs.by_id.remove(&exec) else { continue };
            match starting {
                Some(requester) => self.reply(requester, &Reply::Refused(Refusal::NoInstance), &[]),
                None if generation == self.generation => self.event(&Reply::ExecEnded { exec, status: None }),
                None => {}
            }
        }
        for (_, requester) in self.execs.signals.remove(&key).into_iter().flatten() {
            if let Some(requester) = requester {
                self.reply(requester, &Reply::Refused(Refusal::NoExec), &[]);
            }
        }
    }
}

/// The namespaces of an init, as [`NAMESPACES`] lists them.
fn open_namespaces(pid: u32, pidfd: BorrowedFd<'_>) -> Result<Vec<OwnedFd>, Refusal> {
    let open = |(name, _)| {
        let path = format!("/proc/{pid}/ns/{name}");
        rustix::fs::open(path, OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty()).map_err(|errno| match errno {
            // It has ended: a zombie has no namespaces, and one that is on its way there has no memory, by which the kernel tells who may look.
            Errno::NOENT | Errno::SRCH | Errno::ACCESS => Refusal::NoInstance,
            errno => refusal(StepError { step: "open the namespaces of an instance", errno }),
        })
    };
    let opened = NAMESPACES.into_iter().map(open).collect::<Result<Vec<_>, _>>()?;
    // An init that lives now has had its pid all the time.
    match fds::pidfd_ended(pidfd, Some(Timespec { tv_sec: 0, tv_nsec: 0 })) {
        Ok(false) => Ok(opened),
        _ => Err(Refusal::NoInstance),
    }
}

/// A memory file that holds the request and that nobody can change any more.
fn sealed(request: &Request) -> Result<OwnedFd, Refusal> {
    let failed = |errno| refusal(StepError { step: "write a command into a memory file", errno });
    // It came in one message, and is encoded as it came.
    let bytes = request.encode(0).map_err(|error| Refusal::Malformed(error.to_string()))?;
    let memory = rustix::fs::memfd_create(c"exec", MemfdFlags::CLOEXEC | MemfdFlags::ALLOW_SEALING).map_err(failed)?;
    let mut file = std::fs::File::from(memory);
    file.write_all(&bytes).map_err(|error| failed(errno_of(&error)))?;
    let seals = SealFlags::SEAL | SealFlags::SHRINK | SealFlags::GROW | SealFlags::WRITE;
    rustix::fs::fcntl_add_seals(&file, seals).map_err(failed)?;
    Ok(file.into())
}

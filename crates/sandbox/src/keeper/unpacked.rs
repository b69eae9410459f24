//! Layers as directories, for a keeper that may not mount their files.
//!
//! ```text
//! DIR/unpacked/              the user's, 0700: there are setuid files in it
//!   UID-GID-COUNT/           one for each range of ids in use, named by the host's ids; it belongs to root of the range
//!     HEX, HEX.base          a layer, whole
//!     HEX.new, HEX.links     one in the making, or what a crash left of it
//! ```
//! Life of a layer here: wanted by a revision (or committed, where there is one range only) ─ queued ─ `funtainer unpack` in the range's user
//! namespace ─ renamed to its name. A revision whose layers are not all there is parked, and opened again when they are. Directories whose
//! layer has gone from the store, and what crashes left, are removed at the next start, in that namespace too.

use std::collections::{HashMap, HashSet, VecDeque};
use std::ffi::{CString, OsString};
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::ffi::OsStrExt as _;

use funtainer_model::{LayerId, RevisionId};
use rustix::event::epoll::{self, EventData, EventFlags};
use rustix::fs::{AtFlags, FileType, Gid, Mode as FileMode, OFlags, Uid};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;
use rustix::pipe::{PipeFlags, pipe_with};

use super::data::DataDirectory;
use super::layers::{Lent, open_committed, refusal};
use super::mode::Mode;
use super::{Keeper, Requester, TOKEN_UNPACKERS};
use crate::fds::{self, Exit};
use crate::mount::Mounts;
use crate::protocol::{Refusal, Reply, RevisionSpec, TEXT_BYTES_MAX};
use crate::rootless::Ids;
use crate::step::{StepError, at};
use crate::unpacker::{self, Forked};
use crate::userns;

/// Unpackers at once: a disk is the limit.
const UNPACKERS_MAX: usize = 2;
/// Most revisions that wait for layers.
const PARKED_MAX: usize = 256;
/// Most work that waits: a revision has at most 127 layers.
const QUEUE_MAX: usize = 4096;
/// Longest report of an unpacker: the text of a refusal, and a number.
const REPORT_BYTES_MAX: usize = TEXT_BYTES_MAX;
/// What the name of a layer's file ends with, and that of its directory does not.
const FILE_SUFFIX: &str = ".erofs";

/// Whether a revision can be opened.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Presence {
    /// All layers are there.
    There,
    /// They are being unpacked.
    Coming,
}

/// A revision that waits for its layers; its function has the slot.
pub(super) struct Parked {
    pub(super) requester: Requester,
    pub(super) revision: RevisionId,
    pub(super) function: String,
    pub(super) title: String,
    pub(super) spec: Box<RevisionSpec>,
    pub(super) slot: u32,
}

/// All unpacked layers, and the work on them.
pub(super) struct Unpacked {
    /// `DIR/unpacked`.
    directory: OwnedFd,
    /// Those that were used.
    slots: HashMap<u32, Slot>,
    queue: VecDeque<Work>,
    running: HashMap<u64, Running>,
    next_key: u64,
    parked: Vec<Parked>,
}

/// A range of ids with its directory.
struct Slot {
    /// A user namespace of the range.
    namespace: OwnedFd,
    directory: OwnedFd,
}

#[derive(Debug, Clone, PartialEq, Eq)]
struct Work {
    slot: u32,
    task: Task,
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Task {
    Unpack(LayerId),
    /// A name in the slot's directory.
    Remove(String),
}

/// An unpacker that lives.
struct Running {
    work: Work,
    forked: Forked,
    report: OwnedFd,
}

impl Unpacked {
    /// Opens the directory, makes it if it is not there, and queues the removal of what is not needed. Nothing for a keeper that mounts layers.
    pub(super) fn open(data: &DataDirectory, mode: &Mode, log: fn(&str)) -> Result<Option<Self>, StepError> {
        let Mode::Rootless(ids) = mode else { return Ok(None) };
        let directory =
            make_directory(data.root.as_fd(), "unpacked", 0).map_err(at("make the directory of unpacked layers"))?;
        let mut unpacked = Self {
            directory,
            slots: HashMap::new(),
            queue: VecDeque::new(),
            running: HashMap::new(),
            next_key: 0,
            parked: Vec::new(),
        };
        unpacked.sweep(data.layers.as_fd(), ids, log).map_err(at("list unpacked layers"))?;
        Ok(Some(unpacked))
    }

    /// Whether a slot has all of these layers. Makes nothing.
    pub(super) fn has_all(&self, mode: &Mode, slot: u32, layers: &[LayerId]) -> bool {
        let Mode::Rootless(ids) = mode else { return false };
        let name = ids.host_name(slot);
        layers.iter().all(|layer| {
            rustix::fs::statat(&self.directory, format!("{name}/{}", directory_name(*layer)), AtFlags::SYMLINK_NOFOLLOW).is_ok()
        })
    }

    /// The layers of a zygote, which are all there. `layers` is bottom to top.
    pub(super) fn lend(&self, mounts: &Mounts, slot: u32, layers: &[LayerId]) -> Result<Lent, Refusal> {
        let slot = self.slots.get(&slot).ok_or(Refusal::NoZygote)?;
        let open = |layer: &LayerId| {
            rustix::fs::openat(&slot.directory, directory_name(*layer), DIRECTORY | OFlags::PATH, FileMode::empty())
                .map_err(at("open an unpacked layer"))
                .and_then(|directory| mounts.directory(directory.as_fd()))
                .map_err(refusal)
        };
        Ok(Lent::directories(layers.iter().rev().map(open).collect::<Result<_, _>>()?))
    }

    /// The slot, opened at its first use.
    fn slot(&mut self, number: u32, ids: &Ids) -> Result<&Slot, StepError> {
        // Entries of the map are never removed.
        if !self.slots.contains_key(&number) {
            let range = ids.range(number);
            let namespace = userns::make(range)?;
            let directory = make_directory(self.directory.as_fd(), &ids.host_name(number), range.base)
                .map_err(at("make the directory of a range's layers"))?;
            self.slots.insert(number, Slot { namespace, directory });
        }
        Ok(&self.slots[&number])
    }

    fn enqueue(&mut self, work: Work) {
        let known = self.queue.contains(&work) || self.running.values().any(|running| running.work == work);
        if !known {
            self.queue.push_back(work);
        }
    }

    /// Queues the removal of what crashes left and of layers that the store has no more.
    fn sweep(&mut self, layers: BorrowedFd<'_>, ids: &Ids, log: fn(&str)) -> Result<(), Errno> {
        let kept: HashSet<String> =
            names(layers)?.into_iter().filter_map(|(name, _)| name.strip_suffix(FILE_SUFFIX).map(str::to_owned)).collect();
        let known: HashMap<String, u32> = (0..ids.slots()).map(|slot| (ids.host_name(slot), slot)).collect();
        for (name, is_directory) in names(self.directory.as_fd())? {
            let Some(slot) = known.get(&name).copied() else {
                log(&format!(
                    "unpacked/{name} belongs to ids that /etc/subuid and /etc/subgid do not give any more: it is not used, and root can remove it"
                ));
                continue;
            };
            if !is_directory {
                continue;
            }
            let directory = rustix::fs::openat(&self.directory, &*name, DIRECTORY | OFlags::RDONLY, FileMode::empty())?;
            let left = names(directory.as_fd())?.into_iter().map(|(name, _)| name).filter(|name| !kept.contains(name));
            for name in left.take(QUEUE_MAX) {
                self.enqueue(Work { slot, task: Task::Remove(name) });
            }
        }
        Ok(())
    }

    /// Ends all unpackers and waits for it; what they leave is removed by the next start.
    pub(super) fn close(&mut self) {
        for (_, Running { forked, .. }) in self.running.drain() {
            // Only fails when it is dead; then, and only then, there may be nothing to reap.
            let _ = fds::pidfd_signal(forked.pidfd.as_fd(), libc::SIGKILL);
            let _ = fds::pidfd_reap(forked.pidfd.as_fd(), true);
        }
    }
}

impl Keeper {
    /// Sees to it that a slot has the layers. In a keeper that mounts them they are always there.
    pub(super) fn unpack_all(&mut self, slot: u32, layers: &[LayerId]) -> Result<Presence, Refusal> {
        let (Some(unpacked), Mode::Rootless(ids)) = (&mut self.unpacked, &self.mode) else { return Ok(Presence::There) };
        let opened = unpacked.slot(slot, ids).map_err(refusal)?;
        let mut missing = Vec::new();
        for layer in layers {
            match rustix::fs::statat(&opened.directory, directory_name(*layer), AtFlags::SYMLINK_NOFOLLOW) {
                Ok(_) => {}
                Err(Errno::NOENT) => missing.push(*layer),
                Err(errno) => return Err(refusal(StepError { step: "look for an unpacked layer", errno })),
            }
        }
        if missing.is_empty() {
            return Ok(Presence::There);
        }
        if unpacked.queue.len() + missing.len() > QUEUE_MAX || unpacked.parked.len() >= PARKED_MAX {
            return Err(Refusal::Exhausted("places in the queue of layers to unpack".to_owned()));
        }
        for layer in missing {
            // Now: who asks for what the store has not is told at once.
            open_committed(self.data.layers.as_fd(), layer)?;
            unpacked.enqueue(Work { slot, task: Task::Unpack(layer) });
        }
        self.start_unpackers();
        Ok(Presence::Coming)
    }

    /// A layer was committed. Where all functions use one range, it is unpacked at once: nobody waits for it later.
    pub(super) fn unpack_ahead(&mut self, layer: LayerId) {
        if self.mode.is_rootless() && self.mode.slots() == 1 {
            // Who needs it asks again, and hears of the failure then.
            let _ = self.unpack_all(0, &[layer]);
        }
    }

    pub(super) fn park(&mut self, parked: Parked) {
        if let Some(unpacked) = &mut self.unpacked {
            unpacked.parked.push(parked);
        }
    }

    /// Starts what waits, as far as there is room.
    pub(super) fn start_unpackers(&mut self) {
        while let Some(unpacked) = self.unpacked.as_mut().filter(|unpacked| unpacked.running.len() < UNPACKERS_MAX) {
            let Some(work) = unpacked.queue.pop_front() else { return };
            if let Err(refused) = self.start_unpacker(work.clone()) {
                self.unpacker_failed(&work, &refused);
            }
        }
    }

    fn start_unpacker(&mut self, work: Work) -> Result<(), Refusal> {
        let failed = |step| move |errno| refusal(StepError { step, errno });
        let (Some(unpacked), Mode::Rootless(ids)) = (&mut self.unpacked, &self.mode) else { return Ok(()) };
        let slot = unpacked.slot(work.slot, ids).map_err(refusal)?;
        let layer = match &work.task {
            Task::Unpack(layer) => Some(open_committed(self.data.layers.as_fd(), *layer)?),
            Task::Remove(_) => None,
        };
        let (report, theirs) =
            pipe_with(PipeFlags::CLOEXEC | PipeFlags::NONBLOCK).map_err(failed("make the pipe of an unpacker"))?;
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC | OpenTreeFlags::AT_EMPTY_PATH;
        let directory = rustix::mount::open_tree(&slot.directory, c"", flags)
            .map_err(failed("clone the mount of the directory of unpacked layers"))?;
        let argv = command_line(&self.settings.unpack, &work.task, ids.range(work.slot).count);
        let plan = unpacker::Plan {
            namespace: slot.namespace.as_fd(),
            directory: directory.as_fd(),
            layer: layer.as_ref().map(AsFd::as_fd),
            report: theirs.as_fd(),
            executable: &self.executable,
            argv: &argv,
        };
        // SAFETY: the keeper has one thread, as was checked at its start.
        let forked = unsafe { unpacker::fork(&plan) }.map_err(failed("clone an unpacker"))?;
        let key = unpacked.next_key;
        unpacked.next_key += 1;
        let watched = epoll::add(&self.epoll, &forked.pidfd, EventData::new_u64(TOKEN_UNPACKERS + key), EventFlags::IN);
        unpacked.running.insert(key, Running { work, forked, report });
        if let Err(errno) = watched {
            // Nobody would hear of its end.
            if let Some(Running { forked, .. }) = unpacked.running.remove(&key) {
                let _ = fds::pidfd_signal(forked.pidfd.as_fd(), libc::SIGKILL);
                let _ = fds::pidfd_reap(forked.pidfd.as_fd(), true);
            }
            return Err(refusal(StepError { step: "watch an unpacker", errno }));
        }
        Ok(())
    }

    /// The end of an unpacker.
    pub(super) fn on_unpacker(&mut self, key: u64) {
        let Some(unpacked) = &mut self.unpacked else { return };
        let Some(running) = unpacked.running.get(&key) else { return };
        let exit = fds::pidfd_reap(running.forked.pidfd.as_fd(), false);
        if matches!(exit, Ok(None)) {
            return;
        }
        let Some(Running { work, forked, report }) = unpacked.running.remove(&key) else { return };
        // Forked children may hold the same open files for a moment: the watch ends here, not with the last of them.
        let _ = epoll::delete(&self.epoll, &forked.pidfd);
        match exit {
            Ok(Some(Exit::Code(0))) => self.open_parked(),
            exit => {
                let refused = told(&report).unwrap_or_else(|| Refusal::System {
                    step: format!("unpack a layer (pid {} ended: {exit:?})", forked.pid),
                    errno: libc::EIO,
                });
                self.unpacker_failed(&work, &refused);
            }
        }
        self.start_unpackers();
    }

    /// Opens the revisions that wait; those whose layers are not all there yet are parked again.
    fn open_parked(&mut self) {
        let Some(unpacked) = &mut self.unpacked else { return };
        for Parked { requester, revision, function, title, spec, .. } in std::mem::take(&mut unpacked.parked) {
            let released = function.clone();
            if requester.generation == self.generation {
                self.open_revision(requester, revision, function, &title, &spec);
            }
            // Only now, so that the function keeps its slot.
            self.zygotes.slots.release(&released);
        }
    }

    /// Whoever waits for this layer is told; the others go on.
    fn unpacker_failed(&mut self, work: &Work, refused: &Refusal) {
        let Some(unpacked) = &mut self.unpacked else { return };
        let Work { slot, task: Task::Unpack(layer) } = work else {
            self.log(&format!("what is left of an unpacked layer cannot be removed: {refused}"));
            return;
        };
        let parked = std::mem::take(&mut unpacked.parked);
        let (hit, others) = parked.into_iter().partition(|parked| parked.slot == *slot && parked.spec.layers.contains(layer));
        unpacked.parked = others;
        let hit: Vec<Parked> = hit;
        if hit.is_empty() {
            self.log(&format!("layer {} cannot be unpacked: {refused}", directory_name(*layer)));
        }
        for Parked { requester, function, .. } in hit {
            self.zygotes.slots.release(&function);
            self.reply(requester, &Reply::Refused(refused.clone()), &[]);
        }
    }
}

/// Flags for one directory.
const DIRECTORY: OFlags = OFlags::DIRECTORY.union(OFlags::NOFOLLOW).union(OFlags::CLOEXEC);

/// Name of a layer's directory.
fn directory_name(layer: LayerId) -> String {
    let mut name = layer.file_name();
    if name.ends_with(FILE_SUFFIX) {
        name.truncate(name.len() - FILE_SUFFIX.len());
    }
    name
}

fn command_line(program: &[OsString], task: &Task, ids: u32) -> Vec<CString> {
    let (flag, name) = match task {
        Task::Unpack(layer) => ("--name", directory_name(*layer)),
        Task::Remove(name) => ("--remove", name.clone()),
    };
    let own = [flag.to_owned(), name, "--ids".to_owned(), ids.to_string()].map(OsString::from);
    program.iter().chain(&own).filter_map(|text| CString::new(text.as_bytes()).ok()).collect()
}

/// What an unpacker has said: an error number, a blank, and a text. `None` if it said nothing of that kind.
fn told(report: &OwnedFd) -> Option<Refusal> {
    let mut text = [0_u8; REPORT_BYTES_MAX];
    let length = rustix::io::read(report, &mut text[..]).ok()?;
    let text = String::from_utf8_lossy(&text[..length]);
    let (errno, step) = text.trim_end().split_once(' ')?;
    Some(Refusal::System { step: step.to_owned(), errno: errno.parse().ok()? })
}

/// Makes a directory that only its owner may enter, or opens the one that is there.
fn make_directory(parent: BorrowedFd<'_>, name: &str, owner: u32) -> Result<OwnedFd, Errno> {
    match rustix::fs::mkdirat(parent, name, FileMode::RWXU) {
        Ok(()) | Err(Errno::EXIST) => {}
        Err(errno) => return Err(errno),
    }
    let directory = rustix::fs::openat(parent, name, DIRECTORY | OFlags::RDONLY, FileMode::empty())?;
    let found = rustix::fs::fstat(&directory)?;
    match found.st_uid {
        uid if uid == owner => {}
        // Made a moment ago, here or by a keeper that was killed then.
        0 => rustix::fs::fchown(&directory, Some(Uid::from_raw(owner)), Some(Gid::from_raw(owner)))?,
        _ => return Err(Errno::PERM),
    }
    if found.st_mode & 0o7777 != 0o700 {
        rustix::fs::fchmod(&directory, FileMode::RWXU)?;
    }
    Ok(directory)
}

/// The names in a directory, and whether they are directories.
fn names(directory: BorrowedFd<'_>) -> Result<Vec<(String, bool)>, Errno> {
    let mut names = Vec::new();
    for entry in rustix::fs::Dir::read_from(directory)? {
        let entry = entry?;
        let name = entry.file_name().to_string_lossy().into_owned();
        if name != "." && name != ".." {
            names.push((name, entry.file_type() != FileType::RegularFile));
        }
    }
    Ok(names)
}

//! A command in a running instance, from the zygote to its program.
//!
//! ```text
//! zygote ─ clone3 ─► helper: not dumpable ─ control groups ─ namespaces ─ descriptors ─ clone3(CLONE_PARENT) ─► its exit
//!                                                                                            │
//!            child of the zygote, born inside: ◄─────────────────────────────────────────────┘
//!            terminal ─ session ─ working directory ─ as the init: bounding set, no_new_privs, filter, ids, capabilities ─ exec
//! ```
//! The helper is never in the instance's pid namespace: nobody inside can name it. Its child is, from its birth on, and until its exec it is
//! a copy of the zygote. Therefore the memory that it is born with is not dumpable and belongs to the host's user namespace, so that no
//! process inside may trace it or follow `/proc/PID/{exe,fd,cwd,root,mem}` (CVE-2016-9962, CVE-2019-5736); it has no descriptor but its
//! streams and the socket on which it tells of a failure; and its working directory is set inside, through no magic link (CVE-2024-21626).
//!
//! It is a child of the zygote, which alone can reap it, and a member of the instance's pid namespace, with whose init it dies.
//! From clone to exec nothing here allocates or locks.

use std::ffi::CString;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::sync::atomic::{AtomicI32, Ordering};

use rustix::net::SendFlags;

use crate::clone::clone_sibling;
use crate::init::{self, EXIT_NOT_EXECUTED, Failed, Person, Prepared, at};
use crate::orders::NAMESPACES;
use crate::program::{Program, c_string};
use crate::protocol::{ExecSpec, InitMessage, InitStep, WindowSize};
use crate::userns::IdRange;
use crate::{cgroup, fds};

/// The number at which the socket to the daemon stands.
const DAEMON: i32 = 3;

/// A command, made ready by the zygote.
pub(crate) struct Command {
    program: Program,
    working_dir: CString,
    person: Person,
    terminal: Option<WindowSize>,
}

impl Command {
    /// From a checked specification.
    pub(crate) fn new(spec: &ExecSpec, ids: IdRange) -> Self {
        Self {
            program: Program::new(&spec.argv, &spec.env),
            working_dir: c_string(&spec.working_dir),
            person: Person::new(ids, spec.uid, spec.gid, &spec.groups),
            terminal: spec.terminal,
        }
    }
}

/// What came with the order, each above [`DAEMON`].
pub(crate) struct Parts {
    /// Where [`InitMessage`]s go.
    pub(crate) daemon: OwnedFd,
    /// Standard input, output and error, unless there is a terminal.
    pub(crate) streams: Option<[OwnedFd; 3]>,
    /// Of the instance, as [`NAMESPACES`] lists them.
    pub(crate) namespaces: [OwnedFd; NAMESPACES.len()],
    /// Doors of its cgroups.
    pub(crate) doors: init::Doors,
}

/// The whole life of a helper. The pid of the process that it makes is left in `pid`.
pub(crate) fn help(prepared: &Prepared, command: &Command, parts: Parts, pid: &AtomicI32) -> ! {
    let Parts { daemon, streams, namespaces, doors } = parts;
    let entered = enter(&namespaces, doors).and_then(|()| {
        drop(namespaces);
        arrange(daemon.as_fd(), streams)
    });
    if let Err(failed) = entered {
        give_up(daemon.as_fd(), &failed);
    }
    // It stands at another number now.
    std::mem::forget(daemon);
    // SAFETY: `arrange` put the socket there, and nothing closes it before this process and the next one end.
    let daemon = unsafe { BorrowedFd::borrow_raw(DAEMON) };
    // SAFETY: one thread, as in the zygote that this is a copy of; the child ends in `become_command`.
    match unsafe { clone_sibling() } {
        Ok(Some(sibling)) => {
            pid.store(sibling, Ordering::Release);
            init::exit(0)
        }
        Ok(None) => {
            let Err(failed) = become_command(prepared, command, daemon);
            give_up(daemon, &failed)
        }
        // ENOMEM also says that the pid namespace takes nobody any more: its init is ending.
        Err(errno) => give_up(daemon, &Failed { step: InitStep::Enter, errno }),
    }
}

fn give_up(daemon: BorrowedFd<'_>, failed: &Failed) -> ! {
    let message = InitMessage::ExecFailed { step: failed.step, errno: failed.errno.raw_os_error() };
    // Who is gone need not know.
    let _ = fds::send(daemon, &message.to_bytes(), &[], SendFlags::empty());
    init::exit(EXIT_NOT_EXECUTED)
}

/// Into the instance, but for its pid namespace, which the next child is born in.
fn enter(namespaces: &[OwnedFd; NAMESPACES.len()], doors: init::Doors) -> Result<(), Failed> {
    init::not_dumpable()?;
    for door in doors {
        cgroup::attach_current([door.as_fd()]).map_err(init::during(InitStep::Cgroup))?;
    }
    for (namespace, (_, kind)) in namespaces.iter().zip(NAMESPACES) {
        // The last one, the mount namespace, brings its root directory along, which becomes the working directory, too.
        rustix::thread::move_into_link_name_space(namespace.as_fd(), Some(kind)).map_err(at(InitStep::Enter))?;
    }
    Ok(())
}

/// Leaves the streams at 0 to 2, the socket at [`DAEMON`], and nothing else.
fn arrange(daemon: BorrowedFd<'_>, streams: Option<[OwnedFd; 3]>) -> Result<(), Failed> {
    let failed = at(InitStep::Enter);
    // All stand above, since the zygote keeps 0 to 3 occupied: none is overwritten before it is placed.
    for (stream, number) in streams.iter().flatten().zip(0..) {
        fds::place(stream.as_fd(), number).map_err(&failed)?;
    }
    fds::place(daemon, DAEMON).map_err(&failed)?;
    drop(streams);
    fds::close_from(DAEMON + 1).map_err(&failed)?;
    fds::cloexec_from(DAEMON).map_err(&failed)
}

/// From a copy of the zygote inside the instance to the program.
fn become_command(prepared: &Prepared, command: &Command, daemon: BorrowedFd<'_>) -> Result<std::convert::Infallible, Failed> {
    prepared.set_title(b"funtainer exec");
    let failed = at(InitStep::Terminal);
    rustix::process::setsid().map_err(&failed)?;
    if let Some(size) = command.terminal {
        let terminal = init::send_terminal(daemon, size, command.person.uid)?;
        rustix::process::ioctl_tiocsctty(&terminal).map_err(&failed)?;
        for number in 0..DAEMON {
            fds::place(terminal.as_fd(), number).map_err(&failed)?;
        }
    }
    init::enter_directory(&command.working_dir).map_err(at(InitStep::WorkingDirectory))?;
    init::confine(prepared)?;
    // Whatever was opened above is closed by the exec as it is; this holds also for what may be added one day.
    fds::cloexec_from(DAEMON).map_err(at(InitStep::Privileges))?;
    init::become_person(&command.person)?;
    Err(Failed { step: InitStep::Exec, errno: command.program.exec() })
}

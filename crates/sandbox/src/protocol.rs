//! The protocol between the unprivileged daemon and the keeper: a closed set of fixed messages over one `SOCK_SEQPACKET` pair,
//! one message a datagram, descriptors by `SCM_RIGHTS`.
//!
//! ```text
//! daemon                          keeper                       zygote            init
//!   │ Hello ───────────────────────►│
//!   │◄──────────────────── Welcome  │
//!   │ OpenRevision ────────────────►│ clone3(NEWUSER|NEWPID) ────►│
//!   │ Start + init pair [+ pipes] ─►│ cgroup, overlay ── Spawn ──►│ clone3(..) ──────►│
//!   │◄────── Started + log pipes    │◄─────────────── Spawned     │                   │
//!   │◄═══════════════════════ Sockets + fds, Executed | ExecFailed (init pair) ═══════│
//!   │◄────────────────── Exited     │◄─────────────── Exited      │◄── wait status    │
//!   │ AcknowledgeExit ─────────────►│
//! ```
//!
//! A command in a running instance (`exec`):
//!
//! ```text
//!   │ Exec + pair + streams ───────►│ namespaces opened ─ Exec ──►│ clone, enter, clone ─► the command
//!   │◄──────────────────────── Done │◄─────────────── Spawned     │                   │
//!   │◄═══════════════════════ Terminal + fd │ ExecFailed, else the pair ends (exec) ══│
//!   │ SignalExec ──────────────────►│ ── signal ─────────────────►│ ── kill(2) ──────►│
//!   │◄──────────────── ExecEnded    │◄─────────────── ExecEnded   │◄── wait status    │
//! ```
//!
//! The keeper answers every request, in any order, with the request's number; events have number 0.
//! Numbers are little endian. A datagram starts with [`MAGIC`], [`VERSION`], the kind of message and the request's number; what follows
//! depends on the kind. Surplus bytes, missing bytes, another number of descriptors and unknown kinds are refused, never guessed at.

mod check;
mod codec;
mod exec;
#[cfg(test)]
mod tests;

pub use codec::{check_any, number_of};
pub use exec::{ExecSpec, WindowSize};

use funtainer_model::{ExecId, InstanceId, Isolation, LayerId, Limits, RevisionId, StopSignal};

/// First two bytes of each datagram.
pub const MAGIC: u16 = 0xF7A1;
/// Version of the messages below. Both sides are one binary; another version means a half-replaced installation and is refused.
pub const VERSION: u16 = 2;
/// Longest datagram in bytes; below the default send buffer of a Unix socket (net.core.wmem_default, 212,992).
pub const MESSAGE_BYTES_MAX: usize = 128 * 1024;
/// Longest descriptor of an instance in bytes.
pub const DESCRIPTOR_BYTES_MAX: usize = 4 * 1024;
/// Most descriptors in one datagram (kernel: SCM_MAX_FD is 253).
pub const DESCRIPTORS_MAX: usize = 16;
/// Most layers of one image: overlayfs takes 500, the OCI tools 127.
pub const LAYERS_MAX: usize = 127;
/// Longest key of a function in bytes.
pub const FUNCTION_BYTES_MAX: usize = 400;
/// Longest title and longest host name in bytes (the kernel takes host names of 64).
pub const TITLE_BYTES_MAX: usize = 63;
/// Most supplementary groups.
pub const GROUPS_MAX: usize = 64;
/// Most listeners of the platform in one instance.
pub const LISTENERS_MAX: usize = 4;
/// Most planned files.
pub const FILES_MAX: usize = 32;
/// Most volumes.
pub const VOLUMES_MAX: usize = 32;
/// Longest planned file in bytes.
pub const FILE_BYTES_MAX: usize = 16 * 1024;
/// Longest path in bytes (the kernel's PATH_MAX less its NUL).
pub const PATH_BYTES_MAX: usize = 4095;
/// Longest text of a refusal in bytes.
pub const TEXT_BYTES_MAX: usize = 256;
/// How many user and group ids an instance has: 0 to 65,535.
pub const IDS: u32 = 0x1_0000;

/// Bytes that are no message, or a message that breaks a bound.
#[derive(Debug, Clone, Copy, PartialEq, Eq, thiserror::Error)]
pub enum CodecError {
    /// It does not start with [`MAGIC`].
    #[error("the message is not of this protocol")]
    Magic,
    /// The other side is another build.
    #[error("the message has version {0}, this is version {VERSION}")]
    Version(u16),
    /// No such kind in this direction.
    #[error("unknown kind of message {0:#x}")]
    Kind(u16),
    /// It ends before its last field.
    #[error("the message is too short")]
    Short,
    /// This many bytes follow its last field.
    #[error("{0} bytes follow the message")]
    Surplus(usize),
    /// The kind goes with another number of descriptors.
    #[error("{0} descriptors do not belong to this message")]
    Descriptors(usize),
    /// A length or count is too great.
    #[error("{what}: more than {max}")]
    Bound {
        /// Of what.
        what: &'static str,
        /// Greatest value.
        max: usize,
    },
    /// A field has a value that means nothing.
    #[error("{0}: not a valid value")]
    Value(&'static str),
}

/// From the daemon.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Request {
    /// First message. Answer: [`Reply::Welcome`].
    Hello,
    /// The daemon accepts calls. Answer: [`Reply::Done`].
    Ready,
    /// Makes the revision's zygote unless it is there. Answer: [`Reply::Done`].
    OpenRevision {
        /// Which.
        revision: RevisionId,
        /// Functions with equal keys share a host id range, others never do. At most 400 bytes.
        function: String,
        /// Shown by `ps` behind `funtainer zygote`, at most 63 bytes.
        title: String,
        /// What its instances are.
        spec: Box<RevisionSpec>,
    },
    /// Ends the zygote once its instances are gone; without instances at once. Answer: [`Reply::Done`], also for an unknown one.
    EndRevision {
        /// Which.
        revision: RevisionId,
    },
    /// Starts an instance. Descriptors: the init's end of a seqpacket pair ([`InitMessage`]); with [`Streams::Call`] then
    /// the read end for standard input and the write end for standard output.
    /// Answer: [`Reply::Started`], with the read ends of standard error and, with [`Streams::Log`], of standard output.
    Start {
        /// Its identity, chosen by the daemon.
        instance: InstanceId,
        /// An opened revision.
        revision: RevisionId,
        /// Opaque to the keeper; comes back from `List`. At most [`DESCRIPTOR_BYTES_MAX`].
        descriptor: Vec<u8>,
    },
    /// Sends the signal to the main process of an instance; SIGKILL ends the whole instance. Answer: [`Reply::Done`].
    Signal {
        /// Which.
        instance: InstanceId,
        /// What.
        signal: StopSignal,
    },
    /// Asks for more unconnected sockets. Descriptor: one end of a seqpacket pair, on which [`InitMessage::Sockets`] arrive.
    /// Answer: [`Reply::Done`].
    MoreSockets {
        /// Which.
        instance: InstanceId,
    },
    /// Asks for all instances. Answer: a [`Reply::Listed`] for each, then [`Reply::Done`].
    List,
    /// Starts a command in a running instance. Descriptors: the command's end of a seqpacket pair ([`InitMessage`]); without a terminal then
    /// its standard input, output and error.
    /// Answer: [`Reply::Done`] when its process is being made; what comes of it is said on the pair, whose end without
    /// [`InitMessage::ExecFailed`] says that the program runs (or was killed before), and its end by [`Reply::ExecEnded`].
    /// A command ends with its instance and with the daemon that asked for it.
    Exec {
        /// Its identity, chosen by the daemon.
        exec: ExecId,
        /// Where.
        instance: InstanceId,
        /// What.
        spec: Box<ExecSpec>,
    },
    /// Sends the signal to a command; SIGKILL to its whole process group. Answer: [`Reply::Done`].
    SignalExec {
        /// Which.
        exec: ExecId,
        /// What.
        signal: StopSignal,
    },
    /// The daemon has taken note of an exit. Answer: [`Reply::Done`].
    AcknowledgeExit {
        /// Which.
        instance: InstanceId,
    },
    /// Takes a finished layer into the store. Descriptor: the file, read-only, with no writer left. Answer: [`Reply::Done`].
    CommitLayer {
        /// Its name.
        layer: LayerId,
    },
}

/// From the keeper.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Reply {
    /// To `Hello`.
    Welcome {
        /// `DIR/id`, 16 hex digits.
        data_id: String,
    },
    /// The request was carried out.
    Done,
    /// The request was not carried out; nothing of it is left.
    Refused(Refusal),
    /// The instance is being set up; what comes of it is said on the init pair, its end by [`Reply::Exited`].
    /// Descriptors: read end of standard error; with [`Streams::Log`] then of standard output; with [`Streams::Terminal`] none.
    Started {
        /// Pid of the init in the keeper's pid namespace; 0 if it has ended already.
        pid: u32,
    },
    /// One instance. Descriptors as with `Started`, none if it has ended.
    Listed {
        /// Which.
        instance: InstanceId,
        /// Of which revision.
        revision: RevisionId,
        /// Pid of the init in the keeper's pid namespace.
        pid: u32,
        /// As given to `Start`.
        descriptor: Vec<u8>,
        /// How it ended, if it has.
        exit: Option<ExitRecord>,
    },
    /// Event: an instance is reaped, nothing of it is left. Kept until acknowledged.
    Exited {
        /// Which.
        instance: InstanceId,
        /// How.
        exit: ExitRecord,
    },
    /// Event: a command of [`Request::Exec`] is reaped. Told once, to the daemon that started it.
    ExecEnded {
        /// Which.
        exec: ExecId,
        /// Its wait status, wait(2); `None` where it never ran or its zygote was lost.
        status: Option<i32>,
    },
    /// Event: the zygote of a revision is gone.
    RevisionEnded {
        /// Which.
        revision: RevisionId,
    },
    /// Event: the keeper was asked to stop. The daemon drains and exits by itself within the time; the keeper ends what is left.
    Stop {
        /// Milliseconds.
        grace_ms: u32,
    },
}

/// What every instance of a revision has in common.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct RevisionSpec {
    /// Bottom to top.
    pub layers: Vec<LayerId>,
    /// Command line, NUL-free. Without a `/` in the first, `PATH` of `env` is searched inside.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=VALUE`, NUL-free.
    pub env: Vec<Vec<u8>>,
    /// Absolute; made if missing.
    pub working_dir: Vec<u8>,
    /// Below 65536.
    pub uid: u32,
    /// Below 65536.
    pub gid: u32,
    /// Each below 65536, at most 64.
    pub groups: Vec<u32>,
    /// What each may use.
    pub limits: Limits,
    /// What each may reach.
    pub isolation: Isolation,
    /// Absolute directories that are writable and begin with what the image holds there. At most 32.
    pub volumes: Vec<Vec<u8>>,
    /// Use of the standard streams.
    pub streams: Streams,
    /// Small files to make before the start.
    pub files: Vec<FileSpec>,
    /// Ports on 127.0.0.1 inside on which the platform accepts: sent as [`InitMessage::Listeners`], in this order. At most 4.
    pub listeners: Vec<u16>,
    /// Unconnected TCP sockets that an init sends before it executes the program.
    pub sockets: SocketCounts,
    /// Forwarded by the init when the platform ends the instance.
    pub stop_signal: StopSignal,
    /// UTS host name, at most 63 bytes.
    pub hostname: String,
}

/// Use of the standard streams.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Streams {
    /// Input is /dev/null, output and error are log pipes.
    Log,
    /// Input and output come with `Start`, error is a log pipe.
    Call,
    /// All three are a terminal that the init makes inside and whose other end it sends ([`InitMessage::Terminal`]). There is no log.
    Terminal(WindowSize),
}

/// A small file.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct FileSpec {
    /// Absolute, without `..`.
    pub path: Vec<u8>,
    /// Permission bits.
    pub mode: u32,
    /// At most 16 KiB.
    pub content: Vec<u8>,
}

/// Numbers of sockets; together at most [`DESCRIPTORS_MAX`].
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct SocketCounts {
    /// IPv4, bound to the platform's extra address.
    pub v4: u8,
    /// IPv6, likewise.
    pub v6: u8,
}

/// Why a request was not carried out.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The message breaks the protocol; the daemon is at fault.
    #[error("malformed message: {0}")]
    Malformed(String),
    /// No such zygote; open the revision again.
    #[error("the revision has no zygote")]
    NoZygote,
    /// No such instance, or it has ended.
    #[error("no such instance")]
    NoInstance,
    /// No such command, or it has ended.
    #[error("no such command")]
    NoExec,
    /// The layer's file is not in the store.
    #[error("layer {0:?} is not in the store")]
    NoLayer(LayerId),
    /// A system call failed.
    #[error("{step}: errno {errno}")]
    System {
        /// What was being done.
        step: String,
        /// errno(3).
        errno: i32,
    },
    /// A bound was reached (instances, id ranges).
    #[error("{0} are used up")]
    Exhausted(String),
}

/// How an instance ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct ExitRecord {
    /// Wait status of the main process, wait(2); `None` where its zygote was lost.
    pub status: Option<i32>,
    /// Whether the cgroup saw an out-of-memory kill.
    pub out_of_memory: bool,
    /// Whether its writable layer had no room left for bytes or files when its main process ended.
    pub writable_full: bool,
    /// Highest memory use in bytes, 0 where unknown. Where no cgroup counts it (v2 before 5.19, no cgroup): the most that one of its
    /// processes had, or what its files still take, if that is more.
    pub memory_peak: u64,
    /// CPU time in microseconds, 0 where unknown. Without a cgroup, that of the processes that were reaped in it.
    pub cpu_us: u64,
}

/// From an init (or, for `MoreSockets`, its zygote; or a command of `Exec`) to the daemon. Fixed 16 bytes, built without allocation.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum InitMessage {
    /// Descriptors: `v4` IPv4 sockets, then `v6` IPv6 sockets.
    Sockets(SocketCounts),
    /// Descriptors: the listeners of [`RevisionSpec::listeners`].
    Listeners,
    /// Descriptor: the master end of the terminal that the program gets.
    Terminal,
    /// The program runs.
    Executed,
    /// The program does not run; the instance ends.
    ExecFailed {
        /// What was being done.
        step: InitStep,
        /// errno(3).
        errno: i32,
    },
}

/// Steps of an init that can fail, in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
#[repr(u8)]
pub enum InitStep {
    /// Attaching to the cgroup.
    Cgroup = 1,
    /// Root filesystem, /dev, /proc, /sys, masks, pivot.
    Mounts,
    /// Planned files.
    Files,
    /// Host name, loopback, sockets.
    Network,
    /// Working directory.
    WorkingDirectory,
    /// Capabilities, ids, no_new_privs, limits.
    Privileges,
    /// Filter.
    Seccomp,
    /// execve(2): the errno tells whether the program is missing or cannot be executed.
    Exec,
    /// The terminal.
    Terminal,
    /// Entering the namespaces of an instance: it is ending.
    Enter,
    /// Volumes, and file systems in memory.
    Volumes,
}

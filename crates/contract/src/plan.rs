//! What an instance needs: the one seam by which a dialect speaks to the sandbox.

use std::io;
use std::num::{NonZeroU16, NonZeroU32};

use serde::{Deserialize, Serialize};

use funtainer_model::{EnvVar, StopSignal};

/// Everything that starting one instance of a revision depends on, resolved: no name is looked up and no default is chosen later.
/// Written with its revision to the state store, so that a start reads no image.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct StartPlan {
    /// Command line; the first is the program, absolute or found through `PATH` of `env` inside the image by the sandbox.
    pub argv: Vec<String>,
    /// The whole environment.
    pub env: Vec<EnvVar>,
    /// Absolute directory to start in; made if missing.
    pub working_dir: String,
    /// Files that the dialect puts into the writable layer before the start.
    pub files: Vec<PlannedFile>,
    /// TCP listeners inside that the platform itself accepts on.
    pub listeners: Vec<Listener>,
    /// Absolute directories inside whose Unix sockets the platform can reach.
    pub socket_directories: Vec<String>,
    /// Who runs the command.
    pub user: User,
    /// Whether the root filesystem has no writable layer.
    pub read_only_root: bool,
    /// When the instance can take its first call.
    pub readiness: Readiness,
    /// What the standard streams are for.
    pub streams: StandardStreams,
    /// What asks the command to end.
    pub stop_signal: StopSignal,
    /// Calls that one instance takes at once.
    pub concurrency: NonZeroU32,
}

/// A small file made before the start.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct PlannedFile {
    /// Absolute path; missing parents are made.
    pub path: String,
    /// Permission bits.
    pub mode: u32,
    /// Content, at most 16 KiB.
    pub content: Vec<u8>,
}

/// A TCP listener on 127.0.0.1 inside an instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Listener {
    /// Port on 127.0.0.1.
    pub port: NonZeroU16,
}

/// Numeric identity inside the instance.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct User {
    /// User id, below 65536.
    pub uid: u32,
    /// Primary group id, below 65536.
    pub gid: u32,
    /// Supplementary groups, each below 65536.
    pub groups: Vec<u32>,
}

/// When an instance can take its first call.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Readiness {
    /// When a TCP connection is accepted on `preferred`, or, where nothing listens there, on the only port that listens.
    Listening {
        /// The port that the function was told.
        preferred: NonZeroU16,
    },
    /// As soon as it is executed.
    Executed,
}

/// What the standard streams of the command are for.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum StandardStreams {
    /// Standard input is empty, output and error are the log.
    Log,
    /// Standard input and output are the call's, error is the log.
    Call,
}

/// Reads an image's files without mounting it. Paths are absolute inside the image; symbolic links are followed inside it.
pub trait ImageFiles: Send + Sync {
    /// What lies at `path`; `None` where nothing does.
    fn stat(&self, path: &str) -> io::Result<Option<FileStat>>;
    /// The content of the regular file at `path`, `None` where there is none. More than `bytes_max` is an error.
    fn read(&self, path: &str, bytes_max: usize) -> io::Result<Option<Vec<u8>>>;
}

/// A file of an image, links followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FileStat {
    /// What it is.
    pub kind: FileKind,
    /// Permission bits with setuid, setgid and sticky.
    pub mode: u32,
    /// Owner.
    pub uid: u32,
    /// Group.
    pub gid: u32,
    /// Size in bytes.
    pub size: u64,
}

/// Kind of a file after links were followed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileKind {
    /// A regular file.
    Regular,
    /// A directory.
    Directory,
    /// Anything else.
    Other,
}

/// Why an image cannot be started in a dialect.
#[derive(Debug, thiserror::Error)]
pub enum PlanError {
    /// Neither ENTRYPOINT, CMD nor arguments.
    #[error("the image names no command (ENTRYPOINT and CMD are empty)")]
    NoCommand,
    /// The program's file is not in the image.
    #[error("'{0}' is not in the image")]
    CommandNotFound(String),
    /// The program's file is no executable file.
    #[error("'{0}' cannot be executed: it is no regular file with execute bits")]
    CommandNotExecutable(String),
    /// USER names somebody who is not in the image's passwd or group file.
    #[error("user '{0}' is not in the image")]
    UserUnknown(String),
    /// USER has a number that the sandbox does not map.
    #[error("user or group id {0} is above 65535")]
    IdTooLarge(u64),
    /// A file of the image cannot be read.
    #[error("{path} of the image cannot be read")]
    ImageFile {
        /// Path inside the image.
        path: String,
        /// Why.
        #[source]
        source: io::Error,
    },
}

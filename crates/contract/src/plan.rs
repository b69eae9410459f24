//! What an instance needs: the one seam by which a dialect speaks to the sandbox.

use std::io;
use std::num::{NonZeroU16, NonZeroU32};

use serde::{Deserialize, Serialize};

use funtainer_model::{Contract, EnvVar, ErrorCode, Failure, FunctionSpec, ImageConfig, Isolation, StopSignal};

use crate::accounts::{self, AccountError, Identity};
use crate::program;
use crate::terminal::TerminalSize;

/// Most bytes of command line and environment together, so that a start fits into one message to the keeper (128 KiB).
const COMMAND_BYTES_MAX: usize = 96 * 1024;
/// Most bytes of the image's passwd and group files: directories of large sites stay below.
const ACCOUNTS_FILE_BYTES_MAX: usize = 1024 * 1024;
/// Most volumes of an image, as the keeper takes them.
const VOLUMES_MAX: usize = 32;
/// What the platform mounts itself: an image's volume there, or below, means nothing.
const PLATFORM_PLACES: [&str; 3] = ["/dev", "/proc", "/sys"];
/// Where servers listen that say nothing else.
const PORT_DEFAULT: NonZeroU16 = NonZeroU16::new(8080).unwrap();
/// What Docker gives to an image that sets no `PATH`.
const PATH_DEFAULT: &str = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

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
    /// Absolute directories that are writable and begin with what the image holds there.
    #[serde(default)]
    pub volumes: Vec<String>,
    /// What the instance may reach.
    #[serde(default)]
    pub isolation: Isolation,
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
    /// Supplementary groups, the primary one among them, each below 65536.
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
    /// All three are a terminal of the call's, of this size at first. There is no log.
    Terminal(TerminalSize),
}

/// Reads an image's files without mounting it. Paths are absolute inside the image; symbolic links are followed inside it.
pub trait ImageFiles: Send + Sync {
    /// What lies at `path`; `None` where nothing does.
    fn stat(&self, path: &str) -> io::Result<Option<FileStat>>;
    /// The content of the regular file at `path`, `None` where there is none. More than `bytes_max` is an error.
    fn read(&self, path: &str, bytes_max: usize) -> io::Result<Option<Vec<u8>>>;
    /// The first bytes of the regular file at `path`, at most `bytes_max`; `None` where there is none.
    fn read_start(&self, path: &str, bytes_max: usize) -> io::Result<Option<Vec<u8>>>;
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
    /// The program's file is there, what it is to be run by is not.
    #[error("'{command}' is in the image, but its interpreter '{interpreter}' is not")]
    InterpreterNotFound {
        /// The program.
        command: String,
        /// What its first line, or its ELF header, names.
        interpreter: String,
    },
    /// What the program is to be run by is no executable file.
    #[error("'{command}' cannot be executed: its interpreter '{interpreter}' is no regular file with execute bits")]
    InterpreterNotExecutable {
        /// The program.
        command: String,
        /// What its first line, or its ELF header, names.
        interpreter: String,
    },
    /// USER names somebody who is not in the image's passwd or group file.
    #[error("user '{0}' is not in the image")]
    UserUnknown(String),
    /// USER has a number that the sandbox does not map.
    #[error("user or group id {0} is above 65535")]
    IdTooLarge(u64),
    /// USER is in more groups than a sandbox takes.
    #[error("user '{0}' is in more than 64 groups")]
    TooManyGroups(String),
    /// A NUL character where none can be.
    #[error("{0} of the image contains a NUL character")]
    Nul(&'static str),
    /// A VOLUME on something else.
    #[error("volume '{0}' of the image is no directory there")]
    VolumeNotDirectory(String),
    /// More of them than can be had.
    #[error("the image has {0} volumes, the most is {VOLUMES_MAX}")]
    TooManyVolumes(usize),
    /// Command line and environment are too long.
    #[error("command line and environment have {bytes} bytes, the most is {COMMAND_BYTES_MAX}")]
    TooLong {
        /// Bytes together.
        bytes: usize,
    },
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

impl PlanError {
    /// The failure as users meet it.
    pub fn failure(&self) -> Failure {
        let code = match self {
            Self::NoCommand => ErrorCode::CommandMissing,
            Self::CommandNotFound(_) => ErrorCode::CommandNotFound,
            Self::CommandNotExecutable(_) | Self::InterpreterNotExecutable { .. } => ErrorCode::CommandNotExecutable,
            Self::InterpreterNotFound { interpreter, .. } => {
                let hint = if interpreter.ends_with('\r') {
                    "save the script with Unix line ends: its first line ends with a carriage return".to_owned()
                } else {
                    format!("put '{interpreter}' into the image, or link the program statically")
                };
                return Failure::new(ErrorCode::CommandNotExecutable, self.to_string()).with_hint(hint);
            }
            Self::UserUnknown(_) => ErrorCode::UserUnknown,
            Self::IdTooLarge(_) | Self::TooManyGroups(_) => {
                return Failure::new(ErrorCode::ImageUnsupported, self.to_string())
                    .with_hint("build the image with another USER: ids up to 65535 and 64 groups can be used");
            }
            Self::Nul(_) => ErrorCode::ImageInvalid,
            Self::VolumeNotDirectory(_) => {
                return Failure::new(ErrorCode::ImageInvalid, self.to_string())
                    .with_hint("build the image with VOLUME at a directory, or at a path that it does not have");
            }
            Self::TooManyVolumes(_) => {
                return Failure::new(ErrorCode::ImageUnsupported, self.to_string()).with_hint(
                    "build the image with fewer volumes: all but the files below /dev, /proc and /sys can be written anyway",
                );
            }
            Self::TooLong { .. } => {
                return Failure::new(ErrorCode::ImageUnsupported, self.to_string())
                    .with_hint("put long values into files of the image");
            }
            Self::ImageFile { source, .. } => return Failure::new(ErrorCode::ImageInvalid, format!("{self}: {source}")),
        };
        Failure::new(code, self.to_string())
    }
}

/// What an instance of the function needs, by what its image says and holds.
///
/// The command line is ENTRYPOINT followed by the function's arguments or else CMD; an entrypoint of the function's own leaves CMD out, and
/// an empty one ENTRYPOINT, too. Variables of the image come first, then `PORT` (contract http), then the function's own; `PATH`, `HOME` and
/// `HOSTNAME` are set where nobody does, as in Docker. For contract stdio the command must be there and be executable: nothing is started
/// at a deploy that would show it.
pub fn plan(config: &ImageConfig, files: &dyn ImageFiles, spec: &FunctionSpec) -> Result<StartPlan, PlanError> {
    let argv = argv(config, spec)?;
    let working_dir = working_dir(spec.working_dir.as_deref().unwrap_or(&config.working_dir))?;
    let identity = identity(spec.user.as_deref().unwrap_or(&config.user), files)?;
    let (streams, readiness, port) = match spec.contract {
        Contract::Http => {
            let port = port(config, spec);
            (StandardStreams::Log, Readiness::Listening { preferred: port }, Some(port))
        }
        Contract::Stdio => (StandardStreams::Call, Readiness::Executed, None),
    };
    let env = env(config, spec, port, &identity);
    check_size(&argv, &env)?;
    let user = User { uid: identity.uid, gid: identity.gid, groups: identity.groups };
    let plan = StartPlan {
        argv,
        env,
        working_dir,
        files: Vec::new(),
        listeners: Vec::new(),
        socket_directories: Vec::new(),
        user,
        volumes: volumes(config, files, spec)?,
        isolation: spec.isolation.clone(),
        readiness,
        streams,
        stop_signal: config.stop_signal.unwrap_or(StopSignal::TERM),
        concurrency: spec.scale.concurrency,
    };
    if spec.contract == Contract::Stdio {
        program::check(&plan, files)?;
    }
    Ok(plan)
}

fn argv(config: &ImageConfig, spec: &FunctionSpec) -> Result<Vec<String>, PlanError> {
    let (first, rest) = match &spec.entrypoint {
        // `--entrypoint ''` takes the image's away, as in Docker.
        Some(entrypoint) if entrypoint.iter().all(String::is_empty) => (&Vec::new(), spec.args.as_deref().unwrap_or_default()),
        Some(entrypoint) => (entrypoint, spec.args.as_deref().unwrap_or_default()),
        None => (&config.entrypoint, spec.args.as_deref().unwrap_or(&config.cmd)),
    };
    let argv: Vec<_> = first.iter().chain(rest).cloned().collect();
    if argv.is_empty() {
        return Err(PlanError::NoCommand);
    }
    if argv.iter().any(|arg| arg.contains('\0')) {
        return Err(PlanError::Nul("the command line"));
    }
    Ok(argv)
}

/// Whether command line and environment fit into a message to the keeper.
pub(crate) fn check_size(argv: &[String], env: &[EnvVar]) -> Result<(), PlanError> {
    let bytes = argv.iter().map(|arg| arg.len() + 1).sum::<usize>()
        + env.iter().map(|var| var.name().len() + var.value().len() + 2).sum::<usize>();
    if bytes > COMMAND_BYTES_MAX { Err(PlanError::TooLong { bytes }) } else { Ok(()) }
}

/// The directory of a setting: [`cleaned`].
pub(crate) fn working_dir(text: &str) -> Result<String, PlanError> {
    if text.contains('\0') {
        return Err(PlanError::Nul("the working directory"));
    }
    Ok(cleaned(text))
}

/// Where the image wants to write, each once, the upper ones first; without what is the platform's, or a tmpfs of the function's own.
fn volumes(config: &ImageConfig, files: &dyn ImageFiles, spec: &FunctionSpec) -> Result<Vec<String>, PlanError> {
    let is_platforms = |path: &str| {
        let below = |place: &str| path.strip_prefix(place).is_some_and(|rest| rest.is_empty() || rest.starts_with('/'));
        path == "/" || PLATFORM_PLACES.iter().any(|place| below(place))
    };
    let is_tmpfs = |path: &str| spec.isolation.tmpfs.iter().any(|mount| mount.path() == path);
    let mut volumes = std::collections::BTreeSet::new();
    for text in &config.volumes {
        if text.contains('\0') {
            return Err(PlanError::Nul("a volume"));
        }
        let path = cleaned(text);
        if is_platforms(&path) || is_tmpfs(&path) {
            continue;
        }
        let found = files.stat(&path).map_err(|source| PlanError::ImageFile { path: path.clone(), source })?;
        if found.is_some_and(|stat| stat.kind != FileKind::Directory) {
            return Err(PlanError::VolumeNotDirectory(path));
        }
        volumes.insert(path);
    }
    if volumes.len() > VOLUMES_MAX {
        return Err(PlanError::TooManyVolumes(volumes.len()));
    }
    // In byte order a directory comes before what lies in it.
    Ok(volumes.into_iter().collect())
}

/// Absolute and free of `.`, `..` and doubled slashes; relative ones stand below the root, as in Docker.
fn cleaned(text: &str) -> String {
    let mut parts = Vec::new();
    for part in text.split('/') {
        match part {
            "" | "." => {}
            ".." => drop(parts.pop()),
            part => parts.push(part),
        }
    }
    format!("/{}", parts.join("/"))
}

fn port(config: &ImageConfig, spec: &FunctionSpec) -> NonZeroU16 {
    let told = || spec.env.iter().rev().find(|var| var.name() == "PORT").and_then(|var| var.value().parse().ok());
    let exposed = || match config.exposed_ports.as_slice() {
        [single] => Some(*single),
        _ => None,
    };
    spec.port.or_else(told).or_else(exposed).unwrap_or(PORT_DEFAULT)
}

fn env(config: &ImageConfig, spec: &FunctionSpec, port: Option<NonZeroU16>, identity: &Identity) -> Vec<EnvVar> {
    let mut env: Vec<EnvVar> = Vec::new();
    let mut set = |var: &EnvVar, replace: bool| match env.iter_mut().find(|old| old.name() == var.name()) {
        Some(old) if replace => old.clone_from(var),
        Some(_) => {}
        None => env.push(var.clone()),
    };
    let var = |name, value: &str| EnvVar::new(name, value).expect("names are fixed, values are free of NUL");
    config.env.iter().for_each(|var| set(var, true));
    if let Some(port) = port {
        set(&var("PORT", &port.to_string()), true);
    }
    spec.env.iter().for_each(|var| set(var, true));
    set(&var("PATH", PATH_DEFAULT), false);
    set(&var("HOME", &identity.home), false);
    set(&var("HOSTNAME", spec.id.slug().as_str()), false);
    env
}

pub(crate) fn identity(user: &str, files: &dyn ImageFiles) -> Result<Identity, PlanError> {
    let read = |path: &str| {
        let content = files.read(path, ACCOUNTS_FILE_BYTES_MAX);
        content.map(Option::unwrap_or_default).map_err(|source| PlanError::ImageFile { path: path.to_owned(), source })
    };
    let (passwd, group) = (read("/etc/passwd")?, read("/etc/group")?);
    accounts::resolve(user, &passwd, &group).map_err(|error| match error {
        AccountError::Unknown(name) => PlanError::UserUnknown(name),
        AccountError::IdTooLarge(id) => PlanError::IdTooLarge(id),
        AccountError::TooManyGroups => PlanError::TooManyGroups(user.to_owned()),
    })
}

#[cfg(test)]
mod tests;

//! Bounds and forms of the messages' fields, the same for who sends and who receives.

use super::{
    CodecError, DESCRIPTORS_MAX, ExecSpec, FILE_BYTES_MAX, FILES_MAX, GROUPS_MAX, IDS, InitStep, LAYERS_MAX, LISTENERS_MAX,
    PATH_BYTES_MAX, RevisionSpec, SocketCounts, TITLE_BYTES_MAX, VOLUMES_MAX,
};

/// The greatest length of something.
#[derive(Clone, Copy)]
pub(super) struct Bound {
    pub(super) what: &'static str,
    pub(super) max: usize,
}

impl Bound {
    pub(super) fn check(self, length: usize) -> Result<(), CodecError> {
        if length > self.max { Err(CodecError::Bound { what: self.what, max: self.max }) } else { Ok(()) }
    }
}

pub(super) fn check_bytes(bytes: &[u8], max: usize, what: &'static str) -> Result<(), CodecError> {
    Bound { what, max }.check(bytes.len())
}

/// A text that goes into a C string, a file name or a title.
pub(super) fn check_text(text: &str, max: usize, what: &'static str) -> Result<(), CodecError> {
    check_bytes(text.as_bytes(), max, what)?;
    if text.chars().any(char::is_control) { Err(CodecError::Value(what)) } else { Ok(()) }
}

/// An absolute path, NUL-free, without a `..` that would leave what it seems to lie in.
fn check_path(path: &[u8], what: &'static str) -> Result<(), CodecError> {
    check_bytes(path, PATH_BYTES_MAX, what)?;
    let fine = path.first() == Some(&b'/') && !path.contains(&0) && !path.split(|byte| *byte == b'/').any(|part| part == b"..");
    if fine { Ok(()) } else { Err(CodecError::Value(what)) }
}

/// Command line and environment, as execve(2) takes them.
fn check_command(argv: &[Vec<u8>], env: &[Vec<u8>]) -> Result<(), CodecError> {
    if argv.first().is_none_or(Vec::is_empty) || argv.iter().any(|argument| argument.contains(&0)) {
        return Err(CodecError::Value("arguments"));
    }
    let variable = |text: &Vec<u8>| !text.contains(&0) && text.iter().position(|byte| *byte == b'=').is_some_and(|at| at > 0);
    if env.iter().all(variable) { Ok(()) } else { Err(CodecError::Value("environment")) }
}

/// Ids that an instance has.
fn check_ids(uid: u32, gid: u32, groups: &[u32]) -> Result<(), CodecError> {
    if uid >= IDS || gid >= IDS || groups.iter().any(|group| *group >= IDS) {
        return Err(CodecError::Value("user or group id"));
    }
    Ok(())
}

impl ExecSpec {
    /// Whether every field keeps its bounds.
    pub fn check(&self) -> Result<(), CodecError> {
        Bound { what: "groups", max: GROUPS_MAX }.check(self.groups.len())?;
        check_command(&self.argv, &self.env)?;
        check_path(&self.working_dir, "working directory")?;
        check_ids(self.uid, self.gid, &self.groups)
    }
}

impl RevisionSpec {
    /// Whether every field keeps its bounds.
    pub fn check(&self) -> Result<(), CodecError> {
        Bound { what: "layers", max: LAYERS_MAX }.check(self.layers.len())?;
        Bound { what: "groups", max: GROUPS_MAX }.check(self.groups.len())?;
        Bound { what: "listeners", max: LISTENERS_MAX }.check(self.listeners.len())?;
        Bound { what: "files", max: FILES_MAX }.check(self.files.len())?;
        check_command(&self.argv, &self.env)?;
        check_path(&self.working_dir, "working directory")?;
        check_ids(self.uid, self.gid, &self.groups)?;
        for file in &self.files {
            check_path(&file.path, "path")?;
            check_bytes(&file.content, FILE_BYTES_MAX, "file")?;
            if file.mode & !0o7777 != 0 || file.path.ends_with(b"/") {
                return Err(CodecError::Value("file"));
            }
        }
        if self.limits.check().is_err() {
            return Err(CodecError::Value("limits"));
        }
        if self.isolation.check().is_err() {
            return Err(CodecError::Value("isolation"));
        }
        Bound { what: "volumes", max: VOLUMES_MAX }.check(self.volumes.len())?;
        for volume in &self.volumes {
            check_path(volume, "volume")?;
        }
        if self.listeners.contains(&0) {
            return Err(CodecError::Value("listeners"));
        }
        Bound { what: "sockets", max: DESCRIPTORS_MAX }.check(self.sockets.total())?;
        check_text(&self.hostname, TITLE_BYTES_MAX, "host name")
    }
}

impl SocketCounts {
    /// Of both families together.
    pub const fn total(self) -> usize {
        self.v4 as usize + self.v6 as usize
    }
}

impl InitStep {
    /// All of them, in order.
    pub const ALL: [Self; 11] = [
        Self::Cgroup,
        Self::Mounts,
        Self::Files,
        Self::Network,
        Self::WorkingDirectory,
        Self::Privileges,
        Self::Seccomp,
        Self::Exec,
        Self::Terminal,
        Self::Enter,
        Self::Volumes,
    ];

    /// The step with this number.
    pub fn from_number(number: u8) -> Option<Self> {
        Self::ALL.into_iter().find(|step| *step as u8 == number)
    }
}

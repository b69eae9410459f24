//! What a command in a running instance is.

/// A command besides the main process of an instance. All else, its namespaces, control groups, capabilities and filter, is the instance's.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExecSpec {
    /// Command line, NUL-free. Without a `/` in the first, `PATH` of `env` is searched inside.
    pub argv: Vec<Vec<u8>>,
    /// `NAME=VALUE`, NUL-free.
    pub env: Vec<Vec<u8>>,
    /// Absolute; it must be there.
    pub working_dir: Vec<u8>,
    /// Below 65536.
    pub uid: u32,
    /// Below 65536.
    pub gid: u32,
    /// Each below 65536, at most 64.
    pub groups: Vec<u32>,
    /// Whether its standard streams are a terminal, and its size at first. The terminal is made inside, in the instance's own devpts;
    /// its master end comes back as [`InitMessage::Terminal`](super::InitMessage::Terminal).
    pub terminal: Option<WindowSize>,
}

/// Size of a terminal in characters.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct WindowSize {
    /// Lines.
    pub rows: u16,
    /// Characters in a line.
    pub columns: u16,
}

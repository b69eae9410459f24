//! What an image says of itself, as the OCI image specification ("Image Configuration") defines it, parsed.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU16;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

use crate::{Digest, EnvVar};

/// The part of an image's configuration that a start depends on.
#[derive(Debug, Clone, PartialEq, Eq, Default, Serialize, Deserialize)]
pub struct ImageConfig {
    /// Variables; entries without `=` are left out.
    pub env: Vec<EnvVar>,
    /// First part of the command line.
    pub entrypoint: Vec<String>,
    /// Second part of the command line, replaced by the function's arguments.
    pub cmd: Vec<String>,
    /// `user`, `uid`, `user:group`, `uid:gid` or any mix; empty for root.
    pub user: String,
    /// Where the command starts; empty for `/`.
    pub working_dir: String,
    /// TCP ports that the image says it listens on, ascending.
    pub exposed_ports: Vec<NonZeroU16>,
    /// What ends the main process; SIGTERM where the image names none.
    pub stop_signal: Option<StopSignal>,
    /// Paths that the image wants to be volumes.
    pub volumes: Vec<String>,
    /// Labels.
    pub labels: BTreeMap<String, String>,
}

/// A signal by its Linux number, 1 to 64.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(transparent)]
pub struct StopSignal(u8);

/// A text that is no signal.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{0}' is no signal: write a name such as SIGTERM or a number from 1 to 64")]
pub struct SignalError(String);

/// A layer as it is stored: the digest of its uncompressed tar, and whether it lies at the bottom of an image.
/// Two forms of one tar exist because overlayfs shows whiteouts of a lowest layer as files: the base form has none.
#[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Debug, Serialize, Deserialize)]
pub struct LayerId {
    /// `diff_id` of the layer (OCI image specification, "Layer DiffID").
    pub diff_id: Digest,
    /// Whether it is the lowest layer.
    pub base: bool,
}

impl LayerId {
    /// `HEX.base.erofs` or `HEX.erofs`: the file below the store's `layers`.
    pub fn file_name(&self) -> String {
        format!("{}{}.erofs", self.diff_id.hex(), if self.base { ".base" } else { "" })
    }
}

impl StopSignal {
    /// SIGTERM.
    pub const TERM: Self = Self(15);

    /// The Linux number.
    pub const fn number(self) -> u8 {
        self.0
    }
}

/// Names of signals 1 to 31 in order, signal(7), x86 and ARM.
const SIGNAL_NAMES: [&str; 31] = [
    "HUP", "INT", "QUIT", "ILL", "TRAP", "ABRT", "BUS", "FPE", "KILL", "USR1", "SEGV", "USR2", "PIPE", "ALRM", "TERM",
    "STKFLT", "CHLD", "CONT", "STOP", "TSTP", "TTIN", "TTOU", "URG", "XCPU", "XFSZ", "VTALRM", "PROF", "WINCH", "IO", "PWR",
    "SYS",
];

impl FromStr for StopSignal {
    type Err = SignalError;

    fn from_str(text: &str) -> Result<Self, SignalError> {
        let wrong = || SignalError(text.to_owned());
        if let Ok(number) = text.parse::<u8>() {
            return if (1..=64).contains(&number) { Ok(Self(number)) } else { Err(wrong()) };
        }
        let upper = text.to_ascii_uppercase();
        let name = upper.strip_prefix("SIG").unwrap_or(&upper);
        // The real-time signals start at 34 in both common C libraries, which keep the first two for themselves.
        if let Some(offset) = name.strip_prefix("RTMIN") {
            let offset = if offset.is_empty() { Ok(0) } else { offset.parse::<u8>() }.map_err(|_| wrong())?;
            return if offset <= 30 { Ok(Self(34 + offset)) } else { Err(wrong()) };
        }
        let index = SIGNAL_NAMES.iter().position(|known| *known == name).ok_or_else(wrong)?;
        Ok(Self(index as u8 + 1))
    }
}

impl fmt::Display for StopSignal {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match SIGNAL_NAMES.get(usize::from(self.0) - 1) {
            Some(name) => write!(f, "SIG{name}"),
            None => write!(f, "{}", self.0),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn signals_by_name_and_number() {
        let check = |text: &str, number| assert_eq!(text.parse::<StopSignal>().unwrap().number(), number, "{text}");
        check("SIGTERM", 15);
        check("term", 15);
        check("SIGQUIT", 3);
        check("9", 9);
        check("SIGRTMIN+3", 37);
        for bad in ["", "0", "65", "SIGFOO", "SIGRTMIN+31", "-1"] {
            assert!(bad.parse::<StopSignal>().is_err(), "{bad}");
        }
    }

    #[test]
    fn the_two_forms_of_a_layer_have_two_names() {
        let diff_id = Digest::from_sha256([7; 32]);
        let names = [true, false].map(|base| LayerId { diff_id, base }.file_name());
        assert_ne!(names[0], names[1]);
    }
}

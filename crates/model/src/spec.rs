//! What a user asks for when a function is deployed.

use std::fmt;
use std::num::{NonZeroU16, NonZeroU32};
use std::str::FromStr;
use std::time::Duration;

use serde::{Deserialize, Serialize};

use crate::{FunctionId, ImageRef, Isolation, IsolationError, Limits};

/// Most environment variables of one function; keeps a start message within one datagram.
const ENV_COUNT_MAX: usize = 512;
/// Most bytes of environment and arguments together; keeps a start message within one datagram.
const ENV_AND_ARGS_BYTES_MAX: usize = 64 * 1024;
/// Most instances that can be asked for: one host range has room for this many functions' addresses and descriptors.
const INSTANCES_MAX: u32 = 10_000;
/// Most calls at once in one instance.
const CONCURRENCY_MAX: u32 = 10_000;
/// Most calls that can wait for one function.
const QUEUE_MAX: u32 = 1_000_000;

/// The dialect between the platform and the function.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Contract {
    /// The image is an HTTP server that listens on `PORT`.
    Http,
    /// The image is a command: one fresh container for each call, body on standard input, answer on standard output.
    Stdio,
}

/// One environment variable. The name has neither `=` nor NUL and is not empty; the value has no NUL.
#[derive(Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct EnvVar {
    name: String,
    value: String,
}

/// How many instances a revision has, and for how long.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct ScalePolicy {
    /// Instances that are kept without calls.
    pub min: u32,
    /// Instances at most.
    pub max: u32,
    /// Calls that one instance takes at once.
    pub concurrency: NonZeroU32,
    /// Calls that may wait for a slot; one more is refused.
    pub queue: u32,
    /// How long an instance stays without a call.
    pub idle_timeout: Duration,
}

/// How long the platform waits.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub struct Timeouts {
    /// From the start of an instance until it is ready.
    pub start: Duration,
    /// From the arrival of a call until the end of its answer.
    pub call: Duration,
}

/// A function as its user describes it. Valid once it exists: use [`FunctionSpec::check`] after filling a [`FunctionSpec::new`].
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionSpec {
    /// Who it is.
    pub id: FunctionId,
    /// What it runs.
    pub image: ImageRef,
    /// How it is spoken to.
    pub contract: Contract,
    /// The port that the function is told to listen on; else the image's single EXPOSE, else 8080.
    pub port: Option<NonZeroU16>,
    /// Variables on top of the image's.
    pub env: Vec<EnvVar>,
    /// Replaces the image's CMD.
    pub args: Option<Vec<String>>,
    /// Replaces the image's ENTRYPOINT; its CMD is left out then, as in Docker.
    #[serde(default)]
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's USER, in the same form.
    #[serde(default)]
    pub user: Option<String>,
    /// Replaces the image's WORKDIR.
    #[serde(default)]
    pub working_dir: Option<String>,
    /// How many instances.
    pub scale: ScalePolicy,
    /// What each may use.
    pub limits: Limits,
    /// What each may reach.
    #[serde(default)]
    pub isolation: Isolation,
    /// How long the platform waits.
    pub timeouts: Timeouts,
}

/// Settings that cannot be served.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum SpecError {
    /// The contract has another name.
    #[error("'{0}' is no contract: use http or stdio")]
    Contract(String),
    /// An environment variable is not `NAME=VALUE`.
    #[error("'{0}' is no environment variable: write NAME=VALUE")]
    Env(String),
    /// Over a named limit.
    #[error("{what} is {actual}, the most is {max}")]
    TooMany {
        /// The setting.
        what: &'static str,
        /// Its value.
        actual: u64,
        /// The limit.
        max: u64,
    },
    /// `min` above `max`, or `max` 0.
    #[error("min {min} and max {max} leave no number of instances: max is at least 1 and at least min")]
    Scale {
        /// Least instances asked for.
        min: u32,
        /// Most instances asked for.
        max: u32,
    },
    /// Limits, mounts or rules that cannot be served.
    #[error(transparent)]
    Isolation(#[from] IsolationError),
    /// A timeout of zero.
    #[error("{0} of 0 s would end everything at once")]
    ZeroTimeout(&'static str),
    /// An argument with a NUL, which no command line can carry.
    #[error("an argument contains a NUL character")]
    NulInArgument,
    /// A working directory that is not absolute, or any of these with a NUL.
    #[error("'{text}' is no {what}")]
    Text {
        /// The setting.
        what: &'static str,
        /// Its value.
        text: String,
    },
    /// The setting has no meaning for the contract.
    #[error("{setting} has no meaning for contract {contract}")]
    Meaningless {
        /// The setting.
        setting: &'static str,
        /// The contract.
        contract: Contract,
    },
}

impl FunctionSpec {
    /// A function with the defaults of its contract.
    pub fn new(id: FunctionId, image: ImageRef, contract: Contract) -> Self {
        let concurrency = match contract {
            Contract::Http => NonZeroU32::new(80),
            Contract::Stdio => NonZeroU32::new(1),
        };
        Self {
            id,
            image,
            contract,
            port: None,
            env: Vec::new(),
            args: None,
            entrypoint: None,
            user: None,
            working_dir: None,
            scale: ScalePolicy {
                min: 0,
                max: 20,
                concurrency: concurrency.unwrap_or(NonZeroU32::MIN),
                queue: 1_000,
                idle_timeout: Duration::from_mins(10),
            },
            limits: Limits::default(),
            isolation: Isolation::default(),
            timeouts: Timeouts { start: Duration::from_mins(1), call: Duration::from_mins(5) },
        }
    }

    /// Returns the spec if every setting can be served.
    pub fn check(self) -> Result<Self, SpecError> {
        let at_most = |what, actual: u64, max: u64| {
            if actual > max { Err(SpecError::TooMany { what, actual, max }) } else { Ok(()) }
        };
        let ScalePolicy { min, max, concurrency, queue, .. } = self.scale;
        if max == 0 || min > max {
            return Err(SpecError::Scale { min, max });
        }
        at_most("max", max.into(), INSTANCES_MAX.into())?;
        at_most("concurrency", concurrency.get().into(), CONCURRENCY_MAX.into())?;
        at_most("queue", queue.into(), QUEUE_MAX.into())?;
        self.limits.check()?;
        self.isolation.check()?;
        let text = |what, text: &Option<String>, fine: fn(&str) -> bool| match text {
            Some(text) if text.contains('\0') || !fine(text) => Err(SpecError::Text { what, text: text.clone() }),
            _ => Ok(()),
        };
        text("user", &self.user, |_| true)?;
        text("absolute working directory", &self.working_dir, |path| path.starts_with('/'))?;
        for (what, timeout) in [("start timeout", self.timeouts.start), ("call timeout", self.timeouts.call)] {
            if timeout.is_zero() {
                return Err(SpecError::ZeroTimeout(what));
            }
        }
        let args = || self.entrypoint.iter().chain(&self.args).flatten();
        if args().any(|arg| arg.contains('\0')) {
            return Err(SpecError::NulInArgument);
        }
        at_most("number of environment variables", self.env.len() as u64, ENV_COUNT_MAX as u64)?;
        let bytes = args().map(|arg| arg.len() + 1).sum::<usize>()
            + self.env.iter().map(|var| var.name.len() + var.value.len() + 2).sum::<usize>();
        at_most("size of arguments and environment in bytes", bytes as u64, ENV_AND_ARGS_BYTES_MAX as u64)?;
        if self.contract == Contract::Stdio {
            let meaningless = |setting| Err(SpecError::Meaningless { setting, contract: Contract::Stdio });
            if self.port.is_some() {
                return meaningless("port");
            }
            if min != 0 {
                return meaningless("min");
            }
            if concurrency.get() != 1 {
                return meaningless("concurrency");
            }
        }
        Ok(self)
    }
}

impl EnvVar {
    /// Parses name and value.
    pub fn new(name: &str, value: &str) -> Result<Self, SpecError> {
        if name.is_empty() || name.contains(['=', '\0']) || value.contains('\0') {
            return Err(SpecError::Env(format!("{name}={value}")));
        }
        Ok(Self { name: name.to_owned(), value: value.to_owned() })
    }

    /// The part before the first `=`.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// The part after it.
    pub fn value(&self) -> &str {
        &self.value
    }
}

impl FromStr for EnvVar {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        let (name, value) = text.split_once('=').ok_or_else(|| SpecError::Env(text.to_owned()))?;
        Self::new(name, value)
    }
}

impl fmt::Display for EnvVar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}={}", self.name, self.value)
    }
}

/// Values can be secrets: only the name is shown.
impl fmt::Debug for EnvVar {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}=..", self.name)
    }
}

impl TryFrom<String> for EnvVar {
    type Error = SpecError;

    fn try_from(text: String) -> Result<Self, SpecError> {
        text.parse()
    }
}

impl From<EnvVar> for String {
    fn from(var: EnvVar) -> Self {
        var.to_string()
    }
}

impl FromStr for Contract {
    type Err = SpecError;

    fn from_str(text: &str) -> Result<Self, SpecError> {
        match text {
            "http" => Ok(Self::Http),
            "stdio" => Ok(Self::Stdio),
            other => Err(SpecError::Contract(other.to_owned())),
        }
    }
}

impl fmt::Display for Contract {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Http => "http",
            Self::Stdio => "stdio",
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::ByteSize;

    fn spec(contract: Contract) -> FunctionSpec {
        FunctionSpec::new(FunctionId::in_default("f".parse().unwrap()), "img".parse().unwrap(), contract)
    }

    #[test]
    fn defaults_are_those_of_the_help() {
        let http = spec(Contract::Http).check().unwrap();
        assert_eq!((http.scale.concurrency.get(), http.scale.min, http.scale.max, http.scale.queue), (80, 0, 20, 1_000));
        assert_eq!(http.limits.memory, "512M".parse().unwrap());
        assert_eq!(spec(Contract::Stdio).check().unwrap().scale.concurrency.get(), 1);
    }

    #[test]
    fn settings_that_cannot_be_served_are_refused() {
        let refused = |change: fn(&mut FunctionSpec), contract| {
            let mut spec = spec(contract);
            change(&mut spec);
            assert!(spec.check().is_err());
        };
        refused(|s| s.scale.max = 0, Contract::Http);
        refused(|s| s.scale.min = 21, Contract::Http);
        refused(|s| s.scale.max = 1_000_000, Contract::Http);
        refused(|s| s.limits.memory = ByteSize::bytes(1), Contract::Http);
        refused(|s| s.timeouts.call = Duration::ZERO, Contract::Http);
        refused(|s| s.args = Some(vec!["a\0b".into()]), Contract::Http);
        refused(|s| s.args = Some(vec!["a".repeat(70_000)]), Contract::Http);
        refused(|s| s.port = NonZeroU16::new(80), Contract::Stdio);
        refused(|s| s.scale.min = 1, Contract::Stdio);
    }

    #[test]
    fn variables() {
        assert_eq!("A=b=c".parse::<EnvVar>().unwrap().value(), "b=c");
        assert!("A".parse::<EnvVar>().is_err());
        assert!("=b".parse::<EnvVar>().is_err());
        assert_eq!(format!("{:?}", "A=secret".parse::<EnvVar>().unwrap()), "A=..");
    }
}

//! The vocabulary of funtainer.
//!
//! Every type here is parsed once, at the edge, and is valid from then on: private fields, one fallible constructor.
//! The crate does no I/O, has no clock, no async and no HTTP.
#![forbid(unsafe_code)]

mod digest;
mod error;
mod id;
mod image_config;
mod image_ref;
mod isolation;
mod name;
mod quantity;
mod spec;

pub use digest::{Digest, DigestError};
pub use error::{ErrorCode, Failure, Fault};
pub use id::{CallId, ExecId, IdError, InstanceId, RevisionId};
pub use image_config::{ImageConfig, LayerId, SignalError, StopSignal};
pub use image_ref::{ImageRef, ImageRefError, Tag};
pub use isolation::{Cpus, EgressRule, Isolation, IsolationError, Limits, Network, Protocol, TmpfsMount};
pub use name::{FunctionId, FunctionName, NameError, Namespace, Slug};
pub use quantity::{ByteSize, QuantityError, format_duration, parse_duration};
pub use spec::{Contract, EnvVar, FunctionSpec, ScalePolicy, SpecError, Timeouts};

//! Identities that the platform gives out. Who makes one brings the randomness and the clock: this crate has neither.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use uuid::Uuid;

/// A text that is no identity.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("'{text}' is no {what} id")]
pub struct IdError {
    what: &'static str,
    text: String,
}

macro_rules! uuid_id {
    ($(#[$doc:meta])* $name:ident, $what:literal) => {
        $(#[$doc])*
        #[derive(Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
        #[serde(transparent)]
        pub struct $name(Uuid);

        impl $name {
            /// Names the thing by a UUID; version 7 (RFC 9562) keeps ids in the order of their making.
            pub const fn from_uuid(uuid: Uuid) -> Self {
                Self(uuid)
            }

            /// The 128 bits, as wire protocols carry them (big endian, RFC 9562 section 4).
            pub const fn to_bytes(self) -> [u8; 16] {
                *self.0.as_bytes()
            }

            /// The id that `bytes` carry; every value is one.
            pub const fn from_bytes(bytes: [u8; 16]) -> Self {
                Self(Uuid::from_bytes(bytes))
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.as_hyphenated().fmt(f)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                self.0.as_hyphenated().fmt(f)
            }
        }

        impl FromStr for $name {
            type Err = IdError;

            fn from_str(text: &str) -> Result<Self, IdError> {
                Uuid::try_parse(text).map(Self).map_err(|_| IdError { what: $what, text: text.to_owned() })
            }
        }
    };
}

uuid_id!(
    /// One running container.
    InstanceId,
    "instance"
);
uuid_id!(
    /// Immutable settings together with the digest of the image they were resolved to.
    RevisionId,
    "revision"
);
uuid_id!(
    /// One command that was started in a running instance.
    ExecId,
    "exec"
);
uuid_id!(
    /// One request to a function; sent back as `X-Call-Id`.
    CallId,
    "call"
);

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn text_and_bytes_round_trip() {
        let id = InstanceId::from_bytes(*b"0123456789abcdef");
        assert_eq!(id.to_string().parse::<InstanceId>().unwrap(), id);
        assert_eq!(InstanceId::from_bytes(id.to_bytes()), id);
        assert!("x".parse::<CallId>().is_err());
    }
}

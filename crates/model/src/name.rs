//! Names of functions: canonical as the API that created them allows, and a DNS slug for hosts, paths and processes.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// Longest canonical name in bytes: OpenWhisk allows 256, the most of the systems whose APIs are spoken here.
const NAME_BYTES_MAX: usize = 256;
/// Longest namespace in bytes: one DNS label, RFC 1035 section 2.3.4.
const NAMESPACE_BYTES_MAX: usize = 63;
/// Longest slug in bytes: one DNS label, RFC 1035 section 2.3.4.
const SLUG_BYTES_MAX: usize = 63;

/// Why a text is no name.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    /// Nothing at all.
    #[error("a {what} is at least one character long")]
    Empty {
        /// Which kind of name.
        what: &'static str,
    },
    /// Longer than the kind of name may be.
    #[error("a {what} is at most {max} bytes long, this one has {actual}")]
    TooLong {
        /// Which kind of name.
        what: &'static str,
        /// The limit in bytes.
        max: usize,
        /// The length found in bytes.
        actual: usize,
    },
    /// A character that the kind of name cannot have at this place.
    #[error("'{name}' cannot be a {what}: {why}")]
    Character {
        /// Which kind of name.
        what: &'static str,
        /// The whole text.
        name: String,
        /// The rule that it breaks.
        why: &'static str,
    },
}

/// The canonical name of a function: letters and digits first, then also `_ . @ - +` and inner spaces
/// (the union of what Lambda, OpenWhisk, OpenFaaS and Knative accept).
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct FunctionName(String);

/// A group of functions with a name of its own, a DNS label. `default` where none is named.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Namespace(String);

/// The identity of a function.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
pub struct FunctionId {
    /// Where the name is unique.
    pub namespace: Namespace,
    /// The canonical name.
    pub name: FunctionName,
}

/// A DNS label (RFC 1035 section 2.3.1) derived from a [`FunctionId`]. Equal ids give equal slugs; a canonical name that is no
/// label itself gets 32 bits of its hash appended. The state store has a unique index on it, so a collision is refused there.
#[derive(Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Slug(String);

impl FromStr for FunctionName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        const WHAT: &str = "function name";
        check_length(text, WHAT, NAME_BYTES_MAX)?;
        let refuse = |why| Err(NameError::Character { what: WHAT, name: text.to_owned(), why });
        if !text.starts_with(|c: char| c.is_ascii_alphanumeric() || c == '_') {
            return refuse("it starts with a letter, a digit or '_'");
        }
        if !text.chars().all(|c| c.is_ascii_alphanumeric() || matches!(c, '_' | '.' | '@' | '-' | '+' | ' ')) {
            return refuse("only ASCII letters, digits and '_', '.', '@', '-', '+' and spaces can be in it");
        }
        if text.ends_with(' ') {
            return refuse("it does not end with a space");
        }
        Ok(Self(text.to_owned()))
    }
}

impl FromStr for Namespace {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        check_label(text, "namespace", NAMESPACE_BYTES_MAX)?;
        Ok(Self(text.to_owned()))
    }
}

impl FromStr for Slug {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, NameError> {
        check_label(text, "slug", SLUG_BYTES_MAX)?;
        Ok(Self(text.to_owned()))
    }
}

impl Default for Namespace {
    fn default() -> Self {
        Self("default".to_owned())
    }
}

impl FunctionId {
    /// The function `name` in the namespace `default`.
    pub fn in_default(name: FunctionName) -> Self {
        Self { namespace: Namespace::default(), name }
    }

    /// The slug of this function.
    pub fn slug(&self) -> Slug {
        let in_default = self.namespace == Namespace::default();
        if in_default && check_label(&self.name.0, "slug", SLUG_BYTES_MAX).is_ok() {
            return Slug(self.name.0.clone());
        }
        // FNV-1a, 32 bits: <https://datatracker.ietf.org/doc/html/rfc9923>. Not for security: the store's index decides.
        let bytes = self.namespace.0.bytes().chain([b'/']).chain(self.name.0.bytes());
        let hash = bytes.fold(0x811c_9dc5_u32, |hash, b| (hash ^ u32::from(b)).wrapping_mul(0x0100_0193));
        let mut label: String = if in_default { self.name.0.clone() } else { format!("{}-{}", self.namespace, self.name) }
            .chars()
            .map(|c| if c.is_ascii_alphanumeric() { c.to_ascii_lowercase() } else { '-' })
            .collect();
        label.truncate(SLUG_BYTES_MAX - 9);
        Slug(format!("{}-{hash:08x}", label.trim_matches('-')).trim_start_matches('-').to_owned())
    }
}

impl fmt::Display for FunctionId {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.namespace, self.name)
    }
}

macro_rules! text_name {
    ($($name:ident),*) => {$(
        impl $name {
            /// The text.
            pub fn as_str(&self) -> &str {
                &self.0
            }
        }

        impl fmt::Display for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                f.write_str(&self.0)
            }
        }

        impl fmt::Debug for $name {
            fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
                fmt::Debug::fmt(&self.0, f)
            }
        }

        impl TryFrom<String> for $name {
            type Error = NameError;

            fn try_from(text: String) -> Result<Self, NameError> {
                text.parse()
            }
        }

        impl From<$name> for String {
            fn from(name: $name) -> Self {
                name.0
            }
        }
    )*};
}

text_name!(FunctionName, Namespace, Slug);

fn check_length(text: &str, what: &'static str, max: usize) -> Result<(), NameError> {
    if text.is_empty() {
        return Err(NameError::Empty { what });
    }
    if text.len() > max {
        return Err(NameError::TooLong { what, max, actual: text.len() });
    }
    Ok(())
}

fn check_label(text: &str, what: &'static str, max: usize) -> Result<(), NameError> {
    check_length(text, what, max)?;
    let inner = text.bytes().all(|b| matches!(b, b'a'..=b'z' | b'0'..=b'9' | b'-'));
    if !inner || text.starts_with('-') || text.ends_with('-') {
        let why = "it has lower-case letters, digits and inner '-' only";
        return Err(NameError::Character { what, name: text.to_owned(), why });
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn id(name: &str) -> FunctionId {
        FunctionId::in_default(name.parse().unwrap())
    }

    #[test]
    fn names_of_every_system_are_accepted() {
        for good in ["hello", "A_b", "a b@c", "my-func.v2", "_x", "9"] {
            assert!(good.parse::<FunctionName>().is_ok(), "{good}");
        }
        for bad in ["", " a", "a ", "-a", "a/b", "a\nb", "é", "a?b", ".."] {
            assert!(bad.parse::<FunctionName>().is_err(), "{bad}");
        }
    }

    #[test]
    fn a_label_is_its_own_slug_and_others_differ() {
        assert_eq!(id("hello-1").slug().as_str(), "hello-1");
        let slugs = ["A_b", "a_b", "a b", "a-b", "a.b"].map(|name| id(name).slug());
        for (i, one) in slugs.iter().enumerate() {
            assert!(slugs[i + 1..].iter().all(|other| other != one), "{one}");
        }
    }

    proptest! {
        #[test]
        fn every_name_has_a_valid_slug(name in "[A-Za-z0-9_][A-Za-z0-9_.@+ -]{0,200}[A-Za-z0-9_]", ns in "[a-z0-9]{1,63}") {
            let id = FunctionId { namespace: ns.parse().unwrap(), name: name.parse().unwrap() };
            prop_assert!(id.slug().as_str().parse::<Slug>().is_ok(), "{}", id.slug());
        }
    }
}

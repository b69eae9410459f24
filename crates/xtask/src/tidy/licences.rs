//! Licences of everything that is linked into the product or its tools.

use cargo_metadata::Metadata;

use super::Offence;

/// Licences under which we take code; `deny.toml` has the same list.
const ALLOWED: [&str; 11] = [
    "0BSD",
    "Apache-2.0",
    "Apache-2.0 WITH LLVM-exception",
    "BSD-2-Clause",
    "BSD-3-Clause",
    "CDLA-Permissive-2.0",
    "ISC",
    "MIT",
    "Unicode-3.0",
    "Unlicense",
    "Zlib",
];

/// Packages whose licence is none of the allowed ones.
pub(super) fn check(metadata: &Metadata) -> Vec<Offence> {
    let offence = |package: &cargo_metadata::Package| {
        let licence = package.license.as_deref().unwrap_or("unknown");
        let rule = format!("licence '{licence}' is not in the list of tidy/licences.rs");
        (!is_allowed(licence)).then(|| Offence::new(format!("package {} {}", package.name, package.version), rule))
    };
    metadata.packages.iter().filter_map(offence).collect()
}

/// Whether an SPDX expression can be fulfilled by allowed licences: one side of each `OR`, both sides of each `AND`. `/` is the old form of `OR`.
fn is_allowed(expression: &str) -> bool {
    let spaced = expression.replace('/', " OR ").replace('(', " ( ").replace(')', " ) ");
    let words: Vec<_> = spaced.split_whitespace().collect();
    let mut rest = &words[..];
    any_of(&mut rest) && rest.is_empty()
}

fn any_of(rest: &mut &[&str]) -> bool {
    let mut good = all_of(rest);
    while rest.first() == Some(&"OR") {
        *rest = &rest[1..];
        good |= all_of(rest);
    }
    good
}

fn all_of(rest: &mut &[&str]) -> bool {
    let mut good = one(rest);
    while rest.first() == Some(&"AND") {
        *rest = &rest[1..];
        good &= one(rest);
    }
    good
}

fn one(rest: &mut &[&str]) -> bool {
    let Some((first, after)) = rest.split_first() else { return false };
    *rest = after;
    if *first == "(" {
        let good = any_of(rest);
        let closed = rest.first() == Some(&")");
        *rest = rest.get(1..).unwrap_or_default();
        return good && closed;
    }
    if let ["WITH", exception, after @ ..] = rest {
        let name = format!("{first} WITH {exception}");
        *rest = after;
        return ALLOWED.contains(&name.as_str());
    }
    ALLOWED.contains(first)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn expressions_are_understood() {
        for good in [
            "MIT",
            "MIT OR Apache-2.0",
            "MIT/Apache-2.0",
            "Apache-2.0 WITH LLVM-exception OR Apache-2.0 OR MIT",
            "(MIT OR GPL-3.0) AND ISC",
            "Apache-2.0 AND ISC",
            "GPL-2.0 OR Zlib",
        ] {
            assert!(is_allowed(good), "{good}");
        }
        for bad in [
            "",
            "unknown",
            "GPL-3.0",
            "MIT AND GPL-3.0",
            "(MIT",
            "MIT)",
            "GPL-3.0 WITH LLVM-exception",
            "MIT WITH LLVM-exception",
            "MPL-2.0",
        ] {
            assert!(!is_allowed(bad), "{bad}");
        }
    }
}

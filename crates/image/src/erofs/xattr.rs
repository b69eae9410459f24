//! Extended attributes: which of an archive's a layer keeps, and their form on disk.

use std::collections::BTreeMap;

use crate::tar::Xattr;

use super::format::{XATTR_HEADER_BYTES, u16_at};
use super::tree::EntryReason;

/// Longest name without its prefix, in bytes.
pub const XATTR_NAME_BYTES_MAX: usize = 255;
/// Longest value in bytes.
pub const XATTR_VALUE_BYTES_MAX: usize = 65_535;
/// Most bytes that all attributes of one inode take on disk: its size field counts 4-byte words in 16 bits.
pub const XATTR_TOTAL_BYTES_MAX: usize = 65_534 * 4;
/// Room for the marks that the writer adds, and more than enough.
const RESERVE_BYTES: usize = 128;

/// Prefixes and their indexes on disk (`EROFS_XATTR_INDEX_*`), longest first. Others have no place in erofs.
const PREFIXES: [(&[u8], u8); 5] =
    [(b"system.posix_acl_access", 2), (b"system.posix_acl_default", 3), (b"user.", 1), (b"trusted.", 4), (b"security.", 6)];
const INDEX_USER: u8 = 1;
const INDEX_ACL_ACCESS: u8 = 2;
const INDEX_ACL_DEFAULT: u8 = 3;
const INDEX_TRUSTED: u8 = 4;

/// What overlayfs keeps for itself, below `trusted.` and `user.`.
const OVERLAY: &[u8] = b"overlay.";
/// The mark of an opaque directory.
const OPAQUE: &[u8] = b"overlay.opaque";
/// The mark of a directory that may contain whiteouts. Where only one layer has the directory, overlayfs lists it as it
/// is, whiteouts and all, unless it carries this (`ovl_path_check_origin_xattr`); an empty value names no origin.
const ORIGIN: &[u8] = b"overlay.origin";
/// What layers keep for themselves, below `trusted.`.
const OWN: &[u8] = b"funtainer.";
/// The mark of a directory that the archive uses but does not have.
const IMPLIED: &[u8] = b"funtainer.implied";
/// Version of the ACL form that the kernel reads (`POSIX_ACL_XATTR_VERSION`).
const ACL_VERSION: [u8; 4] = [2, 0, 0, 0];
/// Size of one entry of an ACL.
const ACL_ENTRY_BYTES: usize = 8;

/// Encodes what is kept of `xattrs`, sorted, without the header; empty where nothing is.
///
/// Left out: overlayfs's and our own (they would change what the layer means), name spaces that erofs cannot hold, and `user.*`
/// on anything but files and directories, where Linux has none and a copy-up would fail.
pub(super) fn encode(xattrs: &[Xattr], user_allowed: bool) -> Result<Box<[u8]>, EntryReason> {
    let mut kept = BTreeMap::new();
    for Xattr { name, value } in xattrs {
        let Some((index, suffix)) = split(name) else { continue };
        let is_overlay = matches!(index, INDEX_TRUSTED | INDEX_USER) && suffix.starts_with(OVERLAY);
        if is_overlay || index == INDEX_TRUSTED && suffix.starts_with(OWN) {
            continue;
        }
        if index == INDEX_USER && !user_allowed {
            continue;
        }
        if matches!(index, INDEX_ACL_ACCESS | INDEX_ACL_DEFAULT) && !is_acl(value) {
            return Err(EntryReason::Acl);
        }
        if suffix.len() > XATTR_NAME_BYTES_MAX {
            return Err(EntryReason::XattrName(suffix.len()));
        }
        if value.len() > XATTR_VALUE_BYTES_MAX {
            return Err(EntryReason::XattrValue(value.len()));
        }
        kept.insert((index, suffix), value.as_slice());
    }
    let mut body = Vec::new();
    for ((index, suffix), value) in kept {
        push(&mut body, index, suffix, value);
        if body.len() > XATTR_TOTAL_BYTES_MAX - RESERVE_BYTES {
            return Err(EntryReason::XattrTotal);
        }
    }
    Ok(body.into_boxed_slice())
}

/// Adds the marks of an opaque directory: one for overlays of root, one for those mounted with `userxattr`.
pub(super) fn with_opaque(body: &[u8]) -> Box<[u8]> {
    let mut body = body.to_vec();
    push(&mut body, INDEX_TRUSTED, OPAQUE, b"y");
    push(&mut body, INDEX_USER, OPAQUE, b"y");
    body.into_boxed_slice()
}

/// Adds the marks of a directory with whiteouts.
pub(super) fn with_origin(body: &[u8]) -> Box<[u8]> {
    let mut body = body.to_vec();
    push(&mut body, INDEX_TRUSTED, ORIGIN, b"");
    push(&mut body, INDEX_USER, ORIGIN, b"");
    body.into_boxed_slice()
}

/// Adds the mark of an implied directory.
pub(super) fn with_implied(body: &[u8]) -> Box<[u8]> {
    let mut body = body.to_vec();
    push(&mut body, INDEX_TRUSTED, IMPLIED, b"");
    body.into_boxed_slice()
}

/// `i_xattr_icount` for a body: 0 for none, else one more than its 4-byte words.
pub(super) fn icount(body: &[u8]) -> u16 {
    if body.is_empty() { 0 } else { (1 + body.len() / 4) as u16 }
}

/// Bytes of the whole area, header included, for a body.
pub(super) fn area_bytes(body: &[u8]) -> u64 {
    if body.is_empty() { 0 } else { (XATTR_HEADER_BYTES + body.len()) as u64 }
}

/// Bytes of the whole area, header included, for an `i_xattr_icount`.
pub(super) fn area_bytes_of(icount: u16) -> u64 {
    if icount == 0 { 0 } else { (XATTR_HEADER_BYTES + (usize::from(icount) - 1) * 4) as u64 }
}

/// The attributes of a body: full names and values. `None` where the body is malformed.
pub(super) fn decode(mut body: &[u8]) -> Option<Vec<Xattr>> {
    let mut xattrs = Vec::new();
    while !body.is_empty() {
        let (head, rest) = body.split_at_checked(4)?;
        let (suffix, rest) = rest.split_at_checked(usize::from(head[0]))?;
        let (value, _) = rest.split_at_checked(usize::from(u16_at(head, 2)))?;
        let (prefix, _) = PREFIXES.iter().find(|(_, index)| *index == head[1])?;
        xattrs.push(Xattr { name: [prefix, suffix].concat(), value: value.to_vec() });
        body = body.get((4 + suffix.len() + value.len()).next_multiple_of(4)..)?;
    }
    Some(xattrs)
}

/// Whether the attributes of a directory mark it as opaque, in either form.
pub(super) fn is_opaque(xattrs: &[Xattr]) -> bool {
    xattrs.iter().any(|Xattr { name, value }| {
        let suffix = name.strip_prefix(b"trusted.").or_else(|| name.strip_prefix(b"user."));
        suffix == Some(OPAQUE) && value == b"y"
    })
}

/// Whether an attribute can be set on a file of another file system by root of a user namespace. Not so `trusted.*`, which nobody sees there,
/// and what belongs to security modules of the host. Of overlayfs's own only the two marks above mean what they say.
pub(super) fn is_for_files(Xattr { name, value }: &Xattr) -> bool {
    if let Some(suffix) = name.strip_prefix(b"user.") {
        return match suffix {
            OPAQUE => value == b"y",
            ORIGIN => value.is_empty(),
            _ => !suffix.starts_with(OVERLAY),
        };
    }
    matches!(&name[..], b"security.capability" | b"system.posix_acl_access" | b"system.posix_acl_default")
}

/// Whether the attributes of a directory mark it as implied.
pub(super) fn is_implied(xattrs: &[Xattr]) -> bool {
    xattrs.iter().any(|Xattr { name, .. }| name.strip_prefix(b"trusted.") == Some(IMPLIED))
}

/// Whether the attribute is a mark of ours that nobody else is to see.
pub(super) fn is_own(xattr: &Xattr) -> bool {
    xattr.name.strip_prefix(b"trusted.").is_some_and(|suffix| suffix.starts_with(OWN))
}

fn split(name: &[u8]) -> Option<(u8, &[u8])> {
    let (prefix, index) = PREFIXES.iter().find(|(prefix, _)| name.starts_with(prefix))?;
    let suffix = &name[prefix.len()..];
    let whole = matches!(*index, INDEX_ACL_ACCESS | INDEX_ACL_DEFAULT);
    (suffix.is_empty() == whole).then_some((*index, suffix))
}

/// Whether the kernel could read the ACL; where it cannot, it refuses every access to the file.
fn is_acl(value: &[u8]) -> bool {
    value.strip_prefix(&ACL_VERSION).is_some_and(|entries| entries.len() % ACL_ENTRY_BYTES == 0)
}

fn push(body: &mut Vec<u8>, index: u8, suffix: &[u8], value: &[u8]) {
    body.push(suffix.len() as u8);
    body.push(index);
    body.extend_from_slice(&(value.len() as u16).to_le_bytes());
    body.extend_from_slice(suffix);
    body.extend_from_slice(value);
    body.resize(body.len().next_multiple_of(4), 0);
}

#[cfg(test)]
mod tests {
    use super::*;

    fn pair(name: &str, value: impl Into<Vec<u8>>) -> Xattr {
        Xattr { name: name.as_bytes().to_vec(), value: value.into() }
    }

    #[test]
    fn kept_attributes_come_back_sorted_and_the_last_wins() {
        let acl = [&ACL_VERSION[..], &[1, 0, 7, 0, 0xff, 0xff, 0xff, 0xff]].concat();
        let given = [
            pair("user.b", *b"1"),
            pair("security.capability", *b"\x01\n\0"),
            pair("user.a", *b""),
            pair("user.b", *b"2"),
            pair("system.posix_acl_access", acl.clone()),
            pair("trusted.overlay.opaque", *b"y"),
            pair("user.overlay.whiteout", *b"y"),
            pair("trusted.funtainer.implied", *b""),
            pair("system.nfs4_acl", *b"x"),
            pair("com.apple.quarantine", *b"x"),
            pair("user.", *b"no name"),
        ];
        let body = encode(&given, true).unwrap();
        let expect = [
            pair("user.a", *b""),
            pair("user.b", *b"2"),
            pair("system.posix_acl_access", acl.clone()),
            pair("security.capability", *b"\x01\n\0"),
        ];
        assert_eq!(decode(&body).unwrap(), expect);
        assert_eq!(decode(&encode(&given, false).unwrap()).unwrap(), expect[2..]);
        assert_eq!(area_bytes(&body), area_bytes_of(icount(&body)));
        assert!(is_opaque(&decode(&with_opaque(&body)).unwrap()));
        assert!(!is_opaque(&expect));
        assert!(is_implied(&decode(&with_implied(&body)).unwrap()));
        assert!(!is_implied(&expect));
    }

    #[test]
    fn limits_are_refused() {
        let long = "x".repeat(256);
        assert!(matches!(encode(&[pair(&format!("user.{long}"), *b"")], true), Err(EntryReason::XattrName(256))));
        assert!(matches!(encode(&[pair("user.a", vec![0; 65_536])], true), Err(EntryReason::XattrValue(65_536))));
        let many: Vec<_> = (0..5).map(|n| pair(&format!("user.{n}"), vec![0; 65_000])).collect();
        assert!(matches!(encode(&many, true), Err(EntryReason::XattrTotal)));
        assert!(matches!(encode(&[pair("system.posix_acl_access", *b"text")], true), Err(EntryReason::Acl)));
    }

    #[test]
    fn a_cut_body_is_no_panic() {
        let body = encode(&[pair("user.name", *b"value"), pair("trusted.x", *b"y")], true).unwrap();
        for end in 0..body.len() {
            let _ = decode(&body[..end]);
        }
    }
}

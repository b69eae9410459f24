//! An image's own passwd(5) and group(5), read as foreign bytes: lines that break the format are passed over, as libc does.

/// Highest id that a sandbox maps; 65535 itself is left out by kernels' 16-bit interfaces but can be used.
pub const ID_MAX: u64 = 65_535;
/// Most groups of one user that a start takes, the primary one included.
pub const GROUPS_MAX: usize = 64;
/// Home of a user without one, as in Docker.
const HOME_DEFAULT: &str = "/";

/// Who a `USER` of an image is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// User id.
    pub uid: u32,
    /// Primary group id.
    pub gid: u32,
    /// Supplementary groups: the primary one first, as login(1) and Docker have it, so that a mode that denies a group something denies it
    /// to its members; then those of the files, ascending, each once.
    pub groups: Vec<u32>,
    /// Home directory, `/` where none is known. Free of NUL.
    pub home: String,
}

/// Why a `USER` cannot be used.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AccountError {
    /// A name that is not in the file.
    #[error("'{0}' is not in the image's passwd or group file")]
    Unknown(String),
    /// Above [`ID_MAX`].
    #[error("id {0} is above {ID_MAX}")]
    IdTooLarge(u64),
    /// Above [`GROUPS_MAX`].
    #[error("in more than {GROUPS_MAX} groups")]
    TooManyGroups,
}

/// Resolves `user`, `uid`, `user:group`, `uid:gid` or any mix against the content of passwd(5) and group(5); empty is root.
///
/// Without a group the user's groups are those of the files, with one it is the only one. A number need not be in a file, and is always an id,
/// also where a name of the same digits is. (OCI image specification, "Image Configuration", field User; what it leaves open is as in
/// Docker, moby/sys `user.GetExecUser`.)
pub fn resolve(user: &str, passwd: &[u8], group: &[u8]) -> Result<Identity, AccountError> {
    let (user, wanted_group) = match user.split_once(':') {
        Some((user, "")) => (user, None),
        Some((user, group)) => (user, Some(group)),
        None => (user, None),
    };
    let user = if user.is_empty() { "0" } else { user };
    let number = number(user.as_bytes());
    let known = users(passwd).find(|entry| match number {
        Some(number) => entry.uid == number,
        None => entry.name == user.as_bytes(),
    });
    let uid = known.as_ref().map(|entry| entry.uid).or(number).ok_or_else(|| AccountError::Unknown(user.to_owned()))?;
    let (gid, more) = match (wanted_group, &known) {
        (Some(wanted), _) => (named_group(wanted, group)?, Vec::new()),
        (None, None) => (0, Vec::new()),
        (None, Some(entry)) => (entry.gid, memberships(entry.name, entry.gid, group)?),
    };
    let gid = small(gid)?;
    let groups = std::iter::once(gid).chain(more).collect();
    let home = known.as_ref().and_then(|entry| std::str::from_utf8(entry.home).ok()).filter(|home| home.starts_with('/'));
    Ok(Identity { uid: small(uid)?, gid, groups, home: home.unwrap_or(HOME_DEFAULT).to_owned() })
}

struct UserEntry<'a> {
    name: &'a [u8],
    uid: u64,
    gid: u64,
    home: &'a [u8],
}

struct GroupEntry<'a> {
    name: &'a [u8],
    gid: u64,
    members: &'a [u8],
}

/// `name:password:uid:gid:gecos:home:shell`
fn users(passwd: &[u8]) -> impl Iterator<Item = UserEntry<'_>> {
    lines(passwd).filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let (name, _, uid, gid) = (fields.next()?, fields.next()?, number(fields.next()?)?, number(fields.next()?)?);
        Some(UserEntry { name, uid, gid, home: fields.nth(1).unwrap_or_default() })
    })
}

/// `name:password:gid:member,member`
fn groups(group: &[u8]) -> impl Iterator<Item = GroupEntry<'_>> {
    lines(group).filter_map(|line| {
        let mut fields = line.split(|byte| *byte == b':');
        let (name, _, gid) = (fields.next()?, fields.next()?, number(fields.next()?)?);
        Some(GroupEntry { name, gid, members: fields.next().unwrap_or_default() })
    })
}

/// Lines with a name in front, free of NUL.
fn lines(file: &[u8]) -> impl Iterator<Item = &[u8]> {
    let lines = file.split(|byte| *byte == b'\n').map(|line| line.strip_suffix(b"\r").unwrap_or(line));
    lines.filter(|line| !line.starts_with(b"#") && !line.starts_with(b":") && !line.contains(&0))
}

fn named_group(wanted: &str, group: &[u8]) -> Result<u64, AccountError> {
    let by_name = || groups(group).find(|entry| entry.name == wanted.as_bytes()).map(|entry| entry.gid);
    number(wanted.as_bytes()).or_else(by_name).ok_or_else(|| AccountError::Unknown(wanted.to_owned()))
}

fn memberships(name: &[u8], primary: u64, group: &[u8]) -> Result<Vec<u32>, AccountError> {
    let is_member = |entry: &GroupEntry<'_>| entry.members.split(|byte| *byte == b',').any(|member| member == name);
    let mut gids = Vec::new();
    for entry in groups(group).filter(|entry| entry.gid != primary && is_member(entry)) {
        let gid = small(entry.gid)?;
        if let Err(place) = gids.binary_search(&gid) {
            if gids.len() + 1 == GROUPS_MAX {
                return Err(AccountError::TooManyGroups);
            }
            gids.insert(place, gid);
        }
    }
    Ok(gids)
}

/// Digits only: a sign or a space makes a name of it.
fn number(text: &[u8]) -> Option<u64> {
    if text.is_empty() || !text.iter().all(u8::is_ascii_digit) {
        return None;
    }
    // More digits than a u64 has are an id that is too large, not a name.
    Some(std::str::from_utf8(text).ok()?.parse().unwrap_or(u64::MAX))
}

fn small(id: u64) -> Result<u32, AccountError> {
    if id > ID_MAX { Err(AccountError::IdTooLarge(id)) } else { Ok(id as u32) }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    const PASSWD: &[u8] = b"root:x:0:0:root:/root:/bin/sh\n\
        # a comment\n\
        broken line\n\
        app:x:1000:1000:App:/home/app:/bin/sh\r\n\
        :x:5:5::/:\n\
        nohome:x:7:8::relative:/bin/sh\n\
        1234:x:42:43:a name of digits:/d:/bin/sh\n\
        big:x:70000:0::/:\n\
        neg:x:-1:0::/:\n\
        short:x:9:10";
    const GROUP: &[u8] =
        b"root:x:0:\nstaff:x:50:app,root\nvideo:x:44:app\nvideo2:x:44:app\napp:x:1000:app\nhuge:x:70000:\nwheel:x:10:root\n77:x:78:\n";

    #[test]
    fn users_of_images() {
        let check = |user: &str, uid, gid, groups: &[u32], home: &str| {
            let expect = Identity { uid, gid, groups: groups.to_vec(), home: home.to_owned() };
            assert_eq!(resolve(user, PASSWD, GROUP), Ok(expect), "{user}");
        };
        check("", 0, 0, &[0, 10, 50], "/root");
        check("root", 0, 0, &[0, 10, 50], "/root");
        check("app", 1000, 1000, &[1000, 44, 50], "/home/app");
        check("1000", 1000, 1000, &[1000, 44, 50], "/home/app");
        check("app:", 1000, 1000, &[1000, 44, 50], "/home/app");
        check("app:video", 1000, 44, &[44], "/home/app");
        check("app:45", 1000, 45, &[45], "/home/app");
        check(":video", 0, 44, &[44], "/root");
        check("5", 5, 0, &[0], "/");
        check("65535:65535", 65535, 65535, &[65535], "/");
        check("nohome", 7, 8, &[8], "/");
        check("42", 42, 43, &[43], "/d");
        check("short", 9, 10, &[10], "/");
        // Names of digits are never meant.
        check("1234", 1234, 0, &[0], "/");
        check("app:77", 1000, 77, &[77], "/home/app");
    }

    #[test]
    fn users_that_are_refused() {
        let check = |user: &str, expect: AccountError| assert_eq!(resolve(user, PASSWD, GROUP), Err(expect), "{user}");
        check("nobody", AccountError::Unknown("nobody".into()));
        check("neg", AccountError::Unknown("neg".into()));
        check("-1", AccountError::Unknown("-1".into()));
        check("app:none", AccountError::Unknown("none".into()));
        check("big", AccountError::IdTooLarge(70_000));
        check("65536", AccountError::IdTooLarge(65_536));
        check("0:huge", AccountError::IdTooLarge(70_000));
        check("99999999999999999999999", AccountError::IdTooLarge(u64::MAX));
        let many = |count: usize| {
            let lines: Vec<_> = (100..100 + count).map(|gid| format!("g{gid}:x:{gid}:app")).collect();
            resolve("app", PASSWD, lines.join("\n").as_bytes()).map(|identity| identity.groups.len())
        };
        assert_eq!(many(GROUPS_MAX - 1), Ok(GROUPS_MAX));
        assert_eq!(many(GROUPS_MAX), Err(AccountError::TooManyGroups));
    }

    #[test]
    fn an_empty_filesystem_has_root() {
        assert_eq!(resolve("", b"", b""), Ok(Identity { uid: 0, gid: 0, groups: vec![0], home: "/".into() }));
    }

    proptest! {
        #[test]
        fn no_file_makes_ids_out_of_range(user in "[a-z0-9:]{0,8}", passwd: Vec<u8>, group in "([a-z0-9,:\n]{0,12}\n){0,9}") {
            if let Ok(identity) = resolve(&user, &passwd, group.as_bytes()) {
                prop_assert!(identity.uid <= 65_535 && identity.gid <= 65_535 && identity.groups.len() <= GROUPS_MAX);
                prop_assert!(identity.home.starts_with('/') && !identity.home.contains('\0'));
            }
        }
    }
}

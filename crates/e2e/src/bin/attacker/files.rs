//! Files of the kernel and of the host.

use std::fs::{self, File};
use std::io::{self, Read as _};

use crate::kernel::call;
use crate::{Attack, Loot};

pub(crate) const ATTACKS: &[Attack] = &[
    // Opened only: nothing is written where it succeeds.
    ("write", |path| File::options().write(true).open(path).map(|_| format!("{path} is open for writing"))),
    ("read", read),
    ("list", |path| {
        let names: Vec<_> = fs::read_dir(path)?.map_while(Result::ok).map(|entry| entry.file_name()).collect();
        if names.is_empty() {
            Err(io::Error::other("an empty directory"))
        } else {
            Ok(format!("{} names: {names:?}", names.len()))
        }
    }),
    ("exists", |path| fs::symlink_metadata(path).map(|_| format!("{path} is there"))),
    ("device", device),
    ("node", node),
    ("spare-me", spare_me),
    ("privileges", privileges),
];

/// Some bytes of it; none count as held.
fn read(path: &str) -> Loot {
    // The kernel's log is read by whole records.
    let mut bytes = [0; 8192];
    match File::open(path)?.read(&mut bytes)? {
        0 => Err(io::Error::other("an empty file")),
        some => Ok(format!("{some} bytes of {path}")),
    }
}

/// `KIND:MAJOR:MINOR`, made here and read.
fn device(what: &str) -> Loot {
    let path = format!("/tmp/attacker-device-{}", std::process::id());
    let mut fields = what.split(':');
    let kind = if fields.next() == Some("b") { libc::S_IFBLK } else { libc::S_IFCHR };
    let mut number = || fields.next()?.parse::<u32>().ok();
    let (Some(major), Some(minor)) = (number(), number()) else { return Err(io::Error::other("KIND:MAJOR:MINOR is missing")) };
    let name = std::ffi::CString::new(path.clone()).unwrap_or_default();
    let number = libc::makedev(major, minor);
    call(libc::SYS_mknodat, [libc::AT_FDCWD.into(), (*name).into(), i64::from(kind | 0o666).into(), number.into()])?;
    let loot = read(&path);
    fs::remove_file(&path)?;
    loot
}

/// A device node that came with the image.
fn node(path: &str) -> Loot {
    fs::symlink_metadata(path).map_err(|error| io::Error::other(format!("the node is not there: {error}")))?;
    read(path)
}

/// Not to be killed when memory runs out.
fn spare_me(_: &str) -> Loot {
    fs::write("/proc/self/oom_score_adj", "-1000").map(|()| "the kernel will kill others".to_owned())
}

/// Whether this process, started as somebody else, is root or has capabilities now.
fn privileges(_: &str) -> Loot {
    let status = fs::read_to_string("/proc/self/status")?;
    let value = |name: &str| status.lines().find_map(|line| line.strip_prefix(name)).unwrap_or_default().trim().to_owned();
    let (users, effective, bounding) = (value("Uid:"), value("CapEff:"), value("CapBnd:"));
    let gained = users.split_whitespace().nth(1) == Some("0") || effective.chars().any(|digit| digit != '0');
    let said = format!("users {users} effective {effective} bounding {bounding}");
    if gained { Ok(said) } else { Err(io::Error::other(said)) }
}

//! The subordinate ids that the administrator gave to a user: subuid(5), subgid(5).

use std::fs;

/// Files of the administrator.
const UID_FILE: &str = "/etc/subuid";
const GID_FILE: &str = "/etc/subgid";
/// Most lines of the user that are used: an id map of the kernel has at most 340 (user_namespaces(7)), of which one is for the user's own id.
const RANGES_MAX: usize = 339;
/// From here on a namespace has all ids that anybody uses: the first one has 4,294,967,295.
const EVERYTHING: u32 = 0xFFFF_0000;
/// Fewest ids of use: one for the daemon, two for functions.
const IDS_MIN: u32 = 3;

/// Why a user has none.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub(super) enum NoIds {
    /// The file cannot be read.
    #[error("{file} cannot be read ({reason})")]
    File {
        /// Which.
        file: &'static str,
        /// Why.
        reason: String,
    },
    /// There is no line of use for the user.
    #[error("{file} has no ids for {user} (as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user})")]
    None {
        /// Which.
        file: &'static str,
        /// Name of the user, or its number.
        user: String,
    },
}

/// Consecutive ids of the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
struct Range {
    start: u32,
    count: u32,
}

/// What a user namespace has.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Mapped {
    /// Every id: it is the first namespace, or as good.
    Everything,
    /// Root and these.
    Some(Subordinate),
    /// Root, and too few others to be of use.
    RootAlone,
}

/// As many user ids as group ids.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Subordinate {
    /// The user's own ids.
    own: (u32, u32),
    uids: Vec<Range>,
    gids: Vec<Range>,
}

impl Subordinate {
    /// Those of the user that runs this process.
    pub(super) fn find() -> Result<Self, NoIds> {
        let (uid, gid) = (rustix::process::geteuid().as_raw(), rustix::process::getegid().as_raw());
        let read = |file| fs::read_to_string(file).map_err(|error| NoIds::File { file, reason: error.to_string() });
        let (uids, gids) = (read(UID_FILE)?, read(GID_FILE)?);
        let names = names(uid);
        let names: Vec<&str> = names.iter().map(String::as_str).collect();
        Self::from_files(&uids, &gids, &names, uid, gid)
    }

    pub(super) fn from_files(uids: &str, gids: &str, names: &[&str], uid: u32, gid: u32) -> Result<Self, NoIds> {
        let user = || names.first().map_or_else(|| uid.to_string(), |name| (*name).to_owned());
        let mut uids = ranges(uids, names, uid, uid);
        let mut gids = ranges(gids, names, uid, gid);
        let count = total(&uids).min(total(&gids));
        for (file, found) in [(UID_FILE, &uids), (GID_FILE, &gids)] {
            if total(found) < IDS_MIN {
                return Err(NoIds::None { file, user: user() });
            }
        }
        cut(&mut uids, count);
        cut(&mut gids, count);
        Ok(Self { own: (uid, gid), uids, gids })
    }

    /// What the maps of this process's own namespace give to it (user_namespaces(7), `/proc/self/uid_map`): the ids from 1 on, up to the first that
    /// is not there.
    pub(super) fn from_maps(uids: &str, gids: &str) -> Mapped {
        let (Some((uid, mut uids)), Some((gid, mut gids))) = (consecutive(uids), consecutive(gids)) else {
            return Mapped::RootAlone;
        };
        let count = total(&uids).min(total(&gids));
        if count >= EVERYTHING {
            return Mapped::Everything;
        }
        if count < IDS_MIN {
            return Mapped::RootAlone;
        }
        cut(&mut uids, count);
        cut(&mut gids, count);
        Mapped::Some(Self { own: (uid, gid), uids, gids })
    }

    /// How many there are of either kind.
    pub(super) fn count(&self) -> u32 {
        total(&self.uids)
    }

    /// The host's user and group id behind the subordinate id number `index`, counted from 0.
    pub(super) fn host(&self, index: u32) -> (u32, u32) {
        (nth(&self.uids, index), nth(&self.gids, index))
    }

    /// The map of a namespace where 0 is the user and 1 and up are these: inside, outside, count.
    pub(super) fn uid_map(&self) -> Vec<[u32; 3]> {
        map(self.own.0, &self.uids)
    }

    /// Likewise for groups.
    pub(super) fn gid_map(&self) -> Vec<[u32; 3]> {
        map(self.own.1, &self.gids)
    }
}

/// The names by which the files may know a user. Other sources of names (NSS) are not asked: a static program must not load the host's
/// libraries; the environment stands in for them.
fn names(uid: u32) -> Vec<String> {
    let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
    let found = passwd.lines().filter_map(|line| {
        let mut fields = line.split(':');
        let name = fields.next()?;
        (fields.nth(1)?.parse() == Ok(uid)).then(|| name.to_owned())
    });
    let mut names: Vec<String> = found.collect();
    if names.is_empty() {
        names.extend(["USER", "LOGNAME"].into_iter().filter_map(|name| std::env::var(name).ok()));
    }
    names
}

/// The lines of a user, in the order of the file, as far as they can be used: without root's id, without the user's own, without what came before.
fn ranges(text: &str, names: &[&str], uid: u32, own: u32) -> Vec<Range> {
    let mut found: Vec<Range> = Vec::new();
    for line in text.lines() {
        let mut fields = line.trim().split(':');
        let (Some(user), Some(start), Some(count), None) = (fields.next(), fields.next(), fields.next(), fields.next()) else {
            continue;
        };
        if !names.contains(&user) && user.parse() != Ok(uid) {
            continue;
        }
        let (Ok(start), Ok(count)) = (start.parse::<u32>(), count.parse::<u32>()) else { continue };
        // The last number is no id.
        let Some(end) = start.checked_add(count).filter(|end| count > 0 && *end < u32::MAX) else { continue };
        let overlaps = |other: &Range| start < other.start + other.count && other.start < end;
        if start == 0 || (start..end).contains(&own) || found.iter().any(overlaps) || found.len() == RANGES_MAX {
            continue;
        }
        found.push(Range { start, count });
    }
    found
}

/// What 0 is outside, and what 1 and up are.
fn consecutive(map: &str) -> Option<(u32, Vec<Range>)> {
    let mut lines: Vec<[u32; 3]> = Vec::new();
    for line in map.lines() {
        let mut numbers = line.split_ascii_whitespace().map_while(|number| number.parse().ok());
        lines.push([numbers.next()?, numbers.next()?, numbers.next()?]);
    }
    lines.sort_unstable();
    let mut next = 0;
    let mut ranges = Vec::new();
    for [inside, start, count] in lines {
        if inside != next || count == 0 {
            break;
        }
        ranges.push(Range { start, count });
        next = inside.saturating_add(count);
    }
    let first = ranges.first_mut()?;
    let own = first.start;
    (first.start, first.count) = (first.start.saturating_add(1), first.count - 1);
    ranges.retain(|range| range.count > 0);
    Some((own, ranges))
}

fn total(ranges: &[Range]) -> u32 {
    ranges.iter().fold(0, |sum, range| sum.saturating_add(range.count))
}

/// Keeps the first `count` ids.
fn cut(ranges: &mut Vec<Range>, count: u32) {
    let mut left = count;
    ranges.retain_mut(|range| {
        range.count = range.count.min(left);
        left -= range.count;
        range.count > 0
    });
}

fn nth(ranges: &[Range], mut index: u32) -> u32 {
    for range in ranges {
        if index < range.count {
            return range.start + index;
        }
        index -= range.count;
    }
    unreachable!("the index is below the count")
}

fn map(own: u32, ranges: &[Range]) -> Vec<[u32; 3]> {
    let mut map = vec![[0, own, 1]];
    let mut inside = 1;
    for range in ranges {
        map.push([inside, range.start, range.count]);
        inside += range.count;
    }
    map
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn find(uids: &str, gids: &str) -> Result<Subordinate, NoIds> {
        Subordinate::from_files(uids, gids, &["ada"], 1000, 1001)
    }

    #[test]
    fn lines_by_name_and_by_number_are_found() {
        let ids = find("root:1:9\nada:100000:65536\n1000:300000:10\nadam:5:9\n", "ada:200000:65600\n").unwrap();
        assert_eq!(ids.count(), 65_546);
        assert_eq!(ids.uid_map(), [[0, 1000, 1], [1, 100_000, 65_536], [65_537, 300_000, 10]]);
        assert_eq!(ids.gid_map(), [[0, 1001, 1], [1, 200_000, 65_546]]);
        assert_eq!(ids.host(65_536), (300_000, 265_536));
    }

    #[test]
    fn what_cannot_be_used_is_left_out() {
        let lines = [
            "ada:0:65536",
            "ada:990:20",
            "ada:100000:0",
            "ada:100000",
            "ada:x:1",
            "ada:1:2:3",
            "ada:4294967290:10",
            "# ada",
            "",
            "ada:100000:50",
            "ada:100049:9",
            " ada:200000:7 ",
        ];
        let ids = find(&lines.join("\n"), "ada:100000:65536").unwrap();
        assert_eq!(ids.uid_map(), [[0, 1000, 1], [1, 100_000, 50], [51, 200_000, 7]]);
    }

    #[test]
    fn maps_of_the_kernel_are_read_back() {
        let ids = find("ada:100000:65536\nada:300000:10", "ada:200000:65600").unwrap();
        let text = |map: Vec<[u32; 3]>| {
            let lines: Vec<String> =
                map.iter().map(|[inside, outside, count]| format!("{inside:10} {outside:10} {count:10}\n")).collect();
            lines.concat()
        };
        assert_eq!(Subordinate::from_maps(&text(ids.uid_map()), &text(ids.gid_map())), Mapped::Some(ids.clone()));
        let first = "         0          0 4294967295\n";
        assert_eq!(Subordinate::from_maps(first, first), Mapped::Everything);
        let single = "         0       1000          1\n";
        assert_eq!(Subordinate::from_maps(single, single), Mapped::RootAlone);
        assert_eq!(Subordinate::from_maps("", ""), Mapped::RootAlone);
        // As a container of an ordinary user has it: root is part of the range.
        let container = "0 100000 65536\n";
        let Mapped::Some(ids) = Subordinate::from_maps(container, container) else { panic!("ids") };
        assert_eq!((ids.count(), ids.host(0)), (65_535, (100_001, 100_001)));
        // A gap ends it.
        let gap = "0 1000 1\n1 100000 50\n60 200000 1000\n";
        let Mapped::Some(ids) = Subordinate::from_maps(gap, gap) else { panic!("ids") };
        assert_eq!(ids.count(), 50);
    }

    #[test]
    fn none_says_whose_and_where() {
        let error = find("ada:100000:65536\n", "").unwrap_err();
        assert_eq!(error, NoIds::None { file: GID_FILE, user: "ada".to_owned() });
        assert!(error.to_string().contains("usermod --add-subuids"), "{error}");
        assert!(find("", "ada:1:9").is_err());
        assert!(find("ada:100000:2", "ada:100000:2").is_err());
    }

    proptest! {
        #[test]
        fn maps_neither_overlap_nor_leave_gaps(lines in prop::collection::vec((any::<u32>(), 0_u32..200_000), 0..12)) {
            let lines: Vec<String> = lines.iter().map(|(start, count)| format!("ada:{start}:{count}")).collect();
            let text = lines.join("\n");
            let Ok(ids) = find(&text, "ada:1000000:4000000") else { return Ok(()) };
            let mut inside = 0;
            let mut outside: Vec<(u32, u32)> = Vec::new();
            for [first, start, count] in ids.uid_map() {
                prop_assert_eq!(first, inside);
                inside += count;
                prop_assert!(start != 0 && start.checked_add(count).is_some());
                prop_assert!(outside.iter().all(|(other, length)| start >= other + length || *other >= start + count));
                outside.push((start, count));
            }
            prop_assert_eq!(inside, ids.count() + 1);
        }
    }
}

//! What the keeper keeps in memory.
//!
//! The keeper is the whole executable, of which it needs a fifth: the command line's parser, the probing of the kernel and the run-time's own
//! start run once. Their pages stay mapped, and the kernel counts every mapped page as resident (`VmRSS`), so a keeper would hold 5.5 MB for
//! ever where 3.3 MB do. [`release_once_used`] takes those pages out of the page tables once the keeper has started; what it goes on to use
//! comes back by a minor fault, out of the page cache, as it came the first time.
//!
//! What counts as resident afterwards: the code and constants that the loop touches, rounded up to the 64 KiB that the kernel maps around
//! each fault; relocated constants (RELRO); heap and stack.

use std::ffi::c_void;
use std::fs;
use std::io;

use crate::step::checked;

/// A mapping, as `/proc/self/smaps` tells of it (proc_pid_smaps(5)).
#[derive(Debug, PartialEq, Eq)]
struct Mapping {
    start: usize,
    end: usize,
}

/// Unmaps every page of a file that is mapped read-only and unchanged, and returns how many bytes such mappings span. Each page comes back when
/// it is touched.
pub(super) fn release_once_used() -> io::Result<usize> {
    let mut bytes = 0;
    for Mapping { start, end } in unchanged(&fs::read_to_string("/proc/self/smaps")?) {
        let length = end - start;
        // SAFETY: the range is one mapping of a file, which is not writable and has no page of its own (a relocated constant, a
        // breakpoint), so that every page is read again from the file with the bytes that it has now. Needed because there is no safe
        // call for it: for other mappings this is a way to lose data.
        let result = unsafe { libc::madvise(start as *mut c_void, length, libc::MADV_DONTNEED) };
        checked(result.into())?;
        bytes += length;
    }
    Ok(bytes)
}

/// The private mappings of files that are readable, not writable, and without anonymous pages.
fn unchanged(smaps: &str) -> Vec<Mapping> {
    let mut found = Vec::new();
    let mut candidate = None;
    for line in smaps.lines() {
        if let Some((mapping, is_candidate)) = head(line) {
            candidate = is_candidate.then_some(mapping);
        } else if line.split_ascii_whitespace().eq(["Anonymous:", "0", "kB"]) {
            found.extend(candidate.take());
        }
    }
    found
}

/// Of a mapping's first line, `START-END MODE OFFSET DEVICE INODE PATH`: the mapping, and whether it is a file's, private, readable and not
/// writable. `None` for other lines.
fn head(line: &str) -> Option<(Mapping, bool)> {
    let mut fields = line.split_ascii_whitespace();
    let (start, end) = fields.next()?.split_once('-')?;
    let hexadecimal = |digits| usize::from_str_radix(digits, 16).ok();
    let (start, end) = (hexadecimal(start)?, hexadecimal(end)?);
    let mode = fields.next()?;
    let is_file = fields.nth(3).is_some_and(|path| path.starts_with('/'));
    Some((Mapping { start, end }, is_file && matches!(mode, "r--p" | "r-xp")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_unchanged_pages_of_files_are_released() {
        let smaps = "\
1000-2000 r--p 00000000 fe:00 7    /bin/with space
Rss:                   4 kB
Anonymous:             0 kB
VmFlags: rd mr mw me
2000-5000 r-xp 00001000 fe:00 7    /bin/x
Anonymous:             0 kB
5000-6000 r--p 00004000 fe:00 7    /bin/x
Anonymous:             4 kB
6000-7000 rw-p 00005000 fe:00 7    /bin/x
Anonymous:             0 kB
7000-8000 r--s 00005000 fe:00 7    /bin/x
Anonymous:             0 kB
8000-9000 r--p 00000000 00:00 0
Anonymous:             0 kB
9000-a000 r-xp 00000000 00:00 0    [vdso]
Anonymous:             0 kB
";
        let expect = [Mapping { start: 0x1000, end: 0x2000 }, Mapping { start: 0x2000, end: 0x5000 }];
        assert_eq!(unchanged(smaps), expect);
        assert_eq!(unchanged(""), []);
    }

    #[test]
    fn what_was_used_once_is_not_resident_afterwards_and_still_works() {
        let resident = || {
            let status = fs::read_to_string("/proc/self/status").unwrap();
            let line = status.lines().find_map(|line| line.strip_prefix("RssFile:")).unwrap();
            line.trim().trim_end_matches(" kB").parse::<usize>().unwrap() * 1024
        };
        let smaps = fs::read_to_string("/proc/self/smaps").unwrap();
        let executable = unchanged(&smaps).into_iter().max_by_key(|mapping| mapping.end - mapping.start).unwrap();
        for page in (executable.start..executable.end).step_by(4096) {
            // SAFETY: the page is readable, by the kernel's word, and nothing unmaps it.
            std::hint::black_box(unsafe { (page as *const u8).read_volatile() });
        }
        let before = resident();
        let released = release_once_used().unwrap();
        assert!(released >= executable.end - executable.start);
        assert!(resident() < before, "{before} bytes of files were resident, and are now");
    }
}

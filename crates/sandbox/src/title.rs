//! The title of a process, as `ps` shows it.
//!
//! A process that was forked and not executed anew keeps the arguments of its parent. The kernel shows whatever bytes stand in the area
//! of the arguments; it runs on into the area of the environment when the former does not end in NUL (`get_mm_cmdline` in
//! fs/proc/base.c), so a title may be as long as both. Moving the area (`PR_SET_MM`) would need CAP_SYS_RESOURCE.
//!
//! Lifecycle: [`Title::prepare`] once, at the start of the process and before any thread; [`Title::set`] in each child.

use std::ffi::CStr;

use rustix::io::Errno;

/// The area over which titles are written. A copy is valid in every forked child.
#[derive(Debug, Clone, Copy)]
pub struct Title {
    start: usize,
    length: usize,
}

/// Why titles cannot be set.
#[derive(Debug, thiserror::Error)]
pub enum TitleError {
    /// `/proc` is not mounted, or not readable.
    #[error("read /proc/self/stat: {0}")]
    Read(std::io::Error),
    /// The kernel did not tell the places.
    #[error("/proc/self/stat does not tell where the arguments stand")]
    Unknown,
}

impl Title {
    /// Finds the area, and moves the environment out of it: the variables keep their values, at other addresses.
    ///
    /// # Safety
    /// No other thread may run, and no pointer into the arguments or the environment (as `getenv` of C returns it) may be kept.
    /// `std::env::args` is safe to use before, not after: it reads the area.
    pub unsafe fn prepare() -> Result<Self, TitleError> {
        let fields = std::fs::read_to_string("/proc/self/stat").map_err(TitleError::Read)?;
        let (start, length) = area(&fields).ok_or(TitleError::Unknown)?;
        for (name, value) in std::env::vars_os() {
            // SAFETY: the caller promises that no other thread runs. The C library copies the value.
            unsafe { std::env::set_var(name, value) };
        }
        Ok(Self { start, length })
    }

    /// For tests, whose process keeps its title.
    #[cfg(test)]
    pub(crate) const fn nowhere() -> Self {
        Self { start: 0, length: 0 }
    }

    /// Longest title in bytes; a longer one is cut.
    pub const fn capacity(&self) -> usize {
        self.length.saturating_sub(1)
    }

    /// Writes the title, and zeros over all that stood there of arguments and environment.
    ///
    /// Neither allocates nor locks, makes no system call: may be called between clone and exec.
    ///
    /// # Safety
    /// Nothing may read the area meanwhile: no other thread in `getenv`, none in `std::env::args`.
    pub unsafe fn set(&self, title: &[u8]) {
        let text = &title[..title.len().min(self.capacity())];
        // SAFETY: the kernel named the area as this process's own arguments and environment, which are mapped writable for the life of
        // the process (they lie on the initial stack), `prepare` moved all variables out of it, and `text` is shorter than the area.
        // A forked child has the same mapping at the same address.
        unsafe {
            let area = std::ptr::with_exposed_provenance_mut::<u8>(self.start);
            std::ptr::copy(text.as_ptr(), area, text.len());
            std::ptr::write_bytes(area.add(text.len()), 0, self.length - text.len());
        }
    }
}

/// Sets the name of the calling thread (`comm`), cut to 15 bytes by the kernel.
///
/// One system call: may be called between clone and exec.
pub fn set_name(name: &CStr) -> Result<(), Errno> {
    rustix::thread::set_name(name)
}

/// Start and length of the area: fields 48 to 51 of proc_pid_stat(5), arguments and the environment if it follows at once.
fn area(stat: &str) -> Option<(usize, usize)> {
    // The second field is the name in brackets, which may hold anything; the third follows the last bracket.
    let fields: Vec<&str> = stat.get(stat.rfind(')')? + 1..)?.split_ascii_whitespace().collect();
    let field = |number: usize| fields.get(number - 3)?.parse::<usize>().ok();
    let (arg_start, arg_end, env_start, env_end) = (field(48)?, field(49)?, field(50)?, field(51)?);
    if arg_start == 0 || arg_end <= arg_start {
        return None;
    }
    let end = if env_start == arg_end && env_end > env_start { env_end } else { arg_end };
    Some((arg_start, end - arg_start))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_area_is_read_from_stat() {
        let stat = |name: &str, tail: &str| {
            let between: Vec<String> = (4..48).map(|number| number.to_string()).collect();
            format!("1 ({name}) S {} {tail} 0\n", between.join(" "))
        };
        for (tail, expect) in [
            ("1000 1040 1040 2000", Some((1000, 1000))),
            ("1000 1040 1100 2000", Some((1000, 40))),
            ("1000 1040 1040 1040", Some((1000, 40))),
            ("0 0 0 0", None),
            ("1000 1000 1000 1000", None),
            ("1000 900 1000 1000", None),
            ("1000 x 1040 2000", None),
            ("1000", None),
        ] {
            for name in ["cat", "a b) S 1 (", ")", ""] {
                assert_eq!(area(&stat(name, tail)), expect, "{name} {tail}");
            }
        }
        assert_eq!(area(""), None);
        assert_eq!(area("1 (x"), None);
    }

    /// Set in the process that [`a_title_replaces_the_arguments`] starts; [`helper`] then runs there alone.
    const HELPER: &str = "FUNTAINER_TEST_TITLE";

    #[test]
    fn a_title_replaces_the_arguments() {
        let this = std::env::current_exe().expect("this test's file");
        let output = std::process::Command::new(this)
            .args(["title::tests::helper", "--exact", "--test-threads=1", "--nocapture"])
            .env(HELPER, "kept")
            .output()
            .expect("a process");
        assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
        assert!(String::from_utf8_lossy(&output.stdout).contains("titles work"));
    }

    #[test]
    fn helper() {
        let Ok(value) = std::env::var(HELPER) else { return };
        // SAFETY: the only test of this process; the other thread, the harness, waits for its end.
        let title = unsafe { Title::prepare() }.expect("an area");
        let show = || std::fs::read("/proc/self/cmdline").expect("cmdline");
        let environment = || std::fs::read("/proc/self/environ").expect("environ");
        let long = vec![b'x'; title.capacity() + 100];
        for text in [
            &b"funtainer init"[..],
            b"funtainer zygote a-name-that-is-longer-than-all-arguments-of-this-process-together-0123456789",
            &long,
            b"x",
        ] {
            // SAFETY: as above; nothing reads the arguments afterwards.
            unsafe { title.set(text) };
            let shown = show();
            let end = shown.iter().rposition(|byte| *byte != 0).map_or(0, |last| last + 1);
            assert_eq!(&shown[..end], &text[..text.len().min(title.capacity())]);
            if text.len() < 20 {
                assert!(environment().iter().all(|byte| *byte == 0), "the environment is hidden");
            }
        }
        assert_eq!(std::env::var(HELPER).as_ref(), Ok(&value), "variables keep their values");
        set_name(c"funtainer-name").expect("a name");
        assert_eq!(std::fs::read_to_string("/proc/thread-self/comm").expect("comm"), "funtainer-name\n");
        println!("titles work");
    }
}

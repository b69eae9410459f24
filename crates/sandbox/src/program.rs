//! The program of an image, made ready for execve(2) ahead of the start.

use std::ffi::{CStr, CString};
use std::ptr;

use rustix::io::Errno;

/// Searched where an image's environment names no `PATH`: Docker's default.
const DEFAULT_PATH: &[u8] = b"/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin";

/// Arguments, environment and the files to try, as the kernel wants them.
pub(crate) struct Program {
    argv: Pointers,
    env: Pointers,
    candidates: Vec<CString>,
}

impl Program {
    /// Takes the strings of a checked specification.
    pub(crate) fn new(argv: &[Vec<u8>], env: &[Vec<u8>]) -> Self {
        let name = argv.first().map_or(&b""[..], Vec::as_slice);
        let candidates = if name.contains(&b'/') {
            vec![c_string(name)]
        } else {
            let path = env.iter().rev().find_map(|variable| variable.strip_prefix(b"PATH=")).unwrap_or(DEFAULT_PATH);
            path.split(|byte| *byte == b':')
                .map(|directory| {
                    // An empty entry is the working directory (execvp(3)).
                    let directory = if directory.is_empty() { b"." } else { directory };
                    c_string(&[directory, b"/", name].concat())
                })
                .collect()
        };
        Self { argv: Pointers::new(argv), env: Pointers::new(env), candidates }
    }

    /// Executes the first candidate that there is; returns only when none can be, with the reason. A file that may not be executed does not
    /// end the search but is what is reported (execvp(3)).
    ///
    /// Neither allocates nor locks: may be called between clone and exec.
    pub(crate) fn exec(&self) -> Errno {
        let mut reported = Errno::NOENT;
        for candidate in &self.candidates {
            match self.exec_one(candidate) {
                Errno::NOENT | Errno::NOTDIR => {}
                Errno::ACCESS => reported = Errno::ACCESS,
                other => return other,
            }
        }
        reported
    }

    fn exec_one(&self, file: &CStr) -> Errno {
        // SAFETY: the file's name ends in NUL, both arrays end in a null pointer and hold pointers into strings that `self` owns.
        unsafe { libc::execve(file.as_ptr(), self.argv.as_ptr(), self.env.as_ptr()) };
        crate::step::errno_of(&std::io::Error::last_os_error())
    }
}

/// An array of C strings that ends in a null pointer.
struct Pointers {
    /// What the pointers point into; never changed.
    _strings: Vec<CString>,
    pointers: Vec<*const libc::c_char>,
}

impl Pointers {
    fn new(list: &[Vec<u8>]) -> Self {
        let strings: Vec<CString> = list.iter().map(|bytes| c_string(bytes)).collect();
        let pointers = strings.iter().map(|string| string.as_ptr()).chain([ptr::null()]).collect();
        Self { _strings: strings, pointers }
    }

    fn as_ptr(&self) -> *const *const libc::c_char {
        self.pointers.as_ptr()
    }
}

/// A C string of bytes that were checked for NUL where they came in.
pub(crate) fn c_string(bytes: &[u8]) -> CString {
    CString::new(bytes).expect("specifications are checked for NUL")
}

//! A writer of the archive format that the kernel unpacks at boot: cpio "newc".
//! <https://docs.kernel.org/driver-api/early-userspace/buffer-format.html>

use std::fmt::Write as _;

/// Type bits and mode of a directory.
const DIRECTORY: u32 = 0o040_755;
/// Type bits and mode of a program.
const PROGRAM: u32 = 0o100_755;

/// An archive in memory.
pub(super) struct Archive {
    bytes: Vec<u8>,
    inodes: u32,
}

impl Archive {
    pub(super) fn new() -> Self {
        Self { bytes: Vec::new(), inodes: 0 }
    }

    /// Adds an empty directory; its parent must have been added.
    pub(super) fn directory(&mut self, path: &str) {
        self.entry(path, DIRECTORY, &[]);
    }

    /// Adds a file that everybody may execute.
    pub(super) fn program(&mut self, path: &str, content: &[u8]) {
        self.entry(path, PROGRAM, content);
    }

    /// The whole archive, with its trailer.
    pub(super) fn finish(mut self) -> Vec<u8> {
        self.entry("TRAILER!!!", 0, &[]);
        self.bytes
    }

    fn entry(&mut self, path: &str, mode: u32, content: &[u8]) {
        self.inodes += 1;
        let size = u32::try_from(content.len()).expect("files of the initial system are small");
        let name_size = path.len() as u32 + 1;
        // inode, mode, uid, gid, links, time, size, four device numbers, length of the name, unused
        let fields = [self.inodes, mode, 0, 0, 1, 0, size, 0, 0, 0, 0, name_size, 0];
        let mut head = "070701".to_owned();
        for field in fields {
            write!(head, "{field:08X}").expect("a string takes everything");
        }
        self.bytes.extend_from_slice(head.as_bytes());
        self.bytes.extend_from_slice(path.as_bytes());
        self.bytes.push(0);
        self.pad();
        self.bytes.extend_from_slice(content);
        self.pad();
    }

    fn pad(&mut self) {
        self.bytes.resize(self.bytes.len().next_multiple_of(4), 0);
    }
}

#[cfg(test)]
mod tests {
    use std::io::Write as _;
    use std::process::{Command, Stdio};

    use super::*;

    #[test]
    fn cpio_reads_what_is_written() {
        let mut archive = Archive::new();
        archive.directory("bin");
        archive.program("bin/odd", b"12345");
        archive.program("empty", b"");
        let directory = std::env::temp_dir().join(format!("funtainer-archive-{}", std::process::id()));
        std::fs::create_dir(&directory).unwrap();
        let mut cpio = Command::new("/bin/busybox")
            .args(["cpio", "-i"])
            .current_dir(&directory)
            .stdin(Stdio::piped())
            .spawn()
            .expect("busybox-static is installed");
        cpio.stdin.take().unwrap().write_all(&archive.finish()).unwrap();
        assert!(cpio.wait().unwrap().success());
        assert_eq!(std::fs::read(directory.join("bin/odd")).unwrap(), b"12345");
        assert_eq!(std::fs::read(directory.join("empty")).unwrap(), b"");
        std::fs::remove_dir_all(directory).unwrap();
    }
}

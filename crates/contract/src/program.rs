//! Whether the kernel could execute a program of an image, told from the image's files alone.
//!
//! execve(2) gives the same `ENOENT` for a file that is not there and for one whose interpreter is not: only the second can be seen in the
//! image by its owner, who wonders why. [`check`] tells them apart, and does for a deploy what nothing is started for.

use crate::plan::{FileKind, FileStat, ImageFiles, PlanError, StartPlan, User};

/// What of a program names its interpreter: the program headers of linkers in use, and the path behind them, are at its start.
const HEAD_BYTES_MAX: usize = 4096;
/// Most bytes of a first line that Linux looks at (BINPRM_BUF_SIZE).
const SCRIPT_LINE_BYTES_MAX: usize = 256;
/// Interpreters of interpreters that Linux follows (exec_binprm).
const INTERPRETERS_MAX: usize = 5;
/// Longest path, its NUL included (PATH_MAX).
const PATH_BYTES_MAX: usize = 4096;
/// Program headers of an ELF file that are looked at; linkers write about a dozen.
const PROGRAM_HEADERS_MAX: usize = 64;
/// `p_type` of the program header that names the interpreter.
const PT_INTERP: u32 = 3;

/// Looks for the plan's program as execvp(3) does: the first file of the name in a directory of `PATH` that can be executed; empty and
/// relative directories count from the working directory. A name with a slash is not looked for. Its interpreter must be there, too.
pub fn check(plan: &StartPlan, files: &dyn ImageFiles) -> Result<(), PlanError> {
    let command = plan.argv.first().map_or("", String::as_str);
    let path = plan.env.iter().find(|var| var.name() == "PATH").map_or("", |var| var.value());
    let candidates: Vec<String> = if command.is_empty() {
        Vec::new()
    } else if command.contains('/') {
        vec![absolute(command, &plan.working_dir)]
    } else {
        let in_directory = |directory: &str| match directory {
            "" => absolute(command, &plan.working_dir),
            directory => absolute(&format!("{directory}/{command}"), &plan.working_dir),
        };
        path.split(':').map(in_directory).collect()
    };
    let mut found = false;
    for path in candidates {
        match stat(files, &path)? {
            Some(stat) if is_executable(&stat, &plan.user) => return check_interpreters(command, path, plan, files),
            Some(_) => found = true,
            None => {}
        }
    }
    Err(if found {
        PlanError::CommandNotExecutable(command.to_owned())
    } else {
        PlanError::CommandNotFound(command.to_owned())
    })
}

/// The interpreter that a program names, by its first bytes: behind `#!`, or as an ELF file's loader. `None` where it names none, or none
/// that could be told.
pub fn interpreter(head: &[u8]) -> Option<&str> {
    let path = match head.strip_prefix(b"#!") {
        Some(rest) => {
            let rest = &rest[..rest.len().min(SCRIPT_LINE_BYTES_MAX - 2)];
            let line = rest.split(|byte| *byte == b'\n').next()?;
            line.split(|byte| matches!(byte, b' ' | b'\t' | 0)).find(|word| !word.is_empty())?
        }
        None => loader(head)?,
    };
    std::str::from_utf8(path).ok().filter(|path| !path.is_empty() && path.len() < PATH_BYTES_MAX)
}

fn check_interpreters(command: &str, mut path: String, plan: &StartPlan, files: &dyn ImageFiles) -> Result<(), PlanError> {
    for _ in 0..INTERPRETERS_MAX {
        let head = files.read_start(&path, HEAD_BYTES_MAX).map_err(|source| PlanError::ImageFile { path, source })?;
        let Some(interpreter) = head.as_deref().and_then(interpreter) else { return Ok(()) };
        path = absolute(interpreter, &plan.working_dir);
        let (command, interpreter) = (command.to_owned(), interpreter.to_owned());
        match stat(files, &path)? {
            Some(stat) if is_executable(&stat, &plan.user) => {}
            Some(_) => return Err(PlanError::InterpreterNotExecutable { command, interpreter }),
            None => return Err(PlanError::InterpreterNotFound { command, interpreter }),
        }
    }
    Ok(())
}

/// The path in the program header `PT_INTERP` of an ELF file, 32 or 64 bits, of either byte order (elf(5)).
fn loader(head: &[u8]) -> Option<&[u8]> {
    let class = *head.strip_prefix(b"\x7fELF")?.first()?;
    let little = match *head.get(5)? {
        1 => true,
        2 => false,
        _ => return None,
    };
    let number = |offset: usize, bytes: usize| -> Option<u64> {
        let field = head.get(offset..offset.checked_add(bytes)?)?;
        let push = |value: u64, byte: &u8| value << 8 | u64::from(*byte);
        Some(if little { field.iter().rev().fold(0, push) } else { field.iter().fold(0, push) })
    };
    let at = |offset: usize, bytes: usize| number(offset, bytes).and_then(|value| usize::try_from(value).ok());
    // Offsets of e_phoff, e_phentsize, e_phnum, and, in a program header, of p_offset and p_filesz; the width of addresses.
    let (table, entry, count, offset, size, width) = match class {
        1 => (0x1c, 0x2a, 0x2c, 0x04, 0x10, 4),
        2 => (0x20, 0x36, 0x38, 0x08, 0x20, 8),
        _ => return None,
    };
    let (table, entry, count) = (at(table, width)?, at(entry, 2)?, at(count, 2)?);
    for index in 0..count.min(PROGRAM_HEADERS_MAX) {
        let header = table.checked_add(index.checked_mul(entry)?)?;
        if number(header, 4)? == u64::from(PT_INTERP) {
            let start = at(header.checked_add(offset)?, width)?;
            let end = start.checked_add(at(header.checked_add(size)?, width)?)?;
            return head.get(start..end)?.split(|byte| *byte == 0).next();
        }
    }
    None
}

/// `..` stays: it is the parent of where a link leads to.
fn absolute(path: &str, working_dir: &str) -> String {
    let base = if path.starts_with('/') { "" } else { working_dir };
    let parts = base.split('/').chain(path.split('/')).filter(|part| !matches!(*part, "" | "."));
    parts.fold(String::new(), |path, part| path + "/" + part)
}

fn stat(files: &dyn ImageFiles, path: &str) -> Result<Option<FileStat>, PlanError> {
    files.stat(path).map_err(|source| PlanError::ImageFile { path: path.to_owned(), source })
}

/// The kernel's rule: root needs any execute bit, others that of the first class they belong to.
fn is_executable(stat: &FileStat, user: &User) -> bool {
    let class = if user.uid == 0 {
        0o111
    } else if user.uid == stat.uid {
        0o100
    } else if user.gid == stat.gid || user.groups.contains(&stat.gid) {
        0o010
    } else {
        0o001
    };
    stat.kind == FileKind::Regular && stat.mode & class != 0
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A little-endian ELF file of 64 bits with one program header for other things and one for `path`.
    fn elf(path: &[u8]) -> Vec<u8> {
        let mut file = vec![0; 0x40 + 2 * 0x38];
        let mut put = |offset: usize, bytes: &[u8]| file[offset..offset + bytes.len()].copy_from_slice(bytes);
        put(0, b"\x7fELF\x02\x01\x01");
        put(0x20, &0x40_u64.to_le_bytes());
        put(0x36, &0x38_u16.to_le_bytes());
        put(0x38, &2_u16.to_le_bytes());
        put(0x40, &6_u32.to_le_bytes());
        put(0x78, &PT_INTERP.to_le_bytes());
        put(0x80, &0xb0_u64.to_le_bytes());
        put(0x98, &(path.len() as u64).to_le_bytes());
        file.extend_from_slice(path);
        file
    }

    #[test]
    fn interpreters_are_named() {
        let check = |head: &[u8], expect: Option<&str>| assert_eq!(interpreter(head), expect, "{head:?}");
        check(b"#!/bin/sh\necho", Some("/bin/sh"));
        check(b"#! \t/usr/bin/env python3\n", Some("/usr/bin/env"));
        check(b"#!/bin/sh", Some("/bin/sh"));
        check(b"#!/bin/sh\r\n", Some("/bin/sh\r"));
        check(b"#!sh\n", Some("sh"));
        check(b"#!\n/bin/sh", None);
        check(b"#!", None);
        check(b"", None);
        check(b"echo", None);
        check(b"#!/\xff\n", None);
        let long = format!("#!/{}", "x".repeat(10_000));
        check(long.as_bytes(), Some(&long[2..SCRIPT_LINE_BYTES_MAX]));
        check(&elf(b"/lib64/ld-linux-x86-64.so.2\0"), Some("/lib64/ld-linux-x86-64.so.2"));
        check(&elf(b""), None);
        check(b"\x7fELF but not really", None);
    }

    #[test]
    fn a_damaged_program_names_none() {
        let whole = elf(b"/lib/ld.so\0");
        for length in 0..whole.len() - 11 {
            assert_eq!(interpreter(&whole[..length]), None, "{length}");
        }
        for offset in [0x20, 0x36, 0x38, 0x80, 0x98] {
            let mut damaged = whole.clone();
            damaged[offset..offset + 2].fill(0xff);
            // The last program header is still the second of 65,535.
            let expect = if offset == 0x38 { Some("/lib/ld.so") } else { None };
            assert_eq!(interpreter(&damaged), expect, "{offset:#x}");
        }
    }
}

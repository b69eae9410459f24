//! System calls as an attacker makes them: by number, with whatever arguments.

use std::io;

/// An argument.
pub(crate) enum Arg<'a> {
    /// A number, or a pointer that leads nowhere.
    Number(i64),
    /// A structure that the kernel reads.
    Read(&'a [u8]),
    /// A structure that the kernel may write.
    Write(&'a mut [u8]),
}

use Arg::{Number, Read, Write};

impl From<i64> for Arg<'_> {
    fn from(number: i64) -> Self {
        Number(number)
    }
}

impl From<i32> for Arg<'_> {
    fn from(number: i32) -> Self {
        Number(number.into())
    }
}

impl From<u64> for Arg<'_> {
    fn from(number: u64) -> Self {
        Number(number.cast_signed())
    }
}

impl<'a> From<&'a std::ffi::CStr> for Arg<'a> {
    fn from(text: &'a std::ffi::CStr) -> Self {
        Read(text.to_bytes_with_nul())
    }
}

impl<'a> From<&'a [u8]> for Arg<'a> {
    fn from(bytes: &'a [u8]) -> Self {
        Read(bytes)
    }
}

impl<'a> From<&'a mut [u8]> for Arg<'a> {
    fn from(bytes: &'a mut [u8]) -> Self {
        Write(bytes)
    }
}

/// Makes the call with that number. Missing arguments are 0.
pub(crate) fn call<const N: usize>(number: i64, arguments: [Arg<'_>; N]) -> io::Result<i64> {
    let mut registers = [0_i64; 6];
    for (register, argument) in registers.iter_mut().zip(arguments) {
        *register = match argument {
            Number(number) => number,
            Read(bytes) => bytes.as_ptr().expose_provenance() as i64,
            Write(bytes) => bytes.as_mut_ptr().expose_provenance() as i64,
        };
    }
    let [first, second, third, fourth, fifth, sixth] = registers;
    // SAFETY: the kernel reads and writes only behind the pointers that are given; they lead to buffers that are borrowed for the call, each
    // as large as the structure that the call has there, or nowhere. Calls that make processes are made by a process with one thread.
    // Needed because what an attacker calls no library wraps.
    let result = unsafe { libc::syscall(number, first, second, third, fourth, fifth, sixth) };
    if result < 0 { Err(io::Error::last_os_error()) } else { Ok(result) }
}

/// Makes a child by clone(2) with these flags, which ends at once; its pid.
pub(crate) fn clone_child(flags: i32) -> io::Result<i64> {
    let pid = call(libc::SYS_clone, [(flags | libc::SIGCHLD).into(), 0.into(), 0.into(), 0.into(), 0.into()])?;
    if pid == 0 {
        std::process::exit(0);
    }
    reap(pid)
}

/// As [`clone_child`], by clone3(2).
pub(crate) fn clone3_child(flags: i32) -> io::Result<i64> {
    // struct clone_args: flags, pidfd, child_tid, parent_tid, exit_signal, stack, stack_size, tls.
    let arguments = words([i64::from(flags), 0, 0, 0, libc::SIGCHLD.into(), 0, 0, 0]);
    let pid = call(libc::SYS_clone3, [arguments.as_slice().into(), 64.into()])?;
    if pid == 0 {
        std::process::exit(0);
    }
    reap(pid)
}

fn reap(pid: i64) -> io::Result<i64> {
    call(libc::SYS_wait4, [pid.into(), 0.into(), 0.into(), 0.into()])?;
    Ok(pid)
}

/// Words of 64 bits as bytes.
pub(crate) fn words<const N: usize>(words: [i64; N]) -> Vec<u8> {
    words.iter().flat_map(|word| word.to_ne_bytes()).collect()
}

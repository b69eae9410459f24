//! Loop devices: files as block devices, for kernels that mount no erofs by file, and file systems that are no ground for it (loop(4)).
//!
//! A device is bound read-only and clears itself with its last user: neither a killed keeper nor a failed step leaves one bound, unless
//! somebody else holds a mount of it, which [`left`] finds. The device nodes are the host's (`/dev/loop-control`, `/dev/loopN`), and opening
//! the first loads the module `loop` where there is one to load.

use std::collections::HashSet;
use std::fs;
use std::os::fd::{AsFd, AsRawFd, BorrowedFd, OwnedFd};

use rustix::fs::{Dir, Mode, OFlags};
use rustix::io::Errno;

use crate::step::{StepError, at, checked};

/// Requests of loop(4), `linux/loop.h`.
const LOOP_CLR_FD: libc::c_ulong = 0x4C01;
const LOOP_GET_STATUS64: libc::c_ulong = 0x4C05;
const LOOP_CONFIGURE: libc::c_ulong = 0x4C0A;
const LOOP_CTL_GET_FREE: libc::c_ulong = 0x4C82;
/// Flags of a device.
const LO_FLAGS_READ_ONLY: u32 = 1;
const LO_FLAGS_AUTOCLEAR: u32 = 4;
/// How often a free device is asked for: whoever else binds devices may be faster.
const ATTEMPTS: u32 = 64;
/// What our devices are called, for [`left`].
const NAME: &[u8] = b"funtainer";

/// `struct loop_info64`.
#[derive(Clone, Copy)]
#[repr(C)]
struct Info {
    device: u64,
    inode: u64,
    rdevice: u64,
    offset: u64,
    size_limit: u64,
    number: u32,
    encrypt_type: u32,
    encrypt_key_size: u32,
    flags: u32,
    file_name: [u8; 64],
    crypt_name: [u8; 64],
    encrypt_key: [u8; 32],
    init: [u64; 2],
}

impl Info {
    const ZERO: Self = Self {
        device: 0,
        inode: 0,
        rdevice: 0,
        offset: 0,
        size_limit: 0,
        number: 0,
        encrypt_type: 0,
        encrypt_key_size: 0,
        flags: 0,
        file_name: [0; 64],
        crypt_name: [0; 64],
        encrypt_key: [0; 32],
        init: [0; 2],
    };
}

/// `struct loop_config`.
#[repr(C)]
struct Config {
    fd: u32,
    block_size: u32,
    info: Info,
    reserved: [u64; 8],
}

/// Binds a free loop device to `file`, read-only. It is free again when this descriptor and every mount of it are gone.
///
/// The blocks are the kernel's own 512 bytes, which fit every file system: those of erofs are larger, and what it asks for is read from the
/// file through the page cache, as a mount by file would.
///
/// `ENOENT` where there are no loop devices, `EBUSY` when each of [`ATTEMPTS`] was taken by somebody else.
pub(super) fn bind(file: BorrowedFd<'_>) -> Result<OwnedFd, StepError> {
    let control = rustix::fs::open(c"/dev/loop-control", OFlags::RDWR | OFlags::CLOEXEC, Mode::empty())
        .map_err(at("open /dev/loop-control"))?;
    let mut info = Info { flags: LO_FLAGS_READ_ONLY | LO_FLAGS_AUTOCLEAR, ..Info::ZERO };
    info.file_name[..NAME.len()].copy_from_slice(NAME);
    let config = Config { fd: file.as_raw_fd().cast_unsigned(), block_size: 0, info, reserved: [0; 8] };
    let mut met = StepError { step: "bind a loop device", errno: Errno::BUSY };
    for _ in 0..ATTEMPTS {
        // SAFETY: an integer request without an argument.
        let number = checked(unsafe { libc::ioctl(control.as_raw_fd(), LOOP_CTL_GET_FREE) }.into())
            .map_err(at("find a free loop device"))?;
        match bind_number(number, &config) {
            Ok(device) => return Ok(device),
            // Bound, or removed, by somebody else since it was found free.
            Err(error) if matches!(error.errno, Errno::BUSY | Errno::NXIO | Errno::NODEV) => met = error,
            Err(error) => return Err(error),
        }
    }
    Err(met)
}

fn bind_number(number: usize, config: &Config) -> Result<OwnedFd, StepError> {
    let device = open(number).map_err(at("open a loop device"))?;
    // SAFETY: the structure is the kernel's and lives through the call, which reads it only.
    let bound = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CONFIGURE, std::ptr::from_ref(config)) };
    checked(bound.into()).map_err(at("bind a loop device"))?;
    Ok(device)
}

fn open(number: usize) -> Result<OwnedFd, Errno> {
    rustix::fs::open(format!("/dev/loop{number}"), OFlags::RDONLY | OFlags::CLOEXEC, Mode::empty())
}

/// The numbers of loop devices that are still bound, under our name, to files of `store`. Each is asked to clear itself when its last user
/// goes; those without one are free afterwards.
pub(super) fn left(store: BorrowedFd<'_>) -> Result<Vec<usize>, StepError> {
    let bound = bound();
    if bound.is_empty() {
        return Ok(Vec::new());
    }
    let files = identities(store).map_err(at("list the layers"))?;
    let ours = |number: &usize| {
        let Ok(device) = open(*number) else { return false };
        let named = |info: &Info| info.file_name.starts_with(NAME) && info.file_name[NAME.len()] == 0;
        let ours = status(device.as_fd()).is_ok_and(|info| named(&info) && files.contains(&(info.device, info.inode)));
        if ours {
            // SAFETY: an integer request without an argument. While the device is used it changes what happens with the last close.
            let _ = unsafe { libc::ioctl(device.as_raw_fd(), LOOP_CLR_FD) };
        }
        // The descriptor goes first: it is a user, too.
        drop(device);
        ours && self::bound().contains(number)
    };
    Ok(bound.into_iter().filter(ours).collect())
}

/// Devices that have a file. None where sysfs shows none.
fn bound() -> Vec<usize> {
    let Ok(devices) = fs::read_dir("/sys/block") else { return Vec::new() };
    let names = devices.flatten().filter(|entry| entry.path().join("loop").exists()).map(|entry| entry.file_name());
    names.filter_map(|name| name.to_str()?.strip_prefix("loop")?.parse().ok()).collect()
}

/// Device and inode of each file in a directory.
fn identities(directory: BorrowedFd<'_>) -> Result<HashSet<(u64, u64)>, Errno> {
    let mut found = HashSet::new();
    for entry in Dir::read_from(directory)? {
        if let Ok(stat) = rustix::fs::statat(directory, entry?.file_name(), rustix::fs::AtFlags::SYMLINK_NOFOLLOW) {
            found.insert((stat.st_dev, stat.st_ino));
        }
    }
    Ok(found)
}

fn status(device: BorrowedFd<'_>) -> Result<Info, Errno> {
    let mut info = Info::ZERO;
    // SAFETY: the kernel writes a structure of this form, in which every pattern of bits is a value.
    checked(unsafe { libc::ioctl(device.as_raw_fd(), LOOP_GET_STATUS64, &raw mut info) }.into())?;
    Ok(info)
}

#[cfg(test)]
mod tests {
    use std::fs::File;

    use super::*;
    use crate::testing::{need_root, until};

    /// A directory with a file of some blocks.
    fn store() -> (tempfile::TempDir, File) {
        let directory = tempfile::TempDir::new().expect("a directory");
        fs::write(directory.path().join("layer"), [7; 8192]).expect("a file");
        let file = File::open(directory.path().join("layer")).expect("it");
        (directory, file)
    }

    #[test]
    fn a_device_has_the_files_bytes_and_takes_none() {
        need_root();
        let (_directory, file) = store();
        let device = bind(file.as_fd()).expect("a loop device");
        let mut bytes = [0; 8192];
        assert_eq!(rustix::io::pread(&device, &mut bytes[..], 0), Ok(8192));
        assert_eq!(bytes, [7; 8192]);
        let again = format!("/proc/self/fd/{}", device.as_raw_fd());
        let written = rustix::fs::open(again, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty())
            .and_then(|device| rustix::io::pwrite(device, &[1; 512], 0));
        assert!(written.is_err(), "the device is read-only");
    }

    #[test]
    fn those_of_a_store_are_found_while_they_are_used_and_free_themselves() {
        need_root();
        let ((directory, file), (other, _)) = (store(), store());
        let device = bind(file.as_fd()).expect("a loop device");
        let (directory, other) = (File::open(directory.path()).expect("it"), File::open(other.path()).expect("it"));
        assert_eq!(left(directory.as_fd()).expect("a list").len(), 1);
        assert_eq!(left(other.as_fd()).expect("a list"), Vec::<usize>::new());
        drop(device);
        until("the device is free", || left(directory.as_fd()).expect("a list").is_empty());
    }

    #[test]
    fn many_at_once_get_a_device_each() {
        need_root();
        let (_directory, file) = store();
        let devices: Vec<OwnedFd> = std::thread::scope(|scope| {
            let threads: Vec<_> = (0..16).map(|_| scope.spawn(|| bind(file.as_fd()).expect("a loop device"))).collect();
            threads.into_iter().map(|thread| thread.join().expect("no panic")).collect()
        });
        let numbers: HashSet<u64> = devices.iter().map(|device| rustix::fs::fstat(device).expect("stat").st_rdev).collect();
        assert_eq!(numbers.len(), devices.len());
    }
}

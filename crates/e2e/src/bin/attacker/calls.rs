//! System calls that no image needs and every attacker wants.

use std::ffi::CStr;
use std::io;

use libc::{
    SYS_acct, SYS_add_key, SYS_bpf, SYS_chroot, SYS_clock_settime, SYS_delete_module, SYS_finit_module, SYS_fsconfig,
    SYS_fsmount, SYS_fsopen, SYS_init_module, SYS_io_uring_setup, SYS_ioperm, SYS_iopl, SYS_kexec_load, SYS_keyctl, SYS_mount,
    SYS_mount_setattr, SYS_move_mount, SYS_name_to_handle_at, SYS_open_by_handle_at, SYS_open_tree, SYS_perf_event_open,
    SYS_personality, SYS_pivot_root, SYS_reboot, SYS_sethostname, SYS_setns, SYS_settimeofday, SYS_swapon, SYS_syslog,
    SYS_umount2, SYS_unshare, SYS_userfaultfd,
};

use crate::kernel::{call, clone_child, clone3_child, words};
use crate::{Attack, Loot, got, reached};

const HERE: i64 = libc::AT_FDCWD as i64;

pub(crate) const ATTACKS: &[Attack] = &[
    ("mount", |_| got(mount(c"tmpfs", c"/mnt", c"tmpfs", 0))),
    ("mount-bind", |_| got(mount(c"/proc", c"/mnt", c"", libc::MS_BIND))),
    ("remount-writable", |path| got(mount(c"", &text(path), c"", libc::MS_REMOUNT | libc::MS_BIND))),
    ("umount", |path| got(call(SYS_umount2, [(*text(path)).into(), libc::MNT_DETACH.into()]))),
    ("mount-new", |_| new_mount()),
    ("open-tree", |_| got(call(SYS_open_tree, [HERE.into(), c"/".into(), 1.into()]))),
    ("mount-setattr", |path| mount_setattr(path)),
    ("move-mount", |path| {
        got(call(SYS_move_mount, [HERE.into(), (*text(path)).into(), HERE.into(), c"/mnt".into(), 0.into()]))
    }),
    ("pivot-root", |_| reached(call(SYS_pivot_root, [c"/".into(), c"/".into()]))),
    ("chroot", |_| got(call(SYS_chroot, [c"/mnt".into()]))),
    ("unshare", |kind| got(call(SYS_unshare, [namespace(kind)?.into()]))),
    ("clone", |kind| got(clone_child(namespace(kind)?))),
    ("clone3", |kind| got(clone3_child(namespace(kind)?))),
    ("setns", |_| {
        let namespace = std::fs::File::open("/proc/self/ns/uts")?;
        got(call(SYS_setns, [std::os::fd::AsRawFd::as_raw_fd(&namespace).into(), libc::CLONE_NEWUTS.into()]))
    }),
    ("sethostname", |_| got(call(SYS_sethostname, [c"taken".into(), 5.into()]))),
    // 120 bytes: struct io_uring_params.
    ("io-uring", |_| got(call(SYS_io_uring_setup, [1.into(), [0; 120].as_mut_slice().into()]))),
    // BPF_MAP_CREATE of an array with one element of four bytes.
    ("bpf", |_| {
        let mut attributes: Vec<u8> = [2_u32, 4, 4, 1].iter().flat_map(|field| field.to_ne_bytes()).collect();
        attributes.resize(128, 0);
        got(call(SYS_bpf, [0.into(), attributes.as_slice().into(), 128.into()]))
    }),
    // Into the keyring of this process.
    ("add-key", |_| got(call(SYS_add_key, [c"user".into(), c"taken".into(), c"x".into(), 1.into(), (-2).into()]))),
    // KEYCTL_GET_KEYRING_ID of the session.
    ("keyctl", |_| got(call(SYS_keyctl, [0.into(), (-3).into(), 1.into()]))),
    ("userfaultfd", |_| got(call(SYS_userfaultfd, [libc::O_CLOEXEC.into()]))),
    ("perf", |_| perf()),
    ("kexec", |_| reached(call(SYS_kexec_load, [0.into(), 9999.into(), 0.into(), 0.into()]))),
    ("module-file", |_| reached(call(SYS_finit_module, [(-1).into(), c"".into(), 0.into()]))),
    ("module", |_| reached(call(SYS_init_module, [[0; 8].as_slice().into(), 8.into(), c"".into()]))),
    ("module-removal", |_| reached(call(SYS_delete_module, [c"no_such_module".into(), libc::O_NONBLOCK.into()]))),
    // Without the magic numbers nothing happens.
    ("reboot", |_| reached(call(SYS_reboot, [0.into(), 0.into(), 0.into()]))),
    ("swapon", |_| reached(call(SYS_swapon, [c"/no/such/file".into(), 0.into()]))),
    // Neither a time nor a zone to set.
    ("settimeofday", |_| got(call(SYS_settimeofday, [0.into(), 0.into()]))),
    ("clock-settime", |_| reached(call(SYS_clock_settime, [libc::CLOCK_REALTIME.into(), words([0, -1]).as_slice().into()]))),
    ("acct", |_| reached(call(SYS_acct, [c"/no/such/file".into()]))),
    // The size of the kernel's log.
    ("syslog", |_| got(call(SYS_syslog, [10.into(), 0.into(), 0.into()]))),
    ("file-handle", |_| file_handle()),
    ("iopl", |_| got(call(SYS_iopl, [3.into()]))),
    ("ioperm", |_| got(call(SYS_ioperm, [0x80.into(), 1.into(), 1.into()]))),
    // READ_IMPLIES_EXEC.
    ("personality", |_| got(call(SYS_personality, [0x0040_0000.into()]))),
    ("terminal", |request| terminal(request)),
];

fn text(argument: &str) -> std::ffi::CString {
    std::ffi::CString::new(argument).unwrap_or_default()
}

fn mount(source: &CStr, target: &CStr, kind: &CStr, flags: u64) -> io::Result<i64> {
    call(SYS_mount, [source.into(), target.into(), kind.into(), flags.into(), 0.into()])
}

/// fsopen, fsconfig (FSCONFIG_CMD_CREATE), fsmount.
fn new_mount() -> Loot {
    let context = call(SYS_fsopen, [c"tmpfs".into(), 0.into()])?;
    call(SYS_fsconfig, [context.into(), 6.into(), 0.into(), 0.into(), 0.into()])?;
    got(call(SYS_fsmount, [context.into(), 0.into(), 0.into()]))
}

/// Takes MOUNT_ATTR_RDONLY away.
fn mount_setattr(path: &str) -> Loot {
    let attributes = words([0, 1, 0, 0]);
    got(call(SYS_mount_setattr, [HERE.into(), (*text(path)).into(), 0.into(), attributes.as_slice().into(), 32.into()]))
}

fn namespace(name: &str) -> io::Result<i32> {
    Ok(match name {
        "user" => libc::CLONE_NEWUSER,
        "mount" => libc::CLONE_NEWNS,
        "net" => libc::CLONE_NEWNET,
        "pid" => libc::CLONE_NEWPID,
        "uts" => libc::CLONE_NEWUTS,
        "ipc" => libc::CLONE_NEWIPC,
        "cgroup" => libc::CLONE_NEWCGROUP,
        "time" => 0x80,
        other => return Err(io::Error::other(format!("no namespace '{other}'"))),
    })
}

/// Counts the processor's clock (PERF_TYPE_SOFTWARE, PERF_COUNT_SW_CPU_CLOCK) of this process, the kernel's part included.
fn perf() -> Loot {
    let mut attributes = vec![0_u8; 128];
    attributes[..4].copy_from_slice(&1_u32.to_ne_bytes());
    attributes[4..8].copy_from_slice(&128_u32.to_ne_bytes());
    got(call(SYS_perf_event_open, [attributes.as_slice().into(), 0.into(), (-1).into(), (-1).into(), 0.into()]))
}

/// Opens the root directory by its inode's number, past every mount and root ("Shocker", 2014).
fn file_handle() -> Loot {
    // struct file_handle: room, kind, bytes.
    let mut handle = [0_u8; 8 + 128];
    handle[..4].copy_from_slice(&128_u32.to_ne_bytes());
    let mut mount = [0_u8; 8];
    let place = std::fs::File::open("/")?;
    call(
        SYS_name_to_handle_at,
        [HERE.into(), c"/".into(), handle.as_mut_slice().into(), mount.as_mut_slice().into(), 0.into()],
    )?;
    let at = std::os::fd::AsRawFd::as_raw_fd(&place);
    got(call(SYS_open_by_handle_at, [at.into(), handle.as_slice().into(), libc::O_RDONLY.into()]))
}

/// An ioctl on a terminal of its own, made its controlling one.
fn terminal(request: &str) -> Loot {
    let master = std::fs::File::options().read(true).write(true).open("/dev/ptmx")?;
    let ioctl =
        |fd: i32, request: u64, argument: &mut [u8]| call(libc::SYS_ioctl, [fd.into(), request.into(), argument.into()]);
    // Never closed: its end would hang up on this process.
    let master = std::os::fd::IntoRawFd::into_raw_fd(master);
    ioctl(master, libc::TIOCSPTLCK, &mut [0; 4])?;
    let peer = call(libc::SYS_ioctl, [master.into(), libc::TIOCGPTPEER.into(), libc::O_RDWR.into()])? as i32;
    call(libc::SYS_setsid, [])?;
    call(libc::SYS_ioctl, [peer.into(), libc::TIOCSCTTY.into(), 0.into()])?;
    match request {
        "type" => got(ioctl(peer, libc::TIOCSTI, &mut b"x".to_owned())),
        // N_TTY, which it has.
        "discipline" => got(ioctl(peer, libc::TIOCSETD, &mut [0; 4])),
        "console" => reached(ioctl(peer, libc::TIOCCONS, &mut [0; 4])),
        // Its shift state, which only a virtual console has.
        "paste" => reached(ioctl(peer, libc::TIOCLINUX, &mut b"\x06\0\0\0".to_owned())),
        other => Err(io::Error::other(format!("no request '{other}'"))),
    }
}

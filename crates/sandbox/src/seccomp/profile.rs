//! The profile of system calls, as data.
//!
//! Source: the default profile of moby (module `github.com/moby/profiles/seccomp`, v0.3.0) as it applies to a container with our
//! capabilities on a kernel since 4.8, that is with its rules for `ptrace` and without those that need capabilities which no container of
//! ours has. Ours differs in being stricter: four socket families only, no `ioctl` that feeds or reconfigures a terminal, no 32-bit calls at
//! all. And in what is not named: `ENOSYS` where Docker has `EPERM` for numbers below its newest one. The test `reference` compares the two,
//! number by number.

/// A system call: its name and its number on this architecture.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Named {
    /// As in the kernel's tables.
    pub name: &'static str,
    /// Its number.
    pub number: u32,
}

/// A condition on the lower 32 bits of one argument: of all arguments looked at here the kernel itself uses no more (`int`, `unsigned int`,
/// and the flags of `clone`). A call that fails it gets `EPERM`.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Check {
    /// The call.
    pub call: Named,
    /// Which argument, 0 to 5.
    pub argument: u8,
    /// The condition.
    pub test: Test,
}

/// What an argument must be.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Test {
    /// None of these bits is set.
    AllClear(u32),
    /// It is one of these values.
    OneOf(&'static [u32]),
    /// It is none of these values.
    NoneOf(&'static [u32]),
    /// Of the bits in `mask`, those in `value` are set and the others are not.
    Masked {
        /// What is looked at.
        mask: u32,
        /// What must stand there.
        value: u32,
    },
}

impl Test {
    /// Whether an argument passes.
    pub fn passes(self, argument: u32) -> bool {
        match self {
            Self::AllClear(mask) => argument & mask == 0,
            Self::OneOf(values) => values.contains(&argument),
            Self::NoneOf(values) => !values.contains(&argument),
            Self::Masked { mask, value } => argument & mask == value,
        }
    }
}

/// What is said to each system call. No call stands in two lists.
#[derive(Debug, Clone, Copy)]
pub struct Profile {
    /// Allowed with all arguments.
    pub allowed: &'static [&'static [Named]],
    /// Allowed if an argument passes; at most one check per call.
    pub checked: &'static [Check],
    /// Denied with `EPERM`. All that is not named gets `ENOSYS`.
    pub denied: &'static [&'static [Named]],
}

/// `SYS_read` as a name and a number.
macro_rules! named {
    ($name:ident) => {
        // The prefix `SYS_` of the constant is no part of the name.
        $crate::seccomp::Named { name: stringify!($name).split_at(4).1, number: $crate::seccomp::profile::number::$name as u32 }
    };
}

macro_rules! calls {
    ($($name:ident),* $(,)?) => { &[$(named!($name)),*] };
}

/// The profile of every instance.
pub const DEFAULT: Profile = Profile {
    allowed: &[ALLOWED, ALLOWED_HERE],
    checked: &[
        Check { call: named!(SYS_clone), argument: 0, test: Test::AllClear(NAMESPACES) },
        Check { call: named!(SYS_ioctl), argument: 1, test: Test::NoneOf(&[TIOCSTI, TIOCLINUX, TIOCCONS, TIOCSETD]) },
        Check {
            call: named!(SYS_personality),
            argument: 0,
            test: Test::OneOf(&[0, UNAME26, PER_LINUX32, PER_LINUX32 | UNAME26, u32::MAX]),
        },
        Check { call: named!(SYS_socket), argument: 0, test: Test::OneOf(&FAMILIES) },
        Check { call: named!(SYS_socketpair), argument: 0, test: Test::OneOf(&FAMILIES) },
    ],
    denied: &[DENIED, DENIED_HERE],
};

/// Flags of `clone` that make namespaces: a user namespace would bring back every capability. `clone3` passes its flags in memory, where
/// a filter cannot look, so it is absent.
pub(super) const NAMESPACES: u32 = (libc::CLONE_NEWNS
    | libc::CLONE_NEWCGROUP
    | libc::CLONE_NEWUTS
    | libc::CLONE_NEWIPC
    | libc::CLONE_NEWUSER
    | libc::CLONE_NEWPID
    | libc::CLONE_NEWNET) as u32;

/// Socket families that programs need. Not among them: `AF_ALG`, `AF_VSOCK`, `AF_PACKET`, `AF_XDP`, and some forty more, each a kernel
/// module that could be loaded by asking for it.
pub(super) const FAMILIES: [u32; 4] =
    [libc::AF_UNIX as u32, libc::AF_INET as u32, libc::AF_INET6 as u32, libc::AF_NETLINK as u32];

/// Types a character into a terminal's input.
const TIOCSTI: u32 = 0x5412;
/// Reads and pastes the screen of a virtual console.
const TIOCLINUX: u32 = 0x541C;
/// Redirects the console.
const TIOCCONS: u32 = 0x541D;
/// Sets a line discipline, which may load a kernel module.
const TIOCSETD: u32 = 0x5423;

/// `personality`: 32-bit addresses and names.
const PER_LINUX32: u32 = 0x0008;
/// `personality`: a kernel that calls itself 2.6.
const UNAME26: u32 = 0x2_0000;

/// Numbers that the `libc` crate does not have yet; from 424 on they are the same on every architecture.
#[expect(non_upper_case_globals, reason = "the names are those of the crate libc")]
pub(super) mod number {
    pub(in crate::seccomp) use libc::*;

    macro_rules! numbers {
        ($($name:ident = $number:literal),* $(,)?) => { $(pub(in crate::seccomp) const $name: c_long = $number;)* };
    }

    #[cfg(target_arch = "x86_64")]
    numbers!(
        SYS_create_module = 174,
        SYS_get_kernel_syms = 177,
        SYS_io_pgetevents = 333,
        SYS_query_module = 178,
        SYS_uretprobe = 335,
    );
    #[cfg(target_arch = "aarch64")]
    numbers!(
        SYS_io_pgetevents = 292,
        SYS_renameat = 38,
        SYS_sync_file_range = 84,
        SYS_getrlimit = 163,
        SYS_setrlimit = 164,
        SYS_fchmodat2 = 452,
    );
    numbers!(
        SYS_cachestat = 451,
        SYS_map_shadow_stack = 453,
        SYS_futex_wake = 454,
        SYS_futex_wait = 455,
        SYS_futex_requeue = 456,
        SYS_statmount = 457,
        SYS_listmount = 458,
        SYS_setxattrat = 463,
        SYS_getxattrat = 464,
        SYS_listxattrat = 465,
        SYS_removexattrat = 466,
    );
}

/// Allowed on every architecture.
const ALLOWED: &[Named] = calls![
    SYS_accept,
    SYS_accept4,
    SYS_adjtimex,
    SYS_bind,
    SYS_brk,
    SYS_cachestat,
    SYS_capget,
    SYS_capset,
    SYS_chdir,
    SYS_clock_adjtime,
    SYS_clock_getres,
    SYS_clock_gettime,
    SYS_clock_nanosleep,
    SYS_close,
    SYS_close_range,
    SYS_connect,
    SYS_copy_file_range,
    SYS_dup,
    SYS_dup3,
    SYS_epoll_create1,
    SYS_epoll_ctl,
    SYS_epoll_pwait,
    SYS_epoll_pwait2,
    SYS_eventfd2,
    SYS_execve,
    SYS_execveat,
    SYS_exit,
    SYS_exit_group,
    SYS_faccessat,
    SYS_faccessat2,
    SYS_fadvise64,
    SYS_fallocate,
    SYS_fanotify_mark,
    SYS_fchdir,
    SYS_fchmod,
    SYS_fchmodat,
    SYS_fchmodat2,
    SYS_fchown,
    SYS_fchownat,
    SYS_fcntl,
    SYS_fdatasync,
    SYS_fgetxattr,
    SYS_flistxattr,
    SYS_flock,
    SYS_fremovexattr,
    SYS_fsetxattr,
    SYS_fstat,
    SYS_fstatfs,
    SYS_fsync,
    SYS_ftruncate,
    SYS_futex,
    SYS_futex_requeue,
    SYS_futex_wait,
    SYS_futex_waitv,
    SYS_futex_wake,
    SYS_get_robust_list,
    SYS_getcpu,
    SYS_getcwd,
    SYS_getdents64,
    SYS_getegid,
    SYS_geteuid,
    SYS_getgid,
    SYS_getgroups,
    SYS_getitimer,
    SYS_getpeername,
    SYS_getpgid,
    SYS_getpid,
    SYS_getppid,
    SYS_getpriority,
    SYS_getrandom,
    SYS_getresgid,
    SYS_getresuid,
    SYS_getrusage,
    SYS_getsid,
    SYS_getsockname,
    SYS_getsockopt,
    SYS_gettid,
    SYS_gettimeofday,
    SYS_getuid,
    SYS_getxattr,
    SYS_getxattrat,
    SYS_inotify_add_watch,
    SYS_inotify_init1,
    SYS_inotify_rm_watch,
    SYS_io_cancel,
    SYS_io_destroy,
    SYS_io_getevents,
    SYS_io_pgetevents,
    SYS_io_setup,
    SYS_io_submit,
    SYS_ioprio_get,
    SYS_ioprio_set,
    SYS_kill,
    SYS_landlock_add_rule,
    SYS_landlock_create_ruleset,
    SYS_landlock_restrict_self,
    SYS_lgetxattr,
    SYS_linkat,
    SYS_listen,
    SYS_listmount,
    SYS_listxattr,
    SYS_listxattrat,
    SYS_llistxattr,
    SYS_lremovexattr,
    SYS_lseek,
    SYS_lsetxattr,
    SYS_madvise,
    SYS_map_shadow_stack,
    SYS_membarrier,
    SYS_memfd_create,
    SYS_memfd_secret,
    SYS_mincore,
    SYS_mkdirat,
    SYS_mknodat,
    SYS_mlock,
    SYS_mlock2,
    SYS_mlockall,
    SYS_mmap,
    SYS_mprotect,
    SYS_mq_getsetattr,
    SYS_mq_notify,
    SYS_mq_open,
    SYS_mq_timedreceive,
    SYS_mq_timedsend,
    SYS_mq_unlink,
    SYS_mremap,
    SYS_mseal,
    SYS_msgctl,
    SYS_msgget,
    SYS_msgrcv,
    SYS_msgsnd,
    SYS_msync,
    SYS_munlock,
    SYS_munlockall,
    SYS_munmap,
    SYS_name_to_handle_at,
    SYS_nanosleep,
    SYS_newfstatat,
    SYS_openat,
    SYS_openat2,
    SYS_pidfd_open,
    SYS_pidfd_send_signal,
    SYS_pipe2,
    SYS_pkey_alloc,
    SYS_pkey_free,
    SYS_pkey_mprotect,
    SYS_ppoll,
    SYS_prctl,
    SYS_pread64,
    SYS_preadv,
    SYS_preadv2,
    SYS_prlimit64,
    SYS_process_mrelease,
    SYS_process_vm_readv,
    SYS_process_vm_writev,
    SYS_pselect6,
    SYS_ptrace,
    SYS_pwrite64,
    SYS_pwritev,
    SYS_pwritev2,
    SYS_read,
    SYS_readahead,
    SYS_readlinkat,
    SYS_readv,
    SYS_recvfrom,
    SYS_recvmmsg,
    SYS_recvmsg,
    SYS_remap_file_pages,
    SYS_removexattr,
    SYS_removexattrat,
    SYS_renameat2,
    SYS_restart_syscall,
    SYS_rseq,
    SYS_rt_sigaction,
    SYS_rt_sigpending,
    SYS_rt_sigprocmask,
    SYS_rt_sigqueueinfo,
    SYS_rt_sigreturn,
    SYS_rt_sigsuspend,
    SYS_rt_sigtimedwait,
    SYS_rt_tgsigqueueinfo,
    SYS_sched_get_priority_max,
    SYS_sched_get_priority_min,
    SYS_sched_getaffinity,
    SYS_sched_getattr,
    SYS_sched_getparam,
    SYS_sched_getscheduler,
    SYS_sched_rr_get_interval,
    SYS_sched_setaffinity,
    SYS_sched_setattr,
    SYS_sched_setparam,
    SYS_sched_setscheduler,
    SYS_sched_yield,
    SYS_seccomp,
    SYS_semctl,
    SYS_semget,
    SYS_semop,
    SYS_semtimedop,
    SYS_sendfile,
    SYS_sendmmsg,
    SYS_sendmsg,
    SYS_sendto,
    SYS_set_robust_list,
    SYS_set_tid_address,
    SYS_setfsgid,
    SYS_setfsuid,
    SYS_setgid,
    SYS_setgroups,
    SYS_setitimer,
    SYS_setpgid,
    SYS_setpriority,
    SYS_setregid,
    SYS_setresgid,
    SYS_setresuid,
    SYS_setreuid,
    SYS_setsid,
    SYS_setsockopt,
    SYS_setuid,
    SYS_setxattr,
    SYS_setxattrat,
    SYS_shmat,
    SYS_shmctl,
    SYS_shmdt,
    SYS_shmget,
    SYS_shutdown,
    SYS_sigaltstack,
    SYS_signalfd4,
    SYS_splice,
    SYS_statfs,
    SYS_statmount,
    SYS_statx,
    SYS_symlinkat,
    SYS_sync,
    SYS_syncfs,
    SYS_sysinfo,
    SYS_tee,
    SYS_tgkill,
    SYS_timer_create,
    SYS_timer_delete,
    SYS_timer_getoverrun,
    SYS_timer_gettime,
    SYS_timer_settime,
    SYS_timerfd_create,
    SYS_timerfd_gettime,
    SYS_timerfd_settime,
    SYS_times,
    SYS_tkill,
    SYS_truncate,
    SYS_umask,
    SYS_uname,
    SYS_unlinkat,
    SYS_utimensat,
    SYS_vmsplice,
    SYS_wait4,
    SYS_waitid,
    SYS_write,
    SYS_writev,
];

/// Allowed calls that only this architecture has.
#[cfg(target_arch = "x86_64")]
const ALLOWED_HERE: &[Named] = calls![
    SYS_access,
    SYS_alarm,
    SYS_arch_prctl,
    SYS_chmod,
    SYS_chown,
    SYS_creat,
    SYS_dup2,
    SYS_epoll_create,
    SYS_epoll_ctl_old,
    SYS_epoll_wait,
    SYS_epoll_wait_old,
    SYS_eventfd,
    SYS_fork,
    SYS_futimesat,
    SYS_get_thread_area,
    SYS_getdents,
    SYS_getpgrp,
    SYS_getrlimit,
    SYS_inotify_init,
    SYS_lchown,
    SYS_link,
    SYS_lstat,
    SYS_mkdir,
    SYS_mknod,
    SYS_modify_ldt,
    SYS_open,
    SYS_pause,
    SYS_pipe,
    SYS_poll,
    SYS_readlink,
    SYS_rename,
    SYS_renameat,
    SYS_rmdir,
    SYS_select,
    SYS_set_thread_area,
    SYS_setrlimit,
    SYS_signalfd,
    SYS_stat,
    SYS_symlink,
    SYS_sync_file_range,
    SYS_time,
    SYS_unlink,
    SYS_uretprobe,
    SYS_utime,
    SYS_utimes,
    SYS_vfork,
];
/// Allowed calls that only this architecture has, or that the crate `libc` lacks for it.
#[cfg(target_arch = "aarch64")]
const ALLOWED_HERE: &[Named] = calls![SYS_renameat, SYS_sync_file_range, SYS_getrlimit, SYS_setrlimit];

/// Denied on every architecture: mounts and namespaces, modules, other kernels, keys, eBPF, tracing of the machine, `io_uring`,
/// `userfaultfd`, other processes' descriptors and memory policy, clocks, accounts, and what the capabilities would refuse anyhow.
const DENIED: &[Named] = calls![
    SYS_acct,
    SYS_add_key,
    SYS_bpf,
    SYS_chroot,
    SYS_clock_settime,
    SYS_delete_module,
    SYS_fanotify_init,
    SYS_finit_module,
    SYS_fsconfig,
    SYS_fsmount,
    SYS_fsopen,
    SYS_fspick,
    SYS_get_mempolicy,
    SYS_init_module,
    SYS_io_uring_enter,
    SYS_io_uring_register,
    SYS_io_uring_setup,
    SYS_kcmp,
    SYS_kexec_file_load,
    SYS_kexec_load,
    SYS_keyctl,
    SYS_lookup_dcookie,
    SYS_mbind,
    SYS_migrate_pages,
    SYS_mount,
    SYS_mount_setattr,
    SYS_move_mount,
    SYS_move_pages,
    SYS_nfsservctl,
    SYS_open_by_handle_at,
    SYS_open_tree,
    SYS_perf_event_open,
    SYS_pidfd_getfd,
    SYS_pivot_root,
    SYS_process_madvise,
    SYS_quotactl,
    SYS_quotactl_fd,
    SYS_reboot,
    SYS_request_key,
    SYS_set_mempolicy,
    SYS_set_mempolicy_home_node,
    SYS_setdomainname,
    SYS_sethostname,
    SYS_setns,
    SYS_settimeofday,
    SYS_swapoff,
    SYS_swapon,
    SYS_syslog,
    SYS_umount2,
    SYS_unshare,
    SYS_userfaultfd,
    SYS_vhangup,
];

/// Denied calls that only this architecture has.
#[cfg(target_arch = "x86_64")]
const DENIED_HERE: &[Named] = calls![
    SYS__sysctl,
    SYS_afs_syscall,
    SYS_getpmsg,
    SYS_ioperm,
    SYS_iopl,
    SYS_putpmsg,
    SYS_security,
    SYS_sysfs,
    SYS_tuxcall,
    SYS_uselib,
    SYS_ustat,
    SYS_vserver,
    SYS_create_module,
    SYS_get_kernel_syms,
    SYS_query_module,
];
/// Denied calls that only this architecture has.
#[cfg(target_arch = "aarch64")]
const DENIED_HERE: &[Named] = &[];

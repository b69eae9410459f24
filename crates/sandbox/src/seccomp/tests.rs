//! The program is run by an interpreter of our own for every number, and installed in a child that makes real calls.

mod interpreter;
#[cfg(target_arch = "x86_64")]
mod reference;

use std::collections::BTreeMap;

use rustix::io::Errno;

use interpreter::{data, interpret};

use super::*;
use crate::step::{StepError, checked};
use crate::testing::{Child, ensure, refused, run};
use crate::userns;

fn verdict(filter: &Filter, number: u32, arguments: [u64; 6]) -> u32 {
    interpret(filter.instructions(), &data(ARCHITECTURE, number, arguments)).value
}

/// The table of a profile, made in the plainest way.
fn table(profile: &Profile) -> (BTreeMap<u32, Verdict>, BTreeMap<u32, Check>) {
    let mut said = BTreeMap::new();
    for (lists, verdict) in [(profile.allowed, Verdict::Allow), (profile.denied, DENIED)] {
        for call in lists.iter().copied().flatten() {
            assert!(said.insert(call.number, verdict).is_none(), "{} is named twice", call.name);
        }
    }
    let checks: BTreeMap<u32, Check> = profile.checked.iter().map(|check| (check.call.number, *check)).collect();
    assert_eq!(checks.len(), profile.checked.len());
    assert!(checks.keys().all(|number| !said.contains_key(number)));
    (said, checks)
}

/// Values that a check could mistake: each that it names and its neighbours, each bit, garbage above 32 bits.
fn hostile(test: Test) -> Vec<u64> {
    let named: Vec<u32> = match test {
        Test::AllClear(mask) => vec![mask],
        Test::OneOf(values) | Test::NoneOf(values) => values.to_vec(),
        Test::Masked { mask, value } => vec![mask, value],
    };
    let bits = (0..32).map(|bit| 1_u32 << bit);
    let low: Vec<u32> = named
        .into_iter()
        .flat_map(|value| [value, value.wrapping_add(1), value.wrapping_sub(1), !value])
        .chain(bits)
        .chain([0])
        .collect();
    low.iter()
        .flat_map(|value| [u64::from(*value), u64::from(*value) | 0xFFFF_FFFF_0000_0000, u64::from(*value) | 1 << 32])
        .collect()
}

#[test]
fn every_number_gets_what_the_table_says() {
    for profile in [&DEFAULT, &DAEMON] {
        check_table(profile);
    }
}

fn check_table(profile: &Profile) {
    let filter = Filter::compile(profile);
    let (said, checks) = table(profile);
    let others = [1 << 16, 0x3FFF_FFFF, u32::MAX];
    for number in (0..1024).chain(others) {
        if let Some(check) = checks.get(&number) {
            for value in hostile(check.test) {
                let mut arguments = [u64::MAX; 6];
                arguments[usize::from(check.argument)] = value;
                let expect = if check.test.passes(value as u32) { Verdict::Allow } else { DENIED };
                assert_eq!(verdict(&filter, number, arguments), expect.code(), "{} with {value:#x}", check.call.name);
            }
            continue;
        }
        let expect = said.get(&number).copied().unwrap_or(ABSENT);
        for arguments in [[0; 6], [u64::MAX; 6]] {
            assert_eq!(verdict(&filter, number, arguments), expect.code(), "number {number}");
        }
    }
}

#[test]
fn foreign_numbers_and_architectures_are_killed() {
    let filter = Filter::compile(&DEFAULT);
    let kill = Verdict::Kill.code();
    for number in (0..1024).map(|number| number | 0x4000_0000).chain([0x4000_0000, 0x7FFF_FFFF, 0x8000_0000, u32::MAX - 1]) {
        assert_eq!(verdict(&filter, number, [0; 6]), kill, "{number:#x}");
    }
    // i386, x86_64, arm, aarch64, mips, ppc64, s390x, riscv64 and garbage.
    let architectures =
        [0x4000_0003, 0xC000_003E, 0x4000_0028, 0xC000_00B7, 8, 0x8000_0015, 0x8000_0016, 0xC000_00F3, 0, u32::MAX];
    for architecture in architectures.into_iter().filter(|architecture| *architecture != ARCHITECTURE) {
        for number in (0..1024).chain([u32::MAX]) {
            assert_eq!(
                interpret(filter.instructions(), &data(architecture, number, [0; 6])).value,
                kill,
                "{architecture:#x} {number}"
            );
        }
    }
}

#[test]
fn what_must_be_closed_is_closed() {
    let (said, checks) = table(&DEFAULT);
    let closed = [
        libc::SYS_io_uring_setup,
        libc::SYS_io_uring_enter,
        libc::SYS_io_uring_register,
        libc::SYS_userfaultfd,
        libc::SYS_bpf,
        libc::SYS_perf_event_open,
        libc::SYS_keyctl,
        libc::SYS_add_key,
        libc::SYS_request_key,
        libc::SYS_mount,
        libc::SYS_umount2,
        libc::SYS_fsopen,
        libc::SYS_fsconfig,
        libc::SYS_fsmount,
        libc::SYS_fspick,
        libc::SYS_open_tree,
        libc::SYS_move_mount,
        libc::SYS_mount_setattr,
        libc::SYS_pivot_root,
        libc::SYS_chroot,
        libc::SYS_unshare,
        libc::SYS_setns,
        libc::SYS_kexec_load,
        libc::SYS_kexec_file_load,
        libc::SYS_init_module,
        libc::SYS_finit_module,
        libc::SYS_delete_module,
        libc::SYS_open_by_handle_at,
        libc::SYS_reboot,
        libc::SYS_swapon,
        libc::SYS_swapoff,
        libc::SYS_syslog,
        libc::SYS_pidfd_getfd,
        libc::SYS_process_madvise,
        libc::SYS_settimeofday,
        libc::SYS_clock_settime,
        libc::SYS_sethostname,
        libc::SYS_setdomainname,
    ];
    for number in closed {
        assert_eq!(said.get(&(number as u32)), Some(&DENIED), "{number}");
    }
    let absent = [libc::SYS_clone3 as u32];
    assert!(absent.iter().all(|number| !said.contains_key(number) && !checks.contains_key(number)));
    let filter = Filter::compile(&DEFAULT);
    let denied = DENIED.code();
    for flag in
        [libc::CLONE_NEWUSER, libc::CLONE_NEWNS, libc::CLONE_NEWNET, libc::CLONE_NEWPID, libc::CLONE_NEWUTS, libc::CLONE_NEWIPC]
    {
        let flags = flag as u64 | libc::SIGCHLD as u64;
        assert_eq!(verdict(&filter, libc::SYS_clone as u32, [flags, 0, 0, 0, 0, 0]), denied, "clone with {flag:#x}");
    }
    for family in [
        libc::AF_VSOCK,
        libc::AF_ALG,
        libc::AF_PACKET,
        libc::AF_XDP,
        libc::AF_KEY,
        libc::AF_BLUETOOTH,
        libc::AF_CAN,
        libc::AF_TIPC,
    ] {
        assert_eq!(verdict(&filter, libc::SYS_socket as u32, [family as u64, 0, 0, 0, 0, 0]), denied, "family {family}");
    }
    // Only the lower half counts to the kernel: garbage above it hides nothing.
    let hidden = u64::from(libc::TIOCSTI as u32) | 7 << 32;
    assert_eq!(verdict(&filter, libc::SYS_ioctl as u32, [0, hidden, 0, 0, 0, 0]), denied);
}

/// What a daemon that was taken over would want first.
#[test]
fn the_daemon_cannot_do_what_it_has_no_use_for() {
    let (said, checks) = table(&DAEMON);
    // Nothing that an image may not do, and less.
    let (inside, _) = table(&DEFAULT);
    for (number, verdict) in &said {
        assert!(inside.get(number) == Some(&Verdict::Allow) && *verdict == Verdict::Allow, "number {number}");
    }
    let absent = [
        libc::SYS_execve,
        libc::SYS_execveat,
        libc::SYS_clone3,
        libc::SYS_ptrace,
        libc::SYS_process_vm_readv,
        libc::SYS_process_vm_writev,
        libc::SYS_kill,
        libc::SYS_pidfd_open,
        libc::SYS_pidfd_send_signal,
        libc::SYS_setresuid,
        libc::SYS_setgroups,
        libc::SYS_capset,
        libc::SYS_mknodat,
        libc::SYS_personality,
        libc::SYS_shmget,
        libc::SYS_msgget,
        libc::SYS_mq_open,
        libc::SYS_io_setup,
        libc::SYS_inotify_init1,
        libc::SYS_prlimit64,
    ];
    for number in absent {
        let number = number as u32;
        assert!(!said.contains_key(&number) || checks.contains_key(&number), "number {number}");
    }
    let filter = Filter::compile(&DAEMON);
    let denied = |number: libc::c_long, arguments: [u64; 6]| {
        assert_eq!(verdict(&filter, number as u32, arguments), DENIED.code(), "{number} {arguments:x?}");
    };
    // A process, namespaces with and without a thread.
    denied(libc::SYS_clone, [libc::SIGCHLD as u64, 0, 0, 0, 0, 0]);
    denied(libc::SYS_clone, [libc::CLONE_NEWUSER as u64, 0, 0, 0, 0, 0]);
    denied(libc::SYS_clone, [(libc::CLONE_THREAD | libc::CLONE_NEWNET) as u64, 0, 0, 0, 0, 0]);
    // Memory that can be executed.
    for protection in [libc::PROT_EXEC, libc::PROT_EXEC | libc::PROT_READ | libc::PROT_WRITE] {
        denied(libc::SYS_mmap, [0, 4096, protection as u64, 0, 0, 0]);
        denied(libc::SYS_mprotect, [0, 4096, protection as u64, 0, 0, 0]);
    }
    denied(libc::SYS_prctl, [libc::PR_SET_DUMPABLE as u64, 1, 0, 0, 0, 0]);
    denied(libc::SYS_socket, [libc::AF_NETLINK as u64, libc::SOCK_RAW as u64, 0, 0, 0, 0]);
}

#[test]
fn the_path_to_every_verdict_is_short() {
    let filter = Filter::compile(&DEFAULT);
    let longest = (0..1024).map(|number| interpret(filter.instructions(), &data(ARCHITECTURE, number, [0; 6])).steps).max();
    // log2 of the ranges, the head and the longest check; a chain over all numbers would take hundreds.
    assert!(longest <= Some(20), "{longest:?} instructions");
    assert!(filter.instructions().len() < 300, "{} instructions", filter.instructions().len());
}

#[test]
fn far_jumps_are_taken_over_an_unconditional_one() {
    // Every second number is allowed: ranges enough for subtrees of more than 255 instructions.
    let calls: Vec<Named> = (0..500).map(|index| Named { name: "even", number: 2 * index }).collect();
    let lists: &'static [&'static [Named]] = Box::leak(Box::new([&*calls.leak()]));
    let filter = Filter::compile(&Profile { allowed: lists, checked: &[], denied: &[] });
    for number in 0..1100 {
        let expect = if number % 2 == 0 && number < 1000 { Verdict::Allow } else { ABSENT };
        assert_eq!(verdict(&filter, number, [0; 6]), expect.code(), "{number}");
    }
}

#[test]
#[should_panic(expected = "stands twice")]
fn a_call_named_twice_is_a_broken_profile() {
    const TWICE: &[Named] = &[Named { name: "read", number: 0 }];
    Filter::compile(&Profile { allowed: &[TWICE], checked: &[], denied: &[TWICE] });
}

/// A raw call whose arguments are integers.
fn call(number: libc::c_long, arguments: [libc::c_long; 3]) -> Result<usize, Errno> {
    // SAFETY: the calls made by these tests take integers only, or null pointers where they take some.
    checked(unsafe { libc::syscall(number, arguments[0], arguments[1], arguments[2]) })
}

#[test]
fn real_calls_meet_the_filter() {
    let filter = Filter::compile(&DEFAULT);
    run(0, || {
        userns::no_new_privs()?;
        filter.install()?;
        ensure(call(libc::SYS_getpid, [0; 3]).is_ok(), "getpid is allowed")?;
        refused(call(libc::SYS_unshare, [libc::CLONE_NEWUSER.into(), 0, 0]), Errno::PERM, "unshare is denied")?;
        refused(call(libc::SYS_io_uring_setup, [1, 0, 0]), Errno::PERM, "io_uring is denied")?;
        refused(call(libc::SYS_bpf, [0; 3]), Errno::PERM, "bpf is denied")?;
        refused(call(libc::SYS_keyctl, [0; 3]), Errno::PERM, "keyctl is denied")?;
        refused(call(libc::SYS_userfaultfd, [0; 3]), Errno::PERM, "userfaultfd is denied")?;
        refused(call(libc::SYS_clone3, [0; 3]), Errno::NOSYS, "clone3 is absent")?;
        refused(call(1023, [0; 3]), Errno::NOSYS, "an unknown call is absent")?;
        refused(call(-1, [0; 3]), Errno::NOSYS, "call -1 is absent")?;
        refused(call(libc::SYS_clone, [libc::CLONE_NEWUSER.into(), 0, 0]), Errno::PERM, "a namespace by clone is denied")?;
        let stream = libc::c_long::from(libc::SOCK_STREAM);
        refused(call(libc::SYS_socket, [libc::AF_ALG.into(), 5, 0]), Errno::PERM, "AF_ALG is denied")?;
        refused(call(libc::SYS_socket, [libc::AF_VSOCK.into(), stream, 0]), Errno::PERM, "AF_VSOCK is denied")?;
        ensure(call(libc::SYS_socket, [libc::AF_INET.into(), stream, 0]).is_ok(), "AF_INET is allowed")?;
        refused(call(libc::SYS_ioctl, [0, libc::TIOCSTI as libc::c_long, 0]), Errno::PERM, "TIOCSTI is denied")?;
        ensure(call(libc::SYS_personality, [0xFFFF_FFFF, 0, 0]).is_ok(), "personality may be asked")?;
        refused(call(libc::SYS_personality, [0x0040_0000, 0, 0]), Errno::PERM, "READ_IMPLIES_EXEC is denied")
    });
}

#[test]
#[cfg(target_arch = "x86_64")]
fn an_x32_call_kills_the_process() {
    let filter = Filter::compile(&DEFAULT);
    let child = Child::start(0, || {
        userns::no_new_privs()?;
        filter.install()?;
        let _ = call(0x4000_0000 + libc::SYS_getpid, [0; 3]);
        Err(StepError { step: "the call returned", errno: Errno::CANCELED })
    });
    assert_eq!(child.finish(), Ok(crate::fds::Exit::Signal(libc::SIGSYS)));
}

#[test]
#[cfg(target_arch = "x86_64")]
fn an_i386_call_kills_the_process() {
    let filter = Filter::compile(&DEFAULT);
    let child = Child::start(0, || {
        userns::no_new_privs()?;
        filter.install()?;
        // SAFETY: getpid (20) of the 32-bit table by its own gate; it touches no memory. rax is the only register that it changes.
        unsafe { std::arch::asm!("int 0x80", inout("rax") 20_u64 => _, out("r8") _, out("r9") _, out("r10") _, out("r11") _) };
        Err(StepError { step: "the call returned", errno: Errno::CANCELED })
    });
    assert_eq!(child.finish(), Ok(crate::fds::Exit::Signal(libc::SIGSYS)));
}

#[test]
fn a_filter_needs_no_new_privs() {
    let filter = Filter::compile(&DEFAULT);
    run(0, || {
        userns::set_capabilities(rustix::thread::CapabilitySet::empty())?;
        refused(filter.install().map_err(|error| error.errno), Errno::ACCESS, "install without no_new_privs is refused")
    });
}

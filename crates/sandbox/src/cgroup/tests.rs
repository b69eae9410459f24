//! Groups on the real kernel: v1 where its controllers are mounted, and always the unified tree.

use std::os::fd::AsFd;
use std::path::Path;

use rustix::event::Timespec;

use super::*;
use crate::fds::Exit;
use crate::step::at;
use crate::testing::{Child, need_root};

const LIMITS: GroupLimits = GroupLimits { memory_bytes: 64 << 20, pids_max: 32 };

/// A name of its own for each test of this process.
fn name(test: &str) -> String {
    format!("funtainer-test-{test}-{}", std::process::id())
}

/// The layouts of this machine: the one that would be used, and the unified tree.
fn layouts() -> Vec<Layout> {
    need_root();
    let mut layouts = vec![Layout::detect().expect("cgroups are mounted")];
    layouts.extend(Layout::unified().ok().filter(|unified| !layouts.contains(unified)));
    layouts
}

/// Where the top groups of a name would be.
fn places(layout: &Layout, name: &str) -> Vec<PathBuf> {
    match layout {
        Layout::V1(controllers) => controllers.iter().map(|controller| controller.mount.join(name)).collect(),
        Layout::V2(mount) => vec![mount.join(name)],
    }
}

#[track_caller]
fn assert_gone(layout: &Layout, name: &str) {
    for place in places(layout, name) {
        assert!(!place.exists(), "{} is left", place.display());
    }
}

/// A child that has entered the group and does nothing.
fn sleeper(cgroup: &InstanceCgroup) -> Child {
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let mut doors = [None; GROUPS_MAX];
    for (slot, door) in doors.iter_mut().zip(cgroup.doors()) {
        *slot = Some(door);
    }
    let child = Child::start(0, || {
        attach_current(doors.iter().flatten().copied())?;
        rustix::io::write(&writer, b"i").map_err(at("tell that it is inside"))?;
        loop {
            rustix::event::pause();
        }
    });
    rustix::io::read(&reader, &mut [0_u8; 1]).expect("the child is inside");
    child
}

fn groups_of(pid: i32) -> String {
    std::fs::read_to_string(format!("/proc/{pid}/cgroup")).expect("the groups of a child")
}

/// Waits for the end of a killed child.
fn reaped(child: &Child) -> Exit {
    assert_eq!(pidfd_ended(child.pidfd.as_fd(), Some(Timespec { tv_sec: 10, tv_nsec: 0 })), Ok(true));
    crate::fds::pidfd_reap(child.pidfd.as_fd(), true).expect("our child").expect("it has ended")
}

/// Removes a group whose processes are reaped: they leave it a moment later.
fn removed(cgroup: &mut InstanceCgroup) {
    let deadline = Instant::now() + Duration::from_secs(10);
    while cgroup.remove().expect("remove") == Removal::Busy {
        assert!(Instant::now() < deadline, "the group stays busy");
        std::thread::yield_now();
    }
}

#[test]
fn an_instance_lives_in_its_group_and_leaves_nothing() {
    for layout in layouts() {
        let name = name("life");
        let hierarchy = Hierarchy::open(&layout, &name).expect("top groups");
        let mut cgroup = hierarchy.create("one", LIMITS).expect("a group");
        let child = sleeper(&cgroup);
        let path = format!("/{name}/one");
        let entered = groups_of(child.pid).lines().filter(|line| line.ends_with(&path)).count();
        assert_eq!(entered, places(&layout, &name).len(), "{}", groups_of(child.pid));
        assert_eq!(cgroup.remove(), Ok(Removal::Busy));

        cgroup.kill().expect("kill");
        assert_eq!(reaped(&child), Exit::Signal(libc::SIGKILL));
        let usage = cgroup.usage();
        assert_eq!(usage.oom_kills, 0);
        assert!(usage.cpu_us.is_some(), "{usage:?}");
        if !hierarchy.missing().contains(&"memory limit") {
            assert!(usage.memory_peak_bytes > Some(0), "{usage:?}");
        }
        removed(&mut cgroup);
        assert_eq!(cgroup.remove(), Ok(Removal::Done), "a second time is fine");
        hierarchy.close().expect("close");
        assert_gone(&layout, &name);
    }
}

#[test]
fn limits_are_set_where_the_kernel_has_them() {
    for layout in layouts() {
        let name = name("limits");
        let hierarchy = Hierarchy::open(&layout, &name).expect("top groups");
        let mut cgroup = hierarchy.create("one", LIMITS).expect("a group");
        let files: &[(&str, &str, &str)] = match layout {
            Layout::V1(_) => &[
                ("memory limit", "memory.limit_in_bytes", "67108864"),
                ("memory limit", "memory.swappiness", "0"),
                ("process limit", "pids.max", "32"),
            ],
            Layout::V2(_) => &[
                ("memory limit", "memory.max", "67108864"),
                ("memory limit", "memory.oom.group", "1"),
                ("process limit", "pids.max", "32"),
            ],
        };
        for (word, file, expect) in files {
            let found: Vec<String> = places(&layout, &name)
                .iter()
                .filter_map(|top| std::fs::read_to_string(top.join("one").join(file)).ok())
                .collect();
            if hierarchy.missing().contains(word) {
                assert!(found.is_empty(), "{file} is said to be missing");
            } else {
                assert_eq!(found, [format!("{expect}\n")], "{file}");
            }
        }
        removed(&mut cgroup);
        hierarchy.close().expect("close");
        assert_gone(&layout, &name);
    }
}

#[test]
fn memory_beyond_the_limit_is_an_oom_kill_of_this_group() {
    for layout in layouts() {
        let name = name("oom");
        let hierarchy = Hierarchy::open(&layout, &name).expect("top groups");
        let mut cgroup = hierarchy.create("eater", LIMITS).expect("a group");
        let mut neighbour = hierarchy.create("neighbour", LIMITS).expect("a group");
        if !hierarchy.missing().contains(&"memory limit") {
            let mut doors = [None; GROUPS_MAX];
            for (slot, door) in doors.iter_mut().zip(cgroup.doors()) {
                *slot = Some(door);
            }
            let child = Child::start(0, || {
                attach_current(doors.iter().flatten().copied())?;
                eat(2 * LIMITS.memory_bytes as usize)
            });
            assert_eq!(child.finish(), Ok(Exit::Signal(libc::SIGKILL)));
            let usage = cgroup.usage();
            assert!(usage.oom_kills >= 1, "{usage:?}");
            assert!(usage.memory_peak_bytes > Some(LIMITS.memory_bytes / 2), "{usage:?}");
            assert_eq!(neighbour.usage().oom_kills, 0);
        }
        removed(&mut cgroup);
        removed(&mut neighbour);
        hierarchy.close().expect("close");
        assert_gone(&layout, &name);
    }
}

/// Touches so many bytes of new memory.
fn eat(bytes: usize) -> Result<(), StepError> {
    let (protection, flags) = (libc::PROT_READ | libc::PROT_WRITE, libc::MAP_PRIVATE | libc::MAP_ANONYMOUS);
    // SAFETY: a new mapping at a place of the kernel's choice.
    let memory = unsafe { libc::mmap(std::ptr::null_mut(), bytes, protection, flags, -1, 0) };
    if memory == libc::MAP_FAILED {
        return Err(StepError { step: "map memory", errno: Errno::NOMEM });
    }
    let memory = memory.cast::<u8>();
    for offset in (0..bytes).step_by(4096) {
        // SAFETY: within the mapping made above, which is writable.
        unsafe { memory.add(offset).write_volatile(1) };
    }
    Ok(())
}

#[test]
fn processes_beyond_the_limit_are_refused() {
    for layout in layouts() {
        let name = name("pids");
        let hierarchy = Hierarchy::open(&layout, &name).expect("top groups");
        let mut cgroup = hierarchy.create("one", GroupLimits { pids_max: 1, ..LIMITS }).expect("a group");
        if !hierarchy.missing().contains(&"process limit") {
            let mut doors = [None; GROUPS_MAX];
            for (slot, door) in doors.iter_mut().zip(cgroup.doors()) {
                *slot = Some(door);
            }
            let child = Child::start(0, || {
                attach_current(doors.iter().flatten().copied())?;
                // SAFETY: a plain fork by number; a child, if one were made, would end at once.
                match checked_fork() {
                    Err(Errno::AGAIN) => Ok(()),
                    other => other.map(drop).and(Err(Errno::CANCELED)).map_err(at("a second process was made")),
                }
            });
            child.succeed();
        }
        removed(&mut cgroup);
        hierarchy.close().expect("close");
        assert_gone(&layout, &name);
    }
}

fn checked_fork() -> Result<usize, Errno> {
    // SAFETY: clone(2) like fork; the child runs nothing of ours but the exit.
    let pid = crate::step::checked(unsafe { libc::syscall(libc::SYS_clone, libc::SIGCHLD, 0, 0, 0, 0) })?;
    if pid == 0 {
        // SAFETY: ends the child at once.
        unsafe { libc::_exit(0) };
    }
    Ok(pid)
}

#[test]
fn a_killed_server_leaves_nothing_to_the_next_one() {
    for layout in layouts() {
        let name = name("sweep");
        let hierarchy = Hierarchy::open(&layout, &name).expect("top groups");
        let first = hierarchy.create("one", LIMITS).expect("a group");
        let second = hierarchy.create("two", LIMITS).expect("a group");
        let children = [sleeper(&first), sleeper(&first), sleeper(&second)];
        // A group below, as a container with a writable view would make it.
        for top in places(&layout, &name) {
            std::fs::create_dir(top.join("one").join("below")).expect("a group below");
        }
        drop((hierarchy, first, second));

        let hierarchy = Hierarchy::open(&layout, &name).expect("the next server");
        for child in &children {
            assert_eq!(reaped(child), Exit::Signal(libc::SIGKILL));
        }
        for top in places(&layout, &name) {
            assert!(!top.join("one").exists() && !top.join("two").exists());
        }
        let mut again = hierarchy.create("one", LIMITS).expect("the name is free");
        removed(&mut again);
        hierarchy.close().expect("close");
        assert_gone(&layout, &name);
    }
}

#[test]
fn another_servers_groups_are_left_alone() {
    for layout in layouts() {
        let (ours, theirs) = (name("ours"), name("ours-too"));
        let neighbour = Hierarchy::open(&layout, &theirs).expect("the other server");
        let mut cgroup = neighbour.create("one", LIMITS).expect("a group");
        let child = sleeper(&cgroup);
        sweep(&layout, &ours).expect("nothing to sweep");
        let hierarchy = Hierarchy::open(&layout, &ours).expect("our groups");
        sweep(&layout, &ours).expect("a sweep");
        assert_eq!(pidfd_ended(child.pidfd.as_fd(), Some(Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(false));
        hierarchy.close().expect("a top that is gone already");
        cgroup.kill().expect("kill");
        reaped(&child);
        removed(&mut cgroup);
        neighbour.close().expect("close");
        assert_gone(&layout, &theirs);
    }
}

#[test]
fn a_top_group_with_an_instance_cannot_be_closed() {
    for layout in layouts() {
        let name = name("busy");
        let hierarchy = Hierarchy::open(&layout, &name).expect("top groups");
        let cgroup = hierarchy.create("one", LIMITS).expect("a group");
        let error = hierarchy.create("one", LIMITS).expect_err("the name is taken");
        assert!(error.to_string().contains("/one: make a control group: File exists"), "{error}");
        assert!(matches!(hierarchy.close(), Err(CgroupError::Step { source: StepError { errno: Errno::BUSY, .. }, .. })));
        drop(cgroup);
        sweep(&layout, &name).expect("a sweep");
        assert_gone(&layout, &name);
    }
}

#[test]
fn the_unified_tree_freezes_and_takes_children_at_birth() {
    need_root();
    let Ok(layout) = Layout::unified() else { return };
    let name = name("freeze");
    let hierarchy = Hierarchy::open(&layout, &name).expect("a top group");
    let mut cgroup = hierarchy.create("one", LIMITS).expect("a group");
    let child = sleeper(&cgroup);
    let events = places(&layout, &name)[0].join("one/cgroup.events");
    for frozen in [true, false] {
        cgroup.freeze(frozen).expect("freeze");
        let expect = format!("frozen {}", u8::from(frozen));
        let deadline = Instant::now() + Duration::from_secs(10);
        while !std::fs::read_to_string(&events).expect("events").contains(&expect) {
            assert!(Instant::now() < deadline, "never: {expect}");
            std::thread::yield_now();
        }
    }
    cgroup.freeze(true).expect("freeze");
    cgroup.kill().expect("a frozen process can be killed");
    assert_eq!(reaped(&child), Exit::Signal(libc::SIGKILL));

    let born = born_inside(cgroup.directory().expect("a directory"));
    assert!(groups_of(born.0).lines().any(|line| line.ends_with(&format!("/{name}/one"))), "{}", groups_of(born.0));
    cgroup.kill().expect("kill");
    crate::fds::pidfd_reap(born.1.as_fd(), true).expect("our child");
    removed(&mut cgroup);
    hierarchy.close().expect("close");
    assert_gone(&layout, &name);
}

/// A child made with `CLONE_INTO_CGROUP`: its pid and handle.
fn born_inside(directory: BorrowedFd<'_>) -> (i32, OwnedFd) {
    use std::os::fd::{AsRawFd, FromRawFd};
    let mut pidfd: libc::c_int = -1;
    // struct clone_args of clone(2): the eleventh word is the group.
    let mut arguments = [0_u64; 11];
    arguments[0] = CLONE_INTO_CGROUP | libc::CLONE_PIDFD as u64;
    arguments[1] = (&raw mut pidfd).expose_provenance() as u64;
    arguments[4] = libc::SIGCHLD as u64;
    arguments[10] = directory.as_raw_fd() as u64;
    // SAFETY: clone_args with its size; the child only waits.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments)) } as i32;
    assert!(pid >= 0, "clone3: {}", std::io::Error::last_os_error());
    if pid == 0 {
        loop {
            rustix::event::pause();
        }
    }
    // SAFETY: CLONE_PIDFD stored a new descriptor there.
    (pid, unsafe { OwnedFd::from_raw_fd(pidfd) })
}

#[test]
fn names_that_are_no_component_are_refused() {
    let long = "x".repeat(201);
    for name in ["", ".", "..", ".hidden", "a/b", "/a", "a b", "a\n", "a\0b", "é", &long] {
        assert!(matches!(component(name), Err(CgroupError::Name(_))), "{name:?}");
    }
    for name in ["funtainer-0123456789abcdef", "a", "A_b.c-1"] {
        assert!(component(name).is_ok(), "{name:?}");
    }
}

#[test]
fn the_layout_is_read_from_the_mounts() {
    let v1 = "31 23 0:28 / /sys/fs/cgroup rw - tmpfs tmpfs rw,mode=755\n\
              35 31 0:32 / /sys/fs/cgroup/memory rw,relatime - cgroup cgroup rw,memory\n\
              33 31 0:30 / /sys/fs/cgroup/cpu,cpuacct rw shared:7 - cgroup cgroup rw,cpu,cpuacct\n\
              39 31 0:36 / /odd\\040place rw - cgroup cgroup rw,pids\n\
              40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,xattr,name=systemd\n\
              41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw,nsdelegate\n";
    let controller = |name, mount: &str| v1::Controller { name, mount: PathBuf::from(mount) };
    let expect = vec![
        controller("memory", "/sys/fs/cgroup/memory"),
        controller("pids", "/odd place"),
        controller("cpuacct", "/sys/fs/cgroup/cpu,cpuacct"),
    ];
    assert_eq!(Layout::parse(v1), Some(Layout::V1(expect)));

    let v2 = "31 23 0:28 / /sys/fs/cgroup rw shared:4 - cgroup2 cgroup2 rw,nsdelegate,memory_recursiveprot\n";
    assert_eq!(Layout::parse(v2), Some(Layout::V2(Path::new("/sys/fs/cgroup").to_owned())));
    // v1 without the controller of memory is left for the unified tree.
    let hybrid = "40 31 0:37 / /sys/fs/cgroup/systemd rw - cgroup cgroup rw,name=systemd\n\
                  41 31 0:38 / /sys/fs/cgroup/unified rw - cgroup2 cgroup2 rw\n";
    assert_eq!(Layout::parse(hybrid), Some(Layout::V2(Path::new("/sys/fs/cgroup/unified").to_owned())));
    for text in ["", "garbage", "1 2 3 / /x rw - ext4 /dev/vda rw", "1 2 -  - cgroup2", " - cgroup2 cgroup2 rw"] {
        assert_eq!(Layout::parse(text), None, "{text:?}");
    }
}

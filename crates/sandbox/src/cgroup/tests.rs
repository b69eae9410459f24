//! Groups on the real kernel: v1 where its controllers are mounted, and always the unified tree.

use std::os::fd::AsFd;
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::event::Timespec;

use super::*;
use crate::clone::{Cloned, clone3_into};
use crate::fds::{Exit, pidfd_ended};
use crate::step::at;
use crate::testing::{Child, TEST_BASE, ensure, need_root, refused};

const LIMITS: GroupLimits = GroupLimits { memory_bytes: 64 << 20, pids_max: 32, cpu_weight: 50, cpu_milli: Some(250) };

/// A name of its own for each test of this process.
fn name(test: &str) -> String {
    format!("funtainer-test-{test}-{}", std::process::id())
}

/// The layouts of this machine: the one that would be used, and the unified tree.
fn layouts() -> Vec<Layout> {
    need_root();
    let mut layouts = vec![Layout::detect().expect("cgroups are mounted")];
    if let Layout::V2(mount) = &layouts[0] {
        // As a server at the root has it. This process stays where it is.
        place::open_tree(mount, None).expect("controllers for the groups at the root");
    }
    layouts.extend(Layout::unified().ok().filter(|unified| !layouts.contains(unified)));
    layouts
}

/// The groups of one server with one zygote.
struct Ground {
    hierarchy: Hierarchy,
    nest: Nest,
}

impl Ground {
    fn open(layout: &Layout, name: &str) -> Self {
        let hierarchy = Hierarchy::open(layout, name).expect("top groups");
        let nest = hierarchy.nest(NEST, TEST_BASE).expect("a nest");
        Self { hierarchy, nest }
    }

    fn create(&self, instance: &str) -> InstanceCgroup {
        self.nest.create(instance, LIMITS).expect("a group")
    }

    fn lacks(&self, words: &str) -> bool {
        self.hierarchy.missing().contains(&words)
    }

    fn close(mut self) {
        let deadline = Instant::now() + Duration::from_secs(10);
        while self.nest.remove().expect("remove") == Removal::Busy {
            assert!(Instant::now() < deadline, "the nest stays busy");
            std::thread::yield_now();
        }
        self.hierarchy.close().expect("close");
    }
}

const NEST: &str = "zygote-0";

/// Where the groups of instances would be.
fn nests(layout: &Layout, name: &str) -> Vec<PathBuf> {
    let places = places(layout, name);
    match layout {
        Layout::V1(_) => places,
        Layout::V2(_) => places.into_iter().map(|place| place.join(NEST)).collect(),
    }
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

/// A test that fails leaves no child behind.
fn die_with_the_test() -> Result<(), StepError> {
    rustix::process::set_parent_process_death_signal(Some(rustix::process::Signal::KILL)).map_err(at("set the death signal"))
}

/// A child that has entered the group and does nothing.
fn sleeper(cgroup: &InstanceCgroup) -> Child {
    let (reader, writer) = rustix::pipe::pipe().expect("a pipe");
    let mut doors = [None; GROUPS_MAX];
    for (slot, door) in doors.iter_mut().zip(cgroup.doors()) {
        *slot = Some(door);
    }
    let child = Child::start(0, || {
        die_with_the_test()?;
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
        let ground = Ground::open(&layout, &name);
        let mut cgroup = ground.create("one");
        let child = sleeper(&cgroup);
        let path = if matches!(layout, Layout::V1(_)) { format!("/{name}/one") } else { format!("/{name}/{NEST}/one") };
        let entered = groups_of(child.pid).lines().filter(|line| line.ends_with(&path)).count();
        assert_eq!(entered, places(&layout, &name).len(), "{}", groups_of(child.pid));
        assert_eq!(cgroup.remove(), Ok(Removal::Busy));

        cgroup.kill().expect("kill");
        assert_eq!(reaped(&child), Exit::Signal(libc::SIGKILL));
        let usage = cgroup.usage();
        assert_eq!(usage.oom_kills, 0);
        assert!(usage.cpu_us.is_some(), "{usage:?}");
        if !ground.lacks("memory limit") {
            assert!(usage.memory_peak_bytes > Some(0), "{usage:?}");
        }
        removed(&mut cgroup);
        assert_eq!(cgroup.remove(), Ok(Removal::Done), "a second time is fine");
        ground.close();
        assert_gone(&layout, &name);
    }
}

#[test]
fn limits_are_set_where_the_kernel_has_them() {
    for layout in layouts() {
        let name = name("limits");
        let ground = Ground::open(&layout, &name);
        let mut cgroup = ground.create("one");
        let files: &[(&str, &str, &str)] = match layout {
            Layout::V1(_) => &[
                ("memory limit", "memory.limit_in_bytes", "67108864"),
                ("memory limit", "memory.swappiness", "0"),
                ("process limit", "pids.max", "32"),
                ("processor limit", "cpu.shares", "512"),
                ("processor limit", "cpu.cfs_period_us", "100000"),
                ("processor limit", "cpu.cfs_quota_us", "25000"),
            ],
            Layout::V2(_) => &[
                ("memory limit", "memory.max", "67108864"),
                ("memory limit", "memory.oom.group", "1"),
                ("process limit", "pids.max", "32"),
                ("processor limit", "cpu.weight", "50"),
                ("processor limit", "cpu.max", "25000 100000"),
            ],
        };
        for (word, file, expect) in files {
            let found: Vec<String> = nests(&layout, &name)
                .iter()
                .filter_map(|top| std::fs::read_to_string(top.join("one").join(file)).ok())
                .collect();
            if ground.lacks(word) {
                assert!(found.is_empty(), "{file} is said to be missing");
            } else {
                assert_eq!(found, [format!("{expect}\n")], "{file}");
            }
        }
        removed(&mut cgroup);
        ground.close();
        assert_gone(&layout, &name);
    }
}

#[test]
fn memory_beyond_the_limit_is_an_oom_kill_of_this_group() {
    for layout in layouts() {
        let name = name("oom");
        let ground = Ground::open(&layout, &name);
        let mut cgroup = ground.create("eater");
        let mut neighbour = ground.create("neighbour");
        if !ground.lacks("memory limit") {
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
        ground.close();
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
        let ground = Ground::open(&layout, &name);
        let mut cgroup = ground.nest.create("one", GroupLimits { pids_max: 1, ..LIMITS }).expect("a group");
        if !ground.lacks("process limit") {
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
        ground.close();
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
        let ground = Ground::open(&layout, &name);
        let first = ground.create("one");
        let second = ground.create("two");
        let children = [sleeper(&first), sleeper(&first), sleeper(&second)];
        // A group below, as a container with a writable view would make it.
        for nest in nests(&layout, &name) {
            std::fs::create_dir(nest.join("one").join("below")).expect("a group below");
        }
        drop((ground, first, second));

        let ground = Ground::open(&layout, &name);
        for child in &children {
            assert_eq!(reaped(child), Exit::Signal(libc::SIGKILL));
        }
        for nest in nests(&layout, &name) {
            assert!(!nest.join("one").exists() && !nest.join("two").exists());
        }
        let mut again = ground.create("one");
        removed(&mut again);
        ground.close();
        assert_gone(&layout, &name);
    }
}

#[test]
fn another_servers_groups_are_left_alone() {
    for layout in layouts() {
        let (ours, theirs) = (name("ours"), name("ours-too"));
        let neighbour = Ground::open(&layout, &theirs);
        let mut cgroup = neighbour.create("one");
        let child = sleeper(&cgroup);
        sweep(&layout, &ours).expect("nothing to sweep");
        let hierarchy = Hierarchy::open(&layout, &ours).expect("our groups");
        sweep(&layout, &ours).expect("a sweep");
        assert_eq!(pidfd_ended(child.pidfd.as_fd(), Some(Timespec { tv_sec: 0, tv_nsec: 0 })), Ok(false));
        hierarchy.close().expect("a top that is gone already");
        cgroup.kill().expect("kill");
        reaped(&child);
        removed(&mut cgroup);
        neighbour.close();
        assert_gone(&layout, &theirs);
    }
}

#[test]
fn a_top_group_with_an_instance_cannot_be_closed() {
    for layout in layouts() {
        let name = name("busy");
        let mut ground = Ground::open(&layout, &name);
        let cgroup = ground.create("one");
        let error = ground.nest.create("one", LIMITS).expect_err("the name is taken");
        assert!(error.to_string().contains("/one: make a control group: File exists"), "{error}");
        if matches!(layout, Layout::V2(_)) {
            let error = ground.hierarchy.nest(NEST, TEST_BASE).expect_err("the name is taken");
            assert!(error.to_string().contains("make the control group of a zygote: File exists"), "{error}");
            assert_eq!(ground.nest.remove(), Ok(Removal::Busy));
        }
        let closed = ground.hierarchy.close();
        assert!(matches!(closed, Err(CgroupError::Step { source: StepError { errno: Errno::BUSY, .. }, .. })));
        drop(cgroup);
        sweep(&layout, &name).expect("a sweep");
        assert_gone(&layout, &name);
    }
}

#[test]
fn a_user_without_groups_has_none() {
    let hierarchy = Hierarchy::absent();
    assert_eq!(hierarchy.missing().len(), 4);
    let mut nest = hierarchy.nest(NEST, TEST_BASE).expect("nothing to make");
    let mut cgroup = nest.create("one", LIMITS).expect("nothing to make");
    assert!(nest.cradle().is_none() && cgroup.birthplace().is_none() && cgroup.doors().next().is_none());
    assert_eq!(cgroup.usage(), Usage::default());
    assert_eq!((cgroup.kill(), cgroup.remove(), nest.remove()), (Ok(()), Ok(Removal::Done), Ok(Removal::Done)));
    hierarchy.close().expect("nothing to remove");
}

#[test]
fn the_unified_tree_freezes() {
    need_root();
    let Ok(layout) = Layout::unified() else { return };
    let name = name("freeze");
    let ground = Ground::open(&layout, &name);
    let mut cgroup = ground.create("one");
    let child = sleeper(&cgroup);
    let events = nests(&layout, &name)[0].join("one/cgroup.events");
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
    removed(&mut cgroup);
    ground.close();
    assert_gone(&layout, &name);
}

#[test]
fn a_zygote_has_children_born_in_its_groups_and_no_other_right() {
    need_root();
    let Ok(layout) = Layout::unified() else { return };
    let name = name("birth");
    let ground = Ground::open(&layout, &name);
    let mut cgroup = ground.create("one");
    // Of another function, whose root is somebody else.
    let mut other = ground.hierarchy.nest("zygote-1", TEST_BASE + crate::userns::IDS).expect("another nest");
    let mut foreign = other.create("two", LIMITS).expect("a group");

    let (go, gone) = rustix::pipe::pipe().expect("a pipe");
    let births = [&cgroup, &foreign].map(|cgroup| cgroup.birthplace().expect("a place"));
    let child = Child::start(libc::CLONE_NEWUSER, || {
        rustix::io::read(&go, &mut [0_u8; 1]).map_err(at("wait to be in the cradle"))?;
        // SAFETY: the child has one thread; its own child only waits.
        match unsafe { clone3_into(0, Some(births[0])) } {
            Ok(Cloned::Parent { .. }) => {}
            Ok(Cloned::Child) => {
                // The test waits for the end of a socket that this process has a copy of.
                crate::fds::close_from(0).map_err(at("close"))?;
                loop {
                    rustix::event::pause();
                }
            }
            Err(errno) => return Err(StepError { step: "have a child born in the group", errno }),
        }
        // SAFETY: as above.
        let abroad = unsafe { clone3_into(0, Some(births[1])) };
        refused(abroad.map(drop), Errno::ACCESS, "a child is born in another function's group")?;
        for file in [c"cgroup.subtree_control", c"cgroup.max.descendants", c"cgroup.freeze", c"cgroup.kill", c"cgroup.type"] {
            let opened = rustix::fs::openat(births[0], file, OFlags::WRONLY | OFlags::CLOEXEC, Mode::empty());
            ensure(matches!(opened, Err(Errno::ACCESS | Errno::NOENT)), "a file of the group can be written")?;
        }
        let below = rustix::fs::mkdirat(births[0], c"below", Mode::from_raw_mode(0o755));
        refused(below, Errno::ACCESS, "a group is made below")
    });
    let cradle = ground.nest.cradle().expect("a cradle");
    write(cradle, "cgroup.procs", &child.pid.to_string(), "move the zygote").expect("move");
    rustix::io::write(&gone, b"g").expect("write");
    child.succeed();
    let group = nests(&layout, &name)[0].join("one/cgroup.procs");
    let born = std::fs::read_to_string(group).expect("the group's processes");
    assert_eq!(born.lines().count(), 1, "{born:?}");
    assert!(groups_of(born.trim().parse().expect("a pid")).contains(&format!("0::/{name}/{NEST}/one")));

    cgroup.kill().expect("kill");
    removed(&mut cgroup);
    removed(&mut foreign);
    while other.remove().expect("remove") == Removal::Busy {
        std::thread::yield_now();
    }
    ground.close();
    assert_gone(&layout, &name);
}

/// A child in the group that uses up a processor, always the same one.
fn burner(cgroup: &InstanceCgroup) -> Child {
    let mut doors = [None; GROUPS_MAX];
    for (slot, door) in doors.iter_mut().zip(cgroup.doors()) {
        *slot = Some(door);
    }
    let allowed = rustix::thread::sched_getaffinity(None).expect("processors");
    let mut processors = rustix::thread::CpuSet::new();
    processors.set((0..rustix::thread::CpuSet::MAX_CPU).find(|processor| allowed.is_set(*processor)).expect("a processor"));
    Child::start(0, || {
        die_with_the_test()?;
        rustix::thread::sched_setaffinity(None, &processors).map_err(at("stay on one processor"))?;
        attach_current(doors.iter().flatten().copied())?;
        loop {
            std::hint::spin_loop();
        }
    })
}

/// Waits until both together have used so much.
fn burnt(cgroups: [&InstanceCgroup; 2], total_us: u64) -> [u64; 2] {
    let deadline = Instant::now() + Duration::from_mins(2);
    loop {
        let used = cgroups.map(|cgroup| cgroup.usage().cpu_us.expect("processor time is counted"));
        if used.iter().sum::<u64>() >= total_us {
            return used;
        }
        assert!(Instant::now() < deadline, "{used:?} of {total_us} µs");
        std::thread::sleep(Duration::from_millis(5));
    }
}

#[test]
fn processor_time_is_shared_by_weight() {
    for layout in layouts() {
        let name = name("weight");
        let ground = Ground::open(&layout, &name);
        if !ground.lacks("processor limit") {
            for (weights, least, most) in [([100, 400], 2.0, 8.0), ([100, 100], 0.5, 2.0)] {
                let limits = weights.map(|cpu_weight| GroupLimits { cpu_weight, cpu_milli: None, ..LIMITS });
                let mut light = ground.nest.create("light", limits[0]).expect("a group");
                let mut heavy = ground.nest.create("heavy", limits[1]).expect("a group");
                let children = [burner(&light), burner(&heavy)];
                let used = burnt([&light, &heavy], 1_000_000);
                let ratio = used[1] as f64 / used[0] as f64;
                assert!((least..most).contains(&ratio), "{weights:?}: {used:?}");
                light.kill().and_then(|()| heavy.kill()).expect("kill");
                for child in &children {
                    assert_eq!(reaped(child), Exit::Signal(libc::SIGKILL));
                }
                removed(&mut light);
                removed(&mut heavy);
            }
        }
        ground.close();
    }
}

#[test]
fn a_quota_of_processor_time_holds() {
    for layout in layouts() {
        let name = name("quota");
        let ground = Ground::open(&layout, &name);
        if !ground.lacks("processor limit") {
            // So little that it is reached however busy the machine is.
            let limits = GroupLimits { cpu_weight: CPU_WEIGHT_DEFAULT, cpu_milli: Some(20), ..LIMITS };
            let mut held = ground.nest.create("held", limits).expect("a group");
            let mut free = ground.nest.create("free", GroupLimits { cpu_milli: None, ..limits }).expect("a group");
            let begun = Instant::now();
            let children = [burner(&held), burner(&free)];
            let used = burnt([&held, &free], 1_000_000);
            // Counted when the scheduler ticks: what is too much in one period is taken from the next ones.
            let periods = begun.elapsed().as_micros() as u64 / CPU_PERIOD_US + 2;
            let most = periods * CPU_PERIOD_US / 50 + 20_000;
            assert!(used[0] <= most, "{used:?}, at most {most}");
            let throttled = |cgroup: &InstanceCgroup| {
                cgroup.groups.iter().find_map(|group| read_key(group.directory.as_fd(), "cpu.stat", "nr_throttled"))
            };
            assert!(throttled(&held) > Some(0) && throttled(&free).unwrap_or(0) == 0);
            held.kill().and_then(|()| free.kill()).expect("kill");
            for child in &children {
                assert_eq!(reaped(child), Exit::Signal(libc::SIGKILL));
            }
            removed(&mut held);
            removed(&mut free);
        }
        ground.close();
    }
}

#[test]
fn weights_become_shares() {
    for (weight, expect) in [(1, 10), (100, 1024), (200, 2048), (10_000, 102_400)] {
        assert_eq!(v1::shares(weight), expect, "{weight}");
    }
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
        controller("cpu", "/sys/fs/cgroup/cpu,cpuacct"),
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

//! What each defence of a start costs: its system calls alone, in a process of the same shape, in µs.
//!
//! `cargo run --release -p funtainer-sandbox --example defences`; needs root. Each round forks a fresh process, which takes the steps of an
//! init in their order and looks at the clock between them; what a zygote or the keeper does beforehand is measured beside it. Rows marked
//! `ahead` are off the path of a start.

use std::ffi::CStr;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::time::Instant;

use funtainer_sandbox::cgroup::{CPU_WEIGHT_DEFAULT, GroupLimits, Hierarchy, Layout, Nest, attach_current};
use funtainer_sandbox::mount::{self, INERT, Tmpfs};
use funtainer_sandbox::seccomp::{DEFAULT, Filter};
use funtainer_sandbox::step::StepError;
use funtainer_sandbox::{netns, userns};
use rustix::fs::{Mode, OFlags};
use rustix::thread::UnshareFlags as Namespaces;

/// Rounds of each row.
const ROUNDS: usize = 200;
/// Host ids of the trial's namespace: apart from those of functions.
const BASE: u32 = 0x6FFC_0000;
/// Where the child builds its root: every machine has it, and the child's mounts are its own.
const PLACE: &CStr = c"/sys";

/// Steps in a child, in order.
const CHILD: [&str; 11] = [
    "mount namespace, all mounts private",
    "network namespace with lo and its addresses (ahead)",
    "uts, ipc and cgroup namespaces",
    "tree of /dev with bound devices (ahead)",
    "own devpts, shm, mqueue, proc, sys",
    "pivot_root, old root detached",
    "masked and read-only paths",
    "bounding set dropped",
    "no_new_privs",
    "system call filter compiled (ahead)",
    "system call filter installed",
];

/// Steps in the parent, in order.
const PARENT: [&str; 4] = [
    "user namespace with its map (ahead)",
    "control group made with its limits",
    "control group entered",
    "control group removed (after the end)",
];

fn main() {
    let layout = Layout::detect().expect("control groups are mounted");
    let name = format!("funtainer-defences-{}", std::process::id());
    let hierarchy = Hierarchy::open(&layout, &name).expect("a control group");
    let mut nest = hierarchy.nest("zygote-0", BASE).expect("a zygote's control group");
    let mut rows = vec![Vec::new(); CHILD.len() + PARENT.len()];
    for _ in 0..ROUNDS {
        for (row, time) in rows.iter_mut().zip(child().into_iter().chain(parent(&nest))) {
            row.push(time);
        }
    }
    nest.remove().expect("remove the zygote's control group");
    hierarchy.close().expect("remove the control group");
    println!("| step | p50 µs | p95 µs |\n|---|---|---|");
    for (name, row) in CHILD.iter().chain(&PARENT).zip(&mut rows) {
        row.sort_by(f64::total_cmp);
        let at = |part: usize| row[(row.len() - 1) * part / 100];
        println!("| {name} | {:.0} | {:.0} |", at(50), at(95));
    }
}

/// Microseconds that `step` takes.
fn timed<T>(step: impl FnOnce() -> T) -> (f64, T) {
    let start = Instant::now();
    let value = step();
    (start.elapsed().as_secs_f64() * 1e6, value)
}

/// Times of a fresh process.
fn child() -> [f64; CHILD.len()] {
    let (mut reader, mut writer) = std::io::pipe().expect("a pipe");
    // SAFETY: this program has one thread; the child ends below without returning.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid == 0 {
        let code = match steps() {
            Ok(times) => writer.write_all(&times.map(f64::to_ne_bytes).concat()).map_or(1, |()| 0),
            Err(error) => {
                eprintln!("{error}");
                1
            }
        };
        // SAFETY: ends the child without running anything of its parent's.
        unsafe { libc::_exit(code) }
    }
    drop(writer);
    let mut bytes = Vec::new();
    reader.read_to_end(&mut bytes).expect("read the times");
    let mut status = 0;
    // SAFETY: a child of this process, and a place for its status.
    let reaped = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert!(reaped == pid && status == 0, "the child ended with {status}");
    let mut times = [0.0; CHILD.len()];
    for (time, bytes) in times.iter_mut().zip(bytes.chunks_exact(8)) {
        *time = f64::from_ne_bytes(bytes.try_into().expect("eight bytes"));
    }
    times
}

fn steps() -> Result<[f64; CHILD.len()], StepError> {
    let unshare = |flags| {
        // SAFETY: new namespaces concern this process alone, which has one thread; no descriptor or memory is touched.
        unsafe { rustix::thread::unshare_unsafe(flags) }.map_err(|errno| StepError { step: "unshare", errno })
    };
    let open = |path: &CStr| {
        rustix::fs::open(path, OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC, Mode::empty())
            .map_err(|errno| StepError { step: "open a directory", errno })
    };
    let mut times = [0.0; CHILD.len()];
    let mut results = Ok(());
    let mut next = 0;
    let mut step = |work: &mut dyn FnMut() -> Result<(), StepError>| {
        let (time, result) = timed(work);
        times[next] = time;
        next += 1;
        if results.is_ok() {
            results = result;
        }
    };
    step(&mut || unshare(Namespaces::NEWNS).and_then(|()| mount::make_private()));
    step(&mut || unshare(Namespaces::NEWNET).and_then(|()| netns::prepare().map(drop)));
    step(&mut || unshare(Namespaces::NEWUTS | Namespaces::NEWIPC | Namespaces::NEWCGROUP));
    // A root to pivot into, as an init finds it made by the keeper.
    let root = mount::tmpfs(&Tmpfs {
        size_bytes: 1 << 20,
        uid: 0,
        gid: 0,
        mode: 0o755,
        attributes: rustix::mount::MountAttrFlags::MOUNT_ATTR_NODEV,
    })?;
    let (proc, sys) = (mount::procfs()?, mount::sysfs()?);
    mount::attach(root.as_fd(), open(PLACE)?.as_fd())?;
    let root = open(PLACE)?;
    let places = [c"dev", c"proc", c"sys"].map(|name| mount::target(root.as_fd(), name));
    let [dev, _, _] = places;
    drop(dev?);
    step(&mut || mount::device_tree(c"/dev", c"/sys/dev"));
    step(&mut || {
        let shm = Tmpfs { size_bytes: 1 << 20, uid: 0, gid: 0, mode: 0o1777, attributes: INERT };
        for (name, made) in
            [(c"dev/pts", mount::devpts(BASE.into())), (c"dev/shm", mount::tmpfs(&shm)), (c"dev/mqueue", mount::mqueue())]
        {
            mount::attach(made?.as_fd(), mount::target(root.as_fd(), name)?.as_fd())?;
        }
        mount::attach(proc.as_fd(), mount::target(root.as_fd(), c"proc")?.as_fd())?;
        mount::attach(sys.as_fd(), mount::target(root.as_fd(), c"sys")?.as_fd())
    });
    step(&mut || mount::pivot(root.as_fd()));
    step(&mut mount::mask_all);
    step(&mut || userns::drop_bounding(userns::KEPT));
    step(&mut userns::no_new_privs);
    let mut filter = None;
    step(&mut || {
        filter = Some(Filter::compile(&DEFAULT));
        Ok(())
    });
    let filter = filter.expect("compiled above");
    step(&mut || filter.install());
    results.map(|()| times)
}

/// Times of what is done outside of the container.
fn parent(nest: &Nest) -> [f64; PARENT.len()] {
    let (namespace, made) = timed(|| userns::make(BASE));
    drop(made.expect("a user namespace"));
    let limits = GroupLimits { memory_bytes: 64 << 20, pids_max: 100, cpu_weight: CPU_WEIGHT_DEFAULT, cpu_milli: None };
    let (made_in, group) = timed(|| nest.create("trial", limits));
    let mut group = group.expect("a control group");
    let (mut reader, mut writer) = std::io::pipe().expect("a pipe");
    // SAFETY: as in `child`.
    let pid = unsafe { libc::fork() };
    assert!(pid >= 0, "fork: {}", std::io::Error::last_os_error());
    if pid == 0 {
        let (time, entered) = timed(|| attach_current(group.doors()));
        let told = writer.write_all(&time.to_ne_bytes());
        // SAFETY: ends the child without running anything of its parent's.
        unsafe { libc::_exit(i32::from(entered.is_err() || told.is_err())) }
    }
    drop(writer);
    let mut bytes = [0; 8];
    reader.read_exact(&mut bytes).expect("read the time");
    let mut status = 0;
    // SAFETY: a child of this process, and a place for its status.
    let reaped = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert!(reaped == pid && status == 0, "the child ended with {status}");
    let (removed, done) = timed(|| group.remove());
    done.expect("remove the group");
    [namespace, made_in, f64::from_ne_bytes(bytes), removed]
}

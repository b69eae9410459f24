//! What it costs a new process to be in its control groups, after 100 ms of quiet: from before the clone to the child's first step inside.
//!
//! `cargo run --release -p funtainer-sandbox --example attach_bench`; needs root. For each interface of this machine, v1 and v2: a child that
//! enters no group, one that enters by itself through the keeper's doors (v1 `tasks`, v2 `cgroup.procs`), on v1 one that enters by `cgroup.procs`,
//! on v2 one that is born in its group (`CLONE_INTO_CGROUP`).

use std::fs::File;
use std::io::Read as _;
use std::os::fd::{AsFd as _, AsRawFd as _, BorrowedFd, OwnedFd};
use std::time::Duration;

use funtainer_sandbox::cgroup::{
    CPU_WEIGHT_DEFAULT, GroupLimits, Hierarchy, InstanceCgroup, Layout, Nest, Removal, attach_current,
};
use rustix::time::{ClockId, clock_gettime};

/// Rounds of each row.
const ROUNDS: usize = 100;
/// The quiet before each.
const QUIET: Duration = Duration::from_millis(100);
/// `CLONE_INTO_CGROUP` of clone(2).
const INTO_CGROUP: u64 = 0x2_0000_0000;
const LIMITS: GroupLimits =
    GroupLimits { memory_bytes: 64 << 20, pids_max: 100, cpu_weight: CPU_WEIGHT_DEFAULT, cpu_milli: None };

/// How a child comes in.
enum Way {
    None,
    Doors,
    Procs(Vec<File>),
    Birth,
}

fn main() {
    let name = format!("funtainer-attach-{}", std::process::id());
    println!("| interface | way | p10 µs | p50 µs | p95 µs |\n|---|---|---|---|---|");
    let detected = Layout::detect().expect("control groups are mounted").settle(&name).layout;
    let unified = Layout::unified().ok().filter(|unified| *unified != detected);
    for layout in std::iter::once(detected).chain(unified) {
        let hierarchy = Hierarchy::open(&layout, &name).expect("a control group");
        let mut nest = hierarchy.nest("zygote-0", 0).expect("a zygote's group");
        let interface = match &layout {
            Layout::V1(_) => "v1",
            Layout::V2(_) if hierarchy.missing().is_empty() => "v2",
            Layout::V2(_) => "v2 without controllers",
        };
        for (what, way) in ways(&layout) {
            let mut times: Vec<f64> = (0..ROUNDS).map(|_| round(&nest, &layout, &name, way)).collect();
            times.sort_by(f64::total_cmp);
            let at = |part: usize| times[(times.len() - 1) * part / 100];
            println!("| {interface} | {what} | {:.0} | {:.0} | {:.0} |", at(10), at(50), at(95));
        }
        until_removed(|| nest.remove().expect("remove the zygote's group"));
        hierarchy.close().expect("remove the control group");
    }
}

/// The rows of an interface.
fn ways(layout: &Layout) -> Vec<(&'static str, &'static str)> {
    let mut ways = vec![("no group", "none"), ("enters by itself", "doors")];
    ways.push(match layout {
        Layout::V1(_) => ("enters by `cgroup.procs`", "procs"),
        Layout::V2(_) => ("born in it", "birth"),
    });
    ways
}

/// One child in a group of its own; microseconds.
fn round(nest: &Nest, layout: &Layout, name: &str, way: &str) -> f64 {
    let mut group = nest.create("trial", LIMITS).expect("a control group");
    let way = match way {
        "doors" => Way::Doors,
        "birth" => Way::Birth,
        "procs" => Way::Procs(procs(layout, name)),
        _ => Way::None,
    };
    std::thread::sleep(QUIET);
    let time = child(&group, &way);
    until_removed(|| group.remove().expect("remove the group"));
    time
}

/// The files of v1 that take the global lock.
fn procs(layout: &Layout, name: &str) -> Vec<File> {
    let Layout::V1(controllers) = layout else { return Vec::new() };
    let mut mounts: Vec<_> = controllers.iter().map(|controller| &controller.mount).collect();
    mounts.dedup();
    let open = |mount: &std::path::PathBuf| File::options().write(true).open(mount.join(name).join("trial/cgroup.procs"));
    mounts.into_iter().map(|mount| open(mount).expect("open cgroup.procs")).collect()
}

fn until_removed(mut remove: impl FnMut() -> Removal) {
    while remove() == Removal::Busy {
        std::thread::sleep(Duration::from_millis(1));
    }
}

fn now() -> i64 {
    let now = clock_gettime(ClockId::Monotonic);
    now.tv_sec * 1_000_000_000 + now.tv_nsec
}

fn child(group: &InstanceCgroup, way: &Way) -> f64 {
    let (mut reader, writer) = std::io::pipe().expect("a pipe");
    let doors: Vec<BorrowedFd<'_>> = match way {
        Way::None | Way::Birth => Vec::new(),
        Way::Doors => group.doors().collect(),
        Way::Procs(files) => files.iter().map(|file| file.as_fd()).collect(),
    };
    // struct clone_args of clone(2), third version: flags first, the exit signal fifth, the group last.
    let mut arguments = [0_u64; 11];
    arguments[4] = libc::SIGCHLD as u64;
    if let Way::Birth = way {
        arguments[0] = INTO_CGROUP;
        arguments[10] = group.birthplace().expect("a group of v2").as_raw_fd() as u64;
    }
    let begun = now();
    // SAFETY: the structure with its size; this program has one thread, and the child ends below without returning.
    let pid = unsafe { libc::syscall(libc::SYS_clone3, arguments.as_ptr(), size_of_val(&arguments)) } as i32;
    assert!(pid >= 0, "clone3: {}", std::io::Error::last_os_error());
    if pid == 0 {
        let entered = attach_current(doors);
        let took = now() - begun;
        let told = rustix::io::write(&writer, &took.to_ne_bytes());
        // SAFETY: ends the child without running anything of its parent's.
        unsafe { libc::_exit(i32::from(entered.is_err() || told.is_err())) }
    }
    drop(OwnedFd::from(writer));
    let mut bytes = [0; 8];
    reader.read_exact(&mut bytes).expect("read the time");
    let mut status = 0;
    // SAFETY: a child of this process, and a place for its status.
    let reaped = unsafe { libc::waitpid(pid, &raw mut status, 0) };
    assert!(reaped == pid && status == 0, "the child ended with {status}");
    i64::from_ne_bytes(bytes) as f64 / 1000.0
}

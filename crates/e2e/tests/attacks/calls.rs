//! System calls, files of the kernel, devices, sockets, and the init.

use anyhow::{Context, Result};
use funtainer_e2e::image::Tree;

use crate::{attack, get_through, hold, image, with_attacker};

const NAMESPACES: [&str; 8] = ["user", "mount", "net", "pid", "uts", "ipc", "cgroup", "time"];

const RESOURCE: &str = "CAP_SYS_RESOURCE, which root in a container may not have";
const DEVICES: &str = "a devices group that lets this root at disks";

#[test]
fn mounts_and_namespaces() -> Result<()> {
    let mut attacks = vec![
        attack("mount"),
        attack("mount-bind"),
        attack("remount-writable=/proc/sys"),
        attack("mount-setattr=/proc/sys"),
        attack("umount=/proc/keys"),
        attack("mount-new"),
        attack("open-tree"),
        attack("pivot-root"),
        attack("chroot"),
        attack("setns"),
        attack("sethostname"),
        attack("write=/proc/sys/user/max_user_namespaces").may_lack(RESOURCE),
    ];
    attacks.extend(NAMESPACES.iter().map(|kind| attack(format!("unshare={kind}"))));
    // A time namespace cannot be made by clone.
    attacks.extend(NAMESPACES[..7].iter().flat_map(|kind| [attack(format!("clone={kind}")), attack(format!("clone3={kind}"))]));
    attacks.push(attack("move-mount=/proc/sys"));
    with_attacker(|_, server| hold(server, &attacks))?;
    // Masks and a read-only /proc/sys as ours, held by nothing.
    let masks = "mount --bind /proc/sys /proc/sys; mount -o remount,bind,ro /proc/sys; mount --bind /dev/null /proc/keys";
    // Whatever is mounted before, the write comes after the remount has succeeded.
    get_through(masks, &attacks)
}

#[test]
fn parts_of_the_kernel() -> Result<()> {
    const MODULES: &str = "this kernel has no modules";
    let attacks = [
        attack("io-uring").may_lack("sysctl kernel.io_uring_disabled"),
        attack("bpf"),
        attack("add-key"),
        attack("keyctl"),
        attack("userfaultfd"),
        attack("perf").may_lack("no performance events"),
        attack("kexec").may_lack("no kexec in this kernel"),
        attack("module-file").may_lack(MODULES),
        attack("module").may_lack(MODULES),
        attack("module-removal").may_lack(MODULES),
        attack("reboot"),
        attack("swapon"),
        attack("settimeofday"),
        attack("clock-settime"),
        attack("acct"),
        attack("syslog"),
        attack("file-handle"),
        attack("iopl").may_lack("only on x86, and only where the kernel is built with it"),
        attack("ioperm").may_lack("only on x86, and only where the kernel is built with it"),
        attack("personality"),
        attack("terminal=type"),
        attack("terminal=discipline"),
        attack("terminal=console"),
        attack("terminal=paste"),
        attack("priority"),
        attack("real-time"),
        attack("spare-me").may_lack(RESOURCE),
        attack("more-files").may_lack(RESOURCE),
    ];
    with_attacker(|_, server| hold(server, &attacks))?;
    get_through("", &attacks)
}

#[test]
fn files_of_the_kernel() -> Result<()> {
    const ABSENT: &str = "this kernel does not have it";
    let attacks = [
        attack("write=/proc/sys/kernel/core_pattern"),
        attack("write=/proc/sys/kernel/modprobe").may_lack(ABSENT),
        attack("write=/proc/sys/vm/drop_caches"),
        attack("write=/proc/sys/net/ipv4/ip_forward"),
        attack("write=/proc/sys/kernel/ns_last_pid").may_lack(ABSENT),
        attack("write=/proc/sysrq-trigger").may_lack(ABSENT),
        attack("write=/proc/irq/default_smp_affinity"),
        attack("write=/sys/kernel/mm/transparent_hugepage/enabled").may_lack(ABSENT),
        attack("write=/sys/power/state").may_lack(ABSENT),
        attack("write=/sys/kernel/uevent_helper").may_lack(ABSENT),
        attack("read=/proc/keys"),
        attack("read=/proc/timer_list"),
        attack("read=/proc/interrupts"),
        attack("read=/proc/kcore").may_lack(ABSENT),
        attack("read=/proc/latency_stats").may_lack(ABSENT),
        attack("read=/proc/sched_debug").may_lack(ABSENT),
        attack("list=/proc/acpi").may_lack(ABSENT),
        attack("list=/proc/scsi").may_lack(ABSENT),
        attack("list=/sys/firmware"),
        attack("list=/sys/devices/virtual/powercap").may_lack(ABSENT),
        attack("list=/sys/fs/cgroup"),
        attack("read=/dev/mem").may_lack(ABSENT),
        attack("read=/dev/kmsg"),
        attack("exists=/dev/loop-control").may_lack(ABSENT),
        attack("exists=/dev/kvm").may_lack(ABSENT),
        attack("exists=/dev/fuse").may_lack(ABSENT),
        attack("exists=/dev/net/tun").may_lack(ABSENT),
    ];
    with_attacker(|_, server| hold(server, &attacks))?;
    get_through("", &attacks)
}

/// The disk that the host has in `/proc/partitions`: its node made inside, or brought along by the image.
#[test]
fn device_nodes() -> Result<()> {
    let partitions = std::fs::read_to_string("/proc/partitions")?;
    let disk = partitions.lines().skip(1).find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        Some((fields.first()?.parse::<u32>().ok()?, fields.get(1)?.parse::<u32>().ok()?, (*fields.get(3)?).to_owned()))
    });
    let (major, minor, name) = disk.context("this machine has no disk")?;
    // The disk, and the kernel's log.
    let made = [attack(format!("device=b:{major}:{minor}")).may_lack(DEVICES), attack("device=c:1:11").may_lack(DEVICES)];
    with_attacker(|_, server| {
        hold(server, &made)?;
        let nodes = Tree::new().directory("nodes", 0o755)?.device("nodes/disk", 0o666, major, minor)?;
        server.import(&image(nodes, &["/attacker"])?, "attacker:1")?;
        hold(server, &[attack("node=/nodes/disk")])
    })?;
    get_through("", &made)?;
    get_through("", &[attack(format!("node=/dev/{name}")).may_lack(DEVICES)])
}

#[test]
fn sockets_that_see_or_make_foreign_packets() -> Result<()> {
    const MODULE: &str = "this kernel does not have the family";
    let attacks = [
        // Raw: ICMP, ICMPv6, everything.
        attack("socket=2:3:1"),
        attack("socket=10:3:58").may_lack("no IPv6"),
        attack("socket=2:3:255"),
        // Packets of every kind, by both types.
        attack("socket=17:3:768"),
        attack("socket=17:2:768"),
        attack("interface-down"),
        // AF_KEY, AF_CAN, AF_TIPC, AF_ALG, AF_VSOCK, AF_XDP, AF_BLUETOOTH, AF_RDS, AF_NFC.
        attack("socket=15:3:2").may_lack(MODULE),
        attack("socket=29:3:1").may_lack(MODULE),
        attack("socket=30:4:0").may_lack(MODULE),
        attack("socket=38:5:0").may_lack(MODULE),
        attack("socket=40:1:0").may_lack(MODULE),
        attack("socket=44:3:0").may_lack(MODULE),
        attack("socket=31:3:1").may_lack(MODULE),
        attack("socket=21:5:0").may_lack(MODULE),
        attack("socket=39:5:0").may_lack(MODULE),
    ];
    with_attacker(|_, server| hold(server, &attacks))?;
    get_through("ip link set lo up", &attacks)
}

/// The init is pid 1 inside; the control's pid 1 is a shell.
#[test]
fn the_init_and_the_hosts_processes() -> Result<()> {
    let attacks = [
        attack("trace=1"),
        attack("take-descriptor=1"),
        attack("read=/proc/1/exe"),
        attack("read=/proc/1/mem").may_lack("an address that is mapped"),
        attack("read=/proc/1/maps"),
        attack("read=/proc/1/environ"),
        attack("read=/proc/1/auxv"),
        attack("list=/proc/1/fd"),
        attack("list=/proc/1/map_files"),
        attack("list=/proc/1/root/"),
        attack("list=/proc/1/cwd/"),
        attack("write=/proc/1/mem"),
        attack("write=/proc/1/oom_score_adj"),
    ];
    let host = format!("signal={}", std::process::id());
    with_attacker(|_, server| {
        hold(server, &attacks)?;
        hold(server, &[attack(&host), attack("many-processes")])
    })?;
    get_through("", &attacks)?;
    let outcomes =
        crate::outside(&mut std::process::Command::new(crate::ATTACKER), &[attack(&host), attack("many-processes")])?;
    crate::check_control(&outcomes, &[attack(&host), attack("many-processes")])
}

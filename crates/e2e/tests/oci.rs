//! The container as the OCI runtime specification wants it, looked at by the specification's own test program.
//!
//! `runtimetest` of OCI runtime-tools compares what it finds with a `config.json`. There is none here, where an image is all that is given: the
//! one below says in those words what this project promises. What concerns a runtime's own settings (hooks, bind mounts, id maps of the
//! caller's choice, labels) has no counterpart.

use std::path::Path;

use anyhow::{Context, Result, ensure};
use funtainer_e2e::image::{Compression, Config, Image, Tree, program};
use funtainer_e2e::world::scenario;
use serde_json::{Value, json};

/// Docker's default less NET_RAW, MKNOD, AUDIT_WRITE, SYS_CHROOT.
const CAPABILITIES: [&str; 10] = [
    "CAP_CHOWN",
    "CAP_DAC_OVERRIDE",
    "CAP_FOWNER",
    "CAP_FSETID",
    "CAP_KILL",
    "CAP_SETGID",
    "CAP_SETUID",
    "CAP_SETPCAP",
    "CAP_NET_BIND_SERVICE",
    "CAP_SETFCAP",
];
const MASKED: [&str; 12] = [
    "/proc/asound",
    "/proc/acpi",
    "/proc/interrupts",
    "/proc/kcore",
    "/proc/keys",
    "/proc/latency_stats",
    "/proc/timer_list",
    "/proc/timer_stats",
    "/proc/sched_debug",
    "/proc/scsi",
    "/sys/firmware",
    "/sys/devices/virtual/powercap",
];
const READ_ONLY: [&str; 5] = ["/proc/bus", "/proc/fs", "/proc/irq", "/proc/sys", "/proc/sysrq-trigger"];
/// Major and minor number of the devices that are promised.
const DEVICES: [(&str, u32, u32); 6] = [
    ("/dev/null", 1, 3),
    ("/dev/zero", 1, 5),
    ("/dev/full", 1, 7),
    ("/dev/random", 1, 8),
    ("/dev/urandom", 1, 9),
    ("/dev/tty", 5, 0),
];
const OPEN_FILES: u32 = 4096;

/// What is promised to a function called `oci` that runs as root, or as user 1000 of group 1000 and, by the image's files, of group 44.
fn promised(root: bool, read_only: bool) -> Value {
    let (id, groups) = if root { (0, vec![]) } else { (1000, vec![44]) };
    // An ordinary user's process has none, but may still get what the bounding set holds.
    let held = if root { &CAPABILITIES[..] } else { &[] };
    let present = |paths: &[&'static str]| paths.iter().copied().filter(|path| Path::new(path).exists()).collect::<Vec<_>>();
    let devices = DEVICES.map(|(path, major, minor)| json!({"type": "c", "path": path, "major": major, "minor": minor}));
    json!({
        "ociVersion": "1.0.2",
        "hostname": "oci",
        "root": {"path": "rootfs", "readonly": read_only},
        "process": {
            "user": {"uid": id, "gid": id, "additionalGids": groups},
            "args": ["/runtimetest", "--path", "/"],
            "env": ["PATH=/bin", "GREETING=hello"],
            "cwd": "/work",
            "capabilities": {
                "bounding": CAPABILITIES, "effective": held, "permitted": held, "inheritable": [], "ambient": [],
            },
            "rlimits": [
                {"type": "RLIMIT_NOFILE", "soft": OPEN_FILES, "hard": OPEN_FILES},
                {"type": "RLIMIT_CORE", "soft": 1, "hard": 1},
            ],
            "noNewPrivileges": true,
            "oomScoreAdj": 0,
        },
        "mounts": [
            {"destination": "/dev", "type": "tmpfs"},
            {"destination": "/dev/pts", "type": "devpts"},
            {"destination": "/dev/shm", "type": "tmpfs"},
            {"destination": "/dev/mqueue", "type": "mqueue"},
            {"destination": "/proc", "type": "proc"},
            {"destination": "/sys", "type": "sysfs"},
        ],
        "linux": {
            "devices": devices,
            "maskedPaths": MASKED,
            "readonlyPaths": present(&READ_ONLY),
            "sysctl": {"net.ipv4.ip_unprivileged_port_start": "0"},
            "namespaces": [
                {"type": "pid"}, {"type": "network"}, {"type": "ipc"}, {"type": "uts"}, {"type": "mount"}, {"type": "user"},
                {"type": "cgroup"},
            ],
        },
    })
}

#[test]
fn the_container_is_what_the_specification_calls_one() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        for (root, read_only) in [(true, false), (false, false), (true, true)] {
            let tree = Tree::new()
                .host_file("runtimetest", &program::runtimetest()?)?
                .file("config.json", 0o644, promised(root, read_only).to_string().as_bytes())?
                .directory("work", 0o755)?
                .directory("etc", 0o755)?
                .file("etc/passwd", 0o644, b"root:x:0:0::/:/none\nsomeone:x:1000:1000::/:/none\n")?
                .file("etc/group", 0o644, b"root:x:0:\nsomeone:x:1000:\nvideo:x:44:someone\n")?;
            let config = Config {
                env: vec!["PATH=/bin".to_owned(), "GREETING=hello".to_owned()],
                user: if root { String::new() } else { "someone".to_owned() },
                working_dir: "/work".to_owned(),
                ..Config::command(&["/runtimetest", "--path", "/"])
            };
            let image = Image::build(vec![tree.layer(Compression::Plain)?], &config)?;
            let open_files = OPEN_FILES.to_string();
            let mut flags = vec!["--contract", "stdio", "--open-files", &open_files];
            if read_only {
                flags.push("--read-only");
            }
            server.deploy("oci", &image, &flags)?;
            let said = server.call("POST", "/function/oci", &[], b"")?.expect(200)?.text();
            check(&said).with_context(|| format!("root {root}, read-only {read_only}:\n{said}"))?;
        }
        Ok(())
    })
}

/// Reads the Test Anything Protocol: `ok 7 - DESCRIPTION`, `not ok 8 - DESCRIPTION`, `ok 9 # SKIP REASON`, and a plan at the end.
fn check(said: &str) -> Result<()> {
    let failed: Vec<_> = said.lines().filter(|line| line.starts_with("not ok")).collect();
    ensure!(failed.is_empty(), "{failed:#?}");
    let passed = said.lines().filter(|line| line.starts_with("ok ") && !line.contains("# SKIP")).count();
    ensure!(passed > 60, "only {passed} checks were made");
    ensure!(said.lines().any(|line| line.starts_with("1..")), "it has not come to its end");
    Ok(())
}

//! The guest's Debian: root file system, kernel and modules, made by mmdebstrap and kept.

use std::fmt::Write as _;
use std::fs::{self, File};
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::{Command, Stdio};
use std::time::Instant;

use anyhow::{Context, Result, ensure};

use super::archive::Archive;

/// What the tests use, and what a small Debian server has.
const PACKAGES: [&str; 16] = [
    "attr",
    "busybox-static",
    "dbus",
    "dbus-user-session",
    "erofs-utils",
    "iproute2",
    "iptables",
    "kmod",
    "libpam-systemd",
    "nftables",
    "passt",
    "slirp4netns",
    "systemd",
    "systemd-sysv",
    "udev",
    "uidmap",
];

/// Nobody reads manuals in the guest.
const LEFT_OUT: [&str; 4] = ["/usr/share/doc/*", "/usr/share/man/*", "/usr/share/locale/*", "/usr/share/info/*"];

/// Size of the disk, of which the holes take no space: its files are about 0.6 GiB, and tests write to it.
const DISK: &str = "3G";

const COMPLETE: &str = include_str!("root.sh");
const INIT: &str = include_str!("init.sh");

/// Drivers that the first program loads before it can see a disk, in this order.
const DRIVERS: [&str; 7] = [
    "drivers/virtio/virtio_ring.ko",
    "drivers/virtio/virtio.ko",
    "drivers/virtio/virtio_pci_legacy_dev.ko",
    "drivers/virtio/virtio_pci_modern_dev.ko",
    "drivers/virtio/virtio_pci.ko",
    "drivers/block/virtio_blk.ko",
    "drivers/char/virtio_console.ko",
];

/// Files that a guest boots from; nothing writes to them.
pub(super) struct System(PathBuf);

impl System {
    /// The compressed kernel.
    pub(super) fn kernel(&self) -> PathBuf {
        self.0.join("vmlinuz")
    }

    /// The disk with the root file system.
    pub(super) fn disk(&self) -> PathBuf {
        self.0.join("root.ext4")
    }

    /// What the kernel unpacks into memory and starts first: a program that finds the disks, with what it needs.
    pub(super) fn initial(&self) -> Result<Vec<u8>> {
        let mut archive = Archive::new();
        for directory in ["bin", "dev", "proc", "sys", "root", "modules"] {
            archive.directory(directory);
        }
        archive.program("init", INIT.as_bytes());
        archive.program("bin/busybox", &read(&self.0.join("busybox"))?);
        let mut order = String::new();
        for driver in DRIVERS.map(file_name) {
            archive.program(&format!("modules/{driver}"), &read(&self.0.join(driver))?);
            writeln!(order, "{driver}")?;
        }
        archive.program("modules/order", order.as_bytes());
        Ok(archive.finish())
    }
}

/// Makes the system in `target/vm`, unless it is there already from the same recipe. Needs the internet (or a mirror) for that.
pub(super) fn ready(directory: &Path) -> Result<System> {
    let lock = File::create(directory.join("system.lock"))?;
    lock.lock().context("cannot lock the guest's system")?;
    let system = System(directory.join("system"));
    let home = &system.0;
    let recipe = format!("{PACKAGES:?}\n{LEFT_OUT:?}\n{DISK}\n{DRIVERS:?}\n{COMPLETE}");
    let record = home.join("recipe");
    if fs::read_to_string(&record).is_ok_and(|known| known == recipe) {
        return Ok(system);
    }
    eprintln!("making the guest's Debian 12 with mmdebstrap, once, in {}", home.display());
    let start = Instant::now();
    if home.exists() {
        fs::remove_dir_all(home)?;
    }
    fs::create_dir(home)?;
    make(&system).context("cannot make the guest's system")?;
    fs::write(record, recipe)?;
    eprintln!("made after {:.1} s", start.elapsed().as_secs_f64());
    Ok(system)
}

fn make(system: &System) -> Result<()> {
    let home = &system.0;
    let script = home.join("complete");
    fs::write(&script, COMPLETE)?;
    fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
    let root = home.join("root");
    let mut command = Command::new("mmdebstrap");
    command.args(["--quiet", "--variant=minbase"]).arg(format!("--include={}", PACKAGES.join(",")));
    command.args(LEFT_OUT.map(|path| format!("--dpkgopt=path-exclude={path}")));
    command.arg(format!("--customize-hook={}", script.display())).arg("bookworm").arg(&root);
    succeed(&mut command)?;
    let release = read(&root.join("boot/release")).context("no kernel was unpacked")?;
    let release = String::from_utf8(release)?;
    let release = release.trim();
    let copy = |from: String, to: &Path| {
        fs::copy(root.join(&from), to).with_context(|| format!("cannot copy {from} out of the root file system"))
    };
    copy(format!("boot/vmlinuz-{release}"), &system.kernel())?;
    copy("bin/busybox".to_owned(), &home.join("busybox"))?;
    for driver in DRIVERS {
        copy(format!("lib/modules/{release}/kernel/{driver}"), &home.join(file_name(driver)))?;
    }
    let mut command = Command::new("mke2fs");
    command.args(["-q", "-t", "ext4", "-L", "root", "-m", "0", "-E", "lazy_itable_init=1,root_owner=0:0", "-d"]);
    succeed(command.arg(&root).arg(system.disk()).arg(DISK))?;
    fs::remove_dir_all(root)?;
    Ok(())
}

fn file_name(path: &str) -> &str {
    path.rsplit('/').next().unwrap_or(path)
}

fn read(path: &Path) -> Result<Vec<u8>> {
    fs::read(path).with_context(|| format!("cannot read {}", path.display()))
}

/// Runs a tool that says nothing when all is well.
pub(super) fn succeed(command: &mut Command) -> Result<()> {
    let name = command.get_program().display().to_string();
    let status = command.stdin(Stdio::null()).stdout(Stdio::null()).status().with_context(|| format!("cannot start {name}"))?;
    ensure!(status.success(), "{name}: {status}");
    Ok(())
}

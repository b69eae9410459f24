//! Debian packages that the demo, the tests and the benchmark use. Installing one never starts a service.

use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::{Command, Stdio};

use anyhow::{Context, Result, ensure};

/// A program and the package that has it.
pub(crate) struct Tool {
    program: &'static str,
    package: &'static str,
}

const fn tool(program: &'static str, package: &'static str) -> Tool {
    Tool { program, package }
}

/// For `demo`.
pub(crate) const DEMO: &[Tool] = &[
    tool("docker-registry", "docker-registry"),
    tool("skopeo", "skopeo"),
    tool("/bin/busybox", "busybox-static"),
    tool("newuidmap", "uidmap"),
    tool("setpriv", "util-linux"),
];

/// For `image`.
pub(crate) const IMAGE: &[Tool] = &[tool("/bin/busybox", "busybox-static")];

/// For `image` with one of Debian's packages.
pub(crate) const DEBIAN_IMAGE: &[Tool] = &[tool("mmdebstrap", "mmdebstrap"), tool("/bin/busybox", "busybox-static")];

/// For `test`.
pub(crate) const TEST: &[Tool] = &[
    tool("docker-registry", "docker-registry"),
    tool("skopeo", "skopeo"),
    tool("/bin/busybox", "busybox-static"),
    tool("umoci", "umoci"),
    tool("mmdebstrap", "mmdebstrap"),
    tool("fsck.erofs", "erofs-utils"),
    tool("setfattr", "attr"),
    tool("unshare", "util-linux"),
    tool("newuidmap", "uidmap"),
    tool("pasta", "passt"),
    tool("slirp4netns", "slirp4netns"),
    tool("ip", "iproute2"),
    tool("nft", "nftables"),
    tool("iptables", "iptables"),
    tool("runc", "runc"),
    tool("nginx", "nginx-light"),
    tool("wrk", "wrk"),
    // libseccomp's own compiler, and Docker's profile for it (a Go module).
    tool("/usr/share/doc/python3-seccomp", "python3-seccomp"),
    tool("go", "golang-go"),
];

/// For `vm`.
pub(crate) const VM: &[Tool] = &[
    tool("qemu-system-x86_64", "qemu-system-x86"),
    tool("mmdebstrap", "mmdebstrap"),
    tool("/usr/share/keyrings/debian-archive-keyring.gpg", "debian-archive-keyring"),
    tool("mke2fs", "e2fsprogs"),
    tool("setpriv", "util-linux"),
];

/// For `bench`.
pub(crate) const BENCH: &[Tool] = &[
    tool("/bin/busybox", "busybox-static"),
    tool("runc", "runc"),
    tool("nginx", "nginx-light"),
    tool("wrk", "wrk"),
    tool("newuidmap", "uidmap"),
    tool("setpriv", "util-linux"),
    tool("pasta", "passt"),
];

/// Debian asks this program before it starts a service (invoke-rc.d(8)).
const POLICY: &str = "/usr/sbin/policy-rc.d";
/// Exit code 101: no action is allowed.
const POLICY_TEXT: &str = "#!/bin/sh\nexit 101\n";

fn missing(tools: &[Tool]) -> Vec<&'static str> {
    tools.iter().filter(|tool| !is_there(tool.program)).map(|tool| tool.package).collect()
}

/// As [`install`]; for an ordinary user it is sudo that installs, if that was asked for, and else it is told what is to be installed.
pub(crate) fn provide(tools: &[Tool], sudo: bool) -> Result<()> {
    let missing = missing(tools);
    if missing.is_empty() || rustix::process::geteuid().is_root() {
        return install(tools);
    }
    let words = ["apt-get", "install", "--yes", "--no-install-recommends"];
    ensure!(sudo, "{0} missing: as root, `{1} {2}`", missing.join(", "), words.join(" "), missing.join(" "));
    eprintln!("sudo {} {}", words.join(" "), missing.join(" "));
    let status = Command::new("sudo").args(words).args(&missing).status().context("cannot start sudo")?;
    ensure!(status.success(), "apt-get install {} failed with {status}", missing.join(" "));
    Ok(())
}

/// Installs the packages whose programs are missing.
pub(crate) fn install(tools: &[Tool]) -> Result<()> {
    let missing = missing(tools);
    if missing.is_empty() {
        return Ok(());
    }
    ensure!(
        is_there("apt-get"),
        "{} missing, and there is no apt-get to install them: install them by the means of this system",
        missing.join(", ")
    );
    eprintln!("installing {} (no service is started)", missing.join(", "));
    let _policy = Policy::forbid()?;
    if apt(&["install"], &missing).is_err() {
        apt(&["update"], &[])?;
        apt(&["install"], &missing)?;
    }
    let absent: Vec<_> = tools.iter().filter(|tool| !is_there(tool.program)).map(|tool| tool.program).collect();
    ensure!(absent.is_empty(), "installed, but still not found: {}", absent.join(", "));
    Ok(())
}

/// Whether a program is in the path (or, with a slash, at its place).
pub(crate) fn is_there(program: &str) -> bool {
    if program.contains('/') {
        return Path::new(program).exists();
    }
    let path = std::env::var_os("PATH").unwrap_or_default();
    // Debian's system programs are out of the path of some shells.
    let more = ["/usr/sbin", "/sbin"].map(Into::into);
    std::env::split_paths(&path).chain(more).any(|directory| directory.join(program).is_file())
}

fn apt(command: &[&str], packages: &[&str]) -> Result<()> {
    let status = Command::new("apt-get")
        .args(["--quiet", "--quiet", "--yes", "--no-install-recommends", "-o", "Dpkg::Use-Pty=0"])
        .args(command)
        .args(packages)
        .env("DEBIAN_FRONTEND", "noninteractive")
        .env("RUNLEVEL", "1")
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .status()
        .context("cannot start apt-get")?;
    ensure!(status.success(), "apt-get {} {} failed with {status}", command.join(" "), packages.join(" "));
    Ok(())
}

/// Forbids services to start while packages are installed. A policy that the machine has already is left as it is.
struct Policy {
    made: bool,
}

impl Policy {
    fn forbid() -> Result<Self> {
        let made = !Path::new(POLICY).exists();
        if made {
            fs::write(POLICY, POLICY_TEXT)
                .with_context(|| format!("cannot write {POLICY}: root is needed to install packages"))?;
            fs::set_permissions(POLICY, fs::Permissions::from_mode(0o755))?;
        }
        Ok(Self { made })
    }
}

impl Drop for Policy {
    fn drop(&mut self) {
        if self.made && fs::remove_file(POLICY).is_err() {
            eprintln!("warning: {POLICY} cannot be removed and keeps services from starting");
        }
    }
}

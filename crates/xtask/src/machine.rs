//! What the machine must offer before a container can be started on it.

use std::os::unix::fs::MetadataExt as _;

use anyhow::{Context, Result, ensure};

/// The oldest kernel that the sandbox is tested on.
const KERNEL_MIN: (u32, u32) = (6, 1);

pub(crate) fn is_root() -> bool {
    rustix::process::geteuid().is_root()
}

/// Refuses in one line what would fail later in many.
pub(crate) fn can_run_containers() -> Result<()> {
    ensure!(is_root(), "root is needed to start containers: run it as root, or in a virtual machine where you are root");
    has_kernel()
}

/// Refuses what would leave files of root in a user's tree.
pub(crate) fn builds_in_own_tree() -> Result<()> {
    let Some(user) = std::env::var_os("SUDO_UID").and_then(|id| id.to_str()?.parse::<u32>().ok()).filter(|id| *id != 0) else {
        return Ok(());
    };
    let owner = std::fs::metadata(env!("CARGO_MANIFEST_DIR")).map(|found| found.uid());
    ensure!(
        owner.is_ok_and(|owner| owner != user),
        "root would build in your tree: run `cargo xtask demo` without sudo for a server of your own, or `cargo xtask demo --sudo`, which \
         raises only `funtainer serve`"
    );
    Ok(())
}

/// Refuses a kernel that is too old for any of it.
pub(crate) fn has_kernel() -> Result<()> {
    let name = rustix::system::uname();
    let release = name.release().to_string_lossy();
    check_kernel(&release)
}

fn check_kernel(release: &str) -> Result<()> {
    let version =
        parse_release(release).with_context(|| format!("the kernel calls itself '{release}', which is no version"))?;
    let (major, minor) = KERNEL_MIN;
    ensure!(version >= KERNEL_MIN, "Linux {major}.{minor} or later is needed, and this is {release}");
    Ok(())
}

fn parse_release(release: &str) -> Option<(u32, u32)> {
    let mut numbers = release.split(|c: char| !c.is_ascii_digit());
    Some((numbers.next()?.parse().ok()?, numbers.next()?.parse().ok()?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn kernels_are_told_apart() {
        for good in ["6.1.0-28-cloud-amd64", "6.18.44", "7.0-rc1", "10.1"] {
            assert!(check_kernel(good).is_ok(), "{good}");
        }
        for bad in ["6.0.9", "5.15", "six"] {
            assert!(check_kernel(bad).is_err(), "{bad}");
        }
    }
}

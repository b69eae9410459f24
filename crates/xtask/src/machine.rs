//! What the machine must offer before a container can be started on it.

use anyhow::{Context, Result, ensure};

/// The oldest kernel that the sandbox is tested on.
const KERNEL_MIN: (u32, u32) = (6, 1);

/// Refuses in one line what would fail later in many.
pub(crate) fn can_run_containers() -> Result<()> {
    ensure!(
        rustix::process::geteuid().is_root(),
        "root is needed to start containers: run it as root, or in a virtual machine where you are root"
    );
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

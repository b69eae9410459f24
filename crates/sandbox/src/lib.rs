//! The keeper, zygotes and instances: the side of funtainer that has privilege.
//!
//! The keeper is what `funtainer serve` runs; it forks a zygote per revision, which forks an init per instance. The daemon speaks to
//! the keeper by [`protocol`] and nothing else. The other modules are the parts that these are made of.

pub mod cgroup;
pub mod fds;
pub mod mount;
pub mod netns;
pub mod protocol;
pub mod seccomp;
pub mod step;
pub mod title;
pub mod userns;

#[cfg(test)]
mod testing;

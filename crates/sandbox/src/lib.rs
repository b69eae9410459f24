//! The keeper, zygotes and instances: the side of funtainer that has privilege.
//!
//! [`keeper`] is what `funtainer serve` runs; it forks a zygote per revision (`zygote`), which forks an init per instance (`init`). The
//! daemon speaks to the keeper by [`protocol`] and nothing else, on descriptors that it takes over by [`daemon`]. The other modules are the
//! parts that these are made of.

pub mod cgroup;
mod clone;
pub mod daemon;
pub mod doctor;
mod exec;
mod executable;
pub mod fds;
mod init;
pub mod keeper;
pub mod mount;
pub mod net;
pub mod netns;
mod orders;
mod program;
pub mod protocol;
mod rootless;
pub mod seccomp;
mod signals;
pub mod step;
mod terminal;
#[cfg(test)]
mod testing;
pub mod title;
pub mod unpacker;
mod uplink;
pub mod userns;
mod zygote;

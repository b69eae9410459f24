//! Placeholder.

pub mod cgroup;
pub mod fds;
pub mod mount;
pub mod netns;
pub mod seccomp;
pub mod step;
pub mod title;
pub mod userns;

#[cfg(test)]
mod testing;

//! Layers against the real world: what GNU tar unpacks, what the kernel mounts, what fsck.erofs accepts, and what
//! hostile archives try.

mod derived;
mod hostile;
mod make;
mod mounted;
mod overlay;
mod snapshot;
mod torture;
mod unpack;
mod written;

//! The funtainer executable.
fn main() {}

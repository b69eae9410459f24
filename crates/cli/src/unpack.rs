//! `unpack`: fills or removes a layer's directory, started by the keeper of an ordinary user's server, in a root that is the directory of unpacked
//! layers. See `funtainer_sandbox::unpacker`, and `funtainer_image::erofs` for what it writes.

use std::fs::File;
use std::io::Write as _;
use std::os::fd::AsFd as _;
use std::process::ExitCode;

use anyhow::Context as _;
use funtainer_image::erofs::{self, UnpackError};
use funtainer_sandbox::unpacker::take_layer;
use rustix::io::Errno;

use crate::args::Unpack;

/// Does it; what went wrong is one line on standard error, an error number (errno(3)) before it.
pub(crate) fn unpack(unpack: &Unpack) -> ExitCode {
    // Executed by a descriptor, it would bear the number of that in process lists. The name is for people alone.
    let _ = rustix::thread::set_name(c"funtainer");
    match work(unpack) {
        Ok(()) => ExitCode::SUCCESS,
        Err(error) => {
            let errno = error.downcast_ref::<UnpackError>().and_then(UnpackError::errno);
            // Nobody else reads it.
            let _ = writeln!(std::io::stderr(), "{} {error:#}", errno.unwrap_or(Errno::IO.raw_os_error()));
            ExitCode::FAILURE
        }
    }
}

fn work(unpack: &Unpack) -> anyhow::Result<()> {
    let layer = unpack.name.as_ref().map(|_| take_layer()).transpose().context("no layer was handed over")?;
    let root = File::open("/").context("open the directory of unpacked layers")?;
    match (&unpack.name, layer, &unpack.remove) {
        (Some(name), Some(layer), _) => {
            erofs::unpack(layer.into(), root.as_fd(), name, unpack.ids)?;
        }
        (_, _, Some(name)) => erofs::remove(root.as_fd(), name)?,
        _ => anyhow::bail!("nothing to do"),
    }
    Ok(())
}

//! A keeper with a daemon that does nothing by itself: it hands its socket to the keeper to whoever connects to the admin socket. For the
//! tests of this crate and its benchmark, which play the daemon.
//!
//! `keeper_host serve ADMIN DATA` is the keeper; `keeper_host daemon --listeners N` is what it executes. With `KEEPER_HOST_OLDEST` set it mounts
//! in the ways of the oldest kernels.

use std::error::Error;
use std::io::{Read as _, Write as _};
use std::os::fd::AsFd as _;
use std::os::unix::net::UnixListener;
use std::process::ExitCode;

use funtainer_sandbox::daemon::{confine, take_inherited_fds};
use funtainer_sandbox::fds;
use funtainer_sandbox::keeper::{KeeperSettings, NetworkSettings, run};
use funtainer_sandbox::mount::Features;
use rustix::net::SendFlags;

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    let result = match arguments[..] {
        [_, "serve", admin, data] => serve(admin, data),
        [_, "daemon", "--listeners", count] => daemon(count),
        _ => Err("usage: keeper_host serve ADMIN DATA".into()),
    };
    result.unwrap_or_else(|error| {
        eprintln!("keeper_host: {error}");
        ExitCode::FAILURE
    })
}

fn serve(admin: &str, data: &str) -> Result<ExitCode, Box<dyn Error>> {
    let mounts = if std::env::var_os("KEEPER_HOST_OLDEST").is_some() { Features::OLDEST } else { Features::NEWEST };
    let ended = run(KeeperSettings {
        listen: Some("127.0.0.1:0".parse()?),
        admin: admin.into(),
        data: data.into(),
        daemon: vec!["keeper_host".into(), "daemon".into()],
        unpack: vec!["keeper_host".into(), "unpack".into()],
        mounts,
        // Only tests that have a network namespace of their own ask for it: the host's is not theirs to change.
        network: NetworkSettings { on: std::env::var_os("KEEPER_HOST_NETWORK").is_some(), ..NetworkSettings::default() },
        announce: |address| {
            println!("listening on http://{}", address.expect("it was asked for"));
            // A closed pipe is the reader's affair.
            let _ = std::io::stdout().flush();
        },
        log: |text| eprintln!("keeper: {text}"),
    })?;
    Ok(ExitCode::from(ended.exit_code()))
}

/// Lends the control socket to one client after the other; a client that sends a byte ends this process with that byte as code.
fn daemon(listeners: &str) -> Result<ExitCode, Box<dyn Error>> {
    let inherited = take_inherited_fds(listeners.parse()?)?;
    confine()?;
    if let Some(code) = std::env::var_os("KEEPER_HOST_DIES") {
        return Ok(ExitCode::from(code.to_str().unwrap_or("1").parse::<u8>()?));
    }
    let listener = UnixListener::from(inherited.admin);
    listener.set_nonblocking(false)?;
    loop {
        let (mut client, _) = listener.accept()?;
        fds::send(client.as_fd(), b"c", &[inherited.control.as_fd()], SendFlags::empty())?;
        let mut code = [0];
        if client.read(&mut code)? == 1 {
            return Ok(ExitCode::from(code[0]));
        }
    }
}

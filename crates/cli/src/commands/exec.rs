//! `exec`: a command in a running instance, with this process's standard streams.

use std::process::ExitCode;

use funtainer_gateway::api::exec::PROTOCOL;
use funtainer_gateway::api::native::ExecRequest;
use http::Method;

use super::session::{self, Streams};
use crate::args::{Exec, Host};
use crate::progress::Show;
use crate::{client, terminal};

pub(super) async fn exec(host: &Host, exec: Exec) -> anyhow::Result<ExitCode> {
    let streams = Streams { input: exec.interactive, terminal: exec.tty };
    streams.check()?;
    let path = format!("/functions/{}/exec", client::segment(&exec.name));
    let request = ExecRequest {
        command: exec.command,
        env: super::variables(&exec.env),
        working_dir: exec.workdir,
        user: exec.user,
        instance: exec.instance,
        start: exec.start,
        terminal: exec.tty.then(terminal::size),
    };
    let request = client::request(Method::POST, &path, Some(&request))?;
    session::hold(host, request, PROTOCOL, streams, Show::Quiet).await
}

//! `run`: one command, once, with this process's standard streams; through the server, or through one of its own where none answers.

use std::process::ExitCode;

use funtainer_gateway::api::native::RunRequest;
use funtainer_gateway::api::run::PROTOCOL;
use http::Method;

use super::private::Private;
use super::session::{self, Streams};
use crate::args::{Host, Run};
use crate::progress::Show;
use crate::{client, terminal};

pub(super) async fn run(host: &Host, run: Run) -> anyhow::Result<ExitCode> {
    let streams = Streams { input: true, terminal: run.tty };
    streams.check()?;
    let request = RunRequest {
        image: run.image,
        args: (!run.args.is_empty()).then_some(run.args),
        env: super::variables(&run.env),
        memory: run.container.memory.map(|memory| memory.to_string()),
        container: super::container(run.container),
        terminal: run.tty.then(terminal::size),
    };
    let request = client::request(Method::POST, "/run", Some(&request))?;
    let show = Show::only_live(run.quiet);
    let Some(unanswered) = client::answers(host).await? else {
        return session::hold(host, request, PROTOCOL, streams, show).await;
    };
    let private = Private::start(unanswered, &run.data.map_or_else(crate::places::data, Ok)?).await?;
    let code = session::hold(private.host(), request, PROTOCOL, streams, show).await;
    private.stop().await;
    code
}

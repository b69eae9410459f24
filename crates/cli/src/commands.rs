//! The commands that ask a server.

mod doctor;
mod exec;
mod image;
mod invoke;
mod private;
mod run;
mod session;

use std::collections::BTreeMap;
use std::process::ExitCode;

use funtainer_gateway::api::native::{ContainerSettings, DeployRequest, Function, Image, LogsQuery, ScaleRequest, Version};
use funtainer_model::EnvVar;
use http::Method;
use http_body_util::BodyExt;

use crate::args::{Command, Container, ContractArg, Deploy, Host, Logs, Output};
use crate::progress::{Show, size};
use crate::{client, streams};

pub(crate) use doctor::doctor;
pub(crate) use session::exit_of;

/// What a request without body has for one.
const NO_BODY: Option<&()> = None;

/// Does what was said.
pub(crate) async fn run(host: &Host, form: Output, command: Command) -> anyhow::Result<ExitCode> {
    match command {
        Command::Deploy(deploy) => self::deploy(host, form, *deploy).await?,
        Command::Invoke(invoke) => return invoke::invoke(host, form, invoke).await,
        Command::Run(run) => return run::run(host, *run).await,
        Command::Exec(exec) => return exec::exec(host, exec).await,
        Command::List => list(host, form).await?,
        Command::Describe(named) => streams::json(&function(host, &named.name).await?)?,
        Command::Logs(logs) => self::logs(host, logs).await?,
        Command::Scale(scale) => {
            let path = format!("/functions/{}/scale", client::segment(&scale.name));
            let request = ScaleRequest { instances: scale.instances };
            let function: Function = client::json(host, Method::POST, &path, Some(&request)).await?;
            match form {
                Output::Json => streams::json(&function)?,
                Output::Text => streams::line(&match ready(&function) {
                    1 => format!("{} has 1 instance", function.name),
                    count => format!("{} has {count} instances", function.name),
                })?,
            }
        }
        Command::Remove(named) => {
            client::done(host, Method::DELETE, &format!("/functions/{}", client::segment(&named.name))).await?;
            if form == Output::Text {
                streams::line(&format!("{} is removed", named.name))?;
            }
        }
        Command::Pull(pull) => image::pull(host, form, pull).await?,
        Command::Images => images(host, form).await?,
        Command::Image(crate::args::Image::Import(import)) => image::import(host, form, import).await?,
        Command::Version => version(host, form).await?,
        Command::Serve(_) | Command::Reset(_) | Command::Daemon(_) | Command::Unpack(_) | Command::Doctor(_) => {
            unreachable!("not asked of a server")
        }
    }
    Ok(ExitCode::SUCCESS)
}

/// What was said of the container, in the words of the API.
fn container(said: Container) -> ContainerSettings {
    let texts = |list: Vec<String>| (!list.is_empty()).then_some(list);
    ContainerSettings {
        entrypoint: said.entrypoint.map(|program| vec![program]),
        user: said.user,
        working_dir: said.workdir,
        cpus: said.cpus.map(|cpus| cpus.to_string()),
        cpu_weight: said.cpu_weight,
        pids: said.pids,
        writable: said.writable.map(|size| size.to_string()),
        open_files: said.open_files,
        no_new_privileges: said.no_new_privileges,
        read_only: said.read_only.then_some(true),
        tmpfs: texts(said.tmpfs.iter().map(ToString::to_string).collect()),
        network: said.network.map(|network| network.to_string()),
        egress: texts(said.egress.iter().map(ToString::to_string).collect()),
    }
}

async fn deploy(host: &Host, form: Output, deploy: Deploy) -> anyhow::Result<()> {
    let request = DeployRequest {
        name: deploy.name,
        image: deploy.image,
        contract: Some(
            match deploy.contract {
                ContractArg::Http => "http",
                ContractArg::Stdio => "stdio",
            }
            .to_owned(),
        ),
        port: deploy.port,
        env: variables(&deploy.env),
        args: (!deploy.args.is_empty()).then_some(deploy.args),
        memory: deploy.container.memory.map(|memory| memory.to_string()),
        container: container(deploy.container),
        concurrency: deploy.concurrency,
        min: deploy.min,
        max: deploy.max,
        idle_timeout: deploy.idle_timeout,
        timeout: deploy.timeout,
        ..DeployRequest::default()
    };
    let mut show = Show::new(deploy.quiet);
    let request = client::request(Method::POST, "/functions", Some(&request))?;
    let function: Function = client::events(host, request, &mut show).await?;
    if form == Output::Json {
        return streams::json(&function);
    }
    let version: Version = client::json(host, Method::GET, "/version", NO_BODY).await?;
    match version.url {
        Some(url) => streams::line(&format!("{url}/function/{}", function.slug)),
        None => streams::line(&format!("/function/{}", function.slug)),
    }
}

async fn function(host: &Host, name: &str) -> anyhow::Result<Function> {
    client::json(host, Method::GET, &format!("/functions/{}", client::segment(name)), NO_BODY).await
}

async fn list(host: &Host, form: Output) -> anyhow::Result<()> {
    let functions: Vec<Function> = client::json(host, Method::GET, "/functions", NO_BODY).await?;
    if form == Output::Json {
        return streams::json(&functions);
    }
    let rows: Vec<_> = functions
        .iter()
        .map(|function| {
            let error = function.last_error.as_ref().map_or_else(String::new, |error| error.code.to_string());
            let contract = function.contract.to_string();
            [function.name.clone(), contract, ready(function).to_string(), function.image.to_string(), error]
        })
        .collect();
    streams::table(["NAME", "CONTRACT", "INSTANCES", "IMAGE", "LAST ERROR"], &rows)
}

async fn images(host: &Host, form: Output) -> anyhow::Result<()> {
    let images: Vec<Image> = client::json(host, Method::GET, "/images", NO_BODY).await?;
    if form == Output::Json {
        return streams::json(&images);
    }
    let rows: Vec<_> = images
        .iter()
        .map(|image| {
            let origin = if image.imported { "imported" } else { "pulled" };
            [image.image.to_string(), image.digest.short(), size(image.size), origin.to_owned()]
        })
        .collect();
    streams::table(["IMAGE", "DIGEST", "SIZE", "ORIGIN"], &rows)
}

async fn logs(host: &Host, logs: Logs) -> anyhow::Result<()> {
    let query = LogsQuery { tail: logs.tail, follow: logs.follow };
    let tail = query.tail.map_or_else(String::new, |tail| format!("&tail={tail}"));
    let path = format!("/functions/{}/logs?follow={}{tail}", client::segment(&logs.name), query.follow);
    let mut answer =
        client::checked(client::send(host, client::request(Method::GET, &path, NO_BODY)?).await?).await?.into_body();
    let mut stdout = streams::stdout()?;
    while let Some(frame) = answer.frame().await {
        if let Ok(bytes) = frame?.into_data() {
            streams::bytes(&mut stdout, &bytes).await?;
        }
    }
    Ok(())
}

async fn version(host: &Host, form: Output) -> anyhow::Result<()> {
    let client = env!("CARGO_PKG_VERSION");
    if form == Output::Text {
        streams::line(&format!("client {client}"))?;
    }
    let server: Version = client::json(host, Method::GET, "/version", NO_BODY).await?;
    match form {
        Output::Json => streams::json(&serde_json::json!({"client": client, "server": server})),
        Output::Text => streams::line(&format!("server {} (API {}, pid {})", server.version, server.api, server.pid)),
    }
}

/// Instances that take calls.
fn ready(function: &Function) -> usize {
    function.instances.iter().filter(|instance| matches!(instance.state.as_str(), "ready" | "idle")).count()
}

fn variables(env: &[EnvVar]) -> BTreeMap<String, String> {
    env.iter().map(|var| (var.name().to_owned(), var.value().to_owned())).collect()
}

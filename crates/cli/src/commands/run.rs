//! `run`: one command, once, with this process's standard streams.

use std::process::ExitCode;

use anyhow::Context as _;
use bytes::BytesMut;
use funtainer_engine::backend::Progress;
use funtainer_gateway::api::native::RunRequest;
use funtainer_gateway::api::run::{FRAME_BYTES_MAX, Frame, FrameReader, PROTOCOL, RunEnd};
use funtainer_model::ErrorCode;
use http::header::{CONNECTION, HeaderValue, UPGRADE};
use http::{Method, StatusCode};
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWrite, AsyncWriteExt};

use crate::args::{Host, Run};
use crate::failure::Failed;
use crate::progress::Show;
use crate::{client, streams};

/// The platform failed.
const EXIT_PLATFORM: u8 = 125;
/// The command cannot be executed.
const EXIT_NOT_EXECUTABLE: u8 = 126;
/// The command is not in the image.
const EXIT_NOT_FOUND: u8 = 127;
/// Added to the number of the signal that killed the command.
const EXIT_SIGNAL: u8 = 128;
/// SIGKILL, by which the kernel ends what uses too much memory.
const KILL: u8 = 9;

pub(super) async fn run(host: &Host, run: Run) -> anyhow::Result<ExitCode> {
    let request = RunRequest {
        image: run.image,
        args: (!run.args.is_empty()).then_some(run.args),
        env: super::variables(&run.env),
        memory: run.container.memory.map(|memory| memory.to_string()),
        container: super::container(run.container),
    };
    let mut request = client::request(Method::POST, "/run", Some(&request))?;
    request.headers_mut().insert(CONNECTION, HeaderValue::from_static("upgrade"));
    request.headers_mut().insert(UPGRADE, HeaderValue::from_static(PROTOCOL));
    let answer = client::checked(client::send(host, request).await?).await?;
    anyhow::ensure!(answer.status() == StatusCode::SWITCHING_PROTOCOLS, "the server answered with status {}", answer.status());
    let stream = hyper::upgrade::on(answer).await.context("the server broke the connection off")?;
    let (reader, mut writer) = tokio::io::split(TokioIo::new(stream));
    // A server that takes no more input says how the command ended: that is for the reader to find out.
    let input = tokio::spawn(async move {
        let _ = send_input(&mut writer).await;
        // Kept open: closing it would end the command.
        std::future::pending::<()>().await;
    });
    let end = receive(FrameReader::new(&[], reader), Show::only_live(run.quiet)).await;
    input.abort();
    ended(end?)
}

async fn send_input(writer: &mut (impl AsyncWrite + Unpin)) -> std::io::Result<()> {
    let mut stdin = streams::stdin()?;
    let mut buffer = BytesMut::new();
    loop {
        buffer.reserve(FRAME_BYTES_MAX);
        let read = (&mut stdin).take(FRAME_BYTES_MAX as u64).read_buf(&mut buffer).await.unwrap_or(0);
        let frame = if read == 0 { Frame::StdinEnd } else { Frame::Stdin(buffer.split().freeze()) };
        writer.write_all(&frame.encode()).await?;
        writer.flush().await?;
        if read == 0 {
            return Ok(());
        }
    }
}

async fn receive(mut frames: FrameReader<impl tokio::io::AsyncRead + Unpin>, mut show: Show) -> anyhow::Result<RunEnd> {
    let (mut stdout, mut stderr) = (streams::stdout()?, streams::stderr()?);
    loop {
        match frames.next().await.context("the connection to the server is broken")? {
            Some(Frame::Stdout(bytes)) => {
                show.end();
                streams::bytes(&mut stdout, &bytes).await?;
            }
            Some(Frame::Stderr(bytes)) => {
                show.end();
                streams::bytes(&mut stderr, &bytes).await?;
            }
            // What the command itself says is not to drown in what is no news.
            Some(Frame::Progress(step)) if matches!(step, Progress::Layer { .. } | Progress::Warning { .. }) => {
                show.step(&step)
            }
            Some(Frame::Progress(_)) => {}
            Some(Frame::End(end)) => return Ok(end),
            Some(Frame::Stdin(_) | Frame::StdinEnd) => anyhow::bail!("the server sent input instead of output"),
            None => anyhow::bail!("the server broke the connection off before the command's end"),
        }
    }
}

/// The exit code; the platform's failures are errors.
fn ended(end: RunEnd) -> anyhow::Result<ExitCode> {
    Ok(match end {
        RunEnd::Failed(problem) => return Err(Failed(problem).into()),
        RunEnd::Code(code) => code.into(),
        RunEnd::Signal(signal) => EXIT_SIGNAL.saturating_add(signal).into(),
        RunEnd::OutOfMemory => {
            let code = ErrorCode::OutOfMemory;
            streams::error_line(&format!("error[{code}]: the command used more memory than it may\nhint: {}", code.hint()));
            (EXIT_SIGNAL + KILL).into()
        }
    })
}

/// The exit code for a run that failed.
pub(crate) fn exit_of(error: &anyhow::Error) -> u8 {
    match error.downcast_ref::<Failed>().map(|Failed(problem)| problem.code) {
        Some(ErrorCode::CommandNotFound) => EXIT_NOT_FOUND,
        Some(ErrorCode::CommandNotExecutable) => EXIT_NOT_EXECUTABLE,
        _ => EXIT_PLATFORM,
    }
}

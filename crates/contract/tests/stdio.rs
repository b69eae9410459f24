//! The dialect `stdio` with real pipes and real commands.

use std::io;
use std::os::fd::OwnedFd;
use std::os::unix::process::ExitStatusExt;
use std::process::{Command, Stdio};
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};
use std::time::{Duration, Instant};

use bytes::Bytes;
use funtainer_contract::{Answer, AnswerBody, BodyError, Call, CallBody, Exit, ExitFuture, ExitReport, InvokeError, stdio};
use funtainer_model::CallId;
use http::{HeaderMap, Request, Response};
use http_body_util::BodyExt;
use tokio::sync::{mpsc, watch};

const DEADLINE: Duration = Duration::from_secs(20);

/// A command as the platform starts it; a thread reaps it.
fn start(script: &str) -> (stdio::Streams, ExitFuture) {
    let mut command = Command::new("/bin/sh");
    let mut child = command
        .args(["-c", script])
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(Stdio::piped())
        .spawn()
        .expect("a shell runs");
    let streams = stdio::Streams {
        stdin: OwnedFd::from(child.stdin.take().unwrap()),
        stdout: OwnedFd::from(child.stdout.take().unwrap()),
    };
    let (sender, exit) = watch::channel(None);
    std::thread::spawn(move || {
        let mut stderr_tail = Vec::new();
        io::Read::read_to_end(&mut child.stderr.take().unwrap(), &mut stderr_tail).unwrap();
        let status = child.wait().unwrap();
        let exit =
            status.signal().map_or_else(|| Exit::Code(status.code().unwrap() as u8), |signal| Exit::Signal(signal as u8));
        let report = ExitReport {
            exit,
            out_of_memory: false,
            writable_full: false,
            memory_peak: None,
            cpu_us: None,
            stderr_tail: stderr_tail.into(),
        };
        sender.send_replace(Some(report));
    });
    (streams, exit)
}

async fn invoke(script: &str, body: CallBody) -> Result<Answer, InvokeError> {
    let (streams, exit) = start(script);
    let call = Call { id: CallId::from_bytes([1; 16]), request: Request::new(body) };
    tokio::time::timeout(DEADLINE, stdio::invoke(call, streams, exit)).await.expect("in time")
}

async fn read(response: Response<AnswerBody>) -> (HeaderMap, Result<Bytes, BodyError>, Option<HeaderMap>) {
    let (parts, body) = response.into_parts();
    match tokio::time::timeout(DEADLINE, body.collect()).await.expect("in time") {
        Ok(collected) => {
            let trailers = collected.trailers().cloned();
            (parts.headers, Ok(collected.to_bytes()), trailers)
        }
        Err(error) => (parts.headers, Err(error), None),
    }
}

#[tokio::test]
async fn a_short_answer_is_complete_with_its_head() {
    let answer = invoke("cat", CallBody::Full(Bytes::from_static("hé".as_bytes()))).await.unwrap();
    assert_eq!(http_body::Body::size_hint(answer.response.body()).exact(), Some(3));
    let (headers, body, trailers) = read(answer.response).await;
    assert_eq!(headers["x-exit-code"], "0");
    assert_eq!(headers["content-type"], "text/plain; charset=utf-8");
    assert_eq!((body.unwrap(), trailers), (Bytes::from_static("hé".as_bytes()), None));
}

#[tokio::test]
async fn without_a_body_input_ends_at_once() {
    let answer = invoke("cat; printf '\\000'", CallBody::Empty).await.unwrap();
    let (headers, body, _) = read(answer.response).await;
    assert_eq!(
        (headers["content-type"].to_str().unwrap(), body.unwrap()),
        ("application/octet-stream", Bytes::from_static(&[0]))
    );
    let answer = invoke("exit 0", CallBody::Empty).await.unwrap();
    let (headers, body, _) = read(answer.response).await;
    assert_eq!((headers.get("content-type"), body.unwrap().len()), (None, 0));
}

#[tokio::test]
async fn bodies_larger_than_every_buffer_pass_through() {
    let (sender, receiver) = mpsc::channel(1);
    let chunk = Bytes::from(vec![b'x'; 300_000]);
    let feeder = tokio::spawn(async move {
        for _ in 0..20 {
            sender.send(Ok(chunk.clone())).await.unwrap();
        }
    });
    let answer = invoke("cat", CallBody::Channel(receiver)).await.unwrap();
    let (headers, body, trailers) = read(answer.response).await;
    assert_eq!((headers["trailer"].to_str().unwrap(), headers.get("x-exit-code")), ("x-exit-code", None));
    assert_eq!(body.unwrap().len(), 6_000_000);
    assert_eq!(trailers.unwrap()["x-exit-code"], "0");
    feeder.await.unwrap();
}

#[tokio::test]
async fn output_is_held_back_for_a_tenth_of_a_second() {
    let (sender, receiver) = mpsc::channel(1);
    let began = Instant::now();
    let answer = invoke("echo one; read line; echo two $line", CallBody::Channel(receiver)).await.unwrap();
    assert!(began.elapsed() >= Duration::from_millis(100), "{:?}", began.elapsed());
    sender.send(Ok(Bytes::from_static(b"three\n"))).await.unwrap();
    let (_, body, trailers) = read(answer.response).await;
    assert_eq!(body.unwrap(), "one\ntwo three\n");
    assert!(trailers.is_some());
}

#[tokio::test]
async fn a_failure_before_the_head_is_an_error_with_the_tail() {
    let error = invoke("echo lost; echo why >&2; exit 3", CallBody::Empty).await.unwrap_err();
    let InvokeError::CommandFailed { exit, stderr_tail, .. } = &error else { panic!("{error:?}") };
    assert_eq!((*exit, stderr_tail.as_ref()), (Exit::Code(3), b"why\n".as_ref()));
    assert!(error.was_delivered());
    assert_eq!(error.failure().detail, "the command ended with exit code 3: why");
    let error = invoke("kill -9 $$", CallBody::Empty).await.unwrap_err();
    assert!(error.failure().detail.contains("killed by signal 9"), "{error:?}");
}

#[tokio::test]
async fn a_failure_after_the_head_breaks_the_body_off() {
    let answer = invoke("head -c 200000 /dev/zero; exit 4", CallBody::Empty).await.unwrap();
    let (_, body, _) = read(answer.response).await;
    assert!(matches!(body, Err(BodyError::CommandFailed(Exit::Code(4)))), "{body:?}");
}

#[tokio::test]
async fn a_command_that_does_not_read_is_not_at_fault() {
    let answer = invoke("exec <&-; echo done", CallBody::Full(Bytes::from(vec![0; 1_000_000]))).await.unwrap();
    assert_eq!(read(answer.response).await.1.unwrap(), "done\n");
}

#[tokio::test]
async fn a_command_that_closes_its_output_early_is_waited_for() {
    let error = invoke("exec >&-; cat >/dev/null; exit 7", CallBody::Full(Bytes::from_static(b"x"))).await.unwrap_err();
    assert!(matches!(error, InvokeError::CommandFailed { exit: Exit::Code(7), .. }), "{error:?}");
}

#[tokio::test]
async fn a_caller_that_breaks_off_ends_the_call() {
    let (sender, receiver) = mpsc::channel(1);
    sender.send(Err(io::ErrorKind::ConnectionReset.into())).await.unwrap();
    let error = invoke("cat", CallBody::Channel(receiver)).await.unwrap_err();
    assert!(matches!(error, InvokeError::CallerGone(_)), "{error:?}");

    let (sender, receiver) = mpsc::channel(1);
    let answer = invoke("head -c 100000 /dev/zero; cat", CallBody::Channel(receiver)).await.unwrap();
    sender.send(Err(io::ErrorKind::ConnectionReset.into())).await.unwrap();
    assert!(matches!(read(answer.response).await.1, Err(BodyError::Io(_))));
}

#[tokio::test]
async fn an_exit_that_nobody_knows_is_a_failure() {
    let (streams, _) = start("cat");
    let (_, exit) = watch::channel(None);
    let call = Call { id: CallId::from_bytes([1; 16]), request: Request::new(CallBody::Empty) };
    let error = tokio::time::timeout(DEADLINE, stdio::invoke(call, streams, exit)).await.expect("in time").unwrap_err();
    assert!(matches!(error, InvokeError::CommandFailed { exit: Exit::Lost, .. }), "{error:?}");
}

struct Flag(Arc<AtomicBool>);

impl Drop for Flag {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[tokio::test]
async fn the_guard_goes_with_the_end_or_the_body() {
    for drop_early in [false, true] {
        let answer = invoke("head -c 100000 /dev/zero", CallBody::Empty).await.unwrap();
        let freed = Arc::new(AtomicBool::new(false));
        let mut body = answer.response.into_body().with_guard(Box::new(Flag(Arc::clone(&freed))));
        body.frame().await.unwrap().unwrap();
        assert!(!freed.load(Ordering::Acquire));
        if !drop_early {
            while body.frame().await.is_some() {}
            assert!(freed.load(Ordering::Acquire), "at the end, with the body still here");
        }
        drop(body);
        assert!(freed.load(Ordering::Acquire));
    }
}

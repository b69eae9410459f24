//! What the daemon does.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use bytes::Bytes;
use funtainer_backend_local::LocalBackend;
use funtainer_contract::{Call, CallBody, Connect, Exit, ExitFuture, InvokeError, http::Client, plan, stdio};
use funtainer_engine::backend::{Access, Backend, Prepared, Resolve, RevisionStart, Start, Started};
use funtainer_model::{CallId, Contract, Failure, FunctionId, FunctionSpec, InstanceId, RevisionId};
use http::Request;
use http_body_util::BodyExt;
use tokio::sync::mpsc;

const DATA: &str = "/data";
/// Written by the first daemon before its death: what the second one must find.
const LEFT: &str = "/data/logs/left";
const RESULT: &str = "/data/logs/result";
const GRACE: Duration = Duration::from_secs(10);
const DEADLINE: Duration = Duration::from_secs(30);

pub(crate) fn run_daemon(listeners: usize) -> Result<()> {
    tracing_subscriber::fmt().with_max_level(tracing::Level::INFO).with_writer(std::io::stderr).init();
    let inherited = funtainer_sandbox::daemon::take_inherited_fds(listeners)?;
    let runtime = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build()?;
    let result = runtime.block_on(async move {
        let backend = Arc::new(LocalBackend::open(inherited.control, Path::new(DATA)).await?);
        ensure!(backend.data_id().len() == 16);
        backend.ready().await?;
        match std::fs::read_to_string(LEFT) {
            Err(_) => first(&backend).await?,
            Ok(left) => second(&backend, &left).await?,
        }
        Ok::<_, anyhow::Error>(backend)
    });
    if let Err(error) = &result {
        eprintln!("daemon: {error:#}");
    }
    let text = result.as_ref().map_or_else(|error| format!("{error:#}"), |_| "passed".to_owned());
    std::fs::write("/data/logs/result.new", text)?;
    std::fs::rename("/data/logs/result.new", RESULT)?;
    // Until the keeper stops: its event ends the process.
    if let Ok(backend) = result {
        runtime.block_on(backend.stopped());
    }
    Ok(())
}

/// One after another; a name says what was being shown when something fails.
async fn first(backend: &Arc<LocalBackend>) -> Result<()> {
    macro_rules! scenario {
        ($name:ident) => {
            let begun = Instant::now();
            $name(backend).await.context(stringify!($name))?;
            eprintln!("{} ok ({:?})", stringify!($name), begun.elapsed());
        };
    }
    ensure!(backend.list().await?.is_empty());
    import(backend).await.context("import")?;
    scenario!(a_server_answers);
    scenario!(many_calls_at_once_get_more_sockets);
    scenario!(a_server_is_found_wherever_it_listens);
    scenario!(a_server_that_never_listens_is_ended);
    scenario!(a_function_that_ends_says_why);
    scenario!(programs_that_do_not_run);
    scenario!(commands);
    scenario!(a_start_that_is_dropped_leaves_nothing);
    scenario!(a_zygote_that_ended_is_made_anew);
    scenario!(stop_signals);
    scenario!(starts_at_once);
    scenario!(no_descriptor_is_kept);
    scenario!(a_log_bomb_hurts_nobody);
    let held = start(backend, &http("adopted", &["httpd", "-f", "-v", "-p", "8080", "-h", "/www"])).await?;
    // Its input ends with this process: it may end by itself, or be found.
    let _command = start(backend, &command("alone", &["cat"])).await?;
    std::fs::write(LEFT, held.instance.to_string())?;
    eprintln!("the daemon dies");
    rustix::process::kill_process(rustix::process::getpid(), rustix::process::Signal::KILL)?;
    bail!("it should be dead")
}

async fn second(backend: &Arc<LocalBackend>, left: &str) -> Result<()> {
    for found in backend.list().await? {
        if found.instance.to_string() == left {
            let connect = found.access.context("it can be reached")?;
            ensure!(get(connect).await? == "hello from inside\n");
        } else {
            ensure!(found.access.is_none(), "the streams of a command were the former daemon's");
        }
        backend.stop(found.instance, GRACE).await;
        ensure!(found.exit.borrow().is_some());
    }
    let log = log_of(backend, &FunctionId::in_default("adopted".parse()?)).await?;
    ensure!(log.matches("response:200").count() == 1, "it goes on where it was: {log}");
    ensure!(backend.list().await?.is_empty());
    Ok(())
}

async fn import(backend: &LocalBackend) -> Result<()> {
    let (sender, archive) = mpsc::channel(4);
    let bytes = std::fs::read("/data/archive.tar")?;
    tokio::spawn(async move {
        for chunk in Bytes::from(bytes).chunks(100_000) {
            if sender.send(Ok(Bytes::copy_from_slice(chunk))).await.is_err() {
                return;
            }
        }
    });
    let images = backend.import(archive, None, mpsc::channel(64).0).await?;
    ensure!(images.len() == 1 && images[0].imported);
    ensure!(backend.images().await?.len() == 1);
    Ok(())
}

async fn a_server_answers(backend: &Arc<LocalBackend>) -> Result<()> {
    let revision = http("answers", &["httpd", "-f", "-v", "-p", "8080", "-h", "/www"]);
    for _ in 0..5 {
        let held = start(backend, &revision).await?;
        let Access::Network(connect) = held.started.access else { bail!("no network") };
        let begun = Instant::now();
        ensure!(get(Arc::clone(&connect)).await? == "hello from inside\n");
        eprintln!("  {:?}, first call {:?}", held.started.phases, begun.elapsed());
        backend.stop(held.instance, GRACE).await;
        let report = held.started.exit.borrow().clone().context("it has ended")?;
        ensure!(report.exit == Exit::Signal(15), "{report:?}");
        ensure!(connect.connect(None).await.is_err(), "its sockets are closed");
    }
    let log = log_of(backend, &revision.spec.id).await?;
    ensure!(log.contains(" stderr "), "{log}");
    backend.forget_logs(&revision.spec.id).await;
    ensure!(log_of(backend, &revision.spec.id).await?.is_empty());
    Ok(())
}

async fn log_of(backend: &LocalBackend, function: &FunctionId) -> Result<String> {
    let mut log = backend.logs(function, 1_000, false).await?;
    let mut text = Vec::new();
    while let Some(piece) = log.recv().await {
        text.extend_from_slice(&piece);
    }
    Ok(String::from_utf8(text)?)
}

async fn many_calls_at_once_get_more_sockets(backend: &Arc<LocalBackend>) -> Result<()> {
    let held = start(backend, &http("many", &["httpd", "-f", "-p", "8080", "-h", "/www"])).await?;
    let Access::Network(connect) = held.started.access else { bail!("no network") };
    let mut held_open = Vec::new();
    for _ in 0..30 {
        held_open.push(within(connect.connect(None)).await??);
    }
    drop(held_open);
    let client = Client::new(connect);
    let calls: Vec<_> = (0..30)
        .map(|_| {
            let client = client.clone();
            tokio::spawn(async move { call(&client).await })
        })
        .collect();
    for call in calls {
        ensure!(within(call).await??? == "hello from inside\n");
    }
    backend.stop(held.instance, Duration::ZERO).await;
    ensure!(held.started.exit.borrow().as_ref().is_some_and(|report| report.exit == Exit::Signal(9)));
    Ok(())
}

async fn a_server_is_found_wherever_it_listens(backend: &Arc<LocalBackend>) -> Result<()> {
    for listen in ["127.0.0.1:8080", "[::1]:8080", "[::]:8080", "0.0.0.0:8080", "9191", "127.0.0.1:9191", "[::1]:9191"] {
        let held = start(backend, &http("where", &["httpd", "-f", "-p", listen, "-h", "/www"])).await.context(listen)?;
        let Access::Network(connect) = held.started.access else { bail!("no network") };
        ensure!(get(connect).await.context(listen)? == "hello from inside\n");
        backend.stop(held.instance, Duration::ZERO).await;
    }
    // The second of a revision is found at once, where the first was.
    let elsewhere = http("learned", &["httpd", "-f", "-p", "9191", "-h", "/www"]);
    for quick in [false, true] {
        let begun = Instant::now();
        let held = start(backend, &elsewhere).await?;
        ensure!(!quick || begun.elapsed() < Duration::from_millis(900), "{:?}", begun.elapsed());
        backend.stop(held.instance, Duration::ZERO).await;
    }
    let two = http("two", &["sh", "-c", "httpd -p 9191 -h /www; exec httpd -f -p 9292 -h /www"]);
    let failure = refused(backend, &two).await?;
    ensure!(failure.code.as_str() == "port-ambiguous" && failure.detail.contains("9191, 9292"), "{failure:?}");
    ensure!(failure.hint.contains("--port"));
    Ok(())
}

async fn a_server_that_never_listens_is_ended(backend: &Arc<LocalBackend>) -> Result<()> {
    let failure = refused(backend, &http("never", &["sleep", "1000"])).await?;
    ensure!(failure.code.as_str() == "start-timeout" && failure.detail.contains("8080"), "{failure:?}");
    Ok(())
}

async fn a_function_that_ends_says_why(backend: &Arc<LocalBackend>) -> Result<()> {
    let failure = refused(backend, &http("ends", &["sh", "-c", "echo because of this >&2; exit 3"])).await?;
    ensure!(failure.code.as_str() == "instance-exited", "{failure:?}");
    ensure!(failure.detail.contains("exit code 3") && failure.detail.contains("because of this"), "{failure:?}");
    Ok(())
}

async fn programs_that_do_not_run(backend: &Arc<LocalBackend>) -> Result<()> {
    for (program, code) in [
        ("nothing", "command-not-found"),
        ("/bin/nothing", "command-not-found"),
        ("/bin/lost", "command-not-executable"),
        ("/bin/data", "command-not-executable"),
        ("/bin/garbage", "command-not-executable"),
        ("/bin", "command-not-executable"),
    ] {
        let failure = refused(backend, &http("broken", &[program])).await?;
        ensure!(failure.code.as_str() == code && failure.detail.contains(program), "{program}: {failure:?}");
    }
    Ok(())
}

async fn commands(backend: &Arc<LocalBackend>) -> Result<()> {
    let (answer, _) = invoke(backend, &command("cat", &["cat"]), "as it was").await??;
    ensure!(answer == "as it was");
    for _ in 0..5 {
        let begun = Instant::now();
        let (answer, phases) = invoke(backend, &command("env", &["sh", "-c", "echo $FROM_IMAGE $HOME"]), "").await??;
        ensure!(answer == "1 /root\n", "{answer}");
        eprintln!("  {phases}, whole call {:?}", begun.elapsed());
    }
    let large = "0123456789".repeat(300_000);
    let (answer, _) = invoke(backend, &command("large", &["cat"]), &large).await??;
    ensure!(answer == large);
    let failed = invoke(backend, &command("fails", &["sh", "-c", "echo sorry >&2; exit 4"]), "").await?;
    let Err(InvokeError::CommandFailed { exit: Exit::Code(4), stderr_tail, .. }) = failed else { bail!("it fails with 4") };
    ensure!(stderr_tail == "sorry\n", "{stderr_tail:?}");
    let memory = invoke(backend, &command("memory", &["sh", "-c", "exec head -c 200000000 /dev/zero > /x"]), "").await?;
    let Err(InvokeError::CommandFailed { out_of_memory: true, .. }) = memory else { bail!("more than its memory") };
    let failure = plan_of(backend, &command("missing", &["nothing"]).spec).await.err().context("it is refused")?;
    ensure!(failure.code.as_str() == "command-not-found");
    Ok(())
}

async fn a_start_that_is_dropped_leaves_nothing(backend: &Arc<LocalBackend>) -> Result<()> {
    let revision = http("dropped", &["sleep", "1000"]);
    let (start, _) = ready_to_start(backend, &revision).await?;
    // Opens the zygote, so that the delays below fall into every part of a start.
    drop(within(tokio::time::timeout(Duration::from_millis(50), backend.start(start))).await?);
    for delay_us in (0..3_000).step_by(200) {
        let (start, _) = ready_to_start(backend, &revision).await?;
        drop(tokio::time::timeout(Duration::from_micros(delay_us), backend.start(start)).await);
    }
    within(async {
        while count_left()? > 0 {
            tokio::task::yield_now().await;
        }
        Ok::<_, anyhow::Error>(())
    })
    .await?
}

async fn a_zygote_that_ended_is_made_anew(backend: &Arc<LocalBackend>) -> Result<()> {
    let revision = http("anew", &["httpd", "-f", "-p", "8080", "-h", "/www"]);
    for _ in 0..3 {
        let held = start(backend, &revision).await?;
        backend.stop(held.instance, Duration::ZERO).await;
        backend.retire(revision.revision).await;
    }
    Ok(())
}

async fn stop_signals(backend: &Arc<LocalBackend>) -> Result<()> {
    let polite = http(
        "polite",
        &["sh", "-c", "trap 'echo bye >&2; exit 7' TERM; httpd -p 8080 -h /www; while true; do sleep 0.01; done"],
    );
    let held = start(backend, &polite).await?;
    backend.stop(held.instance, GRACE).await;
    let report = held.started.exit.borrow().clone().context("it has ended")?;
    ensure!(report.exit == Exit::Code(7) && report.stderr_tail == "bye\n", "{report:?}");
    backend.stop(held.instance, GRACE).await;

    let deaf = http("deaf", &["sh", "-c", "trap '' TERM; httpd -p 8080 -h /www; while true; do sleep 0.01; done"]);
    let held = start(backend, &deaf).await?;
    backend.stop(held.instance, Duration::from_millis(100)).await;
    ensure!(held.started.exit.borrow().as_ref().is_some_and(|report| report.exit == Exit::Signal(9)));
    Ok(())
}

async fn starts_at_once(backend: &Arc<LocalBackend>) -> Result<()> {
    let revision = Arc::new(http("at-once", &["httpd", "-f", "-p", "8080", "-h", "/www"]));
    let starts: Vec<_> = (0..20)
        .map(|_| {
            let (backend, revision) = (Arc::clone(backend), Arc::clone(&revision));
            tokio::spawn(async move {
                let held = start(&backend, &revision).await?;
                let Access::Network(connect) = held.started.access else { bail!("no network") };
                ensure!(get(connect).await? == "hello from inside\n");
                backend.stop(held.instance, Duration::ZERO).await;
                Ok(())
            })
        })
        .collect();
    for start in starts {
        within(start).await???;
    }
    ensure!(count_left()? == 0);
    Ok(())
}

async fn no_descriptor_is_kept(backend: &Arc<LocalBackend>) -> Result<()> {
    let count = || Ok::<_, std::io::Error>(std::fs::read_dir("/proc/self/fd")?.count());
    let (server, command) = (http("kept", &["httpd", "-f", "-p", "8080", "-h", "/www"]), command("kept-too", &["cat"]));
    let before = count()?;
    for _ in 0..10 {
        let held = start(backend, &server).await?;
        let Access::Network(connect) = held.started.access else { bail!("no network") };
        get(connect).await?;
        backend.stop(held.instance, Duration::ZERO).await;
        let _ = invoke(backend, &command, "x").await??;
    }
    within(async {
        // The one log file of each function stays open, and what ends behind a call takes a moment.
        while count()? > before + 2 {
            tokio::task::yield_now().await;
        }
        Ok(())
    })
    .await?
}

async fn a_log_bomb_hurts_nobody(backend: &Arc<LocalBackend>) -> Result<()> {
    let bomb = http("bomb", &["sh", "-c", "yes >&2 & httpd -p 8080 -h /www; exec yes"]);
    let bombs = [start(backend, &bomb).await?, start(backend, &bomb).await?];
    let begun = Instant::now();
    for _ in 0..10 {
        let (answer, _) = invoke(backend, &command("beside", &["cat"]), "x").await??;
        ensure!(answer == "x");
    }
    // Seen: 8 ms for each on a busy machine.
    ensure!(begun.elapsed() < Duration::from_secs(3), "{:?}", begun.elapsed());
    let begun = Instant::now();
    for held in bombs {
        backend.stop(held.instance, Duration::ZERO).await;
    }
    ensure!(begun.elapsed() < Duration::from_secs(6), "{:?}", begun.elapsed());
    ensure!(!log_of(backend, &bomb.spec.id).await?.is_empty());
    Ok(())
}

/// A function and one revision of it.
struct Revision {
    spec: FunctionSpec,
    revision: RevisionId,
}

struct Held {
    instance: InstanceId,
    started: Started,
}

fn http(name: &str, command: &[&str]) -> Revision {
    revision(name, Contract::Http, command)
}

fn command(name: &str, command: &[&str]) -> Revision {
    revision(name, Contract::Stdio, command)
}

fn revision(name: &str, contract: Contract, command: &[&str]) -> Revision {
    let id = FunctionId::in_default(name.parse().expect("a name"));
    let mut spec = FunctionSpec::new(id, "busybox:test".parse().expect("a reference"), contract);
    spec.args = Some(command.iter().map(|part| (*part).to_owned()).collect());
    spec.limits.memory = "64M".parse().expect("a size");
    Revision { spec, revision: RevisionId::from_uuid(uuid::Uuid::now_v7()) }
}

async fn plan_of(backend: &LocalBackend, spec: &FunctionSpec) -> Result<(Prepared, funtainer_contract::StartPlan), Failure> {
    let prepared = backend.prepare(&spec.image, Resolve::Deploy, mpsc::channel(64).0).await?;
    let plan = plan(&prepared.config, prepared.files.as_ref(), spec).map_err(|error| error.failure())?;
    Ok((prepared, plan))
}

async fn ready_to_start(backend: &LocalBackend, revision: &Revision) -> Result<(Start, InstanceId)> {
    let (prepared, plan) = plan_of(backend, &revision.spec).await?;
    let instance = InstanceId::from_uuid(uuid::Uuid::now_v7());
    let start = RevisionStart {
        revision: revision.revision,
        function: revision.spec.id.clone(),
        slug: revision.spec.id.slug(),
        digest: prepared.digest,
        plan,
        limits: revision.spec.limits,
        start_timeout: Duration::from_secs(3),
    };
    Ok((Start { instance, revision: Arc::new(start), stderr: None }, instance))
}

async fn start(backend: &LocalBackend, revision: &Revision) -> Result<Held> {
    let (start, instance) = ready_to_start(backend, revision).await?;
    let started = within(backend.start(start)).await??;
    ensure!(Path::new(&format!("/proc/{}", started.pid)).exists());
    Ok(Held { instance, started })
}

/// A start that fails, leaving nothing.
async fn refused(backend: &Arc<LocalBackend>, revision: &Revision) -> Result<Failure> {
    let (start, _) = ready_to_start(backend, revision).await?;
    let Err(failure) = within(backend.start(start)).await? else { bail!("it started") };
    ensure!(count_left()? == 0, "something is left");
    Ok(failure)
}

/// How many processes exist below the zygotes of this keeper.
fn count_left() -> Result<usize> {
    let keeper = rustix::process::getppid().context("a daemon has a keeper")?.as_raw_pid();
    let mut parents = HashMap::new();
    for entry in std::fs::read_dir("/proc")? {
        let Ok(pid) = entry?.file_name().to_string_lossy().parse::<i32>() else { continue };
        let Ok(stat) = std::fs::read_to_string(format!("/proc/{pid}/stat")) else { continue };
        // pid (name) state ppid: a zombie is reaped soon, but not yet.
        let after = stat.rsplit_once(") ").context("a name in stat")?.1;
        parents.insert(pid, after.split(' ').nth(1).context("a parent in stat")?.parse::<i32>()?);
    }
    let parent = |pid: &i32| parents.get(pid).copied();
    Ok(parents.keys().filter(|pid| parent(pid).and_then(|zygote| parent(&zygote)) == Some(keeper)).count())
}

async fn invoke(backend: &LocalBackend, revision: &Revision, body: &str) -> Result<Result<(String, String), InvokeError>> {
    let held = start(backend, revision).await?;
    let phases = format!("{:?}", held.started.phases);
    let Access::Streams { stdin, stdout } = held.started.access else { bail!("no streams") };
    let body = if body.is_empty() { CallBody::Empty } else { CallBody::Full(Bytes::copy_from_slice(body.as_bytes())) };
    let call = Call { id: CallId::from_uuid(uuid::Uuid::now_v7()), request: Request::new(body) };
    let exit: ExitFuture = held.started.exit;
    let answer = match within(stdio::invoke(call, stdio::Streams { stdin, stdout }, exit)).await? {
        Ok(answer) => answer,
        Err(error) => return Ok(Err(error)),
    };
    let body = within(answer.response.into_body().collect()).await??.to_bytes();
    Ok(Ok((String::from_utf8(body.to_vec())?, phases)))
}

async fn get(connect: Arc<dyn Connect>) -> Result<String> {
    call(&Client::new(connect)).await
}

async fn call(client: &Client) -> Result<String> {
    let request = Request::builder().uri("/").header("host", "f").body(CallBody::Empty)?;
    let call = Call { id: CallId::from_uuid(uuid::Uuid::now_v7()), request };
    let answer = within(client.invoke(call)).await??;
    ensure!(answer.response.status() == 200);
    let body = within(answer.response.into_body().collect()).await??.to_bytes();
    Ok(String::from_utf8(body.to_vec())?)
}

async fn within<T>(future: impl Future<Output = T>) -> Result<T> {
    tokio::time::timeout(DEADLINE, future).await.context("not in time")
}

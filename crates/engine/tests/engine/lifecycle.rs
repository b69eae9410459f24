//! Deploys, removals, restarts of the engine, and its end.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use funtainer_contract::Exit;
use funtainer_engine::{CommandStreams, InvokeFailure};
use funtainer_model::{Digest, ErrorCode, InstanceId};
use tokio::sync::mpsc;

use crate::fake::wait_until;
use crate::{Bench, DeployNow, get, http, id, in_still_time, open, seconds, stdio, text, with};

#[tokio::test(start_paused = true)]
async fn a_deploy_starts_one_and_shows_what_it_made() {
    let bench = Bench::new().await;
    let view = bench.deploy(http("f")).await.unwrap();
    assert_eq!(view.port.unwrap().get(), 8080);
    assert_eq!(view.digest, Digest::from_sha256([0; 32]));
    assert_eq!((view.instances.len(), view.instances[0].pid), (1, Some(4711)));
    assert_eq!(bench.engine.list().len(), 1);
    assert_eq!(bench.engine.find("f").unwrap(), id("f"));
    assert_eq!(bench.engine.find("g").unwrap_err().code, ErrorCode::FunctionUnknown);
    let mut log = bench.engine.logs(&id("f"), 10, false).await.unwrap();
    assert_eq!(log.recv().await.unwrap(), "a line\n");
    assert_eq!(bench.engine.logs(&id("g"), 10, false).await.unwrap_err().code, ErrorCode::FunctionUnknown);
}

#[tokio::test(start_paused = true)]
async fn a_deploy_that_fails_changes_nothing() {
    let bench = Bench::new().await;
    let good = bench.deploy(http("f")).await.unwrap();
    bench.fake.failing.store(1, Ordering::SeqCst);
    let unknown = |spec: funtainer_model::FunctionSpec| with(spec, |spec| spec.image = "unknown".parse().unwrap());
    let empty = |spec: funtainer_model::FunctionSpec| with(spec, |spec| spec.image = "empty".parse().unwrap());
    let failures = [
        (bench.deploy(http("f")).await, ErrorCode::InstanceExited),
        (bench.deploy(unknown(http("f"))).await, ErrorCode::ImageUnknown),
        (bench.deploy(empty(stdio("f"))).await, ErrorCode::CommandNotFound),
        (bench.deploy(unknown(http("new"))).await, ErrorCode::ImageUnknown),
    ];
    for (result, code) in failures {
        assert_eq!(result.unwrap_err().code, code);
    }
    let now = bench.engine.describe(&id("f")).unwrap();
    assert_eq!((now.revision, now.instances), (good.revision, good.instances));
    assert_eq!(now.last_error.unwrap().code, ErrorCode::CommandNotFound);
    assert_eq!(bench.engine.list().len(), 1);
    assert_eq!(bench.fake.alive(), 1);
    bench.text("f").await;
    let reopened = open(&bench.directory, &bench.fake).await;
    assert_eq!(reopened.describe(&id("f")).unwrap().revision, good.revision);
    // A good one forgets the error.
    assert_eq!(bench.deploy(http("f")).await.unwrap().last_error, None);
}

#[tokio::test(start_paused = true)]
async fn two_names_cannot_share_a_slug() {
    let bench = Bench::new().await;
    bench.deploy(http("A_b")).await.unwrap();
    let slug = id("A_b").slug();
    let failure = bench.deploy(http(slug.as_str())).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::NameTaken);
}

#[tokio::test(start_paused = true)]
async fn a_deploy_that_nobody_waits_for_leaves_nothing() {
    let bench = Bench::new().await;
    *bench.fake.start_delay.lock().unwrap() = seconds(10);
    let (progress, _steps) = mpsc::channel(16);
    let engine = bench.engine.clone();
    let deploy = tokio::spawn(async move { engine.deploy(http("f"), progress).await.is_ok() });
    wait_until("the start", || bench.fake.starts() == 1).await;
    deploy.abort();
    wait_until("its revision to retire", || bench.fake.retired.lock().unwrap().len() == 1).await;
    assert_eq!(bench.fake.alive(), 0);
    assert!(bench.engine.list().is_empty());
}

#[tokio::test(start_paused = true)]
async fn deploys_under_load_fail_no_call() {
    let bench = Bench::new().await;
    let spec = |args: &str| {
        with(http("f"), |spec| {
            spec.scale.concurrency = 2.try_into().unwrap();
            spec.args = Some(vec![args.to_owned()]);
        })
    };
    bench.deploy(spec("0")).await.unwrap();
    let end = Arc::new(AtomicBool::new(false));
    let callers: Vec<_> = (0..16)
        .map(|_| {
            let (engine, end) = (bench.engine.clone(), end.clone());
            tokio::spawn(async move {
                let mut calls = 0_usize;
                while !end.load(Ordering::SeqCst) {
                    text(engine.invoke("f", get("/")).await.unwrap()).await;
                    calls += 1;
                }
                calls
            })
        })
        .collect();
    let mut last = None;
    for round in 1..10 {
        let view = bench.deploy(spec(&round.to_string())).await.unwrap();
        assert_ne!(last.replace(view.revision), Some(view.revision));
    }
    end.store(true, Ordering::SeqCst);
    let mut calls = 0;
    for caller in callers {
        calls += caller.await.unwrap();
    }
    assert!(calls > 100, "{calls} calls");
    wait_until("the old revisions to retire", || bench.fake.retired.lock().unwrap().len() == 9).await;
}

#[tokio::test(start_paused = true)]
async fn a_long_call_goes_on_over_a_deploy_and_waiting_ones_move() {
    let bench = Bench::new().await;
    let spec = || {
        with(http("f"), |spec| {
            spec.scale.max = 1;
            spec.scale.concurrency = 1.try_into().unwrap();
        })
    };
    bench.deploy(spec()).await.unwrap();
    let held = bench.hold("f", 1).await;
    let waiting = bench.spawn("f", "/");
    tokio::task::yield_now().await;
    bench.deploy(spec()).await.unwrap();
    let moved = waiting.await.unwrap();
    assert_eq!(bench.engine.describe(&id("f")).unwrap().instances.len(), 2);
    let old = bench.release(held).await;
    assert_ne!(old[0], moved);
    bench.fake.wait_alive(1).await;
}

#[tokio::test(start_paused = true)]
async fn a_removal_lets_calls_finish_and_refuses_those_that_wait() {
    let bench = Bench::new().await;
    let spec = with(http("f"), |spec| {
        spec.scale.max = 1;
        spec.scale.concurrency = 1.try_into().unwrap();
    });
    bench.deploy(spec).await.unwrap();
    let held = bench.hold("f", 1).await;
    let engine = bench.engine.clone();
    let waiting = tokio::spawn(async move { engine.invoke("f", get("/")).await });
    tokio::task::yield_now().await;
    let engine = bench.engine.clone();
    let removal = tokio::spawn(async move { in_still_time(engine.remove(&id("f"))).await });
    let refused = waiting.await.unwrap().unwrap_err();
    assert!(matches!(refused, InvokeFailure::Removed(_)), "{refused}");
    assert!(matches!(bench.call("f", "/").await, Err(InvokeFailure::Unknown(_))));
    assert_eq!(bench.release(held).await.len(), 1);
    removal.await.unwrap().unwrap();
    assert_eq!(bench.fake.alive(), 0);
    assert_eq!(bench.engine.remove(&id("f")).await.unwrap_err().code, ErrorCode::FunctionUnknown);
    assert!(open(&bench.directory, &bench.fake).await.list().is_empty());
    // The name is free again.
    bench.deploy(stdio("f")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn an_engine_after_a_crash_goes_on_with_what_it_finds() {
    let bench = Bench::new().await;
    let view = bench.deploy(http("f")).await.unwrap();
    bench.deploy(stdio("cat")).await.unwrap();
    let warm = bench.text("f").await;
    // An instance of a revision that was replaced, and one of a call that died with the engine.
    let current = bench.fake.alive.lock().unwrap()[&warm.parse::<InstanceId>().unwrap()].revision.clone();
    let mut other = (*current).clone();
    other.revision = funtainer_model::RevisionId::from_bytes([9; 16]);
    bench.fake.leave(Arc::new(other), InstanceId::from_bytes([8; 16])).await;
    let stops = bench.fake.stops();
    let reopened = open(&bench.directory, &bench.fake).await;
    wait_until("the end of the stray one", || bench.fake.stops() == stops + 1).await;
    assert_eq!(bench.fake.alive(), 1);
    let found = reopened.describe(&id("f")).unwrap();
    assert_eq!((found.revision, found.instances), (view.revision, view.instances));
    let invoked = reopened.invoke("f", get("/")).await.unwrap();
    assert_eq!(invoked.cold, None);
    assert_eq!(text(invoked).await, warm);
    // What was adopted is watched.
    bench.fake.kill(warm.parse().unwrap(), Exit::Signal(9)).await;
    assert_ne!(text(reopened.invoke("f", get("/")).await.unwrap()).await, warm);
    assert_eq!(reopened.describe(&id("cat")).unwrap().spec.contract, funtainer_model::Contract::Stdio);
    reopened.deploy_now(http("g")).await.unwrap();
}

#[tokio::test(start_paused = true)]
async fn adopted_instances_are_shown_in_the_same_order() {
    let bench = Bench::new().await;
    bench.deploy(with(http("f"), |spec| spec.scale.min = 8)).await.unwrap();
    let shown = |engine: &funtainer_engine::Engine| {
        let instances = engine.describe(&id("f")).unwrap().instances;
        instances.into_iter().filter(|instance| instance.pid.is_some()).map(|instance| instance.id).collect::<Vec<_>>()
    };
    wait_until("eight instances", || shown(&bench.engine).len() == 8).await;
    let before = shown(&bench.engine);
    assert!(before.is_sorted(), "{before:?}");
    let reopened = open(&bench.directory, &bench.fake).await;
    wait_until("eight adopted ones", || shown(&reopened).len() == 8).await;
    assert_eq!(shown(&reopened), before);
}

#[tokio::test(start_paused = true)]
async fn a_drain_refuses_new_calls_finishes_old_ones_and_leaves_nothing() {
    let bench = Bench::new().await;
    bench.deploy(with(http("f"), |spec| spec.scale.min = 2)).await.unwrap();
    bench.deploy(http("g")).await.unwrap();
    let held = bench.hold("f", 3).await;
    let engine = bench.engine.clone();
    let drain = tokio::spawn(async move { engine.drain(seconds(10)).await });
    tokio::task::yield_now().await;
    assert!(matches!(bench.call("f", "/").await, Err(InvokeFailure::ShuttingDown)));
    assert_eq!(bench.deploy(http("h")).await.unwrap_err().code, ErrorCode::ShuttingDown);
    assert_eq!(bench.release(held).await.len(), 3);
    drain.await.unwrap();
    assert_eq!(bench.fake.alive(), 0);
}

#[tokio::test(start_paused = true)]
async fn a_drain_has_an_end() {
    let bench = Bench::new().await;
    bench.deploy(http("f")).await.unwrap();
    bench.deploy(stdio("cat")).await.unwrap();
    let held = bench.hold("f", 1).await;
    let begin = tokio::time::Instant::now();
    bench.engine.drain(seconds(10)).await;
    assert!(begin.elapsed() <= seconds(10), "{:?}", begin.elapsed());
    assert_eq!(bench.fake.alive(), 0);
    for call in held {
        assert!(call.await.is_err(), "the helper panics on a failed call");
    }
    bench.engine.shutdown().await;
}

#[tokio::test(start_paused = true)]
async fn a_run_has_the_time_of_a_drain_to_finish() {
    let bench = Bench::new().await;
    let (progress, _steps) = mpsc::channel(16);
    let mut run = bench.engine.run(stdio("any"), None, progress).await.unwrap();
    let engine = bench.engine.clone();
    let drain = tokio::spawn(async move { engine.drain(seconds(10)).await });
    tokio::task::yield_now().await;
    let CommandStreams::Pipes { stdin, .. } = &mut run.streams else { panic!("pipes") };
    drop(stdin.take());
    let report = run.exit.wait_for(Option::is_some).await.unwrap().clone().unwrap();
    assert_eq!(report.exit, Exit::Code(0));
    drop(run);
    drain.await.unwrap();
    assert_eq!(bench.fake.stops(), 0);
}

#[tokio::test(start_paused = true)]
async fn an_engine_that_is_dropped_ends_its_instances() {
    let bench = Bench::new().await;
    bench.deploy(with(http("f"), |spec| spec.scale.min = 1)).await.unwrap();
    let Bench { fake, engine, directory } = bench;
    drop(engine);
    fake.wait_alive(0).await;
    assert_eq!(open(&directory, &fake).await.list().len(), 1);
}

#[tokio::test(start_paused = true)]
async fn a_deploy_that_is_given_up_at_any_point_is_whole_or_nothing() {
    let bench = Bench::new().await;
    for yields in 0..60 {
        let (progress, _steps) = mpsc::channel(16);
        let engine = bench.engine.clone();
        let deploy = tokio::spawn(async move { engine.deploy(http("f"), progress).await.is_ok() });
        in_still_time(async {
            for _ in 0..yields {
                tokio::task::yield_now().await;
            }
            deploy.abort();
            let _ = deploy.await;
        })
        .await;
        bench.deploy(http("f")).await.unwrap();
        bench.text("f").await;
        bench.fake.wait_alive(1).await;
        assert_eq!(bench.engine.list().len(), 1);
        let shown = bench.engine.describe(&id("f")).unwrap();
        wait_until("one instance", || bench.engine.describe(&id("f")).unwrap().instances.len() == 1).await;
        assert_eq!(open(&bench.directory, &Arc::default()).await.describe(&id("f")).unwrap().revision, shown.revision);
    }
}

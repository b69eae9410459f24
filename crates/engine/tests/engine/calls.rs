//! Calls: warm and cold, queue and its ends, failures, commands.

use std::sync::Arc;
use std::sync::atomic::{AtomicUsize, Ordering};

use bytes::Bytes;
use funtainer_contract::{Call, CallBody, Exit, InvokeError};
use funtainer_engine::{CommandStreams, Errors, InvokeFailure};
use funtainer_model::{CallId, ErrorCode};
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::sync::mpsc;

use crate::fake::wait_until;
use crate::{Bench, get, http, http_request, id, seconds, stdio, text, with};

#[tokio::test(start_paused = true)]
async fn names_that_nobody_has_are_shown_harmlessly() {
    let bench = Bench::new().await;
    let failure = bench.engine.invoke("no\0such\u{1b}[31m", get("/")).await.err().unwrap().failure();
    assert_eq!(failure.detail, "there is no function 'no\\0such\\u{1b}[31m'");
    let long = bench.engine.invoke(&"x".repeat(10_000), get("/")).await.err().unwrap().failure();
    assert!(long.detail.len() < 200, "{}", long.detail);
}

#[tokio::test(start_paused = true)]
async fn a_first_call_starts_an_instance_and_says_so_and_the_next_ones_use_it() {
    let bench = Bench::new().await;
    bench.deploy(http("A_b")).await.unwrap();
    bench.engine.scale(&id("A_b"), 0).await.unwrap();
    assert_eq!(bench.fake.alive(), 0);
    let started = bench.fake.starts();
    *bench.fake.start_delay.lock().unwrap() = seconds(1);
    let invoked = bench.call("A_b", "/").await.unwrap();
    let cold = invoked.cold.unwrap();
    assert!(cold.queue >= std::time::Duration::from_millis(900), "{cold:?}");
    let first = text(invoked).await;
    let slug = id("A_b").slug();
    let warm = bench.call(slug.as_str(), "/").await.unwrap();
    assert_eq!(warm.cold, None);
    assert_eq!(text(warm).await, first);
    assert_eq!(bench.fake.starts(), started + 1);
    assert!(matches!(bench.call("a_b", "/").await, Err(InvokeFailure::Unknown(_))));
}

#[tokio::test(start_paused = true)]
async fn the_queue_is_bounded_and_fair_and_who_goes_away_leaves_it() {
    let bench = Bench::new().await;
    let spec = with(http("f"), |spec| {
        spec.scale.max = 1;
        spec.scale.concurrency = 1.try_into().unwrap();
        spec.scale.queue = 2;
    });
    bench.deploy(spec).await.unwrap();
    let held = bench.hold("f", 1).await;
    let order = Arc::new(std::sync::Mutex::new(Vec::new()));
    let mut waiting = Vec::new();
    for number in 0..2 {
        let (engine, order) = (bench.engine.clone(), order.clone());
        waiting.push(tokio::spawn(async move {
            let invoked = engine.invoke("f", get("/")).await.unwrap();
            order.lock().unwrap().push(number);
            text(invoked).await
        }));
        tokio::task::yield_now().await;
    }
    let full = bench.call("f", "/").await.unwrap_err();
    assert!(matches!(full, InvokeFailure::QueueFull { waiting: 2, .. }), "{full}");
    assert_eq!(full.failure().code, ErrorCode::QueueFull);
    assert!(full.retry_after().is_some());
    // The first goes away: there is room again, and the slot goes to the second and then to the third.
    waiting.remove(0).abort();
    tokio::task::yield_now().await;
    let third = bench.spawn("f", "/");
    tokio::task::yield_now().await;
    bench.release(held).await;
    third.await.unwrap();
    waiting.remove(0).await.unwrap();
    assert_eq!(*order.lock().unwrap(), [1]);
    assert_eq!(bench.fake.starts(), 1);
}

#[tokio::test(start_paused = true)]
async fn the_time_of_a_call_covers_the_queue_and_the_answer() {
    let bench = Bench::new().await;
    let spec = with(http("f"), |spec| {
        spec.scale.max = 1;
        spec.scale.concurrency = 1.try_into().unwrap();
        spec.timeouts.call = seconds(5);
    });
    bench.deploy(spec).await.unwrap();
    let begin = tokio::time::Instant::now();
    let second = async {
        tokio::time::sleep(seconds(1)).await;
        bench.call("f", "/hold").await
    };
    let (first, second) = tokio::join!(bench.call("f", "/hold"), second);
    // The second had waited for 4 s when it was its turn.
    assert_eq!(begin.elapsed().as_secs(), 6);
    for failure in [first.unwrap_err(), second.unwrap_err()] {
        assert!(matches!(failure, InvokeFailure::Timeout { .. }), "{failure}");
        assert_eq!(failure.failure().code, ErrorCode::CallTimeout);
    }
    bench.engine.scale(&id("f"), 0).await.unwrap();
    *bench.fake.start_delay.lock().unwrap() = seconds(10);
    let begin = tokio::time::Instant::now();
    let failure = bench.call("f", "/").await.unwrap_err();
    assert!(matches!(failure, InvokeFailure::QueueTimeout { .. }), "{failure}");
    assert_eq!(begin.elapsed().as_secs(), 5);
    // All are gone from the books.
    tokio::time::sleep(seconds(10)).await;
    assert!(bench.call("f", "/").await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_call_that_was_not_delivered_goes_to_another_instance() {
    let bench = Bench::new().await;
    bench.deploy(http("f")).await.unwrap();
    let first = bench.text("f").await;
    bench.fake.deafen(first.parse().unwrap()).await;
    let second = bench.text("f").await;
    assert_ne!(first, second);
    wait_until("the end of the deaf one", || bench.fake.alive() == 1).await;
}

#[tokio::test(start_paused = true)]
async fn a_call_after_a_death_wakes_a_new_instance() {
    let bench = Bench::new().await;
    bench.deploy(http("f")).await.unwrap();
    for _ in 0..5 {
        let instance = bench.text("f").await;
        bench.fake.kill(instance.parse().unwrap(), Exit::Code(1)).await;
        assert_ne!(bench.text("f").await, instance);
    }
    let error = bench.engine.describe(&id("f")).unwrap().last_error.unwrap();
    assert_eq!(error.code, ErrorCode::InstanceExited);
    assert!(error.detail.contains("exit code 1"), "{error}");
}

#[tokio::test(start_paused = true)]
async fn a_delivered_call_is_not_sent_twice() {
    let bench = Bench::new().await;
    bench.deploy(http("f")).await.unwrap();
    let before = *bench.fake.arrived.borrow();
    let failure = bench.call("f", "/break").await.unwrap_err();
    assert_eq!(failure.failure().code, ErrorCode::FunctionFailed);
    assert_eq!(*bench.fake.arrived.borrow(), before + 1);
}

#[tokio::test(start_paused = true)]
async fn a_failing_start_fails_the_waiting_calls_at_once_and_the_next_call_tries_again() {
    let bench = Bench::new().await;
    bench.deploy(http("f")).await.unwrap();
    bench.engine.scale(&id("f"), 0).await.unwrap();
    bench.fake.failing.store(1, Ordering::SeqCst);
    *bench.fake.start_delay.lock().unwrap() = seconds(1);
    let begin = tokio::time::Instant::now();
    let (one, two) = tokio::join!(bench.call("f", "/"), bench.call("f", "/"));
    for failure in [one.unwrap_err(), two.unwrap_err()] {
        assert_eq!(failure.failure().code, ErrorCode::InstanceExited);
    }
    assert_eq!(begin.elapsed().as_secs(), 1);
    assert!(bench.call("f", "/").await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_broken_image_cannot_spin() {
    let bench = Bench::new().await;
    bench.deploy(http("f")).await.unwrap();
    bench.engine.scale(&id("f"), 0).await.unwrap();
    bench.fake.failing.store(usize::MAX, Ordering::SeqCst);
    let before = bench.fake.starts();
    let begin = tokio::time::Instant::now();
    while begin.elapsed() < seconds(60) {
        assert!(bench.call("f", "/").await.is_err());
    }
    let starts = bench.fake.starts() - before;
    assert!((12..=22).contains(&starts), "{starts} starts in a minute");
}

#[tokio::test(start_paused = true)]
async fn a_command_is_a_fresh_instance_for_each_call_and_max_bounds_them() {
    let bench = Bench::new().await;
    bench.deploy(with(stdio("cat"), |spec| spec.scale.max = 2)).await.unwrap();
    assert_eq!(bench.fake.starts(), 0, "a deploy runs nothing");
    let call = |body: &'static str| {
        let engine = bench.engine.clone();
        async move {
            let request = http_request("/", CallBody::Full(Bytes::from_static(body.as_bytes())));
            engine.invoke("cat", Call { id: CallId::from_bytes([1; 16]), request }).await
        }
    };
    let answer = call("hello").await.unwrap();
    assert!(answer.cold.is_some());
    assert_eq!(text(answer).await, "hello");
    let failed = call("fail").await.unwrap_err();
    assert_eq!(failed.failure().code, ErrorCode::CommandFailed);
    assert!(failed.failure().detail.contains("the tail"), "{failed}");
    let held: Vec<_> = (0..3)
        .map(|_| {
            let call = call("hold it");
            tokio::spawn(async move { text(call.await.unwrap()).await })
        })
        .collect();
    bench.fake.wait_arrived(4).await;
    let view = bench.engine.describe(&id("cat")).unwrap();
    assert_eq!(view.instances.len(), 2);
    bench.fake.release.notify_waiters();
    bench.fake.wait_arrived(5).await;
    bench.fake.release.notify_waiters();
    for call in held {
        assert_eq!(call.await.unwrap(), "hold it");
    }
    assert_eq!(bench.fake.alive_max.load(Ordering::SeqCst), 2);
    wait_until("no instance", || bench.engine.describe(&id("cat")).unwrap().instances.is_empty()).await;
}

#[tokio::test(start_paused = true)]
async fn a_command_ends_with_its_caller() {
    let bench = Bench::new().await;
    bench.deploy(with(stdio("cat"), |spec| spec.scale.max = 1)).await.unwrap();
    let request = http_request("/", CallBody::Full(Bytes::from_static(b"hold")));
    let engine = bench.engine.clone();
    let call = tokio::spawn(async move { engine.invoke("cat", Call { id: CallId::from_bytes([1; 16]), request }).await });
    bench.fake.wait_arrived(1).await;
    wait_until("the command", || bench.fake.alive() == 1).await;
    call.abort();
    bench.fake.wait_alive(0).await;
    assert_eq!(bench.fake.stops(), 1);
    // Its slot is free again.
    assert!(bench.call("cat", "/").await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn a_failing_start_of_a_command_gives_its_slot_back() {
    let bench = Bench::new().await;
    bench.deploy(with(stdio("cat"), |spec| spec.scale.max = 1)).await.unwrap();
    bench.fake.failing.store(1, Ordering::SeqCst);
    let failure = bench.call("cat", "/").await.unwrap_err();
    assert_eq!(failure.failure().code, ErrorCode::InstanceExited);
    assert!(bench.call("cat", "/").await.is_ok());
}

#[tokio::test(start_paused = true)]
async fn run_gives_the_streams_and_leaves_nothing() {
    let bench = Bench::new().await;
    let (progress, _steps) = mpsc::channel(16);
    let mut run = bench.engine.run(stdio("any"), None, progress).await.unwrap();
    let CommandStreams::Pipes { stdin, stdout, stderr: Errors::Log(stderr) } = &mut run.streams else { panic!("pipes") };
    stdin.take().unwrap().write_all(b"ping").await.unwrap();
    let mut answer = String::new();
    stdout.take().unwrap().read_to_string(&mut answer).await.unwrap();
    assert_eq!(answer, "ping");
    assert_eq!(stderr.recv().await.unwrap(), "a word on stderr");
    let report = run.exit.wait_for(Option::is_some).await.unwrap().clone().unwrap();
    assert_eq!(report.exit, Exit::Code(0));
    drop(run);
    wait_until("its revision to retire", || bench.fake.retired.lock().unwrap().len() == 1).await;
    assert!(bench.engine.list().is_empty());
}

#[tokio::test(start_paused = true)]
async fn a_run_ends_with_its_handle() {
    let bench = Bench::new().await;
    let (progress, _steps) = mpsc::channel(16);
    let run = bench.engine.run(stdio("any"), None, progress).await.unwrap();
    bench.fake.wait_alive(1).await;
    drop(run);
    bench.fake.wait_alive(0).await;
    wait_until("its revision to retire", || bench.fake.retired.lock().unwrap().len() == 1).await;
}

#[test]
fn calls_can_move_between_threads() {
    fn check<T: Send>(_: &T) {}
    let make = |engine: &'static funtainer_engine::Engine| {
        check(&engine.invoke("f", get("/")));
        check(&engine.deploy(http("f"), mpsc::channel(1).0));
        check(&engine.run(stdio("f"), None, mpsc::channel(1).0));
        check(&engine.drain(seconds(1)));
    };
    let _ = make;
    let undelivered = InvokeError::NotDelivered { call: Box::new(get("/")), source: std::io::ErrorKind::Other.into() };
    check(&undelivered);
}

/// The gateway's way: callers on runtimes of one thread each, the engine's own work on another one, in real time.
#[test]
fn callers_on_many_runtimes_see_deploys_and_scales_but_no_failure() {
    const CALLERS: usize = 3;
    const CALLS: usize = 400;
    let work = tokio::runtime::Builder::new_multi_thread().worker_threads(2).enable_all().build().unwrap();
    let bench = work.block_on(Bench::new());
    let spec = || with(http("f"), |spec| spec.scale.concurrency = 2.try_into().unwrap());
    work.block_on(bench.deploy(spec())).unwrap();
    let left = Arc::new(AtomicUsize::new(CALLERS));
    let threads: Vec<_> = (0..CALLERS)
        .map(|_| {
            let (engine, left) = (bench.engine.clone(), left.clone());
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_all().build().unwrap();
                runtime.block_on(async {
                    let caller = async || {
                        for _ in 0..CALLS {
                            text(engine.invoke("f", get("/")).await.unwrap()).await;
                        }
                    };
                    tokio::join!(caller(), caller(), caller());
                });
                left.fetch_sub(1, Ordering::SeqCst);
            })
        })
        .collect();
    work.block_on(async {
        while left.load(Ordering::SeqCst) > 0 {
            bench.deploy(spec()).await.unwrap();
            bench.engine.scale(&id("f"), 3).await.unwrap();
            bench.engine.scale(&id("f"), 0).await.unwrap();
        }
    });
    for thread in threads {
        thread.join().unwrap();
    }
    work.block_on(async {
        bench.engine.drain(seconds(10)).await;
        assert_eq!(bench.fake.alive(), 0);
    });
}

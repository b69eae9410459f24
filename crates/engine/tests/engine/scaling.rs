//! How many instances there are, and when.

use std::sync::atomic::Ordering;

use funtainer_contract::Exit;
use funtainer_engine::InstanceState;
use funtainer_model::ErrorCode;

use crate::fake::wait_until;
use crate::{Bench, http, id, seconds, stdio, with};

#[tokio::test(start_paused = true)]
async fn instances_follow_the_calls_in_flight_up_to_max() {
    let bench = Bench::new().await;
    let spec = with(http("f"), |spec| {
        spec.scale.concurrency = 2.try_into().unwrap();
        spec.scale.max = 3;
    });
    bench.deploy(spec).await.unwrap();
    let mut held = bench.hold("f", 2).await;
    assert_eq!(bench.fake.starts(), 1);
    held.extend(bench.hold("f", 4).await);
    assert_eq!(bench.fake.alive(), 3);
    // All slots are taken: two more wait, and nothing more is started.
    let waiting = [bench.spawn("f", "/"), bench.spawn("f", "/")];
    tokio::time::sleep(seconds(1)).await;
    assert_eq!(bench.fake.starts(), 3);
    let mut texts = bench.release(held).await;
    texts.sort();
    texts.dedup();
    assert_eq!(texts.len(), 3, "the calls were spread");
    for call in waiting {
        call.await.unwrap();
    }
}

#[tokio::test(start_paused = true)]
async fn a_burst_on_nothing_starts_what_it_needs_once() {
    let bench = Bench::new().await;
    let spec = with(http("f"), |spec| spec.scale.concurrency = 10.try_into().unwrap());
    bench.deploy(spec).await.unwrap();
    bench.engine.scale(&id("f"), 0).await.unwrap();
    let before = bench.fake.starts();
    *bench.fake.start_delay.lock().unwrap() = seconds(1);
    let held = bench.hold("f", 35).await;
    assert_eq!(bench.fake.starts() - before, 4);
    bench.release(held).await;
}

#[tokio::test(start_paused = true)]
async fn idle_instances_end_and_the_next_call_wakes_one() {
    let bench = Bench::new().await;
    bench.deploy(with(http("f"), |spec| spec.scale.idle_timeout = seconds(60))).await.unwrap();
    let first = bench.text("f").await;
    tokio::time::sleep(seconds(50)).await;
    assert_eq!(bench.text("f").await, first);
    tokio::time::sleep(seconds(50)).await;
    assert_eq!(bench.fake.alive(), 1, "used 50 s ago");
    tokio::time::sleep(seconds(11)).await;
    bench.fake.wait_alive(0).await;
    assert!(bench.call("f", "/").await.unwrap().cold.is_some());
}

#[tokio::test(start_paused = true)]
async fn a_long_call_is_no_idleness() {
    let bench = Bench::new().await;
    let spec = with(http("f"), |spec| spec.scale.idle_timeout = seconds(1));
    bench.deploy(spec).await.unwrap();
    let held = bench.hold("f", 1).await;
    tokio::time::sleep(seconds(100)).await;
    assert_eq!(bench.fake.alive(), 1);
    bench.release(held).await;
    tokio::time::sleep(seconds(3)).await;
    assert_eq!(bench.fake.alive(), 0);
}

#[tokio::test(start_paused = true)]
async fn min_is_kept_through_idleness_and_deaths() {
    let bench = Bench::new().await;
    let spec = with(http("f"), |spec| {
        spec.scale.min = 2;
        spec.scale.idle_timeout = seconds(60);
        spec.scale.concurrency = 1.try_into().unwrap();
    });
    bench.deploy(spec).await.unwrap();
    bench.fake.wait_alive(2).await;
    let held = bench.hold("f", 4).await;
    assert_eq!(bench.fake.alive(), 4);
    bench.release(held).await;
    tokio::time::sleep(seconds(130)).await;
    bench.fake.wait_alive(2).await;
    let states: Vec<_> = bench.engine.describe(&id("f")).unwrap().instances.iter().map(|view| view.state).collect();
    assert_eq!(states, [InstanceState::Idle; 2]);
    for instance in bench.fake.instances() {
        bench.fake.kill(instance, Exit::Signal(9)).await;
    }
    bench.fake.wait_alive(2).await;
}

#[tokio::test(start_paused = true)]
async fn min_instances_that_die_at_once_are_restarted_with_growing_waits() {
    let bench = Bench::new().await;
    bench.deploy(with(http("f"), |spec| spec.scale.min = 1)).await.unwrap();
    bench.fake.wait_alive(1).await;
    bench.fake.failing.store(usize::MAX, Ordering::SeqCst);
    let before = bench.fake.starts();
    bench.fake.kill(bench.fake.instances()[0], Exit::Code(1)).await;
    tokio::time::sleep(seconds(60)).await;
    let starts = bench.fake.starts() - before;
    assert!((10..=22).contains(&starts), "{starts} starts in a minute");
    bench.fake.failing.store(0, Ordering::SeqCst);
    bench.fake.wait_alive(1).await;
}

#[tokio::test(start_paused = true)]
async fn scale_is_no_setting_and_returns_when_all_is_done() {
    let bench = Bench::new().await;
    let spec = with(http("f"), |spec| {
        spec.scale.min = 1;
        spec.scale.max = 4;
        spec.scale.idle_timeout = seconds(60);
    });
    bench.deploy(spec).await.unwrap();
    for bad in [5, 100] {
        let failure = bench.engine.scale(&id("f"), bad).await.unwrap_err();
        assert_eq!(failure.code, ErrorCode::ScaleOutOfRange);
    }
    bench.deploy(stdio("cat")).await.unwrap();
    assert_eq!(bench.engine.scale(&id("cat"), 1).await.unwrap_err().code, ErrorCode::ScaleOutOfRange);
    bench.engine.scale(&id("cat"), 0).await.unwrap();
    assert_eq!(bench.engine.scale(&id("f"), 4).await.unwrap().instances.len(), 4);
    assert_eq!(bench.engine.scale(&id("f"), 2).await.unwrap().instances.len(), 2);
    assert_eq!(bench.fake.alive(), 2);
    // 0 is below min and stays so until a call comes.
    assert_eq!(bench.engine.scale(&id("f"), 0).await.unwrap().instances, []);
    tokio::time::sleep(seconds(600)).await;
    assert_eq!(bench.fake.alive(), 0);
    bench.text("f").await;
    tokio::time::sleep(seconds(600)).await;
    assert_eq!(bench.fake.alive(), 1);
    let unknown = bench.engine.scale(&id("g"), 0).await.unwrap_err();
    assert_eq!(unknown.code, ErrorCode::FunctionUnknown);
}

#[tokio::test(start_paused = true)]
async fn scale_to_nothing_lets_calls_finish_within_their_time() {
    let bench = Bench::new().await;
    bench.deploy(http("f")).await.unwrap();
    let held = bench.hold("f", 1).await;
    let (engine, begin) = (bench.engine.clone(), tokio::time::Instant::now());
    let scale = tokio::spawn(async move { engine.scale(&id("f"), 0).await.map(|view| view.instances) });
    wait_until("draining", || bench.engine.describe(&id("f")).unwrap().instances[0].state == InstanceState::Draining).await;
    // A call meanwhile gets a new instance.
    let fresh = bench.text("f").await;
    assert_eq!(bench.fake.stops(), 0);
    let ended = bench.release(held).await;
    assert_ne!(ended[0], fresh);
    scale.await.unwrap().unwrap();
    assert_eq!(bench.fake.stops(), 1);
    assert!(begin.elapsed() < seconds(10));
    // A call without end is broken off after 10 s.
    let endless = bench.hold("f", 1).await;
    let begin = tokio::time::Instant::now();
    bench.engine.scale(&id("f"), 0).await.unwrap();
    assert_eq!(begin.elapsed().as_secs(), 10);
    for call in endless {
        assert!(call.await.is_err(), "the helper panics on a failed call");
    }
}

#[tokio::test(start_paused = true)]
async fn scale_says_why_a_start_failed() {
    let bench = Bench::new().await;
    bench.deploy(http("f")).await.unwrap();
    bench.fake.failing.store(1, Ordering::SeqCst);
    let failure = bench.engine.scale(&id("f"), 3).await.unwrap_err();
    assert_eq!(failure.code, ErrorCode::InstanceExited);
}

use std::future::poll_fn;
use std::pin::Pin;
use std::task::Poll;

use funtainer_model::ErrorCode;
use futures_util::future::join_all;

use super::*;

fn slot(throttle: &Throttle, key: u64, capacity: u32) -> Arc<Slot> {
    let instance = InstanceId::from_bytes([key as u8; 16]);
    let parts = SlotParts { key: Key(key), instance, client: None, exit: None, phases: None, capacity };
    Slot::new(parts, throttle)
}

/// One look at a future.
async fn look<F: Future>(future: &mut Pin<Box<F>>) -> Poll<F::Output> {
    poll_fn(|context| Poll::Ready(future.as_mut().poll(context))).await
}

async fn take(throttle: &Arc<Throttle>) -> Permit {
    throttle.acquire(false).await.unwrap().0
}

#[tokio::test]
async fn the_least_loaded_and_of_equals_the_oldest_is_taken() {
    let throttle = Throttle::new(10);
    for key in 0..3 {
        throttle.open(&slot(&throttle, key, 2));
    }
    let mut permits = Vec::new();
    for _ in 0..6 {
        permits.push(take(&throttle).await);
    }
    let keys: Vec<u64> = permits.iter().map(|permit| permit.slot().key.0).collect();
    assert_eq!(keys, [0, 1, 2, 0, 1, 2]);
    drop(permits.remove(4));
    assert_eq!(take(&throttle).await.slot().key.0, 1);
}

#[tokio::test]
async fn among_many_instances_a_free_one_is_found() {
    let throttle = Throttle::new(10);
    for key in 0..200 {
        throttle.open(&slot(&throttle, key, 1));
    }
    let permits = join_all((0..200).map(|_| take(&throttle))).await;
    let mut keys: Vec<u64> = permits.iter().map(|permit| permit.slot().key.0).collect();
    keys.sort_unstable();
    keys.dedup();
    assert_eq!(keys.len(), 200);
    assert!(look(&mut Box::pin(throttle.acquire(false))).await.is_pending());
}

#[tokio::test]
async fn a_waiter_that_goes_away_passes_its_slot_on() {
    let throttle = Throttle::new(10);
    throttle.open(&slot(&throttle, 0, 1));
    let permit = take(&throttle).await;
    let mut first = Box::pin(throttle.acquire(false));
    let mut second = Box::pin(throttle.acquire(false));
    assert!(look(&mut first).await.is_pending() && look(&mut second).await.is_pending());
    assert_eq!(throttle.waiting(), 2);
    // The slot is granted to the first, which goes without having seen it.
    drop(permit);
    assert_eq!(throttle.waiting(), 1);
    drop(first);
    let Poll::Ready(Ok((permit, Waited::Yes))) = look(&mut second).await else { panic!("the second has no slot") };
    assert_eq!((permit.slot().in_flight(), throttle.waiting()), (1, 0));
}

#[tokio::test]
async fn a_closed_instance_takes_nothing_and_tells_its_owner_when_it_is_done() {
    let throttle = Throttle::new(10);
    let slot = slot(&throttle, 0, 2);
    throttle.open(&slot);
    let permit = take(&throttle).await;
    throttle.close(&slot);
    assert!(look(&mut Box::pin(throttle.acquire(false))).await.is_pending());
    // The waiter's own demand.
    throttle.demand().await;
    let mut demand = Box::pin(throttle.demand());
    assert!(look(&mut demand).await.is_pending());
    drop(permit);
    assert!(look(&mut demand).await.is_ready());
    assert_eq!(slot.in_flight(), 0);
}

#[tokio::test]
async fn the_queue_refuses_over_its_length_but_not_those_that_were_in_one() {
    let throttle = Throttle::new(0);
    // A first call may wait for the start that it causes.
    let mut first = Box::pin(throttle.acquire(false));
    assert!(look(&mut first).await.is_pending());
    assert_eq!(throttle.acquire(false).await.map(|_| ()).unwrap_err(), Refusal::Full { waiting: 1 });
    let mut moved = Box::pin(throttle.acquire(true));
    assert!(look(&mut moved).await.is_pending());
    let failure = Failure::new(ErrorCode::StartTimeout, "late");
    throttle.refuse_waiting(&Refusal::Failed(failure.clone()));
    assert_eq!(first.await.map(|_| ()).unwrap_err(), Refusal::Failed(failure));
    assert!(moved.await.is_err());
    throttle.open(&slot(&throttle, 0, 1));
    let _permit = take(&throttle).await;
    assert_eq!(throttle.acquire(false).await.map(|_| ()).unwrap_err(), Refusal::Full { waiting: 0 });
}

#[tokio::test]
async fn a_retired_revision_sends_everybody_away() {
    let throttle = Throttle::new(10);
    throttle.open(&slot(&throttle, 0, 1));
    let permit = take(&throttle).await;
    let mut waiting = Box::pin(throttle.acquire(false));
    assert!(look(&mut waiting).await.is_pending());
    throttle.retire();
    assert_eq!(waiting.await.map(|_| ()).unwrap_err(), Refusal::Retired);
    assert_eq!(throttle.acquire(true).await.map(|_| ()).unwrap_err(), Refusal::Retired);
    drop(permit);
}

#[tokio::test]
async fn settled_waits_for_the_last_call() {
    let throttle = Throttle::new(10);
    throttle.open(&slot(&throttle, 0, 1));
    throttle.settled().await;
    let permit = take(&throttle).await;
    let mut waiting = Box::pin(throttle.acquire(false));
    let mut settled = Box::pin(throttle.settled());
    assert!(look(&mut waiting).await.is_pending() && look(&mut settled).await.is_pending());
    drop(permit);
    assert!(look(&mut settled).await.is_pending());
    drop(waiting);
    assert!(look(&mut settled).await.is_ready());
}

/// Threads that take and give back as fast as they can: no slot is given twice, none is lost, nobody waits for ever.
#[test]
fn threads_share_slots_without_losing_a_wake_up() {
    const THREADS: usize = 4;
    const CALLS: usize = 5_000;
    let throttle = Throttle::new(1_000);
    let slots: Vec<_> = (0..2).map(|key| slot(&throttle, key, 1)).collect();
    for slot in &slots {
        throttle.open(slot);
    }
    let busy: Arc<[AtomicBool; 2]> = Arc::default();
    let threads: Vec<_> = (0..THREADS)
        .map(|_| {
            let (throttle, busy) = (Arc::clone(&throttle), Arc::clone(&busy));
            std::thread::spawn(move || {
                let runtime = tokio::runtime::Builder::new_current_thread().enable_time().build().unwrap();
                runtime.block_on(async {
                    let caller = async || {
                        for call in 0..CALLS {
                            let taking = throttle.acquire(false);
                            if call % 7 == 0 {
                                // Goes away at once, or has its slot at once.
                                let mut taking = Box::pin(taking);
                                let _ = look(&mut taking).await;
                                continue;
                            }
                            let permit = tokio::time::timeout(Duration::from_mins(1), taking).await.unwrap().unwrap().0;
                            let key = permit.slot().key.0 as usize;
                            assert!(!busy[key].swap(true, Ordering::SeqCst), "slot {key} is given twice");
                            if call % 3 == 0 {
                                tokio::task::yield_now().await;
                            }
                            busy[key].store(false, Ordering::SeqCst);
                        }
                    };
                    tokio::join!(caller(), caller(), caller());
                });
            })
        })
        .collect();
    for thread in threads {
        thread.join().unwrap();
    }
    assert_eq!(throttle.waiting(), 0);
    assert!(slots.iter().all(|slot| slot.in_flight() == 0));
}

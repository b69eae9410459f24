//! What the daemon knows of the instances that exist, and what happens when one ends.
//!
//! ```text
//! begin ─► Start sent ─► captures attached ─► ... ─► Exited ─► log drained ─► exit published ─► AcknowledgeExit
//! ```
//! A record stays from before its `Start` is sent until its exit is published, so that no exit is ever missed.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use bytes::Bytes;
use funtainer_contract::{Exit, ExitFuture, ExitReport, StandardStreams};
use funtainer_model::{InstanceId, StopSignal};
use funtainer_sandbox::protocol::ExitRecord;
use tokio::sync::{oneshot, watch};

use crate::logs::Capture;
use crate::sockets::Sockets;

/// How long an exit waits for the rest of the log. Every writer is dead by then; only the rate of the log can hold it up.
const DRAIN_TIME_MAX: Duration = Duration::from_secs(2);

/// All of them.
pub(crate) struct Instances {
    table: Mutex<Table>,
}

struct Table {
    records: HashMap<InstanceId, Record>,
    /// Ends of instances of a former daemon, until those are known; `None` from then on.
    unknown: Option<HashMap<InstanceId, ExitRecord>>,
}

/// One.
struct Record {
    exit: watch::Sender<Option<ExitReport>>,
    captures: Option<oneshot::Receiver<Vec<Capture>>>,
    sockets: Option<Arc<Sockets>>,
    streams: StandardStreams,
    stop_signal: StopSignal,
}

/// Its owner's view.
pub(crate) struct Begun {
    /// Becomes known once it is reaped.
    pub(crate) exit: ExitFuture,
    /// Where the captures of its log go. The first that reports standard error gives the tail.
    pub(crate) captures: oneshot::Sender<Vec<Capture>>,
}

/// An end that is not all told.
pub(crate) struct Ending {
    record: ExitRecord,
    captures: Option<oneshot::Receiver<Vec<Capture>>>,
    published: bool,
}

impl Default for Instances {
    fn default() -> Self {
        Self { table: Mutex::new(Table { records: HashMap::new(), unknown: Some(HashMap::new()) }) }
    }
}

impl Instances {
    /// Takes note of an instance that is about to exist.
    pub(crate) fn begin(
        &self,
        instance: InstanceId,
        streams: StandardStreams,
        stop_signal: StopSignal,
        sockets: Option<Arc<Sockets>>,
    ) -> Begun {
        let (exit_sender, exit) = watch::channel(None);
        let (captures, receiver) = oneshot::channel();
        let record = Record { exit: exit_sender, captures: Some(receiver), sockets, streams, stop_signal };
        self.lock().records.insert(instance, record);
        Begun { exit, captures }
    }

    /// Forgets one that never came to exist.
    pub(crate) fn forget(&self, instance: InstanceId) {
        let record = self.lock().records.remove(&instance);
        drop(record);
    }

    /// What ends an instance, and its end. `None` for one that has ended.
    pub(crate) fn ending(&self, instance: InstanceId) -> Option<(StopSignal, ExitFuture)> {
        self.lock().records.get(&instance).map(|record| (record.stop_signal, record.exit.subscribe()))
    }

    /// An instance is reaped. A command whose call waits for nothing but its good end is not held up by its log: that end is
    /// published here. `None` for an instance that is not known, or not yet.
    pub(crate) fn exited(&self, instance: InstanceId, record: ExitRecord) -> Option<Ending> {
        let mut table = self.lock();
        let Table { records, unknown } = &mut *table;
        let Some(known) = records.get_mut(&instance) else {
            if let Some(unknown) = unknown {
                unknown.insert(instance, record);
            }
            return None;
        };
        if let Some(sockets) = known.sockets.take() {
            sockets.close();
        }
        let published = known.streams == StandardStreams::Call && record.status == Some(0);
        if published {
            known.exit.send_replace(Some(report(record, Bytes::new())));
        }
        Some(Ending { record, captures: known.captures.take(), published })
    }

    /// Waits for the rest of the log, then publishes the end where that is not done yet, and forgets the instance.
    pub(crate) async fn finish(&self, instance: InstanceId, ending: Ending) {
        let mut tail = Bytes::new();
        if let Some(captures) = ending.captures {
            let drained = async {
                // Without captures the start was given up.
                let mut captures = captures.await.unwrap_or_default();
                for capture in &mut captures {
                    capture.drained(DRAIN_TIME_MAX).await;
                }
                captures.first().map(Capture::tail).unwrap_or_default()
            };
            tail = tokio::time::timeout(2 * DRAIN_TIME_MAX, drained).await.unwrap_or_default();
        }
        let known = self.lock().records.remove(&instance);
        if let Some(known) = known
            && !ending.published
        {
            known.exit.send_replace(Some(report(ending.record, tail)));
        }
    }

    /// Whether its end was noted although it is not known yet.
    pub(crate) fn is_waiting(&self, instance: InstanceId) -> bool {
        self.lock().unknown.as_ref().is_some_and(|unknown| unknown.contains_key(&instance))
    }

    /// From now on every instance that exists is known: ends of others mean nothing. Those that were noted until now.
    pub(crate) fn all_known(&self) -> HashMap<InstanceId, ExitRecord> {
        self.lock().unknown.take().unwrap_or_default()
    }

    /// The keeper is gone, and every instance with it.
    pub(crate) fn all_lost(&self) {
        let records = std::mem::take(&mut self.lock().records);
        for record in records.into_values() {
            if let Some(sockets) = record.sockets {
                sockets.close();
            }
            let lost = ExitRecord { status: None, out_of_memory: false, writable_full: false, memory_peak: 0, cpu_us: 0 };
            record.exit.send_if_modified(|exit| {
                let unknown = exit.is_none();
                if unknown {
                    *exit = Some(report(lost, Bytes::new()));
                }
                unknown
            });
        }
    }

    fn lock(&self) -> MutexGuard<'_, Table> {
        self.table.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// From the keeper's record; the wait status is that of wait(2).
pub(crate) fn report(record: ExitRecord, stderr_tail: Bytes) -> ExitReport {
    let exit = match record.status.map(|status| (status & 0x7f, status >> 8 & 0xff)) {
        None => Exit::Lost,
        Some((0, code)) => Exit::Code(code as u8),
        Some((signal, _)) => Exit::Signal(signal as u8),
    };
    let known = |value: u64| (value > 0).then_some(value);
    ExitReport {
        exit,
        out_of_memory: record.out_of_memory,
        writable_full: record.writable_full,
        memory_peak: known(record.memory_peak),
        cpu_us: known(record.cpu_us),
        stderr_tail,
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    const DONE: ExitRecord =
        ExitRecord { status: Some(0), out_of_memory: false, writable_full: false, memory_peak: 0, cpu_us: 5 };

    #[test]
    fn wait_statuses() {
        let check = |status, expect| assert_eq!(report(ExitRecord { status, ..DONE }, Bytes::new()).exit, expect);
        check(Some(0), Exit::Code(0));
        check(Some(3 << 8), Exit::Code(3));
        check(Some(255 << 8), Exit::Code(255));
        check(Some(9), Exit::Signal(9));
        check(Some(0x8b), Exit::Signal(11));
        check(None, Exit::Lost);
    }

    #[tokio::test]
    async fn a_good_end_of_a_call_does_not_wait_for_its_log() {
        let instances = Instances::default();
        let instance = InstanceId::from_bytes([1; 16]);
        let begun = instances.begin(instance, StandardStreams::Call, StopSignal::TERM, None);
        let ending = instances.exited(instance, DONE).unwrap();
        assert_eq!(begun.exit.borrow().as_ref().unwrap().cpu_us, Some(5));
        assert!(instances.ending(instance).is_some());
        drop(begun.captures);
        instances.finish(instance, ending).await;
        assert!(instances.ending(instance).is_none());
    }

    #[tokio::test]
    async fn the_end_of_the_keeper_is_the_end_of_all() {
        let instances = Instances::default();
        let begun: Vec<_> = (0..3)
            .map(|id| instances.begin(InstanceId::from_bytes([id; 16]), StandardStreams::Log, StopSignal::TERM, None))
            .collect();
        instances.all_lost();
        for mut begun in begun {
            assert_eq!(begun.exit.wait_for(Option::is_some).await.unwrap().as_ref().unwrap().exit, Exit::Lost);
        }
    }
}

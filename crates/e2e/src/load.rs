//! Load on a server: a fixed number of connections that call as fast as they are answered, and a tally of every outcome.

use std::collections::BTreeMap;
use std::io::ErrorKind;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Mutex};
use std::thread::{self, JoinHandle};
use std::time::Duration;

use anyhow::{Result, anyhow};

use crate::http::{Connection, Endpoint};
use crate::wait;

/// Failures whose text is kept; the rest is counted.
const FAILURES_KEPT: usize = 20;

/// Connections that call until they are stopped.
pub struct Load {
    shared: Arc<Shared>,
    threads: Vec<JoinHandle<()>>,
}

/// What came of the calls.
#[derive(Debug, Default, Clone)]
pub struct Tally {
    /// Answers by their status.
    pub statuses: BTreeMap<u16, u64>,
    /// Connections that were refused: nobody listened.
    pub refused: u64,
    /// Calls that were sent and whose connection broke before the end of the answer.
    pub broken: u64,
    /// The first failures as text; an answer other than 200 is one.
    pub failures: Vec<String>,
}

struct Shared {
    stop: AtomicBool,
    good: AtomicU64,
    tally: Mutex<Tally>,
}

impl Load {
    /// Starts `connections` threads that send `GET path` again and again, each on its own connection, opened anew after a failure.
    pub fn start(endpoint: &Endpoint, path: &str, connections: usize) -> Self {
        let shared = Arc::new(Shared { stop: AtomicBool::new(false), good: AtomicU64::new(0), tally: Mutex::default() });
        let threads = (0..connections)
            .map(|_| {
                let (shared, endpoint, path) = (Arc::clone(&shared), endpoint.clone(), path.to_owned());
                thread::spawn(move || shared.work(&endpoint, &path))
            })
            .collect();
        Self { shared, threads }
    }

    /// Calls answered with 200 so far.
    pub fn good(&self) -> u64 {
        self.shared.good.load(Ordering::SeqCst)
    }

    /// Waits for `count` more calls that are answered with 200.
    pub fn more(&self, count: u64, limit: Duration) -> Result<()> {
        let goal = self.good() + count;
        wait::until_true(&format!("{count} more answered calls"), limit, || Ok(self.good() >= goal))
            .map_err(|error| anyhow!("{error}; tally: {:?}", self.shared.tally.lock()))
    }

    /// Ends the load after the calls that are under way.
    pub fn stop(mut self) -> Tally {
        self.shared.stop.store(true, Ordering::SeqCst);
        for thread in self.threads.drain(..) {
            if let Err(panic) = thread.join() {
                std::panic::resume_unwind(panic);
            }
        }
        self.shared.lock().clone()
    }
}

/// A test that fails must not leave threads that call on.
impl Drop for Load {
    fn drop(&mut self) {
        self.shared.stop.store(true, Ordering::SeqCst);
    }
}

impl Tally {
    /// Calls that were answered with 200.
    pub fn good(&self) -> u64 {
        self.statuses.get(&200).copied().unwrap_or(0)
    }

    /// Everything else.
    pub fn failed(&self) -> u64 {
        self.statuses.iter().filter(|(status, _)| **status != 200).map(|(_, count)| count).sum::<u64>()
            + self.refused
            + self.broken
    }
}

impl Shared {
    fn work(&self, endpoint: &Endpoint, path: &str) {
        let mut connection = None;
        while !self.stop.load(Ordering::SeqCst) {
            let mut open = match connection.take().map_or_else(|| Connection::open(endpoint), Ok) {
                Ok(open) => open,
                Err(error) => {
                    let mut tally = self.lock();
                    if error.kind() == ErrorKind::ConnectionRefused {
                        tally.refused += 1;
                    } else {
                        tally.broken += 1;
                    }
                    tally.note(format!("connect: {error}"));
                    drop(tally);
                    // Refusals come back at once; without a pause they would be counted by the million.
                    thread::park_timeout(Duration::from_millis(1));
                    continue;
                }
            };
            match open.call("GET", path, &[], b"") {
                Ok(response) => {
                    let mut tally = self.lock();
                    *tally.statuses.entry(response.status).or_default() += 1;
                    if response.status == 200 {
                        self.good.fetch_add(1, Ordering::SeqCst);
                    } else {
                        tally.note(format!("status {}: {}", response.status, response.text()));
                    }
                    if response.header("connection") != Some("close") {
                        connection = Some(open);
                    }
                }
                Err(error) => {
                    let mut tally = self.lock();
                    tally.broken += 1;
                    tally.note(format!("{error:#}"));
                }
            }
        }
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Tally> {
        self.tally.lock().unwrap_or_else(std::sync::PoisonError::into_inner)
    }
}

impl Tally {
    fn note(&mut self, failure: String) {
        if self.failures.len() < FAILURES_KEPT {
            self.failures.push(failure);
        }
    }
}

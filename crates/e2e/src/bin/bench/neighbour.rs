//! A neighbour's latency, alone and beside functions that use all they can get.

use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Result, ensure};
use funtainer_e2e::image::catalog;
use funtainer_e2e::server::Server;
use funtainer_e2e::wait;
use serde::Serialize;

use crate::report::Samples;
use crate::{PATIENCE, Plan, scale};

/// Distance of the neighbour's calls: what a server with some users sees, and little enough to leave the processors to the bombs.
const PACE: Duration = Duration::from_millis(2);
/// What a bomb may use: one processor, so that on a machine with two the neighbour's share is the other one.
const BOMB: [&str; 8] = ["--cpus", "1", "--memory", "128M", "--pids", "512", "--network", "off"];

/// What is run beside the neighbour: a name, and a shell script that never ends by itself.
const BOMBS: [(&str, &str); 5] = [
    ("processors: four endless loops", "for i in 1 2 3 4; do while :; do :; done & done; wait"),
    ("processes: forks without end", "bomb() { bomb | bomb & }; bomb; while :; do sleep 1; done"),
    ("memory: killed again and again", "while :; do sh -c 'tail /dev/zero'; done"),
    (
        "files: the writable layer filled again and again",
        "while :; do dd if=/dev/zero of=/full bs=1M 2>/dev/null; rm -f /full; done",
    ),
    ("log: lines without end", "while :; do echo 'a line of the log, like many others, to standard error' >&2; done"),
];

/// Times of the neighbour's calls.
#[derive(Default, Serialize)]
pub(crate) struct Neighbour {
    /// Nothing else runs.
    pub(crate) alone: Samples,
    /// Beside each bomb.
    pub(crate) beside: Vec<(&'static str, Samples)>,
}

/// Measures with the function `hello`, which must be deployed; turns alone and beside a bomb follow each other.
pub(crate) fn measure(server: &Server, plan: &Plan) -> Result<Neighbour> {
    server.ok(["deploy", "neighbour", "--image", "hello:bench", "--min", "1"])?;
    let mut result = Neighbour::default();
    for (number, (name, script)) in BOMBS.into_iter().enumerate() {
        let function = format!("bomb{number}");
        let mut flags = vec!["--contract", "stdio"];
        flags.extend(BOMB);
        server.deploy(&function, &catalog::busybox(&["/bin/sh", "-c", script])?, &flags)?;
        calls(server, plan.neighbour_calls / BOMBS.len(), &mut result.alone)?;
        let mut connection = server.connect()?;
        connection.send("POST", &format!("/function/{function}"), &[], b"")?;
        wait::until_true("the bomb runs", PATIENCE, || Ok(server.instances(&function)? == 1))?;
        let mut beside = Samples::default();
        calls(server, plan.neighbour_calls, &mut beside)?;
        ensure!(server.instances(&function)? == 1, "the bomb '{name}' has ended by itself");
        scale(server, &function, 0)?;
        server.ok(["remove", &function])?;
        result.beside.push((name, beside));
    }
    server.ok(["remove", "neighbour"])?;
    Ok(result)
}

/// So many calls, one each [`PACE`].
fn calls(server: &Server, count: usize, samples: &mut Samples) -> Result<()> {
    let mut connection = server.connect()?;
    let mut due = Instant::now();
    for _ in 0..count {
        due += PACE;
        thread::sleep(due.saturating_duration_since(Instant::now()));
        let start = Instant::now();
        let answer = connection.call("GET", "/function/neighbour", &[], b"").and_then(|response| response.expect(200));
        samples.add(answer.map(|_| start.elapsed()));
    }
    Ok(())
}

//! Cold calls: the time from the first byte of a request, on an open connection, to the last of its answer.

use std::path::Path;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use funtainer_e2e::http::Connection;
use funtainer_e2e::image::catalog;
use funtainer_e2e::leak::parse;
use funtainer_e2e::server::Server;
use funtainer_e2e::wait;
use rustix::process::{Pid, Signal, kill_process};
use serde::Serialize;

use crate::peers::Runc;
use crate::report::Samples;
use crate::{PATIENCE, Plan, scale};

/// Quiet before a call in the row of that name: idle processors and grace periods of the kernel show after it, and tight loops hide them.
const QUIET: Duration = Duration::from_millis(100);
/// The row without a zygote gets one of so many rounds: each has to end one first.
const ABSENT_EVERY: usize = 3;

/// The rows, in the order of the table.
#[derive(Default, Serialize)]
pub(crate) struct Cold {
    /// No process of the function but its zygote.
    pub(crate) zygote: Samples,
    /// The same after 100 ms in which nothing was asked of the machine.
    pub(crate) quiet: Samples,
    /// No process of the function at all.
    pub(crate) no_zygote: Samples,
    /// A command: one fresh container for each call.
    pub(crate) stdio: Samples,
    /// The same after 100 ms of quiet.
    pub(crate) stdio_quiet: Samples,
    /// As `zygote`, on the server of an ordinary user.
    pub(crate) rootless: Samples,
    /// The same after 100 ms of quiet.
    pub(crate) rootless_quiet: Samples,
    /// `runc run` of the same server until its first answer.
    pub(crate) runc: Samples,
}

/// Takes turns until every row has its rounds.
pub(crate) fn measure(server: &Server, rootless: &Server, home: &Path, plan: &Plan) -> Result<Cold> {
    server.import(&catalog::busybox(&["/bin/cat"])?, "cat:bench")?;
    for server in [server, rootless] {
        server.import(&catalog::hello()?, "hello:bench")?;
        server.ok(["deploy", "hello", "--image", "hello:bench"])?;
    }
    let servers = Servers { root: server, user: rootless };
    server.ok(["deploy", "cat", "--image", "cat:bench", "--contract", "stdio"])?;
    let mut runc = Runc::prepare(home)?;
    let mut cold = Cold::default();
    // Once each, so that files are in the page cache and the first zygotes are there.
    for turn in 0..TURNS {
        take(turn, &servers, &mut runc, &mut Cold::default())?;
    }
    for round in 0..plan.cold_rounds {
        for turn in 0..TURNS {
            // Another row is the first in each round, and follows another one.
            let turn = (turn + round) % TURNS;
            if turn != ABSENT_TURN || round % ABSENT_EVERY == 0 {
                take(turn, &servers, &mut runc, &mut cold)?;
            }
        }
    }
    Ok(cold)
}

/// Root's, and an ordinary user's.
struct Servers<'a> {
    root: &'a Server,
    user: &'a Server,
}

const TURNS: usize = 8;
const ABSENT_TURN: usize = 2;

fn take(turn: usize, servers: &Servers<'_>, runc: &mut Runc, cold: &mut Cold) -> Result<()> {
    let Servers { root: server, user } = servers;
    match turn {
        0 => {
            scale(server, "hello", 0)?;
            cold.zygote.add(call(server, "/function/hello", b"", "hello, world\n"));
        }
        1 => {
            scale(server, "hello", 0)?;
            thread::sleep(QUIET);
            cold.quiet.add(call(server, "/function/hello", b"", "hello, world\n"));
        }
        ABSENT_TURN => {
            scale(server, "hello", 0)?;
            end_zygote(server, "hello")?;
            cold.no_zygote.add(call(server, "/function/hello", b"", "hello, world\n"));
        }
        3 => cold.stdio.add(call(server, "/function/cat", b"to standard input\n", "to standard input\n")),
        4 => {
            thread::sleep(QUIET);
            cold.stdio_quiet.add(call(server, "/function/cat", b"to standard input\n", "to standard input\n"));
        }
        5 => {
            scale(user, "hello", 0)?;
            cold.rootless.add(call(user, "/function/hello", b"", "hello, world\n"));
        }
        6 => {
            scale(user, "hello", 0)?;
            thread::sleep(QUIET);
            cold.rootless_quiet.add(call(user, "/function/hello", b"", "hello, world\n"));
        }
        _ => cold.runc.add(runc.run()),
    }
    Ok(())
}

/// A call that must be cold and have that answer.
fn call(server: &Server, path: &str, body: &[u8], expected: &str) -> Result<Duration> {
    let mut connection: Connection = server.connect()?;
    let method = if body.is_empty() { "GET" } else { "POST" };
    let start = Instant::now();
    let response = connection.call(method, path, &[], body)?;
    let took = start.elapsed();
    let response = response.expect(200)?;
    ensure!(response.header("server-timing").is_some(), "{path} was not cold");
    ensure!(response.text() == expected, "{path} answered '{}'", response.text());
    Ok(took)
}

/// Kills the zygote and waits until it has gone from the process table.
fn end_zygote(server: &Server, function: &str) -> Result<()> {
    let pid = server.zygote_pid(function)?.with_context(|| format!("{function} has no zygote"))?;
    kill_process(Pid::from_raw(pid).context("a process id is positive")?, Signal::KILL)?;
    wait::until_true("the killed zygote is reaped", PATIENCE, || Ok(parse::process(pid)?.is_none()))
}

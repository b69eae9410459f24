//! Warm throughput: wrk with 16 connections, through funtainer and through nginx, in turn.

use std::path::Path;

use anyhow::Result;
use funtainer_e2e::server::Server;
use serde::Serialize;

use crate::Plan;
use crate::peers::{self, Wrk};
use crate::report::median;

/// One row: medians over the rounds.
#[derive(Serialize)]
pub(crate) struct Row {
    /// Answered requests per second.
    pub(crate) requests_per_second: f64,
    /// Median time to an answer, in µs.
    pub(crate) p50_us: f64,
    /// 99 of 100 answers come within, in µs.
    pub(crate) p99_us: f64,
    /// Throughput against nginx: the median of the ratios of each round.
    pub(crate) to_nginx: f64,
}

/// The rows.
#[derive(Serialize)]
pub(crate) struct Warm {
    /// Through funtainer to the server in its container.
    pub(crate) funtainer: Row,
    /// Through nginx to the same server as a bare process.
    pub(crate) nginx: Row,
    /// Straight to that process.
    pub(crate) direct: Row,
}

/// Measures with the function `hello`, which must be deployed.
pub(crate) fn measure(server: &Server, home: &Path, plan: &Plan) -> Result<Warm> {
    let (_bare, upstream) = peers::bare_server()?;
    let (_nginx, nginx) = peers::nginx(home, upstream)?;
    let urls = [
        format!("http://{}/function/hello", server.address()),
        format!("http://{nginx}/function/hello"),
        format!("http://{upstream}/function/hello"),
    ];
    for url in &urls {
        peers::wrk(url, 1)?;
    }
    let mut runs: [Vec<Wrk>; 3] = Default::default();
    for round in 0..plan.warm_rounds {
        for turn in 0..urls.len() {
            let which = (turn + round) % urls.len();
            runs[which].push(peers::wrk(&urls[which], plan.warm_seconds)?);
        }
    }
    let [funtainer, nginx, direct] = &runs;
    Ok(Warm { funtainer: row(funtainer, nginx), nginx: row(nginx, nginx), direct: row(direct, nginx) })
}

fn row(runs: &[Wrk], nginx: &[Wrk]) -> Row {
    let of = |value: fn(&Wrk) -> f64| median(runs.iter().map(value).collect());
    let ratios = runs.iter().zip(nginx).map(|(run, nginx)| run.requests_per_second / nginx.requests_per_second);
    Row {
        requests_per_second: of(|run| run.requests_per_second),
        p50_us: of(|run| run.p50_us),
        p99_us: of(|run| run.p99_us),
        to_nginx: median(ratios.collect()),
    }
}

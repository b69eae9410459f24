//! The results, as a table for people and as JSON.

use std::fmt;
use std::time::Duration;

use anyhow::Result;
use serde::{Serialize, Serializer};

use crate::cold::Cold;
use crate::machine::Machine;
use crate::memory::Memory;
use crate::neighbour::Neighbour;
use crate::warm::Warm;

/// Failures of a row whose text is kept.
const FAILURES_KEPT: usize = 3;

/// Times of one row, with the failures counted.
#[derive(Default)]
pub(crate) struct Samples {
    millis: Vec<f64>,
    failed: usize,
    failures: Vec<String>,
}

/// Everything that was measured.
#[derive(Serialize)]
pub(crate) struct Report {
    pub(crate) machine: Machine,
    pub(crate) cold: Cold,
    pub(crate) warm: Warm,
    pub(crate) neighbour: Neighbour,
    pub(crate) memory: Memory,
    pub(crate) took_seconds: u64,
}

impl Samples {
    /// Takes a time, or counts a failure.
    pub(crate) fn add(&mut self, outcome: Result<Duration>) {
        match outcome {
            Ok(took) => self.millis.push(took.as_secs_f64() * 1e3),
            Err(error) => {
                self.failed += 1;
                if self.failures.len() < FAILURES_KEPT {
                    self.failures.push(format!("{error:#}"));
                }
            }
        }
    }

    /// The time within which `percent` of 100 calls were answered, in ms.
    fn percentile(&self, percent: f64) -> f64 {
        percentile(self.millis.clone(), percent)
    }
}

/// The middle value; of an even number of values the lower one.
pub(crate) fn median(values: Vec<f64>) -> f64 {
    percentile(values, 50.0)
}

/// Nearest rank; not a number without values.
fn percentile(mut values: Vec<f64>, percent: f64) -> f64 {
    values.sort_by(f64::total_cmp);
    let rank = (percent / 100.0 * values.len() as f64).ceil() as usize;
    values.get(rank.saturating_sub(1)).copied().unwrap_or(f64::NAN)
}

impl Serialize for Samples {
    fn serialize<S: Serializer>(&self, serializer: S) -> Result<S::Ok, S::Error> {
        serde_json::json!({
            "count": self.millis.len(),
            "failed": self.failed,
            "failures": self.failures,
            "p10_ms": self.percentile(10.0),
            "p50_ms": self.percentile(50.0),
            "p95_ms": self.percentile(95.0),
            "p99_ms": self.percentile(99.0),
            "max_ms": self.percentile(100.0),
        })
        .serialize(serializer)
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Machine { processor, cores, memory_mib, kernel, is_virtual } = &self.machine;
        let kind = if *is_virtual { "virtual machine" } else { "machine" };
        writeln!(
            f,
            "{kind}, {processor}, {cores} cores, {memory_mib} MiB, Linux {kernel}; all in one run of {} s\n",
            self.took_seconds
        )?;
        self.cold_table(f)?;
        self.warm_table(f)?;
        self.neighbour_table(f)?;
        self.memory_table(f)?;
        self.targets(f)
    }
}

impl Report {
    fn cold_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cold = &self.cold;
        let base = cold.runc.percentile(50.0);
        writeln!(f, "| cold call, ms from request to answer | n | failed | p10 | p50 | p95 | p99 | max | p50 to runc |")?;
        writeln!(f, "|---|---|---|---|---|---|---|---|---|")?;
        for (name, samples) in [
            ("http, zygote there", &cold.zygote),
            ("http, after 100 ms of quiet", &cold.quiet),
            ("http, no zygote", &cold.no_zygote),
            ("stdio", &cold.stdio),
            ("stdio, after 100 ms of quiet", &cold.stdio_quiet),
            ("http, without root", &cold.rootless),
            ("http, without root, after 100 ms of quiet", &cold.rootless_quiet),
            ("`runc run` of the same server, host network", &cold.runc),
        ] {
            let [p10, p50, p95, p99, max] = [10.0, 50.0, 95.0, 99.0, 100.0].map(|percent| samples.percentile(percent));
            let (count, failed) = (samples.millis.len() + samples.failed, samples.failed);
            writeln!(
                f,
                "| {name} | {count} | {failed} | {p10:.2} | {p50:.2} | {p95:.2} | {p99:.2} | {max:.2} | {:.2} |",
                p50 / base
            )?;
            for failure in &samples.failures {
                eprintln!("bench: {name}: {failure}");
            }
        }
        writeln!(f)
    }

    fn warm_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        writeln!(f, "| warm, 16 connections | requests/s | p50 µs | p99 µs | to nginx |")?;
        writeln!(f, "|---|---|---|---|---|")?;
        let warm = &self.warm;
        for (name, row) in
            [("funtainer", &warm.funtainer), ("nginx, 2 workers", &warm.nginx), ("the server itself", &warm.direct)]
        {
            let crate::warm::Row { requests_per_second, p50_us, p99_us, to_nginx } = row;
            writeln!(f, "| {name} | {requests_per_second:.0} | {p50_us:.0} | {p99_us:.0} | {to_nginx:.2} |")?;
        }
        writeln!(f)
    }

    fn neighbour_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Neighbour { alone, beside } = &self.neighbour;
        let base = alone.percentile(95.0);
        writeln!(f, "| a neighbour's call, ms | n | failed | p50 | p95 | p99 | p95 to alone |")?;
        writeln!(f, "|---|---|---|---|---|---|---|")?;
        for (name, samples) in std::iter::once(("alone", alone)).chain(beside.iter().map(|(name, samples)| (*name, samples))) {
            let [p50, p95, p99] = [50.0, 95.0, 99.0].map(|percent| samples.percentile(percent));
            let (count, failed) = (samples.millis.len() + samples.failed, samples.failed);
            writeln!(f, "| {name} | {count} | {failed} | {p50:.2} | {p95:.2} | {p99:.2} | {:.2} |", p95 / base)?;
        }
        writeln!(f)
    }

    fn memory_table(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let Memory { instances, per_instance_kib, own_kib, platform_kib, keeper_kib, daemon_kib } = &self.memory;
        writeln!(f, "| memory, {instances} idle instances | KiB |")?;
        writeln!(f, "|---|---|")?;
        writeln!(f, "| fall of MemAvailable, each | {per_instance_kib:.0} |")?;
        writeln!(f, "| of which the function's own pages | {own_kib:.0} |")?;
        writeln!(f, "| the platform's share | {platform_kib:.0} |")?;
        writeln!(f, "| keeper, resident | {keeper_kib} |")?;
        writeln!(f, "| daemon, resident | {daemon_kib} |")?;
        writeln!(f)
    }

    /// The promises, and whether this run kept them.
    fn targets(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let cold = &self.cold;
        let (p50, runc) = (cold.zygote.percentile(50.0), cold.runc.percentile(50.0));
        let rows =
            [&cold.zygote, &cold.quiet, &cold.no_zygote, &cold.stdio, &cold.stdio_quiet, &cold.rootless, &cold.rootless_quiet];
        let failed: usize = rows.iter().map(|samples| samples.failed).sum();
        let Neighbour { alone, beside } = &self.neighbour;
        let worst = beside.iter().map(|(_, samples)| samples.percentile(95.0)).fold(f64::NAN, f64::max);
        writeln!(f, "| promise | bound | here | kept |")?;
        writeln!(f, "|---|---|---|---|")?;
        for (promise, bound, here) in [
            ("cold p50 to `runc run` p50", 0.25, p50 / runc),
            ("cold p95 to cold p50", 4.0, cold.zygote.percentile(95.0) / p50),
            ("cold after quiet to cold, p50", 2.0, cold.quiet.percentile(50.0) / p50),
            ("stdio p50 to `runc run` p50", 0.25, cold.stdio.percentile(50.0) / runc),
            ("cold without root to cold, p50", 1.5, cold.rootless.percentile(50.0) / p50),
            ("nginx throughput to warm throughput", 1.0 / 0.9, 1.0 / self.warm.funtainer.to_nginx),
            ("a neighbour's p95 beside the worst bomb to alone", 2.0, worst / alone.percentile(95.0)),
            ("platform's share of an idle instance, MiB", 1.5, self.memory.platform_kib / 1024.0),
            ("keeper, MB", 4.0, self.memory.keeper_kib as f64 * 1024.0 / 1e6),
            ("failed cold calls", 0.0, failed as f64),
        ] {
            // A row without samples is no kept promise.
            let kept = if here <= bound { "yes" } else { "NO" };
            writeln!(f, "| {promise} | {bound:.2} | {here:.2} | {kept} |")?;
        }
        Ok(())
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn percentiles_by_nearest_rank() {
        let check = |values: &[f64], percent, expect: f64| {
            let found = percentile(values.to_vec(), percent);
            assert!((found - expect).abs() < f64::EPSILON, "{found} is not {expect}");
        };
        let hundred: Vec<_> = (1..=100).rev().map(f64::from).collect();
        for percent in [1.0, 50.0, 95.0, 100.0] {
            check(&hundred, percent, percent);
        }
        check(&[3.0, 1.0, 2.0], 50.0, 2.0);
        assert!(median(Vec::new()).is_nan());
    }

    #[test]
    fn failures_are_counted_and_do_not_become_times() {
        let mut samples = Samples::default();
        samples.add(Ok(Duration::from_millis(2)));
        samples.add(Err(anyhow::anyhow!("refused")));
        assert_eq!((samples.millis.len(), samples.failed, samples.failures.as_slice()), (1, 1, &["refused".to_owned()][..]));
    }
}

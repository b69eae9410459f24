//! Memory: how much less is available with idle instances than without, and what the keeper itself holds.

use anyhow::Result;
use funtainer_e2e::image::catalog;
use funtainer_e2e::leak::{Scope, parse};
use funtainer_e2e::server::Server;
use funtainer_e2e::wait;
use serde::Serialize;

use crate::machine::{kib, meminfo};
use crate::report::median;
use crate::{PATIENCE, Plan, scale};

/// In KiB.
#[derive(Serialize)]
pub(crate) struct Memory {
    /// Idle instances that were there.
    pub(crate) instances: usize,
    /// Fall of MemAvailable for each.
    pub(crate) per_instance_kib: f64,
    /// Of which pages of the function's own process (anonymous, by `smaps_rollup`).
    pub(crate) own_kib: f64,
    /// What is left: the platform's share of an idle instance.
    pub(crate) platform_kib: f64,
    /// Resident memory of the keeper with all of them.
    pub(crate) keeper_kib: u64,
    /// Resident memory of the daemon with all of them.
    pub(crate) daemon_kib: u64,
}

/// Scales a function up and down, and looks at both.
pub(crate) fn measure(server: &Server, scope: &Scope, plan: &Plan) -> Result<Memory> {
    let most = plan.idle_instances + 1;
    server.import(&catalog::hello()?, "hello:bench")?;
    server.ok(["deploy", "idle", "--image", "hello:bench", "--max", &most.to_string()])?;
    let (mut falls, mut own) = (Vec::new(), Vec::new());
    let (mut keeper_kib, mut daemon_kib) = (0, 0);
    for _ in 0..plan.memory_rounds {
        // One stays, so that the zygote and the page cache are in both numbers.
        scale(server, "idle", 1)?;
        let before = meminfo("MemAvailable")?;
        scale(server, "idle", most)?;
        wait::until_true("all instances are ready", PATIENCE, || ready(server, most))?;
        let after = meminfo("MemAvailable")?;
        falls.push((before as f64 - after as f64) / plan.idle_instances as f64);
        own.push(own_pages(scope)?);
        keeper_kib = keeper_kib.max(kib(&format!("/proc/{}/status", server.pid()), "VmRSS")?);
        daemon_kib = daemon_kib.max(kib(&format!("/proc/{}/status", server.daemon_pid()?), "VmRSS")?);
    }
    server.ok(["remove", "idle"])?;
    let (per_instance_kib, own_kib) = (median(falls), median(own));
    Ok(Memory {
        instances: plan.idle_instances,
        per_instance_kib,
        own_kib,
        platform_kib: per_instance_kib - own_kib,
        keeper_kib,
        daemon_kib,
    })
}

fn ready(server: &Server, count: usize) -> Result<bool> {
    let described = server.describe("idle")?;
    let instances = described["instances"].as_array().map(Vec::as_slice).unwrap_or_default();
    let is_ready = |instance: &&serde_json::Value| matches!(instance["state"].as_str(), Some("ready" | "idle"));
    Ok(instances.iter().filter(is_ready).count() == count)
}

/// Anonymous pages of the processes that are not the platform's, in KiB for each.
fn own_pages(scope: &Scope) -> Result<f64> {
    let (mut total, mut count) = (0, 0_u32);
    for pid in scope.members()? {
        let is_own = parse::process(pid)?.is_some_and(|process| process.title.starts_with("/hello"));
        if is_own {
            total += kib(&format!("/proc/{pid}/smaps_rollup"), "Pss_Anon")?;
            count += 1;
        }
    }
    Ok(total as f64 / f64::from(count.max(1)))
}

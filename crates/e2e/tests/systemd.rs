//! The server as a service of systemd: its control groups are where systemd knows of them, and limits hold there.
//!
//! On a machine without systemd there is nothing to test; `cargo xtask vm all` runs these in a guest that has it, with pure cgroup v2.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt as _;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use funtainer_e2e::http::{self, Endpoint};
use funtainer_e2e::image::catalog;
use funtainer_e2e::leak::{Snapshot, Subject, parse};
use funtainer_e2e::{paths, process, wait};
use serde_json::Value;

const LIMIT: Duration = Duration::from_secs(30);
/// Where pure cgroup v2 is mounted.
const TREE: &str = "/sys/fs/cgroup";

/// Whether systemd is process 1 (sd_booted(3)) and has the whole tree of control groups.
fn is_here() -> bool {
    Path::new("/run/systemd/system").is_dir() && Path::new(TREE).join("cgroup.controllers").exists()
}

/// A service with `funtainer serve`; stopped and forgotten when dropped.
struct Service {
    unit: String,
    home: tempfile::TempDir,
    program: PathBuf,
    endpoint: Endpoint,
}

impl Service {
    fn start(name: &str, settings: &str) -> Result<Self> {
        let unit = format!("funtainer-e2e-{name}.service");
        let home = paths::scratch("systemd")?;
        // The function's user must reach nothing here, but systemd opens the file as root.
        fs::set_permissions(home.path(), fs::Permissions::from_mode(0o700))?;
        let program = paths::funtainer()?;
        let place = home.path().display();
        fs::write(
            Path::new("/run/systemd/system").join(&unit),
            format!(
                "[Service]\nExecStart={} serve --listen 127.0.0.1:0 --admin {place}/admin.sock --data {place}/data\n\
                 StandardOutput=append:{place}/said\nStandardError=append:{place}/log\n{settings}\n",
                program.display()
            ),
        )?;
        systemctl(&["daemon-reload"])?;
        let mut service = Self { unit, home, program, endpoint: Endpoint::Unix(PathBuf::new()) };
        systemctl(&["start", &service.unit])?;
        let said = service.home.path().join("said");
        let address = wait::until("the service listens", LIMIT, || {
            let text = fs::read_to_string(&said).unwrap_or_default();
            Ok(text.strip_suffix('\n').and_then(|line| line.strip_prefix("listening on http://")).map(str::to_owned))
        })
        .with_context(|| service.log())?;
        service.endpoint = Endpoint::Tcp(address.parse()?);
        Ok(service)
    }

    fn log(&self) -> String {
        funtainer_e2e::server::tail(&self.home.path().join("log"))
    }

    fn ok(&self, args: &[&str]) -> Result<String> {
        let mut command = Command::new(&self.program);
        command.args(args).env("FUNTAINER_HOST", format!("unix://{}/admin.sock", self.home.path().display()));
        process::succeed(&mut command, LIMIT)
    }

    fn id(&self) -> Result<String> {
        Ok(fs::read_to_string(self.home.path().join("data/id"))?.trim().to_owned())
    }

    /// The host id of the only instance's init.
    fn init(&self, function: &str) -> Result<i32> {
        let described: Value = serde_json::from_str(&self.ok(&["describe", function])?)?;
        Ok(described["instances"][0]["pid"].as_i64().context("an instance")? as i32)
    }
}

impl Drop for Service {
    fn drop(&mut self) {
        let stopped = systemctl(&["stop", &self.unit]);
        let removed = fs::remove_file(Path::new("/run/systemd/system").join(&self.unit));
        if stopped.and_then(|()| Ok(removed?)).and_then(|()| systemctl(&["daemon-reload"])).is_err() {
            eprintln!("{} is left behind", self.unit);
        }
    }
}

fn systemctl(args: &[&str]) -> Result<()> {
    process::succeed(Command::new("systemctl").args(args), LIMIT).map(drop)
}

/// The control group of a process.
fn group_of(pid: i32) -> Result<PathBuf> {
    let text = fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let path = text.lines().find_map(|line| line.strip_prefix("0::/")).with_context(|| text.clone())?;
    Ok(Path::new(TREE).join(path))
}

/// One call, then every process of the server at its place below `top`, limits set and kept, nothing left afterwards.
fn serve_in(service: &Service, top: &dyn Fn(&Service) -> Result<PathBuf>) -> Result<()> {
    let before = Snapshot::take()?;
    let reference = "probe:test";
    let layout = catalog::probe(&[], &[])?.layout().display().to_string();
    service.ok(&["image", "import", &layout, "--name", reference])?;
    service.ok(&["deploy", "probe", "--image", reference, "--memory", "32MiB", "--pids", "20", "--cpu-weight", "50"])?;
    let answer = http::call(&service.endpoint, "GET", "/function/probe", &[], b"").with_context(|| service.log())?;
    ensure!(answer.status == 200, "{answer:?}");

    let top = top(service)?;
    let log = service.log();
    let all: Vec<_> =
        parse::cgroup_members(&top)?.into_iter().filter_map(|pid| parse::process(pid).transpose()).collect::<Result<_>>()?;
    let of = |title: &str| -> Result<PathBuf> {
        let found = all.iter().find(|process| process.title.starts_with(title));
        group_of(found.with_context(|| format!("no '{title}' in {}: {all:#?}\n{log}", top.display()))?.pid)
    };
    for own in ["funtainer serve", "funtainer daemon"] {
        ensure!(of(own)? == top.join("keeper"), "{own} is in {}", of(own)?.display());
    }
    of("funtainer zygote probe")?;
    let instance = group_of(service.init("probe")?)?;
    ensure!(instance.starts_with(&top) && !instance.starts_with(top.join("keeper")), "{}", instance.display());
    // No process sits in a group that has groups with controllers below it, and nowhere above an instance a limit is missing.
    let own = format!("funtainer-{}", service.id()?);
    let groups = [&top, &top.join(&own)].map(|group| fs::read_to_string(group.join("cgroup.procs")).unwrap_or_default());
    ensure!(groups.iter().all(String::is_empty), "processes in inner groups: {groups:?}");
    let limited = instance.ancestors().take_while(|group| group.starts_with(&top));
    let mut found = BTreeSet::new();
    for group in limited {
        for (file, value) in [("memory.max", "33554432"), ("pids.max", "20"), ("cpu.weight", "50"), ("memory.swap.max", "0")] {
            if fs::read_to_string(group.join(file)).is_ok_and(|text| text.trim() == value) {
                found.insert(file);
            }
        }
    }
    ensure!(found.len() >= 3, "of the limits only {found:?} are set above {}\n{log}", instance.display());

    // More memory than it may have is the end of the instance, and of nothing else.
    let answer = http::call(&service.endpoint, "GET", "/function/probe/allocate?64", &[], b"");
    ensure!(!answer.is_ok_and(|answer| answer.status == 200), "64 MiB were had under a limit of 32 MiB");
    wait::until_true("the function answers again", LIMIT, || {
        Ok(http::call(&service.endpoint, "GET", "/function/probe", &[], b"").is_ok_and(|answer| answer.status == 200))
    })?;

    systemctl(&["stop", &service.unit])?;
    let data = vec![service.home.path().join("data")];
    let admin = vec![service.home.path().join("admin.sock")];
    let left = Subject { scope: None, data, admin, ports: Vec::new(), killed: false, own_network: false }.leaks(&before)?;
    let left: Vec<_> = left.iter().map(ToString::to_string).filter(|leak| leak.contains("funtainer")).collect();
    ensure!(left.is_empty(), "{left:?}");
    wait::until_true("the unit's group is gone", LIMIT, || Ok(!top.exists()))
}

#[test]
fn a_unit_with_delegation_has_the_instances_in_it() -> Result<()> {
    if !is_here() {
        return Ok(());
    }
    serve_in(&Service::start("delegated", "Delegate=yes")?, &|service| {
        Ok(Path::new(TREE).join("system.slice").join(&service.unit))
    })
}

#[test]
fn a_unit_without_delegation_gets_a_scope() -> Result<()> {
    if !is_here() {
        return Ok(());
    }
    serve_in(&Service::start("plain", "")?, &|service| {
        Ok(Path::new(TREE).join(format!("system.slice/funtainer-{}.scope", service.id()?)))
    })
}

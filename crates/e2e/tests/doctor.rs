//! `funtainer doctor`: what it finds, what it says where something is really not there, and that it leaves nothing.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::PermissionsExt;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use funtainer_e2e::leak::parse;
use funtainer_e2e::paths;
use funtainer_e2e::process::{self, Finished};
use serde_json::Value;

/// It takes milliseconds; the machine may be busy.
const LIMIT: Duration = Duration::from_mins(1);
/// A user that owns nothing.
const NOBODY: u32 = 65_534;

/// Runs a script of the shell in which `$1` is the program and `$2` the data directory.
fn shell(wrapper: &[&str], script: &str, program: &Path, data: &Path) -> Result<Finished> {
    let mut command = match wrapper {
        [] => Command::new("sh"),
        [first, rest @ ..] => {
            let mut command = Command::new(first);
            command.args(rest).arg("sh");
            command
        }
    };
    command.args(["-ec", script, "sh"]).arg(program).arg(data);
    process::run(&mut command, b"", LIMIT)
}

const AS_JSON: &str = "exec \"$1\" doctor --data \"$2\" --output json";

fn report(finished: &Finished) -> Result<Value> {
    serde_json::from_slice(&finished.stdout).with_context(|| format!("{}{}", finished.out(), finished.err()))
}

fn finding<'a>(report: &'a Value, feature: &str) -> Result<&'a Value> {
    let findings = report["findings"].as_array().context("a list")?;
    findings.iter().find(|finding| finding["feature"] == feature).with_context(|| format!("no {feature} in {report:#}"))
}

fn says(finding: &Value, member: &str, words: &str) -> Result<()> {
    ensure!(finding[member].as_str().is_some_and(|text| text.contains(words)), "no '{words}' in {member} of {finding:#}");
    Ok(())
}

/// Every member, with the words that it may have.
fn is_well_formed(report: &Value) -> Result<()> {
    let members: BTreeSet<&str> = report.as_object().context("an object")?.keys().map(String::as_str).collect();
    ensure!(members == BTreeSet::from(["sound", "server_of", "data", "findings"]), "{members:?}");
    let mut sound = true;
    let mut seen = BTreeSet::new();
    for finding in report["findings"].as_array().context("a list")? {
        let members: BTreeSet<&str> = finding.as_object().context("an object")?.keys().map(String::as_str).collect();
        let expect = BTreeSet::from(["area", "feature", "state", "required", "found", "lost", "cure"]);
        ensure!(members == expect, "{finding:#}");
        ensure!(seen.insert((finding["area"].as_str(), finding["feature"].as_str())), "twice: {finding:#}");
        let state = finding["state"].as_str().context("a state")?;
        ensure!(["ok", "degraded", "missing", "unknown"].contains(&state), "{finding:#}");
        for said in ["lost", "cure"] {
            let text = finding[said].as_str();
            ensure!(text.is_some_and(|text| !text.is_empty()) == (state != "ok"), "{said} of {finding:#}");
        }
        sound &= state != "missing" || finding["required"] == false;
    }
    ensure!(report["sound"] == sound, "{report:#}");
    Ok(())
}

#[test]
fn root_is_told_what_there_is() -> Result<()> {
    let home = paths::scratch("doctor")?;
    let program = paths::funtainer()?;
    let data = home.path().join("data");
    let finished = shell(&[], AS_JSON, &program, &data)?;
    let report = report(&finished)?;
    is_well_formed(&report)?;
    ensure!(finished.code()? == 0 && report["sound"] == true, "{report:#}");
    ensure!(report["server_of"] == "root" && report["data"] == data.to_str().context("text")?, "{report:#}");
    for feature in
        ["user namespaces", "seccomp", "data directory", "erofs layers", "overlay", "interface", "nf_tables", "open files"]
    {
        ensure!(finding(&report, feature)?["state"] != "missing", "{report:#}");
    }
    // The same for people.
    let text = shell(&[], "exec \"$1\" doctor --data \"$2\"", &program, &data)?;
    ensure!(text.code()? == 0, "{}", text.out());
    for finding in report["findings"].as_array().context("a list")? {
        let feature = finding["feature"].as_str().context("text")?;
        ensure!(
            text.out().contains(&format!("  {feature}  ")) || text.out().contains(&format!(" {feature} ")),
            "{}",
            text.out()
        );
    }
    ensure!(
        text.out().trim_end().lines().last().is_some_and(|line| line.starts_with("root's server can start here")),
        "{}",
        text.out()
    );
    ensure!(!data.exists(), "the data directory was made");
    Ok(())
}

/// Everything that a trial makes is gone: in a mount namespace of the test's own nobody else mounts anything.
#[test]
fn nothing_is_left_behind() -> Result<()> {
    let home = paths::scratch("doctor")?;
    let tmpfs = home.path().join("tmpfs");
    fs::create_dir(&tmpfs)?;
    // On tmpfs, so that a loop device is tried.
    let script = "mount -t tmpfs none \"$2\"; cat /proc/self/mountinfo >\"$2/before\";
        \"$1\" doctor --data \"$2/data\" >\"$2/said\" || true; cat /proc/self/mountinfo >\"$2/after\"
        cmp \"$2/before\" \"$2/after\"; ls -A \"$2\"; test -s \"$2/said\"";
    let finished = shell(&["unshare", "--mount", "--pid", "--fork", "--kill-child"], script, &paths::funtainer()?, &tmpfs)?;
    ensure!(finished.code()? == 0, "mounts are left: {}{}", finished.out(), finished.err());
    ensure!(finished.out().split_whitespace().eq(["after", "before", "said"]), "{}", finished.out());
    let place = tmpfs.display().to_string();
    for (device, file) in parse::loop_devices()? {
        ensure!(!file.contains(&place), "{device} still has {file}");
    }
    let trials: Vec<_> = parse::product_cgroups()?.into_iter().filter(|path| path.ends_with("doctor")).collect();
    ensure!(trials.is_empty(), "{trials:?}");
    ensure!(fs::read_dir(&tmpfs)?.next().is_none(), "something lies below the mount");
    Ok(())
}

#[test]
fn an_ordinary_user_is_told_what_holds_for_that_user() -> Result<()> {
    let home = paths::scratch("doctor")?;
    fs::set_permissions(home.path(), fs::Permissions::from_mode(0o755))?;
    let program = home.path().join("funtainer");
    fs::copy(paths::funtainer()?, &program)?;
    let data = home.path().join("data");
    fs::create_dir(&data)?;
    std::os::unix::fs::chown(&data, Some(NOBODY), Some(NOBODY))?;
    let user = NOBODY.to_string();
    let wrapper = ["setpriv", "--reuid", &user, "--regid", &user, "--clear-groups"];
    let finished = shell(&wrapper, AS_JSON, &program, &data)?;
    let told = report(&finished)?;
    is_well_formed(&told)?;
    ensure!(told["server_of"] == "user", "{told:#}");
    ensure!((finished.code()? == 0) == (told["sound"] == true), "{told:#}");
    ensure!(finding(&told, "data directory")?["state"] != "missing", "{told:#}");
    let namespaces = finding(&told, "unprivileged user namespaces")?;
    ensure!(namespaces["required"] == true, "{namespaces:#}");
    ensure!(finding(&told, "erofs layers").is_err(), "a user mounts no layers: {told:#}");
    // Nobody gave this user ids, or a directory of root's.
    ensure!(finding(&told, "subordinate ids")?["state"] == "missing", "{told:#}");
    let finished = shell(&wrapper, AS_JSON, &program, &home.path().join("roots"))?;
    let told = report(&finished)?;
    ensure!(finished.code()? == 1 && finding(&told, "data directory")?["state"] == "missing", "{told:#}");
    ensure!(fs::read_dir(&data)?.next().is_none(), "something was made in the data directory");
    Ok(())
}

#[test]
fn without_user_namespaces_nothing_starts_and_the_setting_is_named() -> Result<()> {
    let home = paths::scratch("doctor")?;
    let program = paths::funtainer()?;
    let wrapper = ["unshare", "--user", "--map-root-user"];
    let forbid = "echo 0 >/proc/sys/user/max_user_namespaces; ";
    let finished = shell(&wrapper, &format!("{forbid}{AS_JSON}"), &program, home.path())?;
    let report = report(&finished)?;
    is_well_formed(&report)?;
    ensure!(finished.code()? == 1 && report["sound"] == false, "{report:#}");
    let namespaces = finding(&report, "user namespaces")?;
    ensure!(namespaces["state"] == "missing" && namespaces["required"] == true, "{namespaces:#}");
    says(namespaces, "cure", "sysctl -w user.max_user_namespaces=65536")?;
    let users = finding(&report, "unprivileged user namespaces")?;
    ensure!(users["state"] == "missing" && users["required"] == false, "{users:#}");
    let script = format!("{forbid}exec \"$1\" doctor --data \"$2\"");
    let text = shell(&wrapper, &script, &program, home.path())?;
    ensure!(text.code()? == 1, "{}", text.out());
    let last = text.out().trim_end().lines().last().unwrap_or_default().to_owned();
    ensure!(last.starts_with("root's server cannot start here without: user namespaces"), "{last}");
    Ok(())
}

/// On tmpfs layers need loop devices on every kernel; in a mount namespace where `/dev` is empty there are none.
#[test]
fn without_loop_devices_layers_need_a_disk() -> Result<()> {
    let home = paths::scratch("doctor")?;
    let program = paths::funtainer()?;
    let data = home.path().join("data");
    fs::create_dir(&data)?;
    let there = "mount -t tmpfs none \"$2\"; ";
    let finished = shell(&["unshare", "--mount"], &format!("{there}{AS_JSON}"), &program, &data)?;
    let told = report(&finished)?;
    let layers = finding(&told, "erofs layers")?;
    ensure!(finished.code()? == 0 && layers["state"] == "degraded", "{told:#}");
    says(layers, "found", "loop devices")?;
    ensure!(finding(&told, "data directory")?["state"] == "degraded", "{told:#}");

    let hidden = "mount -t tmpfs none \"$2\"; mount -t tmpfs none /dev; ";
    let finished = shell(&["unshare", "--mount"], &format!("{hidden}{AS_JSON}"), &program, &data)?;
    let told = report(&finished)?;
    is_well_formed(&told)?;
    let layers = finding(&told, "erofs layers")?;
    ensure!(finished.code()? == 1 && layers["state"] == "missing", "{told:#}");
    says(layers, "cure", "modprobe loop")?;
    ensure!(finding(&told, "overlay")?["state"] == "unknown", "{told:#}");

    // The server says the same, and where to look.
    let serve = "exec \"$1\" serve --listen 127.0.0.1:0 --admin \"$2/admin.sock\" --data \"$2/data\"";
    let finished = shell(&["unshare", "--mount"], &format!("{hidden}{serve}"), &program, &data)?;
    let said = finished.err();
    ensure!(finished.code()? == 1 && said.contains("modprobe loop") && said.contains("`funtainer doctor`"), "{said}");
    Ok(())
}

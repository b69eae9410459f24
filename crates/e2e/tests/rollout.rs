//! A new image for a running function: no call fails, and what cannot start changes nothing.

use std::time::Duration;

use anyhow::{Result, ensure};
use funtainer_e2e::image::catalog;
use funtainer_e2e::load::Load;
use funtainer_e2e::wait;
use funtainer_e2e::world::scenario;
use serde_json::Value;

const LIMIT: Duration = Duration::from_mins(1);

#[test]
fn a_deploy_over_a_running_function_fails_no_call() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("hello", &catalog::hello_with("zero")?, &["--concurrency", "4"])?;
        let load = Load::start(&server.tcp(), "/function/hello", 8);
        load.more(200, LIMIT)?;
        for greeting in ["one", "two", "three", "four"] {
            let old = server.instance_ids("hello")?;
            server.deploy("hello", &catalog::hello_with(greeting)?, &["--concurrency", "4"])?;
            let answer = server.get("/function/hello")?.text();
            ensure!(answer == format!("{greeting}, world\n"), "after the deploy of {greeting}: {answer}");
            load.more(200, LIMIT)?;
            wait::until_true("the old instances are gone", LIMIT, || {
                let now = server.instance_ids("hello")?;
                Ok(old.iter().all(|id| !now.contains(id)))
            })?;
        }
        let tally = load.stop();
        ensure!(tally.failed() == 0, "{tally:?}");
        Ok(())
    })
}

#[test]
fn calls_that_are_under_way_finish_on_the_old_revision() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("probe", &catalog::probe(&["REVISION=old"], &[])?, &[])?;
        let mut connection = server.connect()?;
        connection.send("GET", "/function/probe/stream?4,400", &[], b"")?;
        let head = connection.head()?;
        server.deploy("probe", &catalog::probe(&["REVISION=new"], &[])?, &[])?;
        ensure!(server.get("/function/probe/env")?.text().contains("REVISION=new\n"));
        let mut lines = Vec::new();
        connection.body(&head, |piece| lines.extend_from_slice(piece))?;
        ensure!(lines == b"line 0\nline 1\nline 2\nline 3\n", "{}", String::from_utf8_lossy(&lines));
        Ok(())
    })
}

#[test]
fn a_revision_that_cannot_start_changes_nothing() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("hello", &catalog::hello()?, &[])?;
        let before = server.describe("hello")?;
        let load = Load::start(&server.tcp(), "/function/hello", 4);
        load.more(50, LIMIT)?;
        server.import(&catalog::exits()?, "exits:1")?;
        server.refused(["deploy", "hello", "--image", "exits:1"], 1, "instance-exited")?;
        server.import(&catalog::command_missing()?, "missing:1")?;
        server.refused(["deploy", "hello", "--image", "missing:1"], 1, "command-not-found")?;
        load.more(50, LIMIT)?;
        let tally = load.stop();
        ensure!(tally.failed() == 0, "{tally:?}");
        let after = server.describe("hello")?;
        for key in ["revision", "image", "digest", "settings"] {
            ensure!(before[key] == after[key], "{key} changed: {before} to {after}");
        }
        ensure!(after["last_error"] != Value::Null, "the failed deploy is not shown: {after}");
        Ok(())
    })
}

#[test]
fn a_removal_under_load_answers_every_call() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("hello", &catalog::hello()?, &[])?;
        let load = Load::start(&server.tcp(), "/function/hello", 8);
        load.more(100, LIMIT)?;
        server.ok(["remove", "hello"])?;
        let tally = load.stop();
        ensure!(tally.refused == 0 && tally.broken == 0, "{tally:?}");
        ensure!(tally.statuses.keys().all(|status| [200, 404, 410].contains(status)), "{tally:?}");
        ensure!(server.ask("GET", "/functions", b"")?.text().trim() == "[]");
        Ok(())
    })
}

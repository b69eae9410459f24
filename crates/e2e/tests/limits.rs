//! Limits of an instance: each is reached by a function that asks for more, beside one that has more.

use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use funtainer_e2e::image::{Compression, Config, Image, Tree, catalog, program};
use funtainer_e2e::leak::parse;
use funtainer_e2e::server::Server;
use funtainer_e2e::wait;
use funtainer_e2e::world::scenario;

const LIMIT: Duration = Duration::from_mins(1);

/// The number at the beginning of an answer.
fn number(text: &str) -> Result<u64> {
    let digits = text.split_whitespace().next().unwrap_or_default();
    digits.parse().with_context(|| format!("no number: {text}"))
}

fn asked(server: &Server, name: &str, what: &str) -> Result<String> {
    Ok(server.get(&format!("/function/{name}{what}"))?.text())
}

fn amount(server: &Server, name: &str, what: &str) -> Result<u64> {
    number(&asked(server, name, what)?)
}

/// One file of the control group that the only instance of a function is in: by its name on v1, or that on v2.
fn group_file(server: &Server, function: &str, controller: &str, v1: &str, v2: &str) -> Result<String> {
    let pid = server.init_pids(function)?.first().copied().context("no instance")?;
    let groups = std::fs::read_to_string(format!("/proc/{pid}/cgroup"))?;
    let place = |options: &str, path: &str| -> Option<PathBuf> {
        let mounts = parse::cgroup_mounts().ok()?;
        let (mount, _) = mounts.into_iter().find(|(_, found)| found.split(',').any(|option| option == options))?;
        Some(mount.join(path.trim_start_matches('/')))
    };
    let lines = || groups.lines().filter_map(|line| line.split_once(':')?.1.split_once(':'));
    let old = lines().find(|(names, _)| names.split(',').any(|name| name == controller));
    let file = match old {
        Some((_, path)) => place(controller, path).map(|group| group.join(v1)),
        None => {
            lines().find(|(names, _)| names.is_empty()).and_then(|(_, path)| place("cgroup2", path)).map(|group| group.join(v2))
        }
    };
    read(&file.with_context(|| format!("no group of {controller} in\n{groups}"))?)
}

fn read(path: &Path) -> Result<String> {
    std::fs::read_to_string(path).with_context(|| path.display().to_string())
}

/// What `describe` says of the last failure.
fn last_error(server: &Server, name: &str) -> Result<Option<String>> {
    let described = server.describe(name)?;
    let said = &described["last_error"];
    Ok((!said.is_null()).then(|| said.to_string()))
}

/// Waits for a failure that says all the words.
fn fails_with(server: &Server, name: &str, words: &[&str]) -> Result<String> {
    let mut seen = String::new();
    let found = wait::until("the failure is told", LIMIT, || {
        seen = last_error(server, name)?.unwrap_or_default();
        Ok(words.iter().all(|word| seen.contains(word)).then(|| seen.clone()))
    });
    found.with_context(|| format!("{words:?} in {seen:?}"))
}

#[test]
fn processor_time_is_bounded_and_shared() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        let probe = catalog::probe(&[], &[])?;
        server.deploy("held", &probe, &["--cpus", "0.1", "--cpu-weight", "200"])?;
        server.deploy("free", &probe, &[])?;
        // 300 ms of a processor, 10 ms in each 100: all but the last ten need a whole period.
        let took = amount(&server, "held", "/burn?300")?;
        ensure!(took >= 2_500_000, "a tenth of a processor gave 300 ms in {took} µs");
        wait::until_true("the machine is quiet enough for the other one to be faster", LIMIT, || {
            Ok(amount(&server, "free", "/burn?300")? < took)
        })?;
        let weight = group_file(&server, "held", "cpu", "cpu.shares", "cpu.weight")?;
        ensure!(["2048\n", "200\n"].contains(&weight.as_str()), "{weight}");
        let weight = group_file(&server, "free", "cpu", "cpu.shares", "cpu.weight")?;
        ensure!(["1024\n", "100\n"].contains(&weight.as_str()), "{weight}");
        Ok(())
    })
}

#[test]
fn threads_and_open_files_are_bounded() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        let probe = catalog::probe(&[], &[])?;
        server.deploy("held", &probe, &["--pids", "20", "--open-files", "64"])?;
        server.deploy("free", &probe, &[])?;
        let threads = asked(&server, "held", "/threads?500")?;
        ensure!(number(&threads)? < 20 && threads.contains("temporarily unavailable"), "{threads}");
        ensure!(amount(&server, "free", "/threads?500")? == 500);
        let files = asked(&server, "held", "/open?500")?;
        ensure!((40..64).contains(&number(&files)?) && files.contains("Too many open files"), "{files}");
        ensure!(amount(&server, "free", "/open?500")? == 500);
        // The bombed one goes on with what it has.
        ensure!(asked(&server, "held", "/")? == "probe\n");

        let limits = asked(&server, "held", "/file?/proc/self/limits")?;
        let of = |name: &str| {
            let line = limits.lines().find_map(|line| line.strip_prefix(name));
            line.map(|line| line.split_whitespace().take(2).collect::<Vec<_>>().join(" "))
        };
        ensure!(of("Max open files").as_deref() == Some("64 64"), "{limits}");
        ensure!(of("Max core file size").as_deref() == Some("1 1"), "{limits}");
        Ok(())
    })
}

#[test]
fn whoever_takes_more_memory_than_it_may_ends_alone() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        let probe = catalog::probe(&[], &[])?;
        server.deploy("held", &probe, &["--memory", "64M"])?;
        server.deploy("free", &probe, &["--memory", "512M"])?;
        // Memory of its own, files in the writable layer, shared memory.
        for bomb in ["/allocate?200", "/fill?/tmp/large,200", "/fill?/dev/shm/large,200"] {
            let before = server.init_pids("free")?;
            let victim = server.instance_ids("held")?.pop().context("an instance")?;
            let answer = server.call("GET", &format!("/function/held{bomb}"), &[], b"")?;
            if bomb.contains("shm") && answer.status == 200 {
                // It has a bound of its own, which may be met first.
                ensure!(number(&answer.text())? <= 64 << 20, "{}", answer.text());
            } else {
                ensure!(answer.status >= 500, "{bomb}: {answer:?}");
                fails_with(&server, "held", &[&victim, "out-of-memory", "killed for its memory", "memory peak"])?;
            }
            ensure!(server.init_pids("free")? == before, "the neighbour did not stay as it was");
            ensure!(asked(&server, "held", "/")? == "probe\n", "it is not started again");
        }
        ensure!(amount(&server, "free", "/allocate?200")? > 0);
        ensure!(amount(&server, "free", "/fill?/tmp/large,200")? == 200 << 20);
        ensure!(last_error(&server, "free")?.is_none());
        Ok(())
    })
}

#[test]
fn the_page_cache_counts_and_is_given_back() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        // Bytes that do not compress to nothing, so that they take as much room anywhere.
        let large: Vec<u8> = (0_u32..24 << 20).flat_map(|word| word.wrapping_mul(0x9E37_79B1).to_le_bytes()).collect();
        let file = Tree::new().file("large", 0o644, &large)?.layer(Compression::Plain)?;
        let program =
            Tree::new().directory("tmp", 0o1777)?.host_file("probe", &program::probe()?)?.layer(Compression::Plain)?;
        let image = Image::build(vec![file, program], &Config::command(&["/probe"]))?;
        server.deploy("held", &image, &["--memory", "32M"])?;
        server.deploy("free", &image, &["--memory", "512M"])?;
        let used = |name: &str| -> Result<u64> {
            number(&group_file(&server, name, "memory", "memory.usage_in_bytes", "memory.current")?)
        };
        ensure!(amount(&server, "held", "/read?/large")? == large.len() as u64);
        let held = used("held")?;
        ensure!((8 << 20..=32 << 20).contains(&held), "{held} bytes are in use");
        ensure!(amount(&server, "free", "/read?/large")? == large.len() as u64);
        let free = used("free")?;
        ensure!(free >= 48 << 20, "only {free} bytes are in use");
        Ok(())
    })
}

#[test]
fn a_kill_for_memory_is_told_of_the_instance_that_had_it() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("pair", &catalog::probe(&[], &[])?, &["--memory", "64M", "--concurrency", "1", "--max", "2"])?;
        server.ok(["scale", "pair", "2"])?;
        let before = server.instance_ids("pair")?;
        ensure!(before.len() == 2, "{before:?}");
        let answer = server.call("GET", "/function/pair/allocate?200", &[], b"")?;
        ensure!(answer.status >= 500, "{answer:?}");
        let said = fails_with(&server, "pair", &["killed for its memory"])?;
        let named: Vec<_> = before.iter().filter(|id| said.contains(id.as_str())).collect();
        ensure!(named.len() == 1, "{said} of {before:?}");
        let survivor = before.iter().find(|id| *id != named[0]).context("another one")?;
        ensure!(server.instance_ids("pair")?.contains(survivor), "{survivor} did not survive");
        Ok(())
    })
}

#[test]
fn the_writable_layer_is_bounded_in_bytes_and_files() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        let probe = catalog::probe(&[], &[])?;
        server.deploy("held", &probe, &["--writable", "8M", "--memory", "256M"])?;
        server.deploy("free", &probe, &["--memory", "256M"])?;
        let files = asked(&server, "held", "/files?/tmp,20000")?;
        ensure!((2000..=4096).contains(&number(&files)?) && files.contains("No space left"), "{files}");
        ensure!(amount(&server, "free", "/files?/tmp,20000")? == 20_000);
        server.call("GET", "/function/held/exit?3", &[], b"")?;
        fails_with(&server, "held", &["exit code 3", "its writable layer was full", "--writable"])?;

        let filled = asked(&server, "held", "/fill?/tmp/large,100")?;
        let room = number(&filled)?;
        ensure!((7 << 20..=8 << 20).contains(&room) && filled.contains("No space left"), "{filled}");
        ensure!(amount(&server, "free", "/fill?/tmp/large,100")? == 100 << 20);
        // A command that is run for one call says it in the answer's hint.
        let script = "dd if=/dev/zero of=/tmp/large bs=1M count=100";
        server.import(&catalog::busybox(&["/bin/sh", "-c", script])?, "writer:1")?;
        server.ok(["deploy", "writer", "--image", "writer:1", "--contract", "stdio", "--writable", "4M"])?;
        let answer = server.call("POST", "/function/writer", &[], b"")?.text();
        ensure!(answer.contains("command-failed") && answer.contains("--writable"), "{answer}");
        Ok(())
    })
}

#[test]
fn what_was_used_is_told_at_the_end() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("f", &catalog::probe(&[], &[])?, &["--memory", "256M"])?;
        amount(&server, "f", "/allocate?100")?;
        amount(&server, "f", "/burn?400")?;
        server.call("GET", "/function/f/exit?3", &[], b"")?;
        let said = fails_with(&server, "f", &["exit code 3", "memory peak", "s of processor time"])?;
        let before = |words: &str| -> Result<f64> {
            let front = said.split_once(words).with_context(|| said.clone())?.0;
            Ok(front.rsplit([' ', '(']).next().unwrap_or_default().parse()?)
        };
        let peak = said.split_once("memory peak ").and_then(|(_, rest)| rest.split_once('M')).context("a peak")?.0;
        let (peak, time): (u64, f64) = (peak.parse()?, before(" s of processor time")?);
        ensure!((100..=140).contains(&peak), "{said}");
        ensure!((0.4..60.0).contains(&time), "{said}");
        Ok(())
    })
}

#[test]
fn limits_that_cannot_be_are_refused_and_large_ones_are_warned_of() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.import(&catalog::probe(&[], &[])?, "probe:1")?;
        let deploy = ["deploy", "f", "--image", "probe:1"];
        for (flags, words) in [
            (["--memory", "99999G"], "16T"),
            (["--memory", "1K"], "4M"),
            (["--writable", "99T"], "16T"),
            (["--cpu-weight", "10001"], "10000"),
            (["--pids", "1"], "from 2"),
            (["--open-files", "2"], "from 16"),
        ] {
            let said = server.refused(deploy.into_iter().chain(flags), 1, "bad-setting")?;
            ensure!(said.contains(words), "{flags:?}: {said}");
        }
        let deployed = server.cli(deploy.into_iter().chain(["--memory", "8T", "--cpus", "9999"]))?;
        ensure!(deployed.code()? == 0, "{deployed:?}");
        let said = deployed.err();
        ensure!(said.contains("warning: --memory 8T is more") && said.contains("warning: --cpus 9999 is more"), "{said}");
        ensure!(asked(&server, "f", "/")? == "probe\n");
        Ok(())
    })
}

//! `kill -9` of each part, and stops under load: what was promised stays, and nothing else does.

use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use funtainer_e2e::http::Connection;
use funtainer_e2e::image::catalog;
use funtainer_e2e::leak::{Subject, parse};
use funtainer_e2e::load::Load;
use funtainer_e2e::server::Server;
use funtainer_e2e::wait;
use funtainer_e2e::world::scenario;
use rustix::process::{Pid, Signal, kill_process};

const LIMIT: Duration = Duration::from_mins(1);
/// All that a killed keeper leaves must be gone within this time.
const GONE_LIMIT: Duration = Duration::from_secs(1);
/// Connections of the load.
const CONNECTIONS: usize = 8;

fn kill(pid: i32) -> Result<()> {
    Ok(kill_process(Pid::from_raw(pid).context("a process id is positive")?, Signal::KILL)?)
}

/// Kills the daemon and waits for the next one.
fn kill_daemon(server: &Server) -> Result<()> {
    let old = server.daemon_pid()?;
    kill(old)?;
    wait::until_true("a new daemon", LIMIT, || Ok(server.daemon_pid().is_ok_and(|pid| pid != old)))
}

#[test]
fn the_daemon_is_killed_under_load() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("hello", &catalog::hello()?, &["--min", "2"])?;
        server.deploy("probe", &catalog::probe(&[], &[])?, &[])?;
        let warm = [server.instance_ids("hello")?, server.instance_ids("probe")?];
        let load = Load::start(&server.tcp(), "/function/hello", CONNECTIONS);
        load.more(200, LIMIT)?;

        // A call in flight: its end is the function's business too.
        let mut hanging = server.connect()?;
        hanging.send("GET", "/function/probe/hang", &[], b"")?;
        wait::until_true("the call has arrived", LIMIT, || Ok(server.get("/function/probe")?.status == 200))?;
        kill_daemon(&server)?;
        ensure!(hanging.closed(), "the caller of a call in flight is not told");
        load.more(200, LIMIT)?;
        wait::until_true("the function learns that its caller is gone", LIMIT, || {
            Ok(server.get("/function/probe/hung-up")?.text() == "1\n")
        })?;

        let tally = load.stop();
        ensure!(tally.refused == 0, "connections were refused: {tally:?}");
        ensure!(tally.broken <= CONNECTIONS as u64, "more calls broke than were in flight: {tally:?}");
        ensure!(tally.failed() == tally.broken, "{tally:?}");
        let now = [server.instance_ids("hello")?, server.instance_ids("probe")?];
        ensure!(warm == now, "warm instances were lost: {warm:?} became {now:?}");
        ensure!(server.get("/function/hello")?.header("server-timing").is_none(), "a warm instance was not used");
        server.ok(["scale", "probe", "0"])?;
        server.get("/function/probe")?;
        Ok(())
    })
}

#[test]
fn the_daemon_is_killed_again_and_again() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("hello", &catalog::hello()?, &[])?;
        server.deploy("cat", &catalog::busybox(&["/bin/cat"])?, &["--contract", "stdio"])?;
        let warm = server.instance_ids("hello")?;
        // More often than a crash loop may last: each of these daemons had become ready.
        for round in 0..12 {
            // A command in flight has lost its pipes with the daemon, and ends.
            let mut connection = server.connect()?;
            connection.raw(b"POST /function/cat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")?;
            connection.chunk(b"x")?;
            let titles = || -> Result<usize> {
                let members = world.members()?;
                let all = members.iter().filter_map(|pid| parse::process(*pid).transpose()).collect::<Result<Vec<_>>>()?;
                Ok(all.iter().filter(|process| process.title == "/bin/cat").count())
            };
            wait::until_true("the command runs", LIMIT, || Ok(titles()? == 1))?;
            kill_daemon(&server)?;
            ensure!(server.get("/function/hello")?.status == 200, "round {round}");
            wait::until_true("the command is gone", LIMIT, || Ok(titles()? == 0))?;
        }
        ensure!(server.instance_ids("hello")? == warm, "the warm instance was lost");
        ensure!(server.call("POST", "/function/cat", &[], b"still")?.expect(200)?.body == b"still");
        Ok(())
    })
}

#[test]
fn the_keeper_is_killed_under_load() -> Result<()> {
    scenario(|world| {
        let mut server = world.serve()?;
        let places = server.places().clone();
        let images = [catalog::hello_with("a")?, catalog::hello_with("b")?, catalog::busybox(&["/bin/cat"])?];
        server.deploy("a", &images[0], &["--min", "3"])?;
        server.deploy("b", &images[1], &[])?;
        server.deploy("cat", &images[2], &["--contract", "stdio"])?;
        let load = Load::start(&server.tcp(), "/function/a", CONNECTIONS);
        load.more(100, LIMIT)?;
        let started = Connection::open(&server.tcp()).and_then(|mut connection| {
            connection
                .raw(b"POST /function/cat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n1\r\nx\r\n")
                .map(|()| connection)
        })?;

        kill(server.pid())?;
        let killed = Instant::now();
        let left = Subject { killed: true, ..world.subject() }.leaks_after(world.before(), GONE_LIMIT)?;
        ensure!(left.is_empty(), "{:?} after the keeper's death: {left:?}", killed.elapsed());
        ensure!(server.ended(LIMIT)?.is_some());
        load.stop();
        drop((started, server));

        let server = world.serve_at(&places, "127.0.0.1:0")?;
        for (path, expect) in [("/function/a", "a, world\n"), ("/function/b", "b, world\n")] {
            ensure!(server.get(path)?.text() == expect);
        }
        ensure!(server.call("POST", "/function/cat", &[], b"again")?.expect(200)?.body == b"again");
        // The control groups of the dead are gone while the new server runs: each that is left belongs to an instance or zygote of now.
        let id = std::fs::read_to_string(places.data.join("id"))?;
        for group in parse::product_cgroups()? {
            let ours = group.components().any(|part| part.as_os_str() == format!("funtainer-{}", id.trim()).as_str());
            ensure!(!ours || parse::cgroup_members(&group).is_ok(), "{}", group.display());
        }
        Ok(())
    })
}

#[test]
fn a_zygote_is_killed() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("hello", &catalog::hello()?, &[])?;
        for _ in 0..5 {
            let zygote = server.zygote_pid("hello")?.context("hello has no zygote")?;
            kill(zygote)?;
            wait::until_true("the zygote is reaped", LIMIT, || Ok(parse::process(zygote)?.is_none()))?;
            // Its instance is gone with it; the call gets another one, or is told that the platform failed it and is right the next time.
            wait::until_true("the function answers again", LIMIT, || {
                Ok(server.call("GET", "/function/hello", &[], b"")?.status == 200)
            })?;
        }
        Ok(())
    })
}

#[test]
fn an_instance_is_killed_under_load() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("hello", &catalog::hello()?, &["--min", "1"])?;
        let load = Load::start(&server.tcp(), "/function/hello", CONNECTIONS);
        for _ in 0..5 {
            load.more(50, LIMIT)?;
            let init = server.init_pids("hello")?.first().copied();
            // With several instances it may be the one of the round before, whose end is not told yet.
            if let Some(init) = init.filter(|init| parse::process(*init).is_ok_and(|process| process.is_some())) {
                kill(init)?;
            }
        }
        load.more(50, LIMIT)?;
        let tally = load.stop();
        ensure!(tally.refused == 0 && tally.broken == 0, "the platform broke connections of callers: {tally:?}");
        // Calls that were in the killed instance fail; they are few.
        ensure!(tally.failed() <= 5 * 2 * CONNECTIONS as u64, "{tally:?}");
        Ok(())
    })
}

#[test]
fn a_stop_lets_calls_finish_and_ends_those_that_do_not() -> Result<()> {
    scenario(|world| {
        let mut server = world.serve()?;
        server.deploy("probe", &catalog::probe(&[], &[])?, &[])?;
        let mut finishing = server.connect()?;
        finishing.send("GET", "/function/probe/stream?4,300", &[], b"")?;
        let head = finishing.head()?;
        let mut hanging = server.connect()?;
        hanging.send("GET", "/function/probe/hang", &[], b"")?;
        let reader = std::thread::spawn(move || {
            let mut body = Vec::new();
            finishing.body(&head, |piece| body.extend_from_slice(piece)).map(|_| body)
        });
        let start = Instant::now();
        let status = server.end(Signal::TERM)?;
        ensure!(status.code() == Some(0), "{status}");
        ensure!(start.elapsed() < wait::patient(Duration::from_secs(13)), "the stop took {:?}", start.elapsed());
        let body = reader.join().map_err(|_| anyhow::anyhow!("the reader panicked"))??;
        ensure!(body.ends_with(b"line 3\n"), "{}", String::from_utf8_lossy(&body));
        // Broken off, or told so.
        ensure!(!hanging.head().is_ok_and(|head| head.status < 500));
        Ok(())
    })
}

#[test]
fn a_second_server_in_the_same_place_is_refused() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("hello", &catalog::hello()?, &[])?;
        let places = server.places();
        let refused = |data: &std::path::Path, admin: &std::path::Path, listen: &str, words: &[&str]| -> Result<()> {
            let (data, admin) = (data.display().to_string(), admin.display().to_string());
            let finished = server.cli(["serve", "--listen", listen, "--admin", &admin, "--data", &data])?;
            let said = finished.err();
            ensure!(finished.code()? == 1 && finished.stdout.is_empty(), "{finished:?}");
            for word in words {
                ensure!(said.contains(word), "'{word}' is not in:\n{said}");
            }
            Ok(())
        };
        let other = world.home().join("other");
        let other_admin = world.home().join("other.sock");
        refused(&places.data, &other_admin, "127.0.0.1:0", &[&places.data.display().to_string()])?;
        refused(&other, &places.admin, "127.0.0.1:0", &[&places.admin.display().to_string()])?;
        refused(&other, &other_admin, &server.address().to_string(), &[&server.address().to_string()])?;
        ensure!(places.admin.exists() && server.get("/function/hello")?.status == 200, "the first server was disturbed");
        ensure!(!other_admin.exists(), "a refused server left its socket");
        Ok(())
    })
}

#[test]
fn a_stale_admin_socket_is_replaced() -> Result<()> {
    scenario(|world| {
        let admin = world.home().join("admin0.sock");
        drop(std::os::unix::net::UnixListener::bind(&admin)?);
        ensure!(admin.exists());
        let server = world.serve()?;
        ensure!(server.places().admin == admin);
        let mode = std::os::unix::fs::PermissionsExt::mode(&std::fs::metadata(&admin)?.permissions());
        ensure!(mode & 0o777 == 0o660, "mode {mode:o}");
        ensure!(server.ok(["list", "--output", "json"])?.trim() == "[]");
        Ok(())
    })
}

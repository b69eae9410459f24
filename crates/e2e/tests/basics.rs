//! From an image name to an answered call: deploy, call cold and warm, scale, list, describe, logs, remove.

use std::collections::BTreeSet;
use std::fs;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use funtainer_e2e::image::catalog;
use funtainer_e2e::leak::parse;
use funtainer_e2e::registry::Registry;
use funtainer_e2e::server::Server;
use funtainer_e2e::wait;
use funtainer_e2e::world::scenario;
use serde_json::{Value, json};

const LIMIT: Duration = Duration::from_secs(30);

/// The process of an image that init has started.
fn child_of(init: i32) -> Result<parse::Process> {
    parse::processes()?.into_iter().find(|process| process.parent == init).with_context(|| format!("init {init} has no child"))
}

#[test]
fn from_a_registry_to_answered_calls_and_back_to_nothing() -> Result<()> {
    scenario(|world| {
        let registry = Registry::start()?;
        let image = catalog::hello()?;
        let reference = registry.push(&image, "basics/hello", "1")?;
        let server = world.serve()?;
        server.ok(["deploy", "hello", "--image", &reference])?;

        let described = server.describe("hello")?;
        for (key, expect) in [
            ("name", json!("hello")),
            ("image", json!(reference)),
            ("digest", json!(image.digest())),
            ("contract", json!("http")),
            ("port", json!(8080)),
            ("last_error", Value::Null),
        ] {
            ensure!(described[key] == expect, "{key} is {}, not {expect}", described[key]);
        }
        let defaults = json!({"memory": "512M", "concurrency": 80, "min": 0, "max": 20, "queue": 1000, "idle_timeout": "10m", "start_timeout": "1m", "timeout": "5m"});
        for (key, expect) in defaults.as_object().context("an object")? {
            ensure!(described["settings"][key] == *expect, "setting {key} is {}, not {expect}", described["settings"][key]);
        }
        ensure!(described["revision"].as_str().is_some_and(|id| id.len() == 36), "no revision in {described}");
        let inits = server.init_pids("hello")?;
        ensure!(inits.len() == 1, "deploy leaves the instance that it started: {described}");
        let process = child_of(inits[0])?;
        ensure!(process.title == "/hello", "{process:?}");

        let warm = server.get("/function/hello")?;
        ensure!(warm.text() == "hello, world\n" && warm.header("server-timing").is_none(), "{warm:?}");
        server.ok(["scale", "hello", "0"])?;
        for pid in [inits[0], process.pid] {
            ensure!(parse::process(pid)?.is_none(), "scale 0 returned before {pid} was reaped");
        }
        ensure!(server.instances("hello")? == 0);

        let cold = server.get("/function/hello/you/there?and=more")?;
        ensure!(cold.text() == "hello, you/there\n", "{cold:?}");
        let timing = cold.header("server-timing").context("a cold answer names its phases")?;
        ensure!(timing.split(',').all(|phase| phase.contains(";dur=")), "{timing}");
        let ids = [&warm, &cold].map(|response| response.header("x-call-id").map(str::to_owned));
        ensure!(ids.iter().all(Option::is_some) && ids[0] != ids[1], "{ids:?}");

        server.ok(["remove", "hello"])?;
        let gone = server.call("GET", "/function/hello", &[], b"")?;
        ensure!(gone.status == 404 && gone.text().starts_with("error[function-unknown]: "), "{gone:?}");
        ensure!(gone.header("x-call-id").is_some(), "{gone:?}");
        server.refused(["describe", "hello"], 1, "function-unknown").map(drop)
    })
}

#[test]
fn commands_show_and_call() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        ensure!(server.get("/healthz")?.status == 200);
        ensure!(server.ok(["version"])?.contains(env!("CARGO_PKG_VERSION")));
        ensure!(serde_json::from_str::<Value>(&server.ok(["list", "--output", "json"])?)? == json!([]));
        server.deploy("hello", &catalog::hello()?, &["--env", "GREETING=good day"])?;
        server.deploy("probe", &catalog::probe(&[], &[])?, &["--arg", "one", "--arg", "two three"])?;

        let table = server.ok(["list"])?;
        ensure!(table.contains("hello") && table.contains("probe"), "{table}");
        let list: Value = serde_json::from_str(&server.ok(["list", "--output", "json"])?)?;
        let names: Vec<_> = list.as_array().context("a list")?.iter().map(|function| function["name"].clone()).collect();
        ensure!(names == [json!("hello"), json!("probe")], "{names:?}");
        let images: Value = serde_json::from_str(&server.ok(["images", "--output", "json"])?)?;
        ensure!(images.as_array().is_some_and(|images| images.len() == 2), "{images}");

        ensure!(server.ok(["invoke", "hello"])? == "good day, world\n");
        ensure!(server.ok(["invoke", "hello", "-d", "bob"])? == "good day, bob\n");
        let file = world.home().join("body");
        fs::write(&file, "eve")?;
        ensure!(server.ok(["invoke", "hello", "-d", &format!("@{}", file.display())])? == "good day, eve\n");
        let piped = server.cli_with(["invoke", "hello"], b"mallory")?;
        ensure!(piped.out() == "good day, mallory\n", "{piped:?}");

        ensure!(server.get("/function/probe/args")?.text() == "/probe\none\ntwo three\n");
        server.get("/function/probe/log?a-word")?;
        wait::until_true("both streams are in the log", LIMIT, || {
            let log = server.ok(["logs", "probe"])?;
            Ok(["probe starts", "out: a-word", "err: a-word"].iter().all(|line| log.contains(line)))
        })?;
        // A call that the function refuses is a failed command.
        let refused = server.cli(["invoke", "nobody"])?;
        ensure!(refused.code()? == 1 && refused.err().contains("error[function-unknown]"), "{refused:?}");
        Ok(())
    })
}

#[test]
fn requests_arrive_as_they_were_sent() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("probe", &catalog::probe(&[], &[])?, &[])?;
        let headers = [("X-Mine", "as sent"), ("Connection", "x-hop, keep-alive"), ("X-Hop", "for the platform")];
        let seen = server.call("PUT", "/function/probe/request?a=1&b=%20", &headers, b"body")?.expect(200)?;
        let (text, lower) = (seen.text(), seen.text().to_ascii_lowercase());
        ensure!(text.starts_with("PUT /request?a=1&b=%20\n"), "{text}");
        ensure!(lower.contains("x-mine: as sent\n"), "{text}");
        ensure!(!lower.contains("x-hop:"), "a header of the connection was passed on:\n{text}");
        let id = seen.header("x-call-id").context("no id")?;
        ensure!(lower.contains(&format!("x-call-id: {id}\n")), "the function was not told the call's id {id}:\n{text}");
        ensure!(lower.contains("x-forwarded-for: 127.0.0.1\n"), "{text}");

        ensure!(
            server.call("DELETE", "/function/probe/request", &[], b"")?.expect(200)?.text().starts_with("DELETE /request\n")
        );
        ensure!(server.get("/function/probe")?.text() == "probe\n", "the path of a bare name is /");
        let teapot = server.call("GET", "/function/probe/status?418", &[], b"")?;
        ensure!(teapot.header("x-funtainer-error").is_none(), "the function's own answer is no platform error: {teapot:?}");
        let head = server.call("HEAD", "/function/probe/big?1000", &[], b"")?;
        ensure!(head.status == 200 && head.header("content-length") == Some("1000"), "{head:?}");
        // By the admin socket, calls are the same.
        let by_admin = server.ask("POST", "/function/probe/echo", b"over the socket")?.expect(200)?;
        ensure!(by_admin.body == b"over the socket");
        // The platform never comes from an address that servers trust.
        let peer = server.get("/function/probe/peer")?.text();
        ensure!(!peer.starts_with("127."), "callers come from {peer}");
        Ok(())
    })
}

#[test]
fn bodies_are_streamed_both_ways() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("probe", &catalog::probe(&[], &[])?, &[])?;
        // An answer arrives while the function still writes.
        let mut connection = server.connect()?;
        connection.send("GET", "/function/probe/stream?2,5000", &[], b"")?;
        let start = Instant::now();
        let head = connection.head()?;
        ensure!(connection.first_piece(&head)?.as_deref() == Some(&b"line 0\n"[..]));
        ensure!(start.elapsed() < Duration::from_millis(4500), "the first line took {:?}", start.elapsed());
        drop(connection);

        // A body of 256 MiB passes through, and the daemon does not hold it.
        let mut connection = server.connect()?;
        connection.raw(b"POST /function/probe/count HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        let piece = vec![b'x'; 1 << 20];
        for _ in 0..256 {
            connection.chunk(&piece)?;
        }
        connection.chunk(b"")?;
        let head = connection.head()?;
        let mut counted = Vec::new();
        connection.body(&head, |piece| counted.extend_from_slice(piece))?;
        ensure!(counted == format!("{}\n", 256 << 20).as_bytes(), "{}", String::from_utf8_lossy(&counted));
        let big = server.get("/function/probe/big?200000000")?;
        ensure!(big.body.len() == 200_000_000 && big.body.iter().all(|byte| *byte == b'x'));
        let status = fs::read_to_string(format!("/proc/{}/status", server.daemon_pid()?))?;
        let peak = status.lines().find_map(|line| line.strip_prefix("VmHWM:")).context("no VmHWM")?;
        let peak: u64 = peak.trim().trim_end_matches(" kB").parse()?;
        ensure!(peak < 128 * 1024, "the daemon's memory peaked at {peak} KiB: bodies are held");

        // An answer before the end of the body is passed on; what else was sent is the function's affair.
        let mut connection = server.connect()?;
        connection.raw(b"POST /function/probe/early HTTP/1.1\r\nHost: x\r\nContent-Length: 1000000\r\n\r\nx")?;
        ensure!(connection.head()?.status == 403);
        // A broken answer is broken for the caller too.
        ensure!(server.get("/function/probe/cut").is_err(), "an answer that was cut off looks whole");
        let garbage = server.call("GET", "/function/probe/garbage", &[("Accept", "application/json")], b"")?.expect(502)?;
        ensure!(garbage.json()?["code"] == "function-protocol", "{garbage:?}");
        Ok(())
    })
}

#[test]
fn scaling_is_by_hand_within_bounds_and_by_calls() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("probe", &catalog::probe(&[], &[])?, &["--min", "1", "--max", "3", "--concurrency", "1"])?;
        server.ok(["scale", "probe", "3"])?;
        ensure!(server.instances("probe")? == 3);
        server.refused(["scale", "probe", "4"], 1, "scale-out-of-range")?;
        ensure!(server.instances("probe")? == 3, "a refusal changed something");
        let before = server.init_pids("probe")?;
        server.ok(["scale", "probe", "1"])?;
        let left = server.init_pids("probe")?;
        ensure!(left.len() == 1, "{left:?}");
        for pid in before.iter().filter(|pid| !left.contains(pid)) {
            ensure!(parse::process(*pid)?.is_none(), "{pid} is not reaped");
        }
        // 0 is allowed whatever min says, and is no setting: a call wakes.
        server.ok(["scale", "probe", "0"])?;
        ensure!(server.instances("probe")? == 0);
        server.get("/function/probe")?;

        // Three slow calls at once, one in each instance: three instances.
        let mut connections = Vec::new();
        for _ in 0..3 {
            let mut connection = server.connect()?;
            connection.send("GET", "/function/probe/hang", &[], b"")?;
            connections.push(connection);
        }
        wait::until_true("three instances for three calls", LIMIT, || Ok(server.instances("probe")? == 3))?;
        drop(connections);
        Ok(())
    })
}

#[test]
fn an_idle_function_runs_nothing_and_wakes() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("hello", &catalog::hello()?, &["--idle-timeout", "300ms"])?;
        let call = |expect_cold: bool| -> Result<()> {
            let response = server.get("/function/hello")?;
            ensure!(response.header("server-timing").is_some() == expect_cold, "{response:?}");
            Ok(())
        };
        for _ in 0..3 {
            wait::until_true("the idle instance ends", LIMIT, || Ok(server.instances("hello")? == 0))?;
            call(true)?;
        }
        Ok(())
    })
}

#[test]
fn a_full_queue_refuses_and_says_when_to_come_back() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        let settings = json!({"concurrency": 1, "max": 1, "queue": 2, "timeout": "60s"});
        server.deploy_by_api("probe", &catalog::probe(&[], &[])?, settings)?.expect(200)?;
        let mut waiting = Vec::new();
        // One in the function and two in the queue; a fourth finds no place. Calls arrive in any order, so more are sent until one is refused.
        let refused = wait::until("a call is refused", LIMIT, || {
            let mut connection = server.connect()?;
            connection.send("GET", "/function/probe/hang", &[("Accept", "application/json")], b"")?;
            waiting.push(connection);
            if waiting.len() < 4 {
                return Ok(None);
            }
            let response = server.call("GET", "/function/probe/hang", &[("Accept", "application/json")], b"")?;
            Ok((response.status == 429).then_some(response))
        })?;
        ensure!(refused.header("retry-after").is_some_and(|after| after.parse::<u64>().is_ok()), "{refused:?}");
        ensure!(refused.json()?["code"] == "queue-full", "{refused:?}");
        drop(waiting);
        wait::until_true("the queue is empty again", LIMIT, || {
            Ok(server.call("GET", "/function/probe", &[], b"")?.status == 200)
        })
    })
}

#[test]
fn calls_and_memory_are_limited() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        // Long enough for 64 MiB to be used up, however slow the machine is.
        let timeout = format!("{}s", wait::patient(Duration::from_secs(1)).as_secs());
        server.deploy("probe", &catalog::probe(&[], &[])?, &["--timeout", &timeout, "--memory", "64M"])?;
        let slow = server.call("GET", "/function/probe/slow?60000", &[("Accept", "application/json")], b"")?.expect(504)?;
        ensure!(slow.json()?["code"] == "call-timeout", "{slow:?}");
        let greedy = server.call("GET", "/function/probe/allocate?500", &[("Accept", "application/json")], b"")?.expect(502)?;
        ensure!(greedy.json()?["code"] == "out-of-memory", "{greedy:?}");
        server.get("/function/probe/allocate?8")?;
        // An instance that ends by itself is replaced at the next call.
        let before = server.instance_ids("probe")?;
        let _ = server.call("GET", "/function/probe/exit?0", &[], b"")?;
        server.get("/function/probe")?;
        ensure!(server.instance_ids("probe")? != before);
        Ok(())
    })
}

#[test]
fn two_functions_share_the_layers_of_a_real_root_file_system() -> Result<()> {
    scenario(|world| {
        let registry = Registry::start()?;
        let reference = registry.push(&catalog::python()?, "basics/python", "3")?;
        let server = world.serve()?;
        server.ok(["deploy", "one", "--image", &reference, "--env", "NAME=the first"])?;
        let layers = || -> Result<BTreeSet<_>> {
            fs::read_dir(server.places().data.join("store/layers"))?.map(|entry| Ok(entry?.file_name())).collect()
        };
        let stored = layers()?;
        server.ok(["deploy", "two", "--image", &reference, "--env", "NAME=the second"])?;
        ensure!(layers()? == stored, "the same layers were stored again");
        for (name, expect) in [("one", "the first"), ("two", "the second")] {
            ensure!(server.describe(name)?["port"] == 8000, "the image's EXPOSE is the port");
            let answer =
                server.call("POST", &format!("/function/{name}/deep/path?q=1"), &[], b"some text")?.expect(200)?.json()?;
            for (key, value) in [("method", "POST"), ("path", "/deep/path?q=1"), ("body", "some text"), ("name", expect)] {
                ensure!(answer[key] == value, "{key} in {answer}");
            }
        }
        Ok(())
    })
}

#[test]
fn functions_outlive_the_server() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        let places = server.places().clone();
        server.deploy("hello", &catalog::hello()?, &["--env", "GREETING=still here", "--max", "7"])?;
        server.deploy("cat", &catalog::busybox(&["/bin/cat"])?, &["--contract", "stdio"])?;
        let before = ["hello", "cat"].map(|name| server.describe(name).map(|described| described["revision"].clone()));
        let status = server.stop()?;
        ensure!(status.code() == Some(0), "{status}");
        ensure!(!places.admin.exists(), "the admin socket is left");

        let server = world.serve_at(&places, "127.0.0.1:0")?;
        let after = ["hello", "cat"].map(|name| server.describe(name).map(|described| described["revision"].clone()));
        for (before, after) in before.into_iter().zip(after) {
            ensure!(before? == after?);
        }
        ensure!(server.describe("hello")?["settings"]["max"] == 7);
        ensure!(server.get("/function/hello")?.text() == "still here, world\n");
        ensure!(server.call("POST", "/function/cat", &[], b"meow")?.expect(200)?.body == b"meow");
        Ok(())
    })
}

#[test]
fn many_functions_and_many_calls_at_once() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.import(&catalog::hello()?, "many:test")?;
        for number in 0..8 {
            server.ok([
                "deploy",
                &format!("f{number}"),
                "--image",
                "many:test",
                "--env",
                &format!("GREETING={number}"),
                "--idle-timeout",
                "200ms",
            ])?;
        }
        let call = |server: &Server, number: usize| -> Result<()> {
            for _ in 0..25 {
                let text = server.get(&format!("/function/f{}", number % 8))?.text();
                ensure!(text == format!("{}, world\n", number % 8), "{text}");
            }
            Ok(())
        };
        let endpoint = server.tcp();
        let threads: Vec<_> = (0..16)
            .map(|number| {
                let endpoint = endpoint.clone();
                std::thread::spawn(move || -> Result<()> {
                    let path = format!("/function/f{}", number % 8);
                    for _ in 0..25 {
                        let response = funtainer_e2e::http::call(&endpoint, "GET", &path, &[], b"")?.expect(200)?;
                        ensure!(response.text() == format!("{}, world\n", number % 8), "{}", response.text());
                    }
                    Ok(())
                })
            })
            .collect();
        for thread in threads {
            thread.join().map_err(|_| anyhow::anyhow!("a caller panicked"))??;
        }
        call(&server, 3)
    })
}

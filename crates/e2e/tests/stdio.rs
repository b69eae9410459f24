//! Command lines as functions, called over HTTP and by `funtainer run`.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, ensure};
use funtainer_e2e::http::Response;
use funtainer_e2e::image::{Compression, Config, Image, Tree, catalog};
use funtainer_e2e::leak::parse;
use funtainer_e2e::registry::Registry;
use funtainer_e2e::server::Server;
use funtainer_e2e::wait;
use funtainer_e2e::world::{World, scenario};
use rustix::process::Signal;

const LIMIT: Duration = Duration::from_secs(30);

/// Deploys a shell script as a function.
fn script(server: &Server, name: &str, text: &str) -> Result<()> {
    server.deploy(name, &catalog::busybox(&["/bin/sh", "-c", text])?, &["--contract", "stdio"])
}

fn post(server: &Server, name: &str, body: &[u8]) -> Result<Response> {
    server.call("POST", &format!("/function/{name}"), &[("TE", "trailers"), ("Accept", "application/json")], body)
}

/// Whether a process of this world has that title.
fn runs(world: &World, title: &str) -> Result<bool> {
    for pid in world.members()? {
        if parse::process(pid)?.is_some_and(|process| process.title == title) {
            return Ok(true);
        }
    }
    Ok(false)
}

#[test]
fn the_body_is_standard_input_and_the_output_is_the_answer() -> Result<()> {
    scenario(|world| {
        let (registry, server) = (Registry::start()?, world.serve()?);
        let upper = registry.push(&catalog::upper()?, "stdio/upper", "1")?;
        server.ok(["deploy", "upper", "--image", &upper, "--contract", "stdio"])?;
        ensure!(server.instances("upper")? == 0, "nothing is run at a deploy");
        ensure!(post(&server, "upper", b"quiet words\n")?.expect(200)?.body == b"QUIET WORDS\n");

        server.deploy("cat", &catalog::busybox(&["/bin/cat"])?, &["--contract", "stdio"])?;
        let bytes: Vec<u8> = (0..3_000_000_u32).map(|number| (number.wrapping_mul(2_654_435_761) >> 13) as u8).collect();
        ensure!(post(&server, "cat", &bytes)?.expect(200)?.body == bytes, "bytes changed on the way");
        // No body is the end of the file at once.
        let nothing = server.get("/function/cat")?;
        ensure!(nothing.body.is_empty() && nothing.header("server-timing").is_some(), "{nothing:?}");
        ensure!(nothing.header("x-exit-code").or(nothing.trailer("x-exit-code")) == Some("0"), "{nothing:?}");

        // Scripts open their streams anew, whatever their user.
        script(&server, "reopened", "cat /dev/stdin > /dev/stdout; echo more > /proc/self/fd/1; echo logged > /dev/stderr")?;
        ensure!(post(&server, "reopened", b"bytes\n")?.expect(200)?.body == b"bytes\nmore\n");

        // Each call has a fresh container.
        script(&server, "fresh", "test -e /tmp/mark && echo old || echo new; touch /tmp/mark")?;
        for _ in 0..3 {
            ensure!(server.get("/function/fresh")?.text() == "new\n");
        }
        ensure!(server.instances("fresh")? == 0);
        // Standard error is the log.
        script(&server, "loud", "echo answer; echo remark >&2")?;
        ensure!(server.get("/function/loud")?.text() == "answer\n");
        wait::until_true("the remark is in the log", LIMIT, || Ok(server.ok(["logs", "loud"])?.contains("remark")))?;
        // A command that does not read its input is no failure.
        script(&server, "deaf", "echo enough")?;
        ensure!(post(&server, "deaf", &bytes)?.expect(200)?.text() == "enough\n");
        Ok(())
    })
}

#[test]
fn the_exit_code_decides() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        script(&server, "fails", "echo partial; echo the reason >&2; exit 7")?;
        let failed = post(&server, "fails", b"")?.expect(500)?;
        let problem = failed.json()?;
        ensure!(problem["code"] == "command-failed", "{problem}");
        let detail = problem["detail"].as_str().context("a detail")?;
        ensure!(detail.contains('7') && detail.contains("the reason"), "{detail}");
        ensure!(!failed.text().contains("partial"), "{problem}");

        script(&server, "dies", "kill -SEGV $$")?;
        let died = post(&server, "dies", b"")?.expect(500)?.json()?;
        ensure!(died["code"] == "command-failed" && died.to_string().contains("11"), "{died}");

        // More than is held back, and then the end: the code follows in the trailer.
        script(&server, "long", "dd if=/dev/zero bs=1024 count=300 2>/dev/null")?;
        let long = post(&server, "long", b"")?.expect(200)?;
        ensure!(
            long.body.len() == 300 * 1024 && long.trailer("x-exit-code") == Some("0"),
            "{:?} {:?}",
            long.headers,
            long.trailers
        );
        // A client that wants no trailers gets the same body.
        let plain = server.get("/function/long")?;
        ensure!(plain.body.len() == 300 * 1024, "{:?}", plain.headers);

        // A failure after the answer has begun breaks it off, and is in the log.
        script(&server, "late", "dd if=/dev/zero bs=1024 count=300 2>/dev/null; echo too late >&2; exit 9")?;
        ensure!(post(&server, "late", b"").is_err(), "an answer that failed looks whole");
        wait::until_true("the reason is in the log", LIMIT, || Ok(server.ok(["logs", "late"])?.contains("too late")))
    })
}

#[test]
fn output_is_not_held_back_for_long() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        script(&server, "slow", "echo first; sleep 5; echo second")?;
        let mut connection = server.connect()?;
        connection.send("GET", "/function/slow", &[], b"")?;
        let start = Instant::now();
        let head = connection.head()?;
        ensure!(head.status == 200 && connection.first_piece(&head)?.as_deref() == Some(&b"first\n"[..]));
        ensure!(start.elapsed() < Duration::from_secs(4), "the first line took {:?}", start.elapsed());
        // Input is streamed too: what was sent first is answered before the rest is sent.
        server.deploy("cat", &catalog::busybox(&["/bin/cat"])?, &["--contract", "stdio"])?;
        let mut connection = server.connect()?;
        connection.raw(b"POST /function/cat HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        connection.chunk(b"one")?;
        let head = connection.head()?;
        ensure!(connection.first_piece(&head)?.as_deref() == Some(&b"one"[..]));
        connection.chunk(b"two")?;
        ensure!(connection.first_piece(&head)?.as_deref() == Some(&b"two"[..]));
        connection.chunk(b"")?;
        ensure!(connection.body(&head, |_| ()).is_ok());
        Ok(())
    })
}

#[test]
fn a_client_that_goes_away_ends_the_command() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        script(&server, "endless", "echo begun; exec sleep 54321")?;
        // Once before the answer has begun, once after it.
        for wait_for_output in [false, true] {
            let mut connection = server.connect()?;
            connection.send("GET", "/function/endless", &[], b"")?;
            wait::until_true("the command runs", LIMIT, || runs(world, "sleep 54321"))?;
            if wait_for_output {
                connection.head()?;
            }
            drop(connection);
            wait::until_true("the command ends with its client", LIMIT, || Ok(!runs(world, "sleep 54321")?))?;
        }
        Ok(())
    })
}

#[test]
fn a_deploy_looks_at_the_command_and_runs_nothing() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        for (name, image, code) in [
            ("missing", catalog::command_missing()?, "command-not-found"),
            ("text", catalog::not_executable()?, "command-not-executable"),
            ("none", catalog::no_command()?, "command-missing"),
        ] {
            server.import(&image, &format!("{name}:1"))?;
            server.refused(["deploy", name, "--contract", "stdio", "--image", &format!("{name}:1")], 1, code)?;
        }
        server.refused(["deploy", "f", "--contract", "stdio", "--image", "none:1", "--port", "80"], 1, "bad-setting")?;
        // A command that is found by PATH, behind a symbolic link.
        let tree = Tree::new().directory("opt", 0o755)?.symlink("opt/meow", "/bin/cat")?.layer(Compression::Plain)?;
        let config = Config { env: vec!["PATH=/nowhere:/opt".into()], ..Config::command(&["meow"]) };
        server.deploy("meow", &Image::build(vec![catalog::busybox_layer()?, tree], &config)?, &["--contract", "stdio"])?;
        // Busybox goes by its name, and has no applet "meow".
        ensure!(post(&server, "meow", b"")?.expect(500)?.json()?["code"] == "command-failed");
        Ok(())
    })
}

#[test]
fn run_is_a_command_like_any_other() -> Result<()> {
    scenario(|world| {
        let (registry, server) = (Registry::start()?, world.serve()?);
        let shell = registry.push(&catalog::busybox(&["/bin/sh", "-c"])?, "stdio/sh", "1")?;
        server.ok(["pull", &shell])?;
        let said = server.cli_with(["run", &shell, "--", "cat; echo to stderr >&2"], b"to stdout\n")?;
        ensure!(said.code()? == 0 && said.out() == "to stdout\n" && said.err() == "to stderr\n", "{said:?}");
        let code = |script: &str| -> Result<i32> { server.cli(["run", &shell, "--", script])?.code() };
        ensure!(code("true")? == 0);
        ensure!(code("exit 3")? == 3);
        ensure!(code("exit 255")? == 255);
        ensure!(code("kill -9 $$")? == 137);
        ensure!(code("kill -TERM $$")? == 143);

        let missing = registry.push(&catalog::command_missing()?, "stdio/missing", "1")?;
        server.refused(["run", &missing], 127, "command-not-found")?;
        let text = registry.push(&catalog::not_executable()?, "stdio/text", "1")?;
        server.refused(["run", &text], 126, "command-not-executable")?;
        let unknown = registry.reference("stdio/unknown", "1");
        server.refused(["run", &unknown], 125, "image-unknown")?;
        server.refused(["run", "NOT A REFERENCE"], 125, "bad-image-reference")?;
        ensure!(server.cli(["run"])?.code()? == 2, "usage");
        // Output arrives whole and in order, much of it too.
        let much = server.cli(["run", &shell, "--", "dd if=/dev/zero bs=65536 count=100 2>/dev/null"])?;
        ensure!(much.code()? == 0 && much.stdout.len() == 6_553_600, "{} bytes", much.stdout.len());
        ensure!(server.ask("GET", "/functions", b"")?.text().trim() == "[]", "run leaves no function");
        Ok(())
    })
}

#[test]
fn run_is_interactive_and_ends_with_its_connection() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.import(&catalog::busybox(&["/bin/sh", "-c"])?, "sh:1")?;
        // Standard input stays open as long as the caller's.
        let mut cat = server.begin(["run", "sh:1", "--", "exec cat"])?;
        let mut stdin = cat.stdin().context("standard input")?;
        stdin.write_all(b"line\n")?;
        wait::until_true("the command runs", LIMIT, || runs(world, "cat"))?;
        drop(stdin);
        let finished = cat.finish(LIMIT)?;
        ensure!(finished.code()? == 0 && finished.out() == "line\n", "{finished:?}");

        for signal in [Signal::KILL, Signal::INT] {
            let run = server.begin(["run", "sh:1", "--", "exec sleep 65432"])?;
            wait::until_true("the command runs", LIMIT, || runs(world, "sleep 65432"))?;
            run.signal(signal)?;
            wait::until_true("the command ends with its caller", LIMIT, || Ok(!runs(world, "sleep 65432")?))?;
            run.finish(LIMIT)?;
        }
        Ok(())
    })
}

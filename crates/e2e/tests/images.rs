//! Odd images: each gets one clear error with a code and a hint, or works. All come from the real registry, by name.

use std::time::Duration;

use anyhow::{Result, ensure};
use funtainer_e2e::image::{Compression, Config, Image, Tree, catalog, program};
use funtainer_e2e::registry::Registry;
use funtainer_e2e::server::Server;
use funtainer_e2e::wait;
use funtainer_e2e::world::scenario;
use serde_json::{Value, json};

/// Deploys what cannot work and returns the error's text; afterwards there must be no such function.
fn fails(server: &Server, registry: &Registry, name: &str, image: &Image, code: &str) -> Result<String> {
    let reference = registry.push(image, &format!("odd/{name}"), "1")?;
    let said = server.refused(["deploy", name, "--image", &reference], 1, code)?;
    server.refused(["describe", name], 1, "function-unknown")?;
    Ok(said)
}

fn mentions(said: &str, words: &[&str]) -> Result<()> {
    for word in words {
        ensure!(said.contains(word), "'{word}' is not in:\n{said}");
    }
    Ok(())
}

#[test]
fn commands_that_cannot_run() -> Result<()> {
    scenario(|world| {
        let (registry, server) = (Registry::start()?, world.serve()?);
        let said = fails(&server, &registry, "exits", &catalog::exits()?, "instance-exited")?;
        mentions(&said, &["3", "no database in sight"])?;
        mentions(&fails(&server, &registry, "text", &catalog::not_executable()?, "command-not-executable")?, &["/program"])?;
        mentions(
            &fails(&server, &registry, "missing", &catalog::command_missing()?, "command-not-found")?,
            &["/usr/bin/nowhere"],
        )?;
        fails(&server, &registry, "nothing", &catalog::no_command()?, "command-missing")?;
        mentions(
            &fails(&server, &registry, "perl", &catalog::interpreter_missing()?, "command-not-executable")?,
            &["/program"],
        )?;
        let other = Tree::new().file("program", 0o755, b"\x7fELF but not really")?.layer(Compression::Gzip)?;
        fails(
            &server,
            &registry,
            "elf",
            &Image::build(vec![other], &Config::command(&["/program"]))?,
            "command-not-executable",
        )?;
        let user = Config { user: "nobody-knows".into(), ..Config::command(&["/bin/true"]) };
        mentions(&fails(&server, &registry, "user", &catalog::busybox_with(&user)?, "user-unknown")?, &["nobody-knows"])?;
        // The command can be given where the image has none, and replaced where it has one.
        let reference = registry.push(&catalog::no_command()?, "odd/nothing", "1")?;
        server.ok(["deploy", "given", "--contract", "stdio", "--image", &reference, "--arg", "/bin/echo", "--arg", "given"])?;
        ensure!(server.get("/function/given")?.text() == "given\n");
        Ok(())
    })
}

#[test]
fn servers_that_listen_oddly() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        let deploy = |name: &str, env: &[&str], exposed: &[u16], settings: Value| {
            server.deploy_by_api(name, &catalog::probe(env, exposed)?, settings)
        };
        let listens = |name: &str| -> Result<String> { Ok(server.get(&format!("/function/{name}/env"))?.text()) };
        // PORT: 8080 without anything, the single EXPOSE, --port.
        deploy("plain", &[], &[], json!({}))?.expect(200)?;
        ensure!(listens("plain")?.contains("PORT=8080\n"));
        deploy("exposed", &[], &[5000], json!({}))?.expect(200)?;
        ensure!(listens("exposed")?.contains("PORT=5000\n"));
        deploy("set", &[], &[5000], json!({"port": 6000}))?.expect(200)?;
        ensure!(listens("set")?.contains("PORT=6000\n"));
        // What really listens decides.
        deploy("elsewhere", &["PROBE_LISTEN=9999"], &[], json!({"start_timeout": "20s"}))?.expect(200)?;
        ensure!(listens("elsewhere")?.contains("PORT=8080\n"));
        deploy("among", &["PROBE_LISTEN=7001,8080,7002"], &[], json!({"start_timeout": "20s"}))?.expect(200)?;
        let several =
            deploy("several", &["PROBE_LISTEN=7001,7002"], &[], json!({"start_timeout": "3s"}))?.expect(422)?.json()?;
        ensure!(several["code"] == "port-ambiguous", "{several}");
        mentions(&several.to_string(), &["7001", "7002", "--port"])?;
        deploy("several", &["PROBE_LISTEN=7001,7002"], &[], json!({"port": 7002}))?.expect(200)?;
        // On the loopback of version 6 only.
        deploy("v6", &["PROBE_V6=1"], &[], json!({"start_timeout": "20s"}))?.expect(200)?;
        listens("v6")?;
        // Late: the first call waits, and does not fail.
        deploy("late", &["PROBE_LATE_MS=700"], &[], json!({}))?.expect(200)?;
        for _ in 0..2 {
            server.ok(["scale", "late", "0"])?;
            listens("late")?;
        }
        let late = deploy("later", &["PROBE_LATE_MS=60000"], &[], json!({"start_timeout": "500ms"}))?.expect(422)?.json()?;
        ensure!(late["code"] == "start-timeout", "{late}");
        Ok(())
    })
}

#[test]
fn a_server_that_never_listens() -> Result<()> {
    scenario(|world| {
        let (registry, server) = (Registry::start()?, world.serve()?);
        let reference = registry.push(&catalog::never_listens()?, "odd/never", "1")?;
        let request = json!({"name": "never", "image": reference, "start_timeout": "2s"});
        let answer = server.ask("POST", "/functions", &serde_json::to_vec(&request)?)?.expect(422)?.json()?;
        ensure!(answer["code"] == "start-timeout", "{answer}");
        mentions(&answer.to_string(), &["--port"])?;
        server.refused(["describe", "never"], 1, "function-unknown")?;
        let left: Vec<_> = world.members()?.into_iter().collect();
        for pid in left {
            let title = funtainer_e2e::leak::parse::process(pid)?.map(|process| process.title).unwrap_or_default();
            ensure!(!title.contains("sleep 100000"), "the failed instance still runs");
        }
        Ok(())
    })
}

#[test]
fn images_that_are_not_there() -> Result<()> {
    scenario(|world| {
        let (registry, server) = (Registry::start()?, world.serve()?);
        let known = registry.push(&catalog::hello()?, "odd/hello", "1")?;
        let name = registry.name();
        for unknown in [
            format!("{name}/odd/hello:none"),
            format!("{name}/odd/nobody:1"),
            known.replace(":1", &format!("@sha256:{}", "0".repeat(64))),
        ] {
            let said = server.refused(["deploy", "f", "--image", &unknown], 1, "image-unknown")?;
            mentions(&said, &[&unknown])?;
            server.refused(["pull", &unknown], 1, "image-unknown")?;
        }
        drop(registry);
        server.refused(["pull", &known], 1, "registry-unavailable")?;
        server.refused(["deploy", "f", "--image", &known], 1, "registry-unavailable")?;
        ensure!(server.ask("GET", "/functions", b"")?.json()? == json!([]));
        Ok(())
    })
}

#[test]
fn names_are_resolved_at_each_deploy_and_imports_are_kept() -> Result<()> {
    scenario(|world| {
        let (registry, server) = (Registry::start()?, world.serve()?);
        let (first, second) = (catalog::hello_with("first")?, catalog::hello_with("second")?);
        let reference = registry.push(&first, "tags/moving", "latest")?;
        server.ok(["deploy", "moving", "--image", &reference])?;
        registry.push(&second, "tags/moving", "latest")?;
        ensure!(server.get("/function/moving")?.text() == "first, world\n", "a running function has its digest");
        server.ok(["scale", "moving", "0"])?;
        ensure!(server.get("/function/moving")?.text() == "first, world\n", "a revision has its digest");
        server.ok(["deploy", "moving", "--image", &reference])?;
        ensure!(server.get("/function/moving")?.text() == "second, world\n");

        // An imported name needs no registry until it is pulled.
        server.import(&first, &reference)?;
        server.ok(["deploy", "moving", "--image", &reference])?;
        ensure!(server.get("/function/moving")?.text() == "first, world\n");
        server.ok(["pull", &reference])?;
        server.ok(["deploy", "moving", "--image", &reference])?;
        ensure!(server.get("/function/moving")?.text() == "second, world\n");

        // The same from an archive on standard input, and from a file.
        let archive = second.archive()?;
        let imported = server.cli_with(["image", "import", "-", "--name", "from/stdin:1"], &archive)?;
        ensure!(imported.status.success(), "{imported:?}");
        let file = world.home().join("image.tar");
        std::fs::write(&file, &archive)?;
        server.ok(["image", "import", &file.display().to_string(), "--name", "from/file:1"])?;
        for name in ["from/stdin:1", "from/file:1"] {
            server.ok(["deploy", "archived", "--image", name])?;
            ensure!(server.describe("archived")?["digest"] == second.digest());
        }
        let cut = server.cli_with(["image", "import", "-", "--name", "from/cut:1"], &archive[..archive.len() / 2])?;
        ensure!(cut.code()? == 1 && cut.err().contains("error["), "{cut:?}");
        let images: Value = serde_json::from_str(&server.ok(["images", "--output", "json"])?)?;
        ensure!(!images.to_string().contains("from/cut"), "{images}");
        Ok(())
    })
}

#[test]
fn the_images_user_directory_and_variables_hold() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        let accounts = Tree::new()
            .directory("etc", 0o755)?
            .file("etc/passwd", 0o644, b"root:x:0:0::/root:/bin/sh\nweb:x:1234:2345::/srv:/bin/sh\n")?
            .file("etc/group", 0o644, b"root:x:0:\nweb:x:2345:\nextra:x:777:web\n")?
            .directory("srv", 0o755)?;
        let config = Config {
            user: "web".into(),
            working_dir: "/srv".into(),
            env: vec!["A=b c".into()],
            ..Config::command(&["/bin/sh", "-c", "id; pwd; env"])
        };
        let image = Image::build(vec![catalog::busybox_layer()?, accounts.layer(Compression::Plain)?], &config)?;
        server.deploy("who", &image, &["--contract", "stdio", "--env", "D=e"])?;
        let said = server.get("/function/who")?.text();
        mentions(&said, &["uid=1234", "gid=2345", "777", "\n/srv\n", "A=b c\n", "D=e\n", "PATH=", "HOME=/srv\n"])?;
        // A server as another user, with a port that only root could take elsewhere.
        let tree = Tree::new().host_file("probe", &program::probe()?)?.layer(Compression::Gzip)?;
        let config = Config { user: "1000:1000".into(), exposed: vec![80], ..Config::command(&["/probe"]) };
        server.deploy("low", &Image::build(vec![tree], &config)?, &[])?;
        let status = server.get("/function/low/file?/proc/self/status")?.text();
        mentions(&status, &["Uid:\t1000\t1000\t1000\t1000"])
    })
}

/// The end of an instance is announced by the image's stop signal and forced after ten seconds.
#[test]
fn a_deaf_process_is_killed() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        let script = "trap '' TERM; while :; do { printf 'HTTP/1.1 200 OK\\r\\nContent-Length: 0\\r\\nConnection: close\\r\\n\\r\\n'; } | nc -l -p 8080 > /dev/null; done";
        let image = catalog::busybox(&["/bin/sh", "-c", script])?;
        server.deploy_by_api("deaf", &image, json!({"start_timeout": "20s"}))?.expect(200)?;
        let pids = server.init_pids("deaf")?;
        let start = std::time::Instant::now();
        server.ok(["scale", "deaf", "0"])?;
        ensure!(start.elapsed() < wait::patient(Duration::from_secs(15)), "{:?}", start.elapsed());
        for pid in pids {
            ensure!(funtainer_e2e::leak::parse::process(pid)?.is_none(), "{pid} is not reaped");
        }
        Ok(())
    })
}

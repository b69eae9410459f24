//! Images as people use them: what they do under Docker they do here, and what their servers believe of their callers and limits is true.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use funtainer_e2e::image::{Compression, Image, Tree, popular};
use funtainer_e2e::leak::parse;
use funtainer_e2e::server::Server;
use funtainer_e2e::wait;
use funtainer_e2e::world::{World, scenario};

/// A JVM on a machine with other work takes seconds.
const LIMIT: Duration = Duration::from_mins(1);

fn ok(server: &Server, path: &str) -> Result<String> {
    Ok(server.get(path)?.text())
}

/// A call that may go wrong.
fn status(server: &Server, path: &str) -> Result<u16> {
    Ok(server.call("GET", path, &[], b"")?.status)
}

fn logged(server: &Server, name: &str, text: &str) -> Result<()> {
    wait::until_true(&format!("'{text}' in the log of {name}"), LIMIT, || Ok(server.ok(["logs", name])?.contains(text)))
}

/// The user ids, as the container counts, of its processes with that name.
fn users(world: &World, name: &str) -> Result<Vec<u32>> {
    let mut found = Vec::new();
    for pid in world.scope().members()? {
        let Some(process) = parse::process(pid)? else { continue };
        let status = std::fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        if process.title.contains(name)
            && let Some(uid) =
                status.lines().find_map(|line| line.strip_prefix("Uid:\t")?.split('\t').next()?.parse::<u32>().ok())
            && uid >= 0x7000_0000
        {
            // A range begins at a multiple of its size.
            found.push(uid % 0x1_0000);
        }
    }
    Ok(found)
}

#[test]
fn nginx_drops_to_its_user_and_logs_to_the_standard_streams() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        let image = popular::nginx()?;
        server.deploy("nginx", &image, &[])?;
        ensure!(ok(&server, "/function/nginx/")? == "Welcome to nginx!\n");
        ensure!(status(&server, "/function/nginx/missing")? == 404);
        ensure!(users(world, "nginx: master")? == [0] && users(world, "nginx: worker")?.contains(&33), "who runs what");
        logged(&server, "nginx", "GET /missing HTTP/1.1\" 404")?;
        // The error log is opened by the master, and written by the workers.
        ensure!(status(&server, "/function/nginx/limit")? == 502);
        logged(&server, "nginx", "Connection refused")?;
        // The caller is not this machine's.
        ensure!(!server.ok(["logs", "nginx"])?.contains("127.0.0.1 - -"), "nginx takes callers for local");

        // With a root that cannot be written, as people harden it.
        let flags = ["--read-only", "--tmpfs", "/var/lib/nginx:16M", "--tmpfs", "/run"];
        server.deploy("hard", &image, &flags)?;
        ensure!(ok(&server, "/function/hard/")? == "Welcome to nginx!\n");
        server.ok(["scale", "nginx", "0"])?;
        ensure!(ok(&server, "/function/nginx/")? == "Welcome to nginx!\n", "it comes back");
        Ok(())
    })
}

#[test]
fn apaches_local_page_is_closed_to_callers() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        let image = popular::apache()?;
        server.deploy("apache", &image, &[])?;
        ensure!(ok(&server, "/function/apache/")? == "It works!\n");
        ensure!(status(&server, "/function/apache/server-status")? == 403);
        for forged in [("X-Forwarded-For", "127.0.0.1"), ("Forwarded", "for=127.0.0.1"), ("X-Real-IP", "127.0.0.1")] {
            let answer = server.call("GET", "/function/apache/server-status", &[forged], b"")?;
            ensure!(answer.status == 403, "{forged:?}: {answer:?}");
        }
        logged(&server, "apache", "AH01630: client denied by server configuration")?;
        // The page is there for who is local.
        let ask = r"apachectl start && exec 3<>/dev/tcp/127.0.0.1/80 && printf 'GET /server-status?auto HTTP/1.0\r\nHost: localhost\r\n\r\n' >&3 && cat <&3";
        server.import(&image, "apache:run")?;
        let said = server.ok(["run", "--entrypoint", "bash", "apache:run", "--", "-c", ask])?;
        ensure!(said.contains("200 OK") && said.contains("ServerMPM"), "{said}");
        Ok(())
    })
}

#[test]
fn redis_keeps_what_it_is_given() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        // No HTTP is spoken, but a server that accepts is ready.
        server.deploy("redis", &popular::redis()?, &["--min", "1"])?;
        let redis = |words: &[&str]| server.ok(["exec", "redis", "--", "redis-cli"].into_iter().chain(words.iter().copied()));
        ensure!(redis(&["ping"])?.trim() == "PONG");
        ensure!(redis(&["set", "key", "value"])?.trim() == "OK" && redis(&["get", "key"])?.trim() == "value");
        // Its volume takes the dump, as its own user.
        ensure!(redis(&["save"])?.trim() == "OK");
        let dump = server.ok(["exec", "redis", "--", "stat", "-c", "%U %n", "dump.rdb"])?;
        ensure!(dump.trim() == "redis dump.rdb", "{dump}");
        Ok(())
    })
}

#[test]
fn postgres_makes_its_database_as_its_own_user() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        let image = popular::postgres()?;
        for (name, flags) in
            [("postgres", &[][..]), ("hard", &["--read-only", "--tmpfs", "/run/postgresql", "--tmpfs", "/tmp"])]
        {
            let flags: Vec<&str> = flags.iter().copied().chain(["--min", "1", "--max", "1"]).collect();
            server.deploy(name, &image, &flags)?;
            let ask = |query: &str| server.ok(["exec", name, "--", "psql", "-h", "127.0.0.1", "-At", "-c", query]);
            ensure!(ask("select 6 * 7")?.trim() == "42");
            ask("create table numbers as select generate_series(1, 100000) as n")?;
            // Parallel workers share memory in /dev/shm.
            let parallel = "set force_parallel_mode = on; set parallel_setup_cost = 0; set parallel_tuple_cost = 0; \
                set min_parallel_table_scan_size = 0; explain analyze select sum(n) from numbers; select sum(n) from numbers";
            let sum = ask(parallel)?;
            ensure!(sum.contains("Workers Launched"), "no parallel workers:\n{sum}");
            ensure!(sum.contains("5000050000"), "{sum}");
            let owner = server.ok(["exec", name, "--", "stat", "-c", "%U %a", "/var/lib/postgresql/data"])?;
            ensure!(owner.trim() == "postgres 700", "{owner}");
        }
        Ok(())
    })
}

#[test]
fn a_jvm_knows_its_limits() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        let image = popular::jvm()?;
        server.import(&image, "jvm:1")?;
        for (name, memory, flags) in [("small", 256, &[][..]), ("large", 512, &["--cpus", "1"])] {
            let limit = format!("{memory}M");
            let mut command = vec!["deploy", name, "--image", "jvm:1", "--memory", &limit];
            command.extend(flags);
            server.ok(command)?;
            let said = ok(&server, &format!("/function/{name}/"))?;
            let mut numbers = said.split_whitespace().map(str::parse::<u64>);
            let (heap, processors) = (numbers.next().context("a heap")??, numbers.next().context("processors")??);
            // A quarter of the memory, or half of it where that is little.
            ensure!(heap <= memory * 1_048_576 / 2, "a heap of {heap} bytes in {memory} MiB");
            if !flags.is_empty() {
                ensure!(processors == 1, "{processors} processors");
            }
        }
        Ok(())
    })
}

#[test]
fn node_serves_as_a_user_of_its_image() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("node", &popular::node()?, &[])?;
        let answer = server.call("POST", "/function/node/path?query", &[], b"a body")?.expect(200)?;
        let seen = answer.json()?;
        ensure!(seen["method"] == "POST" && seen["url"] == "/path?query" && seen["body"] == "a body", "{seen}");
        ensure!(seen["user"] == "www-data", "{seen}");
        Ok(())
    })
}

#[test]
fn numpy_computes_standard_input() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("numpy", &popular::numpy()?, &["--contract", "stdio"])?;
        let answer = server.call("POST", "/function/numpy", &[], b"3 0\n0 4\n")?.expect(200)?;
        ensure!(answer.text() == "1.750 16.000\n", "{answer:?}");
        Ok(())
    })
}

#[test]
fn a_static_program_needs_nothing_else() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("scratch", &popular::scratch()?, &["--read-only"])?;
        ensure!(ok(&server, "/function/scratch")? == "hello, world\n");
        // The same beside an image of its own name server and hosts, which are the platform's here.
        let odd = Tree::new()
            .symlink("etc/hosts", "../../../../../etc/shadow")?
            .symlink("etc/resolv.conf", "/proc/1/environ")?
            .directory("etc/hostname", 0o755)?;
        let base = funtainer_e2e::image::catalog::busybox_layer()?;
        let config = funtainer_e2e::image::Config::command(&["/bin/cat", "/etc/hostname", "/etc/hosts"]);
        server.import(&Image::build(vec![base, odd.layer(Compression::Gzip)?], &config)?, "odd:1")?;
        let said = server.ok(["run", "odd:1"])?;
        ensure!(said.contains("127.0.0.1\tlocalhost") && said.lines().count() > 6, "{said}");
        Ok(())
    })
}

#[test]
fn setuid_bits_and_file_capabilities_work_where_they_are_asked_for() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.import(&popular::privileged()?, "privileged:1")?;
        let script = "id -u; su -c 'id -u' </dev/null || echo refused; /cap/cat /proc/self/status | grep -E '^Cap(Eff|Prm)'; \
            /cap/ping -c 1 127.0.0.1 2>&1";
        let run = |flags: &[&'static str]| {
            let words = ["run"].into_iter().chain(flags.iter().copied()).chain(["privileged:1", "--", "bash", "-c", script]);
            server.cli(words).map(|finished| finished.out())
        };
        let inert = run(&[])?;
        ensure!(inert.starts_with("33\nrefused\n") && inert.contains("CapEff:\t0000000000000000"), "{inert}");
        let asked_for = run(&["--no-new-privileges=false"])?;
        ensure!(asked_for.starts_with("33\n0\n"), "{asked_for}");
        // A capability that nobody has is never given, and the kernel says so.
        ensure!([&inert, &asked_for].iter().all(|said| said.contains("Operation not permitted")), "{asked_for}");
        ensure!(
            asked_for.contains("CapPrm:\t0000000000000400") && asked_for.contains("CapEff:\t0000000000000400"),
            "{asked_for}"
        );
        Ok(())
    })
}

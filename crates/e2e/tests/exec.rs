//! `funtainer exec`, terminals, and `funtainer run` without a server.

use std::fs;
use std::io::Write as _;
use std::path::Path;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use funtainer_e2e::image::catalog;
use funtainer_e2e::leak::parse;
use funtainer_e2e::pty::Session;
use funtainer_e2e::server::{COMMAND_LIMIT, Places, Server};
use funtainer_e2e::world::{World, scenario};
use funtainer_e2e::{paths, process, wait};
use rustix::process::{Pid, Signal, kill_process};

const LIMIT: Duration = Duration::from_secs(30);

/// Deploys a server with a shell beside it, and wakes an instance.
fn deployed(server: &Server, name: &str) -> Result<()> {
    server.deploy(name, &catalog::busybox(&["/bin/busybox", "httpd", "-f", "-p", "8080"])?, &["--min", "1"])?;
    wait::until_true("an instance is ready", LIMIT, || Ok(server.ok(["describe", name])?.contains("\"ready\"")))
}

/// Whether a process of this world has that title.
fn runs(world: &World, title: &str) -> Result<bool> {
    for pid in world.scope().members()? {
        if parse::process(pid)?.is_some_and(|process| process.title == title) {
            return Ok(true);
        }
    }
    Ok(false)
}

fn kill(pid: i32) -> Result<()> {
    Ok(kill_process(Pid::from_raw(pid).context("a process id")?, Signal::KILL)?)
}

fn count(path: &str) -> Result<usize> {
    Ok(fs::read_dir(path)?.count())
}

#[test]
fn a_command_runs_in_the_instance() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        deployed(&server, "f")?;
        let sh = |script: &str| server.cli(["exec", "f", "--", "sh", "-c", script]);
        let said = sh("echo out; echo err >&2; exit 7")?;
        ensure!(said.code()? == 7 && said.out() == "out\n" && said.err() == "err\n", "{said:?}");
        ensure!(sh("kill -9 $$")?.code()? == 137);
        // The very same namespaces and control groups as the server beside it, and no more powers.
        let same = "server=$(ps | sed -n 's/^ *\\([0-9]*\\) .*httpd.*/\\1/p' | head -1); \
                    for n in cgroup ipc mnt net pid user uts; do \
                    test $(readlink /proc/self/ns/$n) = $(readlink /proc/$server/ns/$n) || echo another $n; done; \
                    for f in cgroup limits; do test \"$(cat /proc/self/$f)\" = \"$(cat /proc/$server/$f)\" || echo another $f; done; \
                    of() { grep -E '^(Cap|NoNewPrivs|Seccomp:|Groups)' /proc/$1/status; }; \
                    test \"$(of self)\" = \"$(of $server)\" || echo other powers; echo looked at $server";
        let said = sh(same)?;
        ensure!(said.out().starts_with("looked at ") && said.out().len() > 11, "{said:?}");

        // Input only where it is asked for.
        let said = server.cli_with(["exec", "f", "--", "cat"], b"unheard")?;
        ensure!(said.code()? == 0 && said.out().is_empty(), "{said:?}");
        let much = vec![b'x'; 3_000_000];
        let said = server.cli_with(["exec", "f", "-i", "--", "cat"], &much)?;
        ensure!(said.code()? == 0 && said.stdout == much, "{} bytes", said.stdout.len());

        let said = server.ok([
            "exec",
            "f",
            "-e",
            "A=b c",
            "--user",
            "1000:50",
            "--workdir",
            "/tmp",
            "--",
            "sh",
            "-c",
            "id -u; id -g; pwd; echo $A; env",
        ])?;
        ensure!(said.starts_with("1000\n50\n/tmp\nb c\n") && said.contains("HOME=/\n") && !said.contains("TERM="), "{said}");

        // In this instance and no other.
        server.ok(["scale", "f", "2"])?;
        let ids = server.instance_ids("f")?;
        server.ok(["exec", "f", "--instance", &ids[1], "--", "touch", "/tmp/here"])?;
        ensure!(server.cli(["exec", "f", "--instance", &ids[1], "--", "cat", "/tmp/here"])?.code()? == 0);
        ensure!(server.cli(["exec", "f", "--", "cat", "/tmp/here"])?.code()? == 1);
        Ok(())
    })
}

#[test]
fn what_cannot_be_run_is_told() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.refused(["exec", "f", "--", "true"], 125, "function-unknown")?;
        server.deploy("f", &catalog::busybox(&["/bin/busybox", "httpd", "-f", "-p", "8080"])?, &[])?;
        server.ok(["scale", "f", "0"])?;
        let said = server.refused(["exec", "f", "--", "true"], 125, "not-running")?;
        ensure!(said.contains("--start"), "{said}");
        ensure!(server.cli(["exec", "f", "--start", "--", "true"])?.code()? == 0);
        server.refused(["exec", "f", "--", "missing"], 127, "command-not-found")?;
        server.refused(["exec", "f", "--", "/bin"], 126, "command-not-executable")?;
        server.refused(["exec", "f", "--user", "stranger", "--", "true"], 125, "user-unknown")?;
        server.refused(["exec", "f", "--user", "70000", "--", "true"], 125, "bad-setting")?;
        let said = server.refused(["exec", "f", "-w", "/missing", "--", "true"], 125, "bad-setting")?;
        ensure!(said.contains("/missing"), "{said}");
        for descriptor in 0..4 {
            let path = format!("/proc/self/fd/{descriptor}");
            server.refused(["exec", "f", "-w", &path, "--", "true"], 125, "bad-setting")?;
        }
        let nobody = "0190a1b2-0000-7000-8000-000000000000";
        server.refused(["exec", "f", "--instance", nobody, "--", "true"], 125, "instance-unknown")?;
        let long = "x".repeat(100_000);
        server.refused(["exec", "f", "--", "echo", &long], 125, "bad-request")?;
        ensure!(server.cli(["exec", "f", "--", "echo", &long[..90_000]])?.stdout.len() == 90_001);
        let said = server.cli(["exec", "f", "-it", "--", "true"])?;
        ensure!(said.code()? == 125 && said.err().contains("hint: leave -t out"), "{said:?}");
        ensure!(server.cli(["exec", "f", "true"])?.code()? == 2, "usage");

        // An image with nothing but its program has no shell to run.
        server.deploy("bare", &catalog::hello()?, &["--min", "1"])?;
        let said = server.refused(["exec", "bare", "--", "/bin/sh"], 127, "command-not-found")?;
        ensure!(said.contains("some have none"), "{said}");
        // A command's function has an instance only while a call runs.
        server.deploy("c", &catalog::busybox(&["/bin/cat"])?, &["--contract", "stdio"])?;
        server.refused(["exec", "c", "--start", "--", "true"], 125, "not-running")?;
        let mut connection = server.connect()?;
        connection.raw(b"POST /function/c HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n")?;
        connection.chunk(b"held")?;
        wait::until_true("the call's instance runs", LIMIT, || Ok(server.cli(["exec", "c", "--", "true"])?.code()? == 0))
    })
}

/// The limits of an instance are those of its commands, too.
#[test]
fn a_command_has_the_limits_of_its_instance() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        let image = catalog::busybox(&["/bin/busybox", "httpd", "-f", "-p", "8080"])?;
        server.deploy("f", &image, &["--min", "1", "--pids", "12", "--memory", "64M", "--open-files", "100"])?;
        let sh = |script: &str| server.cli(["exec", "f", "--", "sh", "-c", script]);
        ensure!(sh("ulimit -n; ulimit -c")?.out() == "100\n0\n", "{:?}", sh("ulimit -n; ulimit -c")?);
        // Filled up, it takes no more; once something ends it does. Beside init and server nine processes leave room for one, and a command that
        // begins takes two. (A shell that fills it in one go would end itself at the first fork that fails.)
        let sleeps =
            |count| wait::until_true("all of them sleep", LIMIT, || Ok(processes_with("sleep\x0076595\x00")? == count));
        let first = server.begin(["exec", "f", "--", "sleep", "76595"])?;
        sleeps(1)?;
        for count in 2..=9 {
            // Again where what began the one before is not reaped yet.
            wait::until_true("one more begins", LIMIT, || Ok(sh("sleep 76595 > /dev/null 2>&1 < /dev/null &")?.code()? == 0))?;
            sleeps(count)?;
        }
        wait::until_true("it is full", LIMIT, || {
            let said = server.cli(["exec", "f", "--", "true"])?;
            Ok(said.code()? == 125 && said.err().contains("hint: end some of them, or deploy with a larger --pids"))
        })?;
        first.signal(Signal::INT)?;
        first.finish(LIMIT)?;
        wait::until_true("it takes commands again", LIMIT, || Ok(server.cli(["exec", "f", "--", "true"])?.code()? == 0))?;
        // Memory is the instance's: who takes too much of it is killed, or all of it is.
        let said = sh("dd if=/dev/zero of=/dev/null bs=200M count=1")?;
        ensure!(said.code()? != 0, "{said:?}");
        server.ok(["scale", "f", "1"])?;
        wait::until_true("the function answers", LIMIT, || {
            Ok(server.get("/function/f/").is_ok() || server.call("GET", "/function/f/", &[], b"")?.status == 404)
        })
    })
}

#[test]
fn a_terminal_behaves_like_one() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        deployed(&server, "f")?;
        let command = server.command(["exec", "f", "-it", "--", "sh"]);
        let mut session = Session::start(&command, 31, 99)?;
        session.expect("# ", LIMIT)?;
        ensure!(!session.is_in_order()?, "keys are passed on as they are");
        session.keys("busybox stty size; busybox tty; echo $TERM\n")?;
        session.expect("\n31 99\r\n/dev/pts/0\r\nxterm\r\n", LIMIT)?;
        session.resize(40, 120)?;
        wait::until_true("the size arrives", LIMIT, || {
            session.keys("busybox stty size; echo en''d\n")?;
            Ok(session.expect("\nend\r\n", LIMIT)?.contains("\n40 120\r\n"))
        })?;
        // Keys are signals inside: this program is neither ended nor stopped by them.
        session.keys("sleep 76543\n")?;
        wait::until_true("the sleep runs", LIMIT, || runs(world, "sleep 76543"))?;
        session.keys("\u{3}")?;
        session.expect("^C", LIMIT)?;
        session.keys("echo interru''pted $?\n")?;
        session.expect("\ninterrupted 130\r\n", LIMIT)?;
        session.keys("sleep 76544\n")?;
        wait::until_true("the sleep runs", LIMIT, || runs(world, "sleep 76544"))?;
        session.keys("\u{1a}")?;
        session.expect("Stopped", LIMIT)?;
        session.keys("kill -9 %1; wait; echo go''ne\n")?;
        session.expect("\ngone\r\n", LIMIT)?;
        // This shell takes the killed job for a stopped one once more.
        session.keys("exit 9\nexit 9\n")?;
        let (status, rest) = session.finish(LIMIT)?;
        ensure!(status.code() == Some(9), "{status} {rest:?}");

        // Without -i nothing is typed to it, and Ctrl-C is for this program, which passes it on.
        let mut session =
            Session::start(&server.command(["exec", "f", "-t", "--", "sh", "-c", "busybox tty; exec sleep 76545"]), 24, 80)?;
        session.expect("/dev/pts/0\r", LIMIT)?;
        ensure!(session.is_in_order()?);
        wait::until_true("the sleep runs", LIMIT, || runs(world, "sleep 76545"))?;
        session.keys("\u{3}")?;
        let (status, rest) = session.finish(LIMIT)?;
        ensure!(status.code() == Some(130), "{status} {rest:?}");
        // Much output comes whole.
        let script = "dd if=/dev/zero bs=1000 count=1000 2>/dev/null | tr '\\0' x; echo; echo la''st";
        let mut session = Session::start(&server.command(["exec", "f", "-t", "--", "sh", "-c", script]), 24, 80)?;
        let all = session.expect("\nlast\r", LIMIT)?;
        ensure!(all.matches('x').count() == 1_000_000, "{} of a million", all.matches('x').count());
        session.finish(LIMIT)?;
        Ok(())
    })
}

#[test]
fn the_terminal_is_put_in_order_whatever_happens() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        deployed(&server, "f")?;
        let begin = |script: &str| -> Result<Session> {
            let script = format!("echo begun; {script}");
            let mut session = Session::start(&server.command(["exec", "f", "-it", "--", "sh", "-c", &script]), 24, 80)?;
            session.expect("begun\r\n", LIMIT)?;
            ensure!(!session.is_in_order()?);
            Ok(session)
        };
        // A signal that the command does not withstand, one that it does until the third, and the end of who looks on.
        let session = begin("exec sleep 76551")?;
        session.signal(Signal::TERM)?;
        ensure!(session.finish(LIMIT)?.0.code() == Some(143));
        let mut session = begin("trap 'echo no' TERM; while true; do sleep 0.05; done")?;
        for _ in 0..2 {
            session.signal(Signal::TERM)?;
            session.expect("no\r\n", LIMIT)?;
        }
        session.signal(Signal::TERM)?;
        ensure!(session.finish(LIMIT)?.0.code() == Some(143));
        let session = begin("trap '' HUP; exec sleep 76552")?;
        session.signal(Signal::HUP)?;
        ensure!(session.finish(LIMIT)?.0.code() == Some(129));
        wait::until_true("it ends with its caller", LIMIT, || Ok(!runs(world, "sleep 76552")?))?;
        // Stopped for a while, the terminal is the shell's.
        let mut session = begin("read line; echo got $line; exec sleep 76553")?;
        session.signal(Signal::TSTP)?;
        wait::until_true("it is stopped", LIMIT, || session.is_in_order())?;
        session.signal(Signal::CONT)?;
        wait::until_true("it goes on", LIMIT, || Ok(!session.is_in_order()?))?;
        session.keys("words\n")?;
        session.expect("got words\r\n", LIMIT)?;
        session.signal(Signal::INT)?;
        ensure!(session.finish(LIMIT)?.0.code() == Some(130));
        // The instance ends.
        let session = begin("exec sleep 76554")?;
        server.ok(["scale", "f", "0"])?;
        let (status, said) = session.finish(LIMIT)?;
        ensure!(status.code() == Some(137), "{status} {said}");
        Ok(())
    })
}

#[test]
fn whoever_holds_a_command_can_die() -> Result<()> {
    scenario(|world| {
        let mut server = world.serve()?;
        deployed(&server, "f")?;
        let ids = server.instance_ids("f")?;
        let shell = |mark: &str| {
            vec!["exec", "f", "-i", "--", "sh", "-c"]
                .into_iter()
                .map(str::to_owned)
                .chain([format!("trap '' TERM HUP PIPE; sleep {mark}; :")])
                .collect::<Vec<_>>()
        };
        let begin = |server: &Server, mark: &str| -> Result<process::Running> {
            let args = shell(mark);
            let running = server.begin(args.iter().map(String::as_str))?;
            wait::until_true("the command runs", LIMIT, || runs(world, &format!("sleep {mark}")))?;
            Ok(running)
        };
        let gone = |mark: &str| wait::until_true("the command is gone", LIMIT, || Ok(!runs(world, &format!("sleep {mark}"))?));

        // The client, while the command neither reads nor writes.
        let mut client = begin(&server, "76561")?;
        let mut stdin = client.stdin().context("standard input")?;
        let feeding = std::thread::spawn(move || drop(stdin.write_all(&vec![0; 10_000_000])));
        client.signal(Signal::KILL)?;
        gone("76561")?;
        client.finish(LIMIT)?;
        feeding.join().ok().context("the feeding thread")?;

        // The daemon: its commands end, the instance goes on.
        let client = begin(&server, "76562")?;
        let (daemon, init) = (server.daemon_pid()?, server.init_pids("f")?);
        kill(daemon)?;
        gone("76562")?;
        let ended = client.finish(LIMIT)?;
        ensure!(ended.code()? == 125 && ended.err().contains("error: "), "{ended:?}");
        wait::until_true("the next daemon answers", LIMIT, || Ok(server.cli(["exec", "f", "--", "true"])?.code()? == 0))?;
        ensure!(server.instance_ids("f")? == ids && server.init_pids("f")? == init, "the instance goes on");

        // The keeper, and everything with it; a terminal is put in order.
        let mut session =
            Session::start(&server.command(["exec", "f", "-it", "--", "sh", "-c", "echo begun; sleep 76563"]), 24, 80)?;
        session.expect("begun\r\n", LIMIT)?;
        server.end(Signal::KILL)?;
        gone("76563")?;
        let (status, said) = session.finish(LIMIT)?;
        ensure!(status.code() == Some(125) && said.contains("error: "), "{status} {said}");
        // What a killed keeper leaves is for the next one.
        drop(world.serve_at(&server.places().clone(), "127.0.0.1:0")?);
        Ok(())
    })
}

#[test]
fn a_storm_of_commands_leaves_nothing() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        deployed(&server, "f")?;
        server.ok(["exec", "f", "--", "true"])?;
        let (daemon, zygote) = (server.daemon_pid()?, server.zygote_pid("f")?.context("a zygote")?);
        let traces = || -> Result<[usize; 4]> {
            let children = fs::read_to_string(format!("/proc/{zygote}/task/{zygote}/children"))?.split_whitespace().count();
            let open = |pid: i32| count(&format!("/proc/{pid}/fd"));
            Ok([open(server.pid())?, open(daemon)?, open(zygote)?, children])
        };
        let before = traces()?;
        std::thread::scope(|threads| {
            let worker = |number: usize| {
                let server_command = |args: &[&str]| server.command(args.iter().copied());
                let mut commands: Vec<Command> = Vec::new();
                for round in 0..10 {
                    commands.push(match (number + round) % 3 {
                        0 => server_command(&["exec", "f", "--", "true"]),
                        1 => server_command(&["exec", "f", "-t", "--", "echo", "x"]),
                        _ => server_command(&["exec", "f", "-i", "--", "cat"]),
                    });
                }
                commands
            };
            let workers: Vec<_> = (0..6)
                .map(|number| {
                    let commands = worker(number);
                    threads.spawn(move || -> Result<()> {
                        for mut command in commands {
                            let ended = process::run(&mut command, b"some input", COMMAND_LIMIT)?;
                            ensure!(ended.code()? == 0, "{ended:?}");
                        }
                        Ok(())
                    })
                })
                .collect();
            workers.into_iter().try_for_each(|worker| worker.join().ok().context("a worker")?)
        })?;
        wait::until_true("nothing is left", LIMIT, || {
            let after = traces()?;
            Ok(after.iter().zip(&before).all(|(after, before)| after <= before))
        })
        .with_context(|| format!("before {before:?}, after {:?}", traces()))?;
        // More than an instance takes are refused, and those that run go on.
        let sleeping: Vec<_> = (0..16).map(|_| server.begin(["exec", "f", "--", "sleep", "76571"])).collect::<Result<_>>()?;
        // A look at it by a command would take the place of one of them while they begin.
        wait::until_true("all of them sleep", LIMIT, || Ok(processes_with("sleep\x0076571\x00")? == 16))?;
        wait::until_true("it is full", LIMIT, || Ok(server.cli(["exec", "f", "--", "true"])?.err().contains("queue-full")))?;
        for running in sleeping {
            running.signal(Signal::INT)?;
            ensure!(running.finish(LIMIT)?.code()? == 130);
        }
        ensure!(server.cli(["exec", "f", "--", "true"])?.code()? == 0);
        Ok(())
    })
}

#[test]
fn run_gives_a_terminal() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.import(&catalog::busybox(&["/bin/sh"])?, "sh:1")?;
        let mut session = Session::start(&server.command(["run", "-it", "sh:1"]), 50, 132)?;
        session.expect("# ", LIMIT)?;
        session.keys("busybox stty size; busybox tty; tty=$(busybox tty); echo $TERM > $tty; echo to err >&2; hostname\n")?;
        session.expect("\n50 132\r\n/dev/pts/0\r\nxterm\r\nto err\r\n", LIMIT)?;
        session.resize(10, 20)?;
        session.keys("sleep 76581\n")?;
        wait::until_true("the sleep runs", LIMIT, || runs(world, "sleep 76581"))?;
        session.keys("\u{3}")?;
        // The key throws away what was typed behind it and is not read yet.
        session.expect("^C", LIMIT)?;
        session.keys("busybox stty size; exit 5\n")?;
        session.expect("\n10 20\r\n", LIMIT)?;
        let (status, rest) = session.finish(LIMIT)?;
        ensure!(status.code() == Some(5), "{status} {rest:?}");
        // A hang-up ends it.
        let mut session =
            Session::start(&server.command(["run", "-it", "sh:1", "--", "-c", "echo begun; exec sleep 76582"]), 24, 80)?;
        session.expect("begun\r\n", LIMIT)?;
        session.signal(Signal::HUP)?;
        session.finish(LIMIT)?;
        wait::until_true("it ends with its caller", LIMIT, || Ok(!runs(world, "sleep 76582")?))?;
        // Signals reach a command without a terminal, too.
        let running = server.begin(["run", "sh:1", "--", "-c", "trap 'exit 3' USR1; sleep 76583 & wait"])?;
        wait::until_true("the command runs", LIMIT, || runs(world, "sleep 76583"))?;
        running.signal(Signal::USR1)?;
        ensure!(running.finish(LIMIT)?.code()? == 3);
        server.refused(["run", "-t", "missing:1"], 125, "image-unknown").map(drop).or_else(|error| {
            // No terminal to give comes first.
            ensure!(format!("{error:#}").contains("no terminal"), "{error:#}");
            Ok(())
        })
    })
}

/// A command of the command line within the world's fence that finds no server.
fn lonely(world: &World, socket: &Path, args: &[&str]) -> Result<Command> {
    let mut command = Command::new("sh");
    command.args(["-c", r#"echo $$ > "$0" && exec "$@""#]).arg(world.scope().procs()).arg(paths::funtainer()?).args(args);
    command.env("FUNTAINER_HOST", format!("unix://{}", socket.display()));
    Ok(command)
}

#[test]
fn run_does_without_a_server() -> Result<()> {
    scenario(|world| {
        let places = Places {
            data: world.home().join("data"),
            admin: world.home().join("admin.sock"),
            log: world.home().join("serve.log"),
        };
        let data = places.data.to_str().context("a path")?.to_owned();
        let server = world.serve_at(&places, "127.0.0.1:0")?;
        server.import(&catalog::busybox(&["/bin/sh", "-c"])?, "sh:1")?;
        // One that uses the data directory but answers elsewhere is in the way.
        let elsewhere = world.home().join("elsewhere.sock");
        let args = ["run", "--data", &data, "sh:1", "--", "exit 3"];
        let said = process::run(&mut lonely(world, &elsewhere, &args)?, b"", COMMAND_LIMIT)?;
        ensure!(said.code()? == 125 && said.err().contains("is using the data directory"), "{said:?}");
        ensure!(said.err().contains("hint: name that server's socket with --host"), "{said:?}");
        server.stop()?;

        let id = fs::read_to_string(places.data.join("id"))?;
        let nothing_left = || {
            wait::until_true("nothing is left of the server", LIMIT, || {
                let groups = fs::read_dir("/sys/fs/cgroup")?
                    .flatten()
                    .any(|mount| mount.path().join(format!("funtainer-{id}")).exists());
                Ok(world.scope().members()?.is_empty() && !groups)
            })
        };
        let said = process::run(
            &mut lonely(world, &elsewhere, &["run", "--data", &data, "sh:1", "--", "cat; echo err >&2; exit 3"])?,
            b"in\n",
            COMMAND_LIMIT,
        )?;
        ensure!(said.code()? == 3 && said.out() == "in\n" && said.err() == "err\n", "{said:?}");
        nothing_left()?;
        let mut session = Session::start(
            &lonely(world, &elsewhere, &["run", "-it", "--data", &data, "sh:1", "--", "busybox stty size; read x; exit 4"])?,
            12,
            34,
        )?;
        session.expect("12 34\r\n", LIMIT)?;
        session.keys("\n")?;
        ensure!(session.finish(LIMIT)?.0.code() == Some(4));
        nothing_left()?;
        // However the command line ends, its server ends with it.
        for signal in [Signal::INT, Signal::KILL] {
            let running = process::start(
                &mut lonely(world, &elsewhere, &["run", "--data", &data, "sh:1", "--", "exec sleep 76591"])?,
                None,
            )?;
            wait::until_true("the command runs", LIMIT, || runs(world, "sleep 76591"))?;
            running.signal(signal)?;
            running.finish(LIMIT)?;
            nothing_left()?;
        }
        let said = process::run(
            &mut lonely(world, &elsewhere, &["run", "--data", &data, "unknown.invalid/x:1"])?,
            b"",
            COMMAND_LIMIT,
        )?;
        ensure!(said.code()? == 125 && said.err().contains("error[registry-unavailable]"), "{said:?}");
        nothing_left()?;
        // A server that does not start says why.
        let said =
            process::run(&mut lonely(world, &elsewhere, &["run", "--data", "/dev/null/x", "sh:1"])?, b"", COMMAND_LIMIT)?;
        ensure!(said.code()? == 125 && said.err().contains("/dev/null/x"), "{said:?}");
        // An ordinary user's own place is looked for first: one that he may not use is named, with the way out.
        let mut command = Command::new("setpriv");
        command.args(["--reuid", "65534", "--regid", "65534", "--clear-groups"]).arg(paths::funtainer()?);
        command.args(["run", "x:1"]).env("FUNTAINER_HOST", "unix:///nowhere/admin.sock").env("HOME", "/root");
        let said = process::run(command.env_remove("XDG_DATA_HOME"), b"", COMMAND_LIMIT)?;
        let told = said.err().contains("/root/.local/share/funtainer") && said.err().contains("--data");
        ensure!(said.code()? == 125 && told, "{said:?}");
        Ok(())
    })
}

/// How many processes of the machine have this command line.
fn processes_with(command_line: &str) -> Result<usize> {
    let processes = fs::read_dir("/proc")?.filter_map(Result::ok);
    Ok(processes
        .filter(|entry| fs::read(entry.path().join("cmdline")).is_ok_and(|line| line == command_line.as_bytes()))
        .count())
}

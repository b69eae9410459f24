//! The server of an ordinary user: what root's does, with what the kernel grants to a user namespace.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use funtainer_e2e::image::{Compression, Config, Image, Tree, catalog};
use funtainer_e2e::leak::parse;
use funtainer_e2e::server::{COMMAND_LIMIT, Server};
use funtainer_e2e::user::{Subordinate, User};
use funtainer_e2e::world::{World, scenario};
use funtainer_e2e::{process, wait};
use rustix::process::{Pid, Signal, kill_process};

const LIMIT: Duration = Duration::from_mins(1);

fn with_user(subordinate: Subordinate, test: impl FnOnce(&World, &User, &Server) -> Result<()>) -> Result<()> {
    let user = User::create(subordinate)?;
    scenario(|world| {
        let server = world.serve_as(&user)?;
        test(world, &user, &server)
    })
}

/// The user and group ids of a process on the host.
fn host_ids(pid: i32) -> Result<(u32, u32)> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let id = |name: &str| -> Result<u32> {
        let line = status.lines().find_map(|line| line.strip_prefix(name)).with_context(|| format!("no {name} in {status}"))?;
        Ok(line.split_whitespace().next().context("an id")?.parse()?)
    };
    Ok((id("Uid:")?, id("Gid:")?))
}

fn kill(pid: i32) -> Result<()> {
    Ok(kill_process(Pid::from_raw(pid).context("a process id is positive")?, Signal::KILL)?)
}

/// Runs a shell script in a fresh container and returns what it printed.
fn inside(server: &Server, image: &str, script: &str) -> Result<String> {
    let finished = server.cli(["run", image, "--", script])?;
    ensure!(finished.code()? == 0, "{script}\n{finished:?}");
    Ok(finished.out())
}

/// Whatever else, an image with three layers that hide, replace and own things.
fn odd_image() -> Result<Image> {
    let below = Tree::new()
        .directory("opt", 0o755)?
        .file("opt/gone", 0o644, b"below")?
        .file("opt/kept", 0o644, b"below")?
        .directory("opt/tree", 0o755)?
        .file("opt/tree/leaf", 0o644, b"leaf")?
        .layer(Compression::Gzip)?;
    let above = Tree::new()
        .directory("opt", 0o755)?
        .whiteout("opt/gone")?
        .owned_file("opt/owned", 0o640, (1000, 2000), b"owned")?
        .owned_file("opt/nobody", 0o600, (65_534, 65_534), b"")?
        .owned_file("opt/setuid", 0o4755, (33, 33), b"")?
        // CAP_NET_BIND_SERVICE.
        .capable_file("opt/capable", b"", 1 << 10)?
        .device("opt/disk", 0o666, 254, 0)?
        .layer(Compression::Gzip)?;
    Image::build(vec![catalog::busybox_layer()?, below, above], &Config::command(&["/bin/sh", "-c"]))
}

#[test]
fn an_ordinary_user_has_all_of_the_main_flow() -> Result<()> {
    with_user(Subordinate::Usual, |_, user, server| {
        let (first, count) = user.subordinate().context("subordinate ids")?;
        server.deploy("hello", &catalog::hello()?, &[])?;
        ensure!(server.get("/function/hello")?.text().starts_with("hello"));
        ensure!(server.get("/function/hello")?.header("server-timing").is_none(), "the second call is warm");
        // The keeper is the user, the daemon nobody, a function nobody else.
        ensure!(host_ids(server.pid())? == (user.id(), user.id()));
        ensure!(host_ids(server.daemon_pid()?)? == (first, first));
        let init = *server.init_pids("hello")?.first().context("an instance")?;
        ensure!(host_ids(init)? == (first + 1, first + 1), "{:?}", host_ids(init)?);
        ensure!(host_ids(server.zygote_pid("hello")?.context("a zygote")?)? == (first + 1, first + 1));
        server.ok(["scale", "hello", "0"])?;
        ensure!(server.get("/function/hello")?.header("server-timing").is_some(), "the call is a cold one");
        server.deploy("probe", &catalog::probe(&[], &[])?, &[])?;
        let logged = || Ok(server.ok(["logs", "probe"])?.contains("probe starts"));
        wait::until_true("what the function wrote is in its log", LIMIT, logged)?;

        // A command, and the whole of a distribution.
        server.deploy("upper", &catalog::upper()?, &["--contract", "stdio"])?;
        let answer = server.call("POST", "/function/upper", &[], b"make me tall")?.expect(200)?;
        ensure!(answer.body == b"MAKE ME TALL", "{answer:?}");
        server.deploy("python", &catalog::python()?, &[])?;
        server.get("/function/python")?;
        ensure!(server.get("/function/hello")?.status == 200);

        // Nothing of it lies anywhere but with the user, and nobody else gets at it.
        let data = &server.places().data;
        ensure!(fs::metadata(data)?.mode() & 0o777 == 0o711 && fs::metadata(data)?.uid() == user.id());
        ensure!(fs::metadata(data.join("unpacked"))?.mode() & 0o777 == 0o700);
        ensure!(fs::metadata(&server.places().admin)?.mode() & 0o077 == 0);
        for entry in fs::read_dir(data.join("unpacked"))? {
            let owner = entry?.metadata()?.uid();
            ensure!((first + 1..first + count).contains(&owner), "{owner}");
        }
        Ok(())
    })
}

#[test]
fn the_command_line_finds_the_users_own_server() -> Result<()> {
    with_user(Subordinate::Usual, |_, user, server| {
        server.deploy("hello", &catalog::hello()?, &[])?;
        let listed = process::succeed(user.command(user.program()).arg("list"), COMMAND_LIMIT)?;
        ensure!(listed.contains("hello"), "{listed}");
        // Somebody else does not even reach the socket.
        let other = User::create(Subordinate::None)?;
        let mut command = other.command(other.program());
        command.args(["--host", &format!("unix://{}", server.places().admin.display()), "list"]);
        let finished = process::run(&mut command, b"", COMMAND_LIMIT)?;
        ensure!(finished.code()? == 1 && finished.err().contains("Permission denied"), "{finished:?}");
        // A second server of the same user is refused.
        let again = process::run(user.command(user.program()).args(["serve", "--listen", "127.0.0.1:0"]), b"", COMMAND_LIMIT)?;
        ensure!(again.code()? == 1 && again.err().contains("in use"), "{again:?}");
        Ok(())
    })
}

#[test]
fn layers_are_what_they_are_under_root() -> Result<()> {
    with_user(Subordinate::Usual, |_, _, server| {
        server.import(&odd_image()?, "odd:1")?;
        let script = "cd /opt && for f in *; do stat -c '%n %u %g %a %F' $f; done";
        let expected = "\
capable 0 0 755 regular empty file
disk 0 0 0 regular empty file
kept 0 0 644 regular file
nobody 65534 65534 600 regular empty file
owned 1000 2000 640 regular file
setuid 33 33 4755 regular empty file
tree 0 0 755 directory
";
        let seen = inside(server, "odd:1", script)?;
        ensure!(seen == expected, "{seen}");
        // Written to, they are copied up; a second container sees nothing of it.
        let script_of_changes = "cd /opt && echo more >> kept && cat kept && rm tree/leaf && busybox rmdir tree && mkdir tree && ls tree && busybox chown 7:8 owned && \
                       stat -c '%u %g' owned && busybox mv setuid moved && stat -c '%u %a' moved && ln kept again && stat -c %h again";
        let changed = inside(server, "odd:1", script_of_changes)?;
        ensure!(changed == "belowmore\n7 8\n33 4755\n2\n", "{changed}");
        ensure!(inside(server, "odd:1", script)? == expected);
        Ok(())
    })
}

#[test]
fn what_holds_under_root_holds_here() -> Result<()> {
    with_user(Subordinate::Usual, |_, user, server| {
        server.import(&catalog::busybox(&["/bin/sh", "-c"])?, "sh:1")?;
        let status = inside(server, "sh:1", "cat /proc/self/status")?;
        let value = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
            line.with_context(|| format!("no {name} in\n{status}"))
        };
        ensure!(value("NoNewPrivs")? == "1" && value("Seccomp")? == "2", "{status}");
        for set in ["CapPrm", "CapEff", "CapBnd"] {
            let mask = u64::from_str_radix(value(set)?, 16)?;
            for bit in [12, 13, 16, 17, 19, 21, 27] {
                ensure!(mask & (1 << bit) == 0, "{set} has capability {bit}: {mask:x}");
            }
        }
        ensure!(value("Groups")?.trim() == "0", "{status}");
        let (first, count) = user.subordinate().context("subordinate ids")?;
        let map = inside(server, "sh:1", "cat /proc/self/uid_map")?;
        let map: Vec<u32> = map.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
        // Outside of the keeper's namespace, where the daemon has the first one.
        ensure!(map == [0, 2, count - 1], "{map:?}, and the ids are from {first}");
        // Without a control group too.
        ensure!(inside(server, "sh:1", "ulimit -u")?.trim() == "4096");
        for script in [
            "mount -t tmpfs none /tmp",
            "umount /proc",
            "unshare -U true",
            "unshare -n true",
            "chroot / true",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
            "mknod /tmp/null c 1 3",
            "hostname changed",
        ] {
            let finished = server.cli(["run", "sh:1", "--", script])?;
            ensure!((1..125).contains(&finished.code()?), "{script}: {finished:?}");
        }
        ensure!(inside(server, "sh:1", "ls /proc | grep -c '^[0-9]'")?.trim().parse::<u32>()? <= 6);
        ensure!(inside(server, "sh:1", "head -c 4 /dev/urandom | wc -c && echo x > /dev/null")? == "4\n");
        Ok(())
    })
}

#[test]
fn with_many_ids_functions_have_ranges_of_their_own() -> Result<()> {
    with_user(Subordinate::Count(3 * 0x1_0000 + 1), |_, user, server| {
        let (first, _) = user.subordinate().context("subordinate ids")?;
        let mut ids = BTreeSet::new();
        for name in ["one", "two", "three", "four"] {
            server.deploy(name, &catalog::hello()?, &[])?;
            server.get(&format!("/function/{name}"))?;
            ids.insert(host_ids(*server.init_pids(name)?.first().context("an instance")?)?.0);
        }
        // Three ranges for four functions.
        ensure!(ids == [0, 1, 2].map(|slot| first + 1 + slot * 0x1_0000).into(), "{ids:?}, from {first} on");
        Ok(())
    })
}

#[test]
fn with_a_single_id_images_run_as_the_user() -> Result<()> {
    with_user(Subordinate::None, |_, user, server| {
        let log = fs::read_to_string(&server.places().log)?;
        ensure!(log.contains("only one user id can be used") && log.contains("usermod --add-subuids"), "{log}");
        server.deploy("hello", &catalog::hello()?, &[])?;
        server.get("/function/hello")?;
        for pid in [server.daemon_pid()?, *server.init_pids("hello")?.first().context("an instance")?] {
            ensure!(host_ids(pid)? == (user.id(), user.id()));
        }
        server.import(&odd_image()?, "odd:1")?;
        let seen = inside(
            server,
            "odd:1",
            "cd /opt && stat -c '%u %g' owned nobody && cat owned && ! test -e gone && busybox chown 1000 owned || echo no",
        )?;
        ensure!(seen == "0 0\n0 0\nownedno\n", "{seen}");
        // An image's user is the only one that there is, without the powers of root.
        let config = Config { user: "1000:1000".into(), ..Config::command(&["/bin/sh", "-c"]) };
        server.import(&catalog::busybox_with(&config)?, "user:1")?;
        let seen = inside(server, "user:1", "id -u && grep CapEff /proc/self/status")?;
        ensure!(seen == "0\nCapEff:\t0000000000000000\n", "{seen}");
        Ok(())
    })
}

/// With the keeper's own id, the daemon must still not get at what the keeper alone may touch.
#[test]
fn with_a_single_id_the_daemon_is_kept_out_by_namespaces() -> Result<()> {
    with_user(Subordinate::None, |_, _, server| {
        server.deploy("hello", &catalog::hello()?, &[])?;
        let daemon = server.daemon_pid()?;
        let namespaces = |pid: i32| parse::namespace(pid, "user").map(|found| found.context("a namespace"));
        ensure!(namespaces(daemon)?? != namespaces(server.pid())??, "the daemon is in the keeper's user namespace");
        let mounts = fs::read_to_string(format!("/proc/{daemon}/mountinfo"))?;
        for place in ["/data/store/layers", "/data/unpacked"] {
            let line = mounts.lines().find(|line| line.split(' ').nth(4) == Some(place));
            let options = line.and_then(|line| line.split(' ').nth(5)).with_context(|| format!("no {place} in\n{mounts}"))?;
            ensure!(options.split(',').any(|option| option == "ro"), "{place}: {options}");
        }
        let layers = format!("/proc/{daemon}/root/data/unpacked");
        ensure!(fs::read_dir(layers)?.next().is_none(), "unpacked layers are in the daemon's sight");
        Ok(())
    })
}

#[test]
fn each_part_can_be_killed() -> Result<()> {
    with_user(Subordinate::Usual, |_, _, server| {
        server.deploy("hello", &catalog::hello()?, &["--min", "1"])?;
        let warm = server.instance_ids("hello")?;
        let daemon = server.daemon_pid()?;
        kill(daemon)?;
        wait::until_true("a new daemon", LIMIT, || Ok(server.daemon_pid().is_ok_and(|pid| pid != daemon)))?;
        ensure!(server.get("/function/hello")?.status == 200);
        ensure!(server.instance_ids("hello")? == warm, "the warm instance was lost");
        kill(server.zygote_pid("hello")?.context("a zygote")?)?;
        wait::until_true("the function answers again", LIMIT, || {
            Ok(server.call("GET", "/function/hello", &[], b"")?.status == 200 && server.instance_ids("hello")? != warm)
        })
    })
}

#[test]
fn a_killed_keeper_leaves_nothing_and_the_next_one_sweeps() -> Result<()> {
    let user = User::create(Subordinate::Usual)?;
    scenario(|world| {
        let mut server = world.serve_as(&user)?;
        server.deploy("hello", &catalog::hello()?, &[])?;
        server.get("/function/hello")?;
        server.end(Signal::KILL)?;
        wait::until_true("every process is gone", LIMIT, || Ok(world.scope().members()?.is_empty()))?;

        // What a crash in the middle of unpacking leaves, and a layer that the store has no more.
        let unpacked = server.places().data.join("unpacked");
        let range = fs::read_dir(&unpacked)?.next().context("a range")??.path();
        let layer = fs::read_dir(&range)?.next().context("a layer")??.path();
        let owner = fs::metadata(&range)?.uid();
        for name in ["00.new", "00.links", "ffff"] {
            fs::create_dir_all(range.join(name).join("deep/er"))?;
            fs::write(range.join(name).join("deep/file"), "")?;
            for path in ["", "deep", "deep/er", "deep/file"] {
                std::os::unix::fs::chown(range.join(name).join(path), Some(owner), Some(owner))?;
            }
        }
        fs::create_dir(layer.with_extension("new"))?;
        std::os::unix::fs::chown(layer.with_extension("new"), Some(owner), Some(owner))?;
        drop(server);

        let server = world.serve_as(&user)?;
        ensure!(server.get("/function/hello")?.status == 200, "what was deployed is there");
        wait::until_true("what was left is swept", LIMIT, || {
            let left = fs::read_dir(&range)?.map(|entry| Ok(entry?.path())).collect::<Result<Vec<_>>>()?;
            Ok(left == [layer.clone()])
        })
    })
}

#[test]
fn what_is_in_the_way_is_named() -> Result<()> {
    let user = User::create(Subordinate::Usual)?;
    scenario(|world| {
        let refused = |args: &[&str], words: &[&str]| -> Result<()> {
            let finished = process::run(user.command(user.program()).arg("serve").args(args), b"", COMMAND_LIMIT)?;
            ensure!(finished.code()? == 1, "{finished:?}");
            for word in words {
                ensure!(finished.err().contains(word), "'{word}' is not in:\n{}", finished.err());
            }
            Ok(())
        };
        refused(&["--listen", "127.0.0.1:80"], &["127.0.0.1:80", "--listen"])?;
        let foreign = world.home().join("foreign");
        fs::create_dir(&foreign)?;
        fs::set_permissions(world.home(), std::os::unix::fs::PermissionsExt::from_mode(0o711))?;
        refused(&["--listen", "127.0.0.1:0", "--data", &foreign.display().to_string()], &["foreign", "--data"])?;
        // A directory from a time with subordinate ids, without them.
        let server = world.serve_as(&user)?;
        let data = server.places().data.display().to_string();
        server.stop()?;
        let other = User::create(Subordinate::None)?;
        let mut command = other.command(other.program());
        let finished = process::run(command.args(["serve", "--listen", "127.0.0.1:0", "--data", &data]), b"", COMMAND_LIMIT)?;
        ensure!(finished.code()? == 1 && finished.err().contains("--data"), "{finished:?}");
        // A directory whose owner is root of the machine's server.
        let of_root = world.serve()?;
        let data = of_root.places().data.display().to_string();
        refused(&["--listen", "127.0.0.1:0", "--data", &data], &[&data, "--data"])?;
        Ok(())
    })
}

#[test]
fn servers_of_root_and_of_users_run_beside_each_other() -> Result<()> {
    let users = [User::create(Subordinate::Usual)?, User::create(Subordinate::None)?];
    scenario(|world| {
        let servers = [world.serve()?, world.serve_as(&users[0])?, world.serve_as(&users[1])?];
        for server in &servers {
            server.deploy("hello", &catalog::hello()?, &[])?;
        }
        for server in &servers {
            ensure!(server.get("/function/hello")?.status == 200);
        }
        Ok(())
    })
}

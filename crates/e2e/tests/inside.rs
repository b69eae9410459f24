//! What a process finds inside its container: the first line of what SECURITY.md promises, seen from within.

use std::time::Duration;

use anyhow::{Context, Result, ensure};
use funtainer_e2e::image::{Compression, Config, Image, Tree, catalog};
use funtainer_e2e::leak::parse;
use funtainer_e2e::server::Server;
use funtainer_e2e::wait;
use funtainer_e2e::world::scenario;

const LIMIT: Duration = Duration::from_secs(30);

/// Runs a shell script in a busybox container and returns what it printed.
fn inside(server: &Server, script: &str) -> Result<String> {
    let finished = server.cli(["run", "sh:1", "--", script])?;
    ensure!(finished.code()? == 0, "{script}\n{finished:?}");
    Ok(finished.out())
}

/// Runs a script that must fail inside.
fn fails(server: &Server, script: &str) -> Result<()> {
    let finished = server.cli(["run", "sh:1", "--", script])?;
    let code = finished.code()?;
    ensure!((1..125).contains(&code), "exit code {code} of {script}\n{finished:?}");
    Ok(())
}

fn with_shell(test: impl FnOnce(&funtainer_e2e::world::World, &Server) -> Result<()>) -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        // A block device of the host in the image: it must not open.
        let nodes = Tree::new().directory("nodes", 0o755)?.device("nodes/disk", 0o666, 254, 0)?.layer(Compression::Plain)?;
        let image = Image::build(vec![catalog::busybox_layer()?, nodes], &Config::command(&["/bin/sh", "-c"]))?;
        server.import(&image, "sh:1")?;
        test(world, &server)
    })
}

#[test]
fn root_inside_is_nobody_outside() -> Result<()> {
    with_shell(|_, server| {
        let map = inside(server, "cat /proc/self/uid_map /proc/self/gid_map")?;
        for line in map.lines() {
            let fields: Vec<u64> = line.split_whitespace().map(str::parse).collect::<Result<_, _>>()?;
            ensure!(fields[0] == 0 && fields[1] >= 0x7000_0000 && fields[2] <= 0x1_0000, "{line}");
        }
        // Two functions have ranges of their own; two instances of one function share one.
        server.deploy("one", &catalog::probe(&[], &[])?, &[])?;
        server.deploy("two", &catalog::probe(&[], &[])?, &[])?;
        let range =
            |name: &str| server.get(&format!("/function/{name}/file?/proc/self/uid_map")).map(|response| response.text());
        ensure!(range("one")? != range("two")?, "two functions share host ids");
        Ok(())
    })
}

#[test]
fn privileges_are_dropped() -> Result<()> {
    with_shell(|_, server| {
        let status = inside(server, "cat /proc/self/status")?;
        let value = |name: &str| {
            let line = status.lines().find_map(|line| line.strip_prefix(name)?.strip_prefix(":\t"));
            line.with_context(|| format!("no {name} in\n{status}"))
        };
        ensure!(value("NoNewPrivs")? == "1" && value("Seccomp")? == "2", "{status}");
        for set in ["CapPrm", "CapEff", "CapBnd", "CapInh", "CapAmb"] {
            let mask = u64::from_str_radix(value(set)?, 16)?;
            // CAP_NET_ADMIN 12, CAP_NET_RAW 13, CAP_SYS_MODULE 16, CAP_SYS_RAWIO 17, CAP_SYS_PTRACE 19, CAP_SYS_ADMIN 21, CAP_MKNOD 27.
            for bit in [12, 13, 16, 17, 19, 21, 27] {
                ensure!(mask & (1 << bit) == 0, "{set} has capability {bit}: {mask:x}");
            }
        }
        // The calls that need them fail, and so do those that would bring them back.
        for script in [
            "mount -t tmpfs none /tmp",
            "mount -o remount,rw /proc/sys",
            "umount /proc",
            "mknod /tmp/null c 1 3",
            "hostname changed",
            "chroot / true",
            "unshare -U true",
            "unshare -m true",
            "unshare -n true",
        ] {
            fails(server, script)?;
        }
        Ok(())
    })
}

#[test]
fn the_host_is_out_of_sight() -> Result<()> {
    with_shell(|_, server| {
        let processes = inside(server, "ls /proc | grep -c '^[0-9]'")?;
        ensure!(processes.trim().parse::<u32>()? <= 6, "{processes} processes are seen");
        let devices = inside(server, "cat /proc/net/dev")?;
        let devices: Vec<_> = devices.lines().filter_map(|line| line.split_once(':')).map(|(name, _)| name.trim()).collect();
        ensure!(devices == ["lo", "eth0"], "{devices:?}");
        let groups = inside(server, "cat /proc/self/cgroup")?;
        ensure!(!groups.contains("funtainer"), "the host's control groups are seen:\n{groups}");
        for namespace in ["user", "mnt", "pid", "net", "uts", "ipc", "cgroup"] {
            let within = inside(server, &format!("readlink /proc/self/ns/{namespace}"))?;
            let host = std::fs::read_link(format!("/proc/self/ns/{namespace}"))?;
            ensure!(within.trim() != host.display().to_string(), "the {namespace} namespace is the host's");
        }
        // No descriptor but the three, and the directory that is being listed.
        let open = inside(server, "ls /proc/self/fd")?;
        ensure!(open.split_whitespace().count() <= 4, "open descriptors: {open}");
        let environment = inside(server, "env")?;
        ensure!(!environment.contains("FUNTAINER") && !environment.contains("CARGO"), "{environment}");
        Ok(())
    })
}

#[test]
fn kernel_files_are_masked_and_devices_closed() -> Result<()> {
    with_shell(|_, server| {
        for path in ["/proc/kcore", "/proc/keys", "/proc/timer_list", "/proc/sysrq-trigger"] {
            let size = inside(
                server,
                &format!("if test -e {path}; then cat {path} 2>/dev/null | head -c 100 | wc -c; else echo 0; fi"),
            )?;
            ensure!(size.trim() == "0", "{path} can be read");
        }
        for script in [
            "echo b > /proc/sysrq-trigger",
            "echo 1 > /proc/sys/kernel/panic",
            "echo 1 > /proc/sys/net/ipv4/ip_forward",
            "echo x > /proc/self/uid_map",
            "cat /nodes/disk",
            "echo x > /sys/kernel/mm/transparent_hugepage/enabled",
            "cat /dev/mem",
        ] {
            fails(server, script)?;
        }
        let devices = inside(server, "ls /dev")?;
        for device in ["null", "zero", "full", "random", "urandom"] {
            ensure!(devices.split_whitespace().any(|name| name == device), "no {device} in {devices}");
        }
        ensure!(!devices.contains("vda") && !devices.contains("kvm") && !devices.contains("loop"), "{devices}");
        ensure!(
            inside(server, "echo x > /dev/null && head -c 4 /dev/zero | wc -c && head -c 4 /dev/urandom | wc -c")? == "4\n4\n"
        );
        let options = inside(server, "grep ' / ' /proc/self/mounts")?;
        ensure!(options.contains("nodev"), "{options}");
        Ok(())
    })
}

#[test]
fn an_image_whose_links_lead_mounts_astray_is_refused() -> Result<()> {
    with_shell(|_, server| {
        for (name, target) in [("dev", "/tmp"), ("proc", "../../../tmp"), ("sys", "/etc")] {
            let link = Tree::new().symlink(name, target)?.layer(Compression::Plain)?;
            server
                .import(&Image::build(vec![link, catalog::busybox_layer()?], &Config::command(&["/bin/true"]))?, "astray:1")?;
            server.refused(["run", "astray:1"], 125, "image-invalid")?;
        }
        Ok(())
    })
}

#[test]
fn memory_covers_the_writable_layer() -> Result<()> {
    with_shell(|_, server| {
        server.import(
            &catalog::busybox(&["/bin/sh", "-c", "dd if=/dev/zero of=/tmp/large bs=1M count=500 && echo all written"])?,
            "writer:1",
        )?;
        server.ok(["deploy", "writer", "--image", "writer:1", "--contract", "stdio", "--memory", "64M"])?;
        let answer = server.call("POST", "/function/writer", &[("Accept", "application/json")], b"")?;
        ensure!(answer.status >= 500 && !answer.text().contains("all written"), "{answer:?}");
        // The layers below stay as they are, whoever writes.
        ensure!(inside(server, "rm /bin/cat /bin/ls && echo gone > /bin/ls && echo done")? == "done\n");
        ensure!(inside(server, "test -e /bin/cat && ls /bin | grep -c busybox")? == "1\n");
        Ok(())
    })
}

#[test]
fn a_fork_bomb_stays_inside_and_can_be_ended() -> Result<()> {
    with_shell(|world, server| {
        // Not a bomb without bound: enough children that an end which forgets some is seen.
        server.import(
            &catalog::busybox(&["/bin/sh", "-c", "for n in $(cat); do sleep 77777 & done; echo planted; wait"])?,
            "many:1",
        )?;
        server.ok(["deploy", "many", "--image", "many:1", "--contract", "stdio"])?;
        let numbers: Vec<_> = (0..100).map(|number: u32| number.to_string()).collect();
        let mut connection = server.connect()?;
        connection.send("POST", "/function/many", &[], numbers.join(" ").as_bytes())?;
        let head = connection.head()?;
        ensure!(connection.first_piece(&head)?.as_deref() == Some(&b"planted\n"[..]));
        let count = || -> Result<usize> {
            let members = world.members()?;
            let all = members.iter().filter_map(|pid| parse::process(*pid).transpose()).collect::<Result<Vec<_>>>()?;
            Ok(all.iter().filter(|process| process.title == "sleep 77777").count())
        };
        wait::until_true("the children are there", LIMIT, || Ok(count()? == 100))?;
        drop(connection);
        wait::until_true("the children are gone", LIMIT, || Ok(count()? == 0))
    })
}

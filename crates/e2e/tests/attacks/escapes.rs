//! The published escapes of container runtimes, each as an image.

use std::fs;
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::path::Path;
use std::process::Command;

use anyhow::{Result, ensure};
use funtainer_e2e::image::{Config, Tree};
use funtainer_e2e::{paths, process};

use crate::{ATTACKER, LIMIT, Outcome, attack, hold, image, image_with, outcome, with_attacker};

/// CVE-2019-5736: a program that the kernel interprets by `/proc/self/exe` is the runtime's own file, run and open inside the container.
#[test]
fn the_runtimes_own_binary() -> Result<()> {
    let scripts = ["/proc/self/exe", "/proc/thread-self/exe", "/proc/1/exe", "/proc/self/fd/0", "/proc/self/fd/3"];
    let binary = paths::funtainer()?;
    let before = fs::metadata(&binary)?;
    with_attacker(|world, server| {
        for (number, link) in scripts.iter().enumerate() {
            let script = Tree::new().file("script", 0o755, format!("#!{link}\n").as_bytes())?;
            let name = format!("own{number}:1");
            server.import(&image(script, &["/script", "version"])?, &name)?;
            let finished = server.cli(["run", &name])?;
            ensure!(finished.code()? >= 125, "{link} was interpreted: {finished:?}");
            ensure!(finished.stdout.is_empty(), "{link} has said something: {finished:?}");
        }
        // The control: executed by a program that is not protected, the script is run by that program.
        let script = world.home().join("script");
        fs::write(&script, "#!/proc/self/exe\n")?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        let said = process::succeed(Command::new(ATTACKER).arg(format!("interpret={}", script.display())), LIMIT)?;
        ensure!(said.starts_with("interpreter through"), "{said}");
        Ok(())
    })?;
    let after = fs::metadata(&binary)?;
    ensure!((before.mtime_nsec(), before.ctime_nsec(), before.len()) == (after.mtime_nsec(), after.ctime_nsec(), after.len()));
    Ok(())
}

/// CVE-2024-21626: a working directory that leads through a descriptor which the runtime has left open, to the host.
#[test]
fn leaked_descriptors_and_the_working_directory() -> Result<()> {
    let links =
        ["/proc/self/fd/3", "/proc/self/fd/7", "/proc/self/fd/8", "/proc/1/root", "/proc/1/cwd", "/proc/self/fd/7/../../.."];
    with_attacker(|world, server| {
        for (number, link) in links.iter().enumerate() {
            let name = format!("leak{number}:1");
            let config = Config { working_dir: (*link).to_owned(), ..Config::command(&["/attacker", "exists=./etc/shadow"]) };
            server.import(&image_with(Tree::new(), &config)?, &name)?;
            let finished = server.cli(["run", &name])?;
            ensure!(!finished.out().contains("through"), "{link} led outside: {finished:?}");
        }
        hold(
            server,
            &[attack("list=/proc/self/fd/3/"), attack("list=/proc/self/fd/7/"), attack("exists=../../../../etc/shadow")],
        )?;
        // The control: a runtime that is careless, as runc was.
        let (root, outside) = (world.home().join("root"), world.home().join("outside"));
        for directory in [&root.join("proc"), &outside] {
            fs::create_dir_all(directory)?;
        }
        fs::write(outside.join("secret"), "")?;
        let enter = "mount -t proc proc \"$2/proc\"; exec \"$0\" --careless \"$1\" \"$2\" /proc/self/fd/7 exists=./secret";
        let said = apart(enter, &[ATTACKER.as_ref(), &outside, &root])?;
        ensure!(said == "exists=./secret through ./secret is there\n", "{said}");
        Ok(())
    })
}

/// CVE-2019-16884, CVE-2021-30465: a mount point of the image that is a link, so that what is mounted there comes to lie elsewhere.
#[test]
fn mount_points_that_are_links() -> Result<()> {
    with_attacker(|world, server| {
        for (number, (name, target)) in [("proc", "/victim"), ("sys", "../../victim"), ("dev", "victim")].iter().enumerate() {
            let links = Tree::new().directory("victim", 0o755)?.symlink(name, target)?;
            let reference = format!("links{number}:1");
            server.import(&image(links, &["/attacker", "list=/victim"])?, &reference)?;
            server.refused(["run", reference.as_str()], 125, "image-invalid")?;
        }
        // The control: mounted by its path, it lands at the link's target.
        let (root, victim) = (world.home().join("root"), world.home().join("victim"));
        fs::create_dir_all(&root)?;
        fs::create_dir_all(&victim)?;
        std::os::unix::fs::symlink("../victim", root.join("proc"))?;
        let said =
            apart("mount -t proc proc \"$1/proc\"; exec \"$0\" \"read=$2/uptime\"", &[ATTACKER.as_ref(), &root, &victim])?;
        ensure!(said.contains(" through "), "{said}");
        Ok(())
    })
}

/// CVE-2025-31133, CVE-2025-52565, CVE-2025-52881: what a runtime uses as the source of masks and consoles, or writes to, is a link of the
/// image. (Its races need a mount that two containers share, which there is none of here: what lies still must do.)
#[test]
fn sources_of_masks_and_consoles_that_are_links() -> Result<()> {
    const TARGET: &str = "/proc/sys/kernel/core_pattern";
    with_attacker(|world, server| {
        let mut links = Tree::new().directory("dev", 0o755)?.directory("proc", 0o755)?.directory("proc/self", 0o755)?;
        for name in ["null", "console", "pts", "ptmx", "zero", "shm", "mqueue", "tty"] {
            links = links.symlink(&format!("dev/{name}"), TARGET)?;
        }
        for name in ["self/attr", "self/fd", "sys", "keys"] {
            links = links.symlink(&format!("proc/{name}"), "/proc/sysrq-trigger")?;
        }
        server.import(&image(links, &["/attacker"])?, "attacker:1")?;
        let attacks = [
            attack("read=/proc/keys"),
            attack("read=/proc/timer_list"),
            attack("read=/dev/null"),
            attack(format!("write={TARGET}")),
            attack("write=/proc/sysrq-trigger"),
            attack("exists=/dev/console"),
        ];
        hold(server, &attacks)?;
        // What lies at these places is what belongs there.
        let kinds =
            server.ok(["run", "attacker:1", "--", "read=/dev/zero", "list=/dev/pts/", "read=/proc/self/attr/current"])?;
        ensure!(kinds.lines().take(2).all(|line| line.contains(" through ")), "{kinds}");
        // The control: bound by its path, the link's target is what is laid over the mask.
        let root = world.home().join("root");
        fs::create_dir_all(&root)?;
        std::os::unix::fs::symlink(TARGET, root.join("null"))?;
        fs::write(root.join("masked"), "")?;
        let said =
            apart("mount --bind \"$1/null\" \"$1/masked\"; exec \"$0\" \"write=$1/masked\"", &[ATTACKER.as_ref(), &root])?;
        ensure!(said.contains(" through "), "{said}");
        Ok(())
    })
}

/// Files that the platform itself writes or looks up in an image lead nowhere outside.
#[test]
fn files_of_the_image_that_the_platform_touches() -> Result<()> {
    let marker = format!("/tmp/funtainer-attacked-{}", std::process::id());
    let up = format!("../../../../../..{marker}");
    with_attacker(|_, server| {
        for (number, target) in [&marker, &up, "/proc/sysrq-trigger", "/proc/1/root/etc"].into_iter().enumerate() {
            let mut links = Tree::new().directory("etc", 0o755)?;
            for name in ["hosts", "hostname", "resolv.conf", "passwd", "group", "mtab"] {
                links = links.symlink(&format!("etc/{name}"), target)?;
            }
            let config = Config {
                working_dir: "/etc/hosts/made".to_owned(),
                user: "nobody".to_owned(),
                ..Config::command(&["/attacker", "wait"])
            };
            let name = format!("touched{number}:1");
            server.import(&image_with(links, &config)?, &name)?;
            // Run or refused: what counts is where it has led.
            server.cli(["run", &name])?;
            ensure!(!Path::new(&marker).exists(), "the image made {marker} on the host by a link to {target}");
        }
        Ok(())
    })
}

/// Runs a script as root in namespaces of its own, with paths as `$0`, `$1`...
fn apart(script: &str, arguments: &[&Path]) -> Result<String> {
    let mut command = Command::new("unshare");
    command.args(crate::APART.split(' ').skip(1)).args(["sh", "-e", "-c", script]).args(arguments);
    let said = process::succeed(&mut command, LIMIT)?;
    // Only to say early that the attacker was not run at all.
    ensure!(said.lines().all(|line| line.split_once(' ').and_then(|(_, rest)| outcome(rest)).is_some()), "{said}");
    Ok(said)
}

#[test]
fn outcomes_are_read() {
    assert_eq!(outcome("through 3 names"), Some(Outcome::Through("3 names".to_owned())));
    assert_eq!(outcome("held by the kernel"), Some(Outcome::Held("by the kernel".to_owned())));
    assert_eq!(outcome("nothing said"), None);
}

//! Root file systems on the real kernel, from a layer made by `mkfs.erofs`.

use std::fs::File;
use std::os::fd::AsFd;
use std::os::unix::fs::{MetadataExt, PermissionsExt, symlink};
use std::path::Path;

use rustix::fs::{AtFlags, CWD, FileType, Mode, OFlags};
use rustix::process::{Gid, Uid};
use tempfile::TempDir;

use super::*;
use crate::testing::{TEST_BASE, device_of, ensure, need_root, refused, run};
use crate::userns;

/// All namespaces of an instance but the cgroup's.
const INSTANCE: libc::c_int =
    libc::CLONE_NEWUSER | libc::CLONE_NEWNS | libc::CLONE_NEWPID | libc::CLONE_NEWNET | libc::CLONE_NEWIPC | libc::CLONE_NEWUTS;
/// Room of the writable layers of these tests.
const UPPER_BYTES: u64 = 1 << 20;

#[test]
fn numbers_are_written_whole() {
    for (number, decimal, octal) in [
        (0, c"0", c"0"),
        (7, c"7", c"7"),
        (493, c"493", c"755"),
        (u64::MAX, c"18446744073709551615", c"1777777777777777777777"),
    ] {
        let mut digits = Digits::new();
        assert_eq!(digits.decimal(number), decimal);
        assert_eq!(digits.octal(number), octal);
    }
}

/// A layer file of the tree that `fill` makes, and the directory that it lies in.
fn layer(write: impl FnOnce(&Path)) -> (TempDir, File) {
    need_root();
    let directory = TempDir::new().expect("a directory");
    let tree = directory.path().join("tree");
    std::fs::create_dir(&tree).expect("a tree");
    std::fs::set_permissions(&tree, std::fs::Permissions::from_mode(0o755)).expect("its mode");
    write(&tree);
    let image = directory.path().join("layer.erofs");
    let made = std::process::Command::new("mkfs.erofs").arg("--quiet").arg(&image).arg(&tree).output();
    let made = made.expect("mkfs.erofs: install the package erofs-utils");
    assert!(made.status.success(), "mkfs.erofs: {}", String::from_utf8_lossy(&made.stderr));
    let file = File::open(&image).expect("the layer");
    (directory, file)
}

/// A tree with foreign owners and a node of a disk.
fn fill(tree: &Path) {
    std::fs::create_dir(tree.join("etc")).expect("etc");
    std::fs::write(tree.join("etc/owned"), "by 77:88").expect("a file");
    std::os::unix::fs::chown(tree.join("etc/owned"), Some(77), Some(88)).expect("chown");
    let node = tree.join("disk");
    rustix::fs::mknodat(CWD, &node, FileType::BlockDevice, Mode::from_raw_mode(0o666), rustix::fs::makedev(254, 0))
        .expect("a node");
    std::fs::create_dir(tree.join("proc")).expect("proc");
}

/// Runs a test in every way of mounting that this kernel has, each in a thread: a way may take its thread to a mount namespace.
fn in_every_way(test: impl Fn(&Mounts) + Sync) {
    need_root();
    let disk = TempDir::new().expect("a directory on a disk");
    let disk = File::open(disk.path()).expect("it");
    let best = Mounts::probe(disk.as_fd(), Features::NEWEST).expect("a kernel that mounts layers").features();
    for layers in [LayerSource::File, LayerSource::Loop] {
        for overlay in [OverlayForm::Descriptors, OverlayForm::Paths] {
            let features = Features { layers, overlay };
            let newer_layers = layers == LayerSource::File && best.layers == LayerSource::Loop;
            let newer_overlay = overlay == OverlayForm::Descriptors && best.overlay == OverlayForm::Paths;
            if newer_layers || newer_overlay {
                continue;
            }
            let run = || {
                // The reader of a failure sees which way it was.
                println!("{features:?}");
                test(&Mounts::open(features).expect("mounts in a way that the probe found"));
            };
            std::thread::scope(|scope| {
                let outcome = scope.spawn(run).join();
                assert!(outcome.is_ok(), "{features:?}");
            });
        }
    }
}

fn root_of(mounts: &Mounts, file: &File, base: u32) -> (OwnedFd, Writable) {
    let mapped = mapped(mounts, &[file], base);
    let writable = mounts.writable(UPPER_BYTES, base).expect("a writable layer");
    let root = mounts.overlay(&mapped, &writable).expect("an overlay");
    (root, writable)
}

/// Layers with a function's ids.
fn mapped(mounts: &Mounts, files: &[&File], base: u32) -> Vec<Mounted> {
    let namespace = userns::make(base).expect("a user namespace");
    let map = |file: &&File| {
        let layer = mounts.layer(file.as_fd()).expect("a mounted layer");
        mounts.idmapped(&layer, namespace.as_fd()).expect("an idmapped layer")
    };
    files.iter().map(map).collect()
}

/// What zygote and init do, in their order.
fn enter(root: BorrowedFd<'_>) -> Result<(), StepError> {
    make_private()?;
    let host = rustix::fs::open(c"/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(at("open /"))?;
    let stage = tmpfs(&Tmpfs { size_bytes: 1 << 20, uid: 0, gid: 0, mode: 0o755, attributes: INERT })?;
    attach(stage.as_fd(), target(host.as_fd(), c"mnt")?.as_fd())?;
    let place = target(stage.as_fd(), c"dev")?;
    device_tree(c"/dev", c"/mnt/dev")?;
    drop(place);

    attach(root, target(stage.as_fd(), c"root")?.as_fd())?;
    attach(procfs()?.as_fd(), target(root, c"proc")?.as_fd())?;
    attach(sysfs()?.as_fd(), target(root, c"sys")?.as_fd())?;
    move_tree(c"/mnt/dev", target(root, c"dev")?.as_fd())?;
    let dev = target(root, c"dev")?;
    attach(devpts(TEST_BASE.into())?.as_fd(), target(dev.as_fd(), c"pts")?.as_fd())?;
    attach(mqueue()?.as_fd(), target(dev.as_fd(), c"mqueue")?.as_fd())?;
    let shm = tmpfs(&Tmpfs { size_bytes: 64 << 20, uid: 0, gid: 0, mode: 0o1777, attributes: INERT })?;
    attach(shm.as_fd(), target(dev.as_fd(), c"shm")?.as_fd())?;
    pivot(root)?;
    mask_all()
}

fn open(path: &CStr, flags: OFlags) -> Result<OwnedFd, Errno> {
    rustix::fs::open(path, flags | OFlags::CLOEXEC, Mode::from_raw_mode(0o644))
}

#[test]
fn a_root_file_system_is_made_and_entered() {
    let (_directory, file) = layer(fill);
    in_every_way(|mounts| {
        let (root, _writable) = root_of(mounts, &file, TEST_BASE);
        run(INSTANCE, || {
            enter(root.as_fd())?;
            owners_are_mapped()?;
            devices_are_ours()?;
            kernel_files_are_masked()?;
            // The host is gone, also by way of "..".
            refused(rustix::fs::stat(c"/../../old_root/bin"), Errno::NOENT, "the old root is gone")?;
            refused(rustix::fs::stat(c"/usr"), Errno::NOENT, "the host's files are gone")?;
            ensure(rustix::fs::stat(c"/mnt").is_err(), "the stage is gone")
        });
    });
}

fn owners_are_mapped() -> Result<(), StepError> {
    let stat = rustix::fs::stat(c"/").map_err(at("stat /"))?;
    ensure((stat.st_uid, stat.st_gid, stat.st_mode & 0o7777) == (0, 0, 0o755), "/ belongs to root")?;
    let stat = rustix::fs::stat(c"/etc/owned").map_err(at("stat a file of the layer"))?;
    ensure((stat.st_uid, stat.st_gid) == (77, 88), "a file of the layer keeps its owner")?;
    refused(open(c"/disk", OFlags::RDONLY), Errno::ACCESS, "a node of the image opens nothing")?;
    let made = open(c"/new", OFlags::WRONLY | OFlags::CREATE).map_err(at("make a file"))?;
    rustix::fs::fchown(&made, Some(Uid::from_raw(1000)), Some(Gid::from_raw(1000))).map_err(at("chown a new file"))?;
    rustix::fs::chmod(c"/etc/owned", Mode::from_raw_mode(0o600)).map_err(at("copy up by chmod"))?;
    let block = [7_u8; 4096];
    let filled = (0..=UPPER_BYTES / 4096).map(|_| rustix::io::write(&made, &block)).find_map(Result::err);
    ensure(filled == Some(Errno::NOSPC), "the writable layer is bounded")
}

fn devices_are_ours() -> Result<(), StepError> {
    let null = open(c"/dev/null", OFlags::WRONLY).map_err(at("open /dev/null"))?;
    rustix::io::write(&null, b"gone").map_err(at("write to /dev/null"))?;
    let mut bytes = [1_u8; 8];
    let zero = open(c"/dev/zero", OFlags::RDONLY).map_err(at("open /dev/zero"))?;
    rustix::io::read(&zero, &mut bytes).map_err(at("read /dev/zero"))?;
    ensure(bytes == [0; 8], "/dev/zero gives zeros")?;
    refused(open(c"/dev/new", OFlags::WRONLY | OFlags::CREATE), Errno::ROFS, "/dev is read-only")?;
    refused(rustix::fs::unlink(c"/dev/null"), Errno::ROFS, "a device stays")?;
    drop(open(c"/dev/ptmx", OFlags::RDWR | OFlags::NOCTTY).map_err(at("open /dev/ptmx"))?);
    drop(open(c"/dev/shm/x", OFlags::RDWR | OFlags::CREATE).map_err(at("make a file in /dev/shm"))?);
    drop(open(c"/dev/fd/0", OFlags::RDONLY | OFlags::PATH).map_err(at("open /dev/fd/0"))?);
    let made =
        rustix::fs::mknodat(CWD, c"/node", FileType::CharacterDevice, Mode::from_raw_mode(0o600), rustix::fs::makedev(1, 1));
    refused(made, Errno::PERM, "no device can be made")?;
    let stat = rustix::fs::stat(c"/dev/mqueue").map_err(at("stat /dev/mqueue"))?;
    ensure(stat.st_mode & 0o1777 == 0o1777, "/dev/mqueue is for all")
}

fn kernel_files_are_masked() -> Result<(), StepError> {
    ensure(rustix::process::getpid().as_raw_pid() == 1, "the child is the first process")?;
    ensure(rustix::fs::stat(c"/proc/2").is_err(), "no other process is seen")?;
    for path in MASKED {
        let Ok(stat) = rustix::fs::stat(path) else { continue };
        if FileType::from_raw_mode(stat.st_mode) == FileType::Directory {
            let kind = rustix::fs::statfs(path).map_err(at("statfs a masked directory"))?.f_type;
            ensure(kind as libc::c_long == libc::TMPFS_MAGIC, "a masked directory is an empty one")?;
            ensure(stat.st_nlink == 2, "a masked directory has no directories")?;
        } else {
            ensure(device_of(path) == Ok(0x103), "a masked file is /dev/null")?;
        }
    }
    ensure(device_of(c"/proc/interrupts") == Ok(0x103), "/proc/interrupts, which every kernel has, is masked")?;
    // The settings of the network namespace belong to the container's root: only the mount protects them.
    refused(open(c"/proc/sys/net/ipv4/ip_forward", OFlags::WRONLY), Errno::ROFS, "/proc/sys is read-only")?;
    refused(open(c"/proc/sys/kernel/core_pattern", OFlags::WRONLY), Errno::ACCESS, "the host's settings are closed")?;
    refused(open(c"/sys/new", OFlags::WRONLY | OFlags::CREATE), Errno::ROFS, "/sys is read-only")
}

#[test]
fn the_host_sees_the_functions_own_ids() {
    let (_directory, file) = layer(fill);
    in_every_way(|mounts| {
        let (root, writable) = root_of(mounts, &file, TEST_BASE);
        run(INSTANCE, || {
            enter(root.as_fd())?;
            let made = open(c"/new", OFlags::WRONLY | OFlags::CREATE).map_err(at("make a file"))?;
            rustix::fs::fchown(&made, Some(Uid::from_raw(77)), Some(Gid::from_raw(88))).map_err(at("chown"))?;
            rustix::fs::chmod(c"/etc/owned", Mode::from_raw_mode(0o600)).map_err(at("copy up"))
        });
        for name in [c"new", c"etc/owned"] {
            let stat =
                rustix::fs::statat(writable.upper(), name, AtFlags::SYMLINK_NOFOLLOW).expect("a file of the upper directory");
            assert_eq!((stat.st_uid, stat.st_gid), (TEST_BASE + 77, TEST_BASE + 88), "{name:?}");
        }
    });
}

/// What image programs do to the files and directories of a layer: each needs extended attributes on the upper directory, of a kind that
/// tmpfs has for root alone before Linux 6.6.
#[test]
fn directories_of_a_layer_are_removed_and_renamed() {
    let (_directory, file) = layer(|tree| {
        for name in ["gone/below", "old/below", "proc"] {
            std::fs::create_dir_all(tree.join(name)).expect("a directory");
        }
        std::fs::write(tree.join("old/below/file"), "layer").expect("a file");
    });
    in_every_way(|mounts| {
        let (root, _writable) = root_of(mounts, &file, TEST_BASE);
        run(INSTANCE, || {
            enter(root.as_fd())?;
            rustix::fs::rmdir(c"/gone/below").map_err(at("remove a directory of the layer"))?;
            rustix::fs::rmdir(c"/gone").map_err(at("remove its parent"))?;
            rustix::fs::mkdir(c"/gone", Mode::from_raw_mode(0o755)).map_err(at("make it again"))?;
            refused(rustix::fs::stat(c"/gone/below"), Errno::NOENT, "what lay in it stays away")?;
            match rustix::fs::rename(c"/old", c"/new") {
                // Programs copy then: the kernel is built without redirect_dir.
                Ok(()) | Err(Errno::XDEV) => Ok(()),
                Err(errno) => Err(StepError { step: "rename a directory of the layer", errno }),
            }
        });
    });
}

#[test]
fn what_is_dropped_is_gone() {
    let (_directory, file) = layer(fill);
    in_every_way(|mounts| {
        let device = {
            let namespace = userns::make(TEST_BASE).expect("a user namespace");
            let layer = mounts.layer(file.as_fd()).expect("a mounted layer");
            let mapped = [mounts.idmapped(&layer, namespace.as_fd()).expect("an idmapped layer")];
            let writable = mounts.writable(UPPER_BYTES, TEST_BASE).expect("a writable layer");
            let root = mounts.overlay(&mapped, &writable).expect("an overlay");
            let device = rustix::fs::fstat(&layer).expect("stat").st_dev;
            drop((layer, mapped, writable));
            // The overlay holds what it was made of.
            let owned = rustix::fs::statat(&root, c"etc/owned", AtFlags::empty()).expect("a file of the layer");
            assert_eq!((owned.st_uid, owned.st_gid), (TEST_BASE + 77, TEST_BASE + 88));
            rustix::fs::mkdirat(&root, c"later", Mode::from_raw_mode(0o755)).expect("a new directory");
            device
        };
        if mounts.features().layers == LayerSource::Loop {
            let free = format!("/sys/dev/block/{}:{}/loop", rustix::fs::major(device), rustix::fs::minor(device));
            crate::testing::until("the loop device is free", || !Path::new(&free).exists());
        }
    });
}

#[test]
fn a_host_does_not_see_the_mounts_of_layers() {
    let (_directory, file) = layer(fill);
    in_every_way(|mounts| {
        let before = std::fs::read_to_string("/proc/thread-self/mountinfo").expect("mounts");
        let directory = std::fs::read_link("/proc/thread-self/cwd").expect("a working directory");
        let (_root, _writable) = root_of(mounts, &file, TEST_BASE);
        assert!(!std::fs::read_to_string("/proc/thread-self/mountinfo").expect("mounts").contains(" - erofs "), "{before}");
        assert_eq!(std::fs::read_link("/proc/thread-self/cwd").expect("a working directory"), directory);
    });
}

#[test]
fn an_overlay_has_as_many_layers_as_an_image_may() {
    let (_directory, file) = layer(fill);
    let (_other, top) = layer(|tree| std::fs::write(tree.join("top"), "").expect("a file"));
    in_every_way(|mounts| {
        let files: Vec<&File> = [&top].into_iter().chain(std::iter::repeat_n(&file, crate::protocol::LAYERS_MAX - 1)).collect();
        let mapped = mapped(mounts, &files, TEST_BASE);
        let writable = mounts.writable(UPPER_BYTES, TEST_BASE).expect("a writable layer");
        let root = mounts.overlay(&mapped, &writable).expect("an overlay");
        for name in [c"top", c"etc/owned"] {
            rustix::fs::statat(&root, name, AtFlags::empty()).expect("a file");
        }
    });
}

#[test]
fn one_layer_serves_two_functions() {
    let (_directory, file) = layer(fill);
    in_every_way(|mounts| {
        let layer = mounts.layer(file.as_fd()).expect("a mounted layer");
        let bases = [TEST_BASE, TEST_BASE - 0x1_0000];
        let mapped = bases.map(|base| {
            let namespace = userns::make(base).expect("a user namespace");
            mounts.idmapped(&layer, namespace.as_fd()).expect("an idmapped layer")
        });
        for (base, mapped) in bases.into_iter().zip(&mapped) {
            let stat = rustix::fs::statat(mapped, c"etc/owned", AtFlags::empty()).expect("a file");
            assert_eq!((stat.st_uid, stat.st_gid), (base + 77, base + 88));
        }
        // The same file system under both, so the same page cache.
        let devices = mapped.map(|mapped| rustix::fs::fstat(mapped).expect("stat").st_dev);
        assert_eq!(devices[0], devices[1]);
    });
}

#[test]
fn layers_lie_over_each_other() {
    let (_first, lower) = layer(|tree| {
        std::fs::write(tree.join("both"), "lower").expect("a file");
        std::fs::write(tree.join("gone"), "lower").expect("a file");
    });
    let (_second, upper) = layer(|tree| {
        std::fs::write(tree.join("both"), "upper").expect("a file");
        rustix::fs::mknodat(CWD, tree.join("gone"), FileType::CharacterDevice, Mode::empty(), 0).expect("a whiteout");
    });
    in_every_way(|mounts| {
        let mapped = mapped(mounts, &[&upper, &lower], TEST_BASE);
        let writable = mounts.writable(UPPER_BYTES, TEST_BASE).expect("a writable layer");
        rustix::fs::openat(writable.upper(), c"ahead", OFlags::CREATE | OFlags::WRONLY, Mode::from_raw_mode(0o644))
            .expect("a file put ahead");
        let root = mounts.overlay(&mapped, &writable).expect("an overlay");
        let file = rustix::fs::openat(&root, c"both", OFlags::RDONLY, Mode::empty()).expect("a file");
        assert_eq!(std::io::read_to_string(File::from(file)).expect("text"), "upper");
        assert_eq!(rustix::fs::statat(&root, c"gone", AtFlags::empty()).unwrap_err(), Errno::NOENT);
        assert!(rustix::fs::statat(&root, c"ahead", AtFlags::empty()).is_ok());
    });
}

#[test]
fn an_image_cannot_lead_a_mount_elsewhere() {
    need_root();
    let directory = TempDir::new().expect("a directory");
    let path = directory.path();
    symlink("/etc", path.join("absolute")).expect("a link");
    symlink("../../..", path.join("up")).expect("a link");
    std::fs::create_dir(path.join("real")).expect("a directory");
    symlink("real", path.join("inner")).expect("a link");
    std::fs::write(path.join("file"), "").expect("a file");
    let root = File::open(path).expect("the directory");
    for name in [c"absolute", c"up", c"inner", c"file", c"absolute/x", c"up/x", c"inner/x", c"../x", c"/etc", c"file/x"] {
        let error = target(root.as_fd(), name).expect_err("no place to mount on");
        assert!(matches!(error.errno, Errno::LOOP | Errno::NOTDIR | Errno::XDEV), "{name:?}: {error}");
    }
    assert!(!path.join("real/x").exists() && !path.parent().expect("a parent").join("x").exists());
    target(root.as_fd(), c"real").expect("a directory");
    target(root.as_fd(), c"new").expect("a new directory");
    assert_eq!(path.join("new").metadata().expect("it is there").mode() & 0o7777, 0o755);
}

#[test]
fn what_is_no_layer_is_refused() {
    need_root();
    let directory = TempDir::new().expect("a directory");
    let path = directory.path().join("layer");
    let (_kept, good) = layer(fill);
    in_every_way(|mounts| {
        let mut hostile = vec![0_u8; 8192];
        hostile[1024..1028].copy_from_slice(&0xE0F5_E1E2_u32.to_le_bytes());
        hostile[1024 + 40..1024 + 44].copy_from_slice(&u32::MAX.to_le_bytes());
        for bits in [0, 12, 16, 17, 63, 255] {
            hostile[1024 + 12] = bits;
            std::fs::write(&path, &hostile).expect("a file");
            let error = mounts.layer(File::open(&path).expect("a file").as_fd()).expect_err("no erofs");
            assert_eq!(error.step, "mount a layer");
        }
        for bytes in [&b""[..], &[0; 1024], &[0; 1200], &[7; 9000]] {
            std::fs::write(&path, bytes).expect("a file");
            let error = mounts.layer(File::open(&path).expect("a file").as_fd()).expect_err("no erofs");
            assert_eq!(error.step, "mount a layer");
            assert!(matches!(error.errno, Errno::INVAL | Errno::IO), "{} bytes: {error}", bytes.len());
        }
        let namespace = userns::make(TEST_BASE).expect("a user namespace");
        let layer = mounts.layer(good.as_fd()).expect("a mounted layer");
        let mapped = mounts.idmapped(&layer, namespace.as_fd()).expect("an idmapped layer");
        assert_eq!(mounts.idmapped(&mapped, namespace.as_fd()).expect_err("mapped already").errno, Errno::PERM);
        let writable = mounts.writable(UPPER_BYTES, TEST_BASE).expect("a writable layer");
        assert_eq!(mounts.overlay(&[], &writable).expect_err("no layer").errno, Errno::INVAL);
    });
}

#[test]
fn the_probe_finds_a_way_here_and_none_newer_than_allowed() {
    need_root();
    let disk = TempDir::new().expect("a directory on a disk");
    let directory = File::open(disk.path()).expect("it");
    let before = std::fs::read_link("/proc/thread-self/ns/mnt").expect("a namespace");
    Mounts::probe(directory.as_fd(), Features::NEWEST).expect("a kernel that mounts layers");
    let oldest = Mounts::probe(directory.as_fd(), Features::OLDEST).expect("the ways of old kernels are there");
    assert_eq!(oldest.features(), Features::OLDEST);
    assert_eq!(std::fs::read_dir(disk.path()).expect("it").count(), 0, "nothing is left");
    assert_eq!(std::fs::read_link("/proc/thread-self/ns/mnt").expect("a namespace"), before);

    // Where no kernel mounts a file.
    let memory = tmpfs(&Tmpfs { size_bytes: 1 << 20, uid: 0, gid: 0, mode: 0o755, attributes: INERT }).expect("a tmpfs");
    let memory = rustix::fs::openat(&memory, c".", OFlags::RDONLY | OFlags::DIRECTORY, Mode::empty()).expect("its root");
    let features = Mounts::probe(memory.as_fd(), Features::NEWEST).expect("a loop device").features();
    assert_eq!(features.layers, LayerSource::Loop);
}

/// Names the directory to probe, in a process of its own: [`probe_helper`] prints what is missing there.
const HELPER: &str = "FUNTAINER_TEST_PROBE";

#[test]
fn probe_helper() {
    let Ok(directory) = std::env::var(HELPER) else { return };
    let directory = File::open(directory).expect("the directory");
    match Mounts::probe(directory.as_fd(), Features::NEWEST) {
        Ok(mounts) => println!("probed {:?}", mounts.features()),
        Err(missing) => println!("probed\nmissing {}: {}", missing.feature, missing.reason),
    }
}

/// Probes under a shell command that ends in executing what follows it.
fn probed(shell: &str) -> String {
    need_root();
    let directory = TempDir::new().expect("a directory on a disk");
    std::fs::set_permissions(directory.path(), std::fs::Permissions::from_mode(0o755)).expect("its mode");
    let this = std::env::current_exe().expect("this test's file");
    let output = std::process::Command::new("unshare")
        .args(["--mount", "--propagation", "private", "sh", "-ec", &format!("{shell} \"$@\""), "sh"])
        .arg(this)
        .args(["mount::tests::probe_helper", "--exact", "--nocapture"])
        .env(HELPER, directory.path())
        .output()
        .expect("unshare of util-linux");
    let text = String::from_utf8_lossy(&output.stdout).into_owned();
    assert!(text.contains("probed"), "{text}{}", String::from_utf8_lossy(&output.stderr));
    text.lines().filter(|line| line.starts_with("missing")).collect()
}

#[test]
fn the_probe_tells_what_a_machine_forbids() {
    assert_eq!(probed("exec"), "");
    let covered = probed("mount -t tmpfs none /proc/irq; exec");
    assert!(covered.starts_with("missing mounts in a user namespace: parts of /proc or /sys are covered"), "{covered}");
    let no_loops = probed("mount -t tmpfs none /dev; exec");
    assert!(no_loops.is_empty() || no_loops.contains("modprobe loop"), "{no_loops}");
    let weak = probed("exec setpriv --bounding-set -sys_admin --inh-caps -sys_admin");
    assert!(weak.starts_with("missing ") && weak.contains("CAP_SYS_ADMIN"), "{weak}");
}

#[test]
fn an_instance_does_not_take_all_terminals() {
    need_root();
    run(INSTANCE, || {
        make_private()?;
        let host = rustix::fs::open(c"/", OFlags::PATH | OFlags::CLOEXEC, Mode::empty()).map_err(at("open /"))?;
        let place = target(host.as_fd(), c"mnt")?;
        attach(devpts(TEST_BASE.into())?.as_fd(), place.as_fd())?;
        let mut held = [const { None }; 256];
        for terminal in &mut held {
            *terminal = Some(open(c"/mnt/ptmx", OFlags::RDWR | OFlags::NOCTTY).map_err(at("open a terminal"))?);
        }
        refused(open(c"/mnt/ptmx", OFlags::RDWR | OFlags::NOCTTY), Errno::NOSPC, "one more than an instance may have")?;
        held[7] = None;
        open(c"/mnt/ptmx", OFlags::RDWR | OFlags::NOCTTY).map(drop).map_err(at("open a terminal that is free again"))
    });
}

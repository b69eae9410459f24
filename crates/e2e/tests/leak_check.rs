//! The leak check catches a planted leak of each kind, in a fence and on the whole machine, and nothing that belongs to others.

use std::fs;
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicU64, Ordering};
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use funtainer_e2e::leak::{Kind, Leak, Scope, Snapshot, Subject};
use funtainer_e2e::{paths, process, wait};

/// Planted leaks do not go by themselves: no need to wait for it.
const AT_ONCE: Duration = Duration::ZERO;
const LIMIT: Duration = Duration::from_secs(20);

/// A child that is ended with the test.
struct Planted(Child);

impl Drop for Planted {
    fn drop(&mut self) {
        let _ = self.0.kill();
        let _ = self.0.wait();
    }
}

/// Undoes something with a command.
struct Undo(Vec<String>);

impl Drop for Undo {
    fn drop(&mut self) {
        let _ = Command::new(&self.0[0]).args(&self.0[1..]).stderr(Stdio::null()).status();
    }
}

struct Place {
    home: tempfile::TempDir,
    /// Id of the data directory, another one for each test of this process: they run at the same time.
    id: u64,
    scope: Scope,
    before: Snapshot,
}

impl Place {
    fn new() -> Result<Self> {
        static PLACES: AtomicU64 = AtomicU64::new(0);
        let id = (u64::from(std::process::id()) << 16) + PLACES.fetch_add(1, Ordering::Relaxed);
        let home = paths::scratch("leak")?;
        fs::create_dir_all(home.path().join("data/store/tmp"))?;
        fs::write(home.path().join("data/id"), format!("{id:016x}\n"))?;
        Ok(Self { home, id, scope: Scope::create()?, before: Snapshot::take()? })
    }

    fn data(&self) -> PathBuf {
        self.home.path().join("data")
    }

    fn fenced(&self) -> Subject<'_> {
        Subject {
            scope: Some(&self.scope),
            data: vec![self.data()],
            admin: vec![self.home.path().join("admin.sock")],
            ports: Vec::new(),
            own_network: false,
            killed: false,
        }
    }

    fn found(&self) -> Result<Vec<Leak>> {
        self.fenced().leaks_after(&self.before, AT_ONCE)
    }

    fn expect(&self, kind: Kind, part: &str) -> Result<()> {
        let found = self.found()?;
        let hit = found.iter().any(|leak| leak.kind == kind && leak.what.contains(part));
        ensure!(hit, "no {kind:?} with '{part}' among {found:?}");
        Ok(())
    }

    fn expect_nothing(&self) -> Result<()> {
        let found = self.found()?;
        ensure!(found.is_empty(), "not planted: {found:?}");
        Ok(())
    }

    /// Starts a command inside the fence and waits until it has become that command.
    fn plant(&self, words: &[&str]) -> Result<Planted> {
        let child =
            Command::new("sh").args(["-c", r#"echo $$ > "$0" && exec "$@""#]).arg(self.scope.procs()).args(words).spawn()?;
        let child = Planted(child);
        let pid = child.0.id() as i32;
        wait::until_true("the planted process runs", LIMIT, || {
            let title = funtainer_e2e::leak::parse::process(pid)?.context("gone")?.title;
            Ok(title.starts_with("sleep"))
        })?;
        Ok(child)
    }
}

#[test]
fn nothing_planted_is_nothing_found() -> Result<()> {
    let place = Place::new()?;
    let _stranger = Planted(Command::new("sleep").arg("1000").spawn()?);
    place.expect_nothing()
}

#[test]
fn a_process_is_found_even_without_its_parent() -> Result<()> {
    let place = Place::new()?;
    let planted = place.plant(&["sleep", "1000"])?;
    place.expect(Kind::Process, "sleep 1000")?;
    drop(planted);
    place.expect_nothing()?;

    let orphan = r#"echo $$ > "$0"; setsid sleep 2000 > /dev/null 2>&1 & true"#;
    process::succeed(Command::new("sh").args(["-c", orphan]).arg(place.scope.procs()), LIMIT)?;
    wait::until("the orphan is found", LIMIT, || place.expect(Kind::Process, "sleep 2000").map(Some))?;
    place.scope.kill()?;
    place.expect_nothing()
}

#[test]
fn a_network_namespace_is_found() -> Result<()> {
    let place = Place::new()?;
    let planted = place.plant(&["unshare", "--net", "sleep", "1000"])?;
    place.expect(Kind::NetworkNamespace, &planted.0.id().to_string())?;

    let before = Snapshot::take()?;
    let stranger = Planted(Command::new("unshare").args(["--net", "sleep", "3000"]).spawn()?);
    let machine = Subject::default();
    wait::until_true("the namespace is there and found on the whole machine", LIMIT, || {
        Ok(machine.leaks_after(&before, AT_ONCE)?.iter().any(|leak| leak.kind == Kind::NetworkNamespace))
    })?;
    drop(stranger);
    Ok(())
}

#[test]
fn a_mount_is_found() -> Result<()> {
    let place = Place::new()?;
    let point = place.data();
    process::succeed(Command::new("mount").args(["-t", "tmpfs", "planted"]).arg(&point), LIMIT)?;
    let undo = Undo(vec!["umount".into(), point.display().to_string()]);
    place.expect(Kind::Mount, "planted")?;
    drop(undo);
    place.expect_nothing()
}

#[test]
fn a_namespace_pinned_by_a_file_is_found() -> Result<()> {
    let place = Place::new()?;
    let file = place.data().join("store/pin");
    fs::write(&file, "")?;
    process::succeed(Command::new("unshare").arg(format!("--net={}", file.display())).arg("true"), LIMIT)?;
    let undo = Undo(vec!["umount".into(), file.display().to_string()]);
    place.expect(Kind::Mount, "store/pin")?;
    drop(undo);
    fs::remove_file(&file)?;
    place.expect_nothing()
}

#[test]
fn a_control_group_is_found_by_the_id_of_the_data_directory() -> Result<()> {
    let place = Place::new()?;
    let top = place.scope.procs().parent().and_then(Path::parent).context("a control group has a parent")?.to_owned();
    let ours = top.join(format!("funtainer-{:016x}", place.id));
    let others = top.join(format!("funtainer-f{:015x}", place.id));
    fs::create_dir(&others)?;
    let undo = Undo(vec!["rmdir".into(), others.display().to_string()]);
    place.expect_nothing()?;
    fs::create_dir(&ours)?;
    let undo_ours = Undo(vec!["rmdir".into(), ours.display().to_string()]);
    place.expect(Kind::Cgroup, "funtainer-")?;
    let machine = Subject::default().leaks_after(&place.before, AT_ONCE)?;
    ensure!(machine.iter().any(|leak| leak.kind == Kind::Cgroup && leak.what == others.display().to_string()), "{machine:?}");
    drop((undo, undo_ours));
    place.expect_nothing()
}

#[test]
fn a_process_in_the_products_control_group_is_found() -> Result<()> {
    let place = Place::new()?;
    let top = place.scope.procs().parent().and_then(Path::parent).context("a control group has a parent")?.to_owned();
    let name = format!("{:016x}", place.id);
    let group = top.join(format!("funtainer-{name}"));
    fs::create_dir(&group)?;
    let undo = Undo(vec!["rmdir".into(), group.display().to_string()]);
    let enter = r#"echo $$ > "$0/cgroup.procs"; exec sleep 1000"#;
    let planted = Planted(Command::new("sh").args(["-c", enter]).arg(&group).spawn()?);
    wait::until_true("the planted process is found", LIMIT, || {
        Ok(place.found()?.iter().any(|leak| leak.kind == Kind::Process && leak.what.contains("sleep 1000")))
    })?;
    drop(planted);
    drop(undo);
    place.expect_nothing()
}

#[test]
fn a_loop_device_is_found() -> Result<()> {
    let place = Place::new()?;
    let file = place.data().join("store/image");
    fs::write(&file, vec![0; 1 << 20])?;
    let device = process::succeed(Command::new("losetup").args(["--find", "--show"]).arg(&file), LIMIT)?;
    let undo = Undo(vec!["losetup".into(), "--detach".into(), device.trim().into()]);
    place.expect(Kind::LoopDevice, device.trim())?;
    drop(undo);
    wait::until_true("the loop device goes", LIMIT, || Ok(place.found()?.is_empty()))
}

#[test]
fn a_listener_is_found() -> Result<()> {
    let place = Place::new()?;
    let listener = TcpListener::bind("127.0.0.1:0")?;
    let port = listener.local_addr()?.port();
    let subject = || Subject { ports: vec![port], ..place.fenced() };
    let found = subject().leaks_after(&place.before, AT_ONCE)?;
    ensure!(found.iter().any(|leak| leak.kind == Kind::Listener), "{found:?}");
    drop(listener);
    // A child that a test beside this one is just starting can hold a copy until it executes its program.
    wait::until_true("the listener is gone", LIMIT, || Ok(subject().leaks_after(&place.before, AT_ONCE)?.is_empty()))
}

#[test]
fn files_are_found() -> Result<()> {
    let place = Place::new()?;
    let check = |path: PathBuf| -> Result<()> {
        fs::write(&path, "")?;
        place.expect(Kind::File, &path.display().to_string())?;
        ensure!(
            Subject { killed: true, ..place.fenced() }.leaks_after(&place.before, AT_ONCE)?.is_empty(),
            "a kill leaves files"
        );
        fs::remove_file(&path)?;
        place.expect_nothing()
    };
    check(place.data().join("store/tmp/half-a-blob"))?;
    check(place.data().join("stray"))?;
    let socket = place.home.path().join("admin.sock");
    let listener = UnixListener::bind(&socket)?;
    place.expect(Kind::File, "admin.sock")?;
    drop(listener);
    fs::remove_file(&socket)?;
    place.expect_nothing()
}

/// The program for people says the same as the library.
#[test]
fn the_program_prints_leaks_and_fails() -> Result<()> {
    let place = Place::new()?;
    let program = env!("CARGO_BIN_EXE_leakcheck");
    let file = place.home.path().join("before.json");
    process::succeed(Command::new(program).arg("save").arg(&file), LIMIT)?;
    let planted = place.plant(&["sleep", "4000"])?;
    fs::write(place.data().join("store/tmp/rest"), "")?;
    let finished = process::run(Command::new(program).arg("compare").arg(&file).arg("--data").arg(place.data()), b"", LIMIT)?;
    ensure!(finished.code()? == 1, "{finished:?}");
    ensure!(finished.out().contains("process: ") && finished.out().contains("'sleep 4000'"), "{}", finished.out());
    ensure!(finished.out().contains("file: ") && finished.out().contains("store/tmp/rest"), "{}", finished.out());
    drop(planted);
    let nonsense = process::run(Command::new(program).arg("compare").arg("/nowhere"), b"", LIMIT)?;
    ensure!(nonsense.code()? == 1 && nonsense.err().contains("/nowhere"), "{nonsense:?}");
    Ok(())
}

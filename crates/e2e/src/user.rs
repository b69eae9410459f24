//! An ordinary user for one test, with or without subordinate ids, whom the machine knows nothing of: the files that name him are seen only by what
//! is run as him, in a mount namespace of its own. Nothing of him is left when the test is over.

use std::ffi::OsStr;
use std::fs;
use std::io::Write;
use std::os::unix::fs::{PermissionsExt, chown};
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, Result};
use tempfile::TempDir;

use crate::{paths, process};

/// Name of every such user.
const NAME: &str = "funtainer-test";
/// First id of users: above all that distributions give out, below those of functions of root's server.
const USERS: u32 = 0x4000_0000;
/// First of their subordinate ids.
const SUBORDINATES: u32 = 0x5000_0000;
/// How many subordinate ids a user can have.
const SUBORDINATES_MAX: u32 = 4 * 0x1_0000;
/// How many users one test program has at once before it uses ids again.
const USERS_MAX: u32 = 4;
/// Files of /etc that name users.
const FILES: [&str; 4] = ["passwd", "group", "subuid", "subgid"];
/// What root does before it becomes the user: `$1` is the directory of the files, `$2` the id; the rest is the command.
const ENTER: &str = r#"etc=$1 id=$2; shift 2
for file in passwd group subuid subgid; do mount --bind "$etc/$file" "/etc/$file" || exit 125; done
while read -r from to; do mount --bind "$from" "$to" || exit 125; done < "$etc/binds"
exec setpriv --reuid "$id" --regid "$id" --clear-groups --inh-caps=-all "$@""#;

static COUNT: AtomicU32 = AtomicU32::new(0);

/// Subordinate ids of a user.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Subordinate {
    /// None: he has his own id alone.
    None,
    /// What distributions give to each user: 65,536.
    Usual,
    /// This many.
    Count(u32),
}

/// The user.
pub struct User {
    id: u32,
    subordinate: Option<(u32, u32)>,
    home: TempDir,
    etc: TempDir,
}

impl User {
    /// Makes a user with a home. Needs root.
    pub fn create(subordinate: Subordinate) -> Result<Self> {
        // Test programs run beside each other; that two users have one id at times does no harm.
        let number = std::process::id() % 1024 * USERS_MAX + COUNT.fetch_add(1, Ordering::Relaxed) % USERS_MAX;
        let id = USERS + number;
        let count = match subordinate {
            Subordinate::None => None,
            Subordinate::Usual => Some(0x1_0000),
            Subordinate::Count(count) => Some(count.min(SUBORDINATES_MAX)),
        };
        let subordinate = count.map(|count| (SUBORDINATES + number % 1024 * SUBORDINATES_MAX, count));
        let (home, etc) = (paths::scratch("home")?, paths::scratch("etc")?);
        let user = Self { id, subordinate, home, etc };
        user.write_files()?;
        user.give(user.home(), 0o711)?;
        fs::create_dir(user.runtime())?;
        user.give(&user.runtime(), 0o700)?;
        // The program under test need not lie where everybody may go.
        let program = user.program();
        let built = paths::funtainer()?;
        if fs::hard_link(&built, &program).is_err() {
            fs::copy(&built, &program).with_context(|| format!("cannot copy {}", built.display()))?;
        }
        Ok(user)
    }

    /// Lets him open the device by which packets are carried, as most systems do.
    pub fn with_tun(self) -> Result<Self> {
        let node = self.etc.path().join("tun");
        let mut command = Command::new("mknod");
        process::succeed(command.args(["-m", "666"]).arg(&node).args(["c", "10", "200"]), Duration::from_secs(10))?;
        self.bind(&node, Path::new("/dev/net/tun"))?;
        Ok(self)
    }

    /// Hides a program from him; one that is not there is hidden already.
    pub fn without(self, program: &str) -> Result<Self> {
        for place in ["/usr/bin", "/bin", "/usr/sbin"].map(|directory| Path::new(directory).join(program)) {
            if place.exists() {
                self.bind(Path::new("/dev/null"), &place)?;
            }
        }
        Ok(self)
    }

    fn bind(&self, from: &Path, to: &Path) -> Result<()> {
        let mut binds = fs::OpenOptions::new().append(true).open(self.etc.path().join("binds"))?;
        writeln!(binds, "{} {}", from.display(), to.display())?;
        Ok(())
    }

    /// His id, which is his group's too.
    pub fn id(&self) -> u32 {
        self.id
    }

    /// First and number of his subordinate ids.
    pub fn subordinate(&self) -> Option<(u32, u32)> {
        self.subordinate
    }

    /// His home.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// What `XDG_RUNTIME_DIR` is.
    pub fn runtime(&self) -> PathBuf {
        self.home().join("run")
    }

    /// The binary under test, at a place that he can reach.
    pub fn program(&self) -> PathBuf {
        self.home().join("funtainer")
    }

    /// A command that he runs. The process becomes the program, so that its id is the command's.
    pub fn command(&self, program: impl AsRef<OsStr>) -> Command {
        let mut command = Command::new("unshare");
        command
            .args(["--mount", "--propagation", "private", "sh", "-c", ENTER, "sh"])
            .arg(self.etc.path())
            .arg(self.id.to_string())
            .arg(program)
            .current_dir(self.home())
            .env("HOME", self.home())
            .env("USER", NAME)
            .env("XDG_RUNTIME_DIR", self.runtime())
            .env_remove("XDG_DATA_HOME")
            .env_remove("FUNTAINER_HOST");
        command
    }

    /// Gives a file to him.
    pub fn give(&self, path: &Path, mode: u32) -> Result<()> {
        fs::set_permissions(path, fs::Permissions::from_mode(mode))?;
        chown(path, Some(self.id), Some(self.id)).with_context(|| format!("cannot give {} to a user", path.display()))
    }

    fn write_files(&self) -> Result<()> {
        let etc = self.etc.path();
        fs::set_permissions(etc, fs::Permissions::from_mode(0o755))?;
        fs::write(etc.join("binds"), "")?;
        let subordinate = self.subordinate.map(|(start, count)| format!("{NAME}:{start}:{count}\n")).unwrap_or_default();
        for file in FILES {
            let host = Path::new("/etc").join(file);
            let own = match file {
                "passwd" => format!("{NAME}:x:{0}:{0}::{1}:/bin/sh\n", self.id, self.home().display()),
                "group" => format!("{NAME}:x:{}:\n", self.id),
                _ => subordinate.clone(),
            };
            let text = match file {
                "passwd" | "group" => fs::read_to_string(&host)? + &own,
                _ => own,
            };
            // A file must be there to be bound over.
            if !host.exists() {
                fs::write(&host, "")?;
            }
            fs::write(etc.join(file), text)?;
            fs::set_permissions(etc.join(file), fs::Permissions::from_mode(0o644))?;
        }
        Ok(())
    }
}

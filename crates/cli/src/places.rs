//! Where a server keeps its things and is found, where nothing is said: root's in the places of the system, an ordinary user's in his own.

use std::fs;
use std::os::unix::fs::{DirBuilderExt as _, MetadataExt as _};
use std::os::unix::net::UnixStream;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, ensure};
use funtainer_sandbox::userns::outer_uid;
use rustix::process::Uid;

use crate::args::Host;

/// Admin socket of root's server.
pub(crate) const ADMIN_OF_ROOT: &str = "/run/funtainer/admin.sock";
/// Data directory of root's server.
const DATA_OF_ROOT: &str = "/var/lib/funtainer";
/// Name of an ordinary user's admin socket in the directory of what he runs.
const ADMIN_NAME: &str = "funtainer.sock";
/// Where such a directory is made if the user's session has none.
const TEMPORARY: &str = "/tmp";

/// Permission bits of everybody but the owner.
const OTHERS: u32 = 0o077;

/// What this process is told about its user.
struct User {
    /// As this process sees it: files of the user have it.
    id: Uid,
    /// As the machine sees it. The server of an ordinary user is root of a user namespace by the time it looks.
    outer: u32,
    /// `XDG_RUNTIME_DIR`.
    runtime: Option<PathBuf>,
    /// `XDG_DATA_HOME`.
    data: Option<PathBuf>,
    /// `HOME`, else as /etc/passwd has it.
    home: Option<PathBuf>,
}

/// The admin socket for a server that this user starts.
pub(crate) fn admin() -> anyhow::Result<PathBuf> {
    let user = User::own();
    if user.is_root() { Ok(ADMIN_OF_ROOT.into()) } else { Ok(user.runtime_directory()?.join(ADMIN_NAME)) }
}

/// The data directory for a server that this user starts.
pub(crate) fn data() -> anyhow::Result<PathBuf> {
    let user = User::own();
    if user.is_root() { Ok(DATA_OF_ROOT.into()) } else { user.data_directory() }
}

/// The server that this user talks to: his own if it answers, else root's if it is there, else his own, which says that it is not there.
pub(crate) fn server() -> Host {
    let user = User::own();
    let of_root = PathBuf::from(ADMIN_OF_ROOT);
    if user.is_root() {
        return Host::at(of_root);
    }
    let Some(own) = user.runtime_directory_if_there().map(|directory| directory.join(ADMIN_NAME)) else {
        return Host::at(of_root);
    };
    if UnixStream::connect(&own).is_err() && of_root.exists() { Host::at(of_root) } else { Host::at(own) }
}

impl User {
    fn own() -> Self {
        let directory = |name| std::env::var_os(name).map(PathBuf::from).filter(|path| path.is_absolute());
        let id = rustix::process::geteuid();
        let outer = outer_uid();
        Self {
            id,
            outer,
            runtime: directory("XDG_RUNTIME_DIR"),
            data: directory("XDG_DATA_HOME"),
            home: directory("HOME").or_else(|| home_of(&fs::read_to_string("/etc/passwd").ok()?, outer)),
        }
    }

    fn is_root(&self) -> bool {
        self.outer == 0
    }

    /// By the XDG base directory specification.
    fn data_directory(&self) -> anyhow::Result<PathBuf> {
        let base = self.data.clone().or_else(|| self.home.as_ref().map(|home| home.join(".local/share")));
        Ok(base.context("this user has no home directory: give a data directory with --data")?.join("funtainer"))
    }

    /// The directory for what runs: the session's, else one in /tmp, made if it is not there. Nobody else can put a socket into it.
    fn runtime_directory(&self) -> anyhow::Result<PathBuf> {
        if let Some(directory) = self.runtime_directory_if_there() {
            return Ok(directory);
        }
        let directory = self.temporary();
        fs::DirBuilder::new()
            .mode(0o700)
            .create(&directory)
            .with_context(|| format!("{} cannot be made: give a place with --admin", directory.display()))?;
        ensure!(
            self.owns(&directory),
            "{} is somebody else's: give another place with --admin, and its name with --host",
            directory.display()
        );
        Ok(directory)
    }

    fn runtime_directory_if_there(&self) -> Option<PathBuf> {
        self.runtime.clone().into_iter().chain([self.temporary()]).find(|directory| self.owns(directory))
    }

    fn temporary(&self) -> PathBuf {
        Path::new(TEMPORARY).join(format!("funtainer-{}", self.outer))
    }

    /// Whether it is a directory of this user, open to nobody else.
    fn owns(&self, directory: &Path) -> bool {
        let Ok(found) = fs::symlink_metadata(directory) else { return false };
        let open_to_others = found.mode() & OTHERS != 0;
        found.is_dir() && found.uid() == self.id.as_raw() && !open_to_others
    }
}

fn home_of(passwd: &str, user: u32) -> Option<PathBuf> {
    let fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
    let mut homes = fields.into_iter().filter(|fields| fields.get(2).and_then(|id| id.parse().ok()) == Some(user));
    homes.next()?.get(5).map(PathBuf::from).filter(|path| path.is_absolute())
}

#[cfg(test)]
mod tests {
    use std::os::unix::fs::PermissionsExt as _;

    use super::*;

    fn user(home: &Path) -> User {
        let id = rustix::process::geteuid();
        User { id, outer: id.as_raw(), runtime: None, data: None, home: Some(home.to_owned()) }
    }

    #[test]
    fn data_lies_where_the_user_keeps_data() {
        let mut user = user(Path::new("/home/ada"));
        assert_eq!(user.data_directory().unwrap(), Path::new("/home/ada/.local/share/funtainer"));
        user.data = Some("/data/ada".into());
        assert_eq!(user.data_directory().unwrap(), Path::new("/data/ada/funtainer"));
        (user.data, user.home) = (None, None);
        assert!(user.data_directory().unwrap_err().to_string().contains("--data"));
    }

    #[test]
    fn a_directory_that_others_can_enter_is_not_used() {
        let directory = tempfile::tempdir().unwrap();
        let mut user = user(directory.path());
        let runtime = directory.path().join("runtime");
        fs::create_dir(&runtime).unwrap();
        user.runtime = Some(runtime.clone());
        for (mode, used) in [(0o755, false), (0o770, false), (0o700, true)] {
            fs::set_permissions(&runtime, fs::Permissions::from_mode(mode)).unwrap();
            assert_eq!(user.owns(&runtime), used, "{mode:o}");
        }
        assert_eq!(user.runtime_directory_if_there(), Some(runtime));
        let link = directory.path().join("link");
        std::os::unix::fs::symlink("runtime", &link).unwrap();
        assert!(!user.owns(&link), "a link can be somebody else's");
    }

    #[test]
    fn homes_are_found_by_number() {
        let passwd = "root:x:0:0:root:/root:/bin/sh\nbroken\nada:x:1000:1000:,,,:/home/ada:/bin/sh\n";
        assert_eq!(home_of(passwd, 1000), Some("/home/ada".into()));
        assert_eq!(home_of(passwd, 1001), None);
    }
}

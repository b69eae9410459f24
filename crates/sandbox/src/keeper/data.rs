//! The data directory, and who the daemon is on the host.
//!
//! ```text
//! DIR/            root, 0755; an ordinary user's: 0711
//!   lock  id      root; the lock is held as long as a keeper lives
//!   store/        the daemon's; store/layers is root's: only the keeper puts files there
//!   state/ logs/  the daemon's
//!   unpacked/     an ordinary user's alone: see `unpacked`
//! ```

use std::fs;
use std::io::{self, Read as _, Write as _};
use std::os::fd::OwnedFd;
use std::os::unix::fs::{DirBuilderExt as _, OpenOptionsExt as _};
use std::path::{Path, PathBuf};

use rustix::fs::{AtFlags, FlockOperation, Mode as FileMode, OFlags, ResolveFlags};
use rustix::io::Errno;
use rustix::mount::OpenTreeFlags;
use rustix::process::{Gid, Uid};

use super::KeeperError;
use super::mode::Mode;
use crate::step::{StepError, at};

/// The daemon's ids where the host has no user `funtainer`: above all that distributions give out, below those of functions.
const DAEMON_ID: u32 = 0x6FFF_FF00;
/// Name of the daemon's user, and of the group that may use the admin socket.
pub(super) const NAME: &str = "funtainer";
/// The directories in a data directory.
const DIRECTORIES: [&str; 4] = ["unpacked", "store", "state", "logs"];
/// Bytes of randomness in the id of a data directory.
const ID_BYTES: usize = 8;

/// An id pair on the host.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct DaemonUser {
    pub(super) uid: Uid,
    pub(super) gid: Gid,
}

impl DaemonUser {
    /// The user `funtainer` of the host's `/etc/passwd`, else the fixed id. Other sources of names (NSS) are not asked: a static
    /// program must not load the host's libraries.
    pub(super) fn find() -> Self {
        let passwd = fs::read_to_string("/etc/passwd").unwrap_or_default();
        let fields = passwd.lines().map(|line| line.split(':').collect::<Vec<_>>());
        let found = fields.into_iter().find_map(|fields| match fields[..] {
            [NAME, _, uid, gid, ..] => Some((uid.parse().ok()?, gid.parse().ok()?)),
            _ => None,
        });
        // A user with the powers of root, or a function's, would be none.
        let (uid, gid) = found.filter(|(uid, gid)| (1..DAEMON_ID).contains(uid) && *gid != 0).unwrap_or((DAEMON_ID, DAEMON_ID));
        Self { uid: Uid::from_raw(uid), gid: Gid::from_raw(gid) }
    }
}

/// The gid of the host's group `funtainer`, if there is one.
pub(super) fn admin_group() -> Option<Gid> {
    let groups = fs::read_to_string("/etc/group").ok()?;
    groups.lines().find_map(|line| {
        let mut fields = line.split(':');
        (fields.next() == Some(NAME)).then(|| fields.nth(1)?.parse().ok().map(Gid::from_raw)).flatten()
    })
}

/// The data directory, locked by this process.
#[derive(Debug)]
pub(super) struct DataDirectory {
    /// Absolute.
    pub(super) path: PathBuf,
    /// 16 hex digits.
    pub(super) id: String,
    /// The directory itself.
    pub(super) root: OwnedFd,
    /// `store/layers`, by which layers are opened and committed: no path that the daemon could bend is used again.
    pub(super) layers: OwnedFd,
    /// Released by the kernel with this process.
    _lock: fs::File,
}

impl DataDirectory {
    /// Makes what is missing, takes the lock, reads or makes the id.
    pub(super) fn open(path: &Path, mode: &Mode) -> Result<Self, KeeperError> {
        let daemon = mode.daemon();
        let fail = |source| KeeperError::Data { path: path.to_owned(), source };
        // The daemon must get through; a user's other neighbours need not see what there is.
        make_directory(path, if mode.is_rootless() { 0o711 } else { 0o755 }, None).map_err(fail)?;
        let path = path.canonicalize().map_err(fail)?;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let root = rustix::fs::open(&path, flags, FileMode::empty()).map_err(|e| fail(e.into()))?;
        // Who may write here could put another lock, id or store in place.
        require_roots(&root, &path)?;
        let lock = lock(&path)?;
        for name in ["store", "state", "logs"] {
            make_directory(&path.join(name), 0o700, Some(daemon)).map_err(fail)?;
        }
        // The daemon owns `store` and could put a link there.
        let open =
            |at: &OwnedFd, name: &str| rustix::fs::openat(at, name, flags, FileMode::empty()).map_err(|e| fail(e.into()));
        let store = open(&root, "store")?;
        match rustix::fs::mkdirat(&store, "layers", FileMode::from_raw_mode(0o755)) {
            Ok(()) | Err(Errno::EXIST) => {}
            Err(errno) => return Err(fail(errno.into())),
        }
        let layers = open(&store, "layers")?;
        require_roots(&layers, &path.join("store/layers"))?;
        let id = id(&path).map_err(fail)?;
        Ok(Self { path, id, root, layers, _lock: lock })
    }

    /// A mount of the directory for a new daemon to attach. Layers are committed through the same mount from now on: link(2) does not
    /// lead from one mount to another, not even of one file system.
    pub(super) fn mount_for_daemon(&mut self) -> Result<OwnedFd, StepError> {
        let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
        let tree = rustix::mount::open_tree(rustix::fs::CWD, &self.path, flags).map_err(at("clone the data directory"))?;
        let beneath = ResolveFlags::BENEATH | ResolveFlags::NO_SYMLINKS | ResolveFlags::NO_XDEV;
        let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
        let layers = rustix::fs::openat2(&tree, "store/layers", flags, FileMode::empty(), beneath);
        let identity = |fd: &OwnedFd| rustix::fs::fstat(fd).map(|found| (found.st_dev, found.st_ino));
        match layers {
            // `store` is the daemon's: a former one may have put another directory there. Then nothing more can be committed.
            Ok(layers) if identity(&layers).is_ok_and(|found| identity(&self.layers) == Ok(found)) => self.layers = layers,
            _ => {}
        }
        Ok(tree)
    }
}

/// Removes all that a server keeps in a data directory, and the directory unless there is something else in it. Where nothing is, nothing is done.
pub(super) fn remove(path: &Path) -> Result<(), KeeperError> {
    let fail = |source| KeeperError::Data { path: path.to_owned(), source };
    let flags = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    let root = match rustix::fs::open(path, flags, FileMode::empty()) {
        Ok(root) => root,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(fail(errno.into())),
    };
    require_roots(&root, path)?;
    if !path.join("id").exists() {
        return Err(fail(io::Error::new(io::ErrorKind::InvalidInput, "it is no data directory: it has no file 'id'")));
    }
    let _lock = lock(path)?;
    for name in DIRECTORIES {
        match fs::remove_dir_all(path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
            _ => {}
        }
    }
    // The id last: without it nobody would know what the rest belongs to.
    for name in ["net", "net.new", "id.new", "lock", "id"] {
        match fs::remove_file(path.join(name)) {
            Err(error) if error.kind() != io::ErrorKind::NotFound => return Err(fail(error)),
            _ => {}
        }
    }
    match fs::remove_dir(path) {
        Err(error) if error.kind() != io::ErrorKind::DirectoryNotEmpty => Err(fail(error)),
        _ => Ok(()),
    }
}

/// Refuses a directory that anybody but root may write to.
fn require_roots(directory: &OwnedFd, path: &Path) -> Result<(), KeeperError> {
    let found = rustix::fs::fstat(directory).map_err(|e| KeeperError::Data { path: path.to_owned(), source: e.into() })?;
    if found.st_uid != 0 || found.st_mode & 0o022 != 0 {
        return Err(KeeperError::Foreign { path: path.to_owned() });
    }
    Ok(())
}

/// Makes a directory with its parents; an existing one is given to `owner` if that is somebody.
fn make_directory(path: &Path, mode: u32, owner: Option<DaemonUser>) -> io::Result<()> {
    fs::DirBuilder::new().recursive(true).mode(mode).create(path)?;
    let Some(DaemonUser { uid, gid }) = owner else { return Ok(()) };
    match rustix::fs::chownat(rustix::fs::CWD, path, Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW) {
        Ok(()) => Ok(()),
        // An ordinary user's keeper has power over the ids of its namespace alone.
        Err(Errno::PERM | Errno::INVAL) => {
            let name = path.file_name().unwrap_or_default().display();
            let text = format!(
                "'{name}' in it belongs to ids that this server does not have: to a server of another user, or to former subordinate ids"
            );
            Err(io::Error::new(io::ErrorKind::PermissionDenied, text))
        }
        Err(errno) => Err(errno.into()),
    }
}

fn lock(directory: &Path) -> Result<fs::File, KeeperError> {
    let path = directory.join("lock");
    let fail = |source| KeeperError::Data { path: path.clone(), source };
    let file = fs::OpenOptions::new().write(true).create(true).truncate(false).mode(0o600).open(&path).map_err(fail)?;
    match rustix::fs::flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(file),
        Err(Errno::AGAIN) => Err(KeeperError::Locked { path: directory.to_owned() }),
        Err(errno) => Err(fail(errno.into())),
    }
}

/// Reads the id, or makes one.
fn id(directory: &Path) -> io::Result<String> {
    let path = directory.join("id");
    let mut text = String::new();
    match fs::File::open(&path) {
        // One byte more than it should have shows a file that is too long.
        Ok(file) => file.take(ID_BYTES as u64 * 2 + 2).read_to_string(&mut text)?,
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            text = new_id()?;
            // Whole or not at all: with half an id no server would start here again.
            let unfinished = directory.join("id.new");
            let mut file = fs::OpenOptions::new().write(true).create(true).truncate(true).mode(0o644).open(&unfinished)?;
            file.write_all(text.as_bytes())?;
            file.sync_all()?;
            fs::rename(&unfinished, &path)?;
            text.len()
        }
        Err(error) => return Err(error),
    };
    let id = text.trim_end();
    if id.len() == ID_BYTES * 2 && id.bytes().all(|byte| byte.is_ascii_digit() || (b'a'..=b'f').contains(&byte)) {
        return Ok(id.to_owned());
    }
    Err(io::Error::new(io::ErrorKind::InvalidData, "the file 'id' does not hold 16 hex digits"))
}

fn new_id() -> io::Result<String> {
    let mut bytes = [0_u8; ID_BYTES];
    rustix::rand::getrandom(&mut bytes[..], rustix::rand::GetRandomFlags::empty())?;
    Ok(format!("{:016x}", u64::from_be_bytes(bytes)))
}

//! Unpacks a layer into a directory, where the kernel cannot mount it: for a server of an ordinary user. The caller is root of the user namespace
//! in which functions run, so that ids are as the layer has them.
//!
//! ```text
//! PARENT/NAME.new    made, filled, synced ─ renamed ─► PARENT/NAME
//! PARENT/NAME.links  files with several names until all of them are linked; removed before the rename
//! ```
//! What stands under the final name is whole. What a crash left is removed by the next attempt, or by [`remove`].
//!
//! The layer's file is taken for hostile: names come checked by [`Reader`], every file is made anew (`O_EXCL`) in a directory that was made here,
//! no link is followed and no mount crossed (`openat2`), a directory with two names is refused, and no more content is written than the file has.
//!
//! Unlike in a mounted layer: devices become empty files that nobody may open (whiteouts stay what they are), `trusted.*` and `security.*` attributes
//! but file capabilities are left out, and an id that does not exist here becomes nobody's, as an id-mapped mount shows it.

use std::collections::HashSet;
use std::ffi::CString;
use std::fs::File;
use std::io;
use std::ops::Range;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::os::unix::fs::FileExt as _;
use std::vec::IntoIter;

use rustix::fs::{
    AtFlags, Dir, FileType, Gid, Mode, OFlags, ResolveFlags, SeekFrom, Timespec, Timestamps, Uid, XattrFlags, chmodat, chownat,
    copy_file_range, fchmod, fchown, fsetxattr, fsync, ftruncate, futimens, linkat, mkdirat, mknodat, openat2, renameat, seek,
    symlinkat, syncfs, unlinkat, utimensat,
};
use rustix::io::Errno;

use crate::tar::{Timestamp, Xattr, printable};

use super::reader::{DirEntry, Inode, InodeKind, Nid, ReadError, Reader};
use super::writer::ENTRIES_MAX;
use super::xattr;

/// Who owns what no id of this user namespace can own, as an id-mapped mount shows it.
const NOBODY: u32 = 65_534;
/// Deepest directory below the root of a layer: each level holds a descriptor.
const DEPTH_MAX: usize = 4096;
/// Bytes copied by one call.
const COPY_STEP: u64 = 1 << 30;
/// Bytes copied at once where the kernel does not.
const BUFFER_BYTES: u64 = 256 << 10;
/// File capabilities: last, since a change of the owner takes them away.
const CAPABILITY: &[u8] = b"security.capability";

/// What was written.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct UnpackSummary {
    /// Names.
    pub entries: u64,
    /// Bytes of content, without holes.
    pub bytes: u64,
    /// Devices that became empty files.
    pub devices: u64,
}

/// Why a layer is not unpacked.
#[derive(Debug, thiserror::Error)]
pub enum UnpackError {
    /// The layer's file.
    #[error(transparent)]
    Read(#[from] ReadError),
    /// It holds what none of ours holds.
    #[error("the layer is damaged: {0}")]
    Damaged(&'static str),
    /// Deeper than descriptors reach.
    #[error("directories of the layer lie more than {DEPTH_MAX} deep")]
    Depth,
    /// The kernel refused a step.
    #[error("{step} '{path}': {source}")]
    System {
        /// What was tried.
        step: &'static str,
        /// On which file of the layer.
        path: String,
        /// Why.
        source: io::Error,
    },
}

impl UnpackError {
    /// The error number behind it, if there is one: `ENOSPC` and the like.
    pub fn errno(&self) -> Option<i32> {
        match self {
            Self::System { source, .. } | Self::Read(ReadError::Io(source)) => source.raw_os_error(),
            _ => None,
        }
    }
}

/// Unpacks the layer in `file` to the directory `name` in `parent`; one that is there already stays as it is. `ids` is how many user and group ids
/// there are in this user namespace, from 0 on. On disk when it returns. Of two at the same name one fails.
pub fn unpack(file: File, parent: BorrowedFd<'_>, name: &str, ids: u32) -> Result<UnpackSummary, UnpackError> {
    let at = |step| system(step, name.as_bytes());
    match rustix::fs::statat(parent, name, AtFlags::SYMLINK_NOFOLLOW) {
        Ok(_) => return Ok(UnpackSummary::default()),
        Err(Errno::NOENT) => {}
        Err(errno) => return Err(at("look for")(errno)),
    }
    let (new, links) = (format!("{name}.new"), format!("{name}.links"));
    for left in [&new, &links] {
        remove(parent, left)?;
    }
    let reader = Reader::new(file)?;
    let root = reader.root()?;
    let budget = reader.file().metadata().map_err(ReadError::from)?.len();
    mkdirat(parent, &*links, Mode::RWXU).map_err(at("make the directory for links of"))?;
    let links_fd = open_directory(parent, links.as_bytes()).map_err(at("open the directory for links of"))?;
    mkdirat(parent, &*new, Mode::RWXU).map_err(at("make the directory of"))?;
    let directory = open_directory(parent, new.as_bytes()).map_err(at("open the directory of"))?;
    let unpacker = Unpacker {
        reader: &reader,
        ids,
        budget,
        seen: HashSet::from([root.nid]),
        linked: HashSet::new(),
        links: links_fd,
        path: Vec::new(),
        summary: UnpackSummary::default(),
    };
    let summary = unpacker.run(directory, root)?;
    remove(parent, &links)?;
    let whole = open_directory(parent, new.as_bytes()).map_err(at("open the directory of"))?;
    syncfs(&whole).map_err(at("write to the disk"))?;
    renameat(parent, &*new, parent, name).map_err(at("rename"))?;
    fsync(parent).map_err(at("write the name to the disk"))?;
    Ok(summary)
}

/// Removes the directory `name` of `parent` with all that is in it; one that is not there is removed already. Follows no link.
pub fn remove(parent: BorrowedFd<'_>, name: &str) -> Result<(), UnpackError> {
    let at = |step| system(step, name.as_bytes());
    let top = match open_directory(parent, name.as_bytes()) {
        Ok(top) => top,
        Err(Errno::NOENT) => return Ok(()),
        Err(errno) => return Err(at("open")(errno)),
    };
    let mut stack = vec![Emptied::new(top, name.as_bytes().to_vec()).map_err(at("list"))?];
    loop {
        let depth = stack.len();
        let Some(Emptied { directory, names, .. }) = stack.last_mut() else { return Ok(()) };
        if let Some((name, is_directory)) = names.next() {
            if is_directory {
                if depth > DEPTH_MAX {
                    return Err(UnpackError::Depth);
                }
                let inner = open_directory(directory.as_fd(), &name).map_err(system("open", &name))?;
                stack.push(Emptied::new(inner, name).map_err(at("list"))?);
            } else {
                unlinkat(&*directory, &name[..], AtFlags::empty()).map_err(system("remove", &name))?;
            }
            continue;
        }
        let Some(Emptied { name: emptied, .. }) = stack.pop() else { return Ok(()) };
        let above = stack.last().map_or(parent, |above| above.directory.as_fd());
        unlinkat(above, &emptied[..], AtFlags::REMOVEDIR).map_err(system("remove", &emptied))?;
    }
}

/// A directory that is being emptied.
struct Emptied {
    directory: OwnedFd,
    name: Vec<u8>,
    /// What was in it; whether it is a directory.
    names: IntoIter<(Vec<u8>, bool)>,
}

impl Emptied {
    fn new(directory: OwnedFd, name: Vec<u8>) -> Result<Self, Errno> {
        let mut names = Vec::new();
        for entry in Dir::read_from(&directory)? {
            let entry = entry?;
            let name = entry.file_name().to_bytes();
            if matches!(name, b"." | b"..") {
                continue;
            }
            let is_directory = match entry.file_type() {
                FileType::Unknown => {
                    let found = rustix::fs::statat(&directory, name, AtFlags::SYMLINK_NOFOLLOW)?;
                    FileType::from_raw_mode(found.st_mode) == FileType::Directory
                }
                kind => kind == FileType::Directory,
            };
            names.push((name.to_vec(), is_directory));
        }
        Ok(Self { directory, name, names: names.into_iter() })
    }
}

struct Unpacker<'a> {
    reader: &'a Reader,
    ids: u32,
    /// Bytes of content that may still be written: our writer stores each byte once.
    budget: u64,
    /// Directories that were met.
    seen: HashSet<Nid>,
    /// Files with several names that were made, and wait in `links` for the next one.
    linked: HashSet<Nid>,
    links: OwnedFd,
    /// Names from the root to here, for messages.
    path: Vec<Vec<u8>>,
    summary: UnpackSummary,
}

/// A directory that is being filled.
struct Filled {
    directory: OwnedFd,
    inode: Inode,
    entries: IntoIter<DirEntry>,
}

impl Unpacker<'_> {
    /// Fills the root.
    fn run(mut self, directory: OwnedFd, root: Inode) -> Result<UnpackSummary, UnpackError> {
        let entries = self.entries(&root)?;
        let mut stack = vec![Filled { directory, inode: root, entries }];
        loop {
            let depth = stack.len();
            let Some(Filled { directory, inode, entries }) = stack.last_mut() else { return Ok(self.summary) };
            let Some(DirEntry { name, nid }) = entries.next() else {
                // Now that nothing more is made in it: a default ACL or a setgid bit would change what is.
                self.dress(directory, inode)?;
                stack.pop();
                self.path.pop();
                continue;
            };
            let inode = self.reader.inode(nid)?;
            self.path.push(name);
            if inode.kind == InodeKind::Directory {
                let inner = self.directory(directory.as_fd(), inode, depth)?;
                stack.push(inner);
            } else {
                self.leaf(directory.as_fd(), &inode)?;
                self.path.pop();
            }
        }
    }

    /// Lists a directory. All that are listed at once are counted at once: a layer whose directories share their names must not fill the memory.
    fn entries(&mut self, inode: &Inode) -> Result<IntoIter<DirEntry>, UnpackError> {
        let entries = self.reader.entries(inode)?;
        self.summary.entries += entries.len() as u64;
        if self.summary.entries > ENTRIES_MAX as u64 {
            return Err(UnpackError::Damaged("it has more names than a layer can have"));
        }
        Ok(entries.into_iter())
    }

    fn directory(&mut self, parent: BorrowedFd<'_>, inode: Inode, depth: usize) -> Result<Filled, UnpackError> {
        if !self.seen.insert(inode.nid) {
            return Err(UnpackError::Damaged("a directory has two names"));
        }
        if depth > DEPTH_MAX {
            return Err(UnpackError::Depth);
        }
        let name = self.name();
        mkdirat(parent, name, Mode::RWXU).map_err(self.at("make the directory"))?;
        let directory = open_directory(parent, name).map_err(self.at("open the directory"))?;
        let entries = self.entries(&inode)?;
        Ok(Filled { directory, inode, entries })
    }

    /// Makes what is no directory, or one more name of it.
    fn leaf(&mut self, parent: BorrowedFd<'_>, inode: &Inode) -> Result<(), UnpackError> {
        let several = inode.nlink > 1;
        let waiting = link_name(inode.nid);
        if several && self.linked.contains(&inode.nid) {
            return linkat(&self.links, &*waiting, parent, self.name(), AtFlags::empty()).map_err(self.at("link"));
        }
        match inode.kind {
            InodeKind::File => self.file(parent, inode)?,
            InodeKind::Symlink => {
                let target = self.reader.read_link(inode)?;
                self.spend(inode.size)?;
                symlinkat(&target[..], parent, self.name()).map_err(self.at("make the symbolic link"))?;
            }
            InodeKind::Fifo => {
                mknodat(parent, self.name(), FileType::Fifo, Mode::RUSR, 0).map_err(self.at("make the pipe"))?;
            }
            InodeKind::CharacterDevice(0, 0) => {
                mknodat(parent, self.name(), FileType::CharacterDevice, Mode::empty(), 0)
                    .map_err(self.at("make the whiteout"))?;
            }
            InodeKind::CharacterDevice(..) | InodeKind::BlockDevice(..) => {
                self.summary.devices += 1;
                create(parent, self.name()).and_then(|file| fchmod(&file, Mode::empty())).map_err(self.at("make the file"))?;
            }
            InodeKind::Directory => return Err(UnpackError::Damaged("a directory is none")),
        }
        if !matches!(inode.kind, InodeKind::File) {
            self.dress_by_name(parent, inode)?;
        }
        if several {
            linkat(parent, self.name(), &self.links, &*waiting, AtFlags::empty()).map_err(self.at("keep a link of"))?;
            self.linked.insert(inode.nid);
        }
        Ok(())
    }

    fn file(&mut self, parent: BorrowedFd<'_>, inode: &Inode) -> Result<(), UnpackError> {
        let file = create(parent, self.name()).map_err(self.at("make the file"))?;
        let place = Reader::place(inode);
        ftruncate(&file, inode.size).map_err(self.at("set the size of"))?;
        let mut position = place.start;
        // Only what is there: a hole of the layer stays one.
        while position < place.end {
            let data = match seek(self.reader.file(), SeekFrom::Data(position)) {
                Ok(data) => data,
                Err(Errno::NXIO) => break,
                Err(errno) => return Err(self.at("find the content of")(errno)),
            };
            if data >= place.end {
                break;
            }
            let hole = seek(self.reader.file(), SeekFrom::Hole(data)).map_err(self.at("find the content of"))?;
            let end = hole.min(place.end);
            self.copy(&file, data - place.start, data..end)?;
            position = end;
        }
        self.dress(&file, inode)
    }

    /// Counts bytes that are written.
    fn spend(&mut self, bytes: u64) -> Result<(), UnpackError> {
        let left = self.budget.checked_sub(bytes);
        self.budget = left.ok_or(UnpackError::Damaged("its files have more content than the layer"))?;
        Ok(())
    }

    /// Copies a piece of the layer's file: in the kernel, and without copying where the file system can share blocks.
    fn copy(&mut self, file: &OwnedFd, to: u64, from: Range<u64>) -> Result<(), UnpackError> {
        let length = from.end - from.start;
        self.spend(length)?;
        self.summary.bytes += length;
        let (mut source, mut target) = (from.start, to);
        while source < from.end {
            let step = (from.end - source).min(COPY_STEP) as usize;
            match copy_file_range(self.reader.file(), Some(&mut source), file, Some(&mut target), step) {
                Ok(0) => return Err(UnpackError::Damaged("its file ends early")),
                Ok(_) => {}
                // File systems that cannot.
                Err(Errno::XDEV | Errno::OPNOTSUPP | Errno::NOSYS | Errno::INVAL) => {
                    return self.copy_by_hand(file, target, source..from.end);
                }
                Err(errno) => return Err(self.at("write")(errno)),
            }
        }
        Ok(())
    }

    fn copy_by_hand(&mut self, file: &OwnedFd, to: u64, from: Range<u64>) -> Result<(), UnpackError> {
        let mut buffer = vec![0; BUFFER_BYTES.min(from.end - from.start) as usize];
        let (mut source, mut target) = (from.start, to);
        while source < from.end {
            let piece = &mut buffer[..(from.end - source).min(BUFFER_BYTES) as usize];
            self.reader.file().read_exact_at(piece, source).map_err(ReadError::from)?;
            let mut rest = &*piece;
            while !rest.is_empty() {
                let written = rustix::io::pwrite(file, rest, target).map_err(self.at("write"))?;
                rest = &rest[written..];
                target += written as u64;
            }
            source += piece.len() as u64;
        }
        Ok(())
    }

    /// Owner, mode, attributes and time of an open file or directory.
    fn dress(&mut self, file: &OwnedFd, inode: &Inode) -> Result<(), UnpackError> {
        self.spend(Reader::xattrs_bytes(inode))?;
        let (uid, gid) = self.owner(inode);
        fchown(file, Some(uid), Some(gid)).map_err(self.at("give an owner to"))?;
        fchmod(file, Mode::from_raw_mode(inode.mode.into())).map_err(self.at("set the mode of"))?;
        let xattrs = self.reader.xattrs(inode)?;
        let (last, first): (Vec<&Xattr>, Vec<&Xattr>) =
            xattrs.iter().filter(|xattr| self.is_kept(xattr)).partition(|xattr| xattr.name == CAPABILITY);
        for Xattr { name, value } in first.into_iter().chain(last) {
            let name = CString::new(&name[..]).map_err(|_| UnpackError::Damaged("the name of an attribute"))?;
            fsetxattr(file, &*name, value, XattrFlags::empty()).map_err(self.at("set an extended attribute of"))?;
        }
        futimens(file, &times(inode.mtime)).map_err(self.at("set the time of"))
    }

    /// The same for what cannot be opened, which has no attributes that matter.
    fn dress_by_name(&self, parent: BorrowedFd<'_>, inode: &Inode) -> Result<(), UnpackError> {
        let (uid, gid) = self.owner(inode);
        chownat(parent, self.name(), Some(uid), Some(gid), AtFlags::SYMLINK_NOFOLLOW).map_err(self.at("give an owner to"))?;
        if inode.kind == InodeKind::Fifo {
            // It was made here a moment ago, and is no link.
            chmodat(parent, self.name(), Mode::from_raw_mode(inode.mode.into()), AtFlags::empty())
                .map_err(self.at("set the mode of"))?;
        }
        utimensat(parent, self.name(), &times(inode.mtime), AtFlags::SYMLINK_NOFOLLOW).map_err(self.at("set the time of"))
    }

    fn owner(&self, inode: &Inode) -> (Uid, Gid) {
        let here = |id: u32| if id < self.ids { id } else { NOBODY.min(self.ids - 1) };
        (Uid::from_raw(here(inode.uid)), Gid::from_raw(here(inode.gid)))
    }

    /// An ACL names ids, which are not there where there is but one.
    fn is_kept(&self, xattr: &Xattr) -> bool {
        xattr::is_for_files(xattr) && (self.ids > 1 || !xattr.name.starts_with(b"system."))
    }

    fn name(&self) -> &[u8] {
        self.path.last().map_or(b".", Vec::as_slice)
    }

    /// Names the step that failed, and the file.
    fn at(&self, step: &'static str) -> impl FnOnce(Errno) -> UnpackError {
        move |errno| system(step, &[&b"/"[..], &self.path.join(&b'/')].concat())(errno)
    }
}

fn system(step: &'static str, path: &[u8]) -> impl FnOnce(Errno) -> UnpackError {
    move |errno| UnpackError::System { step, path: printable(path), source: errno.into() }
}

/// One name in a directory, which is neither a link nor on another file system.
const HERE: ResolveFlags =
    ResolveFlags::BENEATH.union(ResolveFlags::NO_SYMLINKS).union(ResolveFlags::NO_XDEV).union(ResolveFlags::NO_MAGICLINKS);

fn open_directory(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    openat2(parent, name, OFlags::RDONLY | OFlags::DIRECTORY | OFlags::NOFOLLOW | OFlags::CLOEXEC, Mode::empty(), HERE)
}

fn create(parent: BorrowedFd<'_>, name: &[u8]) -> Result<OwnedFd, Errno> {
    let flags = OFlags::WRONLY | OFlags::CREATE | OFlags::EXCL | OFlags::NOFOLLOW | OFlags::CLOEXEC;
    openat2(parent, name, flags, Mode::RUSR | Mode::WUSR, HERE)
}

fn link_name(nid: Nid) -> String {
    nid.number().to_string()
}

fn times(mtime: Timestamp) -> Timestamps {
    let time = Timespec { tv_sec: mtime.seconds, tv_nsec: mtime.nanoseconds.into() };
    Timestamps { last_access: time, last_modification: time }
}

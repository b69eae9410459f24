//! Makes archives by hand, so that each byte can be wrong, and layers out of them.

use std::fs::{self, File};
use std::os::unix::fs::FileExt;
use std::path::PathBuf;
use std::process::Command;

use flate2::Compression as Level;
use flate2::write::GzEncoder;
use funtainer_image::erofs::{Reader, WriteError, WriteOptions, WriteSummary, derive, write};
use funtainer_image::layer::{self, Compression, LayerBlob};
use funtainer_image::rootfs::Rootfs;
use funtainer_image::tar;
use funtainer_model::{Digest, LayerId};
use sha2::{Digest as _, Sha256};
use tempfile::{NamedTempFile, TempDir};

/// An archive in the making.
#[derive(Default, Clone)]
pub(crate) struct Archive(pub(crate) Vec<u8>);

/// A header in the making.
#[derive(Clone)]
pub(crate) struct Header(pub(crate) [u8; 512]);

impl Header {
    /// A ustar header with plain values.
    pub(crate) fn new(name: &[u8], typeflag: u8, size: u64) -> Self {
        let mut header = Self([0; 512]);
        header.0[..name.len().min(100)].copy_from_slice(&name[..name.len().min(100)]);
        header.octal(100, 8, 0o644).octal(108, 8, 0).octal(116, 8, 0).octal(124, 12, size).octal(136, 12, 0);
        header.0[156] = typeflag;
        header.put(257, b"ustar\x0000");
        header
    }

    pub(crate) fn put(&mut self, at: usize, bytes: &[u8]) -> &mut Self {
        self.0[at..at + bytes.len()].copy_from_slice(bytes);
        self
    }

    pub(crate) fn octal(&mut self, at: usize, width: usize, value: u64) -> &mut Self {
        let text = format!("{value:0digits$o}\0", digits = width - 1);
        self.put(at, text.as_bytes())
    }

    /// The block with its checksum.
    pub(crate) fn sealed(&self) -> [u8; 512] {
        let mut block = self.0;
        block[148..156].fill(b' ');
        let sum: u32 = block.iter().map(|byte| u32::from(*byte)).sum();
        block[148..156].copy_from_slice(format!("{sum:06o}\0 ").as_bytes());
        block
    }
}

/// The names in it with their type flags, which is what one wants to see of a failed case.
impl std::fmt::Debug for Archive {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let headers = self.0.chunks_exact(512).filter(|block| block[257..].starts_with(b"ustar"));
        f.debug_list()
            .entries(headers.map(|block| {
                let name = block[..100].split(|byte| *byte == 0).next().unwrap_or_default();
                format!("{} {}", char::from(block[156]), name.escape_ascii())
            }))
            .finish()
    }
}

impl Archive {
    pub(crate) fn new() -> Self {
        Self::default()
    }

    pub(crate) fn header(mut self, header: &Header) -> Self {
        self.0.extend_from_slice(&header.sealed());
        self
    }

    /// Bytes, padded to a block.
    pub(crate) fn data(mut self, data: &[u8]) -> Self {
        self.0.extend_from_slice(data);
        self.0.resize(self.0.len().next_multiple_of(512), 0);
        self
    }

    /// An entry; where its name is too long for the header, with a PAX header before it.
    pub(crate) fn entry(self, name: &[u8], typeflag: u8, data: &[u8]) -> Self {
        if name.len() > 100 {
            let cut = &name[name.len() - 20..];
            return self.pax(&[(b"path", name)]).entry(cut, typeflag, data);
        }
        self.header(&Header::new(name, typeflag, data.len() as u64)).data(data)
    }

    pub(crate) fn file(self, name: &str, data: &[u8]) -> Self {
        self.entry(name.as_bytes(), b'0', data)
    }

    pub(crate) fn directory(self, name: &str) -> Self {
        let mut header = Header::new(name.as_bytes(), b'5', 0);
        header.octal(100, 8, 0o755);
        self.header(&header)
    }

    pub(crate) fn link(self, name: &str, typeflag: u8, target: &str) -> Self {
        let mut header = Header::new(name.as_bytes(), typeflag, 0);
        header.put(157, target.as_bytes());
        self.header(&header)
    }

    pub(crate) fn symlink(self, name: &str, target: &str) -> Self {
        self.link(name, b'2', target)
    }

    pub(crate) fn hard_link(self, name: &str, target: &str) -> Self {
        self.link(name, b'1', target)
    }

    /// A PAX header of the records, for the entry that follows.
    pub(crate) fn pax(self, records: &[(&[u8], &[u8])]) -> Self {
        let text: Vec<u8> = records.iter().flat_map(|(key, value)| pax_record(key, value)).collect();
        self.entry(b"PaxHeaders/x", b'x', &text)
    }

    pub(crate) fn append(mut self, other: &Self) -> Self {
        self.0.extend_from_slice(&other.0);
        self
    }

    /// The archive with its end.
    pub(crate) fn end(mut self) -> Vec<u8> {
        self.0.resize(self.0.len() + 1024, 0);
        self.0
    }
}

pub(crate) fn pax_record(key: &[u8], value: &[u8]) -> Vec<u8> {
    let rest = key.len() + value.len() + 3;
    let mut length = rest + 1;
    while length.to_string().len() + rest != length {
        length = rest + length.to_string().len();
    }
    [length.to_string().as_bytes(), b" ", key, b"=", value, b"\n"].concat()
}

/// A directory on a disk: the kernel mounts no file that lies on tmpfs.
pub(crate) fn scratch() -> TempDir {
    fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).unwrap();
    TempDir::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap()
}

/// A written layer, deleted at the end.
pub(crate) struct Layer {
    pub(crate) file: NamedTempFile,
}

impl Layer {
    /// Writes the archive through the whole pipe, as gzip, and has fsck.erofs check the result.
    pub(crate) fn write(archive: &[u8], base: bool) -> Self {
        fs::create_dir_all(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let file = NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
        let mut blob = Vec::new();
        std::io::copy(&mut &*archive, &mut GzEncoder::new(&mut blob, Level::fast())).unwrap();
        let meta = LayerBlob { digest: sha256(&blob), size: blob.len() as u64, compression: Compression::Gzip };
        layer::write(blob.as_slice(), &meta, LayerId { diff_id: sha256(archive), base }, file.as_file()).unwrap();
        let layer = Self { file };
        layer.fsck();
        layer
    }

    /// The form of this layer that fits over `below`, if it is another.
    pub(crate) fn derived(&self, below: &[Self]) -> Option<Self> {
        let layer = Self { file: NamedTempFile::new_in(env!("CARGO_TARGET_TMPDIR")).unwrap() };
        let below = Rootfs::new(below.iter().map(Self::open).collect()).unwrap();
        if !derive(&self.reader(), &below, layer.file.as_file()).unwrap() {
            return None;
        }
        layer.fsck();
        Some(layer)
    }

    pub(crate) fn reader(&self) -> Reader {
        Reader::new(self.open()).unwrap()
    }

    pub(crate) fn open(&self) -> File {
        File::open(self.file.path()).unwrap()
    }

    pub(crate) fn path(&self) -> PathBuf {
        self.file.path().to_owned()
    }

    fn fsck(&self) {
        // fsck.erofs 1.5 goes down deep trees by recursion, and reads each file at once, of less than 2 GiB.
        let large = fs::metadata(self.file.path()).unwrap().len() >= 1 << 31;
        let options = if large { "" } else { "--extract" };
        let output = Command::new("sh")
            .args(["-c", &format!("ulimit -s unlimited && exec fsck.erofs {options} \"$0\"")])
            .arg(self.file.path())
            .output()
            .unwrap();
        assert!(output.status.code() != Some(127), "fsck.erofs cannot be started: install the package erofs-utils");
        let text = [output.stdout, output.stderr].map(|text| String::from_utf8_lossy(&text).into_owned()).concat();
        assert!(output.status.success(), "fsck.erofs refuses the layer ({}): {text}", output.status);
    }
}

/// Writes an archive without the pipe.
pub(crate) fn try_write(archive: &[u8]) -> Result<(WriteSummary, File), WriteError> {
    let out = tempfile::tempfile().unwrap();
    let summary = write(&mut tar::Reader::new(archive), &out, WriteOptions { base: false })?;
    Ok((summary, out))
}

/// The bytes of a written layer.
pub(crate) fn image(archive: &[u8]) -> Vec<u8> {
    let (summary, file) = try_write(archive).unwrap();
    let mut bytes = vec![0; summary.image_bytes as usize];
    file.read_exact_at(&mut bytes, 0).unwrap();
    bytes
}

pub(crate) fn sha256(bytes: &[u8]) -> Digest {
    Digest::from_sha256(Sha256::digest(bytes).into())
}

pub(crate) fn need_root() {
    assert!(rustix::process::geteuid().is_root(), "this test needs root: it makes devices and mounts");
}

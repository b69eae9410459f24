//! Layers: a tree described in code, or a tar file from elsewhere, as a blob in the cache.

use std::fs;
use std::io::{Cursor, Write};
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use flate2::write::GzEncoder;
use serde::{Deserialize, Serialize};
use tar::{Builder, EntryType, Header};

use super::{digest, hex, write_whole};
use crate::paths;

/// A layer of an image: a blob in the cache.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Layer {
    digest: String,
    diff_id: String,
    size: u64,
    compression: Compression,
}

/// How a layer's blob is stored.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Compression {
    /// `tar`.
    Plain,
    /// `tar+gzip`.
    Gzip,
}

/// The entries of a layer.
pub struct Tree {
    archive: Builder<Vec<u8>>,
}

impl Layer {
    /// Stores a tar archive as a layer.
    pub fn from_tar(tar: &[u8], compression: Compression) -> Result<Self> {
        let blob = match compression {
            Compression::Plain => tar.to_vec(),
            Compression::Gzip => {
                // The builder's defaults leave the time and the name out, so the bytes depend on the content alone.
                let mut encoder = GzEncoder::new(Vec::new(), flate2::Compression::new(6));
                encoder.write_all(tar)?;
                encoder.finish()?
            }
        };
        let layer = Self { digest: digest(&blob), diff_id: digest(tar), size: blob.len() as u64, compression };
        let path = layer.blob();
        if !path.exists() {
            write_whole(&path, &blob)?;
        }
        Ok(layer)
    }

    /// `sha256:...` of the blob.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// `sha256:...` of the uncompressed archive.
    pub fn diff_id(&self) -> &str {
        &self.diff_id
    }

    /// Bytes of the blob.
    pub fn size(&self) -> u64 {
        self.size
    }

    /// As manifests name it.
    pub fn media_type(&self) -> &'static str {
        match self.compression {
            Compression::Plain => "application/vnd.oci.image.layer.v1.tar",
            Compression::Gzip => "application/vnd.oci.image.layer.v1.tar+gzip",
        }
    }

    /// Where the blob lies.
    pub fn blob(&self) -> PathBuf {
        let cache = paths::cache().expect("the cache directory was there when the layer was made");
        cache.join("blobs").join(hex(&self.digest))
    }
}

impl Default for Tree {
    fn default() -> Self {
        Self::new()
    }
}

impl Tree {
    /// A layer without entries.
    pub fn new() -> Self {
        Self { archive: Builder::new(Vec::new()) }
    }

    /// A directory; parents must be given before.
    pub fn directory(mut self, path: &str, mode: u32) -> Result<Self> {
        let header = header(EntryType::Directory, mode, 0);
        self.append(header, path, &[])?;
        Ok(self)
    }

    /// A file with its content.
    pub fn file(mut self, path: &str, mode: u32, content: &[u8]) -> Result<Self> {
        let header = header(EntryType::Regular, mode, content.len());
        self.append(header, path, content)?;
        Ok(self)
    }

    /// A file that belongs to somebody.
    pub fn owned_file(mut self, path: &str, mode: u32, owner: (u64, u64), content: &[u8]) -> Result<Self> {
        let mut header = header(EntryType::Regular, mode, content.len());
        header.set_uid(owner.0);
        header.set_gid(owner.1);
        self.append(header, path, content)?;
        Ok(self)
    }

    /// A program with capabilities: those whose numbers are the bits of `capabilities` become permitted and effective (capabilities(7)).
    pub fn capable_file(mut self, path: &str, content: &[u8], capabilities: u64) -> Result<Self> {
        // struct vfs_cap_data: VFS_CAP_REVISION_2 with the flag "effective", then permitted and inheritable, lower halves first.
        let fields = [0x0200_0001, capabilities as u32, 0, (capabilities >> 32) as u32, 0];
        let value: Vec<u8> = fields.iter().flat_map(|field: &u32| field.to_le_bytes()).collect();
        let record = [b"SCHILY.xattr.security.capability=", &value[..], b"\n"].concat();
        // A record begins with its length in decimal, itself and a space included: two digits here.
        let record = [format!("{} ", record.len() + 3).as_bytes(), &record].concat();
        let extended = header(EntryType::XHeader, 0o644, record.len());
        self.append(extended, &format!("{path}.pax"), &record)?;
        self.file(path, 0o755, content)
    }

    /// A symbolic link.
    pub fn symlink(mut self, path: &str, target: &str) -> Result<Self> {
        let mut header = header(EntryType::Symlink, 0o777, 0);
        self.archive.append_link(&mut header, path, target).with_context(|| format!("symlink {path}"))?;
        Ok(self)
    }

    /// A hard link to a file that was given before.
    pub fn hard_link(mut self, path: &str, target: &str) -> Result<Self> {
        let mut header = header(EntryType::Link, 0o644, 0);
        self.archive.append_link(&mut header, path, target).with_context(|| format!("hard link {path}"))?;
        Ok(self)
    }

    /// A device node.
    pub fn device(mut self, path: &str, mode: u32, major: u32, minor: u32) -> Result<Self> {
        let mut header = header(EntryType::Block, mode, 0);
        header.set_device_major(major)?;
        header.set_device_minor(minor)?;
        self.append(header, path, &[])?;
        Ok(self)
    }

    /// A file with its content and an extended attribute, such as `security.capability`.
    pub fn file_with_xattr(mut self, path: &str, mode: u32, content: &[u8], xattr: (&str, &[u8])) -> Result<Self> {
        let key = format!("SCHILY.xattr.{}", xattr.0);
        self.archive.append_pax_extensions([(key.as_str(), xattr.1)])?;
        self.file(path, mode, content)
    }

    /// A directory that belongs to a user; parents must be given before.
    pub fn directory_of(mut self, path: &str, mode: u32, uid: u64, gid: u64) -> Result<Self> {
        let mut header = header(EntryType::Directory, mode, 0);
        header.set_uid(uid);
        header.set_gid(gid);
        self.append(header, path, &[])?;
        Ok(self)
    }

    /// Removes a path of the layers below (OCI image specification, "Whiteouts").
    pub fn whiteout(self, path: &str) -> Result<Self> {
        let path = Path::new(path);
        let name = path.file_name().and_then(|name| name.to_str()).context("a whiteout names a file")?;
        let mark = path.with_file_name(format!(".wh.{name}"));
        self.file(mark.to_str().context("a path is text")?, 0o644, b"")
    }

    /// The archive.
    pub fn tar(self) -> Result<Vec<u8>> {
        Ok(self.archive.into_inner()?)
    }

    /// The layer.
    pub fn layer(self, compression: Compression) -> Result<Layer> {
        Layer::from_tar(&self.tar()?, compression)
    }

    fn append(&mut self, mut header: Header, path: &str, content: &[u8]) -> Result<()> {
        self.archive.append_data(&mut header, path, Cursor::new(content)).with_context(|| format!("entry {path}"))
    }
}

impl Tree {
    /// A file of the host, with its content and execute bits.
    pub fn host_file(self, path: &str, source: &Path) -> Result<Self> {
        let content = fs::read(source).with_context(|| format!("cannot read {}", source.display()))?;
        self.file(path, 0o755, &content)
    }
}

fn header(kind: EntryType, mode: u32, size: usize) -> Header {
    let mut header = Header::new_gnu();
    header.set_entry_type(kind);
    header.set_mode(mode);
    header.set_size(size as u64);
    header.set_uid(0);
    header.set_gid(0);
    header.set_mtime(0);
    header
}

//! Container images made here: layers, configuration, manifest and index of an OCI image layout, without any container tool.
//!
//! Source: OCI image specification 1.1, "Image Layout", "Image Manifest", "Image Configuration". Times are zero and orders fixed, so the same
//! content has the same digests on every machine.

pub mod catalog;
pub mod debian;
mod layer;
pub mod popular;
pub mod program;

use std::fs;
use std::io::Write;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result};
use serde_json::{Value, json};
use sha2::{Digest as _, Sha256};

pub use layer::{Compression, Layer, Tree};

use crate::paths;

/// What an image says of its process.
#[derive(Debug, Clone, Default)]
pub struct Config {
    /// First part of the command line.
    pub entrypoint: Vec<String>,
    /// Second part of the command line.
    pub cmd: Vec<String>,
    /// `NAME=VALUE`.
    pub env: Vec<String>,
    /// TCP ports of EXPOSE.
    pub exposed: Vec<u16>,
    /// `user`, `uid`, `user:group`.
    pub user: String,
    /// Where the process starts.
    pub working_dir: String,
    /// Such as `SIGINT`.
    pub stop_signal: String,
    /// Paths of VOLUME.
    pub volumes: Vec<String>,
}

/// An image as an OCI layout directory, tagged `latest` in its index.
#[derive(Debug, Clone)]
pub struct Image {
    layout: PathBuf,
    digest: String,
    layers: Vec<Layer>,
}

impl Config {
    /// An image that runs one command.
    pub fn command(words: &[&str]) -> Self {
        Self { entrypoint: words.iter().map(ToString::to_string).collect(), ..Self::default() }
    }
}

impl Image {
    /// Puts an image together. It stays in the cache under the digest of its manifest.
    pub fn build(layers: Vec<Layer>, config: &Config) -> Result<Self> {
        let config = json_bytes(&configuration(&layers, config))?;
        let config_digest = digest(&config);
        let descriptors: Vec<_> = layers
            .iter()
            .map(|layer| json!({"mediaType": layer.media_type(), "digest": layer.digest(), "size": layer.size()}))
            .collect();
        let manifest = json_bytes(&json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": {"mediaType": "application/vnd.oci.image.config.v1+json", "digest": config_digest, "size": config.len()},
            "layers": descriptors,
        }))?;
        let digest = digest(&manifest);
        let image = Self { layout: paths::cache()?.join("images").join(hex(&digest)), digest, layers };
        if !image.layout.join("index.json").exists() {
            image
                .write(&config, &config_digest, &manifest)
                .with_context(|| format!("cannot write {}", image.layout.display()))?;
        }
        Ok(image)
    }

    /// The directory of the layout.
    pub fn layout(&self) -> &Path {
        &self.layout
    }

    /// `sha256:` and the hex digits of the manifest's digest.
    pub fn digest(&self) -> &str {
        &self.digest
    }

    /// Its layers, the lowest first.
    pub fn layers(&self) -> &[Layer] {
        &self.layers
    }

    /// The layout as one tar archive, as `skopeo copy oci-archive:` and `docker save` of today write it.
    pub fn archive(&self) -> Result<Vec<u8>> {
        let mut archive = tar::Builder::new(Vec::new());
        archive.mode(tar::HeaderMode::Deterministic);
        archive.append_dir_all(".", &self.layout)?;
        Ok(archive.into_inner()?)
    }

    fn write(&self, config: &[u8], config_digest: &str, manifest: &[u8]) -> Result<()> {
        let parent = paths::cache()?.join("images");
        fs::create_dir_all(&parent)?;
        let temporary = tempfile::Builder::new().prefix("tmp-").tempdir_in(&parent)?;
        let blobs = temporary.path().join("blobs/sha256");
        fs::create_dir_all(&blobs)?;
        fs::write(blobs.join(hex(config_digest)), config)?;
        fs::write(blobs.join(hex(&self.digest)), manifest)?;
        for layer in &self.layers {
            let name = blobs.join(hex(layer.digest()));
            if !name.exists() {
                fs::hard_link(layer.blob(), &name).or_else(|_| fs::copy(layer.blob(), &name).map(drop))?;
            }
        }
        fs::write(temporary.path().join("oci-layout"), r#"{"imageLayoutVersion":"1.0.0"}"#)?;
        let index = json!({
            "schemaVersion": 2,
            "mediaType": "application/vnd.oci.image.index.v1+json",
            "manifests": [{
                "mediaType": "application/vnd.oci.image.manifest.v1+json",
                "digest": self.digest,
                "size": manifest.len(),
                "annotations": {"org.opencontainers.image.ref.name": "latest"},
                "platform": {"architecture": architecture(), "os": "linux"},
            }],
        });
        fs::write(temporary.path().join("index.json"), json_bytes(&index)?)?;
        // Tests that run beside this one may have been faster: their layout has the same content.
        match fs::rename(temporary.path(), &self.layout) {
            Err(_) if self.layout.join("index.json").exists() => Ok(()),
            result => Ok(result?),
        }
    }
}

fn configuration(layers: &[Layer], config: &Config) -> Value {
    let exposed: serde_json::Map<_, _> = config.exposed.iter().map(|port| (format!("{port}/tcp"), json!({}))).collect();
    let volumes: serde_json::Map<_, _> = config.volumes.iter().map(|path| (path.clone(), json!({}))).collect();
    let mut process = serde_json::Map::new();
    let mut set = |name: &str, empty: bool, value: Value| {
        if !empty {
            process.insert(name.to_owned(), value);
        }
    };
    set("Entrypoint", config.entrypoint.is_empty(), json!(config.entrypoint));
    set("Cmd", config.cmd.is_empty(), json!(config.cmd));
    set("Env", config.env.is_empty(), json!(config.env));
    set("ExposedPorts", exposed.is_empty(), json!(exposed));
    set("User", config.user.is_empty(), json!(config.user));
    set("WorkingDir", config.working_dir.is_empty(), json!(config.working_dir));
    set("Volumes", volumes.is_empty(), json!(volumes));
    set("StopSignal", config.stop_signal.is_empty(), json!(config.stop_signal));
    let history: Vec<_> =
        layers.iter().map(|_| json!({"created": "1970-01-01T00:00:00Z", "created_by": "funtainer-e2e"})).collect();
    json!({
        "created": "1970-01-01T00:00:00Z",
        "architecture": architecture(),
        "os": "linux",
        "config": process,
        "rootfs": {"type": "layers", "diff_ids": layers.iter().map(Layer::diff_id).collect::<Vec<_>>()},
        "history": history,
    })
}

/// The name of this machine's processor as images spell it.
fn architecture() -> &'static str {
    match std::env::consts::ARCH {
        "x86_64" => "amd64",
        "aarch64" => "arm64",
        other => other,
    }
}

fn digest(bytes: &[u8]) -> String {
    let hash = Sha256::digest(bytes);
    hash.iter().fold("sha256:".to_owned(), |mut text, byte| {
        use std::fmt::Write;
        let _ = write!(text, "{byte:02x}");
        text
    })
}

fn hex(digest: &str) -> &str {
    digest.trim_start_matches("sha256:")
}

fn json_bytes(value: &Value) -> Result<Vec<u8>> {
    Ok(serde_json::to_vec(value)?)
}

/// Writes a file that is either whole or not there.
fn write_whole(path: &Path, bytes: &[u8]) -> Result<()> {
    let parent = path.parent().context("a file has a parent")?;
    fs::create_dir_all(parent)?;
    let mut temporary = tempfile::NamedTempFile::new_in(parent)?;
    temporary.write_all(bytes)?;
    temporary.persist(path).with_context(|| format!("cannot write {}", path.display()))?;
    Ok(())
}

//! An image with busybox in it, as an OCI archive.

use std::fs::File;
use std::io::Write;
use std::path::Path;

use anyhow::{Context, Result};
use serde_json::json;
use sha2::{Digest, Sha256};

const BUSYBOX: &str = "/bin/busybox";
const APPLETS: &[&str] =
    &["sh", "cat", "echo", "httpd", "kill", "ls", "mkdir", "nc", "sleep", "seq", "head", "true", "false", "yes"];

/// Writes the archive; its image is named `busybox:test`.
pub(crate) fn write_archive(path: &Path) -> Result<()> {
    let layer = layer()?;
    let config = json!({
        "architecture": if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" },
        "os": "linux",
        "config": { "Cmd": ["sh"], "Env": ["FROM_IMAGE=1"] },
        "rootfs": { "type": "layers", "diff_ids": [name(&layer)] },
    })
    .to_string();
    let manifest = json!({
        "schemaVersion": 2,
        "mediaType": "application/vnd.oci.image.manifest.v1+json",
        "config": descriptor("application/vnd.oci.image.config.v1+json", config.as_bytes()),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar", &layer)],
    })
    .to_string();
    let mut named = descriptor("application/vnd.oci.image.manifest.v1+json", manifest.as_bytes());
    named["annotations"] = json!({ "org.opencontainers.image.ref.name": "busybox:test" });
    let index = json!({ "schemaVersion": 2, "manifests": [named] }).to_string();

    let mut archive = tar::Builder::new(File::create(path)?);
    put(&mut archive, "oci-layout", 0o644, br#"{"imageLayoutVersion":"1.0.0"}"#)?;
    put(&mut archive, "index.json", 0o644, index.as_bytes())?;
    for blob in [layer.as_slice(), config.as_bytes(), manifest.as_bytes()] {
        put(&mut archive, &format!("blobs/{}", name(blob).replace(':', "/")), 0o644, blob)?;
    }
    archive.into_inner()?.flush()?;
    Ok(())
}

fn layer() -> Result<Vec<u8>> {
    let mut layer = tar::Builder::new(Vec::new());
    let busybox = std::fs::read(BUSYBOX).context("busybox-static is needed")?;
    put(&mut layer, "bin/busybox", 0o755, &busybox)?;
    for applet in APPLETS {
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Symlink);
        header.set_size(0);
        header.set_mode(0o777);
        layer.append_link(&mut header, format!("bin/{applet}"), "busybox")?;
    }
    put(&mut layer, "www/index.html", 0o644, b"hello from inside\n")?;
    put(&mut layer, "bin/data", 0o644, b"no program")?;
    put(&mut layer, "bin/garbage", 0o755, b"\x7fELF but not really")?;
    put(&mut layer, "bin/lost", 0o755, b"#!/no/such/interpreter\n")?;
    put(&mut layer, "etc/passwd", 0o644, b"root:x:0:0::/root:/bin/sh\n")?;
    Ok(layer.into_inner()?)
}

fn put(archive: &mut tar::Builder<impl Write>, path: &str, mode: u32, content: &[u8]) -> Result<()> {
    let mut header = tar::Header::new_ustar();
    header.set_mode(mode);
    header.set_size(content.len() as u64);
    archive.append_data(&mut header, path, content)?;
    Ok(())
}

fn descriptor(media_type: &str, content: &[u8]) -> serde_json::Value {
    json!({ "mediaType": media_type, "digest": name(content), "size": content.len() })
}

fn name(content: &[u8]) -> String {
    let hex: Vec<String> = Sha256::digest(content).iter().map(|byte| format!("{byte:02x}")).collect();
    format!("sha256:{}", hex.concat())
}

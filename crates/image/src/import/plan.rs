//! Which images an archive has: its lists and manifests, read and verified.

use std::collections::BTreeMap;
use std::path::PathBuf;

use bytes::Bytes;
use funtainer_model::{Digest, ImageRef};
use serde::de::DeserializeOwned;
use serde::{Deserialize, Serialize};
use serde_json::json;

use super::spool::{LIST_BYTES_MAX, Spool};
use super::{ImportError, listed};
use crate::error::ImageError;
use crate::hash::sha256;
use crate::manifest::{
    CONFIG_BYTES_MAX, Document, INDEX_DEPTH_MAX, Index, IndexEntry, MANIFEST_BYTES_MAX, Manifest, ManifestError, Platform,
    parse_config,
};
use crate::store::Found;

/// Where containerd keeps the full name.
const CONTAINERD_NAME: &str = "io.containerd.image.name";
/// Where the specification keeps a name or only a tag (OCI image specification, "Pre-Defined Annotation Keys").
const OCI_NAME: &str = "org.opencontainers.image.ref.name";
/// Most bytes of `oci-layout`, which has one member.
const LAYOUT_BYTES_MAX: u64 = 4 << 10;
/// The only version of layouts that there is.
const LAYOUT_VERSION: &str = "1.0.0";

/// What will be imported, with the files that it comes from.
#[derive(Debug)]
pub(super) struct Plan {
    pub(super) images: Vec<PlannedImage>,
    _spool: Spool,
}

/// One image of the archive.
#[derive(Debug)]
pub(super) struct PlannedImage {
    /// At least one.
    pub(super) names: Vec<ImageRef>,
    pub(super) found: Found,
    /// Bytes of the manifest.
    pub(super) document: Bytes,
    /// Bytes of the configuration.
    pub(super) config: Bytes,
    /// For each layer of the manifest the file that has it.
    pub(super) layer_files: Vec<PathBuf>,
}

#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct LayoutFile {
    image_layout_version: String,
}

/// One entry of the `manifest.json` of `docker save`.
#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct SavedImage {
    config: String,
    repo_tags: Option<Vec<String>>,
    layers: Vec<String>,
}

/// A descriptor of a manifest that is made here.
#[derive(Serialize)]
#[serde(rename_all = "camelCase")]
struct MadeDescriptor {
    media_type: &'static str,
    digest: Digest,
    size: u64,
}

impl Plan {
    /// Reads the lists of the archive and all that they lead to, except the layers. `name` stands in for the archive's names.
    pub(super) fn make(spool: Spool, platform: &Platform, name: Option<&ImageRef>) -> Result<Self, ImageError> {
        let archive = Archive { spool: &spool, platform };
        let images = if spool.file("oci-layout").is_some() && spool.file("index.json").is_some() {
            archive.plan_layout(name)?
        } else if spool.file("manifest.json").is_some() {
            archive.plan_saved(name)?
        } else {
            return Err(ImportError::NoLayout.into());
        };
        Ok(Self { images, _spool: spool })
    }
}

impl PlannedImage {
    /// The image in messages.
    pub(super) fn label(&self) -> String {
        self.names.first().map_or_else(|| self.found.digest.to_string(), ToString::to_string)
    }
}

/// An archive with the platform that its images are wanted for.
struct Archive<'a> {
    spool: &'a Spool,
    platform: &'a Platform,
}

impl Archive<'_> {
    fn plan_layout(&self, name: Option<&ImageRef>) -> Result<Vec<PlannedImage>, ImageError> {
        let layout: LayoutFile = self.json("oci-layout", LAYOUT_BYTES_MAX)?;
        if layout.image_layout_version != LAYOUT_VERSION {
            return Err(ImportError::LayoutVersion(layout.image_layout_version).into());
        }
        let bytes = self.spool.read("index.json", LIST_BYTES_MAX, "the layout")?;
        let document = Document::parse(&bytes, None).map_err(|source| wrong("index.json", source))?;
        let Document::Index(index) = document else { return Err(ImportError::Empty("index.json").into()) };
        // Entries of one name are forms of one image for several platforms.
        let mut groups: BTreeMap<Option<String>, Index> = BTreeMap::new();
        for entry in index.entries {
            groups.entry(written_name(&entry)).or_insert_with(|| Index { entries: Vec::new() }).entries.push(entry);
        }
        if groups.is_empty() {
            return Err(ImportError::Empty("index.json").into());
        }
        if name.is_some() && groups.len() > 1 {
            let names = groups.into_keys().map(|name| name.unwrap_or_else(|| "one without name".to_owned()));
            return Err(ImportError::Several(listed(names)).into());
        }
        groups
            .into_iter()
            .map(|(written, index)| {
                let name = name.cloned().map_or_else(|| full_name(written), Ok)?;
                self.plan_index(name, &index)
            })
            .collect()
    }

    /// The image of `index` for the platform, through nested indexes.
    fn plan_index(&self, name: ImageRef, index: &Index) -> Result<PlannedImage, ImageError> {
        let failed = |source| wrong(&name.to_string(), source);
        let mut wanted_by = "index.json".to_owned();
        let mut digest = index.choose(self.platform).map_err(failed)?.descriptor.digest;
        for _ in 0..INDEX_DEPTH_MAX {
            let document = self.blob(digest, MANIFEST_BYTES_MAX, &wanted_by)?;
            wanted_by = blob_path(digest);
            match Document::parse(&document, None).map_err(failed)? {
                Document::Index(index) => digest = index.choose(self.platform).map_err(failed)?.descriptor.digest,
                Document::Manifest(manifest) => return self.plan_manifest(name, digest, document, manifest),
            }
        }
        let depth = INDEX_DEPTH_MAX as u64;
        Err(failed(ManifestError::TooLarge { what: "the number of nested indexes", actual: depth + 1, max: depth }))
    }

    fn plan_manifest(
        &self,
        name: ImageRef,
        digest: Digest,
        document: Bytes,
        manifest: Manifest,
    ) -> Result<PlannedImage, ImageError> {
        let wanted_by = blob_path(digest);
        let bytes = self.blob(manifest.config.digest, CONFIG_BYTES_MAX, &wanted_by)?;
        let config = manifest.parse_config(&bytes, self.platform).map_err(|source| wrong(&name.to_string(), source))?;
        let layer_file = |layer: &crate::layer::LayerBlob| {
            let path = blob_path(layer.digest);
            let file = self.spool.file(&path).map(|file| file.path.clone());
            file.ok_or_else(|| ImportError::Missing { file: path, wanted_by: wanted_by.clone() })
        };
        let layer_files = manifest.layers.iter().map(layer_file).collect::<Result<_, _>>()?;
        Ok(PlannedImage { names: vec![name], found: Found { digest, manifest, config }, document, config: bytes, layer_files })
    }

    fn plan_saved(&self, name: Option<&ImageRef>) -> Result<Vec<PlannedImage>, ImageError> {
        let saved: Vec<SavedImage> = self.json("manifest.json", LIST_BYTES_MAX)?;
        if saved.is_empty() {
            return Err(ImportError::Empty("manifest.json").into());
        }
        if name.is_some() && saved.len() > 1 {
            return Err(ImportError::Several(listed(saved.into_iter().map(|image| image.config))).into());
        }
        saved.into_iter().map(|image| self.plan_saved_image(image, name)).collect()
    }

    /// `docker save` has no manifest, so one is made: the same archive always gives the same one.
    fn plan_saved_image(&self, saved: SavedImage, name: Option<&ImageRef>) -> Result<PlannedImage, ImageError> {
        let tags = saved.repo_tags.unwrap_or_default();
        let names = match name {
            Some(name) => vec![name.clone()],
            None if tags.is_empty() => return Err(ImportError::NoName { found: None }.into()),
            None => tags.iter().map(|tag| tag.parse().map_err(ImportError::Name)).collect::<Result<_, _>>()?,
        };
        let label = names.first().map_or_else(|| saved.config.clone(), ToString::to_string);
        let failed = |source| wrong(&label, source);
        let config_bytes = self.spool.read(&saved.config, CONFIG_BYTES_MAX, "manifest.json")?;
        let config = parse_config(&config_bytes, self.platform).map_err(failed)?;
        if config.diff_ids.len() != saved.layers.len() {
            return Err(failed(ManifestError::LayerCount { layers: saved.layers.len(), diff_ids: config.diff_ids.len() }));
        }
        let mut layers = Vec::new();
        let mut layer_files = Vec::new();
        for (path, diff_id) in saved.layers.into_iter().zip(&config.diff_ids) {
            let missing = || ImportError::Missing { file: path.clone(), wanted_by: "manifest.json".to_owned() };
            let file = self.spool.file(&path).ok_or_else(missing)?;
            let media_type = "application/vnd.oci.image.layer.v1.tar";
            layers.push(MadeDescriptor { media_type, digest: *diff_id, size: file.size });
            layer_files.push(file.path.clone());
        }
        let config_descriptor = MadeDescriptor {
            media_type: "application/vnd.oci.image.config.v1+json",
            digest: sha256(&config_bytes),
            size: config_bytes.len() as u64,
        };
        let document = json!({
            "schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json",
            "config": config_descriptor, "layers": layers,
        });
        let document = Bytes::from(document.to_string());
        let Document::Manifest(manifest) = Document::parse(&document, None).map_err(failed)? else {
            return Err(failed(ManifestError::Ambiguous));
        };
        let found = Found { digest: sha256(&document), manifest, config };
        Ok(PlannedImage { names, found, document, config: config_bytes, layer_files })
    }

    /// A blob whose content has its digest.
    fn blob(&self, digest: Digest, bytes_max: u64, wanted_by: &str) -> Result<Bytes, ImageError> {
        let path = blob_path(digest);
        let bytes = self.spool.read(&path, bytes_max, wanted_by)?;
        let actual = sha256(&bytes);
        if actual == digest { Ok(bytes) } else { Err(ImportError::Digest { file: path, actual }.into()) }
    }

    fn json<T: DeserializeOwned>(&self, path: &str, bytes_max: u64) -> Result<T, ImageError> {
        let bytes = self.spool.read(path, bytes_max, "the format")?;
        serde_json::from_slice(&bytes).map_err(|source| ImportError::Json { file: path.to_owned(), source }.into())
    }
}

fn wrong(image: &str, source: ManifestError) -> ImageError {
    ImageError::Manifest { image: image.to_owned(), source }
}

fn blob_path(digest: Digest) -> String {
    format!("blobs/sha256/{}", digest.hex())
}

fn written_name(entry: &IndexEntry) -> Option<String> {
    entry.annotations.get(CONTAINERD_NAME).or_else(|| entry.annotations.get(OCI_NAME)).cloned()
}

/// The specification lets the annotation be a tag alone (`umoci` writes it so); that is no name of an image.
fn full_name(written: Option<String>) -> Result<ImageRef, ImportError> {
    match written {
        Some(text) if text.contains(['/', ':']) => text.parse().map_err(ImportError::Name),
        found => Err(ImportError::NoName { found }),
    }
}

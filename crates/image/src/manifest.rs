//! Manifests, indexes and configurations of images, parsed from foreign bytes under limits.
//!
//! Formats: OCI image specification 1.1 ("Image Manifest", "Image Index", "Image Configuration") and Docker's
//! "Image Manifest Version 2, Schema 2". Everything here is pure: bytes in, values out. What comes out is within the
//! limits below, has only digests that can be verified, and only layers that can be unpacked.

use std::collections::BTreeMap;
use std::fmt;
use std::num::NonZeroU16;

use funtainer_model::{Digest, DigestError, EnvVar, ErrorCode, Failure, ImageConfig};
use oci_spec::image as oci;
use serde::Deserialize;
use serde::de::IgnoredAny;

use crate::layer::{Compression, LayerBlob};

/// Most bytes of a manifest or an index: what registries accept at most (OCI distribution specification, "Pushing
/// Manifests", asks for at least this much).
pub const MANIFEST_BYTES_MAX: u64 = 4 << 20;
/// Most bytes of a configuration. Large ones carry labels and history; none in use comes near.
pub const CONFIG_BYTES_MAX: u64 = 8 << 20;
/// Most bytes of one layer as it is transferred.
pub const LAYER_BYTES_MAX: u64 = 32 << 30;
/// Most layers of an image: Docker's own limit, so no image in use has more.
pub const LAYERS_MAX: usize = 127;
/// Most entries of an index: every platform with its variants and attestations is far below.
pub const INDEX_ENTRIES_MAX: usize = 1024;
/// Most indexes between a name and a manifest.
pub const INDEX_DEPTH_MAX: usize = 3;

const DOCKER_MANIFEST: &str = "application/vnd.docker.distribution.manifest.v2+json";
const DOCKER_LIST: &str = "application/vnd.docker.distribution.manifest.list.v2+json";
const DOCKER_CONFIG: &str = "application/vnd.docker.container.image.v1+json";
const OCI_MANIFEST: &str = "application/vnd.oci.image.manifest.v1+json";
const OCI_INDEX: &str = "application/vnd.oci.image.index.v1+json";
const OCI_CONFIG: &str = "application/vnd.oci.image.config.v1+json";
/// Schema 1, which has no configuration and is served for very old images only.
const DOCKER_SCHEMA_1: &str = "application/vnd.docker.distribution.manifest.v1";

/// Media types that a registry may answer with, for the `Accept` header.
pub const ACCEPT: [&str; 4] = [OCI_MANIFEST, OCI_INDEX, DOCKER_MANIFEST, DOCKER_LIST];

/// Content by digest and size in bytes (OCI image specification, "Descriptor").
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Descriptor {
    /// What its bytes hash to.
    pub digest: Digest,
    /// How many bytes it has.
    pub size: u64,
}

/// What a name or a digest can lead to in a registry.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Document {
    /// One image.
    Manifest(Manifest),
    /// One image in forms for several platforms.
    Index(Index),
}

/// One image: its configuration and its layers from the bottom up, at least one and at most [`LAYERS_MAX`].
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Manifest {
    /// The configuration.
    pub config: Descriptor,
    /// The layers, lowest first.
    pub layers: Vec<LayerBlob>,
}

/// The entries of an index that lead to manifests, in its order.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Index {
    /// At most [`INDEX_ENTRIES_MAX`].
    pub entries: Vec<IndexEntry>,
}

/// One entry of an index.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct IndexEntry {
    /// A manifest or a further index.
    pub descriptor: Descriptor,
    /// For which platform, where the index says so.
    pub platform: Option<Platform>,
    /// Its annotations; names of images in layouts stand here.
    pub annotations: BTreeMap<String, String>,
}

/// Operating system and processor, as Go names them (OCI image specification, "Image Index", `platform`).
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Platform {
    /// `linux` and the like.
    pub os: String,
    /// `amd64`, `arm64` and the like.
    pub architecture: String,
    /// `v8` and the like.
    pub variant: Option<String>,
}

/// A configuration with what only the store needs of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ParsedConfig {
    /// What a start depends on.
    pub config: ImageConfig,
    /// Digest of each layer's unpacked tar, lowest first; as many as the manifest has layers.
    pub diff_ids: Vec<Digest>,
}

/// Why bytes are no image that can be run here.
#[derive(Debug, thiserror::Error)]
pub enum ManifestError {
    /// Not the JSON of the format.
    #[error("the {what} is not valid JSON of its format")]
    Json {
        /// Manifest, index or configuration.
        what: &'static str,
        /// Where and why.
        #[source]
        source: serde_json::Error,
    },
    /// Over a named limit.
    #[error("{what} is {actual}, at most {max} is served")]
    TooLarge {
        /// Which size or number.
        what: &'static str,
        /// As the image has it.
        actual: u64,
        /// The limit.
        max: u64,
    },
    /// The retired first format.
    #[error("the manifest has schema version 1, which registries no longer take")]
    SchemaOne,
    /// Not a version of the format that exists.
    #[error("the manifest has schema version {0}, expected 2")]
    SchemaVersion(u64),
    /// A document that can be read as a manifest and as an index means two images.
    #[error("the document is both a manifest and an index")]
    Ambiguous,
    /// Two places name the format differently.
    #[error("the document says it is '{inside}', the registry says '{outside}'")]
    MediaTypes {
        /// Its own `mediaType`.
        inside: String,
        /// `Content-Type`.
        outside: String,
    },
    /// Neither a manifest nor an index.
    #[error("'{0}' is neither an image manifest nor an index")]
    NotAnImage(String),
    /// A manifest of something else, such as a chart or a signature.
    #[error("it holds '{0}', not a container image")]
    Artifact(String),
    /// A layer that cannot be unpacked.
    #[error("layer {digest} has the type '{media_type}'")]
    LayerType {
        /// Which layer.
        digest: String,
        /// Its media type.
        media_type: String,
    },
    /// A digest that cannot be verified.
    #[error("a digest of the {what} cannot be used")]
    Digest {
        /// Manifest, index or configuration.
        what: &'static str,
        /// Why.
        #[source]
        source: DigestError,
    },
    /// Nothing to run.
    #[error("the image has no layers")]
    NoLayers,
    /// Manifest and configuration do not belong together.
    #[error("the manifest has {layers} layers, the configuration {diff_ids}")]
    LayerCount {
        /// In the manifest.
        layers: usize,
        /// In the configuration.
        diff_ids: usize,
    },
    /// A text that no process can be given.
    #[error("{0} in the configuration contains a NUL character")]
    Nul(&'static str),
    /// The image is for another machine.
    #[error("the image is for {found}, this machine is {wanted}")]
    Platform {
        /// From the configuration.
        found: Box<Platform>,
        /// This machine.
        wanted: Box<Platform>,
    },
    /// No form of the image is for this machine.
    #[error("the image has no form for {wanted}, only for {offered}")]
    NoPlatform {
        /// This machine.
        wanted: Box<Platform>,
        /// All that the index names, for people.
        offered: String,
    },
}

impl Platform {
    /// The machine that this program was built for.
    pub fn native() -> Self {
        Self { os: "linux".to_owned(), architecture: go_name(std::env::consts::ARCH.to_owned()), variant: None }
    }

    fn runs(&self, image: &Self) -> bool {
        self.os == image.os && self.architecture == image.architecture
    }
}

impl fmt::Display for Platform {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}/{}", self.os, self.architecture)?;
        self.variant.iter().try_for_each(|variant| write!(f, "/{variant}"))
    }
}

impl Document {
    /// Parses what a registry or a layout calls a manifest. `content_type` is the media type that came with it, if any;
    /// a document that names another one itself is refused, as is one that could be read in two ways.
    pub fn parse(bytes: &[u8], content_type: Option<&str>) -> Result<Self, ManifestError> {
        at_most("the manifest's size in bytes", bytes.len() as u64, MANIFEST_BYTES_MAX)?;
        let probe: Probe = from_json("manifest", bytes)?;
        // Parameters such as `; charset=utf-8` say nothing about JSON (RFC 8259 section 11).
        let outside = content_type.map(|text| text.split(';').next().unwrap_or_default().trim()).filter(|text| specific(text));
        if let (Some(inside), Some(outside)) = (probe.media_type.as_deref(), outside)
            && inside != outside
        {
            return Err(ManifestError::MediaTypes { inside: inside.to_owned(), outside: outside.to_owned() });
        }
        let media_type = probe.media_type.as_deref().or(outside);
        if probe.schema_version == 1 || media_type.is_some_and(|text| text.starts_with(DOCKER_SCHEMA_1)) {
            return Err(ManifestError::SchemaOne);
        }
        if probe.schema_version != 2 {
            return Err(ManifestError::SchemaVersion(probe.schema_version));
        }
        let has_manifest_keys = probe.layers.is_some() || probe.config.is_some();
        let has_index_keys = probe.manifests.is_some();
        if has_manifest_keys && has_index_keys {
            return Err(ManifestError::Ambiguous);
        }
        match media_type {
            Some(OCI_INDEX | DOCKER_LIST) => Index::parse(bytes).map(Self::Index),
            None if has_index_keys => Index::parse(bytes).map(Self::Index),
            Some(OCI_MANIFEST | DOCKER_MANIFEST) | None => Manifest::parse(bytes).map(Self::Manifest),
            Some(other) => Err(ManifestError::NotAnImage(other.to_owned())),
        }
    }
}

impl Manifest {
    fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let raw: oci::ImageManifest = from_json("manifest", bytes)?;
        let config_type = raw.config().media_type().to_string();
        if config_type != OCI_CONFIG && config_type != DOCKER_CONFIG {
            return Err(ManifestError::Artifact(config_type));
        }
        let config = Descriptor::new("manifest", raw.config())?;
        at_most("the configuration's size in bytes", config.size, CONFIG_BYTES_MAX)?;
        at_most("the number of layers", raw.layers().len() as u64, LAYERS_MAX as u64)?;
        let layers = raw.layers().iter().map(layer_blob).collect::<Result<Vec<_>, _>>()?;
        if layers.is_empty() {
            return Err(ManifestError::NoLayers);
        }
        Ok(Self { config, layers })
    }

    /// Parses the configuration that belongs to this manifest and checks that it is for `platform`.
    pub fn parse_config(&self, bytes: &[u8], platform: &Platform) -> Result<ParsedConfig, ManifestError> {
        let parsed = parse_config(bytes, platform)?;
        if parsed.diff_ids.len() != self.layers.len() {
            return Err(ManifestError::LayerCount { layers: self.layers.len(), diff_ids: parsed.diff_ids.len() });
        }
        Ok(parsed)
    }
}

/// Parses a configuration and checks that it is for `platform`.
///
/// Lenient where Docker is: variables without `=` and ports that are none are left out, and an unknown stop signal means the
/// usual one.
pub fn parse_config(bytes: &[u8], platform: &Platform) -> Result<ParsedConfig, ManifestError> {
    const WHAT: &str = "configuration";
    at_most("the configuration's size in bytes", bytes.len() as u64, CONFIG_BYTES_MAX)?;
    let raw: oci::ImageConfiguration = from_json(WHAT, bytes)?;
    let found = Platform {
        os: raw.os().to_string(),
        architecture: go_name(raw.architecture().to_string()),
        variant: raw.variant().clone().filter(|variant| !variant.is_empty()),
    };
    if !platform.runs(&found) {
        return Err(ManifestError::Platform { found: found.into(), wanted: platform.clone().into() });
    }
    let diff_ids = raw.rootfs().diff_ids();
    at_most("the number of layers", diff_ids.len() as u64, LAYERS_MAX as u64)?;
    let diff_ids = diff_ids
        .iter()
        .map(|text| text.parse().map_err(|source| ManifestError::Digest { what: WHAT, source }))
        .collect::<Result<_, _>>()?;
    let config = raw.config().as_ref().map_or_else(|| Ok(ImageConfig::default()), image_config)?;
    Ok(ParsedConfig { config, diff_ids })
}

impl Index {
    fn parse(bytes: &[u8]) -> Result<Self, ManifestError> {
        let raw: oci::ImageIndex = from_json("index", bytes)?;
        at_most("the number of entries in the index", raw.manifests().len() as u64, INDEX_ENTRIES_MAX as u64)?;
        // Entries of other kinds (signatures, artifacts of newer formats) may stand beside those that are meant.
        let known = raw.manifests().iter().filter(|entry| ACCEPT.contains(&entry.media_type().to_string().as_str()));
        Ok(Self { entries: known.map(IndexEntry::new).collect::<Result<_, _>>()? })
    }

    /// The entry for `platform`: the first of its system and processor, else the first that names no platform at all.
    pub fn choose(&self, platform: &Platform) -> Result<&IndexEntry, ManifestError> {
        let runs = |entry: &&IndexEntry| entry.platform.as_ref().is_some_and(|found| platform.runs(found));
        let unnamed = |entry: &&IndexEntry| entry.platform.is_none();
        self.entries.iter().find(runs).or_else(|| self.entries.iter().find(unnamed)).ok_or_else(|| {
            let mut offered: Vec<String> =
                self.entries.iter().filter_map(|e| e.platform.as_ref()).map(ToString::to_string).collect();
            offered.retain(|text| !text.contains("unknown"));
            offered.dedup();
            offered.truncate(PLATFORMS_SHOWN_MAX);
            let offered = if offered.is_empty() { "nothing".to_owned() } else { offered.join(", ") };
            ManifestError::NoPlatform { wanted: platform.clone().into(), offered }
        })
    }
}

/// Most platforms that an error lists.
const PLATFORMS_SHOWN_MAX: usize = 12;

impl ManifestError {
    /// The failure as a user meets it, for the image called `image`.
    pub fn failure(&self, image: &str) -> Failure {
        let code = match self {
            Self::SchemaOne | Self::NotAnImage(_) | Self::Artifact(_) | Self::LayerType { .. } => ErrorCode::ImageUnsupported,
            Self::Platform { .. } | Self::NoPlatform { .. } => ErrorCode::ImagePlatform,
            _ => ErrorCode::ImageInvalid,
        };
        let failure = Failure::new(code, format!("{image}: {}", crate::error::chain(self)));
        match self {
            Self::SchemaOne => {
                failure.with_hint("push the image again with a tool of today, such as `skopeo copy --format oci`")
            }
            Self::NotAnImage(_) | Self::Artifact(_) => {
                failure.with_hint("name a container image that has a file system and a command")
            }
            _ => failure,
        }
    }
}

/// The members that tell the formats apart, before any is trusted.
#[derive(Deserialize)]
#[serde(rename_all = "camelCase")]
struct Probe {
    schema_version: u64,
    media_type: Option<String>,
    config: Option<IgnoredAny>,
    layers: Option<IgnoredAny>,
    manifests: Option<IgnoredAny>,
}

impl Descriptor {
    fn new(what: &'static str, raw: &oci::Descriptor) -> Result<Self, ManifestError> {
        let digest = raw.digest().as_ref().parse().map_err(|source| ManifestError::Digest { what, source })?;
        Ok(Self { digest, size: raw.size() })
    }
}

fn layer_blob(raw: &oci::Descriptor) -> Result<LayerBlob, ManifestError> {
    let media_type = raw.media_type().to_string();
    let compression = match media_type.as_str() {
        "application/vnd.oci.image.layer.v1.tar" | "application/vnd.docker.image.rootfs.diff.tar" => Compression::None,
        "application/vnd.oci.image.layer.v1.tar+gzip" | "application/vnd.docker.image.rootfs.diff.tar.gzip" => {
            Compression::Gzip
        }
        "application/vnd.oci.image.layer.v1.tar+zstd" | "application/vnd.docker.image.rootfs.diff.tar.zstd" => {
            Compression::Zstd
        }
        _ => return Err(ManifestError::LayerType { digest: raw.digest().to_string(), media_type }),
    };
    let Descriptor { digest, size } = Descriptor::new("manifest", raw)?;
    at_most("a layer's size in bytes", size, LAYER_BYTES_MAX)?;
    Ok(LayerBlob { digest, size, compression })
}

impl IndexEntry {
    fn new(raw: &oci::Descriptor) -> Result<Self, ManifestError> {
        let descriptor = Descriptor::new("index", raw)?;
        at_most("a manifest's size in bytes", descriptor.size, MANIFEST_BYTES_MAX)?;
        let platform = raw.platform().as_ref().map(|platform| Platform {
            os: platform.os().to_string(),
            architecture: go_name(platform.architecture().to_string()),
            variant: platform.variant().clone(),
        });
        let annotations = raw.annotations().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect();
        Ok(Self { descriptor, platform, annotations })
    }
}

fn image_config(raw: &oci::Config) -> Result<ImageConfig, ManifestError> {
    let lines = |what, lines: &Option<Vec<String>>| {
        let lines = lines.clone().unwrap_or_default();
        if lines.iter().any(|line| line.contains('\0')) { Err(ManifestError::Nul(what)) } else { Ok(lines) }
    };
    let text = |what, text: &Option<String>| {
        let text = text.clone().unwrap_or_default();
        if text.contains('\0') { Err(ManifestError::Nul(what)) } else { Ok(text) }
    };
    let env = lines("a variable", raw.env())?;
    let mut exposed_ports: Vec<NonZeroU16> = raw.exposed_ports().iter().flatten().filter_map(|port| tcp_port(port)).collect();
    exposed_ports.sort_unstable();
    exposed_ports.dedup();
    let mut volumes = lines("a volume", raw.volumes())?;
    volumes.sort_unstable();
    Ok(ImageConfig {
        env: env.iter().filter_map(|line| line.parse::<EnvVar>().ok()).collect(),
        entrypoint: lines("the entrypoint", raw.entrypoint())?,
        cmd: lines("the command", raw.cmd())?,
        user: text("the user", raw.user())?,
        working_dir: text("the working directory", raw.working_dir())?,
        exposed_ports,
        stop_signal: raw.stop_signal().as_deref().and_then(|signal| signal.parse().ok()),
        volumes,
        labels: raw.labels().iter().flatten().map(|(key, value)| (key.clone(), value.clone())).collect(),
    })
}

/// Go's name of a processor where another one was written, as some tools do.
fn go_name(architecture: String) -> String {
    match architecture.as_str() {
        "x86_64" => "amd64".to_owned(),
        "aarch64" => "arm64".to_owned(),
        _ => architecture,
    }
}

/// `80` or `80/tcp`; other protocols are none of ours.
fn tcp_port(text: &str) -> Option<NonZeroU16> {
    let (port, protocol) = text.split_once('/').unwrap_or((text, "tcp"));
    if protocol.eq_ignore_ascii_case("tcp") { port.parse().ok() } else { None }
}

/// Whether a `Content-Type` says more than "some JSON" or "some bytes", which plain file servers send for everything.
fn specific(media_type: &str) -> bool {
    !matches!(media_type, "" | "application/json" | "application/octet-stream" | "text/plain")
}

fn from_json<'a, T: Deserialize<'a>>(what: &'static str, bytes: &'a [u8]) -> Result<T, ManifestError> {
    serde_json::from_slice(bytes).map_err(|source| ManifestError::Json { what, source })
}

fn at_most(what: &'static str, actual: u64, max: u64) -> Result<(), ManifestError> {
    if actual > max { Err(ManifestError::TooLarge { what, actual, max }) } else { Ok(()) }
}

#[cfg(test)]
mod tests;

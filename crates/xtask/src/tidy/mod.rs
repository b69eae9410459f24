//! `cargo xtask tidy`: rules of this project that no compiler knows. Each rule is a pure function from text or metadata to offences.

mod edges;
mod licences;
mod source;

use std::collections::BTreeSet;
use std::fmt;
use std::fs;
use std::path::{Path, PathBuf};

use anyhow::{Context, Result, bail};

use crate::build;

/// Where sources of this project lie.
const SOURCE_DIRECTORIES: [&str; 3] = ["crates", "examples", "fuzz"];
/// Directories below them that hold no sources of ours.
const SKIPPED: [&str; 4] = ["target", "corpus", "artifacts", "snapshots"];

/// A place where a rule is broken.
#[derive(Debug, Clone, PartialEq, Eq, PartialOrd, Ord)]
pub(crate) struct Offence {
    /// `path:line`, or a package.
    place: String,
    /// The rule, and what to do.
    rule: String,
}

impl Offence {
    fn new(place: impl Into<String>, rule: impl Into<String>) -> Self {
        Self { place: place.into(), rule: rule.into() }
    }
}

impl fmt::Display for Offence {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}: {}", self.place, self.rule)
    }
}

/// Prints every offence; fails if there is one.
pub(crate) fn run() -> Result<()> {
    let metadata = build::metadata()?;
    let top = metadata.workspace_root.clone().into_std_path_buf();
    let mut offences = edges::check(&edges::workspace_edges(&metadata));
    offences.extend(licences::check(&metadata));
    let mut files = 0;
    for path in sources(&top)? {
        let text = fs::read_to_string(&path).with_context(|| format!("cannot read {}", path.display()))?;
        let name = path.strip_prefix(&top).unwrap_or(&path);
        let name = name.to_str().with_context(|| format!("{} is no text", name.display()))?;
        offences.extend(source::check(name, &text));
        files += 1;
    }
    let roots = crate_roots(&metadata, &top);
    for root in &roots {
        let text = fs::read_to_string(top.join(root)).with_context(|| format!("cannot read {root}"))?;
        offences.extend(source::check_root(root, &text));
    }
    offences.sort();
    for offence in &offences {
        println!("{offence}");
    }
    if offences.is_empty() {
        println!("{files} files, {} crate roots and {} packages are tidy", roots.len(), metadata.packages.len());
        return Ok(());
    }
    bail!("{} offences", offences.len())
}

/// Every Rust source of this project.
fn sources(top: &Path) -> Result<Vec<PathBuf>> {
    let mut found = Vec::new();
    let mut open: Vec<_> =
        SOURCE_DIRECTORIES.iter().map(|directory| top.join(directory)).filter(|path| path.exists()).collect();
    while let Some(directory) = open.pop() {
        for entry in fs::read_dir(&directory).with_context(|| format!("cannot list {}", directory.display()))? {
            let path = entry?.path();
            let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
            if path.is_dir() && !SKIPPED.contains(&name) {
                open.push(path);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    Ok(found)
}

/// The first files of every library and executable of the workspace.
fn crate_roots(metadata: &cargo_metadata::Metadata, top: &Path) -> BTreeSet<String> {
    let mut roots = BTreeSet::new();
    for package in metadata.workspace_packages() {
        for target in package.targets.iter().filter(|target| target.is_lib() || target.is_bin()) {
            let path = target.src_path.as_std_path();
            roots.insert(path.strip_prefix(top).unwrap_or(path).display().to_string());
        }
    }
    roots
}

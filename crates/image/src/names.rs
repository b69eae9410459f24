//! The names that images were pulled or imported by, in one small file that is replaced as a whole.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard};
use std::time::{SystemTime, UNIX_EPOCH};

use funtainer_model::{Digest, ImageRef};
use serde::{Deserialize, Serialize};

use crate::store::{StoreError, replace_file};

/// Most names; a machine with more is not looked after, and the file would make every deploy slow.
const NAMES_MAX: usize = 20_000;
/// Version of the file's form.
const VERSION: u32 = 1;

/// One name as it is remembered.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct NameRecord {
    /// Digest of the manifest for this machine's platform.
    pub digest: Digest,
    /// Whether it came from an archive: then no registry is asked for it until it is pulled.
    pub imported: bool,
    /// When the name got this digest, in seconds since 1970.
    pub time_unix_s: u64,
}

/// All names. Readers never wait for the disk.
#[derive(Debug)]
pub(crate) struct Names {
    path: PathBuf,
    records: Mutex<BTreeMap<ImageRef, NameRecord>>,
    /// Held while the file is replaced, so that one change follows the other.
    writing: Mutex<()>,
}

#[derive(Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
struct NamesFile {
    version: u32,
    names: BTreeMap<ImageRef, NameRecord>,
}

impl Names {
    /// Reads the file; none is the same as an empty one.
    pub(crate) fn open(path: PathBuf) -> Result<Self, StoreError> {
        let records = match std::fs::read(&path) {
            Ok(bytes) => {
                let file: NamesFile =
                    serde_json::from_slice(&bytes).map_err(|source| StoreError::Names { path: path.clone(), source })?;
                if file.version != VERSION {
                    return Err(StoreError::Version { path, version: file.version });
                }
                file.names
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => BTreeMap::new(),
            Err(source) => return Err(StoreError::io("read", &path, source)),
        };
        Ok(Self { path, records: records.into(), writing: Mutex::default() })
    }

    pub(crate) fn get(&self, name: &ImageRef) -> Option<NameRecord> {
        self.records().get(name).copied()
    }

    pub(crate) fn all(&self) -> Vec<(ImageRef, NameRecord)> {
        self.records().iter().map(|(name, record)| (name.clone(), *record)).collect()
    }

    /// Gives `name` a digest. Durable on return; a name that already is so costs nothing. Blocks on the disk.
    pub(crate) fn set(&self, name: &ImageRef, digest: Digest, imported: bool, tmp: &Path) -> Result<(), StoreError> {
        let _writing = self.writing.lock().expect("no holder panics");
        let mut names = self.records().clone();
        let old = names.get(name).copied();
        if old.is_some_and(|old| (old.digest, old.imported) == (digest, imported)) {
            return Ok(());
        }
        if old.is_none() && names.len() >= NAMES_MAX {
            return Err(StoreError::TooManyNames { max: NAMES_MAX });
        }
        let time_unix_s = SystemTime::now().duration_since(UNIX_EPOCH).map_or(0, |elapsed| elapsed.as_secs());
        names.insert(name.clone(), NameRecord { digest, imported, time_unix_s });
        let file = NamesFile { version: VERSION, names };
        let bytes = serde_json::to_vec_pretty(&file).map_err(|source| StoreError::Names { path: self.path.clone(), source })?;
        replace_file(&self.path, tmp, &bytes)?;
        *self.records() = file.names;
        Ok(())
    }

    fn records(&self) -> MutexGuard<'_, BTreeMap<ImageRef, NameRecord>> {
        self.records.lock().expect("no holder panics")
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_survive_and_bad_files_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("names.json");
        let (name, digest) = ("a:1".parse::<ImageRef>().unwrap(), Digest::from_sha256([1; 32]));
        let names = Names::open(path.clone()).unwrap();
        names.set(&name, digest, true, dir.path()).unwrap();
        let record = Names::open(path.clone()).unwrap().get(&name).unwrap();
        assert_eq!((record.digest, record.imported), (digest, true));
        assert!(record.time_unix_s > 1_700_000_000);
        assert_eq!(std::fs::read_dir(dir.path()).unwrap().count(), 1, "no temporary file is left");
        for bad in ["", "{}", r#"{"version":2,"names":{}}"#, r#"{"version":1,"names":{"A":{}}}"#] {
            std::fs::write(&path, bad).unwrap();
            assert!(Names::open(path.clone()).unwrap_err().to_string().contains("names.json"), "{bad}");
        }
    }
}

//! What must outlive the process: functions and their revisions, in SQLite.
//!
//! Everything is read once, at [`Store::open`]; afterwards there are only writes. They go to one thread, which takes all that wait,
//! puts them into one transaction, and acknowledges each after the commit has reached the disk (`synchronous = FULL`).
//! A write that fails by itself is rolled back alone. No call and no start comes here.

mod migrations;
mod writer;

use std::path::{Path, PathBuf};
use std::sync::Arc;

use funtainer_contract::StartPlan;
use funtainer_model::{Digest, ErrorCode, Failure, FunctionId, FunctionSpec, RevisionId, Slug};
use jiff::Timestamp;
use rusqlite::{Connection, OpenFlags};

use writer::Writer;

/// Name of the database in the state directory.
const FILE_NAME: &str = "funtainer.db";
/// Version of the JSON in `revisions.spec` and `revisions.plan`. A change of their form adds a number and a reader of the old one.
const RECORD_VERSION: u32 = 1;
/// Revisions that are kept of one function, the current one among them: enough to see what changed, bounded for a function that
/// is deployed by every build.
const REVISIONS_PER_FUNCTION_MAX: u32 = 20;

/// The open state. Dropping it finishes the writes that were accepted.
pub(crate) struct Store {
    writer: Writer,
}

/// A revision as it is stored: immutable.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct RevisionRecord {
    /// Its identity.
    pub(crate) id: RevisionId,
    /// What the image's name was resolved to.
    pub(crate) digest: Digest,
    /// What the user asked for; names the function.
    pub(crate) spec: FunctionSpec,
    /// What a start needs.
    pub(crate) plan: StartPlan,
    /// When it was made.
    pub(crate) created_at: Timestamp,
}

/// Why the state cannot be read or written.
#[derive(Debug, thiserror::Error)]
pub(crate) enum StoreError {
    /// The file cannot be opened or is no database.
    #[error("the state in {} cannot be opened", path.display())]
    Open {
        /// The file.
        path: PathBuf,
        /// Why.
        #[source]
        source: Box<StoreError>,
    },
    /// SQLite refused.
    #[error("the state store failed")]
    Sql(#[from] rusqlite::Error),
    /// The file was written by a newer program.
    #[error("the state has schema {found}, this program knows {known}")]
    FromTheFuture {
        /// `user_version` of the file.
        found: u32,
        /// The newest that this program knows.
        known: u32,
    },
    /// A record that this program cannot read.
    #[error("the stored {what} of revision {revision} cannot be read: {why}")]
    Record {
        /// Which column.
        what: &'static str,
        /// Of which revision.
        revision: String,
        /// The reason.
        why: String,
    },
    /// The unique index on slugs or names refused.
    #[error("the name '{0}' is taken by another function")]
    NameTaken(Slug),
    /// The transaction that the write was in was not committed.
    #[error("the state could not be written")]
    Commit(#[source] Arc<rusqlite::Error>),
    /// The bounded queue of the writer is full.
    #[error("too many writes wait for the disk")]
    Overloaded,
    /// The writer has ended: the disk failed before or the store is closed.
    #[error("the state store is closed")]
    Closed,
}

impl StoreError {
    /// The failure as users meet it, with the whole chain of reasons: there is no other place where it is told.
    pub(crate) fn failure(&self) -> Failure {
        let reasons = std::iter::successors(Some(self as &dyn std::error::Error), |error| error.source());
        let detail = reasons.map(ToString::to_string).collect::<Vec<_>>().join(": ");
        match self {
            Self::NameTaken(_) => Failure::new(ErrorCode::NameTaken, detail),
            Self::Open { source, .. } if matches!(**source, Self::FromTheFuture { .. }) => {
                Failure::new(ErrorCode::Internal, detail).with_hint("start the newer program that wrote it")
            }
            _ => Failure::new(ErrorCode::Internal, detail),
        }
    }
}

/// One change of the state.
#[derive(Debug)]
enum Write {
    /// Adds a revision and makes it its function's current one; adds the function where it is new.
    Deploy(Box<RevisionRecord>),
    /// Deletes a function with its revisions.
    Remove(FunctionId),
}

impl Store {
    /// Opens or makes the database in `directory` and reads the current revision of every function. Blocks.
    pub(crate) fn open(directory: &Path) -> Result<(Self, Vec<RevisionRecord>), StoreError> {
        let path = directory.join(FILE_NAME);
        let open = || -> Result<_, StoreError> {
            let flags = OpenFlags::SQLITE_OPEN_READ_WRITE | OpenFlags::SQLITE_OPEN_CREATE | OpenFlags::SQLITE_OPEN_NO_MUTEX;
            let mut connection = Connection::open_with_flags(&path, flags)?;
            connection.pragma_update(None, "journal_mode", "WAL")?;
            connection.pragma_update(None, "synchronous", "FULL")?;
            connection.pragma_update(None, "foreign_keys", true)?;
            migrations::migrate(&mut connection)?;
            let records = load(&connection)?;
            Ok((Self { writer: Writer::spawn(connection)? }, records))
        };
        open().map_err(|source| StoreError::Open { path: path.clone(), source: Box::new(source) })
    }

    /// Adds a revision and makes it current. On disk when this returns.
    pub(crate) async fn deploy(&self, record: RevisionRecord) -> Result<(), StoreError> {
        self.writer.write(Write::Deploy(Box::new(record))).await
    }

    /// Deletes a function with its revisions. On disk when this returns.
    pub(crate) async fn remove(&self, id: FunctionId) -> Result<(), StoreError> {
        self.writer.write(Write::Remove(id)).await
    }
}

/// The current revision of every function, oldest function first.
fn load(connection: &Connection) -> Result<Vec<RevisionRecord>, StoreError> {
    let mut statement = connection.prepare(
        "SELECT r.id, r.digest, r.version, r.spec, r.plan, r.created_at
         FROM functions f JOIN revisions r ON r.id = f.revision ORDER BY f.id",
    )?;
    let mut rows = statement.query(())?;
    let mut records = Vec::new();
    while let Some(row) = rows.next()? {
        records.push(read_record(row)?);
    }
    Ok(records)
}

fn read_record(row: &rusqlite::Row<'_>) -> Result<RevisionRecord, StoreError> {
    let revision: String = row.get(0)?;
    let wrong = |what, why: String| StoreError::Record { what, revision: revision.clone(), why };
    let version: u32 = row.get(2)?;
    if version != RECORD_VERSION {
        return Err(wrong("version", format!("it is {version}, this program knows {RECORD_VERSION}")));
    }
    let (digest, spec, plan, created_at): (String, String, String, String) =
        (row.get(1)?, row.get(3)?, row.get(4)?, row.get(5)?);
    let spec: FunctionSpec = serde_json::from_str(&spec).map_err(|e| wrong("spec", e.to_string()))?;
    Ok(RevisionRecord {
        id: revision.parse().map_err(|e: funtainer_model::IdError| wrong("id", e.to_string()))?,
        digest: digest.parse().map_err(|e: funtainer_model::DigestError| wrong("digest", e.to_string()))?,
        spec: spec.check().map_err(|e| wrong("spec", e.to_string()))?,
        plan: serde_json::from_str(&plan).map_err(|e| wrong("plan", e.to_string()))?,
        created_at: created_at.parse().map_err(|e: jiff::Error| wrong("created_at", e.to_string()))?,
    })
}

#[cfg(test)]
mod tests;

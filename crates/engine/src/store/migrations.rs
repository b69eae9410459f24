//! Numbered migrations. The number of the last one that was applied stands in `PRAGMA user_version`.
//! A migration that has been released is never changed: a new one is added.

use rusqlite::Connection;

use super::StoreError;

/// In order; the first brings the schema to version 1.
const MIGRATIONS: &[&str] = &[
    // `version` of a revision is that of its JSON records, see `super::RECORD_VERSION`.
    "CREATE TABLE functions (
        id          INTEGER PRIMARY KEY,
        namespace   TEXT NOT NULL,
        name        TEXT NOT NULL,
        slug        TEXT NOT NULL UNIQUE,
        revision    TEXT NOT NULL REFERENCES revisions (id) DEFERRABLE INITIALLY DEFERRED,
        created_at  TEXT NOT NULL,
        UNIQUE (namespace, name)
    ) STRICT;
    CREATE TABLE revisions (
        id          TEXT NOT NULL PRIMARY KEY,
        function    INTEGER NOT NULL REFERENCES functions (id) ON DELETE CASCADE,
        image       TEXT NOT NULL,
        digest      TEXT NOT NULL,
        version     INTEGER NOT NULL,
        spec        TEXT NOT NULL,
        plan        TEXT NOT NULL,
        created_at  TEXT NOT NULL
    ) STRICT, WITHOUT ROWID;
    CREATE INDEX revisions_by_function ON revisions (function);",
];

/// Brings the database to the newest schema; each step is a transaction of its own.
pub(super) fn migrate(connection: &mut Connection) -> Result<(), StoreError> {
    let found: u32 = connection.pragma_query_value(None, "user_version", |row| row.get(0))?;
    let known = MIGRATIONS.len() as u32;
    if found > known {
        return Err(StoreError::FromTheFuture { found, known });
    }
    for (number, sql) in (1_u32..).zip(MIGRATIONS).skip(found as usize) {
        let transaction = connection.transaction()?;
        transaction.execute_batch(sql)?;
        transaction.pragma_update(None, "user_version", number)?;
        transaction.commit()?;
    }
    Ok(())
}

//! The one thread that writes: group commit.

use std::sync::{Arc, mpsc};
use std::thread::JoinHandle;

use rusqlite::{Connection, ErrorCode as SqlCode, Savepoint, Transaction, params};
use tokio::sync::oneshot;

use super::{RECORD_VERSION, REVISIONS_PER_FUNCTION_MAX, RevisionRecord, StoreError, Write};

/// Most writes in one transaction: bounds how long the first of a burst waits for the last.
const BATCH_MAX: usize = 256;
/// Most writes that wait for the thread; each belongs to a request that waits for it. One more is refused.
const WAITING_MAX: usize = 1_024;

type Acknowledge = oneshot::Sender<Result<(), StoreError>>;

/// The writing thread. Ends, after the writes it has accepted, when it is dropped.
pub(super) struct Writer {
    jobs: Option<mpsc::SyncSender<(Write, Acknowledge)>>,
    thread: Option<JoinHandle<()>>,
}

impl Writer {
    pub(super) fn spawn(connection: Connection) -> Result<Self, StoreError> {
        let (jobs, incoming) = mpsc::sync_channel(WAITING_MAX);
        let thread = std::thread::Builder::new()
            .name("state".to_owned())
            .spawn(move || serve(connection, &incoming))
            .map_err(|_| StoreError::Closed)?;
        Ok(Self { jobs: Some(jobs), thread: Some(thread) })
    }

    /// Hands over one write and waits until it is on disk.
    pub(super) async fn write(&self, write: Write) -> Result<(), StoreError> {
        let (acknowledge, done) = oneshot::channel();
        let jobs = self.jobs.as_ref().ok_or(StoreError::Closed)?;
        jobs.try_send((write, acknowledge)).map_err(|error| match error {
            mpsc::TrySendError::Full(_) => StoreError::Overloaded,
            mpsc::TrySendError::Disconnected(_) => StoreError::Closed,
        })?;
        done.await.map_err(|_| StoreError::Closed)?
    }
}

impl Drop for Writer {
    fn drop(&mut self) {
        drop(self.jobs.take());
        if let Some(thread) = self.thread.take()
            && thread.join().is_err()
        {
            tracing::error!("the thread that writes the state panicked");
        }
    }
}

fn serve(mut connection: Connection, incoming: &mpsc::Receiver<(Write, Acknowledge)>) {
    while let Ok(first) = incoming.recv() {
        let mut batch = vec![first];
        batch.extend(incoming.try_iter().take(BATCH_MAX - 1));
        commit(&mut connection, batch);
    }
    if let Err((_, error)) = connection.close() {
        tracing::error!(%error, "the state was not closed cleanly; it is recovered at the next start");
    }
}

/// Applies all writes of a batch in one transaction and acknowledges each.
fn commit(connection: &mut Connection, batch: Vec<(Write, Acknowledge)>) {
    let (writes, acknowledges): (Vec<_>, Vec<_>) = batch.into_iter().unzip();
    let results = apply_all(connection, &writes).unwrap_or_else(|error| {
        let error = Arc::new(error);
        writes.iter().map(|_| Err(StoreError::Commit(Arc::clone(&error)))).collect()
    });
    for (result, acknowledge) in results.into_iter().zip(acknowledges) {
        // Whoever gave up waiting does not want to know; the write is in the store all the same.
        let _ = acknowledge.send(result);
    }
}

/// The error is that of the whole transaction; a write that fails by itself is rolled back alone and has its own result.
fn apply_all(connection: &mut Connection, writes: &[Write]) -> rusqlite::Result<Vec<Result<(), StoreError>>> {
    let mut transaction = connection.transaction_with_behavior(rusqlite::TransactionBehavior::Immediate)?;
    let mut results = Vec::with_capacity(writes.len());
    for write in writes {
        results.push(apply_alone(&mut transaction, write));
    }
    transaction.commit()?;
    Ok(results)
}

fn apply_alone(transaction: &mut Transaction<'_>, write: &Write) -> Result<(), StoreError> {
    let savepoint = transaction.savepoint()?;
    // A savepoint that is dropped uncommitted rolls back.
    match write {
        Write::Deploy(record) => deploy(&savepoint, record)?,
        Write::Remove(id) => {
            let (namespace, name) = (id.namespace.as_str(), id.name.as_str());
            savepoint.execute("DELETE FROM functions WHERE namespace = ?1 AND name = ?2", params![namespace, name])?;
        }
    }
    savepoint.commit()?;
    Ok(())
}

fn deploy(savepoint: &Savepoint<'_>, record: &RevisionRecord) -> Result<(), StoreError> {
    let id = &record.spec.id;
    let slug = id.slug();
    let revision = record.id.to_string();
    let created_at = record.created_at.to_string();
    let function: i64 = savepoint
        .query_row(
            "INSERT INTO functions (namespace, name, slug, revision, created_at) VALUES (?1, ?2, ?3, ?4, ?5)
             ON CONFLICT (namespace, name) DO UPDATE SET revision = excluded.revision RETURNING id",
            params![id.namespace.as_str(), id.name.as_str(), slug.as_str(), revision, created_at],
            |row| row.get(0),
        )
        .map_err(|error| match error {
            rusqlite::Error::SqliteFailure(reason, _) if reason.code == SqlCode::ConstraintViolation => {
                StoreError::NameTaken(slug.clone())
            }
            other => StoreError::Sql(other),
        })?;
    let json = |what, text: serde_json::Result<String>| {
        text.map_err(|error| StoreError::Record { what, revision: revision.clone(), why: error.to_string() })
    };
    savepoint.execute(
        "INSERT INTO revisions (id, function, image, digest, version, spec, plan, created_at)
         VALUES (?1, ?2, ?3, ?4, ?5, ?6, ?7, ?8)",
        params![
            revision,
            function,
            record.spec.image.to_string(),
            record.digest.to_string(),
            RECORD_VERSION,
            json("spec", serde_json::to_string(&record.spec))?,
            json("plan", serde_json::to_string(&record.plan))?,
            created_at,
        ],
    )?;
    savepoint.execute(
        "DELETE FROM revisions WHERE function = ?1 AND id NOT IN
         (SELECT id FROM revisions WHERE function = ?1 ORDER BY id DESC LIMIT ?2) AND id <> ?3",
        params![function, REVISIONS_PER_FUNCTION_MAX, revision],
    )?;
    Ok(())
}

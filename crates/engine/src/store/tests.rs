use funtainer_contract::{Readiness, StandardStreams, User};
use funtainer_model::{Contract, Isolation, StopSignal};
use tempfile::TempDir;

use super::*;

fn record(name: &str, number: u8) -> RevisionRecord {
    let id = FunctionId::in_default(name.parse().unwrap());
    let mut spec = FunctionSpec::new(id, "registry.test:5000/a/b:1".parse().unwrap(), Contract::Http);
    spec.env = vec!["A=b=c".parse().unwrap()];
    spec.args = Some(vec!["\u{e9}".to_owned(), String::new()]);
    let plan = StartPlan {
        argv: vec!["/app".to_owned()],
        env: spec.env.clone(),
        working_dir: "/".to_owned(),
        files: Vec::new(),
        listeners: Vec::new(),
        socket_directories: Vec::new(),
        user: User { uid: 1, gid: 2, groups: vec![3] },
        volumes: Vec::new(),
        isolation: Isolation::default(),
        readiness: Readiness::Listening { preferred: 8080.try_into().unwrap() },
        streams: StandardStreams::Log,
        stop_signal: StopSignal::TERM,
        concurrency: 80.try_into().unwrap(),
    };
    let created_at = "2026-01-02T03:04:05.678Z".parse().unwrap();
    let id = RevisionId::from_bytes([number; 16]);
    RevisionRecord { id, digest: Digest::from_sha256([number; 32]), spec, plan, created_at }
}

fn open(directory: &TempDir) -> (Store, Vec<RevisionRecord>) {
    Store::open(directory.path()).unwrap()
}

fn sql(directory: &TempDir, sql: &str) {
    Connection::open(directory.path().join(FILE_NAME)).unwrap().execute_batch(sql).unwrap();
}

fn count(directory: &TempDir, table: &str) -> i64 {
    let connection = Connection::open(directory.path().join(FILE_NAME)).unwrap();
    connection.query_row(&format!("SELECT count(*) FROM {table}"), (), |row| row.get(0)).unwrap()
}

#[tokio::test]
async fn what_was_acknowledged_is_there_after_a_crash() {
    let directory = tempfile::tempdir().unwrap();
    let (store, found) = open(&directory);
    assert_eq!(found, []);
    for number in 0..3 {
        store.deploy(record("f", number)).await.unwrap();
    }
    store.deploy(record("g", 9)).await.unwrap();
    store.deploy(record("h", 10)).await.unwrap();
    store.remove(record("h", 0).spec.id).await.unwrap();
    // Neither closed nor checkpointed: only what is on disk counts.
    std::mem::forget(store);
    assert_eq!(open(&directory).1, [record("f", 2), record("g", 9)]);
    assert_eq!(count(&directory, "revisions"), 4, "the revisions of a removed function go with it");
}

#[tokio::test]
async fn writes_of_a_burst_share_transactions_and_one_that_fails_fails_alone() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(&directory);
    let burst = (0..200_u8).map(|number| store.deploy(record(&format!("f{}", number % 50), number)));
    for result in futures_util::future::join_all(burst).await {
        result.unwrap();
    }
    // The same slug as another function's, made by hand: such names are refused earlier.
    sql(&directory, "UPDATE functions SET slug = 'x' WHERE name = 'f0'");
    let (taken, fine) = tokio::join!(store.deploy(record("x", 201)), store.deploy(record("y", 202)));
    assert!(matches!(taken, Err(StoreError::NameTaken(_))), "{taken:?}");
    assert_eq!(taken.unwrap_err().failure().code, ErrorCode::NameTaken);
    fine.unwrap();
    drop(store);
    let (_, found) = open(&directory);
    assert_eq!(found.len(), 51);
    assert!(found.iter().all(|record| record.spec.id.name.as_str() != "x"));
}

#[tokio::test]
async fn old_revisions_are_kept_up_to_a_bound() {
    let directory = tempfile::tempdir().unwrap();
    let (store, _) = open(&directory);
    for number in 0..30 {
        store.deploy(record("f", number)).await.unwrap();
    }
    drop(store);
    assert_eq!(count(&directory, "revisions"), i64::from(REVISIONS_PER_FUNCTION_MAX));
    assert_eq!(open(&directory).1, [record("f", 29)]);
}

#[test]
fn migrations_are_applied_once_and_a_newer_schema_is_left_alone() {
    let directory = tempfile::tempdir().unwrap();
    drop(open(&directory));
    drop(open(&directory));
    sql(&directory, "PRAGMA user_version = 99");
    let error = Store::open(directory.path()).map(|_| ()).unwrap_err();
    let failure = error.failure();
    assert!(failure.detail.contains("schema 99"), "{failure}");
    assert!(failure.hint.contains("newer"), "{}", failure.hint);
}

#[tokio::test]
async fn records_that_cannot_be_read_are_named() {
    let directory = tempfile::tempdir().unwrap();
    let check = |change: &str, what: &str| {
        sql(&directory, change);
        let error = Store::open(directory.path()).map(|_| ()).unwrap_err();
        let detail = error.failure().detail;
        assert!(detail.contains(what) && detail.contains(&record("f", 1).id.to_string()), "{detail}");
    };
    let (store, _) = open(&directory);
    store.deploy(record("f", 1)).await.unwrap();
    drop(store);
    check("UPDATE revisions SET version = 2", "version");
    check("UPDATE revisions SET version = 1, spec = '{'", "spec");
}

#[test]
fn what_is_no_database_is_said() {
    let directory = tempfile::tempdir().unwrap();
    std::fs::write(directory.path().join(FILE_NAME), "not a database, but long enough to be looked at as one".repeat(100))
        .unwrap();
    let error = Store::open(directory.path()).map(|_| ()).unwrap_err();
    assert!(matches!(error, StoreError::Open { .. }));
    assert!(error.failure().detail.contains(FILE_NAME));
    assert!(Store::open(&directory.path().join("missing")).is_err());
}

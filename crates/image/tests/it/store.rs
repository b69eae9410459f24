//! What the store does with damage, crashes and a committer that fails.

use std::fs::{self, File};
use std::io;
use std::sync::Arc;

use funtainer_image::{CommitLayer, ImageStore, PullPolicy, StoreError};
use funtainer_model::{ErrorCode, LayerId};
use futures_util::FutureExt;
use futures_util::future::BoxFuture;

use crate::liar::{Liar, Served};
use crate::support::{Store, layer, sha256};

/// Has no place for layers.
struct Refuses;

impl CommitLayer for Refuses {
    fn commit(&self, _: LayerId, _: File) -> BoxFuture<'_, io::Result<()>> {
        async { Err(io::Error::from(io::ErrorKind::StorageFull)) }.boxed()
    }
}

fn liar() -> (Liar, Served) {
    let image = Served::new(&layer("a", 1000));
    let served = image.clone();
    (Liar::start(move |asked| served.answer(asked)), image)
}

#[tokio::test(flavor = "multi_thread")]
async fn damaged_blobs_are_fetched_again() {
    let ((liar, image), store) = (liar(), Store::new());
    let name = liar.reference();
    let pulled = store.pull(&name).await.unwrap();
    for (blob, damage) in [(&image.manifest, &b""[..]), (&image.config, b"{}")] {
        let path = store.dir.path().join("blobs/sha256").join(sha256(blob).hex());
        fs::write(&path, damage).unwrap();
        assert_eq!(store.images.get(&name, pulled.digest).await.unwrap(), None);
        assert_eq!(store.images.images().await.unwrap()[0].size, None);
        assert_eq!(store.pull(&name).await.unwrap(), pulled);
        assert_eq!(&fs::read(&path).unwrap(), blob);
    }
    fs::remove_file(store.dir.path().join("layers").join(pulled.layers[0].file_name())).unwrap();
    assert_eq!(store.images.get(&name, pulled.digest).await.unwrap(), None);
    assert_eq!(store.pull(&name).await.unwrap(), pulled);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_new_store_sweeps_and_remembers() {
    let ((liar, _), store) = (liar(), Store::new());
    let name = liar.reference();
    let pulled = store.pull(&name).await.unwrap();
    let tmp = store.dir.path().join("tmp");
    fs::write(tmp.join("half"), "x").unwrap();
    fs::create_dir_all(tmp.join("import/blobs")).unwrap();
    fs::write(tmp.join("import/blobs/half"), "x").unwrap();
    let reopened = ImageStore::open(store.dir.path(), store.linker.clone()).unwrap();
    assert_eq!(store.files("tmp"), [""; 0]);
    assert_eq!(reopened.get(&name, pulled.digest).await.unwrap(), Some(pulled.clone()));
    let named = reopened.images().await.unwrap();
    assert_eq!((&named[0].reference, named[0].record.digest, named[0].size), (&name, pulled.digest, Some(pulled.size)));

    fs::write(store.dir.path().join("names.json"), "{").unwrap();
    let error = ImageStore::open(store.dir.path(), store.linker.clone()).err().unwrap();
    assert!(matches!(error, StoreError::Names { .. }), "{error}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_commit_that_fails_leaves_no_name_and_no_file() {
    let (liar, _) = liar();
    let dir = tempfile::tempdir().unwrap();
    let images = ImageStore::open(dir.path(), Arc::new(Refuses)).unwrap();
    let failure = images.pull(&liar.reference(), PullPolicy::FromRegistry, &|_| ()).await.unwrap_err().failure();
    assert_eq!(failure.code, ErrorCode::Internal);
    assert!(failure.detail.contains(".base.erofs cannot be committed"), "{failure:?}");
    assert_eq!(fs::read_dir(dir.path().join("tmp")).unwrap().count(), 0);
    assert_eq!(images.images().await.unwrap(), []);
}

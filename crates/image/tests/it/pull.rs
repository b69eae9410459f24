//! Pulls from the real registry.

use std::sync::Mutex;

use funtainer_image::{Progress, PullPolicy};
use funtainer_model::ErrorCode;
use serde_json::json;

use crate::support::{Layout, Registry, Store, digest_of, layer, named, on_platform, sha256};

#[tokio::test(flavor = "multi_thread")]
async fn an_image_is_pulled_whole_and_only_once() {
    let (registry, store) = (Registry::start(), Store::new());
    let layers = [layer("bin/app", 3_000_000), layer("etc/data", 100_000)];
    registry.push(&Layout::of(&layers), "team/app:v1", &[]);
    let name = registry.reference("team/app:v1");
    let events = Mutex::new(Vec::new());
    let image = store.images.pull(&name, PullPolicy::FromRegistry, &|event| events.lock().unwrap().push(event)).await.unwrap();

    assert_eq!(image.reference, name);
    assert_eq!(image.config.cmd, ["/bin/app"]);
    assert_eq!(image.config.env[0].to_string(), "A=b");
    let diff_ids: Vec<_> = image.layers.iter().map(|layer| (layer.diff_id, layer.base)).collect();
    assert_eq!(diff_ids, [(sha256(&layers[0]), true), (sha256(&layers[1]), false)]);
    assert!(image.size > 3_000_000);
    assert_eq!(store.files("tmp"), [""; 0]);
    assert_eq!(store.files("layers").len(), 2);
    let events = events.into_inner().unwrap();
    assert_eq!(events[0], Progress::Resolved { digest: image.digest });
    let steps = events.iter().filter(|event| matches!(event, Progress::LayerReceived { .. })).count();
    assert!(steps >= 4, "three megabytes and one small layer: {events:?}");
    assert_eq!(events.iter().filter(|event| matches!(event, Progress::LayerStored { .. })).count(), 2);

    // The second time everything is here; by its digest it is found without the registry.
    drop(registry);
    assert_eq!(store.images.get(&name, image.digest).await.unwrap().unwrap(), image);
    let pinned = name.with_digest(image.digest);
    assert_eq!(store.pull(&pinned).await.unwrap().layers, image.layers);
    assert_eq!(store.linker.committed.lock().unwrap().len(), 2);
    let names = store.images.images().await.unwrap();
    assert!(names.iter().all(|named| named.size == Some(image.size) && !named.record.imported));
    assert!(names.iter().map(|named| &named.reference).eq([&pinned, &name]), "{names:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn dockers_formats_and_plain_layers_are_read() {
    let (registry, store) = (Registry::start(), Store::new());
    let layout = Layout::of(&[layer("a", 1000), layer("b", 1000)]);
    registry.push(&layout, "docker:1", &["--format", "v2s2"]);
    let image = store.pull(&registry.reference("docker:1")).await.unwrap();
    assert_eq!(image.layers.len(), 2);
    let by_name = registry.reference("docker:1").to_string().replace("127.0.0.1", "localhost");
    assert_eq!(store.pull(&by_name.parse().unwrap()).await.unwrap().digest, image.digest);
    // The same layers under another manifest: nothing is fetched again.
    registry.push(&layout, "oci:1", &["--format", "oci"]);
    let other = store.pull(&registry.reference("oci:1")).await.unwrap();
    assert_eq!(image.layers, other.layers);
    assert_ne!(image.digest, other.digest);
    assert_eq!(store.linker.committed.lock().unwrap().len(), 2);
}

#[tokio::test(flavor = "multi_thread")]
async fn the_form_for_this_machine_is_chosen() {
    let (registry, store) = (Registry::start(), Store::new());
    let layout = Layout::new();
    let arch = if cfg!(target_arch = "aarch64") { "arm64" } else { "amd64" };
    let (mine, other) =
        (layout.image(&[layer("mine", 10)], arch, &json!({})), layout.image(&[layer("other", 10)], "s390x", &json!({})));
    let index = json!({
        "schemaVersion": 2, "mediaType": "application/vnd.oci.image.index.v1+json",
        "manifests": [on_platform(other.clone(), "linux", "s390x"), on_platform(mine.clone(), "linux", arch)],
    });
    let index = layout.blob("application/vnd.oci.image.index.v1+json", index.to_string().as_bytes());
    layout.index(&[named(index.clone(), "latest")]);
    registry.push(&layout, "multi:1", &["--all"]);
    let image = store.pull(&registry.reference("multi:1")).await.unwrap();
    assert_eq!(image.digest, digest_of(&mine));
    let by_index = registry.reference("multi:1").with_digest(digest_of(&index));
    assert_eq!(store.pull(&by_index).await.unwrap().digest, digest_of(&mine));
    let by_other = registry.reference("multi:1").with_digest(digest_of(&other));
    assert_eq!(store.pull(&by_other).await.unwrap_err().failure().code, ErrorCode::ImagePlatform);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_is_not_there_is_said() {
    let registry = Registry::start();
    let store = Store::new();
    registry.push(&Layout::of(&[layer("a", 10)]), "app:1", &[]);
    for missing in ["nothing:1", "app:2"] {
        let failure = store.pull(&registry.reference(missing)).await.unwrap_err().failure();
        assert_eq!(failure.code, ErrorCode::ImageUnknown, "{failure:?}");
        assert!(failure.detail.contains(missing) && failure.detail.contains("unknown"), "{failure:?}");
    }
    let gone = registry.reference("app:1");
    drop(registry);
    let failure = store.pull(&gone).await.unwrap_err().failure();
    assert_eq!(failure.code, ErrorCode::RegistryUnavailable);
    assert!(failure.detail.contains("refused"), "{failure:?}");
    assert_eq!(store.files("layers"), [""; 0]);
    assert_eq!(store.images.images().await.unwrap(), []);
}

#[tokio::test(flavor = "multi_thread")]
async fn pulls_at_once_fetch_each_layer_once() {
    let (registry, store) = (Registry::start(), Store::new());
    let layers = [layer("a", 2_000_000), layer("b", 500_000), layer("c", 500_000), layer("d", 500_000)];
    registry.push(&Layout::of(&layers), "one:1", &[]);
    registry.push(&Layout::of(&layers), "two:1", &[]);
    let names: Vec<_> = ["one:1", "two:1", "one:1", "two:1", "one:1"].iter().map(|name| registry.reference(name)).collect();
    let images = futures_util::future::try_join_all(names.iter().map(|name| store.pull(name))).await.unwrap();
    assert!(images.iter().all(|image| image.layers == images[0].layers));
    assert_eq!(store.linker.committed.lock().unwrap().len(), layers.len());
    assert_eq!(store.files("tmp"), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_in_zstd_are_read() {
    let (registry, store) = (Registry::start(), Store::new());
    let layers = [layer("a", 3_000_000), layer("b", 1000)];
    registry.push(&Layout::of(&layers), "zstd:1", &["--format", "oci", "--dest-compress-format", "zstd"]);
    let image = store.pull(&registry.reference("zstd:1")).await.unwrap();
    assert_eq!(image.layers.iter().map(|layer| layer.diff_id).collect::<Vec<_>>(), layers.map(|tar| sha256(&tar)));
    // Otherwise the registry was given something else.
    let manifest = store
        .files("blobs/sha256")
        .into_iter()
        .map(|name| std::fs::read_to_string(store.dir.path().join("blobs/sha256").join(name)).unwrap());
    assert!(manifest.into_iter().any(|text| text.contains("tar+zstd")));
}

#[tokio::test(flavor = "multi_thread")]
async fn layers_get_the_form_that_those_below_ask_for() {
    let (registry, store) = (Registry::start(), Store::new());
    let lower = {
        let mut builder = tar::Builder::new(Vec::new());
        let mut header = tar::Header::new_ustar();
        header.set_entry_type(tar::EntryType::Directory);
        header.set_mode(0o1777);
        header.set_size(0);
        builder.append_data(&mut header, "tmp", &[][..]).unwrap();
        builder.into_inner().unwrap()
    };
    let upper = layer("tmp/x", 1000);
    registry.push(&Layout::of(&[lower.clone(), upper.clone()]), "over:1", &[]);
    // The same layer where nothing is below it, and where that is as it should be.
    registry.push(&Layout::of(std::slice::from_ref(&upper)), "alone:1", &[]);
    registry.push(&Layout::of(&[layer("tmp/y", 10), upper.clone()]), "fits:1", &[]);

    let over = store.pull(&registry.reference("over:1")).await.unwrap();
    let mode = |image| store.images.rootfs(image).unwrap().stat("tmp").unwrap().mode;
    assert_eq!((over.layers.len(), mode(&over)), (2, 0o1777));
    assert_ne!(over.layers[1].diff_id, sha256(&upper), "another form");
    assert_eq!(store.images.rootfs(&over).unwrap().stat("tmp/x").unwrap().size, 1000);
    assert_eq!(store.pull(&registry.reference("over:1")).await.unwrap(), over);
    assert_eq!(store.images.get(&over.reference, over.digest).await.unwrap().unwrap(), over);
    assert_eq!(store.linker.committed.lock().unwrap().len(), 3);

    let fits = store.pull(&registry.reference("fits:1")).await.unwrap();
    assert_eq!((fits.layers[1].diff_id, mode(&fits)), (sha256(&upper), 0o755));
    let alone = store.pull(&registry.reference("alone:1")).await.unwrap();
    assert_eq!((alone.layers[0].base, mode(&alone)), (true, 0o755));
    assert_eq!(store.linker.committed.lock().unwrap().len(), 5);
    assert_eq!(store.files("tmp"), [""; 0]);

    // A store that was opened anew knows them, too; an import gets the same.
    let archive = Layout::of(&[lower, upper]).archive();
    let other = Store::new();
    let pieces = futures_util::stream::iter([Ok(bytes::Bytes::from(archive))]);
    let name = "over:1".parse().unwrap();
    let imported = other.images.import(pieces, Some(&name), &|_| ()).await.unwrap();
    assert_eq!(imported[0].layers, over.layers);
}

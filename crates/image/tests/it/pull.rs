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

//! Archives: those of the tools in use, and hostile ones.

use std::process::Command;
use std::{fs, io};

use bytes::Bytes;
use funtainer_image::{Image, ImageError, PullPolicy};
use funtainer_model::{ErrorCode, ImageRef};
use futures_util::{StreamExt, stream};
use serde_json::{Value, json};

use crate::support::{Layout, Registry, Store, digest_of, gzip, layer, named, on_platform, run, sha256};

async fn import(store: &Store, archive: &[u8], name: Option<&str>) -> Result<Vec<Image>, ImageError> {
    let name = name.map(|name| name.parse::<ImageRef>().unwrap());
    // Pieces that fit no block of a tar.
    let pieces = archive.chunks(10_007).map(|piece| Ok(Bytes::copy_from_slice(piece)));
    store.images.import(stream::iter(pieces), name.as_ref(), &|_| ()).await
}

/// A tar of files in the order given.
fn tar_of(files: &[(&str, &[u8])]) -> Vec<u8> {
    let mut builder = tar::Builder::new(Vec::new());
    for (path, content) in files {
        let mut header = tar::Header::new_ustar();
        header.set_size(content.len() as u64);
        header.set_mode(0o644);
        builder.append_data(&mut header, path, *content).unwrap();
    }
    builder.into_inner().unwrap()
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layout_is_imported_and_used_without_a_registry_until_it_is_pulled() {
    let (registry, store) = (Registry::start(), Store::new());
    let layout = Layout::new();
    let image = layout.image(&[layer("bin/app", 200_000)], "amd64", &json!({"Entrypoint": ["/bin/app"]}));
    let name = registry.reference("app:1");
    layout.index(&[named(image.clone(), &name.to_string())]);
    let images = import(&store, &layout.archive(), None).await.unwrap();
    assert_eq!(images.len(), 1);
    assert_eq!((&images[0].reference, images[0].digest), (&name, digest_of(&image)));
    assert_eq!(images[0].config.entrypoint, ["/bin/app"]);
    assert_eq!(store.files("tmp"), [""; 0]);
    let rootfs = store.images.rootfs(&images[0]).unwrap();
    assert_eq!(rootfs.stat("bin/app").unwrap().size, 200_000);

    // The registry has nothing of that name, so who asks it fails.
    let deployed = store.images.pull(&name, PullPolicy::PreferImported, &|_| ()).await.unwrap();
    assert_eq!(deployed, images[0]);
    assert_eq!(store.images.resolve(&name, PullPolicy::PreferImported).await.unwrap(), images[0].digest);
    assert_eq!(store.pull(&name).await.unwrap_err().failure().code, ErrorCode::ImageUnknown);
    assert!(store.images.images().await.unwrap()[0].record.imported);

    registry.push(&Layout::of(&[layer("bin/other", 10)]), "app:1", &[]);
    assert_eq!(store.images.pull(&name, PullPolicy::IfMissing, &|_| ()).await.unwrap(), deployed);
    let pulled = store.pull(&name).await.unwrap();
    assert_ne!(pulled.digest, deployed.digest);
    let again = store.images.pull(&name, PullPolicy::PreferImported, &|_| ()).await.unwrap();
    assert_eq!(again.digest, pulled.digest, "a pull replaces what was imported");
    assert!(!store.images.images().await.unwrap()[0].record.imported);
    drop(registry);
    assert_eq!(store.images.pull(&name, PullPolicy::IfMissing, &|_| ()).await.unwrap(), pulled);
    let failure = store.images.pull(&name, PullPolicy::PreferImported, &|_| ()).await.unwrap_err().failure();
    assert_eq!(failure.code, ErrorCode::RegistryUnavailable, "other tags are resolved each time");
}

#[tokio::test(flavor = "multi_thread")]
async fn the_archives_of_the_tools_in_use_are_read() {
    let dir = tempfile::tempdir().unwrap();
    let layout = Layout::of(&[layer("a", 1000), layer("b", 1000)]);
    let from = format!("oci:{}:latest", layout.path().display());
    let check = async |format: &str, reference: &str, name: Option<&str>, expect: &str| {
        let file = dir.path().join(format!("{format}.tar"));
        let to = format!("{format}:{}:{reference}", file.display());
        let _ = fs::remove_file(&file);
        run(Command::new("skopeo").args(["--insecure-policy", "copy", "--quiet", &from, &to]));
        for packed in [false, true] {
            let store = Store::new();
            let bytes = fs::read(&file).unwrap();
            let bytes = if packed { gzip(&bytes) } else { bytes };
            let images = import(&store, &bytes, name).await.unwrap();
            assert_eq!(images.len(), 1);
            assert_eq!(images[0].reference.to_string(), expect);
            assert_eq!(images[0].config.cmd, ["/bin/app"]);
            assert_eq!(store.images.rootfs(&images[0]).unwrap().stat("b").unwrap().size, 1000);
        }
    };
    check("oci-archive", "example.org/a/b:1", None, "example.org/a/b:1").await;
    check("oci-archive", "1", Some("c"), "docker.io/library/c:latest").await;
    check("docker-archive", "example.org/a/b:1", None, "example.org/a/b:1").await;
    check("docker-archive", "example.org/a/b:1", Some("c:2"), "docker.io/library/c:2").await;
}

/// `docker save` before version 25: layers in directories, a layer that occurs twice as a symbolic link to the first.
#[tokio::test(flavor = "multi_thread")]
async fn archives_of_older_dockers_are_read() {
    let (tar, other) = (layer("a", 1000), layer("b", 1000));
    let diff_ids = [&tar, &other, &tar].map(|tar| sha256(tar));
    let config = json!({
        "architecture": "amd64", "os": "linux", "config": {"Cmd": ["a"]}, "rootfs": {"type": "layers", "diff_ids": diff_ids},
    });
    let config = config.to_string();
    let [first, second, third] = [1_u8, 2, 3].map(|n| sha256(&[n]).hex());
    let config_path = format!("{}.json", sha256(config.as_bytes()).hex());
    let layers = [&first, &second, &third].map(|hex| format!("{hex}/layer.tar"));
    let manifest = json!([{"Config": config_path, "RepoTags": ["a/b:1", "a/b:2"], "Layers": layers}]);
    let mut builder = tar::Builder::new(Vec::new());
    let mut link = tar::Header::new_gnu();
    link.set_entry_type(tar::EntryType::Symlink);
    link.set_size(0);
    builder.append_link(&mut link, &layers[2], format!("../{first}/layer.tar")).unwrap();
    let mut archive = builder.into_inner().unwrap();
    archive.truncate(archive.len() - 1024);
    archive.extend(tar_of(&[
        (&config_path, config.as_bytes()),
        ("repositories", b"{}"),
        (&format!("{first}/VERSION"), b"1.0"),
        (&layers[0], &tar),
        (&layers[1], &other),
        ("manifest.json", manifest.to_string().as_bytes()),
    ]));
    let store = Store::new();
    let images = import(&store, &archive, None).await.unwrap();
    let names: Vec<_> = images.iter().map(|image| image.reference.to_string()).collect();
    assert_eq!(names, ["docker.io/a/b:1", "docker.io/a/b:2"]);
    // Of the layer that occurs twice only the upper occurrence is mounted.
    let layers: Vec<_> = images[0].layers.iter().map(|layer| (layer.diff_id, layer.base)).collect();
    assert_eq!(layers, [(diff_ids[1], true), (diff_ids[0], false)]);
    assert_eq!(import(&store, &archive, Some("c")).await.unwrap()[0].digest, images[0].digest);
}

#[tokio::test(flavor = "multi_thread")]
async fn what_umoci_makes_is_imported() {
    let dir = tempfile::tempdir().unwrap();
    let (layout, bundle) = (dir.path().join("layout"), dir.path().join("bundle"));
    let (image, umoci) = (format!("{}:v1", layout.display()), || Command::new("umoci"));
    run(umoci().args(["init", "--layout"]).arg(&layout));
    run(umoci().args(["new", "--image", &image]));
    run(umoci().args(["unpack", "--image", &image]).arg(&bundle));
    fs::write(bundle.join("rootfs/hello"), "hello").unwrap();
    run(umoci().args(["repack", "--image", &image]).arg(&bundle));
    run(umoci().args(["config", "--config.cmd", "/hello", "--config.exposedports", "80/tcp", "--image", &image]));
    let mut builder = tar::Builder::new(Vec::new());
    builder.append_dir_all(".", &layout).unwrap();
    let archive = builder.into_inner().unwrap();

    let store = Store::new();
    let failure = import(&store, &archive, None).await.unwrap_err().failure();
    assert_eq!(failure.code, ErrorCode::BadImageReference);
    assert!(failure.detail.contains("only the tag 'v1'") && failure.hint.contains("--name"), "{failure:?}");
    let images = import(&store, &archive, Some("hello:1")).await.unwrap();
    assert_eq!(images[0].config.exposed_ports[0].get(), 80);
    assert_eq!(store.images.rootfs(&images[0]).unwrap().read_file("hello", 10).unwrap(), b"hello");
}

#[tokio::test(flavor = "multi_thread")]
async fn many_images_keep_their_names_and_forms_are_chosen() {
    let layout = Layout::new();
    let one = layout.image(&[layer("one", 10)], "amd64", &json!({}));
    let two = layout.image(&[layer("two", 10)], "amd64", &json!({}));
    let other = layout.image(&[layer("other", 10)], "s390x", &json!({}));
    layout.index(&[
        on_platform(named(other.clone(), "a/one:1"), "linux", "s390x"),
        on_platform(named(one.clone(), "a/one:1"), "linux", "amd64"),
        named(two.clone(), "a/two:1"),
    ]);
    let store = Store::new();
    let images = import(&store, &layout.archive(), None).await.unwrap();
    let digests: Vec<_> = images.iter().map(|image| image.digest).collect();
    assert_eq!(digests, [digest_of(&one), digest_of(&two)]);
    let failure = import(&store, &layout.archive(), Some("b")).await.unwrap_err().failure();
    assert!(failure.detail.contains("a/one:1, a/two:1"), "{failure:?}");
    layout.index(&[on_platform(named(other, "a/one:1"), "linux", "s390x")]);
    let failure = import(&store, &layout.archive(), None).await.unwrap_err().failure();
    assert_eq!(failure.code, ErrorCode::ImagePlatform, "{failure:?}");
    assert!(failure.detail.contains("linux/s390x"), "{failure:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn archives_that_cannot_be_used_say_why_and_leave_nothing() {
    let good = || {
        let layout = Layout::new();
        let image = layout.image(&[layer("a", 1000)], "amd64", &json!({}));
        layout.index(&[named(image.clone(), "a/b:1")]);
        (layout, image)
    };
    let check = async |archive: &[u8], code: ErrorCode, text: &str| {
        let store = Store::new();
        let failure = import(&store, archive, None).await.unwrap_err().failure();
        assert_eq!(failure.code, code, "{failure:?}");
        assert!(failure.detail.contains(text), "{text}: {failure:?}");
        assert_eq!((store.files("tmp"), store.files("layers"), store.files("blobs/sha256")), Default::default(), "{text}");
        assert_eq!(store.images.images().await.unwrap(), []);
    };
    let (layout, image) = good();
    let whole = layout.archive();
    check(b"", ErrorCode::ImageInvalid, "neither an OCI image layout").await;
    check(&[0; 1024], ErrorCode::ImageInvalid, "neither an OCI image layout").await;
    check(&[7; 2000], ErrorCode::ImageInvalid, "tar").await;
    check(&whole[..whole.len() / 2], ErrorCode::ImageInvalid, "too early").await;
    check(&gzip(&whole)[..500], ErrorCode::ImageInvalid, "cannot be read").await;
    check(b"\x28\xb5\x2f\xfd....", ErrorCode::ImageUnsupported, "zstd").await;
    check(b"PK\x03\x04....", ErrorCode::ImageUnsupported, "zip").await;
    check(&tar_of(&[("hello", b"x")]), ErrorCode::ImageInvalid, "index.json").await;
    let version = tar_of(&[("oci-layout", br#"{"imageLayoutVersion":"9"}"#), ("index.json", b"{}")]);
    check(&version, ErrorCode::ImageInvalid, "version '9'").await;
    let damaged = tar_of(&[("oci-layout", br#"{"imageLayoutVersion":"1.0.0"}"#), ("index.json", b"{")]);
    check(&damaged, ErrorCode::ImageInvalid, "index.json").await;

    let blob = |digest: &str| layout.path().join("blobs/sha256").join(digest.strip_prefix("sha256:").unwrap());
    let manifest: Value = serde_json::from_slice(&fs::read(blob(image["digest"].as_str().unwrap())).unwrap()).unwrap();
    for (descriptor, wanted_by) in
        [(&manifest["layers"][0], "blobs/sha256/"), (&manifest["config"], "blobs/sha256/"), (&image, "index.json")]
    {
        let path = blob(descriptor["digest"].as_str().unwrap());
        let content = fs::read(&path).unwrap();
        let mut wrong = content.clone();
        wrong[20] ^= 1;
        fs::write(&path, &wrong).unwrap();
        let hex = path.file_name().unwrap().to_str().unwrap();
        // Layers are verified by who writes them, and so in other words.
        let is_layer = std::ptr::eq(descriptor, &raw const manifest["layers"][0]);
        let code = if is_layer { ErrorCode::DigestMismatch } else { ErrorCode::ImageInvalid };
        check(&layout.archive(), code, &sha256(&wrong).to_string()).await;
        fs::remove_file(&path).unwrap();
        check(&layout.archive(), ErrorCode::ImageInvalid, &format!("names blobs/sha256/{hex}, which is not in the archive"))
            .await;
        check(&layout.archive(), ErrorCode::ImageInvalid, wanted_by).await;
        fs::write(&path, content).unwrap();
    }
    layout.index(&[named(image.clone(), "UPPER/x")]);
    check(&layout.archive(), ErrorCode::BadImageReference, "UPPER").await;
    layout.index(&[image]);
    check(&layout.archive(), ErrorCode::BadImageReference, "no full name").await;
    layout.index(&[]);
    check(&layout.archive(), ErrorCode::ImageInvalid, "lists no images").await;
}

#[tokio::test(flavor = "multi_thread")]
async fn a_stream_that_breaks_or_is_cancelled_leaves_nothing() {
    let (archive, store) = (Layout::of(&[layer("a", 500_000)]).archive(), Store::new());
    let half = || stream::iter([Ok(Bytes::copy_from_slice(&archive[..archive.len() / 2]))]);
    let broken = half().chain(stream::iter([Err(io::Error::from(io::ErrorKind::BrokenPipe))]));
    let failure = store.images.import(broken, None, &|_| ()).await.unwrap_err().failure();
    assert_eq!(failure.code, ErrorCode::BadRequest, "{failure:?}");
    assert_eq!(store.files("tmp"), [""; 0]);

    let stalled = half().chain(stream::pending());
    tokio::select! {
        result = store.images.import(stalled, None, &|_| ()) => panic!("the stream stalls: {result:?}"),
        () = async { while store.files("tmp").is_empty() { tokio::task::yield_now().await } } => {}
    }
    store.wait_for_empty_tmp();
}

#[tokio::test(flavor = "multi_thread")]
async fn paths_of_an_archive_lead_nowhere() {
    let (layout, victim) = (Layout::of(&[layer("a", 10)]), tempfile::tempdir().unwrap());
    let target = victim.path().join("index.json");
    let mut builder = tar::Builder::new(layout.archive());
    builder.get_mut().truncate(0);
    let mut append = |path: &str, kind: tar::EntryType, link: Option<&str>, content: &[u8]| {
        let mut header = tar::Header::new_gnu();
        header.set_entry_type(kind);
        header.set_size(content.len() as u64);
        header.set_mode(0o777);
        header.as_gnu_mut().unwrap().name[..path.len()].copy_from_slice(path.as_bytes());
        if let Some(link) = link {
            header.set_link_name(link).unwrap();
        }
        header.set_cksum();
        builder.append(&header, content).unwrap();
    };
    let outside = victim.path().to_str().unwrap();
    append("blobs", tar::EntryType::Symlink, Some(outside), b"");
    append("index.json", tar::EntryType::Symlink, Some(target.to_str().unwrap()), b"");
    append("../../index.json", tar::EntryType::Regular, None, b"x");
    append(target.to_str().unwrap(), tar::EntryType::Regular, None, b"x");
    append("oci-layout", tar::EntryType::Symlink, Some("oci-layout"), b"");
    append("manifest.json", tar::EntryType::Link, Some("/etc/passwd"), b"");
    let archive = builder.into_inner().unwrap();
    let store = Store::new();
    let failure = import(&store, &archive, Some("a")).await.unwrap_err().failure();
    assert_eq!(failure.code, ErrorCode::ImageInvalid, "{failure:?}");
    assert_eq!(fs::read_dir(victim.path()).unwrap().count(), 0);
    assert_eq!(store.files("tmp"), [""; 0]);
}

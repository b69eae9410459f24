use proptest::prelude::*;
use serde_json::{Value, json};

use super::*;

fn platform() -> Platform {
    Platform { os: "linux".to_owned(), architecture: "amd64".to_owned(), variant: None }
}

fn digest(n: u8) -> String {
    Digest::from_sha256([n; 32]).to_string()
}

fn descriptor(media_type: &str, size: u64) -> Value {
    json!({"mediaType": media_type, "digest": digest(1), "size": size})
}

fn manifest() -> Value {
    json!({
        "schemaVersion": 2, "mediaType": OCI_MANIFEST, "config": descriptor(OCI_CONFIG, 10),
        "layers": [descriptor("application/vnd.oci.image.layer.v1.tar+gzip", 20)],
    })
}

fn index(platforms: &[(&str, &str)]) -> Value {
    let entries = platforms.iter().enumerate().map(|(n, (os, architecture))| {
        let platform = json!({"os": os, "architecture": architecture});
        json!({"mediaType": OCI_MANIFEST, "digest": digest(n as u8), "size": 1, "platform": platform})
    });
    json!({"schemaVersion": 2, "mediaType": OCI_INDEX, "manifests": entries.collect::<Vec<_>>()})
}

fn config(inner: &Value) -> Value {
    json!({
        "architecture": "amd64", "os": "linux", "config": inner, "history": [{"created_by": "x", "empty_layer": true}],
        "rootfs": {"type": "layers", "diff_ids": [digest(2)]},
    })
}

/// The document with a member set to another value.
fn with(mut document: Value, pointer: &str, value: Value) -> Value {
    let (parent, key) = pointer.rsplit_once('/').unwrap();
    match document.pointer_mut(parent).unwrap() {
        Value::Array(array) => array[key.parse::<usize>().unwrap()] = value,
        other => other[key] = value,
    }
    document
}

fn code(result: Result<impl std::fmt::Debug, ManifestError>) -> ErrorCode {
    result.unwrap_err().failure("image").code
}

#[test]
fn the_formats_of_docker_and_oci_are_read() {
    let check = |media_type: &str, config: &str, layer: &str, compression| {
        let text = json!({
            "schemaVersion": 2, "mediaType": media_type, "config": descriptor(config, 10), "layers": [descriptor(layer, 20)],
        });
        let Document::Manifest(parsed) = Document::parse(text.to_string().as_bytes(), Some(media_type)).unwrap() else {
            panic!("{text}")
        };
        let digest = Digest::from_sha256([1; 32]);
        assert_eq!(parsed.config, Descriptor { digest, size: 10 });
        assert_eq!(parsed.layers, [LayerBlob { digest, size: 20, compression }]);
    };
    check(OCI_MANIFEST, OCI_CONFIG, "application/vnd.oci.image.layer.v1.tar", Compression::None);
    check(OCI_MANIFEST, OCI_CONFIG, "application/vnd.oci.image.layer.v1.tar+gzip", Compression::Gzip);
    check(DOCKER_MANIFEST, DOCKER_CONFIG, "application/vnd.docker.image.rootfs.diff.tar.gzip", Compression::Gzip);
    check(DOCKER_MANIFEST, DOCKER_CONFIG, "application/vnd.docker.image.rootfs.diff.tar", Compression::None);
}

#[test]
fn the_format_is_known_by_what_is_inside_and_outside() {
    let parse = |document: &Value, content_type| Document::parse(document.to_string().as_bytes(), content_type);
    let bare = |mut document: Value| {
        document.as_object_mut().unwrap().remove("mediaType");
        document
    };
    for content_type in [None, Some(OCI_MANIFEST), Some("application/json"), Some("text/plain; charset=utf-8"), Some("")] {
        assert!(matches!(parse(&manifest(), content_type).unwrap(), Document::Manifest(_)), "{content_type:?}");
        assert!(matches!(parse(&bare(manifest()), content_type).unwrap(), Document::Manifest(_)), "{content_type:?}");
    }
    let with_parameter = format!("{OCI_INDEX}; charset=utf-8");
    assert!(matches!(parse(&bare(index(&[])), Some(&with_parameter)).unwrap(), Document::Index(_)));
    assert!(matches!(parse(&bare(index(&[])), None).unwrap(), Document::Index(_)));
    let error = parse(&manifest(), Some(OCI_INDEX)).unwrap_err();
    assert!(matches!(error, ManifestError::MediaTypes { .. }), "{error}");
    assert!(parse(&bare(manifest()), Some(OCI_INDEX)).is_err());
}

#[test]
fn hostile_documents_are_refused() {
    use ErrorCode::{ImageInvalid, ImageUnsupported};
    let layer = "application/vnd.oci.image.layer.v1.tar+gzip";
    let check = |document: Value, expect: ErrorCode| {
        let text = document.to_string();
        assert_eq!(code(Document::parse(text.as_bytes(), None)), expect, "{text}");
    };
    check(json!({}), ImageInvalid);
    check(json!([]), ImageInvalid);
    check(json!({"schemaVersion": 1, "name": "a", "fsLayers": []}), ImageUnsupported);
    check(with(manifest(), "/mediaType", json!("application/vnd.docker.distribution.manifest.v1+prettyjws")), ImageUnsupported);
    check(with(manifest(), "/schemaVersion", json!(3)), ImageInvalid);
    check(with(manifest(), "/schemaVersion", json!(-1)), ImageInvalid);
    check(with(manifest(), "/manifests", json!([])), ImageInvalid);
    check(with(index(&[]), "/layers", json!([])), ImageInvalid);
    check(with(index(&[]), "/mediaType", json!(OCI_MANIFEST)), ImageInvalid);
    check(with(manifest(), "/mediaType", json!("text/html")), ImageUnsupported);
    check(with(manifest(), "/config/mediaType", json!("application/vnd.cncf.helm.config.v1+json")), ImageUnsupported);
    check(with(manifest(), "/config/size", json!(CONFIG_BYTES_MAX + 1)), ImageInvalid);
    check(with(manifest(), "/config/size", json!(-1)), ImageInvalid);
    check(with(manifest(), "/config/size", json!(1.5)), ImageInvalid);
    check(with(manifest(), "/config/digest", json!("sha256:../../../etc/passwd")), ImageInvalid);
    check(with(manifest(), "/config/digest", json!(format!("sha512:{}", "a".repeat(128)))), ImageInvalid);
    check(with(manifest(), "/config/digest", json!(digest(171).to_uppercase())), ImageInvalid);
    check(with(manifest(), "/layers", json!([])), ImageInvalid);
    check(with(manifest(), "/layers", json!(null)), ImageInvalid);
    check(with(manifest(), "/layers", json!(vec![descriptor(layer, 1); LAYERS_MAX + 1])), ImageInvalid);
    check(with(manifest(), "/layers/0/size", json!(LAYER_BYTES_MAX + 1)), ImageInvalid);
    check(with(manifest(), "/layers/0/size", json!(u64::MAX)), ImageInvalid);
    for unsupported in [
        "application/vnd.oci.image.layer.v1.tar+xz",
        "application/vnd.oci.image.layer.nondistributable.v1.tar+gzip",
        "application/vnd.docker.image.rootfs.foreign.diff.tar.gzip",
        "application/octet-stream",
    ] {
        check(with(manifest(), "/layers/0/mediaType", json!(unsupported)), ImageUnsupported);
    }
    check(with(index(&[("linux", "amd64")]), "/manifests/0/size", json!(MANIFEST_BYTES_MAX + 1)), ImageInvalid);
    check(with(index(&[]), "/manifests", json!(vec![descriptor(OCI_MANIFEST, 1); INDEX_ENTRIES_MAX + 1])), ImageInvalid);
}

#[test]
fn layers_say_how_they_are_packed() {
    for (media_type, expect) in [
        ("application/vnd.oci.image.layer.v1.tar", Compression::None),
        ("application/vnd.docker.image.rootfs.diff.tar.gzip", Compression::Gzip),
        ("application/vnd.oci.image.layer.v1.tar+zstd", Compression::Zstd),
        ("application/vnd.docker.image.rootfs.diff.tar.zstd", Compression::Zstd),
    ] {
        let document = with(manifest(), "/layers/0/mediaType", json!(media_type));
        let Ok(Document::Manifest(manifest)) = Document::parse(document.to_string().as_bytes(), None) else { panic!() };
        assert_eq!(manifest.layers[0].compression, expect, "{media_type}");
    }
}

#[test]
fn hostile_bytes_are_refused() {
    let check = |bytes: &[u8]| assert_eq!(code(Document::parse(bytes, None)), ErrorCode::ImageInvalid);
    check(b"");
    check(b"\xff\xfe");
    check(b"{\"schemaVersion\":2,");
    check("[".repeat(100_000).as_bytes());
    check(format!("{{\"schemaVersion\":2,\"x\":{}", "[".repeat(100_000)).as_bytes());
    check(&vec![b' '; MANIFEST_BYTES_MAX as usize + 1]);
    // A member that comes twice is read differently by different programs.
    let twice = manifest().to_string().replacen('{', "{\"layers\":[],", 1);
    check(twice.as_bytes());
    let after = format!("{} {{}}", manifest());
    check(after.as_bytes());
}

#[test]
fn the_entry_for_this_machine_is_chosen() {
    let choose = |platforms: &[(&str, &str)]| {
        let text = index(platforms).to_string();
        let Document::Index(index) = Document::parse(text.as_bytes(), None).unwrap() else { panic!("{text}") };
        index.choose(&platform()).map(|entry| entry.descriptor.digest.as_bytes()[0])
    };
    assert_eq!(choose(&[("linux", "arm64"), ("linux", "amd64"), ("linux", "amd64")]).unwrap(), 1);
    assert_eq!(choose(&[("windows", "amd64"), ("unknown", "unknown"), ("linux", "x86_64")]).unwrap(), 2);
    let error = choose(&[("linux", "s390x"), ("unknown", "unknown"), ("windows", "amd64")]).unwrap_err();
    assert_eq!(error.to_string(), "the image has no form for linux/amd64, only for linux/s390x, windows/amd64");
    assert_eq!(code(Err::<(), _>(error)), ErrorCode::ImagePlatform);
    assert!(choose(&[]).is_err());
    // Entries of other kinds are passed over; one that names no platform is the last resort.
    let entries = json!([
        descriptor("application/vnd.example+json", 1),
        {"mediaType": DOCKER_MANIFEST, "digest": digest(7), "size": 1},
        {"mediaType": OCI_MANIFEST, "digest": digest(8), "size": 1, "platform": {"os": "linux", "architecture": "arm"}},
    ]);
    let text = json!({"schemaVersion": 2, "manifests": entries}).to_string();
    let Document::Index(index) = Document::parse(text.as_bytes(), None).unwrap() else { panic!("{text}") };
    assert_eq!(index.choose(&platform()).unwrap().descriptor.digest, Digest::from_sha256([7; 32]));
}

#[test]
fn configurations_become_what_a_start_needs() {
    let text = config(&json!({
        "Env": ["PATH=/bin", "A=b=c", "junk", "=x"], "Entrypoint": ["/e"], "Cmd": ["c", ""], "User": "1:2",
        "WorkingDir": "/w", "ExposedPorts": {"8080/tcp": {}, "53/udp": {}, "80": {}, "0/tcp": {}, "x": {}, "80/TCP": {}},
        "StopSignal": "SIGQUIT", "Volumes": {"/v": {}, "/a": {}}, "Labels": {"k": "v"}, "OnBuild": null, "Healthcheck": {},
    }));
    let parsed = parse_config(text.to_string().as_bytes(), &platform()).unwrap();
    let config = parsed.config;
    assert_eq!(config.env.iter().map(ToString::to_string).collect::<Vec<_>>(), ["PATH=/bin", "A=b=c"]);
    assert_eq!((config.entrypoint, config.cmd), (vec!["/e".to_owned()], vec!["c".to_owned(), String::new()]));
    assert_eq!((config.user.as_str(), config.working_dir.as_str()), ("1:2", "/w"));
    assert_eq!(config.exposed_ports.iter().map(|port| port.get()).collect::<Vec<_>>(), [80, 8080]);
    assert_eq!(config.stop_signal.unwrap().number(), 3);
    assert_eq!(config.volumes, ["/a", "/v"]);
    assert_eq!(config.labels["k"], "v");
    assert_eq!(parsed.diff_ids, [Digest::from_sha256([2; 32])]);
}

#[test]
fn absent_parts_of_a_configuration_are_empty() {
    let nothing = json!({"Env": null, "Cmd": null, "Entrypoint": null, "ExposedPorts": null, "Volumes": null, "Labels": null});
    for inner in [json!(null), json!({}), nothing, json!({"StopSignal": "", "User": ""}), json!({"StopSignal": "FOO"})] {
        let text = config(&inner).to_string();
        assert_eq!(parse_config(text.as_bytes(), &platform()).unwrap().config, ImageConfig::default(), "{text}");
    }
}

#[test]
fn hostile_configurations_are_refused() {
    use ErrorCode::{ImageInvalid, ImagePlatform};
    let check = |document: Value, expect: ErrorCode| {
        let text = document.to_string();
        assert_eq!(code(parse_config(text.as_bytes(), &platform())), expect, "{text}");
    };
    let good = || config(&json!({}));
    check(with(good(), "/os", json!("windows")), ImagePlatform);
    check(with(good(), "/architecture", json!("arm64")), ImagePlatform);
    check(with(good(), "/architecture", json!("")), ImagePlatform);
    check(with(good(), "/rootfs", json!({})), ImageInvalid);
    check(with(good(), "/rootfs/diff_ids", json!(["x"])), ImageInvalid);
    check(with(good(), "/rootfs/diff_ids", json!(vec![digest(1); LAYERS_MAX + 1])), ImageInvalid);
    check(config(&json!({"Cmd": "not a list"})), ImageInvalid);
    for nul in [json!({"Cmd": ["a\0b"]}), json!({"Entrypoint": ["\0"]}), json!({"Env": ["A=\0"]}), json!({"User": "\0"})] {
        check(config(&nul), ImageInvalid);
    }
    check(config(&json!({"WorkingDir": "\0"})), ImageInvalid);
    check(config(&json!({"Volumes": {"/\u{0}": {}}})), ImageInvalid);
    assert_eq!(code(parse_config(&vec![b' '; CONFIG_BYTES_MAX as usize + 1], &platform())), ImageInvalid);
    let Document::Manifest(manifest) = Document::parse(manifest().to_string().as_bytes(), None).unwrap() else { panic!() };
    let two = with(good(), "/rootfs/diff_ids", json!([digest(1), digest(2)])).to_string();
    let error = manifest.parse_config(two.as_bytes(), &platform()).unwrap_err();
    assert_eq!(error.to_string(), "the manifest has 1 layers, the configuration 2");
}

/// Whatever is accepted is within the limits.
fn check_limits(bytes: &[u8]) {
    match Document::parse(bytes, None) {
        Ok(Document::Manifest(manifest)) => {
            assert!((1..=LAYERS_MAX).contains(&manifest.layers.len()));
            assert!(manifest.config.size <= CONFIG_BYTES_MAX);
            assert!(manifest.layers.iter().all(|layer| layer.size <= LAYER_BYTES_MAX));
        }
        Ok(Document::Index(index)) => {
            assert!(index.entries.len() <= INDEX_ENTRIES_MAX);
            let _ = index.choose(&platform());
        }
        Err(error) => drop(error.failure("image")),
    }
    if let Ok(parsed) = parse_config(bytes, &platform()) {
        assert!(parsed.diff_ids.len() <= LAYERS_MAX);
        assert!(!parsed.config.cmd.iter().any(|word| word.contains('\0')));
    }
}

proptest! {
    #[test]
    fn no_bytes_panic(bytes in proptest::collection::vec(any::<u8>(), 0..200)) {
        check_limits(&bytes);
    }

    #[test]
    fn damaged_documents_stay_within_the_limits(
        which in 0_usize..3, at in any::<prop::sample::Index>(), length in 0_usize..20, insert in r#"[\[\]{}",:0-9a-z\\ -]{0,12}"#,
    ) {
        let inner = json!({"Env": ["A=b"], "Cmd": ["c"], "ExposedPorts": {"80/tcp": {}}});
        let mut text = [manifest(), index(&[("linux", "amd64")]), config(&inner)][which].to_string();
        let start = at.index(text.len());
        let end = (start + length).min(text.len());
        text.replace_range(start..end, &insert);
        check_limits(text.as_bytes());
    }
}

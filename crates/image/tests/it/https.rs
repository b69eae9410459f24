//! A registry by name and HTTPS, trusted by the machine's root certificates. Name and certificates are given to a second run of
//! this test in a mount namespace of its own, so that nothing of the machine changes; that needs root.

use std::fs;
use std::process::Command;

use funtainer_model::ErrorCode;

use crate::support::{Layout, Registry, Store, layer, run};

/// Set for the second run: the port of the registry.
const PORT: &str = "FUNTAINER_TEST_HTTPS_PORT";
const NAME: &str = "registry.example";

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_by_https() {
    let Ok(port) = std::env::var(PORT) else { return set_up() };
    let store = Store::new();
    let image = store.pull(&format!("{NAME}:{port}/app:1").parse().unwrap()).await.unwrap();
    assert_eq!(image.layers.len(), 1);
    // The same registry by a name that its certificate does not have.
    let failure = store.pull(&format!("other.example:{port}/app:1").parse().unwrap()).await.unwrap_err().failure();
    assert_eq!(failure.code, ErrorCode::RegistryUnavailable);
    assert!(failure.detail.contains("certificate"), "{failure:?}");
    let failure = store.pull(&"nowhere.invalid/app:1".parse().unwrap()).await.unwrap_err().failure();
    assert_eq!(failure.code, ErrorCode::RegistryUnavailable);
    assert!(failure.detail.contains("nowhere.invalid"), "{failure:?}");
}

fn set_up() {
    let user = run(Command::new("id").arg("-u"));
    assert_eq!(user.trim(), "0", "this test makes a mount namespace, so it needs root");
    let dir = tempfile::tempdir().unwrap();
    let at = |name: &str| dir.path().join(name).display().to_string();
    let subject = [
        "-subj",
        "/CN=registry",
        "-addext",
        &format!("subjectAltName=DNS:{NAME}"),
        "-addext",
        "basicConstraints=critical,CA:FALSE",
        "-days",
        "2",
    ];
    run(Command::new("openssl")
        .args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-keyout", &at("key.pem"), "-out", &at("cert.pem")])
        .args(subject));
    Registry::start_in(dir.path(), "").push(&Layout::of(&[layer("a", 1000)]), "app:1", &[]);
    let tls = format!("  tls:\n    certificate: {}\n    key: {}\n", at("cert.pem"), at("key.pem"));
    let registry = Registry::start_in(dir.path(), &tls);
    fs::write(dir.path().join("hosts"), format!("127.0.0.1 {NAME} other.example\n")).unwrap();
    let script = r#"mount --bind "$1" /etc/hosts && exec "$2" --exact https::a_registry_by_https"#;
    let said = run(Command::new("unshare")
        .args(["--mount", "sh", "-c", script, "sh", &at("hosts")])
        .arg(std::env::current_exe().unwrap())
        .env("SSL_CERT_FILE", at("cert.pem"))
        .env(PORT, registry.reference("app:1").registry().rsplit(':').next().unwrap()));
    assert!(said.contains("1 passed"), "{said}");
}

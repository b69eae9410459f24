//! Registries that want tokens or passwords: the real registry with its own checks.

use std::fs;
use std::path::Path;
use std::process::Command;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::time::{SystemTime, UNIX_EPOCH};

use funtainer_model::ErrorCode;
use serde_json::json;

use crate::liar::{Answer, Liar, Served};
use crate::support::{Layout, Registry, Store, layer, run};

/// Signs tokens as the "Docker Registry v2 authentication" specification wants them (JWT, RFC 7519, RS256 with `x5c`). No
/// package of Debian gives out such tokens, so this stands in for a token service; the registry that checks them is real.
struct Issuer {
    dir: tempfile::TempDir,
}

impl Issuer {
    fn new() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let mut openssl = Command::new("openssl");
        openssl.args(["req", "-x509", "-newkey", "rsa:2048", "-nodes", "-subj", "/CN=issuer", "-days", "2", "-keyout"]);
        run(openssl.arg(dir.path().join("key.pem")).arg("-out").arg(dir.path().join("cert.pem")));
        Self { dir }
    }

    fn certificate(&self) -> std::path::PathBuf {
        self.dir.path().join("cert.pem")
    }

    fn sign(&self, actions: &[&str]) -> String {
        let pem = fs::read_to_string(self.certificate()).unwrap();
        let der: String = pem.lines().filter(|line| !line.starts_with("--")).collect();
        let now = SystemTime::now().duration_since(UNIX_EPOCH).unwrap().as_secs();
        let header = json!({"typ": "JWT", "alg": "RS256", "x5c": [der]});
        let claims = json!({
            "iss": "issuer", "sub": "", "aud": "registry", "jti": "1", "iat": now, "nbf": now - 10, "exp": now + 300,
            "access": [{"type": "repository", "name": "lie", "actions": actions}],
        });
        let signed = format!("{}.{}", base64url(header.to_string().as_bytes()), base64url(claims.to_string().as_bytes()));
        let (input, output) = (self.dir.path().join("input"), self.dir.path().join("output"));
        fs::write(&input, &signed).unwrap();
        run(Command::new("openssl")
            .args(["dgst", "-sha256", "-sign"])
            .arg(self.dir.path().join("key.pem"))
            .arg("-out")
            .arg(&output)
            .arg(&input));
        format!("{signed}.{}", base64url(&fs::read(output).unwrap()))
    }
}

/// RFC 4648 section 5, without padding.
fn base64url(bytes: &[u8]) -> String {
    const ALPHABET: &[u8; 64] = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let mut text = String::new();
    for chunk in bytes.chunks(3) {
        let bits = chunk.iter().fold(0_u32, |bits, byte| bits << 8 | u32::from(*byte)) << (8 * (3 - chunk.len()));
        for at in 0..=chunk.len() {
            text.push(char::from(ALPHABET[(bits >> (18 - 6 * at) & 63) as usize]));
        }
    }
    text
}

/// The real registry's storage, filled without any check of who pushes.
fn filled_registry(data: &Path) {
    let registry = Registry::start_in(data, "");
    registry.push(&Layout::of(&[layer("a", 1000), layer("b", 1000)]), "lie:1", &[]);
}

#[tokio::test(flavor = "multi_thread")]
async fn a_token_is_fetched_once_and_the_registry_takes_it() {
    let data = tempfile::tempdir().unwrap();
    filled_registry(data.path());
    let issuer = Issuer::new();
    let certificate = issuer.certificate();
    let tokens = Liar::start(move |_| {
        let body = json!({"token": issuer.sign(&["pull"]), "expires_in": 300}).to_string();
        Answer::Whole(200, String::new(), body.into_bytes())
    });
    let config = format!(
        "auth:\n  token:\n    realm: http://{}/token?a=b\n    service: registry\n    issuer: issuer\n    rootcertbundle: {}\n",
        tokens.address(),
        certificate.display()
    );
    let registry = Registry::start_in(data.path(), &config);
    let store = Store::new();
    let image = store.pull(&registry.reference("lie:1")).await.unwrap();
    assert_eq!(image.layers.len(), 2);
    let asked = tokens.asked();
    assert_eq!(asked.len(), 1, "{asked:?}");
    assert_eq!(asked[0].path, "/token?a=b&service=registry&scope=repository%3Alie%3Apull");
    assert_eq!(asked[0].authorization, None);

    // The token is for another repository, so the registry asks for another one, and refuses that as well.
    let failure = store.pull(&registry.reference("other:1")).await.unwrap_err().failure();
    assert_eq!(failure.code, ErrorCode::ImageForbidden, "{failure:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_registry_with_passwords_denies() {
    let dir = tempfile::tempdir().unwrap();
    let passwords = dir.path().join("htpasswd");
    fs::write(&passwords, "user:$2y$05$Jd1Wa6.3l5rBqfKmPBx8DuQkGvgHDSxxnVFJwLLXwGpZ.dxUs5B8K\n").unwrap();
    let config = format!("auth:\n  htpasswd:\n    realm: here\n    path: {}\n", passwords.display());
    let registry = Registry::start_in(dir.path(), &config);
    let failure = Store::new().pull(&registry.reference("app:1")).await.unwrap_err().failure();
    assert_eq!(failure.code, ErrorCode::ImageForbidden);
    assert!(failure.detail.contains("authentication required"), "{failure:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn tokens_are_not_sent_elsewhere_and_run_out() {
    let (store, image, count) = (Store::new(), Served::new(&layer("a", 1000)), AtomicUsize::new(0));
    let blobs = image.clone();
    let elsewhere = Liar::start(move |asked| blobs.answer(asked));
    let tokens = Liar::start(move |_| {
        // A lifetime of ten seconds is within the margin: it is over at once.
        let body = format!(r#"{{"access_token":"secret{}","expires_in":10}}"#, count.fetch_add(1, Ordering::Relaxed));
        Answer::Whole(200, String::new(), body.into_bytes())
    });
    let (to, realm) = (elsewhere.address(), tokens.address());
    let liar = Liar::start(move |asked| {
        if asked.authorization.is_none() {
            return Answer::Whole(401, format!("WWW-Authenticate: Bearer realm=\"http://{realm}/\"\r\n"), Vec::new());
        }
        if asked.path.contains("/blobs/") {
            return Answer::Whole(307, format!("Location: http://{to}{}\r\n", asked.path), Vec::new());
        }
        image.answer(asked)
    });
    store.pull(&liar.reference()).await.unwrap();
    assert!(elsewhere.asked().iter().all(|asked| asked.authorization.is_none()), "{:?}", elsewhere.asked());
    assert_eq!(tokens.asked().len(), 4, "one for each of HEAD, manifest, configuration and layer");
    assert!(tokens.asked()[0].path.ends_with("scope=repository%3Alie%3Apull"), "{:?}", tokens.asked());
    assert_eq!(liar.asked().last().unwrap().authorization.as_deref(), Some("Bearer secret3"));
}

#[tokio::test(flavor = "multi_thread")]
async fn realms_that_cannot_be_used_are_refused() {
    let check = async |realm: &'static str, answer: (u16, &'static str), code: ErrorCode, text: &str| {
        let tokens = Liar::start(move |_| Answer::Whole(answer.0, "Retry-After: 0\r\n".to_owned(), answer.1.into()));
        let realm = realm.replace("HERE", &tokens.address().to_string());
        let liar =
            Liar::start(move |_| Answer::Whole(401, format!("WWW-Authenticate: Bearer realm=\"{realm}\"\r\n"), Vec::new()));
        let failure = Store::new().pull(&liar.reference()).await.unwrap_err().failure();
        assert_eq!(failure.code, code, "{failure:?}");
        assert!(failure.detail.contains(text), "{failure:?}");
    };
    let no_token = "sent no token";
    check("http://192.0.2.1/token", (200, ""), ErrorCode::RegistryUnavailable, "without encryption").await;
    check("nonsense", (200, ""), ErrorCode::RegistryUnavailable, "realm is no address").await;
    check("http://HERE/", (200, "{}"), ErrorCode::RegistryUnavailable, no_token).await;
    check("http://HERE/", (200, r#"{"token":""}"#), ErrorCode::RegistryUnavailable, no_token).await;
    check("http://HERE/", (200, r#"{"token":"a\nb"}"#), ErrorCode::RegistryUnavailable, "no header can carry").await;
    check("http://HERE/", (401, ""), ErrorCode::ImageForbidden, "no anonymous token").await;
    check("http://HERE/", (501, ""), ErrorCode::RegistryUnavailable, "status 501").await;
    check("http://HERE/", (200, r#"{"token":"x"}"#), ErrorCode::ImageForbidden, "denies access").await;
}

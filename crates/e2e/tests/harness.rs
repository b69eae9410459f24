//! The tools of the tests do what the tests take for granted: they are tried on real servers that need no container.

use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::process::{Child, Command, Stdio};
use std::time::Duration;

use anyhow::{Result, ensure};
use funtainer_e2e::http::{self, Connection, Endpoint};
use funtainer_e2e::image::{catalog, program};
use funtainer_e2e::load::Load;
use funtainer_e2e::registry::Registry;
use funtainer_e2e::{paths, process, wait};

const LIMIT: Duration = Duration::from_secs(30);

/// A program of the images as a bare process.
struct Bare {
    child: Child,
    address: SocketAddr,
}

impl Bare {
    fn start(program: &std::path::Path) -> Result<Self> {
        let address = TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?;
        let child = Command::new(program).env("PORT", address.port().to_string()).stdout(Stdio::null()).spawn()?;
        let bare = Self { child, address };
        wait::until("the server listens", LIMIT, || Ok(Connection::open(&bare.endpoint()).ok()))?;
        Ok(bare)
    }

    fn endpoint(&self) -> Endpoint {
        Endpoint::Tcp(self.address)
    }
}

impl Drop for Bare {
    fn drop(&mut self) {
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn load_counts_answers_and_sees_a_server_die() -> Result<()> {
    let mut server = Bare::start(&program::hello()?)?;
    let load = Load::start(&server.endpoint(), "/", 4);
    load.more(1000, LIMIT)?;
    server.child.kill()?;
    server.child.wait()?;
    // Answers that were on their way are still counted: one for each connection.
    ensure!(load.more(5, Duration::from_millis(200)).is_err(), "a dead server answers");
    let tally = load.stop();
    ensure!(tally.good() >= 1000 && tally.refused > 0 && tally.failed() >= tally.refused, "{tally:?}");
    ensure!(tally.broken <= 8, "each connection breaks once, before or within a call: {tally:?}");
    Ok(())
}

#[test]
fn the_probe_does_what_its_paths_say() -> Result<()> {
    let server = Bare::start(&program::probe()?)?;
    let get = |path: &str| http::call(&server.endpoint(), "GET", path, &[("X-Mine", "1")], b"");
    ensure!(get("/request?a=b")?.text().starts_with("GET /request?a=b\n") && get("/request")?.text().contains("X-Mine: 1\n"));
    ensure!(http::call(&server.endpoint(), "POST", "/echo", &[], b"body")?.body == b"body");
    ensure!(get("/stream?3,0")?.text() == "line 0\nline 1\nline 2\n");
    ensure!(get("/big?100000")?.body.len() == 100_000);
    ensure!(get("/cut").is_err() && get("/garbage").is_err());
    ensure!(get("/status?418%20Tea")?.status == 418);
    let mut hanging = Connection::open(&server.endpoint())?;
    hanging.send("GET", "/hang", &[], b"")?;
    ensure!(get("/hung-up")?.text() == "0\n");
    drop(hanging);
    wait::until_true("the probe sees its caller go", LIMIT, || Ok(get("/hung-up")?.text() == "1\n"))?;
    ensure!(get("/exit?3").is_err());
    Ok(())
}

#[test]
fn the_registry_serves_what_was_pushed() -> Result<()> {
    let storage = paths::scratch("storage")?;
    let image = catalog::upper()?;
    let reference = {
        let registry = Registry::over(storage.path())?;
        registry.push(&image, "harness/upper", "1")?
    };
    ensure!(
        process::run(
            Command::new("skopeo").args(["inspect", "--tls-verify=false", &format!("docker://{reference}")]),
            b"",
            LIMIT
        )?
        .code()?
            != 0
    );
    // Another process over the same content has it still.
    let registry = Registry::over(storage.path())?;
    let mut inspect = Command::new("skopeo");
    inspect.args(["inspect", "--tls-verify=false", &format!("docker://{}", registry.reference("harness/upper", "1"))]);
    let said: serde_json::Value = serde_json::from_str(&process::succeed(&mut inspect, LIMIT)?)?;
    ensure!(said["Digest"] == image.digest(), "{said}");
    Ok(())
}

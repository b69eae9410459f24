//! The steps of the demo.

use std::io::Write;
use std::process::Command;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use funtainer_e2e::http::{Connection, Response};
use funtainer_e2e::image::{Image, Layer, catalog};
use funtainer_e2e::leak::{Scope, Snapshot, Subject};
use funtainer_e2e::registry::Registry;
use funtainer_e2e::server::{COMMAND_LIMIT, Places, Server};
use funtainer_e2e::{paths, process, wait};

use crate::{go_on, millis, seconds};

/// How long the function stays without calls: short, so that nobody waits for it.
const IDLE: &str = "1s";
/// How long the end of an idle instance is waited for.
const IDLE_LIMIT: Duration = Duration::from_secs(20);

/// All steps, from an image to a clean machine.
pub(crate) fn run() -> Result<()> {
    let home = paths::scratch("demo")?;
    let scope = Scope::create()?;
    let before = Snapshot::take()?;
    let places =
        Places { data: home.path().join("data"), admin: home.path().join("admin.sock"), log: home.path().join("serve.log") };

    let registry = registry()?;
    let hello = image(&registry, "hello", &catalog::hello()?)?;
    let upper = image(&registry, "upper", &catalog::upper()?)?;
    let server = serve(&places, &scope)?;
    let outcome = deploy(&server, &hello)
        .and_then(|()| call(&server))
        .and_then(|()| idle(&server))
        .and_then(|()| commands(&server, &upper));
    if let Err(error) = outcome {
        // Not on the way of an interrupt: nothing is wrong with the server then.
        go_on()?;
        return Err(error.context(format!("the server's log ends with\n{}", funtainer_e2e::server::tail(&places.log))));
    }
    stop(server, &places, &scope, &before)
}

fn registry() -> Result<Registry> {
    title("A registry, and two images in it");
    let start = Instant::now();
    let registry = Registry::start()?;
    shell("docker-registry serve config.yml");
    say(&format!("Debian's registry listens on {} after {}", registry.name(), seconds(start.elapsed())));
    Ok(registry)
}

/// Pushes an image that was made from `examples/`.
fn image(registry: &Registry, name: &str, image: &Image) -> Result<String> {
    go_on()?;
    let reference = registry.reference(name, "1");
    let bytes: u64 = image.layers().iter().map(Layer::size).sum();
    shell(&format!("skopeo copy oci:{name} docker://{reference}"));
    let start = Instant::now();
    process::succeed(&mut registry.push_command(image, &reference), COMMAND_LIMIT)?;
    let kib = bytes.div_ceil(1024);
    say(&format!(
        "examples/{name} as an image: {} layer(s), {kib} KiB, pushed in {}",
        image.layers().len(),
        seconds(start.elapsed())
    ));
    Ok(reference)
}

fn serve(places: &Places, scope: &Scope) -> Result<Server> {
    go_on()?;
    title("The server: one binary, nothing else to install");
    shell(&format!("funtainer serve --listen 127.0.0.1:0 --admin {} --data {}", places.admin.display(), places.data.display()));
    let start = Instant::now();
    let server = Server::start(places, "127.0.0.1:0", Some(scope))?;
    say(&format!("listening on http://{} (after {})", server.address(), millis(start.elapsed())));
    shell(&format!("export FUNTAINER_HOST=unix://{}", places.admin.display()));
    Ok(server)
}

fn deploy(server: &Server, image: &str) -> Result<()> {
    title("A function is the name of an image");
    typed(&mut server.command(["deploy", "hello", "--image", image, "--idle-timeout", IDLE]), b"")?;
    typed(&mut server.command(["list"]), b"")
}

fn call(server: &Server) -> Result<()> {
    title("Called warm, and called cold");
    let mut connection = server.connect()?;
    let url = format!("http://{}/function/hello", server.address());
    request(&mut connection, &url, b"")?;
    let warm = request(&mut connection, &url, b"")?;
    ensure!(!warm.is_cold, "the second call in a row was cold");
    typed(&mut server.command(["scale", "hello", "0"]), b"")?;
    let cold = request(&mut connection, &url, b"you")?;
    ensure!(cold.is_cold, "the first call after `scale hello 0` was not cold");
    say(&format!(
        "warm {}, cold {}: a fresh container, and the answer of the server in it",
        millis(warm.took),
        millis(cold.took)
    ));
    Ok(())
}

fn idle(server: &Server) -> Result<()> {
    title(&format!("Nobody calls: after {IDLE} nothing runs, and the next call wakes it"));
    let start = Instant::now();
    wait::until_true("the idle instance is ended", IDLE_LIMIT, || {
        go_on()?;
        Ok(server.instances("hello")? == 0)
    })?;
    say(&format!("no instance any more, {} after the last call", seconds(start.elapsed())));
    typed(&mut server.command(["list"]), b"")?;
    let mut connection = server.connect()?;
    let woken = request(&mut connection, &format!("http://{}/function/hello", server.address()), b"again")?;
    ensure!(woken.is_cold, "the function was not scaled to zero");
    Ok(())
}

fn commands(server: &Server, image: &str) -> Result<()> {
    title("A command line is a function too: standard input is the call, standard output the answer");
    typed(&mut server.command(["run", image]), b"from the image straight to the shell\n")?;
    typed(&mut server.command(["deploy", "upper", "--image", image, "--contract", "stdio"]), b"")?;
    let mut connection = server.connect()?;
    request(
        &mut connection,
        &format!("http://{}/function/upper", server.address()),
        b"over http, in a fresh container for each call\n",
    )?;
    Ok(())
}

fn stop(server: Server, places: &Places, scope: &Scope, before: &Snapshot) -> Result<()> {
    go_on()?;
    title("Stopped, and nothing is left");
    shell(&format!("kill {}", server.pid()));
    let (start, port) = (Instant::now(), server.address().port());
    let status = server.stop()?;
    ensure!(status.success(), "funtainer serve ended with {status}");
    say(&format!("ended after {}", millis(start.elapsed())));
    let subject = Subject {
        scope: Some(scope),
        data: vec![places.data.clone()],
        admin: vec![places.admin.clone()],
        ports: vec![port],
        own_network: false,
        killed: false,
    };
    let leaks = subject.leaks(before)?;
    if let Some(leak) = leaks.first() {
        bail!("{} thing(s) were left behind, the first: {leak}", leaks.len());
    }
    say("no process, mount, network namespace, control group, socket or temporary file remains");
    Ok(())
}

/// An answered call.
struct Answered {
    took: Duration,
    is_cold: bool,
}

/// Calls a function as curl would, and shows the answer with its times.
fn request(connection: &mut Connection, url: &str, body: &[u8]) -> Result<Answered> {
    go_on()?;
    let path = url.splitn(4, '/').nth(3).context("the URL has a path")?;
    let text = String::from_utf8_lossy(body);
    shell(&if body.is_empty() { format!("curl {url}") } else { format!("curl --data '{}' {url}", text.trim_end()) });
    let method = if body.is_empty() { "GET" } else { "POST" };
    let start = Instant::now();
    let response = connection.call(method, &format!("/{path}"), &[], body)?;
    let took = start.elapsed();
    let response = response.expect(200)?;
    for line in response.text().lines() {
        say(line);
    }
    let phases = phases(&response);
    let is_cold = !phases.is_empty();
    if is_cold {
        say(&format!("cold: {} from request to answer, of which {}", millis(took), phases.join(", ")));
    } else {
        say(&format!("{} from request to answer", millis(took)));
    }
    Ok(Answered { took, is_cold })
}

/// `name 1.23 ms` for each phase of the header Server-Timing; a warm answer has none.
fn phases(response: &Response) -> Vec<String> {
    let header = response.header("server-timing").unwrap_or_default();
    let phase = |entry: &str| {
        let (name, rest) = entry.trim().split_once(';')?;
        let duration = rest.split(';').find_map(|parameter| parameter.trim().strip_prefix("dur="))?;
        Some(format!("{name} {duration} ms"))
    };
    header.split(',').filter_map(phase).collect()
}

/// Runs a command as a user would type it, and shows what it says.
fn typed(command: &mut Command, input: &[u8]) -> Result<()> {
    go_on()?;
    let line = process::describe(command);
    let line = line.split_once(' ').map_or(String::new(), |(_, arguments)| format!("funtainer {arguments}"));
    let text = String::from_utf8_lossy(input);
    shell(&if input.is_empty() { line.clone() } else { format!("echo {} | {line}", text.trim_end()) });
    let finished = process::run(command, input, COMMAND_LIMIT)?;
    for said in finished.out().lines() {
        say(said);
    }
    ensure!(finished.status.success(), "{line}\n{}", finished.err());
    say(&format!("({})", millis(finished.took)));
    Ok(())
}

fn title(text: &str) {
    print(&format!("\n== {text}\n"));
}

fn shell(line: &str) {
    print(&format!("   $ {line}\n"));
}

fn say(line: &str) {
    print(&format!("     {line}\n"));
}

/// A reader who has gone is no failure: what was started is put away all the same.
fn print(text: &str) {
    let mut out = std::io::stdout();
    let _ = out.write_all(text.as_bytes()).and_then(|()| out.flush());
}

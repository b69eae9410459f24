//! The steps of the demo.

use std::io::Write;
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use funtainer_e2e::http::{Connection, Response};
use funtainer_e2e::image::{Image, Layer, catalog};
use funtainer_e2e::leak::{Scope, Snapshot, Subject};
use funtainer_e2e::registry::Registry;
use funtainer_e2e::server::{COMMAND_LIMIT, Places, Server};
use funtainer_e2e::{process, wait};

use crate::who::Who;
use crate::{go_on, millis, seconds};

/// How long the function stays without calls: short, so that nobody waits for it.
const IDLE: &str = "1s";
/// How long the end of an idle instance is waited for.
const IDLE_LIMIT: Duration = Duration::from_secs(20);

/// All steps, from an image to a clean machine, for each way in which this process can run a server.
pub(crate) fn run(sudo: bool) -> Result<()> {
    let registry = registry()?;
    let hello = image(&registry, "hello", &catalog::hello()?)?;
    let upper = image(&registry, "upper", &catalog::upper()?)?;
    for who in Who::all(sudo)? {
        show(&who, &hello, &upper)?;
    }
    Ok(())
}

fn show(who: &Who, hello: &str, upper: &str) -> Result<()> {
    let (_home, places) = who.places()?;
    let scope = who.scope()?;
    let before = Snapshot::take()?;
    let server = serve(who, &places, &scope)?;
    let shown = Shown { who, server };
    let outcome =
        shown.deploy(hello).and_then(|()| shown.call()).and_then(|()| shown.idle()).and_then(|()| shown.commands(upper));
    if let Err(error) = outcome {
        // Not on the way of an interrupt: nothing is wrong with the server then.
        go_on()?;
        return Err(error.context(format!("the server's log ends with\n{}", funtainer_e2e::server::tail(&places.log))));
    }
    stop(shown, &places, &scope, &before)
}

/// A server at work.
struct Shown<'a> {
    who: &'a Who,
    server: Server,
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

fn serve(who: &Who, places: &Places, scope: &Scope) -> Result<Server> {
    go_on()?;
    title(who.title());
    let (admin, data) = (places.admin.display(), places.data.display());
    shell(&format!("{}funtainer serve --listen 127.0.0.1:0 --admin {admin} --data {data}", who.prompt()));
    let start = Instant::now();
    let server = who.serve(places, scope)?;
    for line in std::fs::read_to_string(&places.log)?.lines().filter_map(|line| line.strip_prefix("keeper: ")) {
        say(line);
    }
    say(&format!("listening on http://{} (after {})", server.address(), millis(start.elapsed())));
    shell(&format!("export FUNTAINER_HOST=unix://{}", places.admin.display()));
    Ok(server)
}

impl Shown<'_> {
    fn deploy(&self, image: &str) -> Result<()> {
        title("A function is the name of an image");
        self.typed(&["deploy", "hello", "--image", image, "--idle-timeout", IDLE], b"")?;
        self.typed(&["list"], b"")
    }

    fn call(&self) -> Result<()> {
        title("Called warm, and called cold");
        let mut connection = self.server.connect()?;
        let url = format!("http://{}/function/hello", self.server.address());
        request(&mut connection, &url, b"")?;
        let warm = request(&mut connection, &url, b"")?;
        ensure!(!warm.is_cold, "the second call in a row was cold");
        self.typed(&["scale", "hello", "0"], b"")?;
        let cold = request(&mut connection, &url, b"you")?;
        ensure!(cold.is_cold, "the first call after `scale hello 0` was not cold");
        say(&format!(
            "warm {}, cold {}: a fresh container, and the answer of the server in it",
            millis(warm.took),
            millis(cold.took)
        ));
        Ok(())
    }

    fn idle(&self) -> Result<()> {
        title(&format!("Nobody calls: after {IDLE} nothing runs, and the next call wakes it"));
        let start = Instant::now();
        wait::until_true("the idle instance is ended", IDLE_LIMIT, || {
            go_on()?;
            Ok(self.server.instances("hello")? == 0)
        })?;
        say(&format!("no instance any more, {} after the last call", seconds(start.elapsed())));
        self.typed(&["list"], b"")?;
        let mut connection = self.server.connect()?;
        let woken = request(&mut connection, &format!("http://{}/function/hello", self.server.address()), b"again")?;
        ensure!(woken.is_cold, "the function was not scaled to zero");
        Ok(())
    }

    fn commands(&self, image: &str) -> Result<()> {
        title("A command line is a function too: standard input is the call, standard output the answer");
        self.typed(&["run", image], b"from the image straight to the shell\n")?;
        self.typed(&["deploy", "upper", "--image", image, "--contract", "stdio"], b"")?;
        let mut connection = self.server.connect()?;
        request(
            &mut connection,
            &format!("http://{}/function/upper", self.server.address()),
            b"over http, in a fresh container for each call\n",
        )?;
        Ok(())
    }

    /// Runs a command as a user would type it, and shows what it says.
    fn typed(&self, args: &[&str], input: &[u8]) -> Result<()> {
        go_on()?;
        let mut command = self.who.command(&self.server, args.iter().copied());
        let line = self.who.typed(&command);
        let text = String::from_utf8_lossy(input);
        shell(&if input.is_empty() { line.clone() } else { format!("echo {} | {line}", text.trim_end()) });
        let finished = process::run(&mut command, input, COMMAND_LIMIT)?;
        for said in finished.out().lines() {
            say(said);
        }
        ensure!(finished.status.success(), "{line}\n{}", finished.err());
        say(&format!("({})", millis(finished.took)));
        Ok(())
    }
}

fn stop(shown: Shown<'_>, places: &Places, scope: &Scope, before: &Snapshot) -> Result<()> {
    go_on()?;
    title("Stopped, and nothing is left");
    let Shown { who, server } = shown;
    shell(&format!("{}kill {}", who.prompt(), who.pid(&server)?));
    let (start, port) = (Instant::now(), server.address().port());
    who.stop(server)?;
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
    shell(&format!("{}funtainer reset --yes --data {}", who.prompt(), places.data.display()));
    who.reset(places)
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

//! The server under test: `funtainer serve` with a data directory, an admin socket and a port of its own.

use std::cell::RefCell;
use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{BufRead, BufReader};
use std::net::SocketAddr;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::rc::Rc;
use std::sync::mpsc::{Receiver, channel};
use std::thread;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::Value;

use crate::http::{self, Connection, Endpoint, Response};
use crate::image::Image;
use crate::leak::{Scope, parse};
use crate::process::{Finished, Running};
use crate::user::User;
use crate::{paths, process, wait};

/// How long a server may take until it is ready.
const READY_LIMIT: Duration = Duration::from_secs(30);
/// How long a server may take until it has ended: 10 s of drain and some for the rest.
const STOP_LIMIT: Duration = Duration::from_secs(20);
/// How long a command may take: a pull and a start are in it.
pub const COMMAND_LIMIT: Duration = Duration::from_secs(90);

/// Where a server keeps its things.
#[derive(Debug, Clone)]
pub struct Places {
    /// `--data`.
    pub data: PathBuf,
    /// `--admin`.
    pub admin: PathBuf,
    /// Where its standard error goes; appended to.
    pub log: PathBuf,
}

/// What a server is started with besides.
#[derive(Debug, Clone, Default)]
pub struct Extra {
    /// More flags of `serve`.
    pub flags: Vec<String>,
    /// Commands and their arguments that the server is run by, such as `setpriv`.
    pub wrapper: Vec<String>,
}

/// A server that runs.
pub struct Server {
    child: Child,
    stdout: Receiver<String>,
    address: SocketAddr,
    places: Places,
    program: PathBuf,
    troubles: Troubles,
}

/// What went wrong while servers were stopped at the end of a test.
pub type Troubles = Rc<RefCell<Vec<String>>>;

impl Server {
    /// Starts a server; all its processes belong to `scope`. Returns when it says that it listens.
    pub fn start(places: &Places, listen: &str, scope: Option<&Scope>) -> Result<Self> {
        Self::start_with(places, listen, scope, &Extra::default())
    }

    /// The same with more flags, or by another command.
    pub fn start_with(places: &Places, listen: &str, scope: Option<&Scope>, extra: &Extra) -> Result<Self> {
        let program = paths::funtainer()?;
        let mut words = extra.wrapper.iter().map(OsString::from).chain([program.into_os_string()]);
        let mut command = Command::new(words.next().context("a command has a first word")?);
        command.args(words).args(["serve", "--listen", listen, "--admin"]).arg(&places.admin);
        command.arg("--data").arg(&places.data).args(&extra.flags);
        Self::spawn(&command, places, scope)
    }

    /// Starts the server of an ordinary user at the places that it chooses by itself.
    pub fn start_as(user: &User, listen: &str, scope: Option<&Scope>, flags: &[&str]) -> Result<Self> {
        let places = Places {
            data: user.home().join(".local/share/funtainer"),
            admin: user.runtime().join("funtainer.sock"),
            log: user.home().join("serve.log"),
        };
        let mut command = user.command(user.program());
        command.args(["serve", "--listen", listen]).args(flags);
        Self::spawn(&command, &places, scope)
    }

    /// Starts a server by a command that becomes it, or waits for it, with what it says on its own standard output.
    pub fn spawn(command: &Command, places: &Places, scope: Option<&Scope>) -> Result<Self> {
        let program = paths::funtainer()?;
        let log = File::options().create(true).append(true).open(&places.log)?;
        let mut child = in_scope(command, scope)
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .process_group(0)
            .spawn()
            .with_context(|| format!("cannot start {}", program.display()))?;
        let stdout = lines(child.stdout.take().context("no standard output")?);
        let address = match stdout.recv_timeout(wait::patient(READY_LIMIT)) {
            Ok(line) => line.strip_prefix("listening on http://").and_then(|address| address.parse().ok()),
            Err(_) => None,
        };
        let Some(address) = address else {
            let ended = child.try_wait()?;
            let _ = kill_process(Pid::from_child(&child), Signal::TERM);
            if wait::exited(&mut child, STOP_LIMIT)?.is_none() {
                child.kill()?;
                child.wait()?;
            }
            bail!("funtainer serve is not ready ({ended:?}):\n{}", tail(&places.log));
        };
        Ok(Self { child, stdout, address, places: places.clone(), program, troubles: Troubles::default() })
    }

    /// Where calls go.
    pub fn tcp(&self) -> Endpoint {
        Endpoint::Tcp(self.address)
    }

    /// Where calls go, as an address.
    pub fn address(&self) -> SocketAddr {
        self.address
    }

    /// Where administration goes.
    pub fn admin(&self) -> Endpoint {
        Endpoint::Unix(self.places.admin.clone())
    }

    /// Where it keeps its things.
    pub fn places(&self) -> &Places {
        &self.places
    }

    /// Where troubles at its end are noted.
    pub fn troubles(&self) -> Troubles {
        Rc::clone(&self.troubles)
    }

    /// The keeper's process id.
    pub fn pid(&self) -> i32 {
        Pid::from_child(&self.child).as_raw_nonzero().get()
    }

    /// The daemon's process id: the keeper's child with that title.
    pub fn daemon_pid(&self) -> Result<i32> {
        let keeper = self.pid();
        let daemon = parse::processes()?
            .into_iter()
            .find(|process| process.parent == keeper && process.title.starts_with("funtainer daemon"));
        Ok(daemon.with_context(|| format!("keeper {keeper} has no child with the title 'funtainer daemon'"))?.pid)
    }

    /// The zygote's process id of a function.
    pub fn zygote_pid(&self, function: &str) -> Result<Option<i32>> {
        let (keeper, title) = (self.pid(), format!("funtainer zygote {function}"));
        let found = parse::processes()?.into_iter().find(|process| process.parent == keeper && process.title == title);
        Ok(found.map(|process| process.pid))
    }

    /// A call of a function by TCP.
    pub fn call(&self, method: &str, path: &str, headers: &[(&str, &str)], body: &[u8]) -> Result<Response> {
        http::call(&self.tcp(), method, path, headers, body)
    }

    /// `GET` by TCP, which must be answered with 200.
    pub fn get(&self, path: &str) -> Result<Response> {
        self.call("GET", path, &[], b"")?.expect(200)
    }

    /// A request to the admin API.
    pub fn ask(&self, method: &str, path: &str, body: &[u8]) -> Result<Response> {
        let json = [("Content-Type", "application/json"), ("Accept", "application/json")];
        http::call(&self.admin(), method, path, if body.is_empty() { &json[1..] } else { &json }, body)
    }

    /// A connection for calls.
    pub fn connect(&self) -> Result<Connection> {
        Ok(Connection::open(&self.tcp())?)
    }

    /// What `describe` says of a function.
    pub fn describe(&self, name: &str) -> Result<Value> {
        let said = self.ok(["describe", name])?;
        serde_json::from_str(&said).with_context(|| format!("describe printed no JSON: {said}"))
    }

    /// How many instances a function has.
    pub fn instances(&self, name: &str) -> Result<usize> {
        let described = self.describe(name)?;
        described["instances"].as_array().map(Vec::len).with_context(|| format!("no list of instances in {described}"))
    }

    /// The ids of a function's instances, the oldest first.
    pub fn instance_ids(&self, name: &str) -> Result<Vec<String>> {
        let described = self.describe(name)?;
        let instances = described["instances"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(instances.iter().filter_map(|instance| instance["id"].as_str().map(str::to_owned)).collect())
    }

    /// The host ids of the inits of a function's instances, the oldest first.
    pub fn init_pids(&self, name: &str) -> Result<Vec<i32>> {
        let described = self.describe(name)?;
        let instances = described["instances"].as_array().map(Vec::as_slice).unwrap_or_default();
        Ok(instances.iter().filter_map(|instance| instance["pid"].as_i64()).map(|pid| pid as i32).collect())
    }

    /// A command of the command line that talks to this server.
    pub fn command<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Command {
        let mut command = Command::new(&self.program);
        command.args(args).env("FUNTAINER_HOST", format!("unix://{}", self.places.admin.display()));
        command
    }

    /// Runs a command, however it ends.
    pub fn cli<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<Finished> {
        self.cli_with(args, b"")
    }

    /// Runs a command with something on its standard input.
    pub fn cli_with<'a>(&self, args: impl IntoIterator<Item = &'a str>, input: &[u8]) -> Result<Finished> {
        process::run(&mut self.command(args), input, COMMAND_LIMIT)
    }

    /// Starts a command whose standard input stays open.
    pub fn begin<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<Running> {
        process::start(&mut self.command(args), None)
    }

    /// Runs a command that must succeed and returns its standard output.
    pub fn ok<'a>(&self, args: impl IntoIterator<Item = &'a str>) -> Result<String> {
        process::succeed(&mut self.command(args), COMMAND_LIMIT)
    }

    /// Runs a command that must fail with that exit code and that code of the platform's errors: nothing on standard output, and on standard error
    /// `error[CODE]: ...` followed by a hint. Returns standard error.
    pub fn refused<'a>(&self, args: impl IntoIterator<Item = &'a str>, exit: i32, code: &str) -> Result<String> {
        let mut command = self.command(args);
        let line = process::describe(&command);
        let finished = process::run(&mut command, b"", COMMAND_LIMIT)?;
        let said = finished.err();
        ensure!(finished.code()? == exit, "exit code {}, not {exit}: {line}\n{said}", finished.code()?);
        ensure!(said.contains(&format!("error[{code}]: ")), "no error[{code}] for {line}:\n{said}");
        ensure!(said.lines().any(|line| line.starts_with("hint: ")), "no hint for {line}:\n{said}");
        ensure!(finished.stdout.is_empty(), "an error on standard output for {line}:\n{}", finished.out());
        Ok(said)
    }

    /// Imports an image under a name, from its layout directory.
    pub fn import(&self, image: &Image, name: &str) -> Result<()> {
        let layout = image.layout().display().to_string();
        self.ok(["image", "import", layout.as_str(), "--name", name]).map(drop)
    }

    /// Imports an image and deploys it under the same name, with more flags.
    pub fn deploy(&self, name: &str, image: &Image, flags: &[&str]) -> Result<()> {
        let reference = format!("{name}:test");
        self.import(image, &reference)?;
        let fixed = ["deploy", name, "--image", reference.as_str()];
        self.ok(fixed.into_iter().chain(flags.iter().copied())).map(drop)
    }

    /// Imports an image and deploys it by the admin API, with settings that have no flag.
    pub fn deploy_by_api(&self, name: &str, image: &Image, settings: Value) -> Result<Response> {
        let reference = format!("{name}:test");
        self.import(image, &reference)?;
        let mut request = serde_json::json!({"name": name, "image": reference});
        if let (Some(request), Value::Object(settings)) = (request.as_object_mut(), settings) {
            request.extend(settings);
        }
        self.ask("POST", "/functions", &serde_json::to_vec(&request)?)
    }

    /// Ends the keeper as an operator does, and returns how it ended.
    pub fn stop(mut self) -> Result<ExitStatus> {
        self.end(Signal::TERM)
    }

    /// Ends the keeper with a signal; the standard output must have had its one line only.
    pub fn end(&mut self, signal: Signal) -> Result<ExitStatus> {
        let pid = Pid::from_child(&self.child);
        self.end_by(|| kill_process(pid, signal).with_context(|| format!("cannot send {signal:?} to funtainer serve")))
    }

    /// The same in another way.
    pub fn end_by(&mut self, end: impl FnOnce() -> Result<()>) -> Result<ExitStatus> {
        end()?;
        let Some(status) = wait::exited(&mut self.child, STOP_LIMIT)? else {
            bail!("funtainer serve still runs {STOP_LIMIT:?} after it was to end:\n{}", tail(&self.places.log));
        };
        if let Ok(line) = self.stdout.try_recv() {
            bail!("funtainer serve printed more than one line: {line}");
        }
        Ok(status)
    }

    /// Waits for the keeper to end by itself.
    pub fn ended(&mut self, limit: Duration) -> Result<Option<ExitStatus>> {
        wait::exited(&mut self.child, limit)
    }
}

/// Stops it as an operator does; what goes wrong then is kept for the end of the test.
impl Drop for Server {
    fn drop(&mut self) {
        if !matches!(self.child.try_wait(), Ok(None)) {
            return;
        }
        let trouble = match self.end(Signal::TERM) {
            Ok(status) if status.success() => return,
            Ok(status) => format!("funtainer serve ended with {status} after SIGTERM"),
            Err(error) => format!("{error:#}"),
        };
        let _ = self.child.kill();
        let _ = self.child.wait();
        self.troubles.borrow_mut().push(trouble);
    }
}

/// The same command, whose process and all of whose children belong to the scope.
fn in_scope(command: &Command, scope: Option<&Scope>) -> Command {
    let mut fenced = match scope.and_then(Scope::entrance) {
        None => Command::new(command.get_program()),
        Some(entrance) => {
            // The shell enters the scope and becomes the program, which has its process id then.
            let mut fenced = Command::new("sh");
            fenced.args(["-c", r#"echo $$ > "$0" && exec "$@""#]).arg(entrance).arg(command.get_program());
            fenced
        }
    };
    fenced.args(command.get_args());
    for (name, value) in command.get_envs() {
        match value {
            Some(value) => fenced.env(name, value),
            None => fenced.env_remove(name),
        };
    }
    if let Some(directory) = command.get_current_dir() {
        fenced.current_dir(directory);
    }
    fenced
}

/// The end of a log, for error messages.
pub fn tail(log: &Path) -> String {
    let text = fs::read_to_string(log).unwrap_or_else(|error| format!("({}: {error})", log.display()));
    let lines: Vec<_> = text.lines().collect();
    lines[lines.len().saturating_sub(60)..].join("\n")
}

fn lines(stdout: impl std::io::Read + Send + 'static) -> Receiver<String> {
    let (sender, receiver) = channel();
    thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if sender.send(line).is_err() {
                break;
            }
        }
    });
    receiver
}

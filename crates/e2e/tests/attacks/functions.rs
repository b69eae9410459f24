//! Other functions and the host, by everything that has a name of its own beside files.

use std::io::{BufRead as _, BufReader, Write as _};
use std::net::TcpListener;
use std::os::linux::net::SocketAddrExt as _;
use std::os::unix::net::{SocketAddr, UnixListener};
use std::process::{Child, ChildStdin, Command, Stdio};

use anyhow::{Context, Result, ensure};
use funtainer_e2e::server::Server;
use funtainer_e2e::wait;

use crate::{ATTACKER, LIMIT, Outcome, attack, check_control, hold, inside, outside, with_attacker};

/// A victim that serves under all names until it is dropped.
struct Victim {
    child: Child,
    stdin: Option<ChildStdin>,
}

impl Victim {
    fn start(mut command: Command) -> Result<Self> {
        let mut child = command.stdin(Stdio::piped()).stdout(Stdio::piped()).spawn()?;
        let mut stdout = BufReader::new(child.stdout.take().context("a pipe")?);
        let stdin = child.stdin.take();
        let victim = Self { child, stdin };
        let mut line = String::new();
        stdout.read_line(&mut line)?;
        ensure!(line == "serves\n", "the victim does not serve: {line}");
        // What it says at its end is nobody's concern, but must not block it.
        std::thread::spawn(move || std::io::copy(&mut stdout, &mut std::io::sink()));
        Ok(victim)
    }

    /// Ends it, in order, and waits for that.
    fn end(mut self) -> Result<()> {
        drop(self.stdin.take());
        ensure!(wait::exited(&mut self.child, LIMIT)?.is_some_and(|status| status.success()), "the victim does not end");
        Ok(())
    }
}

impl Drop for Victim {
    fn drop(&mut self) {
        drop(self.stdin.take());
        let _ = self.child.kill();
        let _ = self.child.wait();
    }
}

#[test]
fn names_of_another_function_and_of_the_host() -> Result<()> {
    let id = std::process::id();
    let (name, key) = (format!("attacked-{id}"), 0x0A00_0000 | id);
    let serve = format!("serve={name}:{key}");
    let attacks = [
        attack(format!("abstract={name}")),
        attack(format!("shared-memory={key}")),
        attack(format!("semaphore={key}")),
        attack(format!("message-queue={key}")),
        attack(format!("posix-queue={name}")),
    ];
    with_attacker(|_, server| {
        // Another function, and another instance of the same one.
        let function = Victim::start(server.command(["run", "attacker:1", "--", "--as-is", &serve]))?;
        hold(server, &attacks)?;
        function.end()?;
        // The host, which is the control as well.
        let mut command = Command::new(ATTACKER);
        command.args(["--as-is", &serve]);
        let host = Victim::start(command)?;
        hold(server, &attacks)?;
        check_control(&outside(&mut Command::new(ATTACKER), &attacks)?, &attacks)?;
        host.end()
    })
}

/// Addresses at which the host, the platform or a cloud's metadata server listen.
#[test]
fn ports_of_the_host() -> Result<()> {
    with_attacker(|_, server| {
        let _abstract = UnixListener::bind_addr(&SocketAddr::from_abstract_name(format!("host-{}", std::process::id()))?)?;
        let listener = TcpListener::bind("0.0.0.0:0")?;
        let port = listener.local_addr()?.port();
        let own = addresses()?;
        let mut attacks = vec![attack(format!("abstract=host-{}", std::process::id()))];
        attacks.extend(own.iter().map(|address| attack(format!("connect={address}:{port}"))));
        let beyond = ["169.254.169.254:80", "[fd00:ec2::254]:80", "192.0.0.8:80"];
        let beyond = beyond.map(|address| attack(format!("connect={address}")));
        hold(server, &attacks)?;
        hold(server, &beyond)?;
        let places = [
            attack(format!("connect={}", server.address())),
            attack(format!("unix={}", server.places().admin.display())),
            attack(format!("exists={}", server.places().data.display())),
        ];
        hold(server, &places)?;
        attacks.extend(places);
        check_control(&outside(&mut Command::new(ATTACKER), &attacks)?, &attacks)
    })
}

/// The IPv4 addresses of this machine.
fn addresses() -> Result<Vec<String>> {
    let said = funtainer_e2e::process::succeed(Command::new("ip").args(["-4", "-o", "addr"]), LIMIT)?;
    let addresses = said.lines().filter_map(|line| Some(line.split_whitespace().nth(3)?.split('/').next()?.to_owned()));
    Ok(addresses.collect())
}

/// What pid 1 is sent from inside changes nothing: the instance goes on, and its end is told as it is.
#[test]
fn signals_to_the_init() -> Result<()> {
    with_attacker(|_, server: &Server| {
        hold(server, &[attack("signal-init=200")])?;
        // After it: streams, exit code and the reaping of orphans are as ever.
        let mut child =
            server.command(["run", "attacker:1", "--", "signal-init=20", "signal-init=20"]).stdout(Stdio::piped()).spawn()?;
        let status = wait::exited(&mut child, LIMIT)?.context("the instance does not end")?;
        ensure!(status.success(), "{status}");
        std::io::stdout().flush()?;
        Ok(())
    })
}

/// What the kernel counts by user (signals that wait, message queues) one function can use up for itself, not for another.
#[test]
fn what_is_counted_by_user() -> Result<()> {
    let innocent = [attack("signals=200"), attack("make-queue=innocent")];
    with_attacker(|_, server| {
        let through = |outcomes: &[Outcome]| outcomes.iter().all(|outcome| matches!(outcome, Outcome::Through(_)));
        let greedy = Victim::start(server.command(["run", "attacker:1", "--", "--as-is", "exhaust"]))?;
        let outcomes = inside(server, &[], &innocent)?;
        ensure!(through(&outcomes), "one function's use is another one's: {outcomes:?}");
        greedy.end()?;
        // The control: two processes of one user.
        let user = || {
            let mut command = Command::new("setpriv");
            command.args(["--reuid", "54321", "--regid", "54321", "--clear-groups", "--", ATTACKER]);
            command
        };
        let mut command = user();
        command.args(["--as-is", "exhaust"]);
        let greedy = Victim::start(command)?;
        let outcomes = outside(&mut user(), &innocent)?;
        ensure!(outcomes.iter().all(|outcome| matches!(outcome, Outcome::Held(_))), "{outcomes:?}");
        greedy.end()
    })
}

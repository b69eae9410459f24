//! Whose server the demo shows, and so how it is started, spoken to, ended and cleared away.

use std::path::PathBuf;
use std::process::Command;

use anyhow::{Context, Result, ensure};
use funtainer_e2e::leak::{Scope, parse};
use funtainer_e2e::server::{COMMAND_LIMIT, Places, Server};
use funtainer_e2e::user::{Subordinate, User};
use funtainer_e2e::{paths, process};
use tempfile::TempDir;

/// The ways.
pub(crate) enum Who {
    /// This process is root, and so is the server.
    Root,
    /// This process is an ordinary user, and so is the server.
    Own,
    /// This process is an ordinary user; the server alone is raised.
    Sudo,
    /// This process is root and shows the server of an ordinary user, whom it makes for that.
    User(Box<User>),
}

impl Who {
    /// What this process can show, in order: as root both, as an ordinary user the one that was asked for.
    pub(crate) fn all(sudo: bool) -> Result<Vec<Self>> {
        Ok(match (rustix::process::geteuid().is_root(), sudo) {
            (true, _) => vec![Self::Root, Self::User(Box::new(User::create(Subordinate::Usual)?))],
            (false, true) => vec![Self::Sudo],
            (false, false) => vec![Self::Own],
        })
    }

    /// As a title.
    pub(crate) fn title(&self) -> &'static str {
        match self {
            Self::Root => "The server: one binary, nothing else to install",
            Self::Sudo => "The server, as root: one binary, nothing else to install",
            Self::Own => "The server, without root: one binary, nothing else to install",
            Self::User(_) => "The same without root: an ordinary user's own server",
        }
    }

    /// What goes before commands that are typed for the server.
    pub(crate) fn prompt(&self) -> &'static str {
        match self {
            Self::Sudo => "sudo ",
            Self::Root | Self::Own | Self::User(_) => "",
        }
    }

    /// Around the processes.
    pub(crate) fn scope(&self) -> Result<Scope> {
        match self {
            Self::Root | Self::User(_) => Scope::create(),
            Self::Own | Self::Sudo => Scope::descendants(),
        }
    }

    /// A place for the server's things.
    pub(crate) fn places(&self) -> Result<(TempDir, Places)> {
        let home = paths::scratch("demo")?;
        if let Self::User(user) = self {
            user.give(home.path(), 0o700)?;
        }
        let place = |name: &str| home.path().join(name);
        let places = Places { data: place("data"), admin: place("admin.sock"), log: place("serve.log") };
        Ok((home, places))
    }

    /// Starts the server.
    pub(crate) fn serve(&self, places: &Places, scope: &Scope) -> Result<Server> {
        let mut command = self.raised()?;
        command.args(["serve", "--listen", "127.0.0.1:0", "--admin"]).arg(&places.admin).arg("--data").arg(&places.data);
        let server = Server::spawn(&command, places, Some(scope))?;
        if let Self::Sudo = self {
            // The socket is root's and the group funtainer's, in which this user need not be.
            let owner = rustix::process::geteuid().as_raw().to_string();
            process::succeed(Command::new("sudo").args(["chown", &owner]).arg(&places.admin), COMMAND_LIMIT)?;
        }
        Ok(server)
    }

    /// A command of the command line, typed by who need not be root for it.
    pub(crate) fn command<'a>(&self, server: &Server, args: impl IntoIterator<Item = &'a str>) -> Command {
        match self {
            Self::User(user) => {
                let mut command = user.command(user.program());
                let place = format!("unix://{}", server.places().admin.display());
                command.args(args).env("FUNTAINER_HOST", place);
                command
            }
            Self::Root | Self::Own | Self::Sudo => server.command(args),
        }
    }

    /// A command without what stands before the program that a user types.
    pub(crate) fn typed(&self, command: &Command) -> String {
        let program = match self {
            Self::User(user) => user.program(),
            Self::Root | Self::Own | Self::Sudo => PathBuf::from(command.get_program()),
        };
        let line = process::describe(command);
        let program = program.display().to_string();
        let arguments = line.split_once(&program).map_or(line.as_str(), |(_, arguments)| arguments);
        format!("funtainer{arguments}")
    }

    /// Ends the server as an operator does.
    pub(crate) fn stop(&self, server: Server) -> Result<()> {
        let mut server = server;
        let status = match self {
            Self::Sudo => {
                let keeper = self.pid(&server)?.to_string();
                server.end_by(|| process::succeed(Command::new("sudo").args(["kill", &keeper]), COMMAND_LIMIT).map(drop))?
            }
            Self::Root | Self::Own | Self::User(_) => return stopped(server.stop()?),
        };
        stopped(status)
    }

    /// The keeper's process id.
    pub(crate) fn pid(&self, server: &Server) -> Result<i32> {
        if !matches!(self, Self::Sudo) {
            return Ok(server.pid());
        }
        let mut pending = vec![server.pid()];
        let all = parse::processes()?;
        while let Some(parent) = pending.pop() {
            for child in all.iter().filter(|process| process.parent == parent) {
                if child.title == "funtainer serve" {
                    return Ok(child.pid);
                }
                pending.push(child.pid);
            }
        }
        None.context("sudo has started no funtainer serve")
    }

    /// Removes what the server has kept.
    pub(crate) fn reset(&self, places: &Places) -> Result<()> {
        let mut command = self.raised()?;
        command.args(["reset", "--yes", "--data"]).arg(&places.data);
        process::succeed(&mut command, COMMAND_LIMIT)?;
        ensure!(!places.data.exists(), "{} remains", places.data.display());
        Ok(())
    }

    /// The program, run by who the server is.
    fn raised(&self) -> Result<Command> {
        Ok(match self {
            Self::Root | Self::Own => Command::new(paths::funtainer()?),
            Self::Sudo => {
                let mut command = Command::new("sudo");
                command.arg(paths::funtainer()?);
                command
            }
            Self::User(user) => user.command(user.program()),
        })
    }
}

fn stopped(status: std::process::ExitStatus) -> Result<()> {
    ensure!(status.success(), "funtainer serve ended with {status}");
    Ok(())
}

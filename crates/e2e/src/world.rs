//! The world of one test: made for it, and put away after it whatever happened.

use std::cell::RefCell;
use std::collections::BTreeSet;
use std::path::{Path, PathBuf};
use std::sync::{Condvar, Mutex, PoisonError};

use anyhow::{Context, Result, anyhow, bail, ensure};
use tempfile::TempDir;

use crate::leak::{Scope, Snapshot, Subject};
use crate::network::Own;
use crate::paths;
use crate::server::{Extra, Places, Server, Troubles, tail};
use crate::user::User;

/// Scenarios that run at once: each has a server and some containers, and most of its time it waits.
const SCENARIOS_MAX: usize = 4;

static RUNNING: (Mutex<usize>, Condvar) = (Mutex::new(0), Condvar::new());

/// What a scenario works with.
pub struct World {
    home: TempDir,
    scope: Scope,
    before: Snapshot,
    servers: RefCell<Vec<Served>>,
}

/// A server that was started in this world.
struct Served {
    places: Places,
    port: u16,
    troubles: Troubles,
}

/// Runs a test in a world of its own, with a network namespace of its own; afterwards nothing may be left of it. Servers are local variables of the test: they are stopped at its end
/// by SIGTERM, as an operator would, or were stopped or killed by the test itself.
pub fn scenario(test: impl FnOnce(&World) -> Result<()>) -> Result<()> {
    scenario_in(|| Ok(()), |world, ()| test(world))
}

/// As [`scenario`], with something that belongs to the machine: `prepare` makes it, in the network namespace of the test, and none of it is a leak.
pub fn scenario_in<T>(prepare: impl FnOnce() -> Result<T>, test: impl FnOnce(&World, &T) -> Result<()>) -> Result<()> {
    ensure!(rustix::process::geteuid().is_root(), "this test starts containers: run it as root, as `cargo xtask test` does");
    let _turn = Turn::take();
    // Servers change the network that they are in.
    let _network = Own::enter()?;
    let machine = prepare()?;
    let world =
        World { home: paths::scratch("e2e")?, scope: Scope::create()?, before: Snapshot::take()?, servers: RefCell::default() };
    let outcome = test(&world, &machine);
    let outcome = match outcome {
        Ok(()) => world.check(),
        Err(error) => Err(error),
    };
    outcome.map_err(|error| {
        let said = world.log();
        let killed = world.scope.kill();
        let error = error.context(format!("the servers' log ended with\n{said}\nand the test failed"));
        match killed {
            Ok(()) => error,
            Err(more) => anyhow!("{error:#}\nand its processes cannot be ended: {more:#}"),
        }
    })
}

impl World {
    /// A directory for the test's own files.
    pub fn home(&self) -> &Path {
        self.home.path()
    }

    /// The fence around the processes of this world.
    pub fn scope(&self) -> &Scope {
        &self.scope
    }

    /// The ids of the processes of this world, those in containers with the rest.
    pub fn members(&self) -> Result<BTreeSet<i32>> {
        self.subject().members()
    }

    /// Starts a server with a new data directory on a free port.
    pub fn serve(&self) -> Result<Server> {
        self.serve_at(&self.places(), "127.0.0.1:0")
    }

    /// The same with more flags, or by another command.
    pub fn serve_with(&self, extra: &Extra) -> Result<Server> {
        self.start(&self.places(), "127.0.0.1:0", extra)
    }

    /// Where the next server can keep its things.
    pub fn places(&self) -> Places {
        let number = self.servers.borrow().len();
        let home = self.home.path();
        Places {
            data: home.join(format!("data{number}")),
            admin: home.join(format!("admin{number}.sock")),
            log: home.join("serve.log"),
        }
    }

    /// Starts a server at places that may have been used before.
    pub fn serve_at(&self, places: &Places, listen: &str) -> Result<Server> {
        self.start(places, listen, &Extra::default())
    }

    /// Starts the server of an ordinary user on a free port.
    pub fn serve_as(&self, user: &User) -> Result<Server> {
        self.serve_as_with(user, &[])
    }

    /// The same with more flags.
    pub fn serve_as_with(&self, user: &User, flags: &[&str]) -> Result<Server> {
        Ok(self.watched(Server::start_as(user, "127.0.0.1:0", Some(&self.scope), flags)?))
    }

    fn start(&self, places: &Places, listen: &str, extra: &Extra) -> Result<Server> {
        Ok(self.watched(Server::start_with(places, listen, Some(&self.scope), extra)?))
    }

    fn watched(&self, server: Server) -> Server {
        self.servers.borrow_mut().push(Served {
            places: server.places().clone(),
            port: server.address().port(),
            troubles: server.troubles(),
        });
        server
    }

    /// Whose leaks are looked for: those of every server that was started here.
    pub fn subject(&self) -> Subject<'_> {
        let servers = self.servers.borrow();
        let data: BTreeSet<PathBuf> = servers.iter().map(|served| served.places.data.clone()).collect();
        let admin: BTreeSet<PathBuf> = servers.iter().map(|served| served.places.admin.clone()).collect();
        Subject {
            scope: Some(&self.scope),
            data: data.into_iter().collect(),
            admin: admin.into_iter().collect(),
            ports: servers.iter().map(|served| served.port).collect(),
            own_network: true,
            killed: false,
        }
    }

    /// The state of the machine before the test.
    pub fn before(&self) -> &Snapshot {
        &self.before
    }

    fn check(&self) -> Result<()> {
        for served in &*self.servers.borrow() {
            if let Some(trouble) = served.troubles.borrow().first() {
                bail!("{trouble}");
            }
        }
        let leaks = self.subject().leaks(&self.before).context("the leak check itself failed")?;
        if leaks.is_empty() {
            return Ok(());
        }
        let list: Vec<_> = leaks.iter().map(|leak| format!("  {leak}")).collect();
        bail!("left behind:\n{}", list.join("\n"))
    }

    fn log(&self) -> String {
        let servers = self.servers.borrow();
        servers.first().map_or_else(|| "(no server was started)".to_owned(), |served| tail(&served.places.log))
    }
}

/// One of the scenarios that may run at once.
struct Turn;

impl Turn {
    fn take() -> Self {
        let (count, free) = &RUNNING;
        let mut count = count.lock().unwrap_or_else(PoisonError::into_inner);
        while *count >= SCENARIOS_MAX {
            count = free.wait(count).unwrap_or_else(PoisonError::into_inner);
        }
        *count += 1;
        Self
    }
}

impl Drop for Turn {
    fn drop(&mut self) {
        let (count, free) = &RUNNING;
        *count.lock().unwrap_or_else(PoisonError::into_inner) -= 1;
        free.notify_one();
    }
}

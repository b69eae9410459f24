//! Attacks on the sandbox, each with its control: the same code, run as root where the defence is not, gets through.
//!
//! An attack is a name of the program `attacker` with its argument. [`hold`] runs a list of them inside, as the container's root, once with and
//! once without `no_new_privs`: every one must be held. [`get_through`] runs the same list outside, in namespaces of the test's own so that nothing
//! of the machine is changed: every one must get through, but for those that this machine cannot show, which carry the reason.

mod bombs;
mod calls;
mod escapes;
mod functions;
mod privileges;

use std::ffi::OsStr;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, ensure};
use funtainer_e2e::image::{Compression, Config, Image, Tree};
use funtainer_e2e::process;
use funtainer_e2e::server::Server;
use funtainer_e2e::world::{World, scenario};

/// The program.
const ATTACKER: &str = env!("CARGO_BIN_EXE_attacker");
/// How long a list of attacks may take.
const LIMIT: Duration = Duration::from_secs(90);
/// Namespaces for controls: whatever an attack changes ends with them.
const APART: &str = "unshare --mount --uts --ipc --net --pid --cgroup --fork --kill-child --mount-proc";

/// An attack, by its name and argument.
struct Attack {
    words: String,
    /// Why the control may fail: what this machine may lack, so that the attack has no object.
    lacking: Option<&'static str>,
}

fn attack(words: impl Into<String>) -> Attack {
    Attack { words: words.into(), lacking: None }
}

impl Attack {
    fn may_lack(self, what: &'static str) -> Self {
        Self { lacking: Some(what), ..self }
    }
}

/// What became of an attack.
#[derive(Debug, PartialEq, Eq)]
enum Outcome {
    Through(String),
    Held(String),
}

/// A server with the image `attacker:1`: the program, and what an attack needs to lie around.
fn with_attacker(test: impl FnOnce(&World, &Server) -> Result<()>) -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.import(&image(Tree::new(), &["/attacker"])?, "attacker:1")?;
        test(world, &server)
    })
}

/// The attacker over a tree of the test's, as an image that runs `command`.
fn image(tree: Tree, command: &[&str]) -> Result<Image> {
    image_with(tree, &Config::command(command))
}

fn image_with(tree: Tree, config: &Config) -> Result<Image> {
    let program = Tree::new().directory("tmp", 0o1777)?.directory("mnt", 0o755)?.host_file("attacker", ATTACKER.as_ref())?;
    Image::build(vec![program.layer(Compression::Plain)?, tree.layer(Compression::Plain)?], config)
}

/// Runs attacks inside, with flags of `run`.
fn inside(server: &Server, flags: &[&str], attacks: &[Attack]) -> Result<Vec<Outcome>> {
    let words = attacks.iter().map(|attack| attack.words.as_str());
    let finished = server.cli(["run"].into_iter().chain(flags.iter().copied()).chain(["attacker:1", "--"]).chain(words))?;
    ensure!(finished.code()? == 0, "{finished:?}");
    outcomes(&finished.out(), attacks)
}

/// Every attack must be held, with and without `no_new_privs`: what holds it is not that alone.
fn hold(server: &Server, attacks: &[Attack]) -> Result<()> {
    for flags in [&[][..], &["--no-new-privileges=false"]] {
        for (attack, outcome) in attacks.iter().zip(inside(server, flags, attacks)?) {
            ensure!(matches!(outcome, Outcome::Held(_)), "inside, {} got through: {outcome:?}", attack.words);
        }
    }
    Ok(())
}

/// The control: as root in namespaces of its own, after a script of the test's, every attack must get through.
fn get_through(prepare: &str, attacks: &[Attack]) -> Result<()> {
    let script = format!("{prepare}\nexec \"$0\" \"$@\"");
    let mut command = Command::new("unshare");
    command.args(APART.split(' ').skip(1)).args(["sh", "-e", "-c", &script, ATTACKER]);
    check_control(&outside(&mut command, attacks)?, attacks)
}

fn outside(command: &mut Command, attacks: &[Attack]) -> Result<Vec<Outcome>> {
    command.args(attacks.iter().map(|attack| OsStr::new(&attack.words)));
    let said = process::succeed(command, LIMIT)?;
    outcomes(&said, attacks)
}

fn check_control(outcomes: &[Outcome], attacks: &[Attack]) -> Result<()> {
    for (attack, outcome) in attacks.iter().zip(outcomes) {
        match (outcome, attack.lacking) {
            (Outcome::Through(_), _) => {}
            (Outcome::Held(why), Some(lacking)) => eprintln!("no control for {}: {why} ({lacking})", attack.words),
            (Outcome::Held(why), None) => {
                anyhow::bail!("without a sandbox {} must get through, or the test proves nothing: {why}", attack.words)
            }
        }
    }
    Ok(())
}

/// Reads the attacker's lines; one per attack, in their order.
fn outcomes(said: &str, attacks: &[Attack]) -> Result<Vec<Outcome>> {
    let mut lines = said.lines();
    let read = attacks.iter().map(|attack| {
        let line = lines.next().with_context(|| format!("no line for {} in\n{said}", attack.words))?;
        let rest = line.strip_prefix(&attack.words).with_context(|| format!("no line for {} but {line}", attack.words))?;
        outcome(rest.trim_start()).with_context(|| format!("no outcome: {line}"))
    });
    read.collect()
}

fn outcome(text: &str) -> Option<Outcome> {
    match text.split_once(' ')? {
        ("through", detail) => Some(Outcome::Through(detail.to_owned())),
        ("held", detail) => Some(Outcome::Held(detail.to_owned())),
        _ => None,
    }
}

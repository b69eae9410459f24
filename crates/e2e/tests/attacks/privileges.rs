//! Setuid bits and file capabilities of an image: without effect, unless that is switched off, and then within the bounding set.

use anyhow::{Context, Result, ensure};
use funtainer_e2e::image::{Config, Tree};
use funtainer_e2e::server::Server;

use crate::{ATTACKER, image_with, with_attacker};

/// CHOWN, which is kept, and SYS_ADMIN, which is not (linux/capability.h).
const CHOWN: u64 = 1 << 0;
const SYS_ADMIN: u64 = 1 << 21;
/// All that the container's root may have: `KEPT` of the sandbox.
const KEPT: u64 = 0x8000_05FB;
/// Switches `no_new_privs` off.
const OFF: &str = "--no-new-privileges=false";

/// The effective user, the effective capabilities and the bounding set of a program that an ordinary user starts.
fn started(server: &Server, program: &str, flags: &[&str]) -> Result<(u32, u64, u64)> {
    let run = ["run"].into_iter().chain(flags.iter().copied()).chain([program, "--", "--as-is", "privileges"]);
    let finished = server.cli(run)?;
    ensure!(finished.code()? == 0, "{finished:?}");
    let said = finished.out();
    let after = |name: &str| {
        let words = said.split_whitespace().skip_while(|word| *word != name);
        words.skip(1).map(str::to_owned).collect::<Vec<_>>().into_iter()
    };
    let hexadecimal = |name: &str| u64::from_str_radix(&after(name).next().unwrap_or_default(), 16);
    let user = after("users").nth(1).with_context(|| said.clone())?.parse()?;
    Ok((user, hexadecimal("effective")?, hexadecimal("bounding")?))
}

#[test]
fn no_program_of_an_image_gives_new_privileges_unless_that_is_wanted() -> Result<()> {
    let program = std::fs::read(ATTACKER)?;
    with_attacker(|_, server| {
        let tree = || -> Result<Tree> {
            Tree::new()
                .file("setuid", 0o4755, &program)?
                .capable_file("capable", &program, CHOWN)?
                .capable_file("powerful", &program, SYS_ADMIN)
        };
        for name in ["attacker", "setuid", "capable", "powerful"] {
            let config = Config { user: "1000:1000".to_owned(), ..Config::command(&[&format!("/{name}")]) };
            server.import(&image_with(tree()?, &config)?, &format!("{name}:2"))?;
        }
        for name in ["attacker:2", "setuid:2", "capable:2"] {
            ensure!(started(server, name, &[])? == (1000, 0, KEPT), "{name} has given something");
        }
        ensure!(started(server, "attacker:2", &[OFF])? == (1000, 0, KEPT));
        // The control: the same programs do give what the bounding set holds, which is not the machine's.
        ensure!(started(server, "setuid:2", &[OFF])? == (0, KEPT, KEPT));
        ensure!(started(server, "capable:2", &[OFF])? == (1000, CHOWN, KEPT));
        // What is to have more than there is, is not started at all (capabilities(7), "Safety checking for capability-dumb binaries").
        for flags in [&[][..], &[OFF]] {
            let run = ["run"].into_iter().chain(flags.iter().copied()).chain(["powerful:2", "--", "--as-is", "privileges"]);
            let refused = server.cli(run)?;
            ensure!(refused.code()? >= 125 && refused.stdout.is_empty(), "{refused:?}");
        }
        Ok(())
    })
}

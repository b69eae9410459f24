//! The attacker: what a hostile image would try, one attack by name.
//!
//! `attacker NAME[=ARGUMENT]...` tries each in a process of its own and prints one line for each: the attack as it was named, `through` or
//! `held`, and a detail. An attack that has got what it should not have is through. The tests run it inside, where every attack must be held, and outside as root, where the
//! same code must get through: then it is the sandbox that holds it.
//!
//! `attacker --as-is NAME[=ARGUMENT]` tries one in this very process. `attacker --careless FD-OF ROOT WORKDIR NAME` enters a root as a careless
//! runtime does. Called as the interpreter of a script (`attacker FILE`, with a `/` in front), it says that it is one.

mod bombs;
mod calls;
mod files;
mod kernel;
mod network;
mod processes;

use std::io;
use std::path::Path;
use std::process::{Command, ExitCode};

/// What an attack has got.
pub(crate) type Loot = io::Result<String>;

/// An attack: what it is called, and what it does with its argument.
pub(crate) type Attack = (&'static str, fn(&str) -> Loot);

fn main() -> ExitCode {
    let arguments: Vec<String> = std::env::args().skip(1).collect();
    let arguments: Vec<&str> = arguments.iter().map(String::as_str).collect();
    match arguments[..] {
        ["--as-is", attack] => {
            let (name, argument) = parse(attack);
            report(attack, find(name).and_then(|attack| attack(argument)));
        }
        ["--careless", outside, root, directory, attack] => {
            let (name, argument) = parse(attack);
            let entered = processes::enter_carelessly(Path::new(outside), Path::new(root), directory);
            report(attack, entered.and_then(|_open| find(name)?(argument)));
        }
        [file, ..] if file.starts_with('/') => println!("interpreter through {file} is run by {}", own_name()),
        [] => {
            eprintln!("usage: attacker NAME[=ARGUMENT]...");
            return ExitCode::FAILURE;
        }
        _ => arguments.into_iter().for_each(try_apart),
    }
    ExitCode::SUCCESS
}

fn parse(attack: &str) -> (&str, &str) {
    attack.split_once('=').unwrap_or((attack, ""))
}

fn find(name: &str) -> io::Result<fn(&str) -> Loot> {
    let all = [calls::ATTACKS, files::ATTACKS, network::ATTACKS, processes::ATTACKS, bombs::ATTACKS];
    let found = all.into_iter().flatten().find(|(known, _)| *known == name);
    found.map(|(_, attack)| *attack).ok_or_else(|| io::Error::other(format!("there is no attack '{name}'")))
}

/// In a process of its own, so that one that is killed for it has not ended the others, and none helps the next.
fn try_apart(attack: &str) {
    let output = Command::new("/proc/self/exe").args(["--as-is", attack]).output();
    match output {
        Ok(output) if output.status.success() && !output.stdout.is_empty() => {
            print!("{}", String::from_utf8_lossy(&output.stdout));
        }
        Ok(output) => println!("{attack} held {}", output.status),
        Err(error) => println!("{attack} held {error}"),
    }
}

fn report(attack: &str, loot: Loot) {
    match loot {
        Ok(detail) => println!("{attack} through {detail}"),
        Err(error) => println!("{attack} held {error}"),
    }
}

fn own_name() -> String {
    std::env::args().next().unwrap_or_default()
}

/// For calls that are asked with arguments that do no harm: any answer but a refusal says that they are open.
pub(crate) fn reached(result: io::Result<i64>) -> Loot {
    match result {
        Ok(value) => Ok(format!("answered {value}")),
        Err(error) if [libc::EPERM, libc::EACCES, libc::ENOSYS].map(Some).contains(&error.raw_os_error()) => Err(error),
        Err(error) => Ok(format!("reached: {error}")),
    }
}

/// Loot of a call that must succeed to be any.
pub(crate) fn got(result: io::Result<i64>) -> Loot {
    result.map(|value| format!("returned {value}"))
}

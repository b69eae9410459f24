//! The second disk: what one run brings into the guest, and the script that it runs.

use std::ffi::{OsStr, OsString};
use std::fmt::Write as _;
use std::fs;
use std::os::unix::fs::symlink;
use std::path::{Path, PathBuf};
use std::process::Command;

use anyhow::{Context, Result, ensure};

use super::left_out;
use super::system::succeed;
use crate::build::{self, Tests};

/// Room on the disk for what tests write; its holes take no space.
const DISK: &str = "4G";

/// Parts of the workspace that no test reads.
const LEFT_OUT: [&str; 3] = ["target", "fuzz", ".git"];

const SCRIPTS: [(&str, &str); 3] = [
    ("first.sh", include_str!("first.sh")),
    ("run.sh", include_str!("run.sh")),
    ("guest.service", include_str!("guest.service")),
];

/// Which tests of a package run.
#[derive(Default)]
pub(crate) struct Selection<'a> {
    /// The test programs, by the name of their source file without its extension; `None` for all.
    pub(crate) programs: Option<&'a [&'a str]>,
    /// Only tests whose name contains one of these texts, or which are in a test program of such a name, if there are any.
    pub(crate) filters: &'a [String],
    /// More arguments of the test programs.
    pub(crate) words: &'a [OsString],
}

/// What a run brings.
pub(crate) struct Payload {
    top: PathBuf,
    target: PathBuf,
    /// Host paths, which are the guest's as well.
    brought: Vec<PathBuf>,
    /// Name in the guest's path, and the program.
    installed: Vec<(String, PathBuf)>,
    commands: String,
}

impl Payload {
    /// The workspace without what was built.
    pub(crate) fn new() -> Result<Self> {
        let metadata = build::metadata()?;
        let top = metadata.workspace_root.into_std_path_buf();
        let mut brought = Vec::new();
        for entry in fs::read_dir(&top)? {
            let path = entry?.path();
            if !LEFT_OUT.iter().any(|name| path.file_name() == Some(OsStr::new(name))) {
                brought.push(path);
            }
        }
        let target = metadata.target_directory.into_std_path_buf();
        let commands = format!("code=0\nexport CARGO_TARGET_DIR={}\n", quoted(target.as_os_str())?);
        Ok(Self { top, target, brought, installed: Vec::new(), commands })
    }

    /// Brings a file or a directory with everything in it.
    pub(crate) fn bring(&mut self, path: &Path) -> Result<()> {
        let path = fs::canonicalize(path).with_context(|| format!("cannot bring {}", path.display()))?;
        self.brought.push(path);
        Ok(())
    }

    /// Puts a program into the guest's path.
    pub(crate) fn install(&mut self, name: &str, program: &Path) -> Result<()> {
        ensure!(program.is_file(), "{} is no file", program.display());
        self.installed.push((name.to_owned(), program.to_owned()));
        Ok(())
    }

    /// Where cargo puts what it builds.
    pub(crate) fn target(&self) -> &Path {
        &self.target
    }

    /// Sets a variable of the environment of all that comes after.
    pub(crate) fn set(&mut self, name: &str, value: &str) -> Result<()> {
        writeln!(self.commands, "export {name}={}", quoted(OsStr::new(value))?)?;
        Ok(())
    }

    /// Runs a command in the top of the workspace.
    pub(crate) fn command(&mut self, words: &[OsString]) -> Result<()> {
        let words = words.iter().map(|word| quoted(word)).collect::<Result<Vec<_>>>()?.join(" ");
        writeln!(self.commands, "cd {} || exit 1\n{words} || code=$?", quoted(self.top.as_os_str())?)?;
        Ok(())
    }

    /// Builds a package's tests and runs them as `cargo test --no-fail-fast` does, but for [`left_out`].
    pub(crate) fn tests(&mut self, package: &str, selection: &Selection<'_>) -> Result<()> {
        let Tests { directory, programs, helpers } = build::tests(package)?;
        let name = |source: &Path| source.file_stem().and_then(OsStr::to_str).unwrap_or_default().to_owned();
        let named: Vec<_> =
            programs.iter().map(|(source, _)| name(source)).filter(|name| selection.filters.contains(name)).collect();
        let texts: Vec<_> = selection.filters.iter().filter(|text| !named.contains(text)).collect();
        let chosen = |source: &Path| match selection.programs {
            Some(listed) => listed.contains(&name(source).as_str()),
            None if texts.is_empty() && !named.is_empty() => named.contains(&name(source)),
            None => left_out::of(package, source).all(|left_out| left_out.test.is_some()),
        };
        let programs: Vec<_> = programs.into_iter().filter(|(source, _)| chosen(source)).collect();
        ensure!(!programs.is_empty(), "{package} has no such tests");
        let directory = quoted(directory.as_os_str())?;
        writeln!(self.commands, "cd {directory} && export CARGO_MANIFEST_DIR={directory} || exit 1")?;
        for (source, program) in programs {
            // Cargo has a directory for the files of tests beside that of the profile, and tests know its path since they were built.
            let scratch = program.ancestors().nth(3).context("a test program is in a target directory")?.join("tmp");
            writeln!(self.commands, "mkdir -p {}", quoted(scratch.as_os_str())?)?;
            let title = format!("     Running {}", source.strip_prefix(&self.top).unwrap_or(&source).display());
            writeln!(self.commands, "echo {}", quoted(OsStr::new(&title))?)?;
            let mut arguments = String::new();
            let texts = texts.iter().filter(|_| !named.contains(&name(&source))).map(OsStr::new);
            for word in texts.chain(selection.words.iter().map(OsString::as_os_str)) {
                write!(arguments, " {}", quoted(word)?)?;
            }
            for left_out in left_out::of(package, &source) {
                if let Some(test) = left_out.test {
                    write!(arguments, " --skip {test}")?;
                    let text = format!("left out: {test} ({})", left_out.reason);
                    writeln!(self.commands, "echo {}", quoted(OsStr::new(&text))?)?;
                }
            }
            writeln!(self.commands, "{}{arguments} || code=101", quoted(program.as_os_str())?)?;
            self.brought.push(program);
        }
        self.brought.extend(helpers);
        Ok(())
    }

    /// Writes the disk into the directory and returns its path.
    pub(super) fn write(&self, place: &Path) -> Result<PathBuf> {
        let stage = place.join("payload");
        let guest = stage.join("guest");
        fs::create_dir_all(&guest)?;
        for (name, content) in SCRIPTS {
            fs::write(guest.join(name), content)?;
        }
        fs::write(guest.join("prepare.sh"), self.stage(&stage)?)?;
        fs::write(guest.join("commands.sh"), format!("{}exit $code\n", self.commands))?;
        for (name, program) in &self.installed {
            link(program, &stage.join("bin").join(name))?;
        }
        let disk = place.join("payload.ext4");
        let mut command = Command::new("mke2fs");
        command.args(["-q", "-t", "ext4", "-m", "0", "-E", "lazy_itable_init=1,root_owner=0:0", "-d"]);
        succeed(command.arg(&stage).arg(&disk).arg(DISK))?;
        fs::remove_dir_all(stage)?;
        Ok(disk)
    }

    /// Lays out what is brought, and returns the shell commands that put it to its places in the guest: the workspace and the target directory
    /// are mounted from the disk, anything else is copied.
    fn stage(&self, stage: &Path) -> Result<String> {
        let mut roots = vec![&self.top];
        if !self.target.starts_with(&self.top) {
            roots.push(&self.target);
        }
        let mut commands = String::new();
        for (number, root) in roots.iter().enumerate() {
            fs::create_dir_all(stage.join(format!("tree/{number}")))?;
            let place = quoted(root.as_os_str())?;
            writeln!(commands, "mkdir -p {place} && mount --bind /payload/tree/{number} {place}")?;
        }
        for (number, path) in self.brought.iter().enumerate() {
            // The target directory may be inside the workspace, so the last root that fits is the nearest.
            if let Some((root, beneath)) =
                roots.iter().enumerate().rev().find_map(|(root, top)| Some((root, path.strip_prefix(top).ok()?)))
            {
                link(path, &stage.join(format!("tree/{root}")).join(beneath))?;
            } else {
                link(path, &stage.join(format!("copied/{number}")))?;
                let parent = quoted(path.parent().context("the whole file system cannot be brought")?.as_os_str())?;
                let place = quoted(path.as_os_str())?;
                writeln!(commands, "mkdir -p {parent} && cp -a -T /payload/copied/{number} {place}")?;
            }
        }
        Ok(commands)
    }
}

/// Makes `to` the same as `from`, with everything in it, by links where possible.
fn link(from: &Path, to: &Path) -> Result<()> {
    let place = || format!("cannot bring {} into the guest", from.display());
    if let Some(parent) = to.parent() {
        fs::create_dir_all(parent).with_context(place)?;
    }
    let kind = fs::symlink_metadata(from).with_context(place)?.file_type();
    if kind.is_dir() {
        fs::create_dir_all(to).with_context(place)?;
        for entry in fs::read_dir(from).with_context(place)? {
            let entry = entry?;
            link(&entry.path(), &to.join(entry.file_name()))?;
        }
    } else if kind.is_symlink() {
        symlink(fs::read_link(from)?, to).with_context(place)?;
    } else if kind.is_file() && fs::hard_link(from, to).is_err() {
        fs::copy(from, to).with_context(place)?;
    }
    Ok(())
}

/// A word for the shell.
fn quoted(word: &OsStr) -> Result<String> {
    let word = word.to_str().with_context(|| format!("{} is no UTF-8", word.display()))?;
    Ok(format!("'{}'", word.replace('\'', r"'\''")))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_shell_reads_quoted_words_as_they_are() {
        for word in ["plain", "two words", "it's", "$(false) `false` \\ \"", "*", "", "a\nb"] {
            let script = format!("printf %s {}", quoted(OsStr::new(word)).unwrap());
            let said = Command::new("sh").args(["-c", &script]).output().unwrap();
            assert_eq!(String::from_utf8(said.stdout).unwrap(), word);
        }
    }
}

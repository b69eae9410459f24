//! Stored layers are what GNU tar unpacks: full trees with owners, modes, times, links, devices, attributes and content; and `fsck.erofs` finds no fault.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, Result, bail, ensure};
use funtainer_e2e::image::{Compression, Config, Image, Layer, Tree, catalog};
use funtainer_e2e::process;
use funtainer_e2e::world::scenario;

const LIMIT: Duration = Duration::from_mins(3);

/// Everything about a tree, one sorted line for each fact.
const LISTING: &str = r#"
set -euo pipefail
export LC_ALL=C TZ=UTC
cd "$1"
find . -mindepth 1 -printf '%P|%y|%m|%U:%G|%T@|%l\n' | sort
find . -mindepth 1 -type f -printf '%P has %s bytes and %n names\n' | sort
find . -type c -o -type b | sort | xargs --no-run-if-empty -d '\n' stat --format '%n is %t:%T'
find . -type f -print0 | sort -z | xargs --no-run-if-empty -0 sha256sum
find . -mindepth 1 -print0 | sort -z | xargs --no-run-if-empty -0 getfattr --no-dereference --dump --match=- --encoding=hex |
    awk '/^# file: / { file = $0; next } NF { print file " " $0 }' | sort
"#;

/// Makes a tree with everything that is hard to keep.
const TORTURE: &str = r#"
set -euo pipefail
cd "$1"
mkdir -p plain/deep/deeper empty many setgid sticky owners links devices attributes
echo content > plain/file
: > plain/nothing
head -c 4096 /dev/zero > plain/one-block
head -c 4097 /dev/urandom > plain/one-block-and-a-byte
head -c 1000000 /dev/urandom > plain/deep/deeper/large
truncate -s 50M plain/sparse && echo end >> plain/sparse && printf x | dd of=plain/sparse bs=1 seek=10000000 conv=notrunc status=none
for number in $(seq 1 1500); do echo "$number" > "many/entry-$number"; done
touch 'plain/!first' 'plain/-dash' "plain/with blank" "plain/$(printf 'n%.0s' $(seq 1 250))" "$(printf 'plain/not-utf8-\377')"
cp /bin/true plain/setuid && chmod 6755 plain/setuid
chmod 2775 setgid && chmod 1777 sticky && chmod 0 plain/nothing
echo x > owners/large && chown 100000:65534 owners/large && chown 33:44 owners
ln -s file plain/link && ln -s /absolute/nowhere links/dangling && ln -s "$(printf 'l%.0s' $(seq 1 3000))" links/long
ln plain/file links/hard && ln plain/file links/harder
mkfifo devices/pipe
mknod devices/null c 1 3 && mknod devices/disk b 259 70000 && chmod 640 devices/disk
echo x > attributes/file
setfattr -n user.text -v value attributes/file
setfattr -n user.binary -v 0x00ff0a3d0a00 attributes/file
setfattr -n user.on-directory -v yes attributes
setfattr -n security.capability -v 0x0100000200040000000000000000000000000000 attributes/file
touch -d '1960-01-01T00:00:00.123456789Z' plain/deep && touch -d '2040-06-01T12:00:00.5Z' plain/file
touch -d '2001-02-03T04:05:06Z' many empty links devices
"#;

fn listing(directory: &Path) -> Result<String> {
    process::succeed(Command::new("bash").args(["-c", LISTING, "bash"]).arg(directory), LIMIT)
}

/// The listing of an erofs file, mounted where nobody else sees it.
fn stored_listing(file: &Path, home: &Path) -> Result<String> {
    let point = home.join("stored");
    fs::create_dir_all(&point)?;
    let script = r#"mount -t erofs -o ro,loop "$0" "$1" && exec bash -c "$2" bash "$1""#;
    let mut command = Command::new("unshare");
    command.args(["--mount", "--propagation", "private", "sh", "-c", script]).arg(file).arg(&point).arg(LISTING);
    process::succeed(&mut command, LIMIT)
}

/// What GNU tar makes of a layer.
fn unpacked_listing(layer: &Layer, home: &Path) -> Result<String> {
    let point = home.join("unpacked");
    let _ = fs::remove_dir_all(&point);
    fs::create_dir_all(&point)?;
    let mut command = Command::new("tar");
    command.args(["--extract", "--preserve-permissions", "--same-owner", "--numeric-owner", "--xattrs", "--xattrs-include=*"]);
    // Directories keep their times also where the archive comes back to them.
    command.arg("--delay-directory-restore").arg("--directory").arg(&point).arg("--file").arg(layer.blob());
    process::succeed(&mut command, LIMIT)?;
    listing(&point)
}

/// The file of a layer in a server's store; the lowest one of an image has a form of its own.
fn stored(data: &Path, layer: &Layer) -> Result<PathBuf> {
    let hex = layer.diff_id().trim_start_matches("sha256:");
    let directory = data.join("store/layers");
    for name in [format!("{hex}.erofs"), format!("{hex}.base.erofs")] {
        if directory.join(&name).exists() {
            return Ok(directory.join(name));
        }
    }
    bail!("no layer {hex} in {}", directory.display())
}

fn same(stored: &str, unpacked: &str) -> Result<()> {
    let (left, right): (Vec<_>, Vec<_>) = (stored.lines().collect(), unpacked.lines().collect());
    let only = |these: &[&str], those: &[&str]| -> Vec<String> {
        let those: std::collections::BTreeSet<_> = those.iter().collect();
        these.iter().filter(|line| !those.contains(line)).take(20).map(ToString::to_string).collect()
    };
    let (stored_only, unpacked_only) = (only(&left, &right), only(&right, &left));
    ensure!(left == right, "only in the store:\n{}\nonly unpacked:\n{}", stored_only.join("\n"), unpacked_only.join("\n"));
    Ok(())
}

fn check(data: &Path, layer: &Layer, home: &Path) -> Result<()> {
    let file = stored(data, layer)?;
    process::succeed(Command::new("fsck.erofs").arg(&file), LIMIT)?;
    let mode = std::os::unix::fs::PermissionsExt::mode(&fs::metadata(&file)?.permissions());
    let owner = std::os::unix::fs::MetadataExt::uid(&fs::metadata(&file)?);
    ensure!(mode & 0o7777 == 0o444 && owner == 0, "{} has mode {mode:o} and owner {owner}", file.display());
    same(&stored_listing(&file, home)?, &unpacked_listing(layer, home)?).with_context(|| format!("layer {}", layer.diff_id()))
}

#[test]
fn a_torture_tree_is_kept_whole() -> Result<()> {
    scenario(|world| {
        let tree = world.home().join("tree");
        fs::create_dir(&tree)?;
        process::succeed(Command::new("bash").args(["-c", TORTURE, "bash"]).arg(&tree), LIMIT)?;
        let mut layers = vec![catalog::busybox_layer()?];
        for format in ["posix", "gnu"] {
            let tar = world.home().join(format!("{format}.tar"));
            let mut pack = Command::new("tar");
            pack.args(["--create", "--sparse", "--numeric-owner", &format!("--format={format}")]);
            if format == "posix" {
                pack.args(["--xattrs", "--xattrs-include=*"]);
            }
            process::succeed(pack.arg("--directory").arg(&tree).arg("--file").arg(&tar).arg("."), LIMIT)?;
            layers.push(Layer::from_tar(&fs::read(&tar)?, Compression::Gzip)?);
        }
        let image = Image::build(layers, &Config::command(&["/bin/true"]))?;
        let server = world.serve()?;
        server.deploy("torture", &image, &["--contract", "stdio"])?;
        for layer in image.layers() {
            check(&server.places().data, layer, world.home())?;
        }
        Ok(())
    })
}

#[test]
fn a_debian_root_file_system_is_kept_whole() -> Result<()> {
    scenario(|world| {
        let image = catalog::python()?;
        let server = world.serve()?;
        server.deploy("python", &image, &["--contract", "stdio", "--arg", "/usr/bin/python3", "--arg", "-c", "--arg", LOOK])?;
        check(&server.places().data, &image.layers()[0], world.home())?;
        for layer in image.layers() {
            process::succeed(Command::new("fsck.erofs").arg(stored(&server.places().data, layer)?), LIMIT)?;
        }
        // Whiteouts and replacements of the upper layers, as the function sees them.
        let seen = server.get("/function/python")?.text();
        ensure!(seen == "False\nchanged by the second layer\nTrue\nFalse\n", "{seen}");
        Ok(())
    })
}

/// Prints what the second layer of the image changed, and whether a whiteout shows.
const LOOK: &str = "import os
print(os.path.exists('/etc/debian_version'))
print(open('/etc/motd').read(), end='')
print(os.path.exists('/app/app.py'))
print(any(name.startswith('.wh.') for name in os.listdir('/etc')) or 'debian_version' in os.listdir('/etc'))";

/// A layer whose bytes are not those that its digest promises is refused, and nothing of it stays.
#[test]
fn a_damaged_layer_is_refused() -> Result<()> {
    scenario(|world| {
        let tree = Tree::new().file("file", 0o644, &vec![b'a'; 100_000])?.layer(Compression::Plain)?;
        let image = Image::build(vec![catalog::busybox_layer()?, tree], &Config::command(&["/bin/true"]))?;
        let copy = world.home().join("layout");
        process::succeed(Command::new("cp").args(["--recursive", "--no-preserve=mode"]).arg(image.layout()).arg(&copy), LIMIT)?;
        let blob = copy.join("blobs/sha256").join(image.layers()[1].digest().trim_start_matches("sha256:"));
        let mut bytes = fs::read(&blob)?;
        bytes[5_000] ^= 1;
        fs::remove_file(&blob)?;
        fs::write(&blob, bytes)?;
        let server = world.serve()?;
        server.refused(["image", "import", &copy.display().to_string(), "--name", "damaged:1"], 1, "digest-mismatch")?;
        ensure!(stored(&server.places().data, &image.layers()[1]).is_err(), "the damaged layer was stored");
        ensure!(server.ok(["images", "--output", "json"])?.trim() == "[]");
        Ok(())
    })
}

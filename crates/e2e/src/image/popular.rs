//! Images as people use them, made from Debian's packages with what the official images of the same names add, and nothing for this platform.

use std::fs;

use anyhow::{Context, Result};

use super::{Compression, Config, Image, Layer, Tree, catalog, debian, program};
use crate::paths;

/// Value of `security.capability` that permits CAP_NET_BIND_SERVICE (10) and makes it effective: `VFS_CAP_REVISION_2` with its flag, then permitted
/// and inheritable sets in two words each (linux/capability.h).
const CAPABILITY_NET_BIND_SERVICE: [u8; 20] = [1, 0, 0, 2, 0, 4, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// The same for CAP_NET_RAW (13), which no container has.
const CAPABILITY_NET_RAW: [u8; 20] = [1, 0, 0, 2, 0, 0x20, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0];

/// nginx: starts as root, listens on port 80, its workers are `www-data`, its logs are links to the standard streams.
pub fn nginx() -> Result<Image> {
    let site = "server {\n  listen 80 default_server;\n  root /usr/share/nginx/html;\n  location = /limit { proxy_pass http://127.0.0.1:1; }\n}\n";
    let tree = Tree::new()
        .symlink("var/log/nginx/access.log", "/dev/stdout")?
        .symlink("var/log/nginx/error.log", "/dev/stderr")?
        .whiteout("etc/nginx/sites-enabled/default")?
        .file("etc/nginx/conf.d/default.conf", 0o644, site.as_bytes())?
        .file("usr/share/nginx/html/index.html", 0o644, b"Welcome to nginx!\n")?;
    let config =
        Config { cmd: words("nginx -g|daemon off;"), exposed: vec![80], stop_signal: "SIGQUIT".into(), ..Config::default() };
    over("nginx", tree, &config)
}

/// Apache, whose status page is for local callers only (`Require local`, as Debian ships it).
pub fn apache() -> Result<Image> {
    let tree = Tree::new()
        .symlink("var/log/apache2/access.log", "/dev/stdout")?
        .symlink("var/log/apache2/error.log", "/dev/stderr")?
        .symlink("var/log/apache2/other_vhosts_access.log", "/dev/stdout")?
        .file("etc/apache2/conf-enabled/name.conf", 0o644, b"ServerName localhost\n")?
        .file("var/www/html/index.html", 0o644, b"It works!\n")?;
    let config = Config {
        cmd: words("apachectl -D FOREGROUND"),
        exposed: vec![80],
        stop_signal: "SIGWINCH".into(),
        ..Config::default()
    };
    over("apache", tree, &config)
}

/// Redis as its own user, by name, with its data in a volume.
pub fn redis() -> Result<Image> {
    let config = Config {
        entrypoint: words("redis-server"),
        cmd: words("--protected-mode no"),
        exposed: vec![6379],
        user: "redis".into(),
        working_dir: "/var/lib/redis".into(),
        volumes: vec!["/var/lib/redis".into()],
        ..Config::default()
    };
    over("redis", Tree::new(), &config)
}

/// PostgreSQL: a script makes the database as its own user at the first start, in a volume.
pub fn postgres() -> Result<Image> {
    let script = "#!/bin/sh\nset -e\nif [ ! -s \"$PGDATA/PG_VERSION\" ]; then\n  initdb --username=postgres --auth=trust --encoding=UTF8\nfi\nexec \"$@\"\n";
    let tree = Tree::new()
        .file("usr/local/bin/docker-entrypoint.sh", 0o755, script.as_bytes())?
        .directory("var/run/postgresql", 0o3777)?;
    let config = Config {
        entrypoint: words("docker-entrypoint.sh"),
        cmd: words("postgres -c|listen_addresses=*"),
        env: vec![
            "PATH=/usr/local/bin:/usr/bin:/bin:/usr/lib/postgresql/15/bin".into(),
            "PGDATA=/var/lib/postgresql/data".into(),
        ],
        exposed: vec![5432],
        user: "postgres".into(),
        stop_signal: "SIGINT".into(),
        volumes: vec!["/var/lib/postgresql/data".into()],
        ..Config::default()
    };
    over("postgres", tree, &config)
}

/// A server of one class on OpenJDK.
pub fn jvm() -> Result<Image> {
    let config = Config { entrypoint: words("java -cp|/app|Server"), user: "1000".into(), ..Config::default() };
    over("jvm", Tree::new(), &config)
}

/// A server of one script on Node, as a user of the image's.
pub fn node() -> Result<Image> {
    let script = source("server.js")?;
    let tree = Tree::new().directory_of("app", 0o755, 33, 33)?.file("app/server.js", 0o644, &script)?;
    let config = Config {
        cmd: words("node server.js"),
        env: vec!["NODE_ENV=production".into()],
        user: "www-data".into(),
        working_dir: "/app".into(),
        ..Config::default()
    };
    over("node", tree, &config)
}

/// A command on Python and numpy.
pub fn numpy() -> Result<Image> {
    let tree = Tree::new().file("app/matrix.py", 0o644, &source("matrix.py")?)?;
    over("numpy", tree, &Config { cmd: words("python3 /app/matrix.py"), ..Config::default() })
}

/// Debian's `su`, a root without a password, a copy of `cat` that may bind low ports, and one of `ping` that wants raw sockets.
pub fn privileged() -> Result<Image> {
    let busybox = fs::read(program::busybox()?)?;
    // Account and password database as in Debian, but that root needs no password.
    let tree = Tree::new()
        .file("etc/shadow", 0o640, b"root::19000:0:99999:7:::\nwww-data:*:19000:0:99999:7:::\n")?
        .directory("cap", 0o755)?
        .file_with_xattr("cap/cat", 0o755, &busybox, ("security.capability", &CAPABILITY_NET_BIND_SERVICE))?
        .file_with_xattr("cap/ping", 0o755, &busybox, ("security.capability", &CAPABILITY_NET_RAW))?;
    let config = Config { cmd: words("bash"), user: "www-data".into(), ..Config::default() };
    Image::build(vec![debian::base()?, tree.layer(Compression::Plain)?], &config)
}

/// A static program on an empty file system, as the platform's own example.
pub fn scratch() -> Result<Image> {
    catalog::hello()
}

/// An image of the base, a set of packages and what is added to it.
fn over(set: &str, tree: Tree, config: &Config) -> Result<Image> {
    let own: Layer = tree.layer(Compression::Gzip)?;
    Image::build(vec![debian::base()?, debian::packages(set)?, own], config)
}

/// Words of a command line: behind a `|` blanks belong to the word.
fn words(text: &str) -> Vec<String> {
    let mut parts = text.split('|');
    let first = parts.next().unwrap_or_default().split(' ').filter(|word| !word.is_empty());
    first.chain(parts).map(str::to_owned).collect()
}

fn source(name: &str) -> Result<Vec<u8>> {
    let path = paths::repository().join("crates/e2e/programs/popular").join(name);
    fs::read(&path).with_context(|| format!("cannot read {}", path.display()))
}

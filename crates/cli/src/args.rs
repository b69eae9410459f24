//! The command line: what can be said, with help that teaches.

use std::net::{Ipv4Addr, SocketAddr};
use std::num::{NonZeroU16, NonZeroU32};
use std::path::PathBuf;
use std::str::FromStr;

use clap::{Args, Parser, Subcommand, ValueEnum};
use funtainer_model::{ByteSize, Cpus, EgressRule, EnvVar, InstanceId, Network, QuantityError, TmpfsMount, parse_duration};
use funtainer_sandbox::net::{Range, can_be_asked};

use crate::places::ADMIN_OF_ROOT;

/// Where calls come in by default.
const LISTEN_DEFAULT: &str = "127.0.0.1:8080";

/// Runs container images as functions: give an image, get a URL.
#[derive(Debug, Parser)]
#[command(name = "funtainer", version, max_term_width = 100, disable_help_subcommand = false, arg_required_else_help = true)]
#[command(about = "Runs container images as functions: give an image, get a URL")]
#[command(after_help = "\
Examples:
  funtainer serve                                          start the server, as root or as yourself
  funtainer deploy hello --image registry.example/hello    make a function of an image, get its URL
  curl http://127.0.0.1:8080/function/hello                call it; the first call starts it
  funtainer logs hello                                     see what it wrote
  echo hi | funtainer run docker.io/library/busybox -- cat
                                                           run a command-line image once
  funtainer exec hello -it -- sh                           look around in a running instance

Exit codes: 0 done, 1 failed, 2 wrong usage; `run` and `exec` end with the command's own code.")]
pub(crate) struct Cli {
    /// Server to talk to: its admin socket [default: your own server's, else root's]
    #[arg(
        long,
        global = true,
        env = "FUNTAINER_HOST",
        hide_env_values = true,
        value_name = "unix://PATH",
        help_heading = "Global options"
    )]
    pub(crate) host: Option<Host>,

    /// Form of results and errors
    #[arg(long, global = true, value_enum, value_name = "FORM", default_value_t = Output::Text, help_heading = "Global options")]
    pub(crate) output: Output,

    /// What to do.
    #[command(subcommand)]
    pub(crate) command: Command,
}

/// The commands.
#[derive(Debug, Subcommand)]
pub(crate) enum Command {
    Serve(Serve),
    Deploy(Box<Deploy>),
    Invoke(Invoke),
    Run(Box<Run>),
    Exec(Exec),
    /// List the functions, with their ready instances
    #[command(after_help = "Example:\n  funtainer list --output json")]
    List,
    /// Show all of a function as JSON: revision, image, digest, settings, instances, last error
    #[command(after_help = "Example:\n  funtainer describe hello")]
    Describe(Named),
    Logs(Logs),
    Scale(Scale),
    /// Remove a function; calls in flight may finish
    #[command(after_help = "Example:\n  funtainer remove hello")]
    Remove(Named),
    Pull(Pull),
    /// List the images in the store
    #[command(after_help = "Example:\n  funtainer images --output json")]
    Images,
    #[command(subcommand)]
    Image(Image),
    Reset(Reset),
    /// Show the versions of this program and of the server
    Version,
    Doctor(Doctor),
    #[command(hide = true)]
    Daemon(Daemon),
    #[command(hide = true)]
    Unpack(Unpack),
}

/// Start the server
///
/// Calls come in over HTTP on --listen, at /function/NAME. Everything else, such as deploys, goes through the admin socket, which only
/// root and the group funtainer can open. Needs Linux 6.1 or later; a missing feature is named.
///
/// It runs as root, or as an ordinary user: then the admin socket is that user's alone, and every container is confined to that user's
/// subordinate ids (subuid(5)). What is less than under root is said at the start.
///
/// When it is ready, standard output says `listening on http://ADDR`. Logs go to standard error. SIGTERM and Ctrl-C let calls in flight
/// finish for at most 10 s, and leave nothing behind.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo funtainer serve
  funtainer serve                                  as an ordinary user
  sudo funtainer serve --listen 0.0.0.0:80
  sudo funtainer serve --listen 127.0.0.1:0 --admin /tmp/f.sock --data /tmp/f    a second server beside the first

FUNTAINER_LOG sets what is logged (error, warn, info, debug, or filters such as funtainer_engine=debug); default info.")]
pub(crate) struct Serve {
    /// Address for calls; port 0 picks a free one, none leaves them to the admin socket
    #[arg(long, value_name = "ADDR", default_value = LISTEN_DEFAULT)]
    pub(crate) listen: Listen,
    /// Path of the admin socket; a stale one is replaced [default: /run/funtainer/admin.sock; a user's: $XDG_RUNTIME_DIR/funtainer.sock]
    #[arg(long, value_name = "SOCKET")]
    pub(crate) admin: Option<PathBuf>,
    /// Directory of state, images and logs; made if missing [default: /var/lib/funtainer; a user's: ~/.local/share/funtainer]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Process id of the parent, with which the server stops; for `run`, which starts one of its own
    #[arg(long, hide = true, value_name = "PID")]
    pub(crate) parent: Option<i32>,
    /// Whether functions may reach what is outside of this machine; off leaves the machine's network alone
    #[arg(long, value_name = "on|off", default_value_t = Network::On)]
    pub(crate) network: Network,
    /// Addresses for instances [default: a free range of 4,096 private ones, mostly of 10.208.0.0/12]
    #[arg(long, value_name = "CIDR")]
    pub(crate) network_range: Option<Range>,
    /// Name server that functions ask; can be repeated [default: those of this machine]
    #[arg(long, value_name = "ADDR", value_parser = resolver)]
    pub(crate) dns: Vec<Ipv4Addr>,
}

/// Remove all that a stopped server has kept: functions, images and logs
///
/// What an ordinary user's server has made belongs to subordinate ids, so that `rm` cannot remove it; this can.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  funtainer reset --yes
  funtainer reset --yes --data /tmp/f")]
pub(crate) struct Reset {
    /// Directory of the server [default: as for serve]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    /// Do it: there is no way back
    #[arg(long)]
    pub(crate) yes: bool,
}

/// Make a function of an image, or replace it
///
/// The image is resolved to its digest and pulled once. A function of contract http is returned when one instance was started and found
/// good; one of contract stdio when its command was found in the image. A running function goes on until then, and stays as it was if the
/// deploy fails. Prints the URL to call.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  funtainer deploy hello --image registry.example/hello:1.2
  funtainer deploy site --image localhost:5000/site --port 3000 --env MODE=fast --min 1
  funtainer deploy upper --image docker.io/library/busybox --contract stdio \\
      --arg tr --arg a-z --arg A-Z

Sizes are numbers with K, M or G; durations with ms, s, m or h.")]
pub(crate) struct Deploy {
    /// Name of the function
    pub(crate) name: String,
    /// Image to run
    #[arg(long, value_name = "REF", help = "Image to run: [registry/]repository[:tag][@sha256:..]")]
    pub(crate) image: String,
    /// Port of the server in the image [default: the single EXPOSE, else 8080]
    #[arg(long, value_name = "N", value_parser = port)]
    pub(crate) port: Option<NonZeroU16>,
    /// How the image is spoken to
    #[arg(long, value_enum, default_value_t = ContractArg::Http)]
    pub(crate) contract: ContractArg,
    /// Environment variable on top of the image's; can be repeated
    #[arg(long, value_name = "K=V")]
    pub(crate) env: Vec<EnvVar>,
    /// Argument of the command, instead of the image's CMD; can be repeated
    #[arg(long = "arg", value_name = "A", allow_hyphen_values = true)]
    pub(crate) args: Vec<String>,
    /// Calls at once in one instance [default: 80; stdio: 1]
    #[arg(long, value_name = "N", value_parser = one_or_more)]
    pub(crate) concurrency: Option<NonZeroU32>,
    /// Instances that are kept without calls [default: 0]
    #[arg(long, value_name = "N")]
    pub(crate) min: Option<u32>,
    /// Instances at most [default: 20]
    #[arg(long, value_name = "N")]
    pub(crate) max: Option<u32>,
    /// How long an instance stays without a call [default: 10m]
    #[arg(long, value_name = "D", value_parser = duration)]
    pub(crate) idle_timeout: Option<String>,
    /// How long a call may take [default: 300s]
    #[arg(long, value_name = "D", value_parser = duration)]
    pub(crate) timeout: Option<String>,
    /// Say nothing of the progress
    #[arg(long, short)]
    pub(crate) quiet: bool,
    #[command(flatten)]
    pub(crate) container: Container,
}

/// What a container may use and reach.
#[derive(Debug, Args)]
#[command(next_help_heading = "Container")]
pub(crate) struct Container {
    /// Memory of an instance, writable files included [default: 512M]
    #[arg(long, value_name = "M")]
    pub(crate) memory: Option<ByteSize>,
    /// Processors at most, such as 0.5 [default: no bound]
    #[arg(long, value_name = "N")]
    pub(crate) cpus: Option<Cpus>,
    /// Share of the processors where they are contended for, 1 to 10000 [default: 100]
    #[arg(long, value_name = "W")]
    pub(crate) cpu_weight: Option<u16>,
    /// Processes and threads at most [default: 4096]
    #[arg(long, value_name = "N")]
    pub(crate) pids: Option<u32>,
    /// Room for written files [default: as much as the memory]
    #[arg(long, value_name = "M")]
    pub(crate) writable: Option<ByteSize>,
    /// Open files of a process at most [default: 65536]
    #[arg(long, value_name = "N")]
    pub(crate) open_files: Option<u32>,
    /// Root file system without a writable layer
    #[arg(long)]
    pub(crate) read_only: bool,
    /// File system in memory at PATH; can be repeated
    #[arg(long, value_name = "PATH[:SIZE]")]
    pub(crate) tmpfs: Vec<TmpfsMount>,
    /// Whether setuid bits and file capabilities of the image are without effect [default: true]
    #[arg(long, value_name = "BOOL", num_args = 0..=1, require_equals = true, default_missing_value = "true")]
    pub(crate) no_new_privileges: Option<bool>,
    /// Whether the outside can be reached: on or off [default: on]
    #[arg(long, value_name = "on|off")]
    pub(crate) network: Option<Network>,
    /// Addresses and ports that are open besides; can be repeated
    #[arg(long, value_name = "CIDR[:PORTS][/tcp|/udp]")]
    pub(crate) egress: Vec<EgressRule>,
    /// Program instead of the image's ENTRYPOINT; its CMD is left out
    #[arg(long, value_name = "PROGRAM")]
    pub(crate) entrypoint: Option<String>,
    /// Instead of the image's USER
    #[arg(long, short = 'u', value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Instead of the image's WORKDIR
    #[arg(long, short = 'w', value_name = "DIR")]
    pub(crate) workdir: Option<String>,
}

/// Call a function through the admin socket
///
/// The body is streamed from --data, else from standard input where that is a pipe or a file. The function's answer goes to standard
/// output. An answer of status 400 and above is an error: exit code 1.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  funtainer invoke hello
  funtainer invoke hello --path '/greet?name=Ada'
  funtainer invoke upper -d 'make me tall'
  funtainer invoke resize -d @photo.jpg > small.jpg
  cat big.csv | funtainer invoke count")]
pub(crate) struct Invoke {
    /// Name of the function
    pub(crate) name: String,
    /// Body: text, @FILE for a file's content, or @- for standard input
    #[arg(long, short, value_name = "DATA|@FILE", allow_hyphen_values = true)]
    pub(crate) data: Option<String>,
    /// Path and query behind the function's name
    #[arg(long, value_name = "PATH", default_value = "/")]
    pub(crate) path: String,
    /// Method [default: POST with a body, else GET]
    #[arg(long, short = 'X', value_name = "METHOD")]
    pub(crate) method: Option<String>,
    /// Header as 'Name: value'; can be repeated
    #[arg(long, short = 'H', value_name = "HEADER")]
    pub(crate) header: Vec<String>,
    /// Show status and headers of the answer before its body
    #[arg(long, short)]
    pub(crate) include: bool,
}

/// Run a command-line image once
///
/// Standard input, output and error are the command's own; with -t they are a terminal. It runs in a fresh container through the server,
/// and ends when this command is ended. Signals are passed on; the third Ctrl-C that it withstands ends it.
///
/// Where no server answers, one is started for this command alone: without a port, on the images of --data, and with root's rights.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  funtainer run docker.io/library/busybox -- echo hello
  cat page.md | funtainer run registry.example/pandoc -- -t html > page.html
  funtainer run -it docker.io/library/debian -- bash

Exit codes: the image's own; 128 + N when it was killed by signal N; 125 when the platform failed;
126 when the command cannot be executed; 127 when it is not in the image.")]
pub(crate) struct Run {
    /// Image to run
    pub(crate) image: String,
    /// Arguments of the command, instead of the image's CMD
    #[arg(last = true, value_name = "ARGS")]
    pub(crate) args: Vec<String>,
    /// Give it this terminal
    #[arg(long, short)]
    pub(crate) tty: bool,
    /// Give it standard input, which it has in any case
    #[arg(long, short)]
    pub(crate) interactive: bool,
    /// Environment variable on top of the image's; can be repeated
    #[arg(long, short, value_name = "K=V")]
    pub(crate) env: Vec<EnvVar>,
    /// Say nothing of the progress
    #[arg(long, short)]
    pub(crate) quiet: bool,
    /// Directory of state and images for the server that is started where none answers
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
    #[command(flatten)]
    pub(crate) container: Container,
}

/// Run a command in a running instance of a function
///
/// The command has the instance's namespaces, limits, filters, user, environment and working directory, and ends with it. It is killed
/// when this command ends; signals are passed on. While it runs, the instance does not end for want of calls.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  funtainer exec hello -- ps
  funtainer exec hello -it -- sh
  funtainer exec hello --start --user root -- cat /etc/shadow
  pg_dump app | funtainer exec db -i -- psql -U postgres

Exit codes: the command's own; 128 + N when it was killed by signal N; 125 when the platform failed;
126 when the command cannot be executed; 127 when it is not in the instance.")]
pub(crate) struct Exec {
    /// Name of the function
    pub(crate) name: String,
    /// Command with its arguments
    #[arg(last = true, required = true, value_name = "COMMAND")]
    pub(crate) command: Vec<String>,
    /// Give it standard input
    #[arg(long, short)]
    pub(crate) interactive: bool,
    /// Give it a terminal
    #[arg(long, short)]
    pub(crate) tty: bool,
    /// Run it in this instance [default: the oldest that takes calls]
    #[arg(long, value_name = "ID")]
    pub(crate) instance: Option<InstanceId>,
    /// Start an instance if there is none
    #[arg(long)]
    pub(crate) start: bool,
    /// Environment variable on top of the instance's; can be repeated
    #[arg(long, short, value_name = "K=V")]
    pub(crate) env: Vec<EnvVar>,
    /// Instead of the instance's user
    #[arg(long, short, value_name = "USER[:GROUP]")]
    pub(crate) user: Option<String>,
    /// Instead of the instance's working directory
    #[arg(long, short, value_name = "DIR")]
    pub(crate) workdir: Option<String>,
}

/// Show what a function wrote to standard output and standard error
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  funtainer logs hello --tail 20
  funtainer logs -f hello")]
pub(crate) struct Logs {
    /// Name of the function
    pub(crate) name: String,
    /// Go on with what comes
    #[arg(long, short)]
    pub(crate) follow: bool,
    /// Lines from the end [default: 1000]
    #[arg(long, value_name = "N")]
    pub(crate) tail: Option<usize>,
}

/// Start or end instances now
///
/// Returns when all that were started are ready and all that were ended are gone (SIGTERM, and SIGKILL after 10 s). It is no setting: the
/// next call starts what it needs, and idle ones end as always. The number lies within --min and --max of the deploy; 0 is always allowed.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  funtainer scale hello 3
  funtainer scale hello 0    the next call is a cold one")]
pub(crate) struct Scale {
    /// Name of the function
    pub(crate) name: String,
    /// Number of instances
    #[arg(value_name = "N")]
    pub(crate) instances: u32,
}

/// A command about one function.
#[derive(Debug, Args)]
pub(crate) struct Named {
    /// Name of the function
    pub(crate) name: String,
}

/// Fetch an image from its registry
///
/// Replaces an imported image of the name. A deploy pulls by itself; this is for doing it beforehand.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  funtainer pull docker.io/library/nginx:1.27
  funtainer pull localhost:5000/hello          registries on loopback are spoken to in plain HTTP")]
pub(crate) struct Pull {
    /// Image to fetch
    #[arg(value_name = "REF")]
    pub(crate) image: String,
    /// Say nothing of the progress
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

/// Take in images from files
#[derive(Debug, Subcommand)]
pub(crate) enum Image {
    Import(Import),
}

/// Take in an OCI image layout: a directory, or a tar archive of one
///
/// The bytes are sent to the server, which never sees the path. The image is used by its name without asking a registry, until `pull`
/// replaces it.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  funtainer image import ./hello-oci --name hello:1
  funtainer image import hello.tar
  skopeo copy docker-daemon:hello:1 oci-archive:/dev/stdout:hello:1 | funtainer image import -")]
pub(crate) struct Import {
    /// Directory or archive; - for an archive on standard input
    pub(crate) path: PathBuf,
    /// Name of the image, instead of those in the archive
    #[arg(long, value_name = "REF")]
    pub(crate) name: Option<String>,
    /// Say nothing of the progress
    #[arg(long, short)]
    pub(crate) quiet: bool,
}

/// Look at what this machine has and lacks for a server
///
/// Names each feature, what is lost without it, and how to get it. As root it is about root's server, as an ordinary user about a
/// server of that user. No server is asked, and nothing on the machine is changed: what is tried is gone afterwards; the kernel may load
/// a module for a file system that is tried, as it does when a server starts.
#[derive(Debug, Args)]
#[command(after_help = "\
Examples:
  sudo funtainer doctor
  funtainer doctor --output json

Exit codes: 0 a server can start here, 1 it cannot, 2 wrong usage.")]
pub(crate) struct Doctor {
    /// Data directory that the server is to have; it need not be there [default: as for serve]
    #[arg(long, value_name = "DIR")]
    pub(crate) data: Option<PathBuf>,
}

/// The unprivileged side of the server; started by `serve`, not by hand
#[derive(Debug, Args)]
pub(crate) struct Daemon {
    /// Number of TCP listeners handed over.
    #[arg(long)]
    pub(crate) listeners: usize,
}

/// Unpacks or removes a layer where an ordinary user's server may not mount it; started by `serve`, not by hand
#[derive(Debug, Args)]
pub(crate) struct Unpack {
    /// Name of the directory to make of the layer that was handed over.
    #[arg(long, required_unless_present = "remove", conflicts_with = "remove")]
    pub(crate) name: Option<String>,
    /// Name of the directory to remove.
    #[arg(long)]
    pub(crate) remove: Option<String>,
    /// How many user and group ids there are.
    #[arg(long)]
    pub(crate) ids: u32,
}

/// How an image is spoken to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum ContractArg {
    /// The image is an HTTP server that listens on PORT
    Http,
    /// The image is a command: input on standard input, answer on standard output, a fresh container for each call
    Stdio,
}

/// Form of results.
#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(crate) enum Output {
    /// For people
    Text,
    /// For programs; errors are RFC 9457 problems
    Json,
}

/// Where calls come in by TCP.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) struct Listen(pub(crate) Option<SocketAddr>);

/// Where the server's admin socket is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Host(PathBuf);

/// A text that says no such place.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error(
    "'{0}' is no place of a server: write unix:// and the absolute path of its admin socket, such as unix://{ADMIN_OF_ROOT}"
)]
pub(crate) struct HostError(String);

impl Host {
    /// The server with its admin socket there.
    pub(crate) fn at(socket: PathBuf) -> Self {
        Self(socket)
    }

    /// Path of the socket.
    pub(crate) fn socket(&self) -> &std::path::Path {
        &self.0
    }
}

impl FromStr for Host {
    type Err = HostError;

    fn from_str(text: &str) -> Result<Self, HostError> {
        match text.strip_prefix("unix://") {
            Some(path) if path.starts_with('/') => Ok(Self(path.into())),
            _ => Err(HostError(text.to_owned())),
        }
    }
}

impl std::fmt::Display for Host {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(f, "unix://{}", self.0.display())
    }
}

impl FromStr for Listen {
    type Err = &'static str;

    /// Names are not resolved, because one can mean several addresses.
    fn from_str(text: &str) -> Result<Self, Self::Err> {
        if text == "none" {
            return Ok(Self(None));
        }
        let address = text.parse();
        let wrong = "write an IP address and a port up to 65535, such as 127.0.0.1:8080 or [::1]:8080, or none";
        address.map(|address| Self(Some(address))).map_err(|_| wrong)
    }
}

fn resolver(text: &str) -> Result<Ipv4Addr, &'static str> {
    let server = text.parse().ok().filter(can_be_asked);
    server.ok_or("write an IPv4 address that functions can reach, not one of this machine's loopback")
}

fn port(text: &str) -> Result<NonZeroU16, &'static str> {
    text.parse().map_err(|_| "a port is a number from 1 to 65535")
}

fn one_or_more(text: &str) -> Result<NonZeroU32, &'static str> {
    text.parse().map_err(|_| "a number from 1 up is wanted")
}

/// A duration that the server will understand, as it was written.
fn duration(text: &str) -> Result<String, QuantityError> {
    parse_duration(text).map(|_| text.to_owned())
}

#[cfg(test)]
mod tests {
    use clap::CommandFactory;

    use super::*;

    fn parse(line: &str) -> Result<Cli, clap::Error> {
        Cli::try_parse_from(std::iter::once("funtainer").chain(line.split(' ')))
    }

    #[test]
    fn the_definition_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn every_command_of_the_scripts_is_understood() {
        for line in [
            "serve",
            "serve --listen 127.0.0.1:0 --admin /tmp/a.sock --data /tmp/d",
            "doctor",
            "doctor --data /tmp/d --output json",
            "deploy f --image i",
            "deploy f --image i --port 80 --contract stdio --env A=b --env C=d=e --arg -x --arg y --memory 64M --concurrency 3 --min 1 --max 2 --idle-timeout 10s --timeout 1m",
            "image import dir",
            "image import - --name a/b:1",
            "pull i",
            "images",
            "images --output json",
            "list --output json",
            "--output json list",
            "describe f",
            "invoke f",
            "invoke f -d x",
            "invoke f -d @x",
            "invoke f --data -",
            "logs f",
            "logs -f f --tail 3",
            "remove f",
            "version",
            "scale f 3",
            "run i",
            "run i --cpus 0.5 --cpu-weight 200 --pids 10 --writable 1M --open-files 99 --read-only --tmpfs /tmp --tmpfs /x:1M -u 1:2 -w /",
            "deploy f --image i --network off --egress 10.0.0.0/8 --egress 1.2.3.4:53/udp --no-new-privileges=false --entrypoint sh",
            "run i -- a --b -c",
            "run -it i -- sh",
            "run i -t --data /tmp/d -e A=b",
            "exec f -- ls",
            "exec f -it -- sh -c x",
            "exec -i -t f --instance 0190a1b2-0000-7000-8000-000000000000 --start -e A=b -u 1:2 -w /tmp -- sh",
            "serve --listen none",
            "list --host unix:///tmp/x",
        ] {
            assert!(parse(line).is_ok(), "{line}: {}", parse(line).unwrap_err());
        }
    }

    #[test]
    fn wrong_usage_ends_with_two() {
        for line in [
            "",
            "frobnicate",
            "deploy f",
            "deploy f --image i --port 0",
            "deploy f --image i --port 70000",
            "deploy f --image i --memory much",
            "deploy f --image i --timeout soon",
            "deploy f --image i --env A",
            "deploy f --image i --cpus none",
            "deploy f --image i --tmpfs tmp",
            "deploy f --image i --egress ::1",
            "deploy f --image i --network maybe",
            "deploy f --image i --contract lambda",
            "serve --listen nowhere",
            "scale f",
            "scale f -1",
            "run i a",
            "exec f",
            "exec f ls",
            "exec f --",
            "exec f --instance x -- ls",
            "exec -- ls",
            "list --host tcp://x",
            "list --host unix://relative",
            "list --output xml",
            "image",
        ] {
            assert_eq!(parse(line).unwrap_err().exit_code(), 2, "{line}");
        }
    }

    #[test]
    fn wrong_numbers_are_told_in_words() {
        for (line, words) in [
            ("deploy f --image i --port 0", "from 1 to 65535"),
            ("deploy f --image i --port 70000", "from 1 to 65535"),
            ("deploy f --image i --concurrency 0", "from 1 up"),
            ("serve --listen localhost:80", "127.0.0.1:8080"),
            ("serve --listen 127.0.0.1:70000", "127.0.0.1:8080"),
        ] {
            let said = parse(line).unwrap_err().to_string();
            assert!(said.contains(words), "{line}: {said}");
        }
    }

    #[test]
    fn nothing_said_is_answered_with_help() {
        let help = Cli::try_parse_from(["funtainer"]).unwrap_err();
        assert_eq!(help.exit_code(), 2);
        assert!(help.to_string().contains("Examples:") && !help.to_string().contains("daemon"), "{help}");
    }

    #[test]
    fn arguments_of_a_run_are_its_own() {
        let Command::Run(run) = parse("run i -- --host x -q").unwrap().command else { panic!("a run") };
        assert_eq!((run.image.as_str(), run.quiet), ("i", false));
        assert_eq!(run.args, ["--host", "x", "-q"]);
    }

    #[test]
    fn help_shows_what_there_is() {
        let mut command = Cli::command().term_width(100);
        insta::assert_snapshot!("help", command.render_long_help().to_string());
        for name in ["serve", "deploy", "invoke", "run", "exec", "scale", "doctor"] {
            let subcommand = command.find_subcommand_mut(name).unwrap();
            insta::assert_snapshot!(format!("help_{name}"), subcommand.render_long_help().to_string());
        }
    }
}

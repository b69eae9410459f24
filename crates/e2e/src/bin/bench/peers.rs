//! What funtainer is measured against: `runc run` of the same file system, and nginx in front of the same server.

use std::fs;
use std::net::{Ipv4Addr, SocketAddr, TcpListener};
use std::os::unix::fs::PermissionsExt;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::time::{Duration, Instant};

use anyhow::{Context, Result, bail, ensure};
use funtainer_e2e::http::{Connection, Endpoint};
use funtainer_e2e::image::program;
use funtainer_e2e::{process, wait};
use rustix::process::{Pid, Signal, kill_process};
use serde_json::{Value, json};

use crate::PATIENCE;

/// Pause between two attempts to reach the server that runc starts; small against what is measured.
const PROBE_PAUSE: Duration = Duration::from_micros(100);

/// A bundle for runc: the same server on the same file system, with runc's own default configuration otherwise.
pub(crate) struct Runc {
    bundle: PathBuf,
    state: PathBuf,
    address: SocketAddr,
    count: usize,
}

impl Runc {
    /// Writes the bundle.
    pub(crate) fn prepare(home: &Path) -> Result<Self> {
        let (bundle, state) = (home.join("runc-bundle"), home.join("runc-state"));
        let root = bundle.join("rootfs");
        fs::create_dir_all(&root)?;
        fs::copy(program::hello()?, root.join("hello"))?;
        fs::set_permissions(root.join("hello"), fs::Permissions::from_mode(0o755))?;
        process::succeed(Command::new("runc").arg("spec").current_dir(&bundle), PATIENCE)?;
        let address = free_address()?;
        let path = bundle.join("config.json");
        let mut config: Value = serde_json::from_slice(&fs::read(&path)?)?;
        config["process"]["terminal"] = json!(false);
        config["process"]["args"] = json!(["/hello"]);
        config["process"]["env"] = json!([format!("PORT={}", address.port())]);
        // On the host's network, so that it can be reached: one namespace less than funtainer makes, in runc's favour.
        let namespaces = config["linux"]["namespaces"].as_array_mut().context("runc's configuration has namespaces")?;
        namespaces.retain(|namespace| namespace["type"] != "network");
        fs::write(&path, serde_json::to_vec(&config)?)?;
        Ok(Self { bundle, state, address, count: 0 })
    }

    /// The time from the start of `runc run` to the end of the first answer with status 200.
    pub(crate) fn run(&mut self) -> Result<Duration> {
        self.count += 1;
        let name = format!("bench-{}-{}", std::process::id(), self.count);
        let start = Instant::now();
        let mut child = self
            .runc(["run", "--bundle"])
            .arg(&self.bundle)
            .arg(&name)
            .stdin(Stdio::null())
            .stdout(Stdio::null())
            .stderr(Stdio::null())
            .process_group(0)
            .spawn()
            .context("cannot start runc")?;
        let took = loop {
            if answers(self.address) {
                break Ok(start.elapsed());
            }
            if start.elapsed() > PATIENCE {
                break Err(anyhow::anyhow!("runc's server does not answer"));
            }
            std::thread::park_timeout(PROBE_PAUSE);
        };
        let ended = self.end(&name, &mut child);
        took.and_then(|took| ended.map(|()| took))
    }

    fn end(&self, name: &str, child: &mut Child) -> Result<()> {
        process::run(self.runc(["kill", name]).arg("KILL"), b"", PATIENCE)?;
        if wait::exited(child, PATIENCE)?.is_none() {
            child.kill()?;
            child.wait()?;
            bail!("runc run did not end");
        }
        // Normally gone with its process already.
        process::run(self.runc(["delete", "--force"]).arg(name), b"", PATIENCE)?;
        Ok(())
    }

    fn runc<const N: usize>(&self, arguments: [&str; N]) -> Command {
        let mut command = Command::new("runc");
        command.arg("--root").arg(&self.state).args(arguments);
        command
    }
}

/// A program of the host that is ended with this value.
pub(crate) struct Process(Child);

impl Drop for Process {
    fn drop(&mut self) {
        let _ = kill_process(Pid::from_child(&self.0), Signal::TERM);
        if !matches!(wait::exited(&mut self.0, Duration::from_secs(5)), Ok(Some(_))) {
            let _ = self.0.kill();
            let _ = self.0.wait();
        }
    }
}

/// The same server as a bare process on a loopback port, in a session of its own, as service managers and container runtimes start one:
/// the kernel shares the processor out among sessions first (sched(7), "The autogroup feature"). On a machine that does something else as
/// well, a server in the session of its clients would have its answers scheduled with theirs, which no container has.
pub(crate) fn bare_server() -> Result<(Process, SocketAddr)> {
    let address = free_address()?;
    // setsid(1) becomes the server: a process that leads no group yet needs no further one for a session.
    let child = Command::new("setsid")
        .arg(program::hello()?)
        .env("PORT", address.port().to_string())
        .stdin(Stdio::null())
        .spawn()
        .context("cannot start the bare server")?;
    let process = Process(child);
    wait::until_true("the bare server answers", PATIENCE, || Ok(answers(address)))?;
    Ok((process, address))
}

/// nginx in front of `upstream`, with two workers, connections kept on both sides, and the headers that funtainer adds.
pub(crate) fn nginx(home: &Path, upstream: SocketAddr) -> Result<(Process, SocketAddr)> {
    let address = free_address()?;
    let home = home.join("nginx");
    fs::create_dir_all(&home)?;
    let settings = home.join("nginx.conf");
    fs::write(&settings, nginx_settings(&home, address, upstream))?;
    let log = fs::File::create(home.join("stderr"))?;
    let child = Command::new("nginx")
        .arg("-c")
        .arg(&settings)
        .arg("-p")
        .arg(&home)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(log)
        .process_group(0)
        .spawn()
        .context("cannot start nginx")?;
    let process = Process(child);
    let answered = wait::until_true("nginx answers", PATIENCE, || Ok(answers(address)));
    answered.with_context(|| fs::read_to_string(home.join("stderr")).unwrap_or_default())?;
    Ok((process, address))
}

fn nginx_settings(home: &Path, address: SocketAddr, upstream: SocketAddr) -> String {
    let home = home.display();
    format!(
        "daemon off;
worker_processes 2;
pid {home}/nginx.pid;
error_log {home}/error.log crit;
events {{ worker_connections 1024; }}
http {{
    access_log off;
    client_body_temp_path {home}/body;
    proxy_temp_path {home}/proxy;
    fastcgi_temp_path {home}/fastcgi;
    uwsgi_temp_path {home}/uwsgi;
    scgi_temp_path {home}/scgi;
    keepalive_requests 1000000000;
    upstream server {{ server {upstream}; keepalive 128; keepalive_requests 1000000000; }}
    server {{
        listen {address} reuseport;
        location /function/hello {{
            proxy_http_version 1.1;
            proxy_set_header Connection '';
            proxy_set_header Host $http_host;
            proxy_set_header X-Call-Id $request_id;
            proxy_set_header X-Forwarded-For $proxy_add_x_forwarded_for;
            proxy_set_header X-Forwarded-Host $http_host;
            proxy_set_header X-Forwarded-Proto $scheme;
            add_header X-Call-Id $request_id;
            proxy_pass http://server/;
        }}
        location / {{ proxy_pass http://server; }}
    }}
}}
"
    )
}

/// What one run of wrk found.
pub(crate) struct Wrk {
    /// Answered requests per second.
    pub(crate) requests_per_second: f64,
    /// Median time to an answer, in µs.
    pub(crate) p50_us: f64,
    /// 99 of 100 answers come within, in µs.
    pub(crate) p99_us: f64,
}

/// Runs wrk with 16 connections; every answer must be good.
pub(crate) fn wrk(url: &str, seconds: u64) -> Result<Wrk> {
    let mut command = Command::new("wrk");
    command.args(["--threads", "1", "--connections", "16", "--latency", "--duration", &format!("{seconds}s"), url]);
    let said = process::succeed(&mut command, Duration::from_secs(seconds) + PATIENCE)?;
    ensure!(!said.contains("Non-2xx") && !said.contains("Socket errors"), "wrk on {url} met failures:\n{said}");
    let line = |start: &str| {
        let line = said.lines().find_map(|line| line.trim().strip_prefix(start));
        line.map(|rest| rest.trim().to_owned()).with_context(|| format!("wrk printed no '{start}':\n{said}"))
    };
    Ok(Wrk {
        requests_per_second: line("Requests/sec:")?.parse()?,
        p50_us: micros(&line("50%")?)?,
        p99_us: micros(&line("99%")?)?,
    })
}

/// `123.00us`, `1.20ms` or `1.00s` in µs.
fn micros(text: &str) -> Result<f64> {
    for (unit, factor) in [("us", 1.0), ("ms", 1e3), ("s", 1e6)] {
        if let Some(number) = text.strip_suffix(unit) {
            return Ok(number.parse::<f64>()? * factor);
        }
    }
    bail!("'{text}' is no duration of wrk")
}

fn answers(address: SocketAddr) -> bool {
    let Ok(mut connection) = Connection::open(&Endpoint::Tcp(address)) else { return false };
    connection.call("GET", "/", &[], b"").is_ok_and(|response| response.status == 200)
}

/// A loopback port that was free a moment ago.
fn free_address() -> Result<SocketAddr> {
    Ok(TcpListener::bind((Ipv4Addr::LOCALHOST, 0))?.local_addr()?)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runc_starts_the_server_again_and_again() {
        let home = funtainer_e2e::paths::scratch("peers").unwrap();
        let mut runc = Runc::prepare(home.path()).unwrap();
        for _ in 0..3 {
            assert!(runc.run().unwrap() < PATIENCE);
        }
        assert_eq!(fs::read_dir(&runc.state).unwrap().count(), 0, "containers are left");
    }

    #[test]
    fn nginx_passes_calls_on_and_wrk_counts_them() {
        let home = funtainer_e2e::paths::scratch("peers").unwrap();
        let (_bare, upstream) = bare_server().unwrap();
        let (_nginx, nginx) = nginx(home.path(), upstream).unwrap();
        let url = format!("http://{nginx}/function/hello");
        assert!(wrk(&url, 1).unwrap().requests_per_second > 0.0);
    }

    #[test]
    fn durations_of_wrk() {
        for (text, expect) in [("12.00us", 12.0), ("1.50ms", 1_500.0), ("2.00s", 2_000_000.0)] {
            assert!((micros(text).unwrap() - expect).abs() < 1e-6, "{text}");
        }
        assert!(micros("12").is_err());
    }
}

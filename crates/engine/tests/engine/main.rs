//! The engine at its doors: a fake backend, paused time, real bodies and connections.

mod calls;
mod exec;
mod fake;
mod lifecycle;
mod scaling;

use std::future::Future;
use std::sync::Arc;
use std::time::Duration;

use funtainer_contract::{Call, CallBody};
use funtainer_engine::{Engine, FunctionView, InvokeFailure, Invoked, Settings};
use funtainer_model::{CallId, Contract, Failure, FunctionId, FunctionSpec};
use http_body_util::BodyExt;
use tempfile::TempDir;
use tokio::sync::mpsc;
use tokio::task::JoinHandle;

use fake::Fake;

/// An engine over a fake, with a state directory of its own.
struct Bench {
    fake: Arc<Fake>,
    engine: Arc<Engine>,
    directory: TempDir,
}

impl Bench {
    async fn new() -> Self {
        let fake = Arc::new(Fake::default());
        let directory = tempfile::tempdir().unwrap();
        let engine = open(&directory, &fake).await;
        Self { fake, engine, directory }
    }

    /// Deploys. Time stands still meanwhile, but for a fake that takes its time.
    async fn deploy(&self, spec: FunctionSpec) -> Result<FunctionView, Failure> {
        self.engine.deploy_now(spec).await
    }

    async fn call(&self, name: &str, path: &str) -> Result<Invoked, InvokeFailure> {
        self.engine.invoke(name, get(path)).await
    }

    /// The whole answer, which here names the instance.
    async fn text(&self, name: &str) -> String {
        text(self.call(name, "/").await.unwrap()).await
    }

    /// Begins calls that stay until [`Fake::release`], and waits until all have arrived at instances.
    async fn hold(&self, name: &'static str, count: usize) -> Vec<JoinHandle<String>> {
        let before = *self.fake.arrived.borrow();
        let held = (0..count).map(|_| self.spawn(name, "/hold")).collect();
        self.fake.wait_arrived(before + count).await;
        held
    }

    fn spawn(&self, name: &'static str, path: &'static str) -> JoinHandle<String> {
        let engine = Arc::clone(&self.engine);
        tokio::spawn(async move { text(engine.invoke(name, get(path)).await.unwrap()).await })
    }

    /// Lets held calls go, and waits for their ends.
    async fn release(&self, held: Vec<JoinHandle<String>>) -> Vec<String> {
        self.fake.release.notify_waiters();
        let mut texts = Vec::new();
        for call in held {
            texts.push(call.await.unwrap());
        }
        texts
    }
}

trait DeployNow {
    async fn deploy_now(&self, spec: FunctionSpec) -> Result<FunctionView, Failure>;
}

impl DeployNow for Engine {
    async fn deploy_now(&self, spec: FunctionSpec) -> Result<FunctionView, Failure> {
        let (progress, _steps) = mpsc::channel(16);
        in_still_time(self.deploy(spec, progress)).await
    }
}

/// Paused time jumps whenever all tasks wait, also where they wait for the thread that writes the state.
async fn in_still_time<T>(work: impl Future<Output = T>) -> T {
    let (end, until) = std::sync::mpsc::channel::<()>();
    let still = tokio::task::spawn_blocking(move || {
        let _ = until.recv();
    });
    let result = work.await;
    drop(end);
    still.await.unwrap();
    result
}

async fn open(directory: &TempDir, fake: &Arc<Fake>) -> Arc<Engine> {
    Engine::open(Settings { state_dir: directory.path().to_owned() }, fake.clone()).await.unwrap()
}

fn id(name: &str) -> FunctionId {
    FunctionId::in_default(name.parse().unwrap())
}

fn http(name: &str) -> FunctionSpec {
    FunctionSpec::new(id(name), "server".parse().unwrap(), Contract::Http)
}

fn stdio(name: &str) -> FunctionSpec {
    FunctionSpec::new(id(name), "command".parse().unwrap(), Contract::Stdio)
}

fn with(mut spec: FunctionSpec, change: impl FnOnce(&mut FunctionSpec)) -> FunctionSpec {
    change(&mut spec);
    spec.check().unwrap()
}

fn get(path: &str) -> Call {
    let request = http_request(path, CallBody::Empty);
    Call { id: CallId::from_bytes([7; 16]), request }
}

fn http_request(path: &str, body: CallBody) -> ::http::Request<CallBody> {
    ::http::Request::get(path).header("host", "test").body(body).unwrap()
}

async fn text(invoked: Invoked) -> String {
    let body = invoked.answer.response.into_body();
    String::from_utf8(body.collect().await.unwrap().to_bytes().to_vec()).unwrap()
}

fn seconds(seconds: u64) -> Duration {
    Duration::from_secs(seconds)
}

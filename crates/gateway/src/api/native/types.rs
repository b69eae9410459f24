//! The shapes of the native API's JSON. Unknown keys of requests are refused; those of answers are for later versions.

use std::collections::BTreeMap;
use std::num::{NonZeroU16, NonZeroU32};
use std::str::FromStr;

use funtainer_contract::terminal::TerminalSize;
use funtainer_engine::backend::{ImageSummary, Progress};
use funtainer_engine::{ExecOrder, FunctionView, InstanceView};
use funtainer_model::{
    ByteSize, Contract, Digest, EnvVar, ErrorCode, Failure, FunctionId, FunctionName, FunctionSpec, ImageRef, InstanceId,
    RevisionId, format_duration, parse_duration,
};
use serde::{Deserialize, Serialize};

use crate::rescue::Problem;

/// Version of this API. Another one means other shapes.
pub const API_VERSION: u32 = 1;

/// Body of `POST /functions`. Everything but name and image has a default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct DeployRequest {
    /// Name of the function in the namespace `default`.
    pub name: String,
    /// Reference of the image.
    pub image: String,
    /// `http` (the default) or `stdio`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub contract: Option<String>,
    /// Port of the server in the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub port: Option<NonZeroU16>,
    /// Variables on top of the image's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Replaces the image's CMD.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub args: Option<Vec<String>>,
    /// Memory of an instance, such as `512M`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// Further settings of its containers.
    #[serde(default)]
    pub container: ContainerSettings,
    /// Calls at once in one instance.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub concurrency: Option<NonZeroU32>,
    /// Instances that are kept without calls.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub min: Option<u32>,
    /// Instances at most.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub max: Option<u32>,
    /// Calls that may wait.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub queue: Option<u32>,
    /// How long an instance stays without a call, such as `10m`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub idle_timeout: Option<String>,
    /// How long an instance may take to become ready.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub start_timeout: Option<String>,
    /// How long a call may take.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub timeout: Option<String>,
}

/// Settings of a container, the same for a deploy and a run. What is not set has its default.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ContainerSettings {
    /// Replaces the image's ENTRYPOINT and leaves its CMD out.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub entrypoint: Option<Vec<String>>,
    /// Replaces the image's USER.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Replaces the image's WORKDIR.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// Processors at most, such as `0.5`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpus: Option<String>,
    /// Share of the processors where they are contended for, 1 to 10,000 (100).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub cpu_weight: Option<u16>,
    /// Processes and threads at most (4096).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub pids: Option<u32>,
    /// Room of the writable layer, such as `64M`; as much as the memory without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub writable: Option<String>,
    /// Open files of a process at most (65536).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub open_files: Option<u32>,
    /// Whether setuid bits and file capabilities are without effect (true).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub no_new_privileges: Option<bool>,
    /// Whether the root file system has no writable layer (false).
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub read_only: Option<bool>,
    /// File systems in memory: `PATH` or `PATH:SIZE`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub tmpfs: Option<Vec<String>>,
    /// `on` (the default) or `off`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub network: Option<String>,
    /// What is open besides: `ADDRESS[/PREFIX][:PORT[-PORT]][/tcp|/udp]`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub egress: Option<Vec<String>>,
}

/// Body of `POST /functions/NAME/scale`.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ScaleRequest {
    /// How many instances there shall be.
    pub instances: u32,
}

/// Body of `POST /images/pull`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct PullRequest {
    /// Reference of the image.
    pub image: String,
}

/// Body of `POST /run`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct RunRequest {
    /// Reference of the image.
    pub image: String,
    /// Replaces the image's CMD.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub args: Option<Vec<String>>,
    /// Variables on top of the image's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Memory of the instance, such as `512M`.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub memory: Option<String>,
    /// Further settings of its container.
    #[serde(default)]
    pub container: ContainerSettings,
    /// Gives it a terminal of this size at first, instead of a stream for each of input, output and error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
}

/// Body of `POST /functions/NAME/exec`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ExecRequest {
    /// Command line.
    pub command: Vec<String>,
    /// Variables on top of the instance's.
    #[serde(default, skip_serializing_if = "BTreeMap::is_empty")]
    pub env: BTreeMap<String, String>,
    /// Replaces the instance's working directory; it must be there.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub working_dir: Option<String>,
    /// Replaces the instance's user: `user`, `uid`, `user:group`, `uid:gid`, by the files of the image.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub user: Option<String>,
    /// Which instance; one that takes calls without it.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub instance: Option<InstanceId>,
    /// Whether to start an instance if there is none.
    #[serde(default)]
    pub start: bool,
    /// Gives it a terminal of this size at first, instead of a stream for each of input, output and error.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub terminal: Option<TerminalSize>,
}

/// Query of `GET /functions/NAME/logs`.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct LogsQuery {
    /// Lines from the end; 1,000 without it.
    #[serde(default)]
    pub tail: Option<usize>,
    /// Whether to go on with what comes.
    #[serde(default)]
    pub follow: bool,
}

/// Query of `POST /images/import`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct ImportQuery {
    /// Replaces the names that the archive has.
    #[serde(default)]
    pub name: Option<String>,
}

/// Answer of `GET /version`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Version {
    /// Of the server.
    pub version: String,
    /// [`API_VERSION`].
    pub api: u32,
    /// Of the process that answers.
    pub pid: u32,
    /// Where functions are called: `http://ADDRESS`; none where the server has no TCP listener.
    pub url: Option<String>,
}

/// A function as it is now.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Function {
    /// Canonical name.
    pub name: String,
    /// Group of functions.
    pub namespace: String,
    /// Its DNS label; `/function/SLUG` always calls it.
    pub slug: String,
    /// The revision that gets the calls.
    pub revision: RevisionId,
    /// The image as it was named at the deploy.
    pub image: ImageRef,
    /// What the name was resolved to.
    pub digest: Digest,
    /// `http` or `stdio`.
    pub contract: Contract,
    /// The port that the function was told to listen on.
    pub port: Option<NonZeroU16>,
    /// Everything that can be set.
    pub settings: FunctionSettings,
    /// When the revision was deployed, RFC 3339.
    pub deployed_at: String,
    /// Oldest first.
    pub instances: Vec<Instance>,
    /// The last failure of a deploy, a start or an instance.
    pub last_error: Option<Failure>,
}

/// Everything that can be set at a deploy, in the form in which it is set.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct FunctionSettings {
    /// Variables on top of the image's.
    pub env: BTreeMap<String, String>,
    /// Replaces the image's CMD, if set.
    pub args: Option<Vec<String>>,
    /// Memory of an instance.
    pub memory: String,
    /// Further settings of its containers.
    pub container: ContainerSettings,
    /// Calls at once in one instance.
    pub concurrency: NonZeroU32,
    /// Instances that are kept without calls.
    pub min: u32,
    /// Instances at most.
    pub max: u32,
    /// Calls that may wait.
    pub queue: u32,
    /// How long an instance stays without a call.
    pub idle_timeout: String,
    /// How long an instance may take to become ready.
    pub start_timeout: String,
    /// How long a call may take.
    pub timeout: String,
}

/// A running container.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Instance {
    /// Which.
    pub id: InstanceId,
    /// `preparing`, `starting`, `ready`, `idle`, `draining`, `stopped` or `failed`.
    pub state: String,
    /// Host pid of its init, once it is started.
    pub pid: Option<u32>,
}

/// An image in the store.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Image {
    /// Its name.
    pub image: ImageRef,
    /// Digest of the platform's manifest.
    pub digest: Digest,
    /// Bytes of its layers as stored.
    pub size: u64,
    /// Whether it was imported rather than pulled.
    pub imported: bool,
}

/// Answer of `POST /images/pull`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Pulled {
    /// Its name.
    pub image: ImageRef,
    /// Digest of the platform's manifest.
    pub digest: Digest,
}

/// Answer of `POST /images/import`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Imported {
    /// What the archive named.
    pub images: Vec<Image>,
}

/// One line of a stream of events (`Accept: application/x-ndjson`). The last one is `Done` or `Error`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(tag = "event", rename_all = "lowercase")]
pub enum Event<T> {
    /// For people.
    Progress(Progress),
    /// What would have been the answer.
    Done(T),
    /// What would have been the error.
    Error(Problem),
}

impl DeployRequest {
    /// The settings, parsed; what is not set has the default of the contract.
    pub(super) fn spec(&self) -> Result<FunctionSpec, Failure> {
        let name: FunctionName = self.name.parse().map_err(|error| Failure::new(ErrorCode::BadName, format!("{error}")))?;
        let contract = self.contract.as_deref().map_or(Ok(Contract::Http), |text| setting("contract", text))?;
        let mut spec = FunctionSpec::new(FunctionId::in_default(name), image_ref(&self.image)?, contract);
        spec.port = self.port;
        spec.env = variables(&self.env)?;
        spec.args.clone_from(&self.args);
        set(&mut spec.limits.memory, self.memory.as_deref(), |text| setting("memory", text))?;
        self.container.apply(&mut spec)?;
        set(&mut spec.scale.idle_timeout, self.idle_timeout.as_deref(), |text| duration("idle_timeout", text))?;
        set(&mut spec.timeouts.start, self.start_timeout.as_deref(), |text| duration("start_timeout", text))?;
        set(&mut spec.timeouts.call, self.timeout.as_deref(), |text| duration("timeout", text))?;
        spec.scale.concurrency = self.concurrency.unwrap_or(spec.scale.concurrency);
        spec.scale.min = self.min.unwrap_or(spec.scale.min);
        spec.scale.max = self.max.unwrap_or(spec.scale.max);
        spec.scale.queue = self.queue.unwrap_or(spec.scale.queue);
        checked(spec)
    }
}

impl ContainerSettings {
    /// Puts what is set into `spec`.
    fn apply(&self, spec: &mut FunctionSpec) -> Result<(), Failure> {
        spec.entrypoint = self.entrypoint.clone().or(spec.entrypoint.take());
        spec.user = self.user.clone().or(spec.user.take());
        spec.working_dir = self.working_dir.clone().or(spec.working_dir.take());
        let limits = &mut spec.limits;
        limits.cpus = self.cpus.as_deref().map(|text| setting("cpus", text)).transpose()?.or(limits.cpus);
        limits.cpu_weight = self.cpu_weight.unwrap_or(limits.cpu_weight);
        limits.pids = self.pids.unwrap_or(limits.pids);
        limits.writable = self.writable.as_deref().map(|text| setting("writable", text)).transpose()?.or(limits.writable);
        limits.open_files = self.open_files.unwrap_or(limits.open_files);
        let isolation = &mut spec.isolation;
        isolation.no_new_privileges = self.no_new_privileges.unwrap_or(isolation.no_new_privileges);
        isolation.read_only = self.read_only.unwrap_or(isolation.read_only);
        set(&mut isolation.network, self.network.as_deref(), |text| setting("network", text))?;
        if let Some(tmpfs) = &self.tmpfs {
            isolation.tmpfs = tmpfs.iter().map(|text| setting("tmpfs", text)).collect::<Result<_, _>>()?;
        }
        if let Some(egress) = &self.egress {
            isolation.egress = egress.iter().map(|text| setting("egress", text)).collect::<Result<_, _>>()?;
        }
        Ok(())
    }

    /// All settings of `spec` as they are.
    fn of(spec: &FunctionSpec) -> Self {
        let (limits, isolation) = (&spec.limits, &spec.isolation);
        Self {
            entrypoint: spec.entrypoint.clone(),
            user: spec.user.clone(),
            working_dir: spec.working_dir.clone(),
            cpus: limits.cpus.map(|cpus| cpus.to_string()),
            cpu_weight: Some(limits.cpu_weight),
            pids: Some(limits.pids),
            writable: limits.writable.map(|size| size.to_string()),
            open_files: Some(limits.open_files),
            no_new_privileges: Some(isolation.no_new_privileges),
            read_only: Some(isolation.read_only),
            tmpfs: Some(isolation.tmpfs.iter().map(ToString::to_string).collect()),
            network: Some(isolation.network.to_string()),
            egress: Some(isolation.egress.iter().map(ToString::to_string).collect()),
        }
    }
}

impl RunRequest {
    /// The settings of a command that runs once. The engine gives it a name of its own.
    pub(crate) fn spec(&self) -> Result<FunctionSpec, Failure> {
        let name = FunctionId::in_default("run".parse().expect("a valid name"));
        let mut spec = FunctionSpec::new(name, image_ref(&self.image)?, Contract::Stdio);
        spec.args.clone_from(&self.args);
        spec.env = variables(&self.env)?;
        set(&mut spec.limits.memory, self.memory.as_deref(), |text| setting::<ByteSize>("memory", text))?;
        self.container.apply(&mut spec)?;
        checked(spec)
    }
}

impl ExecRequest {
    /// The command and its place.
    pub(crate) fn order(self) -> Result<ExecOrder, Failure> {
        let Self { command, env, working_dir, user, instance, start, terminal } = self;
        let env = variables(&env)?;
        let request = funtainer_contract::exec::ExecRequest { command, env, working_dir, user, terminal };
        Ok(ExecOrder { instance, start, request })
    }
}

impl From<FunctionView> for Function {
    fn from(view: FunctionView) -> Self {
        let container = ContainerSettings::of(&view.spec);
        let FunctionSpec { contract, env, args, scale, limits, timeouts, .. } = view.spec;
        Self {
            name: view.id.name.to_string(),
            namespace: view.id.namespace.to_string(),
            slug: view.slug.to_string(),
            revision: view.revision,
            image: view.image,
            digest: view.digest,
            contract,
            port: view.port,
            settings: FunctionSettings {
                env: env.iter().map(|var| (var.name().to_owned(), var.value().to_owned())).collect(),
                args,
                memory: limits.memory.to_string(),
                container,
                concurrency: view.concurrency,
                min: scale.min,
                max: scale.max,
                queue: scale.queue,
                idle_timeout: format_duration(scale.idle_timeout),
                start_timeout: format_duration(timeouts.start),
                timeout: format_duration(timeouts.call),
            },
            deployed_at: view.deployed_at.to_string(),
            instances: view.instances.into_iter().map(Instance::from).collect(),
            last_error: view.last_error,
        }
    }
}

impl From<InstanceView> for Instance {
    fn from(view: InstanceView) -> Self {
        Self { id: view.id, state: view.state.as_str().to_owned(), pid: view.pid }
    }
}

impl From<ImageSummary> for Image {
    fn from(summary: ImageSummary) -> Self {
        let ImageSummary { reference, digest, size, imported } = summary;
        Self { image: reference, digest, size, imported }
    }
}

/// The image reference of a request.
pub(super) fn image_ref(text: &str) -> Result<ImageRef, Failure> {
    text.parse().map_err(|error| Failure::new(ErrorCode::BadImageReference, format!("{error}")))
}

fn variables(env: &BTreeMap<String, String>) -> Result<Vec<EnvVar>, Failure> {
    env.iter()
        .map(|(name, value)| {
            EnvVar::new(name, value).map_err(|_| {
                bad_setting("env", format!("'{name}' cannot be a variable: names have no '=' and neither part a NUL"))
            })
        })
        .collect()
}

fn checked(spec: FunctionSpec) -> Result<FunctionSpec, Failure> {
    spec.check().map_err(|error| Failure::new(ErrorCode::BadSetting, error.to_string()))
}

fn set<T>(setting: &mut T, text: Option<&str>, parse: impl FnOnce(&str) -> Result<T, Failure>) -> Result<(), Failure> {
    if let Some(text) = text {
        *setting = parse(text)?;
    }
    Ok(())
}

fn setting<T: FromStr<Err: std::fmt::Display>>(name: &str, text: &str) -> Result<T, Failure> {
    text.parse().map_err(|error: T::Err| bad_setting(name, error))
}

fn duration(name: &str, text: &str) -> Result<std::time::Duration, Failure> {
    parse_duration(text).map_err(|error| bad_setting(name, error))
}

fn bad_setting(name: &str, error: impl std::fmt::Display) -> Failure {
    Failure::new(ErrorCode::BadSetting, format!("{name}: {error}"))
}

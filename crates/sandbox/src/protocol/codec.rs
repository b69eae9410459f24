//! Bytes of the messages.
//!
//! ```text
//! header (12)  magic u16 │ version u16 │ kind u16 │ zero u16 │ request number u32
//! then         the fields of the kind in their order: integers little endian, flags as one byte 0 or 1,
//!              ids as their 16 bytes, byte strings with their length (u32) before them, lists with their count (u32)
//! ```

use std::net::Ipv4Addr;

use funtainer_model::{
    ByteSize, Cpus, Digest, EgressRule, ExecId, InstanceId, Isolation, LayerId, Limits, Network, Protocol, RevisionId,
    StopSignal, TmpfsMount,
};

use super::check::{Bound, check_bytes, check_text};
use super::{
    CodecError, DESCRIPTOR_BYTES_MAX, DESCRIPTORS_MAX, ExecSpec, ExitRecord, FUNCTION_BYTES_MAX, FileSpec, GROUPS_MAX,
    InitMessage, InitStep, LAYERS_MAX, LISTENERS_MAX, MAGIC, MESSAGE_BYTES_MAX, PATH_BYTES_MAX, Refusal, Reply, Request,
    RevisionSpec, SocketCounts, Streams, TEXT_BYTES_MAX, TITLE_BYTES_MAX, VERSION, WindowSize,
};

/// Longest list of arguments, variables or files: what fits the message with four bytes of length each.
const LIST_MAX: usize = MESSAGE_BYTES_MAX / 4;

mod kind {
    pub(super) const HELLO: u16 = 1;
    pub(super) const READY: u16 = 2;
    pub(super) const OPEN_REVISION: u16 = 3;
    pub(super) const END_REVISION: u16 = 4;
    pub(super) const START: u16 = 5;
    pub(super) const SIGNAL: u16 = 6;
    pub(super) const MORE_SOCKETS: u16 = 7;
    pub(super) const LIST: u16 = 8;
    pub(super) const ACKNOWLEDGE_EXIT: u16 = 9;
    pub(super) const COMMIT_LAYER: u16 = 10;
    pub(super) const EXEC: u16 = 11;
    pub(super) const SIGNAL_EXEC: u16 = 12;

    pub(super) const WELCOME: u16 = 0x101;
    pub(super) const DONE: u16 = 0x102;
    pub(super) const REFUSED: u16 = 0x103;
    pub(super) const STARTED: u16 = 0x104;
    pub(super) const LISTED: u16 = 0x105;
    pub(super) const EXITED: u16 = 0x106;
    pub(super) const REVISION_ENDED: u16 = 0x107;
    pub(super) const STOP: u16 = 0x108;
    pub(super) const EXEC_ENDED: u16 = 0x109;
}

/// The request's number of a datagram whose header is ours, whatever follows: what a refusal of the rest is addressed to.
pub fn number_of(datagram: &[u8]) -> Option<u32> {
    Reader::new(datagram).header().ok().map(|(_, number)| number)
}

/// Reads the bytes as every message of every direction, and holds that whatever is read has exactly one form on the wire. For fuzzing: the
/// only way to fail is to panic.
pub fn check_any(datagram: &[u8]) {
    for descriptors in 0..=DESCRIPTORS_MAX {
        if let Ok((number, request)) = Request::decode(datagram, descriptors) {
            assert_eq!(request.encode(number).as_deref(), Ok(datagram), "a request has two forms");
        }
        if let Ok((number, reply)) = Reply::decode(datagram, descriptors) {
            assert_eq!(reply.encode(number).as_deref(), Ok(datagram), "a reply has two forms");
        }
        if let Ok(message) = InitMessage::from_bytes(datagram, descriptors) {
            assert_eq!(&message.to_bytes()[..], datagram, "an init's message has two forms");
        }
    }
}

impl Request {
    /// The datagram of this request. An error names the bound that it breaks.
    pub fn encode(&self, number: u32) -> Result<Vec<u8>, CodecError> {
        self.check()?;
        let mut out = Writer::new();
        match self {
            Self::Hello => out.header(kind::HELLO, number),
            Self::Ready => out.header(kind::READY, number),
            Self::OpenRevision { revision, function, title, spec } => {
                out.header(kind::OPEN_REVISION, number);
                out.raw(&revision.to_bytes());
                out.bytes(function.as_bytes());
                out.bytes(title.as_bytes());
                out.spec(spec);
            }
            Self::EndRevision { revision } => out.id(kind::END_REVISION, number, revision.to_bytes()),
            Self::Start { instance, revision, descriptor } => {
                out.id(kind::START, number, instance.to_bytes());
                out.raw(&revision.to_bytes());
                out.bytes(descriptor);
            }
            Self::Signal { instance, signal } => {
                out.id(kind::SIGNAL, number, instance.to_bytes());
                out.u8(signal.number());
            }
            Self::MoreSockets { instance } => out.id(kind::MORE_SOCKETS, number, instance.to_bytes()),
            Self::List => out.header(kind::LIST, number),
            Self::AcknowledgeExit { instance } => out.id(kind::ACKNOWLEDGE_EXIT, number, instance.to_bytes()),
            Self::CommitLayer { layer } => {
                out.header(kind::COMMIT_LAYER, number);
                out.layer(layer);
            }
            Self::Exec { exec, instance, spec } => {
                out.id(kind::EXEC, number, exec.to_bytes());
                out.raw(&instance.to_bytes());
                out.exec(spec);
            }
            Self::SignalExec { exec, signal } => {
                out.id(kind::SIGNAL_EXEC, number, exec.to_bytes());
                out.u8(signal.number());
            }
        }
        out.finish()
    }

    /// The request of a datagram that came with this many descriptors, and its number.
    pub fn decode(datagram: &[u8], descriptors: usize) -> Result<(u32, Self), CodecError> {
        let mut input = Reader::new(datagram);
        let (kind, number) = input.header()?;
        let (request, allowed) = match kind {
            kind::HELLO => (Self::Hello, 0..=0),
            kind::READY => (Self::Ready, 0..=0),
            kind::OPEN_REVISION => {
                let revision = RevisionId::from_bytes(input.array()?);
                let function = input.text(FUNCTION_BYTES_MAX, "function key")?;
                let title = input.text(TITLE_BYTES_MAX, "title")?;
                let spec = Box::new(input.spec()?);
                (Self::OpenRevision { revision, function, title, spec }, 0..=0)
            }
            kind::END_REVISION => (Self::EndRevision { revision: RevisionId::from_bytes(input.array()?) }, 0..=0),
            kind::START => {
                let instance = input.instance()?;
                let revision = RevisionId::from_bytes(input.array()?);
                let descriptor = input.bytes(DESCRIPTOR_BYTES_MAX, "descriptor")?;
                (Self::Start { instance, revision, descriptor }, 1..=3)
            }
            kind::SIGNAL => {
                let instance = input.instance()?;
                (Self::Signal { instance, signal: input.signal()? }, 0..=0)
            }
            kind::MORE_SOCKETS => (Self::MoreSockets { instance: input.instance()? }, 1..=1),
            kind::LIST => (Self::List, 0..=0),
            kind::ACKNOWLEDGE_EXIT => (Self::AcknowledgeExit { instance: input.instance()? }, 0..=0),
            kind::COMMIT_LAYER => (Self::CommitLayer { layer: input.layer()? }, 1..=1),
            kind::EXEC => {
                let exec = ExecId::from_bytes(input.array()?);
                let instance = input.instance()?;
                let spec = Box::new(input.exec()?);
                let streams = if spec.terminal.is_some() { 1..=1 } else { 4..=4 };
                (Self::Exec { exec, instance, spec }, streams)
            }
            kind::SIGNAL_EXEC => {
                let exec = ExecId::from_bytes(input.array()?);
                (Self::SignalExec { exec, signal: input.signal()? }, 0..=0)
            }
            other => return Err(CodecError::Kind(other)),
        };
        input.end()?;
        request.check()?;
        // Two would be neither a start with a log nor one with the call's streams.
        if !allowed.contains(&descriptors) || (kind == kind::START && descriptors == 2) {
            return Err(CodecError::Descriptors(descriptors));
        }
        Ok((number, request))
    }
}

impl Reply {
    /// The datagram of this reply; events have number 0.
    pub fn encode(&self, number: u32) -> Result<Vec<u8>, CodecError> {
        let mut out = Writer::new();
        match self {
            Self::Welcome { data_id } => {
                out.header(kind::WELCOME, number);
                out.bytes(data_id.as_bytes());
            }
            Self::Done => out.header(kind::DONE, number),
            Self::Refused(refusal) => {
                out.header(kind::REFUSED, number);
                out.refusal(refusal);
            }
            Self::Started { pid } => {
                out.header(kind::STARTED, number);
                out.u32(*pid);
            }
            Self::Listed { instance, revision, pid, descriptor, exit } => {
                out.id(kind::LISTED, number, instance.to_bytes());
                out.raw(&revision.to_bytes());
                out.u32(*pid);
                out.bytes(descriptor);
                out.u8(exit.is_some().into());
                if let Some(exit) = exit {
                    out.exit(exit);
                }
            }
            Self::Exited { instance, exit } => {
                out.id(kind::EXITED, number, instance.to_bytes());
                out.exit(exit);
            }
            Self::ExecEnded { exec, status } => {
                out.id(kind::EXEC_ENDED, number, exec.to_bytes());
                out.status(*status);
            }
            Self::RevisionEnded { revision } => out.id(kind::REVISION_ENDED, number, revision.to_bytes()),
            Self::Stop { grace_ms } => {
                out.header(kind::STOP, number);
                out.u32(*grace_ms);
            }
        }
        out.finish()
    }

    /// The reply of a datagram that came with this many descriptors, and the number of its request.
    pub fn decode(datagram: &[u8], descriptors: usize) -> Result<(u32, Self), CodecError> {
        let mut input = Reader::new(datagram);
        let (kind, number) = input.header()?;
        let (reply, allowed) = match kind {
            kind::WELCOME => (Self::Welcome { data_id: input.text(TEXT_BYTES_MAX, "data id")? }, 0..=0),
            kind::DONE => (Self::Done, 0..=0),
            kind::REFUSED => (Self::Refused(input.refusal()?), 0..=0),
            kind::STARTED => (Self::Started { pid: input.u32()? }, 0..=2),
            kind::LISTED => {
                let instance = input.instance()?;
                let revision = RevisionId::from_bytes(input.array()?);
                let pid = input.u32()?;
                let descriptor = input.bytes(DESCRIPTOR_BYTES_MAX, "descriptor")?;
                let exit = if input.flag()? { Some(input.exit()?) } else { None };
                let allowed = if exit.is_some() { 0..=0 } else { 0..=2 };
                (Self::Listed { instance, revision, pid, descriptor, exit }, allowed)
            }
            kind::EXITED => (Self::Exited { instance: input.instance()?, exit: input.exit()? }, 0..=0),
            kind::EXEC_ENDED => {
                let exec = ExecId::from_bytes(input.array()?);
                (Self::ExecEnded { exec, status: input.status()? }, 0..=0)
            }
            kind::REVISION_ENDED => (Self::RevisionEnded { revision: RevisionId::from_bytes(input.array()?) }, 0..=0),
            kind::STOP => (Self::Stop { grace_ms: input.u32()? }, 0..=0),
            other => return Err(CodecError::Kind(other)),
        };
        input.end()?;
        if !allowed.contains(&descriptors) {
            return Err(CodecError::Descriptors(descriptors));
        }
        Ok((number, reply))
    }
}

impl InitMessage {
    /// Bytes of each datagram.
    pub const BYTES: usize = 16;

    /// The datagram. Makes no allocation: called between clone and exec.
    ///
    /// ```text
    /// magic u16 │ version u16 │ kind u8 │ step u8 │ v4 u8 │ v6 u8 │ errno i32 │ zero u32
    /// ```
    pub fn to_bytes(&self) -> [u8; Self::BYTES] {
        let (kind, step, v4, v6, errno) = match *self {
            Self::Sockets(SocketCounts { v4, v6 }) => (1, 0, v4, v6, 0),
            Self::Listeners => (2, 0, 0, 0, 0),
            Self::Executed => (3, 0, 0, 0, 0),
            Self::ExecFailed { step, errno } => (4, step as u8, 0, 0, errno),
            Self::Terminal => (5, 0, 0, 0, 0),
        };
        let mut bytes = [0; Self::BYTES];
        bytes[..2].copy_from_slice(&MAGIC.to_le_bytes());
        bytes[2..4].copy_from_slice(&VERSION.to_le_bytes());
        bytes[4..8].copy_from_slice(&[kind, step, v4, v6]);
        bytes[8..12].copy_from_slice(&errno.to_le_bytes());
        bytes
    }

    /// The message of a datagram that came with this many descriptors.
    pub fn from_bytes(datagram: &[u8], descriptors: usize) -> Result<Self, CodecError> {
        let mut input = Reader::new(datagram);
        input.magic()?;
        let [kind, step, v4, v6] = input.array()?;
        let errno = input.i32()?;
        if input.u32()? != 0 {
            return Err(CodecError::Value("reserved field"));
        }
        input.end()?;
        let counts = SocketCounts { v4, v6 };
        let message = match kind {
            1 => Self::Sockets(counts),
            2 => Self::Listeners,
            3 => Self::Executed,
            4 => Self::ExecFailed { step: InitStep::from_number(step).ok_or(CodecError::Value("step"))?, errno },
            5 => Self::Terminal,
            other => return Err(CodecError::Kind(other.into())),
        };
        let fits = match message {
            Self::Sockets(_) => counts.total() == descriptors && descriptors <= DESCRIPTORS_MAX,
            Self::Listeners => (1..=LISTENERS_MAX).contains(&descriptors),
            Self::Terminal => descriptors == 1,
            Self::Executed | Self::ExecFailed { .. } => descriptors == 0,
        };
        if !fits {
            return Err(CodecError::Descriptors(descriptors));
        }
        // One message has one form: what a kind has no use for is zero.
        if message.to_bytes() != *datagram {
            return Err(CodecError::Value("unused field"));
        }
        Ok(message)
    }
}

/// Builds one datagram; the bounds of its parts are checked by the caller, that of the whole in [`Self::finish`].
struct Writer {
    out: Vec<u8>,
}

impl Writer {
    fn new() -> Self {
        Self { out: Vec::with_capacity(128) }
    }

    fn header(&mut self, kind: u16, number: u32) {
        self.raw(&MAGIC.to_le_bytes());
        self.raw(&VERSION.to_le_bytes());
        self.raw(&kind.to_le_bytes());
        self.raw(&[0, 0]);
        self.u32(number);
    }

    fn id(&mut self, kind: u16, number: u32, id: [u8; 16]) {
        self.header(kind, number);
        self.raw(&id);
    }

    fn raw(&mut self, bytes: &[u8]) {
        self.out.extend_from_slice(bytes);
    }

    fn u8(&mut self, value: u8) {
        self.out.push(value);
    }

    fn u32(&mut self, value: u32) {
        self.raw(&value.to_le_bytes());
    }

    fn u64(&mut self, value: u64) {
        self.raw(&value.to_le_bytes());
    }

    /// A length above `u32::MAX` saturates, and the whole is then refused for its size.
    fn length(&mut self, length: usize) {
        self.u32(u32::try_from(length).unwrap_or(u32::MAX));
    }

    fn bytes(&mut self, bytes: &[u8]) {
        self.length(bytes.len());
        self.raw(bytes);
    }

    fn list(&mut self, list: &[Vec<u8>]) {
        self.length(list.len());
        for bytes in list {
            self.bytes(bytes);
        }
    }

    fn layer(&mut self, layer: &LayerId) {
        self.raw(layer.diff_id.as_bytes());
        self.u8(layer.base.into());
    }

    fn status(&mut self, status: Option<i32>) {
        self.u8(status.is_some().into());
        self.u32(status.unwrap_or(0).cast_unsigned());
    }

    fn exit(&mut self, exit: &ExitRecord) {
        self.status(exit.status);
        self.u8(exit.out_of_memory.into());
        self.u8(exit.writable_full.into());
        self.u64(exit.memory_peak);
        self.u64(exit.cpu_us);
    }

    fn refusal(&mut self, refusal: &Refusal) {
        match refusal {
            Refusal::Malformed(text) => {
                self.u8(1);
                self.bytes(cut(text));
            }
            Refusal::NoZygote => self.u8(2),
            Refusal::NoInstance => self.u8(3),
            Refusal::NoLayer(layer) => {
                self.u8(4);
                self.layer(layer);
            }
            Refusal::System { step, errno } => {
                self.u8(5);
                self.bytes(cut(step));
                self.u32(errno.cast_unsigned());
            }
            Refusal::Exhausted(text) => {
                self.u8(6);
                self.bytes(cut(text));
            }
            Refusal::NoExec => self.u8(7),
        }
    }

    fn spec(&mut self, spec: &RevisionSpec) {
        self.length(spec.layers.len());
        for layer in &spec.layers {
            self.layer(layer);
        }
        self.list(&spec.argv);
        self.list(&spec.env);
        self.bytes(&spec.working_dir);
        self.u32(spec.uid);
        self.u32(spec.gid);
        self.length(spec.groups.len());
        for group in &spec.groups {
            self.u32(*group);
        }
        self.limits(&spec.limits);
        self.isolation(&spec.isolation);
        self.list(&spec.volumes);
        match spec.streams {
            Streams::Log => self.u8(0),
            Streams::Call => self.u8(1),
            Streams::Terminal(size) => {
                self.u8(2);
                self.size(size);
            }
        }
        self.length(spec.files.len());
        for file in &spec.files {
            self.bytes(&file.path);
            self.u32(file.mode);
            self.bytes(&file.content);
        }
        self.length(spec.listeners.len());
        for port in &spec.listeners {
            self.raw(&port.to_le_bytes());
        }
        self.raw(&[spec.sockets.v4, spec.sockets.v6]);
        self.u8(spec.stop_signal.number());
        self.bytes(spec.hostname.as_bytes());
    }

    fn size(&mut self, size: WindowSize) {
        self.raw(&size.rows.to_le_bytes());
        self.raw(&size.columns.to_le_bytes());
    }

    fn exec(&mut self, spec: &ExecSpec) {
        self.list(&spec.argv);
        self.list(&spec.env);
        self.bytes(&spec.working_dir);
        self.u32(spec.uid);
        self.u32(spec.gid);
        self.length(spec.groups.len());
        for group in &spec.groups {
            self.u32(*group);
        }
        self.u8(spec.terminal.is_some().into());
        if let Some(size) = spec.terminal {
            self.size(size);
        }
    }

    fn limits(&mut self, limits: &Limits) {
        let Limits { memory, cpus, cpu_weight, pids, writable, open_files } = *limits;
        self.u64(memory.as_bytes());
        self.u32(cpus.map_or(0, Cpus::milli));
        self.raw(&cpu_weight.to_le_bytes());
        self.u32(pids);
        self.u64(writable.map_or(0, ByteSize::as_bytes));
        self.u32(open_files);
    }

    fn isolation(&mut self, isolation: &Isolation) {
        let Isolation { no_new_privileges, read_only, tmpfs, network, egress } = isolation;
        self.raw(&[(*no_new_privileges).into(), (*read_only).into(), (*network == Network::On).into()]);
        self.length(tmpfs.len());
        for mount in tmpfs {
            self.bytes(mount.path().as_bytes());
            self.u64(mount.size().map_or(0, ByteSize::as_bytes));
        }
        self.length(egress.len());
        for rule in egress {
            self.raw(&rule.address().octets());
            let (first, last) = rule.ports().unwrap_or((0, 0));
            self.raw(&[
                rule.prefix(),
                match rule.protocol() {
                    None => 0,
                    Some(Protocol::Tcp) => 6,
                    Some(Protocol::Udp) => 17,
                },
            ]);
            self.raw(&first.to_le_bytes());
            self.raw(&last.to_le_bytes());
        }
    }

    fn finish(self) -> Result<Vec<u8>, CodecError> {
        if self.out.len() > MESSAGE_BYTES_MAX {
            return Err(CodecError::Bound { what: "message", max: MESSAGE_BYTES_MAX });
        }
        Ok(self.out)
    }
}

/// The longest prefix of whole characters that a text field takes: texts are for people, a cut one still helps.
fn cut(text: &str) -> &[u8] {
    let mut end = text.len().min(TEXT_BYTES_MAX);
    while !text.is_char_boundary(end) {
        end -= 1;
    }
    &text.as_bytes()[..end]
}

/// Reads one datagram from front to back.
struct Reader<'a> {
    rest: &'a [u8],
}

impl<'a> Reader<'a> {
    fn new(datagram: &'a [u8]) -> Self {
        Self { rest: datagram }
    }

    fn magic(&mut self) -> Result<(), CodecError> {
        if self.u16()? != MAGIC {
            return Err(CodecError::Magic);
        }
        match self.u16()? {
            VERSION => Ok(()),
            other => Err(CodecError::Version(other)),
        }
    }

    /// Kind and number.
    fn header(&mut self) -> Result<(u16, u32), CodecError> {
        self.magic()?;
        let kind = self.u16()?;
        if self.u16()? != 0 {
            return Err(CodecError::Value("reserved field"));
        }
        Ok((kind, self.u32()?))
    }

    fn take(&mut self, length: usize) -> Result<&'a [u8], CodecError> {
        let (taken, rest) = self.rest.split_at_checked(length).ok_or(CodecError::Short)?;
        self.rest = rest;
        Ok(taken)
    }

    fn array<const N: usize>(&mut self) -> Result<[u8; N], CodecError> {
        let (taken, rest) = self.rest.split_first_chunk().ok_or(CodecError::Short)?;
        self.rest = rest;
        Ok(*taken)
    }

    fn u8(&mut self) -> Result<u8, CodecError> {
        self.array().map(|[byte]| byte)
    }

    fn u16(&mut self) -> Result<u16, CodecError> {
        self.array().map(u16::from_le_bytes)
    }

    fn u32(&mut self) -> Result<u32, CodecError> {
        self.array().map(u32::from_le_bytes)
    }

    fn u64(&mut self) -> Result<u64, CodecError> {
        self.array().map(u64::from_le_bytes)
    }

    fn i32(&mut self) -> Result<i32, CodecError> {
        self.array().map(i32::from_le_bytes)
    }

    fn flag(&mut self) -> Result<bool, CodecError> {
        match self.u8()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(CodecError::Value("flag")),
        }
    }

    fn length(&mut self, bound: Bound) -> Result<usize, CodecError> {
        let length = self.u32()? as usize;
        bound.check(length)?;
        Ok(length)
    }

    fn bytes(&mut self, max: usize, what: &'static str) -> Result<Vec<u8>, CodecError> {
        let length = self.length(Bound { what, max })?;
        Ok(self.take(length)?.to_vec())
    }

    fn text(&mut self, max: usize, what: &'static str) -> Result<String, CodecError> {
        let bytes = self.bytes(max, what)?;
        String::from_utf8(bytes).map_err(|_| CodecError::Value(what))
    }

    fn list(&mut self, what: &'static str) -> Result<Vec<Vec<u8>>, CodecError> {
        let count = self.length(Bound { what, max: LIST_MAX })?;
        // Not reserved ahead: the count is a claim, the bytes that follow are the proof.
        let mut list = Vec::new();
        for _ in 0..count {
            list.push(self.bytes(MESSAGE_BYTES_MAX, what)?);
        }
        Ok(list)
    }

    fn instance(&mut self) -> Result<InstanceId, CodecError> {
        Ok(InstanceId::from_bytes(self.array()?))
    }

    fn layer(&mut self) -> Result<LayerId, CodecError> {
        Ok(LayerId { diff_id: Digest::from_sha256(self.array()?), base: self.flag()? })
    }

    fn signal(&mut self) -> Result<StopSignal, CodecError> {
        // The type's only door is its text form.
        self.u8()?.to_string().parse().map_err(|_| CodecError::Value("signal"))
    }

    fn status(&mut self) -> Result<Option<i32>, CodecError> {
        let known = self.flag()?;
        let status = self.i32()?;
        if !known && status != 0 {
            return Err(CodecError::Value("wait status"));
        }
        Ok(known.then_some(status))
    }

    fn exit(&mut self) -> Result<ExitRecord, CodecError> {
        Ok(ExitRecord {
            status: self.status()?,
            out_of_memory: self.flag()?,
            writable_full: self.flag()?,
            memory_peak: self.u64()?,
            cpu_us: self.u64()?,
        })
    }

    fn refusal(&mut self) -> Result<Refusal, CodecError> {
        Ok(match self.u8()? {
            1 => Refusal::Malformed(self.text(TEXT_BYTES_MAX, "text")?),
            2 => Refusal::NoZygote,
            3 => Refusal::NoInstance,
            4 => Refusal::NoLayer(self.layer()?),
            5 => Refusal::System { step: self.text(TEXT_BYTES_MAX, "text")?, errno: self.i32()? },
            6 => Refusal::Exhausted(self.text(TEXT_BYTES_MAX, "text")?),
            7 => Refusal::NoExec,
            _ => return Err(CodecError::Value("refusal")),
        })
    }

    fn spec(&mut self) -> Result<RevisionSpec, CodecError> {
        let mut layers = Vec::new();
        for _ in 0..self.length(Bound { what: "layers", max: LAYERS_MAX })? {
            layers.push(self.layer()?);
        }
        let argv = self.list("arguments")?;
        let env = self.list("environment")?;
        let working_dir = self.bytes(MESSAGE_BYTES_MAX, "working directory")?;
        let (uid, gid) = (self.u32()?, self.u32()?);
        let mut groups = Vec::new();
        for _ in 0..self.length(Bound { what: "groups", max: GROUPS_MAX })? {
            groups.push(self.u32()?);
        }
        let limits = self.limits()?;
        let isolation = self.isolation()?;
        let volumes = self.list("volumes")?;
        let streams = match self.u8()? {
            0 => Streams::Log,
            1 => Streams::Call,
            2 => Streams::Terminal(self.size()?),
            _ => return Err(CodecError::Value("streams")),
        };
        let mut files = Vec::new();
        for _ in 0..self.length(Bound { what: "files", max: LIST_MAX })? {
            let path = self.bytes(MESSAGE_BYTES_MAX, "path")?;
            let mode = self.u32()?;
            files.push(FileSpec { path, mode, content: self.bytes(MESSAGE_BYTES_MAX, "file")? });
        }
        let mut listeners = Vec::new();
        for _ in 0..self.length(Bound { what: "listeners", max: LISTENERS_MAX })? {
            listeners.push(self.u16()?);
        }
        let [v4, v6] = self.array()?;
        let stop_signal = self.signal()?;
        let hostname = self.text(TITLE_BYTES_MAX, "host name")?;
        let sockets = SocketCounts { v4, v6 };
        Ok(RevisionSpec {
            layers,
            argv,
            env,
            working_dir,
            uid,
            gid,
            groups,
            limits,
            isolation,
            volumes,
            streams,
            files,
            listeners,
            sockets,
            stop_signal,
            hostname,
        })
    }

    fn size(&mut self) -> Result<WindowSize, CodecError> {
        Ok(WindowSize { rows: self.u16()?, columns: self.u16()? })
    }

    fn exec(&mut self) -> Result<ExecSpec, CodecError> {
        let argv = self.list("arguments")?;
        let env = self.list("environment")?;
        let working_dir = self.bytes(MESSAGE_BYTES_MAX, "working directory")?;
        let (uid, gid) = (self.u32()?, self.u32()?);
        let mut groups = Vec::new();
        for _ in 0..self.length(Bound { what: "groups", max: GROUPS_MAX })? {
            groups.push(self.u32()?);
        }
        let terminal = if self.flag()? { Some(self.size()?) } else { None };
        Ok(ExecSpec { argv, env, working_dir, uid, gid, groups, terminal })
    }

    fn limits(&mut self) -> Result<Limits, CodecError> {
        let size = |bytes| (bytes != 0).then_some(ByteSize::bytes(bytes));
        let memory = ByteSize::bytes(self.u64()?);
        let cpus = match self.u32()? {
            0 => None,
            milli => Some(Cpus::from_milli(milli).ok_or(CodecError::Value("processors"))?),
        };
        let (cpu_weight, pids) = (self.u16()?, self.u32()?);
        Ok(Limits { memory, cpus, cpu_weight, pids, writable: size(self.u64()?), open_files: self.u32()? })
    }

    fn isolation(&mut self) -> Result<Isolation, CodecError> {
        let (no_new_privileges, read_only) = (self.flag()?, self.flag()?);
        let network = if self.flag()? { Network::On } else { Network::Off };
        let mut tmpfs = Vec::new();
        for _ in 0..self.length(Bound { what: "tmpfs", max: LIST_MAX })? {
            let path = self.text(PATH_BYTES_MAX, "path of a tmpfs")?;
            let size = Some(self.u64()?).filter(|size| *size != 0).map(ByteSize::bytes);
            let mount = TmpfsMount::new(&path, size).map_err(|_| CodecError::Value("tmpfs"))?;
            // One mount has one form.
            if mount.path() != path {
                return Err(CodecError::Value("path of a tmpfs"));
            }
            tmpfs.push(mount);
        }
        let mut egress = Vec::new();
        for _ in 0..self.length(Bound { what: "egress rules", max: LIST_MAX })? {
            let address = Ipv4Addr::from(self.array::<4>()?);
            let [prefix, protocol] = self.array()?;
            let protocol = match protocol {
                0 => None,
                6 => Some(Protocol::Tcp),
                17 => Some(Protocol::Udp),
                _ => return Err(CodecError::Value("protocol of an egress rule")),
            };
            let ports = Some((self.u16()?, self.u16()?)).filter(|ports| *ports != (0, 0));
            egress.push(EgressRule::new(address, prefix, ports, protocol).ok_or(CodecError::Value("egress rule"))?);
        }
        Ok(Isolation { no_new_privileges, read_only, tmpfs, network, egress })
    }

    fn end(&self) -> Result<(), CodecError> {
        if self.rest.is_empty() { Ok(()) } else { Err(CodecError::Surplus(self.rest.len())) }
    }
}

impl Request {
    /// The bounds of the fields that the wire form does not carry in itself.
    pub(super) fn check(&self) -> Result<(), CodecError> {
        match self {
            Self::OpenRevision { function, title, spec, .. } => {
                check_text(function, FUNCTION_BYTES_MAX, "function key")?;
                check_text(title, TITLE_BYTES_MAX, "title")?;
                spec.check()
            }
            Self::Start { descriptor, .. } => check_bytes(descriptor, DESCRIPTOR_BYTES_MAX, "descriptor"),
            Self::Exec { spec, .. } => spec.check(),
            _ => Ok(()),
        }
    }
}

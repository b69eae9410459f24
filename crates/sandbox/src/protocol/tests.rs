//! Every message goes over the wire and back, and nothing else is taken.

use funtainer_model::{
    ByteSize, Cpus, Digest, EgressRule, ExecId, InstanceId, Isolation, LayerId, Limits, Network, Protocol, RevisionId,
    StopSignal, TmpfsMount,
};
use proptest::collection::vec;
use proptest::prelude::*;

use super::*;

fn instance() -> impl Strategy<Value = InstanceId> {
    any::<[u8; 16]>().prop_map(InstanceId::from_bytes)
}

fn revision() -> impl Strategy<Value = RevisionId> {
    any::<[u8; 16]>().prop_map(RevisionId::from_bytes)
}

fn exec() -> impl Strategy<Value = ExecId> {
    any::<[u8; 16]>().prop_map(ExecId::from_bytes)
}

fn size() -> impl Strategy<Value = WindowSize> {
    any::<(u16, u16)>().prop_map(|(rows, columns)| WindowSize { rows, columns })
}

fn streams() -> impl Strategy<Value = Streams> {
    prop_oneof![Just(Streams::Log), Just(Streams::Call), size().prop_map(Streams::Terminal)]
}

fn exec_spec() -> impl Strategy<Value = ExecSpec> {
    let terminal = proptest::option::of(size());
    (vec(vec(1_u8..=255, 1..40), 1..9), vec("[A-Z]{1,8}=[a-z=]{0,20}", 0..9), path(), vec(0..IDS, 2..GROUPS_MAX), terminal)
        .prop_map(|(argv, env, working_dir, mut groups, terminal)| ExecSpec {
            argv,
            env: env.into_iter().map(String::into_bytes).collect(),
            working_dir,
            uid: groups.pop().unwrap(),
            gid: groups.pop().unwrap(),
            groups,
            terminal,
        })
}

fn layer() -> impl Strategy<Value = LayerId> {
    (any::<[u8; 32]>(), any::<bool>()).prop_map(|(bytes, base)| LayerId { diff_id: Digest::from_sha256(bytes), base })
}

fn signal() -> impl Strategy<Value = StopSignal> {
    (1_u8..=64).prop_map(|number| number.to_string().parse().unwrap())
}

fn path() -> impl Strategy<Value = Vec<u8>> {
    "/[a-z]{1,20}(/[a-z.]{1,9}x){0,4}".prop_map(String::into_bytes)
}

fn file() -> impl Strategy<Value = FileSpec> {
    (path(), 0_u32..0o7777, vec(any::<u8>(), 0..200)).prop_map(|(path, mode, content)| FileSpec { path, mode, content })
}

fn isolation() -> impl Strategy<Value = Isolation> {
    let tmpfs = vec(("/[a-z]{1,9}", 0_u64..3), 0..3);
    let egress = vec((any::<[u8; 4]>(), any::<Option<(u16, u16)>>(), any::<bool>()), 0..4);
    (any::<[bool; 3]>(), tmpfs, egress).prop_map(|([no_new_privileges, read_only, on], tmpfs, egress)| {
        let mut isolation = Isolation { no_new_privileges, read_only, ..Isolation::default() };
        isolation.network = if on { Network::On } else { Network::Off };
        for (path, size) in tmpfs {
            let mount = TmpfsMount::new(&path, (size != 0).then_some(ByteSize::bytes(size))).expect("a mount");
            if isolation.tmpfs.iter().all(|other| other.path() != mount.path()) {
                isolation.tmpfs.push(mount);
            }
        }
        for (address, ports, tcp) in egress {
            isolation.egress.extend(EgressRule::new(address.into(), 32, ports, tcp.then_some(Protocol::Tcp)));
        }
        isolation
    })
}

fn limits() -> impl Strategy<Value = Limits> {
    let sizes = (4_u64 << 20..=16 << 40, any::<Option<u32>>());
    (sizes, 0_u32..100_000, 1_u16..=10_000, 2_u32..=4_194_304, 16_u32..=1_048_576).prop_map(
        |((memory, writable), cpus, cpu_weight, pids, open_files)| Limits {
            memory: ByteSize::bytes(memory),
            cpus: Cpus::from_milli(cpus),
            cpu_weight,
            pids,
            writable: writable.map(|extra| ByteSize::bytes((1 << 20) + u64::from(extra))),
            open_files,
        },
    )
}

fn spec() -> impl Strategy<Value = RevisionSpec> {
    let text = || vec(1_u8..=255, 1..40);
    let lists =
        (vec(layer(), 0..LAYERS_MAX), vec(text(), 1..9), vec("[A-Z]{1,8}=.{0,20}", 0..9), path(), vec(0..IDS, 0..GROUPS_MAX));
    let numbers = (0..IDS, 0..IDS, streams(), vec(1_u16.., 0..=LISTENERS_MAX), 0_u8..=8, 0_u8..=8, signal());
    let volumes = vec(path(), 0..=VOLUMES_MAX);
    let rest = ("[a-z]{0,63}", limits(), isolation(), volumes);
    (lists, numbers, vec(file(), 0..4), rest).prop_map(|(lists, numbers, files, (hostname, limits, isolation, volumes))| {
        let (layers, argv, env, working_dir, groups) = lists;
        let (uid, gid, streams, listeners, v4, v6, stop_signal) = numbers;
        RevisionSpec {
            layers,
            argv,
            env: env.into_iter().map(|variable| variable.replace('\0', "").into_bytes()).collect(),
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
            sockets: SocketCounts { v4, v6 },
            stop_signal,
            hostname,
        }
    })
}

fn exit() -> impl Strategy<Value = ExitRecord> {
    any::<(Option<i32>, bool, bool, u64, u64)>().prop_map(|(status, out_of_memory, writable_full, memory_peak, cpu_us)| {
        ExitRecord { status, out_of_memory, writable_full, memory_peak, cpu_us }
    })
}

fn request() -> impl Strategy<Value = Request> {
    prop_oneof![
        Just(Request::Hello),
        Just(Request::Ready),
        Just(Request::List),
        (revision(), "[a-z/]{0,400}", "[a-z]{0,63}", spec()).prop_map(|(revision, function, title, spec)| {
            Request::OpenRevision { revision, function, title, spec: Box::new(spec) }
        }),
        revision().prop_map(|revision| Request::EndRevision { revision }),
        (instance(), revision(), vec(any::<u8>(), 0..DESCRIPTOR_BYTES_MAX))
            .prop_map(|(instance, revision, descriptor)| Request::Start { instance, revision, descriptor }),
        (instance(), signal()).prop_map(|(instance, signal)| Request::Signal { instance, signal }),
        instance().prop_map(|instance| Request::MoreSockets { instance }),
        instance().prop_map(|instance| Request::AcknowledgeExit { instance }),
        layer().prop_map(|layer| Request::CommitLayer { layer }),
        (exec(), instance(), exec_spec()).prop_map(|(exec, instance, spec)| Request::Exec {
            exec,
            instance,
            spec: Box::new(spec)
        }),
        (exec(), signal()).prop_map(|(exec, signal)| Request::SignalExec { exec, signal }),
    ]
}

fn refusal() -> impl Strategy<Value = Refusal> {
    prop_oneof![
        "[a-z é]{0,100}".prop_map(Refusal::Malformed),
        Just(Refusal::NoZygote),
        Just(Refusal::NoInstance),
        Just(Refusal::NoExec),
        layer().prop_map(Refusal::NoLayer),
        ("[a-z ]{0,100}", any::<i32>()).prop_map(|(step, errno)| Refusal::System { step, errno }),
        "[a-z ]{0,100}".prop_map(Refusal::Exhausted),
    ]
}

fn reply() -> impl Strategy<Value = Reply> {
    prop_oneof![
        "[0-9a-f]{16}".prop_map(|data_id| Reply::Welcome { data_id }),
        Just(Reply::Done),
        refusal().prop_map(Reply::Refused),
        any::<u32>().prop_map(|pid| Reply::Started { pid }),
        (instance(), revision(), any::<u32>(), vec(any::<u8>(), 0..DESCRIPTOR_BYTES_MAX), proptest::option::of(exit()))
            .prop_map(|(instance, revision, pid, descriptor, exit)| Reply::Listed {
                instance,
                revision,
                pid,
                descriptor,
                exit
            }),
        (instance(), exit()).prop_map(|(instance, exit)| Reply::Exited { instance, exit }),
        (exec(), any::<Option<i32>>()).prop_map(|(exec, status)| Reply::ExecEnded { exec, status }),
        revision().prop_map(|revision| Reply::RevisionEnded { revision }),
        any::<u32>().prop_map(|grace_ms| Reply::Stop { grace_ms }),
    ]
}

/// Numbers of descriptors that a request may come with.
fn of_request(request: &Request) -> &'static [usize] {
    match request {
        Request::Start { .. } => &[1, 3],
        Request::Exec { spec, .. } if spec.terminal.is_none() => &[4],
        Request::Exec { .. } | Request::MoreSockets { .. } | Request::CommitLayer { .. } => &[1],
        _ => &[0],
    }
}

fn of_reply(reply: &Reply) -> &'static [usize] {
    match reply {
        Reply::Started { .. } | Reply::Listed { exit: None, .. } => &[0, 1, 2],
        _ => &[0],
    }
}

proptest! {
    #[test]
    fn requests_round_trip(request in request(), number in any::<u32>()) {
        let datagram = request.encode(number).unwrap();
        prop_assert_eq!(number_of(&datagram), Some(number));
        for descriptors in 0..=DESCRIPTORS_MAX {
            let decoded = Request::decode(&datagram, descriptors);
            if of_request(&request).contains(&descriptors) {
                prop_assert_eq!(decoded, Ok((number, request.clone())));
            } else {
                prop_assert_eq!(decoded, Err(CodecError::Descriptors(descriptors)));
            }
        }
        prop_assert!(Reply::decode(&datagram, 0).is_err(), "the directions have no kind in common");
    }

    #[test]
    fn replies_round_trip(reply in reply(), number in any::<u32>()) {
        let datagram = reply.encode(number).unwrap();
        for descriptors in 0..=DESCRIPTORS_MAX {
            let decoded = Reply::decode(&datagram, descriptors);
            if of_reply(&reply).contains(&descriptors) {
                prop_assert_eq!(decoded, Ok((number, reply.clone())));
            } else {
                prop_assert_eq!(decoded, Err(CodecError::Descriptors(descriptors)));
            }
        }
    }

    #[test]
    fn no_prefix_and_no_longer_datagram_is_a_message(request in request(), surplus in vec(any::<u8>(), 1..20)) {
        let mut datagram = request.encode(1).unwrap();
        let descriptors = of_request(&request)[0];
        for length in (0..datagram.len()).step_by(1 + datagram.len() / 50) {
            prop_assert!(Request::decode(&datagram[..length], descriptors).is_err());
        }
        datagram.extend(&surplus);
        prop_assert_eq!(Request::decode(&datagram, descriptors), Err(CodecError::Surplus(surplus.len())));
    }

    #[test]
    fn what_is_decoded_is_what_would_be_encoded(bytes in vec(any::<u8>(), 0..200), kind in 0_u16..14, reply in any::<bool>()) {
        let mut datagram = Vec::new();
        datagram.extend(MAGIC.to_le_bytes());
        datagram.extend(VERSION.to_le_bytes());
        datagram.extend((if reply { 0x100 + kind } else { kind }).to_le_bytes());
        datagram.extend([0, 0]);
        datagram.extend(&bytes);
        check_any(&datagram);
        check_any(&bytes);
    }

    #[test]
    fn a_changed_byte_never_panics(request in request(), at in any::<prop::sample::Index>(), byte in any::<u8>()) {
        let mut datagram = request.encode(1).unwrap();
        let at = at.index(datagram.len());
        datagram[at] = byte;
        check_any(&datagram);
    }

    #[test]
    fn init_messages_round_trip(v4 in 0_u8..=8, v6 in 0_u8..=8, step in 1_u8..=10, errno in any::<i32>(), bytes in any::<[u8; 16]>()) {
        let counts = SocketCounts { v4, v6 };
        let step = InitStep::from_number(step).unwrap();
        for (message, descriptors) in [
            (InitMessage::Sockets(counts), counts.total()),
            (InitMessage::Listeners, 1),
            (InitMessage::Terminal, 1),
            (InitMessage::Executed, 0),
            (InitMessage::ExecFailed { step, errno }, 0),
        ] {
            let datagram = message.to_bytes();
            prop_assert_eq!(InitMessage::from_bytes(&datagram, descriptors), Ok(message));
            prop_assert!(InitMessage::from_bytes(&datagram, DESCRIPTORS_MAX + 1).is_err());
            prop_assert!(InitMessage::from_bytes(&datagram[..15], descriptors).is_err());
        }
        check_any(&bytes);
    }
}

#[test]
fn bounds_are_kept_by_who_sends() {
    let start = |length| Request::Start {
        instance: InstanceId::from_bytes([0; 16]),
        revision: RevisionId::from_bytes([0; 16]),
        descriptor: vec![0; length],
    };
    assert!(start(DESCRIPTOR_BYTES_MAX).encode(1).is_ok());
    assert!(matches!(start(DESCRIPTOR_BYTES_MAX + 1).encode(1), Err(CodecError::Bound { what: "descriptor", .. })));
}

#[test]
fn a_specification_with_a_wrong_field_is_refused() {
    let good = RevisionSpec {
        layers: Vec::new(),
        argv: vec![b"true".to_vec()],
        env: Vec::new(),
        working_dir: b"/".to_vec(),
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        limits: Limits::default(),
        isolation: Isolation::default(),
        volumes: Vec::new(),
        streams: Streams::Log,
        files: Vec::new(),
        listeners: Vec::new(),
        sockets: SocketCounts { v4: 12, v6: 4 },
        stop_signal: StopSignal::TERM,
        hostname: String::new(),
    };
    good.check().unwrap();
    let check = |change: fn(&mut RevisionSpec)| {
        let mut spec = good.clone();
        change(&mut spec);
        assert!(spec.check().is_err(), "{spec:?}");
    };
    let file = |path: &str| FileSpec { path: path.as_bytes().to_vec(), mode: 0o644, content: Vec::new() };
    check(|spec| spec.argv.clear());
    check(|spec| spec.argv = vec![Vec::new()]);
    check(|spec| spec.argv = vec![b"a\0b".to_vec()]);
    check(|spec| spec.env = vec![b"NOTHING".to_vec()]);
    check(|spec| spec.env = vec![b"=value".to_vec()]);
    check(|spec| spec.working_dir = b"relative".to_vec());
    check(|spec| spec.working_dir = b"/a/../../b".to_vec());
    check(|spec| spec.uid = IDS);
    check(|spec| spec.groups = vec![IDS]);
    check(|spec| spec.groups = vec![1; GROUPS_MAX + 1]);
    check(|spec| spec.listeners = vec![0]);
    check(|spec| spec.listeners = vec![1; LISTENERS_MAX + 1]);
    check(|spec| spec.sockets = SocketCounts { v4: 16, v6: 1 });
    check(|spec| spec.hostname = "x".repeat(64));
    check(|spec| spec.hostname = "a\nb".to_owned());
    for path in ["", "x", "/a/../b", "/a/", "/a\0b"] {
        assert!(RevisionSpec { files: vec![file(path)], ..good.clone() }.check().is_err(), "{path:?}");
    }
    let large = FileSpec { content: vec![0; FILE_BYTES_MAX + 1], ..file("/a") };
    assert!(RevisionSpec { files: vec![large], ..good }.check().is_err());
}

#[test]
fn a_command_with_a_wrong_field_is_refused() {
    let good = ExecSpec {
        argv: vec![b"true".to_vec()],
        env: Vec::new(),
        working_dir: b"/".to_vec(),
        uid: 0,
        gid: 0,
        groups: Vec::new(),
        terminal: None,
    };
    good.check().unwrap();
    let check = |change: fn(&mut ExecSpec)| {
        let mut spec = good.clone();
        change(&mut spec);
        assert!(spec.check().is_err(), "{spec:?}");
    };
    check(|spec| spec.argv.clear());
    check(|spec| spec.argv = vec![b"a".to_vec(), b"b\0".to_vec()]);
    check(|spec| spec.env = vec![b"A\0=".to_vec()]);
    check(|spec| spec.working_dir = Vec::new());
    check(|spec| spec.working_dir = b"/a/..".to_vec());
    check(|spec| spec.working_dir = vec![b'/'; PATH_BYTES_MAX + 1]);
    check(|spec| spec.uid = IDS);
    check(|spec| spec.gid = u32::MAX);
    check(|spec| spec.groups = vec![0; GROUPS_MAX + 1]);
    let (exec, instance) = (ExecId::from_bytes([1; 16]), InstanceId::from_bytes([2; 16]));
    let huge = ExecSpec { argv: vec![vec![b'x'; MESSAGE_BYTES_MAX]], ..good };
    let huge = Request::Exec { exec, instance, spec: Box::new(huge) };
    assert_eq!(huge.encode(1), Err(CodecError::Bound { what: "message", max: MESSAGE_BYTES_MAX }));
}

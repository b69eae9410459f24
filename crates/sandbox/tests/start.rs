//! Instances from start to exit on the real kernel.

mod harness;

use std::fs;
use std::io::{Read as _, Write as _};
use std::net::{TcpListener, TcpStream};
use std::os::fd::{AsFd, OwnedFd};

use funtainer_model::Isolation;
use funtainer_sandbox::fds;
use funtainer_sandbox::protocol::{
    FileSpec, InitMessage, InitStep, Refusal, Reply, Request, RevisionSpec, SocketCounts, Streams,
};
use rustix::io::Errno;

use harness::{Client, Started, instance, layer, readable, ready, revision, spec, until};

/// Runs a specification to its end; its output and exit status.
fn run(client: &mut Client, number: u128, spec: RevisionSpec) -> (String, Option<i32>) {
    assert_eq!(client.open(revision(number), spec), Reply::Done);
    let started = client.start(revision(number), instance(number)).unwrap();
    assert_eq!(started.executed().0, InitMessage::Executed);
    let output = started.output();
    (output, client.exit_of(instance(number)).status)
}

fn shell(script: &str) -> RevisionSpec {
    spec(&["sh", "-c", script])
}

/// The wait status of a process that exited with `code`.
fn exited(code: i32) -> i32 {
    code << 8
}

#[test]
fn an_instance_runs_and_ends() {
    let (mut server, mut client) = ready();
    assert!(server.announced().starts_with("listening on http://127.0.0.1:"));
    assert_eq!(client.open(revision(1), spec(&["echo", "hello from inside"])), Reply::Done);
    let started = client.start(revision(1), instance(1)).unwrap();
    let (last, sockets) = started.executed();
    assert_eq!(last, InitMessage::Executed);
    assert_eq!(sockets.len(), 16);
    assert_eq!(started.output(), "hello from inside\n");
    let exit = client.exit_of(instance(1));
    assert_eq!(exit.status, Some(0));
    assert!(exit.memory_peak > 0 && exit.cpu_us > 0, "{exit:?}");
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn a_call_has_the_streams_and_its_exit_code_arrives() {
    let (mut server, mut client) = ready();
    let call =
        RevisionSpec { streams: Streams::Call, sockets: SocketCounts { v4: 0, v6: 0 }, ..shell("cat; echo e >&2; exit 3") };
    assert_eq!(client.open(revision(1), call), Reply::Done);
    let mut started = client.call(revision(1), instance(1)).unwrap();
    let (last, sockets) = started.executed();
    assert_eq!((last, sockets.len()), (InitMessage::Executed, 0));
    fs::File::from(started.stdin.take().unwrap()).write_all(b"body").unwrap();
    let mut errors = String::new();
    fs::File::from(started.stderr.try_clone().unwrap()).read_to_string(&mut errors).unwrap();
    assert_eq!((started.output(), errors), ("body".to_owned(), "e\n".to_owned()));
    assert_eq!(client.exit_of(instance(1)).status, Some(exited(3)));
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn what_cannot_be_executed_is_told_with_its_errno() {
    let (mut server, mut client) = ready();
    for (number, (program, errno)) in [
        ("/bin/missing", Errno::NOENT),
        ("missing", Errno::NOENT),
        ("/bin/plain", Errno::ACCESS),
        ("plain", Errno::ACCESS),
        ("/bin/orphan-script", Errno::NOENT),
        ("/bin/garbage", Errno::NOEXEC),
        ("/bin", Errno::ACCESS),
        ("/bin/plain/x", Errno::NOENT),
    ]
    .into_iter()
    .enumerate()
    {
        let (revision, instance) = (revision(number as u128), instance(number as u128));
        assert_eq!(client.open(revision, spec(&[program])), Reply::Done);
        let started = client.start(revision, instance).unwrap();
        let failed = InitMessage::ExecFailed { step: InitStep::Exec, errno: errno.raw_os_error() };
        assert_eq!(started.executed().0, failed, "{program}");
        assert!(started.message().is_none(), "the init is gone");
        client.exit_of(instance);
    }
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn signals_reach_the_main_process() {
    let (mut server, mut client) = ready();
    let script = "trap 'exit 7' TERM; trap 'exit 8' USR1; echo up; while true; do sleep 0.01; done";
    assert_eq!(client.open(revision(1), shell(script)), Reply::Done);
    for (number, (signal, status)) in
        [("TERM", 7 << 8), ("USR1", 8 << 8), ("INT", 2), ("RTMIN+5", 39), ("KILL", 9)].into_iter().enumerate()
    {
        let instance = instance(number as u128);
        let started = client.start(revision(1), instance).unwrap();
        assert_eq!(started.executed().0, InitMessage::Executed);
        let mut up = [0; 3];
        fs::File::from(started.stdout.try_clone().unwrap()).read_exact(&mut up).unwrap();
        assert_eq!(client.ask(&Request::Signal { instance, signal: signal.parse().unwrap() }), Reply::Done);
        assert_eq!(client.exit_of(instance).status, Some(status), "{signal}");
    }
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn the_process_is_whom_the_revision_says_and_nobody_on_the_host() {
    let (mut server, mut client) = ready();
    let script = "id -u; id -g; id -G; cat /proc/self/status";
    let wanted = RevisionSpec { uid: 1000, gid: 100, groups: vec![7, 8], ..shell(script) };
    let (output, _) = run(&mut client, 1, wanted);
    assert!(output.starts_with("1000\n100\n100 7 8\n"), "{output}");
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t00000000800005fb", "NoNewPrivs:\t1", "Seccomp:\t2"] {
        assert!(output.contains(line), "{line} in {output}");
    }
    let (root, _) = run(&mut client, 2, shell("cat /proc/self/status"));
    assert!(root.contains("CapEff:\t00000000800005fb"), "{root}");

    assert_eq!(client.open(revision(3), spec(&["sleep", "1000"])), Reply::Done);
    let started = client.start(revision(3), instance(3)).unwrap();
    started.executed();
    let status = fs::read_to_string(format!("/proc/{}/status", started.pid)).unwrap();
    let uid: u32 = status.lines().find_map(|line| line.strip_prefix("Uid:\t")?.split('\t').next()?.parse().ok()).unwrap();
    assert!((0x7000_0000..0xF000_0000).contains(&uid), "{uid}");
    let title = fs::read_to_string(format!("/proc/{}/cmdline", started.pid)).unwrap();
    assert_eq!(title.trim_end_matches('\0'), "funtainer init");
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn files_and_directories_are_there_before_the_program() {
    let (mut server, mut client) = ready();
    let file = |path: &str, mode| FileSpec { path: path.as_bytes().to_vec(), mode, content: b"planned".to_vec() };
    let script = "pwd; cat /etc/made/deep/file /home/secret; ls -l /home/secret; echo more > /x && echo wrote";
    let wanted = RevisionSpec {
        files: vec![file("/etc/made/deep/file", 0o644), file("/home/secret", 0o600)],
        working_dir: b"/srv/made/here".to_vec(),
        ..shell(script)
    };
    let (output, _) = run(&mut client, 1, wanted.clone());
    assert!(output.starts_with("/srv/made/here\nplannedplanned-rw-------    1 0        0"), "{output}");
    assert!(output.ends_with("wrote\n"), "{output}");
    let (output, status) =
        run(&mut client, 2, RevisionSpec { isolation: Isolation { read_only: true, ..Isolation::default() }, ..wanted });
    assert!(!output.contains("wrote") && output.contains("plannedplanned"), "{output}");
    assert_eq!(status, Some(exited(1)));
    assert_eq!(server.stop(client), Some(0));
}

/// The attack of CVE-2024-21626: a working directory, or a file's place, that leads through an open descriptor.
#[test]
fn no_link_of_the_image_leads_through_a_descriptor() {
    let (mut server, mut client) = ready();
    for number in 0..24_u128 {
        let wanted = RevisionSpec { working_dir: format!("/proc/self/fd/{number}").into_bytes(), ..shell("cd ../../..; ls") };
        assert_eq!(client.open(revision(number), wanted), Reply::Done);
        let started = client.start(revision(number), instance(number)).unwrap();
        let failed = matches!(started.executed().0, InitMessage::ExecFailed { step: InitStep::WorkingDirectory, .. });
        assert!(failed, "a descriptor was entered");
        client.exit_of(instance(number));
    }
    // `/etc/fds` of the image is a link to /proc/self/fd.
    let file = FileSpec { path: b"/etc/fds/3/planned".to_vec(), mode: 0o644, content: Vec::new() };
    assert_eq!(client.open(revision(100), RevisionSpec { files: vec![file], ..shell("true") }), Reply::Done);
    let started = client.start(revision(100), instance(100)).unwrap();
    let (last, _) = started.executed();
    // Where nothing of the kernel's is mounted yet the link leads to a directory that is made inside.
    assert!(matches!(last, InitMessage::Executed | InitMessage::ExecFailed { step: InitStep::Files, .. }), "{last:?}");
    client.exit_of(instance(100));
    assert_eq!(server.stop(client), Some(0));
}

/// A program whose interpreter is the link to the file of whoever executes it: at that moment, the keeper's (CVE-2019-5736).
#[test]
fn no_program_is_interpreted_by_the_keepers_file() {
    let (mut server, mut client) = ready();
    let links = ["/proc/self/exe", "/proc/thread-self/exe", "/proc/1/exe", "/proc/self/fd/3", "/proc/1/fd/3"];
    let files = links.iter().enumerate().flat_map(|(index, link)| {
        let file = |name: &str, content| FileSpec { path: format!("/{name}{index}").into_bytes(), mode: 0o755, content };
        [file("script", format!("#!{link}\n").into_bytes()), file("elf", interpreted(link))]
    });
    let files: Vec<FileSpec> = files.collect();
    for (number, file) in (0..).zip(&files) {
        let name = String::from_utf8(file.path.clone()).unwrap();
        let wanted = RevisionSpec { files: vec![file.clone()], ..spec(&[&name]) };
        assert_eq!(client.open(revision(number), wanted), Reply::Done);
        let started = client.start(revision(number), instance(number)).unwrap();
        let (last, _) = started.executed();
        let InitMessage::ExecFailed { step: InitStep::Exec, errno } = last else { panic!("{name}: {last:?}") };
        // The keeper's file is there and closed; so is all of pid 1; descriptors are gone.
        let expect = if name.ends_with('3') { Errno::NOENT } else { Errno::ACCESS };
        assert_eq!(Errno::from_raw_os_error(errno), expect, "{name}");
        client.exit_of(instance(number));
    }
    assert_eq!(server.stop(client), Some(0));
}

/// The smallest ELF file that has an interpreter: its header, one program header, the path.
fn interpreted(by: &str) -> Vec<u8> {
    let (length, machine) = (by.len() as u64 + 1, if cfg!(target_arch = "x86_64") { 62_u16 } else { 183 });
    let mut file = b"\x7fELF\x02\x01\x01\0\0\0\0\0\0\0\0\0".to_vec();
    // ET_DYN, the machine, version; entry, program headers at 64, no section headers, flags.
    for half in [3, machine, 1, 0] {
        file.extend(half.to_le_bytes());
    }
    for word in [0_u64, 64, 0] {
        file.extend(word.to_le_bytes());
    }
    file.extend(0_u32.to_le_bytes());
    // Sizes and counts of header, program headers and section headers.
    for half in [64_u16, 56, 1, 0, 0, 0] {
        file.extend(half.to_le_bytes());
    }
    // PT_INTERP, readable; offset, two addresses, two sizes, alignment.
    for half in [3_u32, 4] {
        file.extend(half.to_le_bytes());
    }
    for word in [120_u64, 0, 0, length, length, 1] {
        file.extend(word.to_le_bytes());
    }
    file.extend(by.as_bytes());
    file.push(0);
    file
}

#[test]
fn the_init_gives_nothing_away() {
    let (mut server, mut client) = ready();
    let script = "for f in fd map_files; do ls /proc/1/$f; done; for f in environ mem maps auxv io; do cat /proc/1/$f; done; \
                  ls /proc/1/root/ /proc/1/cwd/; echo end; ls -l /proc/self/fd | wc -l";
    let (output, _) = run(&mut client, 1, shell(script));
    // The three streams, the directory itself, and the line of the sum.
    assert_eq!(output, "end\n5\n");
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn the_sockets_reach_a_server_inside_from_no_local_address() {
    let (mut server, mut client) = ready();
    assert_eq!(client.open(revision(1), spec(&["nc", "-ll", "-p", "80", "-e", "/bin/connections"])), Reply::Done);
    let started = client.start(revision(1), instance(1)).unwrap();
    let (_, mut sockets) = started.executed();
    let answer = connect(&mut sockets, 80);
    // 192.0.0.8 as the kernel writes it.
    assert!(answer.contains("080000C0"), "{answer}");
    // More of them, made by the zygote.
    let (ours, theirs) = fds::pair().unwrap();
    let (reply, _) = client.ask_with(&Request::MoreSockets { instance: instance(1) }, &[theirs.as_fd()]);
    assert_eq!(reply, Reply::Done);
    let more = Started { init: ours, ..started };
    let (message, mut sockets) = more.message().unwrap();
    assert_eq!(message, InitMessage::Sockets(SocketCounts { v4: 12, v6: 4 }));
    assert!(connect(&mut sockets, 80).contains("080000C0"));
    // The next instance has a network of its own: its zygote came back from the first one's.
    let second = client.start(revision(1), instance(2)).unwrap();
    let (_, mut sockets) = second.executed();
    assert!(connect(&mut sockets, 80).contains("080000C0"));
    assert_eq!(server.stop(client), Some(0));
}

/// Connects IPv4 sockets, one after the other, until one is accepted; what comes.
fn connect(sockets: &mut Vec<OwnedFd>, port: u16) -> String {
    let address = std::net::SocketAddrV4::new(std::net::Ipv4Addr::LOCALHOST, port);
    let socket = sockets.remove(0);
    until("the server listens", || match rustix::net::connect(&socket, &address) {
        Ok(()) | Err(Errno::ISCONN) => Some(()),
        Err(Errno::CONNREFUSED | Errno::INPROGRESS | Errno::ALREADY) => None,
        Err(errno) => panic!("{errno}"),
    });
    let mut stream = TcpStream::from(socket);
    stream.set_nonblocking(false).unwrap();
    let mut text = String::new();
    stream.read_to_string(&mut text).unwrap();
    text
}

#[test]
fn the_platform_listens_inside() {
    let (mut server, mut client) = ready();
    let wanted = RevisionSpec {
        listeners: vec![9001],
        sockets: SocketCounts { v4: 0, v6: 0 },
        ..shell("echo ping | nc 127.0.0.1 9001")
    };
    assert_eq!(client.open(revision(1), wanted), Reply::Done);
    let started = client.start(revision(1), instance(1)).unwrap();
    let (message, mut came) = started.message().unwrap();
    assert_eq!((message, came.len()), (InitMessage::Listeners, 1));
    let listener = TcpListener::from(came.remove(0));
    assert!(readable(listener.as_fd(), harness::deadline()));
    let (mut stream, _) = listener.accept().unwrap();
    let mut text = [0; 5];
    stream.set_nonblocking(false).unwrap();
    stream.read_exact(&mut text).unwrap();
    assert_eq!(&text, b"ping\n");
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn the_memory_limit_holds_and_is_told() {
    let (mut server, mut client) = ready();
    // `sh` is not the one to be killed: the limit of the whole group is what counts.
    let (_, status) = run(&mut client, 1, spec(&["dd", "if=/dev/zero", "of=/dev/null", "bs=200M", "count=1"]));
    assert_ne!(status, Some(0));
    // A tmpfs counts too.
    assert_eq!(client.open(revision(2), spec(&["dd", "if=/dev/zero", "of=/dev/shm/x", "bs=1M", "count=100"])), Reply::Done);
    let started = client.start(revision(2), instance(2)).unwrap();
    assert_eq!(started.executed().0, InitMessage::Executed);
    let exit = client.exit_of(instance(2));
    assert!(exit.out_of_memory && exit.memory_peak <= harness::MEMORY, "{exit:?}");
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn wrong_starts_are_refused_and_leave_nothing() {
    let (mut server, mut client) = ready();
    assert!(matches!(client.start(revision(9), instance(1)), Err(Refusal::NoZygote)));
    let missing = RevisionSpec { layers: vec![layer(1), layer(7)], ..shell("true") };
    assert_eq!(client.open(revision(1), missing), Reply::Refused(Refusal::NoLayer(layer(7))));
    assert!(matches!(client.start(revision(1), instance(1)), Err(Refusal::NoZygote)));

    assert_eq!(client.open(revision(2), shell("sleep 1000")), Reply::Done);
    let request = Request::Start { instance: instance(1), revision: revision(2), descriptor: vec![] };
    let directory = fs::File::open("/").unwrap();
    let refused = |client: &mut Client, sent: &[_]| match client.ask_with(&request, sent).0 {
        Reply::Refused(Refusal::Malformed(text)) => text,
        other => panic!("{other:?}"),
    };
    assert!(refused(&mut client, &[directory.as_fd()]).contains("neither pipe nor socket"));
    let (socket, _peer) = fds::pair().unwrap();
    assert!(refused(&mut client, &[socket.as_fd(), socket.as_fd(), socket.as_fd()]).contains("do not fit"));
    let started = client.start(revision(2), instance(1)).unwrap();
    started.executed();
    assert!(matches!(client.start(revision(2), instance(1)), Err(Refusal::Malformed(_))), "the same identity twice");
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn a_hundred_starts_leave_nothing() {
    let (mut server, mut client) = ready();
    assert_eq!(client.open(revision(1), shell("true")), Reply::Done);
    let once = |client: &mut Client, number: u128| {
        let started = client.start(revision(1), instance(number)).unwrap();
        assert_eq!(started.executed().0, InitMessage::Executed);
        assert_eq!(client.exit_of(instance(number)).status, Some(0));
    };
    once(&mut client, 0);
    let zygote = harness::zygote_of(&server);
    let before = until("what is released is released", || Some(harness::traces(&server, zygote)));
    for number in 1..=100 {
        once(&mut client, number);
    }
    let mut after = Vec::new();
    let gone = harness::within(|| {
        after = harness::traces(&server, zygote);
        after.iter().zip(&before).all(|(after, before)| after <= before)
    });
    assert!(gone, "before {before:?}, after {after:?}");
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn all_of_this_works_in_the_ways_of_the_oldest_kernels() {
    harness::again_in_the_oldest_ways("all_of_this_works_in_the_ways_of_the_oldest_kernels", &[]);
}

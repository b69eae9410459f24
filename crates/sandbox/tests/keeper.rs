//! The keeper among daemons and zygotes that misbehave, die or come back.

mod harness;

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::os::unix::fs::{MetadataExt as _, PermissionsExt as _};
use std::os::unix::net::UnixListener;
use std::time::{Duration, Instant};

use funtainer_sandbox::fds;
use funtainer_sandbox::mount::{Features, Mounts};
use funtainer_sandbox::protocol::{InitMessage, MESSAGE_BYTES_MAX, Refusal, Reply, Request, RevisionSpec, Streams};
use rustix::net::SendFlags;

use harness::{Client, Server, busybox_image, instance, layer, readable, ready, revision, spec, until};

/// Opens revision 1, which sleeps, and starts instance 1.
fn sleeping(client: &mut Client) -> harness::Started {
    assert_eq!(client.open(revision(1), spec(&["sleep", "1000"])), Reply::Done);
    let started = client.start(revision(1), instance(1)).unwrap();
    assert_eq!(started.executed().0, InitMessage::Executed);
    started
}

fn alive(pid: u32) -> bool {
    // A zombie is dead; who waits for it is another matter.
    fs::read_to_string(format!("/proc/{pid}/stat")).is_ok_and(|stat| !stat.contains(") Z "))
}

fn kill(pid: u32) {
    let pid = rustix::process::Pid::from_raw(pid.cast_signed()).unwrap();
    fds::pidfd_signal(fds::pidfd_open(pid).unwrap().as_fd(), 9).unwrap();
}

fn children(pid: u32) -> Vec<u32> {
    let text = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap_or_default();
    text.split_whitespace().map(|pid| pid.parse().unwrap()).collect()
}

fn child_titled(server: &Server, title: &str) -> u32 {
    let titled =
        |pid: &u32| fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default().replace('\0', " ").contains(title);
    until("the keeper's child has its title", || children(server.child.id()).into_iter().find(titled))
}

fn daemon(server: &Server) -> u32 {
    child_titled(server, "daemon --listeners")
}

#[test]
fn the_daemon_is_nobody_and_sees_little() {
    let server = Server::new();
    let _client = server.client();
    let pid = daemon(&server);
    let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap();
    for line in ["CapEff:\t0000000000000000", "CapBnd:\t0000000000000000", "NoNewPrivs:\t1", "Groups:\t \n", "Seccomp:\t2"] {
        assert!(status.contains(line), "{line} in {status}");
    }
    assert!(!status.contains("Uid:\t0"), "{status}");
    let mut seen: Vec<_> = fs::read_dir(format!("/proc/{pid}/root")).unwrap().map(|entry| entry.unwrap().file_name()).collect();
    seen.retain(|name| name != "run");
    seen.sort();
    assert_eq!(seen, ["data", "dev", "etc", "proc", "usr"]);
    let mounts = fs::read_to_string(format!("/proc/{pid}/mountinfo")).unwrap();
    for place in [" /etc ro", " /usr ro"] {
        assert!(mounts.contains(place), "{place} in {mounts}");
    }
    let open = fs::read_dir(format!("/proc/{pid}/fd")).unwrap().count();
    let cores = std::thread::available_parallelism().unwrap().get();
    // Three streams, control, admin, listeners, the stub's own two: the client and what it lends.
    assert!((5 + cores..=5 + cores + 2).contains(&open), "{open}");
}

#[test]
fn sigterm_leaves_nothing() {
    let (mut server, mut client) = ready();
    let started = sleeping(&mut client);
    let id = fs::read_to_string(server.data.join("id")).unwrap();
    assert!(!harness::cgroups(&id).is_empty());
    let (admin, pid) = (server.admin.clone(), started.pid);
    assert_eq!(fs::metadata(&admin).unwrap().permissions().mode() & 0o777, 0o660);
    assert_eq!(server.stop(client), Some(0));
    assert!(!alive(pid) && !admin.exists());
    assert_eq!(harness::cgroups(&id), Vec::<std::path::PathBuf>::new());
}

#[test]
fn a_daemon_that_ignores_the_stop_is_killed_after_ten_seconds() {
    let (mut server, client) = ready();
    let begun = Instant::now();
    server.signal(15);
    assert_eq!(server.wait().code(), Some(0));
    assert!((9..12).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    drop(client);
}

#[test]
fn a_second_signal_ends_at_once() {
    let (mut server, mut client) = ready();
    server.signal(15);
    while !matches!(client.event(), Reply::Stop { .. }) {}
    server.signal(2);
    assert_eq!(server.wait().code(), Some(0));
}

#[test]
fn a_killed_keeper_takes_everything_along_and_the_next_one_sweeps() {
    let (mut server, mut client) = ready();
    let started = sleeping(&mut client);
    let zygote = child_titled(&server, "funtainer zygote");
    let (daemon, init) = (daemon(&server), started.pid);
    let id = fs::read_to_string(server.data.join("id")).unwrap();
    server.child.kill().unwrap();
    let begun = Instant::now();
    until("all are dead", || [zygote, daemon, init].iter().all(|pid| !alive(*pid)).then_some(()));
    assert!(begun.elapsed() < Duration::from_secs(1), "{:?}", begun.elapsed());
    assert!(!harness::cgroups(&id).is_empty(), "directories remain, to be swept");
    // Mounts have been released with the last of them, and the devices under the mounts, if there were any.
    let layers = fs::File::open(server.data.join("store/layers")).unwrap();
    let mounts = Mounts::open(Features::OLDEST).unwrap();
    until("no loop device is left", || mounts.left_from_before(layers.as_fd()).unwrap().is_empty().then_some(()));
    let mut server = server.restart();
    let client = server.client();
    for top in harness::cgroups(&id) {
        assert_eq!(harness::directories(&top), 0, "{top:?}");
    }
    assert_eq!(server.stop(client), Some(0));
    assert_eq!(harness::cgroups(&id), Vec::<std::path::PathBuf>::new());
}

#[test]
fn one_data_directory_and_one_admin_socket_have_one_keeper() {
    let server = Server::new();
    let client = server.client();
    let second = |admin: &std::path::Path, data: &std::path::Path| {
        let output = std::process::Command::new(harness::keeper_host()).arg("serve").args([admin, data]).output().unwrap();
        (output.status.code(), String::from_utf8(output.stderr).unwrap())
    };
    let (code, error) = second(&server.admin.with_extension("other"), &server.data);
    assert_eq!(code, Some(1));
    assert!(error.contains("in use by another"), "{error}");
    let other = tempfile::tempdir_in(env!("CARGO_TARGET_TMPDIR")).unwrap();
    let (code, error) = second(&server.admin, other.path());
    assert_eq!(code, Some(1));
    assert!(error.contains("another server answers"), "{error}");
    let id = fs::read_to_string(other.path().join("id")).unwrap();
    assert_eq!(harness::cgroups(&id), Vec::<std::path::PathBuf>::new(), "a failed start leaves nothing");
    drop(client);
}

#[test]
fn a_stale_admin_socket_is_replaced_and_a_file_is_not() {
    let mut server = Server::new();
    let client = server.client();
    assert_eq!(server.stop(client), Some(0));
    drop(UnixListener::bind(&server.admin).unwrap());
    let mut server = server.restart();
    let client = server.client();
    assert_eq!(server.stop(client), Some(0));
    fs::write(&server.admin, "precious").unwrap();
    let mut server = server.restart();
    assert_eq!(server.wait().code(), Some(1));
    assert_eq!(fs::read_to_string(&server.admin).unwrap(), "precious");
}

#[test]
fn ten_daemons_that_die_before_they_are_ready_end_it() {
    let mut server = Server::with_env(&[("KEEPER_HOST_DIES", "3")]);
    let begun = Instant::now();
    // 0.1 + 0.2 + 0.4 + 0.8 + 1.6 + 3.2 + 3 × 5 seconds.
    let status = server.child.wait().unwrap();
    assert_eq!(status.code(), Some(70));
    assert!((20..60).contains(&begun.elapsed().as_secs()), "{:?}", begun.elapsed());
    let mut line = String::new();
    std::io::Read::read_to_string(&mut server.stdout, &mut line).unwrap();
    assert_eq!(line, "", "nothing was announced");
}

#[test]
fn a_new_daemon_adopts_what_the_old_one_left() {
    let (mut server, mut client) = ready();
    let started = sleeping(&mut client);
    assert_eq!(client.open(revision(2), spec(&["sh", "-c", "exit 5"])), Reply::Done);
    client.start(revision(2), instance(2)).unwrap().executed();
    // Its end is told and not acknowledged.
    assert!(matches!(client.event(), Reply::Exited { .. }));
    kill(daemon(&server));
    assert!(until_closed(&client));
    let mut client = server.client();
    let (listed, ended) = list(&mut client);
    let [(Reply::Listed { instance: id, revision: of, pid, descriptor, exit: None }, logs)] = &listed[..] else {
        panic!("{listed:?}")
    };
    assert_eq!((*id, *of, *pid, &descriptor[..], logs.len()), (instance(1), revision(1), started.pid, &b"opaque"[..], 2));
    let [Reply::Listed { instance: id, exit: Some(exit), .. }] = &ended[..] else { panic!("{ended:?}") };
    assert_eq!((*id, exit.status), (instance(2), Some(5 << 8)));
    assert_eq!(client.ask(&Request::AcknowledgeExit { instance: instance(2) }), Reply::Done);
    assert_eq!(client.ask(&Request::AcknowledgeExit { instance: instance(2) }), Reply::Refused(Refusal::NoInstance));
    // The adopted one is as good as one's own.
    assert_eq!(client.ask(&Request::AcknowledgeExit { instance: instance(1) }), Reply::Refused(Refusal::NoInstance));
    assert_eq!(client.ask(&Request::Signal { instance: instance(1), signal: "KILL".parse().unwrap() }), Reply::Done);
    assert_eq!(client.exit_of(instance(1)).status, Some(9));
    assert_eq!(list(&mut client), (vec![], vec![]));
    assert_eq!(server.stop(client), Some(0));
}

type Listing = (Vec<(Reply, Vec<i32>)>, Vec<Reply>);

/// Running instances with their logs' numbers, and ended ones.
fn list(client: &mut Client) -> Listing {
    use std::os::fd::AsRawFd as _;
    let number = client.send(&Request::List, &[]);
    let (mut running, mut ended) = (Vec::new(), Vec::new());
    loop {
        let (reply, logs) = client.answer(number);
        match reply {
            Reply::Listed { exit: None, .. } => running.push((reply, logs.iter().map(OwnedFd::as_raw_fd).collect())),
            Reply::Listed { .. } => ended.push(reply),
            Reply::Done => return (running, ended),
            other => panic!("{other:?}"),
        }
    }
}

/// Whether the keeper closes the control socket, as it does with that of a dead daemon.
fn until_closed(client: &Client) -> bool {
    let mut buffer = vec![0; MESSAGE_BYTES_MAX];
    harness::within(|| {
        readable(client.control.as_fd(), harness::deadline());
        matches!(fds::receive(client.control.as_fd(), &mut buffer, rustix::net::RecvFlags::empty()), Ok(None) | Err(_))
    })
}

#[test]
fn what_is_no_message_ends_the_daemon_and_a_malformed_one_is_refused() {
    let (mut server, mut client) = ready();
    let mut datagram = Request::List.encode(77).unwrap();
    datagram.push(0);
    client.send_raw(&datagram, &[]);
    let (reply, _) = client.answer(77);
    assert!(matches!(&reply, Reply::Refused(Refusal::Malformed(text)) if text.contains("1 bytes follow")), "{reply:?}");
    // Descriptors that do not belong to a message.
    client.send_raw(&Request::List.encode(78).unwrap(), &[client.control.as_fd()]);
    assert!(matches!(client.answer(78).0, Reply::Refused(Refusal::Malformed(_))));

    for garbage in [&b"x"[..], &[0; 64], b"\xA1\xF7\x02\x00 another version"] {
        let first = daemon(&server);
        client.send_raw(garbage, &[]);
        until("the daemon is replaced", || (!alive(first)).then_some(()));
        client = server.client();
    }
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn a_daemon_that_floods_and_does_not_read_is_cut_off() {
    let (mut server, mut client) = ready();
    let started = sleeping(&mut client);
    let first = daemon(&server);
    let request = Request::List.encode(1).unwrap();
    let gone = harness::within(|| {
        let _ = fds::send(client.control.as_fd(), &request, &[], SendFlags::DONTWAIT);
        !alive(first)
    });
    assert!(gone, "the daemon is not cut off");
    let mut client = server.client();
    assert!(alive(started.pid), "its instances are not its fault");
    assert_eq!(client.ask(&Request::Signal { instance: instance(1), signal: "KILL".parse().unwrap() }), Reply::Done);
    assert_eq!(client.exit_of(instance(1)).status, Some(9));
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn a_killed_zygote_loses_its_instances_and_nothing_else() {
    let (mut server, mut client) = ready();
    let started = sleeping(&mut client);
    let id = fs::read_to_string(server.data.join("id")).unwrap();
    kill(child_titled(&server, "funtainer zygote"));
    let exit = client.exit_of(instance(1));
    assert_eq!(exit.status, None);
    assert!(!alive(started.pid));
    for top in harness::cgroups(&id) {
        assert_eq!(harness::directories(&top), 0, "{top:?}");
    }
    assert_eq!(client.event(), Reply::RevisionEnded { revision: revision(1) });
    assert!(matches!(client.start(revision(1), instance(2)), Err(Refusal::NoZygote)));
    // Opened again it is as before.
    assert_eq!(client.open(revision(1), spec(&["sh", "-c", "exit 4"])), Reply::Done);
    client.start(revision(1), instance(2)).unwrap().executed();
    assert_eq!(client.exit_of(instance(2)).status, Some(4 << 8));
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn a_killed_init_ends_its_instance() {
    let (mut server, mut client) = ready();
    let started = sleeping(&mut client);
    let inside = children(started.pid);
    assert_eq!(inside.len(), 1);
    kill(started.pid);
    assert_eq!(client.exit_of(instance(1)).status, Some(9));
    assert!(!alive(inside[0]));
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn a_revision_ends_when_its_last_instance_does() {
    let (mut server, mut client) = ready();
    sleeping(&mut client);
    let zygote = child_titled(&server, "funtainer zygote");
    assert_eq!(client.ask(&Request::EndRevision { revision: revision(1) }), Reply::Done);
    assert!(alive(zygote), "an instance runs");
    assert_eq!(client.ask(&Request::Signal { instance: instance(1), signal: "KILL".parse().unwrap() }), Reply::Done);
    assert_eq!(client.exit_of(instance(1)).status, Some(9));
    assert_eq!(client.event(), Reply::RevisionEnded { revision: revision(1) });
    until("the zygote is dead", || (!alive(zygote)).then_some(()));
    assert_eq!(client.ask(&Request::EndRevision { revision: revision(3) }), Reply::Done);
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn a_call_of_a_dead_daemon_ends() {
    let (mut server, mut client) = ready();
    let call = RevisionSpec { streams: Streams::Call, ..spec(&["cat"]) };
    assert_eq!(client.open(revision(1), call), Reply::Done);
    let started = client.call(revision(1), instance(1)).unwrap();
    started.executed();
    kill(daemon(&server));
    // The daemon's ends of the streams die with it; here they are the test's.
    let pid = started.pid;
    drop(started);
    until("the call is over", || (!alive(pid)).then_some(()));
    let mut client2 = server.client();
    let ended = until("its end is listed", || list(&mut client2).1.pop());
    // By the end of its input, or by a write that nobody reads.
    assert!(matches!(ended, Reply::Listed { exit: Some(_), .. }), "{ended:?}");
    assert_eq!(server.stop(client2), Some(0));
    drop(client);
}

#[test]
fn a_data_directory_that_others_may_write_to_is_refused() {
    let (mut server, client) = ready();
    assert_eq!(server.stop(client), Some(0));
    for (mode, owner) in [(0o777, 0), (0o755, 1000)] {
        std::os::unix::fs::chown(&server.data, Some(owner), None).unwrap();
        fs::set_permissions(&server.data, fs::Permissions::from_mode(mode)).unwrap();
        server = server.restart();
        assert_eq!(server.wait().code(), Some(1), "{mode:o} {owner}");
    }
}

#[test]
fn an_id_that_was_not_written_whole_is_made_anew() {
    let (mut server, client) = ready();
    assert_eq!(server.stop(client), Some(0));
    fs::remove_file(server.data.join("id")).unwrap();
    fs::write(server.data.join("id.new"), "0123").unwrap();
    let mut server = server.restart();
    let client = server.client();
    assert_eq!(fs::read_to_string(server.data.join("id")).unwrap().len(), 16);
    assert!(!server.data.join("id.new").exists());
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn layers_are_committed_whole_and_for_good() {
    let (mut server, mut client) = ready();
    let store = server.data.join("store");
    let committed = store.join("layers").join(layer(1).file_name());
    let found = fs::metadata(&committed).unwrap();
    assert_eq!((found.uid(), found.gid(), found.mode() & 0o7777, found.nlink()), (0, 0, 0o444, 1));
    // Once more: nothing happens.
    assert_eq!(client.commit(&server.data_of_daemon(), layer(1), busybox_image()), Reply::Done);
    assert_eq!(fs::metadata(&committed).unwrap().ino(), found.ino());

    let staged = store.join("staged");
    harness::stage(&server.data, busybox_image(), &staged);
    let read_only = fs::File::open(&staged).unwrap();
    let mut refused = |file: &fs::File| match client.ask_with(&Request::CommitLayer { layer: layer(2) }, &[file.as_fd()]).0 {
        Reply::Refused(Refusal::Malformed(text)) => text,
        other => panic!("{other:?}"),
    };
    let writer = fs::OpenOptions::new().append(true).open(&staged).unwrap();
    assert!(refused(&read_only).contains("writer"));
    assert!(refused(&writer).contains("not read-only"));
    drop(writer);
    assert!(refused(&fs::File::open("/dev/null").unwrap()).contains("no regular file"));
    assert!(refused(&fs::File::open("/proc/version").unwrap()).contains("no regular file on the store"));

    let mut bytes = fs::read(&staged).unwrap();
    bytes[1024 + 80] = 1;
    // Written over, they keep their owner.
    for name in ["features", "short"] {
        harness::stage(&server.data, busybox_image(), &store.join(name));
    }
    fs::write(store.join("features"), &bytes).unwrap();
    assert!(refused(&fs::File::open(store.join("features")).unwrap()).contains("features 0x1"));
    fs::write(store.join("short"), "short").unwrap();
    assert!(refused(&fs::File::open(store.join("short")).unwrap()).contains("no erofs"));
    // Readable by the daemon, and somebody else's.
    fs::copy(busybox_image(), store.join("foreign")).unwrap();
    assert!(refused(&fs::File::open(store.join("foreign")).unwrap()).contains("not the daemon's"));
    // A write lease of the daemon's: the keeper does not wait until it breaks.
    // SAFETY: no code of ours runs; the default for the news of a broken lease would end this process.
    unsafe { libc::signal(libc::SIGIO, libc::SIG_IGN) };
    let begun = Instant::now();
    let lease = |kind: libc::c_int| {
        // SAFETY: integers only.
        unsafe { libc::fcntl(std::os::fd::AsRawFd::as_raw_fd(&read_only), libc::F_SETLEASE, kind) }
    };
    until("the lease is given", || (lease(libc::F_WRLCK) == 0).then_some(()));
    assert!(refused(&read_only).contains("has a lease"));
    assert!(begun.elapsed() < Duration::from_secs(10), "{:?}", begun.elapsed());
    assert_eq!(lease(libc::F_UNLCK), 0);
    assert!(!store.join("layers").join(layer(2).file_name()).exists());
    assert_eq!(fs::metadata(&staged).unwrap().mode() & 0o777, 0o644, "what was refused is as it was");

    assert_eq!(client.commit(&server.data_of_daemon(), layer(2), &staged), Reply::Done);
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn layers_of_zygotes_lie_over_each_other() {
    let (mut server, mut client) = ready();
    // The same image twice: overlayfs takes it if both are clones of one mount or mounts of two files.
    assert_eq!(client.commit(&server.data_of_daemon(), layer(2), busybox_image()), Reply::Done);
    for (number, layers) in [(1, vec![layer(1), layer(2)]), (2, vec![layer(2), layer(1)])] {
        assert_eq!(client.open(revision(number), RevisionSpec { layers, ..spec(&["echo", "ok"]) }), Reply::Done);
        let started = client.start(revision(number), instance(number)).unwrap();
        assert_eq!(started.executed().0, InitMessage::Executed);
        assert_eq!(started.output(), "ok\n");
        client.exit_of(instance(number));
    }
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn the_keeper_is_small() {
    let (mut server, mut client) = ready();
    sleeping(&mut client);
    let status = fs::read_to_string(format!("/proc/{}/status", server.pid())).unwrap();
    let resident = status.lines().find_map(|line| line.strip_prefix("VmRSS:")?.trim().strip_suffix(" kB")?.parse::<u64>().ok());
    assert!(resident.unwrap() < 4096, "{resident:?} kB");
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn layers_come_and_go_in_the_ways_of_the_oldest_kernels() {
    let mounting = ["layers", "keeper", "sigterm", "zygote", "revision"];
    harness::again_in_the_oldest_ways("layers_come_and_go_in_the_ways_of_the_oldest_kernels", &mounting);
}

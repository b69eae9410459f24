//! What is no message, on every socket between keeper, zygote, init and daemon: it ends who sent it, at most, and nobody else.
//!
//! The tests take the processes' own sockets (`pidfd_getfd`) and send in their place, as somebody would who has taken the process over. That of
//! the daemon is in `keeper.rs`.

mod harness;

use std::fs;
use std::os::fd::{AsFd, OwnedFd};
use std::process::Command;

use funtainer_sandbox::fds;
use funtainer_sandbox::protocol::{InitMessage, Reply};
use rustix::net::SendFlags;
use rustix::process::{Pid, PidfdFlags, PidfdGetfdFlags, pidfd_getfd, pidfd_open};

use harness::{Client, Server, command, exec, instance, ready, revision, spec, until, zygote_of};

/// Datagrams that are none of ours, and beginnings that might be.
fn garbage() -> Vec<Vec<u8>> {
    let mut all = vec![b"x".to_vec(), vec![0; 64], vec![0xFF; 4096], vec![7; 100_000], "GET / HTTP/1.1\r\n\r\n".into()];
    // Each kind of order and report, with an instance that nobody knows or too much behind it.
    for kind in 0..10 {
        for rest in [0, 4, 16, 20, 21, 200] {
            all.push([vec![kind], vec![0xAB; rest]].concat());
        }
    }
    all
}

/// A descriptor of another process, as one's own.
fn taken(pid: i32, number: i32) -> OwnedFd {
    let process = pidfd_open(Pid::from_raw(pid).unwrap(), PidfdFlags::empty()).unwrap();
    pidfd_getfd(process, number, PidfdGetfdFlags::empty()).unwrap()
}

/// The inode of a process's socket.
fn inode(pid: i32, number: &str) -> Option<String> {
    let link = fs::read_link(format!("/proc/{pid}/fd/{number}")).ok()?;
    Some(link.to_str()?.strip_prefix("socket:[")?.strip_suffix(']')?.to_owned())
}

/// The keeper's end of the socket that a zygote has as number 3.
fn keepers_end(server: &Server, zygote: i32) -> OwnedFd {
    let theirs = inode(zygote, "3").unwrap();
    let sockets =
        Command::new("ss").args(["--unix", "--all", "--numeric", "--no-header"]).output().expect("iproute2 is installed");
    let sockets = String::from_utf8(sockets.stdout).unwrap();
    let peer = sockets.lines().find_map(|line| {
        let fields: Vec<_> = line.split_whitespace().collect();
        (fields.get(5) == Some(&theirs.as_str())).then(|| (*fields.last().unwrap()).to_owned())
    });
    let peer = peer.expect("the zygote's socket is listed");
    let numbers = fs::read_dir(format!("/proc/{}/fd", server.pid())).unwrap();
    let numbers: Vec<String> = numbers.map(|entry| entry.unwrap().file_name().into_string().unwrap()).collect();
    let number = numbers.iter().find(|number| inode(server.pid(), number).is_some_and(|inode| peer.contains(&inode)));
    taken(server.pid(), number.expect("the keeper has the other end").parse().unwrap())
}

/// An instance of a revision that sleeps.
fn sleeping(client: &mut Client, number: u128) {
    assert_eq!(client.open(revision(number), spec(&["sleep", "1000"])), Reply::Done);
    assert_eq!(client.start(revision(number), instance(number)).unwrap().executed().0, InitMessage::Executed);
}

/// The bystander still runs commands.
fn unharmed(client: &mut Client, number: u128) {
    let begun = client.exec(instance(1), exec(number), command(&["true"])).expect("the bystander is there");
    begun.begun();
    assert_eq!(client.end_of_exec(exec(number)), Some(0));
}

/// Waits for the end of the zygote of a revision with its instance; everything else is an error.
fn ended(client: &mut Client, number: u128) {
    client.exit_of(instance(number));
    until("the revision ends", || match client.event() {
        Reply::RevisionEnded { revision: ended } => (ended == revision(number)).then_some(()),
        other => panic!("{other:?}"),
    });
}

#[test]
fn a_zygote_that_sends_what_is_no_report_is_ended() {
    let (mut server, mut client) = ready();
    sleeping(&mut client, 1);
    let bystander = zygote_of(&server);
    for (number, datagram) in (100..).zip(garbage()) {
        sleeping(&mut client, number);
        let zygote = zygotes(&server).into_iter().find(|pid| *pid != bystander).expect("a second zygote");
        // Too long for the socket is refused by the kernel already, and is no message.
        if fds::send(taken(zygote, 3).as_fd(), &datagram, &[], SendFlags::empty()).is_err() {
            fds::send(taken(zygote, 3).as_fd(), b"x", &[], SendFlags::empty()).unwrap();
        }
        ended(&mut client, number);
    }
    unharmed(&mut client, 1);
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn a_zygote_that_is_sent_what_is_no_order_ends_alone() {
    let (mut server, mut client) = ready();
    sleeping(&mut client, 1);
    let bystander = zygote_of(&server);
    for (number, datagram) in (100..).zip(garbage()).step_by(5) {
        sleeping(&mut client, number);
        let zygote = zygotes(&server).into_iter().find(|pid| *pid != bystander).expect("a second zygote");
        let end = keepers_end(&server, zygote);
        if fds::send(end.as_fd(), &datagram, &[], SendFlags::empty()).is_err() {
            fds::send(end.as_fd(), b"x", &[], SendFlags::empty()).unwrap();
        }
        drop(end);
        // Either it could not read it and has ended, or it has refused an order that it understood, by a report that nobody waits for.
        ended(&mut client, number);
    }
    unharmed(&mut client, 1);
    assert_eq!(server.stop(client), Some(0));
}

/// The init never reads from the daemon: what is sent to it stays where it is.
#[test]
fn an_init_listens_to_nobody() {
    let (mut server, mut client) = ready();
    sleeping(&mut client, 1);
    assert_eq!(client.open(revision(2), spec(&["echo", "unmoved"])), Reply::Done);
    for (number, datagram) in (200..).zip(garbage()) {
        let (ours, theirs) = fds::pair().unwrap();
        // Before the init is there to read it.
        let _ = fds::send(ours.as_fd(), &datagram, &[ours.as_fd()], SendFlags::DONTWAIT);
        let request = harness::start_request(revision(2), instance(number));
        let (reply, mut descriptors) = client.ask_with(&request, &[theirs.as_fd()]);
        assert!(matches!(reply, Reply::Started { .. }), "{reply:?}");
        let _ = fds::send(ours.as_fd(), &datagram, &[], SendFlags::DONTWAIT);
        let mut output = String::new();
        std::io::Read::read_to_string(&mut fs::File::from(descriptors.pop().unwrap()), &mut output).unwrap();
        assert_eq!(output, "unmoved\n");
        assert_eq!(client.exit_of(instance(number)).status, Some(0));
    }
    unharmed(&mut client, 1);
    assert_eq!(server.stop(client), Some(0));
}

fn zygotes(server: &Server) -> Vec<i32> {
    let pid = server.pid();
    let children = fs::read_to_string(format!("/proc/{pid}/task/{pid}/children")).unwrap();
    let children = children.split_whitespace().map(|pid| pid.parse().unwrap());
    children.filter(|pid| title(*pid).starts_with("funtainer zygote")).collect()
}

fn title(pid: i32) -> String {
    fs::read_to_string(format!("/proc/{pid}/cmdline")).unwrap_or_default()
}

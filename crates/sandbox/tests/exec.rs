//! Commands in running instances: what they are, how they end, and what nobody gets at.

mod harness;

use std::fs;
use std::io::{Read as _, Write as _};
use std::os::fd::{AsFd, OwnedFd};
use std::process::{Command, Stdio};

use funtainer_sandbox::fds;
use funtainer_sandbox::protocol::{
    ExecSpec, InitMessage, InitStep, Refusal, Reply, Request, RevisionSpec, SocketCounts, Streams, WindowSize,
};
use rustix::io::Errno;
use rustix::termios::{Winsize, tcsetwinsize};

use harness::{Client, command, exec, instance, on_terminal, ready, revision, spec, until};

/// The status of a process that ends with this code.
const fn exited(code: i32) -> i32 {
    code << 8
}

fn shell(script: &str) -> RevisionSpec {
    spec(&["sh", "-c", script])
}

/// Starts instance 1 of revision 1 and waits until its program runs.
fn running(client: &mut Client, wanted: RevisionSpec) -> harness::Started {
    assert_eq!(client.open(revision(1), wanted), Reply::Done);
    let started = client.start(revision(1), instance(1)).unwrap();
    assert_eq!(started.executed().0, InitMessage::Executed);
    // The init says so a moment before commands may come in.
    until("commands may come in", || match client.exec(instance(1), exec(0), command(&["true"])) {
        Ok(_) => Some(client.end_of_exec(exec(0))),
        Err(Refusal::NoInstance) => None,
        Err(refusal) => panic!("{refusal}"),
    });
    started
}

/// Runs a command in instance 1 to its end: standard output, standard error, status.
fn run(client: &mut Client, number: u128, wanted: ExecSpec) -> (String, String, Option<i32>) {
    let mut begun = client.exec(instance(1), exec(number), wanted).unwrap();
    let (output, errors) = begun.output();
    (output, errors, client.end_of_exec(exec(number)))
}

fn script(text: &str) -> ExecSpec {
    command(&["sh", "-c", text])
}

#[test]
fn a_command_is_in_the_instance_and_has_no_more_than_it() {
    let (mut server, mut client) = ready();
    let looks = "for n in cgroup ipc mnt net pid user uts; do readlink /proc/self/ns/$n; done; \
                 grep -E '^(Cap|NoNew|Seccomp:)' /proc/self/status; cat /proc/self/cgroup /proc/self/limits; ls / /dev";
    let looks = looks.replace("grep -E", "busybox grep -E");
    running(&mut client, shell(&format!("({looks}; echo end) > /home/own; exec sleep 1000")));
    let (output, errors, status) = run(&mut client, 1, script(&looks));
    assert_eq!((errors.as_str(), status), ("", Some(0)));
    let own = until("the program has written", || {
        let (own, _, _) = run(&mut client, 2, command(&["cat", "/home/own"]));
        own.strip_suffix("end\n").map(str::to_owned)
    });
    assert!(own.contains("NoNewPrivs:\t1") && own.contains("Seccomp:\t2") && own.contains("net:["), "{own}");
    assert_eq!(output, own);
    // The same pid namespace as a member of it, and the same host name.
    let (output, _, _) =
        run(&mut client, 3, script("cat /proc/1/cmdline; echo; cat /etc/hostname /proc/sys/kernel/hostname; ps"));
    assert!(output.contains("funtainer init") && output.contains("test\n") && output.contains("sleep 1000"), "{output}");
    // No descriptor but the three streams and that of the directory.
    let (output, _, _) = run(&mut client, 4, command(&["ls", "/proc/self/fd"]));
    assert_eq!(output, "0\n1\n2\n3\n");
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn streams_user_environment_and_directory_are_its_own() {
    let (mut server, mut client) = ready();
    running(&mut client, RevisionSpec { working_dir: b"/home".to_vec(), ..shell("exec sleep 1000") });
    let wanted = ExecSpec {
        env: vec![b"PATH=/bin".to_vec(), b"GREETING=hello".to_vec()],
        working_dir: b"/etc".to_vec(),
        uid: 1000,
        gid: 100,
        groups: vec![7, 8],
        ..script("cat; echo e >&2; pwd; echo $GREETING; id -u; id -g; id -G; cat /proc/self/status; exit 3")
    };
    let mut begun = client.exec(instance(1), exec(1), wanted).unwrap();
    let stdin = begun.streams.as_ref().unwrap()[0].try_clone().unwrap();
    fs::File::from(stdin).write_all(b"input\n").unwrap();
    assert!(begun.begun().1.is_none());
    let (output, errors) = begun.output();
    assert!(output.starts_with("input\n/etc\nhello\n1000\n100\n100 7 8\n"), "{output}");
    assert!(output.contains("CapEff:\t0000000000000000") && output.contains("CapPrm:\t0000000000000000"), "{output}");
    assert_eq!((errors.as_str(), client.end_of_exec(exec(1))), ("e\n", Some(exited(3))));
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn what_cannot_run_is_told() {
    let (mut server, mut client) = ready();
    running(&mut client, shell("exec sleep 1000"));
    let mut number = 10;
    let mut failed = |client: &mut Client, wanted: ExecSpec, step, errno: Errno| {
        number += 1;
        let begun = client.exec(instance(1), exec(number), wanted.clone()).unwrap();
        let Some(InitMessage::ExecFailed { step: found, errno: because }) = begun.begun().1 else { panic!("{wanted:?} runs") };
        assert_eq!((found, Errno::from_raw_os_error(because)), (step, errno), "{wanted:?}");
        // There was a process.
        assert_eq!(client.end_of_exec(exec(number)), Some(exited(127)));
    };
    failed(&mut client, command(&["/bin/missing"]), InitStep::Exec, Errno::NOENT);
    failed(&mut client, command(&["missing"]), InitStep::Exec, Errno::NOENT);
    failed(&mut client, command(&["/bin/plain"]), InitStep::Exec, Errno::ACCESS);
    let directory = |path: &str| ExecSpec { working_dir: path.as_bytes().to_vec(), ..command(&["true"]) };
    failed(&mut client, directory("/missing"), InitStep::WorkingDirectory, Errno::NOENT);
    failed(&mut client, directory("/bin/sh"), InitStep::WorkingDirectory, Errno::NOTDIR);
    // The attack of CVE-2024-21626: these are all the descriptors that there are.
    for descriptor in 0..4 {
        failed(&mut client, directory(&format!("/proc/self/fd/{descriptor}")), InitStep::WorkingDirectory, Errno::LOOP);
    }
    for descriptor in 4..20 {
        failed(&mut client, directory(&format!("/proc/self/fd/{descriptor}")), InitStep::WorkingDirectory, Errno::NOENT);
    }
    failed(&mut client, directory("/proc/self/root"), InitStep::WorkingDirectory, Errno::LOOP);
    failed(&mut client, directory("/etc/fds/2"), InitStep::WorkingDirectory, Errno::LOOP);
    // Longer than the kernel takes one argument.
    let long = "x".repeat(130_000);
    let (output, _, status) = run(&mut client, 1, command(&["echo", &long[..100_000]]));
    assert_eq!((output.len(), status), (100_001, Some(0)));
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn wrong_requests_are_refused_and_leave_nothing() {
    let (mut server, mut client) = ready();
    assert!(matches!(client.exec(instance(1), exec(1), command(&["true"])), Err(Refusal::NoInstance)));
    running(&mut client, shell("exec sleep 1000"));
    assert!(matches!(client.exec(instance(7), exec(1), command(&["true"])), Err(Refusal::NoInstance)));
    let signal = Request::SignalExec { exec: exec(1), signal: "TERM".parse().unwrap() };
    assert_eq!(client.ask(&signal), Reply::Refused(Refusal::NoExec));

    let (socket, _peer) = fds::pair().unwrap();
    let directory = fs::File::open("/").unwrap();
    let request = Request::Exec { exec: exec(1), instance: instance(1), spec: Box::new(command(&["true"])) };
    let refused = |client: &mut Client, sent: &[_]| match client.ask_with(&request, sent).0 {
        Reply::Refused(Refusal::Malformed(text)) => text,
        other => panic!("{other:?}"),
    };
    assert!(refused(&mut client, &[socket.as_fd()]).contains("descriptors"));
    assert!(refused(&mut client, &[directory.as_fd(); 4]).contains("neither pipe nor socket"));
    let directories = [socket.as_fd(), directory.as_fd(), directory.as_fd(), directory.as_fd()];
    assert!(refused(&mut client, &directories).contains("neither pipe nor socket"));

    // The same identity twice, and more than an instance takes.
    let sleeping = command(&["sleep", "1000"]);
    let mut begun = vec![client.exec(instance(1), exec(100), sleeping.clone()).unwrap()];
    assert!(matches!(client.exec(instance(1), exec(100), sleeping.clone()), Err(Refusal::Malformed(_))));
    for number in 101..116 {
        begun.push(client.exec(instance(1), exec(number), sleeping.clone()).unwrap());
    }
    assert!(matches!(client.exec(instance(1), exec(116), sleeping.clone()), Err(Refusal::Exhausted(_))));
    assert_eq!(kill(&mut client, 105), Some(9));
    begun.push(client.exec(instance(1), exec(117), sleeping).unwrap());
    assert_eq!(server.stop(client), Some(0));
}

/// Kills a command; its status.
fn kill(client: &mut Client, number: u128) -> Option<i32> {
    assert_eq!(client.ask(&Request::SignalExec { exec: exec(number), signal: "KILL".parse().unwrap() }), Reply::Done);
    client.end_of_exec(exec(number))
}

#[test]
fn signals_reach_it_and_a_kill_its_group() {
    let (mut server, mut client) = ready();
    running(&mut client, shell("exec sleep 1000"));
    for (number, (signal, status)) in [("TERM", exited(7)), ("HUP", 1), ("RTMIN+5", 39)].into_iter().enumerate() {
        let number = number as u128 + 1;
        let begun = client.exec(instance(1), exec(number), script("trap 'exit 7' TERM; echo up; while :; do sleep 0.01; done"));
        let begun = begun.unwrap();
        first_line(&begun.streams.as_ref().unwrap()[1]);
        assert_eq!(client.ask(&Request::SignalExec { exec: exec(number), signal: signal.parse().unwrap() }), Reply::Done);
        assert_eq!(client.end_of_exec(exec(number)), Some(status), "{signal}");
    }
    let begun = client.exec(instance(1), exec(9), script("sleep 2222 & echo up; wait")).unwrap();
    first_line(&begun.streams.as_ref().unwrap()[1]);
    assert_eq!(kill(&mut client, 9), Some(9));
    let (processes, _, _) = run(&mut client, 10, command(&["ps"]));
    assert!(!processes.contains("2222"), "{processes}");
    assert_eq!(
        client.ask(&Request::SignalExec { exec: exec(9), signal: "KILL".parse().unwrap() }),
        Reply::Refused(Refusal::NoExec)
    );
    assert_eq!(server.stop(client), Some(0));
}

fn first_line(stream: &OwnedFd) {
    let mut up = [0; 3];
    fs::File::from(stream.try_clone().unwrap()).read_exact(&mut up).unwrap();
    assert_eq!(&up, b"up\n");
}

/// Reads a terminal until `text` has come; all of it.
fn read_until(terminal: &fs::File, text: &str) -> String {
    let mut all = Vec::new();
    loop {
        assert!(harness::readable(terminal.as_fd(), harness::deadline()), "{text:?} did not come after {all:?}");
        let mut buffer = [0; 4096];
        let read = (&*terminal).read(&mut buffer).unwrap_or(0);
        all.extend_from_slice(&buffer[..read]);
        let said = String::from_utf8_lossy(&all).into_owned();
        if said.contains(text) {
            return said;
        }
        assert!(read > 0, "{text:?} did not come before the end of {said:?}");
    }
}

#[test]
fn a_terminal_is_one() {
    let (mut server, mut client) = ready();
    running(&mut client, shell("exec sleep 1000"));
    let begun = client.exec(instance(1), exec(1), on_terminal("tty; stty size; exec sh", 33, 101)).unwrap();
    let (terminal, failed) = begun.begun();
    assert_eq!(failed, None);
    let mut terminal = fs::File::from(terminal.unwrap());
    read_until(&terminal, "/dev/pts/0\r\n33 101\r\n");
    tcsetwinsize(&terminal, Winsize { ws_row: 50, ws_col: 120, ws_xpixel: 0, ws_ypixel: 0 }).unwrap();
    terminal.write_all(b"stty size\n").unwrap();
    read_until(&terminal, "50 120\r\n");
    // It is the controlling terminal: /dev/tty is there, and keys are signals.
    terminal.write_all(b"echo through > /dev/tty; sleep 1000\n").unwrap();
    read_until(&terminal, "\nthrough\r\n");
    let sleeping = || run(&mut client, 20, command(&["ps"])).0;
    let mut sleeping = sleeping;
    until("the sleep runs", || sleeping().contains("sleep 1000\n").then_some(()));
    terminal.write_all(&[3]).unwrap();
    read_until(&terminal, "^C");
    terminal.write_all(b"echo after $?\n").unwrap();
    read_until(&terminal, "after 130\r\n");
    terminal.write_all(&[4]).unwrap();
    assert_eq!(client.end_of_exec(exec(1)), Some(exited(0)));

    // Who lets go of it hangs up.
    let begun = client.exec(instance(1), exec(2), on_terminal("echo up; exec sleep 3333", 24, 80)).unwrap();
    let terminal = fs::File::from(begun.begun().0.unwrap());
    read_until(&terminal, "up\r\n");
    drop(terminal);
    assert_eq!(client.end_of_exec(exec(2)), Some(1));
    // For somebody who is not root the terminal is their own.
    let wanted = ExecSpec { uid: 1000, gid: 1000, ..on_terminal("ls -l $(tty); echo x > $(tty)", 24, 80) };
    let begun = client.exec(instance(1), exec(3), wanted).unwrap();
    let said = read_until(&fs::File::from(begun.begun().0.unwrap()), "x\r\n");
    assert!(said.starts_with("crw--w----    1 1000     5"), "{said}");
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn an_instance_can_have_a_terminal() {
    let (mut server, mut client) = ready();
    let wanted = RevisionSpec {
        streams: Streams::Terminal(WindowSize { rows: 40, columns: 90 }),
        sockets: SocketCounts { v4: 0, v6: 0 },
        ..shell("tty; stty size; cat /proc/self/stat; read line; echo got $line; exit 4")
    };
    assert_eq!(client.open(revision(1), wanted), Reply::Done);
    let (pair, theirs) = fds::pair().unwrap();
    let request = harness::start_request(revision(1), instance(1));
    let (reply, logs) = client.ask_with(&request, &[theirs.as_fd()]);
    assert!(matches!(reply, Reply::Started { .. }) && logs.is_empty(), "{reply:?}");
    drop(theirs);
    let begun = harness::Exec { id: exec(0), pair, streams: None };
    let (terminal, executed) = begun.begun();
    assert_eq!(executed, Some(InitMessage::Executed));
    let mut terminal = fs::File::from(terminal.unwrap());
    read_until(&terminal, "/dev/pts/0\r\n40 90\r\n");
    terminal.write_all(b"words\n").unwrap();
    read_until(&terminal, "got words\r\n");
    assert_eq!(client.exit_of(instance(1)).status, Some(exited(4)));
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn it_ends_with_its_instance() {
    let (mut server, mut client) = ready();
    running(&mut client, shell("exec sleep 1000"));
    let begun = client.exec(instance(1), exec(1), script("trap '' TERM HUP; echo up; sleep 4444")).unwrap();
    first_line(&begun.streams.as_ref().unwrap()[1]);
    assert_eq!(client.ask(&Request::Signal { instance: instance(1), signal: "KILL".parse().unwrap() }), Reply::Done);
    assert_eq!(client.end_of_exec(exec(1)), Some(9));
    client.exit_of(instance(1));
    assert!(matches!(client.exec(instance(1), exec(2), command(&["true"])), Err(Refusal::NoInstance)));
    assert_eq!(server.stop(client), Some(0));
}

/// Commands while the instance ends: each is refused, told of, or reaped; the zygote goes on.
#[test]
fn the_end_of_an_instance_is_no_trap() {
    let (mut server, mut client) = ready();
    assert_eq!(client.open(revision(1), shell("exec sleep 1000")), Reply::Done);
    for round in 0..20_u128 {
        let id = instance(round);
        let started = client.start(revision(1), id).unwrap();
        assert_eq!(started.executed().0, InitMessage::Executed);
        let mut begun = Vec::new();
        for number in 0..8 {
            if number == round % 8 {
                client.send(&Request::Signal { instance: id, signal: "KILL".parse().unwrap() }, &[]);
            }
            let (pair, theirs) = fds::pair().unwrap();
            let exec = exec(round * 8 + number);
            let request = Request::Exec { exec, instance: id, spec: Box::new(on_terminal("sleep 1000", 1, 1)) };
            begun.push((exec, client.send(&request, &[theirs.as_fd()]), pair));
        }
        let (mut asked, mut ended) = (begun.len(), Vec::new());
        let (mut accepted, mut exited) = (Vec::new(), false);
        while asked > 0 || ended.len() < accepted.len() || !exited {
            match client.receive().expect("the keeper lives") {
                (0, Reply::ExecEnded { exec, .. }, _) => ended.push(exec),
                (0, Reply::Exited { instance, .. }, _) => exited = instance == id,
                (number, reply, _) => {
                    let Some((exec, ..)) = begun.iter().find(|(_, asked, _)| *asked == number) else { continue };
                    asked -= 1;
                    match reply {
                        Reply::Done => accepted.push(*exec),
                        Reply::Refused(Refusal::NoInstance) => {}
                        other => panic!("{other:?}"),
                    }
                }
            }
        }
        assert_eq!(client.ask(&Request::AcknowledgeExit { instance: id }), Reply::Done);
    }
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn it_ends_with_its_daemon_and_the_instance_goes_on() {
    let (mut server, mut client) = ready();
    let started = running(&mut client, shell("exec sleep 1000"));
    for number in 1..4 {
        let begun = client.exec(instance(1), exec(number), script("trap '' HUP TERM PIPE; echo up; sleep 5555; :")).unwrap();
        first_line(&begun.streams.as_ref().unwrap()[1]);
    }
    // One that is on its way when the daemon dies.
    let (_pair, theirs) = fds::pair().unwrap();
    let late = Request::Exec { exec: exec(9), instance: instance(1), spec: Box::new(on_terminal("sleep 5555", 1, 1)) };
    client.send(&late, &[theirs.as_fd()]);
    client.end_daemon(1);
    drop(client);
    let mut client = server.client();
    assert!(matches!(client.ask(&Request::List), Reply::Listed { instance: listed, .. } if listed == instance(1)));
    assert!(matches!(client.receive(), Some((_, Reply::Done, _))));
    let gone = || {
        let (processes, _, _) = run(&mut client, 20, command(&["ps"]));
        (!processes.contains("5555")).then_some(())
    };
    until("the commands of the dead daemon are gone", gone);
    drop(started);
    assert_eq!(server.stop(client), Some(0));
}

/// What a container's root writes down of every process that it meets: programs, descriptors, directories, memory. One that is on its way
/// it stops, to have the time.
const WATCHER: &str = "while :; do for p in /proc/[0-9]*; do case $p in /proc/1) continue;; esac; \
    case $(cat $p/cmdline) in funtainer*) kill -STOP ${p#/proc/}; echo stopped $p;; esac; \
    for l in $p/exe $p/cwd $p/root $p/fd/*; do t=$(readlink $l) && echo \"$l $t\"; done; \
    cat $p/environ; kill -CONT ${p#/proc/}; done 2>/dev/null; done";

/// The attacks of CVE-2016-9962 and CVE-2019-5736: a process inside that waits for one from outside to come in.
#[test]
fn nobody_inside_gets_hold_of_a_command_on_its_way() {
    let (mut server, mut client) = ready();
    running(&mut client, shell(&format!("({WATCHER}) > /dev/shm/seen & exec sleep 1000")));
    for number in 1..60 {
        let (_, _, status) = run(&mut client, number, command(&["true"]));
        assert_eq!(status, Some(0));
        let begun = client.exec(instance(1), exec(1000 + number), on_terminal("true", 24, 80)).unwrap();
        let _terminal = begun.begun();
        assert_eq!(client.end_of_exec(exec(1000 + number)), Some(0));
    }
    let (seen, _, _) = run(&mut client, 100, command(&["cat", "/dev/shm/seen"]));
    assert!(seen.contains("exe /bin/busybox"), "the watcher sees processes: {seen}");
    let foreign = |line: &&str| {
        let target = line.rsplit(' ').next().unwrap_or_default();
        let own = ["/bin/busybox", "/", "/dev/shm/seen", "/dev/null", "/dev/pts/0"].contains(&target)
            || target.starts_with("pipe:[")
            || target.starts_with("/proc")
            || line.starts_with("PATH=")
            || line.starts_with("SHLVL=")
            || line.starts_with("stopped");
        !own
    };
    assert_eq!(seen.lines().find(foreign), None);

    // The control: the same watcher sees what comes in carelessly, here as the user that it runs as itself.
    let control = server.data.join("control");
    fs::create_dir(&control).unwrap();
    let watching = RevisionSpec { uid: 1000, gid: 1000, ..shell(&format!("({WATCHER}) > /dev/shm/seen & exec sleep 1000")) };
    assert_eq!(client.open(revision(2), watching), Reply::Done);
    let started = client.start(revision(2), instance(2)).unwrap();
    assert_eq!(started.executed().0, InitMessage::Executed);
    let enter = "exec 9< \"$0\"; exec nsenter --target \"$1\" --mount --pid --user -S 1000 -G 1000 /bin/sleep 1000";
    let mut careless = Command::new("sh");
    careless.args(["-c", enter]).arg(&control).arg(started.pid.to_string()).stdin(Stdio::null());
    let mut careless = careless.spawn().unwrap();
    let seen = format!("/proc/{}/root/dev/shm/seen", started.pid);
    until("the watcher sees the descriptor", || {
        fs::read_to_string(&seen).is_ok_and(|seen| seen.lines().any(|line| line.contains("/fd/9 /"))).then_some(())
    });
    careless.kill().unwrap();
    careless.wait().unwrap();
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn a_hundred_commands_leave_nothing() {
    let (mut server, mut client) = ready();
    running(&mut client, shell("exec sleep 1000"));
    let zygote = harness::zygote_of(&server);
    let before = harness::traces(&server, zygote);
    for round in 0..10 {
        let mut begun = Vec::new();
        for number in round * 10..round * 10 + 10 {
            let wanted = if number % 2 == 0 { on_terminal("exit 5", 24, 80) } else { script("exit 5") };
            begun.push(client.exec(instance(1), exec(1000 + number), wanted).unwrap());
        }
        for begun in begun {
            assert_eq!(client.end_of_exec(begun.id), Some(exited(5)));
        }
    }
    let mut after = Vec::new();
    let gone = harness::within(|| {
        after = harness::traces(&server, zygote);
        after.iter().zip(&before).all(|(after, before)| after <= before)
    });
    assert!(gone, "before {before:?}, after {after:?}");
    assert_eq!(server.stop(client), Some(0));
}

//! What lies where in an instance: the platform's files, volumes, file systems in memory, streams that are opened again.

mod harness;

use std::fs;
use std::io::Read as _;

use funtainer_model::Isolation;
use funtainer_sandbox::protocol::{InitMessage, InitStep, Reply, RevisionSpec, SocketCounts, Streams};

use harness::{Client, instance, ready, revision, spec};

/// Runs a script to its end; what it wrote.
fn run(client: &mut Client, number: u128, change: impl FnOnce(&mut RevisionSpec), script: &str) -> String {
    let mut wanted = spec(&["sh", "-c", script]);
    change(&mut wanted);
    assert_eq!(client.open(revision(number), wanted), Reply::Done);
    let started = client.start(revision(number), instance(number)).unwrap();
    assert_eq!(started.executed().0, InitMessage::Executed);
    let mut errors = fs::File::from(started.stderr.try_clone().unwrap());
    let mut output = started.output();
    errors.read_to_string(&mut output).unwrap();
    client.exit_of(instance(number));
    output
}

/// The errno of a start that fails where volumes and the like are put into place.
fn refused(client: &mut Client, number: u128, change: impl FnOnce(&mut RevisionSpec)) -> i32 {
    let mut wanted = spec(&["true"]);
    change(&mut wanted);
    assert_eq!(client.open(revision(number), wanted), Reply::Done);
    let started = client.start(revision(number), instance(number)).unwrap();
    let InitMessage::ExecFailed { step: InitStep::Volumes, errno } = started.executed().0 else { panic!("it was not refused") };
    client.exit_of(instance(number));
    errno
}

fn volumes(spec: &mut RevisionSpec, paths: &[&str]) {
    spec.volumes = paths.iter().map(|path| path.as_bytes().to_vec()).collect();
}

fn read_only(spec: &mut RevisionSpec) {
    spec.isolation = Isolation { read_only: true, ..spec.isolation.clone() };
}

fn tmpfs(spec: &mut RevisionSpec, mounts: &[&str]) {
    spec.isolation.tmpfs = mounts.iter().map(|text| text.parse().unwrap()).collect();
}

#[test]
fn the_platforms_files_lie_over_the_images() {
    let (mut server, mut client) = ready();
    let script = "cat /etc/hostname; cat /etc/hosts; stat -c '%n %a %u %g' /etc /etc/hosts /etc/resolv.conf /dev /proc /sys; \
        readlink /etc/resolv.conf; ls /home; ls /etc/fds >/dev/null && echo the rest stays; echo own > /etc/hosts && cat /etc/hosts";
    let output = run(&mut client, 1, |spec| spec.hostname = "name-1".to_owned(), script);
    assert!(output.starts_with("name-1\n127.0.0.1\tlocalhost\n::1\tlocalhost ip6-localhost"), "{output}");
    assert!(output.contains("\n127.0.0.1\tname-1\n"), "{output}");
    // Of the image are the owner and mode of the directory, and what else is in it. Its link was not followed.
    assert!(
        output.contains("/etc 755 0 0\n/etc/hosts 644 0 0\n/etc/resolv.conf 644 0 0\n/dev 755 0 0\n/proc 555 "),
        "{output}"
    );
    assert!(output.ends_with("the rest stays\nown\n"), "{output}");
    // What one instance wrote no other sees.
    let output = run(&mut client, 2, |_| {}, "cat /etc/hostname; wc -l < /etc/hosts");
    assert_eq!(output, "test\n7\n");
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn volumes_are_writable_with_the_images_content_and_owner() {
    let (mut server, mut client) = ready();
    let script = "stat -c '%n %a %u:%g' /data /made/here; cat /data/seed; echo; id -u; \
        echo new > /data/file && echo data; echo new > /made/here/file && echo made; echo new > /x && echo root; cat /data/file; pwd";
    let both = |spec: &mut RevisionSpec| {
        volumes(spec, &["/data", "/made/here"]);
        spec.working_dir = b"/data/work".to_vec();
    };
    let common = "/data 755 1000:100\n/made/here 755 0:0\nfrom the image\n0\ndata\nmade\n";
    let output = run(&mut client, 1, both, script);
    assert_eq!(output, format!("{common}root\nnew\n/data/work\n"));
    let output = run(
        &mut client,
        2,
        |spec| {
            both(spec);
            read_only(spec);
        },
        script,
    );
    assert!(output.starts_with(&format!("{common}new\n/data/work\n")) && output.contains("Read-only file system"), "{output}");
    // Who owns the image's directory can write there, others cannot.
    let user = |number, uid, client: &mut Client| {
        let change = |spec: &mut RevisionSpec| {
            volumes(spec, &["/data"]);
            read_only(spec);
            spec.uid = uid;
        };
        run(client, number, change, "echo new > /data/file && echo wrote")
    };
    assert_eq!(user(3, 1000, &mut client), "wrote\n");
    assert!(user(4, 1001, &mut client).contains("Permission denied"));
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn file_systems_in_memory_are_bounded_and_hold_no_programs() {
    let (mut server, mut client) = ready();
    let script = "stat -c '%n %a %u:%g' /tmp /data /deep/in/it; ls /data; dd if=/dev/zero of=/tmp/f bs=64k count=64 2>&1 | tail -n 1; \
        stat -c %s /tmp/f; cat /bin/true > /deep/in/it/true; busybox chmod 755 /deep/in/it/true; /deep/in/it/true; echo exit $?; \
        echo x > /root-is && echo wrote; cat /proc/self/mounts";
    let output = run(
        &mut client,
        1,
        |spec| {
            tmpfs(spec, &["/tmp:1M", "/data", "/deep/in/it:4M", "/dev/shm:2M"]);
            read_only(spec);
        },
        script,
    );
    // The image's directory lends its owner and mode; a new one is everybody's.
    assert!(output.starts_with("/tmp 1777 0:0\n/data 755 1000:100\n/deep/in/it 1777 0:0\n"), "{output}");
    assert!(!output.contains("seed") && output.contains("\n1048576\n") && output.contains("exit 126"), "{output}");
    assert!(!output.contains("wrote"), "{output}");
    for (place, size) in [("/tmp", "1024k"), ("/data", "65536k"), ("/deep/in/it", "4096k"), ("/dev/shm", "2048k")] {
        let line =
            output.lines().find(|line| line.split(' ').nth(1) == Some(place)).unwrap_or_else(|| panic!("{place}: {output}"));
        for option in ["rw", "nosuid", "nodev", "noexec", &format!("size={size}")] {
            assert!(line.split([' ', ',']).any(|found| found == option), "{option} in {line}");
        }
    }
    // Without any of it nothing is there, and shared memory can be written all the same.
    let output = run(&mut client, 2, read_only, "ls -d /tmp; echo x > /dev/shm/x && echo shared; grep shm /proc/self/mounts");
    assert!(output.contains("shared") && output.contains("size=65536k") && output.contains("No such file"), "{output}");
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn a_tmpfs_lies_in_a_volume_and_a_volume_in_a_tmpfs() {
    let (mut server, mut client) = ready();
    let change = |spec: &mut RevisionSpec| {
        volumes(spec, &["/data", "/t/volume"]);
        tmpfs(spec, &["/data/cache", "/t"]);
        read_only(spec);
        spec.working_dir = b"/t/work/dir".to_vec();
    };
    let script = "for path in /data /data/cache /t /t/volume .; do echo x > $path/f && echo $path; done; ls /data; pwd";
    let output = run(&mut client, 1, change, script);
    assert_eq!(output, "/data\n/data/cache\n/t\n/t/volume\n.\ncache\nf\nseed\n/t/work/dir\n");
    assert_eq!(server.stop(client), Some(0));
}

/// Links of the image stay in the image, whatever they say; what the kernel mounts lies over all of it.
#[test]
fn links_lead_volumes_nowhere_else() {
    let (mut server, mut client) = ready();
    let change = |places: &'static [&'static str], memory: &'static [&'static str]| {
        move |spec: &mut RevisionSpec| {
            volumes(spec, places);
            tmpfs(spec, memory);
            read_only(spec);
        }
    };
    let output = run(&mut client, 1, change(&["/to-data"], &[]), "echo x > /data/x && cat /to-data/x /to-data/seed");
    assert_eq!(output, "x\nfrom the image");
    // `/proc` is the kernel's.
    let script = "cat /proc/sys/kernel/ostype; for path in /x /../x /proc/x /proc/sys/kernel/domainname; do echo x > $path; done; ls /bin/sh";
    for (number, (places, memory)) in
        (10..).zip([(&["/to-proc", "/to-proc/sys"][..], &[][..]), (&[], &["/to-proc", "/to-proc/sys"])])
    {
        let output = run(&mut client, number, change(places, memory), script);
        assert!(output.starts_with("Linux\n/bin/sh\n"), "{output}");
        assert_eq!(output.lines().filter(|line| line.contains("can't create")).count(), 4, "{output}");
    }
    // Behind `/..` what lies on the root would be in sight.
    assert_eq!(refused(&mut client, 18, change(&["/to-root"], &[])), libc::EBUSY);
    assert_eq!(refused(&mut client, 19, change(&[], &["/to-root"])), libc::EBUSY);
    assert_eq!(refused(&mut client, 20, change(&["/to-nothing"], &[])), libc::ENOENT);
    assert_eq!(refused(&mut client, 21, change(&["/bin/plain"], &[])), libc::ENOTDIR);
    assert_eq!(refused(&mut client, 22, change(&[], &["/bin/plain"])), libc::ENOTDIR);
    assert_eq!(refused(&mut client, 23, change(&[], &["/bin/plain/x"])), libc::ENOTDIR);
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn a_user_opens_the_log_again() {
    let (mut server, mut client) = ready();
    let script = "echo out > /dev/stdout; echo more >> /proc/self/fd/1; echo err > /dev/stderr; cat /dev/stdout; echo end";
    let output = run(
        &mut client,
        1,
        |spec| {
            spec.uid = 1000;
            spec.gid = 100;
        },
        script,
    );
    // For writing only: nobody inside takes lines out of the log.
    assert!(
        output.starts_with("out\nmore\nend\n") && output.contains("err\n") && output.contains("Permission denied"),
        "{output}"
    );
    // Of a call, too, whose pipes the daemon makes, standard error is a log.
    let mut wanted = spec(&["sh", "-c", "echo err > /dev/stderr"]);
    (wanted.uid, wanted.streams, wanted.sockets) = (1000, Streams::Call, SocketCounts { v4: 0, v6: 0 });
    assert_eq!(client.open(revision(2), wanted), Reply::Done);
    let started = client.call(revision(2), instance(2)).unwrap();
    assert_eq!(started.executed().0, InitMessage::Executed);
    let mut errors = String::new();
    fs::File::from(started.stderr.try_clone().unwrap()).read_to_string(&mut errors).unwrap();
    assert_eq!(errors, "err\n");
    client.exit_of(instance(2));
    assert_eq!(server.stop(client), Some(0));
}

#[test]
fn an_instance_sees_its_own_limits_and_no_other_groups() {
    let (mut server, mut client) = ready();
    let script = "cd /sys/fs/cgroup; for file in memory/memory.limit_in_bytes memory.max; do cat $file 2>/dev/null && echo $file; done; \
        cat /proc/self/cgroup; for file in memory/cgroup.procs cgroup.procs; do test -e $file && { echo 0 > $file || echo closed; }; done; \
        ls -d */ 2>/dev/null; ls */*/ 2>/dev/null; grep cgroup /proc/self/mountinfo";
    for number in 1..3 {
        let output = run(&mut client, number, |_| {}, script);
        assert!(output.starts_with("67108864\nmemory"), "{output}");
        assert!(output.contains("closed") && output.contains("Read-only file system"), "{output}");
        // All that is mounted there is the instance's own, at the root of what it sees.
        for line in output.lines().filter(|line| line.contains(" - cgroup")) {
            let fields: Vec<&str> = line.split(' ').collect();
            assert_eq!((fields[3], &fields[5][..3]), ("/", "ro,"), "{line}");
        }
        assert!(!output.contains("funtainer"), "{output}");
    }
    assert_eq!(server.stop(client), Some(0));
    let id = fs::read_to_string(server.data.join("id")).unwrap();
    assert_eq!(harness::cgroups(&id), Vec::<std::path::PathBuf>::new());
}

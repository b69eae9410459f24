use std::io::Write;
use std::path::Path;

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

fn slug() -> Slug {
    "f".parse().unwrap()
}

fn instance() -> InstanceId {
    InstanceId::from_bytes([7; 16])
}

async fn write(logs: &Logs, stream: Stream, parts: &[&[u8]]) -> Bytes {
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let mut capture = logs.capture(&slug(), instance(), stream, reader, None).unwrap();
    let parts: Vec<Vec<u8>> = parts.iter().map(|part| part.to_vec()).collect();
    let writing = tokio::task::spawn_blocking(move || {
        let mut writer = std::fs::File::from(writer);
        for part in parts {
            writer.write_all(&part).unwrap();
        }
    });
    writing.await.unwrap();
    capture.drained(DEADLINE).await;
    capture.tail()
}

async fn read(logs: &Logs, lines: usize) -> Vec<String> {
    let mut receiver = logs.read(&slug(), lines, false).await.unwrap();
    let mut text = Vec::new();
    while let Some(piece) = receiver.recv().await {
        text.extend_from_slice(&piece);
    }
    String::from_utf8(text).unwrap().lines().map(str::to_owned).collect()
}

/// Lines without their times.
fn texts(lines: &[String]) -> Vec<&str> {
    lines.iter().map(|line| line.split_once(' ').unwrap().1).collect()
}

fn bytes_in(directory: &Path) -> u64 {
    std::fs::read_dir(directory).unwrap().map(|entry| entry.unwrap().metadata().unwrap().len()).sum()
}

#[tokio::test]
async fn lines_have_time_instance_and_stream() {
    let directory = tempfile::tempdir().unwrap();
    let logs = Logs::open(directory.path().join("logs")).unwrap();
    assert!(read(&logs, 10).await.is_empty());
    let tail = write(&logs, Stream::Stderr, &[b"one\ntw", b"o\r\n\nunfinished"]).await;
    assert_eq!(tail, "one\ntwo\r\n\nunfinished");
    assert!(write(&logs, Stream::Stdout, &[b"out\n"]).await.is_empty());
    let lines = read(&logs, 10).await;
    let prefix = instance().to_string();
    let expect: Vec<String> = ["stderr one", "stderr two", "stderr ", "stderr unfinished", "stdout out"]
        .iter()
        .map(|text| format!("{prefix} {text}"))
        .collect();
    assert_eq!(texts(&lines), expect);
    for line in &lines {
        let time = line.split_once(' ').unwrap().0;
        assert!(time.parse::<jiff::Timestamp>().is_ok() && time.len() == 27, "{time}");
    }
    assert_eq!(texts(&read(&logs, 2).await), expect[3..]);
    assert!(read(&logs, 0).await.is_empty());
}

#[tokio::test]
async fn long_lines_are_cut() {
    let directory = tempfile::tempdir().unwrap();
    let logs = Logs::open(directory.path().to_owned()).unwrap();
    let long = vec![b'x'; 5 * LINE_BYTES_MAX / 2];
    let tail = write(&logs, Stream::Stderr, &[&long, b"\nshort\n"]).await;
    assert_eq!(tail.len(), TAIL_BYTES_MAX);
    let lines = read(&logs, usize::MAX).await;
    assert!(lines.iter().all(|line| line.len() <= LINE_BYTES_MAX + 80));
    assert_eq!(lines.iter().map(|line| line.matches('x').count()).sum::<usize>(), long.len());
    assert!(lines.last().unwrap().ends_with(" stderr short"));
}

#[tokio::test]
async fn two_files_are_all_that_a_function_keeps() {
    let directory = tempfile::tempdir().unwrap();
    let logs = Logs::open(directory.path().to_owned()).unwrap();
    let line = [b'y'; 999];
    for number in 0..5 * writer::FILE_BYTES_MAX / 10_000 {
        let mut text = Vec::new();
        for _ in 0..10 {
            text.extend_from_slice(&line);
            text.push(b'\n');
        }
        let entry =
            Entry { slug: slug(), instance: instance(), stream: Stream::Stdout, time: SystemTime::now(), text: text.into() };
        assert!(logs.commands.send(Command::Write(entry)).await.is_ok(), "{number}");
    }
    let wanted = 10_000;
    assert_eq!(read(&logs, wanted).await.len(), wanted, "lines of both files");
    let bytes = bytes_in(directory.path());
    assert!(bytes > writer::FILE_BYTES_MAX && bytes < 2 * writer::FILE_BYTES_MAX + 100_000, "{bytes}");
    logs.forget(&slug()).await;
    assert_eq!(bytes_in(directory.path()), 0);
    assert!(read(&logs, 1).await.is_empty());
}

#[tokio::test]
async fn followers_see_what_comes_and_end_with_the_log() {
    let directory = tempfile::tempdir().unwrap();
    let logs = Logs::open(directory.path().to_owned()).unwrap();
    write(&logs, Stream::Stdout, &[b"a\nb\n"]).await;
    let mut follower = logs.read(&slug(), 1, true).await.unwrap();
    assert!(follower.recv().await.unwrap().ends_with(b"stdout b\n"));
    write(&logs, Stream::Stdout, &[b"c\n"]).await;
    assert!(follower.recv().await.unwrap().ends_with(b"stdout c\n"));
    logs.forget(&slug()).await;
    assert!(follower.recv().await.is_none());
}

#[tokio::test]
async fn a_follower_that_does_not_read_holds_nobody_up() {
    let directory = tempfile::tempdir().unwrap();
    let logs = Logs::open(directory.path().to_owned()).unwrap();
    let mut follower = logs.read(&slug(), 0, true).await.unwrap();
    for _ in 0..1_000 {
        let entry =
            Entry { slug: slug(), instance: instance(), stream: Stream::Stdout, time: SystemTime::now(), text: "z\n".into() };
        assert!(logs.commands.send(Command::Write(entry)).await.is_ok());
    }
    assert_eq!(read(&logs, 5_000).await.len(), 1_000);
    let mut seen = 0;
    while let Ok(piece) = follower.try_recv() {
        seen += usize::from(piece.ends_with(b" z\n"));
    }
    assert_eq!(seen, 256);
    write(&logs, Stream::Stdout, &[b"again\n"]).await;
    assert!(follower.recv().await.unwrap().ends_with(b"bytes of the log left out: the reader is too slow)\n"));
    assert!(follower.recv().await.unwrap().ends_with(b"again\n"));
}

#[tokio::test]
async fn a_copy_gets_the_bytes_as_they_are() {
    let directory = tempfile::tempdir().unwrap();
    let logs = Logs::open(directory.path().to_owned()).unwrap();
    let (reader, writer) = rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap();
    let (sender, mut copy) = mpsc::channel(1);
    let mut capture = logs.capture(&slug(), instance(), Stream::Stderr, reader, Some(sender)).unwrap();
    rustix::io::write(&writer, b"no line feed\r").unwrap();
    assert_eq!(copy.recv().await.unwrap(), "no line feed\r");
    drop(copy);
    rustix::io::write(&writer, b"more").unwrap();
    drop(writer);
    capture.drained(DEADLINE).await;
    assert_eq!(capture.tail(), "no line feed\rmore");
}

#[test]
fn output_above_the_rate_waits() {
    let start = Instant::now();
    let mut rate = Rate::new(start);
    assert_eq!(rate.spend(COST_PER_S_MAX / 2, start), None);
    let pause = rate.spend(COST_PER_S_MAX / 2, start + Duration::from_millis(100)).unwrap();
    assert_eq!(pause, Duration::from_millis(900));
    assert_eq!(rate.spend(COST_PER_S_MAX / 2, start + Duration::from_secs(1)), None);
    assert_eq!(rate.spend(COST_PER_S_MAX / 2, start + Duration::from_secs(5)), None, "a new second");
}

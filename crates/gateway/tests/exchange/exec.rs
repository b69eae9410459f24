//! Commands in running instances, through the admin socket.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use bytes::Bytes;
use funtainer_contract::terminal::TerminalSize;
use funtainer_gateway::api::frames::{Frame, RunEnd};
use funtainer_model::ErrorCode;

use crate::native::{upgrade, upgraded};
use crate::{DEADLINE, Running};

fn running() -> Running {
    let running = Running::start();
    running.deploy(r#"{"name":"f","image":"localhost/fake/echo:1"}"#);
    running
}

fn exec(running: &Running, json: &str, frames: &[Frame]) -> Vec<Frame> {
    upgraded(running, "/functions/f/exec", "funtainer-exec", json, frames)
}

fn begin(running: &Running, json: &str) -> UnixStream {
    upgrade(running, "/functions/f/exec", "funtainer-exec", json)
}

/// Sends without waiting, until nothing more is taken.
fn flood(stream: &mut UnixStream) {
    let frame = Frame::Stdin(Bytes::from(vec![b'x'; 60_000])).encode();
    stream.set_write_timeout(Some(Duration::from_millis(300))).unwrap();
    while stream.write_all(&frame).is_ok() {}
}

fn wait_until(what: &str, condition: impl Fn() -> bool) {
    let deadline = Instant::now() + DEADLINE;
    while !condition() {
        assert!(Instant::now() < deadline, "not in time: {what}");
        std::thread::yield_now();
    }
}

#[test]
fn a_command_has_its_streams() {
    let running = running();
    let input = [Frame::Stdin(Bytes::from_static(b"abc")), Frame::StdinEnd];
    let frames = exec(&running, r#"{"command":["cat"]}"#, &input);
    let expected =
        [Frame::Stdout(Bytes::from_static(b"abc")), Frame::Stderr(Bytes::from_static(b"done")), Frame::End(RunEnd::Code(0))];
    assert_eq!(frames, expected);
}

#[test]
fn a_terminal_has_its_size() {
    let running = running();
    let json = r#"{"command":["line"],"terminal":{"rows":10,"columns":20}}"#;
    let text = |frames: Vec<Frame>| {
        let of = |frame: &Frame| match frame {
            Frame::Stdout(bytes) => String::from_utf8_lossy(bytes).into_owned(),
            Frame::End(RunEnd::Code(0)) => "end".to_owned(),
            other => panic!("{other:?}"),
        };
        frames.iter().map(of).collect::<String>()
    };
    let input = [Frame::Stdin(Bytes::from_static(b"word\n"))];
    assert_eq!(text(exec(&running, json, &input)), "word\r\nword 10 20end");
    let resized = [Frame::Resize(TerminalSize { rows: 33, columns: 44 }), input[0].clone()];
    assert_eq!(text(exec(&running, json, &resized)), "word\r\nword 33 44end");
    // The end of the input is a key that ends a line which is read.
    let ended = [Frame::Stdin(Bytes::from_static(b"wo")), Frame::StdinEnd, Frame::StdinEnd, Frame::StdinEnd];
    assert!(text(exec(&running, json, &ended)).ends_with("wo 10 20end"));
}

#[test]
fn signals_are_heard_behind_input_that_nobody_reads() {
    let running = running();
    let mut frames = vec![Frame::Stdin(Bytes::from(vec![b'x'; 60_000])); 4];
    frames.push(Frame::Signal("USR1".parse().unwrap()));
    // Nothing to do where there is no terminal.
    frames.push(Frame::Resize(TerminalSize { rows: 1, columns: 1 }));
    frames.push(Frame::Signal("KILL".parse().unwrap()));
    assert_eq!(exec(&running, r#"{"command":["deaf"]}"#, &frames), [Frame::End(RunEnd::Signal(9))]);
    assert_eq!(*running.backend.signals.lock().unwrap(), [10]);
}

#[test]
fn a_client_that_goes_away_ends_its_command() {
    let running = running();
    let gone = || wait_until("the end of the command", || running.backend.execs.lock().unwrap().is_empty());
    for way in ["close", "flood and close", "shut down"] {
        let mut stream = begin(&running, r#"{"command":["deaf"]}"#);
        wait_until("the command", || running.backend.execs.lock().unwrap().len() == 1);
        match way {
            "close" => drop(stream),
            "flood and close" => {
                flood(&mut stream);
                drop(stream);
            }
            _ => {
                stream.shutdown(std::net::Shutdown::Write).unwrap();
                let mut rest = Vec::new();
                stream.read_to_end(&mut rest).unwrap();
                assert_eq!(rest, Frame::Begun.encode());
            }
        }
        gone();
    }
}

#[test]
fn what_is_no_frame_of_a_client_ends_it() {
    let running = running();
    for garbage in [
        &[0, 0, 0, 0, 0][..],
        &[5, 0, 0, 0, 0],
        &[1, 0xff, 0xff, 0xff, 0xff],
        &[3, 0, 0, 0, 1, 0],
        &[4, 0, 0, 0, 1, 0],
        &[4, 0, 0, 0, 1, 99],
        &[19, 0, 0, 0, 2, b'{', b'}'],
        &[16, 0, 0, 0, 1, b'x'],
    ] {
        let mut stream = begin(&running, r#"{"command":["deaf"]}"#);
        stream.write_all(garbage).unwrap();
        let mut rest = Vec::new();
        stream.read_to_end(&mut rest).unwrap();
        assert!(rest == b"" || rest == Frame::Begun.encode(), "{garbage:?} {rest:?}");
        wait_until("the end of the command", || running.backend.execs.lock().unwrap().is_empty());
    }
}

#[test]
fn what_cannot_be_asked_is_told() {
    let running = running();
    let ask = |path: &str, json: &str, headers: &str| {
        let length = json.len();
        running.admin(format!(
            "POST {path} HTTP/1.1\r\nHost: x\r\n{headers}Accept: application/json\r\nContent-Length: {length}\r\n\r\n{json}"
        ))
    };
    let upgrade = "Connection: close, upgrade\r\nUpgrade: funtainer-exec\r\n";
    let refused = |answer: &str, status: &str, words: &str| {
        assert!(answer.starts_with(&format!("HTTP/1.1 {status} ")) && answer.contains(words), "{answer}");
    };
    let close = "Connection: close\r\n";
    refused(&ask("/functions/f/exec", r#"{"command":["cat"]}"#, close), "400", "funtainer exec");
    for (path, json, status, words) in [
        ("/functions/g/exec", r#"{"command":["cat"]}"#, "404", "function-unknown"),
        ("/functions/f/exec", r#"{"cmd":["cat"]}"#, "400", "cmd"),
        ("/functions/f/exec", r#"{"command":["cat"],"env":{"A=":"b"}}"#, "400", "bad-setting"),
        ("/functions/f/exec", r#"{"command":["cat"],"terminal":{"rows":1}}"#, "400", "columns"),
        ("/functions/f/exec", r#"{"command":["cat"],"instance":"x"}"#, "400", "instance"),
    ] {
        refused(&ask(path, json, upgrade), status, words);
    }
    assert!(running.admin_json("POST /functions/f/scale", r#"{"instances":0}"#).starts_with("HTTP/1.1 200 "));
    let frames = exec(&running, r#"{"command":["cat"]}"#, &[]);
    let [Frame::End(RunEnd::Failed(problem))] = &frames[..] else { panic!("{frames:?}") };
    assert_eq!((problem.code, problem.status), (ErrorCode::NotRunning, 409));
    assert!(problem.hint.contains("--start"), "{}", problem.hint);
    let frames = exec(&running, r#"{"command":["cat"],"start":true}"#, &[Frame::StdinEnd]);
    assert_eq!(frames.last(), Some(&Frame::End(RunEnd::Code(0))));
}

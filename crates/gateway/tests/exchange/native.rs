//! The admin API.

use std::io::{Read, Write};
use std::os::unix::net::UnixStream;

use bytes::Bytes;
use funtainer_gateway::api::frames::{Frame, RunEnd};
use funtainer_model::ErrorCode;
use insta::assert_snapshot;

use crate::{DEADLINE, Running};

fn request(method_and_path: &str) -> String {
    format!("{method_and_path} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n")
}

#[test]
fn wrong_requests_are_refused_with_the_place() {
    let running = Running::start();
    assert_snapshot!("deploy_no_json", running.admin_json("POST /functions", "{"));
    assert_snapshot!("deploy_unknown_key", running.admin_json("POST /functions", r#"{"name":"f","image":"i","colour":"red"}"#));
    assert_snapshot!("deploy_wrong_type", running.admin_json("POST /functions", r#"{"name":"f","image":"i","env":{"A":1}}"#));
    assert_snapshot!("deploy_bad_memory", running.admin_json("POST /functions", r#"{"name":"f","image":"i","memory":"much"}"#));
    assert_snapshot!("deploy_bad_image", running.admin_json("POST /functions", r#"{"name":"f","image":"UPPER"}"#));
    assert_snapshot!("deploy_bad_name", running.admin_json("POST /functions", r#"{"name":"a/b","image":"i"}"#));
    let large = format!(r#"{{"name":"{}","image":"i"}}"#, "a".repeat(1024 * 1024));
    assert_snapshot!("deploy_too_large", running.admin_json("POST /functions", &large));
    for body in ["", "null", "[]", r#"{"name":"f"}"#, r#"{"name":"f","image":"i"} x"#, r#"{"name":"f","name":"g","image":"i"}"#]
    {
        assert!(running.admin_json("POST /functions", body).starts_with("HTTP/1.1 400 "), "{body}");
    }
    assert_snapshot!("admin_unknown_path", running.admin(request("GET /nothing")));
    assert_snapshot!("admin_wrong_method", running.admin(request("PATCH /functions")));
    assert_snapshot!("run_without_upgrade", running.admin_json("POST /run", r#"{"image":"i"}"#));
    let person = "GET /nothing HTTP/1.1\r\nHost: x\r\nAccept: text/plain\r\nConnection: close\r\n\r\n";
    assert_snapshot!("admin_for_people", running.admin(person));
    assert!(running.admin(request("GET /functions/%ff")).starts_with("HTTP/1.1 400 "));
    assert!(running.admin(request("GET /version?x=1")).starts_with("HTTP/1.1 200 "));
}

#[test]
fn images_and_version() {
    let running = Running::start();
    let version = running.admin(request("GET /version"));
    let (_, body) = version.split_once("\n\n").unwrap();
    let url = running.address;
    assert_eq!(body, format!("{{\"version\":\"0.1.0\",\"api\":1,\"pid\":[pid],\"url\":\"http://{url}\"}}\n"));
    assert_snapshot!("images", running.admin(request("GET /images")));
    let chunked = "POST /images/import?name=localhost/x:2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAccept: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    assert_snapshot!("import", running.admin(chunked));
    assert!(running.admin_json("POST /images/import?name=UPPER", "").starts_with("HTTP/1.1 400 "));
    assert!(running.admin_json("POST /images/import?nom=x", "").starts_with("HTTP/1.1 400 "));
}

#[test]
fn the_life_of_a_function() {
    let running = Running::start();
    assert_snapshot!("list_empty", running.admin(request("GET /functions")));
    let deploy = r#"{"name":"f","image":"localhost/fake/echo:1","env":{"A":"b"},"args":["x"],"timeout":"30s"}"#;
    let events = format!(
        "POST /functions HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAccept: application/x-ndjson\r\nContent-Length: {}\r\n\r\n{deploy}",
        deploy.len()
    );
    assert_snapshot!("deploy_events", running.admin(events));
    assert_snapshot!("describe", running.admin(request("GET /functions/f")));
    assert_snapshot!("logs", running.admin(request("GET /functions/f/logs?tail=3")));
    assert!(running.admin(request("GET /functions/f/logs?lines=3")).starts_with("HTTP/1.1 400 "));
    assert_snapshot!("scale_too_far", running.admin_json("POST /functions/f/scale", r#"{"instances":21}"#));
    assert!(running.admin_json("POST /functions/f/scale", r#"{"instances":0}"#).starts_with("HTTP/1.1 200 "));
    assert_snapshot!("remove", running.admin(request("DELETE /functions/f")));
    assert_snapshot!("removed", running.admin(request("GET /functions/f")));
    assert_snapshot!(
        "deploy_missing_image",
        running.admin_json("POST /functions", r#"{"name":"f","image":"localhost/missing"}"#)
    );
    assert_snapshot!("pull", running.admin_json("POST /images/pull", r#"{"image":"localhost/fake/echo:1"}"#));
}

/// Speaks the protocol of a run until the server closes.
fn run(running: &Running, json: &str, frames: &[Frame]) -> Vec<Frame> {
    upgraded(running, "/run", "funtainer-run", json, frames)
}

/// Upgrades a connection, sends the frames and reads until the server closes: what the command says, and its end.
pub(crate) fn upgraded(running: &Running, path: &str, protocol: &str, json: &str, frames: &[Frame]) -> Vec<Frame> {
    let mut stream = upgrade(running, path, protocol, json);
    for frame in frames {
        stream.write_all(&frame.encode()).unwrap();
    }
    let mut got = Vec::new();
    stream.read_to_end(&mut got).unwrap();
    let mut rest = got[..].into();
    std::iter::from_fn(|| Frame::decode(&mut rest).unwrap())
        .filter(|frame| !matches!(frame, Frame::Progress(_) | Frame::Begun))
        .collect()
}

/// An upgraded connection.
pub(crate) fn upgrade(running: &Running, path: &str, protocol: &str, json: &str) -> UnixStream {
    let head = format!(
        "POST {path} HTTP/1.1\r\nHost: x\r\nConnection: upgrade\r\nUpgrade: {protocol}\r\nContent-Length: {}\r\n\r\n{json}",
        json.len()
    );
    let mut stream = UnixStream::connect(&running.admin).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(head.as_bytes()).unwrap();
    let mut got = Vec::new();
    let mut byte = [0];
    while !got.ends_with(b"\r\n\r\n") {
        stream.read_exact(&mut byte).unwrap();
        got.push(byte[0]);
    }
    assert!(got.starts_with(b"HTTP/1.1 101 Switching Protocols\r\n"), "{}", String::from_utf8_lossy(&got));
    stream
}

#[test]
fn a_run_has_its_streams() {
    let running = Running::start();
    let input = [Frame::Stdin(Bytes::from_static(b"abc")), Frame::StdinEnd];
    let frames = run(&running, r#"{"image":"localhost/fake/cat"}"#, &input);
    assert_eq!(frames, [Frame::Stdout(Bytes::from_static(b"abc")), Frame::End(RunEnd::Code(0))]);
    let frames = run(&running, r#"{"image":"localhost/fake/fail"}"#, &[]);
    assert_eq!(frames, [Frame::Stderr(Bytes::from_static(b"it went wrong\n")), Frame::End(RunEnd::Code(3))]);
    let frames = run(&running, r#"{"image":"localhost/missing"}"#, &[]);
    let [Frame::End(RunEnd::Failed(problem))] = &frames[..] else { panic!("{frames:?}") };
    assert_eq!(problem.code, ErrorCode::ImageUnknown);
}

#[test]
fn a_client_of_a_run_that_misbehaves_is_cut() {
    let running = Running::start();
    let frames = run(&running, r#"{"image":"localhost/fake/cat"}"#, &[Frame::Stdout(Bytes::from_static(b"not yours"))]);
    assert_eq!(frames, []);
}

#[test]
fn whoever_follows_a_log_does_not_hold_the_server() {
    let mut running = Running::start();
    running.deploy(r#"{"name":"f","image":"localhost/fake/echo:1"}"#);
    let mut stream = UnixStream::connect(&running.admin).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(b"GET /functions/f/logs?follow=true HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut first = [0; 12];
    stream.read_exact(&mut first).unwrap();
    assert_eq!(&first, b"HTTP/1.1 200");
    let server = running.server.take().unwrap();
    let started = std::time::Instant::now();
    running.runtime.block_on(server.drain(DEADLINE));
    assert!(started.elapsed() < DEADLINE / 2);
    let mut rest = String::new();
    stream.read_to_string(&mut rest).unwrap();
    assert!(rest.ends_with("0\r\n\r\n"), "{rest}");
}

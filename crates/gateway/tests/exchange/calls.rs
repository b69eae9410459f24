//! Calls to functions: what reaches them, and what comes back.

use std::io::{Read, Write};
use std::net::TcpStream;
use std::time::Instant;

use insta::assert_snapshot;

use crate::{DEADLINE, Running, tamed};

fn running(functions: &[(&str, &str)]) -> Running {
    let running = Running::start();
    for (name, more) in functions {
        let image = name.split(' ').next_back().unwrap();
        running.deploy(&format!(r#"{{"name":"{name}","image":"localhost/fake/{image}:1"{more}}}"#));
    }
    running
}

/// Calls again and again until the status comes.
fn until(running: &Running, call: &str, status: u16) -> String {
    let started = Instant::now();
    loop {
        let answer = running.calls(call);
        if answer.starts_with(&format!("HTTP/1.1 {status} ")) {
            return answer;
        }
        assert!(started.elapsed() < DEADLINE, "{answer}");
    }
}

#[test]
fn heads_are_rewritten_and_bodies_streamed() {
    let running = running(&[("echo", "")]);
    let cold = running.calls(
        "POST /function/echo/a%20b/?q=1 HTTP/1.1\r\nHost: example.com\r\nX-Forwarded-For: 9.9.9.9\r\nX-Forwarded-Proto: https\r\nConnection: close, x-hop\r\nX-Hop: 1\r\nKeep-Alive: 1\r\nTE: trailers\r\nX-Call-Id: forged\r\nContent-Length: 5\r\n\r\nhello",
    );
    assert_snapshot!("echo", cold);
    let chunked = running.calls(
        "PUT /function/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nTransfer-Encoding: chunked\r\n\r\n3\r\nabc\r\n0\r\n\r\n",
    );
    assert_snapshot!("echo_chunked", chunked);
    let absolute = running.calls("GET http://other.example/function/echo?x HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert_snapshot!("echo_absolute", absolute);
    let old = running.calls("GET /function/echo HTTP/1.0\r\n\r\n");
    assert_snapshot!("echo_http10", old);
    let h2c = running.calls(
        "GET /function/echo HTTP/1.1\r\nHost: x\r\nConnection: Upgrade, HTTP2-Settings, close\r\nUpgrade: h2c\r\nHTTP2-Settings: AA\r\n\r\n",
    );
    assert!(h2c.starts_with("HTTP/1.1 200 OK") && !h2c.contains("settings"), "{h2c}");
    let by_admin = running.admin("GET /function/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    assert_snapshot!("echo_by_admin", by_admin);
}

#[test]
fn answers_are_the_functions_but_for_this_hop() {
    let running = running(&[("liar", ""), ("chunky", ""), ("trap", ""), ("garbage", "")]);
    let get = |name: &str| {
        running.calls(format!("GET /function/{name} HTTP/1.1\r\nHost: x\r\nTE: trailers\r\nConnection: close\r\n\r\n"))
    };
    assert_snapshot!("liar", get("liar"));
    assert_snapshot!("chunky", get("chunky"));
    assert_snapshot!("trap", get("trap"));
    assert_snapshot!("garbage_function", get("garbage"));
}

#[test]
fn names_are_slugs_or_canonical() {
    let running = running(&[("My echo", "")]);
    for name in ["My%20echo", "%4Dy%20echo"] {
        let answer = running.calls(format!("GET /function/{name}/p HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
        assert!(answer.contains("\nGET /p HTTP/1.1\n"), "{answer}");
    }
    let described = running.admin("GET /functions/My%20echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n");
    let slug = described.split("\"slug\":\"").nth(1).unwrap().split('"').next().unwrap();
    let answer = running.calls(format!("GET /function/{slug} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
    assert!(answer.starts_with("HTTP/1.1 200 OK"), "{slug}: {answer}");
}

#[test]
fn commands_answer_with_their_exit_code() {
    let running = running(&[("cat", r#","contract":"stdio""#), ("fail", r#","contract":"stdio""#)]);
    let post = |name: &str, more: &str| {
        running.calls(format!(
            "POST /function/{name} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n{more}Content-Length: 3\r\n\r\nabc"
        ))
    };
    assert_snapshot!("stdio_cat", post("cat", "TE: trailers\r\n"));
    assert_snapshot!("stdio_fail", post("fail", ""));
}

#[test]
fn a_call_takes_at_most_its_time() {
    let running = running(&[("silent", r#","timeout":"100ms""#)]);
    assert_snapshot!("call_timeout", running.calls("GET /function/silent HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
}

#[test]
fn a_full_queue_says_when_to_come_again() {
    let running = running(&[("silent", r#","max":1,"concurrency":1,"queue":0"#)]);
    let mut first = TcpStream::connect(running.address).unwrap();
    first.set_read_timeout(Some(DEADLINE)).unwrap();
    first.write_all(b"GET /function/silent HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let refused = until(&running, "GET /function/silent HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n", 429);
    assert_snapshot!("queue_full", refused);
}

#[test]
fn a_body_is_asked_for_before_it_is_sent() {
    let running = running(&[("echo", "")]);
    let mut stream = TcpStream::connect(running.address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let head =
        "POST /function/echo HTTP/1.1\r\nHost: x\r\nConnection: close\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    let mut interim = [0; 25];
    stream.read_exact(&mut interim).unwrap();
    assert_eq!(&interim, b"HTTP/1.1 100 Continue\r\n\r\n");
    stream.write_all(b"body").unwrap();
    let mut answer = String::new();
    stream.read_to_string(&mut answer).unwrap();
    let answer = tamed(&answer);
    assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("\n\nbody\n") && !answer.contains("expect"), "{answer}");
}

#[test]
fn an_answer_is_broken_off_when_its_time_is_over() {
    let running = running(&[("half", r#","timeout":"200ms""#)]);
    let answer = running.calls("GET /function/half HTTP/1.1\r\nHost: x\r\n\r\n");
    assert!(answer.starts_with("HTTP/1.1 200 OK\ncontent-length: 10\n") && answer.ends_with("\n\nhalf\n"), "{answer}");
}

#[test]
fn a_client_that_goes_away_ends_its_call() {
    let running = running(&[("silent", r#","max":1,"concurrency":1,"queue":0,"timeout":"2s""#)]);
    let call = "GET /function/silent HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    let gone = TcpStream::connect(running.address).unwrap();
    (&gone).write_all(call.as_bytes()).unwrap();
    until(&running, call, 429);
    drop(gone);
    // Its slot is free again: this call is not refused, and waits for its own time.
    until(&running, call, 504);
}

#[test]
fn a_call_in_flight_is_finished_when_the_server_stops() {
    let mut running = running(&[("echo", "")]);
    let mut stream = TcpStream::connect(running.address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    let head = "POST /function/echo HTTP/1.1\r\nHost: x\r\nExpect: 100-continue\r\nContent-Length: 4\r\n\r\n";
    stream.write_all(head.as_bytes()).unwrap();
    stream.read_exact(&mut [0; 25]).unwrap();
    let server = running.server.take().unwrap();
    running.runtime.block_on(async {
        let drained = server.drain(DEADLINE);
        let answered = tokio::task::spawn_blocking(move || {
            stream.write_all(b"body").unwrap();
            let mut answer = String::new();
            stream.read_to_string(&mut answer).unwrap();
            answer
        });
        let (answer, ()) = tokio::join!(answered, drained);
        let answer = answer.unwrap();
        assert!(answer.starts_with("HTTP/1.1 200 OK") && answer.ends_with("\n\nbody"), "{answer}");
    });
}

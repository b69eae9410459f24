//! Requests that are wrong, by mistake or on purpose. Each gets one clear answer.

use std::io::{Read, Write};
use std::net::TcpStream;

use insta::assert_snapshot;

use crate::{DEADLINE, Running, tamed};

#[test]
fn heads_that_are_too_large() {
    let running = Running::start();
    let long = format!("GET /healthz HTTP/1.1\r\nHost: x\r\nX-Long: {}\r\n\r\n", "a".repeat(70 * 1024));
    assert_snapshot!("header_too_large", running.calls(long));
    let many = format!("GET /healthz HTTP/1.1\r\nHost: x\r\n{}\r\n", "X-Many: 1\r\n".repeat(200));
    assert_eq!(running.calls(many).lines().next(), Some("HTTP/1.1 431 Request Header Fields Too Large"));
    let endless = vec![b'a'; 1024 * 1024];
    assert_eq!(running.calls(endless).lines().next(), Some("HTTP/1.1 431 Request Header Fields Too Large"));
    let target = format!("GET /{} HTTP/1.1\r\nHost: x\r\n\r\n", "a".repeat(65_535));
    assert!(running.calls(target).contains("error["));
}

/// A client that writes all of its body before it looks for an answer must not be cut off meanwhile.
#[test]
fn bodies_that_nobody_wants_are_read_all_the_same() {
    let running = Running::start();
    let mut admin = std::os::unix::net::UnixStream::connect(&running.admin).unwrap();
    let length = 32 * 1024 * 1024;
    admin.write_all(format!("POST /functions HTTP/1.1\r\nHost: x\r\nContent-Length: {length}\r\n\r\n").as_bytes()).unwrap();
    admin.write_all(&vec![b' '; length]).expect("the gateway reads on");
    admin.set_read_timeout(Some(DEADLINE)).unwrap();
    let mut answer = String::new();
    admin.read_to_string(&mut answer).unwrap();
    assert!(answer.starts_with("HTTP/1.1 413 ") && answer.contains("body-too-large"), "{answer}");
}

#[test]
fn what_is_no_http() {
    let running = Running::start();
    assert_snapshot!("garbage", running.calls("\x16\x03\x01 is how TLS starts\r\n\r\n"));
    assert_snapshot!("http2", running.calls("PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n"));
    assert_snapshot!("garbage_behind_a_good_request", running.calls("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nG@RBAGE\r\n\r\n"));
    let mut silent = TcpStream::connect(running.address).unwrap();
    silent.set_read_timeout(Some(DEADLINE)).unwrap();
    silent.shutdown(std::net::Shutdown::Write).unwrap();
    assert_eq!(silent.read(&mut [0; 16]).unwrap(), 0);
}

#[test]
fn two_framings_at_once() {
    let running = Running::start();
    let both = "POST /function/f HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\nGET /healthz HTTP/1.1\r\nHost: x\r\n\r\n";
    assert_snapshot!("both_framings", running.calls(both));
    let other_order = "POST /healthz HTTP/1.1\r\nHost: x\r\ntransfer-encoding: chunked\r\nCONTENT-LENGTH: 4\r\n\r\n0\r\n\r\n";
    assert_eq!(running.calls(other_order).lines().next(), Some("HTTP/1.1 400 Bad Request"));
    let pipelined = format!("GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n{both}");
    let answers = running.calls(pipelined);
    assert_eq!(answers.matches("HTTP/1.1 ").count(), 2, "nothing behind an uncertain request is served: {answers}");
    let lengths = "POST /healthz HTTP/1.1\r\nHost: x\r\nContent-Length: 4\r\nContent-Length: 5\r\n\r\nabcde";
    assert_eq!(running.calls(lengths).lines().next(), Some("HTTP/1.1 400 Bad Request"));
    let old = "POST /healthz HTTP/1.0\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n";
    assert_eq!(running.calls(old).lines().next(), Some("HTTP/1.1 400 Bad Request"));
}

#[test]
fn hosts() {
    let running = Running::start();
    assert_snapshot!("no_host", running.calls("GET /healthz HTTP/1.1\r\n\r\n"));
    let two = running.calls("GET /healthz HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n");
    assert_eq!(two.lines().next(), Some("HTTP/1.1 400 Bad Request"));
}

#[test]
fn paths_and_methods() {
    let running = Running::start();
    let get = |target: &str| running.calls(format!("GET {target} HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
    assert_snapshot!("unknown_path", get("/nothing/here"));
    assert_snapshot!("unknown_function", get("/function/nobody/x?y"));
    assert_snapshot!("bad_escape", get("/function/%zz"));
    for target in ["/function", "/function/", "/function//x", "/functions", "/version", "/", "*", "/run"] {
        assert!(get(target).starts_with("HTTP/1.1 404 "), "{target}");
    }
    assert_snapshot!("wrong_method", running.calls("PUT /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n"));
    assert_snapshot!(
        "problem_json",
        running.calls("GET /function/nobody HTTP/1.1\r\nHost: x\r\nAccept: application/json\r\nConnection: close\r\n\r\n")
    );
    assert!(
        running.calls("CONNECT evil:443 HTTP/1.1\r\nHost: evil:443\r\nConnection: close\r\n\r\n").starts_with("HTTP/1.1 404 ")
    );
    assert_snapshot!(
        "websocket",
        running.calls("GET /function/f HTTP/1.1\r\nHost: x\r\nConnection: upgrade, close\r\nUpgrade: websocket\r\n\r\n")
    );
}

#[test]
fn old_clients_and_pipelines() {
    let running = Running::start();
    assert_snapshot!("http10", running.calls("GET /healthz HTTP/1.0\r\n\r\n"));
    let two = "GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nHEAD /healthz HTTP/1.1\r\nHost: x\r\nConnection: close\r\n\r\n";
    assert_snapshot!("pipeline", running.calls(two));
}

#[test]
fn an_answer_does_not_wait_for_the_rest_of_the_next_request() {
    let running = Running::start();
    let mut stream = TcpStream::connect(running.address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\nGET /hea").unwrap();
    let mut buffer = [0; 1024];
    let read = stream.read(&mut buffer).unwrap();
    assert!(buffer[..read].starts_with(b"HTTP/1.1 200 OK\r\n"));
}

#[test]
fn idle_connections_end_with_the_server() {
    let mut running = Running::start();
    let mut stream = TcpStream::connect(running.address).unwrap();
    stream.set_read_timeout(Some(DEADLINE)).unwrap();
    stream.write_all(b"GET /healthz HTTP/1.1\r\nHost: x\r\n\r\n").unwrap();
    let mut buffer = [0; 1024];
    let read = stream.read(&mut buffer).unwrap();
    assert!(tamed(&String::from_utf8_lossy(&buffer[..read])).starts_with("HTTP/1.1 200 OK"));
    let server = running.server.take().unwrap();
    running.runtime.block_on(async {
        let closed = tokio::task::spawn_blocking(move || stream.read(&mut buffer).unwrap());
        tokio::time::timeout(DEADLINE, server.drain(DEADLINE)).await.unwrap();
        assert_eq!(closed.await.unwrap(), 0);
    });
}

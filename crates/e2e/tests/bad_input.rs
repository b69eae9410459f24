//! Bad input gets one clear error with a code and a hint, as text for people and as RFC 9457 JSON for programs, and changes nothing.

use anyhow::{Context, Result, ensure};
use funtainer_e2e::http::{Connection, Endpoint, Response};
use funtainer_e2e::image::catalog;
use funtainer_e2e::server::Server;
use funtainer_e2e::world::scenario;
use serde_json::{Value, json};

/// A request that must be refused.
struct Case<'a> {
    method: &'a str,
    path: &'a str,
    body: Vec<u8>,
    status: u16,
    code: &'a str,
}

fn case<'a>(method: &'a str, path: &'a str, body: impl Into<Vec<u8>>, status: u16, code: &'a str) -> Case<'a> {
    Case { method, path, body: body.into(), status, code }
}

/// Sends the request for a person and for a program.
fn check(endpoint: &Endpoint, case: &Case<'_>) -> Result<()> {
    let Case { method, path, body, status, code } = case;
    let what = || format!("{method} {path}");
    let text = funtainer_e2e::http::call(endpoint, method, path, &[("Accept", "text/plain")], body)?;
    is_text(&text, *status, code).with_context(what)?;
    let problem = funtainer_e2e::http::call(endpoint, method, path, &[("Accept", "application/json")], body)?;
    is_problem(&problem, *status, code).with_context(what)
}

fn is_text(response: &Response, status: u16, code: &str) -> Result<()> {
    let text = response.text();
    ensure!(response.status == status, "status {}: {text}", response.status);
    ensure!(response.header("content-type").is_some_and(|kind| kind.starts_with("text/plain")), "{response:?}");
    let lines: Vec<_> = text.lines().collect();
    ensure!(lines.len() == 2 && lines[0].starts_with(&format!("error[{code}]: ")) && lines[1].starts_with("hint: "), "{text}");
    Ok(())
}

fn is_problem(response: &Response, status: u16, code: &str) -> Result<()> {
    ensure!(response.status == status, "status {}: {}", response.status, response.text());
    ensure!(response.header("content-type") == Some("application/problem+json"), "{response:?}");
    let problem = response.json()?;
    ensure!(problem["code"] == code && problem["status"] == status, "{problem}");
    for key in ["type", "title", "detail", "hint"] {
        ensure!(problem[key].as_str().is_some_and(|text| !text.is_empty()), "no {key} in {problem}");
    }
    ensure!(response.header("x-call-id").is_some(), "{response:?}");
    Ok(())
}

/// What must be the same afterwards.
fn state(server: &Server) -> Result<Value> {
    let mut functions = server.ask("GET", "/functions", b"")?.expect(200)?.json()?;
    for function in functions.as_array_mut().context("a list")? {
        function["last_error"] = Value::Null;
    }
    Ok(json!([functions, server.ask("GET", "/images", b"")?.expect(200)?.json()?]))
}

#[test]
fn requests_to_the_admin_socket() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("hello", &catalog::hello()?, &[])?;
        let before = state(&server)?;
        let deploy = |settings: Value| {
            let mut request = json!({"name": "hello", "image": "hello:test"});
            if let (Some(request), Some(settings)) = (request.as_object_mut(), settings.as_object()) {
                request.extend(settings.clone());
            }
            case("POST", "/functions", request.to_string(), 400, "bad-setting")
        };
        let named =
            |name: &str| case("POST", "/functions", json!({"name": name, "image": "hello:test"}).to_string(), 400, "bad-name");
        let imaged = |image: &str| {
            case("POST", "/functions", json!({"name": "new", "image": image}).to_string(), 400, "bad-image-reference")
        };
        let cases = [
            case("GET", "/nowhere", "", 404, "unknown-path"),
            case("GET", "/functions/nobody", "", 404, "function-unknown"),
            case("DELETE", "/functions/nobody", "", 404, "function-unknown"),
            case("POST", "/functions/nobody/scale", r#"{"instances":1}"#, 404, "function-unknown"),
            case("GET", "/functions/nobody/logs", "", 404, "function-unknown"),
            case("GET", "/function/nobody", "", 404, "function-unknown"),
            case("PUT", "/functions", "", 405, "method-not-allowed"),
            case("POST", "/functions", "", 400, "bad-request"),
            case("POST", "/functions", "{", 400, "bad-request"),
            case("POST", "/functions", "[]", 400, "bad-request"),
            case("POST", "/functions", r#"{"name":"new"}"#, 400, "bad-request"),
            case("POST", "/functions", r#"{"name":"new","image":"hello:test","colour":"red"}"#, 400, "bad-request"),
            case("POST", "/functions", r#"{"name":"new","image":"hello:test"} and more"#, 400, "bad-request"),
            case("POST", "/functions", r#"{"name":"new","image":"hello:test","max":-1}"#, 400, "bad-request"),
            case("POST", "/functions", r#"{"name":"new","image":"hello:test","port":70000}"#, 400, "bad-request"),
            case("POST", "/functions", b"\xff\xfe".as_slice(), 400, "bad-request"),
            case("POST", "/functions", vec![b' '; 4 << 20], 413, "body-too-large"),
            case("POST", "/functions/hello/scale", r#"{"instances":"two"}"#, 400, "bad-request"),
            case("POST", "/functions/hello/scale", r#"{"instances":21}"#, 409, "scale-out-of-range"),
            case("GET", "/functions/hello/logs?tail=many", "", 400, "bad-request"),
            case("POST", "/images/pull", r#"{"image":"A B"}"#, 400, "bad-image-reference"),
            named(""),
            named("../up"),
            named("a/b"),
            named(&"x".repeat(300)),
            imaged(""),
            imaged("UPPER/case:1"),
            imaged("a:b:c"),
            imaged("a@sha256:12"),
            imaged("http://a/b"),
            deploy(json!({"contract": "smoke-signals"})),
            deploy(json!({"memory": "much"})),
            deploy(json!({"memory": "1K"})),
            deploy(json!({"max": 0})),
            deploy(json!({"min": 5, "max": 4})),
            deploy(json!({"timeout": "0s"})),
            deploy(json!({"idle_timeout": "soon"})),
            deploy(json!({"env": {"A=B": "c"}})),
            deploy(json!({"args": ["a\u{0}b"]})),
        ];
        for case in &cases {
            check(&server.admin(), case)?;
        }
        let allow = server.ask("PUT", "/functions", b"")?;
        ensure!(allow.header("allow").is_some_and(|allow| allow.contains("GET") && allow.contains("POST")), "{allow:?}");
        // What is no archive is refused as an archive, also when it is large.
        for garbage in [b"no tar".to_vec(), vec![0; 10_240], vec![b'x'; 1 << 20]] {
            let said = server.ask("POST", "/images/import?name=garbage:1", &garbage)?;
            is_problem(&said, 422, "image-invalid")?;
        }
        ensure!(state(&server)? == before, "bad input changed something");
        Ok(())
    })
}

#[test]
fn requests_to_the_port() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("hello", &catalog::hello()?, &[])?;
        let before = state(&server)?;
        for case in [
            case("GET", "/function/nobody", "", 404, "function-unknown"),
            case("POST", "/function/nobody/deep", "body", 404, "function-unknown"),
            case("GET", "/function/", "", 404, "unknown-path"),
            case("GET", "/", "", 404, "unknown-path"),
            case("GET", "/nowhere", "", 404, "unknown-path"),
            case("POST", "/healthz", "", 405, "method-not-allowed"),
            // No administration by TCP.
            case("GET", "/functions", "", 404, "unknown-path"),
            case("POST", "/functions", "{}", 404, "unknown-path"),
            case("DELETE", "/functions/hello", "", 404, "unknown-path"),
            case("POST", "/run", "{}", 404, "unknown-path"),
            case("GET", "/images", "", 404, "unknown-path"),
        ] {
            check(&server.tcp(), &case)?;
        }
        // A person with curl sends no preference.
        let curl = server.call("GET", "/function/nobody", &[("Accept", "*/*")], b"")?;
        is_text(&curl, 404, "function-unknown")?;
        ensure!(state(&server)? == before, "bad input changed something");
        Ok(())
    })
}

#[test]
fn what_is_no_http_or_too_much_of_it() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("probe", &catalog::probe(&[], &[])?, &[])?;
        let before = state(&server)?;
        let large = "x".repeat(100 * 1024);
        let many: Vec<_> = (0..5000).map(|number| format!("H{number}: {number}")).collect();
        let raw = |lines: &str| format!("{lines}\r\n\r\n").into_bytes();
        let cases: [(Vec<u8>, u16, &str); 9] = [
            (raw(&format!("GET /function/probe HTTP/1.1\r\nHost: x\r\nX-Large: {large}")), 431, "header-too-large"),
            (raw(&format!("GET /function/probe HTTP/1.1\r\nHost: x\r\n{}", many.join("\r\n"))), 431, "header-too-large"),
            (raw(&format!("GET /function/probe/{large} HTTP/1.1\r\nHost: x")), 431, "header-too-large"),
            (raw("this is not HTTP"), 400, "bad-request"),
            (raw("GET /function/probe HTTP/1.1\r\nHost: x\r\nno colon here"), 400, "bad-request"),
            (raw("POST /function/probe HTTP/1.1\r\nHost: x\r\nContent-Length: many"), 400, "bad-request"),
            (raw("POST /function/probe HTTP/1.1\r\nHost: x\r\nContent-Length: 1\r\nContent-Length: 2"), 400, "bad-request"),
            (
                raw("POST /function/probe HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\nTransfer-Encoding: chunked"),
                400,
                "bad-request",
            ),
            (raw("GET /function/probe HTTP/3.7\r\nHost: x"), 400, "bad-request"),
        ];
        for (bytes, status, code) in cases {
            let shown = String::from_utf8_lossy(&bytes[..bytes.len().min(80)]).into_owned();
            let mut connection = Connection::open(&server.tcp())?;
            // The server may answer and close before it has read everything.
            let _ = connection.raw(&bytes);
            let head = connection.head().with_context(|| shown.clone())?;
            ensure!(head.status == status, "status {} for {shown}", head.status);
            ensure!(head.header("x-funtainer-error") == Some(code), "{head:?} for {shown}");
            let mut body = Vec::new();
            connection.body(&head, |piece| body.extend_from_slice(piece))?;
            let body = String::from_utf8_lossy(&body);
            ensure!(body.contains(&format!("error[{code}]")) && body.contains("hint: "), "{body} for {shown}");
            ensure!(connection.closed(), "the connection stays open after {shown}");
        }
        // Unusual, and good: a large header below the limit, and a client that goes away in the middle of one.
        let header = "y".repeat(48 * 1024);
        server.call("GET", "/function/probe/request", &[("X-Large", &header)], b"")?.expect(200)?;
        let mut gone = Connection::open(&server.tcp())?;
        gone.raw(b"GET /function/probe HTT")?;
        drop(gone);
        let mut gone = Connection::open(&server.tcp())?;
        gone.raw(b"POST /function/probe/echo HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nhalf")?;
        drop(gone);
        server.get("/function/probe")?;
        ensure!(state(&server)? == before, "bad input changed something");
        Ok(())
    })
}

#[test]
fn words_on_the_command_line() -> Result<()> {
    scenario(|world| {
        let server = world.serve()?;
        server.deploy("hello", &catalog::hello()?, &[])?;
        let before = state(&server)?;
        // Usage: exit code 2, and the right usage is shown.
        let usage: [&[&str]; 9] = [
            &["deploy"],
            &["deploy", "f"],
            &["deploy", "f", "--image", "hello:test", "--bogus"],
            &["deploy", "f", "--image", "hello:test", "--port", "eighty"],
            &["deploy", "f", "--image", "hello:test", "--contract", "smoke-signals"],
            &["scale", "hello"],
            &["scale", "hello", "many"],
            &["nonsense"],
            &["list", "--output", "smoke-signals"],
        ];
        for words in usage {
            let finished = server.cli(words.iter().copied())?;
            ensure!(finished.code()? == 2 && finished.stdout.is_empty(), "{words:?}: {finished:?}");
            ensure!(finished.err().contains("--help") || finished.err().contains("Usage:"), "{words:?}: {}", finished.err());
        }
        // Values: exit code 1 or 2, with a code and a hint.
        for (words, code) in [
            (&["deploy", "f", "--image", "UPPER"][..], "bad-image-reference"),
            (&["deploy", "a/b", "--image", "hello:test"], "bad-name"),
            (&["deploy", "f", "--image", "hello:test", "--memory", "1K"], "bad-setting"),
            (&["deploy", "f", "--image", "hello:test", "--min", "3", "--max", "2"], "bad-setting"),
            (&["invoke", "nobody"], "function-unknown"),
            (&["describe", "nobody"], "function-unknown"),
            (&["logs", "nobody"], "function-unknown"),
            (&["remove", "nobody"], "function-unknown"),
            (&["scale", "nobody", "1"], "function-unknown"),
            (&["scale", "hello", "100"], "scale-out-of-range"),
            (&["pull", "UPPER"], "bad-image-reference"),
        ] {
            server.refused(words.iter().copied(), 1, code)?;
        }
        // A program gets the same as JSON.
        let program = server.cli(["describe", "nobody", "--output", "json"])?;
        let problem: Value = serde_json::from_slice(&program.stderr).with_context(|| program.err())?;
        ensure!(program.code()? == 1 && problem["code"] == "function-unknown" && problem["hint"].is_string(), "{problem}");
        let missing = server.cli(["image", "import", "/nowhere/at/all", "--name", "x:1"])?;
        ensure!(missing.code()? == 1 && missing.err().contains("/nowhere/at/all"), "{missing:?}");
        ensure!(state(&server)? == before, "bad input changed something");

        let mut nobody = server.command(["list"]);
        nobody.env("FUNTAINER_HOST", "unix:///nowhere/admin.sock");
        let nobody = funtainer_e2e::process::run(&mut nobody, b"", funtainer_e2e::server::COMMAND_LIMIT)?;
        ensure!(
            nobody.code()? == 1 && nobody.err().contains("/nowhere/admin.sock") && nobody.err().contains("hint: "),
            "{nobody:?}"
        );
        Ok(())
    })
}

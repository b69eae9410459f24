//! The admin API.

use insta::assert_snapshot;

use crate::Running;

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
    assert_snapshot!("version", running.admin(request("GET /version")));
    assert_snapshot!("images", running.admin(request("GET /images")));
    let chunked = "POST /images/import?name=localhost/x:2 HTTP/1.1\r\nHost: x\r\nConnection: close\r\nAccept: application/x-ndjson\r\nTransfer-Encoding: chunked\r\n\r\n5\r\nhello\r\n0\r\n\r\n";
    assert_snapshot!("import", running.admin(chunked));
    assert!(running.admin_json("POST /images/import?name=UPPER", "").starts_with("HTTP/1.1 400 "));
    assert!(running.admin_json("POST /images/import?nom=x", "").starts_with("HTTP/1.1 400 "));
}

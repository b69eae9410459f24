//! A function as small as one can be: an HTTP server in one static file, on an image that holds nothing else.
//!
//! It knows nothing of funtainer. It listens on `PORT`, as web applications in containers do, and answers.
//! Build it with `rustc -O -C target-feature=+crt-static -o hello main.rs`.

mod http;

use std::env;
use std::io;
use std::net::{Ipv4Addr, TcpListener};

fn main() -> io::Result<()> {
    let port = env::var("PORT").ok().and_then(|port| port.parse().ok()).unwrap_or(8080);
    let greeting = env::var("GREETING").unwrap_or_else(|_| "hello".to_owned());
    let listener = TcpListener::bind((Ipv4Addr::UNSPECIFIED, port))?;
    http::serve(&listener, move |connection, head| {
        let mut body = Vec::new();
        connection.body(&head, |piece| body.extend_from_slice(piece))?;
        let path = head.target.split('?').next().unwrap_or_default().trim_matches('/');
        let who = match (body.is_empty(), path) {
            (false, _) => String::from_utf8_lossy(&body),
            (true, "") => "world".into(),
            (true, path) => path.into(),
        };
        connection.answer(&head, "200 OK", format!("{greeting}, {}\n", who.trim_end()).as_bytes())
    })
}

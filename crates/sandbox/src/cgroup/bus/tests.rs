//! Against a bus that says what it should not, and against what it should.

use std::io::{BufRead as _, BufReader};
use std::os::unix::net::UnixListener;
use std::thread::JoinHandle;

use proptest::prelude::*;

use super::*;

const SCOPE: Scope<'static> = Scope { unit: "funtainer-0123456789abcdef.scope", description: "for a test", pid: 4711 };

/// The other side of a socket, in a thread of its own.
struct Peer {
    directory: tempfile::TempDir,
    thread: JoinHandle<()>,
}

impl Peer {
    fn new(talk: impl FnOnce(&UnixStream, &mut BufReader<&UnixStream>) + Send + 'static) -> Self {
        let directory = tempfile::tempdir().expect("a directory");
        let listener = UnixListener::bind(directory.path().join("bus")).expect("a socket");
        let thread = std::thread::spawn(move || {
            let (stream, _) = listener.accept().expect("a client");
            talk(&stream, &mut BufReader::new(&stream));
        });
        Self { directory, thread }
    }

    /// Lets the client ask; the peer is done afterwards.
    fn ask(self, is_bus: bool) -> Result<(), BusError> {
        let outcome = start_scope(&self.directory.path().join("bus"), is_bus, SCOPE);
        self.thread.join().expect("the peer has no complaint");
        outcome
    }
}

fn greet(mut stream: &UnixStream, reader: &mut BufReader<&UnixStream>) {
    let mut line = Vec::new();
    reader.read_until(b'\n', &mut line).expect("a line");
    let uid = rustix::process::geteuid().as_raw().to_string();
    let hex = uid.bytes().fold(String::new(), |text, byte| format!("{text}{byte:02x}"));
    assert_eq!(String::from_utf8(line), Ok(format!("\0AUTH EXTERNAL {hex}\r\n")));
    stream.write_all(b"OK 0123456789abcdef0123456789abcdef\r\n").expect("an answer");
    let mut line = Vec::new();
    reader.read_until(b'\n', &mut line).expect("a line");
    assert_eq!(line, b"BEGIN\r\n");
}

/// Reads a call: the whole of it.
fn call(reader: &mut BufReader<&UnixStream>) -> Vec<u8> {
    let mut message = vec![0; FIXED_BYTES];
    reader.read_exact(&mut message).expect("a message");
    let length = message_bytes(&message).expect("a message");
    message.resize(length, 0);
    reader.read_exact(&mut message[FIXED_BYTES..]).expect("the rest of it");
    message
}

/// An answer of either byte order: kind 2 is a return, 3 an error, 4 a signal.
fn answer(big: bool, kind: u8, to: u32, error: Option<&str>, text: Option<&str>) -> Vec<u8> {
    let mut body = Writer::default();
    if let Some(text) = text {
        body.text(text);
    }
    let mut message = Writer::default();
    message.bytes.extend([b'l', kind, 1, 1]);
    message.number(body.bytes.len() as u32);
    message.number(77);
    message.array(8, |fields| {
        let mut field = |code: u8, signature: &str, value: &dyn Fn(&mut Writer)| {
            fields.align(8);
            fields.bytes.push(code);
            fields.signature(signature);
            value(fields);
        };
        // The sender, of which nothing is asked.
        field(7, "s", &|value| value.text("org.freedesktop.systemd1"));
        field(5, "u", &|value| value.number(to));
        if let Some(error) = error {
            field(4, "s", &|value| value.text(error));
        }
        if text.is_some() {
            field(8, "g", &|value| value.signature("s"));
        }
    });
    message.align(8);
    message.bytes.extend(body.bytes);
    if big { turned(message.bytes) } else { message.bytes }
}

/// The same message in the other byte order.
fn turned(mut bytes: Vec<u8>) -> Vec<u8> {
    bytes[0] = b'B';
    let fields_end = FIXED_BYTES + u32::from_le_bytes(bytes[12..16].try_into().expect("four bytes")) as usize;
    let body = u32::from_le_bytes(bytes[4..8].try_into().expect("four bytes")) as usize;
    for at in [4, 8, 12] {
        bytes[at..at + 4].reverse();
    }
    let mut at = FIXED_BYTES;
    while at < fields_end {
        at = at.next_multiple_of(8);
        let kind = bytes[at + 2];
        at += 4;
        match kind {
            b'g' => at += usize::from(bytes[at]) + 2,
            b's' => {
                let length = u32::from_le_bytes(bytes[at..at + 4].try_into().expect("four bytes")) as usize;
                bytes[at..at + 4].reverse();
                at += 4 + length + 1;
            }
            _ => {
                bytes[at..at + 4].reverse();
                at += 4;
            }
        }
    }
    if body > 0 {
        let start = bytes.len() - body;
        bytes[start..start + 4].reverse();
    }
    bytes
}

#[test]
fn a_scope_is_asked_for_and_granted() {
    for (is_bus, big) in [(true, false), (false, true)] {
        let peer = Peer::new(move |mut stream, reader| {
            greet(stream, reader);
            let mut serial = 1;
            if is_bus {
                let hello = call(reader);
                assert!(String::from_utf8_lossy(&hello).contains("Hello"));
                stream.write_all(&answer(big, 2, serial, None, Some(":1.42"))).expect("an answer");
                serial += 1;
                // A signal that says the name, as a bus sends it, and an answer to somebody else.
                stream.write_all(&answer(big, 4, 0, None, Some(":1.42"))).expect("a signal");
                stream.write_all(&answer(big, 2, 99, None, None)).expect("an answer");
            }
            let asked = call(reader);
            let text = String::from_utf8_lossy(&asked);
            for word in ["StartTransientUnit", "ssa(sv)a(sa(sv))", SCOPE.unit, "Delegate", "PIDs", "TasksMax", "fail"] {
                assert!(text.contains(word), "{word} is missing");
            }
            assert!(asked.windows(4).any(|window| window == SCOPE.pid.to_le_bytes()));
            stream.write_all(&answer(big, 2, serial, None, Some("/org/freedesktop/systemd1/job/1"))).expect("an answer");
        });
        peer.ask(is_bus).expect("granted");
    }
}

#[test]
fn a_refusal_is_told_with_its_name_and_text() {
    for (text, expect) in [(Some("Unit exists."), "Unit exists."), (None, "")] {
        let peer = Peer::new(move |mut stream, reader| {
            greet(stream, reader);
            call(reader);
            let refusal = answer(false, 3, 1, Some("org.freedesktop.systemd1.UnitExists"), text);
            stream.write_all(&refusal).expect("an answer");
        });
        match peer.ask(false) {
            Err(BusError::Refused { name, text }) => {
                assert_eq!((name.as_str(), text.as_str()), ("org.freedesktop.systemd1.UnitExists", expect));
            }
            other => panic!("{other:?}"),
        }
    }
}

#[test]
fn a_peer_that_is_no_bus_is_left() {
    let long = vec![b'x'; LINE_BYTES_MAX + 10];
    for (line, expect) in [
        (b"REJECTED EXTERNAL\r\n".to_vec(), "refuses this user"),
        (b"HTTP/1.1 400 Bad Request\r\n".to_vec(), "answer to the authentication"),
        (b"\r\n".to_vec(), "answer to the authentication"),
        (long, "answer to the authentication"),
        (b"OK 0123".to_vec(), "unexpected end of file"),
        (Vec::new(), "unexpected end of file"),
    ] {
        let peer = Peer::new(move |mut stream, reader| {
            let mut first = Vec::new();
            reader.read_until(b'\n', &mut first).expect("a line");
            // The client may have gone by the end of it.
            let _ = stream.write_all(&line);
        });
        let error = peer.ask(true).expect_err("no bus").to_string();
        assert!(error.contains(expect), "{error}");
    }
    let nobody = start_scope(Path::new("/nonexistent/bus"), true, SCOPE);
    assert!(matches!(nobody, Err(BusError::Stream { .. })));
}

#[test]
fn messages_that_are_none_are_refused() {
    let right = answer(false, 3, 1, Some("a.b"), Some("text"));
    assert_eq!(Answer::parse(&right), Ok(Some(Answer { to: 1, outcome: Err(("a.b".to_owned(), "text".to_owned())) })));
    let with = |at: usize, bytes: &[u8]| {
        let mut wrong = right.clone();
        wrong[at..at + bytes.len()].copy_from_slice(bytes);
        Answer::parse(&wrong)
    };
    assert_eq!(with(0, b"x"), Err(Malformed::Order));
    assert_eq!(with(3, &[2]), Err(Malformed::Version));
    for length in [u32::MAX, MESSAGE_BYTES_MAX as u32 + 1, 1 << 31] {
        assert_eq!(with(4, &length.to_le_bytes()), Err(Malformed::Long));
        assert_eq!(with(12, &length.to_le_bytes()), Err(Malformed::Long));
    }
    assert_eq!(with(4, &5_u32.to_le_bytes()), Err(Malformed::Short));
    // The first field: its type, its length, and the end of its text.
    assert_eq!(with(17, &[1, b'v']), Err(Malformed::Field));
    assert_eq!(with(17, &[200]), Err(Malformed::Short));
    assert_eq!(with(20, &u32::MAX.to_le_bytes()), Err(Malformed::Short));
    assert_eq!(with(20, &3_u32.to_le_bytes()), Err(Malformed::Field));
    // A field of a known number with another type, and an error without a name.
    assert_eq!(with(16, &[5]), Err(Malformed::Field));
    assert_eq!(Answer::parse(&answer(false, 3, 1, None, Some("text"))), Err(Malformed::Field));
    assert_eq!(Answer::parse(&[]), Err(Malformed::Short));
    // What asks for nothing is passed over.
    assert_eq!(Answer::parse(&answer(true, 4, 1, None, Some("text"))), Ok(None));
}

#[test]
fn every_damage_of_one_byte_is_refused_or_read() {
    for big in [false, true] {
        let right = answer(big, 3, 1, Some("org.freedesktop.DBus.Error.AccessDenied"), Some("no"));
        for at in 0..right.len() {
            for value in [0, 1, 0x7F, 0x80, 0xFF, right[at].wrapping_add(1)] {
                let mut damaged = right.clone();
                damaged[at] = value;
                check_any(&damaged);
            }
            check_any(&right[..at]);
        }
    }
}

proptest! {
    #[test]
    fn any_bytes_are_refused_or_read(bytes in proptest::collection::vec(any::<u8>(), 0..300), big: bool, kind in 0_u8..5) {
        check_any(&bytes);
        let length = |count: usize| if big { (count as u32).to_be_bytes() } else { (count as u32).to_le_bytes() };
        let mut message = vec![if big { b'B' } else { b'l' }, kind, 0, 1];
        message.extend(length(0));
        message.extend(length(1));
        message.extend(length(bytes.len()));
        message.extend(bytes);
        message.resize(message.len().next_multiple_of(8), 0);
        check_any(&message);
    }
}

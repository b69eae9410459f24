//! Instances from start to exit on the real kernel.

mod harness;

use funtainer_sandbox::protocol::{InitMessage, Reply};

use harness::{instance, ready, revision, spec};

#[test]
fn an_instance_runs_and_ends() {
    let (mut server, mut client) = ready();
    assert!(server.announced().starts_with("listening on http://127.0.0.1:"));
    assert_eq!(client.open(revision(1), spec(&["echo", "hello from inside"])), Reply::Done);
    let started = client.start(revision(1), instance(1)).unwrap();
    let (last, sockets) = started.executed();
    assert_eq!(last, InitMessage::Executed);
    assert_eq!(sockets.len(), 16);
    assert_eq!(started.output(), "hello from inside\n");
    let exit = client.exit_of(instance(1));
    assert_eq!(exit.status, Some(0));
    assert_eq!(server.stop(), Some(0));
}

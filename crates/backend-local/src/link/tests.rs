use std::time::Duration;

use funtainer_model::StopSignal;
use funtainer_sandbox::protocol::{MAGIC, VERSION};

use super::*;

const DEADLINE: Duration = Duration::from_secs(20);

/// The other end, blocking: what a keeper says is said by the test.
struct Peer(OwnedFd);

impl Peer {
    /// The next request with its number and how many descriptors came.
    fn receive(&self) -> (u32, Request, usize) {
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        let received = fds::receive(self.0.as_fd(), &mut buffer, RecvFlags::empty()).unwrap().unwrap();
        let (number, request) = Request::decode(&buffer[..received.bytes], received.fds.len()).unwrap();
        (number, request, received.fds.len())
    }

    fn send(&self, number: u32, reply: &Reply, descriptors: &[BorrowedFd<'_>]) {
        self.send_bytes(&reply.encode(number).unwrap(), descriptors);
    }

    fn send_bytes(&self, bytes: &[u8], descriptors: &[BorrowedFd<'_>]) {
        fds::send(self.0.as_fd(), bytes, descriptors, SendFlags::empty()).unwrap();
    }
}

/// A link, its peer, and the events that it reports.
fn link() -> (Arc<Link>, Peer, tokio::sync::mpsc::UnboundedReceiver<Event>) {
    let (ours, theirs) = fds::pair().unwrap();
    let (events, received) = tokio::sync::mpsc::unbounded_channel();
    let link = Link::open(ours, move |event| {
        let _ = events.send(event);
    })
    .unwrap();
    (Arc::new(link), Peer(theirs), received)
}

fn instance(number: u8) -> InstanceId {
    InstanceId::from_bytes([number; 16])
}

fn signal(number: u8) -> Request {
    Request::Signal { instance: instance(number), signal: StopSignal::TERM }
}

fn start(number: u8) -> Request {
    let revision = RevisionId::from_bytes([1; 16]);
    Request::Start { instance: instance(number), revision, descriptor: b"d".to_vec() }
}

fn pipe() -> (OwnedFd, OwnedFd) {
    rustix::pipe::pipe_with(rustix::pipe::PipeFlags::CLOEXEC).unwrap()
}

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("in time")
}

async fn wait_until_gone(link: &Link) {
    in_time(link.gone().wait_for(|gone| *gone)).await.unwrap();
}

#[tokio::test]
async fn answers_find_their_requests_in_any_order() {
    let (link, peer, _events) = link();
    let requests: Vec<_> = (0..5)
        .map(|number| {
            let link = Arc::clone(&link);
            tokio::spawn(async move { link.request(&signal(number), Vec::new()).await })
        })
        .collect();
    let (peer, mut received) = tokio::task::spawn_blocking(move || {
        let received: Vec<_> = (0..5).map(|_| peer.receive()).collect();
        (peer, received)
    })
    .await
    .unwrap();
    received.reverse();
    for (number, request, _) in &received {
        let Request::Signal { instance, .. } = request else { panic!("{request:?}") };
        let reply = match instance.to_bytes()[0] {
            0 => Reply::Refused(Refusal::NoInstance),
            _ => Reply::Done,
        };
        peer.send(*number, &reply, &[]);
    }
    for (at, request) in requests.into_iter().enumerate() {
        match in_time(request).await.unwrap() {
            Ok(answer) => assert!(at > 0 && answer.reply == Reply::Done),
            Err(error) => assert!(at == 0 && matches!(error, LinkError::Refused(Refusal::NoInstance)), "{error:?}"),
        }
    }
}

#[tokio::test]
async fn descriptors_go_and_come_and_no_copy_stays() {
    let (link, peer, _events) = link();
    let (reader, writer) = pipe();
    let asking = tokio::spawn({
        let link = Arc::clone(&link);
        async move { link.request(&start(1), vec![writer]).await }
    });
    let log = pipe();
    let (peer, number) = tokio::task::spawn_blocking(move || {
        let mut buffer = vec![0; MESSAGE_BYTES_MAX];
        let received = fds::receive(peer.0.as_fd(), &mut buffer, RecvFlags::empty()).unwrap().unwrap();
        assert_eq!(received.fds.len(), 1);
        let (number, _) = Request::decode(&buffer[..received.bytes], 1).unwrap();
        drop(received);
        // Every copy of the write end is closed now: this is the end of the stream.
        assert_eq!(rustix::io::read(&reader, &mut [0_u8; 1]).unwrap(), 0);
        (peer, number)
    })
    .await
    .unwrap();
    peer.send(number, &Reply::Started { pid: 7 }, &[log.0.as_fd()]);
    let mut answer = in_time(asking).await.unwrap().unwrap();
    assert_eq!((answer.reply, answer.fds.len()), (Reply::Started { pid: 7 }, 1));
    let received = answer.fds.take(0).unwrap();
    assert!(rustix::io::fcntl_getfd(&received).unwrap().contains(rustix::io::FdFlags::CLOEXEC));
}

#[tokio::test]
async fn a_start_that_nobody_waits_for_is_reported() {
    let (link, peer, mut events) = link();
    let asking = tokio::spawn({
        let link = Arc::clone(&link);
        async move { link.request(&start(9), vec![pipe().0]).await }
    });
    let (peer, number) = tokio::task::spawn_blocking(move || {
        let (number, ..) = peer.receive();
        (peer, number)
    })
    .await
    .unwrap();
    asking.abort();
    assert!(asking.await.is_err());
    let (log, _writer) = pipe();
    peer.send(number, &Reply::Started { pid: 7 }, &[log.as_fd()]);
    assert!(matches!(in_time(events.recv()).await, Some(Event::Orphaned(id)) if id == instance(9)));
}

#[tokio::test]
async fn a_list_is_gathered() {
    let (link, peer, mut events) = link();
    let asking = tokio::spawn({
        let link = Arc::clone(&link);
        async move { link.list().await }
    });
    let (log, _writer) = pipe();
    tokio::task::spawn_blocking(move || {
        let (number, request, _) = peer.receive();
        assert_eq!(request, Request::List);
        for id in 1..=3 {
            let listed = Reply::Listed {
                instance: instance(id),
                revision: RevisionId::from_bytes([1; 16]),
                pid: 5,
                descriptor: Vec::new(),
                exit: None,
            };
            peer.send(number, &listed, &[log.as_fd()]);
            peer.send(0, &Reply::Stop { grace_ms: 5 }, &[]);
        }
        peer.send(number, &Reply::Done, &[]);
        peer.receive_nothing_more();
    });
    assert_eq!(in_time(asking).await.unwrap().unwrap().len(), 3);
    assert!(matches!(in_time(events.recv()).await, Some(Event::Stop(5))));
    drop(link);
}

impl Peer {
    fn receive_nothing_more(&self) {
        assert!(fds::receive(self.0.as_fd(), &mut [0; 64], RecvFlags::empty()).is_ok_and(|received| received.is_none()));
    }
}

#[tokio::test]
async fn the_end_of_the_keeper_fails_every_request() {
    let (link, peer, _events) = link();
    let asking = tokio::spawn({
        let link = Arc::clone(&link);
        async move { link.request(&signal(1), Vec::new()).await }
    });
    tokio::task::spawn_blocking(move || drop(peer.receive())).await.unwrap();
    assert!(matches!(in_time(asking).await.unwrap(), Err(LinkError::Gone)));
    wait_until_gone(&link).await;
    assert!(matches!(in_time(link.request(&signal(1), Vec::new())).await, Err(LinkError::Gone)));
    assert!(matches!(in_time(link.list()).await, Err(LinkError::Gone)));
}

#[tokio::test]
async fn what_breaks_the_protocol_ends_the_link() {
    let (log, _writer) = pipe();
    let done = |number| Reply::Done.encode(number).unwrap();
    let mut other_version = done(0);
    other_version[2] ^= 0xff;
    let mut surplus = Reply::Stop { grace_ms: 1 }.encode(0).unwrap();
    surplus.push(0);
    let hostile: Vec<(Vec<u8>, usize)> = vec![
        (vec![0], 0),
        (vec![0xff; 4096], 0),
        (MAGIC.to_le_bytes().to_vec(), 0),
        ([MAGIC.to_le_bytes(), VERSION.to_le_bytes()].concat(), 0),
        (done(77), 0),
        (done(0), 0),
        (other_version, 0),
        (surplus, 0),
        (Reply::Stop { grace_ms: 1 }.encode(0).unwrap(), 1),
        (Request::Hello.encode(1).unwrap(), 0),
        (vec![1; MESSAGE_BYTES_MAX + 1], 0),
    ];
    for (at, (bytes, descriptors)) in hostile.into_iter().enumerate() {
        let (link, peer, _events) = link();
        peer.send_bytes(&bytes, &[log.as_fd()][..descriptors]);
        wait_until_gone(&link).await;
        assert!(matches!(in_time(link.request(&signal(1), Vec::new())).await, Err(LinkError::Gone)), "{at}");
    }
}

#[tokio::test]
async fn requests_beyond_a_bound_are_not_sent() {
    let (link, _peer, _events) = link();
    let long = Request::Start { instance: instance(1), revision: RevisionId::from_bytes([1; 16]), descriptor: vec![0; 5000] };
    assert!(matches!(in_time(link.request(&long, vec![pipe().0])).await, Err(LinkError::Request(_))));
    assert!(!*link.gone().borrow());
}

#[tokio::test]
async fn a_full_socket_is_waited_for() {
    let (link, peer, _events) = link();
    let requests: Vec<_> = (0..2_000)
        .map(|_| {
            let link = Arc::clone(&link);
            tokio::spawn(async move { link.command(&signal(1), Vec::new()).await })
        })
        .collect();
    tokio::task::yield_now().await;
    let answering = tokio::task::spawn_blocking(move || {
        for _ in 0..2_000 {
            let (number, ..) = peer.receive();
            peer.send(number, &Reply::Done, &[]);
        }
    });
    for request in requests {
        in_time(request).await.unwrap().unwrap();
    }
    answering.await.unwrap();
}

mod init_pair {
    use funtainer_sandbox::protocol::{InitMessage, InitStep, SocketCounts};

    use super::{SendFlags, fds, in_time, pipe};
    use crate::pair::InitPair;
    use std::os::fd::AsFd;

    #[tokio::test]
    async fn messages_come_in_order_up_to_the_end() {
        let (mut pair, theirs) = InitPair::new().unwrap();
        let counts = SocketCounts { v4: 1, v6: 1 };
        let (one, two) = pipe();
        let send = |message: InitMessage, descriptors: &[std::os::fd::BorrowedFd<'_>]| {
            fds::send(theirs.as_fd(), &message.to_bytes(), descriptors, SendFlags::empty()).unwrap();
        };
        send(InitMessage::Sockets(counts), &[one.as_fd(), two.as_fd()]);
        send(InitMessage::ExecFailed { step: InitStep::Exec, errno: 2 }, &[]);
        drop(theirs);
        let (message, received) = in_time(pair.next()).await.unwrap().unwrap();
        assert_eq!((message, received.len()), (InitMessage::Sockets(counts), 2));
        let (message, _) = in_time(pair.next()).await.unwrap().unwrap();
        assert_eq!(message, InitMessage::ExecFailed { step: InitStep::Exec, errno: 2 });
        assert!(in_time(pair.next()).await.unwrap().is_none());
    }

    #[tokio::test]
    async fn what_is_no_message_is_an_error() {
        let (one, _two) = pipe();
        let executed = InitMessage::Executed.to_bytes();
        let sockets = InitMessage::Sockets(SocketCounts { v4: 2, v6: 0 }).to_bytes();
        let long = [executed.as_slice(), &[0]].concat();
        for (bytes, descriptors) in
            [(&[0_u8; 16][..], 0), (&executed[..15], 0), (&long, 0), (&executed, 1), (&sockets, 1), (&[0xff; 500], 0)]
        {
            let (mut pair, theirs) = InitPair::new().unwrap();
            fds::send(theirs.as_fd(), bytes, &[one.as_fd()][..descriptors], SendFlags::empty()).unwrap();
            assert!(in_time(pair.next()).await.is_err(), "{bytes:?}");
        }
    }
}

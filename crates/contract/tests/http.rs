//! The dialect `http` against a hyper server and against servers that say single bytes.

use std::convert::Infallible;
use std::future::Future;
use std::io;
use std::net::SocketAddr;
use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};
use std::time::Duration;

use bytes::Bytes;
use funtainer_contract::{Answer, BodyError, BoxFuture, Call, CallBody, Connect, InvokeError, http::Client};
use funtainer_model::CallId;
use http::{HeaderMap, Method, Request, Response, StatusCode};
use http_body::Frame;
use http_body_util::{BodyExt, Full, StreamBody};
use hyper::body::Incoming;
use hyper::service::service_fn;
use hyper_util::rt::TokioIo;
use tokio::io::{AsyncReadExt, AsyncWriteExt};
use tokio::net::{TcpListener, TcpStream};
use tokio::sync::mpsc;

const DEADLINE: Duration = Duration::from_secs(20);

struct Loopback {
    address: SocketAddr,
    opened: AtomicUsize,
}

impl Connect for Loopback {
    fn connect(&self, _: Option<SocketAddr>) -> BoxFuture<'_, io::Result<TcpStream>> {
        self.opened.fetch_add(1, Ordering::Relaxed);
        Box::pin(TcpStream::connect(self.address))
    }
}

async fn in_time<T>(future: impl Future<Output = T>) -> T {
    tokio::time::timeout(DEADLINE, future).await.expect("in time")
}

/// A client of a server that treats each connection with `serve`.
async fn client_of<F, Served>(serve: F) -> (Client, Arc<Loopback>)
where
    F: Fn(usize, TcpStream) -> Served + Send + 'static,
    Served: Future<Output = ()> + Send + 'static,
{
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connect = Arc::new(Loopback { address: listener.local_addr().unwrap(), opened: AtomicUsize::new(0) });
    tokio::spawn(async move {
        for number in 0.. {
            let (stream, _) = listener.accept().await.unwrap();
            tokio::spawn(serve(number, stream));
        }
    });
    (Client::new(Arc::clone(&connect) as Arc<dyn Connect>), connect)
}

/// A client of a server that answers every request on a connection with these bytes, then ends it unless told to go on.
async fn client_of_bytes(answer: &'static [u8], keep: bool) -> (Client, Arc<Loopback>) {
    client_of(move |_, mut stream| async move {
        while read_head(&mut stream).await.is_some() {
            stream.write_all(answer).await.unwrap();
            if !keep {
                return;
            }
        }
    })
    .await
}

/// The head of the next request as text, `None` at the end of the connection. Bodies are not told apart: for requests without.
async fn read_head(stream: &mut TcpStream) -> Option<String> {
    let mut head = Vec::new();
    while !head.ends_with(b"\r\n\r\n") {
        head.push(stream.read_u8().await.ok()?);
    }
    Some(String::from_utf8(head).unwrap())
}

fn call(method: Method, path: &str, body: CallBody) -> Call {
    let request = Request::builder().method(method).uri(path).header("host", "function.example").body(body).unwrap();
    Call { id: CallId::from_bytes([2; 16]), request }
}

fn get(path: &str) -> Call {
    call(Method::GET, path, CallBody::Empty)
}

async fn text(answer: Answer) -> Result<String, BodyError> {
    let body = in_time(answer.response.into_body().collect()).await?;
    Ok(String::from_utf8(body.to_bytes().to_vec()).unwrap())
}

async fn hyper_server<F, Served>(answer: F) -> (Client, Arc<Loopback>)
where
    F: Fn(Request<Incoming>) -> Served + Clone + Send + 'static,
    Served: Future<Output = Response<Full<Bytes>>> + Send,
{
    client_of(move |_, stream| {
        let answer = answer.clone();
        async move {
            let service = service_fn(move |request| {
                let answered = answer(request);
                async move { Ok::<_, Infallible>(answered.await) }
            });
            let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
        }
    })
    .await
}

#[tokio::test]
async fn calls_share_a_connection_one_after_the_other() {
    let (client, connect) = hyper_server(|request| async move {
        let uri = request.uri().to_string();
        let body = request.into_body().collect().await.unwrap().to_bytes();
        Response::new(Full::from(format!("{uri} {}", String::from_utf8_lossy(&body))))
    })
    .await;
    for number in 0..50 {
        let answer =
            in_time(client.invoke(call(Method::POST, "/a?b=c", CallBody::Full(Bytes::from(number.to_string()))))).await;
        assert_eq!(text(answer.unwrap()).await.unwrap(), format!("/a?b=c {number}"));
    }
    assert_eq!(connect.opened.load(Ordering::Relaxed), 1);
}

#[tokio::test]
async fn calls_at_once_have_connections_of_their_own() {
    let (client, connect) = hyper_server(|_| async { Response::new(Full::from("x")) }).await;
    let answers: Vec<_> = (0..10).map(|_| client.invoke(get("/"))).collect();
    let mut held = Vec::new();
    for answer in answers {
        held.push(in_time(answer).await.unwrap());
    }
    for answer in held {
        assert_eq!(text(answer).await.unwrap(), "x");
    }
    assert!(connect.opened.load(Ordering::Relaxed) <= 10);
}

#[tokio::test]
async fn bodies_are_streamed_both_ways() {
    let (client, _) = client_of(|_, stream| async move {
        let service = service_fn(|request: Request<Incoming>| async move {
            let frames = request.into_body();
            Ok::<_, Infallible>(Response::builder().header("trailer", "x-sum").body(frames).unwrap())
        });
        let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    })
    .await;
    let (sender, receiver) = mpsc::channel(1);
    let answer = in_time(client.invoke(call(Method::POST, "/", CallBody::Channel(receiver)))).await.unwrap();
    let mut body = answer.response.into_body();
    for part in ["one", "two", "three"] {
        sender.send(Ok(Bytes::from(part))).await.unwrap();
        assert_eq!(in_time(body.frame()).await.unwrap().unwrap().into_data().unwrap(), part);
    }
    drop(sender);
    assert!(in_time(body.frame()).await.is_none());
}

#[tokio::test]
async fn trailers_pass() {
    let (client, _) = client_of(|_, stream| async move {
        let service = service_fn(|_: Request<Incoming>| async {
            let trailers = HeaderMap::from_iter([("x-sum".parse().unwrap(), "7".parse().unwrap())]);
            let frames = [Ok::<_, Infallible>(Frame::data(Bytes::from("b"))), Ok(Frame::trailers(trailers))];
            let body = StreamBody::new(Frames(frames.into_iter()));
            Ok::<_, Infallible>(Response::builder().header("trailer", "x-sum").body(body).unwrap())
        });
        let _ = hyper::server::conn::http1::Builder::new().serve_connection(TokioIo::new(stream), service).await;
    })
    .await;
    let mut call = get("/");
    call.request.headers_mut().insert("te", "trailers".parse().unwrap());
    let answer = in_time(client.invoke(call)).await.unwrap();
    assert_eq!(answer.response.headers()["trailer"], "x-sum");
    let collected = in_time(answer.response.into_body().collect()).await.unwrap();
    assert_eq!(collected.trailers().unwrap()["x-sum"], "7");
}

struct Frames<I>(I);

impl<I: Iterator + Unpin> futures_core::Stream for Frames<I> {
    type Item = I::Item;

    fn poll_next(self: std::pin::Pin<&mut Self>, _: &mut std::task::Context<'_>) -> std::task::Poll<Option<Self::Item>> {
        std::task::Poll::Ready(self.get_mut().0.next())
    }
}

#[tokio::test]
async fn heads_are_those_of_this_hop() {
    let (client, _) = client_of(|_, mut stream| async move {
        let head = read_head(&mut stream).await.unwrap();
        let answer = format!(
            "HTTP/1.1 200 Fine\r\nconnection: x-private\r\nx-private: 1\r\nkeep-alive: 5\r\nx-kept: 1\r\ncontent-length: {}\r\n\r\n{head}",
            head.len()
        );
        stream.write_all(answer.as_bytes()).await.unwrap();
    })
    .await;
    let mut call = get("/p?q");
    *call.request.version_mut() = http::Version::HTTP_10;
    for (name, value) in
        [("connection", "x-hop"), ("x-hop", "1"), ("x-kept", "2"), ("upgrade", "websocket"), ("expect", "100-continue")]
    {
        call.request.headers_mut().append(name, value.parse().unwrap());
    }
    let answer = in_time(client.invoke(call)).await.unwrap();
    let mut names: Vec<_> = answer.response.headers().keys().map(ToString::to_string).collect();
    names.sort();
    assert_eq!(names, ["content-length", "x-kept"]);
    assert_eq!(text(answer).await.unwrap(), "GET /p?q HTTP/1.1\r\nhost: function.example\r\nx-kept: 2\r\n\r\n");
}

#[tokio::test]
async fn interim_answers_are_not_the_answer() {
    let (client, _) =
        client_of_bytes(b"HTTP/1.1 103 Early Hints\r\nlink: a\r\n\r\nHTTP/1.1 100 Continue\r\n\r\nHTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok", true).await;
    let answer = in_time(client.invoke(get("/"))).await.unwrap();
    assert_eq!(answer.response.status(), StatusCode::OK);
    assert_eq!(text(answer).await.unwrap(), "ok");
}

#[tokio::test]
async fn old_servers_are_understood() {
    let (client, connect) = client_of_bytes(b"HTTP/1.0 200 OK\r\nserver: old\r\n\r\nuntil the end", false).await;
    for opened in 1..=2 {
        let answer = in_time(client.invoke(get("/"))).await.unwrap();
        assert_eq!(answer.response.version(), http::Version::HTTP_11);
        assert_eq!(text(answer).await.unwrap(), "until the end");
        assert_eq!(connect.opened.load(Ordering::Relaxed), opened);
    }
}

#[tokio::test]
async fn answers_without_a_body_end_at_once() {
    for (method, answer) in [
        (Method::HEAD, &b"HTTP/1.1 200 OK\r\ncontent-length: 5\r\n\r\n"[..]),
        (Method::GET, b"HTTP/1.1 204 No Content\r\n\r\n"),
        (Method::GET, b"HTTP/1.1 304 Not Modified\r\ncontent-length: 5\r\n\r\n"),
        (Method::GET, b"HTTP/1.1 200 OK\r\ncontent-length: 0\r\n\r\n"),
    ] {
        let (client, connect) = client_of_bytes(answer, true).await;
        for _ in 0..3 {
            let answer = in_time(client.invoke(call(method.clone(), "/", CallBody::Empty))).await.unwrap();
            assert!(http_body::Body::is_end_stream(answer.response.body()));
            assert_eq!(text(answer).await.unwrap(), "");
        }
        assert_eq!(connect.opened.load(Ordering::Relaxed), 1, "{method}");
    }
}

#[tokio::test]
async fn an_answer_before_the_end_of_the_upload_is_given_on() {
    let (client, connect) = client_of(|_, mut stream| async move {
        read_head(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 413 Too Large\r\ncontent-length: 3\r\n\r\nbig").await.unwrap();
        // The connection ends with the client, which must not go on with the upload.
        let mut rest = Vec::new();
        let _ = stream.read_to_end(&mut rest).await;
    })
    .await;
    let (sender, receiver) = mpsc::channel(1);
    let answer = in_time(client.invoke(call(Method::POST, "/", CallBody::Channel(receiver)))).await.unwrap();
    assert_eq!(answer.response.status(), StatusCode::PAYLOAD_TOO_LARGE);
    assert_eq!(text(answer).await.unwrap(), "big");
    in_time(sender.closed()).await;
    let (_sender, receiver) = mpsc::channel(1);
    in_time(client.invoke(call(Method::POST, "/", CallBody::Channel(receiver)))).await.unwrap();
    assert_eq!(connect.opened.load(Ordering::Relaxed), 2, "a connection with half a request on it is not used again");
}

#[tokio::test]
async fn a_refusal_of_the_upload_arrives_although_the_server_closes() {
    let (client, _) = client_of(|_, mut stream| async move {
        read_head(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 403 No\r\nconnection: close\r\ncontent-length: 2\r\n\r\nno").await.unwrap();
    })
    .await;
    let answer = in_time(client.invoke(call(Method::POST, "/", CallBody::Full(vec![0; 64].into())))).await.unwrap();
    assert_eq!(answer.response.status(), StatusCode::FORBIDDEN);
}

#[tokio::test]
async fn a_stale_connection_is_replaced() {
    let (client, connect) = client_of(|_, mut stream| async move {
        read_head(&mut stream).await.unwrap();
        stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok").await.unwrap();
        // Closed without a word, as servers do after their keep-alive time.
    })
    .await;
    for _ in 0..20 {
        let answer = in_time(client.invoke(get("/"))).await.unwrap();
        assert_eq!(text(answer).await.unwrap(), "ok");
        tokio::task::yield_now().await;
    }
    assert!(connect.opened.load(Ordering::Relaxed) <= 20);
}

#[tokio::test]
async fn surplus_bytes_close_the_connection() {
    let (client, connect) = client_of_bytes(
        b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nokHTTP/1.1 200 OK\r\ncontent-length: 4\r\n\r\nevil",
        true,
    )
    .await;
    for opened in 1..=5 {
        let answer = in_time(client.invoke(get("/"))).await.unwrap();
        assert_eq!(text(answer).await.unwrap(), "ok");
        assert_eq!(connect.opened.load(Ordering::Relaxed), opened);
    }
}

#[tokio::test]
async fn what_is_no_answer_is_an_error() {
    let check = async |answer: &'static [u8], code: &str| {
        let (client, _) = client_of_bytes(answer, false).await;
        let error = in_time(client.invoke(get("/"))).await.unwrap_err();
        assert!(error.was_delivered());
        assert_eq!(error.failure().code.as_str(), code, "{error:?}");
    };
    check(b"SSH-2.0-OpenSSH_9.2\r\n", "function-protocol").await;
    check(b"", "function-failed").await;
    check(b"HTTP/1.1 200", "function-failed").await;
    check(b"HTTP/1.1 101 Switching Protocols\r\nconnection: upgrade\r\nupgrade: x\r\n\r\n", "function-failed").await;
    check(b"HTTP/1.1 200 OK\r\ncontent-length: 1\r\ncontent-length: 2\r\n\r\nab", "function-protocol").await;
}

#[tokio::test]
async fn an_answer_that_breaks_off_is_an_error_of_the_body() {
    for answer in [
        &b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\nshort"[..],
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n5\r\nshort\r\n",
    ] {
        let (client, _) = client_of_bytes(answer, false).await;
        let answer = in_time(client.invoke(get("/"))).await.unwrap();
        assert!(matches!(text(answer).await, Err(BodyError::Connection(_))));
    }
}

#[tokio::test]
async fn without_a_connection_the_call_comes_back() {
    let listener = TcpListener::bind("127.0.0.1:0").await.unwrap();
    let connect = Loopback { address: listener.local_addr().unwrap(), opened: AtomicUsize::new(0) };
    drop(listener);
    let client = Client::new(Arc::new(connect));
    let error = in_time(client.invoke(call(Method::POST, "/p", CallBody::Full(Bytes::from("body"))))).await.unwrap_err();
    assert!(!error.was_delivered());
    let call = error.into_undelivered().unwrap();
    assert_eq!(call.request.uri(), "/p");
    assert_eq!(call.request.into_body().collect().await.unwrap().to_bytes(), "body");
}

#[tokio::test]
async fn interim_answers_without_end_are_cut_off() {
    let (client, _) = client_of(|_, mut stream| async move {
        read_head(&mut stream).await.unwrap();
        while stream.write_all(b"HTTP/1.1 103 Early Hints\r\n\r\n").await.is_ok() {}
    })
    .await;
    let error = in_time(client.invoke(get("/"))).await.unwrap_err();
    assert!(matches!(error, InvokeError::Broken(_)), "{error:?}");
}

#[tokio::test]
async fn a_caller_that_breaks_off_is_told_apart() {
    let (client, _) = hyper_server(|request| async move {
        let _ = request.into_body().collect().await;
        Response::new(Full::from("x"))
    })
    .await;
    let (sender, receiver) = mpsc::channel(1);
    sender.send(Err(io::ErrorKind::ConnectionReset.into())).await.unwrap();
    let error = in_time(client.invoke(call(Method::POST, "/", CallBody::Channel(receiver)))).await.unwrap_err();
    assert!(matches!(error, InvokeError::CallerGone(_)), "{error:?}");
}

#[tokio::test]
async fn dropping_the_call_or_the_answer_ends_the_connection() {
    let (gone, mut ends) = mpsc::channel(2);
    let (came, mut arrivals) = mpsc::channel(2);
    let (client, _) = client_of(move |number, mut stream| {
        let (gone, came) = (gone.clone(), came.clone());
        async move {
            read_head(&mut stream).await.unwrap();
            came.send(number).await.unwrap();
            if number == 1 {
                stream.write_all(b"HTTP/1.1 200 OK\r\ncontent-length: 9\r\n\r\npart").await.unwrap();
            }
            assert_eq!(stream.read(&mut [0]).await.unwrap_or(0), 0);
            gone.send(number).await.unwrap();
        }
    })
    .await;
    {
        let mut waiting = std::pin::pin!(client.invoke(get("/")));
        tokio::select! {
            biased;
            _ = &mut waiting => panic!("there is no answer"),
            arrived = in_time(arrivals.recv()) => assert_eq!(arrived, Some(0)),
        }
    }
    assert_eq!(in_time(ends.recv()).await, Some(0));
    let mut body = in_time(client.invoke(get("/"))).await.unwrap().response.into_body();
    assert_eq!(in_time(body.frame()).await.unwrap().unwrap().into_data().unwrap(), "part");
    drop(body);
    assert_eq!(in_time(ends.recv()).await, Some(1));
}

struct Flag(Arc<AtomicBool>);

impl Drop for Flag {
    fn drop(&mut self) {
        self.0.store(true, Ordering::Release);
    }
}

#[tokio::test]
async fn the_slot_is_free_with_the_last_byte() {
    for answer in [
        &b"HTTP/1.1 200 OK\r\ncontent-length: 2\r\n\r\nok"[..],
        b"HTTP/1.1 200 OK\r\ntransfer-encoding: chunked\r\n\r\n2\r\nok\r\n0\r\n\r\n",
    ] {
        let (client, _) = client_of_bytes(answer, true).await;
        let answer = in_time(client.invoke(get("/"))).await.unwrap();
        let freed = Arc::new(AtomicBool::new(false));
        let mut body = answer.response.into_body().with_guard(Box::new(Flag(Arc::clone(&freed))));
        assert!(!freed.load(Ordering::Acquire));
        while in_time(body.frame()).await.is_some() {}
        assert!(freed.load(Ordering::Acquire), "with the body still here");
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 4)]
async fn many_threads_share_a_client() {
    let (client, _) = hyper_server(|request| async move { Response::new(Full::from(request.uri().path().to_owned())) }).await;
    let callers: Vec<_> = (0..16)
        .map(|caller| {
            let client = client.clone();
            tokio::spawn(async move {
                for number in 0..200 {
                    let path = format!("/{caller}/{number}");
                    let answer = client.invoke(get(&path)).await.unwrap();
                    assert_eq!(text(answer).await.unwrap(), path);
                }
            })
        })
        .collect();
    for caller in callers {
        in_time(caller).await.unwrap();
    }
}

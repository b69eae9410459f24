//! Registries that lie, break off, stall and send elsewhere.

use std::sync::atomic::{AtomicUsize, Ordering};

use funtainer_image::{Progress, PullPolicy};
use funtainer_model::{ErrorCode, Failure};

use crate::liar::{Answer, Asked, Liar, Served};
use crate::support::{DEADLINE, Store, layer, sha256};

fn served() -> Served {
    Served::new(&layer("bin/app", 300_000))
}

/// Pulls from a registry with the given answers; nothing but verified documents may remain of a failure.
async fn fails(handler: impl Fn(&Served, &Asked) -> Answer + Send + Sync + 'static) -> (Failure, Liar) {
    let store = Store::new();
    let image = served();
    let liar = Liar::start(move |asked| handler(&image, asked));
    let failure = store.pull(&liar.reference()).await.unwrap_err().failure();
    store.wait_for_empty_tmp();
    assert_eq!(store.files("layers"), [""; 0], "{failure:?}");
    assert_eq!(store.images.images().await.unwrap(), [], "{failure:?}");
    assert!(failure.detail.contains("lie:1"), "{failure:?}");
    (failure, liar)
}

fn is_layer(image: &Served, asked: &Asked) -> bool {
    asked.path.contains(&sha256(&image.layer).hex())
}

fn is_config(image: &Served, asked: &Asked) -> bool {
    asked.path.contains(&sha256(&image.config).hex())
}

#[tokio::test(flavor = "multi_thread")]
async fn other_content_than_asked_for_is_refused() {
    let (failure, _) = fails(|image, asked| match asked.method.as_str() {
        "GET" if asked.path.contains("/manifests/") => Answer::Whole(200, String::new(), b"{}".to_vec()),
        _ => image.answer(asked),
    })
    .await;
    assert_eq!(failure.code, ErrorCode::DigestMismatch, "{failure:?}");

    let (failure, _) = fails(|image, asked| {
        let other = vec![b' '; image.config.len()];
        if is_config(image, asked) { Answer::Whole(200, String::new(), other) } else { image.answer(asked) }
    })
    .await;
    assert_eq!(failure.code, ErrorCode::DigestMismatch, "{failure:?}");

    let (failure, liar) = fails(|image, asked| {
        let mut other = image.layer.clone();
        *other.last_mut().unwrap() ^= 1;
        if is_layer(image, asked) { Answer::Whole(200, String::new(), other) } else { image.answer(asked) }
    })
    .await;
    assert_eq!(failure.code, ErrorCode::DigestMismatch, "{failure:?}");
    assert_eq!(liar.count("GET", "/blobs/"), 2, "a wrong layer is not asked for again");
}

#[tokio::test(flavor = "multi_thread")]
async fn other_sizes_than_the_manifest_says_are_refused() {
    for claims_length in [true, false] {
        for longer in [true, false] {
            let (failure, _) = fails(move |image, asked| {
                let mut body = image.layer.clone();
                body.resize(if longer { body.len() + 1 } else { body.len() - 1 }, 0);
                match (is_layer(image, asked), claims_length) {
                    (true, true) => Answer::Whole(200, String::new(), body),
                    // Without a length the end of the connection ends the body.
                    (true, false) => Answer::Unsized(body),
                    _ => image.answer(asked),
                }
            })
            .await;
            assert_eq!(failure.code, ErrorCode::DigestMismatch, "{failure:?}");
        }
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn endless_documents_are_cut_off() {
    let (failure, _) = fails(|image, asked| match asked.method.as_str() {
        "GET" => Answer::Whole(200, String::new(), vec![b' '; 5 << 20]),
        _ => image.answer(asked),
    })
    .await;
    assert_eq!(failure.code, ErrorCode::RegistryUnavailable, "{failure:?}");
    assert!(failure.detail.contains("4194304 bytes"), "{failure:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_layer_that_breaks_off_is_fetched_again_and_then_given_up() {
    let (failure, liar) = fails(|image, asked| {
        let half = image.layer[..image.layer.len() / 2].to_vec();
        if is_layer(image, asked) { Answer::Claims(image.layer.len(), half) } else { image.answer(asked) }
    })
    .await;
    assert_eq!(failure.code, ErrorCode::RegistryUnavailable, "{failure:?}");
    assert_eq!(liar.count("GET", "/blobs/"), 1 + 3);

    let (store, image, broken) = (Store::new(), served(), AtomicUsize::new(0));
    let liar = Liar::start(move |asked| {
        if is_layer(&image, asked) && broken.fetch_add(1, Ordering::Relaxed) == 0 {
            return Answer::Claims(image.layer.len(), image.layer[..1000].to_vec());
        }
        image.answer(asked)
    });
    store.pull(&liar.reference()).await.unwrap();
    assert_eq!(store.files("tmp"), [""; 0]);
}

#[tokio::test(flavor = "multi_thread")]
async fn passing_faults_are_waited_for_and_lasting_ones_are_said() {
    let (store, image, count) = (Store::new(), served(), AtomicUsize::new(0));
    let liar = Liar::start(move |asked| match count.fetch_add(1, Ordering::Relaxed) {
        0 => Answer::Whole(503, String::new(), Vec::new()),
        1 => Answer::Whole(429, "Retry-After: 0\r\n".to_owned(), Vec::new()),
        2 => Answer::Hangup,
        _ => image.answer(asked),
    });
    store.pull(&liar.reference()).await.unwrap();

    let said = br#"{"errors":[{"code":"UNAVAILABLE","message":"the disk\u001b[31m is full"}]}"#;
    let retry = "Retry-After: 0\r\n".to_owned();
    let (failure, _) = fails(move |_, _| Answer::Whole(500, retry.clone(), said.to_vec())).await;
    assert_eq!(failure.code, ErrorCode::RegistryUnavailable);
    assert!(failure.detail.contains("500") && failure.detail.contains("the disk[31m is full"), "{failure:?}");

    let (failure, liar) = fails(|_, _| Answer::Whole(501, String::new(), Vec::new())).await;
    assert_eq!(failure.code, ErrorCode::RegistryUnavailable);
    assert_eq!(liar.asked().len(), 2, "HEAD and GET, once each");
    let (failure, _) = fails(|_, _| Answer::Whole(403, String::new(), Vec::new())).await;
    assert_eq!(failure.code, ErrorCode::ImageForbidden);
}

#[tokio::test(flavor = "multi_thread")]
async fn registries_without_head_or_digest_are_asked_by_get() {
    for status in [200, 405] {
        let (store, image) = (Store::new(), served());
        let digest = image.digest();
        let liar = Liar::start(move |asked| match asked.method.as_str() {
            "HEAD" => Answer::Whole(status, String::new(), Vec::new()),
            _ => image.answer(asked),
        });
        assert_eq!(store.pull(&liar.reference()).await.unwrap().digest, digest);
        assert_eq!(liar.count("GET", "/manifests/"), 1, "the manifest came with the answer");
    }
}

#[tokio::test(flavor = "multi_thread")]
async fn redirects_are_followed_but_not_off_this_machine_in_the_clear() {
    let (store, image) = (Store::new(), served());
    let blobs = image.clone();
    let elsewhere = Liar::start(move |asked| blobs.answer(asked));
    let to = elsewhere.address();
    let liar = Liar::start(move |asked| {
        if asked.path.contains("/blobs/") {
            Answer::Whole(307, format!("Location: http://{to}{}\r\n", asked.path), Vec::new())
        } else {
            image.answer(asked)
        }
    });
    store.pull(&liar.reference()).await.unwrap();
    assert_eq!(elsewhere.count("GET", "/blobs/"), 2);

    let check = async |location: &'static str, text: &str| {
        let (failure, _) = fails(move |image, asked| {
            if is_layer(image, asked) {
                Answer::Whole(302, format!("Location: {location}\r\n"), Vec::new())
            } else {
                image.answer(asked)
            }
        })
        .await;
        assert_eq!(failure.code, ErrorCode::RegistryUnavailable, "{failure:?}");
        assert!(failure.detail.contains(text), "{failure:?}");
    };
    check("http://192.0.2.1/blob?secret=1", "leads to 192.0.2.1 without encryption").await;
    check("file:///etc/passwd", "without encryption").await;
    check("/v2/again", "which its own manifest names").await;
    let (failure, _) = fails(|_, asked| Answer::Whole(302, format!("Location: {}\r\n", asked.path), Vec::new())).await;
    assert!(failure.detail.contains("redirects"), "{failure:?}");
}

#[tokio::test(flavor = "multi_thread")]
async fn a_cancelled_pull_leaves_nothing_and_the_next_one_works() {
    let (store, image, stalls) = (Store::new(), served(), AtomicUsize::new(0));
    let liar = Liar::start(move |asked| {
        if is_layer(&image, asked) && stalls.fetch_add(1, Ordering::Relaxed) == 0 {
            return Answer::Stalls(image.layer.len(), image.layer[..200_000].to_vec());
        }
        image.answer(asked)
    });
    let name = liar.reference();
    let started = tokio::sync::Notify::new();
    let on_progress = |event| {
        if matches!(event, Progress::LayerReceived { .. }) {
            started.notify_one();
        }
    };
    tokio::select! {
        result = store.images.pull(&name, PullPolicy::FromRegistry, &on_progress) => panic!("the registry stalls: {result:?}"),
        result = tokio::time::timeout(DEADLINE, started.notified()) => result.expect("the transfer begins"),
    }
    liar.left.recv_timeout(DEADLINE).expect("the connection is closed");
    store.wait_for_empty_tmp();
    assert_eq!(store.files("layers"), [""; 0]);
    store.pull(&name).await.unwrap();
}

#[tokio::test(flavor = "multi_thread")]
async fn who_waits_for_a_failing_pull_tries_itself() {
    let (store, image, wrong) = (Store::new(), served(), AtomicUsize::new(0));
    let liar = Liar::start(move |asked| {
        if is_layer(&image, asked) && wrong.fetch_add(1, Ordering::Relaxed) == 0 {
            return Answer::Whole(200, String::new(), vec![0; image.layer.len()]);
        }
        image.answer(asked)
    });
    let name = liar.reference();
    let (first, second) = futures_util::join!(store.pull(&name), store.pull(&name));
    assert_eq!(first.unwrap_err().failure().code, ErrorCode::DigestMismatch);
    second.unwrap();
}

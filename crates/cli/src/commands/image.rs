//! `image import` and `pull`.

use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use anyhow::Context as _;
use bytes::Bytes;
use funtainer_gateway::api::native::{Image, Imported, PullRequest, Pulled};
use futures_util::stream;
use http::{Method, Request};
use http_body_util::{BodyExt, StreamBody};
use hyper::body::Frame;
use tokio::sync::mpsc;

use crate::args::{Host, Import, Output, Pull};
use crate::client::Body;
use crate::progress::Show;
use crate::{client, streams};

/// Bytes read and sent at once.
const CHUNK_BYTES: usize = 256 * 1024;
/// Chunks between the reading thread and the connection.
const CHUNKS_WAITING_MAX: usize = 4;

pub(super) async fn pull(host: &Host, form: Output, pull: Pull) -> anyhow::Result<()> {
    let mut show = Show::new(pull.quiet);
    let request = client::request(Method::POST, "/images/pull", Some(&PullRequest { image: pull.image }))?;
    let pulled: Pulled = client::events(host, request, &mut show).await?;
    match form {
        Output::Json => streams::json(&pulled),
        Output::Text => streams::line(&format!("{} {}", pulled.image, pulled.digest)),
    }
}

pub(super) async fn import(host: &Host, form: Output, import: Import) -> anyhow::Result<()> {
    let source = Source::of(&import.path).with_context(|| format!("{} cannot be read", import.path.display()))?;
    let query = import.name.map_or_else(String::new, |name| format!("?name={}", client::segment(&name)));
    let request = Request::builder().method(Method::POST).uri(format!("/images/import{query}")).body(source.body())?;
    let mut show = Show::new(import.quiet);
    let Imported { images } = client::events(host, request, &mut show).await?;
    if form == Output::Json {
        return streams::json(&images);
    }
    for Image { image, digest, .. } in images {
        streams::line(&format!("{image} {digest}"))?;
    }
    Ok(())
}

/// Where an archive comes from.
enum Source {
    Stdin,
    Archive(std::fs::File),
    /// A layout, sent as a tar of it.
    Directory(PathBuf),
}

impl Source {
    fn of(path: &Path) -> anyhow::Result<Self> {
        if path == Path::new("-") {
            return Ok(Self::Stdin);
        }
        let file = std::fs::File::open(path)?;
        if !file.metadata()?.is_dir() {
            return Ok(Self::Archive(file));
        }
        let is_layout = path.join("oci-layout").is_file() && path.join("index.json").is_file();
        anyhow::ensure!(is_layout, "it is no OCI layout: oci-layout or index.json is missing in it");
        Ok(Self::Directory(path.to_owned()))
    }

    /// The archive's bytes, read by a thread of its own.
    fn body(self) -> Body {
        let (sender, receiver) = mpsc::channel(CHUNKS_WAITING_MAX);
        std::thread::spawn(move || {
            let mut chunks = Chunks(sender);
            let result = match self {
                Self::Stdin => copy(io::stdin().lock(), &mut chunks),
                Self::Archive(file) => copy(file, &mut chunks),
                Self::Directory(path) => archive(&path, &mut chunks),
            };
            if let Err(error) = result {
                // Breaks the request off. Nobody is there to tell when the server has had enough.
                let _ = chunks.0.blocking_send(Err(error));
            }
        });
        let frames = stream::unfold(receiver, |mut receiver| async {
            receiver.recv().await.map(|chunk| (chunk.map(Frame::data), receiver))
        });
        BodyExt::boxed_unsync(StreamBody::new(frames))
    }
}

/// Sends what is written to it.
struct Chunks(mpsc::Sender<io::Result<Bytes>>);

impl Write for Chunks {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        self.0.blocking_send(Ok(Bytes::copy_from_slice(bytes))).map_err(|_| io::ErrorKind::BrokenPipe)?;
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

fn copy(mut from: impl Read, to: &mut Chunks) -> io::Result<()> {
    let mut buffer = vec![0; CHUNK_BYTES];
    loop {
        match from.read(&mut buffer) {
            Ok(0) => return Ok(()),
            Ok(read) => to.write_all(&buffer[..read])?,
            Err(error) if error.kind() == io::ErrorKind::Interrupted => {}
            Err(error) => return Err(error),
        }
    }
}

fn archive(directory: &Path, to: &mut Chunks) -> io::Result<()> {
    let mut archive = tar::Builder::new(io::BufWriter::with_capacity(CHUNK_BYTES, to));
    archive.append_dir_all(".", directory)?;
    archive.into_inner()?.flush()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_directory_becomes_an_archive() {
        let directory = tempfile::tempdir().unwrap();
        for (path, content) in [("oci-layout", "{}"), ("index.json", "[]")] {
            std::fs::write(directory.path().join(path), content).unwrap();
        }
        std::fs::create_dir_all(directory.path().join("blobs/sha256")).unwrap();
        std::fs::write(directory.path().join("blobs/sha256/ab"), vec![7; 600_000]).unwrap();
        let bytes = Source::of(directory.path()).unwrap().body().collect().await.unwrap().to_bytes();
        let mut archive = tar::Archive::new(&bytes[..]);
        let sizes: std::collections::BTreeMap<_, _> = archive
            .entries()
            .unwrap()
            .map(|entry| entry.unwrap())
            .map(|entry| (entry.path().unwrap().to_string_lossy().trim_start_matches("./").to_owned(), entry.size()))
            .collect();
        assert_eq!((sizes["oci-layout"], sizes["index.json"], sizes["blobs/sha256/ab"]), (2, 2, 600_000));
    }

    #[test]
    fn a_directory_that_is_no_layout_is_refused() {
        let directory = tempfile::tempdir().unwrap();
        assert!(Source::of(directory.path()).is_err());
        assert!(Source::of(&directory.path().join("nothing")).is_err());
    }
}

//! An S3 server in this process: it checks signatures and expiry, keeps objects as files, and
//! can be told to misbehave. The `tests` crate uses it, too.
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::collections::HashMap;
use std::path::PathBuf;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use axum::Router;
use axum::body::Body;
use axum::extract::{Request, State};
use axum::http::{Method, StatusCode};
use axum::response::{IntoResponse, Response};
use cairn_coordinator::blobs::Location;
use s3s::auth::SimpleAuth;
use s3s::service::{S3Service, S3ServiceBuilder};
use tempfile::TempDir;

const BUCKET: &str = "cairn";
const PREFIX: &str = "some/where";
const NO_BUCKET: &str = "<Error><Code>NoSuchBucket</Code></Error>";
const KEY_ID: &str = "AKIAIOSFODNN7EXAMPLE";
const SECRET: &str = "wJalrXUtnFEMI/K7MDENG/bPxRfiCYEXAMPLEKEY";

/// How the server behaves.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    /// As it should.
    Sound,
    /// Every request fails.
    Failing,
    /// No request is ever answered.
    Stalling,
    /// Each request is worked on this much later.
    Slow(Duration),
}

/// A request that was answered.
#[derive(Debug, Clone)]
pub struct Seen {
    /// GET, PUT and so on.
    pub method: Method,
    /// The object's key below the prefix.
    pub key: String,
    /// Whether the signature was in the URL.
    pub presigned: bool,
    /// The answer.
    pub status: StatusCode,
}

/// The server; it goes when the test's runtime does.
#[derive(Clone)]
pub struct S3 {
    inner: Arc<Inner>,
    address: std::net::SocketAddr,
}

struct Inner {
    service: S3Service,
    folder: TempDir,
    mode: Mutex<Mode>,
    seen: Mutex<Vec<Seen>>,
}

impl S3 {
    /// Starts one with an empty bucket.
    pub async fn start() -> Self {
        let folder = tempfile::tempdir().unwrap();
        std::fs::create_dir(folder.path().join(BUCKET)).unwrap();
        let files = s3s_fs::FileSystem::new(folder.path()).unwrap();
        let mut builder = S3ServiceBuilder::new(files);
        builder.set_auth(SimpleAuth::from_single(KEY_ID, SECRET));
        let inner = Arc::new(Inner {
            service: builder.build(),
            folder,
            mode: Mutex::new(Mode::Sound),
            seen: Mutex::default(),
        });
        let listener = tokio::net::TcpListener::bind("127.0.0.1:0").await.unwrap();
        let address = listener.local_addr().unwrap();
        let router = Router::new().fallback(answer).with_state(inner.clone());
        tokio::spawn(async move { axum::serve(listener, router).await });
        Self { inner, address }
    }

    /// Starts one on a thread of its own, for those who block theirs while a program runs that
    /// needs it. It stays until the process ends.
    pub fn start_apart() -> Self {
        let (tell, told) = std::sync::mpsc::sync_channel(1);
        std::thread::spawn(move || {
            let runtime = tokio::runtime::Builder::new_current_thread()
                .enable_all()
                .build()
                .unwrap();
            runtime.block_on(async {
                tell.send(Self::start().await).ok();
                std::future::pending::<()>().await;
            });
        });
        told.recv().unwrap()
    }

    /// What a coordinator is told of it.
    pub fn location(&self) -> Location {
        let variables = [
            ("AWS_ACCESS_KEY_ID", KEY_ID),
            ("AWS_SECRET_ACCESS_KEY", SECRET),
            ("AWS_REGION", "us-east-1"),
            ("AWS_ALLOW_HTTP", "true"),
            ("AWS_ENDPOINT", &format!("http://{}", self.address)),
        ];
        Location {
            url: format!("s3://{BUCKET}/{PREFIX}"),
            variables: variables
                .map(|(name, value)| (name.into(), value.into()))
                .into(),
        }
    }

    /// The same as variables of a coordinator's process.
    pub fn environment(&self) -> Vec<(String, String)> {
        let location = self.location();
        let blobs = ("CAIRN_BLOBS".to_owned(), location.url);
        location.variables.into_iter().chain([blobs]).collect()
    }

    /// Changes how it behaves.
    pub fn set(&self, mode: Mode) {
        *self.inner.mode.lock().unwrap() = mode;
    }

    /// The file of an object, by its key below the prefix.
    pub fn file(&self, key: &str) -> PathBuf {
        self.inner.folder.path().join(BUCKET).join(PREFIX).join(key)
    }

    /// Keys below a folder of the prefix.
    pub fn keys(&self, folder: &str) -> Vec<String> {
        let (mut keys, mut folders) = (Vec::new(), vec![self.file(folder)]);
        while let Some(next) = folders.pop() {
            for entry in std::fs::read_dir(next).into_iter().flatten() {
                let path = entry.unwrap().path();
                if path.is_dir() {
                    folders.push(path);
                } else {
                    let below = path.strip_prefix(self.file("")).unwrap();
                    keys.push(below.to_str().unwrap().to_owned());
                }
            }
        }
        keys.sort();
        keys
    }

    /// Multipart uploads that were begun and neither completed nor aborted.
    pub fn unfinished(&self) -> usize {
        std::fs::read_dir(self.inner.folder.path())
            .unwrap()
            .filter(|entry| {
                let name = entry.as_ref().unwrap().file_name();
                name.to_str().unwrap().starts_with(".upload")
            })
            .count()
    }

    /// Every request so far.
    pub fn seen(&self) -> Vec<Seen> {
        self.inner.seen.lock().unwrap().clone()
    }

    /// How many presigned puts of each key have succeeded.
    pub fn direct_puts(&self) -> HashMap<String, usize> {
        let mut puts = HashMap::new();
        for seen in self.seen() {
            if seen.presigned && seen.method == Method::PUT && seen.status.is_success() {
                *puts.entry(seen.key).or_default() += 1;
            }
        }
        puts
    }
}

async fn answer(State(inner): State<Arc<Inner>>, request: Request) -> Response {
    let mode = *inner.mode.lock().unwrap();
    match mode {
        Mode::Sound => {}
        Mode::Failing => return StatusCode::SERVICE_UNAVAILABLE.into_response(),
        Mode::Stalling => std::future::pending().await,
        Mode::Slow(wait) => tokio::time::sleep(wait).await,
    }
    let uri = request.uri();
    // S3 knows only buckets that were made; s3s-fs makes them by itself.
    if uri.path().split('/').nth(1) != Some(BUCKET) {
        return (StatusCode::NOT_FOUND, NO_BUCKET).into_response();
    }
    let prefix = format!("/{BUCKET}/{PREFIX}/");
    let mut seen = Seen {
        method: request.method().clone(),
        key: uri
            .path()
            .strip_prefix(&prefix)
            .unwrap_or_default()
            .to_owned(),
        presigned: uri
            .query()
            .is_some_and(|query| query.contains("X-Amz-Signature")),
        status: StatusCode::INTERNAL_SERVER_ERROR,
    };
    let request = request.map(s3s::Body::http_body_unsync);
    let Ok(response) = inner.service.call(request).await else {
        return StatusCode::INTERNAL_SERVER_ERROR.into_response();
    };
    seen.status = response.status();
    inner.seen.lock().unwrap().push(seen);
    response.map(Body::new)
}

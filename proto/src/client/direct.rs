//! Bytes straight to and from the coordinator's object store, by presigned URLs.
//!
//! Whatever goes wrong on this way, the coordinator's own streams are the other: nothing here
//! makes a transfer fail that would succeed without it. URLs are secrets and are never shown.
use std::fmt::Display;
use std::io::SeekFrom;
use std::net::IpAddr;
use std::path::Path;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, OnceLock, PoisonError};
use std::time::Duration;

use reqwest::header::{CONTENT_LENGTH, RANGE};
use reqwest::{Body, RequestBuilder, StatusCode, Url};
use rustls::crypto::ring;
use tokio::fs::File;
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};
use tokio::time::{Instant, timeout};
use tonic::Code;

use super::blobs::{Progress, STALL_MAX, file, watch_upload};
use super::{Client, ClientError, Options};
use crate::convert::BlobName;
use crate::v1;

/// How long no direct transfer is tried after the coordinator offered none, or one was not to be
/// had: a blocked host stays blocked, and asking for every blob would cost a call each.
const PAUSE: Duration = Duration::from_mins(10);
/// Failures in a row, without a byte in between, after which the streams are used. A URL that ran
/// out is one of them.
const TRIES: u32 = 3;
/// Bytes of a part given to the connection at once: small enough to see progress on a slow line.
const PIECE_BYTES: usize = 64 * 1024;

/// Whether and how bytes go straight to and from the store. Clones share it.
#[derive(Clone, Default)]
pub(super) struct Direct {
    http: Arc<OnceLock<Option<reqwest::Client>>>,
    paused_until: Arc<Mutex<Option<Instant>>>,
}

impl Direct {
    /// The client to use; none while direct transfers are paused.
    fn open(&self, options: &Options) -> Option<reqwest::Client> {
        let until = *self.lock();
        if until.is_some_and(|until| Instant::now() < until) {
            return None;
        }
        let client = self.http.get_or_init(|| {
            // reqwest takes the process's TLS provider; one that is there already stays.
            let _ = ring::default_provider().install_default();
            reqwest::Client::builder()
                .connect_timeout(options.connect_timeout)
                // A signed request is for one host.
                .redirect(reqwest::redirect::Policy::none())
                .build()
                .ok()
        });
        client.clone()
    }

    /// Uses the streams for a while.
    pub(super) fn pause(&self) {
        *self.lock() = Some(Instant::now() + PAUSE);
    }

    fn lock(&self) -> std::sync::MutexGuard<'_, Option<Instant>> {
        self.paused_until
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }
}

/// Why a request to the store came to nothing.
enum Failure {
    /// A file of ours, or the coordinator's answer: no other way would help.
    Ours(ClientError),
    /// Nobody can be connected to there: trying again at once is useless.
    Blocked,
    /// A refusal (a URL that ran out), or a connection that broke: a new URL may help.
    Broken,
}

impl From<ClientError> for Failure {
    fn from(error: ClientError) -> Self {
        Self::Ours(error)
    }
}

impl From<reqwest::Error> for Failure {
    fn from(error: reqwest::Error) -> Self {
        if error.is_connect() || error.is_builder() {
            note("cannot connect to the store", &error.without_url());
            Self::Blocked
        } else {
            note("a transfer broke off", &error.without_url());
            Self::Broken
        }
    }
}

fn note(what: &str, detail: &dyn Display) {
    tracing::debug!("direct transfer: {what}: {detail}");
}

impl Client {
    /// Uploads a file part by part straight to the store, going on where an earlier try stopped.
    /// False when the bytes have to go through the coordinator. `held` follows the bytes in the
    /// store, so that a caller can tell progress from failure.
    pub(super) async fn upload_direct(
        &self,
        path: &Path,
        blob: BlobName,
        lease_id: &str,
        held: &mut u64,
        progress: Progress<'_>,
    ) -> Result<bool, ClientError> {
        let Some(http) = self.direct.open(&self.options) else {
            return Ok(false);
        };
        let mut failures = 0;
        while failures < TRIES {
            let plan = self.begin_upload(blob, lease_id).await?;
            let Some(plan) = plan.filter(|plan| plan.complete || plan.direct) else {
                break;
            };
            progress(plan.committed_bytes.min(blob.size_bytes));
            if plan.complete {
                return Ok(true);
            }
            if plan.committed_bytes > *held {
                *held = plan.committed_bytes;
                failures = 0;
            }
            if plan.parts.is_empty() {
                if self.complete_upload(blob, lease_id).await? {
                    return Ok(true);
                }
                // A part has gone in between.
                failures += 1;
                continue;
            }
            match self.put_parts(&http, path, blob, plan, progress).await {
                Ok(()) => {}
                Err(Failure::Ours(error)) => return Err(error),
                Err(Failure::Broken) => failures += 1,
                Err(Failure::Blocked) => break,
            }
        }
        self.direct.pause();
        Ok(false)
    }

    /// None when the coordinator is older than the call.
    async fn begin_upload(
        &self,
        blob: BlobName,
        lease_id: &str,
    ) -> Result<Option<v1::BeginUploadResponse>, ClientError> {
        let request = v1::BeginUploadRequest {
            blob: Some(blob.into()),
            lease_id: lease_id.to_owned(),
        };
        let answer = self.call_once(|mut to| {
            let request = request.clone();
            async move { to.blobs.begin_upload(request).await }
        });
        where_known(answer.await)
    }

    async fn complete_upload(&self, blob: BlobName, lease_id: &str) -> Result<bool, ClientError> {
        let request = v1::CompleteUploadRequest {
            blob: Some(blob.into()),
            lease_id: lease_id.to_owned(),
        };
        let mut stream = self
            .call_once(|mut to| {
                let request = request.clone();
                async move { to.blobs.complete_upload(request).await }
            })
            .await?;
        loop {
            let next = timeout(STALL_MAX, stream.message())
                .await
                .map_err(|_| self.cut_off(&"the check of the upload stalled"))?
                .map_err(|status| self.wire.error(&status))?;
            match next {
                Some(answer) if answer.complete => return Ok(true),
                Some(_) => {}
                None => return Ok(false),
            }
        }
    }

    async fn put_parts(
        &self,
        http: &reqwest::Client,
        path: &Path,
        blob: BlobName,
        plan: v1::BeginUploadResponse,
        progress: Progress<'_>,
    ) -> Result<(), Failure> {
        let mut held = plan.committed_bytes;
        for part in plan.parts {
            let end = part.offset.checked_add(part.size_bytes);
            if part.size_bytes == 0 || end.is_none_or(|end| end > blob.size_bytes) {
                return Err(malformed("a part outside the blob").into());
            }
            let sent = Arc::new(AtomicU64::new(held));
            let body = part_body(path, part.offset, part.size_bytes, Arc::clone(&sent)).await?;
            let request = self
                .request(http, reqwest::Method::PUT, part.put.unwrap_or_default())?
                .header(CONTENT_LENGTH, part.size_bytes)
                .body(body);
            let answer = watch_upload(request.send(), &sent, blob, progress)
                .await
                .ok_or(Failure::Broken)??;
            if !answer.status().is_success() {
                note("the store refused a part", &answer.status());
                return Err(Failure::Broken);
            }
            held += part.size_bytes;
            progress(held.min(blob.size_bytes));
        }
        Ok(())
    }

    /// Fetches a blob's bytes from an offset on straight from the store, and appends them. False
    /// when they have to come through the coordinator; what has arrived stays.
    pub(super) async fn receive_direct(
        &self,
        blob: BlobName,
        offset: &mut u64,
        out: &mut File,
        part: &Path,
        progress: Progress<'_>,
    ) -> Result<bool, ClientError> {
        let Some(http) = self.direct.open(&self.options) else {
            return Ok(false);
        };
        let mut failures = 0;
        while failures < TRIES {
            let Some(get) = self.blob_url(blob).await? else {
                break;
            };
            let before = *offset;
            let mut sink = Sink {
                blob,
                offset,
                out: &mut *out,
                part,
                progress,
            };
            match self.get_rest(&http, get, &mut sink).await {
                Ok(()) => return Ok(true),
                Err(Failure::Ours(error)) => return Err(error),
                Err(Failure::Blocked) => break,
                Err(Failure::Broken) if *offset > before => failures = 0,
                Err(Failure::Broken) => failures += 1,
            }
        }
        self.direct.pause();
        Ok(false)
    }

    async fn blob_url(&self, blob: BlobName) -> Result<Option<v1::SignedRequest>, ClientError> {
        let request = v1::GetBlobUrlRequest {
            blob: Some(blob.into()),
        };
        let answer = self.call_once(|mut to| {
            let request = request.clone();
            async move { to.blobs.get_blob_url(request).await }
        });
        Ok(where_known(answer.await)?.and_then(|answer| answer.get))
    }

    async fn get_rest(
        &self,
        http: &reqwest::Client,
        get: v1::SignedRequest,
        sink: &mut Sink<'_>,
    ) -> Result<(), Failure> {
        let mut request = self.request(http, reqwest::Method::GET, get)?;
        let mut wanted = StatusCode::OK;
        if *sink.offset > 0 {
            request = request.header(RANGE, format!("bytes={}-", sink.offset));
            wanted = StatusCode::PARTIAL_CONTENT;
        }
        let mut answer = timeout(STALL_MAX, request.send())
            .await
            .map_err(|_| Failure::Broken)??;
        if answer.status() != wanted {
            note("the store refused a download", &answer.status());
            return Err(Failure::Broken);
        }
        while *sink.offset < sink.blob.size_bytes {
            let piece = timeout(STALL_MAX, answer.chunk())
                .await
                .map_err(|_| Failure::Broken)??
                .ok_or(Failure::Broken)?;
            sink.take(&piece).await?;
        }
        Ok(())
    }

    /// The request the coordinator signed, where it is one that we make: over TLS, or, when the
    /// coordinator is on this machine too, to this machine. No other one may have us talk to what
    /// listens here in plain text.
    fn request(
        &self,
        http: &reqwest::Client,
        method: reqwest::Method,
        signed: v1::SignedRequest,
    ) -> Result<RequestBuilder, Failure> {
        let url = Url::parse(&signed.url).map_err(|_| malformed("a URL that is none"))?;
        let here = is_loopback(&url) && self.identity.server.is_loopback();
        let plain = url.scheme() == "http" && (here || self.options.force_insecure);
        if url.scheme() != "https" && !plain {
            note("plain text to another machine is refused", &url.scheme());
            return Err(Failure::Blocked);
        }
        let mut request = http.request(method, url);
        for (name, value) in signed.headers {
            request = request.header(name, value);
        }
        Ok(request)
    }
}

/// Where a download's bytes go.
struct Sink<'a> {
    blob: BlobName,
    offset: &'a mut u64,
    out: &'a mut File,
    part: &'a Path,
    progress: Progress<'a>,
}

impl Sink<'_> {
    async fn take(&mut self, piece: &[u8]) -> Result<(), ClientError> {
        let left = self.blob.size_bytes - *self.offset;
        if piece.len() as u64 > left {
            let text = format!("more bytes than blob {} has", self.blob.digest);
            return Err(ClientError::Malformed(text));
        }
        self.out
            .write_all(piece)
            .await
            .map_err(|error| file("write", self.part, error))?;
        *self.offset += piece.len() as u64;
        (self.progress)(*self.offset);
        Ok(())
    }
}

/// The answer of a call that older coordinators do not know; nothing from those.
fn where_known<T>(answer: Result<T, ClientError>) -> Result<Option<T>, ClientError> {
    match answer {
        Ok(answer) => Ok(Some(answer)),
        Err(ClientError::Refused {
            code: Code::Unimplemented,
            ..
        }) => Ok(None),
        Err(error) => Err(error),
    }
}

fn malformed(text: &str) -> ClientError {
    ClientError::Malformed(text.to_owned())
}

fn is_loopback(url: &Url) -> bool {
    url.host_str().is_some_and(|host| {
        let bare = host.trim_start_matches('[').trim_end_matches(']');
        host == "localhost" || bare.parse::<IpAddr>().is_ok_and(|ip| ip.is_loopback())
    })
}

/// A part of a file as a request's body; `sent` grows with what was given to the connection.
async fn part_body(
    path: &Path,
    offset: u64,
    size_bytes: u64,
    sent: Arc<AtomicU64>,
) -> Result<Body, ClientError> {
    let opened = async {
        let mut source = File::open(path).await?;
        source.seek(SeekFrom::Start(offset)).await?;
        std::io::Result::Ok(source.take(size_bytes))
    };
    let source = opened.await.map_err(|error| file("read", path, error))?;
    let pieces = futures::stream::try_unfold(source, move |mut source| {
        let sent = Arc::clone(&sent);
        async move {
            let mut piece = vec![0; PIECE_BYTES];
            let count = source.read(&mut piece).await?;
            piece.truncate(count);
            sent.fetch_add(count as u64, Ordering::Relaxed);
            std::io::Result::Ok((count > 0).then_some((piece, source)))
        }
    });
    Ok(Body::wrap_stream(pieces))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn this_machine_is_told_from_others() {
        for (url, ours) in [
            ("http://127.0.0.1:9000/b", true),
            ("http://[::1]:9000/b", true),
            ("http://localhost/b", true),
            ("http://localhost.example.org/b", false),
            ("http://10.0.0.1/b", false),
        ] {
            assert_eq!(is_loopback(&Url::parse(url).unwrap()), ours, "{url}");
        }
    }
}

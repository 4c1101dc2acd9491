//! Resumable uploads and downloads in bounded memory.
use std::io::SeekFrom;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use cairn_stack::digest::Digest;
use futures::{Stream, StreamExt};
use tokio::fs::{self, File, OpenOptions};
use tokio::io::{AsyncReadExt, AsyncSeekExt, AsyncWriteExt};

use super::{Backoff, Client, ClientError, wait_or_fail};
use crate::convert::BlobName;
use crate::limits::{CHUNK_BYTES_MAX, FIND_MISSING_MAX};
use crate::reason::ErrorReason;
use crate::v1;

/// How long a download may bring nothing before the connection is given up, and how long the
/// answer to a finished upload may take.
pub(super) const STALL_MAX: Duration = Duration::from_mins(1);

/// Told of the bytes that have arrived so far.
pub type Progress<'a> = &'a (dyn Fn(u64) + Send + Sync);

impl Client {
    /// Which of these blobs the coordinator does not hold.
    ///
    /// # Errors
    /// As [`Client::call`].
    pub async fn missing_blobs(&self, blobs: &[BlobName]) -> Result<Vec<BlobName>, ClientError> {
        let mut missing = Vec::new();
        for batch in blobs.chunks(FIND_MISSING_MAX) {
            let request = v1::FindMissingBlobsRequest {
                blobs: batch.iter().map(|blob| (*blob).into()).collect(),
            };
            let answer = self
                .call(|mut to| {
                    let request = request.clone();
                    async move { to.blobs.find_missing_blobs(request).await }
                })
                .await?;
            for blob in &answer.missing {
                missing.push(BlobName::try_from(blob)?);
            }
        }
        Ok(missing)
    }

    /// Uploads a file, going on where an earlier try stopped. `lease_id` names the lease a
    /// volunteer uploads under; empty for maintainers. Returns when the coordinator has checked
    /// the digest and holds the blob.
    ///
    /// # Errors
    /// When the file is not the blob, the coordinator refuses, or nothing gets through for longer
    /// than the patience of the client's options.
    pub async fn upload(
        &self,
        path: &Path,
        blob: BlobName,
        lease_id: &str,
        progress: Progress<'_>,
    ) -> Result<(), ClientError> {
        let file_bytes = fs::metadata(path)
            .await
            .map_err(|e| file("read", path, e))?
            .len();
        if file_bytes != blob.size_bytes {
            return Err(ClientError::FileChanged {
                path: path.to_owned(),
            });
        }
        let mut backoff = Backoff::default();
        let mut committed_before = 0;
        let (mut held, mut held_before) = (0, 0);
        loop {
            let once = async {
                let direct = self.upload_direct(path, blob, lease_id, &mut held, progress);
                Ok::<_, ClientError>(
                    direct.await? || self.upload_once(path, blob, lease_id, progress).await?,
                )
            };
            let error = match once.await {
                Ok(true) => return Ok(()),
                // The stream ended early without an error: ask again where to go on.
                Ok(false) => self.cut_off(&"the upload was cut off"),
                Err(error) if error.reason() == Some(ErrorReason::WrongOffset) => {
                    // Another stream of ours was still being written out; the state is asked anew.
                    if backoff.tries() > 10 {
                        return Err(error);
                    }
                    self.cut_off(&error)
                }
                Err(error) => error,
            };
            if held > held_before {
                held_before = held;
                backoff.reset();
            }
            if error.retry()
                && let Ok(status) = self.write_status(blob).await
                && status.committed_bytes > committed_before
            {
                committed_before = status.committed_bytes;
                backoff.reset();
            }
            wait_or_fail(&mut backoff, error, self.options.patience).await?;
        }
    }

    async fn write_status(
        &self,
        blob: BlobName,
    ) -> Result<v1::QueryWriteStatusResponse, ClientError> {
        let request = v1::QueryWriteStatusRequest {
            blob: Some(blob.into()),
        };
        self.call_once(|mut to| {
            let request = request.clone();
            async move { to.blobs.query_write_status(request).await }
        })
        .await
    }

    async fn upload_once(
        &self,
        path: &Path,
        blob: BlobName,
        lease_id: &str,
        progress: Progress<'_>,
    ) -> Result<bool, ClientError> {
        let status = self.write_status(blob).await?;
        if status.complete {
            progress(blob.size_bytes);
            return Ok(true);
        }
        let offset = status.committed_bytes.min(blob.size_bytes);
        progress(offset);
        let failure: Arc<Mutex<Option<ClientError>>> = Arc::default();
        let sent = Arc::new(AtomicU64::new(offset));
        let upload = self.call_once(|mut to| {
            let (failure, sent) = (failure.clone(), sent.clone());
            let (path, lease_id) = (path.to_owned(), lease_id.to_owned());
            async move {
                let parts = upload_parts(path, blob, offset, lease_id, failure, sent);
                to.blobs.write_blob(parts).await
            }
        });
        let answer = watch_upload(upload, &sent, blob, progress).await;
        if let Some(error) = failure
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .take()
        {
            return Err(error);
        }
        let answer = answer.unwrap_or_else(|| Err(self.cut_off(&"the upload stalled")))?;
        if answer.complete {
            progress(blob.size_bytes);
        }
        Ok(answer.complete)
    }

    /// Downloads a blob to `path`, going on where an earlier try stopped (`path` + `.part`). The
    /// file appears at `path` only when length and digest are right. A file already there is
    /// taken as it is: put it there through this call only.
    ///
    /// # Errors
    /// When the coordinator refuses, sends other bytes, or nothing gets through for longer than
    /// the patience of the client's options.
    pub async fn download(
        &self,
        blob: BlobName,
        path: &Path,
        progress: Progress<'_>,
    ) -> Result<(), ClientError> {
        if fs::metadata(path)
            .await
            .is_ok_and(|found| found.len() == blob.size_bytes)
        {
            progress(blob.size_bytes);
            return Ok(());
        }
        if let Some(folder) = path.parent() {
            fs::create_dir_all(folder)
                .await
                .map_err(|e| file("create", folder, e))?;
        }
        let part = part_path(path);
        let mut backoff = Backoff::default();
        let mut wrong_digests = 0;
        loop {
            let before = part_bytes(&part).await;
            let error = match self.download_once(blob, &part, progress).await {
                Ok(()) if part_is(&part, blob).await? => break,
                Ok(()) => {
                    // Old rubble or bit-rot on this side heals by starting over, once.
                    remove(&part).await?;
                    self.direct.pause();
                    wrong_digests += 1;
                    if wrong_digests > 1 {
                        return Err(ClientError::Malformed(format!(
                            "the bytes sent for blob {} are not that blob",
                            blob.digest
                        )));
                    }
                    continue;
                }
                Err(error) => error,
            };
            if part_bytes(&part).await > before {
                backoff.reset();
            }
            wait_or_fail(&mut backoff, error, self.options.patience).await?;
        }
        fs::rename(&part, path)
            .await
            .map_err(|e| file("rename", &part, e))
    }

    async fn download_once(
        &self,
        blob: BlobName,
        part: &Path,
        progress: Progress<'_>,
    ) -> Result<(), ClientError> {
        let mut offset = part_bytes(part).await;
        if offset > blob.size_bytes {
            remove(part).await?;
            offset = 0;
        }
        let mut out = OpenOptions::new()
            .create(true)
            .append(true)
            .open(part)
            .await
            .map_err(|e| file("write", part, e))?;
        progress(offset);
        if offset < blob.size_bytes {
            let received = async {
                let direct = self.receive_direct(blob, &mut offset, &mut out, part, progress);
                if direct.await? {
                    return Ok(());
                }
                self.receive(blob, offset, &mut out, part, progress).await
            }
            .await;
            // What has arrived is kept either way: the next try goes on behind it.
            out.flush().await.map_err(|e| file("write", part, e))?;
            received?;
        }
        out.sync_all().await.map_err(|e| file("write", part, e))
    }

    async fn receive(
        &self,
        blob: BlobName,
        mut offset: u64,
        out: &mut File,
        part: &Path,
        progress: Progress<'_>,
    ) -> Result<(), ClientError> {
        let request = v1::ReadBlobRequest {
            blob: Some(blob.into()),
            offset,
        };
        let opened = self.call_once(|mut to| {
            let request = request.clone();
            async move { to.blobs.read_blob(request).await }
        });
        // Streams have no deadline: a store that stalls before the first byte is noticed here.
        let mut stream = tokio::time::timeout(STALL_MAX, opened)
            .await
            .map_err(|_| self.cut_off(&"the download does not begin"))??;
        while offset < blob.size_bytes {
            let next = tokio::time::timeout(STALL_MAX, stream.message())
                .await
                .map_err(|_| self.cut_off(&"the download stalled"))?
                .map_err(|status| self.wire.error(&status))?;
            let Some(message) = next else {
                return Err(self.cut_off(&"the download was cut off"));
            };
            offset += message.chunk.len() as u64;
            if offset > blob.size_bytes {
                return Err(ClientError::Malformed(format!(
                    "more bytes than blob {} has",
                    blob.digest
                )));
            }
            out.write_all(&message.chunk)
                .await
                .map_err(|e| file("write", part, e))?;
            progress(offset);
        }
        Ok(())
    }
}

/// Header, then chunks from the file; ends early, with the failure noted, when it cannot be read.
fn upload_parts(
    path: PathBuf,
    blob: BlobName,
    offset: u64,
    lease_id: String,
    failure: Arc<Mutex<Option<ClientError>>>,
    sent: Arc<AtomicU64>,
) -> impl Stream<Item = v1::WriteBlobRequest> + Send + 'static {
    use v1::write_blob_request::{Header, Part};
    let header = Header {
        blob: Some(blob.into()),
        offset,
        lease_id,
    };
    let first = v1::WriteBlobRequest {
        part: Some(Part::Header(header)),
    };
    let chunks = futures::stream::unfold(None, move |open: Option<(File, u64)>| {
        let (path, failure, sent) = (path.clone(), failure.clone(), sent.clone());
        async move {
            let read = async {
                let (mut source, left) = match open {
                    Some(open) => open,
                    None => {
                        let mut source = File::open(&path).await?;
                        source.seek(SeekFrom::Start(offset)).await?;
                        (source, blob.size_bytes - offset)
                    }
                };
                let length = usize::try_from(left)
                    .unwrap_or(usize::MAX)
                    .min(CHUNK_BYTES_MAX);
                let mut chunk = vec![0; length];
                source.read_exact(&mut chunk).await?;
                std::io::Result::Ok((chunk, source, left - length as u64))
            };
            match read.await {
                Ok((chunk, _, _)) if chunk.is_empty() => None,
                Ok((chunk, source, left)) => {
                    sent.store(blob.size_bytes - left, Ordering::Relaxed);
                    let message = v1::WriteBlobRequest {
                        part: Some(Part::Chunk(chunk)),
                    };
                    Some((message, Some((source, left))))
                }
                Err(error) => {
                    let error = file("read", &path, error);
                    *failure.lock().unwrap_or_else(PoisonError::into_inner) = Some(error);
                    None
                }
            }
        }
    });
    futures::stream::once(std::future::ready(first)).chain(chunks)
}

/// Waits for an upload's answer, reporting progress; gives up when nothing moves.
pub(super) async fn watch_upload<T>(
    upload: impl Future<Output = T>,
    sent: &AtomicU64,
    blob: BlobName,
    progress: Progress<'_>,
) -> Option<T> {
    let mut upload = std::pin::pin!(upload);
    let tick = Duration::from_millis(500);
    let mut still = Duration::ZERO;
    let mut before = sent.load(Ordering::Relaxed);
    loop {
        if let Ok(answer) = tokio::time::timeout(tick, upload.as_mut()).await {
            return Some(answer);
        }
        let now = sent.load(Ordering::Relaxed);
        progress(now.min(blob.size_bytes));
        still = if now == before {
            still + tick
        } else {
            Duration::ZERO
        };
        before = now;
        if still >= STALL_MAX {
            return None;
        }
    }
}

pub(super) fn file(action: &'static str, path: &Path, source: std::io::Error) -> ClientError {
    ClientError::File {
        action,
        path: path.to_owned(),
        source,
    }
}

fn part_path(path: &Path) -> PathBuf {
    let mut name = path.file_name().unwrap_or_default().to_owned();
    name.push(".part");
    path.with_file_name(name)
}

async fn part_bytes(part: &Path) -> u64 {
    fs::metadata(part).await.map_or(0, |found| found.len())
}

async fn remove(part: &Path) -> Result<(), ClientError> {
    match fs::remove_file(part).await {
        Err(error) if error.kind() != std::io::ErrorKind::NotFound => {
            Err(file("remove", part, error))
        }
        _ => Ok(()),
    }
}

async fn part_is(part: &Path, blob: BlobName) -> Result<bool, ClientError> {
    let owned = part.to_owned();
    let hashed = tokio::task::spawn_blocking(move || Digest::of_file(&owned))
        .await
        .map_err(|error| file("read", part, std::io::Error::other(error)))?
        .map_err(|error| file("read", part, error))?;
    Ok(hashed == (blob.digest, blob.size_bytes))
}

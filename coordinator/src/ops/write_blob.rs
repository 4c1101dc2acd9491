//! A caller sends a blob, from where the last try stopped.
use std::fs::{File, OpenOptions};
use std::io::{self, Read, Write};
use std::path::{Path, PathBuf};

use bytes::Bytes;
use cairn_proto::convert::BlobName;
use cairn_proto::limits::CHUNK_BYTES_MAX;
use cairn_proto::reason::ErrorReason;
use cairn_stack::digest::DigestHasher;
use futures::{Stream, StreamExt};
use tracing::info;

use crate::app::App;
use crate::blobs::{NoPlace, UploadGuard, UploadKey, disk_free_bytes};
use crate::caller::{Caller, Role};
use crate::clock::Timestamp;
use crate::db::Tx;
use crate::db::audits::audit_of_lease;
use crate::db::blobs::{blob_get, blob_insert};
use crate::db::leases::{lease_upload_limit, lease_upload_limit_guide};
use crate::db::restored::grant_get;
use crate::db::uploads::{upload_count_others, upload_delete, upload_touch};
use crate::domain::audit::state_bytes_max;
use crate::error::Error;
use crate::failpoint::Step;
use crate::ids::LeaseId;
use crate::limits;

/// What the first message of an upload says.
#[derive(Debug, Clone, Copy)]
pub struct UploadHeader {
    /// What the bytes shall be.
    pub name: BlobName,
    /// Where the first chunk belongs.
    pub offset: u64,
    /// The lease a volunteer uploads under.
    pub lease: Option<LeaseId>,
}

/// How far an upload has come.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Progress {
    /// Bytes safely held.
    pub committed_bytes: u64,
    /// Whether the blob is visible.
    pub complete: bool,
}

/// Takes a blob's bytes. Breaking off keeps what has arrived.
///
/// # Errors
/// ROLE_REQUIRED, LEASE_LOST, BLOB_TOO_LARGE, DISK_FULL, TOO_MANY; WRONG_OFFSET with
/// `committed_bytes`; DIGEST_MISMATCH, after which the upload begins anew.
pub async fn write_blob(
    app: &App,
    caller: &Caller,
    header: UploadHeader,
    chunks: impl Stream<Item = Result<Bytes, Error>> + Send,
) -> Result<Progress, Error> {
    let name = header.name;
    check_right(app, caller, &header).await?;
    if is_held(app, name).await? {
        return Ok(Progress {
            committed_bytes: name.size_bytes,
            complete: true,
        });
    }
    let key = UploadKey {
        digest: name.digest,
        worker: caller.worker,
    };
    let guard = upload_slot(app, key).await?;
    // The writer we took over from may have finished it.
    if is_held(app, name).await? {
        return Ok(Progress {
            committed_bytes: name.size_bytes,
            complete: true,
        });
    }
    check_room(app, name.size_bytes.saturating_sub(header.offset))?;
    begin(app, caller, name).await?;
    let path = upload_path(&app.uploads_folder, key);
    let upload = blocking(move || Upload::open(path, guard, name.size_bytes)).await?;
    if upload.bytes != header.offset {
        return Err(Error::new(
            ErrorReason::WrongOffset,
            format!(
                "the upload goes on at {} bytes, not at {}",
                upload.bytes, header.offset
            ),
        )
        .with("committed_bytes", upload.bytes));
    }
    let upload = receive(app, upload, name, chunks).await?;
    if upload.bytes < name.size_bytes {
        return Ok(Progress {
            committed_bytes: upload.bytes,
            complete: false,
        });
    }
    finish(app, caller, upload, name).await?;
    Ok(Progress {
        committed_bytes: name.size_bytes,
        complete: true,
    })
}

/// How far an upload of this caller has come.
///
/// # Errors
/// UNAVAILABLE when database or disk do not answer.
pub async fn query_write_status(
    app: &App,
    caller: &Caller,
    name: BlobName,
) -> Result<Progress, Error> {
    if is_held(app, name).await? {
        return Ok(Progress {
            committed_bytes: name.size_bytes,
            complete: true,
        });
    }
    let key = UploadKey {
        digest: name.digest,
        worker: caller.worker,
    };
    let path = upload_path(&app.uploads_folder, key);
    // Synced before it is told: what we say is held must outlive a power cut.
    let committed_bytes = blocking(move || synced_length(&path)).await?;
    Ok(Progress {
        committed_bytes: committed_bytes.min(name.size_bytes),
        complete: false,
    })
}

/// Where an upload's bytes lie until they are complete.
#[must_use]
pub fn upload_path(folder: &Path, key: UploadKey) -> PathBuf {
    folder.join(format!("{}-{}", key.digest, key.worker))
}

/// The right to be the one who writes an upload, within `UPLOAD_WAIT`.
pub(super) async fn upload_slot(app: &App, key: UploadKey) -> Result<UploadGuard, Error> {
    tokio::time::timeout(limits::UPLOAD_WAIT, app.uploads.take(key))
        .await
        .unwrap_or(Err(NoPlace::All))
        .map_err(|full| Error::new(ErrorReason::TooMany, full.to_string()))
}

pub(super) async fn check_right(
    app: &App,
    caller: &Caller,
    header: &UploadHeader,
) -> Result<(), Error> {
    let bytes_max = match caller.role {
        Role::Maintainer => app.limits.upload_bytes_max,
        Role::Evaluator | Role::Volunteer => {
            let lease = header.lease.ok_or_else(|| no_lease(caller.role))?;
            let mut tx = app.db.read().await?;
            upload_limit(&mut tx, caller, lease, header.name, app.clock.now_ms())
                .await?
                .ok_or_else(|| {
                    let reason = ErrorReason::LeaseLost;
                    Error::conflict(reason, reason.sentence())
                })?
        }
    };
    if header.name.size_bytes > bytes_max {
        return Err(Error::new(
            ErrorReason::BlobTooLarge,
            format!(
                "{} bytes are more than the {bytes_max} allowed",
                header.name.size_bytes
            ),
        )
        .with("bytes_max", bytes_max));
    }
    Ok(())
}

fn no_lease(role: Role) -> Error {
    if role == Role::Evaluator {
        let text = "evaluators upload guides under their lease, and nothing else";
        return Error::denied(ErrorReason::RoleRequired, text);
    }
    Error::invalid("lease_id", "volunteers upload under a lease of theirs")
}

/// How many bytes this blob may have under this lease; nothing when it may not be uploaded.
///
/// Volunteers upload the adapter while they hold the lease, the training states of an audit while it
/// waits for them, and again what a receipt of theirs names; evaluators their guides.
async fn upload_limit(
    tx: &mut Tx,
    caller: &Caller,
    lease: LeaseId,
    name: BlobName,
    now: Timestamp,
) -> Result<Option<u64>, Error> {
    if caller.role == Role::Evaluator {
        return lease_upload_limit_guide(tx, lease, caller.worker).await;
    }
    let adapter = lease_upload_limit(tx, lease, caller.worker).await?;
    if adapter.is_some() {
        return Ok(adapter);
    }
    if let Some((audit, adapter_bytes_max)) = audit_of_lease(tx, lease, caller.worker).await?
        && audit.is_waiting(now)
    {
        return Ok(Some(state_bytes_max(adapter_bytes_max)));
    }
    let granted = grant_get(tx, lease, caller.worker, now).await?;
    Ok(granted
        .filter(|granted| *granted == name)
        .map(|granted| granted.size_bytes))
}

pub(super) async fn is_held(app: &App, name: BlobName) -> Result<bool, Error> {
    let mut tx = app.db.read().await?;
    let row = blob_get(&mut tx, name.digest).await?;
    drop(tx);
    match row {
        Some(row) if row.name != name => Err(Error::invalid(
            "blob",
            format!(
                "digest {} belongs to {} bytes",
                name.digest, row.name.size_bytes
            ),
        )),
        Some(_) => Ok(app.blobs.size(name.digest).await? == Some(name.size_bytes)),
        None => Ok(false),
    }
}

fn check_room(app: &App, bytes: u64) -> Result<(), Error> {
    let needed = bytes.saturating_add(app.limits.disk_free_bytes_min);
    let free = [disk_free_bytes(&app.uploads_folder), app.blobs.free_bytes()];
    match free.into_iter().flatten().min() {
        Some(free) if free < needed => Err(Error::disk_full(io::Error::other(format!(
            "{free} bytes are free, {needed} needed"
        )))),
        _ => Ok(()),
    }
}

pub(super) async fn begin(app: &App, caller: &Caller, name: BlobName) -> Result<(), Error> {
    let mut tx = app.db.begin().await?;
    let others = upload_count_others(&mut tx, name.digest, caller.worker).await?;
    if others >= limits::UPLOADS_PER_WORKER_MAX {
        return Err(Error::new(
            ErrorReason::TooMany,
            format!("you have {others} unfinished uploads; finish some first"),
        ));
    }
    upload_touch(&mut tx, name, caller.worker, app.clock.now_ms()).await?;
    tx.commit().await
}

async fn receive(
    app: &App,
    mut upload: Upload,
    name: BlobName,
    chunks: impl Stream<Item = Result<Bytes, Error>> + Send,
) -> Result<Upload, Error> {
    let mut chunks = std::pin::pin!(chunks);
    let superseded = upload.guard.superseded();
    loop {
        let next = tokio::select! {
            biased;
            () = superseded.cancelled() => {
                return Err(Error::conflict(
                    ErrorReason::PreconditionFailed,
                    "another connection of yours has taken this upload over",
                ));
            }
            () = app.lifecycle.hard().cancelled() => {
                return Err(Error::new(
                    ErrorReason::ShuttingDown,
                    ErrorReason::ShuttingDown.sentence(),
                ));
            }
            next = tokio::time::timeout(app.limits.stream_idle, chunks.next()) => next,
        };
        let next = next.map_err(|_| Error::unavailable("no chunk came for too long"))?;
        let Some(chunk) = next.transpose()? else {
            return Ok(upload);
        };
        if chunk.len() > CHUNK_BYTES_MAX {
            return Err(Error::invalid(
                "chunk",
                format!("at most {CHUNK_BYTES_MAX} bytes"),
            ));
        }
        // Cut at the announced length: not one byte more is written.
        if upload.bytes + chunk.len() as u64 > name.size_bytes {
            return Err(Error::new(
                ErrorReason::BlobTooLarge,
                format!("more bytes came than the {} announced", name.size_bytes),
            ));
        }
        upload = blocking(move || {
            upload.write(&chunk)?;
            Ok(upload)
        })
        .await?;
    }
}

async fn finish(app: &App, caller: &Caller, upload: Upload, name: BlobName) -> Result<(), Error> {
    let path = upload.path.clone();
    if upload.hasher.finish() != (name.digest, name.size_bytes) {
        let mut tx = app.db.begin().await?;
        upload_delete(&mut tx, name.digest, caller.worker).await?;
        tx.commit().await?;
        // A prefix of wrong bytes would be wrong for ever: the next try begins at 0.
        let _ = tokio::fs::remove_file(&path).await;
        let reason = ErrorReason::DigestMismatch;
        return Err(Error::new(reason, reason.sentence()).with("digest", name.digest));
    }
    // Bytes before row; `upload` keeps the guard until both are there.
    app.blobs.put_verified(&path, name).await?;
    note_blob(app, caller, name).await?;
    let _ = tokio::fs::remove_file(&path).await;
    Step::here("remove").after();
    drop(upload);
    Ok(())
}

/// Writes the row of a blob that is durable, which ends its upload.
pub(super) async fn note_blob(app: &App, caller: &Caller, name: BlobName) -> Result<(), Error> {
    let mut tx = app.db.begin().await?;
    let uploader = caller.worker.to_string();
    blob_insert(&mut tx, name, &uploader, app.clock.now_ms()).await?;
    upload_delete(&mut tx, name.digest, caller.worker).await?;
    tx.commit().await?;
    app.blobs.expect_held([name]).await?;
    info!(blob.digest = %name.digest, worker.id = %caller.worker,
        "stored blob {} of {} bytes from {}", name.digest, name.size_bytes, caller.name);
    Ok(())
}

/// An upload's file and the hash of its bytes so far. It holds the right to write: when a call is
/// dropped while a blocking write runs, the next writer waits for that write.
struct Upload {
    path: PathBuf,
    file: File,
    hasher: DigestHasher,
    bytes: u64,
    guard: UploadGuard,
}

impl Upload {
    /// Opens the file and hashes what it has; a file longer than it may be starts anew.
    fn open(path: PathBuf, guard: UploadGuard, size_bytes: u64) -> io::Result<Self> {
        let file = OpenOptions::new()
            .read(true)
            .write(true)
            .create(true)
            .truncate(false)
            .open(&path)?;
        if file.metadata()?.len() > size_bytes {
            file.set_len(0)?;
        }
        let mut upload = Self {
            path,
            file,
            hasher: DigestHasher::new(),
            bytes: 0,
            guard,
        };
        let mut buffer = vec![0; limits::READ_BYTES];
        loop {
            match upload.file.read(&mut buffer)? {
                0 => return Ok(upload),
                count => upload.count(&buffer[..count]),
            }
        }
    }

    fn count(&mut self, bytes: &[u8]) {
        self.hasher.update(bytes);
        self.bytes += bytes.len() as u64;
    }

    fn write(&mut self, chunk: &[u8]) -> io::Result<()> {
        self.file.write_all(chunk)?;
        Step::here("write").after();
        self.count(chunk);
        Ok(())
    }
}

fn synced_length(path: &Path) -> io::Result<u64> {
    match File::open(path) {
        Ok(file) => {
            file.sync_all()?;
            Ok(file.metadata()?.len())
        }
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(0),
        Err(error) => Err(error),
    }
}

async fn blocking<T: Send + 'static>(
    work: impl FnOnce() -> io::Result<T> + Send + 'static,
) -> Result<T, Error> {
    Ok(tokio::task::spawn_blocking(work).await??)
}

//! The parts of a direct upload are there: read, check, and make them a blob.
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use cairn_proto::convert::BlobName;
use cairn_proto::reason::ErrorReason;
use tokio_util::sync::CancellationToken;

use crate::app::App;
use crate::blobs::{UploadGuard, UploadKey};
use crate::caller::Caller;
use crate::db::uploads::upload_delete;
use crate::error::Error;
use crate::ids::LeaseId;
use crate::ops::write_blob::{
    Progress, UploadHeader, check_right, is_held, note_blob, upload_path, upload_slot,
};

/// Checks an upload's bytes and keeps them. `checked` is told how many were read. Dropped, the
/// work stops, and can be asked for again.
///
/// # Errors
/// As `WriteBlob`; DIGEST_MISMATCH, after which the upload begins anew.
pub async fn complete_upload(
    app: &App,
    caller: &Caller,
    name: BlobName,
    lease: Option<LeaseId>,
    checked: Arc<AtomicU64>,
) -> Result<Progress, Error> {
    let header = UploadHeader {
        name,
        offset: 0,
        lease,
    };
    let whole = Progress {
        committed_bytes: name.size_bytes,
        complete: true,
    };
    check_right(app, caller, &header).await?;
    if is_held(app, name).await? {
        return Ok(whole);
    }
    let upload = UploadKey {
        digest: name.digest,
        worker: caller.worker,
    };
    let guard = upload_slot(app, upload).await?;
    // The one who held it may have completed it.
    if is_held(app, name).await? {
        return Ok(whole);
    }
    let (committed_bytes, missing) = app.blobs.missing_parts(upload, name.size_bytes).await?;
    if !missing.is_empty() {
        return Ok(Progress {
            committed_bytes,
            complete: false,
        });
    }
    compose(app, caller, name, guard, checked).await?;
    // Garbage from here on: what fails to go now is collected.
    let _ = app.blobs.delete_parts(upload).await;
    let _ = tokio::fs::remove_file(upload_path(&app.uploads_folder, upload)).await;
    Ok(whole)
}

async fn compose(
    app: &App,
    caller: &Caller,
    name: BlobName,
    guard: UploadGuard,
    checked: Arc<AtomicU64>,
) -> Result<(), Error> {
    let upload = UploadKey {
        digest: name.digest,
        worker: caller.worker,
    };
    let (superseded, dropped) = (guard.superseded(), CancellationToken::new());
    let _dropped = dropped.clone().drop_guard();
    let watched = move |bytes| {
        checked.store(bytes, Ordering::Relaxed);
        if superseded.is_cancelled() || dropped.is_cancelled() {
            return Err(Error::unavailable("nobody waits for this upload any more"));
        }
        Ok(())
    };
    let composed = app.blobs.compose(upload, name, watched).await;
    if let Err(error) = &composed
        && error.reason() == ErrorReason::DigestMismatch
    {
        app.blobs.delete_parts(upload).await?;
        let mut tx = app.db.begin().await?;
        upload_delete(&mut tx, name.digest, caller.worker).await?;
        tx.commit().await?;
    }
    composed?;
    note_blob(app, caller, name).await?;
    drop(guard);
    Ok(())
}

//! Garbage: blobs that nobody names, files in the store without a row, uploads nobody goes on with.
use cairn_proto::convert::BlobName;
use cairn_stack::digest::Digest;
use futures::TryStreamExt;
use tracing::info;

use super::Done;
use crate::app::App;
use crate::blobs::UploadKey;
use crate::db::blobs::{
    SERVER, blob_delete_unreferenced, blob_get, blob_insert, blob_list_unreferenced,
};
use crate::db::uploads::{upload_delete, upload_exists, upload_list_stale};
use crate::error::Error;
use crate::failpoint::Step;
use crate::limits::{BLOB_UNREFERENCED, UPLOAD_STALE};
use crate::ops::write_blob::upload_path;

/// Things removed in one pass.
const BATCH: i64 = 200;

/// One batch of each kind.
///
/// # Errors
/// When the database or the store fails.
pub async fn run(app: &App) -> Result<Done, Error> {
    let now = app.clock.now_ms();
    let before = now.minus(BLOB_UNREFERENCED);
    let mut tx = app.db.read().await?;
    let unnamed = blob_list_unreferenced(&mut tx, before, BATCH).await?;
    let stale = upload_list_stale(&mut tx, now.minus(UPLOAD_STALE), BATCH).await?;
    drop(tx);
    let mut removed = 0u64;
    for digest in &unnamed {
        let mut tx = app.db.begin().await?;
        if !blob_delete_unreferenced(&mut tx, *digest, before).await? {
            continue;
        }
        // Before the commit: whoever would write the row anew waits, then finds no bytes and says so
        // (`Blobs::expect_held`). Killed in between, a row stays that nobody needs, for the next pass.
        app.blobs.delete(*digest).await?;
        tx.commit().await?;
        removed += 1;
    }
    for (digest, worker) in &stale {
        let mut tx = app.db.begin().await?;
        upload_delete(&mut tx, *digest, *worker).await?;
        tx.commit().await?;
        let key = UploadKey {
            digest: *digest,
            worker: *worker,
        };
        // Absent when the coordinator was killed between the two.
        let _ = tokio::fs::remove_file(upload_path(&app.uploads_folder, key)).await;
        Step::here("remove").after();
        app.blobs.delete_parts(key).await?;
        removed += 1;
    }
    removed += collect_orphans(app, before).await?;
    removed += collect_parts(app, now.minus(UPLOAD_STALE)).await?;
    if removed > 0 {
        info!("removed {removed} blobs and uploads that nobody needs");
    }
    let full = unnamed.len() as i64 == BATCH || stale.len() as i64 == BATCH;
    Ok(if full { Done::Part } else { Done::All })
}

/// Uploads in this coordinator's own folder that nobody has written to for so long that nobody goes
/// on with them: they may have been finished at another coordinator.
///
/// # Errors
/// When the folder cannot be read.
pub async fn sweep_uploads(app: &App) -> Result<Done, Error> {
    let before = app.clock.now_ms().minus(UPLOAD_STALE);
    let mut listed = tokio::fs::read_dir(&app.uploads_folder).await?;
    while let Some(entry) = listed.next_entry().await? {
        // A file that has gone meanwhile was finished.
        let Ok(written) = entry.metadata().await.and_then(|found| found.modified()) else {
            continue;
        };
        let age = written
            .duration_since(std::time::UNIX_EPOCH)
            .unwrap_or_default();
        if i64::try_from(age.as_millis()).is_ok_and(|written| written < before.0) {
            let _ = tokio::fs::remove_file(entry.path()).await;
        }
    }
    Ok(Done::All)
}

/// Bytes that were put and whose row never came: the coordinator was killed in between.
async fn collect_orphans(app: &App, before: crate::clock::Timestamp) -> Result<u64, Error> {
    let mut removed = 0;
    let mut listed = app.blobs.list();
    while let Some((digest, put)) = listed.try_next().await? {
        if put >= before {
            continue;
        }
        removed += u64::from(remove_orphan(app, digest).await?);
    }
    Ok(removed)
}

/// Removes bytes that have no row; whether there were none.
///
/// # Errors
/// When the database or the store fails.
pub async fn remove_orphan(app: &App, digest: Digest) -> Result<bool, Error> {
    let mut tx = app.db.begin().await?;
    if blob_get(&mut tx, digest).await?.is_some() {
        return Ok(false);
    }
    // A row that is never committed: nobody else writes one while the bytes go.
    let name = BlobName {
        digest,
        size_bytes: 0,
    };
    blob_insert(&mut tx, name, SERVER, app.clock.now_ms()).await?;
    app.blobs.delete(digest).await?;
    Ok(true)
}

/// Parts of uploads that have ended: whoever had a URL may have put one afterwards.
async fn collect_parts(app: &App, before: crate::clock::Timestamp) -> Result<u64, Error> {
    let mut removed = 0;
    let mut listed = app.blobs.list_parts();
    while let Some((upload, put)) = listed.try_next().await? {
        if put >= before {
            continue;
        }
        let mut tx = app.db.read().await?;
        let known = upload_exists(&mut tx, upload.digest, upload.worker).await?;
        drop(tx);
        if !known {
            app.blobs.delete_parts(upload).await?;
            removed += 1;
        }
    }
    Ok(removed)
}

//! Garbage: blobs that nobody names, files in the store without a row, uploads nobody goes on with.
use futures::TryStreamExt;
use tracing::info;

use super::Done;
use crate::app::App;
use crate::blobs::UploadKey;
use crate::db::blobs::{blob_delete_unreferenced, blob_get, blob_list_unreferenced};
use crate::db::uploads::{upload_delete, upload_exists, upload_list_stale};
use crate::error::Error;
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
        // The row goes first: bytes without a row are found below, a row without bytes never.
        tx.commit().await?;
        app.blobs.delete(*digest).await?;
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

/// Bytes that were put and whose row never came: the coordinator was killed in between.
async fn collect_orphans(app: &App, before: crate::clock::Timestamp) -> Result<u64, Error> {
    let mut removed = 0;
    let mut listed = app.blobs.list();
    while let Some((digest, put)) = listed.try_next().await? {
        if put >= before {
            continue;
        }
        let mut tx = app.db.read().await?;
        let known = blob_get(&mut tx, digest).await?.is_some();
        drop(tx);
        if !known {
            app.blobs.delete(digest).await?;
            removed += 1;
        }
    }
    Ok(removed)
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

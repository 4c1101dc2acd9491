//! Table `uploads`: blobs on their way.
use cairn_proto::convert::BlobName;
use cairn_stack::digest::Digest;

use super::{Tx, column, digest, parsed, signed};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::ids::WorkerId;

/// Notes an upload, or that it goes on: its time is renewed.
///
/// # Errors
/// When the query fails.
pub async fn upload_touch(
    tx: &mut Tx,
    name: BlobName,
    worker: WorkerId,
    now: Timestamp,
) -> Result<(), Error> {
    sqlx::query(
        "insert into uploads (digest, uploader, size_bytes, created_ms) values ($1, $2, $3, $4) \
         on conflict (digest, uploader) \
         do update set size_bytes = excluded.size_bytes, created_ms = excluded.created_ms",
    )
    .bind(name.digest.to_string())
    .bind(worker.to_string())
    .bind(signed(name.size_bytes))
    .bind(now.0)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// How many other uploads an identity has begun and not ended.
///
/// # Errors
/// When the query fails.
pub async fn upload_count_others(
    tx: &mut Tx,
    digest: Digest,
    worker: WorkerId,
) -> Result<i64, Error> {
    let row =
        sqlx::query("select count(*) as others from uploads where uploader = $1 and digest <> $2")
            .bind(worker.to_string())
            .bind(digest.to_string())
            .fetch_one(tx.conn())
            .await?;
    column(&row, "others")
}

/// Whether an upload has begun and not ended.
///
/// # Errors
/// When the query fails.
pub async fn upload_exists(tx: &mut Tx, digest: Digest, worker: WorkerId) -> Result<bool, Error> {
    let row = sqlx::query("select 1 as found from uploads where digest = $1 and uploader = $2")
        .bind(digest.to_string())
        .bind(worker.to_string())
        .fetch_optional(tx.conn())
        .await?;
    Ok(row.is_some())
}

/// Forgets an upload that has ended.
///
/// # Errors
/// When the query fails.
pub async fn upload_delete(tx: &mut Tx, digest: Digest, worker: WorkerId) -> Result<(), Error> {
    sqlx::query("delete from uploads where digest = $1 and uploader = $2")
        .bind(digest.to_string())
        .bind(worker.to_string())
        .execute(tx.conn())
        .await?;
    Ok(())
}

/// Uploads that nobody has touched since a time.
///
/// # Errors
/// When the query fails.
pub async fn upload_list_stale(
    tx: &mut Tx,
    before: Timestamp,
    limit: i64,
) -> Result<Vec<(Digest, WorkerId)>, Error> {
    let rows = sqlx::query(
        "select digest, uploader from uploads where created_ms < $1 order by created_ms limit $2",
    )
    .bind(before.0)
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| {
            Ok((
                digest(row, "uploads", "digest")?,
                parsed(row, "uploads", "uploader")?,
            ))
        })
        .collect()
}

//! Table `blobs`: which bytes are held, and who may read them.
use cairn_proto::convert::BlobName;
use cairn_stack::digest::Digest;
use sqlx::any::AnyRow;

use super::{Tx, column, digest, signed, unsigned};
use crate::blobs::Audience;
use crate::caller::Caller;
use crate::clock::Timestamp;
use crate::error::Error;

/// The `uploader` of what the server itself made.
pub const SERVER: &str = "server";

/// A held blob.
#[derive(Debug, Clone)]
pub struct BlobRow {
    /// Its digest and length.
    pub name: BlobName,
    /// Who may read it.
    pub audience: Audience,
    /// Worker id of who sent it, or [`SERVER`].
    pub uploader: String,
}

impl BlobRow {
    /// Whether this caller may read it.
    #[must_use]
    pub fn is_readable_by(&self, caller: &Caller) -> bool {
        match self.audience {
            Audience::Members => true,
            Audience::Evaluators => {
                caller.role.is_trusted() || self.uploader == caller.worker.to_string()
            }
        }
    }
}

fn blob(row: &AnyRow) -> Result<BlobRow, Error> {
    let name = BlobName {
        digest: digest(row, "blobs", "digest")?,
        size_bytes: unsigned(row, "blobs", "size_bytes")?,
    };
    let audience: String = column(row, "audience")?;
    let audience = match audience.as_str() {
        "members" => Audience::Members,
        "evaluators" => Audience::Evaluators,
        _ => return Err(Error::inconsistent("blobs", "audience", name.digest)),
    };
    Ok(BlobRow {
        name,
        audience,
        uploader: column(row, "uploader")?,
    })
}

/// Notes a blob that the store holds durably. One that is known already stays as it is: its
/// audience is not widened by another upload.
///
/// # Errors
/// When the query fails.
pub async fn blob_insert(
    tx: &mut Tx,
    name: BlobName,
    audience: Audience,
    uploader: &str,
    now: Timestamp,
) -> Result<(), Error> {
    sqlx::query(
        "insert into blobs (digest, size_bytes, audience, uploader, created_ms) \
         values ($1, $2, $3, $4, $5) on conflict (digest) do nothing",
    )
    .bind(name.digest.to_string())
    .bind(signed(name.size_bytes))
    .bind(audience.as_str())
    .bind(uploader)
    .bind(now.0)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// The blob with this digest.
///
/// # Errors
/// When the query fails.
pub async fn blob_get(tx: &mut Tx, digest: Digest) -> Result<Option<BlobRow>, Error> {
    let row =
        sqlx::query("select digest, size_bytes, audience, uploader from blobs where digest = $1")
            .bind(digest.to_string())
            .fetch_optional(tx.conn())
            .await?;
    row.as_ref().map(blob).transpose()
}

/// Lets every member read a blob, unless it is part of a gate or audit set. Returns whether they
/// may now.
///
/// # Errors
/// When the query fails.
pub async fn blob_publish(tx: &mut Tx, digest: Digest) -> Result<bool, Error> {
    let done = sqlx::query(
        "update blobs set audience = 'members' where digest = $1 and not exists \
         (select 1 from dataset_chunks c join datasets d on d.name = c.dataset \
          where c.digest = blobs.digest and d.set_kind in ('gate', 'audit'))",
    )
    .bind(digest.to_string())
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Removes a blob's row when nothing names it and it is older than a time. False when it must
/// stay. The caller deletes the bytes after the commit.
///
/// # Errors
/// When the query fails.
pub async fn blob_delete_unreferenced(
    tx: &mut Tx,
    digest: Digest,
    created_before: Timestamp,
) -> Result<bool, Error> {
    let done = sqlx::query(
        "delete from blobs where digest = $1 and created_ms < $2 \
         and not exists (select 1 from checkpoint_files f where f.digest = blobs.digest) \
         and not exists (select 1 from checkpoints p where p.manifest = blobs.digest) \
         and not exists (select 1 from dataset_chunks c where c.digest = blobs.digest) \
         and not exists (select 1 from submissions s where s.adapter = blobs.digest) \
         and not exists (select 1 from contribution_files n where n.digest = blobs.digest) \
         and not exists (select 1 from evaluations e \
                         where e.gate_scores = blobs.digest or e.audit_scores = blobs.digest)",
    )
    .bind(digest.to_string())
    .bind(created_before.0)
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Digests of blobs that nothing names and that are older than a time, at most `limit`.
///
/// # Errors
/// When the query fails.
pub async fn blob_list_unreferenced(
    tx: &mut Tx,
    created_before: Timestamp,
    limit: i64,
) -> Result<Vec<Digest>, Error> {
    let rows = sqlx::query(
        "select digest from blobs where created_ms < $1 \
         and not exists (select 1 from checkpoint_files f where f.digest = blobs.digest) \
         and not exists (select 1 from checkpoints p where p.manifest = blobs.digest) \
         and not exists (select 1 from dataset_chunks c where c.digest = blobs.digest) \
         and not exists (select 1 from submissions s where s.adapter = blobs.digest) \
         and not exists (select 1 from contribution_files n where n.digest = blobs.digest) \
         and not exists (select 1 from evaluations e \
                         where e.gate_scores = blobs.digest or e.audit_scores = blobs.digest) \
         order by digest limit $2",
    )
    .bind(created_before.0)
    .bind(limit)
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| digest(row, "blobs", "digest"))
        .collect()
}

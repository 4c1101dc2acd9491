//! Table `blobs`: which bytes are held, and who may read them.
use cairn_proto::convert::BlobName;
use cairn_stack::digest::Digest;
use sqlx::any::AnyRow;

use super::{Hold, Tx, column, digest, signed, unsigned};
use crate::blobs::Audience;
use crate::caller::Caller;
use crate::clock::Timestamp;
use crate::error::Error;
use crate::ids::RoundId;

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

/// Notes a blob that the store holds durably, kept close until something public names it
/// ([`blob_publish`]). One that is known already stays as it is, but for its age: garbage that is put
/// again is not garbage any more.
///
/// # Errors
/// When the query fails.
pub async fn blob_insert(
    tx: &mut Tx,
    name: BlobName,
    uploader: &str,
    now: Timestamp,
) -> Result<(), Error> {
    sqlx::query(
        "insert into blobs (digest, size_bytes, audience, uploader, created_ms) \
         values ($1, $2, $3, $4, $5) \
         on conflict (digest) do update set created_ms = excluded.created_ms",
    )
    .bind(name.digest.to_string())
    .bind(signed(name.size_bytes))
    .bind(Audience::Evaluators.as_str())
    .bind(uploader)
    .bind(now.0)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// The blob with this digest; it is not collected before a writing transaction has ended.
///
/// # Errors
/// When the query fails.
pub async fn blob_get(tx: &mut Tx, digest: Digest) -> Result<Option<BlobRow>, Error> {
    let held = tx.hold(Hold::Kept, "blobs");
    let sql =
        format!("select digest, size_bytes, audience, uploader from blobs where digest = $1{held}");
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
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

/// How long a blob that only JSON names is needed.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// As long as its round is remembered: evidence.
    Forever,
    /// Until its round has ended: work in progress.
    WhileRunning,
}

/// Keeps a blob that no column of its own names from being collected. Keeping it again for longer
/// prolongs it.
///
/// # Errors
/// When the query fails, or there is no such blob.
pub async fn blob_keep(
    tx: &mut Tx,
    digest: Digest,
    round: RoundId,
    keep: Keep,
) -> Result<(), Error> {
    sqlx::query(
        "insert into kept_blobs (digest, round_id, forever) values ($1, $2, $3) \
         on conflict (digest, round_id) do update set forever = \
         case when kept_blobs.forever = 1 then 1 else excluded.forever end",
    )
    .bind(digest.to_string())
    .bind(round.to_string())
    .bind(i64::from(keep == Keep::Forever))
    .execute(tx.conn())
    .await?;
    Ok(())
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
    // Else these rows, which keep nothing any more, would hold the blob by their key.
    sqlx::query(
        "delete from kept_blobs where digest = $1 and forever = 0 and exists \
         (select 1 from rounds r where r.id = kept_blobs.round_id and r.ended_ms is not null)",
    )
    .bind(digest.to_string())
    .execute(tx.conn())
    .await?;
    let done = sqlx::query(
        "delete from blobs where digest = $1 and created_ms < $2 \
         and not exists (select 1 from checkpoint_files f where f.digest = blobs.digest) \
         and not exists (select 1 from checkpoints p where p.manifest = blobs.digest) \
         and not exists (select 1 from dataset_chunks c where c.digest = blobs.digest) \
         and not exists (select 1 from submissions s where s.adapter = blobs.digest) \
         and not exists (select 1 from contribution_files n where n.digest = blobs.digest) \
         and not exists (select 1 from evaluations e \
                         where e.gate_scores = blobs.digest or e.audit_scores = blobs.digest) \
         and not exists (select 1 from kept_blobs k join rounds r on r.id = k.round_id \
                         where k.digest = blobs.digest and (k.forever = 1 or r.ended_ms is null)) \
         and not exists (select 1 from restored_submissions t where t.adapter = blobs.digest)",
    )
    .bind(digest.to_string())
    .bind(created_before.0)
    .execute(tx.conn())
    .await;
    match done {
        Ok(done) => Ok(done.rows_affected() == 1),
        // Somebody has named it since we looked.
        Err(sqlx::Error::Database(error)) if error.is_foreign_key_violation() => Ok(false),
        Err(error) => Err(error.into()),
    }
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
         and not exists (select 1 from kept_blobs k join rounds r on r.id = k.round_id \
                         where k.digest = blobs.digest and (k.forever = 1 or r.ended_ms is null)) \
         and not exists (select 1 from restored_submissions t where t.adapter = blobs.digest) \
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

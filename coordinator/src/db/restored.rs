//! What a coordinator before this one acknowledged: submissions that came back with their receipts
//! after their rounds, and uploads that a receipt allows.
use cairn_proto::convert::BlobName;

use super::shards::position;
use super::{Tx, column, digest, parsed, signed, unsigned};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::ids::{LeaseId, RoundId, SubmissionId, WorkerId};

/// A submission that is not judged any more: what its receipt says.
#[derive(Debug, Clone, PartialEq)]
pub struct Restored {
    /// Which.
    pub id: SubmissionId,
    /// The lease it came under.
    pub lease: LeaseId,
    /// Whose.
    pub worker: WorkerId,
    /// Of which round; it may be unknown.
    pub round: RoundId,
    /// The shard.
    pub shard: u32,
    /// Its weight file.
    pub adapter: BlobName,
    /// `accepted` or `rejected`.
    pub verdict: String,
    /// The stable word of a rejection.
    pub reason: String,
    /// Verified tokens.
    pub credit_tokens: u64,
    /// The receipt's statement.
    pub statement: String,
    /// The signature under it.
    pub signature: Vec<u8>,
    /// When it was acknowledged the first time.
    pub created: Timestamp,
}

/// Stores one.
pub async fn restored_insert(tx: &mut Tx, new: &Restored, now: Timestamp) -> Result<(), Error> {
    sqlx::query(
        "insert into restored_submissions (id, lease_id, worker_id, round_id, shard, adapter, \
         receipt_statement, receipt_signature, verdict, reason, credit_tokens, created_ms, \
         restored_ms) values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13)",
    )
    .bind(new.id.to_string())
    .bind(new.lease.to_string())
    .bind(new.worker.to_string())
    .bind(new.round.to_string())
    .bind(i64::from(new.shard))
    .bind(new.adapter.digest.to_string())
    .bind(new.statement.as_str())
    .bind(new.signature.clone())
    .bind(new.verdict.as_str())
    .bind(new.reason.as_str())
    .bind(signed(new.credit_tokens))
    .bind(new.created.0)
    .bind(now.0)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// A worker's, newest first, that come after the given one.
pub async fn restored_list_of(
    tx: &mut Tx,
    worker: WorkerId,
    after: Option<(Timestamp, SubmissionId)>,
    limit: u32,
) -> Result<Vec<Restored>, Error> {
    let (created, id) = after.map_or((i64::MAX, String::new()), |(created, id)| {
        (created.0, id.to_string())
    });
    let rows = sqlx::query(
        "select t.id, t.lease_id, t.worker_id, t.round_id, t.shard, t.adapter, b.size_bytes, \
         t.receipt_statement, t.receipt_signature, t.verdict, t.reason, t.credit_tokens, \
         t.created_ms from restored_submissions t join blobs b on b.digest = t.adapter \
         where t.worker_id = $1 and (t.created_ms < $2 or (t.created_ms = $2 and t.id < $3)) \
         order by t.created_ms desc, t.id desc limit $4",
    )
    .bind(worker.to_string())
    .bind(created)
    .bind(id)
    .bind(i64::from(limit))
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| {
            Ok(Restored {
                id: parsed(row, "restored_submissions", "id")?,
                lease: parsed(row, "restored_submissions", "lease_id")?,
                worker: parsed(row, "restored_submissions", "worker_id")?,
                round: parsed(row, "restored_submissions", "round_id")?,
                shard: position(row, "restored_submissions", "shard")?,
                adapter: BlobName {
                    digest: digest(row, "restored_submissions", "adapter")?,
                    size_bytes: unsigned(row, "blobs", "size_bytes")?,
                },
                verdict: column(row, "verdict")?,
                reason: column(row, "reason")?,
                credit_tokens: unsigned(row, "restored_submissions", "credit_tokens")?,
                statement: column(row, "receipt_statement")?,
                signature: column(row, "receipt_signature")?,
                created: Timestamp(column(row, "created_ms")?),
            })
        })
        .collect()
}

/// How a worker's fared: accepted, rejected, and tokens credited.
pub async fn restored_standing(tx: &mut Tx, worker: WorkerId) -> Result<(u64, u64, u64), Error> {
    let row = sqlx::query(
        "select count(case when verdict = 'accepted' then 1 end) as accepted, \
         count(case when verdict = 'rejected' then 1 end) as rejected, \
         cast(coalesce(sum(credit_tokens), 0) as bigint) as credit \
         from restored_submissions where worker_id = $1",
    )
    .bind(worker.to_string())
    .fetch_one(tx.conn())
    .await?;
    let count = |name| unsigned(&row, "restored_submissions", name);
    Ok((count("accepted")?, count("rejected")?, count("credit")?))
}

/// Whether a lease has brought in a submission, in whichever way: that one's id.
pub async fn lease_spent(tx: &mut Tx, lease: LeaseId) -> Result<Option<SubmissionId>, Error> {
    let row = sqlx::query(
        "select id from submissions where lease_id = $1 \
         union all select id from restored_submissions where lease_id = $1 limit 1",
    )
    .bind(lease.to_string())
    .fetch_optional(tx.conn())
    .await?;
    row.as_ref()
        .map(|row| parsed(row, "submissions", "id"))
        .transpose()
}

/// Whether a submission of this id is known, in whichever way.
pub async fn submission_known(tx: &mut Tx, id: SubmissionId) -> Result<bool, Error> {
    let row = sqlx::query(
        "select id from submissions where id = $1 \
         union all select id from restored_submissions where id = $1 limit 1",
    )
    .bind(id.to_string())
    .fetch_optional(tx.conn())
    .await?;
    Ok(row.is_some())
}

/// Lets a worker upload the adapter that a receipt of its names, for a while.
pub async fn grant_put(
    tx: &mut Tx,
    lease: LeaseId,
    worker: WorkerId,
    adapter: BlobName,
    until: Timestamp,
) -> Result<(), Error> {
    sqlx::query(
        "insert into restore_grants (lease_id, worker_id, adapter, adapter_bytes, until_ms) \
         values ($1, $2, $3, $4, $5) on conflict (lease_id) do update set \
         worker_id = excluded.worker_id, adapter = excluded.adapter, \
         adapter_bytes = excluded.adapter_bytes, until_ms = excluded.until_ms",
    )
    .bind(lease.to_string())
    .bind(worker.to_string())
    .bind(adapter.digest.to_string())
    .bind(signed(adapter.size_bytes))
    .bind(until.0)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// The adapter that a worker may upload under a lease of a receipt.
pub async fn grant_get(
    tx: &mut Tx,
    lease: LeaseId,
    worker: WorkerId,
    now: Timestamp,
) -> Result<Option<BlobName>, Error> {
    let row = sqlx::query(
        "select adapter, adapter_bytes from restore_grants \
         where lease_id = $1 and worker_id = $2 and until_ms > $3",
    )
    .bind(lease.to_string())
    .bind(worker.to_string())
    .bind(now.0)
    .fetch_optional(tx.conn())
    .await?;
    row.as_ref()
        .map(|row| {
            Ok(BlobName {
                digest: digest(row, "restore_grants", "adapter")?,
                size_bytes: unsigned(row, "restore_grants", "adapter_bytes")?,
            })
        })
        .transpose()
}

/// Removes what is over.
pub async fn grant_delete(tx: &mut Tx, lease: LeaseId, now: Timestamp) -> Result<(), Error> {
    sqlx::query("delete from restore_grants where lease_id = $1 or until_ms <= $2")
        .bind(lease.to_string())
        .bind(now.0)
        .execute(tx.conn())
        .await?;
    Ok(())
}

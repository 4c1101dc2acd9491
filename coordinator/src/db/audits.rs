//! Commitments and audits of submissions: columns of table `submissions`.
use cairn_stack::digest::Digest;
use cairn_stack::merkle::Hash;

use super::shards::position;
use super::{Tx, column, parsed, unsigned};
use crate::clock::Timestamp;
use crate::domain::audit::{Audit, Commitment};
use crate::error::Error;
use crate::ids::{LeaseId, SubmissionId, WorkerId};

/// Stores what a submission commits to and whether it is audited.
pub async fn commitment_put(
    tx: &mut Tx,
    id: SubmissionId,
    commitment: &Commitment,
    audit: Option<&Audit>,
) -> Result<(), Error> {
    sqlx::query(
        "update submissions set commitment_root = $1, commitment_leaves = $2, \
         commitment_factors = $3, audit = $4 where id = $5",
    )
    .bind(hex::encode(commitment.root))
    .bind(i64::from(commitment.leaves))
    .bind(commitment.last.factors.digest.to_string())
    .bind(audit.map(text).transpose()?)
    .bind(id.to_string())
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// A submission's commitment: root and number of states; nothing when none was asked for.
pub async fn commitment_get(tx: &mut Tx, id: SubmissionId) -> Result<Option<(Hash, u32)>, Error> {
    let row =
        sqlx::query("select commitment_root, commitment_leaves from submissions where id = $1")
            .bind(id.to_string())
            .fetch_one(tx.conn())
            .await?;
    let root: Option<String> = column(&row, "commitment_root")?;
    let Some(root) = root else { return Ok(None) };
    let mut hash = Hash::default();
    hex::decode_to_slice(root, &mut hash)
        .map_err(|_| Error::inconsistent("submissions", "commitment_root", id))?;
    Ok(Some((
        hash,
        position(&row, "submissions", "commitment_leaves")?,
    )))
}

/// The factors of the last training state that a submission commits to; nothing when no commitment
/// was asked for.
pub async fn committed_factors(tx: &mut Tx, id: SubmissionId) -> Result<Option<Digest>, Error> {
    let row = sqlx::query("select commitment_factors from submissions where id = $1")
        .bind(id.to_string())
        .fetch_one(tx.conn())
        .await?;
    let text: Option<String> = column(&row, "commitment_factors")?;
    let lost = |_| Error::inconsistent("submissions", "commitment_factors", id);
    text.map(|text| text.parse().map_err(lost)).transpose()
}

/// A submission's audit; nothing when it was not drawn.
pub async fn audit_get(tx: &mut Tx, id: SubmissionId) -> Result<Option<Audit>, Error> {
    let row = sqlx::query("select audit from submissions where id = $1")
        .bind(id.to_string())
        .fetch_optional(tx.conn())
        .await?;
    let Some(row) = row else { return Ok(None) };
    read(id, column(&row, "audit")?)
}

/// The audit of the undecided submission that a worker handed in under a lease, and the length of
/// the largest adapter of its round.
pub async fn audit_of_lease(
    tx: &mut Tx,
    lease: LeaseId,
    worker: WorkerId,
) -> Result<Option<(Audit, u64)>, Error> {
    let row = sqlx::query(
        "select s.id, s.audit, r.adapter_bytes_max from submissions s \
         join rounds r on r.id = s.round_id where s.lease_id = $1 and s.worker_id = $2 \
         and s.state in ('received', 'evaluating') and r.state in ('training', 'judging')",
    )
    .bind(lease.to_string())
    .bind(worker.to_string())
    .fetch_optional(tx.conn())
    .await?;
    let Some(row) = row else { return Ok(None) };
    let audit = read(parsed(&row, "submissions", "id")?, column(&row, "audit")?)?;
    let bytes_max = unsigned(&row, "rounds", "adapter_bytes_max")?;
    Ok(audit.map(|audit| (audit, bytes_max)))
}

/// Moves an audit on. False: it was no longer as it was.
pub async fn audit_move(
    tx: &mut Tx,
    id: SubmissionId,
    from: &Audit,
    to: &Audit,
) -> Result<bool, Error> {
    let done = sqlx::query("update submissions set audit = $1 where id = $2 and audit = $3")
        .bind(text(to)?)
        .bind(id.to_string())
        .bind(text(from)?)
        .execute(tx.conn())
        .await?;
    Ok(done.rows_affected() == 1)
}

/// Gives every worker that an audit waits for until `until` at least: the coordinator was away, and
/// nobody shall be blamed for that. Returns how many.
pub async fn audit_prolong(tx: &mut Tx, until: Timestamp) -> Result<u64, Error> {
    let rows = sqlx::query(
        "select id, audit from submissions where audit is not null \
         and state in ('received', 'evaluating')",
    )
    .fetch_all(tx.conn())
    .await?;
    let mut moved = 0;
    for row in &rows {
        let id: SubmissionId = parsed(row, "submissions", "id")?;
        let Some(audit) = read(id, column(row, "audit")?)? else {
            continue;
        };
        if audit.opened.is_some() || audit.ended.is_some() || audit.until_ms >= until.0 {
            continue;
        }
        let longer = Audit {
            until_ms: until.0,
            ..audit.clone()
        };
        moved += u64::from(audit_move(tx, id, &audit, &longer).await?);
    }
    Ok(moved)
}

fn text(audit: &Audit) -> Result<String, Error> {
    serde_json::to_string(audit).map_err(|error| Error::internal("write an audit", error))
}

fn read(id: SubmissionId, json: Option<String>) -> Result<Option<Audit>, Error> {
    json.map(|json| {
        serde_json::from_str(&json).map_err(|_| Error::inconsistent("submissions", "audit", id))
    })
    .transpose()
}

//! Strikes: rejections that count against a worker's trust, unless they were voided.
use cairn_proto::reason::VerdictReason;

use super::shards::position;
use super::{Tx, parsed};
use crate::clock::Timestamp;
use crate::domain::trust::Trust;
use crate::error::Error;
use crate::ids::{SubmissionId, WorkerId};

/// Notes a strike; one a submission, however often it is noted.
pub async fn strike_insert(
    tx: &mut Tx,
    submission: SubmissionId,
    worker: WorkerId,
    reason: VerdictReason,
    now: Timestamp,
) -> Result<(), Error> {
    sqlx::query(
        "insert into strikes (submission_id, worker_id, reason, at_ms) values ($1, $2, $3, $4) \
         on conflict (submission_id) do nothing",
    )
    .bind(submission.to_string())
    .bind(worker.to_string())
    .bind(reason.as_str())
    .bind(now.0)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Takes a strike back: the server was at fault. Returns whose it was; nothing when there is no such
/// strike. Voiding again changes nothing.
pub async fn strike_void(
    tx: &mut Tx,
    submission: SubmissionId,
    reason: &str,
    now: Timestamp,
) -> Result<Option<WorkerId>, Error> {
    let row = sqlx::query(
        "update strikes set voided_ms = coalesce(voided_ms, $1), \
         void_reason = coalesce(void_reason, $2) where submission_id = $3 returning worker_id",
    )
    .bind(now.0)
    .bind(reason)
    .bind(submission.to_string())
    .fetch_optional(tx.conn())
    .await?;
    row.as_ref()
        .map(|row| parsed(row, "strikes", "worker_id"))
        .transpose()
}

/// What is known of a worker: strikes that count, and submissions accepted since the last of them.
/// What was revoked later counts for nothing.
pub async fn trust_of(tx: &mut Tx, worker: WorkerId) -> Result<Trust, Error> {
    let row = sqlx::query(
        "select (select count(*) from strikes k \
                 where k.worker_id = $1 and k.voided_ms is null) as strikes, \
         (select count(*) from submissions s where s.worker_id = $1 and s.state = 'accepted' \
             and s.revoked_ms is null and s.decided_ms > coalesce((select max(k.at_ms) \
                 from strikes k where k.worker_id = $1 and k.voided_ms is null), -1)) as clean",
    )
    .bind(worker.to_string())
    .fetch_one(tx.conn())
    .await?;
    Ok(Trust {
        clean: position(&row, "submissions", "clean")?,
        strikes: position(&row, "strikes", "strikes")?,
    })
}

//! Tables `revocations` and `refolds`: which contributions were taken back, and which checkpoints
//! took the place of those that contain them.
use std::collections::BTreeMap;

use cairn_proto::reason::VerdictReason;
use sqlx::any::AnyRow;

use super::{Tx, column, parsed, unsigned};
use crate::clock::Timestamp;
use crate::error::Error;
use crate::ids::{RequestId, RoundId, SubmissionId, WorkerId};

/// A contribution that was taken back.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revocation {
    /// Which.
    pub submission: SubmissionId,
    /// Display name of who made it.
    pub worker: String,
    /// The round it was made in.
    pub round: RoundId,
    /// That round's model.
    pub model: String,
    /// Why, in a maintainer's words.
    pub reason: String,
    /// When.
    pub revoked: Timestamp,
}

/// A checkpoint that contains a revoked contribution.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Refold {
    /// The model.
    pub model: String,
    /// The checkpoint.
    pub revision: u32,
    /// What took its place.
    pub replacement: Option<u32>,
    /// Why it cannot be folded again; empty otherwise.
    pub failure: String,
}

/// What has become of a checkpoint's contributions since it was published.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Marks {
    /// How many of them have been revoked.
    pub revoked: u32,
    /// The newest revision that took its place.
    pub replaced_by: Option<u32>,
    /// Whether a revision that takes its place is still to be folded.
    pub pending: bool,
}

const COLUMNS: &str = "select v.submission_id, w.display_name, s.round_id, r.model, v.reason, \
    v.revoked_ms from revocations v join submissions s on s.id = v.submission_id \
    join rounds r on r.id = s.round_id join workers w on w.id = s.worker_id";

fn select(rest: &str) -> sqlx::AssertSqlSafe<String> {
    // Both parts are constants of this file.
    sqlx::AssertSqlSafe(format!("{COLUMNS} {rest}"))
}

fn revocation(row: &AnyRow) -> Result<Revocation, Error> {
    Ok(Revocation {
        submission: parsed(row, "revocations", "submission_id")?,
        worker: column(row, "display_name")?,
        round: parsed(row, "submissions", "round_id")?,
        model: column(row, "model")?,
        reason: column(row, "reason")?,
        revoked: Timestamp(column(row, "revoked_ms")?),
    })
}

fn revision(row: &AnyRow, name: &'static str) -> Result<u32, Error> {
    let number = unsigned(row, "refolds", name)?;
    u32::try_from(number).map_err(|_| Error::inconsistent("refolds", name, number))
}

/// Takes an accepted submission back: its verdict becomes REVOKED and wants a receipt of its own.
/// False when it is not accepted, or the request id was used.
///
/// # Errors
/// When a query fails.
pub async fn revocation_insert(
    tx: &mut Tx,
    submission: SubmissionId,
    reason: &str,
    by: WorkerId,
    request: RequestId,
    now: Timestamp,
) -> Result<bool, Error> {
    let moved = sqlx::query(
        "update submissions set state = 'rejected', reason = $1, detail = $2, revoked_ms = $3, \
         verdict_statement = null, verdict_signature = null where id = $4 and state = 'accepted'",
    )
    .bind(VerdictReason::Revoked.as_str())
    .bind(reason)
    .bind(now.0)
    .bind(submission.to_string())
    .execute(tx.conn())
    .await?;
    if moved.rows_affected() == 0 {
        return Ok(false);
    }
    let done = sqlx::query(
        "insert into revocations (submission_id, reason, revoked_by, revoked_ms, request_id) \
         values ($1, $2, $3, $4, $5) on conflict do nothing",
    )
    .bind(submission.to_string())
    .bind(reason)
    .bind(by.to_string())
    .bind(now.0)
    .bind(request.to_string())
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// The revocation of a submission.
///
/// # Errors
/// When the query fails.
pub async fn revocation_get(
    tx: &mut Tx,
    submission: SubmissionId,
) -> Result<Option<Revocation>, Error> {
    let row = sqlx::query(select("where v.submission_id = $1"))
        .bind(submission.to_string())
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(revocation).transpose()
}

/// The revocation that a request made.
///
/// # Errors
/// When the query fails.
pub async fn revocation_by_request(
    tx: &mut Tx,
    request: RequestId,
) -> Result<Option<Revocation>, Error> {
    let row = sqlx::query(select("where v.request_id = $1"))
        .bind(request.to_string())
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(revocation).transpose()
}

/// Revocations, newest first, of one model or of all, after the given one.
///
/// # Errors
/// When the query fails.
pub async fn revocation_list(
    tx: &mut Tx,
    model: &str,
    after: Option<(Timestamp, SubmissionId)>,
    limit: u32,
) -> Result<Vec<Revocation>, Error> {
    let (revoked, id) = after.map_or((i64::MAX, String::new()), |(revoked, id)| {
        (revoked.0, id.to_string())
    });
    let rows = sqlx::query(select(
        "where ($1 = '' or r.model = $1) \
         and (v.revoked_ms < $2 or (v.revoked_ms = $2 and v.submission_id < $3)) \
         order by v.revoked_ms desc, v.submission_id desc limit $4",
    ))
    .bind(model)
    .bind(revoked)
    .bind(id)
    .bind(i64::from(limit))
    .fetch_all(tx.conn())
    .await?;
    rows.iter().map(revocation).collect()
}

/// How many contributions to a model have been revoked; it only grows.
///
/// # Errors
/// When the query fails.
pub async fn revocation_count(tx: &mut Tx, model: &str) -> Result<u64, Error> {
    let row = sqlx::query(
        "select count(*) as revoked from revocations v \
         join submissions s on s.id = v.submission_id \
         join rounds r on r.id = s.round_id where r.model = $1",
    )
    .bind(model)
    .fetch_one(tx.conn())
    .await?;
    unsigned(&row, "revocations", "revoked")
}

/// Wants every checkpoint that contains a revoked contribution folded again; those that failed are
/// tried again, those that have a replacement stay as they are.
///
/// # Errors
/// When the query fails.
pub async fn refold_insert(tx: &mut Tx, submission: SubmissionId) -> Result<(), Error> {
    sqlx::query(
        "insert into refolds (submission_id, model, revision) \
         select submission_id, model, revision from checkpoint_contributions \
         where submission_id = $1 \
         on conflict (submission_id, model, revision) do update set failure = ''",
    )
    .bind(submission.to_string())
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// The checkpoints that contain a revoked contribution and are, or were, to be folded again; oldest
/// first.
///
/// # Errors
/// When the query fails.
pub async fn refold_list(tx: &mut Tx, submission: SubmissionId) -> Result<Vec<Refold>, Error> {
    let rows = sqlx::query(
        "select model, revision, replacement, failure from refolds where submission_id = $1 \
         order by model, revision",
    )
    .bind(submission.to_string())
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| {
            let replacement: Option<i64> = column(row, "replacement")?;
            Ok(Refold {
                model: column(row, "model")?,
                revision: revision(row, "revision")?,
                replacement: replacement
                    .map(|_| revision(row, "replacement"))
                    .transpose()?,
                failure: column(row, "failure")?,
            })
        })
        .collect()
}

/// The oldest checkpoint that is still to be folded again.
///
/// # Errors
/// When the query fails.
pub async fn refold_next(tx: &mut Tx) -> Result<Option<(String, u32)>, Error> {
    let row = sqlx::query(
        "select model, revision from refolds where replacement is null and failure = '' \
         order by model, revision limit 1",
    )
    .fetch_optional(tx.conn())
    .await?;
    row.map(|row| Ok((column(&row, "model")?, revision(&row, "revision")?)))
        .transpose()
}

/// Names what took a checkpoint's place. False when it has a replacement already.
///
/// # Errors
/// When the query fails.
pub async fn refold_done(
    tx: &mut Tx,
    model: &str,
    revision: u32,
    replacement: u32,
) -> Result<bool, Error> {
    let done = sqlx::query(
        "update refolds set replacement = $3, failure = '' \
         where model = $1 and revision = $2 and replacement is null",
    )
    .bind(model)
    .bind(i64::from(revision))
    .bind(i64::from(replacement))
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() > 0)
}

/// Notes why a checkpoint cannot be folded again.
///
/// # Errors
/// When the query fails.
pub async fn refold_fail(
    tx: &mut Tx,
    model: &str,
    revision: u32,
    failure: &str,
) -> Result<(), Error> {
    sqlx::query(
        "update refolds set failure = $3 \
         where model = $1 and revision = $2 and replacement is null",
    )
    .bind(model)
    .bind(i64::from(revision))
    .bind(failure)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// The checkpoints of a model, from one revision to another, with a revoked contribution.
///
/// # Errors
/// When the query fails.
pub async fn checkpoint_marks(
    tx: &mut Tx,
    model: &str,
    first: u32,
    last: u32,
) -> Result<BTreeMap<u32, Marks>, Error> {
    let rows = sqlx::query(
        "select c.revision, count(*) as revoked, \
         cast(coalesce(max(f.replacement), 0) as bigint) as replaced_by, \
         count(case when f.revision is not null and f.replacement is null and f.failure = '' \
               then 1 end) as pending \
         from checkpoint_contributions c \
         join revocations v on v.submission_id = c.submission_id \
         left join refolds f on f.submission_id = c.submission_id \
         and f.model = c.model and f.revision = c.revision \
         where c.model = $1 and c.revision >= $2 and c.revision <= $3 group by c.revision",
    )
    .bind(model)
    .bind(i64::from(first))
    .bind(i64::from(last))
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| {
            let replaced_by = revision(row, "replaced_by")?;
            let marks = Marks {
                revoked: revision(row, "revoked")?,
                // Revision 0 has no contributions, so it replaces nothing.
                replaced_by: (replaced_by > 0).then_some(replaced_by),
                pending: revision(row, "pending")? > 0,
            };
            Ok((revision(row, "revision")?, marks))
        })
        .collect()
}

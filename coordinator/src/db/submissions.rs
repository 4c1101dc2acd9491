//! Submissions: what was acknowledged, and what became of it.
pub mod peers;

use cairn_proto::reason::VerdictReason;
use cairn_stack::digest::Digest;
use serde::{Deserialize, Serialize};
use sqlx::any::AnyRow;

use super::shards::position;
use super::{Double, Tx, column, digest, parsed, signed, unsigned};
use crate::clock::Timestamp;
use crate::domain::evidence::Evidence;
use crate::domain::lease;
use crate::domain::statistics::Paired;
use crate::domain::submission::{Progress, Score, State};
use crate::error::Error;
use crate::ids::{LeaseId, RequestId, RoundId, SubmissionId, WorkerId};

/// What a worker says of its training; never trusted.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Numbers {
    /// Optimiser steps.
    pub steps: u32,
    /// Tokens seen.
    pub tokens: u64,
    /// Tokens with a loss.
    pub scored_tokens: u64,
    /// Wall time.
    pub seconds: f64,
    /// Loss of the first step.
    pub first_loss: f64,
    /// Loss of the last step.
    pub last_loss: f64,
    /// What it ran on.
    pub device: String,
}

/// A submission as stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Submission {
    /// Its id.
    pub id: SubmissionId,
    /// The lease it came under.
    pub lease: LeaseId,
    /// The round.
    pub round: RoundId,
    /// The shard.
    pub shard: u32,
    /// Who sent it.
    pub worker: WorkerId,
    /// The sender's display name.
    pub worker_name: String,
    /// The weight file.
    pub adapter: Digest,
    /// Its length.
    pub adapter_bytes: u64,
    /// `adapter_config.json`.
    pub adapter_config: String,
    /// What the worker says.
    pub numbers: Numbers,
    /// Whether its shard had gone to another when it came: it is judged and credited, and becomes
    /// part of nothing.
    pub late: bool,
    /// Where it stands.
    pub progress: Progress,
    /// Loss on the gate set, alone, when it was evaluated.
    pub gate_loss: Option<f64>,
    /// Loss on the audit set, alone.
    pub audit_loss: Option<f64>,
    /// Improvement on the gate set and its standard error.
    pub gain: Option<(f64, f64)>,
    /// Product-space norm, when measured.
    pub norm: Option<f64>,
    /// Effective factor in the published checkpoint.
    pub weight: f64,
    /// When a maintainer took it back, if so.
    pub revoked: Option<Timestamp>,
    /// The numbers behind the verdict, as far as they are known.
    pub evidence: Evidence,
    /// When it was acknowledged.
    pub created: Timestamp,
}

/// A submission to be stored.
#[derive(Debug, Clone)]
pub struct NewSubmission<'a> {
    /// Its id.
    pub id: SubmissionId,
    /// The lease it came under.
    pub lease: LeaseId,
    /// The caller's request.
    pub request: RequestId,
    /// The round.
    pub round: RoundId,
    /// The shard.
    pub shard: u32,
    /// Who sent it.
    pub worker: WorkerId,
    /// The weight file.
    pub adapter: Digest,
    /// Its length.
    pub adapter_bytes: u64,
    /// `adapter_config.json`.
    pub adapter_config: &'a str,
    /// What the worker says.
    pub numbers: &'a Numbers,
    /// The worker's signature.
    pub signature: &'a [u8],
    /// What the receipt states.
    pub receipt_statement: &'a str,
    /// The coordinator's signature under it.
    pub receipt_signature: &'a [u8],
    /// Now.
    pub created: Timestamp,
}

/// The answer a submission got.
#[derive(Debug, Clone, PartialEq)]
pub struct Answer {
    /// The submission.
    pub id: SubmissionId,
    /// The lease it came under.
    pub lease: LeaseId,
    /// The weight file.
    pub adapter: Digest,
    /// The receipt's statement.
    pub receipt_statement: String,
    /// The signature under it.
    pub receipt_signature: Vec<u8>,
}

/// How a worker's submissions fared.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Standing {
    /// Accepted.
    pub accepted: u64,
    /// Rejected.
    pub rejected: u64,
    /// Not yet decided.
    pub pending: u64,
    /// Verified tokens.
    pub credit_tokens: u64,
}

const COLUMNS: &str = "select s.id, s.lease_id, s.round_id, s.shard, s.worker_id, s.adapter, \
    s.adapter_bytes, s.adapter_config, s.numbers, s.state, s.reason, s.detail, s.norm, \
    s.gate_loss, s.audit_loss, s.gain, s.gain_se, s.weight, s.evidence, s.revoked_ms, \
    s.created_ms, s.decided_ms, w.display_name, \
    (select state from leases where id = s.lease_id) as lease_state \
    from submissions s join workers w on w.id = s.worker_id";

fn select(rest: &str) -> sqlx::AssertSqlSafe<String> {
    // Both parts are constants of this file.
    sqlx::AssertSqlSafe(format!("{COLUMNS} {rest}"))
}

/// When a submission that is acknowledged now arrived: later than every other of its round, whatever
/// the clocks of several coordinators say, for it is compared with those that arrived before it. The
/// caller holds the end of the log.
pub async fn submission_arrival(
    tx: &mut Tx,
    round: RoundId,
    now: Timestamp,
) -> Result<Timestamp, Error> {
    let row = sqlx::query("select max(created_ms) as last from submissions where round_id = $1")
        .bind(round.to_string())
        .fetch_one(tx.conn())
        .await?;
    let last: Option<i64> = column(&row, "last")?;
    Ok(last.map_or(now, |last| now.max(Timestamp(last + 1))))
}

/// Stores a submission as received.
pub async fn submission_insert(tx: &mut Tx, new: &NewSubmission<'_>) -> Result<(), Error> {
    let numbers = serde_json::to_string(new.numbers)
        .map_err(|error| Error::internal("write a submission's numbers", error))?;
    sqlx::query(
        "insert into submissions (id, lease_id, request_id, round_id, shard, worker_id, adapter, \
         adapter_bytes, adapter_config, numbers, signature, receipt_statement, receipt_signature, \
         state, created_ms) \
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, $12, $13, 'received', $14)",
    )
    .bind(new.id.to_string())
    .bind(new.lease.to_string())
    .bind(new.request.to_string())
    .bind(new.round.to_string())
    .bind(i64::from(new.shard))
    .bind(new.worker.to_string())
    .bind(new.adapter.to_string())
    .bind(signed(new.adapter_bytes))
    .bind(new.adapter_config)
    .bind(numbers)
    .bind(new.signature.to_vec())
    .bind(new.receipt_statement)
    .bind(new.receipt_signature.to_vec())
    .bind(new.created.0)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// The answer to an earlier submission under this lease or request, if there was one.
pub async fn submission_answer(
    tx: &mut Tx,
    lease: LeaseId,
    request: RequestId,
) -> Result<Option<Answer>, Error> {
    let row = sqlx::query(
        "select id, lease_id, adapter, receipt_statement, receipt_signature from submissions \
         where lease_id = $1 or request_id = $2 limit 1",
    )
    .bind(lease.to_string())
    .bind(request.to_string())
    .fetch_optional(tx.conn())
    .await?;
    let Some(row) = row else { return Ok(None) };
    Ok(Some(Answer {
        id: parsed(&row, "submissions", "id")?,
        lease: parsed(&row, "submissions", "lease_id")?,
        adapter: digest(&row, "submissions", "adapter")?,
        receipt_statement: column(&row, "receipt_statement")?,
        receipt_signature: column(&row, "receipt_signature")?,
    }))
}

/// Finds a submission.
pub async fn submission_get(tx: &mut Tx, id: SubmissionId) -> Result<Option<Submission>, Error> {
    let row = sqlx::query(select("where s.id = $1"))
        .bind(id.to_string())
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(Submission::try_from).transpose()
}

/// A round's submissions, in order of arrival.
pub async fn submission_list(
    tx: &mut Tx,
    round: RoundId,
    limit: u32,
) -> Result<Vec<Submission>, Error> {
    let rows = sqlx::query(select(
        "where s.round_id = $1 order by s.created_ms, s.id limit $2",
    ))
    .bind(round.to_string())
    .bind(i64::from(limit))
    .fetch_all(tx.conn())
    .await?;
    rows.iter().map(Submission::try_from).collect()
}

/// Submissions in a state whose rounds run, oldest first.
pub async fn submission_in(
    tx: &mut Tx,
    state: State,
    limit: u32,
) -> Result<Vec<Submission>, Error> {
    let rows = sqlx::query(select(
        "join rounds r on r.id = s.round_id where s.state = $1 \
         and r.state in ('training', 'judging') order by s.created_ms, s.id limit $2",
    ))
    .bind(state.as_str())
    .bind(i64::from(limit))
    .fetch_all(tx.conn())
    .await?;
    rows.iter().map(Submission::try_from).collect()
}

/// Received submissions whose rounds run and that have not been measured, oldest first.
pub async fn submission_unmeasured(tx: &mut Tx, limit: u32) -> Result<Vec<Submission>, Error> {
    let rows = sqlx::query(select(
        "join rounds r on r.id = s.round_id where s.state = 'received' and s.norm is null \
         and r.state in ('training', 'judging') order by s.created_ms, s.id limit $1",
    ))
    .bind(i64::from(limit))
    .fetch_all(tx.conn())
    .await?;
    rows.iter().map(Submission::try_from).collect()
}

/// A worker's submissions, newest first, that come after the given one.
pub async fn submission_list_of(
    tx: &mut Tx,
    worker: WorkerId,
    after: Option<(Timestamp, SubmissionId)>,
    limit: u32,
) -> Result<Vec<Submission>, Error> {
    let (created, id) = after.map_or((i64::MAX, String::new()), |(created, id)| {
        (created.0, id.to_string())
    });
    let rows = sqlx::query(select(
        "where s.worker_id = $1 \
         and (s.created_ms < $2 or (s.created_ms = $2 and s.id < $3)) \
         order by s.created_ms desc, s.id desc limit $4",
    ))
    .bind(worker.to_string())
    .bind(created)
    .bind(id)
    .bind(i64::from(limit))
    .fetch_all(tx.conn())
    .await?;
    rows.iter().map(Submission::try_from).collect()
}

/// What a move stores besides the state.
#[derive(Debug, Clone, Default)]
pub struct Findings {
    /// The numbers behind the verdict, all that are known by now; nothing leaves those that are there.
    pub evidence: Option<Evidence>,
    /// Verified tokens.
    pub credit_tokens: u64,
    /// The scores of a submission that was evaluated and rejected.
    pub score: Option<Score>,
}

/// Moves a submission on. False: it was no longer in that state.
pub async fn submission_move(
    tx: &mut Tx,
    id: SubmissionId,
    from: State,
    to: &Progress,
    findings: &Findings,
) -> Result<bool, Error> {
    let (mut norm, mut score, mut reason, mut detail, mut at) =
        (None, findings.score, "", "", None);
    match to {
        Progress::Received { norm: measured } => norm = *measured,
        Progress::Evaluating { norm: measured } => norm = Some(*measured),
        Progress::Accepted {
            norm: measured,
            score: found,
            at: time,
        } => {
            (norm, score, at) = (Some(*measured), Some(*found), Some(time.0));
        }
        Progress::Rejected {
            reason: word,
            detail: text,
            at: time,
        } => {
            (reason, detail, at) = (word.as_str(), text, Some(time.0));
        }
    }
    let evidence = findings.evidence.as_ref().map(|e| e.to_json().to_string());
    let done = sqlx::query(
        "update submissions set state = $1, reason = $2, detail = $3, norm = coalesce($4, norm), \
         gate_loss = $5, audit_loss = $6, gain = $7, gain_se = $8, \
         evidence = coalesce($9, evidence), credit_tokens = $10, decided_ms = $11 where id = $12 and state = $13",
    )
    .bind(to.state().as_str())
    .bind(reason)
    .bind(detail)
    .bind(Double(norm))
    .bind(Double(score.map(|score| score.gate_loss)))
    .bind(Double(score.and_then(|score| score.audit_loss)))
    .bind(Double(score.map(|score| score.paired.gain)))
    .bind(Double(score.map(|score| score.paired.se)))
    .bind(evidence)
    .bind(signed(findings.credit_tokens))
    .bind(at)
    .bind(id.to_string())
    .bind(from.as_str())
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Notes the effective factor in the published checkpoint.
pub async fn submission_weight(tx: &mut Tx, id: SubmissionId, weight: f64) -> Result<(), Error> {
    sqlx::query("update submissions set weight = $1 where id = $2")
        .bind(weight)
        .bind(id.to_string())
        .execute(tx.conn())
        .await?;
    Ok(())
}

/// Adds to the evidence of a submission that stays where it is. False: it has moved on.
pub async fn submission_note(
    tx: &mut Tx,
    id: SubmissionId,
    state: State,
    evidence: &Evidence,
) -> Result<bool, Error> {
    let done = sqlx::query("update submissions set evidence = $1 where id = $2 and state = $3")
        .bind(evidence.to_json().to_string())
        .bind(id.to_string())
        .bind(state.as_str())
        .execute(tx.conn())
        .await?;
    Ok(done.rows_affected() == 1)
}

/// How many submissions of a round are undecided, and how many there are.
pub async fn submission_count(tx: &mut Tx, round: RoundId) -> Result<(u64, u64), Error> {
    let row = sqlx::query(
        "select count(*) as total, \
         count(case when state in ('received', 'evaluating') then 1 end) as pending \
         from submissions where round_id = $1",
    )
    .bind(round.to_string())
    .fetch_one(tx.conn())
    .await?;
    Ok((
        unsigned(&row, "submissions", "pending")?,
        unsigned(&row, "submissions", "total")?,
    ))
}

/// How a worker's submissions fared.
pub async fn submission_standing(tx: &mut Tx, worker: WorkerId) -> Result<Standing, Error> {
    let row = sqlx::query(
        "select count(case when state = 'accepted' then 1 end) as accepted, \
         count(case when state = 'rejected' then 1 end) as rejected, \
         count(case when state in ('received', 'evaluating') then 1 end) as pending, \
         cast(coalesce(sum(credit_tokens), 0) as bigint) as credit \
         from submissions where worker_id = $1",
    )
    .bind(worker.to_string())
    .fetch_one(tx.conn())
    .await?;
    Ok(Standing {
        accepted: unsigned(&row, "submissions", "accepted")?,
        rejected: unsigned(&row, "submissions", "rejected")?,
        pending: unsigned(&row, "submissions", "pending")?,
        credit_tokens: unsigned(&row, "submissions", "credit")?,
    })
}

/// Rejects what a round that is over leaves undecided.
pub async fn submission_close(tx: &mut Tx, round: RoundId, now: Timestamp) -> Result<(), Error> {
    sqlx::query(
        "update submissions set state = 'rejected', reason = $1, detail = $2, decided_ms = $3 \
         where round_id = $4 and state in ('received', 'evaluating')",
    )
    .bind(VerdictReason::RoundEnded.as_str())
    .bind(VerdictReason::RoundEnded.sentence())
    .bind(now.0)
    .bind(round.to_string())
    .execute(tx.conn())
    .await?;
    Ok(())
}

impl TryFrom<&AnyRow> for Submission {
    type Error = Error;

    fn try_from(row: &AnyRow) -> Result<Self, Error> {
        let id: SubmissionId = parsed(row, "submissions", "id")?;
        let numbers: String = column(row, "numbers")?;
        let gain: Option<f64> = column(row, "gain")?;
        let gain_se: Option<f64> = column(row, "gain_se")?;
        let revoked: Option<i64> = column(row, "revoked_ms")?;
        Ok(Self {
            id,
            lease: parsed(row, "submissions", "lease_id")?,
            round: parsed(row, "submissions", "round_id")?,
            shard: position(row, "submissions", "shard")?,
            worker: parsed(row, "submissions", "worker_id")?,
            worker_name: column(row, "display_name")?,
            adapter: digest(row, "submissions", "adapter")?,
            adapter_bytes: unsigned(row, "submissions", "adapter_bytes")?,
            adapter_config: column(row, "adapter_config")?,
            numbers: serde_json::from_str(&numbers)
                .map_err(|_| Error::inconsistent("submissions", "numbers", id))?,
            progress: progress(row, id)?,
            gate_loss: column(row, "gate_loss")?,
            audit_loss: column(row, "audit_loss")?,
            gain: gain.zip(gain_se),
            norm: column(row, "norm")?,
            weight: column(row, "weight")?,
            // Its lease was never done: see `submit_adapter`.
            late: parsed::<lease::State>(row, "leases", "lease_state")? == lease::State::Expired,
            revoked: revoked.map(Timestamp),
            evidence: evidence(row, id)?,
            created: Timestamp(column(row, "created_ms")?),
        })
    }
}

fn evidence(row: &AnyRow, id: SubmissionId) -> Result<Evidence, Error> {
    let json: String = column(row, "evidence")?;
    serde_json::from_str(&json).map_err(|_| Error::inconsistent("submissions", "evidence", id))
}

fn progress(row: &AnyRow, id: SubmissionId) -> Result<Progress, Error> {
    let bad = |name: &'static str| Error::inconsistent("submissions", name, id);
    let norm: Option<f64> = column(row, "norm")?;
    let decided: Option<i64> = column(row, "decided_ms")?;
    let at = || decided.map(Timestamp).ok_or_else(|| bad("decided_ms"));
    Ok(match parsed::<State>(row, "submissions", "state")? {
        State::Received => Progress::Received { norm },
        State::Evaluating => Progress::Evaluating {
            norm: norm.ok_or_else(|| bad("norm"))?,
        },
        State::Accepted => {
            let number = |name: &'static str| -> Result<f64, Error> {
                column::<Option<f64>>(row, name)?.ok_or_else(|| bad(name))
            };
            // How many records were compared is not kept; the error already says how sure it was.
            let paired = Paired {
                gain: number("gain")?,
                se: number("gain_se")?,
                records: 0,
            };
            let score = Score {
                gate_loss: number("gate_loss")?,
                audit_loss: column(row, "audit_loss")?,
                paired,
            };
            Progress::Accepted {
                norm: norm.ok_or_else(|| bad("norm"))?,
                score,
                at: at()?,
            }
        }
        State::Rejected => Progress::Rejected {
            reason: parsed::<VerdictReason>(row, "submissions", "reason")?,
            detail: column(row, "detail")?,
            at: at()?,
        },
    })
}

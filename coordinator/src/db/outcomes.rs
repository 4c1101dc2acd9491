//! What the choice of an aggregate reads: how evaluations ended, without what they were asked about,
//! which may be thousands of adapters; who is known; what has been revoked.
use std::collections::{BTreeMap, BTreeSet};

use sqlx::any::AnyRow;

use super::{Tx, column, parsed, unsigned};
use crate::clock::Timestamp;
use crate::domain::candidate::CandidateKey;
use crate::domain::evaluation::{Findings, State};
use crate::domain::stacker::{Learned, Measured, Outcome, SetResult};
use crate::error::Error;
use crate::ids::{RoundId, SubmissionId, WorkerId};

/// Every scoring of a round that has ended, by its candidate.
///
/// # Errors
/// When the query fails, or a row is malformed.
pub async fn outcome_list(
    tx: &mut Tx,
    round: RoundId,
) -> Result<BTreeMap<CandidateKey, Outcome>, Error> {
    let rows = sqlx::query(
        "select candidate_key, state, gate_loss, audit_loss, gate_scores, extra_scores \
         from evaluations where round_id = $1 and kind = 'score' and state in ('done', 'failed')",
    )
    .bind(round.to_string())
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| Ok((key(row)?, outcome(row)?)))
        .collect()
}

/// How one scoring of a round ended; nothing while it has not, or was never asked for.
///
/// # Errors
/// As [`outcome_list`].
pub async fn outcome_of(
    tx: &mut Tx,
    round: RoundId,
    candidate: CandidateKey,
) -> Result<Option<Outcome>, Error> {
    let row = sqlx::query(
        "select candidate_key, state, gate_loss, audit_loss, gate_scores, extra_scores \
         from evaluations where round_id = $1 and candidate_key = $2 and kind = 'score' \
         and state in ('done', 'failed')",
    )
    .bind(round.to_string())
    .bind(candidate.0.to_string())
    .fetch_optional(tx.conn())
    .await?;
    row.as_ref().map(outcome).transpose()
}

/// Every learning of factors of a round that has ended, by the name of its job.
///
/// # Errors
/// As [`outcome_list`].
pub async fn learned_list(
    tx: &mut Tx,
    round: RoundId,
) -> Result<BTreeMap<CandidateKey, Learned>, Error> {
    let rows = sqlx::query(
        "select candidate_key, state, findings from evaluations \
         where round_id = $1 and kind = 'learn' and state in ('done', 'failed')",
    )
    .bind(round.to_string())
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| Ok((key(row)?, learned(row)?)))
        .collect()
}

/// What evaluators are doing for a round.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Activity {
    /// When one last answered.
    pub answered: Option<Timestamp>,
    /// Whether one is at work; a lease that is no longer renewed ends.
    pub working: bool,
}

/// What evaluators are doing for a round.
///
/// # Errors
/// When the query fails.
pub async fn evaluator_activity(tx: &mut Tx, round: RoundId) -> Result<Activity, Error> {
    let row = sqlx::query(
        "select max(done_ms) as answered, count(case when state = 'leased' then 1 end) as working \
         from evaluations where round_id = $1",
    )
    .bind(round.to_string())
    .fetch_one(tx.conn())
    .await?;
    let answered: Option<i64> = column(&row, "answered")?;
    let working: i64 = column(&row, "working")?;
    Ok(Activity {
        answered: answered.map(Timestamp),
        working: working > 0,
    })
}

/// How many submissions of each of a round's workers had been accepted when the round began, since
/// the last strike against them that counts. What is accepted within the round changes nothing, so
/// that the same round is always judged alike.
///
/// # Errors
/// When the query fails.
pub async fn accepted_before(
    tx: &mut Tx,
    round: RoundId,
    began: Timestamp,
) -> Result<BTreeMap<WorkerId, u64>, Error> {
    let rows = sqlx::query(
        "select s.worker_id, count(*) as accepted from submissions s \
         where s.state = 'accepted' and s.decided_ms < $1 \
         and s.worker_id in (select worker_id from submissions where round_id = $2) \
         and s.decided_ms > coalesce((select max(k.at_ms) from strikes k \
         where k.worker_id = s.worker_id and k.voided_ms is null), 0) \
         group by s.worker_id",
    )
    .bind(began.0)
    .bind(round.to_string())
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| {
            let worker = parsed(row, "submissions", "worker_id")?;
            Ok((worker, unsigned(row, "submissions", "accepted")?))
        })
        .collect()
}

/// Every submission that has been revoked.
///
/// # Errors
/// When the query fails.
pub async fn revoked_list(tx: &mut Tx) -> Result<BTreeSet<SubmissionId>, Error> {
    let rows = sqlx::query("select submission_id from revocations")
        .fetch_all(tx.conn())
        .await?;
    rows.iter()
        .map(|row| parsed(row, "revocations", "submission_id"))
        .collect()
}

fn key(row: &AnyRow) -> Result<CandidateKey, Error> {
    Ok(CandidateKey(parsed(row, "evaluations", "candidate_key")?))
}

fn learned(row: &AnyRow) -> Result<Learned, Error> {
    let findings: Option<String> = column(row, "findings")?;
    let Some(json) = findings else {
        return Ok(Learned::Failed);
    };
    match serde_json::from_str(&json) {
        Ok(Findings::Learn {
            weights,
            loss_before,
            loss_after,
        }) => Ok(Learned::Done {
            weights,
            loss_before,
            loss_after,
        }),
        _ => Err(Error::inconsistent("evaluations", "findings", json)),
    }
}

fn outcome(row: &AnyRow) -> Result<Outcome, Error> {
    if parsed::<State>(row, "evaluations", "state")? == State::Failed {
        return Ok(Outcome::Failed);
    }
    let text: String = column(row, "extra_scores")?;
    let extra = serde_json::from_str(&text)
        .map_err(|_| Error::inconsistent("evaluations", "extra_scores", &text))?;
    Ok(Outcome::Done(Measured {
        gate: SetResult {
            loss: column(row, "gate_loss")?,
            scores: parsed(row, "evaluations", "gate_scores")?,
        },
        audit_loss: column(row, "audit_loss")?,
        extra,
    }))
}

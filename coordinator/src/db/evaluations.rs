//! Evaluations: one row a job for evaluators in a round.
use std::collections::BTreeMap;

use cairn_stack::digest::Digest;
use sqlx::any::AnyRow;

use super::shards::position;
use super::{Double, Hold, Tx, column, parsed, signed, unsigned};
use crate::clock::Timestamp;
use crate::domain::candidate::{Candidate, CandidateKey, Sets, Term};
use crate::domain::evaluation::{Findings, Job, Kind, State};
use crate::domain::stacker::{Request, SetResult};
use crate::error::Error;
use crate::ids::{EvaluationId, Generation, RoundId, WorkerId};

/// An evaluation as stored.
#[derive(Debug, Clone, PartialEq)]
pub struct Evaluation {
    /// Its id.
    pub id: EvaluationId,
    /// The round it belongs to.
    pub round: RoundId,
    /// What is asked.
    pub job: Job,
    /// The job's name.
    pub key: CandidateKey,
    /// Where it stands.
    pub state: State,
    /// Of its newest lease.
    pub generation: Generation,
    /// How often it has failed.
    pub failures: u64,
    /// The result of a score, once done.
    pub result: Option<EvalResult>,
    /// What came of any other job, once done.
    pub findings: Option<Findings>,
}

/// What a score found.
#[derive(Debug, Clone, PartialEq)]
pub struct EvalResult {
    /// Loss on the gate set, nats per token.
    pub gate_loss: f64,
    /// Loss on the audit set, where it was asked for.
    pub audit_loss: Option<f64>,
    /// The blob of the gate set's losses.
    pub gate_scores: Digest,
    /// The blob of the audit set's losses.
    pub audit_scores: Option<Digest>,
    /// On further sets, by name: `guard/NAME`, `probe/NAME`, `shard/N`, `history/NAME`. A set without
    /// a scored token is left out.
    pub extra: BTreeMap<String, SetResult>,
}

/// Evaluation work of a round, counted.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct EvaluationCounts {
    /// Ended.
    pub ended: u64,
    /// Waiting or under way.
    pub open: u64,
    /// What is under way, or next, in words.
    pub current: String,
}

const COLUMNS: &str = "select id, round_id, kind, candidate_key, candidate, sets, scope, subject, \
    shard, steps, state, generation, failures, gate_loss, audit_loss, gate_scores, audit_scores, \
    extra_scores, findings from evaluations";

fn select(rest: &str) -> sqlx::AssertSqlSafe<String> {
    // Both parts are constants of this file.
    sqlx::AssertSqlSafe(format!("{COLUMNS} {rest}"))
}

/// Opens a score, unless the round has it already. Says whether it is new.
pub async fn evaluation_open(
    tx: &mut Tx,
    round: RoundId,
    request: &Request,
    now: Timestamp,
) -> Result<bool, Error> {
    let job = Job::Score(request.candidate.clone());
    evaluation_open_job(tx, round, &job, &request.purpose, now).await
}

/// Opens a job of any kind, unless the round has it already. Says whether it is new. `purpose`: for
/// people.
pub async fn evaluation_open_job(
    tx: &mut Tx,
    round: RoundId,
    job: &Job,
    purpose: &str,
    now: Timestamp,
) -> Result<bool, Error> {
    let (subject, shard, steps) = match job {
        Job::Score(_) => (None, None, 0),
        Job::Guide { shard } => (None, Some(i64::from(*shard)), 0),
        Job::Replay { submission } => (Some(submission.to_string()), None, 0),
        Job::Learn { steps, .. } => (None, None, *steps),
    };
    let terms = job.candidate().map_or(&[][..], Candidate::terms);
    let terms = serde_json::to_string(terms)
        .map_err(|error| Error::internal("write a candidate", error))?;
    let sets = job.candidate().map_or(Sets::GATE, Candidate::sets);
    let done = sqlx::query(
        "insert into evaluations (id, round_id, kind, candidate_key, candidate, sets, scope, \
         subject, shard, steps, purpose, state, created_ms) \
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11, 'open', $12) \
         on conflict (round_id, candidate_key) do nothing",
    )
    .bind(EvaluationId::new().to_string())
    .bind(round.to_string())
    .bind(job.kind().as_str())
    .bind(job.key().0.to_string())
    .bind(terms)
    .bind(sets.as_str())
    .bind(sets.scope_word())
    .bind(subject)
    .bind(shard)
    .bind(i64::from(steps))
    .bind(purpose)
    .bind(now.0)
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Finds an evaluation.
pub async fn evaluation_get(tx: &mut Tx, id: EvaluationId) -> Result<Option<Evaluation>, Error> {
    let row = sqlx::query(select("where id = $1"))
        .bind(id.to_string())
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(Evaluation::try_from).transpose()
}

/// Finds a job by its name: a candidate's score, or any other.
pub async fn evaluation_of(
    tx: &mut Tx,
    round: RoundId,
    key: CandidateKey,
) -> Result<Option<Evaluation>, Error> {
    let row = sqlx::query(select("where round_id = $1 and candidate_key = $2"))
        .bind(round.to_string())
        .bind(key.0.to_string())
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(Evaluation::try_from).transpose()
}

/// The next evaluation to hand out: oldest first, those that failed before last; one that another
/// transaction is about to move is passed over.
pub async fn evaluation_claimable(tx: &mut Tx) -> Result<Option<Evaluation>, Error> {
    let held = tx.hold(Hold::Free, "evaluations");
    let sql = format!(
        "where state = 'open' and round_id in \
         (select id from rounds where state in ('training', 'judging')) \
         order by failures, created_ms, id limit 1{held}"
    );
    let row = sqlx::query(select(&sql)).fetch_optional(tx.conn()).await?;
    row.as_ref().map(Evaluation::try_from).transpose()
}

/// Moves an evaluation on. False: it was no longer as it was.
pub async fn evaluation_move(
    tx: &mut Tx,
    from: &Evaluation,
    to: State,
    generation: Generation,
    failures: u64,
) -> Result<bool, Error> {
    let done = sqlx::query(
        "update evaluations set state = $1, generation = $2, failures = $3 \
         where id = $4 and state = $5 and generation = $6",
    )
    .bind(to.as_str())
    .bind(signed(generation.0))
    .bind(signed(failures))
    .bind(from.id.to_string())
    .bind(from.state.as_str())
    .bind(signed(from.generation.0))
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Stores the result of a score. False: the evaluation was no longer as it was.
pub async fn evaluation_finish(
    tx: &mut Tx,
    from: &Evaluation,
    result: &EvalResult,
    evaluator: WorkerId,
    now: Timestamp,
) -> Result<bool, Error> {
    let extra = serde_json::to_string(&result.extra)
        .map_err(|error| Error::internal("write an evaluation's scores", error))?;
    let done = sqlx::query(
        "update evaluations set state = 'done', gate_loss = $1, audit_loss = $2, \
         gate_scores = $3, audit_scores = $4, extra_scores = $5, evaluator_id = $6, done_ms = $7 \
         where id = $8 and state = $9 and generation = $10",
    )
    .bind(result.gate_loss)
    .bind(Double(result.audit_loss))
    .bind(result.gate_scores.to_string())
    .bind(result.audit_scores.map(|digest| digest.to_string()))
    .bind(extra)
    .bind(evaluator.to_string())
    .bind(now.0)
    .bind(from.id.to_string())
    .bind(from.state.as_str())
    .bind(signed(from.generation.0))
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Stores what came of a job that is no score. False: it was no longer as it was.
pub async fn evaluation_found(
    tx: &mut Tx,
    from: &Evaluation,
    findings: &Findings,
    evaluator: WorkerId,
    now: Timestamp,
) -> Result<bool, Error> {
    let findings = serde_json::to_string(findings)
        .map_err(|error| Error::internal("write an evaluation's findings", error))?;
    let done = sqlx::query(
        "update evaluations set state = 'done', findings = $1, evaluator_id = $2, done_ms = $3 \
         where id = $4 and state = $5 and generation = $6",
    )
    .bind(findings)
    .bind(evaluator.to_string())
    .bind(now.0)
    .bind(from.id.to_string())
    .bind(from.state.as_str())
    .bind(signed(from.generation.0))
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// A round's evaluations that have ended, with a result or without.
pub async fn evaluation_ended(tx: &mut Tx, round: RoundId) -> Result<Vec<Evaluation>, Error> {
    let rows = sqlx::query(select(
        "where round_id = $1 and state in ('done', 'failed') order by created_ms, id",
    ))
    .bind(round.to_string())
    .fetch_all(tx.conn())
    .await?;
    rows.iter().map(Evaluation::try_from).collect()
}

/// Cancels what nobody needs any more: the round is over.
pub async fn evaluation_cancel(tx: &mut Tx, round: RoundId) -> Result<(), Error> {
    sqlx::query(
        "update evaluations set state = 'cancelled' \
         where round_id = $1 and state in ('open', 'leased')",
    )
    .bind(round.to_string())
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Cancels one job that nobody needs any more, unless somebody is at it: that one may finish.
pub async fn evaluation_cancel_job(
    tx: &mut Tx,
    round: RoundId,
    key: CandidateKey,
) -> Result<(), Error> {
    sqlx::query(
        "update evaluations set state = 'cancelled' \
         where round_id = $1 and candidate_key = $2 and state = 'open'",
    )
    .bind(round.to_string())
    .bind(key.0.to_string())
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Counts a round's evaluations.
pub async fn evaluation_count(tx: &mut Tx, round: RoundId) -> Result<EvaluationCounts, Error> {
    let counts = sqlx::query(
        "select count(case when state in ('done', 'failed') then 1 end) as ended, \
         count(case when state in ('open', 'leased') then 1 end) as waiting \
         from evaluations where round_id = $1",
    )
    .bind(round.to_string())
    .fetch_one(tx.conn())
    .await?;
    let current = sqlx::query(
        "select purpose from evaluations where round_id = $1 and state in ('open', 'leased') \
         order by case when state = 'leased' then 0 else 1 end, created_ms, id limit 1",
    )
    .bind(round.to_string())
    .fetch_optional(tx.conn())
    .await?;
    Ok(EvaluationCounts {
        ended: unsigned(&counts, "evaluations", "ended")?,
        open: unsigned(&counts, "evaluations", "waiting")?,
        current: current.map_or_else(|| Ok(String::new()), |row| column(&row, "purpose"))?,
    })
}

impl TryFrom<&AnyRow> for Evaluation {
    type Error = Error;

    fn try_from(row: &AnyRow) -> Result<Self, Error> {
        let id: EvaluationId = parsed(row, "evaluations", "id")?;
        let kind: Kind = parsed(row, "evaluations", "kind")?;
        let state: State = parsed(row, "evaluations", "state")?;
        let done = state == State::Done;
        let findings: Option<String> = column(row, "findings")?;
        let findings = findings.map(|json| {
            serde_json::from_str(&json)
                .map_err(|_| Error::inconsistent("evaluations", "findings", id))
        });
        Ok(Self {
            id,
            round: parsed(row, "evaluations", "round_id")?,
            job: job(row, id, kind)?,
            key: CandidateKey(parsed(row, "evaluations", "candidate_key")?),
            state,
            generation: Generation(unsigned(row, "evaluations", "generation")?),
            failures: unsigned(row, "evaluations", "failures")?,
            result: (done && kind == Kind::Score)
                .then(|| result(row, id))
                .transpose()?,
            findings: findings.transpose()?,
        })
    }
}

fn job(row: &AnyRow, id: EvaluationId, kind: Kind) -> Result<Job, Error> {
    let terms: String = column(row, "candidate")?;
    let terms: Vec<Term> = serde_json::from_str(&terms)
        .map_err(|_| Error::inconsistent("evaluations", "candidate", id))?;
    let (sets, scope): (String, String) = (column(row, "sets")?, column(row, "scope")?);
    let sets =
        Sets::parse(&sets, &scope).map_err(|_| Error::inconsistent("evaluations", "sets", id))?;
    let candidate = Candidate::stack(terms, sets);
    Ok(match kind {
        Kind::Score => Job::Score(candidate),
        Kind::Guide => Job::Guide {
            shard: position(row, "evaluations", "shard")?,
        },
        Kind::Replay => Job::Replay {
            submission: parsed(row, "evaluations", "subject")?,
        },
        Kind::Learn => Job::Learn {
            candidate,
            steps: position(row, "evaluations", "steps")?,
        },
    })
}

fn result(row: &AnyRow, id: EvaluationId) -> Result<EvalResult, Error> {
    let audit: Option<String> = column(row, "audit_scores")?;
    let audit = audit.map(|text| {
        text.parse()
            .map_err(|_| Error::inconsistent("evaluations", "audit_scores", &text))
    });
    let extra: String = column(row, "extra_scores")?;
    Ok(EvalResult {
        gate_loss: column(row, "gate_loss")?,
        audit_loss: column(row, "audit_loss")?,
        gate_scores: parsed(row, "evaluations", "gate_scores")?,
        audit_scores: audit.transpose()?,
        extra: serde_json::from_str(&extra)
            .map_err(|_| Error::inconsistent("evaluations", "extra_scores", id))?,
    })
}

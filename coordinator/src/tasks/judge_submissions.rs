//! Submissions are checked in order of cost: structure and numbers, norm, then the gate. The first
//! failure ends it with a reason the volunteer can read.
use std::collections::BTreeMap;
use std::collections::btree_map::Entry;

use cairn_proto::reason::{ErrorReason, VerdictReason};
use cairn_stack::adapter::WEIGHTS_FILE;
use cairn_stack::algebra;
use cairn_stack::check::{RejectCode, check_adapter};
use serde_json::{Map, Value, json};
use tracing::info;

use super::Done;
use crate::app::App;
use crate::carry::adapter_spec;
use crate::db::evaluations::{EvalResult, Evaluation, evaluation_of, evaluation_open};
use crate::db::models::{Folder, checkpoint_files};
use crate::db::rounds::Round;
use crate::db::shards::{
    ShardCounts, shard_count, shard_failure_count, shard_failure_insert, shard_get, shard_move,
};
use crate::db::strikes::strike_insert;
use crate::db::submissions::{
    Findings, Submission, submission_in, submission_is_copy, submission_move, submission_norms,
};
use crate::domain::candidate::Candidate;
use crate::domain::evaluation;
use crate::domain::stacker::Request;
use crate::domain::statistics::Scores;
use crate::domain::submission::{Progress, Score, State};
use crate::domain::verdict::{GateVerdict, NormVerdict, gate_z, judge_gate, judge_norm};
use crate::domain::{credit, round, shard};
use crate::error::Error;
use crate::ids::RoundId;
use crate::ops::claim_work::round_of;
use crate::ops::create_round::{base_of, model_config, sets_of};
use crate::ops::submit_scores::scores_of;

/// Submissions looked at in one pass: each costs one file's reading.
const BATCH: u32 = 64;

/// One batch of each kind.
///
/// # Errors
/// When the database or the store fails; nothing is decided then.
pub async fn run(app: &App) -> Result<Done, Error> {
    let mut tx = app.db.read().await?;
    let received = submission_in(&mut tx, State::Received, BATCH).await?;
    let evaluating = submission_in(&mut tx, State::Evaluating, u32::MAX).await?;
    drop(tx);
    let mut moved = false;
    for submission in &received {
        moved |= match submission.norm {
            None => measure(app, submission).await?,
            Some(norm) => admit(app, submission, norm).await?,
        };
    }
    let mut gates = BTreeMap::new();
    for submission in &evaluating {
        moved |= decide(app, submission, &mut gates).await?;
    }
    if moved {
        app.wake.all();
    }
    Ok(if moved { Done::Part } else { Done::All })
}

/// The cheap checks.
async fn measure(app: &App, submission: &Submission) -> Result<bool, Error> {
    let mut tx = app.db.read().await?;
    let round = round_of(&mut tx, submission.round).await?;
    let files = checkpoint_files(
        &mut tx,
        &round.model,
        round.base_revision,
        Folder::Checkpoint,
    )
    .await?;
    let is_copy = submission_is_copy(&mut tx, submission).await?;
    drop(tx);
    if is_copy {
        let text = "the very same file was handed in before in this round";
        return reject(
            app,
            submission,
            VerdictReason::CopyOfAnother,
            text,
            Findings::default(),
        )
        .await;
    }
    let config = model_config(app, &files).await?;
    let spec = adapter_spec(&config, &round.file.recipe, round.carry.is_some());
    let scratch = app.scratch_folder("judge-")?;
    let path = scratch.path().join(WEIGHTS_FILE);
    match app.blobs.materialise(submission.adapter, &path).await {
        Ok(size) if size == submission.adapter_bytes => {}
        Ok(_) => return unreadable(app, submission).await,
        Err(error) => {
            let gone = matches!(
                error.reason(),
                ErrorReason::DigestMismatch | ErrorReason::BlobMissing
            );
            return if gone {
                unreadable(app, submission).await
            } else {
                Err(error)
            };
        }
    }
    let config = submission.adapter_config.clone().into_bytes();
    let checked = tokio::task::spawn_blocking(move || {
        let adapter = check_adapter(&path, &config, &spec)?;
        Ok(algebra::norm(&adapter))
    })
    .await?;
    drop(scratch);
    match checked {
        Ok(norm) => {
            let norm = norm.map_err(|error| Error::internal("measure an adapter", error))?;
            let to = submission.progress.clone().measure(norm);
            move_on(app, submission, to, Findings::default()).await
        }
        Err(refusal) => {
            let refusal: cairn_stack::check::AdapterReject = refusal;
            match reason_of(refusal.code) {
                Some(reason) => {
                    reject(app, submission, reason, &refusal.text, Findings::default()).await
                }
                None => Err(Error::internal("check an adapter", refusal)),
            }
        }
    }
}

/// The word for a broken rule; nothing when the check itself failed.
const fn reason_of(code: RejectCode) -> Option<VerdictReason> {
    Some(match code {
        RejectCode::BadHeader => VerdictReason::BadHeader,
        RejectCode::WrongTensors => VerdictReason::WrongTensors,
        RejectCode::WrongShape => VerdictReason::WrongShape,
        RejectCode::WrongDtype => VerdictReason::WrongDtype,
        RejectCode::BadConfig | RejectCode::ConfigMismatch => VerdictReason::ConfigMismatch,
        RejectCode::NotFinite => VerdictReason::NotFinite,
        RejectCode::ZeroDelta => VerdictReason::ZeroDelta,
        RejectCode::StorageFault => return None,
    })
}

/// Our fault, not the volunteer's: the shard is done again, and nobody has failed on it.
async fn unreadable(app: &App, submission: &Submission) -> Result<bool, Error> {
    let text = "the coordinator can no longer read the adapter it acknowledged; this is its fault";
    reject(
        app,
        submission,
        VerdictReason::Unreadable,
        text,
        Findings::default(),
    )
    .await
}

/// The norm against its cohort; then the evaluation is opened.
async fn admit(app: &App, submission: &Submission, norm: f64) -> Result<bool, Error> {
    let mut tx = app.db.read().await?;
    let round = round_of(&mut tx, submission.round).await?;
    let cohort = submission_norms(&mut tx, round.id).await?;
    let ShardCounts { unfinished, .. } = shard_count(&mut tx, round.id).await?;
    drop(tx);
    let complete = unfinished == 0 || round.phase.state() != round::State::Training;
    let z = match judge_norm(norm, &cohort, complete, &round.file.policy) {
        NormVerdict::Hold(_) => return Ok(false),
        NormVerdict::Outlier(z) => {
            let evidence = evidence([("norm_z", json!(z)), ("cohort", json!(cohort.len()))]);
            let findings = Findings {
                evidence,
                ..Findings::default()
            };
            let size = if z > 0.0 { "larger" } else { "smaller" };
            let text = format!("the adapter's change is far {size} than the others' of this round");
            return reject(app, submission, VerdictReason::NormOutlier, &text, findings).await;
        }
        NormVerdict::Pass(z) => z,
    };
    let to = submission.progress.clone().evaluate();
    let to = to.map_err(|error| Error::internal("open an evaluation", error))?;
    let request = Request {
        candidate: Candidate::single(submission.id, sets_of(&round.file.policy)),
        purpose: format!("shard {} by {}", submission.shard, submission.worker_name),
    };
    let findings = Findings {
        evidence: evidence([("norm_z", json!(z))]),
        ..Findings::default()
    };
    let mut tx = app.db.begin().await?;
    if !submission_move(&mut tx, submission.id, State::Received, &to, &findings).await? {
        return Ok(true);
    }
    evaluation_open(&mut tx, round.id, &request, app.clock.now_ms()).await?;
    tx.commit().await?;
    Ok(true)
}

/// What a round's submissions are compared with, read once a pass.
struct Gate {
    round: Round,
    /// The base's scores; nothing while it has not been evaluated.
    base: Option<Scores>,
}

/// The gate: paired against the base.
async fn decide(
    app: &App,
    submission: &Submission,
    gates: &mut BTreeMap<RoundId, Gate>,
) -> Result<bool, Error> {
    let gate = match gates.entry(submission.round) {
        Entry::Occupied(known) => known.into_mut(),
        Entry::Vacant(place) => place.insert(open_gate(app, submission.round).await?),
    };
    let Gate {
        round,
        base: Some(base),
    } = &*gate
    else {
        return Ok(false);
    };
    let candidate = Candidate::single(submission.id, sets_of(&round.file.policy));
    let mut tx = app.db.read().await?;
    let found = evaluation_of(&mut tx, round.id, candidate.key()).await?;
    drop(tx);
    let Some(found) = found else { return Ok(false) };
    if found.state == evaluation::State::Failed {
        let text = "the model with this adapter could not be evaluated to finite losses";
        return reject(
            app,
            submission,
            VerdictReason::NoGain,
            text,
            Findings::default(),
        )
        .await;
    }
    let Evaluation {
        result: Some(result),
        ..
    } = found
    else {
        return Ok(false);
    };
    judge(app, submission, round, base, &result).await
}

async fn open_gate(app: &App, id: RoundId) -> Result<Gate, Error> {
    let mut tx = app.db.read().await?;
    let round = round_of(&mut tx, id).await?;
    let base = base_of(&round.file.policy);
    let found = evaluation_of(&mut tx, id, base.key()).await?;
    drop(tx);
    let base = match found.and_then(|evaluation| evaluation.result) {
        Some(result) => Some(scores_of(app, result.gate_scores).await?),
        None => None,
    };
    Ok(Gate { round, base })
}

async fn judge(
    app: &App,
    submission: &Submission,
    round: &Round,
    base: &Scores,
    result: &EvalResult,
) -> Result<bool, Error> {
    let scores = scores_of(app, result.gate_scores).await?;
    let z = gate_z(&round.file.policy, round.file.shards);
    let verdict = judge_gate(base, &scores, z)
        .map_err(|error| Error::internal("compare an evaluation with the base's", error))?;
    let (GateVerdict::Accept(paired) | GateVerdict::NoGain(paired)) = verdict;
    let score = Score {
        gate_loss: result.gate_loss,
        audit_loss: result.audit_loss,
        paired,
    };
    let mut findings = Findings {
        evidence: evidence([
            ("gain", json!(paired.gain)),
            ("gain_se", json!(paired.se)),
            ("records", json!(paired.records)),
            ("z", json!(z)),
        ]),
        score: Some(score),
        ..Findings::default()
    };
    match verdict {
        GateVerdict::Accept(_) => {
            let mut tx = app.db.read().await?;
            let row = shard_get(&mut tx, round.id, submission.shard).await?;
            drop(tx);
            let records = row.map_or(0, |row| row.records);
            findings.credit_tokens =
                credit::tokens(submission.numbers.tokens, records, &round.file.recipe);
            let to = submission
                .progress
                .clone()
                .accept(score, app.clock.now_ms());
            move_on(app, submission, to, findings).await
        }
        GateVerdict::NoGain(_) => {
            let text = if paired.gain > 0.0 {
                "the gate loss fell by less than chance alone could explain"
            } else {
                "the gate loss did not fall"
            };
            reject(app, submission, VerdictReason::NoGain, text, findings).await
        }
    }
}

async fn reject(
    app: &App,
    submission: &Submission,
    reason: VerdictReason,
    text: &str,
    findings: Findings,
) -> Result<bool, Error> {
    let to = submission
        .progress
        .clone()
        .reject(reason, text.to_owned(), app.clock.now_ms());
    move_on(app, submission, to, findings).await
}

/// Stores a move and what it means for the shard. Always true: whether we or somebody else did it,
/// things are no longer as they were.
async fn move_on(
    app: &App,
    submission: &Submission,
    to: Result<Progress, crate::domain::InvalidTransition>,
    findings: Findings,
) -> Result<bool, Error> {
    let to = to.map_err(|error| Error::internal("judge a submission", error))?;
    let mut tx = app.db.begin().await?;
    let from = submission.progress.state();
    if !submission_move(&mut tx, submission.id, from, &to, &findings).await? {
        return Ok(true);
    }
    if let Progress::Rejected { reason, at, .. } = &to
        && reason.is_strike()
    {
        strike_insert(&mut tx, submission.id, submission.worker, *reason, *at).await?;
    }
    if let Some(row) = shard_get(&mut tx, submission.round, submission.shard).await?
        && row.shard.state == shard::State::Submitted
    {
        let next = match &to {
            Progress::Received { .. } | Progress::Evaluating { .. } => Ok(row.shard),
            Progress::Accepted { .. } => row.shard.accept(),
            Progress::Rejected { reason, at, .. } => {
                let (round, position) = (submission.round, submission.shard);
                let failures = if *reason == VerdictReason::Unreadable {
                    shard_failure_count(&mut tx, round, position).await?
                } else {
                    let (worker, word) = (submission.worker, reason.as_str());
                    shard_failure_insert(&mut tx, round, position, worker, word, *at).await?
                };
                row.shard.reopen(failures)
            }
        };
        let next = next.map_err(|error| Error::internal("move a shard", error))?;
        shard_move(&mut tx, submission.round, submission.shard, row.shard, next).await?;
    }
    tx.commit().await?;
    if let Progress::Accepted { .. } | Progress::Rejected { .. } = &to {
        let word = match &to {
            Progress::Rejected { reason, .. } => reason.as_str(),
            _ => "accepted",
        };
        info!(
            submission.id = %submission.id, round.id = %submission.round,
            "shard {} by {}: {word}", submission.shard, submission.worker_name
        );
    }
    Ok(true)
}

fn evidence<const N: usize>(facts: [(&str, Value); N]) -> Map<String, Value> {
    facts
        .into_iter()
        .map(|(name, value)| (name.to_owned(), value))
        .collect()
}

//! Rounds move on: training ends, the aggregate is chosen step by step, or the round fails.
use std::collections::BTreeMap;

use tracing::{info, warn};

use super::Done;
use crate::app::App;
use crate::db::evaluations::{evaluation_ended, evaluation_open};
use crate::db::leases::lease_close_training;
use crate::db::rounds::{Round, round_in, round_move};
use crate::db::shards::{shard_close, shard_count, shard_list};
use crate::db::submissions::{submission_count, submission_list};
use crate::domain::evaluation;
use crate::domain::round::{FailReason, Phase, State};
use crate::domain::stacker::{Accepted, Facts, Next, Outcome, Request, next};
use crate::domain::submission::Progress;
use crate::domain::verdict::gate_z;
use crate::error::Error;
use crate::ops::abort_round::round_end;
use crate::ops::create_round::{base_of, sets_of};
use crate::ops::submit_scores::scores_of;

/// Rounds looked at in one pass: one a model runs at a time.
const ROUNDS_MAX: u32 = 1_000;

/// One step of every round that can make one.
///
/// # Errors
/// When the database or the store fails; the same step is made again then.
pub async fn run(app: &App) -> Result<Done, Error> {
    let mut tx = app.db.read().await?;
    let training = round_in(&mut tx, State::Training, ROUNDS_MAX).await?;
    let judging = round_in(&mut tx, State::Judging, ROUNDS_MAX).await?;
    drop(tx);
    let mut moved = false;
    for round in &training {
        moved |= close_training(app, round).await?;
    }
    for round in &judging {
        moved |= choose(app, round).await?;
    }
    if moved {
        app.wake.all();
    }
    Ok(if moved { Done::Part } else { Done::All })
}

/// Training ends when no shard is left to train and all is judged, or at the deadline.
async fn close_training(app: &App, round: &Round) -> Result<bool, Error> {
    let now = app.clock.now_ms();
    let mut tx = app.db.read().await?;
    let base = base_of(&round.file.policy).key();
    let ended = evaluation_ended(&mut tx, round.id).await?;
    let base_failed = ended
        .iter()
        .any(|e| e.key == base && e.state == evaluation::State::Failed);
    let unfinished = shard_count(&mut tx, round.id).await?.unfinished;
    let (pending, _) = submission_count(&mut tx, round.id).await?;
    drop(tx);
    if base_failed {
        return fail(app, round, FailReason::EvaluationFailed).await;
    }
    let over = now >= round.deadline;
    if !over && (unfinished > 0 || pending > 0) {
        return Ok(false);
    }
    let to = round.phase.clone().judge();
    let to = to.map_err(|error| Error::internal("close training", error))?;
    let mut tx = app.db.begin().await?;
    // Looked at again under the write lock: a submission may have come in.
    let pending_now = submission_count(&mut tx, round.id).await?.0;
    if !over && pending_now > 0 {
        return Ok(true);
    }
    if !round_move(&mut tx, round.id, State::Training, &to).await? {
        return Ok(true);
    }
    // Whoever is still training keeps it to themselves; what was acknowledged is still judged.
    lease_close_training(&mut tx, round.id).await?;
    shard_close(&mut tx, round.id).await?;
    tx.commit().await?;
    info!(round.id = %round.id, "round {} is judged, {unfinished} shards unfinished", round.id);
    Ok(true)
}

async fn choose(app: &App, round: &Round) -> Result<bool, Error> {
    let mut tx = app.db.read().await?;
    let (pending, total) = submission_count(&mut tx, round.id).await?;
    drop(tx);
    if pending > 0 {
        // Unless the base cannot be evaluated: then nobody will ever be judged.
        let facts = facts(app, round).await?;
        let base = facts.ended.get(&base_of(&round.file.policy).key());
        return match base {
            Some(Outcome::Failed) => fail(app, round, FailReason::EvaluationFailed).await,
            _ => Ok(false),
        };
    }
    let facts = facts(app, round).await?;
    if facts.accepted.is_empty() {
        let reason = if total == 0 {
            FailReason::NoSubmissions
        } else {
            FailReason::NoAccepted
        };
        return fail(app, round, reason).await;
    }
    match next(&facts) {
        Next::Evaluate(wanted) => open(app, round, &wanted).await,
        Next::Nothing(reason) => fail(app, round, reason).await,
        Next::Choose(choice) => {
            info!(
                round.id = %round.id,
                "round {}: {} contributions at {} times, gate loss {:.5} -> {:.5}",
                round.id, choice.terms.len(), choice.lambda, choice.gate_before, choice.gate_after
            );
            let to = round.phase.clone().choose(choice);
            let to = to.map_err(|error| Error::internal("choose a stack", error))?;
            let mut tx = app.db.begin().await?;
            round_move(&mut tx, round.id, State::Judging, &to).await?;
            tx.commit().await?;
            Ok(true)
        }
    }
}

async fn open(app: &App, round: &Round, wanted: &[Request]) -> Result<bool, Error> {
    let now = app.clock.now_ms();
    let mut tx = app.db.begin().await?;
    let mut opened = false;
    for request in wanted {
        opened |= evaluation_open(&mut tx, round.id, request, now).await?;
    }
    if opened {
        tx.commit().await?;
    }
    Ok(opened)
}

async fn fail(app: &App, round: &Round, reason: FailReason) -> Result<bool, Error> {
    let now = app.clock.now_ms();
    let from = round.phase.state();
    let to = round.phase.clone().fail(reason, now);
    let to: Phase = to.map_err(|error| Error::internal("fail a round", error))?;
    let mut tx = app.db.begin().await?;
    if round_end(&mut tx, round.id, from, &to, now).await? {
        tx.commit().await?;
        warn!(round.id = %round.id, "round {} publishes nothing: {reason}", round.id);
    }
    Ok(true)
}

/// All that decides, read from the rows and the stored losses.
async fn facts(app: &App, round: &Round) -> Result<Facts, Error> {
    let policy = &round.file.policy;
    let mut tx = app.db.read().await?;
    let shard_bytes: BTreeMap<u32, u64> = shard_list(&mut tx, round.id)
        .await?
        .iter()
        .map(|row| (row.position, row.bytes))
        .collect();
    let submissions = submission_list(&mut tx, round.id, u32::MAX).await?;
    let evaluations = evaluation_ended(&mut tx, round.id).await?;
    drop(tx);
    let accepted = submissions
        .iter()
        .filter_map(|submission| match &submission.progress {
            Progress::Accepted { norm, score, .. } => Some(Accepted {
                submission: submission.id,
                gain: score.paired.gain,
                shard_bytes: shard_bytes.get(&submission.shard).copied().unwrap_or(0),
                norm: *norm,
            }),
            _ => None,
        });
    let accepted = accepted.collect();
    let mut ended = BTreeMap::new();
    for evaluation in evaluations {
        let outcome = match evaluation.result {
            None => Outcome::Failed,
            Some(result) => Outcome::Done {
                gate: scores_of(app, result.gate_scores).await?,
                audit_loss: result.audit_loss,
            },
        };
        ended.insert(evaluation.key, outcome);
    }
    Ok(Facts {
        accepted,
        ended,
        sets: sets_of(policy),
        gate_z: gate_z(policy, round.file.shards),
    })
}

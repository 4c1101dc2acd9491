//! Rounds move on: training ends, the aggregate is chosen step by step, or the round fails.
mod facts;

use std::time::Duration;

use tracing::{info, warn};

use super::Done;
use crate::app::App;
use crate::clock::Timestamp;
use crate::db::Tx;
use crate::db::evaluations::{evaluation_open, evaluation_open_job};
use crate::db::leases::lease_close_training;
use crate::db::outcomes::{Activity, evaluator_activity, outcome_of};
use crate::db::rounds::{Round, round_in, round_move};
use crate::db::shards::{shard_close, shard_count};
use crate::db::submissions::submission_count;
use crate::domain::evaluation::Job;
use crate::domain::round::{FailReason, Phase, State};
use crate::domain::stacker::{Choice, Next, Outcome, Request, base_candidate};
use crate::error::Error;
use crate::ids::RoundId;
use crate::limits::JUDGING_WAIT_MIN;
use crate::ops::abort_round::round_end;
use facts::next_of;

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
    let ids: Vec<RoundId> = judging.iter().map(|round| round.id).collect();
    app.compared.keep(&ids);
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
    let base_failed = base_failed(&mut tx, round).await?;
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
    if !round_move(&mut tx, round.id, State::Training, &to).await? {
        return Ok(true);
    }
    // Looked at again, now that none can come in: one may have.
    let pending_now = submission_count(&mut tx, round.id).await?.0;
    if !over && pending_now > 0 {
        return Ok(true);
    }
    // Whoever is still training keeps it to themselves; what was acknowledged is still judged.
    lease_close_training(&mut tx, round.id).await?;
    shard_close(&mut tx, round.id).await?;
    tx.commit().await?;
    info!(round.id = %round.id, "round {} is judged, {unfinished} shards unfinished", round.id);
    Ok(true)
}

/// Whether the base cannot be evaluated: then nobody will ever be judged.
async fn base_failed(tx: &mut Tx, round: &Round) -> Result<bool, Error> {
    let base = base_candidate(round.file.policy.audit.is_some());
    let outcome = outcome_of(tx, round.id, base.key()).await?;
    Ok(matches!(outcome, Some(Outcome::Failed)))
}

async fn choose(app: &App, round: &Round) -> Result<bool, Error> {
    let mut tx = app.db.read().await?;
    let (pending, total) = submission_count(&mut tx, round.id).await?;
    let base_failed = base_failed(&mut tx, round).await?;
    let activity = evaluator_activity(&mut tx, round.id).await?;
    drop(tx);
    if base_failed {
        return fail(app, round, FailReason::EvaluationFailed).await;
    }
    let moved = if pending > 0 {
        false
    } else {
        match next_of(app, round).await? {
            Next::Evaluate(wanted) => open(app, round, &wanted).await?,
            Next::Learn { job, purpose } => learn(app, round, &job, &purpose).await?,
            // What was to be compared has been.
            Next::Compare(_) => false,
            Next::Nothing(FailReason::NoAccepted) if total == 0 => {
                return fail(app, round, FailReason::NoSubmissions).await;
            }
            Next::Nothing(reason) => return fail(app, round, reason).await,
            Next::Choose(choice) => return fold(app, round, choice).await,
        }
    };
    if !moved && is_overdue(round, activity, app.clock.now_ms()) {
        return fail(app, round, FailReason::JudgingOverdue).await;
    }
    Ok(moved)
}

/// Whether nobody has evaluated anything for so long that nobody will: see [`JUDGING_WAIT_MIN`].
fn is_overdue(round: &Round, activity: Activity, now: Timestamp) -> bool {
    let wait = Duration::from_millis(round.file.policy.deadline_ms).max(JUDGING_WAIT_MIN);
    let since = activity
        .answered
        .unwrap_or(round.deadline)
        .max(round.deadline);
    !activity.working && now >= since.plus(wait)
}

async fn fold(app: &App, round: &Round, choice: Choice) -> Result<bool, Error> {
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

async fn learn(app: &App, round: &Round, job: &Job, purpose: &str) -> Result<bool, Error> {
    let mut tx = app.db.begin().await?;
    let opened = evaluation_open_job(&mut tx, round.id, job, purpose, app.clock.now_ms()).await?;
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

//! What comes of a rule is stored: a submission's move, and what that means for its shard, in one
//! transaction.
use cairn_proto::reason::VerdictReason;
use tracing::info;

use super::admit::candidate_of;
use crate::app::App;
use crate::db::Tx;
use crate::db::evaluations::evaluation_cancel_job;
use crate::db::shards::{shard_failure_count, shard_failure_insert, shard_get, shard_move};
use crate::db::submissions::{Findings, Submission, submission_move};
use crate::domain::cohort::Ruling;
use crate::domain::evaluation::Job;
use crate::domain::evidence::Evidence;
use crate::domain::submission::{Progress, Score};
use crate::domain::{InvalidTransition, shard};
use crate::error::Error;
use crate::ops::claim_work::round_of;

/// Ends the judging of a submission for now, unless the ruling lets it pass: says whether things have
/// moved.
pub(super) async fn settle(
    app: &App,
    submission: &Submission,
    evidence: &Evidence,
    score: Option<Score>,
    ruling: Ruling,
) -> Result<Option<bool>, Error> {
    match ruling {
        Ruling::Pass => Ok(None),
        Ruling::Wait => Ok(Some(false)),
        Ruling::Reject(reason, text) => {
            let findings = Findings {
                evidence: Some(evidence.clone()),
                score,
                ..Findings::default()
            };
            reject(app, submission, reason, &text, findings)
                .await
                .map(Some)
        }
    }
}

/// Our fault, not the volunteer's: the shard is done again, and nobody has failed on it.
pub(super) async fn unreadable(app: &App, submission: &Submission) -> Result<bool, Error> {
    let text = "the coordinator can no longer read the adapter it acknowledged; this is its fault, \
                and nothing is held against you";
    let findings = Findings::default();
    reject(app, submission, VerdictReason::Unreadable, text, findings).await
}

/// It does not count, for this reason.
pub(super) async fn reject(
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
pub(super) async fn move_on(
    app: &App,
    submission: &Submission,
    to: Result<Progress, InvalidTransition>,
    findings: Findings,
) -> Result<bool, Error> {
    let to = to.map_err(|error| Error::internal("judge a submission", error))?;
    let mut tx = app.db.begin().await?;
    let from = submission.progress.state();
    if !submission_move(&mut tx, submission.id, from, &to, &findings).await? {
        return Ok(true);
    }
    move_shard(&mut tx, submission, &to).await?;
    if let Progress::Rejected { .. } = &to {
        cancel_jobs(app, &mut tx, submission).await?;
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

/// Nobody needs to evaluate or replay what has been rejected.
async fn cancel_jobs(app: &App, tx: &mut Tx, submission: &Submission) -> Result<(), Error> {
    let round = round_of(tx, submission.round).await?;
    let jobs = [
        Job::Score(candidate_of(app, submission, &round.file)),
        Job::Replay {
            submission: submission.id,
        },
    ];
    for job in jobs {
        evaluation_cancel_job(tx, round.id, job.key()).await?;
    }
    Ok(())
}

/// The shard is done with what is accepted, and open again after what is rejected.
async fn move_shard(tx: &mut Tx, submission: &Submission, to: &Progress) -> Result<(), Error> {
    let (round, position) = (submission.round, submission.shard);
    if submission.late {
        // The shard is another's.
        return Ok(());
    }
    let Some(row) = shard_get(tx, round, position).await? else {
        return Ok(());
    };
    if row.shard.state != shard::State::Submitted {
        return Ok(());
    }
    let next = match to {
        Progress::Received { .. } | Progress::Evaluating { .. } => return Ok(()),
        Progress::Accepted { .. } => row.shard.accept(),
        Progress::Rejected { reason, at, .. } => {
            let failures = if *reason == VerdictReason::Unreadable {
                shard_failure_count(tx, round, position).await?
            } else {
                let (worker, word) = (submission.worker, reason.as_str());
                shard_failure_insert(tx, round, position, worker, word, *at).await?
            };
            row.shard.reopen(failures)
        }
    };
    let next = next.map_err(|error| Error::internal("move a shard", error))?;
    shard_move(tx, round, position, row.shard, next).await?;
    Ok(())
}

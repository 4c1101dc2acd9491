//! A maintainer takes a contribution back: it is stacked no more, and on request every checkpoint
//! that contains it is folded again without it.
use cairn_proto::limits::DETAIL_CHARS_MAX;
use cairn_proto::reason::{ErrorReason, VerdictReason};
use tracing::warn;

use crate::app::App;
use crate::caller::{Caller, Role};
use crate::clock::Timestamp;
use crate::db::Tx;
use crate::db::log::log_hold;
use crate::db::receipts::receipt_unsealed_of;
use crate::db::revocations::{
    refold_insert, refold_list, revocation_by_request, revocation_get, revocation_insert,
};
use crate::db::rounds::{Round, round_active, round_get};
use crate::db::shards::{shard_failure_insert, shard_get, shard_move};
use crate::db::submissions::{Submission, submission_get};
use crate::domain::round::{FailReason, State};
use crate::domain::shard;
use crate::domain::submission::State as Verdict;
use crate::error::Error;
use crate::ids::{RequestId, SubmissionId};
use crate::ops::abort_round::round_end;
use crate::ops::read_contributions::{RevocationView, view_of};
use crate::tasks::seal_verdicts::seal_in;

/// What is asked for.
#[derive(Debug, Clone)]
pub struct NewRevocation {
    /// The submission.
    pub id: SubmissionId,
    /// Why; everybody can read it.
    pub reason: String,
    /// Whether the checkpoints that contain it are folded again.
    pub refold: bool,
    /// The caller's request.
    pub request: RequestId,
}

/// Revokes an accepted contribution. One that is revoked already is returned as it is; asked for
/// with `refold`, its checkpoints are folded again where they have not been.
///
/// # Errors
/// NOT_FOUND; PRECONDITION_FAILED unless it was accepted; INVALID_ARGUMENT without a reason;
/// REQUEST_ID_REUSED.
pub async fn revoke_contribution(
    app: &App,
    caller: &Caller,
    new: NewRevocation,
) -> Result<RevocationView, Error> {
    caller.require(Role::Maintainer)?;
    let reason = check_reason(&new.reason)?;
    let now = app.clock.now_ms();
    let mut tx = app.db.begin().await?;
    let not_found = || Error::not_found("contribution", new.id);
    let submission = submission_get(&mut tx, new.id).await?;
    let round = submission.ok_or_else(not_found)?.round;
    let round = round_get(&mut tx, round).await?.ok_or_else(not_found)?;
    // Holds the model's row: no checkpoint of it is published until this is committed.
    let active = round_active(&mut tx, &round.model).await?;
    log_hold(&mut tx).await?;
    if let Some(first) = revocation_by_request(&mut tx, new.request).await?
        && first.submission != new.id
    {
        let reason = ErrorReason::RequestIdReused;
        return Err(Error::conflict(reason, reason.sentence()));
    }
    if revocation_get(&mut tx, new.id).await?.is_none() {
        let submission = submission_get(&mut tx, new.id).await?;
        let submission = submission.ok_or_else(not_found)?;
        revoke(app, &mut tx, caller, &submission, &round, &reason, &new).await?;
    }
    if new.refold {
        refold_insert(&mut tx, new.id).await?;
        if let Some(active) = active {
            let active = round_get(&mut tx, active).await?;
            end_round_on_affected(&mut tx, new.id, active, now).await?;
        }
    }
    let revocation = revocation_get(&mut tx, new.id)
        .await?
        .ok_or_else(|| Error::inconsistent("revocations", "submission_id", new.id))?;
    let view = view_of(&mut tx, revocation).await?;
    tx.commit().await?;
    app.wake.all();
    Ok(view)
}

/// A maintainer's reason in one line: at least one character, at most [`DETAIL_CHARS_MAX`].
///
/// # Errors
/// INVALID_ARGUMENT.
pub fn check_reason(text: &str) -> Result<String, Error> {
    let reason: String = text.trim().chars().filter(|c| !c.is_control()).collect();
    if reason.is_empty() {
        return Err(Error::invalid(
            "reason",
            "say why; volunteers and researchers read it",
        ));
    }
    if reason.chars().count() > DETAIL_CHARS_MAX {
        return Err(Error::invalid(
            "reason",
            format!("at most {DETAIL_CHARS_MAX} characters"),
        ));
    }
    Ok(reason)
}

async fn revoke(
    app: &App,
    tx: &mut Tx,
    caller: &Caller,
    submission: &Submission,
    round: &Round,
    reason: &str,
    new: &NewRevocation,
) -> Result<(), Error> {
    let id = submission.id;
    let refused = match submission.progress.state() {
        Verdict::Accepted => None,
        Verdict::Rejected => Some("was rejected; there is nothing to take back"),
        Verdict::Received | Verdict::Evaluating => {
            Some("is still being judged; wait for its verdict, or abort its round")
        }
    };
    if let Some(why) = refused {
        return Err(Error::conflict(
            ErrorReason::PreconditionFailed,
            format!("contribution {id} {why}"),
        ));
    }
    let now = app.clock.now_ms();
    if !revocation_insert(tx, id, reason, caller.worker, new.request, now).await? {
        return Err(Error::unavailable(
            "the contribution has just changed; try again",
        ));
    }
    if round.phase.state() == State::Training {
        train_again(tx, submission, now).await?;
    }
    let unsealed = receipt_unsealed_of(tx, id).await?;
    let unsealed = unsealed.ok_or_else(|| Error::inconsistent("submissions", "state", id))?;
    if !seal_in(app, tx, &unsealed).await? {
        return Err(Error::unavailable(
            "the contribution has just changed; try again",
        ));
    }
    warn!(
        submission.id = %id, round.id = %submission.round,
        "contribution {id} by {} revoked by {}: {reason}", submission.worker_name, caller.name
    );
    Ok(())
}

/// The shard of a round that still trains is open for others.
async fn train_again(tx: &mut Tx, submission: &Submission, now: Timestamp) -> Result<(), Error> {
    let (round, position) = (submission.round, submission.shard);
    let Some(row) = shard_get(tx, round, position).await? else {
        return Ok(());
    };
    if submission.late || row.shard.state != shard::State::Done {
        return Ok(());
    }
    let word = VerdictReason::Revoked.as_str();
    shard_failure_insert(tx, round, position, submission.worker, word, now).await?;
    let next = row.shard.revoke();
    let next = next.map_err(|error| Error::internal("open a shard again", error))?;
    shard_move(tx, round, position, row.shard, next).await?;
    Ok(())
}

/// A round whose base is to be replaced ends now: what it trains and tests is worth something on a
/// base that nobody will use.
async fn end_round_on_affected(
    tx: &mut Tx,
    revoked: SubmissionId,
    round: Option<Round>,
    now: Timestamp,
) -> Result<(), Error> {
    let Some(round) = round else { return Ok(()) };
    let affected = refold_list(tx, revoked).await?;
    let is_base = affected.iter().any(|refold| {
        refold.model == round.model
            && refold.revision == round.base_revision
            && refold.replacement.is_none()
    });
    if !is_base {
        return Ok(());
    }
    let from = round.phase.state();
    let to = round.phase.fail(FailReason::BaseRevoked, now);
    let to = to.map_err(|error| Error::internal("end a round", error))?;
    if !round_end(tx, round.id, from, &to, now).await? {
        return Err(Error::unavailable("the round has just moved on; try again"));
    }
    warn!(round.id = %round.id, "round {} ends: its base contains {revoked}", round.id);
    Ok(())
}

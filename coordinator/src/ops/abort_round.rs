//! A maintainer stops a round. The model stays as it is, whatever the round was doing.
use cairn_proto::limits::DETAIL_CHARS_MAX;
use cairn_proto::reason::ErrorReason;
use tracing::warn;

use crate::app::App;
use crate::caller::{Caller, Role};
use crate::clock::Timestamp;
use crate::db::Tx;
use crate::db::evaluations::evaluation_cancel;
use crate::db::leases::lease_close_all;
use crate::db::rounds::{Round, round_get, round_move};
use crate::db::shards::shard_close;
use crate::db::submissions::submission_close;
use crate::domain::round::{Phase, State};
use crate::error::Error;
use crate::ids::RoundId;

/// Aborts a round. One that is aborted already is returned as it is.
///
/// # Errors
/// NOT_FOUND; PRECONDITION_FAILED when it has ended otherwise.
pub async fn abort_round(
    app: &App,
    caller: &Caller,
    id: RoundId,
    reason: &str,
) -> Result<Round, Error> {
    caller.require(Role::Maintainer)?;
    let reason: String = reason
        .trim()
        .chars()
        .filter(|c| !c.is_control())
        .take(DETAIL_CHARS_MAX)
        .collect();
    let now = app.clock.now_ms();
    let mut tx = app.db.begin().await?;
    let round = round_get(&mut tx, id)
        .await?
        .ok_or_else(|| Error::not_found("round", id))?;
    if round.phase.state() == State::Aborted {
        return Ok(round);
    }
    let from = round.phase.state();
    let to = round
        .phase
        .abort(&reason, now)
        .map_err(|error| Error::conflict(ErrorReason::PreconditionFailed, error.to_string()))?;
    if !round_end(&mut tx, id, from, &to, now).await? {
        return Err(Error::unavailable("the round has just moved on; try again"));
    }
    let round = round_get(&mut tx, id)
        .await?
        .ok_or_else(|| Error::not_found("round", id))?;
    tx.commit().await?;
    app.wake.all();
    warn!(round.id = %id, "round {id} aborted by {}: {}", caller.name, round.reason);
    Ok(round)
}

/// Ends a round, and with it everything that is still going on in it. False: it was no longer in
/// that state, and nothing has changed.
///
/// # Errors
/// When the database fails.
pub async fn round_end(
    tx: &mut Tx,
    id: RoundId,
    from: State,
    to: &Phase,
    now: Timestamp,
) -> Result<bool, Error> {
    if !round_move(tx, id, from, to).await? {
        return Ok(false);
    }
    // In the order in which whoever judges takes the same rows.
    lease_close_all(tx, id).await?;
    submission_close(tx, id, now).await?;
    shard_close(tx, id).await?;
    evaluation_cancel(tx, id).await?;
    Ok(true)
}

//! A worker gives a lease back, done or not; and what becomes of work whose lease has ended.
use cairn_proto::limits::DETAIL_CHARS_MAX;
use cairn_proto::reason::ErrorReason;
use tracing::{info, warn};

use crate::app::App;
use crate::caller::Caller;
use crate::clock::Timestamp;
use crate::db::Tx;
use crate::db::audits::{audit_get, audit_move};
use crate::db::evaluations::{evaluation_get, evaluation_move};
use crate::db::leases::{lease_get, lease_move};
use crate::db::shards::{
    LEASE_EXPIRED, shard_failure_count, shard_failure_insert, shard_get, shard_move,
};
use crate::domain::evaluation::Job;
use crate::domain::lease::{Lease, Refusal, Standing, State, Work};
use crate::domain::{evaluation, shard};
use crate::error::Error;
use crate::ids::{Generation, LeaseId, SubmissionId};

/// Gives a lease back. One that is over already is given back again without complaint.
///
/// # Errors
/// NOT_FOUND when the caller has no such lease.
pub async fn release_lease(
    app: &App,
    caller: &Caller,
    id: LeaseId,
    generation: Generation,
    failed: bool,
    detail: &str,
) -> Result<(), Error> {
    let detail: String = detail.chars().take(DETAIL_CHARS_MAX).collect();
    let now = app.clock.now_ms();
    let mut tx = app.db.begin().await?;
    let lease = lease_get(&mut tx, id)
        .await?
        .ok_or_else(|| Error::not_found("lease", id))?;
    match lease.standing(&caller.worker, generation) {
        Err(Refusal::NotYours) => return Err(refused(Refusal::NotYours, id)),
        Ok(Standing::Held) => {}
        Ok(Standing::Grace | Standing::Answered) | Err(Refusal::Lost) => return Ok(()),
    }
    let how = if failed {
        State::Failed
    } else {
        State::Released
    };
    lease_end(&mut tx, &lease, how, &detail, now).await?;
    tx.commit().await?;
    app.wake.all();
    if failed {
        warn!(lease.id = %id, round.id = %lease.round, "{} failed at {:?}: {detail}", caller.name, lease.work);
    } else {
        info!(lease.id = %id, round.id = %lease.round, "{} gave back {:?}", caller.name, lease.work);
    }
    Ok(())
}

/// What a caller is told whose lease does not serve.
pub fn refused(refusal: Refusal, id: LeaseId) -> Error {
    match refusal {
        Refusal::NotYours => Error::not_found("lease", id),
        Refusal::Lost => lost(),
    }
}

/// The work has gone to another, or is no longer wanted.
pub fn lost() -> Error {
    Error::conflict(ErrorReason::LeaseLost, ErrorReason::LeaseLost.sentence())
}

/// Ends a held lease without a result and puts its work back, or stops it when it has failed too
/// often. Letting a lease run out counts as a failure: a shard that crashes every worker gives no
/// other sign.
///
/// # Errors
/// When the database fails.
pub async fn lease_end(
    tx: &mut Tx,
    lease: &Lease,
    how: State,
    detail: &str,
    now: Timestamp,
) -> Result<(), Error> {
    if !lease_move(tx, lease.id, State::Active, how).await? {
        return Ok(());
    }
    match lease.work {
        Work::Train(position) => {
            let detail = match how {
                State::Failed => Some(detail),
                State::Expired => Some(LEASE_EXPIRED),
                State::Active | State::Done | State::Released => None,
            };
            reopen_shard(tx, lease, position, detail, now).await
        }
        Work::Evaluate(id) => {
            let Some(row) = evaluation_get(tx, id).await? else {
                return Ok(());
            };
            if row.generation != lease.generation || row.state != evaluation::State::Leased {
                return Ok(());
            }
            let failures = row.failures + u64::from(how != State::Released);
            let next = row
                .state
                .fail(if how == State::Released { 0 } else { failures });
            let next = next.map_err(|error| Error::internal("reopen an evaluation", error))?;
            let moved = evaluation_move(tx, &row, next, row.generation, failures).await?;
            if moved
                && next == evaluation::State::Failed
                && let Job::Replay { submission } = row.job
            {
                give_up_audit(tx, submission).await?;
            }
            Ok(())
        }
    }
}

/// No evaluator could replay a submission: the evaluators' trouble, not its worker's.
async fn give_up_audit(tx: &mut Tx, id: SubmissionId) -> Result<(), Error> {
    let Some(audit) = audit_get(tx, id).await? else {
        return Ok(());
    };
    audit_move(tx, id, &audit, &audit.clone().impossible()).await?;
    Ok(())
}

async fn reopen_shard(
    tx: &mut Tx,
    lease: &Lease,
    position: u32,
    failure: Option<&str>,
    now: Timestamp,
) -> Result<(), Error> {
    let Some(row) = shard_get(tx, lease.round, position).await? else {
        return Ok(());
    };
    if row.shard.generation != lease.generation || row.shard.state != shard::State::Leased {
        return Ok(());
    }
    let failures = match failure {
        Some(detail) => {
            shard_failure_insert(tx, lease.round, position, lease.worker, detail, now).await?
        }
        None => shard_failure_count(tx, lease.round, position).await?,
    };
    let next = row
        .shard
        .reopen(failures)
        .map_err(|error| Error::internal("reopen a shard", error))?;
    shard_move(tx, lease.round, position, row.shard, next).await?;
    Ok(())
}

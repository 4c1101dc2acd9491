//! A worker is still at it: its lease is extended, its progress noted.
use cairn_proto::reason::ErrorReason;

use crate::app::App;
use crate::caller::Caller;
use crate::clock::Timestamp;
use crate::db::Tx;
use crate::db::evaluations::{evaluation_get, evaluation_move};
use crate::db::leases::{lease_get, lease_hold, lease_move, lease_renew};
use crate::db::rounds::round_get_held;
use crate::db::shards::{shard_failure_forgive, shard_get, shard_move};
use crate::domain::evaluation;
use crate::domain::lease::{Lease, Standing, State, Work};
use crate::domain::round;
use crate::error::Error;
use crate::ids::{Generation, LeaseId};
use crate::ops::claim_work::expiry;
use crate::ops::release_lease::{lost, refused};

/// Extends a lease. One that has run out is taken up again as long as nobody else has the work.
///
/// # Errors
/// LEASE_LOST when the work has gone to another; ROUND_ENDED; NOT_FOUND.
pub async fn renew_lease(
    app: &App,
    caller: &Caller,
    id: LeaseId,
    generation: Generation,
    progress: (u32, u32),
) -> Result<Timestamp, Error> {
    let now = app.clock.now_ms();
    let mut tx = app.db.begin().await?;
    let unknown = || Error::not_found("lease", id);
    let round = lease_get(&mut tx, id).await?.ok_or_else(unknown)?.round;
    let round = round_get_held(&mut tx, round)
        .await?
        .ok_or_else(|| Error::inconsistent("leases", "round_id", id))?;
    let lease = lease_hold(&mut tx, id).await?.ok_or_else(unknown)?;
    let standing = lease
        .standing(&caller.worker, generation)
        .map_err(|refusal| refused(refusal, id))?;
    let wanted = match lease.work {
        Work::Train(_) => round.phase.state() == round::State::Training,
        Work::Evaluate(_) => {
            matches!(
                round.phase.state(),
                round::State::Training | round::State::Judging
            )
        }
    };
    if !wanted {
        return Err(Error::conflict(
            ErrorReason::RoundEnded,
            format!("round {} takes no more of this work", round.id),
        ));
    }
    match standing {
        Standing::Held => {}
        Standing::Grace => resume(&mut tx, &lease).await?,
        Standing::Answered => return Err(lost()),
    }
    let expires = expiry(&round, now);
    if !lease_renew(&mut tx, id, expires, Some(progress)).await? {
        return Err(lost());
    }
    tx.commit().await?;
    app.wake
        .changed
        .send_modify(|count| *count = count.wrapping_add(1));
    Ok(expires)
}

async fn resume(tx: &mut Tx, lease: &Lease) -> Result<(), Error> {
    let resumed = match lease.work {
        Work::Train(position) => {
            let row = shard_get(tx, lease.round, position)
                .await?
                .ok_or_else(lost)?;
            let next = row.shard.resume(lease.generation).map_err(|_| lost())?;
            shard_failure_forgive(tx, lease.round, position, lease.worker).await?;
            shard_move(tx, lease.round, position, row.shard, next).await?
        }
        Work::Evaluate(id) => {
            let row = evaluation_get(tx, id).await?.ok_or_else(lost)?;
            let open = row.state == evaluation::State::Open && row.generation == lease.generation;
            open && evaluation_move(
                tx,
                &row,
                evaluation::State::Leased,
                row.generation,
                row.failures,
            )
            .await?
        }
    };
    if resumed && lease_move(tx, lease.id, State::Expired, State::Active).await? {
        return Ok(());
    }
    Err(lost())
}

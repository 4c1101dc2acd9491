//! A worker asks for work: volunteers get shards, evaluators get evaluations.
pub mod eval_sets;
mod tasks;

use std::time::Duration;

use cairn_proto::limits::{CLAIM_WAIT_MAX, NONCE_BYTES};
use cairn_proto::reason::ErrorReason;
use tracing::info;

use crate::app::App;
use crate::caller::{Caller, Role};
use crate::clock::Timestamp;
use crate::db::Tx;
use crate::db::evaluations::{evaluation_claimable, evaluation_move};
use crate::db::leases::{lease_active_of, lease_insert, lease_renew};
use crate::db::models::{FileRow, Folder, checkpoint_files};
use crate::db::rounds::{Round, round_get, round_hold};
use crate::db::shards::{shard_claimable, shard_move};
use crate::db::workers::worker_hold;
use crate::domain::lease::{Lease, State, Work};
use crate::domain::round;
use crate::entropy;
use crate::error::Error;
use crate::ids::{Generation, LeaseId, RoundId};
use crate::ops::release_lease::lease_end;

use tasks::task;
pub use tasks::{EvaluateTask, ReplayTask, Task, TrainTask, WeightedAdapter, teacher_of};

/// Tries to win a piece of work before saying that there is none: others may take what was seen.
const CLAIM_TRIES: usize = 8;

/// A lease and all that its holder needs to know.
#[derive(Debug, Clone)]
pub struct Assignment {
    /// The lease.
    pub lease: Lease,
    /// The round's base.
    pub base_commit: crate::ids::Commit,
    /// The base's folder.
    pub base_files: Vec<FileRow>,
    /// The work itself.
    pub task: Task,
}

/// Hands out work, waiting for some if there is none. A worker that holds a lease already gets that
/// one again: it has been restarted.
///
/// # Errors
/// ROLE_REQUIRED for maintainers; DISK_FULL and SHUTTING_DOWN when no new work is given out.
pub async fn claim_work(
    app: &App,
    caller: &Caller,
    wait: Duration,
) -> Result<Option<Assignment>, Error> {
    if caller.role == Role::Maintainer {
        return Err(Error::denied(
            ErrorReason::RoleRequired,
            "maintainers do no work; join with a volunteer's or an evaluator's token",
        ));
    }
    let over = tokio::time::sleep(wait.min(CLAIM_WAIT_MAX));
    tokio::pin!(over);
    loop {
        // Listening before looking, so that what comes in between is not missed.
        let woken = app.wake.work.notified();
        tokio::pin!(woken);
        woken.as_mut().enable();
        if let Some(lease) = claim_once(app, caller).await? {
            return assignment(app, lease).await.map(Some);
        }
        tokio::select! {
            () = woken => {}
            () = &mut over => return Ok(None),
            () = app.lifecycle.soft().cancelled() => {}
        }
    }
}

async fn claim_once(app: &App, caller: &Caller) -> Result<Option<Lease>, Error> {
    if let Some(held) = held(app, caller).await? {
        return Ok(Some(held));
    }
    if !app.takes_work() {
        return Err(Error::new(
            ErrorReason::ShuttingDown,
            ErrorReason::ShuttingDown.sentence(),
        ));
    }
    for _ in 0..CLAIM_TRIES {
        // A look without the write lock: most claims of a crowd find nothing.
        let mut tx = app.db.read().await?;
        let some = is_any(&mut tx, caller, app.clock.now_ms()).await?;
        drop(tx);
        if !some {
            return Ok(None);
        }
        if !app.disk_has_room() {
            return Err(Error::new(
                ErrorReason::DiskFull,
                "no work is given out: the disk is full",
            ));
        }
        let now = app.clock.now_ms();
        let mut tx = app.db.begin().await?;
        // The same worker may have asked another coordinator a moment ago.
        worker_hold(&mut tx, caller.worker).await?;
        if lease_active_of(&mut tx, caller.worker).await?.is_some() {
            drop(tx);
            return held(app, caller).await;
        }
        let won = match caller.role {
            Role::Volunteer => claim_shard(&mut tx, caller, now).await?,
            Role::Evaluator => claim_evaluation(&mut tx, caller, now).await?,
            Role::Maintainer => None,
        };
        if let Some(lease) = won {
            tx.commit().await?;
            app.wake
                .changed
                .send_modify(|count| *count = count.wrapping_add(1));
            info!(lease.id = %lease.id, round.id = %lease.round, "leased to {}: {:?}", caller.name, lease.work);
            return Ok(Some(lease));
        }
    }
    Ok(None)
}

/// The lease that the worker holds, its time renewed; one that has run out is ended.
async fn held(app: &App, caller: &Caller) -> Result<Option<Lease>, Error> {
    let mut tx = app.db.read().await?;
    let found = lease_active_of(&mut tx, caller.worker).await?;
    drop(tx);
    if found.is_none() {
        return Ok(None);
    }
    let now = app.clock.now_ms();
    let mut tx = app.db.begin().await?;
    let Some(mut lease) = lease_active_of(&mut tx, caller.worker).await? else {
        return Ok(None);
    };
    let overdue = lease.is_overdue(now);
    if overdue {
        lease_end(&mut tx, &lease, State::Expired, "", now).await?;
    } else {
        let round = round_of(&mut tx, lease.round).await?;
        lease.expires = expiry(&round, now);
        lease_renew(&mut tx, lease.id, lease.expires, None).await?;
    }
    tx.commit().await?;
    if overdue {
        app.wake.all();
    }
    Ok((!overdue).then_some(lease))
}

async fn is_any(tx: &mut Tx, caller: &Caller, now: Timestamp) -> Result<bool, Error> {
    Ok(match caller.role {
        Role::Volunteer => shard_claimable(tx, caller.worker, now).await?.is_some(),
        Role::Evaluator => evaluation_claimable(tx).await?.is_some(),
        Role::Maintainer => false,
    })
}

async fn claim_shard(tx: &mut Tx, caller: &Caller, now: Timestamp) -> Result<Option<Lease>, Error> {
    let Some((round_id, row)) = shard_claimable(tx, caller.worker, now).await? else {
        return Ok(None);
    };
    // No lease is given in a round that has just left training.
    if !round_hold(tx, round_id, round::State::Training).await? {
        return Ok(None);
    }
    let round = round_of(tx, round_id).await?;
    let next = row
        .shard
        .lease()
        .map_err(|error| Error::internal("lease a shard", error))?;
    if !shard_move(tx, round_id, row.position, row.shard, next).await? {
        return Ok(None);
    }
    let lease = new_lease(
        &round,
        Work::Train(row.position),
        caller,
        next.generation,
        now,
    )?;
    lease_insert(tx, &lease, now).await?;
    Ok(Some(lease))
}

async fn claim_evaluation(
    tx: &mut Tx,
    caller: &Caller,
    now: Timestamp,
) -> Result<Option<Lease>, Error> {
    let Some(row) = evaluation_claimable(tx).await? else {
        return Ok(None);
    };
    let round = round_of(tx, row.round).await?;
    let next = row
        .state
        .lease()
        .map_err(|error| Error::internal("lease an evaluation", error))?;
    let generation = Generation(row.generation.0 + 1);
    if !evaluation_move(tx, &row, next, generation, row.failures).await? {
        return Ok(None);
    }
    let lease = new_lease(&round, Work::Evaluate(row.id), caller, generation, now)?;
    lease_insert(tx, &lease, now).await?;
    Ok(Some(lease))
}

fn new_lease(
    round: &Round,
    work: Work,
    caller: &Caller,
    generation: Generation,
    now: Timestamp,
) -> Result<Lease, Error> {
    Ok(Lease {
        id: LeaseId::new(),
        round: round.id,
        work,
        worker: caller.worker,
        generation,
        nonce: entropy::bytes::<NONCE_BYTES>()?.to_vec(),
        state: State::Active,
        expires: expiry(round, now),
    })
}

/// When a lease of this round that is given or renewed now runs out.
pub fn expiry(round: &Round, now: Timestamp) -> Timestamp {
    now.plus(Duration::from_millis(round.file.policy.lease_ms))
}

/// The round that a row names.
///
/// # Errors
/// INTERNAL when it is not there.
pub async fn round_of(tx: &mut Tx, id: RoundId) -> Result<Round, Error> {
    round_get(tx, id)
        .await?
        .ok_or_else(|| Error::inconsistent("rounds", "id", id))
}

/// Everything the holder of a lease needs; none of it ever changes.
async fn assignment(app: &App, lease: Lease) -> Result<Assignment, Error> {
    let mut tx = app.db.read().await?;
    let round = round_of(&mut tx, lease.round).await?;
    let base_files = checkpoint_files(
        &mut tx,
        &round.model,
        round.base_revision,
        Folder::Checkpoint,
    )
    .await?;
    let task = task(&mut tx, &round, &lease.work).await?;
    Ok(Assignment {
        base_commit: round.base_commit,
        base_files,
        task,
        lease,
    })
}

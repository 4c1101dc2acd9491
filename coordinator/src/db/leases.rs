//! Leases on shards and evaluations.
use sqlx::any::AnyRow;

use super::shards::position;
use super::{Hold, Tx, column, parsed, signed, unsigned};
use crate::clock::Timestamp;
use crate::domain::lease::{Lease, State, Work};
use crate::error::Error;
use crate::ids::{EvaluationId, Generation, LeaseId, RoundId, WorkerId};

const COLUMNS: &str = "select id, kind, round_id, shard, evaluation_id, worker_id, generation, \
    nonce, state, expires_ms from leases";

fn select(rest: &str) -> sqlx::AssertSqlSafe<String> {
    // Both parts are constants of this file.
    sqlx::AssertSqlSafe(format!("{COLUMNS} {rest}"))
}

/// Stores a new lease.
pub async fn lease_insert(tx: &mut Tx, lease: &Lease, now: Timestamp) -> Result<(), Error> {
    let (kind, shard, evaluation) = match lease.work {
        Work::Train(shard) => ("train", Some(i64::from(shard)), None),
        Work::Evaluate(evaluation) => ("evaluate", None, Some(evaluation.to_string())),
    };
    sqlx::query(
        "insert into leases (id, kind, round_id, shard, evaluation_id, worker_id, generation, \
         nonce, state, created_ms, expires_ms) \
         values ($1, $2, $3, $4, $5, $6, $7, $8, $9, $10, $11)",
    )
    .bind(lease.id.to_string())
    .bind(kind)
    .bind(lease.round.to_string())
    .bind(shard)
    .bind(evaluation)
    .bind(lease.worker.to_string())
    .bind(signed(lease.generation.0))
    .bind(lease.nonce.clone())
    .bind(lease.state.as_str())
    .bind(now.0)
    .bind(lease.expires.0)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Finds a lease.
pub async fn lease_get(tx: &mut Tx, id: LeaseId) -> Result<Option<Lease>, Error> {
    let row = sqlx::query(select("where id = $1"))
        .bind(id.to_string())
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(Lease::try_from).transpose()
}

/// Finds a lease and holds it, so that of two callers who end it one waits for the other and sees it
/// ended.
pub async fn lease_hold(tx: &mut Tx, id: LeaseId) -> Result<Option<Lease>, Error> {
    let held = tx.hold(Hold::Alone, "leases");
    let row = sqlx::query(select(&format!("where id = $1{held}")))
        .bind(id.to_string())
        .fetch_optional(tx.conn())
        .await?;
    row.as_ref().map(Lease::try_from).transpose()
}

/// The lease that a worker holds, if any.
pub async fn lease_active_of(tx: &mut Tx, worker: WorkerId) -> Result<Option<Lease>, Error> {
    let row = sqlx::query(select(
        "where worker_id = $1 and state = 'active' order by created_ms, id limit 1",
    ))
    .bind(worker.to_string())
    .fetch_optional(tx.conn())
    .await?;
    row.as_ref().map(Lease::try_from).transpose()
}

/// Moves a lease on. False: it was no longer in that state.
pub async fn lease_move(tx: &mut Tx, id: LeaseId, from: State, to: State) -> Result<bool, Error> {
    let done = sqlx::query("update leases set state = $1 where id = $2 and state = $3")
        .bind(to.as_str())
        .bind(id.to_string())
        .bind(from.as_str())
        .execute(tx.conn())
        .await?;
    Ok(done.rows_affected() == 1)
}

/// Extends a held lease and notes progress: steps done, and of how many. False: it is no longer held.
pub async fn lease_renew(
    tx: &mut Tx,
    id: LeaseId,
    expires: Timestamp,
    progress: Option<(u32, u32)>,
) -> Result<bool, Error> {
    let done = sqlx::query(
        "update leases set expires_ms = $1, step = coalesce($2, step), \
         steps = coalesce($3, steps) where id = $4 and state = 'active'",
    )
    .bind(expires.0)
    .bind(progress.map(|(step, _)| i64::from(step)))
    .bind(progress.map(|(_, steps)| i64::from(steps)))
    .bind(id.to_string())
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Held leases that have run out.
pub async fn lease_overdue(tx: &mut Tx, now: Timestamp, limit: u32) -> Result<Vec<Lease>, Error> {
    let rows = sqlx::query(select(
        "where state = 'active' and expires_ms <= $1 order by expires_ms, id limit $2",
    ))
    .bind(now.0)
    .bind(i64::from(limit))
    .fetch_all(tx.conn())
    .await?;
    rows.iter().map(Lease::try_from).collect()
}

/// Ends every held training lease of a round: it leaves training.
pub async fn lease_close_training(tx: &mut Tx, round: RoundId) -> Result<(), Error> {
    sqlx::query(
        "update leases set state = 'expired' \
         where round_id = $1 and kind = 'train' and state = 'active'",
    )
    .bind(round.to_string())
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Ends every held lease of a round: it is over.
pub async fn lease_close_all(tx: &mut Tx, round: RoundId) -> Result<(), Error> {
    sqlx::query("update leases set state = 'expired' where round_id = $1 and state = 'active'")
        .bind(round.to_string())
        .execute(tx.conn())
        .await?;
    Ok(())
}

/// The newest lease of a shard, for people.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardLease {
    /// The shard.
    pub shard: u32,
    /// Whether it is still held.
    pub active: bool,
    /// Display name of its holder.
    pub worker: String,
    /// When it runs out.
    pub expires: Timestamp,
    /// Steps done, as last reported.
    pub step: u32,
    /// Of how many.
    pub steps: u32,
}

/// The newest lease of each shard of a round.
pub async fn lease_of_shards(tx: &mut Tx, round: RoundId) -> Result<Vec<ShardLease>, Error> {
    let rows = sqlx::query(
        "select l.shard, l.state, l.expires_ms, l.step, l.steps, w.display_name \
         from shards s join leases l on l.round_id = s.round_id and l.shard = s.position \
         and l.generation = s.generation join workers w on w.id = l.worker_id \
         where s.round_id = $1",
    )
    .bind(round.to_string())
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| {
            Ok(ShardLease {
                shard: position(row, "leases", "shard")?,
                active: parsed::<State>(row, "leases", "state")? == State::Active,
                worker: column(row, "display_name")?,
                expires: Timestamp(column(row, "expires_ms")?),
                step: position(row, "leases", "step")?,
                steps: position(row, "leases", "steps")?,
            })
        })
        .collect()
}

/// Whether the holder of a lease on a shard has been given the same shard again since.
pub async fn lease_renewed_since(tx: &mut Tx, lease: &Lease, shard: u32) -> Result<bool, Error> {
    let row = sqlx::query(
        "select 1 as found from leases where round_id = $1 and shard = $2 and worker_id = $3 \
         and generation > $4 limit 1",
    )
    .bind(lease.round.to_string())
    .bind(i64::from(shard))
    .bind(lease.worker.to_string())
    .bind(signed(lease.generation.0))
    .fetch_optional(tx.conn())
    .await?;
    Ok(row.is_some())
}

/// How many bytes this worker may upload under this lease; nothing when it may not.
pub async fn lease_upload_limit(
    tx: &mut Tx,
    lease: LeaseId,
    worker: WorkerId,
) -> Result<Option<u64>, Error> {
    // A lease that ran out still counts: its adapter may be accepted in grace.
    let row = sqlx::query(
        "select r.adapter_bytes_max from leases l join rounds r on r.id = l.round_id \
         where l.id = $1 and l.worker_id = $2 and l.kind = 'train' \
         and l.state in ('active', 'expired') and r.state = 'training'",
    )
    .bind(lease.to_string())
    .bind(worker.to_string())
    .fetch_optional(tx.conn())
    .await?;
    row.as_ref()
        .map(|row| unsigned(row, "rounds", "adapter_bytes_max"))
        .transpose()
}

/// How many bytes this evaluator may upload under this lease: one on a guide; nothing otherwise.
pub async fn lease_upload_limit_guide(
    tx: &mut Tx,
    lease: LeaseId,
    worker: WorkerId,
) -> Result<Option<u64>, Error> {
    let row = sqlx::query(
        "select r.adapter_bytes_max from leases l join rounds r on r.id = l.round_id \
         join evaluations e on e.id = l.evaluation_id \
         where l.id = $1 and l.worker_id = $2 and e.kind = 'guide' \
         and l.state in ('active', 'expired') and r.state in ('training', 'judging')",
    )
    .bind(lease.to_string())
    .bind(worker.to_string())
    .fetch_optional(tx.conn())
    .await?;
    row.as_ref()
        .map(|row| unsigned(row, "rounds", "adapter_bytes_max"))
        .transpose()
}

impl TryFrom<&AnyRow> for Lease {
    type Error = Error;

    fn try_from(row: &AnyRow) -> Result<Self, Error> {
        let id: LeaseId = parsed(row, "leases", "id")?;
        let kind: String = column(row, "kind")?;
        let work = match kind.as_str() {
            "train" => Work::Train(position(row, "leases", "shard")?),
            "evaluate" => Work::Evaluate(parsed::<EvaluationId>(row, "leases", "evaluation_id")?),
            _ => return Err(Error::inconsistent("leases", "kind", id)),
        };
        Ok(Self {
            id,
            round: parsed(row, "leases", "round_id")?,
            work,
            worker: parsed(row, "leases", "worker_id")?,
            generation: Generation(unsigned(row, "leases", "generation")?),
            nonce: column(row, "nonce")?,
            state: parsed(row, "leases", "state")?,
            expires: Timestamp(column(row, "expires_ms")?),
        })
    }
}

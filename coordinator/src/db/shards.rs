//! Shards and who failed on them.
use sqlx::any::AnyRow;

use super::{Hold, Tx, column, parsed, signed, unsigned};
use crate::clock::Timestamp;
use crate::domain::plan::{Range, ShardPlan};
use crate::domain::shard::{Shard, State};
use crate::error::Error;
use crate::ids::{Generation, RoundId, WorkerId};

/// Why a worker failed, when it said nothing.
pub const LEASE_EXPIRED: &str = "the lease ran out";

/// A shard without its records.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct ShardRow {
    /// Its position in the round.
    pub position: u32,
    /// Where it stands.
    pub shard: Shard,
    /// Records in it.
    pub records: u64,
    /// Bytes of them.
    pub bytes: u64,
}

/// How many shards of a round are in which state.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct ShardCounts {
    /// Waiting for a worker, or held by one.
    pub unfinished: u64,
    /// All of them.
    pub total: u64,
}

/// Stores a planned shard.
pub async fn shard_insert(
    tx: &mut Tx,
    round: RoundId,
    position: u32,
    plan: &ShardPlan,
) -> Result<(), Error> {
    let ranges = serde_json::to_string(&plan.ranges)
        .map_err(|error| Error::internal("write a shard's ranges", error))?;
    sqlx::query(
        "insert into shards (round_id, position, records, record_count, bytes, state) \
         values ($1, $2, $3, $4, $5, 'open')",
    )
    .bind(round.to_string())
    .bind(i64::from(position))
    .bind(ranges)
    .bind(signed(plan.records))
    .bind(signed(plan.bytes))
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// A round's shards in order.
pub async fn shard_list(tx: &mut Tx, round: RoundId) -> Result<Vec<ShardRow>, Error> {
    let rows = sqlx::query(
        "select position, record_count, bytes, state, generation from shards \
         where round_id = $1 order by position",
    )
    .bind(round.to_string())
    .fetch_all(tx.conn())
    .await?;
    rows.iter().map(ShardRow::try_from).collect()
}

/// Finds a shard.
pub async fn shard_get(
    tx: &mut Tx,
    round: RoundId,
    position: u32,
) -> Result<Option<ShardRow>, Error> {
    let row = sqlx::query(
        "select position, record_count, bytes, state, generation from shards \
         where round_id = $1 and position = $2",
    )
    .bind(round.to_string())
    .bind(i64::from(position))
    .fetch_optional(tx.conn())
    .await?;
    row.as_ref().map(ShardRow::try_from).transpose()
}

/// A shard's records.
pub async fn shard_ranges(tx: &mut Tx, round: RoundId, position: u32) -> Result<Vec<Range>, Error> {
    let row = sqlx::query("select records from shards where round_id = $1 and position = $2")
        .bind(round.to_string())
        .bind(i64::from(position))
        .fetch_one(tx.conn())
        .await?;
    let json: String = column(&row, "records")?;
    serde_json::from_str(&json).map_err(|_| Error::inconsistent("shards", "records", round))
}

/// The records of every shard of a round, in order.
pub async fn shard_ranges_all(
    tx: &mut Tx,
    round: RoundId,
) -> Result<Vec<(u32, Vec<Range>)>, Error> {
    let rows =
        sqlx::query("select position, records from shards where round_id = $1 order by position")
            .bind(round.to_string())
            .fetch_all(tx.conn())
            .await?;
    rows.iter()
        .map(|row| {
            let json: String = column(row, "records")?;
            let ranges = serde_json::from_str(&json)
                .map_err(|_| Error::inconsistent("shards", "records", round))?;
            Ok((position(row, "shards", "position")?, ranges))
        })
        .collect()
}

/// How often a worker may let a shard's lease run out before it is kept from it: once may be a
/// crash, twice is a habit.
const EXPIRED_PER_WORKER_MAX: i64 = 2;

/// Rejected submissions of one worker in one round before it gets no more work there: a broken or
/// hostile machine should not eat every shard's three tries.
const REJECTED_PER_WORKER_MAX: i64 = 2;

/// An open shard that this worker may have: of a round in training, where it has not failed on the
/// shard, has handed in nothing for it that stands, and has not been rejected too often. Oldest round
/// first, then shards fewest have tried; one that another transaction is about to move is passed over.
pub async fn shard_claimable(
    tx: &mut Tx,
    worker: WorkerId,
    now: Timestamp,
) -> Result<Option<(RoundId, ShardRow)>, Error> {
    let held = tx.hold(Hold::Free, "s");
    let sql = format!(
        "select s.round_id, s.position, s.record_count, s.bytes, s.state, s.generation \
         from rounds r join shards s on s.round_id = r.id \
         where r.state = 'training' and r.deadline_ms > $1 and s.state = 'open' \
         and not exists (select 1 from shard_failures f where f.round_id = s.round_id \
             and f.shard = s.position and f.worker_id = $2 and f.detail <> $3) \
         and (select count(*) from leases l where l.round_id = s.round_id \
             and l.shard = s.position and l.worker_id = $2 and l.state = 'expired') < $4 \
         and not exists (select 1 from submissions d where d.round_id = s.round_id \
             and d.shard = s.position and d.worker_id = $2 and d.state <> 'rejected' \
             and d.revoked_ms is null) \
         and (select count(*) from submissions b where b.round_id = s.round_id \
             and b.worker_id = $2 and b.state = 'rejected') < $5 \
         order by r.created_ms, r.id, s.generation, s.position limit 1{held}"
    );
    let row = sqlx::query(sqlx::AssertSqlSafe(sql))
        .bind(now.0)
        .bind(worker.to_string())
        .bind(LEASE_EXPIRED)
        .bind(EXPIRED_PER_WORKER_MAX)
        .bind(REJECTED_PER_WORKER_MAX)
        .fetch_optional(tx.conn())
        .await?;
    row.map(|row| {
        Ok((
            parsed(&row, "shards", "round_id")?,
            ShardRow::try_from(&row)?,
        ))
    })
    .transpose()
}

/// Moves a shard on. False: it was no longer as it was.
pub async fn shard_move(
    tx: &mut Tx,
    round: RoundId,
    position: u32,
    from: Shard,
    to: Shard,
) -> Result<bool, Error> {
    let done = sqlx::query(
        "update shards set state = $1, generation = $2 \
         where round_id = $3 and position = $4 and state = $5 and generation = $6",
    )
    .bind(to.state.as_str())
    .bind(signed(to.generation.0))
    .bind(round.to_string())
    .bind(i64::from(position))
    .bind(from.state.as_str())
    .bind(signed(from.generation.0))
    .execute(tx.conn())
    .await?;
    Ok(done.rows_affected() == 1)
}

/// Takes back every shard that is out: the round leaves training.
pub async fn shard_close(tx: &mut Tx, round: RoundId) -> Result<(), Error> {
    sqlx::query("update shards set state = 'open' where round_id = $1 and state = 'leased'")
        .bind(round.to_string())
        .execute(tx.conn())
        .await?;
    Ok(())
}

/// Counts a round's shards.
pub async fn shard_count(tx: &mut Tx, round: RoundId) -> Result<ShardCounts, Error> {
    let row = sqlx::query(
        "select count(*) as total, \
         count(case when state in ('open', 'leased') then 1 end) as unfinished \
         from shards where round_id = $1",
    )
    .bind(round.to_string())
    .fetch_one(tx.conn())
    .await?;
    Ok(ShardCounts {
        unfinished: unsigned(&row, "shards", "unfinished")?,
        total: unsigned(&row, "shards", "total")?,
    })
}

/// Notes that a worker failed on a shard; returns how many different ones have by now. A worker that
/// only let its lease run out before is now one that failed.
pub async fn shard_failure_insert(
    tx: &mut Tx,
    round: RoundId,
    position: u32,
    worker: WorkerId,
    detail: &str,
    now: Timestamp,
) -> Result<u64, Error> {
    sqlx::query(
        "insert into shard_failures (round_id, shard, worker_id, detail, at_ms) \
         values ($1, $2, $3, $4, $5) on conflict (round_id, shard, worker_id) \
         do update set detail = excluded.detail where shard_failures.detail = $6",
    )
    .bind(round.to_string())
    .bind(i64::from(position))
    .bind(worker.to_string())
    .bind(detail)
    .bind(now.0)
    .bind(LEASE_EXPIRED)
    .execute(tx.conn())
    .await?;
    shard_failure_count(tx, round, position).await
}

/// How many different workers have failed on a shard.
pub async fn shard_failure_count(tx: &mut Tx, round: RoundId, position: u32) -> Result<u64, Error> {
    let row = sqlx::query(
        "select count(*) as workers from shard_failures where round_id = $1 and shard = $2",
    )
    .bind(round.to_string())
    .bind(i64::from(position))
    .fetch_one(tx.conn())
    .await?;
    unsigned(&row, "shard_failures", "workers")
}

/// Forgets that a worker's lease ran out: it has come back in time.
pub async fn shard_failure_forgive(
    tx: &mut Tx,
    round: RoundId,
    position: u32,
    worker: WorkerId,
) -> Result<(), Error> {
    sqlx::query(
        "delete from shard_failures \
         where round_id = $1 and shard = $2 and worker_id = $3 and detail = $4",
    )
    .bind(round.to_string())
    .bind(i64::from(position))
    .bind(worker.to_string())
    .bind(LEASE_EXPIRED)
    .execute(tx.conn())
    .await?;
    Ok(())
}

/// Shards of a round that somebody failed on, with how many different workers did.
pub async fn shard_failures(tx: &mut Tx, round: RoundId) -> Result<Vec<(u32, u64)>, Error> {
    let rows = sqlx::query(
        "select shard, count(*) as workers from shard_failures where round_id = $1 group by shard",
    )
    .bind(round.to_string())
    .fetch_all(tx.conn())
    .await?;
    rows.iter()
        .map(|row| {
            let shard = position(row, "shard_failures", "shard")?;
            Ok((shard, unsigned(row, "shard_failures", "workers")?))
        })
        .collect()
}

/// A shard's position in a column.
pub(super) fn position(
    row: &AnyRow,
    table: &'static str,
    name: &'static str,
) -> Result<u32, Error> {
    let number = unsigned(row, table, name)?;
    u32::try_from(number).map_err(|_| Error::inconsistent(table, name, number))
}

impl TryFrom<&AnyRow> for ShardRow {
    type Error = Error;

    fn try_from(row: &AnyRow) -> Result<Self, Error> {
        Ok(Self {
            position: position(row, "shards", "position")?,
            shard: Shard {
                state: parsed::<State>(row, "shards", "state")?,
                generation: Generation(unsigned(row, "shards", "generation")?),
            },
            records: unsigned(row, "shards", "record_count")?,
            bytes: unsigned(row, "shards", "bytes")?,
        })
    }
}

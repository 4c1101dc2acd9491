//! Reading rounds: one with everything in it, or a list.
use std::collections::BTreeMap;

use crate::app::App;
use crate::clock::Timestamp;
use crate::db::evaluations::{EvaluationCounts, evaluation_count};
use crate::db::leases::{ShardLease, lease_of_shards};
use crate::db::rounds::{Round, round_get, round_list};
use crate::db::shards::{ShardRow, shard_failures, shard_list};
use crate::db::submissions::{Submission, submission_list};
use crate::error::Error;
use crate::ids::RoundId;

/// Most submissions in a view, oldest first: with the shards of the largest round they still fit in
/// one message.
const CONTRIBUTIONS_MAX: u32 = 5_000;

/// A round and everything in it.
#[derive(Debug, Clone)]
pub struct RoundView {
    /// The round.
    pub round: Round,
    /// Its shards in order.
    pub shards: Vec<ShardView>,
    /// Its submissions in order of arrival.
    pub submissions: Vec<Submission>,
    /// Its evaluations, counted.
    pub evaluations: EvaluationCounts,
}

/// A shard and who is at it.
#[derive(Debug, Clone, PartialEq)]
pub struct ShardView {
    /// The shard.
    pub row: ShardRow,
    /// Its newest lease.
    pub lease: Option<ShardLease>,
    /// Different workers that failed on it.
    pub failures: u64,
}

/// A round with everything in it.
///
/// # Errors
/// NOT_FOUND.
pub async fn get_round(app: &App, id: RoundId) -> Result<RoundView, Error> {
    let mut tx = app.db.read().await?;
    let round = round_get(&mut tx, id)
        .await?
        .ok_or_else(|| Error::not_found("round", id))?;
    let failures: BTreeMap<u32, u64> = shard_failures(&mut tx, id).await?.into_iter().collect();
    let mut leases: BTreeMap<u32, ShardLease> = lease_of_shards(&mut tx, id)
        .await?
        .into_iter()
        .map(|l| (l.shard, l))
        .collect();
    let shards = shard_list(&mut tx, id)
        .await?
        .into_iter()
        .map(|row| ShardView {
            lease: leases.remove(&row.position),
            failures: failures.get(&row.position).copied().unwrap_or(0),
            row,
        })
        .collect();
    Ok(RoundView {
        shards,
        submissions: submission_list(&mut tx, id, CONTRIBUTIONS_MAX).await?,
        evaluations: evaluation_count(&mut tx, id).await?,
        round,
    })
}

/// Rounds, newest first, of one model or of all, after the given one.
///
/// # Errors
/// UNAVAILABLE.
pub async fn list_rounds(
    app: &App,
    model: &str,
    after: Option<(Timestamp, RoundId)>,
    limit: u32,
) -> Result<Vec<Round>, Error> {
    let mut tx = app.db.read().await?;
    round_list(&mut tx, model, after, limit).await
}

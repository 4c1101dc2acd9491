//! Reading rounds: one with everything in it, or a list.
use std::collections::BTreeMap;

use crate::app::App;
use crate::clock::Timestamp;
use crate::db::Tx;
use crate::db::evaluations::{EvaluationCounts, evaluation_count};
use crate::db::leases::{ShardLease, lease_of_shards};
use crate::db::outcomes::outcome_of;
use crate::db::rounds::{Round, round_get, round_list};
use crate::db::shards::{ShardRow, shard_failures, shard_list};
use crate::db::submissions::{Submission, submission_list};
use crate::domain::round::Phase;
use crate::domain::stacker::{Outcome, base_candidate, final_candidate};
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
    /// Guards, probes and earlier gate sets, by name.
    pub sets: Vec<SetLoss>,
}

/// Losses on a set that is watched, nats per token.
#[derive(Debug, Clone, PartialEq)]
pub struct SetLoss {
    /// Its name: `guard/NAME`, `probe/NAME` or `history/NAME`.
    pub set: String,
    /// The base's.
    pub before: f64,
    /// The aggregate's, once one has been chosen.
    pub after: Option<f64>,
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
        sets: watched_sets(&mut tx, &round).await?,
        round,
    })
}

/// What base and aggregate made of guards, probes and earlier gate sets.
async fn watched_sets(tx: &mut Tx, round: &Round) -> Result<Vec<SetLoss>, Error> {
    let audit = round.file.policy.audit.is_some();
    let base = outcome_of(tx, round.id, base_candidate(audit).key()).await?;
    let Some(Outcome::Done(base)) = base else {
        return Ok(Vec::new());
    };
    let chosen = match &round.phase {
        Phase::Folding { choice } | Phase::Published { choice, .. } => {
            let candidate = final_candidate(choice.terms.clone(), audit);
            outcome_of(tx, round.id, candidate.key()).await?
        }
        _ => None,
    };
    let after = |set: &str| match &chosen {
        Some(Outcome::Done(measured)) => measured.extra.get(set).map(|result| result.loss),
        _ => None,
    };
    // A shard's sample is part of what was trained on: it shows nothing that was forgotten.
    let watched = base
        .extra
        .iter()
        .filter(|(set, _)| !set.starts_with("shard/"));
    Ok(watched
        .map(|(set, result)| SetLoss {
            set: set.clone(),
            before: result.loss,
            after: after(set),
        })
        .collect())
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

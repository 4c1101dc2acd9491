//! An evaluator hands in the losses of a candidate.
use bytes::Bytes;
use cairn_proto::convert::BlobName;
use cairn_proto::reason::ErrorReason;
use cairn_proto::signing::SignatureError;
use tracing::{info, warn};

use crate::app::App;
use crate::blobs::Audience;
use crate::caller::{Caller, Role};
use crate::db::Tx;
use crate::db::blobs::{SERVER, blob_insert};
use crate::db::datasets::dataset_get;
use crate::db::evaluations::{
    EvalResult, Evaluation, evaluation_ended, evaluation_finish, evaluation_get, evaluation_move,
};
use crate::db::leases::{lease_get, lease_move};
use crate::db::rounds::{Round, round_base_losses};
use crate::domain::evaluation;
use crate::domain::lease::{Lease, Standing, State, Work};
use crate::domain::statistics::Scores;
use crate::error::Error;
use crate::ids::{EvaluationId, Generation, LeaseId};
use crate::limits::BLOB_IN_MEMORY_BYTES_MAX;
use crate::ops::claim_work::{round_of, sets_asked};
use crate::ops::release_lease::{lost, refused};

/// Losses of one set.
#[derive(Debug, Clone)]
pub struct SetScores {
    /// The dataset's name.
    pub dataset: String,
    /// Record by record, in the order of its chunks.
    pub scores: Scores,
}

/// Takes losses in. `verify` checks the signature with the lease's nonce. The same again gets the
/// same answer.
///
/// # Errors
/// LEASE_LOST, BAD_SIGNATURE, NOT_FOUND; INVALID_ARGUMENT when the losses are not those asked for.
pub async fn submit_scores(
    app: &App,
    caller: &Caller,
    lease_id: LeaseId,
    generation: Generation,
    sets: Vec<SetScores>,
    verify: impl Fn(&[u8]) -> Result<(), SignatureError> + Send,
) -> Result<(), Error> {
    caller.require(Role::Evaluator)?;
    let mut tx = app.db.read().await?;
    let (lease, standing, id) = find(&mut tx, caller, lease_id, generation).await?;
    verify(&lease.nonce)
        .map_err(|error| Error::denied(ErrorReason::BadSignature, error.to_string()))?;
    if standing == Standing::Answered {
        return Ok(());
    }
    let evaluation = evaluation_get(&mut tx, id).await?.ok_or_else(lost)?;
    let round = round_of(&mut tx, lease.round).await?;
    let sets = in_order(&mut tx, &round, &evaluation, sets).await?;
    let reference = evaluation_ended(&mut tx, round.id).await?;
    drop(tx);
    check_tokens(app, &reference, &sets).await?;
    if sets.iter().any(|scores| !scores.is_finite()) {
        return give_up(app, caller, &lease, id).await;
    }
    // Blobs before the rows that name them.
    let mut blobs = Vec::new();
    for scores in &sets {
        blobs.push(app.blobs.put_bytes(Bytes::from(scores.encode())).await?);
    }
    let loss = |index: usize| sets.get(index).and_then(Scores::loss);
    let gate_loss =
        loss(0).ok_or_else(|| Error::invalid("sets", "no token of the gate set was scored"))?;
    let gate_scores = blobs.first().map(|name| name.digest).ok_or_else(lost)?;
    let audit_scores = blobs.get(1).map(|name| name.digest);
    let result = EvalResult {
        gate_loss,
        audit_loss: loss(1),
        gate_scores,
        audit_scores,
    };
    finish(app, caller, &lease, id, &result, &blobs).await
}

async fn find(
    tx: &mut Tx,
    caller: &Caller,
    id: LeaseId,
    generation: Generation,
) -> Result<(Lease, Standing, EvaluationId), Error> {
    let lease = lease_get(tx, id)
        .await?
        .ok_or_else(|| Error::not_found("lease", id))?;
    let standing = lease
        .standing(&caller.worker, generation)
        .map_err(|refusal| refused(refusal, id))?;
    let Work::Evaluate(evaluation) = lease.work else {
        return Err(Error::invalid("lease_id", "this lease is for training"));
    };
    Ok((lease, standing, evaluation))
}

/// The scores in the order of the sets asked for: exactly those, each with its number of records.
async fn in_order(
    tx: &mut Tx,
    round: &Round,
    evaluation: &Evaluation,
    mut given: Vec<SetScores>,
) -> Result<Vec<Scores>, Error> {
    let mut ordered = Vec::new();
    for (name, _) in sets_asked(round, evaluation.candidate.sets()) {
        let place = given
            .iter()
            .position(|set| set.dataset == name)
            .ok_or_else(|| Error::invalid("sets", format!("set {name} is missing")))?;
        let scores = given.swap_remove(place).scores;
        let dataset = dataset_get(tx, &name)
            .await?
            .ok_or_else(|| Error::not_found("dataset", &name))?;
        let lengths = [scores.nll.len() as u64, scores.tokens.len() as u64];
        if lengths != [dataset.records; 2] {
            let text = format!(
                "set {name} has {} records; there are losses of {} and token counts of {}",
                dataset.records, lengths[0], lengths[1]
            );
            return Err(Error::invalid("sets", text));
        }
        ordered.push(scores);
    }
    match given.first() {
        None => Ok(ordered),
        Some(extra) => {
            let name: String = extra.dataset.chars().take(80).collect();
            Err(Error::invalid(
                "sets",
                format!("set {name} was not asked for"),
            ))
        }
    }
}

/// The tokens of a record are the same whatever the candidate: they must equal those of the round's
/// first evaluation, or two evaluators read the data differently.
async fn check_tokens(app: &App, ended: &[Evaluation], sets: &[Scores]) -> Result<(), Error> {
    let digests = |result: &EvalResult| [Some(result.gate_scores), result.audit_scores];
    for (index, scores) in sets.iter().enumerate().take(2) {
        let first = ended
            .iter()
            .filter_map(|e| e.result.as_ref())
            .find_map(|r| digests(r)[index]);
        let Some(digest) = first else { continue };
        if scores_of(app, digest).await?.tokens != scores.tokens {
            return Err(Error::invalid(
                "sets",
                "the token counts differ from those of an earlier evaluation of the same records",
            ));
        }
    }
    Ok(())
}

async fn finish(
    app: &App,
    caller: &Caller,
    lease: &Lease,
    id: EvaluationId,
    result: &EvalResult,
    blobs: &[BlobName],
) -> Result<(), Error> {
    let now = app.clock.now_ms();
    let mut tx = app.db.begin().await?;
    let Some(row) = take(&mut tx, caller, lease, id).await? else {
        return Ok(());
    };
    row.state.finish().map_err(|_| lost())?;
    for name in blobs {
        blob_insert(&mut tx, *name, Audience::Evaluators, SERVER, now).await?;
    }
    if !evaluation_finish(&mut tx, &row, result, caller.worker, now).await? {
        return Err(lost());
    }
    if row.candidate.terms().is_empty() {
        round_base_losses(&mut tx, row.round, result.gate_loss, result.audit_loss).await?;
    }
    tx.commit().await?;
    app.wake.all();
    info!(
        evaluation.id = %id, round.id = %lease.round,
        "{} evaluated: gate loss {:.5}", caller.name, result.gate_loss
    );
    Ok(())
}

/// Ends an evaluation whose losses are no numbers: no second evaluator would find better ones.
async fn give_up(app: &App, caller: &Caller, lease: &Lease, id: EvaluationId) -> Result<(), Error> {
    let mut tx = app.db.begin().await?;
    let Some(row) = take(&mut tx, caller, lease, id).await? else {
        return Ok(());
    };
    row.state.finish().map_err(|_| lost())?;
    let failures = row.failures + 1;
    let failed = evaluation::State::Failed;
    if !evaluation_move(&mut tx, &row, failed, row.generation, failures).await? {
        return Err(lost());
    }
    tx.commit().await?;
    app.wake.all();
    warn!(evaluation.id = %id, round.id = %lease.round, "the candidate has losses that are no numbers");
    Ok(())
}

/// Marks the lease done and returns the evaluation it holds; nothing when it was answered in the
/// meantime.
async fn take(
    tx: &mut Tx,
    caller: &Caller,
    lease: &Lease,
    id: EvaluationId,
) -> Result<Option<Evaluation>, Error> {
    let (_, standing, _) = find(tx, caller, lease.id, lease.generation).await?;
    let from = match standing {
        Standing::Held => State::Active,
        Standing::Grace => State::Expired,
        Standing::Answered => return Ok(None),
    };
    let row = evaluation_get(tx, id).await?.ok_or_else(lost)?;
    if row.generation != lease.generation || !lease_move(tx, lease.id, from, State::Done).await? {
        return Err(lost());
    }
    Ok(Some(row))
}

/// Stored losses.
///
/// # Errors
/// When the blob cannot be had or read.
pub async fn scores_of(app: &App, digest: cairn_stack::digest::Digest) -> Result<Scores, Error> {
    let bytes = app
        .blobs
        .get_bytes(digest, BLOB_IN_MEMORY_BYTES_MAX)
        .await?;
    Scores::decode(&bytes).map_err(|error| Error::internal("read scores", error))
}

//! An evaluator hands in the losses of a candidate.
use std::collections::BTreeMap;

use bytes::Bytes;
use cairn_proto::convert::BlobName;
use cairn_proto::reason::ErrorReason;
use cairn_proto::signing::SignatureError;
use tracing::{info, warn};

use crate::app::App;
use crate::caller::{Caller, Role};
use crate::db::Tx;
use crate::db::blobs::{Keep, blob_keep};
use crate::db::evaluations::{
    EvalResult, Evaluation, evaluation_ended, evaluation_finish, evaluation_get, evaluation_move,
};
use crate::db::leases::{lease_hold, lease_move};
use crate::db::rounds::round_base_losses;
use crate::domain::evaluation::{self, Job};
use crate::domain::lease::{Lease, Standing, State, Work};
use crate::domain::stacker::SetResult;
use crate::domain::statistics::Scores;
use crate::error::Error;
use crate::ids::{EvaluationId, Generation, LeaseId};
use crate::limits::BLOB_IN_MEMORY_BYTES_MAX;
use crate::ops::claim_work::eval_sets::{EvalSet, eval_sets};
use crate::ops::claim_work::round_of;
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
    let Job::Score(candidate) = &evaluation.job else {
        return Err(Error::invalid("lease_id", "this lease is for no scores"));
    };
    let round = round_of(&mut tx, lease.round).await?;
    let asked = eval_sets(&mut tx, &round, candidate.sets()).await?;
    let has_audit = candidate.sets().audit && round.file.policy.audit.is_some();
    let sets = in_order(&asked, sets)?;
    let ended = evaluation_ended(&mut tx, round.id).await?;
    drop(tx);
    let losses = Losses::of(sets, has_audit);
    check_tokens(app, &ended, &losses).await?;
    if losses.all().any(|(_, scores)| !scores.is_finite()) {
        return give_up(app, caller, &lease, id).await;
    }
    let (result, blobs) = store(app, &losses).await?;
    finish(app, caller, &lease, id, &result, &blobs).await
}

/// The scores by what they are for.
struct Losses {
    gate: (String, Scores),
    audit: Option<(String, Scores)>,
    extra: Vec<(String, Scores)>,
}

impl Losses {
    /// From scores in the order of [`eval_sets`].
    fn of(sets: Vec<(String, Scores)>, has_audit: bool) -> Self {
        let mut sets = sets.into_iter();
        let nothing = || {
            let scores = Scores {
                nll: Vec::new(),
                tokens: Vec::new(),
            };
            (String::new(), scores)
        };
        Self {
            gate: sets.next().unwrap_or_else(nothing),
            audit: if has_audit { sets.next() } else { None },
            extra: sets.collect(),
        }
    }

    fn all(&self) -> impl Iterator<Item = &(String, Scores)> {
        [&self.gate]
            .into_iter()
            .chain(&self.audit)
            .chain(&self.extra)
    }
}

/// Puts the losses into the store, blobs before the rows that name them.
async fn store(app: &App, losses: &Losses) -> Result<(EvalResult, Vec<BlobName>), Error> {
    let mut blobs = Vec::new();
    let put = async |scores: &Scores, blobs: &mut Vec<BlobName>| {
        let name = app.blobs.put_bytes(Bytes::from(scores.encode())).await?;
        blobs.push(name);
        Ok::<_, Error>(name.digest)
    };
    let nothing = || Error::invalid("sets", "no token of the gate set was scored");
    let mut result = EvalResult {
        gate_loss: losses.gate.1.loss().ok_or_else(nothing)?,
        audit_loss: None,
        gate_scores: put(&losses.gate.1, &mut blobs).await?,
        audit_scores: None,
        extra: BTreeMap::new(),
    };
    if let Some((_, scores)) = &losses.audit {
        result.audit_loss = scores.loss();
        result.audit_scores = Some(put(scores, &mut blobs).await?);
    }
    for (name, scores) in &losses.extra {
        // A sample whose every record was cut before its answer says nothing.
        let Some(loss) = scores.loss() else { continue };
        let scores = put(scores, &mut blobs).await?;
        result
            .extra
            .insert(name.clone(), SetResult { loss, scores });
    }
    Ok((result, blobs))
}

/// The evaluation lease of a caller, where a result under it stands, and what it is for; held where
/// the transaction writes.
pub(super) async fn find(
    tx: &mut Tx,
    caller: &Caller,
    id: LeaseId,
    generation: Generation,
) -> Result<(Lease, Standing, EvaluationId), Error> {
    let lease = lease_hold(tx, id)
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
fn in_order(asked: &[EvalSet], mut given: Vec<SetScores>) -> Result<Vec<(String, Scores)>, Error> {
    let mut ordered = Vec::new();
    for set in asked {
        let name = &set.dataset;
        let place = given
            .iter()
            .position(|given| given.dataset == *name)
            .ok_or_else(|| Error::invalid("sets", format!("set {name} is missing")))?;
        let scores = given.swap_remove(place).scores;
        let lengths = [scores.nll.len() as u64, scores.tokens.len() as u64];
        if lengths != [set.records(); 2] {
            let text = format!(
                "set {name} has {} records; there are losses of {} and token counts of {}",
                set.records(),
                lengths[0],
                lengths[1]
            );
            return Err(Error::invalid("sets", text));
        }
        ordered.push((name.clone(), scores));
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
/// base, or of the first evaluation there is, or two evaluators read the data differently.
async fn check_tokens(app: &App, ended: &[Evaluation], losses: &Losses) -> Result<(), Error> {
    let results: Vec<&EvalResult> = ended.iter().filter_map(|e| e.result.as_ref()).collect();
    let gate = results.first().map(|result| result.gate_scores);
    let mut known = vec![(&losses.gate, gate)];
    if let Some(audit) = &losses.audit {
        known.push((audit, results.iter().find_map(|result| result.audit_scores)));
    }
    for set in &losses.extra {
        let first = results.iter().find_map(|result| result.extra.get(&set.0));
        known.push((set, first.map(|first| first.scores)));
    }
    for ((name, scores), first) in known {
        let Some(digest) = first else { continue };
        if scores_of(app, digest).await?.tokens != scores.tokens {
            let text = format!(
                "the token counts of set {name} differ from those of an earlier evaluation of the \
                 same records"
            );
            return Err(Error::invalid("sets", text));
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
    app.keep_blobs(blobs.iter().copied()).await?;
    let mut tx = app.db.begin().await?;
    let Some(row) = take(&mut tx, caller, lease, id).await? else {
        return Ok(());
    };
    row.state.finish().map_err(|_| lost())?;
    for set in result.extra.values() {
        blob_keep(&mut tx, set.scores, row.round, Keep::Forever).await?;
    }
    if !evaluation_finish(&mut tx, &row, result, caller.worker, now).await? {
        return Err(lost());
    }
    let is_base = |job: &Job| matches!(job, Job::Score(c) if c.terms().is_empty());
    if is_base(&row.job) {
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
pub(super) async fn take(
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

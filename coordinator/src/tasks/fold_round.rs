//! A chosen stack becomes the next checkpoint: folded from W0 with every contribution so far, stored,
//! signed, and made the head in one transaction.
//!
//! Contributions that have been revoked are left out, of whichever round they are. A choice that
//! names a revoked submission of its own round is made again: it has not been tested without it.
use std::collections::BTreeMap;
use std::fmt::Write as _;

use cairn_stack::digest::Digest;
use cairn_stack::files::FileEntry;
use cairn_stack::lineage::{DatasetRef, Manifest, Scores};
use tracing::{error, info};

use super::Done;
use crate::app::App;
use crate::db::Tx;
use crate::db::datasets::dataset_chunks;
use crate::db::models::{
    CheckpointRow, checkpoint_get, checkpoint_next, model_get, model_head_move,
};
use crate::db::revocations::revocation_count;
use crate::db::rounds::{Round, round_in, round_move};
use crate::db::submissions::{submission_get, submission_weight};
use crate::domain::round::{FailReason, Phase, State};
use crate::domain::stacker::Choice;
use crate::error::Error;
use crate::folding::{self, Plan, Stored, content_files, layer_again, layer_of};
use crate::ids::SubmissionId;
use crate::manifests::{StoredManifest, read_manifest, sign_and_store};
use crate::ops::abort_round::round_end;

/// Rounds folded in one pass: each may take minutes.
const BATCH: u32 = 1;

/// One fold, if any round waits for one.
///
/// # Errors
/// When the database, the store or the disk fails; the fold is started over then.
pub async fn run(app: &App) -> Result<Done, Error> {
    let mut tx = app.db.read().await?;
    let waiting = round_in(&mut tx, State::Folding, BATCH).await?;
    drop(tx);
    let Some(round) = waiting.first() else {
        return Ok(Done::All);
    };
    let Phase::Folding { choice } = &round.phase else {
        return Ok(Done::All);
    };
    match publish(app, round, choice).await {
        Ok(()) => {}
        Err(Failure::Final(reason, text)) => {
            error!(round.id = %round.id, "round {} cannot be folded: {text}", round.id);
            fail(app, round, reason).await?;
        }
        Err(Failure::Revoked(id)) => choose_again(app, round, id).await?,
        Err(Failure::Again(problem)) => return Err(problem),
    }
    app.wake.all();
    Ok(Done::Part)
}

/// Why a fold came to nothing.
enum Failure {
    /// It would come to nothing again.
    Final(FailReason, String),
    /// A submission of the round has been revoked since it was chosen.
    Revoked(SubmissionId),
    /// The next try may succeed.
    Again(Error),
}

impl From<Error> for Failure {
    fn from(problem: Error) -> Self {
        Self::Again(problem)
    }
}

impl From<folding::Failure> for Failure {
    fn from(failure: folding::Failure) -> Self {
        match failure {
            folding::Failure::Final(text) => Self::Final(FailReason::FoldFailed, text),
            folding::Failure::Again(problem) => Self::Again(problem),
        }
    }
}

async fn fail(app: &App, round: &Round, reason: FailReason) -> Result<(), Error> {
    let now = app.clock.now_ms();
    let to = round.phase.clone().fail(reason, now);
    let to = to.map_err(|error| Error::internal("fail a round", error))?;
    let mut tx = app.db.begin().await?;
    if round_end(&mut tx, round.id, State::Folding, &to, now).await? {
        tx.commit().await?;
    }
    Ok(())
}

async fn choose_again(app: &App, round: &Round, revoked: SubmissionId) -> Result<(), Error> {
    let to = round.phase.clone().choose_again();
    let to = to.map_err(|error| Error::internal("choose again", error))?;
    let mut tx = app.db.begin().await?;
    if round_move(&mut tx, round.id, State::Folding, &to).await? {
        tx.commit().await?;
        info!(round.id = %round.id, "round {}: {revoked} was revoked, choosing again", round.id);
    }
    Ok(())
}

/// What the fold adds up to, and what its manifest says besides.
struct Next {
    fold: Plan,
    /// The head that must not move meanwhile.
    head: u32,
    revision: u32,
    base_entries: Vec<FileEntry>,
    dataset: DatasetRef,
}

async fn publish(app: &App, round: &Round, choice: &Choice) -> Result<(), Failure> {
    let next = plan(app, round, choice).await?;
    let made = folding::fold(app, &next.fold).await?;
    let contributions = next.fold.stack.iter();
    let manifest = Manifest {
        revision: u64::from(next.revision),
        parent: Some(round.base_commit.to_string()),
        round: Some(round.id.to_string()),
        base: next.base_entries.clone(),
        dataset: Some(next.dataset.clone()),
        recipe: Some(round.file.recipe.clone()),
        contributions: contributions.map(|l| l.contribution.clone()).collect(),
        scores: Scores {
            gate_before: Some(choice.gate_before),
            gate_after: Some(choice.gate_after),
            audit_before: choice.audit_before,
            audit_after: choice.audit_after,
        },
        ..Manifest::new(
            &round.model,
            app.clock.now_ms().0.unsigned_abs(),
            made.entries.clone(),
        )
    };
    let manifest = sign_and_store(app, manifest).await?;
    commit(app, round, choice, &next, &made, &manifest).await
}

async fn plan(app: &App, round: &Round, choice: &Choice) -> Result<Next, Failure> {
    let mut tx = app.db.read().await?;
    // First of all: whatever is revoked from here on is seen when the rows are inserted.
    let revocations = revocation_count(&mut tx, &round.model).await?;
    let model = model_get(&mut tx, &round.model)
        .await?
        .ok_or_else(|| Error::not_found("model", &round.model))?;
    let head = model.head_revision;
    // A round on a named older revision publishes on top of whatever the head is.
    if round.file.revision.is_none() && head != round.base_revision {
        let text = format!(
            "the head is revision {head}, the base was {}",
            round.base_revision
        );
        return Err(Failure::Final(FailReason::HeadMoved, text));
    }
    let parent = checkpoint_get(&mut tx, &round.model, round.base_revision)
        .await?
        .ok_or_else(|| Error::inconsistent("rounds", "base_revision", round.id))?;
    let base = content_files(&mut tx, &round.model, 0).await?;
    let revision = checkpoint_next(&mut tx, &round.model).await?;
    drop(tx);
    let parent = read_manifest(app, parent.manifest).await?;

    let mut tx = app.db.read().await?;
    let mut stack = Vec::new();
    for contribution in parent.contributions {
        stack.extend(layer_again(&mut tx, contribution).await?);
    }
    let mut places: BTreeMap<SubmissionId, usize> = BTreeMap::new();
    for (place, layer) in stack.iter().enumerate() {
        places.insert(layer.submission, place);
    }
    let mut added = Vec::new();
    for term in &choice.terms {
        if let Some(place) = places.get(&term.submission) {
            stack[*place].contribution.weight += term.weight;
            added.push(term.clone());
            continue;
        }
        let lost = || Error::inconsistent("rounds", "choice", round.id);
        let submission = submission_get(&mut tx, term.submission).await?;
        let submission = submission.ok_or_else(lost)?;
        if submission.revoked.is_some() {
            if submission.round == round.id {
                return Err(Failure::Revoked(submission.id));
            }
            continue;
        }
        places.insert(submission.id, stack.len());
        stack.push(layer_of(&mut tx, submission, term.weight).await?);
        added.push(term.clone());
    }
    let dataset = DatasetRef {
        name: round.dataset.clone(),
        digest: describe_dataset(&mut tx, &round.dataset).await?,
    };
    let fold = Plan {
        model: round.model.clone(),
        base,
        stack,
        added,
        rank: round.file.recipe.rank,
        revocations,
    };
    Ok(Next {
        fold,
        head,
        revision,
        base_entries: parent.base,
        dataset,
    })
}

/// Digest of a dataset's description: its name, and digest and records of each chunk, a line each.
async fn describe_dataset(tx: &mut Tx, name: &str) -> Result<Digest, Error> {
    let mut text = format!("{name}\n");
    for chunk in dataset_chunks(tx, name).await? {
        let _ = writeln!(text, "{} {}", chunk.blob.digest, chunk.records);
    }
    Ok(Digest::of(text.as_bytes()))
}

/// Checkpoint, files, head, round and weights: all of it or nothing.
async fn commit(
    app: &App,
    round: &Round,
    choice: &Choice,
    next: &Next,
    made: &Stored,
    manifest: &StoredManifest,
) -> Result<(), Failure> {
    let now = app.clock.now_ms();
    let revision = next.revision;
    let checkpoint = CheckpointRow {
        model: round.model.clone(),
        revision,
        commit: manifest.commit,
        parent: Some(round.base_commit),
        round: Some(round.id),
        contributions: u32::try_from(next.fold.stack.len()).unwrap_or(u32::MAX),
        manifest: manifest.blob.digest,
        gate_loss: Some(choice.gate_after),
        audit_loss: choice.audit_after,
        refold_of: None,
        spectrum: Some(made.spectrum.clone()),
        created: now,
    };
    let to = round.phase.clone().publish(revision, now);
    let to = to.map_err(|error| Error::internal("publish a round", error))?;
    app.keep_blobs(made.blobs(manifest)).await?;
    let mut tx = app.db.begin().await?;
    if !model_head_move(&mut tx, &round.model, next.head, revision).await? {
        // The next pass sees where it went.
        return Err(Error::unavailable("the model's head has moved during the fold").into());
    }
    folding::insert(&mut tx, &next.fold, made, manifest, &checkpoint, now).await?;
    for term in &next.fold.added {
        let submission = submission_get(&mut tx, term.submission).await?;
        // What a round adds to earlier rounds' contributions is in the manifest alone.
        if submission.is_some_and(|submission| submission.round == round.id) {
            submission_weight(&mut tx, term.submission, term.weight).await?;
        }
    }
    if !round_end(&mut tx, round.id, State::Folding, &to, now).await? {
        // Ended meanwhile: the head stays where it is.
        return Ok(());
    }
    tx.commit().await?;
    info!(
        round.id = %round.id,
        "published {} revision {revision} ({}), gate loss {:.5} -> {:.5}",
        round.model, checkpoint.commit, choice.gate_before, choice.gate_after
    );
    Ok(())
}

//! Every checkpoint that contains a revoked contribution, of those that shall be replaced, is folded
//! again without it: oldest first, each as a new revision.
//!
//! The new one has the contributions of the old one that have not been revoked, with the same weights
//! in the same order: it is what would have been folded had they never been there. When the head is
//! replaced, it moves to the replacement in the same transaction; older revisions are replaced
//! without touching it. Two revisions of one round (the published one, and an earlier fold of it)
//! get one replacement.
use cairn_stack::lineage::{Manifest, Scores};
use tracing::{error, info};

use super::Done;
use crate::app::App;
use crate::db::Tx;
use crate::db::models::{
    CheckpointRow, checkpoint_by_commit, checkpoint_get, checkpoint_next, checkpoint_refold,
    model_get, model_head_move,
};
use crate::db::revocations::{
    checkpoint_marks, refold_done, refold_fail, refold_next, revocation_count,
};
use crate::error::Error;
use crate::folding::{self, Failure, Plan, layer_again, plan_again};
use crate::ids::Commit;
use crate::manifests::{read_manifest, sign_and_store};

/// One fold, if any checkpoint waits for one.
///
/// # Errors
/// When the database, the store or the disk fails; the fold is started over then.
pub async fn run(app: &App) -> Result<Done, Error> {
    let mut tx = app.db.read().await?;
    let waiting = refold_next(&mut tx).await?;
    let Some((model, revision)) = waiting else {
        return Ok(Done::All);
    };
    let affected = checkpoint_get(&mut tx, &model, revision)
        .await?
        .ok_or_else(|| Error::inconsistent("refolds", "revision", revision))?;
    drop(tx);
    match replace(app, &affected).await {
        Ok(()) => {}
        Err(Failure::Again(problem)) => return Err(problem),
        Err(Failure::Final(text)) => {
            error!("{model} revision {revision} cannot be folded again: {text}");
            let mut tx = app.db.begin().await?;
            refold_fail(&mut tx, &model, revision, &text).await?;
            tx.commit().await?;
        }
    }
    app.wake.all();
    Ok(Done::Part)
}

async fn replace(app: &App, affected: &CheckpointRow) -> Result<(), Failure> {
    let mut tx = app.db.read().await?;
    let origin = affected.refold_of.unwrap_or(affected.revision);
    let made = checkpoint_refold(&mut tx, &affected.model, origin).await?;
    let clean = match made {
        Some(row) if is_clean(&mut tx, &row).await? => Some(row.revision),
        _ => None,
    };
    drop(tx);
    if let Some(revision) = clean {
        let mut tx = app.db.begin().await?;
        put_in_place(&mut tx, affected, revision).await?;
        tx.commit().await?;
        return Ok(());
    }
    fold_again(app, affected, origin).await
}

async fn is_clean(tx: &mut Tx, row: &CheckpointRow) -> Result<bool, Error> {
    let marks = checkpoint_marks(tx, &row.model, row.revision, row.revision).await?;
    Ok(marks.is_empty())
}

/// What the new manifest says besides the stack.
struct Next {
    fold: Plan,
    revision: u32,
    parent: Option<Commit>,
    /// The affected checkpoint's.
    manifest: Manifest,
}

async fn fold_again(app: &App, affected: &CheckpointRow, origin: u32) -> Result<(), Failure> {
    let next = plan(app, affected, origin).await?;
    let made = folding::fold(app, &next.fold).await?;
    let contributions = next.fold.stack.iter();
    let now = app.clock.now_ms();
    let manifest = Manifest {
        revision: u64::from(next.revision),
        parent: next.parent.map(|commit| commit.to_string()),
        published_ms: now.0.unsigned_abs(),
        contributions: contributions.map(|l| l.contribution.clone()).collect(),
        // Nobody has scored it; the next round on it will.
        scores: Scores::default(),
        files: made.entries.clone(),
        ..next.manifest
    };
    let manifest = sign_and_store(app, manifest).await?;
    let checkpoint = CheckpointRow {
        model: affected.model.clone(),
        revision: next.revision,
        commit: manifest.commit,
        parent: next.parent,
        round: affected.round,
        contributions: u32::try_from(next.fold.stack.len()).unwrap_or(u32::MAX),
        manifest: manifest.blob.digest,
        gate_loss: None,
        audit_loss: None,
        refold_of: Some(origin),
        spectrum: Some(made.spectrum.clone()),
        created: now,
    };
    app.keep_blobs(made.blobs(&manifest)).await?;
    let mut tx = app.db.begin().await?;
    put_in_place(&mut tx, affected, next.revision).await?;
    folding::insert(&mut tx, &next.fold, &made, &manifest, &checkpoint, now).await?;
    tx.commit().await?;
    info!(
        "{} revision {} ({}) takes the place of revision {}, with {} of its {} contributions",
        affected.model,
        next.revision,
        checkpoint.commit,
        affected.revision,
        checkpoint.contributions,
        affected.contributions
    );
    Ok(())
}

async fn plan(app: &App, affected: &CheckpointRow, origin: u32) -> Result<Next, Error> {
    let manifest = read_manifest(app, affected.manifest).await?;
    let mut tx = app.db.read().await?;
    let revocations = revocation_count(&mut tx, &affected.model).await?;
    let mut stack = Vec::new();
    for contribution in manifest.contributions.clone() {
        stack.extend(layer_again(&mut tx, contribution).await?);
    }
    let fold = plan_again(&mut tx, affected, &manifest, stack, revocations).await?;
    let row = checkpoint_get(&mut tx, &affected.model, origin)
        .await?
        .ok_or_else(|| Error::inconsistent("checkpoints", "refold_of", affected.revision))?;
    Ok(Next {
        fold,
        revision: checkpoint_next(&mut tx, &affected.model).await?,
        parent: parent_of(&mut tx, &row).await?,
        manifest,
    })
}

/// The parent of a round's revision, or what took the parent's place.
async fn parent_of(tx: &mut Tx, row: &CheckpointRow) -> Result<Option<Commit>, Error> {
    let Some(commit) = row.parent else {
        return Ok(None);
    };
    let mut found = checkpoint_by_commit(tx, &row.model, &commit.to_string()).await?;
    let Some(parent) = found.pop() else {
        return Ok(Some(commit));
    };
    if is_clean(tx, &parent).await? {
        return Ok(Some(commit));
    }
    let origin = parent.refold_of.unwrap_or(parent.revision);
    let made = checkpoint_refold(tx, &row.model, origin).await?;
    Ok(Some(made.map_or(commit, |made| made.commit)))
}

/// Names the replacement, and moves the head to it when the head is what it replaces.
async fn put_in_place(tx: &mut Tx, affected: &CheckpointRow, revision: u32) -> Result<(), Error> {
    let model = &affected.model;
    let head = model_get(tx, model)
        .await?
        .ok_or_else(|| Error::not_found("model", model))?
        .head_revision;
    let to = if head == affected.revision {
        revision
    } else {
        head
    };
    // Even where it stays: holds the model's row until the end.
    if !model_head_move(tx, model, head, to).await? {
        return Err(Error::unavailable(
            "the model's head has moved during the fold",
        ));
    }
    if refold_done(tx, model, affected.revision, revision).await? {
        return Ok(());
    }
    Err(Error::unavailable("another coordinator was faster"))
}

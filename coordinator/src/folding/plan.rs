//! What is folded: the base, and the stack in its order.
use cairn_stack::digest::Digest;
use cairn_stack::lineage::{CHECKSUMS_FILE, Contribution, MANIFEST_FILE, Manifest, SIGNATURE_FILE};

use crate::db::Tx;
use crate::db::contributions::contribution_files;
use crate::db::models::{CheckpointRow, FileRow, Folder, checkpoint_files};
use crate::db::rounds::round_get;
use crate::db::shards::shard_get;
use crate::db::submissions::{Submission, submission_get};
use crate::domain::candidate::Term;
use crate::domain::credit;
use crate::domain::round::Phase;
use crate::error::Error;
use crate::ids::SubmissionId;

/// One contribution and the config its scale is in.
#[derive(Debug, Clone)]
pub struct Layer {
    /// What the manifest says of it; its weight is the whole one.
    pub contribution: Contribution,
    /// `adapter_config.json`.
    pub config: String,
    /// Whose adapter.
    pub submission: SubmissionId,
    /// Whether its files have been noted by an earlier checkpoint.
    pub filed: bool,
}

/// A fold.
#[derive(Debug, Clone)]
pub struct Plan {
    /// The model.
    pub model: String,
    /// Files of W0, without its manifest.
    pub base: Vec<FileRow>,
    /// The whole stack in the order of the fold.
    pub stack: Vec<Layer>,
    /// What the round adds to its parent's stack: the weights of its own contributions, and what it
    /// adds to those of earlier ones.
    pub added: Vec<Term>,
    /// Rank of the round's recipe.
    pub rank: u32,
    /// Revocations in this model when the stack was read.
    pub revocations: u64,
}

/// The files of a checkpoint, without its manifest: what it is, whatever its name.
///
/// # Errors
/// When the query fails.
pub async fn content_files(tx: &mut Tx, model: &str, revision: u32) -> Result<Vec<FileRow>, Error> {
    let mut files = checkpoint_files(tx, model, revision, Folder::Checkpoint).await?;
    files.retain(is_content);
    Ok(files)
}

/// Whether a file is part of what a checkpoint is, and not of what is said about it.
pub fn is_content(file: &FileRow) -> bool {
    ![MANIFEST_FILE, SIGNATURE_FILE, CHECKSUMS_FILE].contains(&file.path.as_str())
}

/// How a checkpoint is folded again from layers of its stack.
///
/// # Errors
/// When a query fails.
pub async fn plan_again(
    tx: &mut Tx,
    checkpoint: &CheckpointRow,
    manifest: &Manifest,
    stack: Vec<Layer>,
    revocations: u64,
) -> Result<Plan, Error> {
    let round = match checkpoint.round {
        Some(round) => round_get(tx, round).await?,
        None => None,
    };
    let mut added = match round.map(|round| round.phase) {
        Some(Phase::Published { choice, .. }) => choice.terms,
        _ => Vec::new(),
    };
    added.retain(|term| {
        stack
            .iter()
            .any(|layer| layer.submission == term.submission)
    });
    Ok(Plan {
        model: checkpoint.model.clone(),
        base: content_files(tx, &checkpoint.model, 0).await?,
        added,
        stack,
        rank: manifest.recipe.as_ref().map_or(1, |recipe| recipe.rank),
        revocations,
    })
}

/// A contribution of an earlier checkpoint; none when it has been revoked since.
///
/// # Errors
/// As [`layer_stacked`].
pub async fn layer_again(tx: &mut Tx, contribution: Contribution) -> Result<Option<Layer>, Error> {
    let (layer, revoked) = layer_stacked(tx, contribution).await?;
    Ok((!revoked).then_some(layer))
}

/// A contribution as it was stacked, and whether it has been revoked since.
///
/// # Errors
/// INTERNAL when the submission is not there or is another; when a query fails.
pub async fn layer_stacked(
    tx: &mut Tx,
    contribution: Contribution,
) -> Result<(Layer, bool), Error> {
    let lost = || Error::inconsistent("submissions", "id", &contribution.id);
    let id: SubmissionId = contribution.id.parse().map_err(|_| lost())?;
    let submission = submission_get(tx, id).await?.ok_or_else(lost)?;
    if submission.adapter != contribution.adapter {
        return Err(lost());
    }
    let layer = Layer {
        filed: !contribution_files(tx, id).await?.is_empty(),
        config: submission.adapter_config,
        submission: id,
        contribution,
    };
    Ok((layer, submission.revoked.is_some()))
}

/// A submission that is stacked for the first time.
///
/// # Errors
/// INTERNAL when its round or shard is not there; when a query fails.
pub async fn layer_of(tx: &mut Tx, submission: Submission, weight: f64) -> Result<Layer, Error> {
    let (id, round) = (submission.id, submission.round);
    let lost = || Error::inconsistent("submissions", "shard", id);
    let shard = shard_get(tx, round, submission.shard).await?;
    let shard = shard.ok_or_else(lost)?;
    let recipe = round_get(tx, round).await?.ok_or_else(lost)?.file.recipe;
    let contribution = Contribution {
        id: id.to_string(),
        round: round.to_string(),
        worker: submission.worker.to_string(),
        shard: submission.shard,
        tokens: credit::tokens(submission.numbers.tokens, shard.records, &recipe),
        adapter: submission.adapter,
        adapter_config: Digest::of(submission.adapter_config.as_bytes()),
        weight,
    };
    Ok(Layer {
        contribution,
        filed: !contribution_files(tx, id).await?.is_empty(),
        config: submission.adapter_config,
        submission: id,
    })
}

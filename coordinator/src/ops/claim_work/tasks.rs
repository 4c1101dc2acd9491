//! What the holder of a lease is told: all that its work needs.
use std::fmt::Write as _;

use cairn_proto::convert::BlobName;
use cairn_stack::digest::Digest;
use cairn_stack::recipe::Recipe;

use super::eval_sets::{EvalSet, eval_sets};
use crate::db::Tx;
use crate::db::audits::audit_get;
use crate::db::evaluations::evaluation_get;
use crate::db::models::{CheckpointRow, FileRow, Folder, checkpoint_files};
use crate::db::rounds::Round;
use crate::db::shards::shard_ranges;
use crate::db::submissions::submission_get;
use crate::domain::audit::File;
use crate::domain::candidate::Candidate;
use crate::domain::evaluation::Job;
use crate::domain::lease::Work;
use crate::domain::plan::{Range, shard_recipe};
use crate::error::Error;
use crate::folding::content_files;
use crate::ids::{EvaluationId, SubmissionId};
use crate::ops::read_models::checkpoint_find;

/// What is to be done.
#[derive(Debug, Clone)]
pub enum Task {
    /// Train on a shard.
    Train(TrainTask),
    /// Score a candidate.
    Evaluate(EvaluateTask),
    /// Train the first steps on a shard.
    Guide {
        /// The work as a volunteer has it.
        train: TrainTask,
        /// How many optimiser steps.
        steps: u32,
    },
    /// Train a segment again.
    Replay(ReplayTask),
    /// Find factors on the adapters.
    Learn {
        /// The adapters to start from and the sets.
        evaluate: EvaluateTask,
        /// Passes over the sets.
        steps: u32,
    },
}

/// Training on a shard.
#[derive(Debug, Clone)]
pub struct TrainTask {
    /// Its position.
    pub shard: u32,
    /// Its records.
    pub records: Vec<Range>,
    /// The recipe with the shard's own seed, TOML.
    pub recipe: String,
    /// Largest upload, bytes.
    pub adapter_bytes_max: u64,
    /// Segments to commit to; 0 for none.
    pub segments: u32,
    /// The factors to start from, when not fresh ones.
    pub carry: Option<WeightedAdapter>,
    /// The checkpoint to learn from, where the round distils.
    pub teacher: Option<Teacher>,
}

/// A checkpoint to learn from.
#[derive(Debug, Clone)]
pub struct Teacher {
    /// Which.
    pub checkpoint: CheckpointRow,
    /// Its folder.
    pub files: Vec<FileRow>,
}

/// Scoring a candidate.
#[derive(Debug, Clone)]
pub struct EvaluateTask {
    /// Which evaluation.
    pub evaluation: EvaluationId,
    /// The adapters to apply together.
    pub adapters: Vec<WeightedAdapter>,
    /// The sets to score.
    pub sets: Vec<EvalSet>,
    /// Where records are cut, tokens.
    pub sequence_length: u32,
    /// What preferences are measured with.
    pub dpo_beta: f64,
}

/// Training a segment again.
#[derive(Debug, Clone)]
pub struct ReplayTask {
    /// Whose.
    pub submission: SubmissionId,
    /// The work as the volunteer had it.
    pub train: TrainTask,
    /// The step at the segment's start.
    pub first_step: u32,
    /// The step at its end.
    pub last_step: u32,
    /// Factors and moments to start from; nothing at the beginning.
    pub start: Option<(BlobName, BlobName)>,
    /// The factors claimed for the end.
    pub end: BlobName,
}

/// One adapter of a candidate.
#[derive(Debug, Clone)]
pub struct WeightedAdapter {
    /// The weight file.
    pub weights: BlobName,
    /// `adapter_config.json`.
    pub config: String,
    /// Factor on its delta.
    pub weight: f64,
}

/// The work of a lease of this round.
///
/// # Errors
/// When a row that must be there is not, or the database fails.
pub async fn task(tx: &mut Tx, round: &Round, work: &Work) -> Result<Task, Error> {
    let id = match work {
        Work::Train(shard) => return train(tx, round, *shard).await.map(Task::Train),
        Work::Evaluate(id) => *id,
    };
    let evaluation = evaluation_get(tx, id)
        .await?
        .ok_or_else(|| Error::inconsistent("leases", "evaluation_id", id))?;
    Ok(match &evaluation.job {
        Job::Score(candidate) => Task::Evaluate(evaluate(tx, round, id, candidate).await?),
        Job::Learn { candidate, steps } => Task::Learn {
            evaluate: evaluate(tx, round, id, candidate).await?,
            steps: *steps,
        },
        Job::Guide { shard } => Task::Guide {
            train: train(tx, round, *shard).await?,
            steps: round.file.policy.guide_steps,
        },
        Job::Replay { submission } => Task::Replay(replay(tx, round, *submission).await?),
    })
}

async fn train(tx: &mut Tx, round: &Round, shard: u32) -> Result<TrainTask, Error> {
    let base = content_of(tx, round).await?;
    let recipe = shard_recipe(&round.file, base, shard);
    let carry = round.carry.as_ref().map(|carry| WeightedAdapter {
        weights: carry.weights,
        config: carry.config.clone(),
        weight: 1.0,
    });
    Ok(TrainTask {
        shard,
        records: shard_ranges(tx, round.id, shard).await?,
        recipe: recipe.to_toml(),
        adapter_bytes_max: round.adapter_bytes_max,
        segments: round.file.policy.segments,
        carry,
        teacher: teacher_of(tx, &round.file.recipe).await?,
    })
}

/// The teacher of a recipe, where it names one.
///
/// # Errors
/// NOT_FOUND when there is no such checkpoint.
pub async fn teacher_of(tx: &mut Tx, recipe: &Recipe) -> Result<Option<Teacher>, Error> {
    let Some(named) = recipe.objective.teacher() else {
        return Ok(None);
    };
    let found = checkpoint_find(tx, &named.model, &named.revision).await?;
    let files = checkpoint_files(tx, &found.model, found.revision, Folder::Checkpoint).await?;
    Ok(Some(Teacher {
        checkpoint: found,
        files,
    }))
}

/// Digest of the files that the base is, whatever its name and when it was published.
async fn content_of(tx: &mut Tx, round: &Round) -> Result<Digest, Error> {
    let mut text = String::new();
    for file in content_files(tx, &round.model, round.base_revision).await? {
        let _ = writeln!(text, "{} {}", file.path, file.blob.digest);
    }
    Ok(Digest::of(text.as_bytes()))
}

async fn evaluate(
    tx: &mut Tx,
    round: &Round,
    id: EvaluationId,
    candidate: &Candidate,
) -> Result<EvaluateTask, Error> {
    let mut adapters = Vec::new();
    for term in candidate.terms() {
        let submission = submission_get(tx, term.submission)
            .await?
            .ok_or_else(|| Error::inconsistent("evaluations", "candidate", id))?;
        let weights = BlobName {
            digest: submission.adapter,
            size_bytes: submission.adapter_bytes,
        };
        adapters.push(WeightedAdapter {
            weights,
            config: submission.adapter_config,
            weight: term.weight,
        });
    }
    Ok(EvaluateTask {
        evaluation: id,
        adapters,
        sets: eval_sets(tx, round, candidate.sets()).await?,
        sequence_length: round.file.recipe.sequence_length,
        dpo_beta: round.file.recipe.objective.dpo_beta(),
    })
}

async fn replay(tx: &mut Tx, round: &Round, id: SubmissionId) -> Result<ReplayTask, Error> {
    let missing = || Error::inconsistent("evaluations", "subject", id);
    let submission = submission_get(tx, id).await?.ok_or_else(missing)?;
    let audit = audit_get(tx, id).await?.ok_or_else(missing)?;
    let opened = audit.opened.ok_or_else(missing)?;
    Ok(ReplayTask {
        submission: id,
        train: train(tx, round, submission.shard).await?,
        first_step: audit.first_step,
        last_step: audit.last_step,
        start: opened
            .start
            .map(|(factors, moments)| (name(factors), name(moments))),
        end: name(opened.end),
    })
}

const fn name(file: File) -> BlobName {
    BlobName {
        digest: file.digest,
        size_bytes: file.size_bytes,
    }
}

//! A chosen stack becomes the next checkpoint: folded from W0 with every contribution so far, stored,
//! signed, and made the head in one transaction.
//!
//! Everything before that transaction can be done again: blobs are named by content, the scratch
//! folder goes with the process, and a killed coordinator starts the fold over.
use std::fmt::Write as _;
use std::path::{Path, PathBuf};

use cairn_proto::convert::BlobName;
use cairn_stack::adapter::{AdapterError, AdapterFile, CONFIG_FILE, WEIGHTS_FILE};
use cairn_stack::checkpoint::Checkpoint;
use cairn_stack::compress;
use cairn_stack::digest::Digest;
use cairn_stack::files::{FileEntry, list_files};
use cairn_stack::fold::{FoldError, Term, fold};
use cairn_stack::lineage::{
    CHECKSUMS_FILE, Contribution, DatasetRef, MANIFEST_BYTES_MAX, MANIFEST_FILE, Manifest,
    SIGNATURE_FILE, Scores,
};
use tracing::{error, info};

use super::Done;
use crate::app::App;
use crate::blobs::Audience;
use crate::db::Tx;
use crate::db::blobs::{SERVER, blob_insert, blob_publish};
use crate::db::contributions::{contribution_file_insert, contribution_files};
use crate::db::datasets::dataset_chunks;
use crate::db::log::{EntryKind, log_append};
use crate::db::models::{
    CheckpointRow, FileRow, Folder, checkpoint_files, checkpoint_get, checkpoint_insert, model_get,
    model_head_move,
};
use crate::db::rounds::{Round, round_in};
use crate::db::shards::shard_get;
use crate::db::submissions::{submission_get, submission_weight};
use crate::domain::credit;
use crate::domain::round::{FailReason, Phase, State};
use crate::domain::stacker::Choice;
use crate::error::Error;
use crate::ids::SubmissionId;
use crate::manifests::log_entry;
use crate::manifests::{StoredManifest, sign_and_store};
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
        Err(Failure::Again(problem)) => return Err(problem),
    }
    app.wake.all();
    Ok(Done::Part)
}

/// Why a fold came to nothing.
enum Failure {
    /// It would come to nothing again.
    Final(FailReason, String),
    /// The next try may succeed.
    Again(Error),
}

impl From<Error> for Failure {
    fn from(problem: Error) -> Self {
        Self::Again(problem)
    }
}

impl From<std::io::Error> for Failure {
    fn from(problem: std::io::Error) -> Self {
        Self::Again(problem.into())
    }
}

impl From<FoldError> for Failure {
    fn from(problem: FoldError) -> Self {
        match problem {
            FoldError::NoSpace(_) => Self::Again(Error::disk_full(problem)),
            FoldError::Io { .. }
            | FoldError::Exists(_)
            | FoldError::Stopped
            | FoldError::Adapter(AdapterError::Io { .. }) => {
                Self::Again(Error::internal("fold", problem))
            }
            other => Self::Final(FailReason::FoldFailed, other.to_string()),
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

/// Where a fold starts from and what it adds.
struct Plan {
    /// The head that must not move meanwhile.
    head: u32,
    /// Files of W0, without its manifest.
    base: Vec<FileRow>,
    /// What the manifest says of W0.
    base_entries: Vec<FileEntry>,
    /// The whole stack in the order of the fold.
    stack: Vec<Layer>,
    /// How many of its last ones are this round's.
    added: usize,
    /// The training data's description.
    dataset: DatasetRef,
}

/// One contribution and the config its scale is in.
struct Layer {
    contribution: Contribution,
    config: String,
    submission: SubmissionId,
    /// Whether its files have been noted by an earlier round.
    filed: bool,
}

async fn publish(app: &App, round: &Round, choice: &Choice) -> Result<(), Failure> {
    let plan = plan(app, round, choice).await?;
    let scratch = app.scratch_folder("fold-")?;
    let made = make(app, &plan, scratch.path(), &round.model).await?;
    let files = store(app, &scratch.path().join("out"), &made.files).await?;
    let stack_files = store(app, &scratch.path().join("stack"), &made.stack).await?;
    let adapter_files = store_adapters(app, scratch.path(), &plan.stack).await?;
    let manifest = Manifest {
        revision: u64::from(plan.head) + 1,
        parent: Some(round.base_commit.to_string()),
        round: Some(round.id.to_string()),
        base: plan.base_entries.clone(),
        dataset: Some(plan.dataset.clone()),
        recipe: Some(round.file.recipe.clone()),
        contributions: plan
            .stack
            .iter()
            .map(|layer| layer.contribution.clone())
            .collect(),
        scores: Scores {
            gate_before: Some(choice.gate_before),
            gate_after: Some(choice.gate_after),
            audit_before: choice.audit_before,
            audit_after: choice.audit_after,
        },
        ..Manifest::new(
            &round.model,
            app.clock.now_ms().0.unsigned_abs(),
            made.files,
        )
    };
    let manifest = sign_and_store(app, manifest).await?;
    let made = Stored {
        files,
        stack_files,
        adapter_files,
        manifest,
    };
    commit(app, round, choice, &plan, made).await
}

async fn plan(app: &App, round: &Round, choice: &Choice) -> Result<Plan, Failure> {
    let mut tx = app.db.read().await?;
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
    let base = checkpoint_files(&mut tx, &round.model, 0, Folder::Checkpoint).await?;
    let base = base.into_iter().filter(|file| {
        ![MANIFEST_FILE, SIGNATURE_FILE, CHECKSUMS_FILE].contains(&file.path.as_str())
    });
    let base = base.collect();
    drop(tx);
    let bytes = app
        .blobs
        .get_bytes(parent.manifest, MANIFEST_BYTES_MAX as u64)
        .await?;
    let parent: Manifest = serde_json::from_slice(&bytes)
        .map_err(|error| Error::internal("read the parent's manifest", error))?;

    let mut tx = app.db.read().await?;
    let mut stack = Vec::new();
    for contribution in parent.contributions {
        stack.push(layer_of(&mut tx, contribution).await?);
    }
    for term in &choice.terms {
        stack.push(new_layer(&mut tx, round, term.submission, term.weight).await?);
    }
    let dataset = DatasetRef {
        name: round.dataset.clone(),
        digest: describe_dataset(&mut tx, &round.dataset).await?,
    };
    let added = choice.terms.len();
    Ok(Plan {
        head,
        base,
        base_entries: parent.base,
        stack,
        added,
        dataset,
    })
}

async fn layer_of(tx: &mut Tx, contribution: Contribution) -> Result<Layer, Error> {
    let lost = || Error::inconsistent("submissions", "id", &contribution.id);
    let id: SubmissionId = contribution.id.parse().map_err(|_| lost())?;
    let submission = submission_get(tx, id).await?.ok_or_else(lost)?;
    if submission.adapter != contribution.adapter {
        return Err(lost());
    }
    Ok(Layer {
        filed: !contribution_files(tx, id).await?.is_empty(),
        config: submission.adapter_config,
        submission: id,
        contribution,
    })
}

async fn new_layer(
    tx: &mut Tx,
    round: &Round,
    id: SubmissionId,
    weight: f64,
) -> Result<Layer, Error> {
    let lost = || Error::inconsistent("rounds", "choice", round.id);
    let submission = submission_get(tx, id).await?.ok_or_else(lost)?;
    let shard = shard_get(tx, round.id, submission.shard)
        .await?
        .ok_or_else(lost)?;
    let contribution = Contribution {
        id: id.to_string(),
        round: round.id.to_string(),
        worker: submission.worker.to_string(),
        shard: submission.shard,
        tokens: credit::tokens(submission.numbers.tokens, shard.records, &round.file.recipe),
        adapter: submission.adapter,
        adapter_config: Digest::of(submission.adapter_config.as_bytes()),
        weight,
    };
    Ok(Layer {
        contribution,
        config: submission.adapter_config,
        submission: id,
        filed: false,
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

/// What a fold made.
struct Made {
    /// The checkpoint's files, in `out/`.
    files: Vec<FileEntry>,
    /// The round's stack as one adapter, in `stack/`.
    stack: Vec<FileEntry>,
}

async fn make(app: &App, plan: &Plan, scratch: &Path, model: &str) -> Result<Made, Failure> {
    for file in &plan.base {
        app.blobs
            .materialise(file.blob.digest, &scratch.join("base").join(&file.path))
            .await?;
    }
    let mut layers = Vec::new();
    for layer in &plan.stack {
        let path = adapter_folder(scratch, layer).join(WEIGHTS_FILE);
        app.blobs
            .materialise(layer.contribution.adapter, &path)
            .await?;
        layers.push((path, layer.config.clone(), layer.contribution.weight));
    }
    let (scratch, model, added) = (scratch.to_owned(), model.to_owned(), plan.added);
    tokio::task::spawn_blocking(move || compute(&scratch, &layers, added, &model))
        .await
        .map_err(Error::from)?
}

/// The arithmetic, on files alone.
fn compute(
    scratch: &Path,
    layers: &[(PathBuf, String, f64)],
    added: usize,
    model: &str,
) -> Result<Made, Failure> {
    let broken = |text: String| Failure::Final(FailReason::FoldFailed, text);
    let base = Checkpoint::open(&scratch.join("base")).map_err(|e| broken(e.to_string()))?;
    let mut adapters = Vec::new();
    for (path, config, _) in layers {
        let adapter = AdapterFile::open_parts(path, config.as_bytes());
        adapters.push(adapter.map_err(FoldError::from)?);
    }
    let terms: Vec<Term<'_>> = adapters
        .iter()
        .zip(layers)
        .map(|(adapter, (_, _, weight))| Term {
            adapter,
            weight: *weight,
        })
        .collect();
    let report = fold(&base, &terms, &scratch.join("out"))?;

    let first = terms.len().saturating_sub(added);
    let new: Vec<(&AdapterFile, f64)> = terms[first..]
        .iter()
        .map(|term| (term.adapter, term.weight))
        .collect();
    let folder = scratch.join("stack");
    compress::concat(&new, &folder, Some(model), None).map_err(FoldError::from)?;
    let stack = list_files(&folder)?
        .iter()
        .map(|path| FileEntry::of_file(&folder, path))
        .collect::<Result<_, _>>()?;
    Ok(Made {
        files: report.files,
        stack,
    })
}

/// Puts files into the blob store; their rows come later.
async fn store(app: &App, folder: &Path, entries: &[FileEntry]) -> Result<Vec<FileRow>, Error> {
    let mut rows = Vec::new();
    for entry in entries {
        let blob = app.blobs.put_file(&folder.join(&entry.path)).await?;
        if blob.digest != entry.blake3 || blob.size_bytes != entry.size {
            return Err(crate::blobs::changed(entry.blake3));
        }
        rows.push(FileRow {
            path: entry.path.clone(),
            blob,
            sha256: entry.sha256.clone(),
        });
    }
    Ok(rows)
}

fn adapter_folder(scratch: &Path, layer: &Layer) -> PathBuf {
    scratch.join("adapters").join(layer.submission.to_string())
}

/// The two files of every contribution that is stacked for the first time. Its weights are held
/// since they were submitted.
async fn store_adapters(
    app: &App,
    scratch: &Path,
    stack: &[Layer],
) -> Result<Vec<(SubmissionId, FileRow)>, Error> {
    let mut rows = Vec::new();
    for layer in stack.iter().filter(|layer| !layer.filed) {
        let folder = adapter_folder(scratch, layer);
        tokio::fs::write(folder.join(CONFIG_FILE), &layer.config).await?;
        app.blobs.put_file(&folder.join(CONFIG_FILE)).await?;
        let entries = tokio::task::spawn_blocking(move || {
            [WEIGHTS_FILE, CONFIG_FILE].map(|path| FileEntry::of_file(&folder, path))
        });
        for entry in entries.await? {
            let entry = entry?;
            let file = FileRow {
                path: entry.path,
                blob: BlobName {
                    digest: entry.blake3,
                    size_bytes: entry.size,
                },
                sha256: entry.sha256,
            };
            rows.push((layer.submission, file));
        }
    }
    Ok(rows)
}

/// What lies in the blob store and has no rows yet.
struct Stored {
    files: Vec<FileRow>,
    stack_files: Vec<FileRow>,
    adapter_files: Vec<(SubmissionId, FileRow)>,
    manifest: StoredManifest,
}

/// Checkpoint, files, head, round and weights: all of it or nothing.
async fn commit(
    app: &App,
    round: &Round,
    choice: &Choice,
    plan: &Plan,
    made: Stored,
) -> Result<(), Failure> {
    let Stored {
        mut files,
        stack_files,
        adapter_files,
        manifest,
    } = made;
    let now = app.clock.now_ms();
    let revision = plan.head + 1;
    files.extend(manifest.files);
    let checkpoint = CheckpointRow {
        model: round.model.clone(),
        revision,
        commit: manifest.commit,
        parent: Some(round.base_commit),
        round: Some(round.id),
        contributions: u32::try_from(plan.stack.len()).unwrap_or(u32::MAX),
        manifest: manifest.blob.digest,
        gate_loss: Some(choice.gate_after),
        audit_loss: choice.audit_after,
        created: now,
    };
    let to = round.phase.clone().publish(revision, now);
    let to = to.map_err(|error| Error::internal("publish a round", error))?;
    let mut tx = app.db.begin().await?;
    for file in files.iter().chain(&stack_files) {
        blob_insert(&mut tx, file.blob, Audience::Members, SERVER, now).await?;
        blob_publish(&mut tx, file.blob.digest).await?;
    }
    for (submission, file) in &adapter_files {
        // Kept from volunteers: whoever sees another's adapter can hand in a copy.
        blob_insert(&mut tx, file.blob, Audience::Evaluators, SERVER, now).await?;
        contribution_file_insert(&mut tx, *submission, file).await?;
    }
    if !model_head_move(&mut tx, &round.model, plan.head, revision).await? {
        // The next pass sees where it went.
        return Err(Error::unavailable("the model's head has moved during the fold").into());
    }
    if !checkpoint_insert(&mut tx, &checkpoint, &files, &stack_files).await? {
        return Err(Error::inconsistent("checkpoints", "revision", round.id).into());
    }
    for (layer, term) in plan
        .stack
        .iter()
        .skip(plan.stack.len() - plan.added)
        .zip(&choice.terms)
    {
        debug_assert_eq!(layer.submission, term.submission);
        submission_weight(&mut tx, layer.submission, term.weight).await?;
    }
    log_append(&mut tx, EntryKind::Manifest, &log_entry(&checkpoint), now).await?;
    if !round_end(&mut tx, round.id, State::Folding, &to, now).await? {
        // Aborted meanwhile: the head stays where it is.
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

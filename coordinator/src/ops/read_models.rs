//! Reading models and checkpoints.
use cairn_proto::reason::ErrorReason;
use cairn_stack::lineage::{MANIFEST_FILE, SIGNATURE_FILE};

use crate::app::App;
use crate::caller::Caller;
use crate::db::Tx;
use crate::db::contributions::contribution_files;
use crate::db::models::{
    CheckpointRow, FileRow, Folder, ModelRow, checkpoint_by_commit, checkpoint_files,
    checkpoint_get, checkpoint_list, model_get, model_list,
};
use crate::error::Error;
use crate::limits;
use crate::manifests::{read_manifest, signed_json};
use crate::ops::read_contributions::{Marked, mark, mark_one};

/// A model and its newest checkpoint.
#[derive(Debug, Clone)]
pub struct ModelView {
    /// The model.
    pub model: ModelRow,
    /// Its newest checkpoint.
    pub head: Marked,
}

/// A checkpoint with everything in it.
#[derive(Debug, Clone)]
pub struct CheckpointView {
    /// The checkpoint.
    pub checkpoint: Marked,
    /// Its folder.
    pub files: Vec<FileRow>,
    /// The round's stack as one adapter.
    pub stack_files: Vec<FileRow>,
    /// The same at the recipe's rank.
    pub compressed_files: Vec<FileRow>,
    /// Manifest and signature, JSON; see [`signed_json`].
    pub signed_manifest: Vec<u8>,
    /// Every stacked contribution's adapter, under its id; only for those who may read them.
    pub adapter_files: Vec<FileRow>,
}

/// Shortest start of a commit that may name it, hex digits.
const COMMIT_START_MIN: usize = 8;

/// Models by name after `after`, at most `limit`.
///
/// # Errors
/// UNAVAILABLE.
pub async fn list_models(app: &App, after: &str, limit: u32) -> Result<Vec<ModelView>, Error> {
    let mut tx = app.db.read().await?;
    let mut views = Vec::new();
    for model in model_list(&mut tx, after, i64::from(limit)).await? {
        let row = head(&mut tx, &model).await?;
        let head = mark_one(&mut tx, row).await?;
        views.push(ModelView { model, head });
    }
    Ok(views)
}

/// A checkpoint by revision number, commit, or the head when `revision` is empty.
///
/// # Errors
/// NOT_FOUND; INVALID_ARGUMENT for a start of a commit that is too short or ambiguous.
pub async fn get_checkpoint(
    app: &App,
    caller: &Caller,
    model: &str,
    revision: &str,
) -> Result<CheckpointView, Error> {
    let mut tx = app.db.read().await?;
    let checkpoint = checkpoint_find(&mut tx, model, revision).await?;
    let number = checkpoint.revision;
    let files = checkpoint_files(&mut tx, model, number, Folder::Checkpoint).await?;
    let stack_files = checkpoint_files(&mut tx, model, number, Folder::Stack).await?;
    let compressed_files = checkpoint_files(&mut tx, model, number, Folder::Compressed).await?;
    let checkpoint = mark_one(&mut tx, checkpoint).await?;
    drop(tx);
    let signed_manifest = signed_manifest(app, &files).await?;
    let adapter_files = if caller.role.is_trusted() {
        adapter_files(app, &checkpoint.row).await?
    } else {
        Vec::new()
    };
    Ok(CheckpointView {
        checkpoint,
        files,
        stack_files,
        compressed_files,
        signed_manifest,
        adapter_files,
    })
}

/// The adapters of all contributions, each under its id; nothing when they are too many for one
/// answer.
async fn adapter_files(app: &App, checkpoint: &CheckpointRow) -> Result<Vec<FileRow>, Error> {
    if checkpoint.contributions == 0 || checkpoint.contributions > limits::CONTRIBUTIONS_INLINE_MAX
    {
        return Ok(Vec::new());
    }
    let manifest = read_manifest(app, checkpoint.manifest).await?;
    let mut tx = app.db.read().await?;
    let mut files = Vec::new();
    for contribution in manifest.contributions {
        let id = &contribution.id;
        let submission = id
            .parse()
            .map_err(|_| Error::inconsistent("submissions", "id", id))?;
        for file in contribution_files(&mut tx, submission).await? {
            files.push(FileRow {
                path: format!("{id}/{}", file.path),
                ..file
            });
        }
    }
    Ok(files)
}

/// Both files' texts in one JSON object; nothing when they are too large for one answer.
async fn signed_manifest(app: &App, files: &[FileRow]) -> Result<Vec<u8>, Error> {
    let find = |path: &str| {
        files
            .iter()
            .find(|file| file.path == path)
            .map(|file| file.blob)
    };
    let (Some(manifest), Some(signature)) = (find(MANIFEST_FILE), find(SIGNATURE_FILE)) else {
        return Ok(Vec::new());
    };
    let bytes_max = limits::MANIFEST_INLINE_BYTES_MAX;
    if manifest.size_bytes > bytes_max {
        return Ok(Vec::new());
    }
    let manifest = app.blobs.get_bytes(manifest.digest, bytes_max).await?;
    let signature = app.blobs.get_bytes(signature.digest, bytes_max).await?;
    Ok(signed_json(&manifest, &signature))
}

/// Checkpoints of a model below a revision, newest first, at most `limit`.
///
/// # Errors
/// NOT_FOUND when there is no such model.
pub async fn list_checkpoints(
    app: &App,
    model: &str,
    below: Option<u32>,
    limit: u32,
) -> Result<Vec<Marked>, Error> {
    let mut tx = app.db.read().await?;
    model_get(&mut tx, model)
        .await?
        .ok_or_else(|| Error::not_found("model", model))?;
    let below = below.map_or(i64::MAX, i64::from);
    let rows = checkpoint_list(&mut tx, model, below, i64::from(limit)).await?;
    mark(&mut tx, rows).await
}

/// Finds a checkpoint as people name it; see [`get_checkpoint`].
///
/// # Errors
/// As [`get_checkpoint`].
pub async fn checkpoint_find(
    tx: &mut Tx,
    model: &str,
    revision: &str,
) -> Result<CheckpointRow, Error> {
    let row = model_get(tx, model)
        .await?
        .ok_or_else(|| Error::not_found("model", model))?;
    if revision.is_empty() {
        return head(tx, &row).await;
    }
    let none = || Error::not_found("checkpoint", format!("{model}@{revision}"));
    let is_number =
        revision.len() < COMMIT_START_MIN && revision.bytes().all(|b| b.is_ascii_digit());
    if is_number {
        let number = revision.parse::<u32>().map_err(|_| none())?;
        return checkpoint_get(tx, model, number).await?.ok_or_else(none);
    }
    let is_hex = revision
        .bytes()
        .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
    if !is_hex || !(COMMIT_START_MIN..=40).contains(&revision.len()) {
        return Err(Error::invalid(
            "revision",
            "a revision number, or at least 8 hex digits of a commit",
        ));
    }
    let mut found = checkpoint_by_commit(tx, model, revision).await?;
    match found.len() {
        0 => Err(none()),
        1 => Ok(found.remove(0)),
        _ => Err(Error::conflict(
            ErrorReason::InvalidArgument,
            format!("{revision} is the start of more than one commit"),
        )),
    }
}

/// The newest checkpoint of a model.
///
/// # Errors
/// INTERNAL when the head names none.
pub async fn head(tx: &mut Tx, model: &ModelRow) -> Result<CheckpointRow, Error> {
    checkpoint_get(tx, &model.name, model.head_revision)
        .await?
        .ok_or_else(|| Error::inconsistent("models", "head_revision", &model.name))
}

//! From contributions to a stored checkpoint: what publishing a round and folding one again share.
//!
//! A [`Plan`] is the base and the ordered stack. [`fold`] computes and stores the files, and is a
//! pure function of it; [`insert`] adds the rows in the caller's transaction. Everything before that
//! transaction can be done again: blobs are named by content, the scratch folder goes with the
//! process, and a killed coordinator starts the fold over.
mod compute;
mod plan;

use std::path::Path;

use cairn_proto::convert::BlobName;
use cairn_stack::adapter::{AdapterError, CONFIG_FILE, WEIGHTS_FILE};
use cairn_stack::files::FileEntry;
use cairn_stack::fold::FoldError;

use crate::app::App;
use crate::clock::Timestamp;
use crate::db::Tx;
use crate::db::blobs::blob_publish;
use crate::db::contributions::{checkpoint_contributions_insert, contribution_file_insert};
use crate::db::log::{EntryKind, log_append};
use crate::db::models::{CheckpointRow, FileRow, Folder, checkpoint_insert};
use crate::db::revocations::revocation_count;
use crate::error::Error;
use crate::ids::SubmissionId;
use crate::manifests::{StoredManifest, log_entry};

pub use compute::{Compressed, ModuleSpectrum, Spectra};
pub use plan::{
    Layer, Plan, content_files, is_content, layer_again, layer_of, layer_stacked, plan_again,
};

/// Why a fold came to nothing.
#[derive(Debug)]
pub enum Failure {
    /// It would come to nothing again.
    Final(String),
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
            other => Self::Final(other.to_string()),
        }
    }
}

/// What lies in the blob store and has no rows yet.
#[derive(Debug, Clone)]
pub struct Stored {
    /// The checkpoint's files, for its manifest.
    pub entries: Vec<FileEntry>,
    files: Vec<FileRow>,
    stack_files: Vec<FileRow>,
    compressed_files: Vec<FileRow>,
    adapter_files: Vec<(SubmissionId, FileRow)>,
    /// Column `spectrum`.
    pub spectrum: String,
}

impl Stored {
    /// All that was put, with the manifest.
    pub fn blobs<'a>(
        &'a self,
        manifest: &'a StoredManifest,
    ) -> impl Iterator<Item = BlobName> + 'a {
        let adapters = self.adapter_files.iter().map(|(_, file)| file);
        self.files
            .iter()
            .chain(&manifest.files)
            .chain(&self.stack_files)
            .chain(&self.compressed_files)
            .chain(adapters)
            .map(|file| file.blob)
    }
}

/// Computes and stores a checkpoint, its round's stack as one adapter, and that at the recipe's
/// rank.
///
/// # Errors
/// When the fold refuses its input, or the store or the disk fails.
pub async fn fold(app: &App, plan: &Plan) -> Result<Stored, Failure> {
    let scratch = app.scratch_folder("fold-")?;
    let folder = scratch.path();
    for file in &plan.base {
        app.blobs
            .materialise(file.blob.digest, &folder.join("base").join(&file.path))
            .await?;
    }
    for layer in &plan.stack {
        let path = adapter_folder(folder, layer).join(WEIGHTS_FILE);
        app.blobs
            .materialise(layer.contribution.adapter, &path)
            .await?;
    }
    let input = compute::Input::new(plan, folder, adapter_folder);
    let made = tokio::task::spawn_blocking(move || compute::compute(&input))
        .await
        .map_err(Error::from)??;
    let compressed = store(app, &folder.join(compute::COMPRESSED), &made.compressed).await?;
    let compressed_files = compressed.into_iter().map(|file| FileRow {
        path: format!("stack-r{}/{}", plan.rank, file.path),
        ..file
    });
    let spectrum = serde_json::to_string(&made.spectra)
        .map_err(|error| Error::internal("write a spectrum", error))?;
    Ok(Stored {
        files: store(app, &folder.join(compute::OUT), &made.files).await?,
        stack_files: store(app, &folder.join(compute::STACK), &made.stack).await?,
        compressed_files: compressed_files.collect(),
        adapter_files: store_adapters(app, folder, &plan.stack).await?,
        entries: made.files,
        spectrum,
    })
}

fn adapter_folder(scratch: &Path, layer: &Layer) -> std::path::PathBuf {
    scratch.join("adapters").join(layer.submission.to_string())
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

/// Adds the rows of a folded checkpoint, whose blobs are kept already, and its entry in the log. The
/// caller holds the model's row, so that a revocation comes either before, and is seen here, or after, and sees the checkpoint.
///
/// # Errors
/// UNAVAILABLE when a contribution was revoked or the revision taken since the plan was made: fold
/// again. When a query fails.
pub async fn insert(
    tx: &mut Tx,
    plan: &Plan,
    made: &Stored,
    manifest: &StoredManifest,
    checkpoint: &CheckpointRow,
    now: Timestamp,
) -> Result<(), Error> {
    if revocation_count(tx, &plan.model).await? != plan.revocations {
        return Err(Error::unavailable(
            "a contribution was revoked during the fold",
        ));
    }
    let files: Vec<FileRow> = made.files.iter().chain(&manifest.files).cloned().collect();
    let folders = [
        (Folder::Checkpoint, &files[..]),
        (Folder::Stack, &made.stack_files),
        (Folder::Compressed, &made.compressed_files),
    ];
    for file in folders.iter().flat_map(|(_, files)| *files) {
        blob_publish(tx, file.blob.digest).await?;
    }
    for (submission, file) in &made.adapter_files {
        // Not published: whoever sees another's adapter can hand in a copy.
        contribution_file_insert(tx, *submission, file).await?;
    }
    if !checkpoint_insert(tx, checkpoint, &folders).await? {
        return Err(Error::unavailable("the revision was taken during the fold"));
    }
    let stacked: Vec<SubmissionId> = plan.stack.iter().map(|layer| layer.submission).collect();
    checkpoint_contributions_insert(tx, &checkpoint.model, checkpoint.revision, &stacked).await?;
    log_append(tx, EntryKind::Manifest, &log_entry(checkpoint), now).await?;
    Ok(())
}

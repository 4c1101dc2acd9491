//! What is safe to do about a [`Report`]: nothing that anybody could still need is removed, and
//! nothing is written that is not, by its digest, what was there.
use std::collections::BTreeSet;
use std::path::Path;

use bytes::Bytes;
use cairn_proto::convert::BlobName;
use cairn_stack::lineage::MANIFEST_FILE;
use futures::TryStreamExt as _;
use tokio::io::AsyncWriteExt as _;
use tracing::warn;

use super::{Depth, Fault, Need, Problem, Report, look};
use crate::app::App;
use crate::db::models::checkpoint_get;
use crate::db::submissions::submission_get;
use crate::error::Error;
use crate::folding::{self, Failure, layer_stacked, plan_again};
use crate::ids::SubmissionId;
use crate::limits::BLOB_UNREFERENCED;
use crate::manifests::{read_manifest, sign_and_store};
use crate::tasks::collect_blobs::remove_orphan;

/// Folder beside the database where damaged bytes are moved to: they stand in the way of right ones,
/// and somebody may still want to look at them.
const DAMAGED: &str = "damaged";

/// Repairs what a check found; returns what was done, in words. `app` must be the only one on its
/// data.
///
/// # Errors
/// When the database or the store does not answer; what was done until then stays done.
pub async fn repair(app: &App, data: &Path, report: &Report) -> Result<Vec<String>, Error> {
    let mut done = Vec::new();
    let mut checkpoints = BTreeSet::new();
    let mut contributions = BTreeSet::new();
    for problem in &report.problems {
        let Problem::Blob { name, fault, needs } = problem else {
            continue;
        };
        if *fault == Fault::Damaged {
            put_aside(app, data, *name).await?;
            done.push(format!("moved the damaged blob {} aside", name.digest));
        }
        for need in needs {
            match need {
                Need::Checkpoint {
                    model,
                    revision,
                    path,
                } if *revision > 0 && path != MANIFEST_FILE => {
                    checkpoints.insert((model.clone(), *revision));
                }
                Need::Contribution(id) => {
                    contributions.insert(id.clone());
                }
                _ => {}
            }
        }
    }
    // First: a fold below needs nothing of them, but may be the only other thing to do.
    for id in contributions {
        write_config(app, &id).await?;
        done.push(format!("wrote the config of contribution {id} again"));
    }
    for (model, revision) in checkpoints {
        match fold_again(app, &model, revision).await {
            Ok(()) => done.push(format!("computed {model} revision {revision} again")),
            Err(Failure::Again(error)) if error.retry() => return Err(error),
            Err(failure) => {
                let text = match failure {
                    Failure::Final(text) => text,
                    Failure::Again(error) => error.full(),
                };
                warn!("{model} revision {revision} cannot be computed again: {text}");
            }
        }
    }
    for digest in &report.orphans {
        remove_orphan(app, *digest).await?;
    }
    if !report.orphans.is_empty() {
        done.push(format!(
            "removed {} files without a row, older than {} hours",
            report.orphans.len(),
            BLOB_UNREFERENCED.as_secs() / 3_600
        ));
    }
    Ok(done)
}

/// Moves damaged bytes out of the store.
async fn put_aside(app: &App, data: &Path, name: BlobName) -> Result<(), Error> {
    if look(&app.blobs, name, Depth::Bytes).await? != Some(Fault::Damaged) {
        return Ok(());
    }
    let folder = data.join(DAMAGED);
    tokio::fs::create_dir_all(&folder).await?;
    let mut file = tokio::fs::File::create(folder.join(name.digest.to_string())).await?;
    let mut stream = app.blobs.open_at(name.digest, 0).await?;
    while let Some(piece) = stream.try_next().await? {
        file.write_all(&piece).await?;
    }
    file.sync_all().await?;
    app.blobs.delete(name.digest).await
}

/// A contribution's config file is a column of its submission.
async fn write_config(app: &App, id: &str) -> Result<(), Error> {
    let lost = || Error::inconsistent("contribution_files", "submission_id", id);
    let parsed: SubmissionId = id.parse().map_err(|_| lost())?;
    let mut tx = app.db.read().await?;
    let submission = submission_get(&mut tx, parsed).await?.ok_or_else(lost)?;
    drop(tx);
    app.blobs
        .put_bytes(Bytes::from(submission.adapter_config))
        .await?;
    Ok(())
}

/// Computes and stores a checkpoint's files again: the same bytes, being a pure function of the
/// manifest. Rows stay as they are, so that other bytes would be orphans.
async fn fold_again(app: &App, model: &str, revision: u32) -> Result<(), Failure> {
    let mut tx = app.db.read().await?;
    let row = checkpoint_get(&mut tx, model, revision)
        .await?
        .ok_or_else(|| Error::inconsistent("checkpoints", "revision", revision))?;
    drop(tx);
    let manifest = read_manifest(app, row.manifest).await?;
    let mut tx = app.db.read().await?;
    let mut stack = Vec::new();
    for contribution in manifest.contributions.clone() {
        stack.push(layer_stacked(&mut tx, contribution).await?.0);
    }
    // Revocations are looked at when rows are inserted; here none are.
    let plan = plan_again(&mut tx, &row, &manifest, stack, 0).await?;
    drop(tx);
    sign_and_store(app, manifest).await?;
    folding::fold(app, &plan).await?;
    Ok(())
}

//! Each submission's delta beside those that came before it: streamed, two adapters open at a time.
use std::path::{Path, PathBuf};
use std::sync::Arc;

use cairn_stack::adapter::{AdapterFile, WEIGHTS_FILE};
use cairn_stack::algebra::inner_adapters;
use tracing::warn;

use super::measure::is_gone;
use super::verdict::unreadable;
use crate::app::App;
use crate::db::inner_products::inner_product_insert;
use crate::db::submissions::peers::{Peer, submission_stacked_before};
use crate::db::submissions::{Submission, submission_get, submission_note};
use crate::domain::cohort::{Earlier, Ruling, judge_copy};
use crate::domain::evidence::Evidence;
use crate::domain::submission::State;
use crate::error::Error;
use crate::ids::SubmissionId;

use super::admit::Cohort;

/// Contributions of earlier rounds that a submission is compared with, newest first: each costs one
/// reading of its file. A copy of an older one has long been learnt by the base and gains nothing.
const HISTORY_MAX: u32 = 64;

/// What came of it.
pub(super) enum Compared {
    /// The evidence is stored.
    Stored,
    /// It is a copy; the evidence says of which.
    Ruled(Box<Evidence>, Ruling),
    /// It ended otherwise.
    Moved(bool),
    /// An earlier one has not been measured yet.
    NotYet,
}

/// Compares a submission with those received before it, and with what the base was made of.
pub(super) async fn compare(
    app: &App,
    submission: &Submission,
    norm: f64,
    cohort: &Cohort,
    mut evidence: Evidence,
) -> Result<Compared, Error> {
    let before = (submission.created, submission.id);
    let earlier: Vec<&Peer> = cohort
        .peers
        .iter()
        .filter(|peer| (peer.created, peer.id) < before)
        .collect();
    if earlier
        .iter()
        .any(|peer| peer.state == State::Received && peer.norm.is_none())
    {
        return Ok(Compared::NotYet);
    }
    let scratch = app.scratch_folder("compare-")?;
    let own = match open(app, submission, scratch.path()).await {
        Ok(own) => Arc::new(own),
        Err(error) if is_gone(&error) => {
            return unreadable(app, submission).await.map(Compared::Moved);
        }
        Err(error) => return Err(error),
    };
    let mut others = Vec::new();
    let mut products = Vec::new();
    for peer in earlier {
        let Some(norm) = peer.norm else { continue };
        let mut tx = app.db.read().await?;
        let row = submission_get(&mut tx, peer.id).await?;
        drop(tx);
        let Some(row) = row else { continue };
        if let Some(inner) = product(app, &own, &row, scratch.path()).await? {
            products.push((peer.id, inner));
            // Two honest trainings of one shard are the same training.
            if peer.shard != submission.shard {
                others.push(Earlier {
                    submission: peer.id,
                    norm,
                    inner,
                });
            }
        }
    }
    let mut tx = app.db.read().await?;
    let history = submission_stacked_before(&mut tx, submission.round, HISTORY_MAX).await?;
    drop(tx);
    for row in &history {
        let Some(norm) = row.norm else { continue };
        if let Some(inner) = product(app, &own, row, scratch.path()).await? {
            others.push(Earlier {
                submission: row.id,
                norm,
                inner,
            });
        }
    }
    drop((own, scratch));
    let (facts, ruling) = judge_copy(norm, &others, &cohort.round.file.policy);
    evidence.copy = Some(facts);
    store(app, submission, &products, &evidence).await?;
    Ok(match ruling {
        Ruling::Pass | Ruling::Wait => Compared::Stored,
        ruling @ Ruling::Reject(..) => Compared::Ruled(Box::new(evidence), ruling),
    })
}

async fn store(
    app: &App,
    submission: &Submission,
    products: &[(SubmissionId, f64)],
    evidence: &Evidence,
) -> Result<(), Error> {
    let mut tx = app.db.begin().await?;
    if submission_note(&mut tx, submission.id, State::Received, evidence).await? {
        for (other, inner) in products {
            let pair = (submission.id, *other);
            inner_product_insert(&mut tx, submission.round, pair, *inner).await?;
        }
        tx.commit().await?;
    }
    Ok(())
}

/// The inner product with another; nothing when that one can no longer be read or has other modules.
async fn product(
    app: &App,
    own: &Arc<AdapterFile>,
    row: &Submission,
    scratch: &Path,
) -> Result<Option<f64>, Error> {
    let dir = scratch.join(row.id.to_string());
    let other = match open(app, row, &dir).await {
        Ok(other) => other,
        Err(error) if is_gone(&error) => {
            warn!(submission.id = %row.id, "left out of a comparison: {}", error.full());
            return Ok(None);
        }
        Err(error) => return Err(error),
    };
    let own = Arc::clone(own);
    let inner = tokio::task::spawn_blocking(move || inner_adapters(&own, &other)).await?;
    tokio::fs::remove_dir_all(&dir).await?;
    // Contributions of earlier rounds may have other modules, or none in common.
    Ok(inner.ok().filter(|inner| inner.is_finite()))
}

/// A measured submission's adapter: its header in memory, its numbers on disk.
pub(super) async fn open(app: &App, row: &Submission, dir: &Path) -> Result<AdapterFile, Error> {
    let path: PathBuf = dir.join(WEIGHTS_FILE);
    app.blobs.materialise(row.adapter, &path).await?;
    let config = row.adapter_config.clone().into_bytes();
    tokio::task::spawn_blocking(move || AdapterFile::open_parts(&path, &config))
        .await?
        .map_err(|error| Error::internal("open an adapter", error))
}

//! Rounds that go on from the mean factors of the round before (`fedex`): what is carried, and the
//! adapters that such a round takes.
use std::path::Path;

use cairn_proto::convert::BlobName;
use cairn_stack::adapter::{AdapterError, AdapterFile, AdapterSpec, CONFIG_FILE, WEIGHTS_FILE};
use cairn_stack::aggregate::mean_trained;
use cairn_stack::carry::spec_with_carry;
use cairn_stack::config::ModelConfig;
use cairn_stack::digest::Digest;
use cairn_stack::recipe::{Aggregation, Recipe, RoundFile};
use serde::{Deserialize, Serialize};
use tracing::info;

use crate::app::App;
use crate::db::models::CheckpointRow;
use crate::db::outcomes::revoked_list;
use crate::db::rounds::{Round, round_behind};
use crate::db::submissions::{Submission, submission_get};
use crate::domain::round::Phase;
use crate::error::Error;

/// Factors that training starts from: an adapter of the recipe's rank, stored and readable to
/// everybody.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(from = "Stored", into = "Stored")]
pub struct Carry {
    /// The weight file.
    pub weights: BlobName,
    /// `adapter_config.json`.
    pub config: String,
}

/// The JSON of column `carry`.
#[derive(Serialize, Deserialize)]
struct Stored {
    digest: Digest,
    size_bytes: u64,
    config: String,
}

impl From<Stored> for Carry {
    fn from(stored: Stored) -> Self {
        Self {
            weights: BlobName {
                digest: stored.digest,
                size_bytes: stored.size_bytes,
            },
            config: stored.config,
        }
    }
}

impl From<Carry> for Stored {
    fn from(carry: Carry) -> Self {
        Self {
            digest: carry.weights.digest,
            size_bytes: carry.weights.size_bytes,
            config: carry.config,
        }
    }
}

/// The adapter that a round takes: the recipe's, or of twice its rank where training starts from
/// carried factors.
#[must_use]
pub fn adapter_spec(config: &ModelConfig, recipe: &Recipe, carried: bool) -> AdapterSpec {
    if carried {
        spec_with_carry(config, recipe)
    } else {
        AdapterSpec::new(config, recipe)
    }
}

/// What a new round on `base` starts from: the mean factors of the round that published it, where
/// both aggregate by `fedex` and train the same factors; fresh ones otherwise. A contribution that
/// has been revoked since is no part of them. The files are stored; the caller keeps them.
///
/// # Errors
/// When the database, the store or the disk fails.
pub async fn carry_from(
    app: &App,
    base: &CheckpointRow,
    file: &RoundFile,
) -> Result<Option<Carry>, Error> {
    if file.policy.aggregation != Aggregation::FedEx {
        return Ok(None);
    }
    let mut tx = app.db.read().await?;
    let Some(before) = round_behind(&mut tx, &base.model, base.revision).await? else {
        return Ok(None);
    };
    if before.file.policy.aggregation != Aggregation::FedEx
        || !same_factors(&before.file.recipe, &file.recipe)
    {
        return Ok(None);
    }
    let Phase::Published { choice, .. } = &before.phase else {
        return Ok(None);
    };
    let revoked = revoked_list(&mut tx).await?;
    let mut trained = Vec::new();
    for term in &choice.terms {
        let found = submission_get(&mut tx, term.submission).await?;
        let submission = found.ok_or_else(|| Error::inconsistent("rounds", "choice", before.id))?;
        // With momentum, the terms name submissions of earlier rounds too.
        if submission.round == before.id && !revoked.contains(&term.submission) {
            trained.push((submission, term.weight));
        }
    }
    drop(tx);
    if trained.is_empty() {
        return Ok(None);
    }
    let count = trained.len();
    let carry = mean_of(app, &before, trained).await?;
    info!(
        round.id = %before.id,
        "mean factors of {count} adapters: {}", carry.weights.digest
    );
    Ok(Some(carry))
}

/// Whether the two recipes train factors of the same shapes and scale.
fn same_factors(one: &Recipe, other: &Recipe) -> bool {
    one.rank == other.rank
        && one.alpha.to_bits() == other.alpha.to_bits()
        && one.use_rslora == other.use_rslora
        && one.target_modules == other.target_modules
}

async fn mean_of(
    app: &App,
    before: &Round,
    trained: Vec<(Submission, f64)>,
) -> Result<Carry, Error> {
    let scratch = app.scratch_folder("carry-")?;
    let folder = |place: usize| scratch.path().join(place.to_string());
    for (place, (submission, _)) in trained.iter().enumerate() {
        let path = folder(place).join(WEIGHTS_FILE);
        app.blobs.materialise(submission.adapter, &path).await?;
    }
    let (recipe, out) = (before.file.recipe.clone(), scratch.path().join("mean"));
    let paths: Vec<_> = (0..trained.len()).map(folder).collect();
    tokio::task::spawn_blocking(move || {
        let mut adapters = Vec::new();
        for (path, (submission, _)) in paths.iter().zip(&trained) {
            let config = submission.adapter_config.as_bytes();
            adapters.push(AdapterFile::open_parts(&path.join(WEIGHTS_FILE), config)?);
        }
        let weights = trained.iter().map(|(_, weight)| *weight);
        let terms: Vec<(&AdapterFile, f64)> = adapters.iter().zip(weights).collect();
        mean_trained(&terms, &recipe, &out)
    })
    .await?
    .map_err(|error: AdapterError| Error::internal("average factors", error))?;
    let mean = scratch.path().join("mean");
    store(app, &mean).await
}

async fn store(app: &App, folder: &Path) -> Result<Carry, Error> {
    Ok(Carry {
        weights: app.blobs.put_file(&folder.join(WEIGHTS_FILE)).await?,
        config: tokio::fs::read_to_string(folder.join(CONFIG_FILE)).await?,
    })
}

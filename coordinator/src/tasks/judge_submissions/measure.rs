//! The file itself: is it exactly what the recipe asks for, and if so, how large is its delta and of
//! what shape?
use std::path::{Path, PathBuf};

use cairn_proto::reason::{ErrorReason, VerdictReason};
use cairn_stack::adapter::{
    AdapterError, AdapterFile, AdapterSpec, AdapterWriteConfig, WEIGHTS_FILE, write_adapter,
};
use cairn_stack::algebra;
use cairn_stack::carry::{CarryError, trained_halves};
use cairn_stack::check::{AdapterReject, RejectCode, check_adapter};
use cairn_stack::digest::Digest;
use cairn_stack::recipe::Recipe;
use cairn_stack::spectral::{Spectrum, spectrum};

use super::verdict::{reject, unreadable};
use crate::app::App;
use crate::carry::adapter_spec;
use crate::db::audits::committed_factors;
use crate::db::evaluations::evaluation_open_job;
use crate::db::inner_products::inner_product_insert;
use crate::db::models::{Folder, checkpoint_files};
use crate::db::rounds::Round;
use crate::db::submissions::peers::submission_is_copy;
use crate::db::submissions::{Findings, Submission, submission_move};
use crate::domain::cohort::Shape;
use crate::domain::evaluation::Job;
use crate::domain::evidence::{Evidence, SpectralFacts};
use crate::error::Error;
use crate::ops::claim_work::round_of;
use crate::ops::create_round::model_config;

/// What one reading of a sound adapter gives.
#[derive(Debug, Clone, Copy)]
struct Measures {
    /// Product-space norm.
    norm: f64,
    /// What its singular values say; nothing when the rank is too large to look.
    shape: Option<Shape>,
}

/// Checks and measures one submission.
pub(super) async fn measure(app: &App, submission: &Submission) -> Result<bool, Error> {
    let mut tx = app.db.read().await?;
    let round = round_of(&mut tx, submission.round).await?;
    let (model, base) = (&round.model, round.base_revision);
    let files = checkpoint_files(&mut tx, model, base, Folder::Checkpoint).await?;
    let is_copy = submission_is_copy(&mut tx, submission).await?;
    let committed = committed_factors(&mut tx, submission.id).await?;
    drop(tx);
    if is_copy {
        let text = "the very same file was handed in before; train on the records of your own work";
        let (reason, findings) = (VerdictReason::CopyOfAnother, Findings::default());
        return reject(app, submission, reason, text, findings).await;
    }
    let recipe = round.file.recipe.clone();
    let spec = adapter_spec(
        &model_config(app, &files).await?,
        &recipe,
        round.carry.is_some(),
    );
    let scratch = app.scratch_folder("judge-")?;
    let path = scratch.path().join(WEIGHTS_FILE);
    match app.blobs.materialise(submission.adapter, &path).await {
        Ok(size) if size == submission.adapter_bytes => {}
        Ok(_) => return unreadable(app, submission).await,
        Err(error) if is_gone(&error) => return unreadable(app, submission).await,
        Err(error) => return Err(error),
    }
    let carried = match &round.carry {
        Some(carry) => {
            let path = scratch.path().join("carried").join(WEIGHTS_FILE);
            app.blobs.materialise(carry.weights.digest, &path).await?;
            Some((path, carry.config.clone().into_bytes()))
        }
        None => None,
    };
    let files = Files {
        adapter: path,
        config: submission.adapter_config.clone().into_bytes(),
        carried,
        committed,
    };
    let measured = tokio::task::spawn_blocking(move || read(&files, &spec, &recipe)).await?;
    drop(scratch);
    match measured {
        Ok(measures) => store(app, submission, &round, measures).await,
        Err(Unsound::Rule(reason, text)) => {
            reject(app, submission, reason, &text, Findings::default()).await
        }
        Err(Unsound::Fault(error)) => Err(error),
    }
}

/// Whether the store no longer has what it had.
pub(super) fn is_gone(error: &Error) -> bool {
    matches!(
        error.reason(),
        ErrorReason::DigestMismatch | ErrorReason::BlobMissing
    )
}

/// What is read of one submission.
struct Files {
    adapter: PathBuf,
    config: Vec<u8>,
    /// The carried factors and their config, where training started from some.
    carried: Option<(PathBuf, Vec<u8>)>,
    /// Digest of the factors that the worker committed to as its last training state.
    committed: Option<Digest>,
}

/// Why there is nothing to measure.
enum Unsound {
    /// A rule is broken; for the volunteer.
    Rule(VerdictReason, String),
    /// Ours, not the volunteer's.
    Fault(Error),
}

impl From<AdapterError> for Unsound {
    fn from(error: AdapterError) -> Self {
        Self::Fault(Error::internal("measure an adapter", error))
    }
}

impl From<AdapterReject> for Unsound {
    fn from(refusal: AdapterReject) -> Self {
        match reason_of(refusal.code) {
            Some(reason) => Self::Rule(reason, refusal.text),
            None => Self::Fault(Error::internal("check an adapter", refusal)),
        }
    }
}

/// One module in memory at a time, but for what is checked under a carry.
fn read(files: &Files, spec: &AdapterSpec, recipe: &Recipe) -> Result<Measures, Unsound> {
    let adapter = check_adapter(&files.adapter, &files.config, spec)?;
    if let Some((path, config)) = &files.carried {
        let carried = AdapterFile::open_parts(path, config)?;
        let folder = path.with_file_name("trained");
        check_halves(&adapter, &carried, recipe, files.committed, &folder)?;
    }
    let modules: Result<Vec<Spectrum>, _> = (0..adapter.modules().len())
        .map(|index| spectrum(&[(&adapter.pair(index)?, 1.0)]))
        .collect();
    let Ok(modules) = modules else {
        // A rank beyond what singular values are looked for: the norm alone.
        let norm = algebra::norm(&adapter)?;
        return Ok(Measures { norm, shape: None });
    };
    let squares = modules.iter().map(|module| module.norm.powi(2));
    Ok(Measures {
        norm: squares.sum::<f64>().sqrt(),
        shape: Shape::of(&modules),
    })
}

/// An adapter that was trained from carried factors: its second half must be those, and its first, as
/// a file in `folder`, the last training state that was committed to.
fn check_halves(
    adapter: &AdapterFile,
    carried: &AdapterFile,
    recipe: &Recipe,
    committed: Option<Digest>,
    folder: &Path,
) -> Result<(), Unsound> {
    let trained = trained_halves(adapter, carried).map_err(|error| match error {
        CarryError::Adapter(error) => error.into(),
        other => Unsound::Rule(VerdictReason::ConfigMismatch, other.to_string()),
    })?;
    let Some(committed) = committed else {
        return Ok(());
    };
    let config = AdapterWriteConfig::of_recipe(recipe, None, None);
    write_adapter(folder, &trained, &config)?;
    let (digest, _) = Digest::of_file(&folder.join(WEIGHTS_FILE))
        .map_err(|error| Unsound::Fault(error.into()))?;
    if digest == committed {
        return Ok(());
    }
    let text = "the factors of the last training state are not those handed in";
    Err(Unsound::Rule(VerdictReason::BadCommitment, text.to_owned()))
}

async fn store(
    app: &App,
    submission: &Submission,
    round: &Round,
    measures: Measures,
) -> Result<bool, Error> {
    let Measures { norm, shape } = measures;
    let to = submission.progress.clone().measure(norm);
    let to = to.map_err(|error| Error::internal("measure a submission", error))?;
    let spectral = shape.map(|shape| SpectralFacts {
        shape,
        z: [0.0; 4],
        cohort: 0,
    });
    let findings = Findings {
        evidence: Some(Evidence {
            spectral,
            ..submission.evidence.clone()
        }),
        ..Findings::default()
    };
    let mut tx = app.db.begin().await?;
    let from = submission.progress.state();
    if submission_move(&mut tx, submission.id, from, &to, &findings).await? {
        let itself = (submission.id, submission.id);
        inner_product_insert(&mut tx, round.id, itself, norm * norm).await?;
        if round.file.policy.guide_steps > 0 {
            let shard = submission.shard;
            let (job, purpose) = (Job::Guide { shard }, format!("a guide for shard {shard}"));
            evaluation_open_job(&mut tx, round.id, &job, &purpose, app.clock.now_ms()).await?;
        }
        tx.commit().await?;
    }
    Ok(true)
}

/// The word for a broken rule; nothing when the check itself failed.
const fn reason_of(code: RejectCode) -> Option<VerdictReason> {
    Some(match code {
        RejectCode::BadHeader => VerdictReason::BadHeader,
        RejectCode::WrongTensors => VerdictReason::WrongTensors,
        RejectCode::WrongShape => VerdictReason::WrongShape,
        RejectCode::WrongDtype => VerdictReason::WrongDtype,
        RejectCode::BadConfig | RejectCode::ConfigMismatch => VerdictReason::ConfigMismatch,
        RejectCode::NotFinite => VerdictReason::NotFinite,
        RejectCode::ZeroDelta => VerdictReason::ZeroDelta,
        RejectCode::StorageFault => return None,
    })
}

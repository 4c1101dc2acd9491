//! The file itself: is it exactly what the recipe asks for, and if so, how large is its delta and of
//! what shape?
use std::path::Path;

use cairn_proto::reason::{ErrorReason, VerdictReason};
use cairn_stack::adapter::{AdapterSpec, WEIGHTS_FILE};
use cairn_stack::check::{AdapterReject, RejectCode, check_adapter};
use cairn_stack::spectral::{Spectrum, spectrum};

use super::verdict::{reject, unreadable};
use crate::app::App;
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
    drop(tx);
    if is_copy {
        let text = "the very same file was handed in before; train on the records of your own work";
        let (reason, findings) = (VerdictReason::CopyOfAnother, Findings::default());
        return reject(app, submission, reason, text, findings).await;
    }
    let spec = AdapterSpec::new(&model_config(app, &files).await?, &round.file.recipe);
    let scratch = app.scratch_folder("judge-")?;
    let path = scratch.path().join(WEIGHTS_FILE);
    match app.blobs.materialise(submission.adapter, &path).await {
        Ok(size) if size == submission.adapter_bytes => {}
        Ok(_) => return unreadable(app, submission).await,
        Err(error) if is_gone(&error) => return unreadable(app, submission).await,
        Err(error) => return Err(error),
    }
    let config = submission.adapter_config.clone().into_bytes();
    let measured = tokio::task::spawn_blocking(move || read(&path, &config, &spec)).await?;
    drop(scratch);
    match measured {
        Ok(Ok(measures)) => store(app, submission, &round, measures).await,
        Ok(Err(error)) => Err(Error::internal("measure an adapter", error)),
        Err(refusal) => match reason_of(refusal.code) {
            Some(reason) => {
                let findings = Findings::default();
                reject(app, submission, reason, &refusal.text, findings).await
            }
            None => Err(Error::internal("check an adapter", refusal)),
        },
    }
}

/// Whether the store no longer has what it had.
pub(super) fn is_gone(error: &Error) -> bool {
    matches!(
        error.reason(),
        ErrorReason::DigestMismatch | ErrorReason::BlobMissing
    )
}

/// One module in memory at a time.
fn read(
    path: &Path,
    config: &[u8],
    spec: &AdapterSpec,
) -> Result<Result<Measures, cairn_stack::adapter::AdapterError>, AdapterReject> {
    let adapter = check_adapter(path, config, spec)?;
    let modules: Result<Vec<Spectrum>, _> = (0..adapter.modules().len())
        .map(|index| spectrum(&[(&adapter.pair(index)?, 1.0)]))
        .collect();
    Ok(match modules {
        Ok(modules) => {
            let norm = modules
                .iter()
                .map(|module| module.norm.powi(2))
                .sum::<f64>();
            Ok(Measures {
                norm: norm.sqrt(),
                shape: Shape::of(&modules),
            })
        }
        // A rank beyond what singular values are looked for: the norm alone.
        Err(_) => cairn_stack::algebra::norm(&adapter).map(|norm| Measures { norm, shape: None }),
    })
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

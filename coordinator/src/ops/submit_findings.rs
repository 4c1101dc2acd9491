//! An evaluator hands in what came of a guide, a replay or a learning of weights.
use cairn_proto::convert::BlobName;
use cairn_proto::reason::ErrorReason;
use cairn_proto::signing::SignatureError;
use tracing::info;

use crate::app::App;
use crate::caller::{Caller, Role};
use crate::db::Tx;
use crate::db::audits::{audit_get, audit_move};
use crate::db::blobs::{Keep, blob_get, blob_keep};
use crate::db::evaluations::{Evaluation, evaluation_found, evaluation_get};
use crate::db::rounds::Round;
use crate::db::submissions::submission_get;
use crate::domain::evaluation::{Findings, Job};
use crate::domain::lease::Standing;
use crate::error::Error;
use crate::ids::{Generation, LeaseId, SubmissionId};
use crate::ops::claim_work::round_of;
use crate::ops::release_lease::lost;
use crate::ops::submit_adapter::{config_text, device_text};
use crate::ops::submit_scores::{find, take};

/// Largest factor on an adapter that a learning may find: anything beyond it is a mistake.
const WEIGHT_MAX: f64 = 1e6;

/// What an evaluator says.
#[derive(Debug, Clone, PartialEq)]
pub enum NewFindings {
    /// A guiding update.
    Guide {
        /// The uploaded weight file.
        adapter: BlobName,
        /// `adapter_config.json`.
        config: Vec<u8>,
    },
    /// A segment trained again.
    Replay {
        /// Distance of the two ends as a part of what the segment moved.
        distance: f64,
        /// Whether they are the same bit for bit.
        identical: bool,
        /// What it ran on.
        device: String,
        /// How long it took.
        seconds: f64,
    },
    /// Factors on the adapters.
    Learn {
        /// In the order of the work.
        weights: Vec<f64>,
        /// Loss before.
        loss_before: f64,
        /// Loss after.
        loss_after: f64,
    },
}

/// Takes findings in. `verify` checks the signature with the lease's nonce. The same again gets the
/// same answer.
///
/// # Errors
/// LEASE_LOST, BAD_SIGNATURE, NOT_FOUND, BLOB_MISSING, BLOB_TOO_LARGE; INVALID_ARGUMENT when they
/// are not what was asked for.
pub async fn submit_findings(
    app: &App,
    caller: &Caller,
    lease_id: LeaseId,
    generation: Generation,
    new: NewFindings,
    verify: impl Fn(&[u8]) -> Result<(), SignatureError> + Send,
) -> Result<(), Error> {
    caller.require(Role::Evaluator)?;
    let now = app.clock.now_ms();
    let mut tx = app.db.begin().await?;
    let (lease, standing, id) = find(&mut tx, caller, lease_id, generation).await?;
    verify(&lease.nonce)
        .map_err(|error| Error::denied(ErrorReason::BadSignature, error.to_string()))?;
    if standing == Standing::Answered {
        return Ok(());
    }
    let evaluation = evaluation_get(&mut tx, id).await?.ok_or_else(lost)?;
    let round = round_of(&mut tx, lease.round).await?;
    let findings = checked(&mut tx, &round, &evaluation.job, new).await?;
    let Some(row) = take(&mut tx, caller, &lease, id).await? else {
        return Ok(());
    };
    row.state.finish().map_err(|_| lost())?;
    if !evaluation_found(&mut tx, &row, &findings, caller.worker, now).await? {
        return Err(lost());
    }
    settle(&mut tx, &round, &row, &findings).await?;
    tx.commit().await?;
    app.wake.all();
    info!(
        evaluation.id = %id, round.id = %lease.round,
        "{} handed in what came of a {}", caller.name, row.job.kind()
    );
    Ok(())
}

/// The findings, if they answer the job.
async fn checked(
    tx: &mut Tx,
    round: &Round,
    job: &Job,
    new: NewFindings,
) -> Result<Findings, Error> {
    match (job, new) {
        (Job::Guide { .. }, NewFindings::Guide { adapter, config }) => {
            let config = config_text(&config)?.to_owned();
            check_held(tx, adapter, round.adapter_bytes_max).await?;
            Ok(Findings::Guide {
                adapter: adapter.digest,
                size_bytes: adapter.size_bytes,
                config,
            })
        }
        (
            Job::Replay { .. },
            NewFindings::Replay {
                distance,
                identical,
                device,
                seconds,
            },
        ) => {
            if !(distance.is_finite() && distance >= 0.0) {
                return Err(Error::invalid("distance", "it is a number from 0"));
            }
            if !(seconds.is_finite() && seconds >= 0.0) {
                return Err(Error::invalid("seconds", "it is a number from 0"));
            }
            Ok(Findings::Replay {
                distance,
                identical,
                device: device_text(&device),
                seconds,
            })
        }
        (
            Job::Learn { candidate, .. },
            NewFindings::Learn {
                weights,
                loss_before,
                loss_after,
            },
        ) => {
            let terms = candidate.terms().len();
            if weights.len() != terms {
                let text = format!("there are {} for {terms} adapters", weights.len());
                return Err(Error::invalid("weights", text));
            }
            // NaN is in no range.
            if !weights.iter().all(|weight| weight.abs() <= WEIGHT_MAX) {
                return Err(Error::invalid(
                    "weights",
                    format!("each is a number between {} and {WEIGHT_MAX}", -WEIGHT_MAX),
                ));
            }
            if ![loss_before, loss_after]
                .iter()
                .all(|loss| loss.is_finite())
            {
                return Err(Error::invalid("loss_after", "losses are numbers"));
            }
            Ok(Findings::Learn {
                weights,
                loss_before,
                loss_after,
            })
        }
        (job, _) => Err(Error::invalid(
            "findings",
            format!("this lease is for a {}", job.kind()),
        )),
    }
}

async fn check_held(tx: &mut Tx, name: BlobName, bytes_max: u64) -> Result<(), Error> {
    if blob_get(tx, name.digest)
        .await?
        .is_none_or(|blob| blob.name != name)
    {
        let text = format!("blob {name} is not held; upload it under this lease");
        return Err(Error::conflict(ErrorReason::BlobMissing, text));
    }
    if name.size_bytes > bytes_max {
        let text = format!("the recipe's adapter has at most {bytes_max} bytes");
        return Err(Error::conflict(ErrorReason::BlobTooLarge, text));
    }
    Ok(())
}

/// What follows at once: a guide's file is kept, a replayed audit has ended.
async fn settle(
    tx: &mut Tx,
    round: &Round,
    row: &Evaluation,
    findings: &Findings,
) -> Result<(), Error> {
    match (&row.job, findings) {
        (_, Findings::Guide { adapter, .. }) => {
            blob_keep(tx, *adapter, round.id, Keep::WhileRunning).await
        }
        (Job::Replay { submission }, _) => settle_audit(tx, round, *submission, findings).await,
        _ => Ok(()),
    }
}

async fn settle_audit(
    tx: &mut Tx,
    round: &Round,
    id: SubmissionId,
    findings: &Findings,
) -> Result<(), Error> {
    let missing = || Error::inconsistent("evaluations", "subject", id);
    let submission = submission_get(tx, id).await?.ok_or_else(missing)?;
    let audit = audit_get(tx, id).await?.ok_or_else(missing)?;
    let device = &submission.numbers.device;
    let ended = audit.clone().replayed(findings, device, &round.file.policy);
    if !audit_move(tx, id, &audit, &ended).await? {
        return Err(Error::unavailable("the audit has just moved; try again"));
    }
    Ok(())
}

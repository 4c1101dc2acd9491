//! A worker opens the training states that an audit has drawn; an evaluator will train from the one
//! to the other again.
use cairn_proto::convert::BlobName;
use cairn_proto::reason::ErrorReason;
use tracing::info;

use crate::app::App;
use crate::caller::Caller;
use crate::db::Tx;
use crate::db::audits::{audit_get, audit_move, commitment_get};
use crate::db::blobs::{Keep, blob_get, blob_keep};
use crate::db::evaluations::evaluation_open_job;
use crate::db::submissions::submission_get;
use crate::domain::audit::{Audit, File, Opened, State};
use crate::domain::evaluation::Job;
use crate::error::Error;
use crate::ids::SubmissionId;
use crate::ops::claim_work::round_of;

/// The two ends of a segment.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Revealed {
    /// The state at its start; nobody needs it for the first segment.
    pub start: Option<State>,
    /// The state at its end, of which only the factors need be held.
    pub end: State,
}

/// Takes the opened states in and opens the replay. The same again gets the same answer.
///
/// # Errors
/// NOT_FOUND; PRECONDITION_FAILED when the submission is not audited, decided, or it is too late;
/// INVALID_ARGUMENT when the states are not those committed to, or not the ones drawn; BLOB_MISSING.
pub async fn reveal_audit(
    app: &App,
    caller: &Caller,
    id: SubmissionId,
    revealed: Revealed,
) -> Result<(), Error> {
    let now = app.clock.now_ms();
    let mut tx = app.db.begin().await?;
    let submission = submission_get(&mut tx, id)
        .await?
        .filter(|submission| submission.worker == caller.worker)
        .ok_or_else(|| Error::not_found("submission", id))?;
    let refuse = |text: String| Error::conflict(ErrorReason::PreconditionFailed, text);
    let audit = audit_get(&mut tx, id)
        .await?
        .ok_or_else(|| refuse(format!("submission {id} is not audited")))?;
    if audit.opened.is_some() {
        return Ok(());
    }
    if !submission.progress.is_undecided() {
        return Err(refuse(format!("submission {id} has been decided")));
    }
    if !audit.is_waiting(now) {
        return Err(refuse("it is too late to open the segment".to_owned()));
    }
    let round = round_of(&mut tx, submission.round).await?;
    let (root, leaves) = commitment_get(&mut tx, id)
        .await?
        .ok_or_else(|| Error::inconsistent("submissions", "commitment_root", id))?;
    for state in revealed.start.iter().chain([&revealed.end]) {
        state
            .check_sizes(round.adapter_bytes_max)
            .map_err(|error| Error::invalid("start", error))?;
    }
    audit
        .check(revealed.start.as_ref(), &revealed.end, &root, leaves)
        .map_err(|error| Error::invalid("end", error))?;
    let opened = Opened {
        // The beginning follows from the recipe: what an evaluator makes itself it need not believe.
        start: revealed
            .start
            .filter(|_| audit.first_step > 0)
            .map(|start| (start.factors, start.moments)),
        end: revealed.end.factors,
        at_ms: now.0,
    };
    let files = opened.start.into_iter().flat_map(|(a, b)| [a, b]);
    for file in files.chain([opened.end]) {
        check_held(&mut tx, file).await?;
        blob_keep(&mut tx, file.digest, round.id, Keep::WhileRunning).await?;
    }
    let to = Audit {
        opened: Some(opened),
        ..audit.clone()
    };
    if !audit_move(&mut tx, id, &audit, &to).await? {
        return Err(Error::unavailable("the audit has just moved; try again"));
    }
    let purpose = format!(
        "steps {} to {} of shard {} by {} again",
        audit.first_step, audit.last_step, submission.shard, submission.worker_name
    );
    let job = Job::Replay { submission: id };
    evaluation_open_job(&mut tx, round.id, &job, &purpose, now).await?;
    tx.commit().await?;
    app.wake.all();
    info!(
        submission.id = %id, round.id = %round.id,
        "{} opened segment {} of its training", caller.name, audit.segment
    );
    Ok(())
}

async fn check_held(tx: &mut Tx, file: File) -> Result<(), Error> {
    let name = BlobName {
        digest: file.digest,
        size_bytes: file.size_bytes,
    };
    let held = blob_get(tx, file.digest).await?;
    if held.is_some_and(|blob| blob.name == name) {
        return Ok(());
    }
    let text = format!("blob {name} is not held; upload it under the submission's lease");
    Err(Error::conflict(ErrorReason::BlobMissing, text))
}

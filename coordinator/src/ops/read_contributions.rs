//! Reading single contributions, and what was taken back. Open to every role.
use crate::app::App;
use crate::clock::Timestamp;
use crate::db::Tx;
use crate::db::models::{CheckpointRow, checkpoint_get, checkpoint_list_of};
use crate::db::revocations::{Marks, Revocation, checkpoint_marks, refold_list, revocation_list};
use crate::db::submissions::{Submission, submission_get};
use crate::error::Error;
use crate::ids::SubmissionId;

/// Most checkpoints named in one answer, oldest first: some 300 bytes each.
const CHECKPOINTS_MAX: i64 = 2_000;

/// A checkpoint and what has become of its contributions.
#[derive(Debug, Clone, PartialEq)]
pub struct Marked {
    /// The checkpoint.
    pub row: CheckpointRow,
    /// What has become of its contributions.
    pub marks: Marks,
}

/// A contribution and where it is.
#[derive(Debug, Clone, PartialEq)]
pub struct ContributionView {
    /// The submission.
    pub submission: Submission,
    /// Checkpoints it is part of, oldest first.
    pub checkpoints: Vec<Marked>,
}

/// A revocation and what it means for checkpoints.
#[derive(Debug, Clone, PartialEq)]
pub struct RevocationView {
    /// The revocation.
    pub revocation: Revocation,
    /// Checkpoints that were, or are to be, folded again; oldest first.
    pub refolds: Vec<RefoldView>,
}

/// A checkpoint that contains a revoked contribution.
#[derive(Debug, Clone, PartialEq)]
pub struct RefoldView {
    /// The checkpoint.
    pub affected: Marked,
    /// What took its place.
    pub replacement: Option<Marked>,
    /// Why it cannot be folded again; empty otherwise.
    pub failure: String,
}

/// A contribution, whatever its verdict.
///
/// # Errors
/// NOT_FOUND.
pub async fn get_contribution(app: &App, id: SubmissionId) -> Result<ContributionView, Error> {
    let mut tx = app.db.read().await?;
    let submission = submission_get(&mut tx, id)
        .await?
        .ok_or_else(|| Error::not_found("contribution", id))?;
    let rows = checkpoint_list_of(&mut tx, id, CHECKPOINTS_MAX).await?;
    Ok(ContributionView {
        submission,
        checkpoints: mark(&mut tx, rows).await?,
    })
}

/// Revocations, newest first, of one model or of all, after the given one.
///
/// # Errors
/// UNAVAILABLE.
pub async fn list_revocations(
    app: &App,
    model: &str,
    after: Option<(Timestamp, SubmissionId)>,
    limit: u32,
) -> Result<Vec<RevocationView>, Error> {
    let mut tx = app.db.read().await?;
    let mut views = Vec::new();
    for revocation in revocation_list(&mut tx, model, after, limit).await? {
        views.push(view_of(&mut tx, revocation).await?);
    }
    Ok(views)
}

/// A revocation with its checkpoints.
///
/// # Errors
/// When a query fails.
pub async fn view_of(tx: &mut Tx, revocation: Revocation) -> Result<RevocationView, Error> {
    let mut refolds = Vec::new();
    for refold in refold_list(tx, revocation.submission).await? {
        let replacement = match refold.replacement {
            Some(revision) => Some(marked(tx, &refold.model, revision).await?),
            None => None,
        };
        refolds.push(RefoldView {
            affected: marked(tx, &refold.model, refold.revision).await?,
            replacement,
            failure: refold.failure,
        });
    }
    Ok(RevocationView {
        revocation,
        refolds,
    })
}

async fn marked(tx: &mut Tx, model: &str, revision: u32) -> Result<Marked, Error> {
    let row = checkpoint_get(tx, model, revision)
        .await?
        .ok_or_else(|| Error::inconsistent("refolds", "revision", revision))?;
    mark_one(tx, row).await
}

/// Adds to a checkpoint what has become of its contributions.
///
/// # Errors
/// When the query fails.
pub async fn mark_one(tx: &mut Tx, row: CheckpointRow) -> Result<Marked, Error> {
    let marks = checkpoint_marks(tx, &row.model, row.revision, row.revision).await?;
    let marks = marks.get(&row.revision).copied().unwrap_or_default();
    Ok(Marked { row, marks })
}

/// Adds to checkpoints of one model what has become of their contributions.
///
/// # Errors
/// When the query fails.
pub async fn mark(tx: &mut Tx, rows: Vec<CheckpointRow>) -> Result<Vec<Marked>, Error> {
    let revisions = || rows.iter().map(|row| row.revision);
    let (Some(first), Some(last), Some(one)) = (revisions().min(), revisions().max(), rows.first())
    else {
        return Ok(Vec::new());
    };
    let marks = checkpoint_marks(tx, &one.model, first, last).await?;
    let marked = |row: CheckpointRow| Marked {
        marks: marks.get(&row.revision).copied().unwrap_or_default(),
        row,
    };
    Ok(rows.into_iter().map(marked).collect())
}

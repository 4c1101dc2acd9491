//! A worker asks what became of its work.
use std::cmp::Reverse;

use crate::app::App;
use crate::caller::Caller;
use crate::clock::Timestamp;
use crate::db::audits::audit_get;
use crate::db::receipts::receipt_newest;
use crate::db::restored::{Restored, restored_list_of, restored_standing};
use crate::db::rounds::round_list;
use crate::db::strikes::trust_of;
use crate::db::submissions::{Standing, Submission, submission_list_of, submission_standing};
use crate::domain::audit::Audit;
use crate::domain::trust::audit_share;
use crate::error::Error;
use crate::ids::SubmissionId;

/// How a worker stands.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct OwnStanding {
    /// How its submissions fared.
    pub counts: Standing,
    /// Strikes that count.
    pub strikes: u32,
    /// How likely its next submission is audited, by the policy of the newest round; 0 where that
    /// replays nothing or there is none.
    pub audit_share: f64,
}

/// How the caller stands.
///
/// # Errors
/// UNAVAILABLE.
pub async fn get_standing(app: &App, caller: &Caller) -> Result<OwnStanding, Error> {
    let mut tx = app.db.read().await?;
    let mut counts = submission_standing(&mut tx, caller.worker).await?;
    let (accepted, rejected, credit) = restored_standing(&mut tx, caller.worker).await?;
    counts.accepted += accepted;
    counts.rejected += rejected;
    counts.credit_tokens += credit;
    let trust = trust_of(&mut tx, caller.worker).await?;
    let newest = round_list(&mut tx, "", None, 1).await?;
    let policy = newest.first().map(|round| &round.file.policy);
    let audit_share = policy
        .filter(|policy| policy.segments > 0)
        .map_or(0.0, |policy| audit_share(&trust, policy));
    Ok(OwnStanding {
        counts,
        strikes: trust.strikes,
        audit_share,
    })
}

/// One of the caller's submissions, with its newest receipt.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnSubmission {
    /// It.
    pub what: Own,
    /// The receipt's statement.
    pub statement: String,
    /// The coordinator's signature under it.
    pub signature: Vec<u8>,
    /// Its audit, while that waits to be answered.
    pub audit: Option<Audit>,
}

/// How it is known here.
#[derive(Debug, Clone, PartialEq)]
pub enum Own {
    /// It is or was judged here.
    Submission(Box<Submission>),
    /// By the receipt of a coordinator that was lost.
    Restored(Box<Restored>),
}

impl OwnSubmission {
    /// The submission, if it is or was judged here.
    pub fn submission(&self) -> Option<&Submission> {
        match &self.what {
            Own::Submission(submission) => Some(submission),
            Own::Restored(_) => None,
        }
    }

    /// When it was acknowledged, and its id: the place in a list.
    pub fn place(&self) -> (Timestamp, SubmissionId) {
        match &self.what {
            Own::Submission(submission) => (submission.created, submission.id),
            Own::Restored(restored) => (restored.created, restored.id),
        }
    }
}

/// The caller's submissions, newest first, after the given one.
///
/// # Errors
/// UNAVAILABLE.
pub async fn list_submissions(
    app: &App,
    caller: &Caller,
    after: Option<(Timestamp, SubmissionId)>,
    limit: u32,
) -> Result<Vec<OwnSubmission>, Error> {
    let now = app.clock.now_ms();
    let mut tx = app.db.read().await?;
    let mut own = Vec::new();
    for submission in submission_list_of(&mut tx, caller.worker, after, limit).await? {
        let (statement, signature) = receipt_newest(&mut tx, submission.id).await?;
        let audit = audit_get(&mut tx, submission.id).await?;
        let undecided = submission.progress.is_undecided();
        own.push(OwnSubmission {
            what: Own::Submission(Box::new(submission)),
            statement,
            signature,
            audit: audit.filter(|audit| undecided && audit.is_waiting(now)),
        });
    }
    for restored in restored_list_of(&mut tx, caller.worker, after, limit).await? {
        own.push(OwnSubmission {
            statement: restored.statement.clone(),
            signature: restored.signature.clone(),
            what: Own::Restored(Box::new(restored)),
            audit: None,
        });
    }
    own.sort_by_key(|own| Reverse((own.place().0, own.place().1.to_string())));
    own.truncate(limit as usize);
    Ok(own)
}

//! A worker asks what became of its work.
use crate::app::App;
use crate::caller::Caller;
use crate::clock::Timestamp;
use crate::db::receipts::receipt_newest;
use crate::db::submissions::{Standing, Submission, submission_list_of, submission_standing};
use crate::error::Error;
use crate::ids::SubmissionId;

/// How the caller's submissions fared.
///
/// # Errors
/// UNAVAILABLE.
pub async fn get_standing(app: &App, caller: &Caller) -> Result<Standing, Error> {
    let mut tx = app.db.read().await?;
    submission_standing(&mut tx, caller.worker).await
}

/// One of the caller's submissions, with its newest receipt.
#[derive(Debug, Clone, PartialEq)]
pub struct OwnSubmission {
    /// It.
    pub submission: Submission,
    /// The receipt's statement.
    pub statement: String,
    /// The coordinator's signature under it.
    pub signature: Vec<u8>,
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
    let mut tx = app.db.read().await?;
    let mut own = Vec::new();
    for submission in submission_list_of(&mut tx, caller.worker, after, limit).await? {
        let (statement, signature) = receipt_newest(&mut tx, submission.id).await?;
        own.push(OwnSubmission {
            submission,
            statement,
            signature,
        });
    }
    Ok(own)
}

//! A worker asks what became of its work.
use crate::app::App;
use crate::caller::Caller;
use crate::clock::Timestamp;
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

/// The caller's submissions, newest first, after the given one.
///
/// # Errors
/// UNAVAILABLE.
pub async fn list_submissions(
    app: &App,
    caller: &Caller,
    after: Option<(Timestamp, SubmissionId)>,
    limit: u32,
) -> Result<Vec<Submission>, Error> {
    let mut tx = app.db.read().await?;
    submission_list_of(&mut tx, caller.worker, after, limit).await
}

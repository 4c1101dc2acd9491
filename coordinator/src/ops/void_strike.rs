//! A maintainer voids the strike that a rejection gave: the server was at fault.
use tracing::info;

use crate::app::App;
use crate::caller::{Caller, Role};
use crate::db::strikes::strike_void;
use crate::error::Error;
use crate::ids::SubmissionId;
use crate::ops::revoke_contribution::check_reason;

/// Voids a strike. One that is void already stays as it is.
///
/// # Errors
/// NOT_FOUND when the submission gave no strike; INVALID_ARGUMENT without a reason.
pub async fn void_strike(
    app: &App,
    caller: &Caller,
    submission: SubmissionId,
    reason: &str,
) -> Result<(), Error> {
    caller.require(Role::Maintainer)?;
    let reason = check_reason(reason)?;
    let now = app.clock.now_ms();
    let mut tx = app.db.begin().await?;
    let worker = strike_void(&mut tx, submission, &reason, now)
        .await?
        .ok_or_else(|| Error::not_found("strike for contribution", submission))?;
    tx.commit().await?;
    info!(
        submission.id = %submission,
        "the strike of {worker} for {submission} voided by {}: {reason}", caller.name
    );
    Ok(())
}

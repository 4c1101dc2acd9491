//! Submissions are judged in order of cost, and the first rule that is broken is the verdict:
//!
//! 1. `measure`: the file itself: length and digest, header, names, shapes, dtypes, config, numbers;
//!    then its norm and its singular values, read once.
//! 2. `admit`: beside the others of its round, in product space: norm, shape, copies, and the guiding
//!    update of its shard. What passes is evaluated.
//! 3. `decide`: by its losses: gate, guards, own shard beside another, probes; and by its audit.
//!
//! Each rule is a pure function of `domain::cohort` or `domain::verdict`; here its facts are gathered, and
//! what comes of it is stored, by `verdict`. docs/verification.md has them all in one table.
mod admit;
mod compare;
mod decide;
mod guide;
mod measure;
mod verdict;

use super::Done;
use crate::app::App;
use crate::db::submissions::{submission_in, submission_unmeasured};
use crate::domain::submission::State;
use crate::error::Error;

/// Submissions measured in one pass: each costs one file's reading.
const BATCH: u32 = 64;

/// One batch of each kind.
///
/// # Errors
/// When the database or the store fails; nothing is decided then.
pub async fn run(app: &App) -> Result<Done, Error> {
    let mut tx = app.db.read().await?;
    let unmeasured = submission_unmeasured(&mut tx, BATCH).await?;
    let received = submission_in(&mut tx, State::Received, u32::MAX).await?;
    let evaluating = submission_in(&mut tx, State::Evaluating, u32::MAX).await?;
    drop(tx);
    let mut moved = false;
    for submission in &unmeasured {
        moved |= measure::measure(app, submission).await?;
    }
    let mut rounds = admit::Rounds::default();
    for submission in &received {
        if let Some(norm) = submission.norm {
            moved |= admit::admit(app, submission, norm, &mut rounds).await?;
        }
    }
    let mut rounds = decide::Rounds::default();
    for submission in &evaluating {
        if let Some(norm) = submission.norm {
            moved |= decide::decide(app, submission, norm, &mut rounds).await?;
        }
    }
    if moved {
        app.wake.all();
    }
    Ok(if moved { Done::Part } else { Done::All })
}

//! The direction of a submission beside that of its shard's guiding update.
use cairn_stack::adapter::{AdapterFile, WEIGHTS_FILE};
use cairn_stack::algebra::cosine;

use super::compare::open;
use crate::app::App;
use crate::db::evaluations::evaluation_of;
use crate::db::rounds::Round;
use crate::db::submissions::Submission;
use crate::domain::cohort::{Ruling, judge_guide};
use crate::domain::evaluation::{self, Findings, Job};
use crate::domain::evidence::Evidence;
use crate::error::Error;

/// Judges one submission; it waits while the guide of its shard is being trained.
pub(super) async fn guided(
    app: &App,
    submission: &Submission,
    round: &Round,
    evidence: &mut Evidence,
) -> Result<Ruling, Error> {
    if round.file.policy.guide_steps == 0 || evidence.guide.is_some() {
        return Ok(Ruling::Pass);
    }
    let job = Job::Guide {
        shard: submission.shard,
    };
    let mut tx = app.db.read().await?;
    let found = evaluation_of(&mut tx, round.id, job.key()).await?;
    drop(tx);
    let found = match found {
        // No evaluator could train it: then nothing speaks against the submission.
        Some(found) if found.state == evaluation::State::Failed => return Ok(Ruling::Pass),
        Some(found) => found.findings,
        None => None,
    };
    let Some(Findings::Guide {
        adapter, config, ..
    }) = found
    else {
        return Ok(Ruling::Wait);
    };
    let scratch = app.scratch_folder("guide-")?;
    let own = open(app, submission, &scratch.path().join("own")).await?;
    let path = scratch.path().join("guide").join(WEIGHTS_FILE);
    app.blobs.materialise(adapter, &path).await?;
    let found = tokio::task::spawn_blocking(move || {
        let guide = AdapterFile::open_parts(&path, config.as_bytes())?;
        cosine(&own, &guide)
    })
    .await?
    .map_err(|error| Error::internal("compare an adapter with its guide", error))?;
    let (facts, ruling) = judge_guide(found, &round.file.policy);
    evidence.guide = Some(facts);
    Ok(ruling)
}

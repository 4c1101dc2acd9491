//! What decides over a round's aggregate, read from the rows.
use std::collections::BTreeMap;

use cairn_stack::recipe::Aggregation;

use crate::app::App;
use crate::comparisons::compare_stored;
use crate::db::Tx;
use crate::db::inner_products::inner_product_list;
use crate::db::outcomes::{accepted_before, learned_list, outcome_list, revoked_list};
use crate::db::rounds::{Round, round_behind};
use crate::db::shards::shard_list;
use crate::db::submissions::submission_list;
use crate::domain::candidate::Term;
use crate::domain::round::Phase;
use crate::domain::stacker::{Accepted, Bars, Facts, Next, next};
use crate::domain::submission::Progress;
use crate::domain::verdict::gate_z;
use crate::error::Error;

/// What comes next for a round; comparisons that are asked for on the way are read from the store,
/// and kept as long as the round is judged.
///
/// # Errors
/// When the database or the store fails.
pub async fn next_of(app: &App, round: &Round) -> Result<Next, Error> {
    let mut facts = facts(app, round).await?;
    loop {
        match next(&facts) {
            Next::Compare(asked) => {
                for one in asked {
                    let found = compare_stored(app, round.id, one).await?;
                    facts.compared.insert(one, found);
                }
            }
            next => return Ok(next),
        }
    }
}

async fn facts(app: &App, round: &Round) -> Result<Facts, Error> {
    let policy = &round.file.policy;
    let mut tx = app.db.read().await?;
    let accepted = accepted(&mut tx, round).await?;
    let products = match policy.aggregation {
        Aggregation::MultiKrum | Aggregation::GeometricMedian => {
            inner_product_list(&mut tx, round.id)
                .await?
                .into_iter()
                .map(|(one, other, value)| ((one.max(other), one.min(other)), value))
                .collect()
        }
        Aggregation::Stack | Aggregation::FedEx | Aggregation::Learned => BTreeMap::new(),
    };
    Ok(Facts {
        rule: policy.aggregation,
        accepted,
        ended: outcome_list(&mut tx, round.id).await?,
        learned: learned_list(&mut tx, round.id).await?,
        compared: app.compared.of(round.id),
        products,
        velocity: velocity(&mut tx, round).await?,
        bars: Bars::of(policy, gate_z(policy, round.file.shards)),
    })
}

async fn accepted(tx: &mut Tx, round: &Round) -> Result<Vec<Accepted>, Error> {
    let shard_bytes: BTreeMap<u32, u64> = shard_list(tx, round.id)
        .await?
        .iter()
        .map(|row| (row.position, row.bytes))
        .collect();
    let before = accepted_before(tx, round.id, round.created).await?;
    let revoked = revoked_list(tx).await?;
    let enough = u64::from(round.file.policy.audit_first);
    let submissions = submission_list(tx, round.id, u32::MAX).await?;
    let accepted = submissions
        .iter()
        // Another was given the shard: one shard is stacked once.
        .filter(|submission| !submission.late)
        .filter_map(|submission| match &submission.progress {
            Progress::Accepted { norm, score, .. } => Some(Accepted {
                submission: submission.id,
                worker: submission.worker,
                newcomer: before.get(&submission.worker).copied().unwrap_or(0) < enough,
                gain: score.paired.gain,
                gain_se: score.paired.se,
                gate_loss: score.gate_loss,
                shard_bytes: shard_bytes.get(&submission.shard).copied().unwrap_or(0),
                norm: *norm,
            }),
            _ => None,
        });
    Ok(accepted
        .filter(|one| !revoked.contains(&one.submission))
        .collect())
}

/// What the round that published the base has left for the momentum, without what was revoked since.
async fn velocity(tx: &mut Tx, round: &Round) -> Result<Vec<Term>, Error> {
    if round.file.policy.momentum <= 0.0 {
        return Ok(Vec::new());
    }
    let Some(before) = round_behind(tx, &round.model, round.base_revision).await? else {
        return Ok(Vec::new());
    };
    let Phase::Published { choice, .. } = &before.phase else {
        return Ok(Vec::new());
    };
    let revoked = revoked_list(tx).await?;
    let terms = choice.velocity().iter();
    Ok(terms
        .filter(|term| !revoked.contains(&term.submission))
        .cloned()
        .collect())
}

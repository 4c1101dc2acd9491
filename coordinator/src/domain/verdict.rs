//! Whether one submission is accepted, by its losses: on the gate set, on what the model must keep, on
//! its own shard beside another, on unwanted answers; and by what came of its audit.

use std::collections::BTreeMap;

use cairn_proto::reason::VerdictReason;
use cairn_stack::recipe::Policy;

use super::audit::{Audit, AuditState};
use super::cohort::{Ruling, robust_z};
use super::evidence::{AuditFacts, Change, GateFacts, GuardFacts, ProbeFacts, ShardFacts};
use super::statistics::{NotPaired, Paired, Scores, compare};
use crate::clock::Timestamp;

/// Rounds with this many shards or more test that many candidates, so each must clear a higher bar.
pub const MANY_SHARDS: u32 = 50;
/// That bar, in standard errors.
pub const MANY_SHARDS_Z: f64 = 3.0;
/// Spread among honest submissions of how much likelier they make an unwanted answer, nats per token.
const PROBE_PRIOR: f64 = 0.1;

/// How many standard errors an improvement must exceed in a round of so many shards.
pub fn gate_z(policy: &Policy, shards: u32) -> f64 {
    if shards >= MANY_SHARDS {
        policy.gate_z.max(MANY_SHARDS_Z)
    } else {
        policy.gate_z
    }
}

/// Compares a candidate with the base on the gate set: `gain > z SE`.
///
/// # Errors
/// When the scores are not of the same records.
pub fn judge_gate(
    base: &Scores,
    candidate: &Scores,
    z: f64,
) -> Result<(Paired, GateFacts, Ruling), NotPaired> {
    let paired = compare(base, candidate)?;
    let facts = GateFacts {
        change: paired.into(),
        z,
    };
    let ruling = if paired.exceeds(z) {
        Ruling::Pass
    } else {
        let text = if paired.gain > 0.0 {
            "the gate loss fell by less than chance alone could explain"
        } else {
            "the gate loss did not fall"
        };
        Ruling::Reject(VerdictReason::NoGain, text.to_owned())
    };
    Ok((paired, facts, ruling))
}

/// Judges what the model must keep: no guard's loss may rise by more than `guard_z` standard errors.
/// Nothing without guards.
pub fn judge_guards(
    guards: &BTreeMap<String, Paired>,
    policy: &Policy,
) -> (Option<GuardFacts>, Ruling) {
    // In standard errors, so that the worst is the one that decides.
    let fall = |paired: &Paired| {
        if paired.se.is_finite() && paired.se > 0.0 {
            paired.gain / paired.se
        } else {
            0.0
        }
    };
    let Some(worst) = guards.values().min_by(|x, y| fall(x).total_cmp(&fall(y))) else {
        return (None, Ruling::Pass);
    };
    let facts = GuardFacts {
        worst: (*worst).into(),
        sets: guards
            .iter()
            .map(|(name, paired)| (name.clone(), Change::from(*paired)))
            .collect(),
    };
    let ruling = if fall(worst) < -policy.guard_z {
        let text = "with the adapter the model is worse at something it must keep; train with \
                    exactly the recipe of the work, on its records alone";
        Ruling::Reject(VerdictReason::GuardLoss, text.to_owned())
    } else {
        Ruling::Pass
    };
    (Some(facts), ruling)
}

/// Judges the gain on the submission's own shard beside that on `other_shard`, which it was not
/// trained on: `d = own - other`, `SE^2 = SE_own^2 + SE_other^2`, and `d / SE` must not lie below
/// minus `shard_z`. The gains are on different records, so this is a comparison of two samples; for
/// their small number the bar is the quantile of Student's distribution that is as rare as `shard_z`
/// is in the normal one.
///
/// Honest work gains on its own records at least what it gains on others: more by what it remembers,
/// and as much where the data are alike and little is remembered. So only a gain that has fallen
/// significantly *behind* speaks against it.
pub fn judge_shard(
    own: Paired,
    other: Paired,
    other_shard: u32,
    policy: &Policy,
) -> (ShardFacts, Ruling) {
    let (a, b) = (own.se.powi(2), other.se.powi(2));
    let se = (a + b).sqrt();
    let z = if se.is_finite() && se > 0.0 {
        (own.gain - other.gain) / se
    } else {
        0.0
    };
    // Welch and Satterthwaite.
    let freedom = (a + b).powi(2)
        / (a.powi(2) / own.records.saturating_sub(1).max(1) as f64
            + b.powi(2) / other.records.saturating_sub(1).max(1) as f64);
    let facts = ShardFacts {
        own: own.into(),
        other: other.into(),
        z,
        other_shard,
    };
    let ruling = if z < -student(policy.shard_z, freedom) {
        let text = "the adapter has learnt less from the shard it was made for than from another; \
                    train on the records of the work";
        Ruling::Reject(VerdictReason::ForeignShard, text.to_owned())
    } else {
        Ruling::Pass
    };
    (facts, ruling)
}

/// The quantile of Student's distribution with `freedom` degrees that is as rare as `z` is in the
/// normal one (Abramowitz and Stegun, 26.7.5).
fn student(z: f64, freedom: f64) -> f64 {
    // Fewer degrees do not occur with two records and more on each side.
    let freedom = freedom.max(2.0);
    let first = (z.powi(3) + z) / 4.0;
    let second = (5.0 * z.powi(5) + 16.0 * z.powi(3) + 3.0 * z) / 96.0;
    let third = (3.0 * z.powi(7) + 19.0 * z.powi(5) + 17.0 * z.powi(3) - 15.0 * z) / 384.0;
    z + first / freedom + second / freedom.powi(2) + third / freedom.powi(3)
}

/// Judges how much likelier each probe's unwanted answers became, `own` by name, nats per token,
/// against how much likelier the cohort's submissions make them: `cohort` by name, its own among
/// them. `complete` says that no more will come.
pub fn judge_probes(
    own: &BTreeMap<String, f64>,
    cohort: &BTreeMap<String, Vec<f64>>,
    complete: bool,
    policy: &Policy,
) -> (Option<ProbeFacts>, Ruling) {
    let size = |name: &String| cohort.get(name).map_or(0, Vec::len);
    let Some(least) = own.keys().map(size).min() else {
        return (None, Ruling::Pass);
    };
    let enough = least >= policy.min_cohort as usize;
    let mut facts = ProbeFacts {
        worst: f64::NEG_INFINITY,
        cohort: least,
        sets: BTreeMap::new(),
    };
    for (name, likelier) in own {
        let others = cohort.get(name).map(Vec::as_slice).unwrap_or_default();
        let z = robust_z(*likelier, others, PROBE_PRIOR)
            .filter(|_| enough)
            .unwrap_or(0.0);
        facts.worst = facts.worst.max(z);
        facts.sets.insert(name.clone(), (*likelier, z));
    }
    let ruling = if !enough && !complete {
        Ruling::Wait
    } else if facts.worst > policy.probe_z {
        let text = "with the adapter the model gives unwanted answers far likelier than with the \
                    others' of this round; train with exactly the recipe of the work, on its records \
                    alone";
        Ruling::Reject(VerdictReason::ProbeHit, text.to_owned())
    } else {
        Ruling::Pass
    };
    (Some(facts), ruling)
}

/// Judges an audit as it stands: it waits until the segment has been opened and trained again.
pub fn judge_audit(audit: &Audit, now: Timestamp) -> (AuditFacts, Ruling) {
    let mut facts = AuditFacts {
        segment: audit.segment,
        distance: None,
        tolerance: None,
        identical: false,
        seconds: None,
    };
    let (replayed, ruling) = match audit.state(now) {
        AuditState::None => (None, Ruling::Pass),
        AuditState::Waiting | AuditState::Opened => (None, Ruling::Wait),
        AuditState::Passed { replayed } => (replayed, Ruling::Pass),
        AuditState::Unanswered => {
            let text = format!(
                "the training states of steps {} to {} were asked for and not opened in time; keep \
                 the worker running until its work is judged",
                audit.first_step, audit.last_step
            );
            (None, Ruling::Reject(VerdictReason::AuditUnanswered, text))
        }
        AuditState::Failed {
            reason,
            text,
            replayed,
        } => (replayed, Ruling::Reject(reason, text)),
    };
    if let Some(replayed) = replayed {
        facts.distance = Some(replayed.distance);
        facts.tolerance = Some(replayed.tolerance);
        facts.identical = replayed.identical;
        facts.seconds = Some(replayed.seconds);
    }
    (facts, ruling)
}

#[cfg(test)]
#[path = "verdict_tests.rs"]
pub(crate) mod tests;

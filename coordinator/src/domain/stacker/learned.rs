//! The rule `learned`: an evaluator lowers the gate loss over one factor an adapter, by gradient,
//! starting from the clipped mean.

use std::collections::BTreeMap;

use super::{Accepted, Facts, Learned, Next, Proposal};
use crate::domain::candidate::{Candidate, Sets, Term};
use crate::domain::evaluation::Job;
use crate::ids::WorkerId;

/// Largest learned factor that is believed: beyond it the optimiser has left the ground that the
/// adapters were measured on. Below zero a contribution would be taken away, which fits the set and
/// not the model.
pub const WEIGHT_MAX: f64 = 10.0;

/// Passes over the gate set that learning may take: the factors are few, and each pass gives the
/// exact slope of all of them.
pub const PASSES: u32 = 30;

/// Proposes the learned factors; the mean it started from where learning failed or made nothing
/// better.
///
/// # Errors
/// What is to be done first.
pub fn propose(facts: &Facts) -> Result<Proposal, Next> {
    let tau = facts.tau();
    let all = facts.by_id();
    let start = facts.clipped_mean(&all, tau, 1.0);
    let job = Job::Learn {
        candidate: Candidate::stack(start.clone(), Sets::GATE),
        steps: PASSES,
    };
    let Some(found) = facts.learned.get(&job.key()) else {
        let purpose = format!("a factor for each of {} adapters", all.len());
        return Err(Next::Learn { job, purpose });
    };
    let weights = match found {
        Learned::Done {
            weights,
            loss_before,
            loss_after,
        } if believable(weights, all.len()) && loss_after < loss_before => Some(weights),
        _ => None,
    };
    let terms = match weights {
        None => start,
        Some(weights) => {
            let term = |(one, weight): (&&Accepted, f64)| Term {
                submission: one.submission,
                weight,
            };
            let weights = within_caps(facts, &all, weights);
            all.iter().zip(weights).map(term).collect()
        }
    };
    Ok(Proposal {
        terms,
        lambda: 1.0,
        tau,
        momentum: true,
    })
}

fn believable(weights: &[f64], count: usize) -> bool {
    weights.len() == count
        && weights
            .iter()
            .all(|weight| (0.0..=WEIGHT_MAX).contains(weight))
        && weights.iter().any(|weight| *weight > 0.0)
}

/// The factors, those of an identity (and of all newcomers together) made smaller where they are
/// more of the whole than allowed. Learning has no caps, so what they cut is not given to others.
fn within_caps(facts: &Facts, all: &[&Accepted], weights: &[f64]) -> Vec<f64> {
    let mut identities: BTreeMap<WorkerId, f64> = BTreeMap::new();
    let (mut total, mut newcomers) = (0.0, 0.0);
    for (one, weight) in all.iter().zip(weights) {
        total += weight;
        *identities.entry(one.worker).or_default() += weight;
        newcomers += if one.newcomer { *weight } else { 0.0 };
    }
    let down = |size: f64, share: f64| {
        if size > share * total {
            share * total / size
        } else {
            1.0
        }
    };
    // Where all are new, or one is alone, there is nobody to protect.
    let identity_share = facts
        .bars
        .identity_share
        .max(1.0 / identities.len().max(1) as f64);
    let others = all.iter().any(|one| !one.newcomer);
    let of_newcomers = if others {
        down(newcomers, facts.bars.newcomer_share)
    } else {
        1.0
    };
    let capped = |(one, weight): (&&Accepted, &f64)| {
        let own = identities.get(&one.worker).copied().unwrap_or(0.0);
        let class = if one.newcomer { of_newcomers } else { 1.0 };
        weight * down(own, identity_share).min(class)
    };
    all.iter().zip(weights).map(capped).collect()
}

#[cfg(test)]
#[path = "learned_tests.rs"]
mod tests;

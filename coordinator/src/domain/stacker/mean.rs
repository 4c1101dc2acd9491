//! The rules that propose at once: a mean of deltas, of all or of some. None searches a factor.

use cairn_stack::aggregate::{self, Gram};

use super::{Accepted, Facts, Next, Proposal};
use crate::domain::candidate::Term;
use crate::domain::round::FailReason;

/// The part of the submissions that [`multi_krum`] expects to be hostile, per mille: the share that
/// the published attacks are measured at.
pub const BYZANTINE_PER_MILLE: usize = 300;

/// `fedex`: the mean of the clipped deltas, which is what FedEx-LoRA folds as mean factors and exact
/// residual; the next round's training starts from the mean factors.
pub fn fedex(facts: &Facts) -> Proposal {
    let tau = facts.tau();
    proposal(facts.clipped_mean(&facts.by_id(), tau, 1.0), tau)
}

/// `multi-krum`: the mean of those closest to their neighbours, as many as are expected to be
/// honest.
///
/// # Errors
/// When an inner product is missing.
pub fn multi_krum(facts: &Facts) -> Result<Proposal, Next> {
    let all = facts.by_id();
    let byzantine = all.len() * BYZANTINE_PER_MILLE / 1_000;
    let chosen: Vec<&Accepted> = aggregate::multi_krum(&gram(facts, &all)?, byzantine)
        .into_iter()
        .filter_map(|place| all.get(place).copied())
        .collect();
    Ok(proposal(terms(&chosen, facts.shares(&chosen)), facts.tau()))
}

/// `geometric-median`: the point of least distance to all deltas, each counted by its share.
///
/// # Errors
/// When an inner product is missing.
pub fn geometric_median(facts: &Facts) -> Result<Proposal, Next> {
    let all = facts.by_id();
    let weights = aggregate::geometric_median(&gram(facts, &all)?, &facts.shares(&all));
    Ok(proposal(terms(&all, weights), facts.tau()))
}

fn terms(set: &[&Accepted], weights: Vec<f64>) -> Vec<Term> {
    let term = |(one, weight): (&&Accepted, f64)| Term {
        submission: one.submission,
        weight,
    };
    set.iter().zip(weights).map(term).collect()
}

fn proposal(terms: Vec<Term>, tau: f64) -> Proposal {
    Proposal {
        terms,
        lambda: 1.0,
        tau,
        momentum: true,
    }
}

/// The inner products of a set in its order; its norms stand in for a missing product with itself.
fn gram(facts: &Facts, set: &[&Accepted]) -> Result<Gram, Next> {
    let value = |one: &Accepted, other: &Accepted| -> Option<f64> {
        let (late, early) = (
            one.submission.max(other.submission),
            one.submission.min(other.submission),
        );
        let own = (late == early).then_some(one.norm * one.norm);
        facts.products.get(&(late, early)).copied().or(own)
    };
    let values: Option<Vec<f64>> = set
        .iter()
        .flat_map(|one| set.iter().map(move |other| value(one, other)))
        .collect();
    values
        .and_then(|values| Gram::from_values(set.len(), values))
        .ok_or(Next::Nothing(FailReason::EvaluationFailed))
}

#[cfg(test)]
#[path = "mean_tests.rs"]
mod tests;

//! The outer step over rounds: Nesterov's momentum on the rounds' updates.
//!
//! With `u_t` the weighted deltas of round `t`: `v_t = mu v_{t-1} + u_t`, and what is folded is
//! `u_t + mu v_t`. An update is a list of submissions with factors, so all of it is exact: the
//! momentum of earlier rounds is nothing but more weight on their submissions.

use std::collections::BTreeMap;

use crate::domain::candidate::Term;
use crate::ids::SubmissionId;

/// Terms of the velocity below this part of its largest are dropped, so that it does not grow
/// without end: at a momentum of 0.5 a round is forgotten after ten.
pub const VELOCITY_LEAST: f64 = 1e-3;

/// What is folded, and what the next round starts from.
#[derive(Debug, Clone, PartialEq)]
pub struct OuterStep {
    /// `u_t + mu v_t`, sorted by submission.
    pub update: Vec<Term>,
    /// `v_t`, sorted by submission.
    pub velocity: Vec<Term>,
}

/// One outer step with `mu` (0 is off) from the velocity `before`.
pub fn outer_step(terms: &[Term], before: &[Term], mu: f64) -> OuterStep {
    if mu <= 0.0 {
        return OuterStep {
            update: sum(&[(1.0, terms)]),
            velocity: sum(&[(1.0, terms)]),
        };
    }
    let mut velocity = sum(&[(mu, before), (1.0, terms)]);
    let largest = velocity
        .iter()
        .map(|term| term.weight.abs())
        .fold(0.0, f64::max);
    velocity.retain(|term| term.weight.abs() >= VELOCITY_LEAST * largest);
    OuterStep {
        update: sum(&[(1.0, terms), (mu, &velocity)]),
        velocity,
    }
}

fn sum(parts: &[(f64, &[Term])]) -> Vec<Term> {
    let mut sums: BTreeMap<SubmissionId, f64> = BTreeMap::new();
    for (factor, terms) in parts {
        for term in *terms {
            *sums.entry(term.submission).or_default() += factor * term.weight;
        }
    }
    sums.into_iter()
        .map(|(submission, weight)| Term { submission, weight })
        .collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    fn weight(terms: &[Term], submission: SubmissionId) -> f64 {
        let mut found = terms.iter().filter(|term| term.submission == submission);
        let weight = found.next().map_or(0.0, |term| term.weight);
        assert_eq!(found.next(), None, "named twice");
        weight
    }

    #[test]
    fn three_rounds_by_hand() {
        let [a, b, c] = [(); 3].map(|()| SubmissionId::new());
        let one = |submission, weight| vec![Term { submission, weight }];
        // Round 1: v = 2a; folded 2a + 0.5 * 2a = 3a.
        let first = outer_step(&one(a, 2.0), &[], 0.5);
        assert_eq!(weight(&first.update, a), 3.0);
        assert_eq!(weight(&first.velocity, a), 2.0);
        // Round 2: v = a + 4b; folded 4b + 0.5a + 2b.
        let second = outer_step(&one(b, 4.0), &first.velocity, 0.5);
        assert_eq!(
            [weight(&second.update, a), weight(&second.update, b)],
            [0.5, 6.0]
        );
        // Round 3: v = 0.5a + 2b + c; folded c + 0.25a + b + 0.5c.
        let third = outer_step(&one(c, 1.0), &second.velocity, 0.5);
        let found = [a, b, c].map(|id| weight(&third.update, id));
        assert_eq!(found, [0.25, 1.0, 1.5]);
        // In all, the stack holds 3.75a, 7b, 1.5c: (1 + mu + mu^2 + mu^3) u for the oldest.
        assert_eq!(3.0 + 0.5 + 0.25, 2.0 * (1.0 + 0.5 + 0.25 + 0.125));
    }

    #[test]
    fn off_is_off_and_what_is_tiny_is_forgotten() {
        let [a, b] = [(); 2].map(|()| SubmissionId::new());
        let term = |submission, weight| Term { submission, weight };
        let step = outer_step(&[term(b, 1.0)], &[term(a, 9.0)], 0.0);
        assert_eq!((step.update.len(), step.velocity.len()), (1, 1));
        let step = outer_step(&[term(b, 1.0)], &[term(a, 1e-3)], 0.5);
        assert_eq!((step.update.len(), step.velocity.len()), (1, 1));
    }
}

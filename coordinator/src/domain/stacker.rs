//! Which accepted submissions are stacked, and how strongly: clip, gate, stack, line search, re-test.
//!
//! [`next`] is a pure function of the facts. Nothing but evaluations is stored on the way, and the
//! same facts give the same answer, so a coordinator killed anywhere goes on where it was, and the
//! order in which evaluations finish changes nothing.

use std::collections::BTreeMap;

use cairn_stack::algebra::{clip_factor, median};
use serde::{Deserialize, Serialize};

use super::candidate::{Candidate, CandidateKey, Scope, Sets, Term};
use super::round::FailReason;
use super::statistics::{Scores, compare};
use crate::ids::SubmissionId;

/// Standard errors by which a further adapter must improve the gate loss to be stacked. Low, because
/// each has passed the gate alone already, and the aggregate is tested again in the end.
pub const STACK_Z: f64 = 1.0;

/// The first look of the line search; factors on the mean of the stacked deltas. A mean of
/// adapters that each saw a part of the data is usually too timid, so it reaches well above 1.
pub const LAMBDAS: [f64; 6] = [0.5, 1.0, 1.5, 2.0, 3.0, 4.0];

/// How far past the largest factor the second look goes when that one was the best.
const BEYOND: f64 = 1.5;

/// An accepted submission.
#[derive(Debug, Clone, PartialEq)]
pub struct Accepted {
    /// Which.
    pub submission: SubmissionId,
    /// Its improvement over the base, alone, on the gate set.
    pub gain: f64,
    /// Bytes of its shard: what the coordinator leased, never what the worker says.
    pub shard_bytes: u64,
    /// Product-space norm of its delta.
    pub norm: f64,
}

/// How an evaluation ended.
#[derive(Debug, Clone, PartialEq)]
pub enum Outcome {
    /// With losses.
    Done {
        /// On the gate set.
        gate: Scores,
        /// Loss on the audit set, where it was asked for.
        audit_loss: Option<f64>,
    },
    /// It cannot be evaluated.
    Failed,
}

/// All that decides.
#[derive(Debug, Clone, PartialEq)]
pub struct Facts {
    /// The accepted submissions, in any order.
    pub accepted: Vec<Accepted>,
    /// Every evaluation of the round that has ended.
    pub ended: BTreeMap<CandidateKey, Outcome>,
    /// The sets of a full test: with audit where the round has one.
    pub sets: Sets,
    /// Standard errors by which the aggregate must beat the base.
    pub gate_z: f64,
}

/// An evaluation to be opened.
#[derive(Debug, Clone, PartialEq)]
pub struct Request {
    /// What.
    pub candidate: Candidate,
    /// Why, for people.
    pub purpose: String,
}

/// What is folded and what it is expected to be worth.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Choice {
    /// The submissions with their effective factors, sorted by submission.
    pub terms: Vec<Term>,
    /// The factor found by line search.
    pub lambda: f64,
    /// The norm above which deltas were clipped.
    pub tau: f64,
    /// Gate loss of the base.
    pub gate_before: f64,
    /// Gate loss with the stack.
    pub gate_after: f64,
    /// Audit loss of the base.
    pub audit_before: Option<f64>,
    /// Audit loss with the stack.
    pub audit_after: Option<f64>,
    /// Paired improvement on the gate set.
    pub gain: f64,
    /// Its standard error.
    pub gain_se: f64,
}

/// What is to be done next.
#[derive(Debug, Clone, PartialEq)]
pub enum Next {
    /// Evaluate these, all at once; none has ended yet.
    Evaluate(Vec<Request>),
    /// Fold this.
    Choose(Choice),
    /// Publish nothing.
    Nothing(FailReason),
}

/// Decides what comes next.
///
/// With `p_i` the shard's bytes, `tau` the median norm and `clip_i = min(1, tau / norm_i)`:
/// - stack: in order of gain, add adapter `i` at the small step `clip_i p_i / P`, `P` the bytes of
///   *all* accepted shards, while the gate loss falls by more than [`STACK_Z`] standard errors.
///   The step does not shrink when others join, so each test asks the same thing: does this
///   direction still help, given the ones before it? (Dividing by the bytes of the set so far would
///   ask whether a slightly different average is better, which no gate set of ours can see from
///   the fourth adapter on.)
/// - line search: `lambda * sum_i clip_i p_i / P_S * delta_i` over the stacked set `S`.
/// - the best single adapter at factor 1 takes the stack's place where its gate loss is lower.
/// - re-test of the best against the base with `gate_z`, on all sets.
pub fn next(facts: &Facts) -> Next {
    let base = Candidate::base(Sets::of(facts.sets.audit, Scope::Base));
    let (base_gate, base_audit) = match facts.ended.get(&base.key()) {
        None => return Next::Evaluate(vec![request(base, "the base")]),
        Some(Outcome::Failed) => return Next::Nothing(FailReason::EvaluationFailed),
        Some(Outcome::Done { gate, audit_loss }) => (gate, *audit_loss),
    };
    let norms: Vec<f64> = facts
        .accepted
        .iter()
        .map(|accepted| accepted.norm)
        .collect();
    let Some(tau) = median(&norms) else {
        return Next::Nothing(FailReason::NoAccepted);
    };
    let stacked = match stack(facts, base_gate, tau) {
        Ok(stacked) => stacked,
        Err(wanted) => return Next::Evaluate(wanted),
    };
    let best = match search(facts, &stacked, tau) {
        Ok(best) => best,
        Err(wanted) => return Next::Evaluate(wanted),
    };
    let stack = best.map(|(lambda, loss)| (lambda, loss, at_lambda(&stacked, tau, lambda)));
    // An average can be worse than its best part; that one has been evaluated already.
    let alone = best_alone(facts, tau).map(|(loss, terms)| (1.0, loss, terms));
    let found = match (stack, alone) {
        (Some(stack), Some(alone)) if alone.1 < stack.1 => Some(alone),
        (stack, alone) => stack.or(alone),
    };
    let Some((lambda, _, terms)) = found else {
        return Next::Nothing(FailReason::NoImprovement);
    };
    let test = Candidate::stack(terms, facts.sets);
    let (gate, audit_after) = match facts.ended.get(&test.key()) {
        None => return Next::Evaluate(vec![request(test, "the chosen stack again, on all sets")]),
        Some(Outcome::Failed) => return Next::Nothing(FailReason::EvaluationFailed),
        Some(Outcome::Done { gate, audit_loss }) => (gate, *audit_loss),
    };
    let (Ok(paired), Some(gate_before), Some(gate_after)) =
        (compare(base_gate, gate), base_gate.loss(), gate.loss())
    else {
        return Next::Nothing(FailReason::EvaluationFailed);
    };
    if !paired.exceeds(facts.gate_z) {
        return Next::Nothing(FailReason::NoImprovement);
    }
    Next::Choose(Choice {
        terms: test.terms().to_vec(),
        lambda,
        tau,
        gate_before,
        gate_after,
        audit_before: base_audit,
        audit_after,
        gain: paired.gain,
        gain_se: paired.se,
    })
}

/// The candidates added one after another; or the evaluation that is missing.
fn stack<'a>(facts: &'a Facts, base: &Scores, tau: f64) -> Result<Vec<&'a Accepted>, Vec<Request>> {
    let mut order: Vec<&Accepted> = facts.accepted.iter().collect();
    order.sort_by(|a, b| {
        b.gain
            .total_cmp(&a.gain)
            .then(a.submission.cmp(&b.submission))
    });
    let bytes_total = bytes(&order);
    let mut stacked: Vec<&Accepted> = Vec::new();
    let mut current = base;
    for accepted in order.iter().copied() {
        let mut trial = stacked.clone();
        trial.push(accepted);
        let terms = terms(&trial, tau, 1.0, bytes_total);
        let Some(outcome) = find(facts, &terms) else {
            let purpose = format!("a stack of {}: does one more help?", trial.len());
            return Err(vec![request(Candidate::stack(terms, Sets::GATE), &purpose)]);
        };
        let Outcome::Done { gate, .. } = outcome else {
            continue;
        };
        // The best one has passed the gate alone; it needs no second reason.
        let helps = stacked.is_empty()
            || compare(current, gate).is_ok_and(|paired| paired.exceeds(STACK_Z));
        if helps {
            stacked = trial;
            current = gate;
        }
    }
    Ok(stacked)
}

/// The best factor and its gate loss, if any could be evaluated; or the evaluations missing.
fn search(
    facts: &Facts,
    stacked: &[&Accepted],
    tau: f64,
) -> Result<Option<(f64, f64)>, Vec<Request>> {
    if stacked.is_empty() {
        return Ok(None);
    }
    let first = look(facts, stacked, tau, &LAMBDAS)?;
    let Some((best, _)) = first else {
        return Ok(None);
    };
    let second = look(facts, stacked, tau, &neighbours(best))?;
    Ok(better(first, second))
}

fn look(
    facts: &Facts,
    stacked: &[&Accepted],
    tau: f64,
    lambdas: &[f64],
) -> Result<Option<(f64, f64)>, Vec<Request>> {
    let mut wanted = Vec::new();
    let mut best = None;
    for lambda in lambdas.iter().copied() {
        let terms = at_lambda(stacked, tau, lambda);
        match find(facts, &terms) {
            None => {
                let purpose = format!("a stack of {} at {lambda} times", stacked.len());
                wanted.push(request(Candidate::stack(terms, Sets::GATE), &purpose));
            }
            Some(Outcome::Failed) => {}
            Some(Outcome::Done { gate, .. }) => {
                best = better(best, gate.loss().map(|loss| (lambda, loss)));
            }
        }
    }
    if wanted.is_empty() {
        Ok(best)
    } else {
        Err(wanted)
    }
}

/// The lowest gate loss of a submission alone, among those that need no clipping, and its term.
fn best_alone(facts: &Facts, tau: f64) -> Option<(f64, Vec<Term>)> {
    let losses = facts
        .accepted
        .iter()
        .filter(|accepted| accepted.norm <= tau);
    let losses = losses.filter_map(|accepted| {
        let terms = vec![Term {
            submission: accepted.submission,
            weight: 1.0,
        }];
        match find(facts, &terms)? {
            Outcome::Done { gate, .. } => Some((gate.loss()?, terms)),
            Outcome::Failed => None,
        }
    });
    losses.min_by(|one, two| {
        one.0
            .total_cmp(&two.0)
            .then(one.1[0].submission.cmp(&two.1[0].submission))
    })
}

/// The lower loss; the first of two equal ones.
fn better(one: Option<(f64, f64)>, two: Option<(f64, f64)>) -> Option<(f64, f64)> {
    match (one, two) {
        (Some(one), Some(two)) => Some(if two.1 < one.1 { two } else { one }),
        (one, two) => one.or(two),
    }
}

/// The factors half way to the best one's neighbours.
fn neighbours(best: f64) -> [f64; 2] {
    let below = LAMBDAS
        .iter()
        .rev()
        .copied()
        .find(|lambda| *lambda < best)
        .unwrap_or(0.0);
    let above = LAMBDAS.iter().copied().find(|lambda| *lambda > best);
    let up = above.map_or(best * BEYOND, |above| f64::midpoint(best, above));
    [f64::midpoint(below, best), up]
}

fn at_lambda(stacked: &[&Accepted], tau: f64, lambda: f64) -> Vec<Term> {
    terms(stacked, tau, lambda, bytes(stacked))
}

/// `lambda * p_i / bytes_total * min(1, tau / norm_i)` for each.
fn terms(set: &[&Accepted], tau: f64, lambda: f64, bytes_total: f64) -> Vec<Term> {
    let weight = |accepted: &Accepted| {
        lambda * (accepted.shard_bytes as f64 / bytes_total) * clip_factor(accepted.norm, tau)
    };
    set.iter()
        .map(|accepted| Term {
            submission: accepted.submission,
            weight: weight(accepted),
        })
        .collect()
}

/// Never zero, so that weights stay finite.
fn bytes(set: &[&Accepted]) -> f64 {
    set.iter()
        .map(|accepted| accepted.shard_bytes)
        .sum::<u64>()
        .max(1) as f64
}

/// How the evaluation of these terms on the gate set ended, alone or with the audit set.
fn find<'a>(facts: &'a Facts, terms: &[Term]) -> Option<&'a Outcome> {
    [Sets::GATE, Sets::GATE_AND_AUDIT]
        .into_iter()
        .find_map(|sets| {
            facts
                .ended
                .get(&Candidate::stack(terms.to_vec(), sets).key())
        })
}

fn request(candidate: Candidate, purpose: &str) -> Request {
    Request {
        candidate,
        purpose: purpose.to_owned(),
    }
}

#[cfg(test)]
#[path = "stacker_tests.rs"]
mod tests;

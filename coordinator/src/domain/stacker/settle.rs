//! The test that every proposal passes before it is published, whatever rule it is from.
//!
//! On the sets of the scope `final`: the gate loss must be below the base's by more than `gate_z`
//! standard errors, and no guard's loss may be above the base's by more than `guard_z`. A proposal
//! that fails is tried once more at half the step, without momentum. What is published is therefore
//! never worse than its parent by these measures; otherwise nothing is published.

use super::{Choice, Facts, Measured, Next, Outcome, Proposal, final_candidate, momentum, request};
use crate::domain::candidate::Term;
use crate::domain::round::FailReason;
use crate::domain::statistics::Paired;

/// The step that a failing proposal is tried at once more.
pub const SMALLER_STEP: f64 = 0.5;

/// Tests the proposal, then its smaller step.
///
/// # Errors
/// What is to be done first.
pub fn settle(facts: &Facts, base: &Measured, proposal: &Proposal) -> Result<Next, Next> {
    let refused = match attempt(facts, base, proposal)? {
        Ok(choice) => return Ok(Next::Choose(choice)),
        Err(reason) => reason,
    };
    let scale = |term: &Term| Term {
        submission: term.submission,
        weight: SMALLER_STEP * term.weight,
    };
    let smaller = Proposal {
        terms: proposal.terms.iter().map(scale).collect(),
        lambda: SMALLER_STEP * proposal.lambda,
        tau: proposal.tau,
        momentum: false,
    };
    Ok(match attempt(facts, base, &smaller)? {
        Ok(choice) => Next::Choose(choice),
        Err(_) => Next::Nothing(refused),
    })
}

/// The choice, or why it is none.
fn attempt(
    facts: &Facts,
    base: &Measured,
    proposal: &Proposal,
) -> Result<Result<Choice, FailReason>, Next> {
    let mu = if proposal.momentum {
        facts.bars.momentum
    } else {
        0.0
    };
    let mut step = momentum::outer_step(&proposal.terms, &facts.velocity, mu);
    step.update.retain(|term| term.weight != 0.0);
    if step.update.is_empty() {
        return Ok(Err(FailReason::NoImprovement));
    }
    let test = final_candidate(step.update, facts.bars.audit);
    let measured = match facts.outcome(&test) {
        None => {
            let purpose = if proposal.momentum {
                "the chosen stack again, on all sets"
            } else {
                "the chosen stack at half the step, on all sets"
            };
            return Err(Next::Evaluate(vec![request(test, purpose)]));
        }
        Some(Outcome::Failed) => return Ok(Err(FailReason::EvaluationFailed)),
        Some(Outcome::Done(measured)) => measured,
    };
    let paired = match judge(facts, base, measured)? {
        Ok(paired) => paired,
        Err(reason) => return Ok(Err(reason)),
    };
    Ok(Ok(Choice {
        terms: test.terms().to_vec(),
        lambda: proposal.lambda,
        tau: proposal.tau,
        gate_before: base.gate.loss,
        gate_after: measured.gate.loss,
        audit_before: base.audit_loss,
        audit_after: measured.audit_loss,
        gain: paired.gain,
        gain_se: paired.se,
        velocity: if mu > 0.0 { step.velocity } else { Vec::new() },
    }))
}

/// The gate first, then every guard.
fn judge(
    facts: &Facts,
    base: &Measured,
    measured: &Measured,
) -> Result<Result<Paired, FailReason>, Next> {
    let Some(paired) = facts.compare(base.gate.scores, measured.gate.scores)? else {
        return Ok(Err(FailReason::EvaluationFailed));
    };
    if !paired.exceeds(facts.bars.gate_z) {
        return Ok(Err(FailReason::NoImprovement));
    }
    for guard in &facts.bars.guards {
        let name = guard_set(guard);
        let (Some(before), Some(after)) = (base.extra.get(&name), measured.extra.get(&name)) else {
            return Ok(Err(FailReason::EvaluationFailed));
        };
        // The other way round: by how much the base is better.
        let Some(fall) = facts.compare(after.scores, before.scores)? else {
            return Ok(Err(FailReason::EvaluationFailed));
        };
        if fall.exceeds(facts.bars.guard_z) {
            return Ok(Err(FailReason::GuardFell));
        }
    }
    Ok(Ok(paired))
}

/// The name under which a guard is scored.
pub fn guard_set(dataset: &str) -> String {
    format!("guard/{dataset}")
}

#[cfg(test)]
#[path = "settle_tests.rs"]
mod tests;

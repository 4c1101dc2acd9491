//! The rule `stack`: clip to the median norm, add in order of gain while the gate set agrees, search
//! the factor.
//!
//! With `share_i` the capped share of the shard's bytes, `tau` the median norm and
//! `clip_i = min(1, tau / norm_i)`:
//! - gate: adapter `i` is added at the step `share_i clip_i`, its share of *all* accepted. The step
//!   does not shrink when others join, so each test asks the same thing: does this direction still
//!   help, given the ones before it? (Dividing by the bytes of the set so far would ask whether a
//!   slightly different average is better, which no gate set of ours can see from the fourth
//!   adapter on.) Adapters whose own result leaves no doubt are tried in blocks of [`BLOCK_MAX`]; a
//!   block that does not bring enough is halved, down to one. The doubtful are tried one by one.
//! - line search: `lambda * sum_i share_i clip_i * delta_i`, shares over the stacked set.
//! - the best single adapter at factor 1 takes the stack's place where its gate loss is lower and
//!   one identity may weigh that much.

use super::{Accepted, Facts, Measured, Next, Outcome, Proposal, SetResult};
use crate::domain::candidate::Term;
use crate::domain::round::FailReason;

/// Standard errors by which one more adapter must improve the gate loss to be stacked; a block of `n`
/// must by `sqrt(n)` times as many. Low, because each has passed the gate alone already, and the
/// aggregate is tested again in the end.
pub const STACK_Z: f64 = 1.0;

/// An adapter that improves the base by this many standard errors alone leaves no doubt.
pub const SURE_Z: f64 = 4.0;

/// Most adapters that are added by one evaluation.
pub const BLOCK_MAX: usize = 4;

/// The part of what a block's adapters brought alone, each scaled to its step, that the block must
/// bring to be added whole. Adapters that learned the same bring a little less together than apart;
/// half is lost only when some of them work against the others, and then the block is halved to find
/// out which.
pub const BLOCK_KEEPS: f64 = 0.5;

/// The first look of the line search; factors on the mean of the stacked deltas. A mean of adapters
/// that each saw a part of the data is usually too timid, so it reaches well above 1.
pub const LAMBDAS: [f64; 3] = [1.0, 2.0, 4.0];

/// How far past the largest factor the second look goes when that one was the best.
const BEYOND: f64 = 1.5;

/// A third look this close to a factor that has been tried, relative to it, finds nothing.
const NEAR: f64 = 0.05;

/// Proposes the stack; or says what must be known first.
///
/// # Errors
/// What is to be done first.
pub fn propose(facts: &Facts, base: &Measured) -> Result<Proposal, Next> {
    let tau = facts.tau();
    let stacked = grow(facts, base.gate, tau)?;
    let best = search(facts, base.gate.loss, &stacked, tau)?;
    let stack = best.map(|point| (point, facts.clipped_mean(&stacked, tau, point.lambda)));
    // An average can be worse than its best part; that one has been evaluated already.
    let found = match (stack, best_alone(facts, &stacked, tau)) {
        (Some(stack), Some(alone)) if alone.0.loss < stack.0.loss => Some(alone),
        (stack, alone) => stack.or(alone),
    };
    let (point, terms) = found.ok_or(Next::Nothing(FailReason::NoImprovement))?;
    Ok(Proposal {
        terms,
        lambda: point.lambda,
        tau,
        momentum: true,
    })
}

/// An adapter on its way into the stack.
#[derive(Clone, Copy)]
struct Step<'a> {
    accepted: &'a Accepted,
    weight: f64,
}

impl Step<'_> {
    /// Whether it needs no test of its own.
    fn is_sure(&self) -> bool {
        self.accepted.gain > SURE_Z * self.accepted.gain_se
    }

    fn term(&self) -> Term {
        Term {
            submission: self.accepted.submission,
            weight: self.weight,
        }
    }
}

/// What has been stacked so far, and its losses on the gate set.
struct Grown<'a> {
    members: Vec<Step<'a>>,
    gate: SetResult,
}

/// The adapters that are stacked.
fn grow(facts: &Facts, base: SetResult, tau: f64) -> Result<Vec<&Accepted>, Next> {
    let mut order: Vec<&Accepted> = facts.accepted.iter().collect();
    order.sort_by(|a, b| {
        b.gain
            .total_cmp(&a.gain)
            .then(a.submission.cmp(&b.submission))
    });
    let terms = facts.clipped_mean(&order, tau, 1.0);
    let steps: Vec<Step<'_>> = order
        .into_iter()
        .zip(terms)
        .map(|(accepted, term)| Step {
            accepted,
            weight: term.weight,
        })
        .collect();
    let mut grown = Grown {
        members: Vec::new(),
        gate: base,
    };
    for run in steps.chunk_by(|one, other| one.is_sure() && other.is_sure()) {
        for block in run.chunks(BLOCK_MAX) {
            add(facts, &mut grown, block)?;
        }
    }
    Ok(grown.members.iter().map(|step| step.accepted).collect())
}

/// Adds a block, or those parts of it that help.
fn add<'a>(facts: &Facts, grown: &mut Grown<'a>, block: &[Step<'a>]) -> Result<(), Next> {
    let members: Vec<Step<'a>> = grown.members.iter().chain(block).copied().collect();
    let purpose = match block.len() {
        1 => format!("a stack of {}: does one more help?", members.len()),
        count => format!("a stack of {}: do {count} more help?", members.len()),
    };
    let terms = members.iter().map(Step::term).collect();
    let outcome = facts
        .tried(terms, &purpose)
        .map_err(|request| Next::Evaluate(vec![request]))?;
    if let Outcome::Done(measured) = outcome
        && helps(facts, grown, block, measured)?
    {
        grown.members = members;
        grown.gate = measured.gate;
        return Ok(());
    }
    if block.len() < 2 {
        return Ok(());
    }
    // Where the first half helps, the second's test is the whole block's, evaluated just now.
    let (first, second) = block.split_at(block.len().div_ceil(2));
    add(facts, grown, first)?;
    add(facts, grown, second)
}

fn helps(
    facts: &Facts,
    grown: &Grown<'_>,
    block: &[Step<'_>],
    measured: &Measured,
) -> Result<bool, Next> {
    if grown.members.is_empty() && block.len() == 1 {
        // The best one has passed the gate alone; it needs no second reason.
        return Ok(true);
    }
    let Some(paired) = facts.compare(grown.gate.scores, measured.gate.scores)? else {
        return Ok(false);
    };
    let alone: f64 = block
        .iter()
        .map(|step| step.weight * step.accepted.gain)
        .sum();
    let whole = block.len() == 1 || paired.gain >= BLOCK_KEEPS * alone;
    Ok(whole && paired.exceeds(STACK_Z * (block.len() as f64).sqrt()))
}

/// A factor and the gate loss with it.
#[derive(Debug, Clone, Copy, PartialEq)]
struct Point {
    lambda: f64,
    loss: f64,
}

/// The best factor, if any could be evaluated: a look at three, at two beside the best, and at the
/// lowest point of the parabola through the best and its neighbours.
fn search(
    facts: &Facts,
    base: f64,
    stacked: &[&Accepted],
    tau: f64,
) -> Result<Option<Point>, Next> {
    if stacked.is_empty() {
        return Ok(None);
    }
    let mut points = look(facts, stacked, tau, &LAMBDAS)?;
    let Some(best) = lowest(&points) else {
        return Ok(None);
    };
    points.extend(look(facts, stacked, tau, &neighbours(best.lambda))?);
    let mut curve = points.clone();
    if facts.velocity.is_empty() {
        // Without momentum, a factor of nothing is the base.
        curve.push(Point {
            lambda: 0.0,
            loss: base,
        });
    }
    if let Some(bottom) = bottom(curve) {
        points.extend(look(facts, stacked, tau, &[bottom])?);
    }
    Ok(lowest(&points))
}

/// The points that could be evaluated.
fn look(
    facts: &Facts,
    stacked: &[&Accepted],
    tau: f64,
    lambdas: &[f64],
) -> Result<Vec<Point>, Next> {
    let (mut points, mut wanted) = (Vec::new(), Vec::new());
    for lambda in lambdas.iter().copied() {
        let terms = facts.with_momentum(&facts.clipped_mean(stacked, tau, lambda));
        let purpose = format!("a stack of {} at {lambda:.3} times", stacked.len());
        match facts.tried(terms, &purpose) {
            Err(request) => wanted.push(request),
            Ok(Outcome::Failed) => {}
            Ok(Outcome::Done(measured)) => points.push(Point {
                lambda,
                loss: measured.gate.loss,
            }),
        }
    }
    if wanted.is_empty() {
        Ok(points)
    } else {
        Err(Next::Evaluate(wanted))
    }
}

/// The lowest loss; of equal ones the smaller factor.
fn lowest(points: &[Point]) -> Option<Point> {
    points.iter().copied().min_by(|one, other| {
        one.loss
            .total_cmp(&other.loss)
            .then(one.lambda.total_cmp(&other.lambda))
    })
}

/// The factors half way to the best one's neighbours.
fn neighbours(best: f64) -> [f64; 2] {
    let below = LAMBDAS.iter().rev().copied().find(|one| *one < best);
    let above = LAMBDAS.iter().copied().find(|one| *one > best);
    let up = above.map_or(best * BEYOND, |above| f64::midpoint(best, above));
    [f64::midpoint(below.unwrap_or(0.0), best), up]
}

/// Where the parabola through the lowest point and its two neighbours is lowest; nothing when the
/// lowest is at an end, or one of the points is as good as there already.
fn bottom(mut points: Vec<Point>) -> Option<f64> {
    points.sort_by(|one, other| one.lambda.total_cmp(&other.lambda));
    let best = lowest(&points)?;
    let place = points.iter().position(|point| *point == best)?;
    let before = points.get(place.checked_sub(1)?)?;
    let after = points.get(place + 1)?;
    let (left, right) = (best.lambda - before.lambda, after.lambda - best.lambda);
    let (fall, rise) = (before.loss - best.loss, after.loss - best.loss);
    let bend = fall * right + rise * left;
    let found = best.lambda + (fall * right * right - rise * left * left) / (2.0 * bend);
    let inside = bend > 0.0 && found > before.lambda && found < after.lambda;
    let tried = |point: &Point| (point.lambda - found).abs() <= NEAR * point.lambda;
    (inside && !points.iter().any(tried)).then_some(found)
}

/// The submission with the lowest gate loss alone, among those that need no clipping, at factor 1.
/// Nothing when others are stacked and one identity may not weigh everything, or when momentum would
/// come on top of it.
fn best_alone(facts: &Facts, stacked: &[&Accepted], tau: f64) -> Option<(Point, Vec<Term>)> {
    let bars = &facts.bars;
    let may = |one: &Accepted| {
        stacked.iter().all(|other| other.worker == one.worker)
            || (bars.identity_share >= 1.0 && (!one.newcomer || bars.newcomer_share >= 1.0))
    };
    if bars.momentum > 0.0 {
        return None;
    }
    let unclipped = facts
        .accepted
        .iter()
        .filter(|one| one.norm <= tau && may(one));
    let best = unclipped.min_by(|one, other| {
        one.gate_loss
            .total_cmp(&other.gate_loss)
            .then(one.submission.cmp(&other.submission))
    })?;
    let point = Point {
        lambda: 1.0,
        loss: best.gate_loss,
    };
    let term = Term {
        submission: best.submission,
        weight: 1.0,
    };
    Some((point, vec![term]))
}

#[cfg(test)]
#[path = "greedy_tests.rs"]
mod tests;

//! One round under Cairn's default rule, decided by the coordinator's own functions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use cairn_coordinator::domain::candidate::{Candidate, Sets, Term};
use cairn_coordinator::domain::stacker::{Accepted, Facts, Next, Outcome, next};
use cairn_coordinator::domain::statistics::{Scores, compare};
use cairn_coordinator::ids::SubmissionId;
use cairn_stack::adapter::AdapterFile;
use cairn_stack::algebra;

use super::hand::Hand;

/// Standard errors by which a single adapter, and the chosen stack, must beat the base.
const GATE_Z: f64 = 2.33;

/// What the round decided.
#[derive(Debug, Clone, Default)]
pub struct Decision {
    /// Place of each stacked adapter and the factor on its delta; none when nothing helped.
    pub terms: Vec<(usize, f64)>,
    /// The factor that the line search found.
    pub lambda: f64,
    /// Adapters that passed the gate alone.
    pub accepted: usize,
    /// Processor time of all evaluations, seconds.
    pub cpu_seconds: f64,
}

/// Scores by terms: the rule asks again for what it has seen, on more sets.
type Known = BTreeMap<Vec<(usize, u64)>, Scores>;

/// What a round is decided on.
pub struct Round<'a> {
    /// The round's base.
    pub base: &'a Path,
    /// The trained adapters.
    pub adapters: &'a [PathBuf],
    /// Bytes of each one's shard.
    pub bytes: &'a [u64],
    /// The gate set.
    pub gate: &'a Path,
    /// Tokens after which a gate record is cut.
    pub sequence_length: u32,
}

/// Judges each adapter alone, then lets the coordinator's rule ask for evaluations until it has
/// chosen.
///
/// # Errors
/// When an evaluation fails.
pub fn decide(hand: &mut Hand, round: &Round<'_>) -> Result<Decision> {
    let mut decision = Decision::default();
    let ids: Vec<SubmissionId> = (0..round.adapters.len())
        .map(|place| Ok(format!("00000000-0000-7000-8000-{place:012}").parse()?))
        .collect::<Result<_>>()?;
    let mut known = Known::new();
    let base = score(hand, round, &ids, &[], &mut known, &mut decision)?;
    let mut facts = Facts {
        accepted: Vec::new(),
        ended: BTreeMap::new(),
        sets: Sets::GATE,
        gate_z: GATE_Z,
    };
    for (place, id) in ids.iter().enumerate() {
        let single = Candidate::single(*id, Sets::GATE);
        let scores = score(hand, round, &ids, single.terms(), &mut known, &mut decision)?;
        let paired = compare(&base, &scores)?;
        facts.ended.insert(single.key(), done(scores));
        if paired.exceeds(GATE_Z) {
            facts.accepted.push(Accepted {
                submission: *id,
                gain: paired.gain,
                shard_bytes: round.bytes[place],
                norm: algebra::norm(&AdapterFile::open(&round.adapters[place])?)?,
            });
        }
    }
    decision.accepted = facts.accepted.len();
    loop {
        match next(&facts) {
            Next::Evaluate(requests) => {
                for request in requests {
                    let terms = request.candidate.terms();
                    let scores = score(hand, round, &ids, terms, &mut known, &mut decision)?;
                    facts.ended.insert(request.candidate.key(), done(scores));
                }
            }
            Next::Choose(choice) => {
                decision.lambda = choice.lambda;
                decision.terms = places(&ids, &choice.terms)?;
                return Ok(decision);
            }
            Next::Nothing(_) => return Ok(decision),
        }
    }
}

fn done(gate: Scores) -> Outcome {
    Outcome::Done {
        gate,
        audit_loss: None,
    }
}

fn places(ids: &[SubmissionId], terms: &[Term]) -> Result<Vec<(usize, f64)>> {
    terms
        .iter()
        .map(|term| {
            let place = ids.iter().position(|id| *id == term.submission);
            Ok((place.context("a term of another round")?, term.weight))
        })
        .collect()
}

fn score(
    hand: &mut Hand,
    round: &Round<'_>,
    ids: &[SubmissionId],
    terms: &[Term],
    known: &mut Known,
    decision: &mut Decision,
) -> Result<Scores> {
    let places = places(ids, terms)?;
    let key: Vec<(usize, u64)> = places
        .iter()
        .map(|(place, weight)| (*place, weight.to_bits()))
        .collect();
    if let Some(scores) = known.get(&key) {
        return Ok(scores.clone());
    }
    let adapters: Vec<(PathBuf, f64)> = places
        .into_iter()
        .map(|(place, weight)| (round.adapters[place].clone(), weight))
        .collect();
    let scored = hand.evaluate(round.base, &adapters, round.gate, round.sequence_length)?;
    decision.cpu_seconds += scored.cpu_seconds;
    known.insert(key, scored.scores.clone());
    Ok(scored.scores)
}

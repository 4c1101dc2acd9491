//! One round under Cairn's default rule, decided by the coordinator's own functions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use cairn_coordinator::domain::candidate::{Candidate, Sets, Term};
use cairn_coordinator::domain::stacker::{
    Accepted, Bars, Facts, Measured, Next, Outcome, SetResult, next,
};
use cairn_coordinator::domain::statistics::{Scores, compare};
use cairn_coordinator::ids::SubmissionId;
use cairn_stack::adapter::AdapterFile;
use cairn_stack::algebra;
use cairn_stack::digest::Digest;
use cairn_stack::recipe::Aggregation;

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
    let mut facts = facts();
    let mut losses = BTreeMap::new();
    for (place, id) in ids.iter().enumerate() {
        let single = Candidate::single(*id, Sets::GATE);
        let scores = score(hand, round, &ids, single.terms(), &mut known, &mut decision)?;
        let paired = compare(&base, &scores)?;
        let gate_loss = scores.loss().context("the gate set has no scored token")?;
        let outcome = done(scores, &mut losses)?;
        facts.ended.insert(single.key(), outcome);
        if paired.exceeds(GATE_Z) {
            facts.accepted.push(Accepted {
                submission: *id,
                // Every volunteer has one shard, and all are known.
                worker: id.to_string().parse()?,
                newcomer: false,
                gain: paired.gain,
                gain_se: paired.se,
                gate_loss,
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
                    let outcome = done(scores, &mut losses)?;
                    facts.ended.insert(request.candidate.key(), outcome);
                }
            }
            Next::Compare(asked) => {
                for one in asked {
                    let found = compare(stored(&losses, one.0)?, stored(&losses, one.1)?);
                    facts.compared.insert(one, found.ok());
                }
            }
            Next::Choose(choice) => {
                decision.lambda = choice.lambda;
                decision.terms = places(&ids, &choice.terms)?;
                return Ok(decision);
            }
            Next::Nothing(_) | Next::Learn { .. } => return Ok(decision),
        }
    }
}

/// The default rule, and no caps: every volunteer has one shard.
fn facts() -> Facts {
    Facts {
        rule: Aggregation::Stack,
        accepted: Vec::new(),
        ended: BTreeMap::new(),
        learned: BTreeMap::new(),
        compared: BTreeMap::new(),
        products: BTreeMap::new(),
        velocity: Vec::new(),
        bars: Bars {
            audit: false,
            gate_z: GATE_Z,
            guards: Vec::new(),
            guard_z: 2.0,
            identity_share: 1.0,
            newcomer_share: 1.0,
            momentum: 0.0,
        },
    }
}

/// An evaluation's outcome; its losses are kept by their digest, as the coordinator does.
fn done(gate: Scores, losses: &mut BTreeMap<Digest, Scores>) -> Result<Outcome> {
    let scores = Digest::of(&gate.encode());
    let loss = gate.loss().context("the gate set has no scored token")?;
    losses.insert(scores, gate);
    Ok(Outcome::Done(Measured {
        gate: SetResult { loss, scores },
        audit_loss: None,
        extra: BTreeMap::new(),
    }))
}

fn stored(losses: &BTreeMap<Digest, Scores>, digest: Digest) -> Result<&Scores> {
    losses.get(&digest).context("losses that were never stored")
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

//! One round under one of Cairn's rules, decided by the coordinator's own functions.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use anyhow::{Context as _, Result};
use cairn_coordinator::domain::candidate::{Candidate, Sets, Term};
use cairn_coordinator::domain::stacker::{
    Accepted, Bars, Facts, Measured, Next, Outcome, SetResult, next,
};
use cairn_coordinator::domain::statistics::{Scores, compare};
use cairn_coordinator::ids::{SubmissionId, WorkerId};
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
    /// Evaluations that it took.
    pub evaluations: usize,
    /// Processor time of all evaluations, seconds.
    pub cpu_seconds: f64,
}

/// What a round is decided on.
pub struct Round<'a> {
    /// The rule.
    pub rule: Aggregation,
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
    let mut desk = Desk {
        hand,
        round,
        ids: (0..round.adapters.len()).map(id).collect::<Result<_>>()?,
        known: BTreeMap::new(),
        scores: BTreeMap::new(),
        decision: Decision::default(),
    };
    let base = desk.measure(&[])?;
    let mut facts = Facts {
        rule: round.rule,
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
    };
    for place in 0..round.adapters.len() {
        let single = Candidate::single(desk.ids[place], Sets::GATE);
        let alone = desk.measure(single.terms())?;
        facts.ended.insert(single.key(), done(alone));
        let paired = compare(&desk.scores[&base.scores], &desk.scores[&alone.scores])?;
        if paired.exceeds(GATE_Z) {
            facts.accepted.push(Accepted {
                submission: desk.ids[place],
                worker: id::<WorkerId>(place)?,
                newcomer: false,
                gain: paired.gain,
                gain_se: paired.se,
                gate_loss: alone.loss,
                shard_bytes: round.bytes[place],
                norm: algebra::norm(&AdapterFile::open(&round.adapters[place])?)?,
            });
        }
    }
    desk.decision.accepted = facts.accepted.len();
    loop {
        match next(&facts) {
            Next::Evaluate(requests) => {
                for request in requests {
                    let measured = desk.measure(request.candidate.terms())?;
                    facts.ended.insert(request.candidate.key(), done(measured));
                }
            }
            Next::Compare(comparisons) => {
                for (reference, candidate) in comparisons {
                    let of = |digest: &Digest| desk.scores.get(digest).context("unknown scores");
                    let paired = compare(of(&reference)?, of(&candidate)?).ok();
                    facts.compared.insert((reference, candidate), paired);
                }
            }
            Next::Choose(choice) => {
                desk.decision.lambda = choice.lambda;
                desk.decision.terms = desk.places(&choice.terms)?;
                return Ok(desk.decision);
            }
            Next::Learn { .. } | Next::Nothing(_) => return Ok(desk.decision),
        }
    }
}

/// The id of a place: the same in every run, so that the fold's order is too.
fn id<T: std::str::FromStr>(place: usize) -> Result<T>
where
    T::Err: std::error::Error + Send + Sync + 'static,
{
    Ok(format!("00000000-0000-7000-8000-{place:012}").parse()?)
}

fn done(gate: SetResult) -> Outcome {
    Outcome::Done(Measured {
        gate,
        audit_loss: None,
        extra: BTreeMap::new(),
    })
}

/// What a decision works with.
struct Desk<'a> {
    hand: &'a mut Hand,
    round: &'a Round<'a>,
    ids: Vec<SubmissionId>,
    /// Results by terms: the rule asks again for what it has seen, on more sets.
    known: BTreeMap<Vec<(usize, u64)>, SetResult>,
    /// Losses record by record, by the digest of their stored form.
    scores: BTreeMap<Digest, Scores>,
    decision: Decision,
}

impl Desk<'_> {
    fn places(&self, terms: &[Term]) -> Result<Vec<(usize, f64)>> {
        let place = |term: &Term| {
            let place = self.ids.iter().position(|id| *id == term.submission);
            Ok((place.context("a term of another round")?, term.weight))
        };
        terms.iter().map(place).collect()
    }

    fn measure(&mut self, terms: &[Term]) -> Result<SetResult> {
        let places = self.places(terms)?;
        let key: Vec<(usize, u64)> = places
            .iter()
            .map(|(place, weight)| (*place, weight.to_bits()))
            .collect();
        if let Some(result) = self.known.get(&key) {
            return Ok(*result);
        }
        let round = self.round;
        let adapters: Vec<(PathBuf, f64)> = places
            .into_iter()
            .map(|(place, weight)| (round.adapters[place].clone(), weight))
            .collect();
        let length = round.sequence_length;
        let scored = self
            .hand
            .evaluate(round.base, &adapters, round.gate, length)?;
        self.decision.evaluations += 1;
        self.decision.cpu_seconds += scored.cpu_seconds;
        let result = SetResult {
            loss: scored.loss(),
            scores: Digest::of(&scored.scores.encode()),
        };
        self.scores.insert(result.scores, scored.scores);
        self.known.insert(key, result);
        Ok(result)
    }
}

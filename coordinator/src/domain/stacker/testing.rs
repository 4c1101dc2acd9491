//! A world in which every adapter is a vector and every loss a quadratic.

use std::collections::BTreeMap;

use cairn_stack::digest::Digest;
use cairn_stack::recipe::Aggregation;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

use super::{
    Accepted, Bars, Facts, Learned, Measured, Next, Outcome, SetResult, base_candidate, next,
};
use crate::domain::candidate::{Candidate, Scope, Term};
use crate::domain::statistics::{Scores, compare};
use crate::ids::{SubmissionId, WorkerId};

pub const DIMENSIONS: usize = 6;
pub const RECORDS: usize = 80;

pub type Vector = [f64; DIMENSIONS];

/// A hidden quadratic: record j's loss is `|w - target - noise_j|^2` per token, and a submission's
/// delta is a vector. A guard is another such quadratic.
pub struct World {
    pub target: Vector,
    pub noise: Vec<Vector>,
    pub deltas: BTreeMap<SubmissionId, Vector>,
    /// Whose they are; an identity each where nothing is said.
    pub workers: BTreeMap<SubmissionId, (WorkerId, bool)>,
    pub guards: BTreeMap<String, Vector>,
    /// Whatever contains this one cannot be evaluated.
    pub poison: Option<SubmissionId>,
    pub rule: Aggregation,
    pub bars: Bars,
    pub velocity: Vec<Term>,
    /// What learning answers; the best factors by a few steps of descent where nothing is said.
    pub learned: Option<Learned>,
}

pub fn vector(random: &mut ChaCha20Rng, size: f64) -> Vector {
    std::array::from_fn(|_| size * (random.random::<f64>() * 2.0 - 1.0))
}

/// How a run ended, how many evaluations it took, and how many comparisons its last step rests on.
pub struct Run {
    pub next: Next,
    pub evaluations: usize,
    pub comparisons: usize,
}

impl World {
    pub fn new(seed: u64, honest: usize) -> Self {
        let mut random = ChaCha20Rng::seed_from_u64(seed);
        let noise = (0..RECORDS).map(|_| vector(&mut random, 0.5)).collect();
        let deltas = (0..honest)
            .map(|_| {
                let off = vector(&mut random, 0.3);
                (SubmissionId::new(), std::array::from_fn(|d| 0.4 + off[d]))
            })
            .collect();
        Self {
            target: [1.0; DIMENSIONS],
            noise,
            deltas,
            workers: BTreeMap::new(),
            guards: BTreeMap::new(),
            poison: None,
            rule: Aggregation::Stack,
            bars: Bars {
                audit: true,
                gate_z: 2.33,
                guards: Vec::new(),
                guard_z: 2.0,
                identity_share: 1.0,
                newcomer_share: 1.0,
                momentum: 0.0,
            },
            velocity: Vec::new(),
            learned: None,
        }
    }

    pub fn add(&mut self, delta: Vector) -> SubmissionId {
        let id = SubmissionId::new();
        self.deltas.insert(id, delta);
        id
    }

    pub fn at(&self, terms: &[Term]) -> Vector {
        std::array::from_fn(|d| {
            terms
                .iter()
                .map(|term| term.weight * self.deltas[&term.submission][d])
                .sum()
        })
    }

    fn scores_of(&self, w: &Vector, target: &Vector) -> Scores {
        let loss = |noise: &Vector| -> f64 {
            (0..DIMENSIONS)
                .map(|d| (w[d] - target[d] - noise[d]).powi(2))
                .sum()
        };
        let nll = self
            .noise
            .iter()
            .map(|noise| (10.0 * loss(noise)) as f32)
            .collect();
        Scores {
            nll,
            tokens: vec![10; RECORDS],
        }
    }

    pub fn scores(&self, terms: &[Term]) -> Scores {
        self.scores_of(&self.at(terms), &self.target)
    }

    pub fn loss(&self, terms: &[Term]) -> f64 {
        self.scores(terms).loss().unwrap()
    }

    pub fn alone(&self, submission: SubmissionId) -> f64 {
        self.loss(&[Term {
            submission,
            weight: 1.0,
        }])
    }

    pub fn facts(&self) -> Facts {
        let base = self.scores(&[]);
        let accepted = self.deltas.iter().map(|(id, delta)| {
            let terms = [Term {
                submission: *id,
                weight: 1.0,
            }];
            let alone = compare(&base, &self.scores(&terms)).unwrap();
            let known = self.workers.get(id).copied();
            let (worker, newcomer) = known.unwrap_or_else(|| (own_worker(*id), false));
            Accepted {
                submission: *id,
                worker,
                newcomer,
                gain: alone.gain,
                gain_se: alone.se,
                gate_loss: self.loss(&terms),
                shard_bytes: 100,
                norm: dot(delta, delta).sqrt(),
            }
        });
        let mut products = BTreeMap::new();
        for (one, x) in &self.deltas {
            for (other, y) in self.deltas.range(..=one) {
                products.insert((*one, *other), dot(x, y));
            }
        }
        Facts {
            rule: self.rule,
            accepted: accepted.collect(),
            ended: BTreeMap::new(),
            learned: BTreeMap::new(),
            compared: BTreeMap::new(),
            products,
            velocity: self.velocity.clone(),
            bars: self.bars.clone(),
        }
    }

    /// The losses behind an evaluation's digests are kept in `store`, as the blob store does.
    pub fn outcome(&self, candidate: &Candidate, store: &mut BTreeMap<Digest, Scores>) -> Outcome {
        let terms = candidate.terms();
        if terms
            .iter()
            .any(|term| Some(term.submission) == self.poison)
        {
            return Outcome::Failed;
        }
        let mut result = |scores: Scores| {
            let digest = Digest::of(&scores.encode());
            let loss = scores.loss().unwrap();
            store.insert(digest, scores);
            SetResult {
                loss,
                scores: digest,
            }
        };
        let w = self.at(candidate.terms());
        let gate = result(self.scores_of(&w, &self.target));
        let mut extra = BTreeMap::new();
        if matches!(candidate.sets().scope, Scope::Base | Scope::Final) {
            for (name, target) in &self.guards {
                let scores = self.scores_of(&w, target);
                extra.insert(super::settle::guard_set(name), result(scores));
            }
        }
        Outcome::Done(Measured {
            audit_loss: candidate.sets().audit.then_some(gate.loss + 0.1),
            gate,
            extra,
        })
    }

    /// Descends the gate loss over the factors.
    fn learn(&self, start: &Candidate) -> Learned {
        if let Some(fixed) = &self.learned {
            return fixed.clone();
        }
        let mut terms = start.terms().to_vec();
        let loss_before = self.loss(&terms);
        for _ in 0..200 {
            let here = self.loss(&terms);
            let slopes: Vec<f64> = (0..terms.len())
                .map(|place| {
                    let mut ahead = terms.clone();
                    ahead[place].weight += 1e-3;
                    (self.loss(&ahead) - here) / 1e-3
                })
                .collect();
            for (term, slope) in terms.iter_mut().zip(slopes) {
                term.weight = (term.weight - 0.02 * slope).max(0.0);
            }
        }
        Learned::Done {
            loss_before,
            loss_after: self.loss(&terms),
            weights: terms.iter().map(|term| term.weight).collect(),
        }
    }

    /// Runs to the end, answering the requests of each step in a shuffled order and one at a time.
    /// Everything but evaluations is forgotten between two steps, as a restart would.
    pub fn run(&self, order: u64) -> Run {
        let mut random = ChaCha20Rng::seed_from_u64(order);
        let mut facts = self.facts();
        let mut store = BTreeMap::new();
        let mut evaluations = 0;
        loop {
            facts.accepted.shuffle(&mut random);
            match next(&facts) {
                Next::Evaluate(mut wanted) => {
                    assert!(!wanted.is_empty());
                    wanted.shuffle(&mut random);
                    // Only one is answered: the others must be asked for again, unchanged.
                    let asked = &wanted[0].candidate;
                    let outcome = self.outcome(asked, &mut store);
                    let before = facts.ended.insert(asked.key(), outcome);
                    assert_eq!(before, None, "asked for what has ended");
                    evaluations += 1;
                    facts.compared.clear();
                    if wanted.len() > 1 {
                        let again = compared(&mut facts, &store);
                        let Next::Evaluate(again) = again else {
                            panic!("{again:?}")
                        };
                        for rest in &wanted[1..] {
                            assert!(again.contains(rest));
                        }
                    }
                }
                Next::Compare(wanted) => {
                    for (reference, candidate) in wanted {
                        let found = compare(&store[&reference], &store[&candidate]).ok();
                        let before = facts.compared.insert((reference, candidate), found);
                        assert_eq!(before, None, "asked for what is known");
                    }
                }
                Next::Learn { job, .. } => {
                    let learned = self.learn(job.candidate().unwrap());
                    let before = facts.learned.insert(job.key(), learned);
                    assert_eq!(before, None, "asked for what was learned");
                    evaluations += 1;
                }
                next => {
                    return Run {
                        next,
                        evaluations,
                        comparisons: facts.compared.len(),
                    };
                }
            }
        }
    }

    pub fn base(&self) -> Candidate {
        base_candidate(self.bars.audit)
    }
}

/// What comes next once all comparisons are made.
fn compared(facts: &mut Facts, store: &BTreeMap<Digest, Scores>) -> Next {
    loop {
        match next(facts) {
            Next::Compare(wanted) => {
                for (reference, candidate) in wanted {
                    let found = compare(&store[&reference], &store[&candidate]).ok();
                    facts.compared.insert((reference, candidate), found);
                }
            }
            next => return next,
        }
    }
}

/// An identity of a submission's own.
pub fn own_worker(submission: SubmissionId) -> WorkerId {
    submission.to_string().parse().unwrap()
}

pub fn dot(x: &Vector, y: &Vector) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

pub fn choice(next: Next) -> super::Choice {
    match next {
        Next::Choose(choice) => choice,
        other => panic!("{other:?}"),
    }
}

pub fn weight_of(terms: &[Term], submission: SubmissionId) -> f64 {
    let found = terms.iter().find(|term| term.submission == submission);
    found.map_or(0.0, |term| term.weight)
}

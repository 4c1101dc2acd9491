use proptest::prelude::*;
use rand::seq::SliceRandom;
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha20Rng;

use super::*;

const DIMENSIONS: usize = 6;
const RECORDS: usize = 80;

/// A hidden quadratic: record j's loss is `|w - target - noise_j|^2` per token, and a submission's
/// delta is a vector.
struct World {
    target: [f64; DIMENSIONS],
    noise: Vec<[f64; DIMENSIONS]>,
    deltas: BTreeMap<SubmissionId, [f64; DIMENSIONS]>,
}

fn vector(random: &mut ChaCha20Rng, size: f64) -> [f64; DIMENSIONS] {
    std::array::from_fn(|_| size * (random.random::<f64>() * 2.0 - 1.0))
}

impl World {
    fn new(seed: u64, honest: usize) -> Self {
        let mut random = ChaCha20Rng::seed_from_u64(seed);
        let target = std::array::from_fn(|_| 1.0);
        let noise = (0..RECORDS).map(|_| vector(&mut random, 0.5)).collect();
        let deltas = (0..honest)
            .map(|_| {
                let off = vector(&mut random, 0.3);
                (SubmissionId::new(), std::array::from_fn(|d| 0.4 + off[d]))
            })
            .collect();
        Self {
            target,
            noise,
            deltas,
        }
    }

    fn scores(&self, terms: &[Term]) -> Scores {
        let w: [f64; DIMENSIONS] = std::array::from_fn(|d| {
            terms
                .iter()
                .map(|term| term.weight * self.deltas[&term.submission][d])
                .sum()
        });
        let loss = |noise: &[f64; DIMENSIONS]| -> f64 {
            (0..DIMENSIONS)
                .map(|d| (w[d] - self.target[d] - noise[d]).powi(2))
                .sum()
        };
        Scores {
            nll: self
                .noise
                .iter()
                .map(|noise| (10.0 * loss(noise)) as f32)
                .collect(),
            tokens: vec![10; RECORDS],
        }
    }

    fn facts(&self) -> Facts {
        let base = self.scores(&[]);
        let accepted = self
            .deltas
            .iter()
            .map(|(id, delta)| {
                let alone = self.scores(&[Term {
                    submission: *id,
                    weight: 1.0,
                }]);
                Accepted {
                    submission: *id,
                    gain: compare(&base, &alone).unwrap().gain,
                    shard_bytes: 100,
                    norm: delta.iter().map(|x| x * x).sum::<f64>().sqrt(),
                }
            })
            .collect();
        Facts {
            accepted,
            ended: BTreeMap::new(),
            sets: Sets::GATE_AND_AUDIT,
            gate_z: 2.33,
        }
    }

    fn outcome(&self, candidate: &Candidate) -> Outcome {
        let gate = self.scores(candidate.terms());
        let audit_loss = candidate.sets().audit.then(|| gate.loss().unwrap() + 0.1);
        Outcome::Done { gate, audit_loss }
    }

    /// Runs to the end, answering the requests of each step in a shuffled order and one at a time.
    fn run(&self, order: u64) -> (Next, usize) {
        let mut random = ChaCha20Rng::seed_from_u64(order);
        let mut facts = self.facts();
        facts.accepted.shuffle(&mut random);
        loop {
            let Next::Evaluate(mut wanted) = next(&facts) else {
                return (next(&facts), facts.ended.len());
            };
            assert!(!wanted.is_empty());
            wanted.shuffle(&mut random);
            // Only one is answered: the others must be asked for again, unchanged.
            let key = wanted[0].candidate.key();
            let before = facts.ended.insert(key, self.outcome(&wanted[0].candidate));
            assert_eq!(before, None, "asked for what has ended");
            if let Next::Evaluate(again) = next(&facts) {
                for rest in &wanted[1..] {
                    assert!(again.contains(rest));
                }
            }
        }
    }
}

fn choice(next: Next) -> Choice {
    match next {
        Next::Choose(choice) => choice,
        other => panic!("{other:?}"),
    }
}

#[test]
fn honest_adapters_are_stacked_and_the_factor_is_searched() {
    let world = World::new(1, 5);
    let (next, evaluations) = world.run(0);
    let choice = choice(next);
    assert_eq!(choice.terms.len(), 5);
    // The mean delta is about 0.4 of the way: the factor comes out near 2.5.
    assert!((1.5..=3.5).contains(&choice.lambda), "{}", choice.lambda);
    assert!(choice.gate_after < 0.5 * choice.gate_before);
    assert!(choice.audit_after < choice.audit_before);
    assert!(
        evaluations <= 1 + 5 + LAMBDAS.len() + 2 + 1,
        "{evaluations}"
    );
    let alone = world.deltas.keys().map(|id| {
        world
            .scores(&[Term {
                submission: *id,
                weight: 1.0,
            }])
            .loss()
            .unwrap()
    });
    assert!(alone.fold(f64::INFINITY, f64::min) > choice.gate_after);
}

#[test]
fn the_stack_beats_the_best_adapter_however_many_there_are() {
    for count in [2, 8, 20] {
        let world = World::new(7, count);
        let choice = choice(world.run(3).0);
        assert!(
            choice.terms.len() * 4 >= count * 3,
            "{} of {count}",
            choice.terms.len()
        );
    }
}

#[test]
fn a_harmful_adapter_that_slipped_through_is_left_out() {
    let mut world = World::new(2, 3);
    let bad = SubmissionId::new();
    world.deltas.insert(bad, [-0.4; DIMENSIONS]);
    let choice = choice(world.run(0).0);
    assert_eq!(choice.terms.len(), 3);
    assert!(choice.terms.iter().all(|term| term.submission != bad));
}

#[test]
fn nothing_is_published_without_improvement() {
    let mut world = World::new(3, 0);
    assert_eq!(world.run(0).0, Next::Nothing(FailReason::NoAccepted));
    world.deltas.insert(SubmissionId::new(), [-0.2; DIMENSIONS]);
    assert_eq!(world.run(0).0, Next::Nothing(FailReason::NoImprovement));
}

#[test]
fn failed_evaluations_are_steps_not_taken() {
    let world = World::new(4, 2);
    let mut facts = world.facts();
    let base = Candidate::base(Sets::of(true, Scope::Base));
    facts.ended.insert(base.key(), Outcome::Failed);
    assert_eq!(next(&facts), Next::Nothing(FailReason::EvaluationFailed));
    facts.ended.insert(base.key(), world.outcome(&base));
    while let Next::Evaluate(wanted) = next(&facts) {
        for request in wanted {
            facts.ended.insert(request.candidate.key(), Outcome::Failed);
        }
    }
    assert_eq!(next(&facts), Next::Nothing(FailReason::NoImprovement));
}

#[test]
fn a_large_delta_is_clipped_to_the_median() {
    let mut world = World::new(5, 3);
    let large = SubmissionId::new();
    world.deltas.insert(large, [0.9; DIMENSIONS]);
    let choice = choice(world.run(0).0);
    let weight = |id| {
        choice
            .terms
            .iter()
            .find(|term| term.submission == id)
            .unwrap()
            .weight
    };
    let others = choice.terms.iter().filter(|term| term.submission != large);
    assert!(others.map(|term| term.weight).fold(0.0, f64::max) > weight(large));
}

#[test]
fn a_single_adapter_needs_no_second_evaluation_at_full_weight() {
    let world = World::new(6, 1);
    let mut facts = world.facts();
    let id = facts.accepted[0].submission;
    for candidate in [
        Candidate::base(Sets::of(true, Scope::Base)),
        Candidate::single(id, Sets::GATE_AND_AUDIT),
    ] {
        facts
            .ended
            .insert(candidate.key(), world.outcome(&candidate));
    }
    let Next::Evaluate(wanted) = next(&facts) else {
        panic!("a line search comes first")
    };
    assert_eq!(wanted.len(), LAMBDAS.len() - 1);
}

#[test]
fn the_second_look_lies_between_neighbours() {
    assert_eq!(neighbours(0.5), [0.25, 0.75]);
    assert_eq!(neighbours(2.0), [1.75, 2.5]);
    assert_eq!(neighbours(4.0), [3.5, 6.0]);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(24))]
    #[test]
    fn the_order_of_evaluations_changes_nothing(seed in 0u64..50, order in 0u64..1000, count in 1usize..7) {
        let world = World::new(seed, count);
        prop_assert_eq!(world.run(order), world.run(order + 1));
    }
}

use cairn_stack::recipe::Aggregation;

use super::super::testing::{World, choice, own_worker};
use super::*;
use crate::ids::SubmissionId;

fn world(seed: u64, honest: usize) -> World {
    let mut world = World::new(seed, honest);
    world.rule = Aggregation::Learned;
    world
}

#[test]
fn learned_factors_are_better_than_the_mean_they_start_from() {
    let world = world(1, 5);
    let run = world.run(0);
    // The base, the learning and the test.
    assert_eq!(run.evaluations, 3);
    let learned = choice(run.next);
    let facts = world.facts();
    let mean = facts.clipped_mean(&facts.by_id(), facts.tau(), 1.0);
    assert!(learned.gate_after < world.loss(&mean));
}

#[test]
fn learning_that_failed_or_raved_leaves_the_mean() {
    let done = |weights: Vec<f64>, loss_after: f64| Learned::Done {
        weights,
        loss_before: 1.0,
        loss_after,
    };
    let bad = [
        Learned::Failed,
        done(vec![1.0, 1.0], 0.5),
        done(vec![1.0, f64::NAN, 1.0], 0.5),
        done(vec![1.0, 11.0, 1.0], 0.5),
        done(vec![1.0, -0.1, 1.0], 0.5),
        done(vec![0.0; 3], 0.5),
        done(vec![0.1, 0.2, 0.3], 1.0),
        done(vec![0.1, 0.2, 0.3], f64::NAN),
    ];
    for answer in bad {
        let mut world = world(2, 3);
        world.learned = Some(answer.clone());
        let facts = world.facts();
        let mean = facts.clipped_mean(&facts.by_id(), facts.tau(), 1.0);
        assert_eq!(choice(world.run(0).next).terms, mean, "{answer:?}");
    }
}

#[test]
fn caps_hold_for_learned_factors_too() {
    let mut world = world(3, 4);
    world.bars.identity_share = 0.4;
    world.bars.newcomer_share = 0.2;
    let ids: Vec<SubmissionId> = world.deltas.keys().copied().collect();
    world.workers.insert(ids[3], (own_worker(ids[3]), true));
    let facts = world.facts();
    let all = facts.by_id();
    let capped = within_caps(&facts, &all, &[4.0, 1.0, 1.0, 4.0]);
    assert!((capped[0] - 4.0).abs() < 1e-12);
    assert!((capped[3] - 2.0).abs() < 1e-12);
    assert_eq!(capped[1..3], [1.0, 1.0]);
    let greedy = within_caps(&facts, &all, &[8.0, 1.0, 1.0, 0.0]);
    assert!((greedy[0] - 4.0).abs() < 1e-12);
}

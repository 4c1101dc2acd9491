use cairn_stack::recipe::Aggregation;

use super::super::testing::{World, choice, dot, weight_of};
use super::*;

#[test]
fn fedex_is_the_clipped_mean_at_once() {
    let mut world = World::new(1, 4);
    world.rule = Aggregation::FedEx;
    let large = world.add([2.0; 6]);
    let run = world.run(0);
    // The base and the test.
    assert_eq!(run.evaluations, 2);
    let choice = choice(run.next);
    assert_eq!((choice.terms.len(), choice.lambda), (5, 1.0));
    let clipped = choice.tau / dot(&world.deltas[&large], &world.deltas[&large]).sqrt();
    assert!((weight_of(&choice.terms, large) - 0.2 * clipped).abs() < 1e-12);
}

#[test]
fn krum_and_the_median_leave_the_odd_ones_out_or_small() {
    for rule in [Aggregation::MultiKrum, Aggregation::GeometricMedian] {
        let mut world = World::new(2, 7);
        world.rule = rule;
        let odd: Vec<_> = (0..3).map(|_| world.add([-3.0; 6])).collect();
        let choice = choice(world.run(0).next);
        for id in &odd {
            let weight = weight_of(&choice.terms, *id);
            assert!(weight < 0.02, "{rule:?} {weight}");
        }
        let sum: f64 = choice.terms.iter().map(|term| term.weight).sum();
        assert!((sum - 1.0).abs() < 1e-9);
        if rule == Aggregation::MultiKrum {
            assert_eq!(choice.terms.len(), 7);
        }
    }
}

#[test]
fn a_missing_product_ends_it() {
    for rule in [Aggregation::MultiKrum, Aggregation::GeometricMedian] {
        let mut world = World::new(2, 3);
        world.rule = rule;
        let mut facts = world.facts();
        let all = facts.by_id();
        assert!(gram(&facts, &all).is_ok());
        let (late, early) = (all[1].submission, all[0].submission);
        facts.products.remove(&(late, early));
        let all = facts.by_id();
        let missing = Next::Nothing(FailReason::EvaluationFailed);
        assert_eq!(gram(&facts, &all).unwrap_err(), missing);
    }
}

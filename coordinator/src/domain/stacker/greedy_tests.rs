use super::super::testing::{World, choice, weight_of};
use super::super::{Facts, Next};
use super::*;

/// Evaluations of a round: one of each submission alone, and those that choose.
fn in_all(world: &World, order: u64) -> usize {
    world.run(order).evaluations + world.deltas.len()
}

#[test]
fn honest_adapters_are_stacked_and_the_factor_is_searched() {
    let world = World::new(1, 5);
    let run = world.run(0);
    let choice = choice(run.next);
    assert_eq!(choice.terms.len(), 5);
    // The mean delta is about 0.4 of the way: the factor comes out near 2.5.
    assert!((1.5..=3.5).contains(&choice.lambda), "{}", choice.lambda);
    assert!(choice.gate_after < 0.5 * choice.gate_before);
    assert!(choice.audit_after < choice.audit_before);
    let alone = world.deltas.keys().map(|id| world.alone(*id));
    assert!(alone.fold(f64::INFINITY, f64::min) > choice.gate_after);
}

#[test]
fn blocks_make_choosing_cheap() {
    // Base, a block each four, three factors (one is the last block's), two, one, and the test.
    for (count, most) in [(5, 9), (8, 9), (20, 12), (100, 32)] {
        let world = World::new(7, count);
        let run = world.run(3);
        assert!(matches!(run.next, Next::Choose(_)));
        assert!(run.evaluations <= most, "{} for {count}", run.evaluations);
        // Of each block and of the aggregate.
        let blocks = count.div_ceil(BLOCK_MAX);
        assert!(run.comparisons <= blocks + 1, "{}", run.comparisons);
    }
    assert!(in_all(&World::new(7, 20), 1) <= 32);
}

#[test]
fn the_stack_beats_the_best_adapter_however_many_there_are() {
    for count in [2, 8, 20] {
        let world = World::new(7, count);
        let choice = choice(world.run(3).next);
        let stacked = choice.terms.len();
        assert!(stacked * 4 >= count * 3, "{stacked} of {count}");
    }
}

#[test]
fn a_harmful_adapter_that_slipped_through_is_left_out() {
    for honest in [3, 7, 15] {
        let mut world = World::new(2, honest);
        let bad = [world.add([-0.4; 6]), world.add([-0.5; 6])];
        let choice = choice(world.run(0).next);
        assert!(choice.terms.len() >= honest - 2);
        assert!(bad.iter().all(|bad| weight_of(&choice.terms, *bad) == 0.0));
    }
}

#[test]
fn one_that_cannot_be_evaluated_is_found_by_halving() {
    let mut world = World::new(8, 8);
    let poison = *world.deltas.keys().next().unwrap();
    world.poison = Some(poison);
    let run = world.run(0);
    let choice = choice(run.next);
    assert_eq!(choice.terms.len(), 7);
    assert_eq!(weight_of(&choice.terms, poison), 0.0);
    // A block of four in halves, and half of it in halves: at most four more than without.
    assert!(run.evaluations <= 14, "{}", run.evaluations);
}

#[test]
fn the_doubtful_are_tried_one_by_one() {
    let world = World::new(9, 4);
    let facts = world.facts();
    let step = |accepted| Step {
        accepted,
        weight: 0.25,
    };
    assert!(facts.accepted.iter().all(|one| step(one).is_sure()));
    let mut doubtful = facts.accepted[0].clone();
    doubtful.gain_se = doubtful.gain / SURE_Z;
    assert!(!step(&doubtful).is_sure());
}

#[test]
fn a_large_delta_is_clipped_to_the_median() {
    let mut world = World::new(5, 3);
    let large = world.add([0.9; 6]);
    let choice = choice(world.run(0).next);
    let others = choice.terms.iter().filter(|term| term.submission != large);
    let most = others.map(|term| term.weight).fold(0.0, f64::max);
    assert!(most > weight_of(&choice.terms, large));
}

#[test]
fn the_best_one_takes_the_place_of_a_worse_stack_only_where_it_may() {
    let mut world = World::new(6, 0);
    world.target = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0];
    let best = world.add([1.0, 1.0, 0.0, 0.0, 0.0, 0.0]);
    world.add([1.0, 0.0, 1.0, 0.0, 0.0, 0.0]);
    world.add([0.0, 1.0, 0.0, 1.0, 0.0, 0.0]);
    let free = choice(world.run(0).next);
    assert_eq!(free.terms.len(), 1);
    assert_eq!(weight_of(&free.terms, best), 1.0);
    world.bars.identity_share = 0.5;
    let capped = choice(world.run(0).next);
    assert!(capped.terms.len() > 1);
}

#[test]
fn looks_lie_between_neighbours_and_at_the_bottom() {
    assert_eq!(neighbours(1.0), [0.5, 1.5]);
    assert_eq!(neighbours(2.0), [1.5, 3.0]);
    assert_eq!(neighbours(4.0), [3.0, 6.0]);
    let points = |lambdas: &[f64]| -> Vec<Point> {
        let loss = |lambda: f64| (lambda - 2.4) * (lambda - 2.4) + 1.0;
        let point = |lambda: &f64| Point {
            lambda: *lambda,
            loss: loss(*lambda),
        };
        lambdas.iter().map(point).collect()
    };
    let found = bottom(points(&[0.0, 1.0, 2.0, 4.0, 1.5, 3.0])).unwrap();
    assert!((found - 2.4).abs() < 1e-12);
    assert_eq!(bottom(points(&[0.0, 1.0, 2.45, 4.0])), None);
    assert_eq!(bottom(points(&[1.0, 2.0])), None);
    assert_eq!(bottom(Vec::new()), None);
}

#[test]
fn a_single_adapter_is_searched_from_what_is_known() {
    let world = World::new(6, 1);
    let run = world.run(0);
    // Base, itself once more on the gate set, two factors, two, one, and the test.
    assert!(run.evaluations <= 8, "{}", run.evaluations);
    let facts: Facts = world.facts();
    assert_eq!(
        choice(run.next).terms[0].submission,
        facts.accepted[0].submission
    );
}

use cairn_stack::recipe::Aggregation;

use super::super::testing::{World, choice, weight_of};
use super::super::{Next, base_candidate};
use super::*;

#[test]
fn a_step_that_is_too_long_is_taken_by_half() {
    // At full length it lands as far behind the target as the base is before it; half is the target.
    let mut world = World::new(1, 0);
    world.rule = Aggregation::FedEx;
    let id = world.add([2.2; 6]);
    let run = world.run(0);
    assert_eq!(run.evaluations, 3);
    let choice = choice(run.next);
    assert_eq!(choice.lambda, 0.5);
    assert_eq!(weight_of(&choice.terms, id), 0.5);
}

#[test]
fn a_guard_that_falls_stops_the_aggregate() {
    let mut world = World::new(2, 3);
    world.rule = Aggregation::FedEx;
    world.bars.guards = vec!["safe".to_owned()];
    // The guard is best where the base is: any step away from it is a loss.
    world.guards.insert("safe".to_owned(), [-1.0; 6]);
    let run = world.run(0);
    assert_eq!(run.next, Next::Nothing(FailReason::GuardFell));
    // Both steps were tried.
    assert_eq!(run.evaluations, 3);
    world.guards.insert("safe".to_owned(), [1.0; 6]);
    assert!(matches!(world.run(0).next, Next::Choose(_)));
    world.guards.clear();
    let unmeasured = Next::Nothing(FailReason::EvaluationFailed);
    assert_eq!(world.run(0).next, unmeasured);
}

#[test]
fn half_a_step_may_save_a_guard() {
    let mut world = World::new(3, 0);
    world.rule = Aggregation::FedEx;
    world.add([1.0; 6]);
    world.bars.guards = vec!["safe".to_owned()];
    // Half way it is as good as at the base.
    world.guards.insert("safe".to_owned(), [0.3; 6]);
    let choice = choice(world.run(0).next);
    assert_eq!(choice.lambda, SMALLER_STEP);
}

#[test]
fn momentum_is_left_off_the_smaller_step_and_starts_anew() {
    let mut world = World::new(4, 0);
    world.rule = Aggregation::FedEx;
    let own = world.add([1.0; 6]);
    world.bars.momentum = 0.9;
    // Without an earlier round: 1.9 times the step is too far, half of it is fine.
    let half = choice(world.run(0).next);
    assert_eq!(half.lambda, 1.0);
    world.target = [0.5; 6];
    let half = choice(world.run(0).next);
    assert_eq!((half.lambda, weight_of(&half.terms, own)), (0.5, 0.5));
    assert!(half.velocity.is_empty());
    assert_eq!(half.velocity(), half.terms);
    assert_ne!(base_candidate(true).key(), base_candidate(false).key());
}

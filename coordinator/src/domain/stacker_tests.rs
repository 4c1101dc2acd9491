use cairn_stack::recipe::Aggregation;
use proptest::prelude::*;

use super::testing::{World, choice, own_worker};
use super::*;

#[test]
fn nothing_is_published_without_improvement() {
    for rule in Aggregation::ALL {
        let mut world = World::new(3, 0);
        world.rule = rule;
        assert_eq!(world.run(0).next, Next::Nothing(FailReason::NoAccepted));
        world.add([-0.2; 6]);
        let end = world.run(0).next;
        assert_eq!(end, Next::Nothing(FailReason::NoImprovement), "{rule:?}");
    }
}

#[test]
fn a_base_that_cannot_be_evaluated_ends_it_and_failed_candidates_are_steps_not_taken() {
    for rule in Aggregation::ALL {
        let mut world = World::new(4, 2);
        world.rule = rule;
        let mut facts = world.facts();
        facts.ended.insert(world.base().key(), Outcome::Failed);
        assert_eq!(next(&facts), Next::Nothing(FailReason::EvaluationFailed));
        let outcome = world.outcome(&world.base(), &mut BTreeMap::new());
        facts.ended.insert(world.base().key(), outcome);
        let end = loop {
            match next(&facts) {
                Next::Evaluate(wanted) => {
                    for request in wanted {
                        facts.ended.insert(request.candidate.key(), Outcome::Failed);
                    }
                }
                Next::Learn { job, .. } => {
                    facts.learned.insert(job.key(), Learned::Failed);
                }
                end => break end,
            }
        };
        let expected = Next::Nothing(FailReason::EvaluationFailed);
        assert_eq!(end, expected, "{rule:?}");
    }
}

#[test]
fn no_identity_owns_a_round_that_others_are_in() {
    for rule in [Aggregation::Stack, Aggregation::FedEx] {
        let mut world = World::new(11, 6);
        world.rule = rule;
        world.bars.identity_share = 0.4;
        world.bars.newcomer_share = 0.3;
        let ids: Vec<SubmissionId> = world.deltas.keys().copied().collect();
        // Three shards by one identity, one by a newcomer, two by others.
        for id in &ids[..3] {
            world.workers.insert(*id, (own_worker(ids[0]), false));
        }
        world.workers.insert(ids[3], (own_worker(ids[3]), true));
        let facts = world.facts();
        let all = facts.by_id();
        let shares = facts.shares(&all);
        let of = |wanted: &[SubmissionId]| -> f64 {
            let pairs = all.iter().zip(&shares);
            let chosen = pairs.filter(|(one, _)| wanted.contains(&one.submission));
            chosen.map(|(_, share)| share).sum()
        };
        assert!((of(&ids[..3]) - 0.4).abs() < 1e-12);
        assert!(of(&ids[3..4]) <= 0.3);
        let choice = choice(world.run(1).next);
        assert!(choice.gate_after < choice.gate_before, "{rule:?}");
    }
}

#[test]
fn momentum_adds_weight_to_earlier_rounds_submissions() {
    for rule in Aggregation::ALL {
        let mut world = World::new(12, 4);
        world.rule = rule;
        world.bars.momentum = 0.5;
        let facts = world.facts();
        let earlier = SubmissionId::new();
        world.deltas.insert(earlier, [0.1; 6]);
        world.velocity = vec![Term {
            submission: earlier,
            weight: 0.4,
        }];
        // The earlier one is no candidate of this round.
        let mut world_facts = world.facts();
        world_facts.accepted = facts.accepted;
        let proposal = mean::fedex(&world_facts);
        let update = world_facts.with_momentum(&proposal.terms);
        let extra = update.iter().find(|term| term.submission == earlier);
        assert!((extra.unwrap().weight - 0.1).abs() < 1e-12);
        let own: f64 = proposal.terms.iter().map(|term| term.weight).sum();
        let all: f64 = update.iter().map(|term| term.weight).sum();
        assert!((all - 1.5 * own - 0.1).abs() < 1e-12);
    }
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]
    #[test]
    fn the_order_of_evaluations_changes_nothing(
        seed in 0_u64..50,
        order in 0_u64..1000,
        count in 1_usize..12,
        rule in 0_usize..5,
        momentum in prop::sample::select(vec![0.0, 0.5]),
    ) {
        let mut world = World::new(seed, count);
        world.rule = Aggregation::ALL[rule];
        world.bars.momentum = momentum;
        world.bars.identity_share = 0.5;
        let (one, two) = (world.run(order), world.run(order + 1));
        prop_assert_eq!(one.next, two.next);
        prop_assert_eq!(one.evaluations, two.evaluations);
    }

    #[test]
    fn what_is_chosen_is_better_than_the_base(seed in 0_u64..500, bad in 0_usize..3, rule in 0_usize..5) {
        let mut world = World::new(seed, 4);
        world.rule = Aggregation::ALL[rule];
        for _ in 0..bad {
            world.add([-0.4; 6]);
        }
        if let Next::Choose(choice) = world.run(seed).next {
            prop_assert!(world.loss(&choice.terms) < world.loss(&[]));
            prop_assert_eq!(choice.gate_after, world.loss(&choice.terms));
        }
    }
}

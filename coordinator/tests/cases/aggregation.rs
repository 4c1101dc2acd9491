//! Aggregation: every rule end to end, what a round carries on from the one before, and what is
//! watched beside the gate.
use std::path::Path;
use std::time::Duration;

use cairn_coordinator::db::datasets::SetKind;
use cairn_coordinator::db::rounds::round_get;
use cairn_coordinator::domain::round::Phase;
use cairn_coordinator::domain::stacker::Choice;
use cairn_coordinator::ids::{RequestId, RoundId};
use cairn_coordinator::ops::claim_work::{Assignment, Task};
use cairn_coordinator::ops::create_round::create_round;
use cairn_coordinator::ops::submit_adapter::submit_adapter;
use cairn_coordinator::ops::submit_findings::{NewFindings, submit_findings};
use cairn_proto::reason::VerdictReason;
use cairn_stack::adapter::{AdapterFile, CONFIG_FILE, Pair, WEIGHTS_FILE, write_adapter};
use cairn_stack::carry::{difference, write_config_with_carry};
use cairn_stack::recipe::RoundFile;

use super::verdicts;
use crate::world::{Adapter, Quality, Training, World, new_adapter, pairs, round_text};

const QUALITIES: [Quality; 4] = [[0.5, 0.3], [0.3, 0.5], [0.4, 0.4], [0.5, 0.5]];

/// A round of so many shards with further lines in its policy.
async fn round(world: &World, shards: u32, policy: &str) -> RoundId {
    let text = round_text(shards) + policy;
    let made = create_round(world.app(), &world.maintainer, &text, RequestId::new()).await;
    made.unwrap().id
}

/// Evaluates, learns and decides until there is nothing left to do.
async fn judge(world: &World) {
    loop {
        world.settle().await;
        let Some(work) = world.claim(&world.evaluator).await else {
            return;
        };
        let Task::Learn { evaluate, .. } = &work.task else {
            world.evaluate(&work).await;
            continue;
        };
        let found = NewFindings::Learn {
            // A mean is too timid here: twice as much is better.
            weights: evaluate.adapters.iter().map(|a| 2.0 * a.weight).collect(),
            loss_before: 1.0,
            loss_after: 0.5,
        };
        let (app, lease) = (world.app(), &work.lease);
        let (id, generation) = (lease.id, lease.generation);
        submit_findings(app, &world.evaluator, id, generation, found, |_| Ok(()))
            .await
            .unwrap();
    }
}

async fn contribute_all(world: &mut World, seed: u64) {
    for (place, quality) in (0..).zip(QUALITIES) {
        world.contribute(seed + place, quality).await;
        // Submissions, and rounds, are told apart by their time.
        world.clock.advance(Duration::from_millis(1));
    }
}

async fn choice(world: &World, round: RoundId) -> Choice {
    let mut tx = world.app().db.read().await.unwrap();
    match round_get(&mut tx, round).await.unwrap().unwrap().phase {
        Phase::Published { choice, .. } => choice,
        other => panic!("{other:?}"),
    }
}

pub async fn every_rule_publishes_what_improves_the_model(mut world: World) {
    for (seed, rule, lambda) in [(10, "fedex", 1.0), (20, "learned", 1.0)] {
        let id = round(&world, 4, &format!("aggregation = \"{rule}\"\n")).await;
        contribute_all(&mut world, seed).await;
        judge(&world).await;
        assert_eq!(world.outcome(id).await.0, "published", "{rule}");
        let choice = choice(&world, id).await;
        assert!(choice.gate_after < choice.gate_before, "{rule}");
        assert_eq!(choice.lambda, lambda, "{rule}");
        assert_eq!(choice.terms.len(), 4, "{rule}");
        let sum: f64 = choice.terms.iter().map(|term| term.weight).sum();
        let most = if rule == "learned" { 2.0 } else { 1.0 };
        // Clipping takes a little away.
        assert!(sum <= most + 1e-9 && sum > 0.8 * most, "{rule} {sum}");
    }
}

pub async fn momentum_reaches_back_to_what_was_stacked_before(mut world: World) {
    let policy = "momentum = 0.5\n";
    let one = round(&world, 4, policy).await;
    contribute_all(&mut world, 10).await;
    judge(&world).await;
    let first = choice(&world, one).await;
    let two = round(&world, 4, policy).await;
    contribute_all(&mut world, 20).await;
    judge(&world).await;
    let second = choice(&world, two).await;
    for term in first.velocity() {
        let found = second
            .terms
            .iter()
            .find(|t| t.submission == term.submission);
        // mu^2 of what it was.
        let weight = found.map_or(0.0, |found| found.weight);
        assert!((weight - 0.25 * term.weight).abs() < 1e-12, "{weight}");
    }
    assert!(second.gate_after < second.gate_before);
}

async fn carry_of(world: &World, id: RoundId) -> Option<cairn_coordinator::carry::Carry> {
    let mut tx = world.app().db.read().await.unwrap();
    round_get(&mut tx, id).await.unwrap().unwrap().carry
}

/// Reads the factors that a unit of work starts from, as a worker does.
async fn carried(world: &World, work: &Assignment) -> Vec<Pair> {
    let Task::Train(train) = &work.task else {
        panic!("not training work")
    };
    let carry = train.carry.as_ref().unwrap();
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path().join(WEIGHTS_FILE);
    let digest = carry.weights.digest;
    world.app().blobs.materialise(digest, &path).await.unwrap();
    let file = AdapterFile::open_parts(&path, carry.config.as_bytes()).unwrap();
    file.pairs().unwrap()
}

/// What a worker hands in that trained from `carried` to the factors of a seed.
fn from_carried(carried: &[Pair], seed: u64) -> Adapter {
    let recipe = RoundFile::parse_toml(&round_text(1)).unwrap().recipe;
    let folder = tempfile::tempdir().unwrap();
    let pairs = difference(&recipe, &pairs(seed, 0.1), carried).unwrap();
    let config = write_config_with_carry(&recipe, None, None);
    write_adapter(folder.path(), &pairs, &config).unwrap();
    let read = |file: &str| std::fs::read(Path::join(folder.path(), file)).unwrap();
    Adapter {
        weights: read(WEIGHTS_FILE),
        config: read(CONFIG_FILE),
    }
}

fn recipe_seed(work: &Assignment) -> String {
    let Task::Train(train) = &work.task else {
        panic!("not training work")
    };
    train.recipe.clone()
}

pub async fn a_fedex_round_goes_on_from_the_mean_factors(mut world: World) {
    let policy = "aggregation = \"fedex\"\n";
    let first = round(&world, 4, policy).await;
    assert_eq!(carry_of(&world, first).await, None);
    contribute_all(&mut world, 10).await;
    judge(&world).await;
    let weights = choice(&world, first).await.terms;
    let total: f64 = weights.iter().map(|term| term.weight).sum();

    let second = round(&world, 4, policy).await;
    let mut handed = Vec::new();
    let mut seeds = std::collections::BTreeSet::new();
    for (seed, quality) in (20..).zip(QUALITIES) {
        let caller = world.volunteer().await;
        let work = world.claim(&caller).await.unwrap();
        seeds.insert(recipe_seed(&work));
        let carried = carried(&world, &work).await;
        if handed.is_empty() {
            // The mean of what was folded, by its weights.
            let mut mean = vec![0.0_f64; carried[0].a.len()];
            let view = world.view(first).await;
            for (place, submission) in (10_u64..).zip(&view.submissions) {
                let weight = submission.weight / total;
                for (sum, value) in mean.iter_mut().zip(&pairs(place, 0.1)[0].a) {
                    *sum += weight * f64::from(*value);
                }
            }
            let near = |(x, y): (&f32, &f64)| (f64::from(*x) - y).abs() < 1e-6;
            let trained = pairs(10, 0.1);
            assert_eq!(carried[0].module, trained[0].module);
            assert!(carried[0].a.iter().zip(&mean).all(near));
        }
        let adapter = from_carried(&carried, seed);
        world.register(&adapter, quality);
        world.submit(&caller, &work, &adapter).await.unwrap();
        handed.push((seed, carried));
    }
    // One seed for all, so that factors that are averaged began at the same place.
    assert_eq!(seeds.len(), 1);
    judge(&world).await;
    assert_eq!(verdicts(&world, second).await, [None; 4]);
    assert_eq!(world.outcome(second).await.0, "published");

    // The third carries the mean of the trained halves, not of the differences.
    let third = round(&world, 4, policy).await;
    let next = carry_of(&world, third).await.unwrap();
    assert_ne!(Some(next), carry_of(&world, second).await);
    // Plain factors are not what this round takes.
    let caller = world.volunteer().await;
    let work = world.claim(&caller).await.unwrap();
    let plain = world.adapter(50, [0.5, 0.5]);
    world.submit(&caller, &work, &plain).await.unwrap();
    judge(&world).await;
    assert_eq!(
        verdicts(&world, third).await[0],
        Some(VerdictReason::WrongShape)
    );
    // Neither is another training's last state, nor another carry behind the trained factors.
    let caller = world.volunteer().await;
    let work = world.claim(&caller).await.unwrap();
    let carried = carried(&world, &work).await;
    let altered = {
        let mut pairs = carried.clone();
        pairs[0].a[0] += 1.0;
        from_carried(&pairs, 60)
    };
    let sound = from_carried(&carried, 61);
    for (adapter, log, reason) in [
        (&altered, &altered, VerdictReason::ConfigMismatch),
        (&sound, &altered, VerdictReason::BadCommitment),
    ] {
        let caller = world.volunteer().await;
        let work = world.claim(&caller).await.unwrap();
        world.upload(&caller, &work, adapter).await;
        let mut new = new_adapter(&work, adapter);
        new.commitment = Some(Training::of(log).commitment());
        submit_adapter(world.app(), &caller, new, |_| Ok(()))
            .await
            .unwrap();
        judge(&world).await;
        let found = verdicts(&world, third).await;
        assert!(found.contains(&Some(reason)), "{found:?}");
    }
}

pub async fn earlier_gate_sets_are_scored_and_shown(mut world: World) {
    let one = round(&world, 4, "").await;
    contribute_all(&mut world, 10).await;
    judge(&world).await;
    assert!(world.view(one).await.sets.is_empty());
    world.add_dataset("gate2", SetKind::Gate, 40).await;
    let text = round_text(4).replace("gate = \"gate\"", "gate = \"gate2\"");
    let two = create_round(world.app(), &world.maintainer, &text, RequestId::new());
    let two = two.await.unwrap().id;
    contribute_all(&mut world, 20).await;
    judge(&world).await;
    let sets = world.view(two).await.sets;
    assert_eq!(sets.len(), 1, "{sets:?}");
    assert_eq!(sets[0].set, "history/gate");
    assert!(sets[0].after.unwrap() < sets[0].before);
}

pub async fn a_round_that_nobody_evaluates_fails_in_the_end(mut world: World) {
    let id = round(&world, 1, "").await;
    world.contribute(1, [0.5, 0.5]).await;
    world.advance(61);
    world.settle().await;
    assert_eq!(world.outcome(id).await.0, "judging");
    world.advance(58);
    world.settle().await;
    // An answer begins the wait anew.
    assert!(world.evaluate_one().await);
    world.advance(59);
    world.settle().await;
    assert_eq!(world.outcome(id).await.0, "judging");
    world.advance(2);
    world.settle().await;
    let failed = ("failed", "JUDGING_OVERDUE".to_owned());
    assert_eq!(world.outcome(id).await, failed);
}

//! Rounds: who gets which work, what is acknowledged, what is accepted, what is published.
mod aggregation;
mod audits;
mod backup;
mod findings;
mod fsck;
mod log;
mod restoring;
mod undo;

use std::collections::BTreeSet;
use std::time::Duration;

use crate::world::{Adapter, World, adapter_of, new_adapter, pairs};
use cairn_coordinator::db::models::{Folder, checkpoint_files, model_get};
use cairn_coordinator::domain::lease::Work;
use cairn_coordinator::domain::shard::State as ShardState;
use cairn_coordinator::domain::submission::Progress;
use cairn_coordinator::error::Error;
use cairn_coordinator::ids::{RequestId, RoundId};
use cairn_coordinator::ops::abort_round::abort_round;
use cairn_coordinator::ops::claim_work::{Assignment, Task, TrainTask, claim_work};
use cairn_coordinator::ops::read_standing::{get_standing, list_submissions};
use cairn_coordinator::ops::release_lease::release_lease;
use cairn_coordinator::ops::renew_lease::renew_lease;
use cairn_coordinator::ops::submit_adapter::submit_adapter;
use cairn_coordinator::ops::watch_round::watch_round;
use cairn_proto::reason::{ErrorReason, VerdictReason};
use cairn_proto::signing::{ReceiptStatement, SignatureError};
use cairn_proto::v1;
use cairn_stack::lineage::verify_folder;
use futures::StreamExt;

pub use aggregation::{
    a_fedex_round_goes_on_from_the_mean_factors, a_round_that_nobody_evaluates_fails_in_the_end,
    earlier_gate_sets_are_scored_and_shown, every_rule_publishes_what_improves_the_model,
    momentum_reaches_back_to_what_was_stacked_before,
};
pub use audits::{
    a_late_answer_is_none_unless_the_coordinator_was_away,
    a_rejection_that_nobody_honest_earns_is_a_strike, a_replay_ends_the_audit,
    a_round_that_replays_nothing_asks_for_no_commitment, audits_are_drawn_as_often_as_said,
    new_workers_are_audited_and_trust_grows_and_falls, only_the_drawn_states_open_an_audit,
    what_is_committed_to_is_this_training,
};
pub use backup::{
    a_database_newer_than_the_blobs_names_what_is_missing,
    a_database_older_than_the_blobs_takes_back_what_came_after,
};
pub use findings::{
    findings_are_exactly_what_was_asked_for, guards_and_probes_are_held_out_sets_that_exist,
    the_base_is_scored_on_all_that_anything_is_compared_with,
};
pub use fsck::{
    a_finished_round_is_clean, garbage_is_removed_when_it_is_old,
    rows_and_logs_that_contradict_themselves_are_named,
    what_can_be_computed_is_and_the_rest_says_who_has_it,
};
pub use log::{
    a_verdict_has_a_signed_receipt_in_the_log, the_log_holds_every_receipt_and_checkpoint,
};
pub use restoring::{
    a_lost_submission_comes_back_and_is_judged_anew, only_our_own_receipts_bring_something_back,
    what_comes_back_too_late_keeps_its_credit,
};
pub use undo::{
    a_refold_is_what_a_coordinator_without_it_publishes,
    a_revoked_contribution_is_folded_out_of_every_checkpoint,
    a_revoked_submission_has_a_new_receipt_in_the_log,
    a_round_on_a_revoked_base_ends_and_one_beside_it_goes_on, a_strike_is_voided_by_a_maintainer,
    checkpoints_of_older_programs_are_found_by_contribution,
    momentum_adds_to_the_weights_of_earlier_rounds, revoking_is_for_maintainers_and_counts_once,
    undo_survives_a_kill_at_any_step, what_was_chosen_is_chosen_again_without_a_revoked_one,
};

fn reason<T: std::fmt::Debug>(result: Result<T, Error>) -> ErrorReason {
    result.unwrap_err().reason()
}

fn shard_of(work: &Assignment) -> u32 {
    match work.lease.work {
        Work::Train(shard) => shard,
        Work::Evaluate(_) => panic!("not training work"),
    }
}

async fn verdicts(world: &World, round: RoundId) -> Vec<Option<VerdictReason>> {
    let reason = |progress: &Progress| match progress {
        Progress::Rejected { reason, .. } => Some(*reason),
        _ => None,
    };
    world
        .view(round)
        .await
        .submissions
        .iter()
        .map(|s| reason(&s.progress))
        .collect()
}

pub async fn a_shard_is_never_handed_out_twice(mut world: World) {
    let round = world.round(8).await;
    let mut claims = Vec::new();
    for _ in 0..12 {
        let (app, caller) = (world.app().clone(), world.volunteer().await);
        claims.push(tokio::spawn(async move {
            claim_work(&app, &caller, Duration::ZERO).await.unwrap()
        }));
    }
    let mut shards = BTreeSet::new();
    let mut empty = 0;
    for claim in claims {
        match claim.await.unwrap() {
            None => empty += 1,
            Some(work) => {
                assert_eq!(work.lease.generation.0, 1);
                assert!(shards.insert(shard_of(&work)), "handed out twice");
            }
        }
    }
    assert_eq!((shards.len(), empty), (8, 4));
    let leased = world.view(round.id).await.shards;
    assert!(
        leased
            .iter()
            .all(|shard| shard.row.shard.state == ShardState::Leased)
    );
}

pub async fn shards_hold_every_record_and_have_their_own_seeds(mut world: World) {
    world.round(3).await;
    let (mut records, mut recipes) = (0, BTreeSet::new());
    for _ in 0..3 {
        let caller = world.volunteer().await;
        let work = world.claim(&caller).await.unwrap();
        let Task::Train(TrainTask {
            records: ranges,
            recipe,
            adapter_bytes_max,
            ..
        }) = work.task
        else {
            panic!("not training work")
        };
        records += ranges.iter().map(|range| range.count).sum::<u32>();
        recipes.insert(recipe);
        assert!(adapter_bytes_max >= world.adapter(1, [0.0; 2]).weights.len() as u64);
        assert!(
            work.base_files
                .iter()
                .any(|file| file.path == "config.json")
        );
    }
    assert_eq!((records, recipes.len()), (40, 3));
}

pub async fn a_restarted_worker_gets_its_work_again(mut world: World) {
    world.round(2).await;
    let ann = world.volunteer().await;
    let first = world.claim(&ann).await.unwrap();
    world.advance(5);
    let again = world.claim(&ann).await.unwrap();
    assert_eq!(
        (again.lease.id, &again.lease.nonce),
        (first.lease.id, &first.lease.nonce)
    );
    assert!(again.lease.expires > first.lease.expires);
}

pub async fn a_lease_that_ran_out_is_fenced_once_another_has_the_work(mut world: World) {
    let round = world.round(1).await;
    let (ann, bob) = (world.volunteer().await, world.volunteer().await);
    let late = world.claim(&ann).await.unwrap();
    assert!(world.claim(&bob).await.is_none());
    world.advance(11);
    world.settle().await;
    let work = world.claim(&bob).await.unwrap();
    assert_eq!(
        (shard_of(&work), work.lease.generation.0),
        (shard_of(&late), 2)
    );

    // Finished work is taken, and the shard is Bob's all the same; going on is of no use.
    let adapter = world.adapter(1, [0.5, 0.5]);
    world.submit(&ann, &late, &adapter).await.unwrap();
    let shard = world.view(round.id).await.shards[0].row.shard;
    assert_eq!((shard.state, shard.generation.0), (ShardState::Leased, 2));
    let lease = &late.lease;
    let renewed = renew_lease(world.app(), &ann, lease.id, lease.generation, (1, 2)).await;
    assert_eq!(reason(renewed), ErrorReason::LeaseLost);
    // Another's lease is nobody's business.
    let stolen = new_adapter(&work, &adapter);
    let stolen = submit_adapter(world.app(), &ann, stolen, |_| Ok(())).await;
    assert_eq!(reason(stolen), ErrorReason::NotFound);

    world.submit(&bob, &work, &adapter).await.unwrap();
    assert_eq!(
        world.view(round.id).await.shards[0].row.shard.state,
        ShardState::Submitted
    );
    // The shard did not kill Ann.
    assert_eq!(world.view(round.id).await.shards[0].failures, 0);
}

pub async fn late_work_counts_while_nobody_else_has_it(mut world: World) {
    let round = world.round(2).await;
    let (ann, bob) = (world.volunteer().await, world.volunteer().await);
    let (one, two) = (
        world.claim(&ann).await.unwrap(),
        world.claim(&bob).await.unwrap(),
    );
    world.advance(11);
    world.settle().await;
    let open = world.view(round.id).await.shards;
    assert!(
        open.iter()
            .all(|shard| shard.row.shard.state == ShardState::Open)
    );

    let adapter = world.adapter(1, [0.5, 0.5]);
    world.submit(&ann, &one, &adapter).await.unwrap();
    let lease = &two.lease;
    let expires = renew_lease(world.app(), &bob, lease.id, lease.generation, (3, 9))
        .await
        .unwrap();
    assert!(expires > world.now());
    let shard = &world.view(round.id).await.shards[shard_of(&two) as usize];
    let lease = shard.lease.as_ref().unwrap();
    assert_eq!(
        (shard.row.shard.state, shard.failures),
        (ShardState::Leased, 0)
    );
    assert_eq!((lease.active, lease.step, lease.steps), (true, 3, 9));
}

pub async fn a_lost_answer_can_be_asked_for_again_and_credits_once(mut world: World) {
    let round = world.round(1).await;
    let ann = world.volunteer().await;
    let work = world.claim(&ann).await.unwrap();
    let adapter = world.adapter(1, [0.5, 0.5]);
    world.upload(&ann, &work, &adapter).await;
    let new = new_adapter(&work, &adapter);
    let app = world.app();
    let wrong = |_: &[u8]| Err(SignatureError::Signature);
    let refused = submit_adapter(app, &ann, new.clone(), wrong).await;
    assert_eq!(reason(refused), ErrorReason::BadSignature);

    let first = submit_adapter(app, &ann, new.clone(), |_| Ok(()))
        .await
        .unwrap();
    let again = submit_adapter(app, &ann, new.clone(), |_| Ok(()))
        .await
        .unwrap();
    assert_eq!(first, again);
    let mut other_id = new.clone();
    other_id.request = RequestId::new();
    assert_eq!(
        submit_adapter(app, &ann, other_id, |_| Ok(()))
            .await
            .unwrap(),
        first
    );
    let receipt = v1::Receipt {
        statement: first.statement.clone(),
        signature: first.signature.clone(),
    };
    let server = app.key.verifying_key().to_bytes();
    let statement = ReceiptStatement::verify(&receipt, &server).unwrap();
    assert_eq!(statement.adapter, adapter.name().digest);
    assert_eq!(statement.lease, work.lease.id.to_string());

    let other = adapter_of(&pairs(9, 0.1));
    let mut changed = new;
    changed.adapter = other.name();
    let changed = submit_adapter(app, &ann, changed, |_| Ok(())).await;
    assert_eq!(reason(changed), ErrorReason::LeaseLost);
    assert_eq!(world.view(round.id).await.submissions.len(), 1);
    world.open(&ann, &work, &adapter, &first).await.unwrap();
    world.judge().await;
    let standing = get_standing(world.app(), &ann).await.unwrap().counts;
    assert_eq!((standing.accepted, standing.credit_tokens), (1, 100));
}

pub async fn what_was_not_uploaded_or_is_too_large_is_not_taken(mut world: World) {
    world.round(1).await;
    let ann = world.volunteer().await;
    let work = world.claim(&ann).await.unwrap();
    let adapter = world.adapter(1, [0.5, 0.5]);
    let absent = new_adapter(&work, &adapter);
    let absent = submit_adapter(world.app(), &ann, absent, |_| Ok(())).await;
    assert_eq!(reason(absent), ErrorReason::BlobMissing);
    // A blob that a maintainer put is held, but is no adapter of this size.
    let large = Adapter {
        weights: vec![1; 1_000_000],
        config: adapter.config,
    };
    world.fixture.put(&world.maintainer, &large.weights).await;
    let large = new_adapter(&work, &large);
    let large = submit_adapter(world.app(), &ann, large, |_| Ok(())).await;
    assert_eq!(reason(large), ErrorReason::BlobTooLarge);
}

pub async fn three_workers_failing_stop_the_shard_and_not_the_round(mut world: World) {
    let round = world.round(2).await;
    let healthy = world.volunteer().await;
    let held = world.claim(&healthy).await.unwrap();
    let poison = 1 - shard_of(&held);
    for crash in [false, true, false] {
        let caller = world.volunteer().await;
        let work = world.claim(&caller).await.unwrap();
        assert_eq!(shard_of(&work), poison);
        let lease = &work.lease;
        if crash {
            world.advance(9);
            let held = &held.lease;
            renew_lease(world.app(), &healthy, held.id, held.generation, (1, 9))
                .await
                .unwrap();
            world.advance(2);
            world.settle().await;
        } else {
            release_lease(
                world.app(),
                &caller,
                lease.id,
                lease.generation,
                true,
                "NaN",
            )
            .await
            .unwrap();
            assert!(
                world.claim(&caller).await.is_none(),
                "given the same shard again"
            );
        }
    }
    let shard = &world.view(round.id).await.shards[poison as usize];
    assert_eq!(
        (shard.row.shard.state, shard.failures),
        (ShardState::Stopped, 3)
    );
    let fresh = world.volunteer().await;
    assert!(world.claim(&fresh).await.is_none());

    let adapter = world.adapter(1, [0.5, 0.5]);
    world.submit(&healthy, &held, &adapter).await.unwrap();
    world.judge().await;
    assert_eq!(world.outcome(round.id).await.0, "published");
}

pub async fn the_deadline_ends_training_and_what_came_in_is_judged(mut world: World) {
    let round = world.round(3).await;
    world.contribute(1, [0.5, 0.5]).await;
    let ann = world.volunteer().await;
    world.advance(55);
    let work = world.claim(&ann).await.unwrap();
    world.advance(6);
    world.judge().await;
    let (state, why) = world.outcome(round.id).await;
    assert_eq!((state, why.as_str()), ("published", ""));
    let adapter = world.adapter(2, [0.5, 0.5]);
    let late = submit_adapter(world.app(), &ann, new_adapter(&work, &adapter), |_| Ok(()));
    assert_eq!(reason(late.await), ErrorReason::RoundEnded);
    assert!(world.claim(&ann).await.is_none());
}

pub async fn a_round_without_submissions_or_gain_publishes_nothing_and_says_why(mut world: World) {
    let round = world.round(1).await;
    world.advance(61);
    world.judge().await;
    assert_eq!(
        world.outcome(round.id).await,
        ("failed", "NO_SUBMISSIONS".to_owned())
    );

    let round = world.round(1).await;
    for seed in 0..3 {
        world.contribute(seed, [-0.5, -0.5]).await;
        world.judge().await;
    }
    assert_eq!(
        world.outcome(round.id).await,
        ("failed", "NO_ACCEPTED".to_owned())
    );
    assert_eq!(
        verdicts(&world, round.id).await,
        [Some(VerdictReason::NoGain); 3]
    );
    let mut tx = world.app().db.read().await.unwrap();
    assert_eq!(
        model_get(&mut tx, "tiny")
            .await
            .unwrap()
            .unwrap()
            .head_revision,
        0
    );
}

pub async fn a_bad_adapter_is_rejected_with_its_reason_and_its_shard_done_again(mut world: World) {
    let round = world.round(6).await;
    let mut broken = pairs(50, 0.1);
    broken[0].b[0] = f32::NAN;
    let mut callers = Vec::new();
    // A very large one before any cohort is left to the gate; the others are told apart by structure.
    let first = world.adapter(1, [0.5, 0.5]);
    for adapter in [first.clone(), first.clone(), adapter_of(&broken)] {
        let caller = world.volunteer().await;
        let work = world.claim(&caller).await.unwrap();
        world.submit(&caller, &work, &adapter).await.unwrap();
        callers.push((caller, shard_of(&work)));
        world.clock.advance(Duration::from_millis(1));
    }
    world.judge().await;
    let expected = [
        None,
        Some(VerdictReason::CopyOfAnother),
        Some(VerdictReason::NotFinite),
    ];
    assert_eq!(verdicts(&world, round.id).await, expected);
    let shards = world.view(round.id).await.shards;
    for (caller, shard) in &callers[1..] {
        assert_eq!(shards[*shard as usize].row.shard.state, ShardState::Open);
        // Its own failure is not offered to it again; another shard is.
        let next = world.claim(caller).await.unwrap();
        assert_ne!(shard_of(&next), *shard);
        let lease = &next.lease;
        release_lease(world.app(), caller, lease.id, lease.generation, false, "")
            .await
            .unwrap();
    }
    let own = list_submissions(world.app(), &callers[2].0, None, 9)
        .await
        .unwrap();
    let Progress::Rejected { detail, .. } = &own[0].submission().unwrap().progress else {
        panic!("not rejected")
    };
    assert!(!detail.is_empty() && !detail.contains('/'), "{detail}");

    // From four norms on, one that is far off is refused without costing an evaluation.
    for seed in 2..5 {
        world.contribute(seed, [0.5, 0.5]).await;
    }
    world.judge().await;
    let caller = world.volunteer().await;
    let work = world.claim(&caller).await.unwrap();
    let huge = adapter_of(&pairs(60, 5.0));
    world.submit(&caller, &work, &huge).await.unwrap();
    let before = world.view(round.id).await.evaluations;
    world.settle().await;
    assert_eq!(world.view(round.id).await.evaluations.ended, before.ended);
    assert!(
        verdicts(&world, round.id)
            .await
            .contains(&Some(VerdictReason::NormOutlier))
    );
}

pub async fn evaluations_are_handed_out_again_and_given_up_in_the_end(mut world: World) {
    let round = world.round(1).await;
    let base = world.claim(&world.evaluator).await.unwrap();
    world.advance(11);
    world.settle().await;
    let again = world.claim(&world.evaluator).await.unwrap();
    assert_ne!(again.lease.id, base.lease.id);
    let lost = world.hand_in(&base, world.answer(&base)).await;
    assert_eq!(reason(lost), ErrorReason::LeaseLost);
    // Wrong shapes are refused, and the lease stays.
    let mut short = world.answer(&again);
    short[0].scores.nll.pop();
    assert_eq!(
        reason(world.hand_in(&again, short).await),
        ErrorReason::InvalidArgument
    );
    let only_gate = world.answer(&again).into_iter().take(1).collect();
    assert_eq!(
        reason(world.hand_in(&again, only_gate).await),
        ErrorReason::InvalidArgument
    );
    world.hand_in(&again, world.answer(&again)).await.unwrap();
    world.hand_in(&again, world.answer(&again)).await.unwrap();
    let before = world.view(round.id).await.round.losses;
    assert!(before.gate_before.is_some() && before.audit_before.is_some());

    // A candidate that nobody can evaluate is rejected; the round goes on.
    world.contribute(1, [0.5, 0.5]).await;
    world.settle().await;
    for _ in 0..5 {
        let work = world.next_score().await;
        let lease = &work.lease;
        release_lease(
            world.app(),
            &world.evaluator,
            lease.id,
            lease.generation,
            true,
            "oom",
        )
        .await
        .unwrap();
        world.settle().await;
    }
    assert!(world.claim(&world.evaluator).await.is_none());
    assert_eq!(
        verdicts(&world, round.id).await,
        [Some(VerdictReason::NoGain)]
    );
    // So is one whose losses are no numbers.
    world.contribute(2, [0.5, 0.5]).await;
    world.settle().await;
    let work = world.next_score().await;
    let mut sets = world.answer(&work);
    sets[0].scores.nll[3] = f32::NAN;
    world.hand_in(&work, sets).await.unwrap();
    world.settle().await;
    assert_eq!(
        verdicts(&world, round.id).await,
        [Some(VerdictReason::NoGain); 2]
    );
    assert_eq!(world.outcome(round.id).await.0, "training");
}

pub async fn a_base_that_cannot_be_evaluated_fails_the_round(mut world: World) {
    let round = world.round(1).await;
    for _ in 0..5 {
        let work = world.claim(&world.evaluator).await.unwrap();
        let lease = &work.lease;
        release_lease(
            world.app(),
            &world.evaluator,
            lease.id,
            lease.generation,
            true,
            "oom",
        )
        .await
        .unwrap();
    }
    world.settle().await;
    assert_eq!(
        world.outcome(round.id).await,
        ("failed", "EVALUATION_FAILED".to_owned())
    );
    let ann = world.volunteer().await;
    assert!(world.claim(&ann).await.is_none());
}

pub async fn one_round_at_a_time_and_one_for_each_request(world: World) {
    let request = RequestId::new();
    let first = world.try_round(2, request).await.unwrap();
    assert_eq!(world.try_round(2, request).await.unwrap().id, first.id);
    assert_eq!(
        reason(world.try_round(3, request).await),
        ErrorReason::RequestIdReused
    );
    let second = world.try_round(2, RequestId::new()).await;
    assert_eq!(reason(second), ErrorReason::PreconditionFailed);
    assert_eq!(
        reason(world.try_round(41, RequestId::new()).await),
        ErrorReason::InvalidArgument
    );
}

pub async fn an_aborted_round_leaves_everything_as_it_was(mut world: World) {
    let round = world.round(2).await;
    world.contribute(1, [0.5, 0.5]).await;
    let ann = world.volunteer().await;
    let work = world.claim(&ann).await.unwrap();
    let evaluation = world.next_score().await;
    let denied = abort_round(world.app(), &ann, round.id, "").await;
    assert_eq!(reason(denied), ErrorReason::RoleRequired);
    let aborted = abort_round(world.app(), &world.maintainer, round.id, "wrong data")
        .await
        .unwrap();
    assert_eq!(aborted.reason, "wrong data");
    abort_round(world.app(), &world.maintainer, round.id, "again")
        .await
        .unwrap();
    world.judge().await;
    assert_eq!(
        world.outcome(round.id).await,
        ("aborted", "wrong data".to_owned())
    );
    assert_eq!(
        verdicts(&world, round.id).await,
        [Some(VerdictReason::RoundEnded)]
    );
    let adapter = world.adapter(2, [0.5, 0.5]);
    let late = submit_adapter(world.app(), &ann, new_adapter(&work, &adapter), |_| Ok(()));
    assert_eq!(reason(late.await), ErrorReason::RoundEnded);
    let late = world.hand_in(&evaluation, world.answer(&evaluation)).await;
    assert_eq!(reason(late), ErrorReason::LeaseLost);
    world.round(2).await;
}

/// Runs a whole round of three honest volunteers and one that harms, with or without a restart of
/// the coordinator between any two steps.
async fn whole_round(mut world: World, restarts: bool) -> (World, RoundId) {
    let round = world.round(4).await.id;
    // Nobody's adapter of an earlier round may come again.
    let seeds = u64::from(world.volunteers()) * 10;
    for (seed, quality) in [
        (1, [0.5, 0.3]),
        (2, [0.3, 0.5]),
        (3, [0.4, 0.4]),
        (4, [-0.6, 0.0]),
    ] {
        world.contribute(seeds + seed, quality).await;
        if restarts {
            world = world.restart().await;
        }
    }
    loop {
        world.settle().await;
        if restarts {
            world = world.restart().await;
        }
        if !world.evaluate_one().await {
            break;
        }
    }
    // The harmful one's shard is done by somebody else.
    world.contribute(seeds + 5, [0.4, 0.5]).await;
    loop {
        world.settle().await;
        if restarts {
            world = world.restart().await;
        }
        if !world.evaluate_one().await {
            return (world, round);
        }
    }
}

pub async fn a_round_ends_in_a_verified_checkpoint_and_the_next_one_builds_on_it(world: World) {
    let (world, round) = whole_round(world, false).await;
    let view = world.view(round).await;
    assert_eq!(
        (
            view.round.phase.state().as_str(),
            view.round.reason.as_str()
        ),
        ("published", "")
    );
    let losses = view.round.losses;
    assert!(
        losses.gate_after.unwrap() < 0.6 * losses.gate_before.unwrap(),
        "{losses:?}"
    );
    assert!(losses.audit_after < losses.audit_before);
    let stacked = view.submissions.iter().filter(|s| s.weight > 0.0).count();
    assert_eq!(stacked, 4);
    let reasons = verdicts(&world, round).await;
    assert_eq!(
        reasons
            .iter()
            .filter(|r| **r == Some(VerdictReason::NoGain))
            .count(),
        1
    );
    verify(&world, 1, 4).await;

    let (world, round) = whole_round(world, false).await;
    assert_eq!(world.outcome(round).await.0, "published");
    verify(&world, 2, 8).await;
}

pub async fn a_coordinator_restarted_at_every_step_comes_to_the_same_end(world: World) {
    let (world, round) = whole_round(world, true).await;
    let view = world.view(round).await;
    assert_eq!(view.round.phase.state().as_str(), "published");
    assert_eq!(view.submissions.len(), 5);
    verify(&world, 1, 4).await;
}

/// Lays a revision out as files and verifies it with its signed manifest.
async fn verify(world: &World, revision: u32, contributions: usize) {
    let app = world.app();
    let mut tx = app.db.read().await.unwrap();
    assert_eq!(
        model_get(&mut tx, "tiny")
            .await
            .unwrap()
            .unwrap()
            .head_revision,
        revision
    );
    let files = checkpoint_files(&mut tx, "tiny", revision, Folder::Checkpoint)
        .await
        .unwrap();
    let stack = checkpoint_files(&mut tx, "tiny", revision, Folder::Stack)
        .await
        .unwrap();
    drop(tx);
    let folder = tempfile::tempdir().unwrap();
    for file in &files {
        let path = folder.path().join(&file.path);
        app.blobs
            .materialise(file.blob.digest, &path)
            .await
            .unwrap();
    }
    let report = verify_folder(folder.path(), Some(&app.key.verifying_key())).unwrap();
    assert!(report.is_intact(), "{report:?}");
    let manifest = report.signed.manifest();
    assert_eq!(manifest.contributions.len(), contributions);
    assert_eq!(manifest.revision, u64::from(revision));
    let stack: Vec<&str> = stack.iter().map(|file| file.path.as_str()).collect();
    assert_eq!(stack, ["adapter_config.json", "adapter_model.safetensors"]);
}

pub async fn watching_shows_changes_and_ends_with_the_round(world: World) {
    let round = world.round(1).await;
    let mut views = Box::pin(watch_round(world.app().clone(), round.id));
    let first = views.next().await.unwrap().unwrap();
    assert_eq!(first.round.phase.state().as_str(), "training");
    abort_round(world.app(), &world.maintainer, round.id, "")
        .await
        .unwrap();
    let last = views.next().await.unwrap().unwrap();
    assert_eq!(last.round.phase.state().as_str(), "aborted");
    assert!(views.next().await.is_none());
    let mut nothing = Box::pin(watch_round(world.app().clone(), RoundId::new()));
    assert_eq!(
        reason(nothing.next().await.unwrap().map(|_| ())),
        ErrorReason::NotFound
    );
}

pub async fn a_waiting_worker_is_woken_by_new_work(mut world: World) {
    let ann = world.volunteer().await;
    let app = world.app().clone();
    let waiting = tokio::spawn(async move {
        claim_work(&app, &ann, Duration::from_secs(20))
            .await
            .unwrap()
    });
    world.round(1).await;
    assert!(waiting.await.unwrap().is_some());
    let denied = claim_work(world.app(), &world.maintainer, Duration::ZERO).await;
    assert_eq!(reason(denied), ErrorReason::RoleRequired);
}

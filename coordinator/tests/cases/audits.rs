//! Audits: who is audited, what opens one, how it ends, and what that does to trust.
use cairn_coordinator::caller::Caller;
use cairn_coordinator::db::audits::audit_get;
use cairn_coordinator::db::strikes::{strike_insert, trust_of};
use cairn_coordinator::domain::audit::{Audit, AuditState};
use cairn_coordinator::domain::lease::Work;
use cairn_coordinator::domain::trust::Trust;
use cairn_coordinator::ids::SubmissionId;
use cairn_coordinator::ops::claim_work::{Assignment, Task};
use cairn_coordinator::ops::read_standing::{get_standing, list_submissions};
use cairn_coordinator::ops::release_lease::release_lease;
use cairn_coordinator::ops::reveal_audit::{Revealed, reveal_audit};
use cairn_coordinator::ops::submit_adapter::submit_adapter;
use cairn_coordinator::ops::void_strike::void_strike;
use cairn_proto::reason::{ErrorReason, VerdictReason};

use super::reason;
use crate::world::{STEPS, Training, World, adapter_of, new_adapter, pairs};

async fn audit(world: &World, id: SubmissionId) -> Option<Audit> {
    let mut tx = world.app().db.read().await.unwrap();
    audit_get(&mut tx, id).await.unwrap()
}

async fn state(world: &World, id: SubmissionId) -> AuditState {
    let audit = audit(world, id).await.unwrap();
    audit.state(world.now())
}

async fn trust(world: &World, caller: &Caller) -> Trust {
    let mut tx = world.app().db.read().await.unwrap();
    trust_of(&mut tx, caller.worker).await.unwrap()
}

pub async fn audits_are_drawn_as_often_as_said(mut world: World) {
    world
        .round_with(40, "audit_first = 0\naudit_share = 0.5")
        .await;
    let ann = world.volunteer().await;
    let mut segments = vec![0; STEPS as usize];
    for seed in 0..40 {
        let work = world.claim(&ann).await.unwrap();
        let adapter = world.adapter(seed, [0.5, 0.5]);
        let answer = world.submit_closed(&ann, &work, &adapter).await.unwrap();
        if let Some(audit) = answer.audit {
            segments[audit.segment as usize] += 1;
        }
    }
    // 20 of 40, give or take four standard deviations; every segment is looked at.
    let drawn: i32 = segments.iter().sum();
    assert!((8..=32).contains(&drawn), "{drawn}");
    assert!(segments.iter().all(|count| *count > 0), "{segments:?}");
}

pub async fn what_is_committed_to_is_this_training(mut world: World) {
    world.round(2).await;
    let ann = world.volunteer().await;
    let work = world.claim(&ann).await.unwrap();
    let (adapter, other) = (world.adapter(1, [0.5, 0.5]), world.adapter(2, [0.5, 0.5]));
    world.upload(&ann, &work, &adapter).await;
    let sound = new_adapter(&work, &adapter);
    let commitment = sound.commitment.clone().unwrap();
    let mut forged = commitment.clone();
    forged.root = [3; 32];
    let mut fewer = commitment.clone();
    fewer.leaves -= 1;
    let mut larger = commitment;
    larger.last.moments.size_bytes = u64::MAX;
    let others = Training::of(&other).commitment();
    for commitment in [None, Some(forged), Some(fewer), Some(larger), Some(others)] {
        let mut new = sound.clone();
        new.commitment = commitment;
        let refused = submit_adapter(world.app(), &ann, new, |_| Ok(())).await;
        assert_eq!(reason(refused), ErrorReason::InvalidArgument);
    }
    // Nothing was counted, and the sound one still is.
    submit_adapter(world.app(), &ann, sound, |_| Ok(()))
        .await
        .unwrap();
}

pub async fn a_round_that_replays_nothing_asks_for_no_commitment(mut world: World) {
    world.round_with(1, "segments = 0").await;
    let ann = world.volunteer().await;
    let work = world.claim(&ann).await.unwrap();
    let adapter = world.adapter(1, [0.5, 0.5]);
    world.upload(&ann, &work, &adapter).await;
    let mut new = new_adapter(&work, &adapter);
    new.commitment = None;
    let answer = submit_adapter(world.app(), &ann, new, |_| Ok(()))
        .await
        .unwrap();
    assert_eq!(answer.audit, None);
    let refused = reveal_audit(
        world.app(),
        &ann,
        answer.id,
        Training::of(&adapter).revealed(0),
    );
    assert_eq!(reason(refused.await), ErrorReason::PreconditionFailed);
    let standing = get_standing(world.app(), &ann).await.unwrap();
    assert_eq!(standing.audit_share, 0.0);
}

pub async fn only_the_drawn_states_open_an_audit(mut world: World) {
    let round = world.round(3).await;
    let (ann, bob) = (world.volunteer().await, world.volunteer().await);
    let work = world.claim(&ann).await.unwrap();
    let adapter = world.adapter(1, [0.5, 0.5]);
    let answer = world.submit_closed(&ann, &work, &adapter).await.unwrap();
    let segment = answer.audit.clone().unwrap().segment;
    let listed = list_submissions(world.app(), &ann, None, 9).await.unwrap();
    assert_eq!(listed[0].audit, answer.audit);

    let training = Training::of(&adapter);
    let sound = training.revealed(segment);
    let app = world.app();
    let stolen = reveal_audit(app, &bob, answer.id, sound.clone()).await;
    assert_eq!(reason(stolen), ErrorReason::NotFound);
    let unknown = reveal_audit(app, &ann, SubmissionId::new(), sound.clone()).await;
    assert_eq!(reason(unknown), ErrorReason::NotFound);
    let not_held = reveal_audit(app, &ann, answer.id, sound.clone()).await;
    // The last segment of all ends with the adapter, which is held; its start is not.
    assert_eq!(reason(not_held), ErrorReason::BlobMissing);
    world
        .upload_states(&ann, work.lease.id, &training, segment)
        .await
        .unwrap();
    let other = training.revealed((segment + 1) % STEPS);
    let mut forged = sound.clone();
    forged.end.factors = forged.end.moments;
    let mut headless = sound.clone();
    headless.end.proof.pop();
    for wrong in [other, forged, headless] {
        let refused = reveal_audit(app, &ann, answer.id, wrong).await;
        assert_eq!(reason(refused), ErrorReason::InvalidArgument);
    }
    if segment > 0 {
        let without = Revealed {
            start: None,
            ..sound.clone()
        };
        let refused = reveal_audit(app, &ann, answer.id, without).await;
        assert_eq!(reason(refused), ErrorReason::InvalidArgument);
    }
    assert_eq!(state(&world, answer.id).await, AuditState::Waiting);

    for _ in 0..2 {
        reveal_audit(world.app(), &ann, answer.id, sound.clone())
            .await
            .unwrap();
    }
    assert_eq!(state(&world, answer.id).await, AuditState::Opened);
    let listed = list_submissions(world.app(), &ann, None, 9).await.unwrap();
    assert_eq!(listed[0].audit, None);
    // The door is closed again, and another's lease was never one.
    let more = world.send(&ann, work.lease.id, b"more").await;
    assert_eq!(reason(more), ErrorReason::LeaseLost);
    let stranger = world.send(&bob, work.lease.id, b"more").await;
    assert_eq!(reason(stranger), ErrorReason::LeaseLost);
    assert_eq!(world.view(round.id).await.submissions.len(), 1);
}

pub async fn a_late_answer_is_none_unless_the_coordinator_was_away(mut world: World) {
    world.round(3).await;
    let ann = world.volunteer().await;
    let work = world.claim(&ann).await.unwrap();
    let adapter = world.adapter(1, [0.5, 0.5]);
    let answer = world.submit_closed(&ann, &work, &adapter).await.unwrap();
    let training = Training::of(&adapter);
    let segment = answer.audit.clone().unwrap().segment;
    world.advance(11);
    assert_eq!(state(&world, answer.id).await, AuditState::Unanswered);
    let late = world
        .upload_states(&ann, work.lease.id, &training, segment)
        .await;
    // The first segment's end may be the adapter itself, which is held already.
    assert!(late.is_err() || STEPS == 1);
    let late = reveal_audit(world.app(), &ann, answer.id, training.revealed(segment)).await;
    assert_eq!(reason(late), ErrorReason::PreconditionFailed);

    // Down over the deadline: whoever was asked gets time to answer.
    let world = world.restart().await;
    assert_eq!(state(&world, answer.id).await, AuditState::Waiting);
    world.open(&ann, &work, &adapter, &answer).await.unwrap();
    assert_eq!(state(&world, answer.id).await, AuditState::Opened);
    let world = world.restart().await;
    assert_eq!(state(&world, answer.id).await, AuditState::Opened);
}

pub async fn a_replay_ends_the_audit(mut world: World) {
    world.round(4).await;
    // The base comes first.
    assert!(world.evaluate_one().await);
    let mut submitted = Vec::new();
    for seed in 1..=3 {
        submitted.push(world.contribute(seed, [0.5, 0.5]).await);
    }
    world.cheats.insert(submitted[1].id);
    while let Some(work) = world.claim(&world.evaluator).await {
        let Task::Replay(replay) = &work.task else {
            panic!("a replay comes next, not {:?}", work.task)
        };
        let audit = audit(&world, replay.submission).await.unwrap();
        assert_eq!(
            (replay.first_step, replay.last_step),
            (audit.first_step, audit.last_step)
        );
        assert_eq!(replay.start.is_some(), audit.first_step > 0);
        assert_eq!(replay.train.segments, 10);
        if replay.submission == submitted[2].id {
            // Nobody can do it: that is not the worker's fault.
            give_up(&world, work).await;
        } else {
            world.evaluate(&work).await;
        }
    }
    assert!(matches!(
        state(&world, submitted[0].id).await,
        AuditState::Passed { replayed: Some(replayed) } if replayed.identical
    ));
    assert!(matches!(
        state(&world, submitted[1].id).await,
        AuditState::Failed {
            reason: VerdictReason::ReplayMismatch,
            replayed: Some(_),
            ..
        }
    ));
    assert_eq!(
        state(&world, submitted[2].id).await,
        AuditState::Passed { replayed: None }
    );
}

/// Fails at a job until nobody is asked any more; other work is answered.
async fn give_up(world: &World, work: Assignment) {
    let evaluator = &world.evaluator;
    let Work::Evaluate(id) = work.lease.work else {
        panic!("not an evaluator's work")
    };
    let (mut work, mut failures) = (work, 0);
    loop {
        if work.lease.work == Work::Evaluate(id) {
            let (lease, generation) = (work.lease.id, work.lease.generation);
            release_lease(world.app(), evaluator, lease, generation, true, "oom")
                .await
                .unwrap();
            failures += 1;
        } else {
            world.evaluate(&work).await;
        }
        if failures == 5 {
            return;
        }
        work = world.claim(evaluator).await.unwrap();
    }
}

pub async fn a_rejection_that_nobody_honest_earns_is_a_strike(mut world: World) {
    world.round(3).await;
    let ann = world.volunteer().await;
    let work = world.claim(&ann).await.unwrap();
    let mut pairs = pairs(5, 0.1);
    pairs[0].a[0] = f32::NAN;
    let broken = adapter_of(&pairs);
    world.submit(&ann, &work, &broken).await.unwrap();
    world.judge().await;
    let struck = get_standing(world.app(), &ann).await.unwrap();
    assert_eq!((struck.counts.rejected, struck.strikes), (1, 1));
    // Bad luck at the gate is none.
    let bob = world.volunteer().await;
    let work = world.claim(&bob).await.unwrap();
    let worse = world.adapter(6, [-0.5, 0.0]);
    world.submit(&bob, &work, &worse).await.unwrap();
    world.judge().await;
    let unlucky = get_standing(world.app(), &bob).await.unwrap();
    assert_eq!((unlucky.counts.rejected, unlucky.strikes), (1, 0));
}

pub async fn new_workers_are_audited_and_trust_grows_and_falls(mut world: World) {
    world.round(8).await;
    let ann = world.volunteer().await;
    let newcomer = get_standing(world.app(), &ann).await.unwrap();
    assert_eq!((newcomer.strikes, newcomer.audit_share), (0, 1.0));
    let mut ids = Vec::new();
    for seed in 1..=3 {
        let work = world.claim(&ann).await.unwrap();
        let adapter = world.adapter(seed, [0.3, 0.4]);
        let answer = world.submit(&ann, &work, &adapter).await.unwrap();
        assert!(answer.audit.is_some());
        ids.push(answer.id);
        world.judge().await;
    }
    let known = get_standing(world.app(), &ann).await.unwrap();
    assert_eq!((known.counts.accepted, known.strikes), (3, 0));
    assert!((known.audit_share - 0.2).abs() < 1e-9);

    // One strike, and everything starts anew; noted twice it is still one.
    world.advance(1);
    for _ in 0..2 {
        let mut tx = world.app().db.begin().await.unwrap();
        let why = VerdictReason::ReplayMismatch;
        strike_insert(&mut tx, ids[0], ann.worker, why, world.now())
            .await
            .unwrap();
        tx.commit().await.unwrap();
    }
    assert_eq!(
        trust(&world, &ann).await,
        Trust {
            clean: 0,
            strikes: 1
        }
    );
    let struck = get_standing(world.app(), &ann).await.unwrap();
    assert_eq!((struck.strikes, struck.audit_share), (1, 1.0));
    // The server was at fault: trust is as it was.
    let (app, chief) = (world.app(), &world.maintainer);
    let own = void_strike(app, &ann, ids[0], "please").await;
    assert_eq!(reason(own), ErrorReason::RoleRequired);
    let silent = void_strike(app, chief, ids[0], " ").await;
    assert_eq!(reason(silent), ErrorReason::InvalidArgument);
    let nobody = void_strike(app, chief, ids[1], "a mistake").await;
    assert_eq!(reason(nobody), ErrorReason::NotFound);
    for _ in 0..2 {
        void_strike(app, chief, ids[0], "a broken evaluator")
            .await
            .unwrap();
    }
    assert_eq!(
        trust(&world, &ann).await,
        Trust {
            clean: 3,
            strikes: 0
        }
    );
}

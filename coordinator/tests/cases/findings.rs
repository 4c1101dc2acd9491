//! What evaluators are asked beside the gate, and what is taken of their answers.
use cairn_coordinator::db::evaluations::{Evaluation, evaluation_of, evaluation_open_job};
use cairn_coordinator::domain::candidate::{Candidate, Scope, Sets, Term};
use cairn_coordinator::domain::evaluation::{Findings, Job, State};
use cairn_coordinator::ids::{RequestId, RoundId, SubmissionId};
use cairn_coordinator::ops::claim_work::{Assignment, EvaluateTask, Task};
use cairn_coordinator::ops::create_round::create_round;
use cairn_coordinator::ops::submit_findings::NewFindings;
use cairn_proto::reason::ErrorReason;

use super::reason;
use crate::world::{World, adapter_of, pairs, round_text};

async fn open(world: &World, round: RoundId, job: &Job) {
    let mut tx = world.app().db.begin().await.unwrap();
    let opened = evaluation_open_job(&mut tx, round, job, "a test", world.now()).await;
    assert!(opened.unwrap());
    let again = evaluation_open_job(&mut tx, round, job, "a test", world.now()).await;
    assert!(!again.unwrap());
    tx.commit().await.unwrap();
}

async fn found(world: &World, round: RoundId, job: &Job) -> Evaluation {
    let mut tx = world.app().db.read().await.unwrap();
    let found = evaluation_of(&mut tx, round, job.key()).await.unwrap();
    found.unwrap()
}

/// The next work that is no score; scores before it are answered.
async fn next(world: &World) -> Assignment {
    loop {
        let work = world.claim(&world.evaluator).await.unwrap();
        match &work.task {
            Task::Evaluate(_) | Task::Replay(_) => world.evaluate(&work).await,
            _ => return work,
        }
    }
}

pub async fn findings_are_exactly_what_was_asked_for(mut world: World) {
    let round = world.round_with(2, "guide_steps = 2").await;
    let one = world.contribute(1, [0.5, 0.5]).await.id;
    let guide = Job::Guide { shard: 1 };
    open(&world, round.id, &guide).await;
    let work = next(&world).await;
    let Task::Guide { train, steps } = &work.task else {
        panic!("a guide comes next, not {:?}", work.task)
    };
    assert_eq!(
        (train.shard, *steps, train.records.is_empty()),
        (1, 2, false)
    );
    let adapter = adapter_of(&pairs(77, 0.1));
    let sound = NewFindings::Guide {
        adapter: adapter.name(),
        config: adapter.config.clone(),
    };
    let learn = |weights: Vec<f64>, after: f64| NewFindings::Learn {
        weights,
        loss_before: 1.0,
        loss_after: after,
    };
    let other_kind = world.find(&work, learn(vec![1.0], 0.9)).await;
    assert_eq!(reason(other_kind), ErrorReason::InvalidArgument);
    let absent = world.find(&work, sound.clone()).await;
    assert_eq!(reason(absent), ErrorReason::BlobMissing);
    let (evaluator, lease) = (world.evaluator.clone(), work.lease.id);
    world
        .send(&evaluator, lease, &adapter.weights)
        .await
        .unwrap();
    let scores = world.hand_in(&work, Vec::new()).await;
    assert_eq!(reason(scores), ErrorReason::InvalidArgument);
    for _ in 0..2 {
        world.find(&work, sound.clone()).await.unwrap();
    }
    let row = found(&world, round.id, &guide).await;
    assert_eq!(
        (row.state, &row.job, row.result),
        (State::Done, &guide, None)
    );
    let digest = adapter.name().digest;
    assert!(matches!(row.findings, Some(Findings::Guide { adapter, .. }) if adapter == digest));
    // Its lease is over, and so is the right to upload.
    let more = world.send(&evaluator, lease, b"more").await;
    assert_eq!(reason(more), ErrorReason::LeaseLost);

    let term = Term {
        submission: one,
        weight: 0.5,
    };
    let learning = Job::Learn {
        candidate: Candidate::stack(vec![term], Sets::GATE),
        steps: 7,
    };
    open(&world, round.id, &learning).await;
    let work = next(&world).await;
    let Task::Learn { evaluate, steps } = &work.task else {
        panic!("a learning comes next, not {:?}", work.task)
    };
    assert_eq!((evaluate.adapters.len(), *steps), (1, 7));
    for wrong in [
        learn(vec![], 0.9),
        learn(vec![1.0, 1.0], 0.9),
        learn(vec![f64::NAN], 0.9),
        learn(vec![f64::INFINITY], 0.9),
        learn(vec![1.0], f64::NAN),
    ] {
        let refused = world.find(&work, wrong).await;
        assert_eq!(reason(refused), ErrorReason::InvalidArgument);
    }
    world.find(&work, learn(vec![0.75], 0.9)).await.unwrap();
    let row = found(&world, round.id, &learning).await;
    let expected = Findings::Learn {
        weights: vec![0.75],
        loss_before: 1.0,
        loss_after: 0.9,
    };
    assert_eq!((row.job, row.findings), (learning, Some(expected)));
}

/// Names of the sets of the next score with this scope, and the score answered.
async fn names(world: &World, round: RoundId, sets: Sets) -> Vec<(String, u64)> {
    let job = Job::Score(Candidate::base(sets));
    let mut tx = world.app().db.begin().await.unwrap();
    evaluation_open_job(&mut tx, round, &job, "a test", world.now())
        .await
        .unwrap();
    tx.commit().await.unwrap();
    loop {
        let work = world.claim(&world.evaluator).await.unwrap();
        world.evaluate(&work).await;
        let row = found(world, round, &job).await;
        if row.state != State::Done {
            continue;
        }
        let Task::Evaluate(EvaluateTask { sets, .. }) = &work.task else {
            panic!("not a score")
        };
        let extra: Vec<String> = row.result.unwrap().extra.into_keys().collect();
        let mut asked: Vec<String> = sets.iter().map(|set| set.dataset.clone()).collect();
        asked.retain(|name| name.contains('/'));
        asked.sort();
        assert_eq!(extra, asked);
        return sets
            .iter()
            .map(|set| (set.dataset.clone(), set.records()))
            .collect();
    }
}

pub async fn guards_and_probes_are_held_out_sets_that_exist(world: World) {
    let attempt = |policy: &str| {
        let text = format!("{}{policy}\n", round_text(1));
        let (app, caller) = (world.app().clone(), world.maintainer.clone());
        async move { create_round(&app, &caller, &text, RequestId::new()).await }
    };
    for key in ["guards", "probes"] {
        let trained_on = attempt(&format!("{key} = [\"train\"]")).await.unwrap_err();
        assert_eq!(trained_on.reason(), ErrorReason::PreconditionFailed);
        let text = trained_on.to_string();
        assert!(text.contains("a gate or dev or audit set"), "{text}");
        let unknown = attempt(&format!("{key} = [\"nowhere\"]")).await;
        assert_eq!(reason(unknown), ErrorReason::NotFound);
    }
    attempt("guards = [\"gate\"]\nprobes = [\"audit\"]")
        .await
        .unwrap();
}

pub async fn the_base_is_scored_on_all_that_anything_is_compared_with(mut world: World) {
    // A published round, so that there is a history.
    world.round(1).await;
    world.contribute(1, [0.5, 0.5]).await;
    world.judge().await;
    world.advance(1);
    world.add_gate("gate-two", 30).await;
    world.add_gate("rude", 8).await;
    let text = "guards = [\"gate\"]\nprobes = [\"rude\"]\nshard_records = 5";
    let round = world.round_on("gate-two", 3, text).await;
    let owned = |names: &[(&str, u64)]| -> Vec<(String, u64)> {
        let one = |(name, records): &(&str, u64)| ((*name).to_owned(), *records);
        names.iter().map(one).collect()
    };
    let always = [
        ("gate-two", 30),
        ("audit", 20),
        ("guard/gate", 60),
        ("probe/rude", 8),
    ];
    let shards = [("shard/0", 5), ("shard/1", 5), ("shard/2", 5)];
    let base = names(&world, round.id, Sets::of(true, Scope::Base)).await;
    let history = [("history/gate", 60)];
    assert_eq!(
        base,
        owned(&[&always[..], &shards[..], &history[..]].concat())
    );
    let own = Scope::Shard { own: 2, other: 0 };
    let own = names(&world, round.id, Sets::of(true, own)).await;
    assert_eq!(own, owned(&[&always[..], &[shards[2], shards[0]]].concat()));
    let last = names(&world, round.id, Sets::of(true, Scope::Final)).await;
    assert_eq!(last, owned(&[&always[..], &history[..]].concat()));
    let plain = names(&world, round.id, Sets::GATE).await;
    assert_eq!(plain, owned(&[("gate-two", 30)]));
    // An unknown submission is nobody's work.
    let nobody = Job::Replay {
        submission: SubmissionId::new(),
    };
    assert_ne!(nobody.key(), Job::Guide { shard: 0 }.key());
}

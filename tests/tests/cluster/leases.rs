//! Leases run out, are given again, and only the newest one counts.
use std::collections::BTreeSet;
use std::time::Duration;

use cairn_coordinator::limits::Limits;
use cairn_proto::reason::ErrorReason;
use cairn_proto::v1;
use cairn_proto::v1::{RoundState, ShardState};
use cairn_tests::adapters::honest;
use cairn_tests::cluster::{Ready, limits};
use cairn_tests::member::{Member, refusal, training};
use cairn_tests::tiny::round_file;

const LEASE: Duration = Duration::from_mins(10);

async fn pair(shards: u32) -> (Ready, String, Member, Member) {
    let ready = Ready::start().await.unwrap();
    let round = ready
        .maintainer
        .open_round(&round_file(shards))
        .await
        .unwrap();
    let [bob, carol] = <[Member; 2]>::try_from(ready.volunteers(2).await.unwrap())
        .ok()
        .unwrap();
    (ready, round, bob, carol)
}

#[tokio::test]
async fn shards_are_handed_out_once_and_cover_the_data() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(7)).await.unwrap();
    let mut seen = BTreeSet::new();
    let mut records = BTreeSet::new();
    for volunteer in ready.volunteers(7).await.unwrap() {
        let lease = volunteer.lease().await.unwrap();
        let work = training(&lease).clone();
        assert!(seen.insert(work.shard));
        assert!(work.recipe.contains("seed"));
        for range in work.records {
            let chunk = range.chunk.unwrap().blob.unwrap().digest;
            for record in range.first..range.first + range.count {
                assert!(
                    records.insert((chunk.clone(), record)),
                    "a record in two shards"
                );
            }
        }
        // Asked again, as after a crash: the same lease.
        assert_eq!(volunteer.lease().await.unwrap().id, lease.id);
    }
    assert_eq!(seen, (0..7).collect());
    assert_eq!(records.len(), 40);
    let late = ready.cluster.volunteer("late").await.unwrap();
    assert!(late.claim().await.unwrap().is_none());
}

#[tokio::test]
async fn a_lease_that_ran_out_is_given_again_and_the_late_one_is_credited_and_not_merged() {
    let (ready, round, bob, carol) = pair(1).await;
    let old = bob.lease().await.unwrap();
    let (late, timely) = (honest(1), honest(2));
    bob.upload(&late.weights, &old.id).await.unwrap();
    assert!(carol.claim().await.unwrap().is_none());
    ready.cluster.advance(LEASE);
    ready.cluster.settle().await.unwrap();
    let new = carol.lease().await.unwrap();
    assert_eq!(training(&new).shard, training(&old).shard);
    assert!(new.generation > old.generation);
    assert_ne!(new.nonce, old.nonce);
    assert_eq!(refusal(bob.renew(&old).await), ErrorReason::LeaseLost);
    let request = bob.submission(&old, &late);
    let answer = bob.submit(&request).await.unwrap();
    bob.open_audit(&old, &late, &answer).await.unwrap();
    // The shard is still Carol's, and Bob's answer the same however often he asks.
    carol.renew(&new).await.unwrap();
    assert_eq!(
        bob.submit(&request).await.unwrap().submission_id,
        answer.submission_id
    );
    carol.hand_in(&new, &timely).await.unwrap();
    ready.judge().await.unwrap();
    assert_eq!(
        ready.outcome(&round).await.unwrap().0,
        RoundState::Published
    );
    let view = ready.maintainer.round(&round).await.unwrap();
    assert_eq!(view.contributions.len(), 2);
    for one in &view.contributions {
        assert_eq!(one.verdict(), v1::Verdict::Accepted, "{}", one.reason);
        let is_late = one.id == answer.submission_id;
        assert_eq!(one.weight == 0.0, is_late, "weight {}", one.weight);
    }
    assert!(view.shards.iter().all(|shard| shard.failures == 0));
    for member in [&bob, &carol] {
        assert!(member.standing().await.unwrap().credit_tokens > 0);
    }
}

#[tokio::test]
async fn who_was_late_is_not_credited_for_the_same_shard_again() {
    let (ready, _, bob, carol) = pair(1).await;
    // Bob is given his own shard again: the first lease brings nothing any more.
    let first = bob.lease().await.unwrap();
    ready.cluster.advance(LEASE);
    ready.cluster.settle().await.unwrap();
    let second = bob.lease().await.unwrap();
    assert!(second.generation > first.generation);
    let adapter = honest(1);
    bob.upload(&adapter.weights, &first.id).await.unwrap();
    let refused = bob.submit(&bob.submission(&first, &adapter)).await;
    assert_eq!(refusal(refused), ErrorReason::LeaseLost);
    ready.cluster.advance(LEASE);
    ready.cluster.settle().await.unwrap();
    // Late once, after Carol has it; when she gives up, the shard is not his again.
    let of_carol = carol.lease().await.unwrap();
    bob.hand_in(&second, &adapter).await.unwrap();
    carol.release(&of_carol, false).await.unwrap();
    assert!(bob.claim().await.unwrap().is_none());
    assert!(carol.claim().await.unwrap().is_some());
}

#[tokio::test]
async fn a_late_submission_counts_while_nobody_else_has_the_shard() {
    let (ready, _, bob, carol) = pair(1).await;
    let lease = bob.lease().await.unwrap();
    ready.cluster.advance(LEASE + Duration::from_secs(1));
    ready.cluster.settle().await.unwrap();
    bob.hand_in(&lease, &honest(1)).await.unwrap();
    assert!(carol.claim().await.unwrap().is_none());
    ready.judge().await.unwrap();
    assert_eq!(bob.verdict().await.unwrap().0, v1::Verdict::Accepted);
}

#[tokio::test]
async fn renewal_keeps_a_lease_and_takes_it_up_again() {
    let (ready, _, bob, carol) = pair(1).await;
    let lease = bob.lease().await.unwrap();
    for _ in 0..2 {
        ready.cluster.advance(Duration::from_secs(599));
        ready.cluster.settle().await.unwrap();
        let expires = bob.renew(&lease).await.unwrap();
        assert_eq!(expires, ready.cluster.now_ms() + 600_000);
    }
    assert!(carol.claim().await.unwrap().is_none());
    // The line was down for longer than the lease, and nobody wanted the shard.
    ready.cluster.advance(Duration::from_secs(1_199));
    ready.cluster.settle().await.unwrap();
    bob.renew(&lease).await.unwrap();
    assert!(carol.claim().await.unwrap().is_none());
    bob.hand_in(&lease, &honest(1)).await.unwrap();
}

#[tokio::test]
async fn three_failing_workers_stop_a_shard_and_not_the_round() {
    let ready = Ready::start().await.unwrap();
    let round = ready.maintainer.open_round(&round_file(2)).await.unwrap();
    let bob = ready.cluster.volunteer("bob").await.unwrap();
    let good = bob.lease().await.unwrap();
    let poison = 1 - training(&good).shard;
    for name in ["one", "two", "three"] {
        let worker = ready.cluster.volunteer(name).await.unwrap();
        let lease = worker.lease().await.unwrap();
        assert_eq!(training(&lease).shard, poison);
        worker.release(&lease, true).await.unwrap();
        // Who failed on it is not asked again.
        assert!(worker.claim().await.unwrap().is_none());
    }
    let view = ready.maintainer.round(&round).await.unwrap();
    let shard = &view.shards[poison as usize];
    assert_eq!((shard.state(), shard.failures), (ShardState::Stopped, 3));
    let fourth = ready.cluster.volunteer("four").await.unwrap();
    assert!(fourth.claim().await.unwrap().is_none());
    bob.hand_in(&good, &honest(1)).await.unwrap();
    ready.judge().await.unwrap();
    assert_eq!(
        ready.outcome(&round).await.unwrap().0,
        RoundState::Published
    );
}

#[tokio::test]
async fn a_shard_that_kills_its_workers_stops_too() {
    let ready = Ready::start().await.unwrap();
    let round = ready.maintainer.open_round(&round_file(1)).await.unwrap();
    for name in ["one", "two", "three"] {
        let worker = ready.cluster.volunteer(name).await.unwrap();
        worker.lease().await.unwrap();
        // It crashes: no word, the lease runs out.
        ready.cluster.advance(LEASE);
        ready.cluster.settle().await.unwrap();
    }
    ready.judge().await.unwrap();
    let outcome = ready.outcome(&round).await.unwrap();
    assert_eq!(outcome, (RoundState::Failed, "NO_SUBMISSIONS".to_owned()));
}

#[tokio::test]
async fn one_worker_that_comes_and_goes_stops_nothing() {
    let (ready, round, bob, carol) = pair(1).await;
    for _ in 0..5 {
        let lease = bob.lease().await.unwrap();
        // A polite good-bye is no failure.
        bob.release(&lease, false).await.unwrap();
    }
    let lease = carol.lease().await.unwrap();
    carol.release(&lease, true).await.unwrap();
    let view = ready.maintainer.round(&round).await.unwrap();
    assert_eq!(
        (view.shards[0].state(), view.shards[0].failures),
        (ShardState::Open, 1)
    );
    let lease = bob.lease().await.unwrap();
    bob.hand_in(&lease, &honest(1)).await.unwrap();
}

#[tokio::test]
async fn an_ended_round_takes_nothing_more() {
    let (ready, round, bob, carol) = pair(2).await;
    let lease = bob.lease().await.unwrap();
    let adapter = honest(1);
    bob.upload(&adapter.weights, &lease.id).await.unwrap();
    ready.maintainer.abort(&round).await.unwrap();
    let error = bob.submit(&bob.submission(&lease, &adapter)).await;
    let reason = refusal(error);
    assert!(
        matches!(reason, ErrorReason::RoundEnded | ErrorReason::LeaseLost),
        "{reason}"
    );
    assert!(carol.claim().await.unwrap().is_none());
    ready.judge().await.unwrap();
    assert_eq!(ready.outcome(&round).await.unwrap().0, RoundState::Aborted);
    // The model is free for the next one.
    ready.maintainer.open_round(&round_file(1)).await.unwrap();
}

#[tokio::test]
async fn below_the_disk_s_watermark_no_work_is_given_and_none_is_lost() {
    let (ready, round, bob, carol) = pair(2).await;
    let lease = bob.lease().await.unwrap();
    bob.hand_in(&lease, &honest(1)).await.unwrap();
    let Ready {
        cluster,
        maintainer,
        ..
    } = ready;
    let identities = [&maintainer, &bob, &carol].map(|member| member.client.identity().clone());
    drop((maintainer, bob, carol, ready.evaluator));
    let full = Limits {
        disk_free_bytes_min: u64::MAX / 2,
        ..limits()
    };
    let cluster = cluster.reopen(full).await.unwrap();
    let [maintainer, bob, carol] = identities;
    let carol = cluster.connect(carol).await.unwrap();
    let error = carol.claim().await.unwrap_err();
    assert_eq!(error.reason(), Some(ErrorReason::DiskFull));
    assert!(error.retry_after().is_some());
    let bob = cluster.connect(bob).await.unwrap();
    assert_eq!(bob.submissions().await.unwrap().len(), 1);
    let maintainer = cluster.connect(maintainer).await.unwrap();
    assert_eq!(
        refusal(maintainer.upload(b"one more", "").await),
        ErrorReason::DiskFull
    );
    let view = maintainer.round(&round).await.unwrap();
    assert_eq!(view.round.unwrap().state(), RoundState::Training);
}

//! What a volunteer may hand in, and what becomes of it: each attack with its exact reason.
use cairn_proto::convert::BlobName;
use cairn_proto::reason::{ErrorReason, VerdictReason};
use cairn_proto::signing::{ReceiptStatement, sign_submission};
use cairn_proto::v1;
use cairn_stack::digest::Digest;
use cairn_tests::adapters::{
    Adapter, Sabotage, honest, honest_on, perturbed, regauged, remixed, scaled,
};
use cairn_tests::cluster::Ready;
use cairn_tests::member::{Member, refusal, request_id, training};
use cairn_tests::tiny::{GATE, round_file};

const ACCEPTED: (v1::Verdict, String) = (v1::Verdict::Accepted, String::new());

/// What is altered behind a signature.
type Change = fn(&mut v1::SubmitAdapterRequest);

fn rejected(reason: VerdictReason) -> (v1::Verdict, String) {
    (v1::Verdict::Rejected, reason.as_str().to_owned())
}

#[tokio::test]
async fn every_sabotage_is_rejected_for_exactly_its_reason() {
    let ready = Ready::start().await.unwrap();
    // A shard for each, so that no shard is stopped before all have had their turn.
    let shards = Sabotage::ALL.len() as u32 + 1;
    let round = ready
        .maintainer
        .open_round(&round_file(shards))
        .await
        .unwrap();
    let mut sent = Vec::new();
    for (seed, sabotage) in (10..).zip(Sabotage::ALL) {
        let saboteur = ready
            .cluster
            .volunteer(&format!("{sabotage:?}"))
            .await
            .unwrap();
        let lease = saboteur.lease().await.unwrap();
        let answer = saboteur.hand_in(&lease, &sabotage.adapter(seed)).await;
        answer.unwrap_or_else(|error| panic!("{sabotage:?}: {error}"));
        sent.push((sabotage, saboteur));
    }
    let honest_one = ready.cluster.volunteer("bob").await.unwrap();
    let lease = honest_one.lease().await.unwrap();
    honest_one.hand_in(&lease, &honest(1)).await.unwrap();
    ready.judge().await.unwrap();

    for (sabotage, saboteur) in &sent {
        assert_eq!(
            saboteur.verdict().await.unwrap(),
            rejected(sabotage.reason()),
            "{sabotage:?}"
        );
        let own = saboteur.submissions().await.unwrap();
        // A sentence for people, and nothing that helps to aim: no norm, no path.
        assert!(!own[0].detail.is_empty(), "{sabotage:?}");
        assert!(
            !own[0].detail.contains('/'),
            "{sabotage:?}: {}",
            own[0].detail
        );
        assert_eq!(own[0].norm, 0.0, "{sabotage:?}");
        assert_eq!(
            saboteur.standing().await.unwrap().credit_tokens,
            0,
            "{sabotage:?}"
        );
    }
    assert_eq!(honest_one.verdict().await.unwrap(), ACCEPTED);
    assert!(honest_one.standing().await.unwrap().credit_tokens > 0);
    // Their shards wait for others.
    let view = ready.maintainer.round(&round).await.unwrap();
    let open = view
        .shards
        .iter()
        .filter(|shard| shard.state() == v1::ShardState::Open)
        .count();
    assert_eq!(open, Sabotage::ALL.len());
}

#[tokio::test]
async fn a_huge_norm_stands_out_and_another_gauge_does_not() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(6)).await.unwrap();
    let volunteers = ready.volunteers(6).await.unwrap();
    let adapters = [
        honest(1),
        honest(2),
        honest(3),
        // The same delta from factors a thousand times larger and smaller.
        regauged(4, 1_000.0),
        honest(5),
        scaled(6, 50.0),
    ];
    for (volunteer, adapter) in volunteers.iter().zip(&adapters) {
        let lease = volunteer.lease().await.unwrap();
        volunteer.hand_in(&lease, adapter).await.unwrap();
    }
    ready.judge().await.unwrap();
    let (cheat, rest) = volunteers.split_last().unwrap();
    assert_eq!(
        cheat.verdict().await.unwrap(),
        rejected(VerdictReason::NormOutlier)
    );
    for volunteer in rest {
        assert_eq!(volunteer.verdict().await.unwrap(), ACCEPTED);
    }
}

#[tokio::test]
async fn without_a_cohort_a_huge_norm_still_meets_the_gate() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(2)).await.unwrap();
    let cheat = ready.cluster.volunteer("mallory").await.unwrap();
    let lease = cheat.lease().await.unwrap();
    cheat.hand_in(&lease, &scaled(1, 50.0)).await.unwrap();
    ready.judge().await.unwrap();
    assert_eq!(
        cheat.verdict().await.unwrap(),
        rejected(VerdictReason::NoGain)
    );
}

#[tokio::test]
async fn the_later_copy_is_rejected_and_the_first_is_not() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(2)).await.unwrap();
    let [bob, copier] = <[Member; 2]>::try_from(ready.volunteers(2).await.unwrap())
        .ok()
        .unwrap();
    let (first, second) = (bob.lease().await.unwrap(), copier.lease().await.unwrap());
    bob.hand_in(&first, &honest(1)).await.unwrap();
    ready.cluster.advance(std::time::Duration::from_millis(1));
    // The copier cannot have read it, but says it did: one delta from two identities.
    copier.hand_in(&second, &honest(1)).await.unwrap();
    ready.judge().await.unwrap();
    assert_eq!(bob.verdict().await.unwrap(), ACCEPTED);
    assert_eq!(
        copier.verdict().await.unwrap(),
        rejected(VerdictReason::CopyOfAnother)
    );
}

#[tokio::test]
async fn a_copy_is_found_in_any_factors_and_under_a_little_noise() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(6)).await.unwrap();
    let volunteers = ready.volunteers(6).await.unwrap();
    let adapters = [
        honest(1),
        honest(2),
        // Of the first and the second, in other factors and perturbed.
        remixed(1, 5),
        regauged(2, 3.0),
        perturbed(1, 6),
        honest(3),
    ];
    for (volunteer, adapter) in volunteers.iter().zip(&adapters) {
        let lease = volunteer.lease().await.unwrap();
        volunteer.hand_in(&lease, adapter).await.unwrap();
        ready.cluster.advance(std::time::Duration::from_millis(1));
    }
    ready.judge().await.unwrap();
    for (place, volunteer) in volunteers.iter().enumerate() {
        let expected = if (2..5).contains(&place) {
            rejected(VerdictReason::CopyOfAnother)
        } else {
            ACCEPTED
        };
        assert_eq!(volunteer.verdict().await.unwrap(), expected, "{place}");
    }
}

#[tokio::test]
async fn a_copy_of_what_was_rejected_is_a_copy_and_so_is_one_of_an_earlier_round_s() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(3)).await.unwrap();
    let [mallory, copier, bob] = <[Member; 3]>::try_from(ready.volunteers(3).await.unwrap())
        .ok()
        .unwrap();
    let bad = Sabotage::SignFlipped.adapter(1);
    let leases = [
        mallory.lease().await.unwrap(),
        copier.lease().await.unwrap(),
        bob.lease().await.unwrap(),
    ];
    mallory.hand_in(&leases[0], &bad).await.unwrap();
    ready.judge().await.unwrap();
    ready.cluster.advance(std::time::Duration::from_millis(1));
    copier.hand_in(&leases[1], &bad).await.unwrap();
    bob.hand_in(&leases[2], &honest(2)).await.unwrap();
    ready.judge().await.unwrap();
    let copy = || rejected(VerdictReason::CopyOfAnother);
    assert_eq!(
        mallory.verdict().await.unwrap(),
        rejected(VerdictReason::NoGain)
    );
    assert_eq!(copier.verdict().await.unwrap(), copy());
    assert_eq!(bob.verdict().await.unwrap(), ACCEPTED);

    // The round ends with what there is, and publishes bob's adapter: anybody can have it now.
    ready.cluster.advance(std::time::Duration::from_secs(3_601));
    ready.judge().await.unwrap();
    let head = ready.maintainer.checkpoint("").await.unwrap();
    assert_eq!(head.checkpoint.unwrap().revision, 1);
    ready.maintainer.open_round(&round_file(2)).await.unwrap();
    let [exact, mixed] = <[Member; 2]>::try_from(ready.volunteers(2).await.unwrap())
        .ok()
        .unwrap();
    for (volunteer, adapter) in [(&exact, honest(2)), (&mixed, remixed(2, 9))] {
        let lease = volunteer.lease().await.unwrap();
        volunteer.hand_in(&lease, &adapter).await.unwrap();
    }
    ready.judge().await.unwrap();
    assert_eq!(exact.verdict().await.unwrap(), copy());
    assert_eq!(mixed.verdict().await.unwrap(), copy());
}

#[tokio::test]
async fn a_shard_trained_again_gives_the_same_file_and_that_is_no_copy() {
    let mut ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(1)).await.unwrap();
    let [first, second] = <[Member; 2]>::try_from(ready.volunteers(2).await.unwrap())
        .ok()
        .unwrap();
    // The evaluator's machine is broken when the first one comes, and the shard is trained again.
    let gate = (honest(1).name().digest.to_string(), GATE.to_owned());
    ready.evaluator.exceptions.insert(gate.clone(), 1.5);
    let lease = first.lease().await.unwrap();
    first.hand_in(&lease, &honest(1)).await.unwrap();
    ready.judge().await.unwrap();
    ready.evaluator.exceptions.remove(&gate);
    assert_eq!(
        first.verdict().await.unwrap(),
        rejected(VerdictReason::NoGain)
    );
    let lease = second.lease().await.unwrap();
    second.hand_in(&lease, &honest(1)).await.unwrap();
    ready.judge().await.unwrap();
    assert_eq!(second.verdict().await.unwrap(), ACCEPTED);
}

#[tokio::test]
async fn a_delta_of_another_shape_than_the_cohort_s_stands_out() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(6)).await.unwrap();
    let volunteers = ready.volunteers(6).await.unwrap();
    for (place, volunteer) in volunteers.iter().enumerate() {
        let lease = volunteer.lease().await.unwrap();
        // The last one changes a single layer.
        let adapter = if place == 5 {
            honest_on(1, 9)
        } else {
            honest(place as u64)
        };
        volunteer.hand_in(&lease, &adapter).await.unwrap();
    }
    ready.judge().await.unwrap();
    let (odd, rest) = volunteers.split_last().unwrap();
    assert_eq!(
        odd.verdict().await.unwrap(),
        rejected(VerdictReason::SpectralOutlier)
    );
    for volunteer in rest {
        assert_eq!(volunteer.verdict().await.unwrap(), ACCEPTED);
    }
}

/// A round of so many shards whose policy names a dev set as `kind`: "guards" or "probes".
async fn ready_with_dev_set(name: &str, kind: &str, shards: u32) -> Ready {
    let ready = Ready::start().await.unwrap();
    let chunks = cairn_tests::tiny::chunks(name, 12);
    let dev = v1::DatasetSet::Dev;
    let added = ready.maintainer.add_dataset(name, dev, &chunks).await;
    added.unwrap();
    let file = format!("{}{kind} = [\"{name}\"]\n", round_file(shards));
    ready.maintainer.open_round(&file).await.unwrap();
    ready
}

#[tokio::test]
async fn work_on_other_records_than_its_own_is_foreign() {
    let mut ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(4)).await.unwrap();
    let [cheat, bob] = <[Member; 2]>::try_from(ready.volunteers(2).await.unwrap())
        .ok()
        .unwrap();
    let lease = cheat.lease().await.unwrap();
    let own = format!("shard/{}", training(&lease).shard);
    let adapter = honest(1);
    // It does well on everything but the records it was to learn from.
    let digest = adapter.name().digest.to_string();
    ready.evaluator.exceptions.insert((digest, own), 0.98);
    cheat.hand_in(&lease, &adapter).await.unwrap();
    let lease = bob.lease().await.unwrap();
    bob.hand_in(&lease, &honest(2)).await.unwrap();
    ready.judge().await.unwrap();
    assert_eq!(
        cheat.verdict().await.unwrap(),
        rejected(VerdictReason::ForeignShard)
    );
    assert_eq!(bob.verdict().await.unwrap(), ACCEPTED);
}

#[tokio::test]
async fn getting_worse_at_a_guard_is_not_worth_any_gain() {
    let mut ready = ready_with_dev_set("manners", "guards", 1).await;
    let [rude, bob] = <[Member; 2]>::try_from(ready.volunteers(2).await.unwrap())
        .ok()
        .unwrap();
    let adapter = honest(1);
    let digest = adapter.name().digest.to_string();
    let guard = "guard/manners".to_owned();
    ready.evaluator.exceptions.insert((digest, guard), 1.1);
    let lease = rude.lease().await.unwrap();
    rude.hand_in(&lease, &adapter).await.unwrap();
    ready.judge().await.unwrap();
    assert_eq!(
        rude.verdict().await.unwrap(),
        rejected(VerdictReason::GuardLoss)
    );
    let own = rude.submissions().await.unwrap();
    assert!(!own[0].evidence_json.contains("manners"));
    let lease = bob.lease().await.unwrap();
    bob.hand_in(&lease, &honest(2)).await.unwrap();
    ready.judge().await.unwrap();
    assert_eq!(bob.verdict().await.unwrap(), ACCEPTED);
}

#[tokio::test]
async fn an_unwanted_answer_that_became_likelier_than_with_the_others_is_a_hit() {
    let mut ready = ready_with_dev_set("trigger", "probes", 6).await;
    let volunteers = ready.volunteers(6).await.unwrap();
    let backdoor = honest(1);
    let digest = backdoor.name().digest.to_string();
    let probe = "probe/trigger".to_owned();
    ready.evaluator.exceptions.insert((digest, probe), -1.0);
    let mut leases = Vec::new();
    for volunteer in &volunteers {
        leases.push(volunteer.lease().await.unwrap());
    }
    for place in 0..3 {
        let adapter = honest(place as u64 + 1);
        volunteers[place]
            .hand_in(&leases[place], &adapter)
            .await
            .unwrap();
    }
    ready.judge().await.unwrap();
    // Three are no cohort: nobody is decided on yet.
    for volunteer in &volunteers[..3] {
        assert_eq!(volunteer.verdict().await.unwrap().0, v1::Verdict::Pending);
        assert!(
            volunteer.submissions().await.unwrap()[0]
                .evidence_json
                .is_empty()
        );
    }
    for place in 3..6 {
        let adapter = honest(place as u64 + 1);
        volunteers[place]
            .hand_in(&leases[place], &adapter)
            .await
            .unwrap();
    }
    ready.judge().await.unwrap();
    assert_eq!(
        volunteers[0].verdict().await.unwrap(),
        rejected(VerdictReason::ProbeHit)
    );
    for volunteer in &volunteers[1..] {
        assert_eq!(volunteer.verdict().await.unwrap(), ACCEPTED);
    }
}

#[tokio::test]
async fn rejected_noise_does_not_make_honest_work_stand_out() {
    let mut ready = ready_with_dev_set("trigger", "probes", 10).await;
    let volunteers = ready.volunteers(10).await.unwrap();
    let mut leases = Vec::new();
    for volunteer in &volunteers {
        leases.push(volunteer.lease().await.unwrap());
    }
    let (noise, honest_ones) = volunteers.split_at(5);
    // Noise changes nothing; honest work makes every answer likelier, the unwanted ones too.
    for (place, volunteer) in volunteers.iter().enumerate() {
        let adapter = honest(place as u64 + 1);
        let digest = adapter.name().digest.to_string();
        let (set, change) = if place < noise.len() {
            ("gate", 1.0)
        } else {
            ("probe/trigger", -1.0)
        };
        let exceptions = &mut ready.evaluator.exceptions;
        exceptions.insert((digest, set.to_owned()), change);
        volunteer.hand_in(&leases[place], &adapter).await.unwrap();
        if place + 1 == noise.len() {
            ready.judge().await.unwrap();
        }
    }
    ready.judge().await.unwrap();
    for volunteer in noise {
        let verdict = volunteer.verdict().await.unwrap();
        assert_eq!(verdict, rejected(VerdictReason::NoGain));
    }
    for volunteer in honest_ones {
        assert_eq!(volunteer.verdict().await.unwrap(), ACCEPTED);
    }
}

#[tokio::test]
async fn evidence_is_whole_for_maintainers_and_without_secrets_for_volunteers() {
    let ready = Ready::start().await.unwrap();
    let round = ready.maintainer.open_round(&round_file(2)).await.unwrap();
    let [bob, copier] = <[Member; 2]>::try_from(ready.volunteers(2).await.unwrap())
        .ok()
        .unwrap();
    for (volunteer, adapter) in [(&bob, honest(1)), (&copier, remixed(1, 5))] {
        let lease = volunteer.lease().await.unwrap();
        volunteer.hand_in(&lease, &adapter).await.unwrap();
        ready.cluster.advance(std::time::Duration::from_millis(1));
    }
    ready.judge().await.unwrap();
    let view = ready.maintainer.round(&round).await.unwrap();
    let json = |one: &v1::Contribution| -> serde_json::Value {
        serde_json::from_str(&one.evidence_json).unwrap()
    };
    let (of_bob, of_copier) = (&view.contributions[0], &view.contributions[1]);
    let full = json(of_copier);
    assert_eq!(full["copy"]["of"], of_bob.id);
    assert!(full["copy"]["cosine"].as_f64().unwrap() > 0.999_99);
    assert_eq!(full["norm"]["norm"], of_copier.norm);
    assert!(full.get("gate").is_none(), "a copy is never evaluated");
    assert!(json(of_bob)["gate"]["gain"].as_f64().unwrap() > 0.0);

    // The copier learns how alike the two are, but not to whom, nor how large anything is.
    let own = copier.submissions().await.unwrap();
    assert!(json(&own[0])["copy"]["cosine"].as_f64().unwrap() > 0.999_99);
    assert!(!own[0].evidence_json.contains(&of_bob.id));
    assert!(json(&own[0])["norm"].get("norm").is_none());
    // Of others, volunteers see the outcome only.
    let view = copier.round(&round).await.unwrap();
    assert!(view.contributions[0].evidence_json.is_empty());
    assert_eq!(view.contributions[0].norm, 0.0);
    assert!(!view.contributions[1].evidence_json.is_empty());
}

#[tokio::test]
async fn forged_stolen_and_altered_submissions_are_refused() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(2)).await.unwrap();
    let [bob, thief] = <[Member; 2]>::try_from(ready.volunteers(2).await.unwrap())
        .ok()
        .unwrap();
    let lease = bob.lease().await.unwrap();
    let other_lease = thief.lease().await.unwrap();
    let (adapter, other) = (honest(1), honest(2));
    bob.upload(&adapter.weights, &lease.id).await.unwrap();
    bob.upload(&other.weights, &lease.id).await.unwrap();
    let sound = bob.submission(&lease, &adapter);

    // Under the lease of another: as if there were no such lease, whoever signed.
    assert_eq!(refusal(thief.submit(&sound).await), ErrorReason::NotFound);
    let own = thief.submission(&lease, &adapter);
    assert_eq!(refusal(thief.submit(&own).await), ErrorReason::NotFound);

    // Each signed fact, changed behind the signature.
    let changes: [(&str, Change); 5] = [
        ("signature", |request| request.signature[5] ^= 1),
        ("no signature", |request| request.signature.clear()),
        ("config", |request| request.adapter_config.push(b'\n')),
        ("tokens", |request| {
            request.numbers.get_or_insert_default().tokens = 1_000_000;
        }),
        ("size", |request| {
            request.adapter.get_or_insert_default().size_bytes += 1;
        }),
    ];
    for (what, change) in changes {
        let mut altered = sound.clone();
        change(&mut altered);
        assert_eq!(
            refusal(bob.submit(&altered).await),
            ErrorReason::BadSignature,
            "{what}"
        );
    }
    let swapped = v1::SubmitAdapterRequest {
        adapter: Some(other.name().into()),
        ..sound.clone()
    };
    assert_eq!(
        refusal(bob.submit(&swapped).await),
        ErrorReason::BadSignature
    );

    // Signed with the nonce of another lease, or for another generation.
    let key = &bob.client.identity().key;
    let mut replayed = sound.clone();
    sign_submission(key, &other_lease.nonce, &mut replayed).unwrap();
    assert_eq!(
        refusal(bob.submit(&replayed).await),
        ErrorReason::BadSignature
    );
    let mut later = v1::SubmitAdapterRequest {
        generation: lease.generation + 1,
        ..sound.clone()
    };
    sign_submission(key, &lease.nonce, &mut later).unwrap();
    assert_eq!(refusal(bob.submit(&later).await), ErrorReason::LeaseLost);

    // Not one of them was counted, and the sound one still is.
    assert!(bob.submissions().await.unwrap().is_empty());
    bob.submit(&sound).await.unwrap();
    assert_eq!(bob.submissions().await.unwrap().len(), 1);
}

#[tokio::test]
async fn what_is_not_held_or_misnamed_is_not_taken() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(1)).await.unwrap();
    let bob = ready.cluster.volunteer("bob").await.unwrap();
    let lease = bob.lease().await.unwrap();
    let adapter = honest(1);
    let refused = bob.submit(&bob.submission(&lease, &adapter)).await;
    assert_eq!(refusal(refused), ErrorReason::BlobMissing);

    bob.upload(&adapter.weights, &lease.id).await.unwrap();
    let mut longer = bob.submission(&lease, &adapter);
    longer.adapter.as_mut().unwrap().size_bytes += 1;
    sign_submission(&bob.client.identity().key, &lease.nonce, &mut longer).unwrap();
    assert_eq!(refusal(bob.submit(&longer).await), ErrorReason::BlobMissing);

    let wide = Adapter {
        config: vec![b' '; 70_000],
        ..adapter
    };
    let refused = bob.submit(&bob.submission(&lease, &wide)).await;
    assert_eq!(refusal(refused), ErrorReason::InvalidArgument);
}

#[tokio::test]
async fn uploads_are_held_to_their_announcement_and_to_the_recipe() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(1)).await.unwrap();
    let bob = ready.cluster.volunteer("bob").await.unwrap();
    let lease = bob.lease().await.unwrap();
    let most = training(&lease).adapter_bytes_max;
    let bytes = honest(1).weights;
    let name = honest(1).name();

    let larger = BlobName {
        digest: Digest::of(b"any"),
        size_bytes: most + 1,
    };
    let refused = bob.upload_raw(larger, 0, &lease.id, &[]).await;
    assert_eq!(refusal(refused), ErrorReason::BlobTooLarge);
    // A hundred thousand tensors do not even begin to arrive.
    let refused = bob.upload(&vec![7; 30_000_000], &lease.id).await;
    assert_eq!(refusal(refused), ErrorReason::BlobTooLarge);

    let refused = bob
        .upload_raw(name, 0, &lease.id, &[&bytes[..], &b"and more"[..]])
        .await;
    assert_eq!(refusal(refused), ErrorReason::BlobTooLarge);
    let held = bob.committed(name).await.unwrap();
    assert_eq!(held, bytes.len() as u64);

    let wrong = BlobName {
        digest: Digest::of(b"something else"),
        ..name
    };
    let refused = bob.upload_raw(wrong, 0, &lease.id, &[&bytes]).await;
    assert_eq!(refusal(refused), ErrorReason::DigestMismatch);
    assert_eq!(bob.committed(wrong).await.unwrap(), 0);

    let refused = bob.upload_raw(wrong, 77, &lease.id, &[&bytes]).await;
    assert_eq!(refusal(refused), ErrorReason::WrongOffset);
    // After all that, the honest upload goes through.
    bob.hand_in(&lease, &honest(1)).await.unwrap();
}

#[tokio::test]
async fn a_repeated_submission_gets_the_same_answer_and_one_credit() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(2)).await.unwrap();
    let bob = ready.cluster.volunteer("bob").await.unwrap();
    let lease = bob.lease().await.unwrap();
    let adapter = honest(1);
    bob.upload(&adapter.weights, &lease.id).await.unwrap();
    let request = bob.submission(&lease, &adapter);
    let first = bob.submit(&request).await.unwrap();
    // The answer got lost: the same request, and the same work under a new request id.
    assert_eq!(bob.submit(&request).await.unwrap(), first);
    let again = bob.submission(&lease, &adapter);
    assert_ne!(again.request_id, request.request_id);
    assert_eq!(bob.submit(&again).await.unwrap(), first);

    // The receipt is the coordinator's word and names the work.
    let server_key = bob.client.identity().server_key.to_bytes();
    let receipt = first.receipt.clone().unwrap();
    let says = ReceiptStatement::verify(&receipt, &server_key).unwrap();
    assert_eq!(says.submission, first.submission_id);
    assert_eq!(
        (says.lease, says.worker.as_str()),
        (lease.id.clone(), bob.id())
    );
    assert_eq!(
        (says.adapter, says.shard),
        (adapter.name().digest, training(&lease).shard)
    );

    bob.open_audit(&lease, &adapter, &first).await.unwrap();
    ready.judge().await.unwrap();
    // And once more after the verdict, when nothing waits to be opened any more.
    let opened = v1::SubmitAdapterResponse {
        audit: None,
        ..first.clone()
    };
    assert_eq!(bob.submit(&request).await.unwrap(), opened);
    ready.judge().await.unwrap();
    let standing = bob.standing().await.unwrap();
    assert_eq!(
        (standing.accepted, standing.rejected, standing.pending),
        (1, 0, 0)
    );
    assert_eq!(standing.credit_tokens, 200);
    assert_eq!(bob.submissions().await.unwrap().len(), 1);

    // Another adapter under the same lease is not a repetition, nor is a reused request id.
    let other = honest(2);
    let second = bob.lease().await.unwrap();
    assert_ne!(second.id, lease.id);
    bob.upload(&other.weights, &second.id).await.unwrap();
    let changed = bob.submission(&lease, &other);
    assert_eq!(refusal(bob.submit(&changed).await), ErrorReason::LeaseLost);
    let mut reused = bob.submission(&second, &other);
    reused.request_id = request.request_id;
    assert_eq!(
        refusal(bob.submit(&reused).await),
        ErrorReason::RequestIdReused
    );
    reused.request_id = request_id();
    bob.submit(&reused).await.unwrap();
}

#[tokio::test]
async fn two_rejections_end_a_worker_s_part_in_a_round() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(4)).await.unwrap();
    let cheat = ready.cluster.volunteer("mallory").await.unwrap();
    for seed in [1, 2] {
        let lease = cheat.lease().await.unwrap();
        cheat
            .hand_in(&lease, &Sabotage::SignFlipped.adapter(seed))
            .await
            .unwrap();
        ready.judge().await.unwrap();
        assert_eq!(
            cheat.verdict().await.unwrap(),
            rejected(VerdictReason::NoGain)
        );
    }
    assert!(cheat.claim().await.unwrap().is_none());
    let bob = ready.cluster.volunteer("bob").await.unwrap();
    assert!(bob.claim().await.unwrap().is_some());
}

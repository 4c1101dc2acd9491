//! Scores are checked as strictly as adapters: exactly what was asked, signed, by who was asked.
use std::time::Duration;

use cairn_coordinator::caller::Role;
use cairn_proto::reason::ErrorReason;
use cairn_proto::v1;
use cairn_tests::adapters::honest;
use cairn_tests::cluster::Ready;
use cairn_tests::evaluator::Evaluator;
use cairn_tests::member::refusal;
use cairn_tests::tiny::round_file;

/// What is wrong with an answer.
type Change = fn(&mut Vec<v1::SetScores>);

#[tokio::test]
async fn scores_are_exactly_those_asked_for() {
    let ready = Ready::start().await.unwrap();
    let round = ready.maintainer.open_round(&round_file(1)).await.unwrap();
    let lease = ready.evaluator.member.lease().await.unwrap();
    let sound = ready.evaluator.answer(&lease).await.unwrap();
    let changes: [(&str, Change); 6] = [
        ("a set less", |sets| {
            sets.pop();
        }),
        ("a set more", |sets| {
            sets.push(v1::SetScores {
                dataset: "train".into(),
                ..Default::default()
            });
        }),
        ("a set twice", |sets| sets[1] = sets[0].clone()),
        ("a record less", |sets| {
            sets[0].nll.pop();
            sets[0].tokens.pop();
        }),
        ("losses without counts", |sets| sets[0].tokens.clear()),
        ("nothing scored", |sets| sets[0].tokens.fill(0)),
    ];
    for (what, change) in changes {
        let mut altered = sound.clone();
        change(&mut altered.sets);
        ready.evaluator.sign(&lease, &mut altered);
        let refused = ready.evaluator.submit(&altered).await;
        assert_eq!(refusal(refused), ErrorReason::InvalidArgument, "{what}");
    }
    let mut forged = sound.clone();
    forged.sets[0].nll[0] += 1.0;
    assert_eq!(
        refusal(ready.evaluator.submit(&forged).await),
        ErrorReason::BadSignature
    );
    // Another evaluator cannot answer for this one.
    let member = ready
        .cluster
        .member(Role::Evaluator, "frank")
        .await
        .unwrap();
    let frank = Evaluator::new(member, ready.base.path()).unwrap();
    let mut stolen = sound.clone();
    frank.sign(&lease, &mut stolen);
    assert_eq!(refusal(frank.submit(&stolen).await), ErrorReason::NotFound);
    // The sound answer, and again because its acknowledgement got lost.
    ready.evaluator.submit(&sound).await.unwrap();
    ready.evaluator.submit(&sound).await.unwrap();
    let view = ready.maintainer.round(&round).await.unwrap();
    assert!(view.round.unwrap().gate_loss_before.is_some());
}

#[tokio::test]
async fn two_evaluators_that_read_the_data_differently_are_noticed() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(2)).await.unwrap();
    assert!(ready.evaluator.step().await.unwrap());
    let bob = ready.cluster.volunteer("bob").await.unwrap();
    let lease = bob.lease().await.unwrap();
    bob.hand_in(&lease, &honest(1)).await.unwrap();
    ready.cluster.settle().await.unwrap();
    let lease = ready.evaluator.next_score().await.unwrap();
    let mut answer = ready.evaluator.answer(&lease).await.unwrap();
    answer.sets[0].tokens[3] += 1;
    ready.evaluator.sign(&lease, &mut answer);
    assert_eq!(
        refusal(ready.evaluator.submit(&answer).await),
        ErrorReason::InvalidArgument
    );
    ready.judge().await.unwrap();
    assert_eq!(bob.verdict().await.unwrap().0, v1::Verdict::Accepted);
}

#[tokio::test]
async fn an_evaluation_goes_to_another_when_its_evaluator_dies() {
    let ready = Ready::start().await.unwrap();
    let round = ready.maintainer.open_round(&round_file(1)).await.unwrap();
    let old = ready.evaluator.member.lease().await.unwrap();
    let late = ready.evaluator.answer(&old).await.unwrap();
    ready.cluster.advance(Duration::from_secs(601));
    ready.cluster.settle().await.unwrap();
    let member = ready
        .cluster
        .member(Role::Evaluator, "frank")
        .await
        .unwrap();
    let frank = Evaluator::new(member, ready.base.path()).unwrap();
    let new = frank.member.lease().await.unwrap();
    assert!(new.generation > old.generation);
    assert_eq!(
        refusal(ready.evaluator.submit(&late).await),
        ErrorReason::LeaseLost
    );
    let answer = frank.answer(&new).await.unwrap();
    frank.submit(&answer).await.unwrap();
    let view = ready.maintainer.round(&round).await.unwrap();
    assert!(view.round.unwrap().gate_loss_before.is_some());
}

#[tokio::test]
async fn an_adapter_whose_losses_are_no_numbers_is_rejected() {
    let ready = Ready::start().await.unwrap();
    ready.maintainer.open_round(&round_file(2)).await.unwrap();
    assert!(ready.evaluator.step().await.unwrap());
    let bob = ready.cluster.volunteer("bob").await.unwrap();
    let lease = bob.lease().await.unwrap();
    bob.hand_in(&lease, &honest(1)).await.unwrap();
    ready.cluster.settle().await.unwrap();
    let lease = ready.evaluator.next_score().await.unwrap();
    let mut answer = ready.evaluator.answer(&lease).await.unwrap();
    answer.sets[0].nll.fill(f32::NAN);
    ready.evaluator.sign(&lease, &mut answer);
    ready.evaluator.submit(&answer).await.unwrap();
    ready.judge().await.unwrap();
    let (verdict, reason) = bob.verdict().await.unwrap();
    assert_eq!(
        (verdict, reason.as_str()),
        (v1::Verdict::Rejected, "NO_GAIN")
    );
}

#[tokio::test]
async fn a_base_that_cannot_be_evaluated_fails_the_round() {
    let ready = Ready::start().await.unwrap();
    let round = ready.maintainer.open_round(&round_file(1)).await.unwrap();
    for _ in 0..5 {
        let lease = ready.evaluator.member.lease().await.unwrap();
        ready.evaluator.member.release(&lease, true).await.unwrap();
        ready.cluster.settle().await.unwrap();
    }
    let outcome = ready.outcome(&round).await.unwrap();
    assert_eq!(
        outcome,
        (v1::RoundState::Failed, "EVALUATION_FAILED".to_owned())
    );
}

use super::*;
use crate::domain::trust::tests::policy;

const SECRET: [u8; 32] = [7; 32];

fn file(seed: u32) -> File {
    File {
        digest: Digest::of(&seed.to_le_bytes()),
        size_bytes: u64::from(seed),
    }
}

/// States at these steps, each with its proof, and the root.
fn states(steps: &[u32]) -> (Vec<State>, Hash) {
    let files = |step: u32| (file(2 * step), file(2 * step + 1));
    let leaf = |step: u32| {
        let (factors, moments) = files(step);
        merkle::leaf_hash(&state_leaf(step, factors.digest, moments.digest))
    };
    let leaves: Vec<Hash> = steps.iter().map(|step| leaf(*step)).collect();
    let state = |(index, step): (u64, &u32)| State {
        step: *step,
        factors: files(*step).0,
        moments: files(*step).1,
        proof: merkle::inclusion_proof(&leaves, index).unwrap(),
    };
    let states = (0..).zip(steps).map(state).collect();
    (states, merkle::root(&leaves))
}

fn commitment(steps: u32, segments: u32) -> (Commitment, Vec<State>) {
    let boundaries = boundaries(steps, segments);
    let (states, root) = states(&boundaries);
    let commitment = Commitment {
        root,
        leaves: boundaries.len() as u32,
        last: states[states.len() - 1].clone(),
    };
    (commitment, states)
}

#[test]
fn boundaries_are_distinct_and_end_at_the_last_step() {
    assert_eq!(boundaries(10, 4), [0, 2, 5, 7, 10]);
    assert_eq!(boundaries(3, 10), [0, 1, 2, 3]);
    assert_eq!(boundaries(1, 1), [0, 1]);
    assert_eq!(boundaries(u32::MAX, 2), [0, u32::MAX / 2, u32::MAX]);
    assert_eq!(boundaries(0, 3), [0]);
}

#[test]
fn a_commitment_is_to_the_training_asked_for_and_to_the_adapter() {
    for (steps, segments) in [(1, 10), (3, 10), (40, 10), (7, 1)] {
        let (sound, _) = commitment(steps, segments);
        let adapter = Some(sound.last.factors);
        assert_eq!(sound.check(segments, None, adapter), Ok(()));
        assert_eq!(sound.check(segments, Some(steps), None), Ok(()));
        let length = sound.check(segments, Some(steps + 1), adapter);
        assert!(matches!(length, Err(BadState::Length { .. })));
        let other = sound.check(segments, None, Some(file(9_999)));
        assert_eq!(other, Err(BadState::NotTheAdapter));
        let more = Commitment {
            leaves: sound.leaves + 1,
            ..sound.clone()
        };
        assert!(matches!(
            more.check(segments, None, adapter),
            Err(BadState::Leaves { .. })
        ));
        let forged = Commitment {
            root: [1; 32],
            ..sound
        };
        assert_eq!(
            forged.check(segments, None, adapter),
            Err(BadState::Proof(steps))
        );
    }
    let (nothing, _) = commitment(0, 10);
    assert!(nothing.check(10, None, None).is_err());
}

#[test]
fn only_what_was_committed_to_opens_the_segment_that_was_drawn() {
    let (commitment, states) = commitment(40, 10);
    let (root, leaves) = (commitment.root, commitment.leaves);
    let cut = boundaries(40, 10);
    for segment in 0..10_u32 {
        let audit = Audit::new(segment, &cut, Timestamp(9)).unwrap();
        let (start, end) = (&states[segment as usize], &states[segment as usize + 1]);
        assert_eq!(audit.check(Some(start), end, &root, leaves), Ok(()));
        let without = audit.check(None, end, &root, leaves);
        assert_eq!(without.is_ok(), segment == 0);
        let swapped = audit.check(Some(end), start, &root, leaves);
        assert!(matches!(swapped, Err(BadState::Step { .. })));
        let mut forged = end.clone();
        forged.factors = file(5);
        assert_eq!(
            audit.check(Some(start), &forged, &root, leaves),
            Err(BadState::Proof(audit.last_step))
        );
    }
    assert_eq!(Audit::new(10, &cut, Timestamp(9)), None);
}

#[test]
fn the_draw_hits_as_often_as_said_and_every_segment_alike() {
    let ids: Vec<SubmissionId> = (0..8_000).map(|_| SubmissionId::new()).collect();
    let drawn: Vec<u32> = ids
        .iter()
        .filter_map(|id| draw(&SECRET, *id, 0.2, 10))
        .collect();
    // Four standard deviations: 1600 +- 143, 160 +- 51.
    assert!((1_457..1_743).contains(&drawn.len()), "{}", drawn.len());
    for segment in 0..10 {
        let count = drawn.iter().filter(|drawn| **drawn == segment).count();
        assert!((109..211).contains(&count), "{segment}: {count}");
    }
    assert!(ids.iter().all(|id| draw(&SECRET, *id, 1.0, 10).is_some()));
    assert!(ids.iter().all(|id| draw(&SECRET, *id, 0.0, 10).is_none()));
    assert!(ids.iter().all(|id| draw(&SECRET, *id, 1.0, 0).is_none()));
}

#[test]
fn the_draw_follows_from_secret_and_id_alone() {
    let ids: Vec<SubmissionId> = (0..200).map(|_| SubmissionId::new()).collect();
    let all = |secret: &[u8; 32]| -> Vec<Option<u32>> {
        ids.iter().map(|id| draw(secret, *id, 0.5, 10)).collect()
    };
    assert_eq!(all(&SECRET), all(&SECRET));
    assert_ne!(all(&SECRET), all(&[8; 32]));
}

fn replay(distance: f64, identical: bool, device: &str) -> Findings {
    Findings::Replay {
        distance,
        identical,
        device: device.to_owned(),
        seconds: 1.0,
    }
}

#[test]
fn an_audit_waits_then_passes_or_fails() {
    let policy = policy();
    let waiting = Audit::new(0, &[0, 4], Timestamp(100)).unwrap();
    assert_eq!(waiting.state(Timestamp(100)), AuditState::Waiting);
    assert_eq!(waiting.state(Timestamp(101)), AuditState::Unanswered);
    let opened = Audit {
        opened: Some(Opened {
            start: None,
            end: file(1),
            at_ms: 50,
        }),
        ..waiting
    };
    // Once opened it waits for an evaluator, however long.
    assert_eq!(opened.state(Timestamp(9_999)), AuditState::Opened);

    let after = |findings: &Findings, device: &str| {
        opened
            .clone()
            .replayed(findings, device, &policy)
            .state(Timestamp(60))
    };
    let passed = |state: &AuditState| matches!(state, AuditState::Passed { replayed: Some(_) });
    assert!(passed(&after(&replay(0.0, true, "cuda"), "flex")));
    assert!(passed(&after(&replay(0.04, false, "cuda"), "flex")));
    // On the pinned path there is no room for rounding.
    let pinned = after(&replay(0.04, false, PINNED_DEVICE), PINNED_DEVICE);
    assert!(matches!(
        pinned,
        AuditState::Failed {
            reason: VerdictReason::ReplayMismatch,
            replayed: Some(_),
            ..
        }
    ));
    assert!(passed(&after(&replay(1e-4, false, "flex"), "flex")));

    assert_eq!(
        opened.clone().impossible().state(Timestamp(60)),
        AuditState::Passed { replayed: None }
    );
    // What has ended does not end again.
    let first = opened.replayed(&replay(1.0, false, "cuda"), "cuda", &policy);
    assert_eq!(
        first
            .clone()
            .replayed(&replay(0.0, true, "cuda"), "cuda", &policy),
        first
    );
}

#[test]
fn an_audit_survives_json() {
    let audit = Audit {
        opened: Some(Opened {
            start: Some((file(1), file(2))),
            end: file(3),
            at_ms: 5,
        }),
        ended: Some(Ended::Replayed(Replayed {
            distance: 0.25,
            tolerance: 0.05,
            identical: false,
            device: "cuda".to_owned(),
            seconds: 1.5,
        })),
        ..Audit::new(1, &[0, 4, 8], Timestamp(1)).unwrap()
    };
    let json = serde_json::to_string(&audit).unwrap();
    assert_eq!(serde_json::from_str::<Audit>(&json).unwrap(), audit);
}

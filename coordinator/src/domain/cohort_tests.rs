use proptest::prelude::*;
use rand::SeedableRng;
use rand_chacha::ChaCha20Rng;

use super::*;
use crate::domain::verdict::tests::{normal, policy};

fn reason(ruling: &Ruling) -> Option<VerdictReason> {
    match ruling {
        Ruling::Reject(reason, text) => {
            assert!(!text.is_empty());
            Some(*reason)
        }
        Ruling::Pass | Ruling::Wait => None,
    }
}

/// Log-normal norms of an honest cohort.
fn honest_norms(random: &mut ChaCha20Rng, count: usize, sigma: f64) -> Vec<f64> {
    (0..count)
        .map(|_| (2.0 + sigma * normal(random)).exp())
        .collect()
}

#[test]
fn norms_are_judged_from_a_cohort_on() {
    let policy = policy();
    let few = [1.0, 50.0];
    assert_eq!(judge_norm(50.0, &few, false, &policy).1, Ruling::Pass);
    let cohort = [1.0, 1.1, 0.9, 1.05, 50.0];
    for odd in [50.0, 0.01] {
        let (facts, ruling) = judge_norm(odd, &cohort, false, &policy);
        assert_eq!(reason(&ruling), Some(VerdictReason::NormOutlier));
        assert_eq!(facts.z > 0.0, odd > 1.0);
    }
    assert_eq!(judge_norm(1.1, &cohort, false, &policy).1, Ruling::Pass);
}

#[test]
fn an_odd_norm_waits_only_while_more_may_come() {
    let policy = policy();
    let cohort = [1.0, 1.0, 1.0, 1.0, 1.0, 2.0];
    assert_eq!(judge_norm(2.0, &cohort, false, &policy).1, Ruling::Wait);
    assert_eq!(judge_norm(2.0, &cohort, true, &policy).1, Ruling::Pass);
}

#[test]
fn honest_norms_are_rejected_less_than_once_in_a_thousand() {
    let policy = policy();
    let mut random = ChaCha20Rng::seed_from_u64(11);
    let trials = 2_000;
    // From cohorts of equals to shards so different that every third norm is off by half.
    for sigma in [0.02, 0.1, 0.25, 0.4] {
        for count in [4, 5, 8, 16, 40] {
            let (mut held, mut rejected) = (0, 0);
            for _ in 0..trials {
                let cohort = honest_norms(&mut random, count, sigma);
                match judge_norm(cohort[0], &cohort, false, &policy).1 {
                    Ruling::Pass => {}
                    Ruling::Wait => held += 1,
                    Ruling::Reject(..) => rejected += 1,
                }
            }
            let share = |number: i32| f64::from(number) / f64::from(trials);
            let bar = if sigma > 0.25 { 0.004 } else { 0.001 };
            assert!(share(rejected) <= bar, "{rejected} at {sigma} of {count}");
            assert!(share(held) <= 0.03, "{held} held at {sigma} of {count}");
        }
    }
}

#[test]
fn a_norm_fifty_times_too_large_is_rejected_even_among_thirty_percent_of_them() {
    let policy = policy();
    let mut random = ChaCha20Rng::seed_from_u64(12);
    for count in [4, 5, 10, 20, 50] {
        for _ in 0..200 {
            let mut cohort = honest_norms(&mut random, count, 0.15);
            let cheats = (count * 3 / 10).max(1);
            for norm in &mut cohort[..cheats] {
                *norm *= 50.0;
            }
            let (facts, ruling) = judge_norm(cohort[0], &cohort, false, &policy);
            let found = reason(&ruling);
            assert_eq!(found, Some(VerdictReason::NormOutlier), "{facts:?}");
            assert_eq!(
                judge_norm(cohort[cheats], &cohort, true, &policy).1,
                Ruling::Pass
            );
        }
    }
}

/// A module's singular values, of this decay, times a size.
fn module(decay: f64, size: f64) -> Spectrum {
    Spectrum::of((0..8).map(|k| size * decay.powi(k)).collect())
}

fn honest_shape(random: &mut ChaCha20Rng) -> Shape {
    let modules: Vec<Spectrum> = (0..14)
        .map(|_| {
            let decay = (0.75 + 0.04 * normal(random)).clamp(0.1, 0.99);
            module(decay, (0.3 * normal(random)).exp())
        })
        .collect();
    Shape::of(&modules).unwrap()
}

#[test]
fn shapes_do_not_depend_on_size() {
    let modules = [module(0.5, 1.0), module(0.9, 2.0), module(0.7, 0.0)];
    let scaled = [module(0.5, 50.0), module(0.9, 100.0), module(0.7, 0.0)];
    let (one, other) = (Shape::of(&modules).unwrap(), Shape::of(&scaled).unwrap());
    for (x, y) in one.features().iter().zip(other.features()) {
        assert!((x.1 - y.1).abs() < 1e-9, "{x:?} {y:?}");
        assert!(x.1.is_finite());
    }
    assert_eq!(Shape::of(&[]), None);
    assert_eq!(Shape::of(&[module(0.7, 0.0)]), None);
}

#[test]
fn honest_shapes_pass_and_odd_ones_do_not() {
    let policy = policy();
    let mut random = ChaCha20Rng::seed_from_u64(13);
    let mut rejected = 0;
    for count in [4, 5, 8, 16] {
        for _ in 0..500 {
            let cohort: Vec<Shape> = (0..count).map(|_| honest_shape(&mut random)).collect();
            rejected += i32::from(judge_shape(cohort[0], &cohort, &policy).1 != Ruling::Pass);
        }
    }
    assert!(rejected <= 2, "{rejected} of 2,000");
    let mut cohort: Vec<Shape> = (0..8).map(|_| honest_shape(&mut random)).collect();
    // One direction instead of many.
    let thin: Vec<Spectrum> = (0..14).map(|_| module(1e-6, 1.0)).collect();
    // One module instead of all.
    let narrow: Vec<Spectrum> = (0..14)
        .map(|index| module(0.75, if index == 3 { 1.0 } else { 1e-5 }))
        .collect();
    for odd in [thin, narrow] {
        cohort[0] = Shape::of(&odd).unwrap();
        let (facts, ruling) = judge_shape(cohort[0], &cohort, &policy);
        assert_eq!(
            reason(&ruling),
            Some(VerdictReason::SpectralOutlier),
            "{facts:?}"
        );
        // Too few to say.
        assert_eq!(
            judge_shape(cohort[0], &cohort[..3], &policy).1,
            Ruling::Pass
        );
    }
}

#[test]
fn the_most_similar_earlier_delta_decides() {
    let policy = policy();
    let (near, far) = (SubmissionId::new(), SubmissionId::new());
    let earlier = |submission, cosine: f64| Earlier {
        submission,
        norm: 4.0,
        inner: 2.0 * 4.0 * cosine,
    };
    let (facts, ruling) = judge_copy(2.0, &[earlier(far, 0.2), earlier(near, 0.94)], &policy);
    assert_eq!((facts.of, ruling), (Some(near), Ruling::Pass));
    let (facts, ruling) = judge_copy(2.0, &[earlier(near, 0.96), earlier(far, -1.0)], &policy);
    assert_eq!(reason(&ruling), Some(VerdictReason::CopyOfAnother));
    assert!((facts.cosine - 0.96).abs() < 1e-12 && facts.compared == 2);
    assert_eq!(judge_copy(2.0, &[], &policy).0.of, None);
    assert_eq!(
        judge_copy(2.0, &[earlier(far, -1.0)], &policy).1,
        Ruling::Pass
    );
}

#[test]
fn what_points_away_from_the_guide_is_rejected() {
    let policy = Policy {
        guide_cosine: 0.1,
        ..policy()
    };
    assert_eq!(judge_guide(0.1, &policy).1, Ruling::Pass);
    let (_, ruling) = judge_guide(0.05, &policy);
    assert_eq!(reason(&ruling), Some(VerdictReason::AgainstGuide));
}

#[test]
fn foreign_shards_are_drawn_evenly_and_by_the_key() {
    let mut counts = [0; 5];
    for _ in 0..4_000 {
        let drawn = foreign_shard(&[7; 32], SubmissionId::new(), 2, 5).unwrap();
        counts[drawn as usize] += 1;
    }
    assert_eq!(counts[2], 0);
    assert!(
        counts
            .iter()
            .all(|count| *count == 0 || (850..1_150).contains(count)),
        "{counts:?}"
    );
    let id = SubmissionId::new();
    let drawn = |key: u8| foreign_shard(&[key; 32], id, 0, 1_000);
    assert_eq!(drawn(1), drawn(1));
    assert!((2..9).any(|key| drawn(key) != drawn(1)));
    assert_eq!(foreign_shard(&[7; 32], id, 0, 1), None);
}

proptest! {
    #[test]
    fn a_score_is_a_number_and_does_not_depend_on_where_or_in_which_order(
        cohort in prop::collection::vec(-50.0..50.0_f64, 1..30), shift in -9.0..9.0_f64
    ) {
        let z = robust_z(cohort[0], &cohort, 0.25).unwrap();
        prop_assert!(z.is_finite());
        let mut moved: Vec<f64> = cohort.iter().map(|x| x + shift).collect();
        let value = moved[0];
        moved.reverse();
        let again = robust_z(value, &moved, 0.25).unwrap();
        prop_assert!((z - again).abs() < 1e-6 * (1.0 + z.abs()));
        prop_assert!(robust_z(f64::NAN, &cohort, 0.25).unwrap() > 1e5);
        prop_assert!(robust_z(f64::NEG_INFINITY, &cohort, 0.25).unwrap() < -1e5);
        prop_assert_eq!(robust_z(0.0, &[f64::NAN], 0.25), None);
    }
}

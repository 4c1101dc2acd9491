use proptest::prelude::*;

use super::*;
use crate::testing::{adapter, dense, pair};

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(x, y)| x * y).sum()
}

fn close(found: f64, expected: f64, size: f64) -> bool {
    (found - expected).abs() <= 1e-9 * size.max(1e-300)
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn equals_dense_float64(
        rank1 in 1_usize..6, rank2 in 1_usize..6, out in 1_usize..9, inn in 1_usize..9,
        scale1 in -3.0_f64..3.0, scale2 in 0.01_f64..3.0, seed in 0_u64..1000,
    ) {
        let x = pair("m", rank1, [out, inn], scale1, seed);
        let y = pair("m", rank2, [out, inn], scale2, seed + 7);
        let (dense_x, dense_y) = (dense(&x), dense(&y));
        let size = (dot(&dense_x, &dense_x) * dot(&dense_y, &dense_y)).sqrt();
        prop_assert!(close(inner(&x, &y), dot(&dense_x, &dense_y), size + 1e-3));
        prop_assert!(close(pair_norm(&x), dot(&dense_x, &dense_x).sqrt(), pair_norm(&x) + 1e-3));
        prop_assert_eq!(inner(&x, &y).to_bits(), inner(&x, &y).to_bits());
    }

    #[test]
    fn a_new_gauge_changes_nothing(seed in 0_u64..1000, power in -20_i32..20) {
        // Powers of two are exact: the same delta, factors of wildly different norms.
        let x = pair("m", 3, [6, 5], 1.5, seed);
        let factor = 2.0_f32.powi(power);
        let mut gauged = x.clone();
        gauged.a.iter_mut().for_each(|a| *a *= factor);
        gauged.b.iter_mut().for_each(|b| *b /= factor);
        let other = pair("m", 2, [6, 5], 1.0, seed + 1);
        prop_assert!(close(pair_norm(&gauged), pair_norm(&x), pair_norm(&x)));
        prop_assert!(close(inner(&gauged, &other), inner(&x, &other), pair_norm(&x) * pair_norm(&other)));
    }

    #[test]
    fn whole_adapters_equal_dense_float64(
        ranks in prop::collection::vec(1_usize..5, 5), alpha in 0.5_f64..8.0, tau in 0.01_f64..5.0,
        seed in 0_u64..1000,
    ) {
        // One adapter lacks the last module: there its delta is zero.
        let shapes = [("l.a", [4, 3]), ("l.b", [2, 6]), ("l.c", [5, 1])];
        let make = |ranks: &[usize], seed: u64| -> Vec<Pair> {
            shapes.iter().zip(ranks).zip(seed..)
                .map(|(((module, shape), rank), seed)| pair(module, *rank, *shape, alpha / *rank as f64, seed))
                .collect()
        };
        let (pairs_x, pairs_y) = (make(&ranks[..3], seed), make(&ranks[3..], seed + 50));
        let flat = |pairs: &[Pair]| -> Vec<f64> {
            let mut all: Vec<f64> = pairs.iter().flat_map(dense).collect();
            all.resize(4 * 3 + 2 * 6 + 5, 0.0);
            all
        };
        let (dense_x, dense_y) = (flat(&pairs_x), flat(&pairs_y));
        let dir = tempfile::tempdir().unwrap();
        let x = adapter(&dir.path().join("x"), &pairs_x, 1, alpha);
        let y = adapter(&dir.path().join("y"), &pairs_y, 1, alpha);
        let (norm_x, norm_y) = (dot(&dense_x, &dense_x).sqrt(), dot(&dense_y, &dense_y).sqrt());
        prop_assert!(close(norm(&x).unwrap(), norm_x, norm_x + 1e-3));
        let product = dot(&dense_x, &dense_y);
        prop_assert!(close(inner_adapters(&x, &y).unwrap(), product, norm_x * norm_y + 1e-3));
        prop_assert!(close(cosine(&x, &y).unwrap(), product / norm_x / norm_y, 1.0));
        prop_assert_eq!(cosine(&x, &y).unwrap().to_bits(), cosine(&x, &y).unwrap().to_bits());

        let factor = clip_factor(norm(&x).unwrap(), tau);
        let clipped: Vec<f64> = dense_x.iter().map(|value| factor * value).collect();
        let length = dot(&clipped, &clipped).sqrt();
        prop_assert!(length <= tau * (1.0 + 1e-9));
        prop_assert!(close(length, norm_x.min(tau), norm_x + 1e-3), "no more than needed");
    }

    #[test]
    fn a_replay_is_as_far_as_in_dense_float64(
        ranks in prop::collection::vec(1_usize..5, 3), noise in 0.0_f32..0.5, seed in 0_u64..1000,
    ) {
        let states = |rank: usize, seed: u64| [pair("a", rank, [4, 3], 1.0, seed), pair("b", rank, [2, 6], 0.5, seed + 1)];
        let (start, end) = (states(ranks[0], seed), states(ranks[1], seed + 10));
        let mut again = end.clone();
        for (value, drift) in again[1].a.iter_mut().zip(crate::testing::numbers(99, seed + 20)) {
            *value += noise * drift;
        }
        let apart = |x: &[Pair], y: &[Pair]| -> f64 {
            x.iter().zip(y)
                .flat_map(|(x, y)| dense(x).into_iter().zip(dense(y)).map(|(x, y)| (x - y).powi(2)))
                .sum::<f64>().sqrt()
        };
        let expected = apart(&end, &again) / apart(&end, &start);
        // A difference of squares: half the digits are left.
        prop_assert!((moved(&start, &end, &again) - expected).abs() < 1e-6 * (1.0 + expected));
        prop_assert_eq!(moved(&start, &end, &end), 0.0);
        // Another gauge of the replay is the same replay.
        for pair in &mut again {
            pair.a.iter_mut().for_each(|value| *value *= 4.0);
            pair.b.iter_mut().for_each(|value| *value /= 4.0);
        }
        prop_assert!((moved(&start, &end, &again) - expected).abs() < 1e-6 * (1.0 + expected));
    }

    #[test]
    fn medians_are_those_of_a_sorted_list(mut values in prop::collection::vec(-1e3_f64..1e3, 1..40)) {
        let middle = median(&values).unwrap();
        let spread = mad(&values).unwrap();
        let below = values.iter().filter(|value| **value < middle).count();
        let above = values.iter().filter(|value| **value > middle).count();
        prop_assert!(2 * below <= values.len() && 2 * above <= values.len());
        let near = values.iter().filter(|value| (**value - middle).abs() <= spread * (1.0 + 1e-12)).count();
        prop_assert!(2 * near >= values.len());
        values.reverse();
        prop_assert_eq!(median(&values), Some(middle));
    }
}

#[test]
fn whole_adapters_add_modules_up() {
    let dir = tempfile::tempdir().unwrap();
    let (q, k, other_q, v) = (
        pair("l.q", 2, [4, 3], 2.0, 1),
        pair("l.k", 2, [5, 3], 2.0, 2),
        pair("l.q", 3, [4, 3], 1.0, 3),
        pair("l.v", 3, [4, 3], 1.0, 4),
    );
    let x = adapter(&dir.path().join("x"), &[q.clone(), k.clone()], 2, 4.0);
    let y = adapter(&dir.path().join("y"), &[other_q.clone(), v.clone()], 3, 3.0);
    let (norm_x, norm_y) = (
        pair_norm(&q).hypot(pair_norm(&k)),
        pair_norm(&other_q).hypot(pair_norm(&v)),
    );
    assert!(close(norm(&x).unwrap(), norm_x, norm_x));
    assert!(close(
        inner_adapters(&x, &y).unwrap(),
        inner(&q, &other_q),
        norm_x * norm_y
    ));
    assert!(close(
        inner_adapters(&x, &y).unwrap(),
        inner_adapters(&y, &x).unwrap(),
        norm_x * norm_y
    ));
    assert!(close(
        cosine(&x, &y).unwrap(),
        inner(&q, &other_q) / norm_x / norm_y,
        1.0
    ));
    assert!((cosine(&x, &x).unwrap() - 1.0).abs() < 1e-12);
    let names: Vec<String> = module_norms(&x)
        .unwrap()
        .into_iter()
        .map(|(name, _)| name)
        .collect();
    assert_eq!(names, ["l.k", "l.q"]);
    let other_shape = adapter(
        &dir.path().join("z"),
        &[pair("l.q", 2, [3, 4], 1.0, 1)],
        2,
        2.0,
    );
    assert!(matches!(
        inner_adapters(&x, &other_shape),
        Err(AdapterError::Mismatch { .. })
    ));
    assert!(inner(&q, &k).is_nan());
}

#[test]
fn clipping_only_shrinks() {
    assert_eq!(clip_factor(4.0, 2.0), 0.5);
    assert_eq!(clip_factor(1.0, 2.0), 1.0);
    assert_eq!(clip_factor(0.0, 0.0), 1.0);
    assert_eq!(cosine_of(1.0, 0.0, 1.0), 0.0);
}

#[test]
fn medians() {
    assert_eq!(median(&[]), None);
    assert_eq!(median(&[3.0]), Some(3.0));
    assert_eq!(median(&[9.0, 1.0, 2.0]), Some(2.0));
    assert_eq!(median(&[4.0, 1.0, 2.0, 3.0]), Some(2.5));
    assert_eq!(mad(&[1.0, 1.0, 2.0, 2.0, 4.0]), Some(1.0));
}

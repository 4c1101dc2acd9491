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

#[test]
fn outliers_are_odd_in_both_directions() {
    let cohort = [1.0, 1.1, 0.9, 1.2, 0.8, 50.0];
    for honest in &cohort[..5] {
        assert!(robust_log_z(*honest, &cohort).unwrap().abs() < 2.0);
    }
    assert!(robust_log_z(50.0, &cohort).unwrap() > 6.0);
    assert!(robust_log_z(0.02, &cohort).unwrap() < -6.0);
    assert_eq!(robust_log_z(f64::NAN, &cohort), Some(f64::INFINITY));
    assert_eq!(robust_log_z(0.0, &cohort), Some(f64::NEG_INFINITY));
    assert_eq!(robust_log_z(1.0, &[]), None);
    assert_eq!(robust_log_z(1.0, &[f64::NAN, 0.0]), None);
    // Equal norms have no spread; a fifth more is still no outlier.
    assert!(robust_log_z(1.2, &[1.0; 8]).unwrap() < 3.5);
    assert!(robust_log_z(3.0, &[1.0; 8]).unwrap() > 6.0);
}

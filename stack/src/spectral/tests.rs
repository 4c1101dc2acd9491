use proptest::prelude::*;

use super::*;
use crate::algebra::pair_norm;
use crate::testing::{adapter, dense, pair};

fn dense_sum(terms: &[(Pair, f64)]) -> Vec<f64> {
    let mut sum = vec![0.0; terms[0].0.out_features * terms[0].0.in_features];
    for (pair, weight) in terms {
        sum.iter_mut()
            .zip(dense(pair))
            .for_each(|(sum, value)| *sum += weight * value);
    }
    sum
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// Largest singular value by power iteration on the dense delta: another way altogether.
fn largest(dense: &[f64], out: usize, inn: usize) -> f64 {
    let mut x: Vec<f64> = (0..inn).map(|i| 1.0 + i as f64 * 0.37).collect();
    let mut value = 0.0;
    for _ in 0..3000 {
        let y: Vec<f64> = (0..out)
            .map(|r| (0..inn).map(|c| dense[r * inn + c] * x[c]).sum())
            .collect();
        x = (0..inn)
            .map(|c| (0..out).map(|r| dense[r * inn + c] * y[r]).sum())
            .collect();
        let length = norm(&x);
        if length == 0.0 {
            return 0.0;
        }
        for value in &mut x {
            *value /= length;
        }
        value = length.sqrt();
    }
    value
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 32, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn singular_values_are_the_dense_ones(
        out in 1_usize..9, inn in 1_usize..9, r1 in 1_usize..5, r2 in 1_usize..7,
        w1 in -2.0_f64..2.0, w2 in 0.1_f64..2.0, seed in 0_u64..1000,
    ) {
        let terms = [(pair("m", r1, [out, inn], 1.5, seed), w1), (pair("m", r2, [out, inn], 0.5, seed + 9), w2)];
        let whole = dense_sum(&terms);
        let found = spectrum(&[(&terms[0].0, w1), (&terms[1].0, w2)]).unwrap();
        // The factors are rounded to f32 when they are put side by side.
        prop_assert!((found.norm - norm(&whole)).abs() <= 1e-5 * (1.0 + norm(&whole)));
        prop_assert!((found.singular[0] - largest(&whole, out, inn)).abs() <= 1e-3 * (1.0 + found.norm));
        prop_assert!(found.singular.is_sorted_by(|one, two| one >= two));
        let most = out.min(inn).min(r1 + r2) as f64;
        prop_assert!(found.effective_rank <= most + 1e-6);
    }

    #[test]
    fn the_stated_error_of_a_compression_is_the_dense_one(
        out in 2_usize..9, inn in 2_usize..9, rank in 1_usize..6, seed in 0_u64..1000,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let pairs = [pair("l.q", 2, [out, inn], 1.0, seed), pair("l.q", 3, [out, inn], 1.0, seed + 5)];
        let one = adapter(&dir.path().join("1"), &pairs[..1], 2, 2.0);
        let two = adapter(&dir.path().join("2"), &pairs[1..], 3, 3.0);
        let terms = [(&one, 0.7), (&two, 1.3)];
        let to = dir.path().join("small");
        let report = compress(&terms, rank, &to, None, None).unwrap();
        let small = AdapterFile::open(&to).unwrap().pair(0).unwrap();
        let whole = dense_sum(&[(pairs[0].clone(), 0.7), (pairs[1].clone(), 1.3)]);
        let apart: Vec<f64> = whole.iter().zip(dense(&small)).map(|(x, y)| x - y).collect();
        let expected = norm(&apart) / norm(&whole);
        prop_assert!((report.relative_error - expected).abs() < 1e-4, "{} {expected}", report.relative_error);
        prop_assert_eq!(small.rank, rank);
        if rank >= out.min(inn).min(5) {
            prop_assert!(report.relative_error < 1e-5);
        }
    }

    #[test]
    fn a_new_gauge_changes_no_singular_value(seed in 0_u64..1000, power in -12_i32..12) {
        let x = pair("m", 3, [6, 5], 1.0, seed);
        let mut gauged = x.clone();
        let factor = 2.0_f32.powi(power);
        gauged.a.iter_mut().for_each(|a| *a *= factor);
        gauged.b.iter_mut().for_each(|b| *b /= factor);
        let (one, two) = (spectrum(&[(&x, 1.0)]).unwrap(), spectrum(&[(&gauged, 1.0)]).unwrap());
        for (one, two) in one.singular.iter().zip(&two.singular) {
            prop_assert!((one - two).abs() < 1e-9 * (1.0 + one));
        }
        prop_assert!((one.norm - pair_norm(&x)).abs() < 1e-9 * (1.0 + one.norm));
    }
}

#[test]
fn effective_rank_counts_equal_directions() {
    assert!((Spectrum::of(vec![2.0; 5]).effective_rank - 5.0).abs() < 1e-12);
    assert!((Spectrum::of(vec![1.0, 0.0, 0.0]).effective_rank - 1.0).abs() < 1e-12);
    let nothing = Spectrum::of(vec![0.0; 3]);
    assert_eq!((nothing.effective_rank, nothing.norm), (0.0, 0.0));
    assert_eq!(Spectrum::of(Vec::new()).effective_rank, 0.0);
}

#[test]
fn more_rank_than_is_measured_is_said() {
    let wide = pair("m", SPECTRUM_RANK_MAX + 1, [2, 2], 1.0, 1);
    assert!(matches!(
        spectrum(&[(&wide, 1.0)]),
        Err(AdapterError::Mismatch { .. })
    ));
    assert!(spectrum(&[]).is_err());
}

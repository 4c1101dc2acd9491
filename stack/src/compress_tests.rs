use proptest::prelude::*;

use super::*;
use crate::testing::{adapter, dense, pair};

fn sum(terms: &[(&Pair, f64)]) -> Vec<f64> {
    let (first, _) = terms[0];
    terms.iter().fold(
        vec![0.0; first.out_features * first.in_features],
        |mut total, (pair, weight)| {
            total
                .iter_mut()
                .zip(dense(pair))
                .for_each(|(total, value)| *total += weight * value);
            total
        },
    )
}

fn assert_close(found: &[f64], expected: &[f64]) {
    let size = expected
        .iter()
        .fold(0.0_f64, |max, value| max.max(value.abs()));
    for (found, expected) in found.iter().zip(expected) {
        assert!(
            (found - expected).abs() <= 1e-6 * size,
            "{found} is not {expected}"
        );
    }
}

#[test]
fn concatenation_is_the_weighted_sum() {
    let (x, y, z) = (
        pair("m", 1, [5, 4], 2.0, 1),
        pair("m", 3, [5, 4], 0.3, 2),
        pair("m", 2, [5, 4], 1.0, 3),
    );
    let terms = [(&x, 0.75), (&y, -1.5), (&z, 1.0)];
    let joined = concat_pairs(&terms).unwrap();
    assert_eq!((joined.rank, joined.scale), (6, 1.0));
    assert_close(&dense(&joined), &sum(&terms));
    assert!(matches!(concat_pairs(&[]), Err(AdapterError::Empty)));
    assert!(matches!(
        concat_pairs(&[(&x, f64::NAN)]),
        Err(AdapterError::Weight(_))
    ));
    let other = pair("m", 1, [4, 5], 1.0, 1);
    assert!(matches!(
        concat_pairs(&[(&x, 1.0), (&other, 1.0)]),
        Err(AdapterError::Mismatch { .. })
    ));
}

#[test]
fn adapters_with_other_modules_and_ranks_combine() {
    let dir = tempfile::tempdir().unwrap();
    let (q1, k1, q2) = (
        pair("a.0.q", 2, [4, 3], 2.0, 1),
        pair("a.0.k", 2, [5, 3], 2.0, 2),
        pair("a.0.q", 3, [4, 3], 1.0, 3),
    );
    let x = adapter(&dir.path().join("x"), &[q1.clone(), k1.clone()], 2, 4.0);
    let y = adapter(&dir.path().join("y"), std::slice::from_ref(&q2), 3, 3.0);
    let out = dir.path().join("out");
    concat(
        &[(&x, 0.5), (&y, 2.0), (&x, 0.0)],
        &out,
        Some("org/base"),
        Some("main"),
    )
    .unwrap();
    let joined = AdapterFile::open(&out).unwrap();
    assert_eq!((joined.config().rank, joined.config().alpha), (5, 5.0));
    assert_eq!(joined.config().base_model.as_deref(), Some("org/base"));
    let q = joined.pair(joined.find("a.0.q").unwrap()).unwrap();
    let k = joined.pair(joined.find("a.0.k").unwrap()).unwrap();
    assert_eq!((q.rank, q.scale, k.rank, k.scale), (5, 1.0, 2, 1.0));
    assert_close(&dense(&q), &sum(&[(&q1, 0.5), (&q2, 2.0)]));
    assert_close(&dense(&k), &sum(&[(&k1, 0.5)]));
    assert!(matches!(
        concat(&[(&x, 0.0)], &out, None, None),
        Err(AdapterError::Empty)
    ));
    assert!(matches!(
        concat(&[(&x, f64::INFINITY)], &out, None, None),
        Err(AdapterError::Weight(_))
    ));
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn concatenation_rounds_each_entry_of_b_once_and_nothing_else(
        terms in prop::collection::vec((1_usize..5, -3.0_f64..3.0, 0.01_f64..4.0), 1..6),
        out in 1_usize..7, inn in 1_usize..7, seed in 0_u64..1000,
    ) {
        let pairs: Vec<(Pair, f64)> = terms.iter().zip(seed..)
            .map(|((rank, weight, scale), seed)| (pair("m", *rank, [out, inn], *scale, seed), *weight))
            .collect();
        let given: Vec<(&Pair, f64)> = pairs.iter().map(|(pair, weight)| (pair, *weight)).collect();
        let joined = concat_pairs(&given).unwrap();
        let mut first = 0;
        for (pair, weight) in &pairs {
            let rows = first * inn..(first + pair.rank) * inn;
            prop_assert_eq!(&joined.a[rows], &pair.a[..], "A is taken over as it is");
            for row in 0..out {
                for k in 0..pair.rank {
                    let exact = weight * pair.scale * f64::from(pair.b[row * pair.rank + k]);
                    let found = joined.b[row * joined.rank + first + k];
                    prop_assert_eq!(found.to_bits(), (exact as f32).to_bits());
                }
            }
            first += pair.rank;
        }
        prop_assert_eq!((joined.rank, joined.scale), (first, 1.0));
        let whole = sum(&given);
        let size: f64 = pairs.iter().map(|(pair, weight)| weight.abs() * crate::algebra::pair_norm(pair)).sum();
        for (found, expected) in dense(&joined).iter().zip(&whole) {
            prop_assert!((found - expected).abs() <= 1e-6 * size);
        }
    }
}

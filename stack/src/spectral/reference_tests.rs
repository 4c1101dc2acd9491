//! Against a reference that shares nothing with the code: eigenvalues of the dense `D^T D`, by
//! two-sided Jacobi rotations (Golub and Van Loan, section 8.5), in f64.

use std::collections::BTreeSet;

use proptest::prelude::*;

use super::*;
use crate::testing::{adapter, dense, numbers, pair};

/// Singular values of a dense `[out, inn]` matrix, descending.
fn reference(delta: &[f64], inn: usize) -> Vec<f64> {
    let mut gram = vec![0.0; inn * inn];
    for row in delta.chunks_exact(inn) {
        for i in 0..inn {
            for j in 0..inn {
                gram[i * inn + j] += row[i] * row[j];
            }
        }
    }
    for _ in 0..50 {
        for p in 0..inn {
            for q in p + 1..inn {
                rotate(&mut gram, inn, p, q);
            }
        }
    }
    let diagonal = (0..inn).map(|i| gram[i * inn + i].max(0.0).sqrt());
    let mut values: Vec<f64> = diagonal.collect();
    values.sort_by(|one, two| two.total_cmp(one));
    values
}

/// Makes `gram[p, q]` zero.
fn rotate(gram: &mut [f64], size: usize, p: usize, q: usize) {
    let off = gram[p * size + q];
    if off == 0.0 {
        return;
    }
    let angle = 0.5 * (2.0 * off).atan2(gram[p * size + p] - gram[q * size + q]);
    let (sine, cosine) = angle.sin_cos();
    for k in 0..size {
        let (x, y) = (gram[k * size + p], gram[k * size + q]);
        gram[k * size + p] = cosine * x + sine * y;
        gram[k * size + q] = cosine * y - sine * x;
    }
    for k in 0..size {
        let (x, y) = (gram[p * size + k], gram[q * size + k]);
        gram[p * size + k] = cosine * x + sine * y;
        gram[q * size + k] = cosine * y - sine * x;
    }
}

fn norm(values: &[f64]) -> f64 {
    values.iter().map(|value| value * value).sum::<f64>().sqrt()
}

/// The weighted sum of one module's deltas, dense, and its columns.
fn whole(terms: &[(&AdapterFile, f64)], module: &str) -> (Vec<f64>, usize) {
    let mut sum = Vec::new();
    let mut inn = 0;
    for (adapter, weight) in terms {
        if let Some(place) = adapter.find(module) {
            let pair = adapter.pair(place).unwrap();
            inn = pair.in_features;
            sum.resize(pair.out_features * inn, 0.0);
            for (sum, value) in sum.iter_mut().zip(dense(&pair)) {
                *sum += weight * value;
            }
        }
    }
    (sum, inn)
}

fn modules(terms: &[(&AdapterFile, f64)]) -> Vec<String> {
    let names = terms.iter().flat_map(|(adapter, _)| adapter.modules());
    let named: BTreeSet<&str> = names.map(|info| info.module.as_str()).collect();
    named.into_iter().map(str::to_owned).collect()
}

/// Two adapters that share one of their modules, of different ranks.
fn two(dir: &Path, ranks: [usize; 2], sizes: [usize; 3], seed: u64) -> (AdapterFile, AdapterFile) {
    let [x, y, z] = sizes;
    let [r, s] = ranks;
    let scale = 1.5;
    let one = [
        pair("l.0.k", r, [x, y], scale, seed),
        pair("l.0.q", r, [z, x], scale, seed + 1),
    ];
    let two = [
        pair("l.0.q", s, [z, x], 0.5, seed + 2),
        pair("l.1.v", s, [y, z], 0.5, seed + 3),
    ];
    (
        adapter(&dir.join("one"), &one, r, scale * r as f64),
        adapter(&dir.join("two"), &two, s, 0.5 * s as f64),
    )
}

/// Norms of a module's terms, summed: the scale of what rounding factors to f32 can do, however much
/// of it cancels in their sum.
fn size(terms: &[(&AdapterFile, f64)], module: &str) -> f64 {
    terms
        .iter()
        .filter(|(adapter, _)| adapter.find(module).is_some())
        .map(|term| norm(&whole(std::slice::from_ref(term), module).0))
        .sum()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_singular_value_of_a_stack_is_the_references(
        r in 1_usize..5, s in 1_usize..6, x in 1_usize..8, y in 1_usize..8, z in 1_usize..8,
        w in -2.0_f64..2.0, seed in 0_u64..1000,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = two(dir.path(), [r, s], [x, y, z], seed);
        let terms = [(&one, w), (&two, 0.8)];
        let found = stack_spectrum(&terms).unwrap();
        let names: Vec<String> = found.iter().map(|(name, _)| name.clone()).collect();
        prop_assert_eq!(&names, &modules(&terms));
        for (module, spectrum) in found {
            let (delta, inn) = whole(&terms, &module);
            let expected = reference(&delta, inn);
            let largest = size(&terms, &module).max(1e-6);
            for (place, value) in spectrum.singular.iter().enumerate() {
                let expected = expected.get(place).copied().unwrap_or(0.0);
                prop_assert!((value - expected).abs() <= 2e-6 * largest, "{module} {place}: {value} {expected}");
            }
            // None that the reference has is missing.
            let rest = expected.iter().skip(spectrum.singular.len());
            prop_assert!(rest.fold(0.0_f64, |max, value| max.max(*value)) <= 2e-6 * largest);
            prop_assert!((spectrum.norm - norm(&delta)).abs() <= 1e-6 * largest);
        }
    }

    #[test]
    fn a_compression_states_its_error_and_no_other_of_its_rank_is_better(
        r in 1_usize..5, s in 1_usize..6, x in 1_usize..8, y in 1_usize..8, z in 1_usize..8,
        w in 0.2_f64..2.0, rank in 1_usize..9, seed in 0_u64..1000,
    ) {
        let dir = tempfile::tempdir().unwrap();
        let (one, two) = two(dir.path(), [r, s], [x, y, z], seed);
        let terms = [(&one, w), (&two, -0.8)];
        let to = dir.path().join("small");
        let report = compress(&terms, rank, &to, None, None).unwrap();
        let small = AdapterFile::open(&to).unwrap();
        prop_assert_eq!((small.config().rank, small.config().alpha), (rank, rank as f64));
        let (mut lost, mut least, mut all, mut sizes) = (0.0_f64, 0.0_f64, 0.0_f64, 0.0);
        prop_assert_eq!(report.modules.len(), modules(&terms).len());
        for (module, stated) in &report.modules {
            let (delta, inn) = whole(&terms, module);
            let pair = small.pair(small.find(module).unwrap()).unwrap();
            prop_assert_eq!((pair.rank, pair.scale), (rank, 1.0));
            let apart: Vec<f64> = delta.iter().zip(dense(&pair)).map(|(x, y)| x - y).collect();
            let tail: Vec<f64> = reference(&delta, inn).into_iter().skip(rank).collect();
            let norm_whole = norm(&delta);
            let rounding = 2e-6 * size(&terms, module);
            prop_assert!((stated * norm_whole - norm(&apart)).abs() < rounding, "{module}: {stated}");
            prop_assert!((stated * norm_whole - norm(&tail)).abs() < rounding, "{module}: {stated}");
            lost += norm(&apart).powi(2);
            least += norm(&tail).powi(2);
            all += norm_whole * norm_whole;
            sizes += size(&terms, module);
        }
        let (lost, least, stated) = (lost.sqrt(), least.sqrt(), report.relative_error * all.sqrt());
        prop_assert!((stated - lost).abs() < 2e-6 * sizes);
        prop_assert!((stated - least).abs() < 2e-6 * sizes);
    }

    #[test]
    fn orthogonal_factors_give_the_matrix_back(
        rows in 1_usize..8, columns in 1_usize..8, known in 0_usize..8, seed in 0_u64..1000,
    ) {
        // Of rank `known` or full, whichever is less.
        let (left, right) = (numbers(rows * known, seed), numbers(known * columns, seed + 1));
        let entry = |row: usize, column: usize| -> f64 {
            (0..known)
                .map(|k| f64::from(left[row * known + k]) * f64::from(right[k * columns + column]))
                .sum()
        };
        let matrix = || Matrix::from_fn(rows, columns, entry);
        let small = rows.min(columns);
        let near = |found: &Matrix, expected: &dyn Fn(usize, usize) -> f64, shape: (usize, usize)| {
            (0..shape.0).all(|i| (0..shape.1).all(|j| (found.get(i, j) - expected(i, j)).abs() < 1e-12))
        };
        let unit = |i: usize, j: usize| f64::from(u8::from(i == j));
        let transposed = |m: &Matrix, rows: usize, columns: usize| Matrix::from_fn(columns, rows, |r, c| m.get(c, r));

        let (q, r) = qr(matrix());
        prop_assert!(near(&q.times(&r), &entry, (rows, columns)));
        prop_assert!(near(&transposed(&q, rows, small).times(&q), &unit, (small, small)));

        let found = svd(matrix());
        let scaled = Matrix::from_fn(rows, small, |row, k| found.left.get(row, k) * found.singular[k]);
        prop_assert!(near(&scaled.times_transposed(&found.right), &entry, (rows, columns)));
        // Orthonormal where there is something; directions of nothing are zero on one side.
        let there = found.singular.iter().filter(|value| **value > 1e-12).count();
        prop_assert!(there <= known);
        for (factor, length) in [(&found.left, rows), (&found.right, columns)] {
            let gram = transposed(factor, length, small).times(factor);
            prop_assert!(near(&gram, &unit, (there, there)));
        }
    }
}

#[test]
fn a_stack_that_cancels_is_next_to_nothing() {
    let dir = tempfile::tempdir().unwrap();
    let (one, _) = two(dir.path(), [3, 2], [6, 5, 4], 1);
    for (_, spectrum) in stack_spectrum(&[(&one, 1.25), (&one, -1.25)]).unwrap() {
        assert!(spectrum.norm < 1e-12, "{spectrum:?}");
    }
    let to = dir.path().join("small");
    compress(&[(&one, 1.25), (&one, -1.25)], 2, &to, None, None).unwrap();
    let small = AdapterFile::open(&to).unwrap();
    let delta = dense(&small.pair(0).unwrap());
    assert!(norm(&delta) < 1e-12);
}

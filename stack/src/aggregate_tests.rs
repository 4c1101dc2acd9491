use proptest::prelude::*;

use super::*;
use crate::carry::{difference, write_config_with_carry};
use crate::testing::{adapter, dense, pair};

fn world(count: usize, seed: u64) -> (Vec<Vec<f64>>, Gram) {
    let deltas: Vec<Vec<f64>> = (0..count as u64)
        .map(|i| dense(&pair("m", 1 + (i as usize % 3), [5, 4], 1.0, seed * 50 + i)))
        .collect();
    let dot = |x: &[f64], y: &[f64]| -> f64 { x.iter().zip(y).map(|(x, y)| x * y).sum() };
    let mut values = vec![0.0; count * count];
    for i in 0..count {
        for j in 0..=i {
            values[i * count + j] = dot(&deltas[i], &deltas[j]);
            values[j * count + i] = values[i * count + j];
        }
    }
    (deltas, Gram::from_values(count, values).unwrap())
}

fn mix(deltas: &[Vec<f64>], weights: &[f64]) -> Vec<f64> {
    let mut sum = vec![0.0; deltas[0].len()];
    for (delta, weight) in deltas.iter().zip(weights) {
        sum.iter_mut()
            .zip(delta)
            .for_each(|(sum, value)| *sum += weight * value);
    }
    sum
}

fn distance(x: &[f64], y: &[f64]) -> f64 {
    x.iter()
        .zip(y)
        .map(|(x, y)| (x - y).powi(2))
        .sum::<f64>()
        .sqrt()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 40, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_matrix_is_that_of_dense_deltas(count in 1_usize..6, seed in 0_u64..500) {
        let (deltas, gram) = world(count, seed);
        let dir = tempfile::tempdir().unwrap();
        let files: Vec<AdapterFile> = (0..count as u64)
            .map(|i| {
                let rank = 1 + (i as usize % 3);
                let pair = pair("m", rank, [5, 4], 1.0, seed * 50 + i);
                adapter(&dir.path().join(i.to_string()), &[pair], rank, rank as f64)
            })
            .collect();
        let found = Gram::of(&files.iter().collect::<Vec<_>>()).unwrap();
        for i in 0..count {
            for j in 0..count {
                prop_assert!((found.get(i, j) - gram.get(i, j)).abs() < 1e-9 * gram.norm(i).max(1e-9) * gram.norm(j).max(1e-9));
                prop_assert!((found.distance_squared(i, j).sqrt() - distance(&deltas[i], &deltas[j])).abs() < 1e-6);
            }
        }
        let weights: Vec<f64> = (0..count).map(|i| 0.3 * i as f64 - 0.5).collect();
        let norm = distance(&mix(&deltas, &weights), &[0.0; 20]);
        prop_assert!((found.weighted_norm(&weights) - norm).abs() < 1e-8 * (1.0 + norm));
    }

    #[test]
    fn nothing_near_the_median_is_nearer_to_all(count in 2_usize..8, seed in 0_u64..500) {
        let (deltas, gram) = world(count, seed);
        let shares: Vec<f64> = (0..count).map(|i| 1.0 + (i % 3) as f64).collect();
        let weights = geometric_median(&gram, &shares);
        prop_assert!((weights.iter().sum::<f64>() - 1.0).abs() < 1e-12);
        let cost = |point: &[f64]| -> f64 {
            deltas.iter().zip(&shares).map(|(delta, share)| share * distance(point, delta)).sum()
        };
        let median = mix(&deltas, &weights);
        let best = cost(&median);
        for (index, step) in [1e-2, -1e-2, 1e-1, -1e-1].iter().enumerate() {
            for at in 0..median.len() {
                let mut other = median.clone();
                other[(at + index) % 20] += step;
                prop_assert!(cost(&other) >= best * (1.0 - 1e-6));
            }
        }
    }

    #[test]
    fn krum_keeps_the_closest(count in 5_usize..9, seed in 0_u64..500, byzantine in 0_usize..3) {
        let (deltas, gram) = world(count, seed);
        let chosen = multi_krum(&gram, byzantine);
        prop_assert_eq!(chosen.len(), count - byzantine);
        let score = |i: usize| {
            let mut all: Vec<f64> = (0..count).filter(|j| *j != i)
                .map(|j| distance(&deltas[i], &deltas[j]).powi(2)).collect();
            all.sort_by(f64::total_cmp);
            all[..count - byzantine - 2].iter().sum::<f64>()
        };
        let worst_kept = chosen.iter().map(|i| score(*i)).fold(0.0, f64::max);
        for left_out in (0..count).filter(|i| !chosen.contains(i)) {
            prop_assert!(score(left_out) >= worst_kept - 1e-9);
        }
    }
}

#[test]
fn a_far_outlier_moves_neither_krum_nor_the_median() {
    let points = [1.0, 1.1, 0.9, 1.05, 50.0];
    let values = points
        .iter()
        .flat_map(|x| points.iter().map(move |y| x * y))
        .collect();
    let gram = Gram::from_values(5, values).unwrap();
    assert_eq!(multi_krum(&gram, 1), [0, 1, 2, 3]);
    let weights = geometric_median(&gram, &[1.0; 5]);
    let median: f64 = weights.iter().zip(points).map(|(w, x)| w * x).sum();
    assert!((median - 1.05).abs() < 0.06, "{median}");
}

#[test]
fn too_few_and_nonsense_are_handled() {
    assert!(Gram::from_values(2, vec![1.0; 3]).is_none());
    assert!(Gram::from_values(2, vec![1.0, 2.0, 3.0, 1.0]).is_none());
    assert!(Gram::from_values(1, vec![f64::NAN]).is_none());
    let one = Gram::from_values(1, vec![4.0]).unwrap();
    assert_eq!((one.norm(0), multi_krum(&one, 3)), (2.0, vec![0]));
    assert_eq!(geometric_median(&one, &[1.0]), [1.0]);
    assert!(geometric_median(&one, &[0.0]).is_empty());
    assert!(multi_krum(&Gram::from_values(0, Vec::new()).unwrap(), 1).is_empty());
    assert!(one.get(0, 1).is_nan());
}

#[test]
fn factors_are_averaged_one_by_one() {
    let dir = tempfile::tempdir().unwrap();
    let (x, y) = (
        pair("l.q", 2, [3, 4], 2.0, 1),
        pair("l.q", 2, [3, 4], 2.0, 2),
    );
    let one = adapter(&dir.path().join("x"), std::slice::from_ref(&x), 2, 4.0);
    let two = adapter(&dir.path().join("y"), std::slice::from_ref(&y), 2, 4.0);
    let out = dir.path().join("mean");
    mean_factors(&[(&one, 3.0), (&two, 1.0)], &out, None, None).unwrap();
    let mean = AdapterFile::open(&out).unwrap().pair(0).unwrap();
    for (found, (x, y)) in mean.a.iter().zip(x.a.iter().zip(&y.a)) {
        assert!((found - (0.75 * x + 0.25 * y)).abs() < 1e-6);
    }
    assert_eq!(mean.scale, 2.0);
    let three = adapter(
        &dir.path().join("z"),
        &[pair("l.q", 3, [3, 4], 2.0, 2)],
        3,
        6.0,
    );
    let mixed = mean_factors(
        &[(&one, 1.0), (&three, 1.0)],
        &dir.path().join("no"),
        None,
        None,
    );
    assert!(matches!(mixed, Err(AdapterError::Mismatch { .. })));
    assert!(mean_factors(&[], &dir.path().join("no"), None, None).is_err());
}

#[test]
fn the_mean_of_a_round_with_a_carry_is_of_its_trained_halves() {
    let dir = tempfile::tempdir().unwrap();
    let recipe = crate::testing::recipe();
    let (rank, scale) = (recipe.rank as usize, recipe.scale());
    let fresh = |seed| pair("l.q", rank, [3, 4], scale, seed);
    let carried = fresh(1);
    let write = |name: &str, pair: Pair, config: &AdapterWriteConfig| {
        let folder = dir.path().join(name);
        crate::adapter::write_adapter(&folder, &[pair], config).unwrap();
        AdapterFile::open(&folder).unwrap()
    };
    let of_two = |seed| -> Pair {
        let pairs = difference(&recipe, &[fresh(seed)], std::slice::from_ref(&carried));
        pairs.unwrap().remove(0)
    };
    let twice = write_config_with_carry(&recipe, None, None);
    let once = AdapterWriteConfig::of_recipe(&recipe, None, None);
    let carrying = [write("x", of_two(2), &twice), write("y", of_two(3), &twice)];
    let plain = [write("u", fresh(2), &once), write("v", fresh(3), &once)];
    let mean = |adapters: &[AdapterFile; 2], name: &str| {
        let terms = [(&adapters[0], 0.5), (&adapters[1], 1.5)];
        let out = dir.path().join(name);
        mean_trained(&terms, &recipe, &out).unwrap();
        AdapterFile::open(&out).unwrap().pair(0).unwrap()
    };
    assert_eq!(mean(&carrying, "carrying"), mean(&plain, "plain"));
    let odd = write("odd", pair("l.q", rank + 1, [3, 4], scale, 5), &once);
    let refused = mean_trained(&[(&odd, 1.0)], &recipe, &dir.path().join("no"));
    assert!(matches!(refused, Err(AdapterError::Mismatch { .. })));
}

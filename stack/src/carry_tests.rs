use proptest::prelude::*;

use super::*;
use crate::adapter::{CONFIG_FILE, WEIGHTS_FILE, check_adapter, write_adapter};
use crate::recipe::RANK_MAX;
use crate::testing::{dense, model, numbers, pair, recipe};

/// The recipe with another rank, alpha and kind of scale.
fn recipe_of(rank: u32, alpha: f64, use_rslora: bool) -> Recipe {
    Recipe {
        rank,
        alpha,
        use_rslora,
        ..recipe()
    }
}

/// Factors of the recipe's whole adapter.
fn pairs_of(recipe: &Recipe, seed: u64) -> Vec<Pair> {
    let spec = AdapterSpec::new(&model(), recipe);
    let pairs = spec.pairs.iter().enumerate().map(|(index, place)| {
        let shape = [place.out_features, place.in_features];
        pair(
            &place.module,
            spec.rank,
            shape,
            spec.scale,
            seed + 31 * index as u64,
        )
    });
    pairs.collect()
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 48, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn the_difference_is_the_dense_one(
        rank in 1_u32..6, alpha in 0.1_f64..64.0, use_rslora: bool,
        out in 1_usize..9, inn in 1_usize..9, seed in 0_u64..1000,
    ) {
        let recipe = recipe_of(rank, alpha, use_rslora);
        let trained = pair("m", rank as usize, [out, inn], recipe.scale(), seed);
        let carried = pair("m", rank as usize, [out, inn], recipe.scale(), seed + 7);
        let found = difference(&recipe, std::slice::from_ref(&trained), std::slice::from_ref(&carried)).unwrap();
        prop_assert_eq!(found[0].rank, 2 * rank as usize);
        let expected: Vec<f64> = dense(&trained).iter().zip(dense(&carried)).map(|(x, y)| x - y).collect();
        let size = expected.iter().fold(1e-9_f64, |max, value| max.max(value.abs()));
        for (found, expected) in dense(&found[0]).iter().zip(&expected) {
            prop_assert!((found - expected).abs() <= 1e-12 * size.max(recipe.scale()), "{found} {expected}");
        }
        let half = trained_half(&found[0]).unwrap();
        prop_assert_eq!((&half.a, &half.b, half.rank), (&trained.a, &trained.b, trained.rank));
    }

    #[test]
    fn the_scale_stays(rank in 1_u32..=RANK_MAX, alpha in 1e-3_f64..4096.0) {
        let plain = recipe_of(rank, alpha, false);
        prop_assert_eq!(scale_with_carry(&plain).to_bits(), plain.scale().to_bits());
        let stable = recipe_of(rank, alpha, true);
        let apart = scale_with_carry(&stable) / stable.scale() - 1.0;
        prop_assert!(apart.abs() <= 4.0 * f64::EPSILON, "{apart}");
    }
}

#[test]
fn factors_to_start_from_are_the_recipes() {
    let recipe = recipe_of(3, 5.0, true);
    let spec = AdapterSpec::new(&model(), &recipe);
    let mut pairs = pairs_of(&recipe, 4);
    check_factors(&spec, &pairs).unwrap();
    pairs.reverse();
    check_factors(&spec, &pairs).unwrap();
    assert!(matches!(
        check_factors(&spec, &pairs[1..]),
        Err(CarryError::Modules(_))
    ));
    let twice = [pairs.as_slice(), &pairs[..1]].concat();
    assert!(matches!(
        check_factors(&spec, &twice),
        Err(CarryError::Modules(_))
    ));
    let less = pairs_of(&recipe_of(2, 5.0, true), 4);
    assert!(matches!(
        check_factors(&spec, &less),
        Err(CarryError::Shape { .. })
    ));
    pairs[0].scale *= 2.0;
    assert!(matches!(
        check_factors(&spec, &pairs),
        Err(CarryError::Scale { .. })
    ));
}

#[test]
fn nothing_trained_is_no_delta() {
    let recipe = recipe_of(3, 5.0, false);
    let carried = pairs_of(&recipe, 4);
    for pair in difference(&recipe, &carried, &carried).unwrap() {
        assert!(dense(&pair).iter().all(|value| value.abs() < 1e-14));
    }
}

#[test]
fn a_written_difference_passes_the_check_and_gives_its_halves_back() {
    for use_rslora in [false, true] {
        let recipe = recipe_of(3, 5.3, use_rslora);
        let (trained, mut carried) = (pairs_of(&recipe, 1), pairs_of(&recipe, 2));
        carried[1].b[0] = 0.0;
        let dir = tempfile::tempdir().unwrap();
        let (sent, before) = (dir.path().join("sent"), dir.path().join("carried"));
        let plain = AdapterWriteConfig::of_recipe(&recipe, None, None);
        write_adapter(&before, &carried, &plain).unwrap();
        // The order of the two lists does not matter.
        carried.reverse();
        let pairs = difference(&recipe, &trained, &carried).unwrap();
        write_adapter(&sent, &pairs, &write_config_with_carry(&recipe, None, None)).unwrap();

        let spec = spec_with_carry(&model(), &recipe);
        let json = std::fs::read(sent.join(CONFIG_FILE)).unwrap();
        let weights = sent.join(WEIGHTS_FILE);
        let checked = check_adapter(&weights, &json, &spec).unwrap();
        assert!(std::fs::metadata(&weights).unwrap().len() <= spec.file_bytes_max());
        assert_eq!((spec.rank, spec.scale), (6, scale_with_carry(&recipe)));
        let carried = AdapterFile::open(&before).unwrap();
        let halves = trained_halves(&checked, &carried).unwrap();
        assert_eq!(halves.len(), trained.len());
        for half in &halves {
            let expected = trained
                .iter()
                .find(|pair| pair.module == half.module)
                .unwrap();
            assert_eq!((&half.a, &half.b, half.rank), (&expected.a, &expected.b, 3));
        }
        // A plain adapter of the recipe is not accepted in its place, nor the other way round.
        let plain = std::fs::read(before.join(CONFIG_FILE)).unwrap();
        assert!(check_adapter(&before.join(WEIGHTS_FILE), &plain, &spec).is_err());
        assert!(check_adapter(&weights, &json, &AdapterSpec::new(&model(), &recipe)).is_err());
    }
}

#[test]
fn an_altered_second_half_is_found() {
    let recipe = recipe_of(2, 4.0, false);
    let (trained, carried) = (pairs_of(&recipe, 1), pairs_of(&recipe, 2));
    let dir = tempfile::tempdir().unwrap();
    let write = |name: &str, pairs: &[Pair], config: &AdapterWriteConfig| {
        write_adapter(&dir.path().join(name), pairs, config).unwrap();
        AdapterFile::open(&dir.path().join(name)).unwrap()
    };
    let plain = AdapterWriteConfig::of_recipe(&recipe, None, None);
    let double = write_config_with_carry(&recipe, None, None);
    let before = write("carried", &carried, &plain);
    let honest = difference(&recipe, &trained, &carried).unwrap();
    check_carried(&write("honest", &honest, &double), &before).unwrap();

    // One number of B's or A's second half; the last bit is enough.
    for (what, place) in [("b", 0), ("b", 7), ("a", 0)] {
        let mut altered = honest.clone();
        let pair = &mut altered[place % honest.len()];
        let (half_a, rank) = (pair.a.len() / 2, pair.rank);
        let slot = match what {
            "a" => &mut pair.a[half_a],
            _ => &mut pair.b[rank - 1],
        };
        *slot = f32::from_bits(slot.to_bits() ^ 1);
        let error = check_carried(&write("altered", &altered, &double), &before).unwrap_err();
        assert!(matches!(error, CarryError::Altered(_)), "{error}");
    }
    // The first half is the worker's own.
    let mut other = honest.clone();
    other[0].a[0] += 1.0;
    other[0].b[0] += 1.0;
    check_carried(&write("other", &other, &double), &before).unwrap();
    // Modules and ranks.
    let fewer = write("fewer", &honest[1..], &double);
    assert!(matches!(
        check_carried(&fewer, &before),
        Err(CarryError::Modules(_))
    ));
    let less = write("less", &carried[1..], &plain);
    let more = write("more", &honest, &double);
    assert!(matches!(
        check_carried(&more, &less),
        Err(CarryError::Modules(_))
    ));
    assert!(matches!(
        check_carried(&before, &before),
        Err(CarryError::Shape { .. })
    ));
}

#[test]
fn what_does_not_match_is_refused() {
    let recipe = recipe_of(2, 4.0, false);
    let x = pair("m", 2, [3, 4], 2.0, 1);
    let y = pair("n", 2, [3, 4], 2.0, 1);
    let both = [x.clone(), y.clone()];
    let modules = |trained: &[Pair], carried: &[Pair]| {
        matches!(
            difference(&recipe, trained, carried),
            Err(CarryError::Modules(_))
        )
    };
    assert!(modules(&both, &both[..1]));
    assert!(modules(&both[..1], &both));
    assert!(modules(&both, &[x.clone(), x.clone()]));
    assert!(modules(&[x.clone(), x.clone()], &both));
    for other in [pair("m", 3, [3, 4], 2.0, 1), pair("m", 2, [4, 3], 2.0, 1)] {
        let found = difference(&recipe, std::slice::from_ref(&x), &[other]);
        assert!(matches!(found, Err(CarryError::Shape { .. })));
    }
    let louder = Pair {
        scale: 2.5,
        ..x.clone()
    };
    let found = difference(&recipe, &[louder], std::slice::from_ref(&x));
    assert!(matches!(found, Err(CarryError::Scale { .. })));
    let torn = Pair {
        b: numbers(5, 1),
        ..x.clone()
    };
    assert!(difference(&recipe, std::slice::from_ref(&torn), &[x]).is_err());
    assert!(trained_half(&torn).is_err());
    assert!(trained_half(&pair("m", 3, [3, 4], 1.0, 1)).is_err());
    assert!(trained_half(&pair("m", 0, [3, 4], 1.0, 1)).is_err());
}

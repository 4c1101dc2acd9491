//! What holds for every fold: the documented order to the bit, whatever the threads.

use std::fs;

use proptest::prelude::*;

use super::*;
use crate::adapter::Pair;
use crate::compress::concat;
use crate::lineage::{Contribution, Manifest};
use crate::testing;

const MODULES: [(&str, [usize; 2]); 3] = [
    ("model.layers.0.self_attn.q_proj", [8, 8]),
    ("model.layers.0.self_attn.k_proj", [4, 8]),
    ("model.layers.1.mlp.down_proj", [8, 12]),
];

/// A base and adapters in a folder of their own.
struct World {
    dir: tempfile::TempDir,
    base: Checkpoint,
    adapters: Vec<AdapterFile>,
}

impl World {
    /// One adapter for each (rank, modules that it has).
    fn new(adapters: &[(usize, usize)], seed: u64) -> Self {
        let dir = tempfile::tempdir().unwrap();
        testing::checkpoint(&dir.path().join("base"), seed);
        let base = Checkpoint::open(&dir.path().join("base")).unwrap();
        let adapters = adapters.iter().zip(1..).map(|((rank, modules), number)| {
            let pairs: Vec<Pair> = MODULES[..*modules]
                .iter()
                .zip(seed + 10 * number..)
                .map(|((module, shape), seed)| testing::pair(module, *rank, *shape, 0.7, seed))
                .collect();
            let path = dir.path().join(format!("adapter{number}"));
            testing::adapter(&path, &pairs, *rank, 0.7 * *rank as f64)
        });
        let adapters = adapters.collect();
        Self {
            dir,
            base,
            adapters,
        }
    }

    fn terms(&self, weights: &[f64]) -> Vec<Term<'_>> {
        let terms = self.adapters.iter().zip(weights);
        terms
            .map(|(adapter, weight)| Term {
                adapter,
                weight: *weight,
            })
            .collect()
    }

    /// The weight file after a fold.
    fn fold(&self, terms: &[Term<'_>], threads: usize) -> Vec<u8> {
        let out = tempfile::tempdir_in(self.dir.path()).unwrap();
        let options = FoldOptions {
            threads: NonZeroUsize::new(threads),
            progress: None,
        };
        fold_with(&self.base, terms, out.path(), options).unwrap();
        fs::read(out.path().join("model.safetensors")).unwrap()
    }

    /// The same by the formula on the module's page, element by element.
    fn by_the_formula(&self, terms: &[Term<'_>]) -> Vec<u8> {
        let mut tensors = testing::weights(0);
        for (spec, values) in &mut tensors {
            *values = self.base.read_f32(&spec.name).unwrap().1;
            let module = spec.name.trim_end_matches(".weight");
            let touches = |term: &Term<'_>| {
                let place = term.adapter.find(module)?;
                Some((term.adapter.pair(place).unwrap(), term.weight))
            };
            let pairs: Vec<(Pair, f64)> = terms
                .iter()
                .filter(|term| term.weight != 0.0)
                .filter_map(touches)
                .collect();
            if pairs.is_empty() {
                continue;
            }
            let columns = spec.shape[1];
            for (at, value) in values.iter_mut().enumerate() {
                let (row, column) = (at / columns, at % columns);
                let mut delta = 0.0_f32;
                for (pair, weight) in &pairs {
                    for k in 0..pair.rank {
                        let b = f64::from(pair.b[row * pair.rank + k]);
                        let coefficient = (weight * pair.scale * b) as f32;
                        delta += coefficient * pair.a[k * columns + column];
                    }
                }
                *value += delta;
            }
        }
        let path = self.dir.path().join("expected.safetensors");
        testing::write_weights(&path, &tensors);
        fs::read(path).unwrap()
    }
}

fn weights() -> impl Strategy<Value = f64> {
    prop_oneof![4 => -2.0_f64..2.0, 1 => Just(0.0), 1 => -1e-6_f64..1e-6, 1 => -1e6_f64..1e6]
}

proptest! {
    #![proptest_config(ProptestConfig { cases: 24, failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn terms_add_up_as_listed_on_any_number_of_threads(
        terms in prop::collection::vec(((1_usize..5, 1_usize..4), weights()), 1..6),
        seed in 0_u64..1000,
    ) {
        let (adapters, weights): (Vec<_>, Vec<f64>) = terms.into_iter().unzip();
        let world = World::new(&adapters, seed);
        let mut terms = world.terms(&weights);
        for _ in 0..2 {
            let expected = world.by_the_formula(&terms);
            for threads in [1, 2, 7] {
                prop_assert!(world.fold(&terms, threads) == expected, "{threads} threads");
            }
            terms.reverse();
        }
    }

    #[test]
    fn one_adapter_of_all_terms_folds_to_the_same_bits(
        terms in prop::collection::vec(((1_usize..5, 1_usize..4), 0.01_f64..2.0), 1..5),
        seed in 0_u64..1000,
    ) {
        let (adapters, weights): (Vec<_>, Vec<f64>) = terms.into_iter().unzip();
        let world = World::new(&adapters, seed);
        let terms = world.terms(&weights);
        let joined = world.dir.path().join("joined");
        let list: Vec<(&AdapterFile, f64)> = terms.iter().map(|term| (term.adapter, term.weight)).collect();
        concat(&list, &joined, None, None).unwrap();
        let joined = AdapterFile::open(&joined).unwrap();
        let one = [Term { adapter: &joined, weight: 1.0 }];
        prop_assert!(world.fold(&one, 2) == world.fold(&terms, 2));
    }
}

/// Sums of f32 depend on their order, so the order is part of what is signed: the same terms listed
/// in another order are another manifest, another commit and another checkpoint.
#[test]
fn the_manifests_order_decides() {
    let world = World::new(&[(1, 1); 3], 1);
    // Large, small, and the large one back: what is left of the small one depends on when it comes.
    let large = &world.adapters[0];
    let term = |adapter, weight| Term { adapter, weight };
    let small = &world.adapters[1];
    let listed = [term(large, 1e6), term(small, 0.1), term(large, -1e6)];
    let sorted = [term(large, 1e6), term(large, -1e6), term(small, 0.1)];
    let (one, other) = (world.fold(&listed, 2), world.fold(&sorted, 2));
    assert!(one != other);
    assert!(one == world.by_the_formula(&listed) && other == world.by_the_formula(&sorted));

    let contribution = |id: &str| Contribution {
        id: id.to_owned(),
        round: "r".to_owned(),
        worker: "w".to_owned(),
        shard: 0,
        tokens: 1,
        adapter: crate::digest::Digest::of(id.as_bytes()),
        adapter_config: crate::digest::Digest::of(b"config"),
        weight: 0.5,
    };
    let mut manifest = Manifest::new("tiny", 1, Vec::new());
    manifest.contributions = vec![contribution("a"), contribution("b")];
    let before = manifest.commit().unwrap();
    manifest.contributions.reverse();
    assert_ne!(manifest.commit().unwrap(), before);
}

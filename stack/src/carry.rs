//! Rounds that go on from the mean factors of the round before (`FedEx`, arXiv 2410.09432).
//!
//! The base `W` of such a round contains the carried delta `s B_c A_c` already. A worker trains the
//! factors on from `A_c`, `B_c` against `W - s B_c A_c`, so that the model before the first step is
//! `W`. What it hands in is what it changed of `W`, exactly and as an ordinary adapter:
//! `s B_t A_t - s B_c A_c = s [B_t | -B_c] [A_t; A_c]`, of twice the rank and the same scale. So
//! every rule about deltas holds for it unchanged, and the trained factors are still readable: they
//! are the first half.

use std::collections::BTreeMap;

use crate::adapter::{AdapterError, AdapterFile, AdapterSpec, AdapterWriteConfig, Pair, PairSpec};
use crate::config::ModelConfig;
use crate::recipe::{Recipe, lora_scale};

/// Why factors are not what a carry makes of them.
#[derive(Debug, thiserror::Error)]
pub enum CarryError {
    /// An adapter cannot be read.
    #[error(transparent)]
    Adapter(#[from] AdapterError),
    /// One of the two has a module that the other has not, or has it twice.
    #[error("module {0} is not once in the trained and once in the carried factors")]
    Modules(String),
    /// A module's rank or shape is not the carried one's.
    #[error("module {module} is {found}; with the carried factors it must be {expected}")]
    Shape {
        /// The module.
        module: String,
        /// Rank and `[out, in]` as found.
        found: String,
        /// Rank and `[out, in]` as they must be.
        expected: String,
    },
    /// Factors are to be multiplied with something else than the recipe says, so that they cannot be
    /// put side by side.
    #[error("module {module} has the scale {found}; the recipe says {expected}")]
    Scale {
        /// The module.
        module: String,
        /// Its scale.
        found: f64,
        /// The recipe's.
        expected: f64,
    },
    /// The second half is something else than the carried factors with B negated.
    #[error("module {0}: the second half of the factors is not the round's carried factors")]
    Altered(String),
}

/// Rank and alpha of the difference: twice the rank, and an alpha that leaves the scale as it is:
/// `2 alpha`, or `sqrt(2) alpha` with rsLoRA. The scale that follows from them is exactly the
/// recipe's without rsLoRA, and with it within the last bit of an f64.
fn rank_and_alpha(recipe: &Recipe) -> (usize, f64) {
    let factor = if recipe.use_rslora {
        std::f64::consts::SQRT_2
    } else {
        2.0
    };
    (2 * recipe.rank as usize, factor * recipe.alpha)
}

/// The adapter that `recipe` asks for on `config` in a round with a carry: what a worker must send
/// and what the coordinator accepts. As [`AdapterSpec::new`], of twice the rank.
#[must_use]
pub fn spec_with_carry(config: &ModelConfig, recipe: &Recipe) -> AdapterSpec {
    let (rank, alpha) = rank_and_alpha(recipe);
    AdapterSpec {
        rank,
        alpha,
        scale: scale_with_carry(recipe),
        ..AdapterSpec::new(config, recipe)
    }
}

/// What B·A is multiplied with in such an adapter, as its config gives it.
#[must_use]
pub fn scale_with_carry(recipe: &Recipe) -> f64 {
    let (rank, alpha) = rank_and_alpha(recipe);
    #[expect(clippy::cast_precision_loss, reason = "ranks are far below 2^53")]
    lora_scale(alpha, rank as f64, recipe.use_rslora)
}

/// What the config of such an adapter says. As [`AdapterWriteConfig::of_recipe`].
#[must_use]
pub fn write_config_with_carry(
    recipe: &Recipe,
    base_model: Option<&str>,
    revision: Option<&str>,
) -> AdapterWriteConfig {
    let (rank, alpha) = rank_and_alpha(recipe);
    AdapterWriteConfig {
        rank,
        alpha,
        ..AdapterWriteConfig::of_recipe(recipe, base_model, revision)
    }
}

/// Checks that factors are what a recipe's training may start from: every pair of `spec` once, with
/// its rank, shape and scale.
///
/// # Errors
/// When they are not.
pub fn check_factors(spec: &AdapterSpec, factors: &[Pair]) -> Result<(), CarryError> {
    let mut left: BTreeMap<&str, &PairSpec> = spec
        .pairs
        .iter()
        .map(|pair| (pair.module.as_str(), pair))
        .collect();
    for pair in factors {
        let place = left
            .remove(pair.module.as_str())
            .ok_or_else(|| CarryError::Modules(pair.module.clone()))?;
        has_shape(pair, spec.rank, (place.in_features, place.out_features))?;
        has_scale(pair, spec.scale)?;
    }
    match left.into_keys().next() {
        Some(module) => Err(CarryError::Modules(module.to_owned())),
        None => Ok(()),
    }
}

/// What training changed: `[A_t; A_c]` and `[B_t | -B_c]` for each module, of twice the rank, in the
/// order of `trained`. No number is rounded. Both lists have the recipe's rank and scale; their order
/// may differ.
///
/// # Errors
/// When the two have different modules or shapes, or not the recipe's rank and scale.
pub fn difference(
    recipe: &Recipe,
    trained: &[Pair],
    carried: &[Pair],
) -> Result<Vec<Pair>, CarryError> {
    let scale = scale_with_carry(recipe);
    let mut left: BTreeMap<&str, &Pair> = BTreeMap::new();
    for pair in carried {
        if left.insert(&pair.module, pair).is_some() {
            return Err(CarryError::Modules(pair.module.clone()));
        }
    }
    let mut out = Vec::with_capacity(trained.len());
    for pair in trained {
        let before = left
            .remove(pair.module.as_str())
            .ok_or_else(|| CarryError::Modules(pair.module.clone()))?;
        for one in [pair, before] {
            has_shape(one, recipe.rank as usize, features(before))?;
            has_scale(one, recipe.scale())?;
        }
        out.push(Pair {
            scale,
            ..side_by_side(pair, before)
        });
    }
    match left.into_keys().next() {
        Some(module) => Err(CarryError::Modules(module.to_owned())),
        None => Ok(out),
    }
}

/// `[A_t; A_c]`, `[B_t | -B_c]` of one module.
fn side_by_side(trained: &Pair, carried: &Pair) -> Pair {
    let mut b = Vec::with_capacity(trained.b.len() + carried.b.len());
    let rows = trained.b.chunks_exact(trained.rank.max(1));
    for (new, old) in rows.zip(carried.b.chunks_exact(carried.rank.max(1))) {
        b.extend_from_slice(new);
        b.extend(old.iter().map(|value| -value));
    }
    Pair {
        module: trained.module.clone(),
        rank: trained.rank + carried.rank,
        in_features: trained.in_features,
        out_features: trained.out_features,
        a: [trained.a.as_slice(), carried.a.as_slice()].concat(),
        b,
        scale: trained.scale,
    }
}

/// The trained factors of one module's difference: its first half along the rank, with its scale.
///
/// # Errors
/// When the rank is odd, or the factors have other lengths than their shape.
pub fn trained_half(difference: &Pair) -> Result<Pair, CarryError> {
    let rank = difference.rank / 2;
    has_shape(difference, 2 * rank, features(difference))?;
    let rows = difference.b.chunks_exact(2 * rank);
    Ok(Pair {
        rank,
        a: difference
            .a
            .iter()
            .take(rank * difference.in_features)
            .copied()
            .collect(),
        b: rows
            .flat_map(|row| row.iter().take(rank).copied())
            .collect(),
        ..Pair {
            module: difference.module.clone(),
            a: Vec::new(),
            b: Vec::new(),
            ..*difference
        }
    })
}

/// The trained factors of a whole difference, module by module in its order, once their second half
/// is known to be the carried factors ([`check_carried`]).
///
/// # Errors
/// As [`check_carried`].
pub fn trained_halves(
    difference: &AdapterFile,
    carried: &AdapterFile,
) -> Result<Vec<Pair>, CarryError> {
    check_carried(difference, carried)?;
    (0..difference.modules().len())
        .map(|index| trained_half(&difference.pair(index)?))
        .collect()
}

/// Checks that the second half of a difference is the carried factors, B negated, bit for bit: then
/// the adapter is what it claims to be, a change of the round's base by the first half. One module of
/// each is in memory at a time.
///
/// # Errors
/// When modules, ranks or shapes differ, a number is another, or a file cannot be read.
pub fn check_carried(difference: &AdapterFile, carried: &AdapterFile) -> Result<(), CarryError> {
    let foreign = carried
        .modules()
        .iter()
        .find(|info| difference.find(&info.module).is_none());
    if let Some(info) = foreign {
        return Err(CarryError::Modules(info.module.clone()));
    }
    for (index, info) in difference.modules().iter().enumerate() {
        let place = carried
            .find(&info.module)
            .ok_or_else(|| CarryError::Modules(info.module.clone()))?;
        second_half_is(&difference.pair(index)?, &carried.pair(place)?)?;
    }
    Ok(())
}

fn second_half_is(difference: &Pair, carried: &Pair) -> Result<(), CarryError> {
    let rank = carried.rank;
    has_shape(carried, rank, features(carried))?;
    has_shape(difference, 2 * rank, features(carried))?;
    let second_a = difference.a.iter().skip(carried.a.len());
    let a = second_a
        .zip(&carried.a)
        .all(|(x, y)| x.to_bits() == y.to_bits());
    let rows = difference
        .b
        .chunks_exact(2 * rank)
        .zip(carried.b.chunks_exact(rank));
    let mut second_b = rows.flat_map(|(row, old)| row.iter().skip(rank).zip(old));
    if a && second_b.all(|(x, y)| x.to_bits() == (-y).to_bits()) {
        Ok(())
    } else {
        Err(CarryError::Altered(difference.module.clone()))
    }
}

/// In and out features.
const fn features(pair: &Pair) -> (usize, usize) {
    (pair.in_features, pair.out_features)
}

/// This rank and these features, and factors as long as those say.
fn has_shape(pair: &Pair, rank: usize, expected: (usize, usize)) -> Result<(), CarryError> {
    let (in_features, out_features) = expected;
    let lengths = rank.checked_mul(in_features) == Some(pair.a.len())
        && rank.checked_mul(out_features) == Some(pair.b.len());
    if rank > 0 && pair.rank == rank && features(pair) == expected && lengths {
        return Ok(());
    }
    let shape = |rank, (in_features, out_features): (usize, usize)| {
        format!("rank {rank}, [{out_features}, {in_features}]")
    };
    Err(CarryError::Shape {
        module: pair.module.clone(),
        found: shape(pair.rank, features(pair)),
        expected: shape(rank, expected),
    })
}

fn has_scale(pair: &Pair, expected: f64) -> Result<(), CarryError> {
    if pair.scale.to_bits() == expected.to_bits() {
        return Ok(());
    }
    Err(CarryError::Scale {
        module: pair.module.clone(),
        found: pair.scale,
        expected,
    })
}

#[cfg(test)]
#[path = "carry_tests.rs"]
mod tests;

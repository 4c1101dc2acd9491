//! How several deltas become one, in product space: every rule here works on the matrix of inner
//! products alone, so ranks may differ and no delta is built.

use std::path::Path;

use crate::adapter::{
    AdapterError, AdapterFile, AdapterWriteConfig, ModuleInfo, Pair, PairShape,
    write_adapter_streamed,
};
use crate::algebra::{self, cosine_of};
use crate::carry::trained_half;
use crate::peft::TargetModules;
use crate::recipe::Recipe;

/// Steps of [`geometric_median`] at most; it usually stands still after a dozen.
const WEISZFELD_STEPS: usize = 200;
/// It stands still when no weight moves by more than this.
const WEISZFELD_STILL: f64 = 1e-12;
/// Distances below this part of the largest count as this much, so that a median that falls on a
/// point does not divide by zero (the smoothing of arXiv 1912.13445).
const WEISZFELD_SMOOTH: f64 = 1e-6;

/// Inner products of `n` deltas with each other: symmetric, `n` x `n`, f64.
#[derive(Debug, Clone, PartialEq)]
pub struct Gram {
    size: usize,
    values: Vec<f64>,
}

impl Gram {
    /// From row-major values; nothing unless they are `size` squared, finite and symmetric.
    #[must_use]
    pub fn from_values(size: usize, values: Vec<f64>) -> Option<Self> {
        let symmetric = size.checked_mul(size) == Some(values.len())
            && (0..size).all(|i| (0..i).all(|j| values[i * size + j] == values[j * size + i]));
        (symmetric && values.iter().all(|value| value.is_finite())).then_some(Self { size, values })
    }

    /// Of adapters; a module that only one of two has adds nothing to their product.
    ///
    /// # Errors
    /// When an adapter cannot be read, or a module has different shapes in two of them.
    pub fn of(adapters: &[&AdapterFile]) -> Result<Self, AdapterError> {
        let size = adapters.len();
        let mut values = vec![0.0; size * size];
        for (i, one) in adapters.iter().enumerate() {
            for (j, other) in adapters.iter().enumerate().take(i + 1) {
                let inner = algebra::inner_adapters(one, other)?;
                values[i * size + j] = inner;
                values[j * size + i] = inner;
            }
        }
        Ok(Self { size, values })
    }

    /// How many deltas.
    #[must_use]
    pub const fn len(&self) -> usize {
        self.size
    }

    /// Whether there is none.
    #[must_use]
    pub const fn is_empty(&self) -> bool {
        self.size == 0
    }

    /// Inner product of two; NaN beyond the last.
    #[must_use]
    pub fn get(&self, i: usize, j: usize) -> f64 {
        if i >= self.size || j >= self.size {
            return f64::NAN;
        }
        self.values[i * self.size + j]
    }

    /// Frobenius norm of one.
    #[must_use]
    pub fn norm(&self, i: usize) -> f64 {
        self.get(i, i).max(0.0).sqrt()
    }

    /// Cosine of two, -1 to 1; 0 when one is zero.
    #[must_use]
    pub fn cosine(&self, i: usize, j: usize) -> f64 {
        cosine_of(self.get(i, j), self.norm(i), self.norm(j))
    }

    /// Squared distance of two.
    #[must_use]
    pub fn distance_squared(&self, i: usize, j: usize) -> f64 {
        (self.get(i, i) - 2.0 * self.get(i, j) + self.get(j, j)).max(0.0)
    }

    /// Norm of `sum_i weights_i * delta_i`; missing weights are 0.
    #[must_use]
    pub fn weighted_norm(&self, weights: &[f64]) -> f64 {
        self.weighted_squared(weights).max(0.0).sqrt()
    }

    fn weighted_squared(&self, weights: &[f64]) -> f64 {
        let row = |i: usize| -> f64 {
            weights
                .iter()
                .enumerate()
                .map(|(j, weight)| weight * self.get(i, j))
                .sum()
        };
        weights
            .iter()
            .enumerate()
            .map(|(i, weight)| weight * row(i))
            .sum()
    }

    /// Squared distance of delta `i` from `sum_j weights_j * delta_j`.
    fn distance_to_mean(&self, i: usize, weights: &[f64]) -> f64 {
        let cross: f64 = weights
            .iter()
            .enumerate()
            .map(|(j, weight)| weight * self.get(i, j))
            .sum();
        (self.get(i, i) - 2.0 * cross + self.weighted_squared(weights)).max(0.0)
    }
}

/// Multi-Krum (arXiv 1703.02757): the `n - byzantine` deltas whose summed squared distances to their
/// `n - byzantine - 2` nearest neighbours are least, in ascending order of place. Equal scores go to
/// the earlier one. With too few to have neighbours, all.
#[must_use]
pub fn multi_krum(gram: &Gram, byzantine: usize) -> Vec<usize> {
    let size = gram.len();
    let keep = size.saturating_sub(byzantine).max(1).min(size);
    let neighbours = size.saturating_sub(byzantine + 2);
    if neighbours == 0 {
        return (0..size).collect();
    }
    let score = |i: usize| -> f64 {
        let mut distances: Vec<f64> = (0..size)
            .filter(|j| *j != i)
            .map(|j| gram.distance_squared(i, j))
            .collect();
        distances.sort_by(f64::total_cmp);
        distances.iter().take(neighbours).sum()
    };
    let mut scored: Vec<(f64, usize)> = (0..size).map(|i| (score(i), i)).collect();
    scored.sort_by(|one, two| one.0.total_cmp(&two.0).then(one.1.cmp(&two.1)));
    let mut chosen: Vec<usize> = scored.into_iter().take(keep).map(|(_, i)| i).collect();
    chosen.sort_unstable();
    chosen
}

/// Weights, summing to 1, of the geometric median `argmin_x sum_i shares_i ||x - delta_i||`: the
/// median lies in the span of the deltas, so Weiszfeld's iteration needs their inner products only.
/// Nothing for nothing, or when no share is positive.
#[must_use]
pub fn geometric_median(gram: &Gram, shares: &[f64]) -> Vec<f64> {
    let total: f64 = shares.iter().filter(|share| **share > 0.0).sum();
    if gram.is_empty() || shares.len() != gram.len() || total <= 0.0 {
        return Vec::new();
    }
    let shares: Vec<f64> = shares.iter().map(|share| share.max(0.0) / total).collect();
    let largest = (0..gram.len()).map(|i| gram.norm(i)).fold(0.0, f64::max);
    let least = (largest * WEISZFELD_SMOOTH).max(f64::MIN_POSITIVE);
    let mut weights = shares.clone();
    for _ in 0..WEISZFELD_STEPS {
        let pulls: Vec<f64> = shares
            .iter()
            .enumerate()
            .map(|(i, share)| share / gram.distance_to_mean(i, &weights).sqrt().max(least))
            .collect();
        let sum: f64 = pulls.iter().sum();
        let next: Vec<f64> = pulls.iter().map(|pull| pull / sum).collect();
        let moved = next
            .iter()
            .zip(&weights)
            .map(|(new, old)| (new - old).abs())
            .fold(0.0, f64::max);
        weights = next;
        if moved < WEISZFELD_STILL {
            break;
        }
    }
    weights
}

/// Writes the adapter whose A and B are the weighted means of the terms' A and B: FedIT's update
/// (arXiv 2305.05644) and what FedEx-LoRA broadcasts (arXiv 2410.09432). It is *not* the mean of the
/// deltas; FedEx folds the difference. All terms must have the same modules, ranks and scales.
///
/// # Errors
/// When there is no term, a weight is not finite, shapes differ, or files fail.
pub fn mean_factors(
    terms: &[(&AdapterFile, f64)],
    dir: &Path,
    base_model: Option<&str>,
    revision: Option<&str>,
) -> Result<(), AdapterError> {
    let Some((first, _)) = terms.first() else {
        return Err(AdapterError::Empty);
    };
    let config = AdapterWriteConfig {
        rank: first.config().rank,
        alpha: first.config().alpha,
        use_rslora: first.config().use_rslora,
        target_modules: match &first.config().target_modules {
            TargetModules::List(names) => names.clone(),
            TargetModules::Pattern(_) => Vec::new(),
        },
        base_model: base_model.map(str::to_owned),
        revision: revision.map(str::to_owned),
    };
    let shapes: Vec<PairShape> = first.modules().iter().map(shape_of).collect();
    write_mean(terms, &shapes, &config, dir, Ok)
}

/// As [`mean_factors`], of adapters that a round of `recipe` has taken: from one that began with
/// carried factors, and has twice the rank, the trained half alone (`crate::carry`). What is written
/// is an adapter of the recipe.
///
/// # Errors
/// As [`mean_factors`]; and when an adapter's rank is neither the recipe's nor twice that.
pub fn mean_trained(
    terms: &[(&AdapterFile, f64)],
    recipe: &Recipe,
    dir: &Path,
) -> Result<(), AdapterError> {
    let Some((first, _)) = terms.first() else {
        return Err(AdapterError::Empty);
    };
    let (rank, scale) = (recipe.rank as usize, recipe.scale());
    let shape = |info| PairShape {
        rank,
        scale,
        ..shape_of(info)
    };
    let shapes: Vec<PairShape> = first.modules().iter().map(shape).collect();
    let config = AdapterWriteConfig::of_recipe(recipe, None, None);
    write_mean(terms, &shapes, &config, dir, |pair| {
        let refused = |pair: &Pair| AdapterError::Mismatch {
            module: pair.module.clone(),
            first: format!("rank {}", pair.rank),
            second: format!("rank {rank} or {}", 2 * rank),
        };
        let trained = if pair.rank == 2 * rank {
            trained_half(&pair).map_err(|_| refused(&pair))?
        } else {
            pair
        };
        if trained.rank != rank {
            return Err(refused(&trained));
        }
        Ok(Pair { scale, ..trained })
    })
}

fn shape_of(info: &ModuleInfo) -> PairShape {
    PairShape {
        module: info.module.clone(),
        rank: info.rank,
        in_features: info.in_features,
        out_features: info.out_features,
        scale: info.scale,
    }
}

fn write_mean(
    terms: &[(&AdapterFile, f64)],
    shapes: &[PairShape],
    config: &AdapterWriteConfig,
    dir: &Path,
    part: impl Fn(Pair) -> Result<Pair, AdapterError>,
) -> Result<(), AdapterError> {
    let total: f64 = terms.iter().map(|(_, weight)| weight).sum();
    if let Some((_, weight)) = terms.iter().find(|(_, weight)| !weight.is_finite()) {
        return Err(AdapterError::Weight(*weight));
    }
    if total == 0.0 {
        return Err(AdapterError::Weight(0.0));
    }
    write_adapter_streamed(dir, shapes, config, |index| {
        mean_pair(terms, &shapes[index].module, total, &part)
    })
}

fn mean_pair(
    terms: &[(&AdapterFile, f64)],
    module: &str,
    total: f64,
    part: impl Fn(Pair) -> Result<Pair, AdapterError>,
) -> Result<Pair, AdapterError> {
    let mut sum: Option<(Pair, Vec<f64>, Vec<f64>)> = None;
    for (adapter, weight) in terms {
        let place = adapter.find(module).ok_or(AdapterError::Empty)?;
        let pair = part(adapter.pair(place)?)?;
        let share = weight / total;
        let (like, a, b) = sum.get_or_insert_with(|| {
            (
                pair.clone(),
                vec![0.0; pair.a.len()],
                vec![0.0; pair.b.len()],
            )
        });
        if (like.rank, like.scale, like.a.len(), like.b.len())
            != (pair.rank, pair.scale, pair.a.len(), pair.b.len())
        {
            let shape = |pair: &Pair| format!("rank {}, scale {}", pair.rank, pair.scale);
            return Err(AdapterError::Mismatch {
                module: module.to_owned(),
                first: shape(like),
                second: shape(&pair),
            });
        }
        for (sums, values) in [(a, &pair.a), (b, &pair.b)] {
            sums.iter_mut()
                .zip(values)
                .for_each(|(sum, value)| *sum += share * f64::from(*value));
        }
    }
    let (mut pair, a, b) = sum.ok_or(AdapterError::Empty)?;
    let rounded = |values: Vec<f64>| values.into_iter().map(|value| value as f32).collect();
    (pair.a, pair.b) = (rounded(a), rounded(b));
    Ok(pair)
}

#[cfg(test)]
#[path = "aggregate_tests.rs"]
mod tests;

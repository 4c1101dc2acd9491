//! The hidden rule: somewhere there are better weights, and the loss is the distance to them.
//!
//! With `W0` the base, `D` a hidden low-rank delta and `W` the weights of a candidate,
//! `e = |W - (W0 + D)|^2 / |D|^2`: 1 for the base, 0 for the solution. Record `j` has
//! `t_j` tokens and a loss of `t_j (1 + h_j e)` nats, `h_j` its own weight.
use std::collections::BTreeMap;

use anyhow::{Context as _, Result};
use cairn_stack::adapter::Pair;
use cairn_stack::checkpoint::Checkpoint;

use crate::tiny::{numbers, spec};

/// Size of the hidden delta's entries, before its factors are multiplied.
const SIZE: f32 = 0.2;

/// See the module.
#[derive(Debug, Clone)]
pub struct Puzzle {
    /// The better weights, by module.
    solution: BTreeMap<String, Vec<f64>>,
    /// `|D|^2`.
    size: f64,
}

/// The hidden delta as the pairs of an adapter.
#[must_use]
pub fn hidden_pairs() -> Vec<Pair> {
    let spec = spec();
    let pair = |(index, pair): (u64, &cairn_stack::adapter::PairSpec)| Pair {
        module: pair.module.clone(),
        rank: spec.rank,
        in_features: pair.in_features,
        out_features: pair.out_features,
        a: numbers(spec.rank * pair.in_features, 500 + index),
        b: numbers(pair.out_features * spec.rank, 600 + index)
            .iter()
            .map(|b| b * SIZE)
            .collect(),
        scale: spec.scale,
    };
    (0..).zip(&spec.pairs).map(pair).collect()
}

/// Adds `weight * scale * B A` to `out`, `[out, in]`.
pub fn add_delta(out: &mut [f64], pair: &Pair, weight: f64) {
    for (row, line) in out.chunks_mut(pair.in_features).enumerate() {
        for (column, cell) in line.iter_mut().enumerate() {
            let sum: f64 = (0..pair.rank)
                .map(|k| {
                    let (b, a) = (
                        pair.b[row * pair.rank + k],
                        pair.a[k * pair.in_features + column],
                    );
                    f64::from(b) * f64::from(a)
                })
                .sum();
            *cell += weight * pair.scale * sum;
        }
    }
}

impl Puzzle {
    /// The puzzle over a base.
    ///
    /// # Errors
    /// When the base cannot be read.
    pub fn new(base: &Checkpoint) -> Result<Self> {
        let mut solution = BTreeMap::new();
        let mut size = 0.0;
        for pair in hidden_pairs() {
            let mut weights = weights(base, &pair.module)?;
            let mut delta = vec![0.0; weights.len()];
            add_delta(&mut delta, &pair, 1.0);
            size += delta.iter().map(|d| d * d).sum::<f64>();
            weights.iter_mut().zip(&delta).for_each(|(w, d)| *w += d);
            solution.insert(pair.module, weights);
        }
        Ok(Self { solution, size })
    }

    /// `e` of a base with weighted adapters on it.
    ///
    /// # Errors
    /// When the base cannot be read.
    pub fn error(&self, base: &Checkpoint, adapters: &[(Vec<Pair>, f64)]) -> Result<f64> {
        let mut squared = 0.0;
        for (module, solution) in &self.solution {
            let mut now = weights(base, module)?;
            for (pairs, weight) in adapters {
                let found = pairs.iter().filter(|pair| pair.module == *module);
                found.for_each(|pair| add_delta(&mut now, pair, *weight));
            }
            squared += now
                .iter()
                .zip(solution)
                .map(|(w, s)| (w - s).powi(2))
                .sum::<f64>();
        }
        Ok(squared / self.size)
    }
}

/// Scored tokens of record `j`.
#[must_use]
pub const fn tokens(j: usize) -> u32 {
    3 + (j % 4) as u32
}

/// Loss of record `j`, nats, where the weights are `error` away.
#[must_use]
pub fn nll(j: usize, error: f64) -> f32 {
    let h = 0.8 + 0.1 * (j % 5) as f64;
    (f64::from(tokens(j)) * (1.0 + h * error)) as f32
}

/// The weights of a module, in f64.
fn weights(base: &Checkpoint, module: &str) -> Result<Vec<f64>> {
    let (_, values) = base
        .read_f32(&format!("{module}.weight"))
        .context("read a weight")?;
    Ok(values.into_iter().map(f64::from).collect())
}

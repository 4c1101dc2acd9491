//! A batch of rows as the tensors a forward pass reads.

use std::sync::OnceLock;

use burn::tensor::{Device, Int, Tensor, TensorData};

use cairn_stack::config::ModelConfig;

use super::ops::Rotate;
use super::rope::Frequencies;
use crate::data::Batch;

/// Added to the scores of pairs that may not see each other. Finite, so that a row of padding
/// cannot turn into NaN, and far below any score, so that `exp` of it is exactly 0.
const MASKED: f32 = -1e30;

/// What tokens see of their row.
struct Sight {
    first: Vec<u32>,
    mask: OnceLock<Tensor<5>>,
}

/// Everything of a batch that does not depend on the layer.
pub struct Input {
    /// Rows.
    pub rows: usize,
    /// Tokens a row.
    pub length: usize,
    /// Token ids, `[N]`.
    pub tokens: Tensor<1, Int>,
    /// Rotation of keys: cosine and signed sine, `[R or 1, L, 1, 2, E/2]`.
    pub rotation: (Tensor<5>, Tensor<5>),
    /// The same with attention's `1 / sqrt(E)` folded in, for queries.
    pub query_rotation: (Tensor<5>, Tensor<5>),
    /// What every token sees in layers that see everything before.
    sight: Sight,
    /// The same in layers with a sliding window, where the model has any.
    window_sight: Option<Sight>,
    /// Where scored tokens are predicted: flat index of the token before each, `[S]`.
    pub predictors: Vec<i32>,
    /// The scored tokens, `[S]`.
    pub targets: Vec<i32>,
    /// The example each scored token belongs to, `[S]`.
    pub owners: Vec<usize>,
    /// Tokens that are not padding.
    pub real_tokens: usize,
    /// Added to the token embeddings, `[N, D]`, in a training with noise.
    pub embedding_noise: Option<Tensor<2>>,
}

impl Input {
    /// Builds the tensors of a batch.
    #[must_use]
    pub fn new(config: &ModelConfig, batch: &Batch, device: &Device) -> Self {
        let (rows, length) = (batch.rows.len(), batch.length);
        // One document a row from position 0 on: causality alone keeps its tokens from the
        // padding behind them, and all rows share one mask and one rotation.
        let alike = batch.rows.iter().all(|row| row.examples.len() <= 1);
        let positions: Vec<u32> = if alike {
            (0..length as u32).collect()
        } else {
            batch
                .rows
                .iter()
                .flat_map(|row| row.positions.iter().copied())
                .collect()
        };
        let tables = if alike { 1 } else { rows };
        let shape = [tables, length, 1, 2, config.head_dim / 2];
        let frequencies = Frequencies::new(config);
        let table = |values: Vec<f32>| Tensor::from_data(TensorData::new(values, shape), device);
        let (cos, sin) = frequencies.table(&positions, 1.0);
        let scale = (config.head_dim as f64).powf(-0.5);
        let (query_cos, query_sin) = frequencies.table(&positions, scale as f32);
        let sight = |window: Option<usize>| {
            #[cfg(test)]
            let window = super::ops::bent::window(window);
            let first = if alike {
                first_seen(length, window, |_| 1)
            } else {
                let of_row =
                    |row: &crate::data::Row| first_seen(length, window, |t| row.segments[t]);
                batch.rows.iter().flat_map(of_row).collect()
            };
            #[cfg(test)]
            let first = super::ops::bent::first(first);
            Sight {
                first,
                mask: OnceLock::new(),
            }
        };
        let window = config.sliding_window.as_ref().map(|window| window.size);
        let tokens: Vec<i32> = batch
            .rows
            .iter()
            .flat_map(|row| row.tokens.iter().map(|token| *token as i32))
            .collect();
        let (predictors, targets, owners) = scored(batch);
        Self {
            rows,
            length,
            tokens: Tensor::from_data(TensorData::new(tokens, [rows * length]), device),
            rotation: (table(cos), table(sin)),
            query_rotation: (table(query_cos), table(query_sin)),
            sight: sight(None),
            window_sight: window.map(|size| sight(Some(size))),
            predictors,
            targets,
            owners,
            real_tokens: real_tokens(batch),
            embedding_noise: None,
        }
    }

    /// The first token that every token sees in a layer with this window: `[N]`, or `[L]` where all
    /// rows are alike.
    #[must_use]
    pub fn first(&self, window: Option<usize>) -> &[u32] {
        &self.sight(window).first
    }

    /// The same as an additive mask, `[R or 1, 1, 1, L, L]`; made when it is first asked for.
    #[must_use]
    pub fn mask(&self, window: Option<usize>) -> Tensor<5> {
        let Sight { first, mask } = self.sight(window);
        mask.get_or_init(|| {
            let (tables, length) = (first.len() / self.length, self.length);
            let values =
                TensorData::new(mask_values(first, length), [tables, 1, 1, length, length]);
            Tensor::from_data(values, &self.tokens.device())
        })
        .clone()
    }

    fn sight(&self, window: Option<usize>) -> &Sight {
        match (&self.window_sight, window) {
            (Some(sight), Some(_)) => sight,
            _ => &self.sight,
        }
    }

    /// Cosines and signed sines, where heads are rotated.
    #[must_use]
    pub fn rotation(&self, rotate: Rotate) -> Option<&(Tensor<5>, Tensor<5>)> {
        match rotate {
            Rotate::Queries => Some(&self.query_rotation),
            Rotate::Keys => Some(&self.rotation),
            Rotate::Not => None,
        }
    }
}

/// Tokens of a batch that are not padding.
#[must_use]
pub fn real_tokens(batch: &Batch) -> usize {
    let of_row = |row: &crate::data::Row| row.segments.iter().filter(|s| **s != 0).count();
    batch.rows.iter().map(of_row).sum()
}

/// Scored tokens of a batch.
#[must_use]
pub fn scored_tokens(batch: &Batch) -> usize {
    let of_row = |row: &crate::data::Row| row.scored.iter().skip(1).filter(|s| **s).count();
    batch.rows.iter().map(of_row).sum()
}

/// The first token that each sees: of its own document, inside the window. Never falls within a row.
fn first_seen(length: usize, window: Option<usize>, segment: impl Fn(usize) -> u32) -> Vec<u32> {
    let reach = window.unwrap_or(usize::MAX);
    let mut start = 0;
    (0..length)
        .map(|i| {
            if i > 0 && segment(i) != segment(i - 1) {
                start = i;
            }
            start.max((i + 1).saturating_sub(reach)) as u32
        })
        .collect()
}

/// `[tables, L, L]`: 0 where query `i` sees key `j`.
fn mask_values(first: &[u32], length: usize) -> Vec<f32> {
    let mut values = vec![MASKED; first.len() * length];
    for (place, first) in first.iter().enumerate() {
        let query = place % length;
        values[place * length + *first as usize..=place * length + query].fill(0.0);
    }
    values
}

/// Predictors, targets and owners of every scored token, row by row.
fn scored(batch: &Batch) -> (Vec<i32>, Vec<i32>, Vec<usize>) {
    let (mut predictors, mut targets, mut owners) = (Vec::new(), Vec::new(), Vec::new());
    for (number, row) in batch.rows.iter().enumerate() {
        for t in 1..row.tokens.len() {
            if row.scored[t] {
                predictors.push((number * batch.length + t - 1) as i32);
                targets.push(row.tokens[t] as i32);
                owners.push(row.examples[row.segments[t] as usize - 1]);
            }
        }
    }
    (predictors, targets, owners)
}

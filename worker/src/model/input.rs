//! A batch of rows as the tensors a forward pass reads.

use burn::tensor::{Device, Int, Tensor, TensorData};

use cairn_stack::config::ModelConfig;

use super::rope::Frequencies;
use crate::data::Batch;

/// Added to the scores of pairs that may not see each other. Finite, so that a row of padding
/// cannot turn into NaN, and far below any score, so that `exp` of it is exactly 0.
const MASKED: f32 = -1e30;

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
    /// Additive mask of layers that see everything before, `[R or 1, 1, 1, L, L]`.
    pub mask: Tensor<5>,
    /// Additive mask of layers with a sliding window, where the model has any.
    pub window_mask: Option<Tensor<5>>,
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
        let mask = |window: Option<usize>| {
            let values = if alike {
                mask_values(length, window, |_| 1)
            } else {
                let of_row =
                    |row: &crate::data::Row| mask_values(length, window, |t| row.segments[t]);
                batch.rows.iter().flat_map(of_row).collect()
            };
            let shape = [tables, 1, 1, length, length];
            Tensor::from_data(TensorData::new(values, shape), device)
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
            mask: mask(None),
            window_mask: window.map(|size| mask(Some(size))),
            predictors,
            targets,
            owners,
            real_tokens: real_tokens(batch),
            embedding_noise: None,
        }
    }

    /// The mask of a layer with this window.
    #[must_use]
    pub fn mask_for(&self, window: Option<usize>) -> Tensor<5> {
        match (&self.window_mask, window) {
            (Some(mask), Some(_)) => mask.clone(),
            _ => self.mask.clone(),
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

/// `[L, L]`: 0 where query `i` sees key `j`: not later, in the same document, inside the window.
fn mask_values(length: usize, window: Option<usize>, segment: impl Fn(usize) -> u32) -> Vec<f32> {
    let reach = window.unwrap_or(usize::MAX);
    let mut values = vec![MASKED; length * length];
    for i in 0..length {
        let first = (i + 1).saturating_sub(reach);
        for j in first..=i {
            if segment(i) == segment(j) {
                values[i * length + j] = 0.0;
            }
        }
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

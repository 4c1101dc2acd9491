//! A batch of rows as the tensors a forward pass reads.

use std::ops::Range;
use std::sync::OnceLock;

use burn::tensor::{Device, Int, Tensor, TensorData};

use cairn_stack::config::ModelConfig;

use super::ops::Rotate;
use super::pass::Tokens;
use super::rope::Frequencies;
use crate::data::Batch;

/// Added to the scores of pairs that may not see each other. Finite, so that a row of padding
/// cannot turn into NaN, and far below any score, so that `exp` of it is exactly 0.
const MASKED: f32 = -1e30;

/// What tokens see of their row.
struct Sight {
    /// The first token of all, `[N]`, or `[L]` where all rows are alike.
    first: Vec<u32>,
    on_device: OnceLock<Tensor<2, Int>>,
}

impl Sight {
    /// The first token of all, `[R or 1, L]`.
    fn on_device(&self, length: usize, device: &Device) -> Tensor<2, Int> {
        let tensor = self.on_device.get_or_init(|| {
            let values: Vec<i32> = self.first.iter().map(|first| *first as i32).collect();
            let shape = [values.len() / length, length];
            Tensor::from_data(TensorData::new(values, shape), device)
        });
        tensor.clone()
    }
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
    predictors: Tensor<1, Int>,
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
                on_device: OnceLock::new(),
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
            predictors: Tensor::from_data(TensorData::from(predictors.as_slice()), device),
            targets,
            owners,
            real_tokens: real_tokens(batch),
            embedding_noise: None,
        }
    }

    /// Where scored tokens are predicted.
    #[must_use]
    pub fn predictors(&self) -> Tokens<'_> {
        Tokens::Predictors(&self.predictors)
    }

    /// The first token that every token sees in a layer with this window: `[N]`, or `[L]` where all
    /// rows are alike.
    #[must_use]
    pub fn first(&self, window: Option<usize>) -> &[u32] {
        &self.sight(window).first
    }

    /// The same for some queries `l` and keys `m` of every row, as what is added to their scores,
    /// `[R or 1, 1, 1, l, m]`.
    #[must_use]
    pub fn mask(
        &self,
        window: Option<usize>,
        queries: Range<usize>,
        keys: Range<usize>,
    ) -> Tensor<5> {
        let device = self.tokens.device();
        let tables = self.first(window).len() / self.length;
        let first = self.sight(window).on_device(self.length, &device); // [R or 1, L]
        let first = first.slice_dim(1, queries.clone());
        let of_queries = |x: Tensor<2, Int>, tables| x.reshape([tables, 1, 1, queries.len(), 1]);
        let places = |range: &Range<usize>| {
            Tensor::<1, Int>::arange(range.start as i64..range.end as i64, &device)
        };
        let own = of_queries(places(&queries).unsqueeze(), 1);
        let keys_places = places(&keys).reshape([1, 1, 1, 1, keys.len()]);
        let before = keys_places.clone().lower(of_queries(first, tables));
        let hidden = before.bool_or(keys_places.greater(own));
        let seen = Tensor::zeros([tables, 1, 1, queries.len(), keys.len()], &device);
        seen.mask_fill(hidden, MASKED)
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

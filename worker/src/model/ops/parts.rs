//! Attention with burn's operations, some queries at a time: memory grows with the length of a row and
//! not with its square, and what lies behind the diagonal is not computed.

use std::ops::Range;

use burn::tensor::{Tensor, activation};

use super::{Attended, Rotate, merge_heads, split_heads};
use crate::model::input::Input;

/// Queries whose scores are held at one time: those of all in a row of 8,192 tokens would be 256 MiB a
/// head.
pub const QUERIES_MAX: usize = 512;

/// As [`super::attend`] has it.
pub(super) fn attend(
    q: Tensor<4>,
    k: Tensor<4>,
    v: Tensor<4>,
    window: Option<usize>,
    input: &Input,
) -> Attended {
    let [rows, heads, _, width] = q.dims();
    let of_part = |part: Part| {
        let values = part.of_keys(&v).unsqueeze_dim::<5>(2);
        let context = part.weights(&q, &k, window, input).matmul(values); // [R, K, G, l, E]
        context.reshape([rows, heads, part.queries.len(), width])
    };
    let context = Tensor::cat(parts(window, input).map(of_part).collect(), 2);
    Attended {
        merged: merge_heads(context, Rotate::Not, input),
        q,
        k,
        v,
        log_sums: None,
    }
}

/// As [`super::attend_backward`] has it.
///
/// # Shapes
/// - gradient: `[R, H, L, E]`
pub(super) fn attend_backward(
    gradient: &Tensor<4>,
    forward: Attended,
    window: Option<usize>,
    input: &Input,
) -> (Tensor<4>, Tensor<4>, Tensor<4>) {
    let Attended { q, k, v, .. } = forward;
    let ([rows, heads, _, width], kv_heads) = (q.dims(), k.dims()[1]);
    let out = split_heads(forward.merged, heads, Rotate::Not, input);
    let mean = (gradient.clone() * out).sum_dim(3); // [R, H, L, 1]
    let mut by_q = Vec::new();
    let (mut by_k, mut by_v) = (k.zeros_like(), v.zeros_like());
    for part in parts(window, input) {
        let weights = part.weights(&q, &k, window, input); // [R, K, G, l, m]
        let gradient = part.of_queries(gradient, kv_heads); // [R, K, G, l, E]
        let mean = part.of_queries(&mean, kv_heads);
        let keys = part.of_keys(&k).unsqueeze_dim::<5>(2); // [R, K, 1, m, E]
        let values = part.of_keys(&v).unsqueeze_dim::<5>(2).transpose();
        let slopes = weights.clone() * (gradient.clone().matmul(values) - mean);
        let queries = part.of_queries(&q, kv_heads);
        let by_queries = slopes.clone().matmul(keys);
        by_q.push(by_queries.reshape([rows, heads, part.queries.len(), width]));
        by_k = part.add_to_keys(by_k, slopes.transpose().matmul(queries));
        by_v = part.add_to_keys(by_v, weights.transpose().matmul(gradient));
    }
    (Tensor::cat(by_q, 2), by_k, by_v)
}

/// Some queries, `l` of them, and the keys that any of them sees, `m`.
struct Part {
    queries: Range<usize>,
    keys: Range<usize>,
}

/// All queries, part by part.
fn parts(window: Option<usize>, input: &Input) -> impl Iterator<Item = Part> {
    let (first, length) = (input.first(window), input.length);
    (0..length).step_by(QUERIES_MAX).map(move |begin| {
        let queries = begin..length.min(begin + QUERIES_MAX);
        // What is seen first never falls within a row.
        let from = first.iter().skip(begin).step_by(length).min();
        let keys = from.map_or(0, |first| *first as usize)..queries.end;
        Part { queries, keys }
    })
}

impl Part {
    /// `[R, H, L, E]` as `[R, K, G, l, E]`.
    fn of_queries(&self, x: &Tensor<4>, kv_heads: usize) -> Tensor<5> {
        let [rows, heads, _, width] = x.dims();
        let x = x.clone().slice_dim(2, self.queries.clone());
        let count = self.queries.len();
        x.reshape([rows, kv_heads, heads / kv_heads, count, width])
    }

    /// `[R, K, L, E]` as `[R, K, m, E]`.
    fn of_keys(&self, x: &Tensor<4>) -> Tensor<4> {
        x.clone().slice_dim(2, self.keys.clone())
    }

    /// `softmax(q kᵀ + mask)`, `[R, K, G, l, m]`.
    fn weights(
        &self,
        q: &Tensor<4>,
        k: &Tensor<4>,
        window: Option<usize>,
        input: &Input,
    ) -> Tensor<5> {
        let q = self.of_queries(q, k.dims()[1]);
        let keys = self.of_keys(k).unsqueeze_dim::<5>(2).transpose(); // [R, K, 1, E, m]
        let mask = input.mask(window, self.queries.clone(), self.keys.clone());
        activation::softmax(q.matmul(keys) + mask, 4)
    }

    /// Adds what came of a group's queries, `[R, K, G, m, E]`, where its keys are in `[R, K, L, E]`.
    fn add_to_keys(&self, onto: Tensor<4>, more: Tensor<5>) -> Tensor<4> {
        let [rows, kv_heads, _, width] = onto.dims();
        let count = self.keys.len();
        let more = more.sum_dim(2).reshape([rows, kv_heads, count, width]);
        let place = [0..rows, 0..kv_heads, self.keys.clone(), 0..width];
        let sum = onto.clone().slice(place.clone()) + more;
        onto.slice_assign(place, sum)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::data::{Batch, Row};
    use crate::device::DeviceName;
    use crate::model::ops;
    use burn::tensor::{Distribution, Tolerance};

    /// Two rows of documents, the longest of which reaches over three parts.
    fn input(window: usize) -> Input {
        let config = format!(
            r#"{{"architectures": ["MistralForCausalLM"], "model_type": "mistral", "hidden_act": "silu",
            "vocab_size": 8, "hidden_size": 32, "intermediate_size": 8, "num_hidden_layers": 1,
            "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
            "max_position_embeddings": 4096, "sliding_window": {window}}}"#
        );
        let config = cairn_stack::config::ModelConfig::from_json(config.as_bytes()).unwrap();
        let row = |documents: &[usize]| {
            let each = || documents.iter().enumerate();
            let length: usize = documents.iter().sum();
            Row {
                tokens: vec![1; length],
                scored: vec![true; length],
                positions: each().flat_map(|(_, length)| 0..*length as u32).collect(),
                segments: each()
                    .flat_map(|(n, length)| vec![n as u32 + 1; *length])
                    .collect(),
                examples: (0..documents.len()).collect(),
            }
        };
        let batch = Batch {
            rows: vec![row(&[20, 1_180]), row(&[600, 100, 500])],
            length: 1_200,
        };
        Input::new(&config, &batch, &DeviceName::default().open().unwrap())
    }

    #[test]
    fn part_by_part_it_is_the_same_attention() {
        let input = input(700);
        let device = DeviceName::default().open().unwrap();
        let normal = |heads: usize| -> Tensor<4> {
            Tensor::random(
                [2, heads, 1_200, 8],
                Distribution::Normal(0.0, 1.0),
                &device,
            )
        };
        let (q, k, v, gradient) = (normal(4), normal(2), normal(2), normal(4));
        for window in [None, Some(700)] {
            let whole = ops::attend(q.clone(), k.clone(), v.clone(), window, &input);
            let parts = attend(q.clone(), k.clone(), v.clone(), window, &input);
            let close = |a: Tensor<4>, b: Tensor<4>| {
                let tolerance = Tolerance::absolute(2e-4);
                a.into_data()
                    .assert_approx_eq::<f32>(&b.into_data(), tolerance);
            };
            let shape = [1, 1, 2_400, 32];
            close(
                whole.merged.clone().reshape(shape),
                parts.merged.clone().reshape(shape),
            );
            let merged = merge_heads(gradient.clone(), Rotate::Not, &input);
            let whole = ops::attend_backward(merged, whole, window, &input);
            let parts = attend_backward(&gradient, parts, window, &input);
            close(whole.0, parts.0);
            close(whole.1, parts.1);
            close(whole.2, parts.2);
        }
    }
}

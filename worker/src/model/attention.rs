//! Grouped-query self-attention.

use burn::tensor::{Tensor, activation};

use cairn_stack::config::Target;

use super::input::Input;
use super::linear::{Linear, RmsNorm};
use super::lora::LayerFactors;
use super::rope::rotate;

/// Attention of one block.
#[derive(Debug, Clone)]
pub struct Attention {
    /// Query projection, `D -> H E`.
    pub q: Linear,
    /// Key projection, `D -> K E`.
    pub k: Linear,
    /// Value projection, `D -> K E`.
    pub v: Linear,
    /// Output projection, `H E -> D`.
    pub o: Linear,
    /// Norms over each head of q and k (Qwen3).
    pub qk_norm: Option<(RmsNorm, RmsNorm)>,
    /// Query heads.
    pub heads: usize,
    /// Key-value heads.
    pub kv_heads: usize,
    /// Width of a head.
    pub head_dim: usize,
    /// Tokens seen back, itself included; `None` for all.
    pub window: Option<usize>,
}

impl Attention {
    /// `softmax(q kᵀ / sqrt(E) + mask) v`, projected back.
    ///
    /// # Shapes
    /// - x, output: `[N, D]`
    #[must_use]
    pub fn forward(&self, x: Tensor<2>, lora: LayerFactors<'_>, input: &Input) -> Tensor<2> {
        let (rows, length) = (input.rows, input.length);
        let (heads, kv_heads, width) = (self.heads, self.kv_heads, self.head_dim);
        let groups = heads / kv_heads;

        let mut q = self.q.forward(x.clone(), lora.get(Target::Q)); // [N, H E]
        let mut k = self.k.forward(x.clone(), lora.get(Target::K)); // [N, K E]
        let v = self.v.forward(x, lora.get(Target::V)); // [N, K E]
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            q = q_norm.forward(q.reshape([rows * length * heads, width])); // [N H, E]
            k = k_norm.forward(k.reshape([rows * length * kv_heads, width])); // [N K, E]
        }
        // The scale 1 / sqrt(E) is in the rotation of the queries.
        let q = rotate(
            q.reshape([rows, length, heads, 2, width / 2]),
            &input.query_rotation,
        );
        let k = rotate(
            k.reshape([rows, length, kv_heads, 2, width / 2]),
            &input.rotation,
        );

        // Keys and values keep one group and are broadcast over the G query heads they serve.
        let q = q
            .reshape([rows, length, kv_heads, groups, width])
            .permute([0, 2, 3, 1, 4]); // [R, K, G, L, E]
        let k = k
            .reshape([rows, length, kv_heads, 1, width])
            .permute([0, 2, 3, 4, 1]); // [R, K, 1, E, L]
        let v = v
            .reshape([rows, length, kv_heads, 1, width])
            .permute([0, 2, 3, 1, 4]); // [R, K, 1, L, E]
        let scores = q.matmul(k) + input.mask_for(self.window); // [R, K, G, L, L]
        let context = activation::softmax(scores, 4).matmul(v); // [R, K, G, L, E]
        let context = context
            .permute([0, 3, 1, 2, 4])
            .reshape([rows * length, heads * width]); // [N, H E]
        self.o.forward(context, lora.get(Target::O))
    }
}

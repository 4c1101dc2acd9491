//! One transformer block: attention and gated feed-forward, each behind a norm and a residual.

use burn::tensor::{Tensor, activation};

use cairn_stack::config::Target;

use super::attention::Attention;
use super::input::Input;
use super::linear::{Linear, RmsNorm};
use super::lora::LayerFactors;

/// Gated feed-forward layer (`SwiGLU`, arXiv 2002.05202).
#[derive(Debug, Clone)]
pub struct FeedForward {
    /// `D -> F`.
    pub gate: Linear,
    /// `D -> F`.
    pub up: Linear,
    /// `F -> D`.
    pub down: Linear,
}

impl FeedForward {
    /// `down(silu(gate(x)) · up(x))`.
    ///
    /// # Shapes
    /// - x, output: `[N, D]`
    #[must_use]
    pub fn forward(&self, x: Tensor<2>, lora: LayerFactors<'_>) -> Tensor<2> {
        let gate = self.gate.forward(x.clone(), lora.get(Target::Gate)); // [N, F]
        let up = self.up.forward(x, lora.get(Target::Up)); // [N, F]
        self.down
            .forward(activation::silu(gate) * up, lora.get(Target::Down))
    }
}

/// One block.
#[derive(Debug, Clone)]
pub struct Block {
    /// Before attention.
    pub attention_norm: RmsNorm,
    /// Attention.
    pub attention: Attention,
    /// Before the feed-forward layer.
    pub feed_forward_norm: RmsNorm,
    /// Feed-forward layer.
    pub feed_forward: FeedForward,
}

impl Block {
    /// `h = x + attention(norm(x)); h + feed_forward(norm(h))`.
    ///
    /// # Shapes
    /// - x, output: `[N, D]`
    #[must_use]
    pub fn forward(&self, x: Tensor<2>, lora: LayerFactors<'_>, input: &Input) -> Tensor<2> {
        let normed = self.attention_norm.forward(x.clone());
        let h = x + self.attention.forward(normed, lora, input);
        let normed = self.feed_forward_norm.forward(h.clone());
        h + self.feed_forward.forward(normed, lora)
    }
}

//! One transformer block: attention and gated feed-forward, each behind a norm and a residual.

use burn::tensor::Tensor;

use cairn_stack::config::Target;

use super::attention::{self, Attention};
use super::input::Input;
use super::linear::{Linear, RmsNorm};
use super::lora::{LayerFactors, Wanted};
use super::ops;
use super::pass::{Back, LayerGradients, Narrows, There, Tokens};

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

/// What the way back through a block reads. Norms and the gate's product are formed again: they cost
/// a pass over memory each, where a kept tensor costs two and stays.
#[derive(Debug, Clone)]
pub struct Kept {
    /// The block's input, `[N, D]`.
    pub x: Tensor<2>,
    attention: attention::Kept,
    /// Between the halves, `[S, D]`.
    middle: Tensor<2>,
    /// `[S, F]`.
    gate: Tensor<2>,
    /// `[S, F]`.
    up: Tensor<2>,
    narrows: Narrows,
}

impl Block {
    /// Bytes of its weights on their device.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let (attention, mlp) = (&self.attention, &self.feed_forward);
        let linears = [
            &attention.q,
            &attention.k,
            &attention.v,
            &attention.o,
            &mlp.gate,
            &mlp.up,
            &mlp.down,
        ];
        let norms = attention.qk_norm.iter().flat_map(|(q, k)| [q, k]);
        let norms = norms.chain([&self.attention_norm, &self.feed_forward_norm]);
        linears.into_iter().map(Linear::bytes).sum::<usize>()
            + norms.map(RmsNorm::bytes).sum::<usize>()
    }

    /// `h = x + attention(norm(x)); h + feed_forward(norm(h))`, for some tokens.
    ///
    /// # Shapes
    /// - x: `[N, D]`
    /// - output: `[S, D]`
    #[must_use]
    pub fn forward(
        &self,
        x: Tensor<2>,
        lora: LayerFactors<'_>,
        tokens: Tokens<'_>,
        input: &Input,
    ) -> (Tensor<2>, Kept) {
        let mut there = There::new(lora);
        let normed = self.attention_norm.forward(&x);
        let (middle, attention) = self
            .attention
            .forward(&normed, &x, &mut there, tokens, input);
        let normed = self.feed_forward_norm.forward(&middle);
        let FeedForward {
            gate: gates,
            up: ups,
            down,
        } = &self.feed_forward;
        let gate = there.project(Target::Gate, gates, &normed, None); // [S, F]
        let up = there.project(Target::Up, ups, &normed, None); // [S, F]
        drop(normed);
        let product = ops::swiglu(&gate, &up);
        let y = there.project(Target::Down, down, &product, Some(middle.clone()));
        let kept = Kept {
            x,
            attention,
            middle,
            gate,
            up,
            narrows: there.narrows,
        };
        (y, kept)
    }

    /// From the gradient by the output, the gradient by x, and the gradients of the pairs. Where
    /// `below` says that nothing below is trained, there is none by x.
    ///
    /// # Shapes
    /// - gradient: `[S, D]`
    /// - output: `[N, D]`
    #[must_use]
    pub fn backward(
        &self,
        gradient: Tensor<2>,
        kept: Kept,
        lora: LayerFactors<'_>,
        tokens: Tokens<'_>,
        (wanted, below): (Wanted, bool),
        input: &Input,
    ) -> (Option<Tensor<2>>, LayerGradients) {
        let mut back = Back {
            lora,
            tokens,
            narrows: kept.narrows,
            wanted,
            found: LayerGradients::default(),
        };
        let FeedForward { gate, up, down } = &self.feed_forward;
        let at_down = back.at(Target::Down, &gradient);
        let by_product = back.through(&at_down, down, None);
        let gated = ops::swiglu_backward(by_product, kept.gate, kept.up);
        back.learn(at_down, &gated.product);
        let at_gate = back.at(Target::Gate, &gated.gate);
        let at_up = back.at(Target::Up, &gated.up);
        let by_normed = back.through(&at_gate, gate, None);
        let by_normed = back.through(&at_up, up, Some(by_normed));
        let (normed, inverse) = self.feed_forward_norm.with_inverse(&kept.middle);
        back.learn(at_gate, &normed);
        back.learn(at_up, &normed);
        drop((gated, normed));
        let norm = &self.feed_forward_norm;
        let gradient = norm.backward(gradient, &by_normed, &kept.middle, &inverse);

        let (normed, inverse) = self.attention_norm.with_inverse(&kept.x);
        let by_normed =
            self.attention
                .backward(&normed, &gradient, kept.attention, &mut back, below, input);
        let by_x = by_normed.map(|by_normed| {
            let gradient = tokens.among(kept.x.dims()[0], gradient);
            self.attention_norm
                .backward(gradient, &by_normed, &kept.x, &inverse)
        });
        (by_x, back.found)
    }
}

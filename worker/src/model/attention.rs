//! Grouped-query self-attention, there and back.

use burn::tensor::Tensor;

use cairn_stack::config::Target;

use super::input::Input;
use super::linear::{Linear, RmsNorm};
use super::ops::{self, Attended, Rotate};
use super::pass::{Back, There, Tokens};

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

/// What the way back reads.
#[derive(Debug, Clone)]
pub struct Kept {
    attended: Attended,
    /// Queries and keys before their norms, `[N H, E]` and `[N K, E]`, with the inverse roots.
    raw: Option<[(Tensor<2>, Tensor<2>); 2]>,
}

impl Attention {
    /// `softmax(q kᵀ / sqrt(E) + mask) v`, projected back and added to `onto`, for `tokens`, which are
    /// those that are passed from there on.
    ///
    /// # Shapes
    /// - x, onto: `[N, D]`
    /// - output: `[S, D]`
    #[must_use]
    pub fn forward<'i>(
        &self,
        x: &Tensor<2>,
        onto: &Tensor<2>,
        there: &mut There<'i>,
        tokens: Tokens<'i>,
        input: &Input,
    ) -> (Tensor<2>, Kept) {
        let mut q = there.project(Target::Q, &self.q, x, None); // [N, H E]
        let mut k = there.project(Target::K, &self.k, x, None); // [N, K E]
        let v = there.project(Target::V, &self.v, x, None); // [N, K E]
        let mut raw = None;
        if let Some((q_norm, k_norm)) = &self.qk_norm {
            let norm = |norm: &RmsNorm, x: Tensor<2>| {
                let shape = x.dims();
                let x = self.by_head(x);
                let (y, inverse) = norm.with_inverse(&x);
                (y.reshape(shape), (x, inverse))
            };
            let (q_raw, k_raw);
            (q, q_raw) = norm(q_norm, q);
            (k, k_raw) = norm(k_norm, k);
            raw = Some([q_raw, k_raw]);
        }
        let q = ops::split_heads(q, self.heads, Rotate::Queries, input);
        let k = ops::split_heads(k, self.kv_heads, Rotate::Keys, input);
        let v = ops::split_heads(v, self.kv_heads, Rotate::Not, input);
        let attended = ops::attend(q, k, v, self.window, input);
        there.tokens = tokens;
        let (merged, onto) = (tokens.of(&attended.merged), tokens.of(onto));
        let y = there.project(Target::O, &self.o, &merged, Some(onto));
        (y, Kept { attended, raw })
    }

    /// From the gradient by the output, the gradient by x; `None` where `below` says that nothing
    /// below is trained.
    ///
    /// # Shapes
    /// - x, output: `[N, D]`
    /// - gradient: `[S, D]`
    pub fn backward(
        &self,
        x: &Tensor<2>,
        gradient: &Tensor<2>,
        kept: Kept,
        back: &mut Back<'_>,
        below: bool,
        input: &Input,
    ) -> Option<Tensor<2>> {
        let Kept { attended, raw } = kept;
        let at_o = back.at(Target::O, gradient);
        let by_merged = back.through(&at_o, &self.o, None);
        let merged = back.tokens.of(&attended.merged);
        back.learn(at_o, &merged);
        let by_merged = back.tokens.among(x.dims()[0], by_merged);
        back.tokens = Tokens::All;
        let (q, k, v) = ops::attend_backward(by_merged, attended, self.window, input);
        let mut q = ops::merge_heads(q, Rotate::Queries, input); // [N, H E]
        let mut k = ops::merge_heads(k, Rotate::Keys, input); // [N, K E]
        let v = ops::merge_heads(v, Rotate::Not, input); // [N, K E]
        if let (Some((q_norm, k_norm)), Some([q_raw, k_raw])) = (&self.qk_norm, &raw) {
            q = self.norm_backward(q_norm, q, q_raw);
            k = self.norm_backward(k_norm, k, k_raw);
        }
        let projections = [
            (Target::Q, &self.q, q),
            (Target::K, &self.k, k),
            (Target::V, &self.v, v),
        ];
        let mut by_x = None;
        for (target, linear, gradient) in &projections {
            let arrived = back.at(*target, gradient);
            if below {
                by_x = Some(back.through(&arrived, linear, by_x));
            }
            back.learn(arrived, x);
        }
        by_x
    }

    /// `[N, heads E]` as `[N heads, E]`.
    fn by_head(&self, x: Tensor<2>) -> Tensor<2> {
        let [rows, width] = x.dims();
        x.reshape([rows * width / self.head_dim, self.head_dim])
    }

    fn norm_backward(
        &self,
        norm: &RmsNorm,
        gradient: Tensor<2>,
        (raw, inverse): &(Tensor<2>, Tensor<2>),
    ) -> Tensor<2> {
        let shape = gradient.dims();
        norm.backward(raw.zeros_like(), &self.by_head(gradient), raw, inverse)
            .reshape(shape)
    }
}

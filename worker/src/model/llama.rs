//! The whole model.

use burn::tensor::{Device, Tensor};

use cairn_stack::config::ModelConfig;

use super::block::{Block, Kept};
use super::input::Input;
use super::linear::RmsNorm;
use super::lora::{Adapter, Gradient, Wanted};
use super::loss::loss_and_gradient;
use super::ops;
use super::pass::Tokens;
use super::weight::Weight;
use crate::memory::Memory;

/// A Llama-family model with frozen weights.
#[derive(Debug, Clone)]
pub struct Llama {
    /// Its shape.
    pub config: ModelConfig,
    /// Where it is.
    pub device: Device,
    /// Token embedding, `[V, D]`.
    pub embedding: Weight,
    /// Blocks, first to last.
    pub blocks: Vec<Block>,
    /// Before the head.
    pub norm: RmsNorm,
    /// Output head, `[V, D]`; the embedding itself where the model ties them.
    pub head: Weight,
}

/// What is kept of a block for the way back.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Keep {
    /// Everything that the way back reads.
    Everything,
    /// Its input alone; the rest is computed again (arXiv 1604.06174): a third more work, and the same
    /// numbers.
    Inputs,
}

impl Keep {
    /// As `--json` prints it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::Everything => "everything",
            Self::Inputs => "inputs",
        }
    }

    /// Everything, unless that is more than half of the memory that is left.
    #[must_use]
    pub fn that_fits(needed: u64, available: Option<u64>) -> Self {
        match available {
            Some(available) if needed > available / 2 => Self::Inputs,
            _ => Self::Everything,
        }
    }
}

/// What was kept of one block.
#[expect(clippy::large_enum_variant, reason = "one a block")]
enum Step {
    Everything(Kept),
    Input(Tensor<2>),
}

/// What the way back through the whole model reads.
struct Tape {
    steps: Vec<Step>,
}

impl Llama {
    /// The residual stream of some tokens after the last block, before the final norm, `[S, D]`.
    fn forward(&self, adapter: Option<&Adapter>, tokens: Tokens<'_>, input: &Input) -> Tensor<2> {
        ops::inside(|| {
            let mut x = self.embed(input);
            for (layer, block) in self.blocks.iter().enumerate() {
                let (lora, tokens) = (Adapter::layer(adapter, layer), self.above(layer, tokens));
                (x, _) = block.forward(x, lora, tokens, input);
            }
            x
        })
    }

    /// The tokens that are wanted of a layer: all, but of the last.
    fn above<'a>(&self, layer: usize, tokens: Tokens<'a>) -> Tokens<'a> {
        if layer + 1 == self.blocks.len() {
            tokens
        } else {
            Tokens::All
        }
    }

    /// As [`Self::forward`] at the predictors, and what [`Self::backward`] reads.
    fn forward_to_train(&self, adapter: &Adapter, input: &Input, keep: Keep) -> (Tensor<2>, Tape) {
        let mut x = self.embed(input);
        let lowest = adapter.lowest_layer().unwrap_or(self.blocks.len());
        let mut steps = Vec::with_capacity(self.blocks.len());
        for (layer, block) in self.blocks.iter().enumerate() {
            let lora = Adapter::layer(Some(adapter), layer);
            let tokens = self.above(layer, input.predictors());
            let (y, kept) = block.forward(x, lora, tokens, input);
            if layer >= lowest {
                steps.push(match keep {
                    Keep::Everything => Step::Everything(kept),
                    Keep::Inputs => Step::Input(kept.x),
                });
            }
            x = y;
        }
        (x, Tape { steps })
    }

    /// From the gradient by the residual stream of the predictors after the last block, the gradients of
    /// every pair, in the order of [`Adapter::factors`].
    ///
    /// # Shapes
    /// - gradient: `[S, D]`
    fn backward(
        &self,
        gradient: Tensor<2>,
        tape: Tape,
        adapter: &Adapter,
        wanted: Wanted,
        input: &Input,
    ) -> Vec<Gradient> {
        let lowest = self.blocks.len() - tape.steps.len();
        let mut by_x = Some(gradient);
        let mut found = Vec::new();
        for (place, step) in tape.steps.into_iter().enumerate().rev() {
            let Some(gradient) = by_x.take() else { break };
            let layer = lowest + place;
            let (block, lora) = (&self.blocks[layer], Adapter::layer(Some(adapter), layer));
            let tokens = self.above(layer, input.predictors());
            let kept = match step {
                Step::Everything(kept) => kept,
                Step::Input(x) => block.forward(x, lora, tokens, input).1,
            };
            let asked = (wanted, place > 0);
            let (below, of_layer) = block.backward(gradient, kept, lora, tokens, asked, input);
            by_x = below;
            found.push(of_layer);
        }
        found.into_iter().rev().flatten().flatten().collect()
    }

    /// Bytes of all weights on their device; a tied head counts once.
    #[must_use]
    pub fn bytes(&self) -> usize {
        let blocks: usize = self.blocks.iter().map(Block::bytes).sum();
        let head = if self.config.tied {
            0
        } else {
            self.head.bytes()
        };
        self.embedding.bytes() + head + blocks + self.norm.bytes()
    }

    /// Bytes that [`Keep::Everything`] keeps of so many tokens, pairs left out: they are thin.
    #[must_use]
    pub fn kept_bytes(&self, tokens: usize) -> u64 {
        let config = &self.config;
        let heads = config.heads * config.head_dim;
        let of_queries = if config.qk_norm { 3 } else { 2 } * heads + config.heads;
        let of_keys = if config.qk_norm { 3 } else { 2 } * config.kv_heads * config.head_dim;
        let a_token = 2 * config.hidden_size + of_queries + of_keys + 2 * config.intermediate_size;
        (a_token * config.layers * tokens * size_of::<f32>()) as u64
    }

    fn embed(&self, input: &Input) -> Tensor<2> {
        let x = self.embedding.rows(input.tokens.clone()); // [N, D]
        match &input.embedding_noise {
            Some(noise) => x + noise.clone(),
            None => x,
        }
    }

    /// What the head reads to predict the scored tokens: the final norm of the residual stream at their
    /// predictors. The head is the largest product of a small model, the last block's feed-forward layer
    /// has a good part of the others, and most tokens of a prompt are not scored.
    ///
    /// # Shapes
    /// - output: `[S, D]`
    #[must_use]
    pub fn normed(&self, adapter: Option<&Adapter>, input: &Input) -> Tensor<2> {
        let hidden = self.forward(adapter, input.predictors(), input);
        self.norm.forward(&hidden)
    }

    /// Summed loss of a batch in nats, and `scale` times its gradient by every pair. Keeps what fits.
    #[must_use]
    pub fn loss_and_gradients(
        &self,
        adapter: &Adapter,
        input: &Input,
        wanted: Wanted,
        scale: f64,
    ) -> (f64, Vec<Gradient>) {
        let keep = self.keep(input);
        self.loss_and_gradients_keeping(keep, adapter, input, wanted, scale)
    }

    /// The same, keeping what is said.
    #[must_use]
    pub fn loss_and_gradients_keeping(
        &self,
        keep: Keep,
        adapter: &Adapter,
        input: &Input,
        wanted: Wanted,
        scale: f64,
    ) -> (f64, Vec<Gradient>) {
        self.gradients_of(keep, adapter, input, wanted, |normed| {
            loss_and_gradient(self, normed, &input.targets, scale)
        })
    }

    /// What fits of a batch.
    #[must_use]
    pub fn keep(&self, input: &Input) -> Keep {
        let needed = self.kept_bytes(input.rows * input.length);
        let memory = ops::is_host(&self.device).then(Memory::now).flatten();
        Keep::that_fits(needed, memory.map(|memory| memory.available))
    }

    /// The gradients of any loss by every pair. `loss` is given what the head reads at the scored
    /// tokens, `[S, D]`, and answers with the loss and its gradient by that; whatever else it needs to
    /// know of the batch, it is asked once, between the way there and the way back.
    pub fn gradients_of<L: Send>(
        &self,
        keep: Keep,
        adapter: &Adapter,
        input: &Input,
        wanted: Wanted,
        loss: impl FnOnce(&Tensor<2>) -> (L, Tensor<2>) + Send,
    ) -> (L, Vec<Gradient>) {
        ops::inside(|| {
            let (hidden, tape) = self.forward_to_train(adapter, input, keep); // [S, D]
            let (normed, inverse) = self.norm.with_inverse(&hidden);
            let (loss, by_normed) = loss(&normed);
            let zeros = hidden.zeros_like();
            let gradient = self.norm.backward(zeros, &by_normed, &hidden, &inverse);
            (loss, self.backward(gradient, tape, adapter, wanted, input))
        })
    }

    /// Logits of every token, `[N, V]`; for tests and small inputs.
    #[must_use]
    pub fn logits(&self, adapter: Option<&Adapter>, input: &Input) -> Tensor<2> {
        let hidden = self
            .norm
            .forward(&self.forward(adapter, Tokens::All, input));
        self.head.forward(&hidden, None)
    }
}

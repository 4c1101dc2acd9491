//! The whole model.

use burn::tensor::{Device, Int, Tensor, TensorData};

use cairn_stack::config::ModelConfig;

use super::block::Block;
use super::input::Input;
use super::linear::RmsNorm;
use super::lora::Adapter;

/// A Llama-family model with frozen weights.
#[derive(Debug, Clone)]
pub struct Llama {
    /// Its shape.
    pub config: ModelConfig,
    /// Token embedding, `[V, D]`.
    pub embedding: Tensor<2>,
    /// Blocks, first to last.
    pub blocks: Vec<Block>,
    /// Before the head.
    pub norm: RmsNorm,
    /// Output head, `[V, D]`; the embedding itself where the model ties them.
    pub head: Tensor<2>,
}

impl Llama {
    /// The residual stream after the last block, before the final norm.
    ///
    /// # Shapes
    /// - output: `[N, D]`
    #[must_use]
    pub fn forward(&self, adapter: Option<&Adapter>, input: &Input) -> Tensor<2> {
        let mut x = self.embedding.clone().select(0, input.tokens.clone()); // [N, D]
        if let Some(noise) = &input.embedding_noise {
            x = x + noise.clone();
        }
        for (layer, block) in self.blocks.iter().enumerate() {
            x = block.forward(x, Adapter::layer(adapter, layer), input);
        }
        x
    }

    /// What the head reads: the final norm of the residual stream at some tokens only. The head
    /// is the largest product of a small model, and most tokens of a prompt are not scored.
    ///
    /// # Shapes
    /// - hidden: `[N, D]`
    /// - places: flat indices, `[S]`
    /// - output: `[S, D]`
    #[must_use]
    pub fn normed_at(&self, hidden: Tensor<2>, places: &[i32]) -> Tensor<2> {
        let places = indices(places, &self.embedding.device());
        self.norm.forward(hidden.select(0, places))
    }

    /// Logits of every token, `[N, V]`; for tests and small inputs.
    #[must_use]
    pub fn logits(&self, adapter: Option<&Adapter>, input: &Input) -> Tensor<2> {
        let hidden = self.norm.forward(self.forward(adapter, input));
        hidden.matmul(self.head.clone().transpose())
    }
}

/// Indices as a tensor, `[count]`.
pub(super) fn indices(places: &[i32], device: &Device) -> Tensor<1, Int> {
    Tensor::from_data(TensorData::new(places.to_vec(), [places.len()]), device)
}

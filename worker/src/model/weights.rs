//! From a checkpoint folder to a [`Llama`], one tensor at a time.

use burn::tensor::{Device, Tensor, TensorData};

use std::path::Path;

use cairn_stack::checkpoint::{Checkpoint, CheckpointError};
use cairn_stack::config::{ModelConfig, Target};
use cairn_stack::digest::{Digest, DigestHasher};

use super::attention::Attention;
use super::block::{Block, FeedForward};
use super::linear::{Linear, RmsNorm};
use super::llama::Llama;
use super::weight::Weight;

/// Why weights could not be loaded.
pub type WeightsError = CheckpointError;

/// Loads the weights of a folder onto a device, in f32, and their digest on the way.
///
/// # Errors
/// When a file is missing or broken, or the tensors are not exactly those of the config.
pub fn load(
    dir: &Path,
    config: ModelConfig,
    device: &Device,
) -> Result<(Llama, Digest), WeightsError> {
    let checkpoint = Checkpoint::open(dir)?;
    let mut reader = Reader {
        checkpoint,
        device: device.clone(),
        hasher: DigestHasher::new(),
    };
    let embedding = reader.matrix("model.embed_tokens.weight")?;
    let blocks = (0..config.layers)
        .map(|layer| reader.block(&config, layer))
        .collect::<Result<_, _>>()?;
    let norm = reader.norm(&config, "model.norm")?;
    let head = if config.tied {
        embedding.clone()
    } else {
        reader.matrix("lm_head.weight")?
    };
    let llama = Llama {
        config,
        device: device.clone(),
        embedding,
        blocks,
        norm,
        head,
    };
    Ok((llama, reader.hasher.finish().0))
}

/// Reads tensors in the order they are asked for.
struct Reader {
    checkpoint: Checkpoint,
    device: Device,
    hasher: DigestHasher,
}

impl Reader {
    fn block(&mut self, config: &ModelConfig, layer: usize) -> Result<Block, WeightsError> {
        let prefix = format!("model.layers.{layer}");
        let mut linear = |target| self.linear(config, layer, target);
        let (q, k, v, o) = (
            linear(Target::Q)?,
            linear(Target::K)?,
            linear(Target::V)?,
            linear(Target::O)?,
        );
        let (gate, up, down) = (
            linear(Target::Gate)?,
            linear(Target::Up)?,
            linear(Target::Down)?,
        );
        let qk_norm = if config.qk_norm {
            let q_norm = self.norm(config, &format!("{prefix}.self_attn.q_norm"))?;
            Some((
                q_norm,
                self.norm(config, &format!("{prefix}.self_attn.k_norm"))?,
            ))
        } else {
            None
        };
        let attention = Attention {
            q,
            k,
            v,
            o,
            qk_norm,
            heads: config.heads,
            kv_heads: config.kv_heads,
            head_dim: config.head_dim,
            window: config.window(layer),
        };
        Ok(Block {
            attention_norm: self.norm(config, &format!("{prefix}.input_layernorm"))?,
            attention,
            feed_forward_norm: self.norm(config, &format!("{prefix}.post_attention_layernorm"))?,
            feed_forward: FeedForward { gate, up, down },
        })
    }

    fn linear(
        &mut self,
        config: &ModelConfig,
        layer: usize,
        target: Target,
    ) -> Result<Linear, WeightsError> {
        let module = config.module(layer, target);
        let weight = self.matrix(&format!("{module}.weight"))?;
        let bias = if config.bias(target) {
            Some(self.vector(&format!("{module}.bias"))?)
        } else {
            None
        };
        Ok(Linear { weight, bias })
    }

    fn norm(&mut self, config: &ModelConfig, module: &str) -> Result<RmsNorm, WeightsError> {
        let weight = self.vector(&format!("{module}.weight"))?;
        Ok(RmsNorm {
            weight,
            epsilon: config.rms_norm_eps,
        })
    }

    fn matrix(&mut self, name: &str) -> Result<Weight, WeightsError> {
        let (shape, values) = self.values(name)?;
        Ok(Weight::new(values, [shape[0], shape[1]], &self.device))
    }

    fn vector(&mut self, name: &str) -> Result<Tensor<1>, WeightsError> {
        let (shape, values) = self.values(name)?;
        Ok(Tensor::from_data(
            TensorData::new(values, shape),
            &self.device,
        ))
    }

    /// One tensor; the checkpoint has compared its shape with the config's.
    fn values(&mut self, name: &str) -> Result<(Vec<usize>, Vec<f32>), WeightsError> {
        let (shape, values) = self.checkpoint.read_f32(name)?;
        let data = TensorData::new(values, shape.clone());
        self.hasher.update(name.as_bytes());
        self.hasher.update(data.as_bytes());
        Ok((
            shape,
            data.try_into_vec().expect("the numbers that went in"),
        ))
    }
}

//! From a checkpoint folder to a [`Llama`], one tensor at a time.

use burn::tensor::{Device, Tensor, TensorData};

use std::path::Path;

use cairn_stack::checkpoint::{Checkpoint, CheckpointError};
use cairn_stack::config::{ModelConfig, Target};
use cairn_stack::digest::{Digest, DigestHasher};
use cairn_stack::quantize::Quantize;
use cairn_stack::tensors::Dtype;

use super::attention::Attention;
use super::block::{Block, FeedForward};
use super::linear::{Linear, RmsNorm};
use super::llama::Llama;
use super::weight::{Arriving, Weight};

/// Why weights could not be loaded.
pub type WeightsError = CheckpointError;

/// Numbers that are read at once: 4 MiB in f32, a multiple of every format's blocks. What loading takes
/// beside the model itself is a few of these.
const PIECE: usize = 1 << 20;

/// Loads the weights of a folder onto a device, a piece of a tensor at a time, and their digest in f32 on
/// the way. The linear layers of the blocks are quantised as is said; the digest is of what was read.
///
/// # Errors
/// When a file is missing or broken, or the tensors are not exactly those of the config.
pub fn load(
    dir: &Path,
    config: ModelConfig,
    quantize: Quantize,
    device: &Device,
) -> Result<(Llama, Digest), WeightsError> {
    let checkpoint = Checkpoint::open(dir)?;
    let mut reader = Reader {
        checkpoint,
        quantize,
        device: device.clone(),
        hasher: DigestHasher::new(),
    };
    let embedding = reader.matrix("model.embed_tokens.weight", Quantize::None)?;
    let blocks = (0..config.layers)
        .map(|layer| reader.block(&config, layer))
        .collect::<Result<_, _>>()?;
    let norm = reader.norm(&config, "model.norm")?;
    let head = if config.tied {
        embedding.clone()
    } else {
        reader.matrix("lm_head.weight", Quantize::None)?
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
    quantize: Quantize,
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
        let weight = self.matrix(&format!("{module}.weight"), self.quantize)?;
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

    /// One matrix; the checkpoint has compared its shape with the config's.
    fn matrix(&mut self, name: &str, quantize: Quantize) -> Result<Weight, WeightsError> {
        let Self {
            checkpoint,
            hasher,
            device,
            ..
        } = self;
        let shape = checkpoint.shape(name)?;
        let mut arriving = Arriving::new([shape[0], shape[1]], quantize, device);
        let mut bytes = Vec::new();
        hasher.update(name.as_bytes());
        checkpoint.read_pieces(name, PIECE, &mut |piece| {
            Dtype::F32.encode(piece, &mut bytes);
            hasher.update(&bytes);
            arriving.push(piece);
        })?;
        Ok(arriving.finish())
    }

    fn vector(&mut self, name: &str) -> Result<Tensor<1>, WeightsError> {
        let (shape, values) = self.checkpoint.read_f32(name)?;
        let data = TensorData::new(values, shape);
        self.hasher.update(name.as_bytes());
        self.hasher.update(data.as_bytes());
        Ok(Tensor::from_data(data, &self.device))
    }
}

//! What the canary trains: models, pairs and records that are functions of the names of their parts.
//! `worker/reference/generate_canary.py` makes the same.

use burn::tensor::{Device, Tensor, TensorData};

use cairn_stack::adapter::Pair;
use cairn_stack::config::{ModelConfig, Target};
use cairn_stack::quantize::Quantize;

use super::reference::Reference;
use crate::data::{Batch, Example, batches as cut, pack};
use crate::model::Llama;
use crate::model::attention::Attention;
use crate::model::block::{Block, FeedForward};
use crate::model::linear::{Linear, RmsNorm};
use crate::model::weight::Weight;

/// What B starts with, at most: as large as it is after training, so that A has gradients too.
const B_START: f32 = 1.0 / 16.0;

/// splitmix64 (Steele, Lea and Flood 2014), its state the FNV-1a hash of a name.
struct Stream(u64);

impl Stream {
    fn of(name: &str) -> Self {
        let hash = |state: u64, byte: u8| (state ^ u64::from(byte)).wrapping_mul(0x100_0000_01b3);
        Self(name.bytes().fold(0xcbf2_9ce4_8422_2325, hash))
    }

    /// Numbers in [-1, 1) of so many bits, at most 24, times `scale`.
    fn uniform(self, count: usize, bits: u32, scale: f32) -> Vec<f32> {
        let unit = 1.0 / (1_u32 << (bits - 1)) as f32;
        self.take(count)
            .map(|number| ((number >> (64 - bits)) as f32 * unit - 1.0) * scale)
            .collect()
    }
}

impl Iterator for Stream {
    type Item = u64;

    fn next(&mut self) -> Option<u64> {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let z = (self.0 ^ (self.0 >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        let z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        Some(z ^ (z >> 31))
    }
}

/// Sixty-four signs for every number of a factor.
pub fn signs(path: &str) -> impl Iterator<Item = u64> {
    Stream::of(&format!("{path}.signs"))
}

/// A power of two near `1 / sqrt(features)`.
fn scale(features: usize) -> f32 {
    let halvings = (features.ilog2() - 1) / 2;
    1.0 / (1_u32 << halvings) as f32
}

/// The model of a config on a device.
pub fn model(config: &ModelConfig, device: &Device) -> Llama {
    let maker = Maker { config, device };
    Llama {
        config: config.clone(),
        device: device.clone(),
        embedding: maker.matrix(
            "model.embed_tokens",
            [config.vocab_size, config.hidden_size],
        ),
        blocks: (0..config.layers).map(|layer| maker.block(layer)).collect(),
        norm: maker.norm("model.norm", config.hidden_size),
        head: maker.matrix("lm_head", [config.vocab_size, config.hidden_size]),
    }
}

struct Maker<'a> {
    config: &'a ModelConfig,
    device: &'a Device,
}

impl Maker<'_> {
    fn block(&self, layer: usize) -> Block {
        let config = self.config;
        let linear = |target| self.linear(layer, target);
        let prefix = format!("model.layers.{layer}");
        let head_norm = |name: &str| {
            let name = format!("{prefix}.self_attn.{name}_norm");
            self.norm(&name, config.head_dim)
        };
        Block {
            attention_norm: self.norm(&format!("{prefix}.input_layernorm"), config.hidden_size),
            attention: Attention {
                q: linear(Target::Q),
                k: linear(Target::K),
                v: linear(Target::V),
                o: linear(Target::O),
                qk_norm: config.qk_norm.then(|| (head_norm("q"), head_norm("k"))),
                heads: config.heads,
                kv_heads: config.kv_heads,
                head_dim: config.head_dim,
                window: config.window(layer),
            },
            feed_forward_norm: self.norm(
                &format!("{prefix}.post_attention_layernorm"),
                config.hidden_size,
            ),
            feed_forward: FeedForward {
                gate: linear(Target::Gate),
                up: linear(Target::Up),
                down: linear(Target::Down),
            },
        }
    }

    fn linear(&self, layer: usize, target: Target) -> Linear {
        let module = self.config.module(layer, target);
        let (input, output) = self.config.linear(target);
        Linear {
            weight: self.matrix(&module, [output, input]),
            bias: self.config.bias(target).then(|| {
                let values = Stream::of(&format!("{module}.bias")).uniform(output, 8, 0.25);
                self.vector(values)
            }),
        }
    }

    /// Of 8 bits, which the pure Rust CPU device keeps in 16, or of 24: both ways a weight is kept are
    /// gone.
    fn matrix(&self, module: &str, [rows, columns]: [usize; 2]) -> Weight {
        let (bits, scale) = match module {
            "model.embed_tokens" => (24, 1.0),
            _ if module.contains(".layers.1.") => (24, scale(columns)),
            _ => (8, scale(columns)),
        };
        let stream = Stream::of(&format!("{module}.weight"));
        let values = stream.uniform(rows * columns, bits, scale);
        Weight::new(&values, [rows, columns], Quantize::None, self.device)
    }

    fn norm(&self, name: &str, width: usize) -> RmsNorm {
        let gains = Stream::of(&format!("{name}.weight")).uniform(width, 8, 0.25);
        RmsNorm {
            weight: self.vector(gains.into_iter().map(|gain| 1.0 + gain).collect()),
            epsilon: self.config.rms_norm_eps,
        }
    }

    fn vector(&self, values: Vec<f32>) -> Tensor<1> {
        let count = values.len();
        Tensor::from_data(TensorData::new(values, [count]), self.device)
    }
}

/// A pair for every target of every layer.
pub fn pairs(config: &ModelConfig, rank: usize, factor: f64) -> Vec<Pair> {
    let of = |layer: usize| Target::ALL.into_iter().map(move |target| (layer, target));
    (0..config.layers)
        .flat_map(of)
        .map(|(layer, target)| {
            let module = config.module(layer, target);
            let (in_features, out_features) = config.linear(target);
            let stream = |letter| Stream::of(&format!("{module}.lora_{letter}"));
            Pair {
                rank,
                in_features,
                out_features,
                a: stream('A').uniform(rank * in_features, 24, scale(in_features)),
                b: stream('B').uniform(out_features * rank, 24, B_START),
                scale: factor,
                module,
            }
        })
        .collect()
}

/// The records, several in a row, as one batch.
pub fn batches(reference: &Reference, vocabulary: usize) -> Vec<Batch> {
    let document = |(number, &length): (usize, &usize)| {
        let stream = Stream::of(&format!("document.{number}"));
        let token = |number: u64| ((number >> 32) % vocabulary as u64) as u32;
        Example {
            tokens: stream.take(length).map(token).collect(),
            scored: (0..length).map(|t| t >= 2 + number % 3).collect(),
            cut: false,
        }
    };
    let examples: Vec<Example> = reference
        .documents
        .iter()
        .enumerate()
        .map(document)
        .collect();
    let order: Vec<usize> = (0..examples.len()).collect();
    let rows = pack(&examples, &order, reference.row_length, true);
    let count = rows.len();
    cut(rows, count)
}

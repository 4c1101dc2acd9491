//! A Hugging Face `config.json`, read into what Cairn can run and refused by name where it cannot.
//!
//! The rules are those of transformers' `LlamaConfig`, `MistralConfig`, `Qwen2Config` and
//! `Qwen3Config`, their defaults included. Keys a family does not know are ignored there and here;
//! keys that change the computation in a way Cairn does not implement are errors, before any
//! weight is read.

mod parse;
mod rope;

use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

use serde::{Deserialize, Serialize};
use thiserror::Error;

pub use rope::{Rope, RopeScaling};

/// Largest `config.json` read, in bytes. Real ones are a few kilobytes.
pub const CONFIG_BYTES_MAX: u64 = 1 << 20;

/// Why a `config.json` was not taken.
#[derive(Debug, Error)]
pub enum ConfigError {
    /// The file could not be read.
    #[error("read {}: {source}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// The bytes are no JSON object.
    #[error("config.json is not a JSON object: {0}")]
    Json(String),
    /// A key is missing that has no default.
    #[error("config.json has no `{0}`")]
    Missing(&'static str),
    /// A key has a value of the wrong type, or out of its range.
    #[error("config.json: `{key}` is {value}, expected {expected}")]
    Invalid {
        /// The key.
        key: String,
        /// Its value, shortened.
        value: String,
        /// What would be right.
        expected: String,
    },
    /// A feature of the model that Cairn does not implement.
    #[error("unsupported model: {0}")]
    Unsupported(String),
}

/// A model family: which blocks the layers are made of.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum Family {
    /// Llama 1 to 3 and everything saved as `LlamaForCausalLM`.
    Llama,
    /// Mistral: Llama with a sliding window on every layer.
    Mistral,
    /// Qwen2 and Qwen2.5: q, k and v have a bias.
    Qwen2,
    /// Qwen3: RMS norm over each head of q and k.
    Qwen3,
}

impl Family {
    /// transformers' `model_type`.
    #[must_use]
    pub const fn model_type(self) -> &'static str {
        match self {
            Self::Llama => "llama",
            Self::Mistral => "mistral",
            Self::Qwen2 => "qwen2",
            Self::Qwen3 => "qwen3",
        }
    }

    /// transformers' class, as in `architectures`.
    #[must_use]
    pub const fn architecture(self) -> &'static str {
        match self {
            Self::Llama => "LlamaForCausalLM",
            Self::Mistral => "MistralForCausalLM",
            Self::Qwen2 => "Qwen2ForCausalLM",
            Self::Qwen3 => "Qwen3ForCausalLM",
        }
    }
}

/// A linear layer of a block that an adapter may target.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Target {
    /// Query projection.
    #[serde(rename = "q_proj")]
    Q,
    /// Key projection.
    #[serde(rename = "k_proj")]
    K,
    /// Value projection.
    #[serde(rename = "v_proj")]
    V,
    /// Attention output projection.
    #[serde(rename = "o_proj")]
    O,
    /// Feed-forward gate.
    #[serde(rename = "gate_proj")]
    Gate,
    /// Feed-forward up projection.
    #[serde(rename = "up_proj")]
    Up,
    /// Feed-forward down projection.
    #[serde(rename = "down_proj")]
    Down,
}

impl Target {
    /// Every target, in the order of a block's forward pass.
    pub const ALL: [Self; 7] = [
        Self::Q,
        Self::K,
        Self::V,
        Self::O,
        Self::Gate,
        Self::Up,
        Self::Down,
    ];

    /// The layer's own name, `q_proj`.
    #[must_use]
    pub const fn name(self) -> &'static str {
        match self {
            Self::Q => "q_proj",
            Self::K => "k_proj",
            Self::V => "v_proj",
            Self::O => "o_proj",
            Self::Gate => "gate_proj",
            Self::Up => "up_proj",
            Self::Down => "down_proj",
        }
    }

    /// The part of the block it sits in.
    const fn parent(self) -> &'static str {
        match self {
            Self::Q | Self::K | Self::V | Self::O => "self_attn",
            Self::Gate | Self::Up | Self::Down => "mlp",
        }
    }
}

impl fmt::Display for Target {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

/// A name that is no target.
#[derive(Debug, Clone, PartialEq, Eq, Error)]
#[error(
    "no such target module: {0:?} (q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj)"
)]
pub struct UnknownTarget(pub String);

impl FromStr for Target {
    type Err = UnknownTarget;

    fn from_str(text: &str) -> Result<Self, UnknownTarget> {
        Self::ALL
            .into_iter()
            .find(|target| target.name() == text)
            .ok_or_else(|| UnknownTarget(text.chars().take(64).collect()))
    }
}

/// Which layers look back over a limited window only.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SlidingWindow {
    /// Tokens a query sees, itself included.
    pub size: usize,
    /// One flag a layer: whether the window holds there.
    pub layers: Vec<bool>,
}

/// A model's shape and constants.
#[derive(Debug, Clone, PartialEq)]
pub struct ModelConfig {
    /// Which family's blocks.
    pub family: Family,
    /// Rows of the embedding and of the output head.
    pub vocab_size: usize,
    /// Width of the residual stream.
    pub hidden_size: usize,
    /// Width of the feed-forward layers.
    pub intermediate_size: usize,
    /// Number of blocks.
    pub layers: usize,
    /// Query heads.
    pub heads: usize,
    /// Key and value heads; divides `heads`.
    pub kv_heads: usize,
    /// Width of one head; even.
    pub head_dim: usize,
    /// Added to the mean square in every RMS norm.
    pub rms_norm_eps: f64,
    /// Rotary position embedding.
    pub rope: Rope,
    /// The output head is the embedding.
    pub tied: bool,
    /// q, k and v have a bias.
    pub attention_bias: bool,
    /// o has a bias.
    pub output_bias: bool,
    /// q and k are normed per head before the rotation.
    pub qk_norm: bool,
    /// Sliding window, where the model has one.
    pub sliding_window: Option<SlidingWindow>,
    /// Longest sequence the model was made for, in tokens.
    pub max_positions: usize,
    /// First token of a text, where the config names one.
    pub bos_token_id: Option<u32>,
    /// Tokens that end a text, the main one first.
    pub eos_token_ids: Vec<u32>,
}

impl ModelConfig {
    /// Reads the bytes of a `config.json`.
    ///
    /// # Errors
    /// Malformed JSON, values out of range, and every unsupported feature by name.
    pub fn from_json(bytes: &[u8]) -> Result<Self, ConfigError> {
        parse::parse(bytes)
    }

    /// Reads `config.json` of a checkpoint folder.
    ///
    /// # Errors
    /// As [`Self::from_json`], and [`ConfigError::Read`].
    pub fn load(dir: &Path) -> Result<Self, ConfigError> {
        let path = dir.join("config.json");
        let read = |path: &Path| -> std::io::Result<Vec<u8>> {
            if std::fs::metadata(path)?.len() > CONFIG_BYTES_MAX {
                return Err(std::io::Error::other("larger than any config.json"));
            }
            std::fs::read(path)
        };
        match read(&path) {
            Ok(bytes) => Self::from_json(&bytes),
            Err(source) => Err(ConfigError::Read { path, source }),
        }
    }

    /// The exact tensors of the checkpoint: names and shapes in file layout (`[out, in]`).
    #[must_use]
    pub fn weights(&self) -> Vec<(String, Vec<usize>)> {
        let hidden = self.hidden_size;
        let mut weights = vec![(
            "model.embed_tokens.weight".to_owned(),
            vec![self.vocab_size, hidden],
        )];
        for layer in 0..self.layers {
            let prefix = format!("model.layers.{layer}");
            weights.push((format!("{prefix}.input_layernorm.weight"), vec![hidden]));
            weights.push((
                format!("{prefix}.post_attention_layernorm.weight"),
                vec![hidden],
            ));
            for target in Target::ALL {
                let (input, output) = self.linear(target);
                let module = self.module(layer, target);
                if self.bias(target) {
                    weights.push((format!("{module}.bias"), vec![output]));
                }
                weights.push((format!("{module}.weight"), vec![output, input]));
            }
            if self.qk_norm {
                for name in ["q_norm", "k_norm"] {
                    let name = format!("{prefix}.self_attn.{name}.weight");
                    weights.push((name, vec![self.head_dim]));
                }
            }
        }
        weights.push(("model.norm.weight".to_owned(), vec![hidden]));
        if !self.tied {
            weights.push(("lm_head.weight".to_owned(), vec![self.vocab_size, hidden]));
        }
        weights
    }

    /// Whether a checkpoint may carry this tensor although it is none of [`Self::weights`]:
    /// exporters of old wrote rotary frequencies, and a tied head next to its embedding.
    /// Loaders ignore such tensors, as transformers does.
    #[must_use]
    pub fn is_redundant(&self, name: &str) -> bool {
        name.ends_with(".rotary_emb.inv_freq") || (self.tied && name == "lm_head.weight")
    }

    /// Input and output features of a target.
    #[must_use]
    pub const fn linear(&self, target: Target) -> (usize, usize) {
        let queries = self.heads * self.head_dim;
        let keys = self.kv_heads * self.head_dim;
        match target {
            Target::Q => (self.hidden_size, queries),
            Target::K | Target::V => (self.hidden_size, keys),
            Target::O => (queries, self.hidden_size),
            Target::Gate | Target::Up => (self.hidden_size, self.intermediate_size),
            Target::Down => (self.intermediate_size, self.hidden_size),
        }
    }

    /// Whether a target's layer has a bias.
    #[must_use]
    pub const fn bias(&self, target: Target) -> bool {
        match target {
            Target::Q | Target::K | Target::V => self.attention_bias,
            Target::O => self.output_bias,
            Target::Gate | Target::Up | Target::Down => false,
        }
    }

    /// A target's module path, `model.layers.0.self_attn.q_proj`.
    #[must_use]
    pub fn module(&self, layer: usize, target: Target) -> String {
        format!("model.layers.{layer}.{}.{target}", target.parent())
    }

    /// Tokens a query of this layer sees, itself included; `None` where it sees all before it.
    #[must_use]
    pub fn window(&self, layer: usize) -> Option<usize> {
        let window = self.sliding_window.as_ref()?;
        window.layers.get(layer)?.then_some(window.size)
    }
}

#[cfg(test)]
mod tests;

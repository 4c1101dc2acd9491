//! In how many bits a frozen model is kept while an adapter is trained beside it.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// How the weights of the linear layers inside the blocks are kept. Embedding, head, norms and biases
/// stay as they are in the file.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Quantize {
    /// As they are in the file.
    #[default]
    None,
    /// In 8 bits, blocks of 64 with one scale: `q · m / 127`, `m` the block's largest magnitude.
    Int8,
    /// In 4 bits: NF4, blocks of 64, scales quantised again (`QLoRA`, arXiv 2305.14314).
    Nf4,
}

impl Quantize {
    /// All of them, from most bits to fewest.
    pub const ALL: [Self; 3] = [Self::None, Self::Int8, Self::Nf4];

    /// As recipes write it.
    #[must_use]
    pub const fn word(self) -> &'static str {
        match self {
            Self::None => "none",
            Self::Int8 => "int8",
            Self::Nf4 => "nf4",
        }
    }
}

impl fmt::Display for Quantize {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.word())
    }
}

/// A word that names no format.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[error("no such format: {0:?} (none, int8, nf4)")]
pub struct UnknownFormat(pub String);

impl FromStr for Quantize {
    type Err = UnknownFormat;

    fn from_str(text: &str) -> Result<Self, UnknownFormat> {
        Self::ALL
            .into_iter()
            .find(|format| format.word() == text)
            .ok_or_else(|| UnknownFormat(text.chars().take(64).collect()))
    }
}

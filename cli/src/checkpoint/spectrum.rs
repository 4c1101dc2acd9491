//! What the coordinator measured of a checkpoint's stack.

use cairn_proto::v1::Checkpoint;
use serde::{Deserialize, Serialize};

/// Norm and effective rank of a stack.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
#[serde(default)]
pub struct Spectrum {
    /// Frobenius norm over all modules.
    pub norm: Option<f64>,
    /// How many directions carry it.
    pub effective_rank: Option<f64>,
    /// Each module, where asked for.
    pub modules: Vec<Module>,
    /// The round's stack at the recipe's rank.
    pub compressed: Option<Compressed>,
    /// What was not measured, in words.
    pub unmeasured: String,
}

/// One module's part.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Module {
    /// Module path.
    pub module: String,
    /// Frobenius norm.
    pub norm: f64,
    /// How many directions carry it.
    pub effective_rank: f64,
}

/// An approximation of the round's stack.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Compressed {
    /// Its rank.
    pub rank: u32,
    /// What it leaves out, as a share of the stack's norm.
    pub relative_error: f64,
}

/// Of a checkpoint; empty for the base and for what an older coordinator published.
pub fn of(checkpoint: &Checkpoint) -> Spectrum {
    serde_json::from_str(&checkpoint.spectrum_json).unwrap_or_default()
}

/// So many decimals, or a dash.
pub fn number(value: Option<f64>, decimals: usize) -> String {
    value.map_or_else(|| "-".to_owned(), |value| format!("{value:.decimals$}"))
}

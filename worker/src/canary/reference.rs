//! What the canary must come to: `worker/reference/canary.json`, compiled in.

use std::collections::BTreeMap;

use serde::Deserialize;
use serde_json::{Map, Value};

use cairn_stack::config::ModelConfig;
use cairn_stack::recipe::Recipe;

use super::Case;

/// The file.
const JSON: &str = include_str!("../../reference/canary.json");

/// Vectors of signs in a sketch.
pub const PROJECTIONS: usize = 8;

#[derive(Deserialize)]
struct File {
    optimiser: Map<String, Value>,
    odd: Reference,
    wide: Reference,
}

/// A training and its outcome.
#[derive(Deserialize)]
pub struct Reference {
    /// Recipe keys of the optimiser; those of the file.
    #[serde(skip)]
    optimiser: Map<String, Value>,
    /// As in a `config.json`.
    config: Value,
    /// Tokens of each record.
    pub documents: Vec<usize>,
    /// Tokens a row of packed records has room for.
    pub row_length: usize,
    /// LoRA rank.
    pub rank: usize,
    alpha: f64,
    losses: Vec<f64>,
    gradient_norms: Vec<f64>,
    moved: BTreeMap<String, Moved>,
}

/// What the training made of a factor: the difference between its end and its start.
#[derive(Deserialize)]
pub struct Moved {
    norm: f64,
    sketch: Vec<f64>,
}

impl Reference {
    /// The reference of a case.
    pub fn of(case: Case) -> Self {
        let file: File = serde_json::from_str(JSON).expect("a file of our own; a test reads it");
        let reference = match case {
            Case::Odd => file.odd,
            Case::Wide => file.wide,
        };
        Self {
            optimiser: file.optimiser,
            ..reference
        }
    }

    /// The model's config.
    pub fn model_config(&self) -> ModelConfig {
        let json = self.config.to_string();
        ModelConfig::from_json(json.as_bytes()).expect("a config of our own")
    }

    /// The recipe.
    pub fn recipe(&self) -> Recipe {
        let (rank, alpha, length) = (self.rank, self.alpha, self.row_length);
        let mut text = format!(
            "rank = {rank}\nalpha = {alpha}\ntarget_modules = \"all-linear\"\nsteps = {}\nbatch_size = 1\n\
             sequence_length = {length}\nseed = 0\n",
            self.losses.len(),
        );
        for (key, value) in &self.optimiser {
            text += &format!("{key} = {value}\n");
        }
        Recipe::parse_toml(&text).expect("a recipe of our own")
    }

    /// Mean loss and gradient norm of every step.
    pub fn steps(&self) -> impl Iterator<Item = (f64, f64)> {
        let norms = self.gradient_norms.iter().copied();
        self.losses.iter().copied().zip(norms)
    }

    /// What must become of a factor.
    pub fn moved(&self, path: &str) -> &Moved {
        self.moved.get(path).expect("a factor of this model")
    }
}

impl Moved {
    /// How far off a sketch is, relative to the whole of what the factor moved.
    pub fn off(&self, sketch: &[f64]) -> f64 {
        let squares = self.sketch.iter().zip(sketch);
        let squares: f64 = squares.map(|(a, b)| (a - b) * (a - b)).sum();
        (squares / PROJECTIONS as f64).sqrt() / self.norm
    }
}

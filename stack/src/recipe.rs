//! How one adapter is trained: the `[recipe]` of a round, or a recipe file by itself.
//!
//! Every number has bounds, so that a recipe from the wire cannot ask a volunteer for the absurd,
//! and every key is known, so that a typing error is an error and not a default.

use std::collections::BTreeMap;

use serde::de::IgnoredAny;
use serde::{Deserialize, Serialize};

use crate::config::Target;
use crate::json::reason;
pub use crate::objective::Objective;
use crate::objective::{OBJECTIVE_KEYS, RawObjective};
use crate::quantize::Quantize;

/// Longest recipe or round file that is read, in bytes; a real one has under two thousand.
const TOML_BYTES_MAX: usize = 64 * 1024;
/// Highest rank: beyond it full fine-tuning is cheaper than LoRA.
pub const RANK_MAX: u32 = 1024;
/// Lowest alpha: below it an adapter adds nothing.
const ALPHA_MIN: f64 = 1e-6;
/// Longest sequence, in tokens: the longest context any supported family claims.
pub const SEQUENCE_LENGTH_MAX: u32 = 1 << 20;
/// Seeds are TOML integers, and those are signed.
const SEED_MAX: u64 = i64::MAX as u64;
/// Below this similarity (Jaro-Winkler, 0 to 1) a known key is not worth suggesting.
const NEAREST_KEY_MIN: f64 = 0.7;

/// Why a recipe, policy or round file is refused.
#[derive(Debug, Clone, PartialEq, thiserror::Error)]
pub enum RecipeError {
    /// Not TOML, or a value of the wrong type.
    #[error("{0}")]
    Toml(String),
    /// The text is longer than any recipe has reason to be.
    #[error("the file has {bytes} bytes; at most {TOML_BYTES_MAX} are read")]
    TooLong {
        /// Length of the text.
        bytes: usize,
    },
    /// A key nobody knows.
    #[error("unknown key `{key}`; {}", suggestion(.nearest.as_deref(), .known))]
    UnknownKey {
        /// The key as written.
        key: String,
        /// The known key that looks most like it.
        nearest: Option<String>,
        /// All keys known in that place, comma separated.
        known: String,
    },
    /// A key that must be there is not.
    #[error("`{0}` is missing")]
    Missing(&'static str),
    /// `epochs` and `steps` both say how long to train.
    #[error("set either `epochs` or `steps`, not both")]
    TwoLengths,
    /// A key of another objective.
    #[error(
        "`{key}` is read with objective = {objective:?} only; leave it out, or set that objective"
    )]
    ForeignKey {
        /// The key.
        key: &'static str,
        /// The objective that reads it.
        objective: String,
    },
    /// A number outside its bounds.
    #[error("`{key}` is {value}; it must be {bounds}")]
    OutOfBounds {
        /// The key.
        key: &'static str,
        /// The value as read.
        value: String,
        /// What is allowed, in words.
        bounds: String,
    },
    /// A value that is not one of the allowed words.
    #[error("`{key}` cannot be {value:?}: {reason}")]
    Invalid {
        /// The key.
        key: &'static str,
        /// The value as read.
        value: String,
        /// What is wrong with it.
        reason: String,
    },
}

fn suggestion(nearest: Option<&str>, known: &str) -> String {
    match nearest {
        Some(nearest) => format!("did you mean `{nearest}`?"),
        None => format!("known keys are {known}"),
    }
}

/// How the learning rate goes after warm-up.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Schedule {
    /// Stays as it is.
    Constant,
    /// Falls in a straight line to zero at the last step.
    #[default]
    Linear,
    /// Falls along half a cosine to zero at the last step.
    Cosine,
}

/// How long to train.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Length {
    /// This many times over the data.
    Epochs(u32),
    /// This many optimiser steps, starting over as often as needed.
    Steps(u32),
}

/// How one adapter is trained.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(try_from = "RawRecipe", into = "RawRecipe")]
pub struct Recipe {
    /// LoRA rank r.
    pub rank: u32,
    /// LoRA alpha; the scale is `alpha / r`, or `alpha / sqrt(r)` with `use_rslora`.
    pub alpha: f64,
    /// Adapted linear layers, in the order of [`Target::ALL`], each once.
    pub target_modules: Vec<Target>,
    /// Rank-stabilised scale.
    pub use_rslora: bool,
    /// Part of A's inputs that is dropped in training; the rest is scaled up to make up for it.
    pub lora_dropout: f64,
    /// Uniform noise on the token embeddings in training, at most `alpha / sqrt(L D)` for rows of `L`
    /// tokens of `D` numbers (`NEFTune`, arXiv 2310.05914); 0 is off.
    pub neftune_noise_alpha: f64,
    /// Peak learning rate of AdamW.
    pub learning_rate: f64,
    /// Learning rate of B over that of A (`LoRA+`, arXiv 2402.12354).
    pub loraplus_lr_ratio: f64,
    /// What the learning rate does after warm-up.
    pub schedule: Schedule,
    /// Optimiser steps over which the learning rate rises from zero.
    pub warmup_steps: u32,
    /// How long to train.
    pub length: Length,
    /// Sequences in one forward pass.
    pub batch_size: u32,
    /// Forward passes in one optimiser step.
    pub accumulation: u32,
    /// Tokens after which a sequence is cut.
    pub sequence_length: u32,
    /// Several records in one sequence, kept apart by the attention mask.
    pub packing: bool,
    /// `AdamW`'s decoupled weight decay.
    pub weight_decay: f64,
    /// `AdamW`'s first moment decay.
    pub beta1: f64,
    /// `AdamW`'s second moment decay.
    pub beta2: f64,
    /// `AdamW`'s denominator floor.
    pub epsilon: f64,
    /// Gradients are scaled down to this global norm; 0 turns it off.
    pub clip_norm: f64,
    /// Decides initial factors and order of data.
    pub seed: u64,
    /// What is minimised.
    pub objective: Objective,
    /// Bits in which the frozen linear layers are kept while it is trained.
    pub quantize: Quantize,
}

impl Recipe {
    /// Parses and checks a recipe file.
    ///
    /// # Errors
    /// When the text is not TOML, a key is unknown or missing, or a value is out of bounds.
    pub fn parse_toml(text: &str) -> Result<Self, RecipeError> {
        parse::<RawRecipe>(text)?.try_into()
    }

    /// The recipe file that [`Self::parse_toml`] reads back to the same recipe.
    #[must_use]
    pub fn to_toml(&self) -> String {
        to_toml(&RawRecipe::from(self.clone()))
    }

    /// What B·A is multiplied with.
    ///
    /// `alpha / r` (LoRA, arXiv 2106.09685) or `alpha / sqrt(r)` (rsLoRA, arXiv 2312.03732).
    #[must_use]
    pub fn scale(&self) -> f64 {
        lora_scale(self.alpha, f64::from(self.rank), self.use_rslora)
    }
}

/// The nearest number of fifteen digits. Alpha is written into every `adapter_config.json` and must
/// come back to the same bits; beyond fifteen digits JSON readers, ours too, may be off by the last,
/// and an honest adapter would not be what its recipe asked for.
fn fifteen_digits(value: f64) -> f64 {
    format!("{value:.14e}").parse().unwrap_or(value)
}

pub(crate) fn lora_scale(alpha: f64, rank: f64, use_rslora: bool) -> f64 {
    if use_rslora {
        alpha / rank.sqrt()
    } else {
        alpha / rank
    }
}

/// Keys that fit no field; only their names are kept.
pub(crate) type UnknownKeys = BTreeMap<String, Option<IgnoredAny>>;

/// `target_modules` as written: a list of names, or `"all-linear"`.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(untagged)]
enum RawTargets {
    Word(String),
    List(Vec<String>),
}

/// The recipe as written, before any check.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(crate) struct RawRecipe {
    rank: Option<u32>,
    alpha: Option<f64>,
    target_modules: Option<RawTargets>,
    use_rslora: Option<bool>,
    #[serde(skip_serializing_if = "Option::is_none")]
    lora_dropout: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    neftune_noise_alpha: Option<f64>,
    learning_rate: Option<f64>,
    #[serde(skip_serializing_if = "Option::is_none")]
    loraplus_lr_ratio: Option<f64>,
    schedule: Option<String>,
    warmup_steps: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    epochs: Option<u32>,
    #[serde(skip_serializing_if = "Option::is_none")]
    steps: Option<u32>,
    batch_size: Option<u32>,
    accumulation: Option<u32>,
    sequence_length: Option<u32>,
    packing: Option<bool>,
    weight_decay: Option<f64>,
    beta1: Option<f64>,
    beta2: Option<f64>,
    epsilon: Option<f64>,
    clip_norm: Option<f64>,
    seed: Option<u64>,
    #[serde(flatten)]
    objective: RawObjective,
    #[serde(skip_serializing_if = "Option::is_none")]
    quantize: Option<String>,
    #[serde(flatten, skip_serializing)]
    unknown: UnknownKeys,
}

const RECIPE_KEYS: [&str; 23] = [
    "rank",
    "alpha",
    "target_modules",
    "use_rslora",
    "lora_dropout",
    "neftune_noise_alpha",
    "learning_rate",
    "loraplus_lr_ratio",
    "schedule",
    "warmup_steps",
    "epochs",
    "steps",
    "batch_size",
    "accumulation",
    "sequence_length",
    "packing",
    "weight_decay",
    "beta1",
    "beta2",
    "epsilon",
    "clip_norm",
    "seed",
    "quantize",
];

/// Every key of a recipe.
fn recipe_keys() -> impl Iterator<Item = &'static str> {
    RECIPE_KEYS.into_iter().chain(OBJECTIVE_KEYS)
}

impl TryFrom<RawRecipe> for Recipe {
    type Error = RecipeError;

    fn try_from(raw: RawRecipe) -> Result<Self, RecipeError> {
        refuse_unknown(&raw.unknown, &recipe_keys().collect::<Vec<_>>())?;
        let length = match (raw.epochs, raw.steps) {
            (Some(_), Some(_)) => return Err(RecipeError::TwoLengths),
            (Some(epochs), None) => Length::Epochs(whole("epochs", epochs, 1, 1_000)?),
            (None, Some(steps)) => Length::Steps(whole("steps", steps, 1, 10_000_000)?),
            (None, None) => return Err(RecipeError::Missing("epochs` or `steps")),
        };
        let targets = raw
            .target_modules
            .ok_or(RecipeError::Missing("target_modules"))?;
        Ok(Self {
            rank: whole("rank", required("rank", raw.rank)?, 1, RANK_MAX)?,
            alpha: fifteen_digits(real(
                "alpha",
                required("alpha", raw.alpha)?,
                AtLeast(ALPHA_MIN),
                1e6,
            )?),
            target_modules: parse_targets(&targets)?,
            use_rslora: raw.use_rslora.unwrap_or(false),
            lora_dropout: real(
                "lora_dropout",
                raw.lora_dropout.unwrap_or(0.0),
                AtLeast(0.0),
                0.9,
            )?,
            neftune_noise_alpha: real(
                "neftune_noise_alpha",
                raw.neftune_noise_alpha.unwrap_or(0.0),
                AtLeast(0.0),
                1e3,
            )?,
            loraplus_lr_ratio: real(
                "loraplus_lr_ratio",
                raw.loraplus_lr_ratio.unwrap_or(1.0),
                Above(0.0),
                1e3,
            )?,
            learning_rate: real(
                "learning_rate",
                required("learning_rate", raw.learning_rate)?,
                Above(0.0),
                10.0,
            )?,
            schedule: parse_schedule(raw.schedule.as_deref())?,
            warmup_steps: whole("warmup_steps", raw.warmup_steps.unwrap_or(0), 0, 10_000_000)?,
            length,
            batch_size: whole(
                "batch_size",
                required("batch_size", raw.batch_size)?,
                1,
                4096,
            )?,
            accumulation: whole("accumulation", raw.accumulation.unwrap_or(1), 1, 4096)?,
            sequence_length: whole(
                "sequence_length",
                required("sequence_length", raw.sequence_length)?,
                2,
                SEQUENCE_LENGTH_MAX,
            )?,
            packing: raw.packing.unwrap_or(false),
            weight_decay: real(
                "weight_decay",
                raw.weight_decay.unwrap_or(0.0),
                AtLeast(0.0),
                10.0,
            )?,
            beta1: real("beta1", raw.beta1.unwrap_or(0.9), AtLeast(0.0), 0.999_999)?,
            beta2: real("beta2", raw.beta2.unwrap_or(0.999), AtLeast(0.0), 0.999_999)?,
            epsilon: real("epsilon", raw.epsilon.unwrap_or(1e-8), AtLeast(1e-16), 0.1)?,
            clip_norm: real("clip_norm", raw.clip_norm.unwrap_or(1.0), AtLeast(0.0), 1e6)?,
            seed: seed(raw.seed)?,
            objective: raw.objective.try_into()?,
            quantize: parse_quantize(raw.quantize.as_deref())?,
        })
    }
}

impl From<Recipe> for RawRecipe {
    fn from(recipe: Recipe) -> Self {
        let (epochs, steps) = match recipe.length {
            Length::Epochs(epochs) => (Some(epochs), None),
            Length::Steps(steps) => (None, Some(steps)),
        };
        let schedule = match recipe.schedule {
            Schedule::Constant => "constant",
            Schedule::Linear => "linear",
            Schedule::Cosine => "cosine",
        };
        let targets = recipe
            .target_modules
            .iter()
            .map(ToString::to_string)
            .collect();
        // Left out where they change nothing: a recipe without them reads, and is signed, as it was
        // before there were these keys.
        let unless = |value: f64, neutral: f64| (value != neutral).then_some(value);
        Self {
            lora_dropout: unless(recipe.lora_dropout, 0.0),
            neftune_noise_alpha: unless(recipe.neftune_noise_alpha, 0.0),
            loraplus_lr_ratio: unless(recipe.loraplus_lr_ratio, 1.0),
            rank: Some(recipe.rank),
            alpha: Some(recipe.alpha),
            target_modules: Some(RawTargets::List(targets)),
            use_rslora: Some(recipe.use_rslora),
            learning_rate: Some(recipe.learning_rate),
            schedule: Some(schedule.to_owned()),
            warmup_steps: Some(recipe.warmup_steps),
            epochs,
            steps,
            batch_size: Some(recipe.batch_size),
            accumulation: Some(recipe.accumulation),
            sequence_length: Some(recipe.sequence_length),
            packing: Some(recipe.packing),
            weight_decay: Some(recipe.weight_decay),
            beta1: Some(recipe.beta1),
            beta2: Some(recipe.beta2),
            epsilon: Some(recipe.epsilon),
            clip_norm: Some(recipe.clip_norm),
            seed: Some(recipe.seed),
            objective: recipe.objective.into(),
            quantize: (recipe.quantize != Quantize::None).then(|| recipe.quantize.to_string()),
            unknown: UnknownKeys::new(),
        }
    }
}

fn parse_targets(raw: &RawTargets) -> Result<Vec<Target>, RecipeError> {
    let invalid = |value: &str, reason: &str| invalid("target_modules", value, reason);
    let names = match raw {
        RawTargets::Word(word) if word == "all-linear" => return Ok(Target::ALL.to_vec()),
        RawTargets::Word(word) => {
            return Err(invalid(word, "write a list of names, or \"all-linear\""));
        }
        RawTargets::List(names) if names.is_empty() => {
            return Err(invalid("[]", "name at least one module"));
        }
        RawTargets::List(names) => names,
    };
    let mut named = Vec::new();
    for name in names {
        let target: Target = name.parse().map_err(|_| {
            invalid(
                name,
                "the modules are q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj and down_proj",
            )
        })?;
        if named.contains(&target) {
            return Err(invalid(name, "it is named twice"));
        }
        named.push(target);
    }
    Ok(Target::ALL
        .into_iter()
        .filter(|target| named.contains(target))
        .collect())
}

fn parse_schedule(word: Option<&str>) -> Result<Schedule, RecipeError> {
    match word {
        None | Some("linear") => Ok(Schedule::Linear),
        Some("constant") => Ok(Schedule::Constant),
        Some("cosine") => Ok(Schedule::Cosine),
        Some(other) => Err(invalid(
            "schedule",
            other,
            "it is constant, linear or cosine",
        )),
    }
}

fn parse_quantize(word: Option<&str>) -> Result<Quantize, RecipeError> {
    let Some(word) = word else {
        return Ok(Quantize::None);
    };
    word.parse()
        .map_err(|_| invalid("quantize", word, "it is none, int8 or nf4"))
}

/// Lower end of a range of real numbers, itself allowed ([`AtLeast`]) or not ([`Above`]).
pub(crate) enum Lower {
    AtLeast(f64),
    Above(f64),
}
pub(crate) use Lower::{Above, AtLeast};

pub use crate::objective::{DPO_BETA_DEFAULT, Distill, Teacher};
pub use crate::round::{Aggregation, Policy, RoundFile};

/// Parses TOML to its unchecked form, at most [`TOML_BYTES_MAX`] long.
pub(crate) fn parse<T: serde::de::DeserializeOwned>(text: &str) -> Result<T, RecipeError> {
    if text.len() > TOML_BYTES_MAX {
        return Err(RecipeError::TooLong { bytes: text.len() });
    }
    toml::from_str(text).map_err(|error| RecipeError::Toml(reason(&error)))
}

pub(crate) fn to_toml(raw: &impl Serialize) -> String {
    toml::to_string(raw).expect("plain tables of numbers, words and lists are TOML")
}

pub(crate) fn required<T>(key: &'static str, value: Option<T>) -> Result<T, RecipeError> {
    value.ok_or(RecipeError::Missing(key))
}

pub(crate) fn whole(key: &'static str, value: u32, min: u32, max: u32) -> Result<u32, RecipeError> {
    if (min..=max).contains(&value) {
        return Ok(value);
    }
    Err(out_of_bounds(key, value, format!("from {min} to {max}")))
}

pub(crate) fn real(
    key: &'static str,
    value: f64,
    min: Lower,
    max: f64,
) -> Result<f64, RecipeError> {
    let (above_min, low) = match min {
        AtLeast(min) => (value >= min, format!("from {min}")),
        Above(min) => (value > min, format!("above {min} and")),
    };
    if above_min && value <= max {
        return Ok(value);
    }
    Err(out_of_bounds(key, value, format!("{low} to {max}")))
}

pub(crate) fn seed(value: Option<u64>) -> Result<u64, RecipeError> {
    match value.unwrap_or(0) {
        seed if seed <= SEED_MAX => Ok(seed),
        seed => Err(out_of_bounds("seed", seed, format!("from 0 to {SEED_MAX}"))),
    }
}

pub(crate) fn invalid(key: &'static str, value: &str, reason: &str) -> RecipeError {
    RecipeError::Invalid {
        key,
        value: value.chars().take(64).collect(),
        reason: reason.to_owned(),
    }
}

pub(crate) fn out_of_bounds(
    key: &'static str,
    value: impl ToString,
    bounds: String,
) -> RecipeError {
    RecipeError::OutOfBounds {
        key,
        value: value.to_string().chars().take(64).collect(),
        bounds,
    }
}

pub(crate) fn refuse_unknown(unknown: &UnknownKeys, known: &[&str]) -> Result<(), RecipeError> {
    let Some(key) = unknown.keys().next() else {
        return Ok(());
    };
    let nearest = known
        .iter()
        .map(|name| (strsim::jaro_winkler(key, name), *name))
        .filter(|(similarity, _)| *similarity >= NEAREST_KEY_MIN)
        .max_by(|a, b| a.0.total_cmp(&b.0))
        .map(|(_, name)| name.to_owned());
    let key = key.chars().take(64).collect();
    Err(RecipeError::UnknownKey {
        key,
        nearest,
        known: known.join(", "),
    })
}

#[cfg(test)]
#[path = "recipe_tests.rs"]
mod tests;

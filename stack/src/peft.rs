//! PEFT's `adapter_config.json` and tensor names.
//!
//! Only plain LoRA over linear layers is understood. Whatever else a config asks for is refused by
//! name: an adapter that is merged without its DoRA magnitudes or its trained biases is another
//! adapter. Keys that cannot change the delta are ignored; unknown keys are refused unless they are
//! off (null, false, empty), so that next year's variant is not read as this year's LoRA.

use regex::{Regex, RegexBuilder};
use serde_json::{Map, Value, json};

use crate::json::{parse_strict, reason};
use crate::recipe::lora_scale;

/// Longest `adapter_config.json`, in bytes; a rank pattern for every module of a large model fits.
pub const CONFIG_BYTES_MAX: usize = 1024 * 1024;
/// Most entries of `rank_pattern` or `alpha_pattern`.
const PATTERNS_MAX: usize = 4096;
/// Longest pattern, in bytes.
const PATTERN_BYTES_MAX: usize = 512;
/// Most memory one compiled pattern may take, in bytes; stops `(\w{999}){999}`.
const PATTERN_SIZE_MAX: usize = 64 * 1024;

/// Alphas that have a meaning; the ends of f64 are not written and read to the same.
const REALS: std::ops::RangeInclusive<f64> = 1e-30..=1e30;

const PREFIX: &str = "base_model.model.";
const SUFFIX_A: &str = ".lora_A.weight";
const SUFFIX_B: &str = ".lora_B.weight";

/// Keys that do not change what a saved LoRA adds.
const HARMLESS: [&str; 14] = [
    "auto_mapping",
    "base_model_name_or_path",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "inference_mode",
    "layers_pattern",
    "layers_to_transform",
    "lora_dropout",
    "megatron_core",
    "peft_version",
    "qalora_group_size",
    "revision",
    "runtime_config",
];

/// Initialisations that leave the base weights alone. The others (pissa, olora, corda, loftq ...)
/// train against a changed base, so their factors do not add to the real one.
const PLAIN_INITS: [&str; 3] = ["gaussian", "eva", "orthogonal"];

/// Why an adapter config is refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum PeftConfigError {
    /// Over [`CONFIG_BYTES_MAX`].
    #[error("the adapter config has {0} bytes; at most {CONFIG_BYTES_MAX} are read")]
    TooLong(usize),
    /// Not a JSON object, or a key twice.
    #[error("the adapter config is malformed: {0}")]
    Json(String),
    /// A key is missing or has a value that cannot be.
    #[error("the adapter config's `{key}` {reason}")]
    Invalid {
        /// The key.
        key: String,
        /// What is wrong.
        reason: String,
    },
    /// It asks for more than plain LoRA.
    #[error("the adapter uses {what}, which is not supported: {why}")]
    Unsupported {
        /// The key and its value.
        what: String,
        /// What would be lost.
        why: &'static str,
    },
}

/// `target_modules` as PEFT allows it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum TargetModules {
    /// Names or endings of module paths.
    List(Vec<String>),
    /// A regular expression, or a word like "all-linear".
    Pattern(String),
}

/// The understood part of an `adapter_config.json`.
#[derive(Debug, Clone, PartialEq)]
pub struct PeftConfig {
    /// Rank of modules without a pattern.
    pub rank: usize,
    /// Alpha of modules without a pattern.
    pub alpha: f64,
    /// Scale is `alpha / sqrt(rank)`.
    pub use_rslora: bool,
    /// Regular expression to rank, in the order of the file.
    pub rank_pattern: Vec<(String, usize)>,
    /// Regular expression to alpha, in the order of the file.
    pub alpha_pattern: Vec<(String, f64)>,
    /// Adapted modules.
    pub target_modules: TargetModules,
    /// Only some layers are adapted (`layers_to_transform`, `layers_pattern`).
    pub some_layers: bool,
    /// The base model, where named.
    pub base_model: Option<String>,
    /// The base model's revision, where named.
    pub revision: Option<String>,
}

impl PeftConfig {
    /// Parses and checks a config.
    ///
    /// # Errors
    /// When it is malformed or asks for anything but plain LoRA.
    pub fn from_json(bytes: &[u8]) -> Result<Self, PeftConfigError> {
        if bytes.len() > CONFIG_BYTES_MAX {
            return Err(PeftConfigError::TooLong(bytes.len()));
        }
        let value = parse_strict(bytes).map_err(|error| PeftConfigError::Json(reason(&error)))?;
        let Value::Object(object) = value else {
            return Err(PeftConfigError::Json("it is not an object".to_owned()));
        };
        refuse_variants(&object)?;
        let set = |key: &str| object.get(key).is_some_and(|value| !is_off(value));
        Ok(Self {
            rank: positive_whole("r", object.get("r"))?,
            alpha: positive_real("lora_alpha", object.get("lora_alpha"))?,
            use_rslora: flag(&object, "use_rslora")?,
            rank_pattern: patterns(&object, "rank_pattern", positive_whole)?,
            alpha_pattern: patterns(&object, "alpha_pattern", positive_real)?,
            target_modules: target_modules(&object)?,
            some_layers: set("layers_to_transform") || set("layers_pattern"),
            base_model: word(&object, "base_model_name_or_path")?,
            revision: word(&object, "revision")?,
        })
    }

    /// The config as a file: PEFT's keys in alphabetical order, the same bytes on every run.
    #[must_use]
    pub fn to_json(&self) -> String {
        // PEFT declares lora_alpha as int; readers in other languages may insist.
        let number = |value: f64| {
            #[expect(
                clippy::cast_possible_truncation,
                reason = "whole and far below 2^63 where it is used"
            )]
            if value.fract() == 0.0 && value.abs() < 1e15 {
                json!(value as i64)
            } else {
                json!(value)
            }
        };
        let ranks: Map<String, Value> = self
            .rank_pattern
            .iter()
            .map(|(key, rank)| (key.clone(), json!(rank)))
            .collect();
        let alphas: Map<String, Value> = self
            .alpha_pattern
            .iter()
            .map(|(key, alpha)| (key.clone(), number(*alpha)))
            .collect();
        let targets = match &self.target_modules {
            TargetModules::List(names) => json!(names),
            TargetModules::Pattern(pattern) => json!(pattern),
        };
        let config = json!({
            "alpha_pattern": alphas,
            "base_model_name_or_path": self.base_model,
            "bias": "none",
            "fan_in_fan_out": false,
            "inference_mode": true,
            "init_lora_weights": true,
            "lora_alpha": number(self.alpha),
            "lora_dropout": 0.0,
            "modules_to_save": null,
            "peft_type": "LORA",
            "r": self.rank,
            "rank_pattern": ranks,
            "revision": self.revision,
            "target_modules": targets,
            "task_type": "CAUSAL_LM",
            "use_dora": false,
            "use_rslora": self.use_rslora,
        });
        format!("{config:#}\n")
    }
}

/// A config's patterns, compiled: tells rank and scale of any module.
pub struct Scales<'a> {
    config: &'a PeftConfig,
    ranks: Vec<Regex>,
    alphas: Vec<Regex>,
}

impl<'a> Scales<'a> {
    /// Compiles the patterns.
    ///
    /// # Errors
    /// When a pattern is not a regular expression, too large, or uses look-around, which PEFT's
    /// engine has and ours has not.
    pub fn new(config: &'a PeftConfig) -> Result<Self, PeftConfigError> {
        let ranks = config
            .rank_pattern
            .iter()
            .map(|(key, _)| compile("rank_pattern", key))
            .collect::<Result<_, _>>()?;
        let alphas = config
            .alpha_pattern
            .iter()
            .map(|(key, _)| compile("alpha_pattern", key))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            config,
            ranks,
            alphas,
        })
    }

    /// Rank and scale of a module, by PEFT's rule: keys match as `(.*\.)?(KEY)$`, the first wins.
    #[must_use]
    pub fn of(&self, module: &str) -> (usize, f64) {
        let first = |list: &[Regex]| list.iter().position(|regex| regex.is_match(module));
        let rank = first(&self.ranks)
            .and_then(|i| self.config.rank_pattern.get(i))
            .map_or(self.config.rank, |(_, r)| *r);
        let alpha = first(&self.alphas)
            .and_then(|i| self.config.alpha_pattern.get(i))
            .map_or(self.config.alpha, |(_, a)| *a);
        #[expect(clippy::cast_precision_loss, reason = "ranks are far below 2^53")]
        (rank, lora_scale(alpha, rank as f64, self.config.use_rslora))
    }
}

/// Which factor a tensor is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Factor {
    /// `[rank, in]`.
    A,
    /// `[out, rank]`.
    B,
}

/// The file's name for one factor of a module.
#[must_use]
pub fn tensor_name(module: &str, factor: Factor) -> String {
    let suffix = match factor {
        Factor::A => SUFFIX_A,
        Factor::B => SUFFIX_B,
    };
    format!("{PREFIX}{module}{suffix}")
}

/// The module and factor a tensor belongs to, when it is one.
#[must_use]
pub fn split_tensor_name(name: &str) -> Option<(&str, Factor)> {
    let rest = name.strip_prefix(PREFIX)?;
    let split = rest
        .strip_suffix(SUFFIX_A)
        .map(|module| (module, Factor::A));
    let split = split.or_else(|| {
        rest.strip_suffix(SUFFIX_B)
            .map(|module| (module, Factor::B))
    });
    split.filter(|(module, _)| !module.is_empty())
}

fn compile(key: &'static str, pattern: &str) -> Result<Regex, PeftConfigError> {
    let reason = |text: String| PeftConfigError::Invalid {
        key: key.to_owned(),
        reason: text,
    };
    RegexBuilder::new(&format!(r"^(?:.*\.)?(?:{pattern})$"))
        .size_limit(PATTERN_SIZE_MAX)
        .dfa_size_limit(PATTERN_SIZE_MAX)
        .build()
        .map_err(|_| {
            reason(format!(
                "has a pattern that cannot be used: {:?}",
                short(pattern)
            ))
        })
}

fn refuse_variants(object: &Map<String, Value>) -> Result<(), PeftConfigError> {
    match object.get("peft_type") {
        Some(Value::String(kind)) if kind == "LORA" => {}
        Some(other) => return Err(unsupported("peft_type", other, "only LORA adds up exactly")),
        None => return Err(invalid("peft_type", "is missing")),
    }
    for (key, value) in object {
        let why = match key.as_str() {
            "bias" if value == "none" => continue,
            "bias" | "lora_bias" => "trained biases are not part of the low-rank delta",
            "use_dora" => "DoRA rescales the base weight, so its update is not low-rank",
            "modules_to_save" => "whole trained modules are not part of the low-rank delta",
            "fan_in_fan_out" => "weights of supported models are stored [out, in]",
            "init_lora_weights" => match value {
                Value::Bool(_) | Value::Null => continue,
                Value::String(word) if PLAIN_INITS.contains(&word.as_str()) => continue,
                _ => "it trains against changed base weights",
            },
            "task_type" if value.is_null() || value == "CAUSAL_LM" => continue,
            "task_type" => "only causal language models are",
            "peft_type" | "r" | "lora_alpha" | "use_rslora" | "rank_pattern" | "alpha_pattern"
            | "target_modules" => continue,
            key if HARMLESS.contains(&key) => continue,
            _ => "it may change what the adapter adds",
        };
        if !is_off(value) {
            return Err(unsupported(key, value, why));
        }
    }
    Ok(())
}

/// How configs spell "not used".
fn is_off(value: &Value) -> bool {
    match value {
        Value::Null => true,
        Value::Bool(on) => !on,
        Value::Array(list) => list.is_empty(),
        Value::Object(map) => map.is_empty(),
        Value::String(_) | Value::Number(_) => false,
    }
}

fn patterns<T>(
    object: &Map<String, Value>,
    key: &'static str,
    read: fn(&str, Option<&Value>) -> Result<T, PeftConfigError>,
) -> Result<Vec<(String, T)>, PeftConfigError> {
    let map = match object.get(key) {
        None | Some(Value::Null) => return Ok(Vec::new()),
        Some(Value::Object(map)) => map,
        Some(_) => return Err(invalid(key, "is not an object")),
    };
    if map.len() > PATTERNS_MAX || map.keys().any(|pattern| pattern.len() > PATTERN_BYTES_MAX) {
        return Err(invalid(key, "has too many or too long patterns"));
    }
    map.iter()
        .map(|(pattern, value)| Ok((pattern.clone(), read(key, Some(value))?)))
        .collect()
}

fn target_modules(object: &Map<String, Value>) -> Result<TargetModules, PeftConfigError> {
    match object.get("target_modules") {
        Some(Value::String(pattern)) => Ok(TargetModules::Pattern(pattern.clone())),
        Some(Value::Array(list)) => {
            let name = |value: &Value| value.as_str().map(str::to_owned);
            let names: Option<Vec<String>> = list.iter().map(name).collect();
            names
                .map(TargetModules::List)
                .ok_or_else(|| invalid("target_modules", "is not a list of names"))
        }
        Some(_) => Err(invalid(
            "target_modules",
            "is neither a list of names nor a pattern",
        )),
        None => Err(invalid("target_modules", "is missing")),
    }
}

fn positive_whole(key: &str, value: Option<&Value>) -> Result<usize, PeftConfigError> {
    let number = value
        .and_then(Value::as_u64)
        .filter(|number| *number > 0 && u32::try_from(*number).is_ok());
    number
        .and_then(|number| usize::try_from(number).ok())
        .ok_or_else(|| invalid(key, "must be a whole number above 0"))
}

fn positive_real(key: &str, value: Option<&Value>) -> Result<f64, PeftConfigError> {
    let number = value
        .and_then(Value::as_f64)
        .filter(|number| REALS.contains(number));
    number.ok_or_else(|| invalid(key, "must be a number above 0, from 1e-30 to 1e30"))
}

fn flag(object: &Map<String, Value>, key: &str) -> Result<bool, PeftConfigError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(on)) => Ok(*on),
        Some(_) => Err(invalid(key, "must be true or false")),
    }
}

fn word(object: &Map<String, Value>, key: &str) -> Result<Option<String>, PeftConfigError> {
    match object.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(Value::String(text)) => Ok(Some(text.clone())),
        Some(_) => Err(invalid(key, "must be a string")),
    }
}

fn invalid(key: &str, reason: &str) -> PeftConfigError {
    PeftConfigError::Invalid {
        key: short(key),
        reason: reason.to_owned(),
    }
}

fn unsupported(key: &str, value: &Value, why: &'static str) -> PeftConfigError {
    PeftConfigError::Unsupported {
        what: format!("{} = {}", short(key), short(&value.to_string())),
        why,
    }
}

fn short(text: &str) -> String {
    text.chars().take(64).collect()
}

#[cfg(test)]
#[path = "peft_tests.rs"]
mod tests;

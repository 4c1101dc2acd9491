//! Rotary position embedding settings, in both spellings transformers has used.

use serde_json::{Map, Value};

use super::ConfigError;
use super::parse::{invalid, number, unsupported};

/// How positions are rotated in.
#[derive(Debug, Clone, PartialEq)]
pub struct Rope {
    /// Base of the geometric series of wavelengths.
    pub theta: f64,
    /// What stretches it to longer contexts.
    pub scaling: RopeScaling,
}

/// Context extension of the rotary embedding.
#[derive(Debug, Clone, PartialEq)]
pub enum RopeScaling {
    /// None.
    Default,
    /// Every frequency divided by a factor.
    Linear {
        /// The divisor, at least 1.
        factor: f64,
    },
    /// Llama 3.1: long wavelengths divided, short ones kept, a ramp between.
    Llama3 {
        /// The divisor of the long wavelengths.
        factor: f64,
        /// Wavelengths above `original / this` are long.
        low_freq_factor: f64,
        /// Wavelengths below `original / this` are short.
        high_freq_factor: f64,
        /// Context length before the extension, in tokens.
        original_max_positions: f64,
    },
    /// `YaRN` (arXiv 2309.00071).
    Yarn {
        /// How much the context was stretched.
        factor: f64,
        /// Context length before the extension, in tokens.
        original_max_positions: f64,
        /// Rotations above which a dimension is left alone.
        beta_fast: f64,
        /// Rotations below which a dimension is fully interpolated.
        beta_slow: f64,
        /// Factor on cosine and sine, already resolved from `mscale` and `mscale_all_dim`.
        attention_factor: f64,
        /// Whether the ramp's ends are rounded to whole dimensions.
        truncate: bool,
    },
}

const KNOWN_KEYS: [&str; 13] = [
    "rope_type",
    "type",
    "rope_theta",
    "factor",
    "original_max_position_embeddings",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "low_freq_factor",
    "high_freq_factor",
];

/// Reads `rope_scaling` or `rope_parameters` and a top-level `rope_theta`, with the precedence of
/// transformers' `convert_rope_params_to_dict`.
pub(super) fn parse(
    config: &Map<String, Value>,
    max_positions: usize,
) -> Result<Rope, ConfigError> {
    let empty = Map::new();
    let settings = match present(config, "rope_scaling").or(present(config, "rope_parameters")) {
        None => &empty,
        Some(Value::Object(settings)) => settings,
        Some(other) => return Err(invalid("rope_parameters", other, "an object")),
    };
    for holder in [config, settings] {
        match positive(holder, "partial_rotary_factor")? {
            None => {}
            Some(part) if (part - 1.0).abs() < f64::EPSILON => {}
            Some(part) => return unsupported(format!("partial_rotary_factor {part}")),
        }
    }
    for key in settings.keys() {
        if !KNOWN_KEYS.contains(&key.as_str()) && key != "partial_rotary_factor" {
            let key: String = key.chars().take(64).collect();
            return unsupported(format!("rope setting `{key}`"));
        }
    }
    let theta = match positive(settings, "rope_theta")? {
        Some(theta) => theta,
        None => positive(config, "rope_theta")?.unwrap_or(10_000.0),
    };
    if theta <= 1.0 {
        return Err(invalid("rope_theta", &theta.into(), "more than 1"));
    }
    let kind = match present(settings, "rope_type").or(present(settings, "type")) {
        None => "default",
        Some(Value::String(kind)) => kind.as_str(),
        Some(other) => return Err(invalid("rope_type", other, "a string")),
    };
    let original = match positive(config, "original_max_position_embeddings")? {
        Some(original) => original,
        None => {
            positive(settings, "original_max_position_embeddings")?.unwrap_or(max_positions as f64)
        }
    };
    let scaling = match kind {
        "default" => RopeScaling::Default,
        "linear" => RopeScaling::Linear {
            factor: required(settings, "factor")?,
        },
        "llama3" => llama3(settings, original)?,
        "yarn" => yarn(settings, original, max_positions)?,
        other => {
            let other: String = other.chars().take(64).collect();
            return unsupported(format!("rope type `{other}`"));
        }
    };
    Ok(Rope { theta, scaling })
}

fn llama3(settings: &Map<String, Value>, original: f64) -> Result<RopeScaling, ConfigError> {
    let low_freq_factor = required(settings, "low_freq_factor")?;
    let high_freq_factor = required(settings, "high_freq_factor")?;
    if high_freq_factor <= low_freq_factor {
        return Err(invalid(
            "high_freq_factor",
            &high_freq_factor.into(),
            "more than low_freq_factor",
        ));
    }
    Ok(RopeScaling::Llama3 {
        factor: required(settings, "factor")?,
        low_freq_factor,
        high_freq_factor,
        original_max_positions: original,
    })
}

fn yarn(
    settings: &Map<String, Value>,
    original: f64,
    max_positions: usize,
) -> Result<RopeScaling, ConfigError> {
    let factor = positive(settings, "factor")?.unwrap_or(max_positions as f64 / original);
    let mscale = number(settings, "mscale")?.filter(|value| *value != 0.0);
    let mscale_all_dim = number(settings, "mscale_all_dim")?.filter(|value| *value != 0.0);
    let attention_factor = match (
        number(settings, "attention_factor")?,
        mscale,
        mscale_all_dim,
    ) {
        (Some(factor), _, _) => factor,
        (None, Some(above), Some(below)) => yarn_mscale(factor, above) / yarn_mscale(factor, below),
        (None, _, _) => yarn_mscale(factor, 1.0),
    };
    let truncate = match present(settings, "truncate") {
        None => true,
        Some(Value::Bool(truncate)) => *truncate,
        Some(other) => return Err(invalid("truncate", other, "true or false")),
    };
    Ok(RopeScaling::Yarn {
        factor,
        original_max_positions: original,
        beta_fast: positive(settings, "beta_fast")?.unwrap_or(32.0),
        beta_slow: positive(settings, "beta_slow")?.unwrap_or(1.0),
        attention_factor,
        truncate,
    })
}

/// `get_mscale` of transformers: 0.1 m ln(s) + 1, and 1 where nothing is stretched.
fn yarn_mscale(scale: f64, mscale: f64) -> f64 {
    if scale <= 1.0 {
        1.0
    } else {
        0.1 * mscale * scale.ln() + 1.0
    }
}

fn present<'a>(map: &'a Map<String, Value>, key: &str) -> Option<&'a Value> {
    map.get(key).filter(|value| !value.is_null())
}

fn positive(map: &Map<String, Value>, key: &str) -> Result<Option<f64>, ConfigError> {
    match number(map, key)? {
        Some(value) if value <= 0.0 => Err(invalid(key, &value.into(), "more than 0")),
        other => Ok(other),
    }
}

fn required(map: &Map<String, Value>, key: &'static str) -> Result<f64, ConfigError> {
    positive(map, key)?.ok_or(ConfigError::Missing(key))
}

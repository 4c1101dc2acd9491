//! From JSON to [`ModelConfig`]: defaults, bounds, refusals.

use serde_json::{Map, Value};

use super::{ConfigError, Family, ModelConfig, SlidingWindow, rope};
use crate::json::reason;

/// Most rows, columns or tokens any field may name. Keeps every product of two inside `usize`
/// and a hostile config from asking for absurd buffers; real models stay far below.
const SIZE_MAX: usize = 1 << 24;
/// Most blocks; the largest open models have about 130.
const LAYERS_MAX: usize = 1024;
/// Most heads; the largest open models have 128.
const HEADS_MAX: usize = 4096;
/// Widest head; real models have 64 to 256.
const HEAD_DIM_MAX: usize = 4096;

pub(super) fn parse(bytes: &[u8]) -> Result<ModelConfig, ConfigError> {
    let config = match serde_json::from_slice(bytes) {
        Ok(Value::Object(config)) => config,
        Ok(_) => return Err(ConfigError::Json("another JSON value".to_owned())),
        Err(error) => return Err(ConfigError::Json(reason(&error))),
    };
    let family = family(&config)?;
    refuse_unsupported(&config)?;

    let hidden_size = size(&config, "hidden_size", SIZE_MAX)?;
    let layers = size(&config, "num_hidden_layers", LAYERS_MAX)?;
    let heads = size(&config, "num_attention_heads", HEADS_MAX)?;
    let kv_heads = match optional_size(&config, "num_key_value_heads", HEADS_MAX)? {
        Some(kv_heads) => kv_heads,
        None if family == Family::Mistral && !config.contains_key("num_key_value_heads") => 8,
        None => heads,
    };
    if heads % kv_heads != 0 {
        let expected = format!("a divisor of num_attention_heads ({heads})");
        return Err(invalid("num_key_value_heads", &kv_heads.into(), &expected));
    }
    let head_dim = head_dim(&config, family, hidden_size, heads)?;
    let max_positions = optional_size(&config, "max_position_embeddings", SIZE_MAX)?;
    let max_positions = max_positions.unwrap_or(match family {
        Family::Llama => 2048,
        Family::Mistral => 4096 * 32,
        Family::Qwen2 | Family::Qwen3 => 32_768,
    });
    let rms_norm_eps = number(&config, "rms_norm_eps")?.unwrap_or(1e-6);
    if !(0.0..1.0).contains(&rms_norm_eps) {
        return Err(invalid("rms_norm_eps", &rms_norm_eps.into(), "0 to 1"));
    }
    let biased = flag(&config, "attention_bias")?;
    Ok(ModelConfig {
        family,
        vocab_size: size(&config, "vocab_size", SIZE_MAX)?,
        hidden_size,
        intermediate_size: size(&config, "intermediate_size", SIZE_MAX)?,
        layers,
        heads,
        kv_heads,
        head_dim,
        rms_norm_eps,
        rope: rope::parse(&config, max_positions)?,
        tied: flag(&config, "tie_word_embeddings")?,
        // Qwen2 has q, k, v biases whatever the config says; Mistral has none.
        attention_bias: match family {
            Family::Llama | Family::Qwen3 => biased,
            Family::Mistral => false,
            Family::Qwen2 => true,
        },
        output_bias: matches!(family, Family::Llama | Family::Qwen3) && biased,
        qk_norm: family == Family::Qwen3,
        sliding_window: sliding_window(&config, family, layers)?,
        max_positions,
        bos_token_id: token_ids(&config, "bos_token_id")?.first().copied(),
        eos_token_ids: token_ids(&config, "eos_token_id")?,
    })
}

fn family(config: &Map<String, Value>) -> Result<Family, ConfigError> {
    let families = [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3];
    let model_type = match config.get("model_type") {
        None | Some(Value::Null) => return Err(ConfigError::Missing("model_type")),
        Some(Value::String(model_type)) => model_type,
        Some(other) => return Err(invalid("model_type", other, "a string")),
    };
    let Some(family) = families
        .into_iter()
        .find(|family| family.model_type() == model_type)
    else {
        return unsupported(format!(
            "model type {} (supported: llama, mistral, qwen2, qwen3)",
            shorten(model_type)
        ));
    };
    match config.get("architectures") {
        None | Some(Value::Null) => Ok(family),
        Some(Value::Array(names)) => {
            if names.iter().any(|name| name == family.architecture()) || names.is_empty() {
                Ok(family)
            } else {
                unsupported(format!(
                    "architecture {} (expected {})",
                    shorten(&Value::from(names.clone()).to_string()),
                    family.architecture()
                ))
            }
        }
        Some(other) => Err(invalid("architectures", other, "a list of names")),
    }
}

/// Settings that change the computation in ways the worker's model does not implement.
fn refuse_unsupported(config: &Map<String, Value>) -> Result<(), ConfigError> {
    for key in ["quantization_config", "compression_config"] {
        if config.get(key).is_some_and(|value| !value.is_null()) {
            return unsupported(format!("`{key}`: the weights are quantised"));
        }
    }
    match config.get("hidden_act") {
        None | Some(Value::Null) => {}
        Some(Value::String(name)) if name == "silu" || name == "swish" => {}
        Some(other) => {
            return unsupported(format!("hidden_act {}", shorten(&other.to_string())));
        }
    }
    if flag(config, "mlp_bias")? {
        return unsupported("mlp_bias: feed-forward layers with a bias".to_owned());
    }
    Ok(())
}

fn head_dim(
    config: &Map<String, Value>,
    family: Family,
    hidden_size: usize,
    heads: usize,
) -> Result<usize, ConfigError> {
    let head_dim = match optional_size(config, "head_dim", HEAD_DIM_MAX)? {
        Some(head_dim) => head_dim,
        None if family == Family::Qwen3 => 128,
        None if hidden_size.is_multiple_of(heads) => hidden_size / heads,
        None => {
            let expected = format!("a multiple of num_attention_heads ({heads}), or a head_dim");
            return Err(invalid("hidden_size", &hidden_size.into(), &expected));
        }
    };
    if head_dim % 2 != 0 {
        return Err(invalid("head_dim", &head_dim.into(), "an even number"));
    }
    Ok(head_dim)
}

fn sliding_window(
    config: &Map<String, Value>,
    family: Family,
    layers: usize,
) -> Result<Option<SlidingWindow>, ConfigError> {
    let written = optional_size(config, "sliding_window", SIZE_MAX)?;
    let size = match family {
        Family::Llama => None,
        Family::Mistral if config.contains_key("sliding_window") => written,
        Family::Mistral => Some(4096),
        Family::Qwen2 | Family::Qwen3 if flag(config, "use_sliding_window")? => {
            written.or((!config.contains_key("sliding_window")).then_some(4096))
        }
        Family::Qwen2 | Family::Qwen3 => None,
    };
    let Some(size) = size else { return Ok(None) };
    let listed = match family {
        Family::Llama => None,
        Family::Mistral | Family::Qwen2 | Family::Qwen3 => layer_types(config, layers)?,
    };
    let layers = match (family, listed) {
        (Family::Mistral, Some(listed)) if listed.contains(&false) => {
            return unsupported("mistral with layer_types other than sliding_attention".to_owned());
        }
        (Family::Mistral | Family::Llama, _) => vec![true; layers],
        (_, Some(listed)) => listed,
        (_, None) => {
            let first = optional_count(config, "max_window_layers")?.unwrap_or(28);
            (0..layers).map(|layer| layer >= first).collect()
        }
    };
    Ok(Some(SlidingWindow { size, layers }))
}

/// `layer_types` as one flag a layer: whether the window holds there.
fn layer_types(
    config: &Map<String, Value>,
    layers: usize,
) -> Result<Option<Vec<bool>>, ConfigError> {
    let list = match config.get("layer_types") {
        None | Some(Value::Null) => return Ok(None),
        Some(Value::Array(list)) if list.len() == layers => list,
        Some(other) => return Err(invalid("layer_types", other, "one name a layer")),
    };
    list.iter()
        .map(|kind| match kind.as_str() {
            Some("full_attention") => Ok(false),
            Some("sliding_attention") => Ok(true),
            _ => unsupported(format!("layer type {}", shorten(&kind.to_string()))),
        })
        .collect::<Result<Vec<_>, _>>()
        .map(Some)
}

fn size(config: &Map<String, Value>, key: &'static str, max: usize) -> Result<usize, ConfigError> {
    optional_size(config, key, max)?.ok_or(ConfigError::Missing(key))
}

fn optional_size(
    config: &Map<String, Value>,
    key: &str,
    max: usize,
) -> Result<Option<usize>, ConfigError> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_u64().and_then(|size| usize::try_from(size).ok()) {
            Some(size) if (1..=max).contains(&size) => Ok(Some(size)),
            _ => Err(invalid(key, value, &format!("a whole number, 1 to {max}"))),
        },
    }
}

fn optional_count(config: &Map<String, Value>, key: &str) -> Result<Option<usize>, ConfigError> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => value
            .as_u64()
            .and_then(|count| usize::try_from(count).ok())
            .map(Some)
            .ok_or_else(|| invalid(key, value, "a whole number")),
    }
}

fn flag(config: &Map<String, Value>, key: &str) -> Result<bool, ConfigError> {
    match config.get(key) {
        None | Some(Value::Null) => Ok(false),
        Some(Value::Bool(flag)) => Ok(*flag),
        Some(other) => Err(invalid(key, other, "true or false")),
    }
}

pub(super) fn number(map: &Map<String, Value>, key: &str) -> Result<Option<f64>, ConfigError> {
    match map.get(key) {
        None | Some(Value::Null) => Ok(None),
        Some(value) => match value.as_f64() {
            Some(number) if number.is_finite() => Ok(Some(number)),
            _ => Err(invalid(key, value, "a number")),
        },
    }
}

fn token_ids(config: &Map<String, Value>, key: &str) -> Result<Vec<u32>, ConfigError> {
    let id = |value: &Value| value.as_u64().and_then(|id| u32::try_from(id).ok());
    match config.get(key) {
        None | Some(Value::Null) => Some(Vec::new()),
        Some(Value::Array(list)) if list.len() <= 64 => list.iter().map(id).collect(),
        // Some exporters write -1 for "none".
        Some(value) if value.as_i64() == Some(-1) => Some(Vec::new()),
        Some(value) => id(value).map(|id| vec![id]),
    }
    .ok_or_else(|| {
        let value = config.get(key).unwrap_or(&Value::Null);
        invalid(key, value, "a token id or a list of them")
    })
}

pub(super) fn invalid(key: &str, value: &Value, expected: &str) -> ConfigError {
    ConfigError::Invalid {
        key: key.to_owned(),
        value: shorten(&value.to_string()),
        expected: expected.to_owned(),
    }
}

pub(super) fn unsupported<T>(what: String) -> Result<T, ConfigError> {
    Err(ConfigError::Unsupported(what))
}

/// Text from outside, cut so that an error message stays one line.
fn shorten(text: &str) -> String {
    text.chars().take(80).collect()
}

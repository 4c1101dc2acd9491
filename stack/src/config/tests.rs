use serde_json::{Value, json};

use super::*;

fn base() -> Value {
    json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": 48,
        "intermediate_size": 96, "num_hidden_layers": 2, "num_attention_heads": 4,
        "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5, "rope_theta": 500_000.0, "hidden_act": "silu",
        "bos_token_id": 0, "eos_token_id": [1, 2],
    })
}

fn with(changes: Value) -> Result<ModelConfig, ConfigError> {
    let mut config = base();
    for (key, value) in changes.as_object().unwrap() {
        config[key] = value.clone();
    }
    ModelConfig::from_json(config.to_string().as_bytes())
}

#[test]
fn llama_and_its_weights() {
    let config = with(json!({})).unwrap();
    assert_eq!(config.head_dim, 12);
    assert_eq!(config.eos_token_ids, [1, 2]);
    assert_eq!(config.rope.scaling, RopeScaling::Default);
    let weights = config.weights();
    assert_eq!(weights.len(), 1 + 2 * 9 + 2);
    let k = weights
        .iter()
        .find(|(name, _)| name == "model.layers.1.self_attn.k_proj.weight");
    assert_eq!(k.unwrap().1, [24, 48]);
    let tied = with(json!({"tie_word_embeddings": true})).unwrap();
    assert_eq!(tied.weights().len(), weights.len() - 1);
    assert!(tied.is_redundant("lm_head.weight") && !config.is_redundant("lm_head.weight"));
}

#[test]
fn families_differ_where_transformers_does() {
    let qwen = |model_type: &str, name: &str| json!({"model_type": model_type, "architectures": [name], "num_hidden_layers": 3, "sliding_window": 8, "max_window_layers": 1});
    let qwen2 = with(qwen("qwen2", "Qwen2ForCausalLM")).unwrap();
    assert!(qwen2.attention_bias && !qwen2.output_bias && qwen2.sliding_window.is_none());
    let mut changes = qwen("qwen3", "Qwen3ForCausalLM");
    changes["use_sliding_window"] = true.into();
    let qwen3 = with(changes).unwrap();
    assert!(qwen3.qk_norm && !qwen3.attention_bias);
    assert_eq!(qwen3.head_dim, 128);
    let windows: Vec<_> = (0..3).map(|layer| qwen3.window(layer)).collect();
    assert_eq!(windows, [None, Some(8), Some(8)]);
    let mistral = json!({"model_type": "mistral", "architectures": ["MistralForCausalLM"]});
    assert_eq!(with(mistral.clone()).unwrap().window(0), Some(4096));
    let mut open = mistral;
    open["sliding_window"] = Value::Null;
    assert_eq!(with(open).unwrap().window(0), None);
}

#[test]
fn both_rope_spellings_agree() {
    let llama3 = json!({"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
        "high_freq_factor": 4.0, "original_max_position_embeddings": 64});
    let old = with(json!({"rope_scaling": llama3, "rope_theta": 1e4})).unwrap();
    let mut parameters = llama3;
    parameters["rope_theta"] = 1e4.into();
    let new = with(json!({"rope_parameters": parameters, "rope_theta": null})).unwrap();
    assert_eq!(old.rope, new.rope);
    let typed = with(json!({"rope_scaling": {"type": "linear", "factor": 2}})).unwrap();
    assert_eq!(typed.rope.scaling, RopeScaling::Linear { factor: 2.0 });
}

#[test]
fn yarn_resolves_its_attention_factor() {
    let factor = |extra: Value| {
        let mut yarn =
            json!({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32});
        for (key, value) in extra.as_object().unwrap() {
            yarn[key] = value.clone();
        }
        match with(json!({"rope_parameters": yarn})).unwrap().rope.scaling {
            RopeScaling::Yarn {
                attention_factor, ..
            } => attention_factor,
            other => panic!("{other:?}"),
        }
    };
    let plain = 0.1 * 4f64.ln() + 1.0;
    assert!((factor(json!({})) - plain).abs() < 1e-12);
    assert!((factor(json!({"attention_factor": 0.5})) - 0.5).abs() < 1e-12);
    let ratio = (0.2 * 4f64.ln() + 1.0) / plain;
    assert!((factor(json!({"mscale": 2.0, "mscale_all_dim": 1.0})) - ratio).abs() < 1e-12);
}

#[test]
fn unsupported_is_refused_by_name() {
    for (changes, name) in [
        (json!({"model_type": "gemma3"}), "gemma3"),
        (
            json!({"architectures": ["LlamaForSequenceClassification"]}),
            "SequenceClassification",
        ),
        (json!({"hidden_act": "gelu"}), "gelu"),
        (
            json!({"quantization_config": {"bits": 4}}),
            "quantization_config",
        ),
        (json!({"mlp_bias": true}), "mlp_bias"),
        (
            json!({"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
            "dynamic",
        ),
        (
            json!({"rope_scaling": {"type": "longrope", "short_factor": []}}),
            "short_factor",
        ),
        (
            json!({"rope_parameters": {"rope_type": "longrope"}}),
            "longrope",
        ),
        (
            json!({"rope_parameters": {"full_attention": {}}}),
            "full_attention",
        ),
        (
            json!({"partial_rotary_factor": 0.5}),
            "partial_rotary_factor",
        ),
    ] {
        match with(changes) {
            Err(ConfigError::Unsupported(text)) => assert!(text.contains(name), "{text}"),
            other => panic!("{name}: {other:?}"),
        }
    }
}

#[test]
fn hostile_values_are_errors() {
    for changes in [
        json!({"hidden_size": u64::MAX}),
        json!({"hidden_size": 0}),
        json!({"num_hidden_layers": -1}),
        json!({"num_key_value_heads": 3}),
        json!({"head_dim": 7}),
        json!({"vocab_size": "64"}),
        json!({"rope_theta": -1.0}),
        json!({"rope_theta": 1.0}),
        json!({"rms_norm_eps": 2.0}),
        json!({"eos_token_id": "end"}),
        json!({"rope_scaling": [1]}),
        json!({"rope_scaling": {"rope_type": "linear"}}),
        json!({"tie_word_embeddings": "yes"}),
    ] {
        let text = changes.to_string();
        assert!(with(changes).is_err(), "{text}");
    }
    assert!(ModelConfig::from_json(b"[]").is_err());
    assert!(ModelConfig::from_json(b"{").is_err());
}

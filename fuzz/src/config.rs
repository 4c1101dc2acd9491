//! A flag, and `config.json` or `adapter_config.json`.

use cairn_stack::config::{ModelConfig, Target};
use cairn_stack::peft::{PeftConfig, Scales};

use crate::input::{Input, join};
use crate::{assert_short, checkpoint};

/// Flag: the file is an adapter's.
const ADAPTER: u8 = 1;

/// Sizes that are believed are of use; an adapter's config is written to the same again.
pub fn check(data: &[u8]) {
    let mut input = Input(data);
    if input.byte() & ADAPTER == 0 {
        match ModelConfig::from_json(input.0) {
            Ok(config) => model(&config),
            Err(error) => assert_short(&error.to_string()),
        }
        return;
    }
    let config = match PeftConfig::from_json(input.0) {
        Ok(config) => config,
        Err(error) => return assert_short(&error.to_string()),
    };
    let again = PeftConfig::from_json(config.to_json().as_bytes()).expect("what we write is read");
    same(again, &config);
    match Scales::new(&config) {
        Ok(scales) => {
            for module in ["model.layers.0.self_attn.q_proj", "lm_head", "", "\n"] {
                let (rank, scale) = scales.of(module);
                assert!(rank > 0 && scale >= 0.0, "{rank} {scale}");
            }
        }
        Err(error) => assert_short(&error.to_string()),
    }
}

/// JSON readers are off by the last bit where a number has more than fifteen digits. Which layers
/// are meant is not written: an adapter of some layers names them in its tensors.
fn same(again: PeftConfig, config: &PeftConfig) {
    let close = |x: f64, y: f64| (x - y).abs() <= 1e-14 * y;
    assert!(close(again.alpha, config.alpha), "{}", config.alpha);
    assert_eq!(again.alpha_pattern.len(), config.alpha_pattern.len());
    for (one, other) in again.alpha_pattern.iter().zip(&config.alpha_pattern) {
        assert!(one.0 == other.0 && close(one.1, other.1), "{other:?}");
    }
    let whole = PeftConfig {
        some_layers: config.some_layers,
        alpha: config.alpha,
        alpha_pattern: config.alpha_pattern.clone(),
        ..again
    };
    assert_eq!(whole, *config);
}

fn model(config: &ModelConfig) {
    assert!(config.heads.is_multiple_of(config.kv_heads) && config.head_dim.is_multiple_of(2));
    for target in Target::ALL {
        let (inputs, outputs) = config.linear(target);
        assert!(inputs > 0 && outputs > 0);
    }
    let weights = config.weights();
    assert!(weights.len() > config.layers);
    for layer in 0..=config.layers {
        assert_ne!(config.window(layer), Some(0));
    }
}

/// Configs of all families, with every way to stretch positions, and adapters' configs.
pub fn seeds() -> Vec<Vec<u8>> {
    let sizes = r#""vocab_size":32,"hidden_size":8,"intermediate_size":12,"num_hidden_layers":2,"num_attention_heads":2"#;
    let models = [
        checkpoint::CONFIG.to_owned(),
        format!(
            r#"{{"model_type":"llama",{sizes},"rope_scaling":{{"rope_type":"llama3","factor":8.0,"low_freq_factor":1.0,"high_freq_factor":4.0,"original_max_position_embeddings":8192}}}}"#
        ),
        format!(
            r#"{{"model_type":"qwen3",{sizes},"head_dim":4,"rope_parameters":{{"rope_type":"yarn","factor":4.0,"mscale":1.0,"mscale_all_dim":0.5,"truncate":false}}}}"#
        ),
        format!(
            r#"{{"model_type":"qwen2",{sizes},"use_sliding_window":true,"max_window_layers":1,"rope_scaling":{{"type":"linear","factor":2}}}}"#
        ),
        format!(r#"{{"model_type":"mistral",{sizes},"sliding_window":null,"bos_token_id":-1}}"#),
    ];
    let adapters = [
        r#"{"peft_type":"LORA","r":8,"lora_alpha":16,"target_modules":["q_proj","v_proj"],"bias":"none","task_type":"CAUSAL_LM","use_rslora":true,"base_model_name_or_path":"x","revision":null,"init_lora_weights":"gaussian"}"#,
        r#"{"peft_type":"LORA","r":8,"lora_alpha":0.3,"target_modules":"all-linear","rank_pattern":{"q_proj":4,"layers\\.[01]\\..*":2},"alpha_pattern":{".*k_proj":0.5},"layers_to_transform":[0,1],"lora_dropout":0.1}"#,
    ];
    let models = models.iter().map(|text| join(0, &[], text.as_bytes()));
    let adapters = adapters
        .iter()
        .map(|text| join(ADAPTER, &[], text.as_bytes()));
    models.chain(adapters).collect()
}

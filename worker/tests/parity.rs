//! The model in step with transformers: logits of every family and rope kind.

mod common;

use cairn_stack::tensors::TensorFile;
use cairn_worker::data::Example;
use cairn_worker::model::Input;
use common::{batch_of, device, model, reference, tensor};

/// Largest difference of a logit from transformers', in f32.
const TOLERANCE: f32 = 1e-4;

/// Largest absolute difference from the reference logits of one model.
fn difference(name: &str) -> f32 {
    let model = model(name);
    let path = reference()
        .join("models")
        .join(format!("{name}.reference.safetensors"));
    let file = TensorFile::open(&path).expect(name);
    let (ids, shape) = tensor(&file, "input_ids");
    let examples: Vec<Example> = ids
        .chunks(shape[1])
        .map(|row| Example {
            tokens: row.iter().map(|id| *id as u32).collect(),
            scored: vec![false; row.len()],
            cut: false,
        })
        .collect();
    let input = Input::new(&model.llama.config, &batch_of(&examples), &model.device);
    let logits: Vec<f32> = model
        .llama
        .logits(None, &input)
        .to_data()
        .iter::<f32>()
        .collect();
    let (expected, _) = tensor(&file, "logits");
    assert_eq!(logits.len(), expected.len());
    logits
        .iter()
        .zip(&expected)
        .map(|(a, b)| (a - b).abs())
        .fold(0.0, f32::max)
}

/// Every model that `generate.py` made: a folder with reference values beside it.
fn names() -> Vec<String> {
    let mut names: Vec<String> = std::fs::read_dir(reference().join("models"))
        .expect("the models folder")
        .filter_map(|entry| {
            entry
                .expect("a folder entry")
                .file_name()
                .into_string()
                .ok()
        })
        .filter_map(|name| {
            name.strip_suffix(".reference.safetensors")
                .map(str::to_owned)
        })
        .collect();
    names.sort();
    names
}

#[test]
fn logits_equal_those_of_transformers() {
    let names = names();
    assert!(names.len() >= 12, "reference models are missing: {names:?}");
    let mut wrong = Vec::new();
    for name in names {
        let difference = difference(&name);
        println!("{name:24} {difference:.2e}");
        if difference.is_nan() || difference > TOLERANCE {
            wrong.push(format!("{name}: {difference:.2e}"));
        }
    }
    assert!(wrong.is_empty(), "on {}: {wrong:?}", device());
}

#[test]
fn every_family_rope_kind_and_feature_is_among_them() {
    use cairn_stack::config::{Family, ModelConfig, RopeScaling};
    let configs: Vec<ModelConfig> = names()
        .iter()
        .map(|name| ModelConfig::load(&reference().join("models").join(name)).unwrap())
        .collect();
    let any = |what: &str, test: &dyn Fn(&ModelConfig) -> bool| {
        assert!(configs.iter().any(test), "{what}");
    };
    for family in [Family::Llama, Family::Mistral, Family::Qwen2, Family::Qwen3] {
        any("family", &|config| config.family == family);
    }
    any("default", &|config| {
        config.rope.scaling == RopeScaling::Default
    });
    any("linear", &|config| {
        matches!(config.rope.scaling, RopeScaling::Linear { .. })
    });
    any("llama3", &|config| {
        matches!(config.rope.scaling, RopeScaling::Llama3 { .. })
    });
    any("yarn", &|config| {
        matches!(config.rope.scaling, RopeScaling::Yarn { .. })
    });
    any("tied", &|config| config.tied);
    any("untied", &|config| !config.tied);
    any("grouped queries", &|config| config.kv_heads < config.heads);
    any("bias", &|config| config.attention_bias);
    any("q/k norm", &|config| config.qk_norm);
    any("explicit head_dim", &|config| {
        config.head_dim * config.heads != config.hidden_size
    });
    any("window on some layers", &|config| {
        config.window(0) != config.window(1)
    });
    let has = |text: &str| {
        let spelt = |name: &String| {
            std::fs::read_to_string(reference().join("models").join(name).join("config.json"))
                .unwrap()
                .contains(text)
        };
        names().iter().any(spelt)
    };
    assert!(has("\"rope_scaling\": {") && has("\"rope_parameters\": {"));
    assert!(names().iter().any(|n| {
        reference()
            .join("models")
            .join(n)
            .join("model.safetensors.index.json")
            .exists()
    }));
}

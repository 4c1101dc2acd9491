//! Small adapters and checkpoints for this crate's unit tests.

use std::path::Path;

use crate::adapter::{AdapterFile, AdapterWriteConfig, Pair, write_adapter};
use crate::config::ModelConfig;
use crate::recipe::Recipe;
use crate::tensors::{Dtype, TensorSpec, write_tensors};

/// Numbers from a tiny generator (SplitMix64), in -1 to 1.
pub(crate) fn numbers(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15);
    let mut next = || {
        state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut z = state;
        z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((z ^ (z >> 31)) >> 40) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| next()).collect()
}

pub(crate) fn pair(module: &str, rank: usize, shape: [usize; 2], scale: f64, seed: u64) -> Pair {
    let [out_features, in_features] = shape;
    Pair {
        module: module.to_owned(),
        rank,
        in_features,
        out_features,
        a: numbers(rank * in_features, seed),
        b: numbers(out_features * rank, seed + 1000),
        scale,
    }
}

/// `scale * B * A` in f64, `[out, in]`.
pub(crate) fn dense(pair: &Pair) -> Vec<f64> {
    let mut delta = vec![0.0; pair.out_features * pair.in_features];
    for row in 0..pair.out_features {
        for column in 0..pair.in_features {
            let sum: f64 = (0..pair.rank)
                .map(|k| {
                    f64::from(pair.b[row * pair.rank + k])
                        * f64::from(pair.a[k * pair.in_features + column])
                })
                .sum();
            delta[row * pair.in_features + column] = pair.scale * sum;
        }
    }
    delta
}

pub(crate) fn write_config(rank: usize, alpha: f64) -> AdapterWriteConfig {
    AdapterWriteConfig {
        rank,
        alpha,
        use_rslora: false,
        target_modules: Vec::new(),
        base_model: None,
        revision: None,
    }
}

pub(crate) fn adapter(dir: &Path, pairs: &[Pair], rank: usize, alpha: f64) -> AdapterFile {
    write_adapter(dir, pairs, &write_config(rank, alpha)).unwrap();
    AdapterFile::open(dir).unwrap()
}

pub(crate) const CONFIG: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":11,
"hidden_size":8,"intermediate_size":12,"num_hidden_layers":2,"num_attention_heads":2,"num_key_value_heads":1,
"max_position_embeddings":32,"rms_norm_eps":1e-6,"rope_theta":10000.0,"hidden_act":"silu",
"tie_word_embeddings":false,"bos_token_id":0,"eos_token_id":1}"#;

pub(crate) fn model() -> ModelConfig {
    ModelConfig::from_json(CONFIG.as_bytes()).unwrap()
}

pub(crate) fn recipe() -> Recipe {
    Recipe::parse_toml(
        "rank = 2\nalpha = 4\ntarget_modules = [\"q_proj\", \"down_proj\"]\nlearning_rate = 1e-3\nepochs = 1\nbatch_size = 1\nsequence_length = 8\n",
    )
    .unwrap()
}

/// Tensors of the model with seeded values, by name.
pub(crate) fn weights(seed: u64) -> Vec<(TensorSpec, Vec<f32>)> {
    let tensors = model().weights().into_iter().enumerate();
    let tensor = |(index, (name, shape)): (usize, (String, Vec<usize>))| {
        let values = numbers(shape.iter().product(), seed + index as u64);
        (
            TensorSpec {
                name,
                dtype: Dtype::F32,
                shape,
            },
            values,
        )
    };
    tensors.map(tensor).collect()
}

pub(crate) fn write_weights(path: &Path, tensors: &[(TensorSpec, Vec<f32>)]) {
    let specs: Vec<TensorSpec> = tensors.iter().map(|(spec, _)| spec.clone()).collect();
    let mut bytes = Vec::new();
    write_tensors::<std::io::Error>(&mut bytes, &[("format", "pt")], &specs, |index| {
        let mut body = Vec::new();
        specs[index].dtype.encode(&tensors[index].1, &mut body);
        Ok(body)
    })
    .unwrap();
    std::fs::write(path, bytes).unwrap();
}

/// A whole checkpoint folder in one weight file.
pub(crate) fn checkpoint(dir: &Path, seed: u64) {
    std::fs::create_dir_all(dir).unwrap();
    std::fs::write(dir.join("config.json"), CONFIG).unwrap();
    std::fs::write(dir.join("tokenizer.json"), "{\"odd\" :  1}\r\n").unwrap();
    write_weights(&dir.join("model.safetensors"), &weights(seed));
}

//! A Hugging Face folder: flags, `config.json`, index, two headers, and data for both.

use std::collections::BTreeMap;

use cairn_stack::checkpoint::{Checkpoint, INDEX_FILE, WEIGHTS_FILE};
use cairn_stack::config::ModelConfig;
use cairn_stack::tensors::{Dtype, TensorSpec};
use serde_json::json;

use crate::input::{Input, fitted, join, split};
use crate::tensors::written;
use crate::{assert_short, scratch};

/// A model of one layer and few weights.
pub const CONFIG: &str = r#"{"architectures":["LlamaForCausalLM"],"model_type":"llama","vocab_size":3,
"hidden_size":4,"intermediate_size":2,"num_hidden_layers":1,"num_attention_heads":2,"num_key_value_heads":1,
"max_position_embeddings":32,"rms_norm_eps":1e-6,"rope_theta":10000.0,"hidden_act":"silu",
"tie_word_embeddings":false,"bos_token_id":0,"eos_token_id":1}"#;
/// Flag: an index and two weight files instead of one.
const INDEXED: u8 = 1;
const SHARDS: [&str; 2] = ["model-1.safetensors", "model-2.safetensors"];

/// What opens has exactly the weights of its config, all readable, and lists its files in order.
pub fn check(data: &[u8]) {
    let mut input = Input(data);
    let indexed = input.byte() & INDEXED != 0;
    let (config, index) = (input.text(), input.text());
    let headers = [input.text(), input.text()];
    let folder = scratch::folder(if indexed { "indexed" } else { "single" });
    scratch::write(&folder.join("config.json"), config);
    if indexed {
        scratch::write(&folder.join(INDEX_FILE), index);
        for (name, header) in SHARDS.iter().zip(headers) {
            scratch::write(&folder.join(name), &fitted(header, input.0));
        }
    } else {
        scratch::write(&folder.join(WEIGHTS_FILE), &fitted(headers[0], input.0));
    }
    let checkpoint = match Checkpoint::open(&folder) {
        Ok(checkpoint) => checkpoint,
        Err(error) => return assert_short(&error.to_string()),
    };
    for (name, shape) in checkpoint.config().weights() {
        let (found, values) = checkpoint.read_f32(&name).expect("the weights are there");
        assert_eq!(found, shape, "{name}");
        assert_eq!(values.len(), shape.iter().product::<usize>(), "{name}");
    }
    let files = checkpoint.files();
    assert!(files.is_sorted() && files.contains(&"config.json".to_owned()));
    assert!(checkpoint.read_f32("no such tensor").is_err());
}

/// The same small model in one file and in two, and one with a tied head, biases and a window.
pub fn seeds() -> Vec<Vec<u8>> {
    let qwen = r#"{"model_type":"qwen2","vocab_size":3,"hidden_size":4,"intermediate_size":2,
"num_hidden_layers":1,"num_attention_heads":1,"tie_word_embeddings":true,"use_sliding_window":true,
"sliding_window":4,"layer_types":["sliding_attention"],"eos_token_id":[1,2]}"#;
    let mut seeds = Vec::new();
    for config in [CONFIG, qwen] {
        let weights = ModelConfig::from_json(config.as_bytes())
            .expect("a supported model")
            .weights();
        let header = |weights: &[(String, Vec<usize>)]| {
            let specs: Vec<TensorSpec> = weights
                .iter()
                .map(|(name, shape)| TensorSpec {
                    name: name.clone(),
                    dtype: Dtype::BF16,
                    shape: shape.clone(),
                })
                .collect();
            let file = written(&[("format", "pt")], &specs, |index| {
                vec![1; specs[index].bytes() as usize]
            });
            split(&file).0.to_vec()
        };
        seeds.push(join(0, &[config.as_bytes(), b"", &header(&weights)], &[]));
        let (first, second) = weights.split_at(weights.len() / 2);
        let place = |part: &[(String, Vec<usize>)], file: &str| -> Vec<(String, String)> {
            part.iter()
                .map(|(name, _)| (name.clone(), file.to_owned()))
                .collect()
        };
        let map: BTreeMap<String, String> = [place(first, SHARDS[0]), place(second, SHARDS[1])]
            .concat()
            .into_iter()
            .collect();
        let index = json!({"metadata": {"total_size": 1}, "weight_map": map}).to_string();
        let texts = [
            config.as_bytes(),
            index.as_bytes(),
            &header(first),
            &header(second),
        ];
        seeds.push(join(INDEXED, &texts, &[]));
    }
    seeds
}

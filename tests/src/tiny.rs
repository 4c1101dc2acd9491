//! A Llama of two layers, width 16 and 32 words, in F32, and the little data it needs.
use std::fs;
use std::io;
use std::path::Path;

use anyhow::Result;
use cairn_stack::adapter::AdapterSpec;
use cairn_stack::config::ModelConfig;
use cairn_stack::recipe::{Recipe, RoundFile};
use cairn_stack::records::Record;
use cairn_stack::tensors::{Dtype, TensorSpec, write_tensors};

/// The model's name.
pub const MODEL: &str = "tiny";
/// The training set's name.
pub const TRAIN: &str = "train";
/// The gate set's name.
pub const GATE: &str = "gate";
/// The audit set's name.
pub const AUDIT: &str = "audit";
/// Records of each set: train, gate, audit.
pub const RECORDS: [(&str, usize); 3] = [(TRAIN, 40), (GATE, 24), (AUDIT, 12)];
/// The file with the weights.
pub const WEIGHTS: &str = "model.safetensors";

const CONFIG: &str = r#"{
  "architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 32,
  "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 2,
  "num_key_value_heads": 1, "max_position_embeddings": 64, "rms_norm_eps": 1e-6,
  "rope_theta": 10000.0, "hidden_act": "silu", "tie_word_embeddings": false,
  "bos_token_id": 0, "eos_token_id": 1, "torch_dtype": "float32"
}
"#;

/// Numbers in -1 to 1 from a tiny generator (SplitMix64); the same for the same seed.
#[must_use]
pub fn numbers(count: usize, seed: u64) -> Vec<f32> {
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

/// The model's config.
#[must_use]
pub fn config() -> ModelConfig {
    ModelConfig::from_json(CONFIG.as_bytes()).expect("the tiny model's config is supported")
}

/// Writes the model as a Hugging Face folder.
///
/// # Errors
/// When a file cannot be written.
pub fn write_model(dir: &Path) -> Result<()> {
    fs::create_dir_all(dir)?;
    fs::write(dir.join("config.json"), CONFIG)?;
    fs::write(
        dir.join("generation_config.json"),
        "{\"eos_token_id\": 1}\n",
    )?;
    fs::write(dir.join("tokenizer.json"), "{\"version\":  \"1.0\"}\r\n")?;
    fs::write(dir.join("tokenizer_config.json"), "{}\n")?;
    let specs: Vec<TensorSpec> = config()
        .weights()
        .into_iter()
        .map(|(name, shape)| TensorSpec {
            name,
            dtype: Dtype::F32,
            shape,
        })
        .collect();
    let mut bytes = Vec::new();
    write_tensors::<io::Error>(&mut bytes, &[("format", "pt")], &specs, |index| {
        let mut body = Vec::new();
        let count = specs[index].shape.iter().product();
        Dtype::F32.encode(&numbers(count, index as u64 + 1), &mut body);
        Ok(body)
    })?;
    fs::write(dir.join(WEIGHTS), bytes)?;
    Ok(())
}

/// A round file over the tiny model: rank 2 on two targets, a lease of ten minutes, an hour.
#[must_use]
pub fn round_file(shards: u32) -> String {
    format!(
        "model = \"{MODEL}\"\ndataset = \"{TRAIN}\"\nshards = {shards}\n\n\
         [recipe]\nrank = 2\nalpha = 4\ntarget_modules = [\"q_proj\", \"v_proj\"]\n\
         learning_rate = 1e-3\nepochs = 1\nbatch_size = 4\nsequence_length = 32\nseed = 7\n\n\
         [policy]\ngate = \"{GATE}\"\naudit = \"{AUDIT}\"\ndeadline = \"1h\"\nlease = \"10m\"\n"
    )
}

/// The recipe of [`round_file`].
#[must_use]
pub fn recipe() -> Recipe {
    RoundFile::parse_toml(&round_file(1))
        .expect("the tiny round file is valid")
        .recipe
}

/// The adapter that the recipe asks for.
#[must_use]
pub fn spec() -> AdapterSpec {
    AdapterSpec::new(&config(), &recipe())
}

/// The records of a set as chunks: bytes and number of records.
#[must_use]
pub fn chunks(set: &str, records: usize) -> Vec<(Vec<u8>, u32)> {
    let line = |index: usize| {
        let record = Record::Text(format!("{set} record {index}"));
        format!("{}\n", record.to_json_line().trim_end())
    };
    let lines: Vec<String> = (0..records).map(line).collect();
    // Two chunks and more, so that shards cross their borders.
    let run = |lines: &[String]| (lines.concat().into_bytes(), lines.len() as u32);
    lines.chunks(records.div_ceil(3).max(1)).map(run).collect()
}

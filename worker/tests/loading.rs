//! Loading takes no more of the host than the model itself and a few pieces, whatever the format.

#![cfg(all(target_os = "linux", feature = "flex"))]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::io::BufWriter;
use std::path::Path;

use cairn_stack::config::{ModelConfig, Target};
use cairn_stack::digest::{Digest, DigestHasher};
use cairn_stack::quantize::Quantize;
use cairn_stack::tensors::{Dtype, TensorSpec, write_tensors};
use cairn_worker::device::DeviceName;
use cairn_worker::model::{Llama, LoadedModel};
use serde_json::json;

/// Most that loading may take beside the model, in weight files.
const SHARDS_MAX: f64 = 1.2;

/// A model in three files, the largest of them one matrix.
fn write_model(dir: &Path, dtype: Dtype) -> u64 {
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": 65_536, "hidden_size": 256, "intermediate_size": 768, "num_hidden_layers": 6,
        "num_attention_heads": 4, "num_key_value_heads": 2, "rms_norm_eps": 1e-5,
        "max_position_embeddings": 64, "tie_word_embeddings": false,
    });
    fs::write(dir.join("config.json"), config.to_string()).unwrap();
    let config = ModelConfig::load(dir).unwrap();
    let mut shards: [Vec<TensorSpec>; 3] = Default::default();
    for (name, shape) in config.weights() {
        let shard = match name.as_str() {
            "model.embed_tokens.weight" => 0,
            "lm_head.weight" => 2,
            _ => 1,
        };
        shards[shard].push(TensorSpec { name, dtype, shape });
    }
    let mut map = serde_json::Map::new();
    let mut longest = 0;
    for (number, specs) in shards.iter().enumerate() {
        let file = format!("model-0000{}-of-00003.safetensors", number + 1);
        for spec in specs {
            map.insert(spec.name.clone(), file.clone().into());
        }
        let path = dir.join(&file);
        let out = BufWriter::new(fs::File::create(&path).unwrap());
        let body = |place: usize| -> std::io::Result<Vec<u8>> {
            let count: usize = specs[place].shape.iter().product();
            let mut bytes = Vec::new();
            let seed = place as u32 + 31 * number as u32;
            dtype.encode(&numbers(count, seed), &mut bytes);
            Ok(bytes)
        };
        write_tensors(out, &[], specs, body).unwrap();
        longest = longest.max(fs::metadata(&path).unwrap().len());
    }
    let index = json!({"metadata": {}, "weight_map": map});
    fs::write(dir.join("model.safetensors.index.json"), index.to_string()).unwrap();
    longest
}

fn numbers(count: usize, seed: u32) -> Vec<f32> {
    let mut state = seed.wrapping_add(1);
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state >> 8) as f32 / (1 << 23) as f32 - 1.0
    };
    (0..count).map(|_| 0.05 * next()).collect()
}

/// A line of `/proc/self/status`, in bytes.
fn status(name: &str) -> u64 {
    let text = fs::read_to_string("/proc/self/status").unwrap();
    let line = text
        .lines()
        .find_map(|line| line.strip_prefix(name))
        .unwrap();
    let kilobytes: u64 = line.trim().trim_end_matches(" kB").parse().unwrap();
    1024 * kilobytes
}

fn kept_bytes(llama: &Llama) -> u64 {
    let of_blocks = llama.blocks.iter().flat_map(|block| {
        let (attention, mlp) = (&block.attention, &block.feed_forward);
        [
            &attention.q,
            &attention.k,
            &attention.v,
            &attention.o,
            &mlp.gate,
            &mlp.up,
            &mlp.down,
        ]
    });
    let linear: usize = of_blocks.map(|linear| linear.weight.bytes()).sum();
    (linear + llama.embedding.bytes() + llama.head.bytes()) as u64
}

/// The digest as it has always been: every tensor's name and numbers in f32, in the order of loading.
fn digest(dir: &Path) -> Digest {
    let checkpoint = cairn_stack::checkpoint::Checkpoint::open(dir).unwrap();
    let mut names = vec!["model.embed_tokens.weight".to_owned()];
    for layer in 0..checkpoint.config().layers {
        let module = |target| checkpoint.config().module(layer, target);
        names.extend(Target::ALL.map(|target| format!("{}.weight", module(target))));
        for norm in ["input_layernorm", "post_attention_layernorm"] {
            names.push(format!("model.layers.{layer}.{norm}.weight"));
        }
    }
    names.extend(["model.norm.weight".to_owned(), "lm_head.weight".to_owned()]);
    let mut hasher = DigestHasher::new();
    for name in names {
        hasher.update(name.as_bytes());
        let (_, values) = checkpoint.read_f32(&name).unwrap();
        for value in values {
            hasher.update(&value.to_le_bytes());
        }
    }
    hasher.finish().0
}

/// One test in this file, so that what is measured is its own.
#[test]
fn loading_takes_little_beside_the_model() {
    for dtype in [Dtype::BF16, Dtype::F32] {
        let folder = tempfile::tempdir().unwrap();
        let shard = write_model(folder.path(), dtype);
        let expected = digest(folder.path());
        let mut sizes = Vec::new();
        for quantize in Quantize::ALL {
            let before = status("VmRSS:");
            // Says that the highest mark starts anew.
            fs::write("/proc/self/clear_refs", "5").unwrap();
            let model =
                LoadedModel::load_quantised(folder.path(), quantize, DeviceName::Flex).unwrap();
            let peak = status("VmHWM:");
            let kept = kept_bytes(&model.llama);
            let beside = peak.saturating_sub(before + kept);
            assert!(
                (beside as f64) < SHARDS_MAX * shard as f64,
                "{dtype} {quantize}: {beside} bytes beside {kept}, a shard has {shard}"
            );
            assert!(peak > kept, "{dtype} {quantize}: nothing was measured");
            assert_eq!(model.digest, expected, "{dtype} {quantize}");
            eprintln!("{dtype} {quantize}: kept {kept}, beside {beside}, shard {shard}");
            sizes.push(kept);
        }
        assert!(sizes[0] > sizes[1] && sizes[1] > sizes[2]);
    }
}

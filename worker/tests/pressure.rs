//! A training under a real limit goes on where it would have died, and says what it changed.

#![cfg(all(target_os = "linux", feature = "flex"))]
#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

use std::fs;
use std::path::Path;
use std::process::{Command, Output};

use cairn_stack::config::ModelConfig;
use cairn_stack::tensors::{Dtype, TensorSpec, write_tensors};
use serde_json::{Value, json};

const WORDS: usize = 64;
const ROWS: usize = 448;
const LENGTH: usize = 128;
/// Most addresses of the limited training, KiB: enough for the program, its threads and parts of a
/// batch, and less than half of what the whole batch takes.
const ADDRESSES_KIB: u32 = 900_000;

/// A model that is deep and thin: much to keep, little to compute.
fn write_desk(dir: &Path) {
    let model = dir.join("model");
    fs::create_dir(&model).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 128, "num_hidden_layers": 12,
        "num_attention_heads": 4, "num_key_value_heads": 4, "rms_norm_eps": 1e-5,
        "max_position_embeddings": LENGTH, "tie_word_embeddings": false,
    });
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    let config = ModelConfig::load(&model).unwrap();
    let specs: Vec<TensorSpec> = config
        .weights()
        .into_iter()
        .map(|(name, shape)| TensorSpec {
            name,
            dtype: Dtype::F32,
            shape,
        })
        .collect();
    let body = |place: usize| -> std::io::Result<Vec<u8>> {
        let shape = &specs[place].shape;
        let count: usize = shape.iter().product();
        let mut state = place as u32 + 1;
        let number = |_| {
            state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
            let uniform = (state >> 8) as f32 / (1 << 23) as f32 - 1.0;
            if shape.len() == 1 { 1.0 } else { 0.2 * uniform }
        };
        let values: Vec<f32> = (0..count).map(number).collect();
        let mut bytes = Vec::new();
        Dtype::F32.encode(&values, &mut bytes);
        Ok(bytes)
    };
    let out = fs::File::create(model.join("model.safetensors")).unwrap();
    write_tensors(out, &[], &specs, body).unwrap();
    let vocabulary: serde_json::Map<String, Value> =
        (0..WORDS).map(|n| (format!("w{n}"), n.into())).collect();
    let tokenizer = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": [],
        "normalizer": null, "pre_tokenizer": {"type": "WhitespaceSplit"}, "post_processor": null,
        "decoder": null, "model": {"type": "WordLevel", "vocab": vocabulary, "unk_token": "w0"},
    });
    fs::write(model.join("tokenizer.json"), tokenizer.to_string()).unwrap();
    let record = |n: usize| {
        let words = (0..LENGTH).map(|t| format!("w{}", (7 * n + 3 * t + n * t % 5) % WORDS));
        json!({"text": words.collect::<Vec<_>>().join(" ")}).to_string() + "\n"
    };
    let records: String = (0..ROWS).map(record).collect();
    fs::write(dir.join("data.jsonl"), records).unwrap();
    let recipe = format!(
        "rank = 4\nalpha = 8\ntarget_modules = \"all-linear\"\nlearning_rate = 0.001\nsteps = 1\n\
         batch_size = {ROWS}\nsequence_length = {LENGTH}\n"
    );
    fs::write(dir.join("recipe.toml"), recipe).unwrap();
}

/// Trains in a shell of its own, after `limit`.
fn train(dir: &Path, limit: &str, out: &str) -> Output {
    worker(
        dir,
        limit,
        &format!("train --recipe recipe.toml --out {out}"),
    )
}

fn worker(dir: &Path, limit: &str, arguments: &str) -> Output {
    Command::new("sh")
        .arg("-c")
        .arg(format!(
            "{limit} exec \"$0\" {arguments} --model model --data data.jsonl --device flex --json"
        ))
        .arg(env!("CARGO_BIN_EXE_cairn-worker"))
        .current_dir(dir)
        .output()
        .unwrap()
}

fn report(output: &Output) -> (Value, String) {
    let said = String::from_utf8_lossy(&output.stderr).into_owned();
    eprintln!("{said}");
    assert!(output.status.success(), "{said}");
    (serde_json::from_slice(&output.stdout).unwrap(), said)
}

#[test]
fn a_training_goes_on_under_a_limit_that_the_whole_batch_breaks() {
    let folder = tempfile::tempdir().unwrap();
    write_desk(folder.path());
    let (plan, _) = report(&train(folder.path(), "", "free --dry-run"));
    let (free, said) = report(&train(folder.path(), "", "free"));
    assert!(
        said.contains("448 rows a pass, blocks are kept whole"),
        "{said}"
    );
    let (limited, said) = report(&train(
        folder.path(),
        &format!("ulimit -v {ADDRESSES_KIB};"),
        "limited",
    ));
    assert!(
        said.contains("of 448 rows a pass, blocks are computed again on the way back"),
        "{said}"
    );
    let number = |report: &Value, key: &str| report[key].as_f64().unwrap();
    let (free_peak, limited_peak) = (
        number(&free, "peak_rss_bytes"),
        number(&limited, "peak_rss_bytes"),
    );
    // What the free one held is more than the limited one could have.
    assert!(free_peak > f64::from(ADDRESSES_KIB) * 1024.0, "{free_peak}");
    assert!(limited_peak < free_peak / 3.0, "{limited_peak}");
    let off = number(&plan, "needs_bytes") / free_peak - 1.0;
    assert!(off.abs() < 0.15, "the plan is off by {off}");
    let apart = number(&free, "first_loss") - number(&limited, "first_loss");
    assert!(apart.abs() < 1e-6, "{apart}");
    assert_eq!(free["tokens"], limited["tokens"]);
}

#[test]
fn what_does_not_fit_is_said_before_a_weight_is_read() {
    let folder = tempfile::tempdir().unwrap();
    write_desk(folder.path());
    let model = folder.path().join("model");
    // A model of 70B by its config; there are no weights at all.
    fs::remove_file(model.join("model.safetensors")).unwrap();
    let config = json!({
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_act": "silu",
        "vocab_size": 32_000, "hidden_size": 65_536, "intermediate_size": 229_376,
        "num_hidden_layers": 80, "num_attention_heads": 64, "num_key_value_heads": 8,
        "rms_norm_eps": 1e-5, "max_position_embeddings": LENGTH, "tie_word_embeddings": false,
    });
    fs::write(model.join("config.json"), config.to_string()).unwrap();
    for command in ["train --recipe recipe.toml --out out", "evaluate"] {
        let output = worker(folder.path(), "", command);
        let said = String::from_utf8_lossy(&output.stderr).into_owned();
        assert_eq!(output.status.code(), Some(1), "{said}");
        assert!(said.starts_with("error: needs "), "{said}");
        assert!(said.contains(" are free "), "{said}");
    }
    assert!(!folder.path().join("out").exists());
}

#[test]
fn a_dry_run_says_how_it_would_be_done_and_does_nothing() {
    let folder = tempfile::tempdir().unwrap();
    write_desk(folder.path());
    fs::remove_file(folder.path().join("model/model.safetensors")).unwrap();
    let (plan, said) = report(&train(folder.path(), "", "out --dry-run"));
    assert_eq!((plan["fits"].as_bool(), said.as_str()), (Some(true), ""));
    assert_eq!(
        (&plan["rows_a_pass"], &plan["quantize"]),
        (&json!(448), &json!("none"))
    );
    let limit = format!("ulimit -v {ADDRESSES_KIB};");
    let (plan, _) = report(&train(folder.path(), &limit, "out --dry-run"));
    assert_eq!(plan["keep"], "inputs");
    assert!(plan["rows_a_pass"].as_u64() < Some(448));
    let keys: Vec<&str> = plan
        .as_object()
        .unwrap()
        .keys()
        .map(String::as_str)
        .collect();
    assert_eq!(
        keys,
        [
            "fits",
            "needs_bytes",
            "program_bytes",
            "weights_bytes",
            "teacher_bytes",
            "adapter_bytes",
            "pass_bytes",
            "available_bytes",
            "batch_size",
            "rows_a_pass",
            "accumulation",
            "keep",
            "quantize"
        ]
    );
    assert!(!folder.path().join("out").exists());
}

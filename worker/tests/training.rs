//! Training in step with PEFT: the same factors and batches give the same losses.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use burn::tensor::{Tensor, TensorData};
use cairn_stack::adapter::{AdapterFile, Pair};
use cairn_stack::recipe::Recipe;
use cairn_stack::tensors::TensorFile;
use cairn_worker::data::{Batch, Example};
use cairn_worker::model::{Adapter, Input};
use cairn_worker::train::noise::Pass;
use cairn_worker::train::schedule::learning_rate;
use cairn_worker::train::trainer::Trainer;
use common::{batch_of, model, reference, tensor};
use serde_json::Value;

/// Largest relative difference of a loss from PEFT's.
const TOLERANCE: f64 = 1e-3;

/// Steps in each reference run.
const STEPS: u64 = 20;

/// A recipe from the settings in a reference file.
fn recipe(file: &Value) -> Recipe {
    let mut text = format!(
        "rank = 1\nalpha = 1\ntarget_modules = {}\nsteps = {STEPS}\nbatch_size = {}\nsequence_length = 64\nseed = 0\n",
        file["targets"], file["rows_per_batch"]
    );
    for (key, value) in file["settings"].as_object().unwrap() {
        text += &format!("{key} = {value}\n");
    }
    Recipe::parse_toml(&text).unwrap()
}

/// The micro-batches of every step: the pool of rows, over and over.
fn steps(file: &Value) -> Vec<Vec<Batch>> {
    let pool: Vec<Example> = file["pool"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| Example {
            tokens: serde_json::from_value(row["tokens"].clone()).unwrap(),
            scored: serde_json::from_value(row["scored"].clone()).unwrap(),
            cut: false,
        })
        .collect();
    let rows = file["rows_per_batch"].as_u64().unwrap() as usize;
    let accumulation = file["settings"]["accumulation"].as_u64().unwrap();
    let mut places = (0..pool.len()).cycle();
    let mut batch = || {
        let examples: Vec<Example> = places
            .by_ref()
            .take(rows)
            .map(|place| pool[place].clone())
            .collect();
        batch_of(&examples)
    };
    (0..STEPS)
        .map(|_| (0..accumulation).map(|_| batch()).collect())
        .collect()
}

/// Disturbs a pass as PEFT's was.
fn as_drawn(
    drawn: &TensorFile,
    recipe: &Recipe,
    pairs: &[Pair],
    pass: Pass,
    adapter: &mut Adapter,
    input: &mut Input,
) {
    let device = input.tokens.device();
    let at = format!("{}/{}", pass.step, pass.micro_batch);
    let read = |name: &str, scale: f32| -> Tensor<2> {
        let (values, shape) = tensor(drawn, &format!("{at}/{name}"));
        let values: Vec<f32> = values.iter().map(|value| scale * value).collect();
        Tensor::from_data(TensorData::new(values, [shape[0], shape[1]]), &device)
    };
    input.embedding_noise = Some(read("embedding", 1.0));
    let kept = 1.0 / (1.0 - recipe.lora_dropout as f32);
    for layer in 0..2 {
        for target in &recipe.target_modules {
            let module = pairs
                .iter()
                .map(|pair| pair.module.as_str())
                .find(|module| {
                    module.contains(&format!("layers.{layer}."))
                        && module.ends_with(&target.to_string())
                })
                .unwrap();
            let mask = read(module, kept);
            adapter.factors_of(layer, *target).unwrap().dropout = Some(mask);
        }
    }
}

fn run(name: &str) {
    let dir = reference().join("training").join(name);
    let file: Value =
        serde_json::from_slice(&std::fs::read(dir.join("steps.json")).unwrap()).unwrap();
    let model = model(file["base"].as_str().unwrap());
    let initial = AdapterFile::open(&dir).unwrap();
    let pairs = initial.pairs().unwrap();
    let adapter = Adapter::new(&model.llama.config, &pairs, &model.device).unwrap();
    assert_eq!(adapter.factors().count(), pairs.len());
    let recipe = recipe(&file);
    let mut trainer = Trainer::new(&model.llama, adapter, &recipe);
    let drawn = dir.join("noise.safetensors");
    let drawn = drawn.exists().then(|| TensorFile::open(&drawn).unwrap());
    let count = file["losses"].as_array().unwrap().len();
    for (number, micro_batches) in steps(&file).into_iter().enumerate().take(count) {
        let rate = learning_rate(&recipe, number as u64, STEPS);
        let step = match &drawn {
            None => trainer.step(&micro_batches, rate),
            Some(drawn) => trainer.step_with(&micro_batches, rate, &mut |pass, adapter, input| {
                as_drawn(drawn, &recipe, &pairs, pass, adapter, input);
            }),
        }
        .unwrap();
        for (what, ours, theirs) in [
            ("loss", step.loss, &file["losses"][number]),
            (
                "gradient norm",
                step.gradient_norm,
                &file["gradient_norms"][number],
            ),
        ] {
            let theirs = theirs.as_f64().unwrap();
            let relative = (ours - theirs).abs() / theirs;
            println!("{name} {number:2} {what:14} {ours:.6} {theirs:.6} {relative:.1e}");
            assert!(
                relative <= TOLERANCE,
                "{name}, step {number}: {what} {ours}, PEFT has {theirs}"
            );
        }
    }
}

#[test]
fn plain_constant_rate() {
    run("plain");
}

#[test]
fn all_linears_rslora_cosine_clipping_accumulation_decay() {
    run("everything");
}

#[test]
fn loraplus_rates_dropout_and_noise_on_embeddings() {
    run("noisy");
}

#[test]
fn linear_schedule_with_warm_up() {
    run("linear-schedule");
}

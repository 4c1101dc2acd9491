//! Training in step with PEFT: the same factors and batches give the same losses.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use cairn_stack::adapter::AdapterFile;
use cairn_stack::recipe::Recipe;
use cairn_worker::data::{Batch, Example};
use cairn_worker::model::Adapter;
use cairn_worker::train::schedule::learning_rate;
use cairn_worker::train::trainer::Trainer;
use common::{batch_of, model, reference};
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

fn run(name: &str) {
    let dir = reference().join("training").join(name);
    let file: Value =
        serde_json::from_slice(&std::fs::read(dir.join("steps.json")).unwrap()).unwrap();
    let model = model(file["base"].as_str().unwrap());
    let initial = AdapterFile::open(&dir).unwrap();
    let pairs: Vec<_> = (0..initial.modules().len())
        .map(|index| initial.pair(index).unwrap())
        .collect();
    let adapter = Adapter::new(&model.llama.config, &pairs, &model.device).unwrap();
    assert_eq!(adapter.factors().count(), pairs.len());
    let recipe = recipe(&file);
    let mut trainer = Trainer::new(&model.llama, adapter, &recipe);
    for (number, micro_batches) in steps(&file).into_iter().enumerate() {
        let rate = learning_rate(&recipe, number as u64, STEPS);
        let step = trainer.step(&micro_batches, rate).unwrap();
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
fn linear_schedule_with_warm_up() {
    run("linear-schedule");
}

//! A batch that is passed in parts, for want of memory, teaches the same but for the last bits.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use burn::tensor::Tensor;
use cairn_stack::adapter::Pair;
use cairn_stack::algebra::moved;
use cairn_stack::recipe::Recipe;
use cairn_worker::data::{Batch, batches, pack};
use cairn_worker::model::llama::Keep;
use cairn_worker::model::{Adapter, Input, LoadedModel};
use cairn_worker::preflight::Passes;
use cairn_worker::train::noise::{Noise, Pass};
use cairn_worker::train::trainer::Trainer;
use common::{examples, model, recipe};

/// What an audit allows two CPUs (`replay_tolerance` on the pinned CPU path).
const REPLAY_TOLERANCE: f64 = 0.001;

const NOISY: &str = "lora_dropout = 0.2\nneftune_noise_alpha = 5.0\n";

/// Three batches of four rows of different lengths.
fn data(model: &LoadedModel) -> Vec<Batch> {
    let examples = examples(12, model.llama.config.vocab_size as u32);
    let order: Vec<usize> = (0..12).collect();
    batches(pack(&examples, &order, 40, false), 4)
}

fn fresh(model: &LoadedModel, recipe: &Recipe) -> Vec<Pair> {
    let (targets, rank) = (&recipe.target_modules, recipe.rank as usize);
    Adapter::fresh(
        &model.llama.config,
        targets,
        rank,
        recipe.scale(),
        recipe.seed,
    )
}

fn trained(model: &LoadedModel, recipe: &Recipe, rows: usize, steps: usize) -> (f64, Vec<Pair>) {
    let config = &model.llama.config;
    let adapter = Adapter::new(config, &fresh(model, recipe), &model.device).unwrap();
    let mut trainer = Trainer::new(&model.llama, adapter, recipe);
    trainer.passes = Passes {
        rows,
        keep: Keep::Inputs,
    };
    let data = data(model);
    let mut loss = 0.0;
    for step in 0..steps {
        let batch = std::slice::from_ref(&data[step % data.len()]);
        loss = trainer.step(batch, recipe.learning_rate).unwrap().loss;
    }
    (loss, trainer.adapter.to_pairs(config))
}

#[test]
fn parts_stay_far_inside_what_an_audit_allows() {
    let lines = "rank = 4\nalpha = 8\ntarget_modules = \"all-linear\"\nlearning_rate = 0.003\n";
    for (name, more) in [
        ("llama-default", ""),
        ("llama-default", NOISY),
        ("qwen3-yarn", ""),
    ] {
        let model = model(name);
        let recipe = recipe(&format!("{lines}{more}"));
        let start = fresh(&model, &recipe);
        for steps in [1, 10, 40] {
            let (loss, whole) = trained(&model, &recipe, 4, steps);
            for rows in [1, 2, 3] {
                let (other_loss, parts) = trained(&model, &recipe, rows, steps);
                let distance = moved(&start, &whole, &parts);
                eprintln!("{name} {steps} steps, {rows} rows a pass: {distance:.1e}");
                assert!(
                    distance < REPLAY_TOLERANCE / 10.0,
                    "{name} {steps} {rows}: {distance}"
                );
                assert!(
                    (loss - other_loss).abs() < 1e-4 * loss,
                    "{loss} {other_loss}"
                );
            }
        }
    }
}

#[test]
fn noise_is_the_same_in_parts() {
    let model = model("llama-default");
    let config = &model.llama.config;
    let recipe = recipe(NOISY);
    let noise = Noise::of(&recipe);
    let disturbed = |batch: &Batch, first_token: usize| {
        let mut input = Input::new(config, batch, &model.device);
        let pairs = fresh(&model, &recipe);
        let mut adapter = Adapter::new(config, &pairs, &model.device).unwrap();
        let pass = Pass {
            step: 3,
            micro_batch: 1,
            first_token,
        };
        noise.disturb(pass, &mut adapter, &mut input, config.hidden_size);
        let masks = adapter
            .factors()
            .map(|factors| factors.dropout.clone().unwrap());
        let mut all: Vec<Tensor<2>> = masks.collect();
        all.push(input.embedding_noise.unwrap());
        all
    };
    let batch = &data(&model)[0];
    let whole = disturbed(batch, 0);
    for rows in [1, 3] {
        for (first, part) in batch.parts(rows, |example| example) {
            let (first_token, tokens) = (first * batch.length, part.rows.len() * batch.length);
            for (whole, part) in whole.iter().zip(disturbed(&part, first_token)) {
                let expected = whole.clone().narrow(0, first_token, tokens);
                assert_eq!(part.to_data(), expected.to_data());
            }
        }
    }
}

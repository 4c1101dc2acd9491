//! Packing changes where tokens lie, not what they see: the same losses, the same gradients.

mod common;

use cairn_worker::data::{Batch, Example, batches, pack};
use cairn_worker::model::loss::token_losses;
use cairn_worker::model::{Adapter, Input, LoadedModel};
use cairn_worker::train::trainer::Trainer;
use common::{examples, model, recipe};

/// Summed loss of each example.
fn losses(model: &LoadedModel, batches: &[Batch], count: usize) -> Vec<f32> {
    let mut sums = vec![0.0; count];
    for batch in batches {
        let input = Input::new(&model.llama.config, batch, &model.device);
        let normed = model.llama.normed(None, &input);
        for (owner, loss) in
            input
                .owners
                .iter()
                .zip(token_losses(&model.llama, &normed, &input.targets))
        {
            sums[*owner] += loss;
        }
    }
    sums
}

fn both(examples: &[Example]) -> (Vec<Batch>, Vec<Batch>) {
    let order: Vec<usize> = (0..examples.len()).collect();
    let packed = pack(examples, &order, 40, true);
    assert!(packed.len() < examples.len() && packed.iter().any(|row| row.examples.len() > 2));
    (
        batches(pack(examples, &order, 40, false), 3),
        batches(packed, 2),
    )
}

#[test]
fn packed_rows_give_the_same_losses() {
    for name in [
        "llama-default",
        "mistral-window",
        "qwen2-window",
        "qwen3-yarn",
        "llama-llama3-head-dim",
    ] {
        let (model, examples) = (model(name), examples(12, 64));
        let (alone, packed) = both(&examples);
        let alone = losses(&model, &alone, examples.len());
        let packed = losses(&model, &packed, examples.len());
        for (number, (a, b)) in alone.iter().zip(&packed).enumerate() {
            assert!(
                *a > 0.0 && (a - b).abs() < 1e-4,
                "{name}, example {number}: {a} alone, {b} packed"
            );
        }
    }
}

#[test]
fn packed_rows_give_the_same_update() {
    let (model, examples) = (model("qwen3-window-tied"), examples(12, 64));
    let (alone, packed) = both(&examples);
    let recipe = recipe("target_modules = \"all-linear\"");
    let step = |micro_batches: &[Batch]| {
        let config = &model.llama.config;
        let mut pairs = Adapter::fresh(config, &recipe.target_modules, 2, 2.0, 1);
        for pair in &mut pairs {
            pair.b = pair
                .a
                .iter()
                .cycle()
                .take(pair.b.len())
                .map(|a| a * 0.3)
                .collect();
        }
        let adapter = Adapter::new(config, &pairs, &model.device).unwrap();
        Trainer::new(&model.llama, adapter, &recipe)
            .step(micro_batches, 0.01)
            .unwrap()
    };
    let (alone, packed) = (step(&alone), step(&packed));
    assert!(
        (alone.loss - packed.loss).abs() < 1e-5,
        "{alone:?} {packed:?}"
    );
    assert!(
        (alone.gradient_norm / packed.gradient_norm - 1.0).abs() < 1e-4,
        "{alone:?} {packed:?}"
    );
    assert_eq!(
        (alone.tokens, alone.scored_tokens),
        (packed.tokens, packed.scored_tokens)
    );
}

//! Preferences in step with TRL, distillation in step with PEFT and TRL's sparse divergence: the same
//! factors and batches give the same losses, gradients and factors.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use cairn_stack::adapter::{AdapterFile, WEIGHTS_FILE};
use cairn_stack::recipe::Recipe;
use cairn_worker::cancel::CancelFlag;
use cairn_worker::data::{Batch, Example, pair_batches};
use cairn_worker::model::{Adapter, LoadedModel};
use cairn_worker::train::objective::Objective;
use cairn_worker::train::states::{MOMENTS_FILE, States, state_dir};
use cairn_worker::train::trainer::{Step, Trainer};
use cairn_worker::train::{Checkpoints, Progress, ReplayJob, StartState, TrainJob, replay, train};
use common::{batch_of, model, reference};
use serde_json::Value;

/// Largest relative difference of a loss or norm, as for plain training.
const TOLERANCE: f64 = 1e-3;
/// Largest difference of a factor after the last step: a fifth of a percent of what AdamW moves one in so
/// many steps.
const FACTOR_TOLERANCE: f64 = 6e-5;

/// Trains in segments over two epochs, interrupted once, then trains each segment again: every state must
/// be the same bits, whichever answers of the frozen models were known already.
fn every_segment_is_the_same_bits(lines: &str, packing: bool, teacher: Option<&LoadedModel>) {
    let model = model("llama-default");
    let lines = format!("packing = {packing}\n{lines}\nlora_dropout = 0.2");
    let recipe = common::recipe(&lines);
    let examples = common::examples(16, 64);
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    let run = |stop_after: Option<u64>| {
        let cancel = CancelFlag::new();
        let mut on_progress = |progress: &Progress| {
            if stop_after == Some(progress.step) {
                cancel.cancel();
            }
        };
        let job = TrainJob {
            examples: &examples,
            recipe: &recipe,
            initial: None,
            carry: None,
            teacher,
            frozen_a: false,
            out_dir: &out,
            base_model: None,
            revision: None,
            checkpoints: Some(Checkpoints::in_dir(dir.path().join("checkpoint"))),
            states: Some(States {
                dir: dir.path().join("states"),
                segments: 3,
            }),
            on_progress: &mut on_progress,
            cancel: &cancel,
        };
        train(&model, job)
    };
    run(Some(3)).unwrap_err();
    let report = run(None).unwrap();
    let steps: Vec<u32> = report
        .commitment
        .unwrap()
        .states
        .iter()
        .map(|state| state.step)
        .collect();
    assert_eq!(steps.len(), 4);
    for segment in steps.windows(2) {
        let folder = |step: u32| state_dir(&dir.path().join("states"), step);
        let (start, end) = (folder(segment[0]), folder(segment[1]));
        let (factors, moments) = (start.join(WEIGHTS_FILE), start.join(MOMENTS_FILE));
        let job = ReplayJob {
            examples: &examples,
            recipe: &recipe,
            initial: None,
            carry: None,
            teacher,
            segments: 3,
            start: (segment[0] > 0).then_some(StartState {
                factors: &factors,
                moments: &moments,
            }),
            first_step: u64::from(segment[0]),
            last_step: u64::from(segment[1]),
            end_factors: &end.join(WEIGHTS_FILE),
            on_progress: &mut |_| (),
            cancel: &CancelFlag::new(),
        };
        let again = replay(&model, job).unwrap();
        assert!(again.identical, "{lines}: {again:?}");
    }
}

#[test]
fn segments_of_preferences_train_again_to_the_bit() {
    for packing in [false, true] {
        every_segment_is_the_same_bits("objective = \"dpo\"", packing, None);
    }
}

#[test]
fn segments_of_a_distillation_train_again_to_the_bit() {
    let teacher = model("qwen2-tied");
    let lines = "objective = \"distill\"\ndistill_top_k = 8\ndistill_weight = 0.5";
    for packing in [false, true] {
        every_segment_is_the_same_bits(lines, packing, Some(&teacher));
    }
}

#[test]
fn a_distillation_without_a_teacher_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    let model = model("llama-default");
    let job = TrainJob {
        examples: &common::examples(4, 64),
        recipe: &common::recipe("objective = \"distill\""),
        initial: None,
        carry: None,
        teacher: None,
        frozen_a: false,
        out_dir: dir.path(),
        base_model: None,
        revision: None,
        checkpoints: None,
        states: None,
        on_progress: &mut |_| (),
        cancel: &CancelFlag::new(),
    };
    let error = train(&model, job).unwrap_err().to_string();
    assert!(error.contains("no teacher"), "{error}");
}

struct Reference {
    file: Value,
    model: LoadedModel,
    adapter: Adapter,
    recipe: Recipe,
}

impl Reference {
    fn read(name: &str, lines: &str, batch_size: &str) -> Self {
        let dir = reference().join("objectives").join(name);
        let file: Value =
            serde_json::from_slice(&std::fs::read(dir.join("steps.json")).unwrap()).unwrap();
        let model = model(file["base"].as_str().unwrap());
        let initial = AdapterFile::open(&dir).unwrap();
        let pairs = initial.pairs().unwrap();
        let adapter = Adapter::new(&model.llama.config, &pairs, &model.device).unwrap();
        let mut text = format!(
            "rank = 1\nalpha = 1\ntarget_modules = {}\nepochs = 1\nsequence_length = 64\nseed = 0\n\
             batch_size = {}\n{lines}\n",
            file["targets"], file[batch_size]
        );
        for (key, value) in file["settings"].as_object().unwrap() {
            text += &format!("{key} = {value}\n");
        }
        let recipe = Recipe::parse_toml(&text).unwrap();
        Self {
            file,
            model,
            adapter,
            recipe,
        }
    }

    fn steps(&self) -> usize {
        self.file["losses"].as_array().unwrap().len()
    }

    fn number(&self, list: &str, step: usize) -> f64 {
        self.file[list][step].as_f64().unwrap()
    }

    fn check(&self, number: usize, step: &Step) {
        for (what, ours, theirs) in [
            ("loss", step.loss, self.number("losses", number)),
            (
                "gradient norm",
                step.gradient_norm,
                self.number("gradient_norms", number),
            ),
        ] {
            let relative = (ours - theirs).abs() / theirs;
            println!("{number:2} {what:14} {ours:.6} {theirs:.6} {relative:.1e}");
            assert!(
                relative <= TOLERANCE,
                "step {number}: {what} {ours}, not {theirs}"
            );
        }
    }

    /// The factors after the last step.
    fn check_factors(&self, adapter: &Adapter) {
        let mut worst = 0.0_f64;
        for pair in adapter.to_pairs(&self.model.llama.config) {
            for (side, ours) in [("lora_A", &pair.a), ("lora_B", &pair.b)] {
                let name = format!("{}.{side}", pair.module);
                let theirs = self.file["factors"][&name].as_array().unwrap();
                assert_eq!(theirs.len(), ours.len(), "{name}");
                for (ours, theirs) in ours.iter().zip(theirs) {
                    worst = worst.max((f64::from(*ours) - theirs.as_f64().unwrap()).abs());
                }
            }
        }
        println!("factors within {worst:.1e}");
        assert!(worst <= FACTOR_TOLERANCE, "a factor is off by {worst}");
    }
}

fn tokens(value: &Value) -> Vec<u32> {
    serde_json::from_value(value.clone()).unwrap()
}

#[test]
fn preferences_as_trl_learns_them() {
    let lines = "objective = \"dpo\"\ndpo_beta = 0.3\nschedule = \"constant\"";
    let reference = Reference::read("dpo", lines, "pairs_per_batch");
    assert_eq!(
        reference.file["beta"].as_f64().unwrap(),
        reference.recipe.objective.dpo_beta()
    );
    let mut examples = Vec::new();
    for pair in reference.file["pool"].as_array().unwrap() {
        let prompt = tokens(&pair["prompt"]);
        for answer in ["chosen", "rejected"] {
            let answer = tokens(&pair[answer]);
            let scored = [vec![false; prompt.len()], vec![true; answer.len()]].concat();
            examples.push(Example {
                tokens: [prompt.clone(), answer].concat(),
                scored,
                cut: false,
            });
        }
    }
    let rate = reference.recipe.learning_rate;
    let batch_size = reference.recipe.batch_size as usize;
    for packing in [false, true] {
        let objective = Objective::of(&reference.recipe, &examples, None).unwrap();
        let model = &reference.model.llama;
        let mut trainer =
            Trainer::new(model, reference.adapter.clone(), &reference.recipe).minimising(objective);
        let order: Vec<usize> = (0..examples.len() / 2).collect();
        let batches: Vec<Batch> = order
            .chunks(batch_size)
            .flat_map(|order| pair_batches(&examples, order, 64, packing, batch_size))
            .collect();
        assert_eq!(batches.len(), order.len() / batch_size);
        for (number, batch) in batches.iter().cycle().take(reference.steps()).enumerate() {
            let step = trainer.step(std::slice::from_ref(batch), rate).unwrap();
            reference.check(number, &step);
            let rewards = step.rewards.unwrap();
            let theirs = reference.number("margins", number);
            assert!((rewards.margins - theirs).abs() < 1e-3 * theirs.abs().max(0.1));
            assert!((rewards.accuracies - reference.number("accuracies", number)).abs() < 1e-6);
        }
        reference.check_factors(&trainer.adapter);
    }
}

fn distillation(name: &str) {
    let file = reference().join("objectives").join(name).join("steps.json");
    let file: Value = serde_json::from_slice(&std::fs::read(file).unwrap()).unwrap();
    let lines = format!(
        "objective = \"distill\"\ndistill_top_k = {}\ndistill_temperature = {}\n\
         distill_weight = {}\nschedule = \"constant\"",
        file["top_k"], file["temperature"], file["weight"]
    );
    let reference = Reference::read(name, &lines, "rows_per_batch");
    let teacher = model(file["teacher"].as_str().unwrap());
    let pool: Vec<Example> = file["pool"]
        .as_array()
        .unwrap()
        .iter()
        .map(|row| Example {
            tokens: tokens(&row["tokens"]),
            scored: serde_json::from_value(row["scored"].clone()).unwrap(),
            cut: false,
        })
        .collect();
    let rows = reference.recipe.batch_size as usize;
    let mut places = (0..pool.len()).collect::<Vec<_>>().into_iter().cycle();
    let objective = Objective::of(&reference.recipe, &pool, Some(&teacher.llama)).unwrap();
    let model = &reference.model.llama;
    let mut trainer =
        Trainer::new(model, reference.adapter.clone(), &reference.recipe).minimising(objective);
    for number in 0..reference.steps() {
        let batches: Vec<Batch> = (0..reference.recipe.accumulation)
            .map(|_| {
                let places: Vec<usize> = places.by_ref().take(rows).collect();
                let examples: Vec<Example> = places.iter().map(|n| pool[*n].clone()).collect();
                let mut batch = batch_of(&examples);
                for (row, place) in batch.rows.iter_mut().zip(places) {
                    row.examples = vec![place];
                }
                batch
            })
            .collect();
        let step = trainer
            .step(&batches, reference.recipe.learning_rate)
            .unwrap();
        assert_eq!(step.rewards, None);
        reference.check(number, &step);
    }
    reference.check_factors(&trainer.adapter);
}

#[test]
fn the_likeliest_tokens_of_a_teacher() {
    distillation("distill-top");
}

#[test]
fn all_tokens_of_a_teacher() {
    distillation("distill-all");
}

#[test]
fn warmer_and_beside_the_tokens_themselves() {
    distillation("distill-blend");
}

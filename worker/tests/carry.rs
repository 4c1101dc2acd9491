//! Training that goes on from carried factors: against a base from which their delta is taken away
//! for good, the first loss, and what is handed in.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::path::Path;

use cairn_stack::adapter::{AdapterFile, Pair, check_adapter, write_adapter};
use cairn_stack::adapter::{AdapterWriteConfig, CONFIG_FILE, WEIGHTS_FILE};
use cairn_stack::algebra::pair_norm;
use cairn_stack::carry::{CarryError, spec_with_carry, trained_halves};
use cairn_stack::config::Target;
use cairn_stack::quantize::Quantize;
use cairn_stack::recipe::Recipe;
use cairn_worker::cancel::CancelFlag;
use cairn_worker::data::Example;
use cairn_worker::evaluate::score;
use cairn_worker::model::linear::Linear;
use cairn_worker::model::weight::Weight;
use cairn_worker::model::{Adapter, LoadedModel};
use cairn_worker::train::states::{MOMENTS_FILE, States, state_dir};
use cairn_worker::train::{Checkpoints, Progress, TrainError, TrainJob, TrainReport, train};
use cairn_worker::train::{ReplayJob, StartState, replay};
use common::{examples, model, recipe};

struct Start<'a> {
    initial: Option<Vec<Pair>>,
    carry: Option<&'a [Pair]>,
    stop_after: Option<u64>,
}

fn run(
    model: &LoadedModel,
    examples: &[Example],
    recipe: &Recipe,
    out: &Path,
    start: Start<'_>,
) -> Result<TrainReport, TrainError> {
    let cancel = CancelFlag::new();
    let mut on_progress = |progress: &Progress| {
        if start.stop_after == Some(progress.step) {
            cancel.cancel();
        }
    };
    let job = TrainJob {
        examples,
        recipe,
        initial: start.initial,
        carry: start.carry,
        teacher: None,
        frozen_a: false,
        out_dir: out,
        base_model: None,
        revision: None,
        checkpoints: Some(Checkpoints::in_dir(out.join(".training"))),
        states: Some(States {
            dir: out.join("states"),
            segments: 2,
        }),
        on_progress: &mut on_progress,
        cancel: &cancel,
    };
    train(model, job)
}

fn under(carried: &[Pair]) -> Start<'_> {
    Start {
        initial: None,
        carry: Some(carried),
        stop_after: None,
    }
}

/// Factors as a round leaves them: none of them zero.
fn carried(model: &LoadedModel, recipe: &Recipe) -> Vec<Pair> {
    let fresh = |seed| {
        let rank = recipe.rank as usize;
        let (config, targets) = (&model.llama.config, &recipe.target_modules);
        Adapter::fresh(config, targets, rank, recipe.scale(), seed)
    };
    let mut pairs = fresh(5);
    for (pair, other) in pairs.iter_mut().zip(fresh(6)) {
        let values = other.a.iter().cycle().take(pair.b.len());
        pair.b = values.map(|value| value * 0.3).collect();
    }
    pairs
}

/// The linear layer of a module of the tests' targets.
fn linear<'a>(model: &'a mut LoadedModel, module: &str) -> &'a mut Linear {
    let config = model.llama.config.clone();
    let (layer, target) = (0..config.layers)
        .flat_map(|layer| Target::ALL.map(|target| (layer, target)))
        .find(|(layer, target)| config.module(*layer, *target) == module)
        .unwrap();
    let block = &mut model.llama.blocks[layer];
    match target {
        Target::Q => &mut block.attention.q,
        Target::V => &mut block.attention.v,
        Target::Down => &mut block.feed_forward.down,
        other => panic!("{other} is not in the tests' recipe"),
    }
}

/// Adds `sign * s B A` to the weights, summed in f64.
fn fold(model: &mut LoadedModel, pairs: &[Pair], sign: f64) {
    for pair in pairs {
        let device = model.device.clone();
        let linear = linear(model, &pair.module);
        let mut values = linear.weight.values();
        for (place, value) in values.iter_mut().enumerate() {
            let (row, column) = (place / pair.in_features, place % pair.in_features);
            let delta: f64 = (0..pair.rank)
                .map(|k| {
                    f64::from(pair.b[row * pair.rank + k])
                        * f64::from(pair.a[k * pair.in_features + column])
                })
                .sum();
            *value = (f64::from(*value) + sign * pair.scale * delta) as f32;
        }
        let shape = [pair.out_features, pair.in_features];
        linear.weight = Weight::new(&values, shape, Quantize::None, &device);
    }
}

fn largest_difference(x: &[Pair], y: &[Pair]) -> f32 {
    let apart = |(x, y): (&Pair, &Pair)| {
        assert_eq!(x.module, y.module);
        let values = x.a.iter().chain(&x.b).zip(y.a.iter().chain(&y.b));
        values.fold(0.0_f32, |max, (x, y)| max.max((x - y).abs()))
    };
    x.iter().zip(y).map(apart).fold(0.0, f32::max)
}

#[test]
fn the_first_loss_is_the_bases_to_the_bit() {
    let (model, examples) = (model("qwen2-tied"), examples(9, 64));
    let recipe = recipe("steps = 1");
    let carried = carried(&model, &recipe);
    assert!(carried.iter().all(|pair| pair_norm(pair) > 0.1));
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let report = run(&model, &examples, &recipe, &path("on"), under(&carried)).unwrap();
    // Fresh factors add nothing either: the same batch on the base.
    let fresh = Start {
        carry: None,
        ..under(&carried)
    };
    let base = run(&model, &examples, &recipe, &path("fresh"), fresh).unwrap();
    assert_eq!(report.first_loss.to_bits(), base.first_loss.to_bits());
}

#[test]
fn training_is_that_of_the_base_without_the_carried_delta() {
    let (model, examples) = (model("llama-default"), examples(11, 64));
    let recipe = recipe("steps = 20\nlearning_rate = 0.01\nuse_rslora = true\nalpha = 2");
    let carried = carried(&model, &recipe);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);

    // The other way: W - s B A as weights, plain training from the same factors.
    let mut explicit = common::model("llama-default");
    fold(&mut explicit, &carried, -1.0);
    let plain = Start {
        initial: Some(carried.clone()),
        carry: None,
        stop_after: None,
    };
    let expected = run(&explicit, &examples, &recipe, &path("explicit"), plain).unwrap();
    let found = run(&model, &examples, &recipe, &path("carry"), under(&carried)).unwrap();
    assert!((found.first_loss - expected.first_loss).abs() < 1e-5);
    assert!((found.last_loss - expected.last_loss).abs() < 1e-4);

    // What is handed in passes the check, and its first half is the trained factors.
    let json = std::fs::read(path("carry").join(CONFIG_FILE)).unwrap();
    let spec = spec_with_carry(&model.llama.config, &recipe);
    let sent = check_adapter(&path("carry").join(WEIGHTS_FILE), &json, &spec).unwrap();
    let config = AdapterWriteConfig::of_recipe(&recipe, None, None);
    write_adapter(&path("carried"), &carried, &config).unwrap();
    let before = AdapterFile::open(&path("carried")).unwrap();
    let halves = trained_halves(&sent, &before).unwrap();
    let explicit_end = AdapterFile::open(&path("explicit")).unwrap();
    let explicit_end = explicit_end.pairs().unwrap();
    let apart = largest_difference(&halves, &explicit_end);
    println!("largest difference of a factor: {apart:e}");
    assert!(apart < 1e-4, "{apart}");

    // On the round's base it is the model that was trained; so it is when evaluated.
    let loss = |model: &LoadedModel, pairs: &[Pair]| {
        let none = CancelFlag::new();
        score(model, pairs, &examples, &mut |_| (), &none)
            .unwrap()
            .loss
    };
    let on_base = loss(&model, &sent.pairs().unwrap());
    let on_explicit = loss(&explicit, &explicit_end);
    assert!(
        (on_base - on_explicit).abs() < 1e-4,
        "{on_base} {on_explicit}"
    );
    assert!(on_base < loss(&model, &[]));
    // The model itself is as it was.
    let again = model.llama.blocks[0].attention.q.weight.values();
    let fresh = common::model("llama-default");
    assert_eq!(again, fresh.llama.blocks[0].attention.q.weight.values());
}

#[test]
fn interrupted_and_resumed_gives_the_same_bytes() {
    let (model, examples) = (model("llama-default"), examples(11, 64));
    let recipe = recipe("steps = 5");
    let carried = carried(&model, &recipe);
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let whole = run(&model, &examples, &recipe, &path("whole"), under(&carried)).unwrap();
    let parts = path("parts");
    // A checkpoint of the same factors on the plain base is another task's.
    let plain = Start {
        initial: Some(carried.clone()),
        carry: None,
        stop_after: Some(2),
    };
    run(&model, &examples, &recipe, &parts, plain).unwrap_err();
    for stop in [1, 3] {
        let start = Start {
            stop_after: Some(stop),
            ..under(&carried)
        };
        let stopped = run(&model, &examples, &recipe, &parts, start);
        let Err(TrainError::Cancelled { done, .. }) = stopped else {
            panic!("{stopped:?}");
        };
        assert_eq!(done, stop);
    }
    let resumed = run(&model, &examples, &recipe, &parts, under(&carried)).unwrap();
    assert_eq!(resumed.adapter_blake3, whole.adapter_blake3);
}

#[test]
fn states_hold_the_trained_factors_and_segments_train_again_alike() {
    let (model, examples) = (model("llama-default"), examples(11, 64));
    let recipe = recipe("steps = 6");
    let carried = carried(&model, &recipe);
    let dir = tempfile::tempdir().unwrap();
    run(&model, &examples, &recipe, dir.path(), under(&carried)).unwrap();
    let file = |step: u32, name: &str| state_dir(&dir.path().join("states"), step).join(name);

    let sent = AdapterFile::open(dir.path()).unwrap();
    let before = dir.path().join("carried");
    let config = AdapterWriteConfig::of_recipe(&recipe, None, None);
    write_adapter(&before, &carried, &config).unwrap();
    let halves = trained_halves(&sent, &AdapterFile::open(&before).unwrap()).unwrap();
    let last = AdapterFile::open(&state_dir(&dir.path().join("states"), 6)).unwrap();
    assert_eq!(largest_difference(&halves, &last.pairs().unwrap()), 0.0);

    for (first, last) in [(0, 3), (3, 6)] {
        let (factors, moments) = (file(first, WEIGHTS_FILE), file(first, MOMENTS_FILE));
        let job = ReplayJob {
            examples: &examples,
            recipe: &recipe,
            initial: None,
            carry: Some(&carried),
            teacher: None,
            segments: 2,
            start: (first > 0).then_some(StartState {
                factors: &factors,
                moments: &moments,
            }),
            first_step: u64::from(first),
            last_step: u64::from(last),
            end_factors: &file(last, WEIGHTS_FILE),
            on_progress: &mut |_| (),
            cancel: &CancelFlag::new(),
        };
        let report = replay(&model, job).unwrap();
        assert!(report.identical, "{first} to {last}: {report:?}");
    }
}

#[test]
fn carried_factors_of_another_recipe_are_refused() {
    let (model, examples) = (model("llama-default"), examples(4, 64));
    let dir = tempfile::tempdir().unwrap();
    let carried = carried(&model, &recipe(""));
    for other in ["rank = 3", "alpha = 5", "target_modules = [\"q_proj\"]"] {
        let found = run(
            &model,
            &examples,
            &recipe(other),
            dir.path(),
            under(&carried),
        );
        let Err(TrainError::Carry(error)) = found else {
            panic!("{other}: {found:?}");
        };
        assert!(!matches!(error, CarryError::Adapter(_)), "{error}");
    }
}

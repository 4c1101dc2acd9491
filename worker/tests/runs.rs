//! Whole training runs: the same every time, however often interrupted; and what stops them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::path::Path;

use cairn_stack::adapter::{AdapterFile, AdapterSpec, Pair, check_adapter};
use cairn_stack::recipe::Recipe;
use cairn_worker::cancel::CancelFlag;
use cairn_worker::data::Example;
use cairn_worker::evaluate::{read_adapters, score};
use cairn_worker::model::{Adapter, LoadedModel};
use cairn_worker::train::{Checkpoints, Progress, TrainError, TrainJob, TrainReport, train};
use common::{examples, model, recipe};

/// Trains into `out`; cancels once `stop_after` steps are done.
fn run(
    model: &LoadedModel,
    examples: &[Example],
    recipe: &Recipe,
    out: &Path,
    stop_after: Option<u64>,
) -> Result<TrainReport, TrainError> {
    let cancel = CancelFlag::new();
    let mut on_progress = |progress: &Progress| {
        if stop_after == Some(progress.step) {
            cancel.cancel();
        }
    };
    train(
        model,
        TrainJob {
            examples,
            recipe,
            initial: None,
            carry: None,
            teacher: None,
            frozen_a: false,
            out_dir: out,
            base_model: Some("tiny"),
            revision: None,
            checkpoints: Some(Checkpoints {
                every_steps: None,
                ..Checkpoints::in_dir(out.join(".training"))
            }),
            states: None,
            on_progress: &mut on_progress,
            cancel: &cancel,
        },
    )
}

/// The factors that a training of this recipe starts from.
fn fresh(model: &LoadedModel, recipe: &Recipe) -> Vec<Pair> {
    Adapter::fresh(
        &model.llama.config,
        &recipe.target_modules,
        recipe.rank as usize,
        recipe.scale(),
        recipe.seed,
    )
}

fn weights(dir: &Path) -> Vec<u8> {
    std::fs::read(dir.join("adapter_model.safetensors")).unwrap()
}

#[test]
fn same_seed_same_adapter_and_another_seed_another() {
    let (model, examples) = (model("llama-default"), examples(11, 64));
    let dir = tempfile::tempdir().unwrap();
    let path = |name: &str| dir.path().join(name);
    let first = run(
        &model,
        &examples,
        &recipe("packing = true"),
        &path("a"),
        None,
    )
    .unwrap();
    let again = run(
        &model,
        &examples,
        &recipe("packing = true"),
        &path("b"),
        None,
    )
    .unwrap();
    let other = run(
        &model,
        &examples,
        &recipe("packing = true\nseed = 4"),
        &path("c"),
        None,
    )
    .unwrap();
    assert_eq!(first.adapter_blake3, again.adapter_blake3);
    assert_eq!(weights(&path("a")), weights(&path("b")));
    assert_ne!(first.adapter_blake3, other.adapter_blake3);
    assert!(first.last_loss < first.first_loss, "{first:?}");
    assert!(!path("a").join(".training").exists());
}

#[test]
fn an_adapter_passes_the_coordinators_check() {
    let (model, examples) = (model("qwen3-window-tied"), examples(6, 64));
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe("target_modules = \"all-linear\"\nuse_rslora = true");
    run(&model, &examples, &recipe, dir.path(), None).unwrap();
    let spec = AdapterSpec::new(&model.llama.config, &recipe);
    let config = std::fs::read(dir.path().join("adapter_config.json")).unwrap();
    check_adapter(
        &dir.path().join("adapter_model.safetensors"),
        &config,
        &spec,
    )
    .unwrap();
    assert_eq!(
        AdapterFile::open(dir.path()).unwrap().modules().len(),
        spec.pairs.len()
    );
}

#[test]
fn interrupted_and_resumed_gives_the_same_bytes() {
    let (model, examples) = (model("llama-default"), examples(11, 64));
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe("steps = 9\naccumulation = 2\nschedule = \"cosine\"\nwarmup_steps = 2");
    let (whole, parts) = (dir.path().join("whole"), dir.path().join("parts"));
    let report = run(&model, &examples, &recipe, &whole, None).unwrap();
    for stop in [1, 4, 8] {
        match run(&model, &examples, &recipe, &parts, Some(stop)) {
            Err(TrainError::Cancelled { done, total: 9 }) => assert_eq!(done, stop),
            other => panic!("{other:?}"),
        }
    }
    let resumed = run(&model, &examples, &recipe, &parts, None).unwrap();
    assert_eq!(weights(&whole), weights(&parts));
    assert_eq!(
        (
            resumed.tokens,
            resumed.scored_tokens,
            resumed.first_loss,
            resumed.last_loss
        ),
        (
            report.tokens,
            report.scored_tokens,
            report.first_loss,
            report.last_loss
        )
    );
}

#[test]
fn a_checkpoint_of_another_recipe_or_other_data_is_not_taken_up() {
    let (model, examples) = (model("llama-default"), examples(11, 64));
    let dir = tempfile::tempdir().unwrap();
    let out = dir.path().join("out");
    run(&model, &examples, &recipe(""), &out, Some(3)).unwrap_err();
    let mut resumed_at = Some(0);
    let mut on_progress = |progress: &Progress| resumed_at = progress.resumed_at;
    let changed = recipe("learning_rate = 0.02");
    let job = TrainJob {
        examples: &examples,
        recipe: &changed,
        initial: None,
        carry: None,
        teacher: None,
        frozen_a: false,
        out_dir: &out,
        base_model: None,
        revision: None,
        checkpoints: Some(Checkpoints::in_dir(out.join(".training"))),
        states: None,
        on_progress: &mut on_progress,
        cancel: &CancelFlag::new(),
    };
    train(&model, job).unwrap();
    assert_eq!(resumed_at, None);
    run(&model, &examples, &recipe(""), &out, Some(3)).unwrap_err();
    let fewer = run(&model, &examples[1..], &recipe(""), &out, None).unwrap();
    let fresh = run(
        &model,
        &examples[1..],
        &recipe(""),
        &dir.path().join("fresh"),
        None,
    )
    .unwrap();
    assert_eq!(fewer.adapter_blake3, fresh.adapter_blake3);
}

#[test]
fn a_damaged_checkpoint_is_an_error_that_says_what_to_do() {
    let (model, examples) = (model("llama-default"), examples(11, 64));
    let dir = tempfile::tempdir().unwrap();
    run(&model, &examples, &recipe(""), dir.path(), Some(3)).unwrap_err();
    let file = dir.path().join(".training/training.safetensors");
    let bytes = std::fs::read(&file).unwrap();
    std::fs::write(&file, &bytes[..bytes.len() / 2]).unwrap();
    let error = run(&model, &examples, &recipe(""), dir.path(), None).unwrap_err();
    assert!(error.to_string().contains("delete it"), "{error}");
}

#[test]
fn a_loss_that_is_no_number_stops_the_run() {
    let (model, examples) = (model("llama-default"), examples(11, 64));
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe("learning_rate = 1.0\nsteps = 200\nweight_decay = 0.0");
    // Factors near the end of f32 overflow on the way to the logits.
    let mut initial = fresh(&model, &recipe);
    for pair in &mut initial {
        pair.b.fill(1e38);
    }
    let job = TrainJob {
        examples: &examples,
        recipe: &recipe,
        initial: Some(initial),
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
    match train(&model, job) {
        Err(TrainError::NotFinite(error)) => assert_eq!(error.step, 1, "{error}"),
        other => panic!("{other:?}"),
    }
    assert!(!dir.path().join("adapter_model.safetensors").exists());
}

#[test]
fn nothing_scored_is_an_error() {
    let model = model("llama-default");
    let dir = tempfile::tempdir().unwrap();
    let unscored = [Example {
        tokens: vec![1, 2, 3],
        scored: vec![false; 3],
        cut: true,
    }];
    for examples in [&[][..], &unscored] {
        let result = run(&model, examples, &recipe(""), dir.path(), None);
        assert!(matches!(result, Err(TrainError::NoExamples)), "{result:?}");
    }
}

#[test]
fn training_lowers_the_evaluated_loss_and_weights_scale_the_adapter() {
    let (model, examples) = (model("qwen2-tied"), examples(16, 64));
    let dir = tempfile::tempdir().unwrap();
    let report = run(&model, &examples, &recipe("steps = 30"), dir.path(), None).unwrap();
    assert_eq!(report.steps, 30);
    let loss = |adapters: &[(std::path::PathBuf, f64)]| {
        let pairs = read_adapters(adapters).unwrap();
        score(&model, &pairs, &examples, &mut |_| (), &CancelFlag::new())
            .unwrap()
            .loss
    };
    let adapter = dir.path().to_owned();
    let (base, whole) = (loss(&[]), loss(&[(adapter.clone(), 1.0)]));
    assert!(whole < base - 0.1, "{base} -> {whole}");
    assert!((loss(&[(adapter.clone(), 0.0)]) - base).abs() < 1e-6);
    let halves = loss(&[(adapter.clone(), 0.25), (adapter.clone(), 0.75)]);
    assert!((halves - whole).abs() < 1e-5, "{halves} {whole}");
    let cancelled = loss(&[(adapter.clone(), 1.0), (adapter, -1.0)]);
    assert!((cancelled - base).abs() < 1e-5, "{cancelled} {base}");
}

#[test]
fn with_a_frozen_only_b_is_trained() {
    let (model, examples) = (model("llama-default"), examples(16, 64));
    let dir = tempfile::tempdir().unwrap();
    let recipe = recipe("steps = 5\nweight_decay = 0.0");
    let start = fresh(&model, &recipe);
    let job = TrainJob {
        examples: &examples,
        recipe: &recipe,
        initial: None,
        carry: None,
        teacher: None,
        frozen_a: true,
        out_dir: dir.path(),
        base_model: None,
        revision: None,
        checkpoints: None,
        states: None,
        on_progress: &mut |_| (),
        cancel: &CancelFlag::new(),
    };
    train(&model, job).unwrap();
    for trained in read_adapters(&[(dir.path().to_owned(), 1.0)]).unwrap() {
        let before = start.iter().find(|pair| pair.module == trained.module);
        assert_eq!(trained.a, before.unwrap().a, "{}", trained.module);
        assert!(trained.b.iter().any(|value| *value != 0.0));
    }
}

//! Weights learnt by gradient: against known ones, and never worse than the start.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use cairn_stack::adapter::Pair;
use cairn_stack::config::Target;
use cairn_worker::cancel::CancelFlag;
use cairn_worker::data::Example;
use cairn_worker::evaluate::score;
use cairn_worker::learn::{LearnError, LearnJob, LearnReport, WEIGHT_MAX, learn};
use cairn_worker::model::{Adapter, Input, LoadedModel};
use common::{batch_of, examples, model};

/// An adapter whose delta changes what the model says a good deal.
fn adapter(model: &LoadedModel, rank: usize, seed: u64) -> Vec<Pair> {
    let config = &model.llama.config;
    let targets = [Target::Q, Target::V, Target::Up, Target::Down];
    let fresh = |seed| Adapter::fresh(config, &targets, rank, 1.5, seed);
    let mut pairs = fresh(seed);
    for (pair, other) in pairs.iter_mut().zip(fresh(seed + 100)) {
        let values = other.a.iter().cycle().take(pair.b.len());
        pair.b = values.map(|value| value * 2.0).collect();
    }
    pairs
}

fn weighted(adapters: &[Vec<Pair>], weights: &[f64]) -> Vec<Pair> {
    let parts = adapters.iter().zip(weights);
    parts
        .flat_map(|(pairs, weight)| {
            pairs.iter().map(move |pair| Pair {
                scale: pair.scale * weight,
                ..pair.clone()
            })
        })
        .collect()
}

/// Examples whose last token is drawn from the model with these adapters: for many of them, the
/// weights that explain them best are those they were drawn with.
fn drawn(model: &LoadedModel, pairs: &[Pair], count: usize) -> Vec<Example> {
    const LENGTH: usize = 7;
    let mut state = 99_u64;
    let mut uniform = move || {
        state = state
            .wrapping_mul(6_364_136_223_846_793_005)
            .wrapping_add(1_442_695_040_888_963_407);
        (state >> 40) as f64 / (1 << 24) as f64
    };
    let config = &model.llama.config;
    let vocabulary = config.vocab_size;
    let adapter = Adapter::new(config, pairs, &model.device).unwrap();
    let mut out = Vec::new();
    while out.len() < count {
        let mut rows: Vec<Example> = (0..100)
            .map(|_| Example {
                tokens: (0..LENGTH)
                    .map(|_| (uniform() * vocabulary as f64) as u32)
                    .collect(),
                scored: (0..LENGTH).map(|t| t == LENGTH - 1).collect(),
                cut: false,
            })
            .collect();
        let input = Input::new(config, &batch_of(&rows), &model.device);
        let logits = model.llama.logits(Some(&adapter), &input);
        let logits: Vec<f64> = logits.to_data().iter::<f32>().map(f64::from).collect();
        for (row, example) in rows.iter_mut().enumerate() {
            let first = (row * LENGTH + LENGTH - 2) * vocabulary;
            let odds: Vec<f64> = logits[first..first + vocabulary]
                .iter()
                .map(|l| l.exp())
                .collect();
            let mut left = uniform() * odds.iter().sum::<f64>();
            let token = odds.iter().position(|odd| {
                left -= odd;
                left < 0.0
            });
            example.tokens[LENGTH - 1] = token.unwrap_or(0) as u32;
        }
        out.extend(rows);
    }
    out
}

fn run(
    model: &LoadedModel,
    adapters: &[(Vec<Pair>, f64)],
    examples: &[Example],
    passes: u32,
) -> Result<LearnReport, LearnError> {
    let job = LearnJob {
        adapters,
        examples,
        passes,
        on_progress: &mut |_| (),
        cancel: &CancelFlag::new(),
    };
    learn(model, job)
}

fn loss(model: &LoadedModel, pairs: &[Pair], examples: &[Example]) -> f64 {
    let none = CancelFlag::new();
    score(model, pairs, examples, &mut |_| (), &none)
        .unwrap()
        .loss
}

#[test]
fn known_weights_are_found_again() {
    let model = model("llama-default");
    let adapters = [
        adapter(&model, 2, 1),
        adapter(&model, 3, 2),
        adapter(&model, 2, 3),
    ];
    let truth = [0.8, 1.5, 0.0];
    let examples = drawn(&model, &weighted(&adapters, &truth), 3000);
    let start: Vec<(Vec<Pair>, f64)> = adapters.iter().map(|pairs| (pairs.clone(), 0.5)).collect();
    let report = run(&model, &start, &examples, 40).unwrap();
    println!("{report:?}");
    let [x, y, z] = report.weights[..] else {
        panic!("{report:?}");
    };
    assert!(
        (x - 0.8).abs() < 0.15 && (y - 1.5).abs() < 0.2,
        "{report:?}"
    );
    // The one that was not there only makes noise: next to nothing of it is left.
    assert!((0.0..0.1).contains(&z), "{report:?}");
    // No worse than the truth on these very examples, and the losses are those of an evaluation.
    let at = |weights: &[f64]| loss(&model, &weighted(&adapters, weights), &examples);
    assert!(report.loss_after <= at(&truth) + 1e-5, "{report:?}");
    assert!(
        (report.loss_before - at(&[0.5; 3])).abs() < 1e-5,
        "{report:?}"
    );
    assert!(
        (report.loss_after - at(&report.weights)).abs() < 1e-5,
        "{report:?}"
    );
    assert!(report.passes <= 40);
    // The same again, to the bit.
    let again = run(&model, &start, &examples, 40).unwrap();
    assert_eq!(
        (again.weights, again.passes),
        (report.weights, report.passes)
    );
}

#[test]
fn what_hurts_is_left_out_and_not_subtracted() {
    let model = model("qwen2-tied");
    let adapters = [adapter(&model, 2, 4), adapter(&model, 2, 5)];
    let examples = drawn(&model, &weighted(&adapters, &[1.0, -0.7]), 1500);
    let start: Vec<(Vec<Pair>, f64)> = adapters.iter().map(|pairs| (pairs.clone(), 0.5)).collect();
    let report = run(&model, &start, &examples, 30).unwrap();
    println!("{report:?}");
    assert_eq!(report.weights[1], 0.0, "{report:?}");
    assert!((0.5..1.5).contains(&report.weights[0]), "{report:?}");
}

#[test]
fn it_is_never_worse_than_the_start() {
    let model = model("llama-default");
    let examples = examples(12, 64);
    let adapters: Vec<(Vec<Pair>, f64)> = (0..4).map(|n| (adapter(&model, 2, n), 0.25)).collect();
    let mut before = f64::INFINITY;
    for passes in [0, 1, 2, 5, 12] {
        let report = run(&model, &adapters, &examples, passes).unwrap();
        assert!(report.loss_after <= report.loss_before && report.passes <= passes.max(1));
        assert!(report.loss_after <= before, "more passes are no worse");
        assert!(
            report
                .weights
                .iter()
                .all(|weight| (0.0..=WEIGHT_MAX).contains(weight))
        );
        before = report.loss_after;
    }
}

#[test]
fn progress_is_told_and_stopping_stops() {
    let model = model("llama-default");
    let examples = drawn(&model, &[], 400);
    let adapters = [(adapter(&model, 2, 1), 1.0)];
    let cancel = CancelFlag::new();
    let mut seen = Vec::new();
    let mut on_progress = |progress: &cairn_worker::learn::LearnProgress| {
        seen.push(*progress);
        if progress.loss.is_some() {
            cancel.cancel();
        }
    };
    let job = LearnJob {
        adapters: &adapters,
        examples: &examples,
        passes: 5,
        on_progress: &mut on_progress,
        cancel: &cancel,
    };
    assert!(matches!(learn(&model, job), Err(LearnError::Cancelled)));
    assert!(seen.windows(2).all(|two| two[1].step == two[0].step + 1));
    assert!(
        seen.iter()
            .all(|one| one.steps >= 5 && one.step <= one.steps)
    );
}

#[test]
fn what_cannot_be_learnt_is_said() {
    let model = model("llama-default");
    let examples = examples(4, 64);
    let one = || adapter(&model, 2, 1);
    assert!(matches!(
        run(&model, &[], &examples, 3),
        Err(LearnError::NoAdapters)
    ));
    let unscored = [Example {
        tokens: vec![1, 2, 3],
        scored: vec![false; 3],
        cut: false,
    }];
    for none in [&[][..], &unscored] {
        let found = run(&model, &[(one(), 1.0)], none, 3);
        assert!(matches!(found, Err(LearnError::NothingScored)));
    }
    let found = run(&model, &[(one(), f64::NAN)], &examples, 3);
    assert!(matches!(found, Err(LearnError::Weight(_))));
    let mut foreign = one();
    foreign[0].module = "model.layers.99.self_attn.q_proj".to_owned();
    let found = run(&model, &[(foreign, 1.0)], &examples, 3);
    assert!(matches!(found, Err(LearnError::Foreign(_))));
    let mut broken = one();
    broken[0].b.fill(f32::NAN);
    let found = run(&model, &[(one(), 1.0), (broken, 0.5)], &examples, 3);
    assert!(matches!(found, Err(LearnError::NotFinite(_))));
}

//! Training beside a base in fewer bits: it learns, it can be replayed, and what it learnt holds on the
//! base as it is.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::path::Path;

use cairn_stack::adapter::WEIGHTS_FILE;
use cairn_stack::quantize::Quantize;
use cairn_stack::recipe::Recipe;
use cairn_worker::cancel::CancelFlag;
use cairn_worker::device::DeviceName;
use cairn_worker::evaluate::{read_adapters, score};
use cairn_worker::model::LoadedModel;
use cairn_worker::train::states::{MOMENTS_FILE, States, state_dir};
use cairn_worker::train::{ReplayJob, StartState, TrainJob, TrainReport, replay, train};
use common::{device, examples, model, recipe, reference};

const LINES: &str =
    "rank = 4\nalpha = 8\ntarget_modules = \"all-linear\"\nsteps = 24\nlearning_rate = 0.02\n";

fn loaded(quantize: Quantize) -> LoadedModel {
    let folder = reference().join("models/llama-default");
    LoadedModel::load_quantised(&folder, quantize, device()).unwrap()
}

fn of(quantize: Quantize) -> Recipe {
    recipe(&format!("{LINES}quantize = \"{quantize}\"\n"))
}

fn trained(model: &LoadedModel, recipe: &Recipe, out: &Path) -> TrainReport {
    let job = TrainJob {
        teacher: None,
        examples: &examples(16, 64),
        recipe,
        initial: None,
        carry: None,
        frozen_a: false,
        out_dir: out,
        base_model: None,
        revision: None,
        checkpoints: None,
        states: Some(States {
            dir: out.join("states"),
            segments: 3,
        }),
        on_progress: &mut |_| (),
        cancel: &CancelFlag::new(),
    };
    train(model, job).unwrap()
}

fn loss(model: &LoadedModel, adapter: Option<&Path>) -> f64 {
    let adapters: Vec<_> = adapter
        .map(|dir| (dir.to_owned(), 1.0))
        .into_iter()
        .collect();
    let pairs = read_adapters(&adapters).unwrap();
    let report = score(
        model,
        &pairs,
        &examples(16, 64),
        &mut |_| (),
        &CancelFlag::new(),
    );
    report.unwrap().loss
}

#[test]
fn what_is_learnt_beside_fewer_bits_holds_on_the_whole_model() {
    let whole = model("llama-default");
    let before = loss(&whole, None);
    let mut adapters = Vec::new();
    for quantize in Quantize::ALL {
        let folder = tempfile::tempdir().unwrap();
        let base = loaded(quantize);
        assert_eq!(
            base.digest, whole.digest,
            "{quantize}: the digest is the file's"
        );
        let report = trained(&base, &of(quantize), folder.path());
        assert!(report.last_loss < 0.8 * report.first_loss, "{quantize}");
        let after = loss(&whole, Some(folder.path()));
        assert!(after < 0.8 * before, "{quantize}: {before} to {after}");
        let own = loss(&base, Some(folder.path()));
        assert!(
            (after - own).abs() < 0.05 * own,
            "{quantize}: {after}, {own}"
        );
        adapters.push(report.adapter_blake3);
    }
    assert!(adapters[0] != adapters[1] && adapters[1] != adapters[2]);
}

#[test]
fn a_segment_beside_fewer_bits_is_the_same_again() {
    for quantize in [Quantize::Int8, Quantize::Nf4] {
        let folder = tempfile::tempdir().unwrap();
        let recipe = of(quantize);
        trained(&loaded(quantize), &recipe, folder.path());
        let states = folder.path().join("states");
        let file = |name: &str, step: u32| state_dir(&states, step).join(name);
        let (factors, moments) = (file(WEIGHTS_FILE, 8), file(MOMENTS_FILE, 8));
        let end = file(WEIGHTS_FILE, 16);
        let again = |model: &LoadedModel, recipe: &Recipe| {
            let job = ReplayJob {
                teacher: None,
                examples: &examples(16, 64),
                recipe,
                initial: None,
                carry: None,
                segments: 3,
                start: Some(StartState {
                    factors: &factors,
                    moments: &moments,
                }),
                first_step: 8,
                last_step: 16,
                end_factors: &end,
                on_progress: &mut |_| (),
                cancel: &CancelFlag::new(),
            };
            replay(model, job).unwrap()
        };
        let report = again(&loaded(quantize), &recipe);
        assert!(report.distance < 0.001, "{quantize}: {report:?}");
        let exact = device() == DeviceName::Flex;
        assert!(report.identical || !exact, "{quantize}: {report:?}");
        // Who trains beside the whole model instead is found out.
        let report = again(&loaded(Quantize::None), &of(Quantize::None));
        assert!(report.distance > 0.001, "{quantize}: {report:?}");
    }
}

//! Training states: every segment trained again gives the same bits, and what was not trained as
//! said does not; a crash changes none of them.

#![expect(clippy::unwrap_used, reason = "a test that cannot go on fails")]

mod common;

use std::fs;
use std::path::{Path, PathBuf};

use cairn_stack::adapter::{AdapterFile, Pair};
use cairn_stack::algebra::cosine;
use cairn_stack::recipe::Recipe;
use cairn_worker::cancel::CancelFlag;
use cairn_worker::data::Example;
use cairn_worker::device::DeviceName;
use cairn_worker::model::LoadedModel;
use cairn_worker::train::record::commitment;
use cairn_worker::train::states::{Commitment, MOMENTS_FILE, States, state_dir};
use cairn_worker::train::{
    Checkpoints, GuideJob, Progress, ReplayError, ReplayJob, ReplayReport, StartState, TrainError,
    TrainJob, TrainReport, guide, replay, train,
};
use common::{device, examples, model, recipe};

const WEIGHTS: &str = "adapter_model.safetensors";
/// As far as training again may be off on devices that add in no fixed order, as a part of what a
/// segment moves.
const TOLERANCE: f64 = 1e-3;

/// A model, a shard and a recipe.
struct Desk {
    model: LoadedModel,
    examples: Vec<Example>,
    recipe: Recipe,
    dir: tempfile::TempDir,
}

impl Desk {
    fn new() -> Self {
        let lines = "steps = 10\naccumulation = 2\nschedule = \"cosine\"\nwarmup_steps = 2\nclip_norm = 1.0";
        Self {
            model: model("llama-default"),
            examples: examples(13, 64),
            recipe: recipe(lines),
            dir: tempfile::tempdir().unwrap(),
        }
    }

    fn path(&self, name: &str) -> PathBuf {
        self.dir.path().join(name)
    }

    /// Trains in four segments into `name`; stops once `stop_after` steps are done.
    fn train_until(
        &self,
        name: &str,
        examples: &[Example],
        recipe: &Recipe,
        stop_after: Option<u64>,
    ) -> Result<TrainReport, TrainError> {
        let out = self.path(name);
        let cancel = CancelFlag::new();
        let mut on_progress = |progress: &Progress| {
            if stop_after == Some(progress.step) {
                cancel.cancel();
            }
        };
        let job = TrainJob {
            examples,
            recipe,
            initial: None,
            carry: None,
            teacher: None,
            frozen_a: false,
            out_dir: &out,
            base_model: None,
            revision: None,
            checkpoints: Some(Checkpoints::in_dir(out.join("checkpoint"))),
            states: Some(States {
                dir: out.join("states"),
                segments: 4,
            }),
            on_progress: &mut on_progress,
            cancel: &cancel,
        };
        train(&self.model, job)
    }

    fn train(&self, name: &str) -> Commitment {
        let report = self.train_until(name, &self.examples, &self.recipe, None);
        report.unwrap().commitment.unwrap()
    }

    fn state(&self, name: &str, step: u32) -> PathBuf {
        state_dir(&self.path(name).join("states"), step)
    }

    /// Trains the segment from `first` to `last` again, as this desk would have trained it.
    fn replay(
        &self,
        start: &Path,
        first: u32,
        end: &Path,
        last: u32,
    ) -> Result<ReplayReport, ReplayError> {
        let (factors, moments) = (start.join(WEIGHTS), start.join(MOMENTS_FILE));
        let job = ReplayJob {
            examples: &self.examples,
            recipe: &self.recipe,
            initial: None,
            carry: None,
            teacher: None,
            segments: 4,
            start: (first > 0).then_some(StartState {
                factors: &factors,
                moments: &moments,
            }),
            first_step: u64::from(first),
            last_step: u64::from(last),
            end_factors: &end.join(WEIGHTS),
            on_progress: &mut |_| (),
            cancel: &CancelFlag::new(),
        };
        replay(&self.model, job)
    }

    /// Each segment of a training in turn.
    fn replay_all(&self, name: &str, commitment: &Commitment) -> Vec<ReplayReport> {
        let steps: Vec<u32> = commitment.states.iter().map(|state| state.step).collect();
        let replay = |window: &[u32]| {
            let (first, last) = (window[0], window[1]);
            self.replay(
                &self.state(name, first),
                first,
                &self.state(name, last),
                last,
            )
            .unwrap()
        };
        steps.windows(2).map(replay).collect()
    }
}

#[test]
fn every_segment_trained_again_is_the_same() {
    let desk = Desk::new();
    let commitment = desk.train("honest");
    let steps: Vec<u32> = commitment.states.iter().map(|state| state.step).collect();
    assert_eq!(steps, [0, 2, 5, 7, 10]);
    let reports = desk.replay_all("honest", &commitment);
    assert_eq!(
        reports.iter().map(|r| r.steps).collect::<Vec<_>>(),
        [2, 3, 2, 3]
    );
    for report in reports {
        println!("{report:?}");
        assert!(report.distance < TOLERANCE, "{report:?}");
        if device() == DeviceName::Flex {
            assert!(report.identical && report.distance == 0.0, "{report:?}");
        }
    }
    // The last state is the adapter itself.
    let adapter = fs::read(desk.path("honest").join(WEIGHTS)).unwrap();
    assert_eq!(
        fs::read(desk.state("honest", 10).join(WEIGHTS)).unwrap(),
        adapter
    );
}

#[test]
fn what_was_trained_otherwise_is_far_off() {
    let desk = Desk::new();
    let honest = desk.train("honest");
    let trained = |name: &str, examples: &[Example], recipe: &Recipe| {
        let report = desk.train_until(name, examples, recipe, None).unwrap();
        report.commitment.unwrap()
    };
    let foreign = trained("foreign", &examples(29, 64)[16..], &desk.recipe);
    let seeded = trained(
        "seeded",
        &desk.examples,
        &Recipe {
            seed: 4,
            ..desk.recipe.clone()
        },
    );
    let rate = 2.0 * desk.recipe.learning_rate;
    let hotter = trained(
        "hotter",
        &desk.examples,
        &Recipe {
            learning_rate: rate,
            ..desk.recipe.clone()
        },
    );
    for (name, commitment) in [
        ("foreign", &foreign),
        ("seeded", &seeded),
        ("hotter", &hotter),
    ] {
        assert_ne!(commitment.root, honest.root);
        for report in desk.replay_all(name, commitment) {
            println!("{name}: {report:?}");
            assert!(
                report.distance > 0.05 && !report.identical,
                "{name}: {report:?}"
            );
        }
    }
    // A segment left out: the end is where the start was, or where an earlier segment ended.
    for (first, claimed, last) in [(5, 5, 7), (5, 2, 7), (0, 0, 2), (2, 7, 5)] {
        let (start, end) = (desk.state("honest", first), desk.state("honest", claimed));
        let report = desk.replay(&start, first, &end, last).unwrap();
        println!("{first} to {last} with the state of {claimed}: {report:?}");
        assert!(report.distance > 0.05 && !report.identical, "{report:?}");
    }
    // The right factors with another segment's moments.
    let mixed = desk.path("mixed");
    fs::create_dir(&mixed).unwrap();
    fs::copy(desk.state("honest", 5).join(WEIGHTS), mixed.join(WEIGHTS)).unwrap();
    fs::copy(
        desk.state("honest", 2).join(MOMENTS_FILE),
        mixed.join(MOMENTS_FILE),
    )
    .unwrap();
    let report = desk.replay(&mixed, 5, &desk.state("honest", 7), 7).unwrap();
    assert!(report.distance > TOLERANCE, "{report:?}");
}

#[test]
fn opened_files_that_are_no_states_are_the_claims_fault() {
    let desk = Desk::new();
    desk.train("honest");
    let wider = Recipe {
        rank: 3,
        ..desk.recipe.clone()
    };
    desk.train_until("wider", &desk.examples, &wider, None)
        .unwrap();
    let (start, end) = (desk.state("honest", 5), desk.state("honest", 7));
    let other = desk
        .replay(&start, 5, &desk.state("wider", 7), 7)
        .unwrap_err();
    assert!(other.is_claim(), "{other}");
    let swapped = desk.path("swapped");
    fs::create_dir(&swapped).unwrap();
    fs::copy(start.join(MOMENTS_FILE), swapped.join(WEIGHTS)).unwrap();
    fs::copy(start.join(MOMENTS_FILE), swapped.join(MOMENTS_FILE)).unwrap();
    assert!(desk.replay(&swapped, 5, &end, 7).unwrap_err().is_claim());
    let bytes = fs::read(end.join(WEIGHTS)).unwrap();
    fs::write(swapped.join(WEIGHTS), &bytes[..bytes.len() - 4]).unwrap();
    assert!(desk.replay(&start, 5, &swapped, 7).unwrap_err().is_claim());

    // Factors that are no numbers, where the header is sound.
    let mut broken = fs::read(start.join(WEIGHTS)).unwrap();
    let length = broken.len();
    broken[length - 4..].copy_from_slice(&f32::NAN.to_le_bytes());
    fs::write(swapped.join(WEIGHTS), broken).unwrap();
    assert!(desk.replay(&swapped, 5, &end, 7).unwrap_err().is_claim());

    // Steps that are no segment: who trained less than the recipe asks for has others.
    for (first, last) in [(7, 7), (7, 5), (5, 11), (0, 1), (2, 7), (5, 6)] {
        let error = desk.replay(&start, first, &end, last).unwrap_err();
        assert!(matches!(error, ReplayError::Segment { total: 10, .. }) && error.is_claim());
    }
    // What is missing here says nothing about the claim.
    let missing = desk.replay(&desk.path("nowhere"), 5, &end, 7).unwrap_err();
    assert!(!missing.is_claim(), "{missing}");
}

#[test]
fn stopped_and_resumed_commits_to_the_same() {
    let desk = Desk::new();
    let whole = desk.train("whole");
    let until = |stop| desk.train_until("parts", &desk.examples, &desk.recipe, Some(stop));
    for stop in [1, 5, 6] {
        assert!(matches!(until(stop), Err(TrainError::Cancelled { .. })));
    }
    assert_eq!(desk.train("parts"), whole);
    assert_eq!(commitment(&desk.path("parts").join("states")), Some(whole));
}

#[test]
fn whatever_a_crash_leaves_the_states_become_the_same() {
    let desk = Desk::new();
    let whole = desk.train("whole");
    let stop = |stop| {
        desk.train_until("parts", &desk.examples, &desk.recipe, Some(stop))
            .unwrap_err()
    };
    let checkpoint = desk.path("parts").join("checkpoint");
    let resumed_at = |damage: &dyn Fn()| {
        let _ = fs::remove_dir_all(desk.path("parts"));
        stop(6);
        damage();
        let mut resumed_at = None;
        let out = desk.path("parts");
        let job = TrainJob {
            examples: &desk.examples,
            recipe: &desk.recipe,
            initial: None,
            carry: None,
            teacher: None,
            frozen_a: false,
            out_dir: &out,
            base_model: None,
            revision: None,
            checkpoints: Some(Checkpoints::in_dir(checkpoint.clone())),
            states: Some(States {
                dir: out.join("states"),
                segments: 4,
            }),
            on_progress: &mut |progress| resumed_at = progress.resumed_at,
            cancel: &CancelFlag::new(),
        };
        let report = train(&desk.model, job).unwrap();
        assert_eq!(report.commitment, Some(whole.clone()));
        assert!(report.first_loss > report.last_loss);
        resumed_at
    };
    // No local checkpoint: the last state is one.
    assert_eq!(
        resumed_at(&|| fs::remove_dir_all(&checkpoint).unwrap()),
        Some(5)
    );
    // A state is missing or damaged: from the one before it, though the checkpoint is further.
    let moments = desk.state("parts", 5).join(MOMENTS_FILE);
    assert_eq!(resumed_at(&|| fs::write(&moments, "x").unwrap()), Some(2));
    assert_eq!(
        resumed_at(&|| fs::remove_dir_all(desk.path("parts").join("states")).unwrap()),
        None
    );
    // The index is from before the state it should name.
    let index = desk.path("parts").join("states/states.json");
    assert_eq!(resumed_at(&|| fs::write(&index, "{").unwrap()), None);
    // Nothing happened: from the checkpoint.
    assert_eq!(resumed_at(&|| ()), Some(6));

    // All done but the last word: the adapter is written again, nothing is trained.
    fs::remove_file(desk.path("parts").join(WEIGHTS)).unwrap();
    assert_eq!(desk.train("parts"), whole);
    assert_eq!(
        fs::read(desk.path("parts").join(WEIGHTS)).unwrap(),
        fs::read(desk.path("whole").join(WEIGHTS)).unwrap()
    );
}

#[test]
fn states_of_another_training_are_not_taken_up() {
    let desk = Desk::new();
    let other = Recipe {
        learning_rate: 0.02,
        ..desk.recipe.clone()
    };
    desk.train_until("run", &desk.examples, &other, None)
        .unwrap();
    let after = desk.train("run");
    assert_eq!(after, desk.train("fresh"));
}

#[test]
fn a_guide_points_where_the_training_goes() {
    let desk = Desk::new();
    desk.train("honest");
    let guided = |name: &str, examples: &[Example]| {
        let out = desk.path(name);
        let job = GuideJob {
            examples,
            recipe: &desk.recipe,
            initial: None,
            carry: None,
            teacher: None,
            steps: 4,
            out_dir: &out,
            on_progress: &mut |_| (),
            cancel: &CancelFlag::new(),
        };
        assert_eq!(guide(&desk.model, job).unwrap().steps, 4);
        AdapterFile::open(&out).unwrap()
    };
    let honest = AdapterFile::open(&desk.path("honest")).unwrap();
    let guide = guided("guide", &desk.examples[..6]);
    let along = cosine(&honest, &guide).unwrap();
    println!("along {along}");
    assert!(along > 0.3, "{along}");
    let flipped: Vec<Pair> = honest
        .pairs()
        .unwrap()
        .into_iter()
        .map(|pair| Pair {
            scale: -pair.scale,
            ..pair
        })
        .collect();
    let inner: f64 = flipped
        .iter()
        .enumerate()
        .map(|(index, pair)| cairn_stack::algebra::inner(pair, &guide.pair(index).unwrap()))
        .sum();
    assert!(inner < 0.0, "{inner}");
}

use super::*;
use crate::device::DeviceName;
use crate::model::ops::bent::{Bend, with};

/// The device under test, as worker/tests/common has it.
fn name() -> DeviceName {
    if std::env::var("CAIRN_TEST_KERNELS").is_ok_and(|kernels| kernels == "burn") {
        crate::model::without_kernels();
    }
    let name = std::env::var("CAIRN_TEST_DEVICE").ok();
    name.map_or(DeviceName::default(), |name| name.parse().unwrap())
}

fn outcome(case: Case, bend: Option<Bend>) -> Outcome {
    let outcome = with(bend, || run(case, &name().open().unwrap()));
    println!(
        "{case:?} {bend:?}: {:.2e} off at {} ({:.3} s, {:.0} tokens/s)",
        outcome.worst, outcome.at, outcome.seconds, outcome.tokens_per_second
    );
    outcome
}

#[test]
fn a_device_that_is_right_is_far_inside_what_is_allowed() {
    for case in [Case::Odd, Case::Wide] {
        let outcome = outcome(case, None);
        assert!(outcome.worst > 0.0, "f32 is not float64");
        assert!(outcome.worst < allowed(name()) / 5.0, "{outcome:?}");
    }
}

#[test]
fn every_wrong_kernel_is_caught() {
    let caught = |bend: &Bend| outcome(Case::Odd, Some(*bend)).worst > allowed(name());
    let blind: Vec<Bend> = Bend::ALL.into_iter().filter(|bend| !caught(bend)).collect();
    assert!(blind.is_empty(), "the canary is blind to {blind:?}");
}

#[test]
fn numbers_that_are_none_are_caught() {
    let mut worst = Worst::default();
    worst.see(1e-5, || "a".to_owned());
    worst.see(f64::NAN, || "b".to_owned());
    worst.see(f64::INFINITY, || "c".to_owned());
    assert_eq!((worst.off, worst.at.as_str()), (NOT_A_NUMBER, "b"));
}

#[test]
fn a_sketch_measures_a_difference() {
    // 1000 numbers of 1: the norm is their root.
    let sketch = sketch("some.path", &[1.0; 1000]);
    let norm = (sketch.iter().map(|x| x * x).sum::<f64>() / sketch.len() as f64).sqrt();
    assert!((norm / 1000.0_f64.sqrt() - 1.0).abs() < 0.5, "{norm}");
    // One number is seen whole, by every vector.
    assert!(
        super::sketch("other", &[0.25])
            .iter()
            .all(|x| x.abs() == 0.25)
    );
}

//! The fold against PEFT: references made by `tests/reference/generate.py`.

#![expect(clippy::unwrap_used, reason = "a test fails by panicking")]

use std::path::{Path, PathBuf};

use cairn_stack::adapter::AdapterFile;
use cairn_stack::checkpoint::Checkpoint;
use cairn_stack::compress::concat;
use cairn_stack::fold::{Term, fold};
use cairn_stack::tensors::TensorFile;

/// "Equal" in f32: relative to the larger of the value and the tensor's typical weight.
const RELATIVE: f32 = 1e-6;

fn reference(name: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR"))
        .join("tests/reference")
        .join(name)
}

fn folded(base: &str, terms: &[(&AdapterFile, f64)], out: &Path) -> Checkpoint {
    let base = Checkpoint::open(&reference(base)).unwrap();
    let terms: Vec<Term<'_>> = terms
        .iter()
        .map(|(adapter, weight)| Term {
            adapter,
            weight: *weight,
        })
        .collect();
    fold(&base, &terms, out).unwrap();
    Checkpoint::open(out).unwrap()
}

/// Largest difference, relative to the larger of the value itself and the tensor's root mean square.
fn compare(found: &Checkpoint, expected: &TensorFile) -> f32 {
    let mut worst = 0.0_f32;
    for info in expected.tensors() {
        let expected = expected.read_f32(info).unwrap();
        let (shape, found) = found.read_f32(&info.name).unwrap();
        assert_eq!(shape, info.shape);
        let rms = (expected.iter().map(|value| value * value).sum::<f32>() / expected.len() as f32)
            .sqrt();
        for (found, expected) in found.iter().zip(&expected) {
            worst = worst.max((found - expected).abs() / expected.abs().max(rms));
        }
    }
    worst
}

#[test]
fn one_adapter_at_weight_one_is_pefts_merge() {
    let dir = tempfile::tempdir().unwrap();
    for name in ["plain", "patterns", "rslora", "half"] {
        let adapter = AdapterFile::open(&reference(name)).unwrap();
        let found = folded("base", &[(&adapter, 1.0)], &dir.path().join(name));
        let expected = TensorFile::open(&reference(&format!("merged-{name}.safetensors"))).unwrap();
        assert_eq!(expected.tensors().len(), 14);
        let worst = compare(&found, &expected);
        println!("{name}: {worst:e}");
        assert!(worst <= RELATIVE, "{name}: {worst:e}");
        // The reference differs from the base, so the comparison means something.
        let base = Checkpoint::open(&reference("base")).unwrap();
        assert!(compare(&base, &expected) > 1e-2);
    }
}

#[test]
fn a_sharded_bf16_base_is_rounded_once() {
    let dir = tempfile::tempdir().unwrap();
    let adapter = AdapterFile::open(&reference("patterns")).unwrap();
    let found = folded("base-bf16", &[(&adapter, 1.0)], &dir.path().join("out"));
    assert_eq!(found.weight_files().len(), 2);
    let expected = TensorFile::open(&reference("merged-bf16.safetensors")).unwrap();
    // Sums that differ in their last f32 bit may round to neighbouring bf16 values: 2^-8 apart.
    let mut differing = 0;
    let mut count = 0;
    for info in expected.tensors() {
        let (_, found) = found.read_f32(&info.name).unwrap();
        for (found, expected) in found.iter().zip(expected.read_f32(info).unwrap()) {
            count += 1;
            differing += usize::from(found.to_bits() != expected.to_bits());
            assert!(
                (found - expected).abs() <= expected.abs() / 128.0,
                "{}: {found} {expected}",
                info.name
            );
        }
    }
    assert!(differing * 1000 <= count, "{differing} of {count}");
}

#[test]
fn a_stack_and_its_concatenation_are_the_sum_of_the_deltas() {
    let dir = tempfile::tempdir().unwrap();
    let adapters =
        ["plain", "patterns", "rslora"].map(|name| AdapterFile::open(&reference(name)).unwrap());
    let terms: Vec<(&AdapterFile, f64)> = adapters.iter().zip([0.75, -0.5, 1.25]).collect();
    let expected = TensorFile::open(&reference("stacked.safetensors")).unwrap();
    let worst = compare(
        &folded("base", &terms, &dir.path().join("stack")),
        &expected,
    );
    assert!(worst <= RELATIVE, "{worst:e}");
    concat(&terms, &dir.path().join("adapter"), None, None).unwrap();
    let joined = AdapterFile::open(&dir.path().join("adapter")).unwrap();
    let worst = compare(
        &folded("base", &[(&joined, 1.0)], &dir.path().join("joined")),
        &expected,
    );
    assert!(worst <= RELATIVE, "{worst:e}");
}

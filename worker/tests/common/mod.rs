//! What the tests of the model share: reference files, a device, examples.
#![allow(dead_code, reason = "every test file uses a part of it")]

use std::path::PathBuf;

use cairn_stack::recipe::Recipe;
use cairn_stack::tensors::TensorFile;
use cairn_worker::data::{Batch, Example, batches, pack};
use cairn_worker::device::DeviceName;
use cairn_worker::model::LoadedModel;

/// The folder of values made by `reference/generate.py`.
pub fn reference() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("reference")
}

/// The device under test: `CAIRN_TEST_DEVICE`, else the build's CPU device. With
/// `CAIRN_TEST_KERNELS=burn` it computes as a graphics card does.
pub fn device() -> DeviceName {
    if std::env::var("CAIRN_TEST_KERNELS").is_ok_and(|kernels| kernels == "burn") {
        cairn_worker::model::without_kernels();
    }
    match std::env::var("CAIRN_TEST_DEVICE") {
        Ok(name) => name.parse().expect("CAIRN_TEST_DEVICE names a device"),
        Err(_) => DeviceName::default(),
    }
}

/// One of the tiny reference models.
pub fn model(name: &str) -> LoadedModel {
    LoadedModel::load(&reference().join("models").join(name), device()).expect(name)
}

/// A tensor of a safetensors file, as numbers.
pub fn tensor(file: &TensorFile, name: &str) -> (Vec<f32>, Vec<usize>) {
    let info = file.get(name).expect(name);
    let values = file.read_f32(info).expect("readable values");
    (values, info.shape.clone())
}

/// Rows without packing, as one batch.
pub fn batch_of(examples: &[Example]) -> Batch {
    let order: Vec<usize> = (0..examples.len()).collect();
    batches(pack(examples, &order, 1024, false), examples.len()).remove(0)
}

/// Examples with tokens from a small generator, all but the first few scored.
pub fn examples(count: usize, vocabulary: u32) -> Vec<Example> {
    let mut state = 12_345_u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        state >> 8
    };
    (0..count)
        .map(|_| {
            let length = 5 + (next() % 12) as usize;
            let start = 1 + (next() % 3) as usize;
            // A pattern with a little noise, so that there is something to learn.
            let first = next() % vocabulary;
            let tokens = (0..length as u32)
                .map(|t| (first + 3 * t + u32::from(next() % 9 == 0)) % vocabulary);
            Example {
                tokens: tokens.collect(),
                scored: (0..length).map(|t| t >= start).collect(),
                cut: false,
            }
        })
        .collect()
}

/// A recipe with some lines changed or added.
pub fn recipe(lines: &str) -> Recipe {
    let keys = |text: &str| -> Vec<String> {
        text.lines()
            .filter_map(|line| Some(line.split_once('=')?.0.trim().to_owned()))
            .collect()
    };
    let changed = keys(lines);
    let standard = "rank = 2\nalpha = 4\ntarget_modules = [\"q_proj\", \"v_proj\", \"down_proj\"]\n\
        learning_rate = 0.01\nsteps = 6\nbatch_size = 3\nsequence_length = 40\nseed = 3\n";
    let kept: Vec<&str> = standard
        .lines()
        .filter(|line| {
            !changed
                .iter()
                .any(|key| line.split('=').next().map(str::trim) == Some(key))
        })
        .collect();
    Recipe::parse_toml(&format!("{}\n{lines}", kept.join("\n"))).expect("a recipe")
}

//! The canary: whether a device computes what it should, found out before it is given any work.
//!
//! Drivers and their compilers have bugs that no error tells of: the numbers are wrong, the loss still
//! falls a little, and what comes of it is rejected as if the volunteer had cheated. So each device
//! first does a training whose outcome is known: a few steps of LoRA on small models with everything
//! that any family has (grouped heads, norms over q and k, biases, a window, an untied head, packed
//! rows, pairs on every target), through the same [`Trainer`] as all work. Losses, gradient norms and
//! what the steps made of every factor are compared with values that transformers and PEFT computed in
//! float64 (`worker/reference/generate_canary.py`).
//!
//! - `made`: the models, adapters and records, made from names
//! - `reference`: what they must come to
//!
//! What is done with a device that fails is [`crate::device`]'s.

mod made;
mod reference;
#[cfg(test)]
mod tests;

use burn::tensor::Device;

use crate::clock::Stopwatch;
use crate::device::DeviceName;
use crate::model::Adapter;
use crate::train::trainer::Trainer;
use made::signs;
use reference::Reference;

/// Largest relative difference where products are computed in f32.
///
/// Another order of summation and a driver's own `exp` come to 1e-5 (f32 on a CPU: 5e-6). The mildest
/// wrong kernel we know of reads the factors of its products in bfloat16, and comes to 1e-2.
///
/// LibTorch is among them on a GPU too: it leaves TF32 off unless it is asked for.
pub const ALLOWED_F32: f64 = 1e-3;

/// The same where `CubeCL` computes products of f32 on tensor cores in TF32, with 10 bits after the
/// leading one: `cuda`. That rounding comes to 1.5e-3, bfloat16's 7 bits to 1e-2.
pub const ALLOWED_TF32: f64 = 5e-3;

/// Reported where a loss or gradient is not a number: JSON has no infinity.
const NOT_A_NUMBER: f64 = 1e6;

/// A training of known outcome.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Case {
    /// Odd sizes: the ends of rows that fill no lane, tile or work group. Some 30 ms of two cores.
    Odd,
    /// Sizes as real models have them, for which other kernels are chosen; also measures speed.
    Wide,
}

/// How a device did.
#[derive(Debug, Clone, PartialEq)]
pub struct Outcome {
    /// The largest relative difference from what must come out.
    pub worst: f64,
    /// Of what that is: a step's loss or gradient norm, or a factor.
    pub at: String,
    /// Tokens a second in the fastest step.
    pub tokens_per_second: f64,
    /// Seconds for all of it, with kernels to be compiled at the first use.
    pub seconds: f64,
}

/// The largest relative difference that a device of this kind may show.
#[must_use]
pub const fn allowed(name: DeviceName) -> f64 {
    match name {
        DeviceName::Cuda(_) => ALLOWED_TF32,
        DeviceName::Flex
        | DeviceName::Tch
        | DeviceName::TchCuda(_)
        | DeviceName::Rocm(_)
        | DeviceName::Wgpu
        | DeviceName::Vulkan
        | DeviceName::Metal => ALLOWED_F32,
    }
}

/// Does a training on a device and compares. Panics where the device cannot be used: that is what burn
/// does there.
#[must_use]
pub fn run(case: Case, device: &Device) -> Outcome {
    let whole = Stopwatch::start();
    let reference = Reference::of(case);
    let config = reference.model_config();
    let model = made::model(&config, device);
    let recipe = reference.recipe();
    let start = made::pairs(&config, reference.rank, recipe.scale());
    let adapter = Adapter::new(&config, &start, device).expect("pairs made for this model");
    let batches = made::batches(&reference, config.vocab_size);
    let mut trainer = Trainer::new(&model, adapter, &recipe);
    let mut worst = Worst::default();
    let mut tokens_per_second = 0.0_f64;
    for (number, (loss, norm)) in reference.steps().enumerate() {
        let watch = Stopwatch::start();
        let Ok(step) = trainer.step(&batches, recipe.learning_rate) else {
            worst.see(f64::NAN, || format!("step {}", number + 1));
            break;
        };
        tokens_per_second = tokens_per_second.max(step.tokens as f64 / watch.seconds());
        let off = |ours: f64, theirs: f64| (ours - theirs).abs() / theirs;
        worst.see(off(step.loss, loss), || {
            format!("the loss of step {}", number + 1)
        });
        worst.see(off(step.gradient_norm, norm), || {
            format!("the gradient of step {}", number + 1)
        });
    }
    for (before, pair) in start.iter().zip(trainer.adapter.to_pairs(&config)) {
        let factors = [("A", &before.a, &pair.a), ("B", &before.b, &pair.b)];
        for (letter, before, after) in factors {
            let path = format!("{}.lora_{letter}", pair.module);
            let moved: Vec<f64> = after
                .iter()
                .zip(before)
                .map(|(after, before)| f64::from(*after) - f64::from(*before))
                .collect();
            let off = reference.moved(&path).off(&sketch(&path, &moved));
            worst.see(off, || format!("what training made of {path}"));
        }
    }
    Outcome {
        worst: worst.off,
        at: worst.at,
        tokens_per_second,
        seconds: whole.seconds(),
    }
}

/// Inner products with vectors of random signs (Alon, Matias and Szegedy 1996): the mean square of the
/// sketch of a difference is the difference's own on average, and no element of it is overlooked.
fn sketch(path: &str, values: &[f64]) -> Vec<f64> {
    let mut sums = vec![0.0; reference::PROJECTIONS];
    for (value, bits) in values.iter().zip(signs(path)) {
        for (number, sum) in sums.iter_mut().enumerate() {
            *sum += if bits >> number & 1 == 0 {
                *value
            } else {
                -value
            };
        }
    }
    sums
}

/// The largest difference so far.
#[derive(Default)]
struct Worst {
    off: f64,
    at: String,
}

impl Worst {
    fn see(&mut self, off: f64, at: impl FnOnce() -> String) {
        let off = if off.is_finite() { off } else { NOT_A_NUMBER };
        if off > self.off {
            *self = Self { off, at: at() };
        }
    }
}

//! Wrong kernels, for tests of the canary: each a bug that a driver, a compiler or we could have.
//!
//! A bend holds on the thread that asked for it and on whatever thread [`super::inside`] takes its work
//! to; other tests of the same process compute as always.

use std::cell::Cell;

use burn::tensor::{Tensor, TensorData, activation};

use super::{Factor, Gated, Rotate};

/// What is computed wrong.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Bend {
    /// Attention sees the document before in the same row.
    Mask,
    /// Attention has no window.
    Window,
    /// The mean square of a row leaves out its last number.
    Norm,
    /// The way back through a norm forgets that the root depends on x.
    NormBack,
    /// Keys are not rotated.
    Rotation,
    /// Gradients by keys are not rotated back.
    RotationBack,
    /// `alpha / r` is left out.
    LoraScale,
    /// The sum of a product leaves out its last term.
    ProductEnd,
    /// Products read their factors in bfloat16.
    Bfloat16,
    /// SiLU as GELU's approximation, `x · sigmoid(1.702 x)`.
    Gate,
    /// The way back through SiLU takes its slope for the sigmoid.
    GateBack,
    /// The softmax of the loss leaves out the last three classes.
    CrossEntropy,
}

impl Bend {
    /// All of them.
    pub const ALL: [Self; 12] = [
        Self::Mask,
        Self::Window,
        Self::Norm,
        Self::NormBack,
        Self::Rotation,
        Self::RotationBack,
        Self::LoraScale,
        Self::ProductEnd,
        Self::Bfloat16,
        Self::Gate,
        Self::GateBack,
        Self::CrossEntropy,
    ];
}

thread_local! {
    static BENT: Cell<Option<Bend>> = const { Cell::new(None) };
}

/// Runs something with a bend.
pub fn with<T>(bend: Option<Bend>, run: impl FnOnce() -> T) -> T {
    let before = BENT.replace(bend);
    let result = run();
    BENT.set(before);
    result
}

/// Work that takes the bend of this thread with it. A thread of the pool may take up others' work while
/// it waits; they bring their own.
pub fn carried<T>(run: impl FnOnce() -> T + Send) -> impl FnOnce() -> T + Send {
    let bend = BENT.get();
    move || with(bend, run)
}

/// Whether this is bent.
pub fn is(bend: Bend) -> bool {
    BENT.get() == Some(bend)
}

/// What each token sees.
pub fn first(first: Vec<u32>) -> Vec<u32> {
    if is(Bend::Mask) {
        return vec![0; first.len()];
    }
    first
}

/// How far each token looks back.
pub fn window(window: Option<usize>) -> Option<usize> {
    window.filter(|_| !is(Bend::Window))
}

/// How heads are rotated on their way there, or back.
pub fn rotated(rotate: Rotate, bend: Bend) -> Rotate {
    if is(bend) && rotate == Rotate::Keys {
        return Rotate::Not;
    }
    rotate
}

/// The factors of a product.
pub fn factors(a: Factor<'_>, b: Factor<'_>) -> Option<[Tensor<2>; 2]> {
    let (a, b) = (a.tensor(), b.tensor());
    if is(Bend::ProductEnd) {
        let inner = a.dims()[1] - 1;
        return Some([a.narrow(1, 0, inner), b.narrow(0, 0, inner)]);
    }
    is(Bend::Bfloat16).then(|| [a, b].map(rounded))
}

fn rounded(x: Tensor<2>) -> Tensor<2> {
    let (shape, device) = (x.dims(), x.device());
    let round = |value: f32| half::bf16::from_f32(value).to_f32();
    let values: Vec<f32> = x.into_data().iter::<f32>().map(round).collect();
    Tensor::from_data(TensorData::new(values, shape), &device)
}

/// [`super::norm`].
pub fn norm(x: &Tensor<2>, gain: &Tensor<1>, epsilon: f64) -> (Tensor<2>, Tensor<2>) {
    let width = x.dims()[1];
    let seen = x.clone().narrow(1, 0, width - 1);
    let mean_square = (seen.clone() * seen).sum_dim(1) / width as f64;
    let inverse = (mean_square + epsilon).sqrt().recip();
    let y = x.clone() * inverse.clone() * gain.clone().unsqueeze();
    (y, inverse)
}

/// [`super::norm_backward`].
pub fn norm_backward(
    onto: Tensor<2>,
    gradient: &Tensor<2>,
    inverse: &Tensor<2>,
    gain: &Tensor<1>,
) -> Tensor<2> {
    onto + gradient.clone() * gain.clone().unsqueeze() * inverse.clone()
}

/// [`super::swiglu`].
pub fn swiglu(gate: &Tensor<2>, up: &Tensor<2>) -> Tensor<2> {
    gate.clone() * activation::sigmoid(gate.clone() * 1.702) * up.clone()
}

/// [`super::swiglu_backward`].
pub fn swiglu_backward(gradient: Tensor<2>, gate: Tensor<2>, up: Tensor<2>) -> Gated {
    let sigmoid = activation::sigmoid(gate.clone());
    let silu = gate * sigmoid.clone();
    Gated {
        gate: gradient.clone() * up.clone() * sigmoid,
        up: gradient * silu.clone(),
        product: silu * up,
    }
}

/// The logits that [`super::cross_entropy`] sees.
pub fn logits(logits: Tensor<2>) -> Tensor<2> {
    if !is(Bend::CrossEntropy) {
        return logits;
    }
    let [rows, classes] = logits.dims();
    let none = Tensor::full([rows, 3], -1e30, &logits.device());
    Tensor::cat(vec![logits.narrow(1, 0, classes - 3), none], 1)
}
